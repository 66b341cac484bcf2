"""Bad input gives one line on stderr that names the fault, and exit code 2; no traceback, and nothing is written."""

import shutil
from pathlib import Path

import pytest

from tests.distributed.spawn import run_command
from tests.helpers import ASSETS
from tests.integration.conftest import MakeRecipe
from tests.runs import train
from tests.shards import every_task, write_shards


@pytest.fixture(scope="module")
def recipe(make_recipe: MakeRecipe, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_recipe(tmp_path_factory.mktemp("bad"))


@pytest.fixture(scope="module")
def broken(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder whose second shard is missing."""
    folder = write_shards(tmp_path_factory.mktemp("broken") / "set", every_task(8), per_shard=12)
    (folder / "shard-000001.tar").unlink()
    return folder


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (["train.stesp=3"], "unknown key train.stesp; did you mean train.steps?"),
        (["train.steps=three"], "train.steps"),
        (["train.steps=0"], "train.steps is 0; it must be more than 0 and at most 1000000000"),
        (["engine.precision=fp16"], "engine.precision is 'fp16'; it is one of bf16, fp32"),
        (["attention.backend=flex"], "attention.backend=flex needs an NVIDIA GPU"),
        (
            ["data.samples_per_step=25"],
            "data.samples_per_step is 25, which the mix of phase stage1 (i2t=1, t2i=1) cannot divide",
        ),
        (["data.slots=16"], "12 i2t samples per step cannot reach each of 16 slots"),
        (["data.pack_tokens=40"], "tokens into one slot, more than data.pack_tokens=40"),
        (["data.pack_tokens=40", "data.workers=1"], "tokens into one slot, more than data.pack_tokens=40"),
        (["model.decoder.vocab=100"], "more than model.decoder.vocab=100"),
        (["stage.name=stage5"], "stage.name is 'stage5'; did you mean stage"),
        (["stage.name=stage0"], "mix.t2i is 1, but stage0 trains i2t only"),
        (["stage.name=stage3"], "stage3 starts from stage2: set init.from to its run folder"),
        (["init.from=no/such/run"], "init.from: no/such/run does not exist"),
        (["data.tokenizer=no/such/file"], "no/such/file"),
        (["model.autoencoder.path=no/such/folder"], "no/such/folder"),
        (["data.sources=[{path: no/such/folder}]"], "no/such/folder/manifest.json: cannot read"),
        (["data.sources=[{path: BROKEN}]"], "shard-000001.tar: missing"),
    ],
    ids=lambda value: value[0] if isinstance(value, list) else "",
)
def test_one_line_names_what_is_wrong(recipe: Path, broken: Path, overrides: list[str], said: str) -> None:
    words = [word.replace("BROKEN", str(broken)) for word in overrides]
    (outcome,) = train(recipe, "run.name=never", *words, code=2)
    (line,) = outcome.error_lines
    assert said in line
    assert line.startswith("emma-train train: ")
    assert not (recipe.parent / "never" / "checkpoints").exists()


def test_the_command_itself_says_it_in_one_line_too(recipe: Path) -> None:
    outcome = run_command("train", str(recipe), "optimizer.learning_rate=1", code=2)
    (line,) = outcome.error_lines
    assert "unknown key optimizer.learning_rate" in line
    assert outcome.out == ""


@pytest.mark.parametrize("content", [None, "- a\n- list\n", "a: [1, 2\n", "just words\n"])
def test_what_is_no_recipe_is_named(tmp_path: Path, content: str | None) -> None:
    path = tmp_path / "recipe.yaml"
    if content is not None:
        path.write_text(content)
    (outcome,) = train(path, code=2)
    (line,) = outcome.error_lines
    assert str(path) in line


def test_a_stage_does_not_start_from_one_that_it_does_not_follow(make_recipe: MakeRecipe, tmp_path: Path) -> None:
    train(make_recipe(tmp_path, "stage0"), "train.steps=1")
    later = make_recipe(tmp_path, "stage2")
    (outcome,) = train(later, f"init.from={tmp_path / 'stage0'}", code=2)
    (line,) = outcome.error_lines
    assert "is a checkpoint of stage0, but stage2 starts from stage1" in line


def test_a_run_folder_without_a_whole_checkpoint_is_no_start(recipe: Path, tmp_path: Path) -> None:
    (tmp_path / "run" / "checkpoints" / "step-00000001.tmp").mkdir(parents=True)
    (outcome,) = train(recipe, "run.name=never", f"init.from={tmp_path / 'run'}", code=2)
    (line,) = outcome.error_lines
    assert "holds no valid checkpoint" in line


def test_a_model_of_another_shape_is_refused_before_training(make_recipe: MakeRecipe, tmp_path: Path) -> None:
    train(make_recipe(tmp_path, "stage0"), "train.steps=1")
    recipe = make_recipe(tmp_path, "stage1")
    (outcome,) = train(recipe, f"init.from={tmp_path / 'stage0'}", "model.decoder.intermediate_size=64", code=2)
    (line,) = outcome.error_lines
    assert "has shape [48, 32] there and [64, 32] in this recipe" in line


def test_a_shard_that_shrank_is_refused(recipe: Path, tmp_path: Path) -> None:
    shutil.copytree(ASSETS / "emoji" / "heldout_concepts", folder := tmp_path / "set")
    tar = folder / "shard-000000.tar"
    tar.write_bytes(tar.read_bytes()[:-1024])
    (outcome,) = train(recipe, "run.name=never", f"data.sources=[{{path: {folder}}}]", code=2)
    (line,) = outcome.error_lines
    assert "shard-000000.tar: has" in line


def test_a_world_that_does_not_divide_the_slots_is_told_under_torchrun(recipe: Path) -> None:
    """torchrun exits with code 1 and prints more lines, but our line is among them."""
    outcome = run_command("train", str(recipe), "run.name=never", processes=4, code=1)
    said = "data.slots is 6, which 4 processes cannot share evenly; it fits 1, 2, 3, 6 processes"
    assert said in outcome.err
    ours = outcome.err[: outcome.err.index("torch.distributed.elastic")] if "elastic" in outcome.err else outcome.err
    assert "UserError" not in ours
    assert not (recipe.parent / "never" / "checkpoints").exists()


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        (["check", "no/such/folder"], "no/such/folder"),
        (["index", "no/such/folder", "--tokenizer", str(ASSETS / "tokenizer")], "no/such/folder"),
        (["stats", "BROKEN"], "shard-000001.tar: missing"),
        (["check", "BROKEN"], "shard-000001.tar: missing"),
        (["cache-latents", "BROKEN", "--autoencoder", "no/such/autoencoder"], "no/such/autoencoder"),
    ],
    ids=lambda value: value[0] if isinstance(value, list) else "",
)
def test_emma_data_names_what_is_wrong_in_one_line(broken: Path, argv: list[str], said: str) -> None:
    words = [word.replace("BROKEN", str(broken)) for word in argv]
    outcome = run_command(*words, module="data_pipelines", code=2)
    (line,) = outcome.error_lines
    assert said in line
