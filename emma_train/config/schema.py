"""What a recipe may say: one dataclass per section, one docstring line per field.

Defaults are those of the paper where it speaks (arXiv 2512.04810, Table 2) and our documented choice where it does not.
"""

from dataclasses import dataclass, field

from omegaconf import MISSING


@dataclass
class RunConfig:
    root: str = "runs"
    """Folder that holds the run folders."""
    name: str = MISSING
    """Name of this run; its folder is root/name."""


@dataclass
class StageConfig:
    name: str = MISSING
    """One of stage0, stage1, stage2, stage3, stage4_expert, stage4_router."""


@dataclass
class VisionConfig:
    hidden: int = 1152
    """Width of the SigLIP2 encoder."""
    num_layers: int = 27
    """Encoder layers on the way of every image (shared and versatile together)."""
    heads: int = 16
    """Attention heads."""
    intermediate_size: int = 4304
    """Width of the MLP."""
    patch: int = 16
    """Side of a patch in pixels."""
    position_grid: int = 32
    """Side of the learned position table in patches (32 for patch16-512)."""
    shuffle: int = 2
    """Side of the pixel-shuffle block: patch * shuffle pixels make one visual token."""
    eps: float = 1e-6
    """LayerNorm epsilon."""
    expert_layers: int = 3
    """Last layers that exist once per expert."""
    router_hidden: int = 1152
    """Hidden width of the router MLP."""
    stem_expert: bool = False
    """Whether the STEM expert exists; it is created by the hand-off to stage4_expert."""
    router: bool = False
    """Whether the router exists; it is created by the hand-off to stage4_router."""
    stem_threshold: float = 0.5
    """An image goes to the STEM expert when the router's probability exceeds this."""


@dataclass
class DecoderConfig:
    hidden: int = 2560
    """Width of the residual stream."""
    num_layers: int = 36
    """Shallow and deep layers together."""
    num_shared_layers: int = 18
    """N: the first layers, in which both branches share the modules named in `shared`."""
    shared: list[str] = field(default_factory=lambda: ["q_proj", "k_proj"])
    """What shallow layers share: of q_proj, k_proj, v_proj, o_proj, mlp, input_norm, mlp_norm; `norm` shares the
    final norm."""
    heads: int = 32
    """Query heads."""
    kv_heads: int = 8
    """Key and value heads."""
    head_dim: int = 128
    """Channels of one head; heads * head_dim need not equal hidden."""
    intermediate_size: int = 9728
    """Width of the SwiGLU MLP."""
    vocab: int = 151936
    """Rows of the token embedding."""
    rope_theta: float = 1e6
    """Base of the rotary embedding."""
    eps: float = 1e-6
    """RMSNorm epsilon."""
    tied: bool = True
    """Whether the LM head is the token embedding."""


@dataclass
class AutoencoderConfig:
    path: str = MISSING
    """Folder of a diffusers AutoencoderDC (config.json and safetensors)."""
    channels: int = 32
    """Latent channels."""
    pixels: int = 32
    """Pixels per latent on a side; equals vision.patch * vision.shuffle."""
    chunk: int = 32
    """Images encoded or decoded at once."""


@dataclass
class ModelConfig:
    vision: VisionConfig = field(default_factory=VisionConfig)
    """Understanding encoder."""
    decoder: DecoderConfig = field(default_factory=DecoderConfig)
    """Shared-and-decoupled language model."""
    autoencoder: AutoencoderConfig = field(default_factory=AutoencoderConfig)
    """Generation encoder, frozen in every stage."""
    position_scale: float = 0.3
    """Amplitude of the fixed 2D position that is added to visual tokens; 1 would drown what the adapter says of
    them."""
    time_features: int = 256
    """Sinusoidal features of the flow time."""
    seed: int = 0
    """Seed of the initial weights of what no checkpoint provides."""


@dataclass
class ImageConfig:
    mode: str = "square"
    """square (every image becomes side x side), native (multiples of 32) or buckets (nearest aspect ratio)."""
    side: int = 512
    """Side in pixels; for native and buckets the side of the square with the same area."""
    max_tokens: int = 4096
    """Cap of visual tokens per image in native mode; larger images are scaled down to it."""


@dataclass
class SourceConfig:
    path: str = MISSING
    """Folder of shards with a manifest.json: a path, or a URL that fsspec opens (s3://, https://, ...)."""
    tasks: list[str] = field(default_factory=list)
    """Tasks to take from it; empty takes all that it has."""
    require_tags: list[str] = field(default_factory=list)
    """Only samples that carry all of these tags."""
    exclude_tags: list[str] = field(default_factory=list)
    """Only samples that carry none of these tags."""
    weight: float | None = None
    """Share of a task's samples that come from here, against the weights of the task's other sources; all of them have
    one or none has, and then each sample comes once an epoch."""


@dataclass
class MixConfig:
    i2t: int = 0
    """Share of understanding samples in every optimizer step."""
    t2i: int = 0
    """Share of generation samples."""
    it2i: int = 0
    """Share of editing samples."""


