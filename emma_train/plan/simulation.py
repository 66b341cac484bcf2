"""What one rank of N keeps and sends: the real model under the real FSDP engine, in one process and without memory.

Tensors have shapes and no values (torch's FakeTensorMode), and the process group sends nothing (torch's fake backend).
So the units, their shards with padding, and the collectives with their sizes are those that torch makes, not those of
the arithmetic in plan/state.py and plan/traffic.py, which they check. Rank 0 is looked at: where a tensor does not
divide evenly, no rank has more. Not simulated: DeepSpeed, the matrices that Muon sends, and time.
"""

from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from emma_train.config.schema import ModelConfig, Recipe
from emma_train.engine.activation_checkpointing import checkpoint_activations
from emma_train.engine.flat_shard import local
from emma_train.engine.fsdp import FsdpEngine
from emma_train.engine.protocol import MakeOptimizer
from emma_train.engine.torch_private import EXCHANGE_OPERATORS, join_fake_group, tensors_without_memory
from emma_train.engine.world import World
from emma_train.errors import UserError
from emma_train.model.adapters import position_2d
from emma_train.model.decoder import DecoderLayer
from emma_train.model.emma import Emma, training_experts
from emma_train.model.vision import resize_matrix
from emma_train.sequence.image_rules import image_rules
from emma_train.sequence.layout import ImageRole, ImageSegment, Segment, TextSegment
from emma_train.sequence.pack import ImageTokens, PackedBatch, Sample, pack
from emma_train.stages.freeze import freeze
from emma_train.stages.stage import Stage, makes_images, stage_of

CPU = torch.device("cpu")


@dataclass(frozen=True)
class Simulation:
    """One of `num_ranks` ranks. Sizes are in bytes; that of a collective is the size of its complete tensor."""

    num_ranks: int
    micro_steps: int
    """Of a step."""
    units: int
    """FSDP units."""
    weights: int
    gradients: int
    """As they are when a step's last backward pass is over."""
    optimizer: int
    collectives: dict[str, tuple[int, int]]
    """Number and bytes of a step's collectives, by kind."""
    per_micro_step: dict[str, tuple[int, int]]
    """The same of the micro-step before the last; of the last, where it is the only one."""


def simulate(recipe: Recipe, source: str, num_ranks: int, make_optimizer: MakeOptimizer) -> Simulation:
    """Build the stage's model for `num_ranks` ranks and run one to three micro-steps of a step.

    Raises UserError where that cannot be simulated.
    """
    if problem := not_simulated(recipe, num_ranks):
        raise UserError(f"{source}: {problem}")
    stage, micro_steps = stage_of(recipe, source), recipe.data.slots // num_ranks
    batch = _small_pack(recipe.model, makes_images(recipe))
    mode = tensors_without_memory()
    with _alone_among(num_ranks) as world:
        engine = _engine(recipe, stage, world, make_optimizer, mode)
        with mode, _Counter() as counter:
            return _run(engine, batch, stage, micro_steps, counter)


def _run(engine: FsdpEngine, batch: PackedBatch, stage: Stage, micro_steps: int, counter: "_Counter") -> Simulation:
    seen: list[dict[str, tuple[int, int]]] = []
    for last in [False, False, True][-min(3, micro_steps) :]:
        counter.clear()
        engine.accumulate(_loss(engine, batch, stage), last)
        seen.append(counter.totals())
    state = engine.state()
    gradients = [weight.grad for weight in engine.weights.values() if weight.grad is not None]
    return Simulation(
        dist.get_world_size(),
        micro_steps,
        len(engine.units),
        _local_bytes(state["model"].values()),
        _local_bytes(gradients),
        _local_bytes(state["optimizer"].values()),
        _step_total(seen, micro_steps),
        seen[max(0, len(seen) - 2)],
    )


def not_simulated(recipe: Recipe, num_ranks: int) -> str | None:
    """Why `num_ranks` ranks of a recipe cannot be simulated; None if they can."""
    engine, slots = recipe.engine, recipe.data.slots
    if engine.kind != "fsdp":
        return f"engine.kind={engine.kind} is not simulated; the plan has its arithmetic"
    if engine.sequence_parallel > 1:
        return "engine.sequence_parallel is not simulated; the plan has its arithmetic"
    if slots % num_ranks or num_ranks % engine.replicate:
        return f"{num_ranks} ranks cannot share data.slots={slots} in engine.replicate={engine.replicate} replicas"
    return None


class _World(World):
    """Rank 0 of ranks that do not exist."""

    def gather(self, value: Any) -> list[Any]:
        return [value] * self.size


