"""One setting of the step benchmark (step.py): whole optimizer steps of a stage, measured in a process of its own."""

import statistics
import time
import warnings
from collections import Counter
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import torch
import torch._inductor.config

from data_pipelines.loader.pack_buffer import PackBuffer
from emma_train.config.load import load_recipe
from emma_train.config.schema import Recipe
from emma_train.engine.compiled import num_graphs
from emma_train.engine.flat_shard import local
from emma_train.engine.world import World, join
from emma_train.flops.formulas import mfu
from emma_train.flops.work import module_flops, pack_work
from emma_train.model.autoencoder import Autoencoder
from emma_train.model.varlen import kernel_name
from emma_train.objectives.loss import LossAccumulator, count, losses
from emma_train.plan.arithmetic import Plan
from emma_train.plan.cards import GIB
from emma_train.plan.samples import MeanSample, StepLoad
from emma_train.sequence.layout import ImageRole, ImageSegment, TextSegment
from emma_train.sequence.pack import PackedBatch, Sample, pack
from emma_train.stages.stage import Stage, stage_of
from emma_train.training.build import TrainingParts, build
from emma_train.training.forward import micro_loss
from tests.gpu.kernel_time import profile
from tests.gpu.stage_packs import SHAPES, PackShape, samples_of_pack

ROOT = Path(__file__).parents[2]
CACHED_LATENTS = cast(Autoencoder, SimpleNamespace(scale=0.41407))
"""Stands for DC-AE: where latents are cached only its scale is used, here that of dc-ae-f32c32-sana-1.0."""
TINY = {
    "model.decoder": {"hidden": 64, "heads": 4, "kv_heads": 2, "head_dim": 16, "intermediate_size": 128, "vocab": 1024},
    "model.vision": {"hidden": 48, "heads": 2, "num_layers": 4, "intermediate_size": 64, "position_grid": 8},
    "model": {"time_features": 16},
}
"""Sizes for a run that proves the script, not the speed."""


@dataclass(frozen=True)
class Setting:
    """How one measurement runs."""

    name: str
    compile: bool = True
    backend: str = "flash"
    depth: float = 1.0
    """Decoder layers, over those that fit the card."""
    stage: str = "stage1"
    times: float = 1.0
    """Samples of a pack, over those of the recipe: 8 understanding and 8 generation samples, about 6.1 k tokens."""
    tokenwise: bool = False
    """Whether an image to make has a token for each 16 pixels, as behind an 8x autoencoder with patches of 2 (BAGEL),
    not for each 32."""
    padded: bool = False
    """Whether it is the baseline (padded.py) that runs: a padded batch through modules of Hugging Face."""
    from_shards: bool = False
    """Whether `emma-train train` runs, on shards (from_shards.py)."""
    deterministic: bool = False
    """Whether torch.compile chooses kernels without timing them, so that every start has the same."""
    profile: bool = False
    """Whether to write torch's profile of one step."""
    changes: tuple[str, ...] = ()
    """What the recipe's values are changed to."""


@dataclass(frozen=True)
class Scale:
    """What all settings of a run share."""

    device: str
    tiny: bool
    num_layers: int
    micro_steps: int
    num_steps: int


