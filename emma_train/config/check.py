"""Checks of a recipe: each field against its facts (config/values.py), then the rules that join several fields.

Each failure names the fields, their values and a way out.
"""

import logging

from emma_train.config.mix import TASK_NAMES, phases, samples_per_task, task_shares
from emma_train.config.schema import ANSWER_METRICS, EngineConfig, PhaseConfig, Recipe, TrainConfig
from emma_train.config.values import check_values
from emma_train.errors import UserError

log = logging.getLogger(__name__)
SHAREABLE = ("q_proj", "k_proj", "v_proj", "o_proj", "mlp", "input_norm", "mlp_norm", "norm")


def check_recipe(recipe: Recipe, source: str) -> None:
    """Raise UserError on the first mistake in a recipe; `source` names the recipe in the message."""
    check_values(recipe, source)
    check_model(recipe, source)
    _check_comparisons(recipe, source)
    _check_engine(recipe.engine, source)
    _check_sequence(recipe, source)
    if not recipe.data.caption_questions:
        raise UserError(f"{source}: data.caption_questions is empty; name at least one question")
    for phase in phases(recipe):
        _check_mix(recipe, phase, source)
    _check_local(recipe.train, source)
    _check_keeping(recipe, source)
    _check_validation(recipe, source)
    for window in recipe.health.skip_steps:
        if window.last < window.first:
            raise UserError(f"{source}: health.skip_steps has a window from {window.first} to {window.last}; swap them")
    if recipe.health.replay and recipe.engine.kind != "fsdp":
        raise UserError(f"{source}: health.replay needs engine.kind=fsdp, not {recipe.engine.kind}")
    traced = recipe.profile.steps
    if traced and (len(traced) != 2 or traced[0] > traced[1]):
        raise UserError(f"{source}: profile.steps is {traced}; it must be the first and the last step, as in [10, 13]")
    before_last = sum(phase.steps for phase in recipe.data.phases[:-1])
    if recipe.data.phases and before_last >= recipe.train.steps:
        last = recipe.data.phases[-1].name
        log.warning(
            "%s: train.steps=%d ends before phase %s, which begins at %d", source, recipe.train.steps, last, before_last
        )


def check_world(slots: int, world: int) -> None:
    """Raise UserError if the slots of a step cannot be divided evenly among `world` ranks."""
    if slots % world:
        fits = ", ".join(str(n) for n in range(1, slots + 1) if slots % n == 0)
        raise UserError(f"data.slots is {slots}, which {world} processes cannot share evenly; it fits {fits} processes")


def _check_sequence(recipe: Recipe, source: str) -> None:
    ranks, decoder = recipe.engine.sequence_parallel, recipe.model.decoder
    if decoder.heads % ranks or (decoder.kv_heads % ranks and ranks % decoder.kv_heads):
        raise UserError(
            f"{source}: engine.sequence_parallel is {ranks}; it must divide model.decoder.heads ({decoder.heads}), and "
            f"divide kv_heads ({decoder.kv_heads}) or be a multiple of them"
        )
    if ranks > 1 and recipe.engine.compile:
        raise UserError(f"{source}: engine.compile does not work with engine.sequence_parallel; set one of them")


def _check_engine(engine: EngineConfig, source: str) -> None:
    if engine.debug_lockstep and engine.compile:
        raise UserError(
            f"{source}: engine.debug_lockstep compares modules one by one, which compiled layers hide; "
            "set engine.compile=false"
        )
    if engine.fp8 != "off" and (engine.kind, engine.precision) != ("fsdp", "bf16"):
        raise UserError(
            f"{source}: engine.fp8 is {engine.fp8}, which needs engine.kind=fsdp and engine.precision=bf16, not "
            f"{engine.kind} and {engine.precision}; set engine.fp8=off"
        )
    if engine.kind == "fsdp":
        return
    for key, usual in (("replicate", 1), ("frozen", "sharded")):
        if (value := getattr(engine, key)) != usual:
            raise UserError(
                f"{source}: engine.{key} is {value}, which engine.kind=deepspeed does not support; leave it out"
            )
    if engine.compile and engine.zero_stage == 3:
        raise UserError(
            f"{source}: engine.compile does not work with ZeRO-3, which gathers weights inside a layer; "
            f"set engine.zero_stage=2 or engine.kind=fsdp"
        )


