"""Functions that ranks run in the distributed tests; a rank imports them by name, so they are in no test module."""

import ctypes
import gc
import multiprocessing
import os
import resource
import signal
import threading
import time
import weakref
from collections import defaultdict
from collections.abc import Callable
from dataclasses import replace
from functools import lru_cache
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor

from data_pipelines.loader.reader import SampleReader
from data_pipelines.planner.planner import Planner
from emma_train.checkpoint.saver import Saver
from emma_train.checkpoint.state import checkpoint_state
from emma_train.cli import main
from emma_train.config.load import as_dict
from emma_train.config.schema import AutoencoderConfig, Recipe
from emma_train.engine.flat_shard import local, local_chunks
from emma_train.engine.grad_norm import global_norm
from emma_train.engine.lockstep import OutOfStep
from emma_train.engine.protocol import Engine
from emma_train.engine.world import World, join
from emma_train.model.autoencoder import Autoencoder
from emma_train.model.parameter_groups import group_of
from emma_train.objectives.loss import Counts, LossAccumulator, count, losses
from emma_train.sequence import seeds
from emma_train.sequence.layout import TextSegment
from emma_train.sequence.pack import PackedBatch, Sample, pack
from emma_train.sequence.step_batches import StepBatches
from emma_train.sequence.tasks import TASKS
from emma_train.sequence.tokens import TextTokenizer
from emma_train.stages.stage import stage_of
from emma_train.storage.safetensors_io import Tensors
from emma_train.training.build import TrainingParts, build, set_initial
from emma_train.training.forward import micro_loss
from emma_train.training.loop import Trainer
from tests.distributed.failing import shorten_waits
from tests.helpers import tiny_recipe

Result = TypeVar("Result")


def command(argv: list[str]) -> int:
    """An emma-train command in this process."""
    return main(argv)


def command_with_old_seeds(argv: list[str]) -> int:
    """`generate` with the seeds of version 0.1.0, which did not depend on the prompt."""
    seed_of = seeds.seed_of
    seeds.seed_of = lambda seed, epoch, key, what: seed_of(seed, epoch, key.split()[0], what)
    return main(argv)


def stopped_command(argv: list[str], step: int) -> int:
    """A command whose last rank is asked to stop during an optimizer step."""
    take = Trainer._step

    def asked_to_stop(self: Trainer, data: StepBatches, stop_asked: bool, log_now: bool) -> Any:
        stop_here = data.step == step and self.world.rank == self.world.size - 1
        return take(self, data, stop_asked or stop_here, log_now)

    Trainer._step = asked_to_stop  # type: ignore[method-assign]
    return main(argv)


def full_disk_command(argv: list[str], num_bytes: int) -> int:
    """A command for which no file may grow beyond `num_bytes`."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (num_bytes, num_bytes))
    return main(argv)


def loaded(recipe: Recipe) -> dict[str, Any]:
    """Full weights after the start of a stage, and how many values this rank read and holds."""
    count, read = 0, Tensors.read

    def counted(self: Tensors, name: str, slices: tuple[slice, ...] = ()) -> Tensor:
        nonlocal count
        part = read(self, name, slices)
        count += part.numel()
        return part

    Tensors.read = counted  # type: ignore[method-assign]
    with join("cpu", 60) as world:
        sharded = build(recipe, stage_of(recipe), world, resuming=False).engine.weights
        weights = {name: full_tensor(weight) for name, weight in sharded.items()}
    return {"weights": weights, "read": count, "held": sum(local(weight).numel() for weight in sharded.values())}


def write_checkpoint(run: Path, recipe: Recipe) -> int:
    """A run folder with a checkpoint of its start; returns the bytes of the model."""
    with join("cpu", 60) as world:
        built = build(recipe, stage_of(recipe), world, resuming=False)
        meta = {"step": 1, "stage": recipe.stage.name, "config": as_dict(recipe)}
        (run / "checkpoints").mkdir(parents=True)
        saver = Saver(run / "checkpoints", recipe.train, world, timeout_s=60)
        saver.start(checkpoint_state(built.engine, {}), meta)
        saver.finish_last(lambda: None)
        return sum(p.numel() * 4 for p in built.engine.model.parameters())


def command_memory(warm_up: list[str], argv: list[str]) -> int:
    """Peak memory in bytes of a command, in a process that has run another one before."""
    assert main(warm_up) == 0
    code, peak = peak_memory(lambda: main(argv))
    assert code == 0
    return peak


def start_memory(warm_up: Recipe, recipe: Recipe) -> tuple[int, int]:
    """Peak memory in bytes of the start of a stage on this rank, and the bytes of the rank's shards."""
    with join("cpu", 60) as world:
        build(warm_up, stage_of(warm_up), world, resuming=False)
        built, peak = peak_memory(lambda: build(recipe, stage_of(recipe), world, resuming=False))
        return peak, sum(local(weight).nbytes for weight in built.engine.weights.values())