@dataclass
class PhaseConfig:
    name: str = MISSING
    """Name of the phase, as in the paper's Stage 2: a, b, c."""
    steps: int = MISSING
    """Optimizer steps of the phase; the last phase lasts until train.steps."""
    mix: MixConfig = field(default_factory=MixConfig)
    """Task ratio during the phase."""
    sources: list[SourceConfig] = field(default_factory=list)
    """Sources of the phase; empty takes data.sources."""


@dataclass
class DataConfig:
    sources: list[SourceConfig] = field(default_factory=list)
    """Shard folders; a task draws evenly from the samples of all of them, or by their weights."""
    phases: list[PhaseConfig] = field(default_factory=list)
    """Curriculum; empty means one phase with `mix`."""
    tokenizer: str = MISSING
    """tokenizer.json, or a folder that holds it."""
    seed: int = 0
    """Seed of order, choices, noise and dropout (contract 1)."""
    slots: int = 12
    """Packs per optimizer step; world size must divide it (contract 2)."""
    samples_per_step: int = 0
    """Samples per optimizer step, over all tasks and ranks; 0 takes as many as the packs hold."""
    mix_by: str = "samples"
    """Whether the task ratio counts samples, exact in every step, or tokens, exact over the steps."""
    shuffle_window: int = 262144
    """Samples that are shuffled together, at least; an epoch also shuffles all shards."""
    pack_tokens: int = 8192
    """Cap of LLM tokens in one pack."""
    pack_pairs: int = 0
    """Cap of token pairs that attention computes in one pack; 0 sets none."""
    pack_patches: int = 0
    """Cap of patches that the vision encoder sees in one pack; 0 sets none."""
    pack_pixels: int = 0
    """Cap of pixels that the autoencoder encodes in one pack; 0 sets none."""
    und: ImageConfig = field(default_factory=ImageConfig)
    """Images to be understood."""
    gen: ImageConfig = field(default_factory=ImageConfig)
    """Reference and target images."""
    text_dropout: float = 0.1
    """Probability that a generation prompt is dropped, for guidance."""
    reference_dropout: float = 0.1
    """Probability that editing loses its reference image, for guidance."""
    workers: int = 0
    """Loader processes per rank; 0 reads in a background thread of the trainer."""
    prefetch: int = 8
    """Packs read ahead per worker."""
    max_bad_samples: int = 100
    """Stop once more samples than this could not be read, replaced or not, over all ranks."""
    cache_dir: str = ""
    """Folder on a local disk for copies of remote shards, shared by the ranks of a machine; empty reads ranges."""
    cache_gib: float = 100.0
    """Room for these copies; the ones read longest ago go first."""
    read_retries: int = 5
    """Further tries of a read whose failure may pass: no answer in time, a server's 5xx, a body cut short."""
    read_wait_s: float = 0.5
    """Wait before the first of them; it doubles from try to try, up to half a minute."""
    read_timeout_s: float = 30.0
    """Longest time that one answer of a remote store may take."""


@dataclass
class LossConfig:
    ce_weight: float = 0.25
    """Weight of next-token cross-entropy."""
    fm_weight: float = 1.0
    """Weight of flow matching."""


@dataclass
class FlowConfig:
    logit_mean: float = 0.0
    """Mean of the logit-normal flow time."""
    logit_std: float = 1.0
    """Standard deviation of the logit-normal flow time."""
    shift: float = 1.0
    """s in s*t / (1 + (s-1)*t); 1 at 512 pixels, 4 at 1K."""


@dataclass
class OptimizerConfig:
    lr: float = MISSING
    """Peak learning rate."""
    betas: list[float] = field(default_factory=lambda: [0.9, 0.999])
    """AdamW moment decays."""
    eps: float = 1e-8
    """AdamW epsilon."""
    weight_decay: float = 0.0
    """Decoupled weight decay, on matrices only."""
    max_grad_norm: float = 1.0
    """Global gradient norm is clipped to this; 0 turns it off."""


@dataclass
class ScheduleConfig:
    kind: str = "constant"
    """cosine or constant."""
    warmup_steps: int = 0
    """Steps of linear warm-up."""
    min_ratio: float = 0.0
    """Cosine ends at this share of the peak."""


@dataclass
class EmaConfig:
    decay: float = 0.0
    """Decay of the averaged weights; 0 keeps none."""
    device: str = "auto"
    """auto keeps them beside the weights; cpu in host memory, where every step copies the weights."""


@dataclass
class TrainConfig:
    steps: int = MISSING
    """Optimizer steps of the stage."""
    log_every: int = 10
    """Steps between lines of metrics.jsonl."""
    checkpoints: str = ""
    """Folder or URL (s3://, gs://, ...: what fsspec writes to) for checkpoints, those of a run below its name; empty
    keeps them in the run folder."""
    save_every: int = 1000
    """Steps between checkpoints; the last step is always saved."""
    save_async: bool = True
    """Write checkpoints while training goes on; takes host memory for one copy of what is saved."""
    keep: int = 2
    """Newest checkpoints that are kept."""
    keep_every: int = 0
    """Checkpoints of steps that this divides are kept for good; 0 keeps none."""
    keep_best: str = ""
    """Loss by which the best checkpoint is kept too (its mean since the checkpoint before): loss, loss/i2t, ..."""
    stop_within_s: int = 240
    """Seconds that a run which is asked to stop may take to finish its step and save; then it ends as it is."""
    sample_every: int = 0
    """Steps between sample images; 0 makes them only at the end."""
    sample_from: str = ""
    """Shard folder whose records are drawn and answered as samples, best a held-out one; empty draws none."""
    num_samples: int = 4
    """Samples per task."""
    max_skipped_steps: int = 10
    """Stop after this many non-finite steps in a row."""
    gc_every: int = 100
    """Steps between garbage collections, on all ranks at once; 0 leaves them to Python."""


