"""Builds all that training needs, in the one right order: model on the meta device -> freeze -> fp8 -> compile ->
activation checkpointing -> shard -> optimizer -> weights -> EMA."""

import gc
import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from emma_train.checkpoint import dcp, verify
from emma_train.checkpoint import folder as folders
from emma_train.config.load import load_stored_yaml
from emma_train.config.schema import EngineConfig, ModelConfig, Recipe
from emma_train.engine.activation_checkpointing import checkpoint_activations
from emma_train.engine.compiled import compile_layers
from emma_train.engine.deepspeed import DeepSpeedEngine
from emma_train.engine.flat_shard import local_chunks
from emma_train.engine.fp8 import use_fp8
from emma_train.engine.fsdp import FsdpEngine
from emma_train.engine.lockstep import watched
from emma_train.engine.protocol import Engine
from emma_train.engine.ulysses import divide_tokens
from emma_train.engine.world import World
from emma_train.export import export
from emma_train.model.attention import select_backend
from emma_train.model.decoder import DecoderLayer
from emma_train.model.emma import Emma
from emma_train.model.initial import start_value
from emma_train.stages.freeze import freeze
from emma_train.stages.handoff import HandOff, check_settings, plan_handoff
from emma_train.stages.stage import Stage, check_order, departures, makes_images
from emma_train.storage.paths import StoragePath, parse_path
from emma_train.training.ema import Ema
from emma_train.training.optimizer import log_optimizer, make_optimizer

log = logging.getLogger(__name__)
ENGINES: dict[str, type[FsdpEngine] | type[DeepSpeedEngine]] = {"fsdp": FsdpEngine, "deepspeed": DeepSpeedEngine}


@dataclass
class TrainingParts:
    engine: Engine
    ema: Ema | None
    trainable: dict[str, int]
    """Trainable parameters by group."""
    num_parameters: int
    """Parameters of the model, without the autoencoder."""
    handoff: HandOff | None
    """What was loaded from the previous stage; None at a start from the seed or a resume."""
    parent: dict[str, Any] | None
    """Path, stage and step of the checkpoint or export that the weights came from; None as above."""


def build(recipe: Recipe, stage: Stage, world: World, resuming: bool) -> TrainingParts:
    """A sharded model with its weights, optimizer and EMA.

    When `resuming`, weights stay uninitialised: checkpoint.dcp.load_training fills them. Raises UserError where the
    stage cannot follow that of init.from, or init.from does not fit the recipe's model.
    """
    select_backend(
        recipe.attention.backend, world.device, torch.bfloat16 if recipe.engine.precision == "bf16" else torch.float32
    )
    log.info("building the model")
    gc.collect()  # frees the model of a previous stage, which may be part of reference cycles
    source, parent = None, None
    if not resuming:
        source, parent = find_source(recipe, world)
        check_order(stage, parent["stage"] if parent else None, recipe.init)
    for line in departures(recipe, stage):
        log.warning(line)
    with torch.device("meta"):
        model = Emma(recipe.model, recipe.attention.backend)
    trainable = freeze(model, stage.trainable)
    num_parameters = sum(p.numel() for p in model.parameters())
    for layer in model.modules():
        if isinstance(layer, DecoderLayer):
            layer.skip_gen_branch = not makes_images(recipe)
    if world.sp_size > 1:
        divide_tokens(model.decoder, world)
    use_fp8(model, recipe.engine.fp8, world.device)
    if recipe.engine.compile:
        compile_layers(model, world.device)
    checkpoint_activations(model, recipe.engine.activation_checkpointing)
    learns = {name: tuple(p.shape) for name, p in model.named_parameters() if p.requires_grad}
    log_optimizer(recipe.optimizer, learns)
    optimizer = partial(make_optimizer, config=recipe.optimizer)
    config, max_norm = engine_config(recipe, stage), recipe.optimizer.max_grad_norm
    engine: Engine = ENGINES[recipe.engine.kind](model, config, max_norm, world, optimizer)
    if recipe.engine.debug_lockstep:
        engine = watched(engine, world, recipe.engine.timeout_s)
    handoff = None
    if source is not None:
        handoff = load_previous_stage(engine.weights, recipe, source)
    elif not resuming:
        set_initial(engine.weights, recipe.model, list(engine.weights))
    engine.sync_compute_weights()
    ema = None
    if recipe.ema.decay:
        ema = Ema({name: engine.weights[name] for name in learns}, recipe.ema.decay, recipe.ema.device)
    return TrainingParts(engine, ema, trainable, num_parameters, handoff, parent)


def engine_config(recipe: Recipe, stage: Stage) -> EngineConfig:
    """The recipe's, but with gradients reduced in every micro-step where no image is made though the Gen branch is
    trainable: torch's FSDP fails to add up the gradients of units that did not run."""
    if makes_images(recipe) or "gen_adapter" not in stage.trainable:
        return recipe.engine
    return replace(recipe.engine, reduce_every_micro_step=True)


def find_source(recipe: Recipe, world: World) -> tuple[StoragePath | None, dict[str, Any] | None]:
    """The checkpoint or export that init.from names, with its path, stage and step; every rank calls it. Raises
    UserError where there is none, or only incomplete ones."""
    if not recipe.init.source:
        return None, None
    given = parse_path(recipe.init.source)
    source: StoragePath = given
    if export.is_export(given):
        meta = world.on_main(partial(export.read_export_meta, given))
    else:
        source = verify.find_verified(given, world=world)
        meta = folders.read_meta(source) or {}
    return source, {"path": str(source), "stage": meta["stage"], "step": meta["step"]}


def stored_config(source: StoragePath) -> dict[str, Any]:
    """The config that a checkpoint or an export keeps, as it was written."""
    if export.is_export(source):
        return load_stored_yaml(source / export.RECIPE_FILE)
    config: dict[str, Any] = (folders.read_meta(source) or {})["config"]
    return config


def load_previous_stage(weights: Mapping[str, Tensor], recipe: Recipe, source: StoragePath) -> HandOff:
    """Fill the weights from the previous stage; new modules are cloned or start from the seed."""
    load: Callable[[Mapping[str, str], Mapping[str, Tensor]], None]
    if export.is_export(source):
        load, stored = partial(export.load_export_weights, source), export.export_shapes(source)
    else:
        load, stored = partial(dcp.load_checkpoint_weights, source), dcp.tensor_shapes(source)
    shapes = {name: tuple(weight.shape) for name, weight in weights.items()}
    init = recipe.init
    plan = plan_handoff(shapes, stored, recipe.model.vision, init.ema, str(init.source), init.gen_adapter)
    check_settings(stored_config(source), recipe)
    load(plan.loaded, weights)
    # Clones are read again, not copied: their shards may lie on other ranks than those of the original.
    load({name: plan.loaded[origin] for name, origin in plan.cloned.items()}, weights)
    set_initial(weights, recipe.model, plan.initial)
    return plan


@torch.no_grad()
def set_initial(weights: Mapping[str, Tensor], config: ModelConfig, names: Sequence[str]) -> None:
    """Fill the named weights with start values from the recipe's seed. Every rank computes each full tensor and copies
    its own part, so no communication is needed."""
    for name in names:
        value = start_value(name, weights[name].shape, config)
        for slices, chunk in local_chunks(weights[name]):
            chunk.copy_(value[slices])
