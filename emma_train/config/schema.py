"""What a recipe may say: one dataclass per section, one docstring line per field, its facts in its metadata.

Defaults are those of the paper where it speaks (arXiv 2512.04810, Table 2) and our documented choice where it does not.
"""

from dataclasses import dataclass, field, fields

from omegaconf import MISSING

from emma_train.config.data_schema import DataConfig, ImageConfig, MixConfig, PhaseConfig, SourceConfig
from emma_train.config.model_schema import AutoencoderConfig, DecoderConfig, ModelConfig, VisionConfig
from emma_train.config.setting import section, setting

__all__ = [
    "AttentionConfig",
    "AutoencoderConfig",
    "DataConfig",
    "DecoderConfig",
    "EmaConfig",
    "EngineConfig",
    "FlowConfig",
    "ImageConfig",
    "InitConfig",
    "LossConfig",
    "MixConfig",
    "ModelConfig",
    "OptimizerConfig",
    "PhaseConfig",
    "Pipeline",
    "Recipe",
    "ResumeConfig",
    "RunConfig",
    "ScheduleConfig",
    "SourceConfig",
    "StageConfig",
    "TrackerConfig",
    "TrainConfig",
    "VisionConfig",
]
LOSS_METRICS = ("loss", *(f"loss/{task.name}" for task in fields(MixConfig)))


@dataclass
class RunConfig:
    root: str = setting("runs")
    """Folder that holds the run folders."""
    name: str = setting(MISSING)
    """Name of this run; its folder is root/name."""


@dataclass
class StageConfig:
    name: str = setting(MISSING)
    """One of stage0, stage1, stage2, stage3, stage4_expert, stage4_router."""


@dataclass
class LossConfig:
    ce_weight: float = setting(0.25)
    """Weight of next-token cross-entropy."""
    fm_weight: float = setting(1.0)
    """Weight of flow matching."""


@dataclass
class FlowConfig:
    logit_mean: float = setting(0.0)
    """Mean of the logit-normal flow time."""
    logit_std: float = setting(1.0)
    """Standard deviation of the logit-normal flow time."""
    shift: float = setting(1.0)
    """s in s*t / (1 + (s-1)*t); 1 at 512 pixels, 4 at 1K."""


@dataclass
class OptimizerConfig:
    lr: float = setting(MISSING, more_than=0)
    """Peak learning rate."""
    betas: list[float] = setting([0.9, 0.999])
    """AdamW moment decays."""
    eps: float = setting(1e-8)
    """AdamW epsilon."""
    weight_decay: float = setting(0.0)
    """Decoupled weight decay, on matrices only."""
    max_grad_norm: float = setting(1.0)
    """Global gradient norm is clipped to this; 0 turns it off."""


@dataclass
class ScheduleConfig:
    kind: str = setting("constant", choices=("constant", "cosine"))
    """cosine or constant."""
    warmup_steps: int = setting(0)
    """Steps of linear warm-up."""
    min_ratio: float = setting(0.0)
    """Cosine ends at this share of the peak."""


@dataclass
class EmaConfig:
    decay: float = setting(0.0, at_least=0, at_most=1)
    """Decay of the averaged weights; 0 keeps none."""
    device: str = setting("auto", choices=("auto", "cpu"), resume="free")
    """auto keeps them beside the weights; cpu in host memory, where every step copies the weights."""


@dataclass
class TrainConfig:
    steps: int = setting(MISSING, more_than=0)
    """Optimizer steps of the stage."""
    log_every: int = setting(10, more_than=0)
    """Steps between lines of metrics.jsonl."""
    checkpoints: str = setting("")
    """Folder or URL (s3://, gs://, ...: what fsspec writes to) for checkpoints, those of a run below its name; empty
    keeps them in the run folder."""
    save_every: int = setting(1000, more_than=0)
    """Steps between checkpoints; the last step is always saved."""
    save_async: bool = setting(True)
    """Write checkpoints while training goes on; takes host memory for one copy of what is saved."""
    keep: int = setting(2, more_than=0)
    """Newest checkpoints that are kept."""
    keep_every: int = setting(0)
    """Checkpoints of steps that this divides are kept for good; 0 keeps none."""
    keep_best: str = setting("", choices=("", *LOSS_METRICS))
    """Loss by which the best checkpoint is kept too (its mean since the checkpoint before): loss, loss/i2t, ..."""
    stop_within_s: int = setting(240, more_than=0)
    """Seconds that a run which is asked to stop may take to finish its step and save; then it ends as it is."""
    sample_every: int = setting(0)
    """Steps between sample images; 0 makes them only at the end."""
    sample_from: str = setting("")
    """Shard folder whose records are drawn and answered as samples, best a held-out one; empty draws none."""
    num_samples: int = setting(4)
    """Samples per task."""
    max_skipped_steps: int = setting(10)
    """Stop after this many non-finite steps in a row."""
    gc_every: int = setting(100)
    """Steps between garbage collections, on all ranks at once; 0 leaves them to Python."""


