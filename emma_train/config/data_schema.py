"""The data and mix sections of a recipe: sources, phases, packs, images and how samples are read."""

from dataclasses import dataclass

from omegaconf import MISSING

from emma_train.config.setting import section, setting


@dataclass
class ImageConfig:
    mode: str = setting("square", choices=("square", "native", "buckets"))
    """square (every image becomes side x side), native (multiples of 32) or buckets (nearest aspect ratio)."""
    side: int = setting(512, more_than=0)
    """Side in pixels; for native and buckets the side of the square with the same area."""
    max_tokens: int = setting(4096)
    """Cap of visual tokens per image in native mode; larger images are scaled down to it."""


@dataclass
class SourceConfig:
    path: str = setting(MISSING)
    """Folder of shards with a manifest.json: a path, or a URL that fsspec opens (s3://, https://, ...)."""
    tasks: list[str] = setting([])
    """Tasks to take from it; empty takes all that it has."""
    require_tags: list[str] = setting([])
    """Only samples that carry all of these tags."""
    exclude_tags: list[str] = setting([])
    """Only samples that carry none of these tags."""
    weight: float | None = setting(None)
    """Share of a task's samples that come from here, against the weights of the task's other sources; all of them have
    one or none has, and then each sample comes once an epoch."""


@dataclass
class MixConfig:
    i2t: int = setting(0)
    """Share of understanding samples in every optimizer step."""
    t2i: int = setting(0)
    """Share of generation samples."""
    it2i: int = setting(0)
    """Share of editing samples."""


@dataclass
class PhaseConfig:
    name: str = setting(MISSING)
    """Name of the phase, as in the paper's Stage 2: a, b, c."""
    steps: int = setting(MISSING)
    """Optimizer steps of the phase; the last phase lasts until train.steps."""
    mix: MixConfig = section(MixConfig, set_together=True)
    """Task ratio during the phase."""
    sources: list[SourceConfig] = setting([])
    """Sources of the phase; empty takes data.sources."""


@dataclass
class DataConfig:
    sources: list[SourceConfig] = setting([])
    """Shard folders; a task draws evenly from the samples of all of them, or by their weights."""
    phases: list[PhaseConfig] = setting([])
    """Curriculum; empty means one phase with `mix`."""
    tokenizer: str = setting(MISSING)
    """tokenizer.json, or a folder that holds it."""
    seed: int = setting(0)
    """Seed of order, choices, noise and dropout (contract 1)."""
    slots: int = setting(12, more_than=0)
    """Packs per optimizer step; world size must divide it (contract 2)."""
    samples_per_step: int = setting(0, at_least=0)
    """Samples per optimizer step, over all tasks and ranks; 0 takes as many as the packs hold."""
    mix_by: str = setting("samples", choices=("samples", "tokens"))
    """Whether the task ratio counts samples, exact in every step, or tokens, exact over the steps."""
    shuffle_window: int = setting(262144, more_than=0)
    """Samples that are shuffled together, at least; an epoch also shuffles all shards."""
    pack_tokens: int = setting(8192, more_than=0)
    """Cap of LLM tokens in one pack."""
    pack_pairs: int = setting(0, at_least=0)
    """Cap of token pairs that attention computes in one pack; 0 sets none."""
    pack_patches: int = setting(0, at_least=0)
    """Cap of patches that the vision encoder sees in one pack; 0 sets none."""
    pack_pixels: int = setting(0, at_least=0)
    """Cap of pixels that the autoencoder encodes in one pack; 0 sets none."""
    und: ImageConfig = section(ImageConfig)
    """Images to be understood."""
    gen: ImageConfig = section(ImageConfig)
    """Reference and target images."""
    text_dropout: float = setting(0.1, at_least=0, at_most=1)
    """Probability that a generation prompt is dropped, for guidance."""
    reference_dropout: float = setting(0.1, at_least=0, at_most=1)
    """Probability that editing loses its reference image, for guidance."""
    workers: int = setting(0, at_least=0, resume="free")
    """Loader processes per rank; 0 reads in a background thread of the trainer."""
    prefetch: int = setting(8, resume="free")
    """Packs read ahead per worker."""
    max_bad_samples: int = setting(100, at_least=0, resume="free")
    """Stop once more samples than this could not be read, replaced or not, over all ranks."""
    cache_dir: str = setting("", resume="free")
    """Folder on a local disk for copies of remote shards, shared by the ranks of a machine; empty reads ranges."""
    cache_gib: float = setting(100.0, more_than=0, resume="free")
    """Room for these copies; the ones read longest ago go first."""
    read_retries: int = setting(5, at_least=0, resume="free")
    """Further tries of a read whose failure may pass: no answer in time, a server's 5xx, a body cut short."""
    read_wait_s: float = setting(0.5, at_least=0, resume="free")
    """Wait before the first of them; it doubles from try to try, up to half a minute."""
    read_timeout_s: float = setting(30.0, more_than=0, resume="free")
    """Longest time that one answer of a remote store may take."""
