"""The data and mix sections of a recipe: sources, phases, packs, images and how samples are read."""

from dataclasses import dataclass, fields

from omegaconf import MISSING

from emma_train.config.setting import section, setting


@dataclass
class ImageConfig:
    mode: str = setting("square", choices=("square", "crop", "native", "buckets"))
    """square (every image is stretched to side x side), crop (the middle of every image, side x side), native
    (multiples of 32) or buckets (nearest aspect ratio)."""
    side: int = setting(512, more_than=0, at_most=16384)
    """Side in pixels; for native and buckets the side of the square with the same area."""
    max_tokens: int = setting(4096, more_than=0, at_most=262144)
    """Cap of visual tokens per image in native mode; larger images are scaled down to it."""
    min_pixels: int = setting(0, at_least=0, at_most=2**28)
    """Fewest pixels of an image in native mode; smaller ones are scaled up to about as many. 0 scales none up. Qwen3-VL
    has 65536, `size.shortest_edge` of its preprocessor_config.json: 64 tokens of 32 x 32 pixels, as ours."""
    min_side: int = setting(0, at_least=0, at_most=16384, absent=0)
    """Shortest side in pixels of an image that is used; a sample with a smaller one is replaced by another. 0 uses all
    images and enlarges small ones. Ours: the paper filters its data beforehand."""
    max_aspect: float = setting(5.0, at_least=0, at_most=1e6, absent=0.0)
    """Buckets only: longest side of an image that is used, as a multiple of its shortest one; a sample with a longer
    image is replaced by another. The buckets end at 4, so that images beyond are squeezed. 0 uses all images. Ours."""


@dataclass
class MixConfig:
    i2t: int = setting(0, at_least=0, at_most=10**6)
    """Share of understanding samples in every optimizer step."""
    t2i: int = setting(0, at_least=0, at_most=10**6)
    """Share of generation samples in every optimizer step."""
    it2i: int = setting(0, at_least=0, at_most=10**6)
    """Share of editing samples in every optimizer step."""
    recon: int = setting(0, at_least=0, at_most=10**6)
    """Share of reconstruction samples in every optimizer step (RecA, arXiv 2509.07295; not in the paper's mix)."""


@dataclass
class SourceConfig:
    path: str = setting(MISSING, form="url", resume="free")
    """Folder of shards with a manifest.json: a path, or a URL that fsspec opens (s3://, https://, ...). It may
    change at a resume; the content of the shards may not."""
    tasks: list[str] = setting([], choices=tuple(field.name for field in fields(MixConfig)))
    """Tasks to take from this source; empty takes all that it has."""
    require_tags: list[str] = setting([])
    """Only samples that carry all of these tags."""
    exclude_tags: list[str] = setting([])
    """Only samples that carry none of these tags."""
    weight: float | None = setting(None, more_than=0, at_most=1e9)
    """Weight of this source against the other sources of a task. Set it for all sources of a phase or for none; without
    weights each sample comes once an epoch."""


@dataclass
class PhaseConfig:
    name: str = setting(MISSING)
    """Name of the phase, as in the paper's Stage 2: a, b, c."""
    steps: int = setting(MISSING, more_than=0, at_most=10**9)
    """Optimizer steps of the phase; the last phase lasts until train.steps."""
    mix: MixConfig = section(MixConfig, set_together=True)
    """Task ratio during the phase."""
    sources: list[SourceConfig] = setting([])
    """Sources of the phase; empty takes data.sources."""