@contextmanager
def _alone_among(num_ranks: int) -> Iterator[World]:
    group = join_fake_group(num_ranks)
    try:
        yield _World(0, num_ranks, CPU, group)
    finally:
        dist.destroy_process_group()


class _Counter(TorchDispatchMode):
    """Counts collectives and their bytes."""

    def __init__(self) -> None:
        super().__init__()
        self.clear()

    def clear(self) -> None:
        self._calls: Counter[str] = Counter()
        self._bytes: Counter[str] = Counter()

    def totals(self) -> dict[str, tuple[int, int]]:
        return {name: (self._calls[name], self._bytes[name]) for name in sorted(self._calls)}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if (kind := EXCHANGE_OPERATORS.get(func)) is not None:
            name, argument = kind
            tensors = args[argument] if isinstance(args[argument], list | tuple) else [args[argument]]
            self._calls[name] += 1
            self._bytes[name] += sum(t.numel() * t.element_size() for t in tensors)
        return func(*args, **(kwargs or {}))


def _engine(
    recipe: Recipe, stage: Stage, world: World, make_optimizer: MakeOptimizer, mode: AbstractContextManager[Any]
) -> FsdpEngine:
    """As training/build.py makes it. The shards are made in `mode`, in which they take no memory."""
    with torch.device("meta"):
        model = Emma(recipe.model, "sdpa")
    freeze(model, stage.trainable)
    for layer in model.modules():
        if isinstance(layer, DecoderLayer):
            layer.skip_gen_branch = not makes_images(recipe)
    checkpoint_activations(model, recipe.engine.activation_checkpointing)
    to_empty = model.to_empty

    def without_memory(**options: Any) -> Emma:
        with mode:
            return to_empty(**options)

    model.to_empty = without_memory  # type: ignore[method-assign]
    return FsdpEngine(model, recipe.engine, recipe.optimizer.max_grad_norm, world, make_optimizer)


def _loss(engine: FsdpEngine, batch: PackedBatch, stage: Stage) -> Tensor:
    """A scalar that depends on all outputs, as the loss does."""
    model: Any = engine.model
    if stage.loss == "router":
        logits: Tensor = model.route(batch)
        return logits.sum()
    latents = torch.zeros(sum(batch.num_cells), model.config.autoencoder.channels)
    experts = training_experts(batch) if stage.stem_expert else None
    prediction = model(batch, latents, torch.zeros(batch.counts[3]), experts, losses=True)
    return prediction.text_losses.sum() + prediction.velocity.sum()


def _small_pack(config: ModelConfig, generates: bool) -> PackedBatch:
    """A question about an image with its answer and, where the stage makes images, a prompt with its target. What a
    rank keeps and sends does not depend on a pack."""
    side = max(1, config.vision.position_grid // config.vision.shuffle)
    grid, shuffle = (side, side), config.vision.shuffle
    # These are kept from call to call: they have values if they are made here.
    position_2d([grid], config.decoder.hidden, CPU)
    resize_matrix(side * shuffle, config.vision.position_grid, CPU)
    patches = np.zeros(((side * shuffle) ** 2, 3 * config.vision.patch**2), np.uint8)
    text, rules = TextSegment((0, 0)), image_rules(config)
    samples = [_sample("i2t", [text, ImageSegment("a", ImageRole.UND), TextSegment((0, 0), True)], grid, patches)]
    if generates:
        samples.append(_sample("t2i", [text, ImageSegment("a", ImageRole.TARGET)], grid, patches))
    return pack([replace(sample, rules=rules) for sample in samples])


def _sample(task: str, segments: list[Segment], grid: tuple[int, int], patches: np.ndarray) -> Sample:
    return Sample(task, task, segments, {"a": ImageTokens(grid, patches, stem=1)})


def _step_total(seen: Sequence[dict[str, tuple[int, int]]], micro_steps: int) -> dict[str, tuple[int, int]]:
    """The first and the last micro-step once, and the one between as often as a step has such."""
    times = [1, micro_steps - 2, 1] if len(seen) == 3 else [1] * len(seen)
    total: dict[str, tuple[int, int]] = {}
    for often, counts in zip(times, seen, strict=True):
        for name, (calls, num_bytes) in counts.items():
            before = total.get(name, (0, 0))
            total[name] = (before[0] + often * calls, before[1] + often * num_bytes)
    return dict(sorted(total.items()))


def _local_bytes(tensors: Any) -> int:
    parts = [local(tensor) for tensor in tensors]
    return sum(part.numel() * part.element_size() for part in parts)
