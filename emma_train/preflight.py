"""What can be known of a run before it starts: inputs that are absent, packs that the ranks cannot share, memory, and
checkpoints that contradict the recipe. A job that waits a day in a queue should not end by one of them."""

from collections.abc import Callable, Sequence
from pathlib import Path

from emma_train.checkpoint import folder as folders
from emma_train.config.schema import Recipe
from emma_train.errors import UserError
from emma_train.export.export import is_export
from emma_train.plan import Plan, problems
from emma_train.plan.samples import ReadIndexRows
from emma_train.storage.paths import as_local, parse_path
from emma_train.storage.urls import is_local, local_path
from emma_train.training.build import stored_config
from emma_train.training.resume_rule import recipe_to_resume
from emma_train.training.run_folder import RunFolder

Stages = Sequence[tuple[Path, Recipe]]
ANY_GPU = "h100-80g"
"""For the checks that are the same for all kinds of GPU."""


def absent_inputs(stages: Stages, folder: Path = Path()) -> list[str]:
    """Local inputs of the recipes that are not on disk, each with its key; relative paths belong to `folder`."""
    absent: dict[str, None] = {}
    for index, (_, recipe) in enumerate(stages):
        sources = {f"data.sources[{n}].path": source.path for n, source in enumerate(recipe.data.sources)}
        held_out = {"sources": recipe.validate.sources, "questions": recipe.validate.questions}
        validated = {
            f"validate.{key}[{n}].path": source.path
            for key, entries in held_out.items()
            for n, source in enumerate(entries if recipe.validate.every else [])
        }
        shards = {**sources, **validated, "train.sample_from": recipe.train.sample_from}
        others = {"model.autoencoder.path": recipe.model.autoencoder.path, "data.tokenizer": recipe.data.tokenizer}
        # A later stage of a pipeline starts from the stage before it. A run with a checkpoint does not read init.from.
        start = {"init.from": recipe.init.source} if index == 0 else {}
        for key, path, file in [
            *((key, path, "manifest.json") for key, path in shards.items()),
            *((key, path, "") for key, path in (others | start).items()),
        ]:
            if not path or not is_local(path) or (folder / local_path(path) / file).exists():
                continue
            if key not in start or not _has_checkpoint(recipe, folder):
                absent[f"{key}: {Path(path) / file} is not there"] = None
    return list(absent)


def _has_checkpoint(recipe: Recipe, folder: Path = Path()) -> bool:
    """Whether a run goes on instead of starting from init.from; relative paths belong to `folder`."""
    checkpoints = RunFolder(recipe).checkpoints
    local = as_local(checkpoints)
    return folders.newest_checkpoint(checkpoints if local is None else folder / local) is not None


def working_folder(recipe: Path, stages: Stages) -> Path:
    """The folder to which the relative paths of a recipe belong: the current one; or, where inputs are absent there
    and none is in the recipe's repository (the folder that holds its recipes/), the latter."""
    current = Path.cwd()
    repositories = [folder.parent for folder in recipe.resolve().parents if folder.name == "recipes"]
    if repositories and absent_inputs(stages, current) and not absent_inputs(stages, repositories[0]):
        return repositories[0]
    return current


def node_counts(stages: Stages, numbers: Sequence[int], num_processes: int) -> list[int]:
    """Those numbers of nodes with so many processes each on which every stage can share the packs of a step."""
    shares = [set(Plan(recipe, str(file), 1, ANY_GPU).gpu_counts()) for file, recipe in stages]
    return [number for number in numbers if all(number * num_processes in counts for counts in shares)]


def check_start(
    stages: Stages, world_size: int, gpu: str | None, index_reader: Callable[[Recipe], ReadIndexRows]
) -> None:
    """Raise UserError on what would end the run at its start. gpu: the kind, where memory is to be checked too."""
    for file, recipe in stages:
        plan = Plan(recipe, str(file), world_size, gpu or ANY_GPU, read_index_rows=index_reader(recipe))
        if lines := problems(plan) if gpu else plan.sharing_problems():
            raise UserError(f"{file}: {'; '.join(lines)}")
        checkpoint = folders.newest_checkpoint(RunFolder(recipe).checkpoints)
        if checkpoint is not None:
            step = (folders.read_meta(checkpoint) or {})["step"]
            recipe_to_resume(recipe, stored_config(checkpoint), str(checkpoint), step)
    first = stages[0][1]
    source = None if _has_checkpoint(first) else first.init.source
    if source and is_local(source) and parse_path(source).exists() and not is_export(parse_path(source)):
        folders.find_checkpoint(source)