def measure(setting: Setting, scale: Scale, out: Path) -> dict[str, Any]:
    """Build the model, run the steps, and return what they took."""
    recipe = make_recipe(setting, scale)
    stage = stage_of(recipe)
    if setting.deterministic:
        torch._inductor.config.deterministic = True
    with join(scale.device, 600) as world:
        started = time.perf_counter()
        parts = build(recipe, stage, world, resuming=True)
        set_random_weights(parts)
        samples = make_samples(recipe, setting, scale)
        packs = make_packs(samples, pin=world.device.type == "cuda")
        step = Step(recipe, stage, world, parts, packs)
        build_s = time.perf_counter() - started
        first_s, first_loss = step.timed()
        graphs = num_graphs()
        for _ in range(2):
            step.timed()
        reset_memory(world.device)
        timed = [step.timed() for _ in range(scale.num_steps)]
        seconds = statistics.median(s for s, _ in timed)
        values = {
            **asdict(setting),
            "num_layers": recipe.model.decoder.num_layers,
            "parameters": parts.num_parameters,
            "tokens_per_micro_step": sum(batch.num_tokens for batch in packs) / len(packs),
            "labels_per_micro_step": sum(len(batch.labels) for batch in packs) / len(packs),
            "micro_steps": len(packs),
            "build_s": build_s,
            "first_step_s": first_s,
            "step_s": seconds,
            "step_s_min": min(s for s, _ in timed),
            "step_s_max": max(s for s, _ in timed),
            "samples_per_s": sum(len(batch.keys) for batch in packs) / seconds,
            "tokens_per_s": sum(batch.num_tokens for batch in packs) / seconds,
            "first_loss": first_loss,
            "last_loss": timed[-1][1],
            "graphs": graphs,
            "graphs_after_first_step": num_graphs() - graphs,
            "kernels": {
                head_dim: kernel_name(world.device, head_dim)
                for head_dim in (recipe.model.vision.hidden // recipe.model.vision.heads, recipe.model.decoder.head_dim)
                if setting.backend == "flash"
            },
            "planned_gib": planned_bytes(recipe, samples) / GIB,
            **memory(world.device),
            **utilisation(recipe, stage, packs, seconds, world.device),
        }
        values["optimizer_s"] = step.optimizer_seconds()
        try:
            values["waits_for_device"] = waits_for_device(step.run, world.device)
            if setting.profile:
                profiled = profile(step.run)
                values |= {"num_kernels": profiled.count, "ms_of_part": profiled.ms_of_part}
                (out / f"profile-{setting.name}.txt").write_text(profiled.table)
        except RuntimeError as error:  # extras, which may be out of reach on a rented machine
            values["warning"] = str(error)
        return values


def make_recipe(setting: Setting, scale: Scale) -> Recipe:
    """A stage of EMMA-4B at a depth that fits one card; or tiny."""
    return load_recipe(recipe_path(setting), changes_of(setting, scale))


def recipe_path(setting: Setting) -> Path:
    """The file of the stage that a setting measures."""
    return ROOT / "recipes" / "emma-4b" / f"{setting.stage}.yaml"


def changes_of(setting: Setting, scale: Scale) -> list[str]:
    """KEY=VALUE of what differs from the stage's file."""
    num_layers = max(2, round(scale.num_layers * setting.depth / 2) * 2)
    values: dict[str, Any] = {
        "model.decoder.num_layers": num_layers,
        "model.decoder.num_shared_layers": num_layers // 2,
        "engine.device": scale.device,
        "engine.compile": str(setting.compile).lower(),
        "attention.backend": "auto" if scale.device == "cpu" and setting.backend == "flash" else setting.backend,
        "init.from": "null",
    }
    if scale.tiny:
        values |= {f"{section}.{key}": value for section, sizes in TINY.items() for key, value in sizes.items()}
    return [*(f"{key}={value}" for key, value in values.items()), *setting.changes]


@torch.no_grad()
def set_random_weights(parts: TrainingParts) -> None:
    """Norms are 1, biases 0, the rest small and random, the same in every setting of a depth, whose losses can be
    compared; made on the device, where it takes no time."""
    torch.manual_seed(0)
    for name, weight in parts.engine.weights.items():
        values = local(weight)
        if name.endswith("bias"):
            values.zero_()
        elif "norm" in name:
            values.fill_(1.0)
        else:
            values.normal_(std=0.02)
    parts.engine.sync_compute_weights()


def make_samples(recipe: Recipe, setting: Setting, scale: Scale) -> list[list[Sample]]:
    """The samples of each micro-step: texts of several lengths, so that no two packs have equally many tokens."""
    rng, shape = np.random.default_rng(0), SHAPES[setting.stage]
    if scale.tiny:
        shape = PackShape(shape.samples, shape.side // 4)
    return [
        samples_of_pack(recipe, str(number), shape, rng, setting.times, setting.tokenwise)
        for number in range(scale.micro_steps)
    ]


def make_packs(samples: list[list[Sample]], pin: bool) -> list[PackedBatch]:
    """Packs of these samples, in pinned memory for a GPU."""
    packs = [pack(of_pack) for of_pack in samples]
    return [PackBuffer.of(batch).pin_memory().batch() for batch in packs] if pin else packs


def planned_bytes(recipe: Recipe, samples: list[list[Sample]]) -> float:
    """What `emma-train plan` expects of a GPU that has these packs, of the longest one, without an autoencoder."""
    plan = Plan(recipe, "", 1, "h100-80g")  # memory does not depend on the kind of GPU
    load = load_of(plan.loads[-1], [sample for of_pack in samples for sample in of_pack])
    longest = max(sum(sample.num_tokens for sample in of_pack) for of_pack in samples)
    return sum(size for name, size in plan.memory(load, 1, longest).kept.items() if "autoencoder" not in name)


def load_of(assumed: StepLoad, samples: list[Sample]) -> StepLoad:
    """The load of a step of these samples."""

    def tokens(sample: Sample, *roles: ImageRole) -> int:
        images = [s for s in sample.segments if isinstance(s, ImageSegment) and s.role in roles]
        return sum(sample.segment_tokens(image) for image in images)

    def mean(of_task: list[Sample]) -> MeanSample:
        texts = [s for sample in of_task for s in sample.segments if isinstance(s, TextSegment)]
        seen = sum(tokens(sample, ImageRole.UND, ImageRole.REFERENCE) for sample in of_task) / len(of_task)
        return MeanSample(
            text=sum(len(text.ids) for text in texts) / len(of_task),
            supervised=sum(len(text.ids) for text in texts if text.supervised) / len(of_task),
            seen=seen,
            images_seen=float(seen > 0),
            made=sum(tokens(sample, ImageRole.TARGET) for sample in of_task) / len(of_task),
            measured=True,
        )

    by_task: dict[str, list[Sample]] = {}
    for sample in samples:
        by_task.setdefault(sample.task, []).append(sample)
    counts = {task: len(of_task) for task, of_task in by_task.items()}
    return StepLoad(assumed.phase, counts, {task: mean(of_task) for task, of_task in by_task.items()})


class Step:
    """An optimizer step over the same packs, as the training loop runs it."""

    def __init__(
        self, recipe: Recipe, stage: Stage, world: World, parts: TrainingParts, packs: list[PackedBatch]
    ) -> None:
        self._recipe, self._stage, self._world, self._parts, self._packs = recipe, stage, world, parts, packs
        self._counts = count(packs, stage.loss)

    def run(self) -> float:
        """One step; returns its loss."""
        accumulator = self._accumulate()
        self._update()
        return losses(accumulator.sums.tolist(), self._counts, self._recipe.loss)["loss"]

    def timed(self) -> tuple[float, float]:
        """Seconds and loss of one step."""
        wait(self._world.device)
        started = time.perf_counter()
        loss = self.run()
        wait(self._world.device)
        return time.perf_counter() - started, loss

    def optimizer_seconds(self) -> float:
        """Seconds of norm, clipping, AdamW and averages, which one step has once."""
        self._accumulate()
        wait(self._world.device)
        started = time.perf_counter()
        self._update()
        wait(self._world.device)
        return time.perf_counter() - started

    def _accumulate(self) -> LossAccumulator:
        accumulator = LossAccumulator(self._recipe.loss, self._counts, self._world.device)
        for index, host_batch in enumerate(self._packs):
            batch = host_batch.to(self._world.device)
            loss = micro_loss(
                self._parts.engine.model, CACHED_LATENTS, batch, self._recipe.flow, self._stage, accumulator
            )
            self._parts.engine.accumulate(loss, last=index == len(self._packs) - 1)
        return accumulator

    def _update(self) -> None:
        self._parts.engine.step(self._recipe.optimizer.lr)
        if self._parts.ema is not None:
            self._parts.ema.update()


def utilisation(
    recipe: Recipe, stage: Stage, packs: list[PackedBatch], seconds: float, device: torch.device
) -> dict[str, Any]:
    """Useful FLOPs of the step, and their share of the card's dense bf16 peak (None of an unknown card)."""
    shuffle = recipe.model.vision.shuffle
    flops = sum(sum(module_flops(recipe.model, stage.trainable, pack_work(b, shuffle)).values()) for b in packs)
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"
    return {"flops": flops, "tflops_per_s": flops / seconds / 1e12, "mfu": mfu(flops, seconds, 1, name)}


def memory(device: torch.device) -> dict[str, float | None]:
    """Peaks of the allocator since `reset_memory`, in GiB."""
    if device.type != "cuda":
        return {"peak_gib": None, "reserved_gib": None}
    return {
        "peak_gib": torch.cuda.max_memory_allocated(device) / 2**30,
        "reserved_gib": torch.cuda.max_memory_reserved(device) / 2**30,
    }


def reset_memory(device: torch.device) -> None:
    """Start a new interval of `memory`."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)


def wait(device: torch.device) -> None:
    """Wait for all work of the device."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def waits_for_device(step: Callable[[], Any], device: torch.device) -> dict[str, int]:
    """How often each line makes the host wait for the device in one step: "file:line" -> times; {} on a CPU."""
    if device.type != "cuda":
        return {}
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            step()
        finally:
            torch.cuda.set_sync_debug_mode("default")
    lines = Counter(f"{Path(w.filename).name}:{w.lineno}" for w in caught if "called a synchronizing" in str(w.message))
    return dict(lines.most_common())