def _check_mix(recipe: Recipe, phase: PhaseConfig, source: str) -> None:
    shares, name = task_shares(phase.mix), f"mix of phase {phase.name}"
    total = sum(shares.values())
    if total == 0:
        raise UserError(f"{source}: {name} needs at least one share above 0 (mix.i2t=1)")
    if recipe.data.samples_per_step and recipe.data.mix_by == "tokens":
        raise UserError(f"{source}: data.mix_by=tokens fills the packs by tokens; leave out data.samples_per_step")
    if recipe.data.samples_per_step % total:
        fits = recipe.data.samples_per_step // total * total or total
        raise UserError(
            f"{source}: data.samples_per_step is {recipe.data.samples_per_step}, which the {name} "
            f"({', '.join(f'{task}={share}' for task, share in shares.items())}) cannot divide exactly; {fits} would do"
        )
    for task, count in samples_per_task(phase.mix, recipe.data.samples_per_step).items():
        if 0 < count < recipe.data.slots:
            raise UserError(
                f"{source}: {count} {task} samples per step cannot reach each of {recipe.data.slots} slots "
                f"(data.slots); raise data.samples_per_step or lower data.slots"
            )
    weights = [entry.weight for entry in phase.sources]
    has_weights = any(weight is not None for weight in weights)
    if has_weights and None in weights:
        raise UserError(f"{source}: the sources of phase {phase.name} have weights {weights}; give each one, or none")
    if not phase.sources:
        raise UserError(f"{source}: data.sources is empty; name a folder of shards ({{path: FOLDER}})")


def validated_tasks(recipe: Recipe) -> list[str]:
    """Tasks whose held-out losses are measured: those of the mix, and I2T, so that it shows where it is forgotten."""
    mixes = [phase.mix for phase in phases(recipe)]
    return [task for task in TASK_NAMES if task == "i2t" or any(getattr(mix, task) for mix in mixes)]


def _check_validation(recipe: Recipe, source: str) -> None:
    validate = recipe.validate
    if validate.every and not validate.sources and not validate.questions:
        raise UserError(
            f"{source}: validate.every is {validate.every}, but there is nothing to validate on; name a held-out "
            "folder of shards (validate.sources=[{path: FOLDER}])"
        )
    trained = {entry.path for phase in phases(recipe) for entry in phase.sources}
    for key, entries in (("sources", validate.sources), ("questions", validate.questions)):
        for index, entry in enumerate(entries):
            if validate.every and entry.path in trained:
                log.warning("%s: validate.%s[%d] %s is trained on as well", source, key, index, entry.path)


def _check_keeping_validated(recipe: Recipe, source: str) -> None:
    train, validate, name = recipe.train, recipe.validate, recipe.train.keep_best
    if not validate.every or train.save_every % validate.every:
        raise UserError(
            f"{source}: train.keep_best is {name}, which each checkpoint must have; train.save_every "
            f"({train.save_every}) must be a multiple of validate.every ({validate.every})"
        )
    if name.startswith("val/ema/") and not recipe.ema.decay:
        raise UserError(f"{source}: train.keep_best is {name}, but ema.decay is 0; take {name.replace('ema/', '')}")
    if name in ANSWER_METRICS and not validate.questions:
        raise UserError(f"{source}: train.keep_best is {name}, but validate.questions names no folder")
    if name not in ANSWER_METRICS and not validate.sources:
        raise UserError(f"{source}: train.keep_best is {name}, but validate.sources names no folder")
    task = name.partition("loss/")[2]
    if task and task not in validated_tasks(recipe):
        raise UserError(f"{source}: train.keep_best is {name}, but {task} is not in the mix")


def _check_local(train: TrainConfig, source: str) -> None:
    if train.local_every and not train.local_folder:
        raise UserError(
            f"{source}: train.local_every is {train.local_every}, but train.local_folder names no folder; name one on "
            "a disk of each node, or /dev/shm/emma"
        )
    if train.local_every >= train.save_every:
        raise UserError(
            f"{source}: train.local_every is {train.local_every}; it must be below train.save_every "
            f"({train.save_every}), or local checkpoints save no work"
        )


