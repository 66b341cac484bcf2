"""Bytes of weights, gradients and optimizer state on one rank, as each engine divides them among ranks."""

from dataclasses import dataclass

from emma_train.config.schema import Recipe
from emma_train.engine.deepspeed import BUCKET


@dataclass(frozen=True)
class Sizes:
    """Numbers of parameters: of the whole model, and of the units that FSDP gathers one at a time."""

    stored: int
    trained: int
    units: tuple[int, ...]
    """Those of the vision encoder (engine/units.py) and every decoder layer that runs, without their unused part;
    smallest first."""
    frozen_units: int
    """Sum over the units of which no parameter trains."""
    unused: int
    """What the stage never runs: the Gen branch of decoder layers; in router tuning, the decoder and the experts."""
    backward: int = 0
    """Sum over the units that are gathered again for backward, without their unused part: those that it passes
    through, but the last decoder layer, which stays gathered."""
    frozen_running: int = 0
    """Of the frozen units, the sum over those that run."""
    frozen_backward: int = 0
    """Of these, the sum over those that are gathered again for backward."""
    muon: int = 0
    """Of those that train, the parameters that take Muon: they have one moment, all others two."""

    @property
    def root(self) -> int:
        """Parameters outside the units: embedding, adapters, heads."""
        return self.stored - self.unused - sum(self.units)


def state_memory(recipe: Recipe, sizes: Sizes, world: int) -> dict[str, float]:
    """Bytes that one of `world` ranks keeps on its device, by name; the same for every pack."""
    return (_fsdp if recipe.engine.kind == "fsdp" else _deepspeed)(recipe, sizes, world)


def exchange_memory(recipe: Recipe, sizes: Sizes, world: int) -> float:
    """Bytes of one rank while Muon's results return: its parts, sent and received, and the results of the matrices that
    it owns (engine/matrix_exchange.py)."""
    value = 2 if recipe.optimizer.muon.dtype == "bf16" else 4
    return value * sizes.muon * (2 * recipe.engine.replicate + 1) / world


def _fsdp(recipe: Recipe, sizes: Sizes, world: int) -> dict[str, float]:
    """fp32 weights, gradients, moments and the EMA as shards, on the device or in host memory.

    Gathered at the same time are the root (embedding, adapters, head) and two units; without
    engine.reshard_after_forward, all units. A unit's gradients leave it in compute precision and are summed in fp32.
    Gradients that stay unsharded until the last micro-batch then give way to their shards.
    """
    engine, shards = recipe.engine, world / recipe.engine.replicate
    b = 2 if engine.precision == "bf16" else 4
    on_device = 0 if engine.offload_optimizer else 1
    unsharded = recipe.data.slots * engine.sequence_parallel > world and not engine.reduce_every_micro_step
    replicated = sizes.frozen_units if engine.frozen == "replicated" else 0
    gathered = sizes.root + sum(sizes.units[-2:]) if engine.reshard_after_forward else sizes.stored - sizes.unused
    averages = 4 * sizes.trained / shards if recipe.ema.decay and recipe.ema.device == "auto" else 0.0
    gradients = {"gradients, fp32 whole": 4.0 * sizes.trained}
    if not unsharded:
        gradients = {"gradients, fp32 shard": on_device * 4 * sizes.trained / shards}
    return {
        "weights, fp32 shard": on_device * (4 * (sizes.stored - replicated) / shards + 4 * replicated),
        **gradients,
        "Adam moments, fp32 shards": on_device * 8 * (sizes.trained - sizes.muon) / shards,
        "Muon's momentum, fp32 shards": on_device * 4 * sizes.muon / shards,
        "average (EMA), fp32 shard": on_device * averages,
        "gathered weights": b * gathered,
        "gradients on their way": (b + 4) * min(sizes.trained, max(sizes.units[-1], sizes.root)),
    }


def _deepspeed(recipe: Recipe, sizes: Sizes, world: int) -> dict[str, float]:
    """Weights in compute precision: all of them, or (ZeRO-3) a part, of which all may be gathered. Of what trains, fp32
    values, moments and the EMA in parts, on the device or in host memory.

    Gradients are in fp32: all of them (ZeRO-1) or a part; once more as one flat tensor in the step; and in buckets on
    their way, of which some exist twice while ranks exchange them. Measured on a CPU, the sum is within a tenth of what
    one, two and four processes use.
    """
    engine, trained = recipe.engine, sizes.trained
    b = 2 if engine.precision == "bf16" else 4
    on_device = 0 if engine.offload_optimizer else 1
    bucket = min(BUCKET, trained)
    partitioned = engine.zero_stage == 3
    averages = 4 * trained / world if recipe.ema.decay and recipe.ema.device == "auto" else 0.0
    kept = {
        "weights to compute with": b * sizes.stored / (world if partitioned else 1),
        "weights that train, fp32 part": on_device * 4 * trained / world,
        "Adam moments, fp32 parts": on_device * 8 * (trained - sizes.muon) / world,
        "Muon's momentum, fp32 parts": on_device * 4 * sizes.muon / world,
        "average (EMA), fp32 part": on_device * averages,
    }
    if partitioned:
        kept["gathered weights"] = b * (sizes.stored - sizes.unused)
    if engine.zero_stage == 1 and b == 2 and on_device:
        # In this case DeepSpeed uses another optimizer, which reduces all gradients at once.
        return {**kept, "gradients, bf16 and fp32 whole": 6 * trained, "gradients on their way": 4 * trained}
    partitions_gradients, exchanged = engine.zero_stage > 1, bucket * (world > 1)
    filled = bucket * (b + 4 * (b == 2)) if partitions_gradients else 0
    return {
        **kept,
        "gradients, fp32 " + ("part" if partitions_gradients else "whole"): 4
        * trained
        / (world if partitions_gradients else 1),
        "gradients, fp32 flat": on_device * 4 * trained / world,
        "gradients on their way": filled + exchanged * (2 if engine.zero_stage == 2 else 4),
    }
