"""The task mix of a recipe: its phases, the names of the tasks, and the samples of each task in a step."""

from dataclasses import fields

from emma_train.config.schema import MixConfig, PhaseConfig, Recipe

TASK_NAMES = tuple(f.name for f in fields(MixConfig))
"""Names of all tasks, in the order of MixConfig. sequence/tasks.py says what each task is."""


def phases(recipe: Recipe) -> list[PhaseConfig]:
    """The phases of the recipe. A recipe without phases has one, which lasts for all its steps."""
    if recipe.data.phases:
        return [PhaseConfig(p.name, p.steps, p.mix, p.sources or recipe.data.sources) for p in recipe.data.phases]
    return [PhaseConfig(recipe.stage.name, recipe.train.steps, recipe.mix, recipe.data.sources)]


def task_shares(mix: MixConfig) -> dict[str, int]:
    """The share of every task that the mix trains."""
    return {task: share for task in TASK_NAMES if (share := getattr(mix, task))}


def samples_per_task(mix: MixConfig, samples_per_step: int) -> dict[str, int]:
    """Samples of each task in one optimizer step; exact, so samples_per_step is a multiple of the shares' sum."""
    shares = task_shares(mix)
    return {task: share * samples_per_step // sum(shares.values()) for task, share in shares.items()}
