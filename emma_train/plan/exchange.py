"""Bytes that the ranks of FSDP exchange in a step; plan/traffic.py says how long that takes."""

from dataclasses import dataclass

from emma_train.plan.arithmetic import Plan


@dataclass(frozen=True)
class Exchange:
    """Bytes of a step's collectives, each with the size of its complete tensor; of FSDP."""

    gathered: float
    reduced: float
    summed: float
    """Over replicas."""


def exchange(plan: Plan) -> Exchange:
    """What one rank gathers, reduces and sums under engine.kind=fsdp; plan/simulation.py counts the same."""
    engine, sizes = plan.recipe.engine, plan.sizes
    weight = 2 if engine.precision == "bf16" else 4
    replicated = engine.frozen == "replicated"
    forward = sizes.stored - sizes.unused - replicated * sizes.frozen_running
    backward = (sizes.backward - replicated * sizes.frozen_backward) if engine.reshard_after_forward else 0
    # Weights that stay gathered after the forward pass stay so until the optimizer changes them.
    gathers = micro_steps_of(plan) if engine.reshard_after_forward else 1
    reduces = micro_steps_of(plan) if engine.reduce_every_micro_step else 1
    shards, replicas = plan.num_gpus // engine.replicate, engine.replicate
    divided = shards > 1
    return Exchange(
        gathered=divided * gathers * weight * (forward + backward),
        reduced=divided * reduces * 4 * sizes.trained,
        summed=4 * sizes.trained / shards if replicas > 1 else 0.0,
    )


def micro_steps_of(plan: Plan) -> float:
    """Packs that a rank computes, or has a part in, in a step."""
    return max(1.0, plan.recipe.data.slots * plan.recipe.engine.sequence_parallel / plan.num_gpus)