def peak_memory(function: Callable[[], Result]) -> tuple[Result, int]:
    """The value of a function, and its peak memory in bytes (mapped files do not count)."""

    def anonymous() -> int:
        line = next(s for s in Path("/proc/self/status").read_text().splitlines() if s.startswith("RssAnon"))
        return int(line.split()[1]) * 1024

    before, peak, done = anonymous(), 0, threading.Event()

    def watch() -> None:
        nonlocal peak
        while not done.wait(0.001):
            peak = max(peak, anonymous())

    watcher = threading.Thread(target=watch)
    watcher.start()
    result = function()
    peak = max(peak, anonymous())
    done.set()
    watcher.join()
    return result, max(0, peak - before)


def one_step(recipe: Recipe, kinds: list[str], seeded: bool = False) -> dict[str, Any]:
    """Loss, gradient norm and full gradients of one step over packs of the given kinds, which the ranks take in turn.

    `seeded` starts a stage from the seed that otherwise follows another.
    """
    with join("cpu", 60) as world:
        built = build(recipe, stage_of(recipe), world, resuming=seeded)
        if seeded:
            set_initial(built.engine.weights, recipe.model, list(built.engine.weights))
            built.engine.sync_compute_weights()
        _wake_up(built)
        packs = [make_pack(recipe, kind) for kind in kinds[world.rank :: world.size]]
        return step_of(recipe, world, built, packs)


def step_of(
    recipe: Recipe, world: World, built: TrainingParts, packs: list[PackedBatch], lr: float = 0.0, factor: float = 1.0
) -> dict[str, Any]:
    """One step as the loop does it; with lr 0 the weights stay. `factor` multiplies this rank's loss."""
    stage, engine = stage_of(recipe), built.engine
    num_local = count(packs, stage.loss)
    totals = world.sum(list(num_local.by_task.values()))
    counts = Counts({task: int(n) for task, n in zip(TASKS, totals, strict=True)})
    accumulator = LossAccumulator(recipe.loss, counts, world.device)
    for index, batch in enumerate(packs):
        loss = micro_loss(
            engine.model, _autoencoder(recipe.model.autoencoder.path), batch, recipe.flow, stage, accumulator
        )
        engine.accumulate(loss * factor, last=index == len(packs) - 1)
    gradients = {name: full_tensor(p.grad) for name, p in engine.weights.items() if p.grad is not None}
    norm = engine.step(lr)
    return {**losses(world.sum(accumulator.sums.tolist()), counts, recipe.loss), "norm": norm, "gradients": gradients}


@lru_cache(maxsize=1)
def _autoencoder(path: str) -> Autoencoder:
    return Autoencoder(AutoencoderConfig(path), torch.device("cpu"))


def make_pack(recipe: Recipe, kind: str) -> PackedBatch:
    """A pack of a few real samples: i2t, t2i, it2i, mixed, silent (nothing supervised) or text (no image at all)."""
    if kind == "text":
        return pack([Sample("text", "i2t", [TextSegment((5, 6, 7)), TextSegment((8, 9), supervised=True)], {})])
    tokenizer, vision = TextTokenizer(recipe.data.tokenizer, recipe.data.template), recipe.model.vision
    reader = SampleReader(recipe.data, tokenizer, vision.patch, vision.shuffle, None)
    wanted = ("i2t", "t2i", "it2i") if kind == "mixed" else ("i2t",) if kind == "silent" else (kind,)
    planned = [sample for slot in Planner(recipe, tokenizer).plan(1).slots for sample in slot]
    samples = [reader.read(p) for task in wanted for p in [p for p in planned if p.task == task][:2]]
    if kind == "silent":
        for sample in samples:
            sample.segments = [TextSegment(s.ids) if isinstance(s, TextSegment) else s for s in sample.segments]
    return pack(samples)


def _wake_up(built: TrainingParts) -> None:
    """The velocity head starts at zero, which makes the gradients of everything before it zero."""
    for name, weight in built.engine.weights.items():
        if name.startswith("velocity_head."):
            local(weight).fill_(0.02)
    built.engine.sync_compute_weights()


def full_tensor(tensor: Tensor) -> Tensor:
    """The full tensor, put together from the parts of all ranks."""
    result = torch.zeros(tensor.shape, dtype=tensor.dtype)
    parts: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(parts, [(index, values.detach().cpu()) for index, values in local_chunks(tensor)])
    for index, values in (piece for part in parts for piece in part):
        result[index] = values
    return result


def stream_steps(recipe: Recipe, rank: int, size: int, last: int) -> list[Any]:
    """Steps 1 to `last` of a rank's stream, in a process that may start worker processes."""
    from data_pipelines.loader.loader import Stream
    from emma_train.model.autoencoder import fingerprint

    stream = Stream(recipe, rank, size, fingerprint(Path(recipe.model.autoencoder.path)))
    return list(stream.steps(1, last))


