"""Bytes of weights, gradients and optimizer state on one rank, as each engine divides them."""

from dataclasses import dataclass

from emma_train.config.schema import Recipe
from emma_train.engine.deepspeed import BUCKET


@dataclass(frozen=True)
class Sizes:
    """Parameters of a model and how FSDP cuts it."""

    stored: int
    trained: int
    units: tuple[int, ...]
    """Of the vision encoder and every decoder layer, without what rests, smallest first."""
    frozen_units: int
    """Of those units that do not train at all, in sum."""
    resting: int
    """Of the Gen branch's part of the layers, where it never runs."""

    @property
    def root(self) -> int:
        return self.stored - self.resting - sum(self.units)


def state_memory(recipe: Recipe, sizes: Sizes, world: int) -> dict[str, float]:
    """What one of `world` ranks keeps on its device whatever its packs hold, by name."""
    return (_fsdp if recipe.engine.kind == "fsdp" else _deepspeed)(recipe, sizes, world)


def _fsdp(recipe: Recipe, sizes: Sizes, world: int) -> dict[str, float]:
    """fp32 weights, gradients, both Adam moments and the average in shards, or in host memory.

    Gathered at once are the root (embedding, adapters, head) and two units; all of them without
    engine.reshard_after_forward. A unit's gradients leave it in compute precision and are summed in fp32. Gradients
    that are held whole until the last micro-batch then give way to their shards.
    """
    engine, shards = recipe.engine, world / recipe.engine.replicate
    b = 2 if engine.precision == "bf16" else 4
    on_device = 0 if engine.offload_optimizer else 1
    whole = recipe.data.slots * engine.sequence_parallel > world and not engine.reduce_every_micro_step
    replicated = sizes.frozen_units if engine.frozen == "replicated" else 0
    gathered = sizes.root + sum(sizes.units[-2:]) if engine.reshard_after_forward else sizes.stored - sizes.resting
    averages = 4 * sizes.trained / shards if recipe.ema.decay and recipe.ema.device == "auto" else 0.0
    gradients = {"gradients, fp32 whole": 4.0 * sizes.trained}
    if not whole:
        gradients = {"gradients, fp32 shard": on_device * 4 * sizes.trained / shards}
    return {
        "weights, fp32 shard": on_device * (4 * (sizes.stored - replicated) / shards + 4 * replicated),
        **gradients,
        "Adam moments, fp32 shards": on_device * 8 * sizes.trained / shards,
        "average (EMA), fp32 shard": on_device * averages,
        "gathered weights": b * gathered,
        "gradients on their way": (b + 4) * min(sizes.trained, max(sizes.units[-1], sizes.root)),
    }


def _deepspeed(recipe: Recipe, sizes: Sizes, world: int) -> dict[str, float]:
    """Weights in compute precision, whole or (ZeRO-3) in parts, of which all may be gathered; fp32 values of what
    trains, both Adam moments and the average in parts, or in host memory.

    Gradients are whole (ZeRO-1) or in parts, in fp32, once more as one flat tensor in the step, and on their way in
    buckets, of which some is held twice while ranks exchange it. Measured on a CPU, the sum is within a tenth of what
    one, two and four processes take.
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
        "Adam moments, fp32 parts": on_device * 8 * trained / world,
        "average (EMA), fp32 part": on_device * averages,
    }
    if partitioned:
        kept["gathered weights"] = b * (sizes.stored - sizes.resting)
    if engine.zero_stage == 1 and b == 2 and on_device:
        # DeepSpeed's own optimizer for this case reduces all of the gradient at once.
        return {**kept, "gradients, bf16 and fp32 whole": 6 * trained, "gradients on their way": 4 * trained}
    whole, exchanged = engine.zero_stage == 1, bucket * (world > 1)
    filled = 0 if whole else bucket * (b + 4 * (b == 2))
    return {
        **kept,
        "gradients, fp32 " + ("whole" if whole else "part"): 4 * trained / (1 if whole else world),
        "gradients, fp32 flat": on_device * 4 * trained / world,
        "gradients on their way": filled + exchanged * (2 if engine.zero_stage == 2 else 4),
    }
