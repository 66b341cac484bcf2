"""What ranks do in the distributed tests. Here, and not in a test module, because a rank finds its function by name."""

import multiprocessing
import os
import resource
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from data_pipelines.stream.plan import Planner
from data_pipelines.stream.reader import Reader
from emma_train.checkpoint.saver import Saver
from emma_train.checkpoint.state import state_of
from emma_train.checkpoint.tensors import Tensors
from emma_train.cli import main
from emma_train.config.load import as_dict
from emma_train.config.schema import Recipe
from emma_train.engine.world import World, join
from emma_train.model.autoencoder import Autoencoder
from emma_train.objectives.account import Counts, LossAccount, count, losses
from emma_train.sequence.layout import Text
from emma_train.sequence.pack import PackedBatch, Sample, pack
from emma_train.sequence.step import StepBatches
from emma_train.sequence.tokens import TextTokenizer
from emma_train.stages.stage import stage_of
from emma_train.training.build import Built, build, set_initial
from emma_train.training.forward import micro_loss
from emma_train.training.loop import Trainer

Result = TypeVar("Result")


def command(argv: list[str]) -> int:
    """An emma-train command in this process."""
    return main(argv)


def stopped_command(argv: list[str], step: int) -> int:
    """A command whose last rank is asked to stop during an optimizer step."""
    take = Trainer._step

    def asked_to_stop(self: Trainer, data: StepBatches, stop_asked: bool, log_now: bool) -> Any:
        mine = data.step == step and self.world.rank == self.world.size - 1
        return take(self, data, stop_asked or mine, log_now)

    Trainer._step = asked_to_stop  # type: ignore[method-assign]
    return main(argv)


def full_disk_command(argv: list[str], num_bytes: int) -> int:
    """A command for which no file may grow beyond so many bytes."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (num_bytes, num_bytes))
    return main(argv)


def loaded(recipe: Recipe) -> dict[str, Any]:
    """Whole weights after the start of a stage, and how many values this rank read and holds."""
    count, read = 0, Tensors.read

    def counted(self: Tensors, name: str, place: tuple[slice, ...] = ()) -> Tensor:
        nonlocal count
        part = read(self, name, place)
        count += part.numel()
        return part

    Tensors.read = counted  # type: ignore[method-assign]
    with join("cpu", 60) as world:
        model = build(recipe, stage_of(recipe), world, resuming=False).engine.model
        own = [p.to_local() if isinstance(p, DTensor) else p for p in model.parameters()]
        weights = {name: _whole(p.detach()) for name, p in model.named_parameters()}
    return {"weights": weights, "read": count, "held": sum(p.numel() for p in own)}


def write_checkpoint(run: Path, recipe: Recipe) -> int:
    """A run folder with a checkpoint of its start; returns the bytes of the model."""
    with join("cpu", 60) as world:
        built = build(recipe, stage_of(recipe), world, resuming=False)
        meta = {"step": 1, "stage": recipe.stage.name, "config": as_dict(recipe)}
        saver = Saver(run / "checkpoints", recipe.train, world, timeout_s=60)
        saver.start(state_of(built.engine.model, built.engine.optimizer, {}), meta)
        saver.finish_last(lambda: None)
        return sum(p.numel() * 4 for p in built.engine.model.parameters())


def command_memory(warm_up: list[str], argv: list[str]) -> int:
    """Memory that a command takes at most, in a process that has run another."""
    assert main(warm_up) == 0
    code, peak = peak_memory(lambda: main(argv))
    assert code == 0
    return peak


def start_memory(warm_up: Recipe, recipe: Recipe) -> tuple[int, int]:
    """Memory that the start of a stage takes on this rank at most, and the bytes of the rank's shards."""
    with join("cpu", 60) as world:
        build(warm_up, stage_of(warm_up), world, resuming=False)
        built, peak = peak_memory(lambda: build(recipe, stage_of(recipe), world, resuming=False))
        own = [p.to_local() if isinstance(p, DTensor) else p for p in built.engine.model.parameters()]
        return peak, sum(p.nbytes for p in own)