def stream_memory(recipe: Recipe, steps: list[int]) -> list[dict[str, int]]:
    """Resident bytes of the trainer and of each loader worker after the given steps of a stream, once what was read
    ahead has arrived."""
    from data_pipelines.loader.loader import Stream

    sizes = []
    for data in Stream(recipe, 0, 1, None).steps(1, steps[-1] + 20):
        if data.step in steps:
            time.sleep(3)
            processes = [("trainer", os.getpid()), *((w.name, w.pid) for w in multiprocessing.active_children())]
            sizes.append({name: _resident(pid) for name, pid in processes if pid is not None})
        if data.step == steps[-1]:
            break
    return sizes


def _resident(pid: int) -> int:
    line = next(s for s in Path(f"/proc/{pid}/status").read_text().splitlines() if s.startswith("VmRSS"))
    return int(line.split()[1]) * 1024


def steps_with_poison(recipe: Recipe, kinds: list[str], poisoned: int | None) -> dict[str, Any]:
    """Three steps; the gradients of step `poisoned` are not finite on the last rank. Norms, whether that step changed
    anything, and full weights at the end."""
    with join("cpu", 60) as world:
        built = build(recipe, stage_of(recipe), world, resuming=True)
        engine = built.engine
        set_initial(engine.weights, recipe.model, list(engine.weights))
        engine.sync_compute_weights()
        packs = [make_pack(recipe, kind) for kind in kinds[world.rank :: world.size]]
        norms, moved = [], None
        for step in range(3):
            before = [local(t).clone() for part in engine.state().values() for t in part.values()]
            bad = step == poisoned and world.rank == world.size - 1
            norms.append(step_of(recipe, world, built, packs, lr=1e-3, factor=float("nan") if bad else 1.0)["norm"])
            after = [local(t) for part in engine.state().values() for t in part.values()]
            if step == poisoned:
                moved = not all(torch.equal(a, b) for a, b in zip(before, after, strict=True))
        return {"norms": norms, "moved": moved, "weights": {n: full_tensor(w) for n, w in engine.weights.items()}}


def live_tensors(recipe: Recipe, kinds: list[str], steps: int) -> list[int]:
    """Number of live tensors after every tenth step, without garbage collection."""
    with join("cpu", 60) as world:
        built = build(recipe, stage_of(recipe), world, resuming=True)
        set_initial(built.engine.weights, recipe.model, list(built.engine.weights))
        built.engine.sync_compute_weights()
        packs = [make_pack(recipe, kind) for kind in kinds[world.rank :: world.size]]
        counts = []
        gc.disable()
        for step in range(1, steps + 1):
            step_of(recipe, world, built, packs, lr=1e-3)
            if built.ema is not None:
                built.ema.update()
            if step % 10 == 0:
                counts.append(sum(issubclass(type(thing), Tensor) for thing in gc.get_objects()))
        return counts


def models_left(recipe: Recipe, kinds: list[str]) -> int:
    """Number of tensors of a stage's model and optimizer that are alive after the next stage was built."""
    with join("cpu", 60) as world:
        left: list[Any] = []
        for _ in range(2):
            built = build(recipe, stage_of(recipe), world, resuming=True)
            if left:
                break
            set_initial(built.engine.weights, recipe.model, list(built.engine.weights))
            built.engine.sync_compute_weights()
            packs = [make_pack(recipe, kind) for kind in kinds[world.rank :: world.size]]
            step_of(recipe, world, built, packs, lr=1e-3)
            state = built.engine.state()
            storages = [local(t) for part in state.values() for t in part.values()]
            left = [weakref.ref(t.untyped_storage()) for t in (*storages, *built.engine.model.parameters())]
            built.engine.close()
            del built, state, storages
        return sum(reference() is not None for reference in left)


def gathered_gen(recipe: Recipe) -> dict[str, set[bool]]:
    """By branch: whether its layers are gathered on this rank after a forward pass that reshards nothing."""
    with join("cpu", 60) as world:
        built = build(recipe, stage_of(recipe), world, resuming=True)
        set_initial(built.engine.weights, recipe.model, list(built.engine.weights))
        built.engine.sync_compute_weights()
        batch, stage = make_pack(recipe, "i2t"), stage_of(recipe)
        accumulator = LossAccumulator(recipe.loss, count([batch], stage.loss), world.device)
        micro_loss(
            built.engine.model, _autoencoder(recipe.model.autoencoder.path), batch, recipe.flow, stage, accumulator
        )
        gathered: dict[str, set[bool]] = {"und": set(), "gen": set()}
        for name, parameter in built.engine.model.named_parameters():
            for branch, whole_ones in gathered.items():
                if name.startswith("decoder.layers.") and f".{branch}." in name:
                    whole_ones.add(not isinstance(parameter, DTensor))
        return gathered


