"""The stages of the paper's Table 2: what each trains, on which tasks, and what it follows (paper §4, Table 2)."""

import difflib
from dataclasses import dataclass

from emma_train.config.mix import TASK_NAMES, phases
from emma_train.config.schema import Recipe
from emma_train.errors import UserError

GROUPS = {
    "und_adapter": ("und_adapter.",),
    "gen_adapter": ("gen_adapter.",),
    "velocity_head": ("velocity_head.",),
    "stem_expert": ("vision.stem_layers.",),
    "router": ("vision.router.",),
    "vision": ("vision.",),
    "decoder": ("decoder.",),
}
"""Parameter groups by name prefix; the first that fits wins. The autoencoder belongs to none: it never trains."""
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
        Stage("stage1", "pre-training", ALL_BUT_AUTOENCODER, TASK_NAMES, ("stage0", "")),
        Stage("stage2", "supervised fine-tuning", ALL_BUT_AUTOENCODER, TASK_NAMES, ("stage1",)),
        Stage("stage3", "quality tuning", ALL_BUT_AUTOENCODER, TASK_NAMES, ("stage2",)),
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


def stage_of(recipe: Recipe, where: str = "recipe") -> Stage:
    """The stage of a recipe, its tasks and model checked. Raises UserError."""
    name = recipe.stage.name
    if name not in STAGES:
        near = difflib.get_close_matches(name, STAGES, n=1)
        advice = f"did you mean {near[0]}?" if near else f"it is one of {', '.join(STAGES)}"
        raise UserError(f"{where}: stage.name is {name!r}; {advice}")
    stage = STAGES[name]
    for phase in phases(recipe):
        for task in TASK_NAMES:
            if getattr(phase.mix, task) and task not in stage.tasks:
                raise UserError(
                    f"{where}: mix.{task} is {getattr(phase.mix, task)}, but {name} trains "
                    f"{', '.join(stage.tasks)} only"
                )
    vision = recipe.model.vision
    if (vision.stem_expert, vision.router) != (stage.stem_expert, stage.router):
        raise UserError(
            f"{where}: {name} needs model.vision.stem_expert={str(stage.stem_expert).lower()} and "
            f"model.vision.router={str(stage.router).lower()}"
        )
    return stage


def makes_images(recipe: Recipe) -> bool:
    """Whether any pack of the stage may hold a token of the Gen branch: decided by stage, never by pack (contract
    3)."""
    return any(phase.mix.t2i or phase.mix.it2i for phase in phases(recipe))


def check_order(stage: Stage, previous: str | None, source: str | None) -> None:
    """Raise UserError where `stage` cannot start from a checkpoint of stage `previous` (None: no checkpoint)."""
    if (previous or "") in stage.follows:
        return
    needed = " or ".join(name for name in stage.follows if name)
    if previous is None:
        raise UserError(f"{stage.name} starts from {needed}: set init.from to its run folder (init.from=runs/NAME)")
    allowed = needed or "imported or random weights"
    found = f"is a checkpoint of {previous}" if previous else "holds imported weights"
    raise UserError(f"init.from {source}: {found}, but {stage.name} starts from {allowed}")
