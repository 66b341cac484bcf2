"""What a recipe may say: one dataclass per section, one docstring line per field, its facts in its metadata.

Defaults are those of the paper where it speaks (arXiv 2512.04810, Table 2) and our documented choice where it does not.
A new field whose default changes the behaviour gives the value of the old behaviour as `absent`, so that older
checkpoints resume as before (config/stored.py). Sections model, data, mix: model_schema.py and data_schema.py.
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
    "GenerationConfig",
    "GuardConfig",
    "HealthConfig",
    "ImageConfig",
    "InitConfig",
    "LossConfig",
    "MixConfig",
    "ModelConfig",
    "MuonConfig",
    "OptimizerConfig",
    "PhaseConfig",
    "Pipeline",
    "ProfileConfig",
    "Recipe",
    "ResumeConfig",
    "RunConfig",
    "ScheduleConfig",
    "SourceConfig",
    "StageConfig",
    "StepWindow",
    "TrackerConfig",
    "TrainConfig",
    "ValidateConfig",
    "VisionConfig",
]
LOSS_METRICS = ("loss", *(f"loss/{task.name}" for task in fields(MixConfig)))
ANSWER_METRICS = ("val/answers", "val/ema/answers")
"""Share of right answers; of all other metrics by which the best checkpoint may be chosen, less is better."""
VALIDATION_METRICS = (*(f"val/{which}{name}" for which in ("", "ema/") for name in LOSS_METRICS), *ANSWER_METRICS)


@dataclass
class RunConfig:
    root: str = setting("runs", form="path")
    """Folder that holds the run folders."""
    name: str = setting(MISSING, form="name")
    """Name of this run; its folder is root/name."""


@dataclass
class StageConfig:
    name: str = setting(MISSING)
    """One of stage0, stage1, stage2, stage3, stage4_expert, stage4_router."""
    trainable: list[str] = setting([])
    """Parameter groups that train: vision, stem_expert, router, und_adapter, gen_adapter, decoder, velocity_head; empty
    trains those of the paper for this stage."""


@dataclass
class LossConfig:
    ce_weight: float = setting(0.25, at_least=0, at_most=1000)
    """Weight of next-token cross-entropy."""
    fm_weight: float = setting(1.0, at_least=0, at_most=1000)
    """Weight of flow matching."""


@dataclass
class FlowConfig:
    logit_mean: float = setting(0.0, at_least=-10, at_most=10)
    """Mean of the logit-normal flow time."""
    logit_std: float = setting(1.0, at_least=0, at_most=10)
    """Standard deviation of the logit-normal flow time."""
    shift: float = setting(1.0, more_than=0, at_most=1000)
    """s in s*t / (1 + (s-1)*t), the shift of the flow time; 1 shifts nothing. Sana, with the same autoencoder as EMMA,
    takes 3 at 512 pixels and at 1K."""
    time: str = setting("logit_normal", choices=("logit_normal", "uniform"))
    """Distribution of the flow time before the shift."""


@dataclass
class GenerationConfig:
    steps: int = setting(30, more_than=0, at_most=10_000)
    """Steps from noise to image. BAGEL and OmniGen2 take 50."""
    text_guidance: float = setting(2.5, at_least=0, at_most=1000)
    """Strength of the prompt; 1 turns guidance off. BAGEL takes 4, OmniGen2 5."""
    image_guidance: float = setting(2.0, at_least=0, at_most=1000)
    """Strength of the reference image in editing; 1 turns it off. BAGEL and OmniGen2 take 2."""
    guidance_from: float = setting(0.0, at_least=0, at_most=1)
    """Flow time (1 is noise, 0 the image) above which there is guidance. BAGEL takes 0.4 for text to image."""
    guidance_to: float = setting(1.0, at_least=0, at_most=1)
    """Flow time up to which there is guidance."""
    guidance_renorm: bool = setting(False)
    """Scale the guided velocity of an image down to the norm of the one without guidance (BAGEL's global
    renormalisation)."""
    solver: str = setting("euler", choices=("euler", "heun"))
    """euler, or heun: second order, and two forwards a step but for the last."""


@dataclass
class MuonConfig:
    momentum: float = setting(0.95, at_least=0, less_than=1)
    """Decay of the mean gradient whose matrix is orthogonalised. This and the next three as Muon's author has them
    (kellerjordan.github.io/posts/muon)."""
    nesterov: bool = setting(True)
    """Orthogonalise the mean of the gradient and the mean gradient (Nesterov), not the mean gradient alone."""
    iterations: int = setting(5, more_than=0, at_most=100)
    """Iterations of Newton-Schulz, which brings all singular values near 1."""
    coefficients: list[float] = setting([3.4445, -4.775, 2.0315], at_least=-100, at_most=100, length=3)
    """a, b, c of an iteration: X <- aX + b(XX')X + c(XX')(XX')X."""
    update_rms: float = setting(0.2, more_than=0, at_most=100)
    """Root mean square of an update at learning rate 1: each is scaled by update_rms * sqrt(longer side). AdamW's is
    about 0.2, so that both take the same rate and weight decay (arXiv 2502.16982, section 2.2)."""
    dtype: str = setting("bf16", choices=("bf16", "fp32"))
    """Type in which matrices are iterated, and sent between ranks for it."""


@dataclass
class OptimizerConfig:
    kind: str = setting("adamw", choices=("adamw", "muon"), strict=True)
    """adamw, or muon: Muon for the matrices of decoder layers, vision layers and adapters, AdamW for all else
    (embedding, heads, router, position table, patch embedding, norms, biases)."""
    lr: float = setting(MISSING, more_than=0, at_most=10)
    """Peak learning rate."""
    lr_scale: dict[str, float] = setting({}, more_than=0, at_most=1000)
    """Factor of the learning rate by parameter group, as in {vision: 0.1}; groups that it does not name have 1."""
    betas: list[float] = setting([0.9, 0.999], at_least=0, less_than=1, length=2)
    """AdamW moment decays."""
    eps: float = setting(1e-8, more_than=0, at_most=1)
    """AdamW epsilon."""
    weight_decay: float = setting(0.0, at_least=0, at_most=100)
    """Decoupled weight decay, on matrices only."""
    max_grad_norm: float = setting(1.0, at_least=0, at_most=1e6)
    """Gradients are scaled down to this global norm; 0 turns clipping off."""
    muon: MuonConfig = section(MuonConfig)
    """Muon, where optimizer.kind is muon."""


@dataclass
class ScheduleConfig:
    kind: str = setting("constant", choices=("constant", "cosine"))
    """Learning rate after the warm-up: constant, or a cosine down to min_ratio of the peak."""
    warmup_steps: int = setting(0, at_least=0, at_most=10**9)
    """Steps of linear warm-up."""
    min_ratio: float = setting(0.0, at_least=0, at_most=1)
    """Share of the peak learning rate at which the cosine ends."""


@dataclass
class EmaConfig:
    decay: float = setting(0.0, at_least=0, less_than=1)
    """Decay of the averaged weights; 0 keeps none."""
    device: str = setting("auto", choices=("auto", "cpu"), resume="free")
    """Where the averages are: auto keeps them beside the weights; cpu in host memory, to which every step copies the
    weights."""


@dataclass
class TrainConfig:
    steps: int = setting(MISSING, more_than=0, at_most=10**9)
    """Optimizer steps of the stage."""
    log_every: int = setting(10, more_than=0, at_most=10**9)
    """Steps between lines of metrics.jsonl."""
    checkpoints: str = setting("", form="url")
    """Folder or URL (s3://, gs://, ...: what fsspec writes to) for checkpoints, in a folder for each run name; empty
    keeps them in the run folder."""
    save_every: int = setting(1000, more_than=0, at_most=10**9)
    """Steps between checkpoints; the last step is always saved."""
    local_every: int = setting(0, at_least=0, at_most=10**9)
    """Steps between local checkpoints, in a folder of each node with a copy on the next node, so that a restart repeats
    fewer steps; fewer than save_every. 0 makes none."""
    local_folder: str = setting("", form="path")
    """Folder of each node for local checkpoints, on its disk or in /dev/shm; {node} stands for the node's name. A
    restart takes the newest checkpoint, local or not. Empty looks for no local ones."""
    save_async: bool = setting(True)
    """Write checkpoints while training goes on; needs host memory for one copy of what is saved."""
    keep: int = setting(2, more_than=0, at_most=10**6)
    """Number of newest checkpoints to keep."""
    keep_every: int = setting(0, at_least=0, at_most=10**9)
    """Keep checkpoints of steps that are multiples of this for good; 0 keeps none."""
    keep_best: str = setting("", choices=("", *LOSS_METRICS, *VALIDATION_METRICS))
    """Also keep the checkpoint with the lowest mean of this loss since the checkpoint before, or the best value of this
    validation (val/...) after its step; empty keeps none."""
    stop_within_s: int = setting(240, more_than=0, at_most=604800)
    """Seconds that a run may take to finish its step and save after it was asked to stop; then the process ends."""
    sample_every: int = setting(0, at_least=0, at_most=10**9)
    """Steps between sample images; 0 makes them only at the end."""
    sample_from: str = setting("", form="url")
    """Shard folder, best a held-out one, whose records are the prompts of samples; empty makes no samples."""
    num_samples: int = setting(4, at_least=0, at_most=4096)
    """Samples per task."""
    max_skipped_steps: int = setting(10, more_than=0, at_most=10**6)
    """Stop after this many non-finite steps in a row."""
    gc_every: int = setting(100, at_least=0, at_most=10**9)
    """Steps between garbage collections, which all ranks run at once; 0 leaves them to Python."""


@dataclass
class GuardConfig:
    max_drop: float = setting(0.1, more_than=0, at_most=1)
    """How far the share of right answers may fall below its best before the guard warns; 1 turns this off."""
    max_rise: float = setting(0.1, more_than=0, at_most=1e6)
    """How far the held-out I2T loss may rise above its best, as a share of the best, before the guard warns."""
    stop: bool = setting(False)
    """Stop the run after a checkpoint where the guard warns."""


@dataclass
class ValidateConfig:
    every: int = setting(0, at_least=0, at_most=10**9)
    """Steps between validations; the first and the last step have one too. 0 validates never."""
    sources: list[SourceConfig] = setting([])
    """Held-out shard folders, on whose samples the losses are measured: those of the tasks in the mix, and of I2T even
    where it is not in the mix."""
    num_samples: int = setting(64, more_than=0, at_most=10**7)
    """Most held-out samples of each task. They are read once and stay in host memory, divided among the ranks."""
    questions: list[SourceConfig] = setting([])
    """Held-out shard folders with questions that have a short answer (I2T): the probe of understanding, by exact match.
    Empty asks none."""
    num_questions: int = setting(256, more_than=0, at_most=10**7)
    """Most questions."""
    guard: GuardConfig = section(GuardConfig)
    """Warns where understanding is forgotten while other tasks train."""


@dataclass
class StepWindow:
    first: int = setting(MISSING, more_than=0, at_most=10**9)
    """First step of the window."""
    last: int = setting(MISSING, more_than=0, at_most=10**9)
    """Last step of the window."""


@dataclass
class HealthConfig:
    skip_steps: list[StepWindow] = setting([])
    """Windows of steps that are not trained, as in [{first: 120, last: 124}]: their data are not read, and weights,
    averages and schedule stay as they are."""
    spike: str = setting("warn", choices=("warn", "rewind"))
    """What follows a loss far above the last 100 that were logged: a warning, or also a rewind: back to the newest
    checkpoint before the spike, and on without the steps that led to it."""
    skip_before: int = setting(1, at_least=0, at_most=10**6)
    """A rewind skips the steps after the last logged one, up to the spike, and so many more before them."""
    max_rewinds: int = setting(3, at_least=0, at_most=10**6)
    """Most rewinds of a stage; later spikes are warnings. The same number of mismatches of replays ends the run."""
    replay: int = setting(0, at_least=0, at_most=10**9)
    """Steps between replays, in which every rank computes one micro-step twice and compares loss and gradients bit by
    bit, to find hardware that computes wrongly; 0 makes none. Needs fsdp, and kernels that repeat their bits."""


@dataclass
class EngineConfig:
    kind: str = setting("fsdp", choices=("fsdp", "deepspeed"))
    """Engine that shards the model: FSDP2 or DeepSpeed ZeRO."""
    precision: str = setting("bf16", choices=("bf16", "fp32"))
    """bf16 (bf16 compute, fp32 master weights and reduction) or fp32."""
    fp8: str = setting("off", choices=("off", "tensorwise", "rowwise"))
    """Products of linears in 8-bit floats, in all layers of decoder and vision encoder but the first and the last: off,
    tensorwise (one scale for each operand) or rowwise (one for each of its rows). Needs fsdp and bf16."""
    device: str = setting("auto", choices=("auto", "cpu", "cuda"))
    """Device to train on; auto takes CUDA if there is a GPU."""
    zero_stage: int = setting(2, choices=(1, 2, 3))
    """What deepspeed divides among the ranks: 1 optimizer state, 2 gradients too, 3 weights too."""
    offload_optimizer: bool = setting(False)
    """Keep fp32 weights and optimizer state in host memory and update them there."""
    replicate: int = setting(1, more_than=0, at_most=65536)
    """Copies of the sharded model that fsdp keeps, each over an equal part of the ranks (HSDP); best the number of
    nodes."""
    frozen: str = setting("sharded", choices=("sharded", "replicated"))
    """How fsdp keeps units that do not train: sharded, or replicated (complete on every rank, never gathered)."""
    sequence_parallel: int = setting(1, more_than=0, at_most=4096)
    """Ranks that share the tokens of one pack (Ulysses), for packs too long for one GPU; divides the heads."""
    prefetch: int = setting(1, at_least=0, at_most=1024)
    """Decoder layers that fsdp gathers ahead, in forward and in backward; 0 leaves it to torch."""
    reshard_after_forward: bool = setting(True)
    """Free gathered weights between forward and backward; false keeps them until the optimizer changes them, which is
    faster where memory allows."""
    reduce_every_micro_step: bool = setting(True)
    """Whether fsdp reduces gradients after every micro-batch; false reduces them after the last one only: faster, more
    memory."""
    activation_checkpointing: str = setting("none", choices=("none", "full", "selective"))
    """Layers whose activations backward computes again: none, full (all layers of decoder and vision encoder) or
    selective (every second one)."""
    compile: bool = setting(False)
    """torch.compile for every layer; the first steps then take minutes."""
    timeout_s: int = setting(1800, more_than=0, at_most=604800)
    """Longest wait in seconds for other ranks until the first step is done, and while checkpoints and samples are
    written."""
    step_timeout_s: int = setting(600, more_than=0, at_most=604800)
    """Longest wait in seconds for other ranks from step to step. Shortly before, the log says where each rank is
    (logs/hang-...)."""
    debug_lockstep: bool = setting(False)
    """Compare before every module that all ranks run the same one, and stop where they differ; slow."""


@dataclass
class AttentionConfig:
    backend: str = setting("auto", choices=("auto", "flash", "flex", "sdpa"))
    """Attention kernel; auto chooses by device, sdpa is the dense reference."""


@dataclass
class InitConfig:
    source: str | None = setting(None, form="url", key="from")
    """Run folder, checkpoint or export whose weights the stage starts from; null starts from random weights. Called
    `from` in recipes."""
    ema: bool = setting(True)
    """Start from the averaged weights if the source has them."""
    gen_adapter: str = setting("random", choices=("random", "und"))
    """What the Gen adapter starts from at the hand-off from stage0 or from imported weights: random weights, or und, a
    copy of the Und adapter (ours: text-to-image alone gives its semantic columns almost no gradient before editing)."""
    any_stage: bool = setting(False)
    """Start from a checkpoint of any stage, not only of the one before or of the stage itself."""


@dataclass
class ResumeConfig:
    allow: list[str] = setting([])
    """Keys that may differ from the checkpoint's config when a run is resumed."""


@dataclass
class TrackerConfig:
    kind: list[str] = setting(["jsonl"], choices=("jsonl", "wandb", "tensorboard"), single=True)
    """Where metrics go beside metrics.jsonl: jsonl (nowhere), wandb (offline unless its usual variables say otherwise),
    tensorboard, or a list of them."""
    project: str = setting("emma")
    """W&B project."""
    entity: str = setting("")
    """W&B user or team; empty takes that of the key."""
    group: str = setting("")
    """W&B group; empty takes the name of the pipeline, and none for a single stage."""
    tags: list[str] = setting([])
    """W&B tags."""
    notes: str = setting("")
    """W&B notes."""


@dataclass
class ProfileConfig:
    steps: list[int] = setting([], at_least=1, at_most=10**9)
    """First and last step that the main rank traces, as in [10, 13]; empty traces none. The trace, and on a GPU its
    memory over these steps, go to the run folder's profile/."""


@dataclass
class Recipe:
    """One stage of training."""

    run: RunConfig = section(RunConfig, resume="free")
    """Name and folder of the run."""
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
    """AdamW, or Muon and AdamW."""
    schedule: ScheduleConfig = section(ScheduleConfig)
    """Learning rate over the steps."""
    ema: EmaConfig = section(EmaConfig)
    """Averaged weights."""
    train: TrainConfig = section(TrainConfig, resume="free")
    """Length of the stage; how often to log, save and sample."""
    validate: ValidateConfig = section(ValidateConfig, resume="free")
    """Losses and answers on held-out data while a stage trains."""
    generation: GenerationConfig = section(GenerationConfig, resume="free")
    """How images are generated: samples of a run, and what its exports take where nothing else is said."""
    health: HealthConfig = section(HealthConfig, resume="free")
    """Steps that are skipped, and what follows a spike of the loss."""
    engine: EngineConfig = section(EngineConfig, resume="free")
    """Sharding, precision and memory."""
    attention: AttentionConfig = section(AttentionConfig, resume="free")
    """Attention kernel."""
    init: InitConfig = section(InitConfig, resume="free")
    """Weights to start from."""
    resume: ResumeConfig = section(ResumeConfig, resume="free")
    """Exceptions from the resume rule."""
    tracker: TrackerConfig = section(TrackerConfig, resume="free")
    """Where metrics go, beside metrics.jsonl."""
    profile: ProfileConfig = section(ProfileConfig, resume="free")
    """Traces of single steps."""
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