@dataclass
class EngineConfig:
    kind: str = setting("fsdp", choices=("fsdp", "deepspeed"))
    """fsdp or deepspeed."""
    precision: str = setting("bf16", choices=("bf16", "fp32"))
    """bf16 (bf16 compute, fp32 master weights and reduction) or fp32."""
    device: str = setting("auto", choices=("auto", "cpu", "cuda"))
    """auto, cpu or cuda."""
    zero_stage: int = setting(2, choices=(1, 2, 3))
    """deepspeed divides among the ranks: 1 optimizer state, 2 gradients too, 3 weights too."""
    offload_optimizer: bool = setting(False)
    """Keep fp32 weights and optimizer state in host memory and update them there."""
    replicate: int = setting(1, more_than=0)
    """fsdp keeps so many copies of the shards, each over its share of the ranks (HSDP); best the number of nodes."""
    frozen: str = setting("sharded", choices=("sharded", "replicated"))
    """fsdp keeps units that do not train sharded, or replicated: whole on every rank, never gathered."""
    sequence_parallel: int = setting(1, more_than=0)
    """Ranks that share the tokens of one pack (Ulysses), for packs too long for one GPU; divides the heads."""
    prefetch: int = setting(1)
    """Decoder layers that fsdp gathers ahead of their turn, forward and backward; 0 leaves it to torch."""
    reshard_after_forward: bool = setting(True)
    """Free gathered weights between forward and backward; false is faster where memory allows."""
    reduce_every_micro_step: bool = setting(True)
    """fsdp reduces gradients after every micro-batch; false keeps whole ones until the last: faster, more memory."""
    activation_checkpointing: str = setting("none", choices=("none", "full", "selective"))
    """Layers whose activations backward computes again: none, full (all layers of decoder and vision encoder) or
    selective (every second one)."""
    compile: bool = setting(False)
    """torch.compile for every layer; the first steps then take minutes."""
    timeout_s: int = setting(1800, more_than=0)
    """Longest wait for other ranks until the first step is done, and while checkpoints and samples are written."""
    step_timeout_s: int = setting(600, more_than=0)
    """The same from step to step; a rank whose step takes longer also writes its stack to stderr."""
    debug_lockstep: bool = setting(False)
    """Have ranks compare which module they run before each of them, and stop where they differ; slow."""


@dataclass
class AttentionConfig:
    backend: str = setting("auto", choices=("auto", "flash", "flex", "sdpa"))
    """auto, flash, flex or sdpa; sdpa is the dense reference."""


@dataclass
class InitConfig:
    source: str | None = setting(None, key="from")
    """Written `from` in recipes: run folder, checkpoint or export whose weights the stage starts from; empty starts
    at random."""
    ema: bool = setting(True)
    """Start from the averaged weights where the source has them."""


@dataclass
class ResumeConfig:
    allow: list[str] = setting([])
    """Recipe fields that may differ from the checkpoint when a run is resumed."""


@dataclass
class TrackerConfig:
    kind: str = setting("jsonl", choices=("jsonl", "wandb"))
    """jsonl, or wandb (beside jsonl; offline unless its usual variables say otherwise)."""
    project: str = setting("emma")
    """W&B project."""


@dataclass
class Recipe:
    """One stage of training."""

    run: RunConfig = section(RunConfig, resume="free")
    """Where the run is kept."""
    stage: StageConfig = section(StageConfig)
    """Which stage it is."""
    model: ModelConfig = section(ModelConfig)
    """Sizes of the model."""
    data: DataConfig = section(DataConfig)
    """Stream of packed batches."""
    mix: MixConfig = section(MixConfig, set_together=True)
    """Task ratio by samples, exact in every optimizer step."""
    loss: LossConfig = section(LossConfig)
    """Loss weights."""
    flow: FlowConfig = section(FlowConfig)
    """Flow matching."""
    optimizer: OptimizerConfig = section(OptimizerConfig)
    """AdamW."""
    schedule: ScheduleConfig = section(ScheduleConfig)
    """Learning rate over the steps."""
    ema: EmaConfig = section(EmaConfig)
    """Averaged weights."""
    train: TrainConfig = section(TrainConfig, resume="free")
    """Length and cadence."""
    engine: EngineConfig = section(EngineConfig, resume="free")
    """Sharding and precision."""
    attention: AttentionConfig = section(AttentionConfig, resume="free")
    """Attention kernel."""
    init: InitConfig = section(InitConfig, resume="free")
    """Hand-off from the previous stage."""
    resume: ResumeConfig = section(ResumeConfig, resume="free")
    """The escape hatch of the resume rule."""
    tracker: TrackerConfig = section(TrackerConfig, resume="free")
    """Where metrics go."""
    set_keys: frozenset[str] = field(
        default=frozenset(), repr=False, compare=False, metadata={"omegaconf_ignore": True}
    )
    """Dotted keys that file and overrides set; all others have their defaults. Not a key of recipes."""


@dataclass
class Pipeline:
    """Several stages, one after another, in one run folder."""

    pipeline: list[str] = setting([])
    """Stage recipes, relative to the pipeline recipe."""
    run: RunConfig = section(RunConfig)
    """Where the stages' run folders are kept."""
