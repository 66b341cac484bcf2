"""Bytes that a stage reads from its shards, and how fast.

Each sample reads its complete record, also the parts that it does not use, and reads it again in the next epoch. A rank
reads the samples of the packs that it computes, and no others. Sizes are those of the index where the plan has its
rows, else assumed (plan/samples.py). With data.cache_dir, shards are copied as files, which reads more where a mix
leaves records out.
"""

from dataclasses import dataclass

from emma_train.plan.arithmetic import Plan
from emma_train.plan.roofline import step_seconds

LATENT_VALUE = 2
"""Bytes of a value of a cached latent, in float16."""


@dataclass(frozen=True)
class DataVolume:
    """Of all ranks together."""

    read: float
    """Bytes of the stage's records."""
    latents: float
    """Bytes of the latents of its images, read besides where they are cached."""
    seconds: float
    """Estimated time of the stage."""
    measured: bool
    """Whether all sizes are from an index."""

    def per_hour(self, num_nodes: float) -> float:
        """Bytes of records that a node reads in an hour."""
        return self.read / num_nodes / max(self.seconds, 1e-9) * 3600


def data_volume(plan: Plan) -> DataVolume:
    """Of a stage, over its phases."""
    steps = list(zip(plan.loads, plan.phase_steps, strict=True))
    channels = plan.recipe.model.autoencoder.channels * (plan.stage.loss == "tokens")
    return DataVolume(
        read=sum(n * load.total(lambda s: s.read_bytes) for load, n in steps),
        latents=sum(n * load.total(lambda s: s.seen + s.made) for load, n in steps) * channels * LATENT_VALUE,
        seconds=sum(n * step_seconds(plan, load) for load, n in steps),
        measured=all(mean.measured for load in plan.loads for mean in load.means.values()),
    )
