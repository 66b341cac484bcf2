"""The one function that states and enforces the order: meta build -> freeze -> recompute -> shard -> weights ->
optimizer -> EMA."""

import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor

from emma_train.checkpoint import export, store, verify
from emma_train.checkpoint import folder as folders
from emma_train.config.errors import UserError
from emma_train.config.load import load_yaml
from emma_train.config.schema import ModelConfig, Recipe
from emma_train.engine.fsdp import FsdpEngine, shard
from emma_train.engine.recompute import recompute
from emma_train.engine.world import World
from emma_train.model.attention import choose
from emma_train.model.emma import Emma
from emma_train.model.initial import start_value
from emma_train.stages.freeze import freeze
from emma_train.stages.handoff import HandOff, check_settings, plan_handoff
from emma_train.stages.stage import Stage, check_order
from emma_train.training.ema import Ema
from emma_train.training.optimizer import make_optimizer

log = logging.getLogger(__name__)


@dataclass
class Built:
    engine: FsdpEngine
    ema: Ema | None
    trainable: dict[str, int]
    """Trainable parameters by group."""
    num_parameters: int
    """Parameters of the model, without the autoencoder."""
    handoff: HandOff | None
    """What was taken over from the previous stage; None at a start from the seed or a resume."""
    parent: dict[str, Any] | None
    """Where the weights came from: path, stage and step; None likewise."""


def build(recipe: Recipe, stage: Stage, world: World, resuming: bool) -> Built:
    """A sharded model with its weights, optimizer and EMA. Raises UserError on a stage out of order or a wrong source.

    When `resuming`, weights are left for checkpoint.store.load_training to fill.
    """
    if recipe.engine.kind != "fsdp":
        raise UserError(f"engine.kind={recipe.engine.kind} is not available in this version; use engine.kind=fsdp")
    choose(
        recipe.attention.backend, world.device, torch.bfloat16 if recipe.engine.precision == "bf16" else torch.float32
    )
    source, parent = None, None
    if not resuming:
        source, parent = find_source(recipe, world)
        check_order(stage, parent["stage"] if parent else None, recipe.init.source)
    with torch.device("meta"):
        model = Emma(recipe.model, recipe.attention.backend)
    trainable = freeze(model, stage.trainable)
    num_parameters = sum(p.numel() for p in model.parameters())
    recompute(model, recipe.engine.activation_checkpointing)
    shard(model, recipe.engine, world)
    model.to_empty(device=world.device)
    handoff = None
    if source is not None:
        handoff = take_over(model, recipe, source)
    elif not resuming:
        set_initial(model, recipe.model, [name for name, _ in model.named_parameters()])
    optimizer = make_optimizer(model, recipe.optimizer)
    ema = Ema(model, recipe.ema.decay) if recipe.ema.decay else None
    return Built(FsdpEngine(model, optimizer, recipe.engine), ema, trainable, num_parameters, handoff, parent)


def find_source(recipe: Recipe, world: World) -> tuple[Path | None, dict[str, Any] | None]:
    """The checkpoint or export that init.from names, with its path, stage and step; every rank calls it. Raises
    UserError where there is none that is whole."""
    if not recipe.init.source:
        return None, None
    given = Path(recipe.init.source)
    source = given if export.is_export(given) else verify.resolve(given, world=world)
    meta = export.read_meta(source) if export.is_export(source) else folders.read_meta(source) or {}
    return source, {"path": str(source), "stage": meta["stage"], "step": meta["step"]}


def take_over(model: nn.Module, recipe: Recipe, source: Path) -> HandOff:
    """Fill the model from the previous stage; new modules are cloned or start from the seed."""
    weights = export if export.is_export(source) else store
    stored = export.shapes(source) if weights is export else store.tensors(source)
    made_by = load_yaml(source / export.RECIPE) if weights is export else (folders.read_meta(source) or {})["config"]
    shapes = {name: tuple(p.shape) for name, p in model.named_parameters()}
    plan = plan_handoff(shapes, stored, recipe.model.vision, recipe.init.ema, str(recipe.init.source))
    check_settings(made_by["model"], recipe.model, str(recipe.init.source))
    weights.load_weights(source, plan.loaded, model)
    set_initial(model, recipe.model, plan.initial)
    parameters = dict(model.named_parameters())
    with torch.no_grad():
        for name, origin in plan.cloned.items():
            parameters[name].copy_(parameters[origin])
    return plan


@torch.no_grad()
def set_initial(model: nn.Module, config: ModelConfig, names: list[str]) -> None:
    """Start values from the recipe's seed, one whole tensor at a time, cut to this rank's shard without
    communication."""
    parameters = dict(model.named_parameters())
    for name in names:
        parameter = parameters[name]
        value: Tensor = start_value(name, parameter.shape, config).to(parameter.device)
        if isinstance(parameter, DTensor):
            value = distribute_tensor(value, parameter.device_mesh, parameter.placements, src_data_rank=None)
        parameter.copy_(value)