@dataclass
class DataConfig:
    sources: list[SourceConfig] = setting([])
    """Shard folders. A task draws evenly from the samples of all of them, or by their weights."""
    phases: list[PhaseConfig] = setting([])
    """Curriculum; empty means one phase with the recipe's mix."""
    tokenizer: str = setting(MISSING, form="path", resume="free")
    """tokenizer.json, or a folder that holds it."""
    template: str = setting("plain", choices=("plain", "no_think"))
    """Chat template: plain, or no_think, which puts Qwen3's empty think block before the last answer, as Qwen3's own
    template does where it shall not think."""
    seed: int = setting(0, at_least=0, at_most=2**63 - 1)
    """Seed of order, choices, noise and dropout (contract 1)."""
    slots: int = setting(12, more_than=0, at_most=10**6)
    """Packs (micro-batches) per optimizer step, over all ranks; the number of ranks must divide it (contract 2)."""
    samples_per_step: int = setting(0, at_least=0, at_most=10**8)
    """Samples per optimizer step, over all tasks and ranks; 0 takes as many as the packs hold."""
    mix_by: str = setting("samples", choices=("samples", "tokens"))
    """What the task ratio counts: samples, exact in every step, or tokens, exact over many steps."""
    shuffle_window: int = setting(262144, more_than=0, at_most=10**9)
    """Fewest samples that are shuffled together; an epoch also shuffles the order of all shards."""
    pack_tokens: int = setting(8192, more_than=0, at_most=2**24)
    """Most LLM tokens in one pack."""
    pack_pairs: int = setting(0, at_least=0, at_most=2**48)
    """Most token pairs that attention computes in one pack; 0 sets no limit."""
    pack_patches: int = setting(0, at_least=0, at_most=2**32)
    """Most patches that the vision encoder sees in one pack; 0 sets no limit."""
    pack_pixels: int = setting(0, at_least=0, at_most=2**40)
    """Most pixels that the autoencoder encodes in one pack; 0 sets no limit."""
    und: ImageConfig = section(ImageConfig)
    """Images to understand."""
    gen: ImageConfig = section(ImageConfig)
    """Reference and target images."""
    caption_questions: list[str] = setting(["Describe this picture."])
    """Questions that the caption of a plain image-caption pair answers in understanding; each sample draws one by the
    seed. Several keep the model from learning one phrase (ours; LLaVA has a list too)."""
    untagged: str = setting("general", choices=("general", "unknown"))
    """What an image of a record with neither tag, `stem` nor `general`, is to router tuning: general, or unknown, which
    has no label and no loss (ours)."""
    text_dropout: float = setting(0.1, at_least=0, at_most=1)
    """Probability that a generation prompt is dropped, for guidance."""
    reference_dropout: float = setting(0.1, at_least=0, at_most=1)
    """Probability that editing loses its reference image, for guidance. BAGEL takes 0.3."""
    workers: int = setting(0, at_least=0, at_most=1024, resume="free")
    """Loader processes per rank; 0 reads in a background thread of the trainer."""
    prefetch: int = setting(8, more_than=0, at_most=65536, resume="free")
    """Packs that each worker reads ahead."""
    max_bad_samples: int = setting(100, at_least=0, at_most=10**12, resume="free")
    """A run ends when its unreadable samples, replaced or not, are more than this and more than max_bad_share of all
    samples so far."""
    max_bad_share: float = setting(1e-3, at_least=0, at_most=1, resume="free", absent=0.0)
    """Share of unreadable samples that ends a run, beside max_bad_samples; with 0 that count alone decides. Ours: of a
    billion web images more than a hundred cannot be decoded."""
    cache_dir: str = setting("", form="path", resume="free")
    """Folder on a local disk for copies of remote shards, shared by the ranks of a machine; empty reads byte ranges of
    the remote files instead."""
    cache_gib: float = setting(100.0, more_than=0, at_most=10**7, resume="free")
    """Size limit of data.cache_dir in GiB; the shards that were read longest ago are removed first."""
    read_retries: int = setting(5, at_least=0, at_most=1000, resume="free")
    """How often a read is tried again after a failure that may pass: no answer in time, a server error (5xx), a body
    cut short."""
    read_wait_s: float = setting(0.5, at_least=0, at_most=86400, resume="free")
    """Seconds before a read is tried again for the first time; doubles with each further try, up to half a minute."""
    read_timeout_s: float = setting(30.0, more_than=0, at_most=86400, resume="free")
    """Longest time in seconds that one answer of a remote store may take."""
