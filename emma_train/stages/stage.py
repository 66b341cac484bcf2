"""The stages of the paper's Table 2: what each trains, on which tasks, and what it follows (paper §4, Table 2)."""

import difflib
import logging
from collections.abc import Iterable
from dataclasses import dataclass, replace

from emma_train.config.mix import phases, task_shares
from emma_train.config.schema import InitConfig, Recipe
from emma_train.errors import UserError
from emma_train.model.parameter_groups import GROUPS
from emma_train.sequence.tasks import TASKS

log = logging.getLogger(__name__)
GEN_GROUPS = ("gen_adapter", "velocity_head")
"""Groups that only the Gen branch uses."""
ALL_BUT_AUTOENCODER = ("vision", "und_adapter", "gen_adapter", "decoder", "velocity_head")


@dataclass(frozen=True)
class Stage:
    name: str
    title: str
    trainable: tuple[str, ...]
    """Parameter groups that learn; all others are frozen."""
    tasks: tuple[str, ...]
    """Tasks that its mix may hold."""
    follows: tuple[str, ...]
    """Stages that it may start from; "" allows a start from imported or random weights."""
    stem_expert: bool = False
    router: bool = False
    loss: str = "tokens"
    """tokens (next-token and flow matching) or router (classification of images)."""


STAGES = {
    stage.name: stage
    for stage in (
        Stage("stage0", "alignment", ("und_adapter",), ("i2t",), ("",)),
        Stage("stage1", "pre-training", ALL_BUT_AUTOENCODER, tuple(TASKS), ("stage0", "")),
        Stage("stage2", "supervised fine-tuning", ALL_BUT_AUTOENCODER, tuple(TASKS), ("stage1",)),
        Stage("stage3", "quality tuning", ALL_BUT_AUTOENCODER, tuple(TASKS), ("stage2",)),
        Stage("stage4_expert", "STEM expert tuning", ("stem_expert",), ("i2t",), ("stage3",), stem_expert=True),
        Stage(
            "stage4_router",
            "router tuning",
            ("router",),
            ("i2t",),
            ("stage4_expert",),
            stem_expert=True,
            router=True,
            loss="router",
        ),
    )
}


def stage_of(recipe: Recipe, source: str = "recipe") -> Stage:
    """The stage of a recipe, its tasks and model checked. Raises UserError."""
    name = recipe.stage.name
    if name not in STAGES:
        near = difflib.get_close_matches(name, STAGES, n=1)
        advice = f"did you mean {near[0]}?" if near else f"it is one of {', '.join(STAGES)}"
        raise UserError(f"{source}: stage.name is {name!r}; {advice}")
    stage = STAGES[name]
    for phase in phases(recipe):
        for task, share in task_shares(phase.mix).items():
            if task not in stage.tasks:
                raise UserError(f"{source}: mix.{task} is {share}, but {name} trains {', '.join(stage.tasks)} only")
    vision = recipe.model.vision
    if (vision.stem_expert, vision.router) != (stage.stem_expert, stage.router):
        raise UserError(
            f"{source}: {name} needs model.vision.stem_expert={str(stage.stem_expert).lower()} and "
            f"model.vision.router={str(stage.router).lower()}"
        )
    _check_groups(recipe.optimizer.lr_scale, "optimizer.lr_scale", source)
    if not recipe.stage.trainable:
        return stage
    _check_trainable(recipe, stage, source)
    return replace(stage, trainable=tuple(group for group in GROUPS if group in recipe.stage.trainable))


def departures(recipe: Recipe, stage: Stage) -> list[str]:
    """One line for each override that departs from the paper or has no effect."""
    lines, usual = [], STAGES[stage.name].trainable
    if set(stage.trainable) != set(usual):
        lines.append(
            f"stage.trainable: {stage.name} trains {', '.join(stage.trainable)}; in the paper it trains "
            f"{', '.join(usual)}"
        )
    for group, scale in recipe.optimizer.lr_scale.items():
        if group not in stage.trainable:
            lines.append(f"optimizer.lr_scale.{group}={scale:g} has no effect: {group} does not train in {stage.name}")
    return lines


def _check_trainable(recipe: Recipe, stage: Stage, source: str) -> None:
    """Raise UserError where stage.trainable names a group that no gradient reaches in this stage."""
    groups = recipe.stage.trainable
    _check_groups(groups, "stage.trainable", source)
    reasons = {
        "stem_expert": None if stage.stem_expert else "model.vision.stem_expert is false",
        "router": None if stage.router else "model.vision.router is false",
    }
    if not makes_images(recipe):
        reasons |= dict.fromkeys(GEN_GROUPS, "its mix makes no images, so the Gen branch is skipped")
    if stage.loss == "router":
        reasons |= {group: "it computes the router's loss alone" for group in GROUPS if group != "router"}
    for group in groups:
        if reason := reasons.get(group):
            raise UserError(f"{source}: stage.trainable names {group}, which {stage.name} cannot train: {reason}")


def _check_groups(groups: Iterable[str], key: str, source: str) -> None:
    for group in groups:
        if group not in GROUPS:
            near = difflib.get_close_matches(group, GROUPS, n=1)
            advice = f"did you mean {near[0]}?" if near else f"they are {', '.join(GROUPS)}"
            raise UserError(f"{source}: {key} names {group!r}, which is no parameter group; {advice}")


def makes_images(recipe: Recipe) -> bool:
    """Whether any pack of the stage may hold a token of the Gen branch: decided by stage, never by pack (contract
    3)."""
    return any(TASKS[task].makes_image for phase in phases(recipe) for task in task_shares(phase.mix))


def check_order(stage: Stage, previous: str | None, init: InitConfig) -> None:
    """Raise UserError where `stage` cannot start from a checkpoint of stage `previous` (None: no checkpoint; "":
    imported weights), or where init.gen_adapter would replace a trained Gen adapter. With init.any_stage it may start
    from any stage, and a log line says so."""
    if init.gen_adapter == "und" and (previous or "") not in ("", "stage0"):
        raise UserError(
            f"init.from {init.source}: a checkpoint of {previous} has a trained Gen adapter, which "
            "init.gen_adapter=und would replace; set init.gen_adapter=random"
        )
    if (previous or "") in stage.follows:
        return
    if previous == stage.name:
        log.info("%s starts from a checkpoint of %s itself: its weights only, at step 0", stage.name, stage.name)
        return
    needed = " or ".join(name for name in stage.follows if name) or "imported or random weights"
    if init.any_stage:
        content = (
            "random weights" if previous is None else f"a checkpoint of {previous}" if previous else "imported weights"
        )
        log.info("%s starts from %s, not from %s: init.any_stage allows it", stage.name, content, needed)
        return
    if previous is None:
        raise UserError(f"{stage.name} starts from {needed}: set init.from to its run folder (init.from=runs/NAME)")
    content = f"is a checkpoint of {previous}" if previous else "holds imported weights"
    raise UserError(
        f"init.from {init.source}: {content}, but {stage.name} starts from {needed}; init.any_stage=true allows it"
    )