def peak_memory(function: Callable[[], Result]) -> tuple[Result, int]:
    """What a function gives, and the bytes of memory of its own (not mapped files) that it takes at most."""

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
    """Loss, gradient norm and whole gradients of one step over packs of the given kinds, dealt to the ranks in turn.

    `seeded` starts a stage from the seed that otherwise follows another.
    """
    with join("cpu", 60) as world:
        built = build(recipe, stage_of(recipe), world, resuming=seeded)
        if seeded:
            set_initial(built.engine.model, recipe.model, [name for name, _ in built.engine.model.named_parameters()])
        _wake_up(built)
        mine = [make_pack(recipe, kind) for kind in kinds[world.rank :: world.size]]
        return step_of(recipe, world, built, mine)


def step_of(recipe: Recipe, world: World, built: Built, packs: list[PackedBatch]) -> dict[str, Any]:
    """What the loop does in a step, without the update."""
    stage, engine = stage_of(recipe), built.engine
    mine = count(packs, stage.loss)
    counts = Counts(*(int(n) for n in world.sum([mine.i2t, mine.t2i, mine.it2i])))
    account = LossAccount(recipe.loss, counts, world.device)
    autoencoder = Autoencoder(recipe.model.autoencoder, world.device)
    for index, batch in enumerate(packs):
        loss = micro_loss(engine.model, autoencoder, batch, recipe.flow, stage, account)
        engine.accumulate(loss, last=index == len(packs) - 1)
    gradients = {name: _whole(p.grad) for name, p in engine.model.named_parameters() if p.grad is not None}
    norm = engine.clip(0.0)
    return {**losses(world.sum(account.sums.tolist()), counts, recipe.loss), "norm": norm, "gradients": gradients}


def make_pack(recipe: Recipe, kind: str) -> PackedBatch:
    """A pack of a few real samples: i2t, t2i, it2i, mixed, silent (nothing supervised) or text (no picture at all)."""
    if kind == "text":
        return pack([Sample("text", "i2t", [Text((5, 6, 7)), Text((8, 9), supervised=True)], {})])
    tokenizer, vision = TextTokenizer(recipe.data.tokenizer), recipe.model.vision
    reader = Reader(recipe.data, tokenizer, vision.patch, vision.shuffle, None)
    wanted = ("i2t", "t2i", "it2i") if kind == "mixed" else ("i2t",) if kind == "silent" else (kind,)
    planned = [sample for slot in Planner(recipe, tokenizer).plan(1).slots for sample in slot]
    samples = [reader.read(p) for task in wanted for p in [p for p in planned if p.task == task][:2]]
    if kind == "silent":
        for sample in samples:
            sample.segments = [Text(s.ids) if isinstance(s, Text) else s for s in sample.segments]
    return pack(samples)


def _wake_up(built: Built) -> None:
    """The velocity head starts at zero and would hide every gradient behind it."""
    with torch.no_grad():
        for name, parameter in built.engine.model.named_parameters():
            if name.startswith("velocity_head."):
                parameter.fill_(0.02)


def _whole(tensor: Tensor) -> Tensor:
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor.clone()


def stream_steps(recipe: Recipe, rank: int, size: int, last: int) -> list[Any]:
    """The steps 1 to `last` of a rank's stream, for worker processes that a test must not fork from itself."""
    from data_pipelines.stream.loader import Stream
    from emma_train.model.autoencoder import fingerprint

    stream = Stream(recipe, rank, size, fingerprint(Path(recipe.model.autoencoder.path)))
    return list(stream.steps(1, last))


def stream_memory(recipe: Recipe, steps: list[int]) -> list[dict[str, int]]:
    """Resident bytes of the trainer and of each loader worker after the given steps of a stream, once what was read
    ahead has arrived."""
    from data_pipelines.stream.loader import Stream

    found = []
    for data in Stream(recipe, 0, 1, None).steps(1, steps[-1] + 20):
        if data.step in steps:
            time.sleep(3)
            mine = [("trainer", os.getpid()), *((w.name, w.pid) for w in multiprocessing.active_children())]
            found.append({name: _resident(pid) for name, pid in mine if pid is not None})
        if data.step == steps[-1]:
            break
    return found


def _resident(pid: int) -> int:
    line = next(s for s in Path(f"/proc/{pid}/status").read_text().splitlines() if s.startswith("VmRSS"))
    return int(line.split()[1]) * 1024