def _check_keeping(recipe: Recipe, source: str) -> None:
    train = recipe.train
    if train.keep_every % train.save_every:
        raise UserError(
            f"{source}: train.keep_every is {train.keep_every}, no multiple of train.save_every ({train.save_every}); "
            "there is no such checkpoint to keep"
        )
    if train.keep_best.startswith("val/"):
        _check_keeping_validated(recipe, source)
        return
    task = train.keep_best.partition("/")[2]
    if task and not any(getattr(phase.mix, task) for phase in phases(recipe)):
        raise UserError(f"{source}: train.keep_best is {train.keep_best}, but {task} is not in the mix")
    if train.keep_best and train.log_every > train.save_every:
        raise UserError(
            f"{source}: train.keep_best needs a logged loss for each checkpoint; lower train.log_every "
            f"({train.log_every}) to train.save_every ({train.save_every})"
        )


def _check_comparisons(recipe: Recipe, source: str) -> None:
    """The switches of the model that EMMA is compared with."""
    if recipe.model.adapters == "one" and recipe.init.gen_adapter == "und":
        raise UserError(
            f"{source}: init.gen_adapter is und, but model.adapters is one, so the Gen adapter has no matrices to "
            "start; set init.gen_adapter=random"
        )
    if recipe.model.fusion == "latent" and (recipe.model.vision.stem_expert or recipe.model.vision.router):
        raise UserError(
            f"{source}: model.fusion is latent, so the vision encoder runs on no image and its STEM expert and router "
            "would learn nothing; set model.fusion=channel, or leave out stage 4"
        )
    if recipe.model.fusion in ("latent", "token") and any(phase.mix.recon for phase in phases(recipe)):
        raise UserError(
            f"{source}: model.fusion is {recipe.model.fusion}, but recon hides the latent half of tokens that "
            "have both; set mix.recon=0, or model.fusion=channel"
        )


def check_model(recipe: Recipe, source: str) -> None:
    """Raise UserError on the first mistake in the model section."""
    check_values(recipe.model, source, "model.")
    vision, decoder = recipe.model.vision, recipe.model.decoder
    if recipe.model.autoencoder.pixels != vision.patch * vision.shuffle:
        raise UserError(
            f"{source}: model.autoencoder.pixels is {recipe.model.autoencoder.pixels}, but vision.patch * "
            f"vision.shuffle is {vision.patch * vision.shuffle}; both grids must agree to be fused channel by channel"
        )
    if decoder.num_shared_layers > decoder.num_layers:
        raise UserError(
            f"{source}: model.decoder.num_shared_layers is {decoder.num_shared_layers}; it lies between 0 and "
            f"num_layers ({decoder.num_layers})"
        )
    if unknown := [name for name in decoder.shared if name not in SHAREABLE]:
        raise UserError(f"{source}: model.decoder.shared names {unknown[0]!r}; it may name {', '.join(SHAREABLE)}")
    if decoder.heads % decoder.kv_heads:
        raise UserError(
            f"{source}: model.decoder.heads ({decoder.heads}) is no multiple of kv_heads ({decoder.kv_heads})"
        )
    if recipe.model.time_features % 2:
        raise UserError(f"{source}: model.time_features is {recipe.model.time_features}; it must be an even number")
    if decoder.head_dim % 2:
        raise UserError(
            f"{source}: model.decoder.head_dim is {decoder.head_dim}; rotary embedding needs an even number"
        )
    if vision.expert_layers >= vision.num_used_layers:
        raise UserError(
            f"{source}: model.vision.expert_layers is {vision.expert_layers}, but the encoder has "
            f"{vision.num_used_layers} layers up to its feature_layer; at least one of them is not an expert's"
        )
    if vision.hidden % vision.heads:
        raise UserError(f"{source}: model.vision.hidden ({vision.hidden}) is no multiple of heads ({vision.heads})")
    pixels = recipe.model.autoencoder.pixels
    for key, image in (("und", recipe.data.und), ("gen", recipe.data.gen)):
        if image.side % pixels:
            raise UserError(f"{source}: data.{key}.side is {image.side}; it must be a multiple of {pixels}")