def norm_over_meshes() -> tuple[float, float]:
    """The norm of tensors on three meshes of four ranks, and the norm that one process computes."""
    with join("cpu", 60):
        meshes = [
            init_device_mesh("cpu", (4,), mesh_dim_names=("shard",)),
            init_device_mesh("cpu", (2, 2), mesh_dim_names=("replicate", "shard")),
            init_device_mesh("cpu", (4, 1), mesh_dim_names=("replicate", "shard")),
        ]
        generator = torch.Generator().manual_seed(0)
        tensors = [torch.randn(7, 3, generator=generator) for _ in meshes for _ in range(2)]
        spread = [
            distribute_tensor(tensor, mesh, [*[Replicate()] * (mesh.ndim - 1), Shard(0)])
            for tensor, mesh in zip(tensors, meshes * 2, strict=True)
        ]
        named = {f"decoder.{number}": tensor for number, tensor in enumerate(spread)}
        return global_norm(named), float(torch.cat([t.flatten() for t in tensors]).double().norm())


def spread(recipe: Recipe) -> dict[str, float]:
    """By parameter group, and for the decoder's layers: the share of its values that this rank holds."""
    with join("cpu", 60) as world:
        weights = build(recipe, stage_of(recipe), world, resuming=True).engine.weights
        num_local: dict[str, int] = defaultdict(int)
        num_total: dict[str, int] = defaultdict(int)
        for name, weight in weights.items():
            groups = [group_of(name), *(["layers"] if name.startswith("decoder.layers.") else [])]
            for group in groups:
                num_local[group] += local(weight).numel()
                num_total[group] += weight.numel()
        return {group: num_local[group] / num_total[group] for group in num_total}


def end_in_step(argv: list[str], victim: int, step: int, how: str) -> None:
    """A training command in which rank `victim` is killed, stopped, fails or hangs in a step; exits with its code."""
    plain = Trainer._step

    def ending(self: Trainer, data: StepBatches, *rest: Any) -> Any:
        if self.world.rank == victim and data.step == step:
            if how == "killed":
                os.kill(os.getpid(), signal.SIGKILL)
            if how == "stopped":
                os.kill(os.getpid(), signal.SIGSTOP)
            if how == "failed":
                raise ValueError("a bad day")
            time.sleep(60)
        return plain(self, data, *rest)

    Trainer._step = ending  # type: ignore[method-assign]
    shorten_waits()
    raise SystemExit(main(argv))


def training_memory(recipe: Recipe, kinds: list[str]) -> tuple[int, int]:
    """Peak memory in bytes of this rank over three steps of a stage, and the tokens of its longest pack."""
    # Return large blocks to the system when they are freed: holes in the heap would count as memory.
    ctypes.CDLL(None).mallopt(-3, 1 << 16)
    with join("cpu", 60) as world:
        packs, stage = [make_pack(recipe, kind) for kind in kinds[world.rank :: world.size]], stage_of(recipe)

        def train(recipe: Recipe, steps: int) -> Engine:
            built = build(recipe, stage, world, resuming=True)
            for weight in built.engine.weights.values():
                local(weight).normal_(std=0.02)
            built.engine.sync_compute_weights()
            for _ in range(steps):
                accumulator = LossAccumulator(recipe.loss, count(packs, stage.loss), world.device)
                for index, batch in enumerate(packs):
                    autoencoder = _autoencoder(recipe.model.autoencoder.path)
                    loss = micro_loss(built.engine.model, autoencoder, batch, recipe.flow, stage, accumulator)
                    built.engine.accumulate(loss, last=index == len(packs) - 1)
                    del loss
                built.engine.step(1e-4)
                if built.ema is not None:
                    built.ema.update()
            return built.engine

        small = replace(recipe, model=tiny_recipe(recipe.stage.name).model)
        train(small, 1).close()
        gc.collect()
        _, peak = peak_memory(lambda: train(recipe, 3))
        return peak, max(batch.num_tokens for batch in packs)


def out_of_step(recipe: Recipe, victim: int) -> str:
    """The error message of this rank when rank `victim` runs another module than the others."""
    with join("cpu", 60) as world:
        built = build(recipe, stage_of(recipe), world, resuming=True)
        set_initial(built.engine.weights, recipe.model, list(built.engine.weights))
        built.engine.sync_compute_weights()
        batch = make_pack(recipe, "i2t")
        if world.rank == victim:
            vision = built.engine.model.vision
            vision.layers[1].forward = lambda x, lengths: vision.post_layernorm(x)
        try:
            step_of(recipe, world, built, [batch])
        except OutOfStep as error:
            return str(error)
        return ""