@dataclass
class EngineConfig:
    kind: str = "fsdp"
    """fsdp or deepspeed."""
    precision: str = "bf16"
    """bf16 (bf16 compute, fp32 master weights and reduction) or fp32."""
    device: str = "auto"
    """auto, cpu or cuda."""
    zero_stage: int = 2
    """deepspeed divides among the ranks: 1 optimizer state, 2 gradients too, 3 weights too."""
    offload_optimizer: bool = False
    """Keep fp32 weights and optimizer state in host memory and update them there."""
    replicate: int = 1
    """fsdp keeps so many copies of the shards, each over its share of the ranks (HSDP); best the number of nodes."""
    frozen: str = "sharded"
    """fsdp keeps units that do not train sharded, or replicated: whole on every rank, never gathered."""
    sequence_parallel: int = 1
    """Ranks that share the tokens of one pack (Ulysses), for packs too long for one GPU; divides the heads."""
    prefetch: int = 1
    """Decoder layers that fsdp gathers ahead of their turn, forward and backward; 0 leaves it to torch."""
    reshard_after_forward: bool = True
    """Free gathered weights between forward and backward; false is faster where memory allows."""
    reduce_every_micro_step: bool = True
    """fsdp reduces gradients after every micro-batch; false keeps whole ones until the last: faster, more memory."""
    activation_checkpointing: str = "none"
    """Layers whose activations backward computes again: none, full (all layers of decoder and vision encoder) or
    selective (every second one)."""
    compile: bool = False
    """torch.compile for every layer; the first steps then take minutes."""
    timeout_s: int = 1800
    """Longest wait for other ranks until the first step is done, and while checkpoints and samples are written."""
    step_timeout_s: int = 600
    """The same from step to step; a rank whose step takes longer also writes its stack to stderr."""
    debug_lockstep: bool = False
    """Have ranks compare which module they run before each of them, and stop where they differ; slow."""


@dataclass
class AttentionConfig:
    backend: str = "auto"
    """auto, flash, flex or sdpa; sdpa is the dense reference."""


@dataclass
class InitConfig:
    source: str | None = None
    """Written `from` in recipes: run folder, checkpoint or export whose weights the stage starts from; empty starts
    at random."""
    ema: bool = True
    """Start from the averaged weights where the source has them."""


@dataclass
class ResumeConfig:
    allow: list[str] = field(default_factory=list)
    """Recipe fields that may differ from the checkpoint when a run is resumed."""


@dataclass
class TrackerConfig:
    kind: str = "jsonl"
    """jsonl, or wandb (beside jsonl; offline unless its usual variables say otherwise)."""
    project: str = "emma"
    """W&B project."""


@dataclass
class Recipe:
    """One stage of training."""

    run: RunConfig = field(default_factory=RunConfig)
    """Where the run is kept."""
    stage: StageConfig = field(default_factory=StageConfig)
    """Which stage it is."""
    model: ModelConfig = field(default_factory=ModelConfig)
    """Sizes of the model."""
    data: DataConfig = field(default_factory=DataConfig)
    """Stream of packed batches."""
    mix: MixConfig = field(default_factory=MixConfig)
    """Task ratio by samples, exact in every optimizer step."""
    loss: LossConfig = field(default_factory=LossConfig)
    """Loss weights."""
    flow: FlowConfig = field(default_factory=FlowConfig)
    """Flow matching."""
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    """AdamW."""
    schedule: ScheduleConfig = field(default_factory=ScheduleConfig)
    """Learning rate over the steps."""
    ema: EmaConfig = field(default_factory=EmaConfig)
    """Averaged weights."""
    train: TrainConfig = field(default_factory=TrainConfig)
    """Length and cadence."""
    engine: EngineConfig = field(default_factory=EngineConfig)
    """Sharding and precision."""
    attention: AttentionConfig = field(default_factory=AttentionConfig)
    """Attention kernel."""
    init: InitConfig = field(default_factory=InitConfig)
    """Hand-off from the previous stage."""
    resume: ResumeConfig = field(default_factory=ResumeConfig)
    """The escape hatch of the resume rule."""
    tracker: TrackerConfig = field(default_factory=TrackerConfig)
    """Where metrics go."""


@dataclass
class Pipeline:
    """Several stages, one after another, in one run folder."""

    pipeline: list[str] = field(default_factory=list)
    """Stage recipes, relative to the pipeline recipe."""
    run: RunConfig = field(default_factory=RunConfig)
    """Where the stages' run folders are kept."""
