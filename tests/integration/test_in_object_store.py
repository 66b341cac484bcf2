"""Checkpoints in an object store, through the command line: train.checkpoints, and its URL wherever a checkpoint is
accepted."""

import shutil
from pathlib import Path

import pytest
import torch

from emma_train.checkpoint import folder as folders
from emma_train.checkpoint import verify
from emma_train.storage.paths import parse_path
from emma_train.storage.safetensors_io import Tensors
from tests.distributed.ranks import command
from tests.distributed.spawn import Outcome, run_ranks
from tests.integration.conftest import MakeRecipe
from tests.object_stores import url_of
from tests.runs import checkpoint, differences, learnt, stored, train, train_until

STEPS = 8


def ask(*argv: str, code: int = 0) -> Outcome:
    """An emma-train command on one forked rank, where the test store is registered."""
    (outcome,) = run_ranks(1, command, list(argv))
    assert outcome.value == code, f"exit code {outcome.value}\n{outcome.out}\n{outcome.err}"
    return outcome


@pytest.fixture(scope="module")
def recipe(make_recipe: MakeRecipe, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Stage 0, which freezes all but an adapter; a checkpoint every other step."""
    root = tmp_path_factory.mktemp("store")
    return make_recipe(root, "stage0", train={"steps": STEPS, "save_every": 2, "log_every": 1})


@pytest.fixture(scope="module")
def bucket(recipe: Path) -> Path:
    """The folder with the content of the store."""
    return recipe.parent / "bucket"


@pytest.fixture(scope="module")
def straight(recipe: Path) -> Path:
    """Two processes, checkpoints in the run folder."""
    train(recipe, "run.name=straight", processes=2)
    return recipe.parent / "straight"


@pytest.fixture(scope="module")
def remote(recipe: Path, bucket: Path, straight: Path) -> str:
    """The same with checkpoints in a store: stopped after step 5, its last checkpoint damaged, then resumed. Returns
    its URL."""
    where = f"train.checkpoints={url_of(bucket)}"
    train_until(recipe, 5, "run.name=remote", where, processes=2)
    assert names(bucket / "remote") == ["frozen", "latest", *(folders.step_name(step) for step in (2, 4, 5))]
    (bucket / "remote" / "step-00000005" / "meta.json").unlink()
    outcomes = train(recipe, "run.name=remote", where, processes=2)
    assert f"resumed {url_of(bucket)}/remote/step-00000004" in outcomes[0].err
    return url_of(bucket / "remote")


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def test_a_run_that_goes_on_from_a_store_is_the_one_that_never_stopped(
    recipe: Path, bucket: Path, straight: Path, remote: str
) -> None:
    run = recipe.parent / "remote"
    assert learnt(run) == learnt(straight)
    newest = folders.find_checkpoint(remote)
    assert folders.find_checkpoint(run) == newest  # the recipe in the run folder says where
    assert differences(stored(newest), stored(checkpoint(straight, STEPS))) == []
    assert not (run / "checkpoints").exists()
    kept = [folders.step_name(step) for step in (4, 6, STEPS)]
    assert names(bucket / "remote") == ["frozen", "latest", *kept]
    assert all(verify.find_damage(folder) is None for folder in folders.list_steps(parse_path(remote)))


def test_a_store_s_url_stands_wherever_a_checkpoint_may(
    remote: str, straight: Path, make_recipe: MakeRecipe, tmp_path: Path
) -> None:
    newest = f"{remote}/step-{STEPS:08d}"
    assert "frozen weights" in ask("inspect", remote).out
    listed = ask("inspect", remote, "--verify").out.splitlines()
    assert listed == [f"{remote}/{folders.step_name(step)}: whole" for step in (STEPS, 6, 4)]

    alone = tmp_path / "alone"
    ask("inspect", newest, "--self-contained", str(alone))
    assert ask("inspect", str(alone), "--verify").out == f"{alone}: whole\n"
    assert differences(stored(alone), stored(checkpoint(straight, STEPS))) == []

    for name, model in (("remote", remote), ("local", str(straight))):
        ask("export", model, str(tmp_path / name))
    one, other = (Tensors(tmp_path / name) for name in ("local", "remote"))
    assert one.specs == other.specs and all(torch.equal(one.read(name), other.read(name)) for name in one.specs)

    answers = [ask("generate", m, "--task", "t2i", "--prompt", "a cat", "--steps", "1", "--out", str(tmp_path / name))
               for name, m in (("a", remote), ("b", str(straight)))]  # fmt: skip
    images = [Path(answer.out.strip()).read_bytes() for answer in answers]
    assert images[0] == images[1]

    for name, source in (("from-remote", remote), ("from-local", str(straight))):
        later = make_recipe(tmp_path, "stage1", init={"from": source})
        (outcome,) = train(later, "train.steps=1", f"run.name={name}")
        assert f"from {source}: loaded" in outcome.err
    assert learnt(tmp_path / "from-remote") == learnt(tmp_path / "from-local")

    (line,) = ask("evaluate", remote, code=2).error_lines
    assert "say where to write the scores (--out FILE)" in line


def test_inspect_verify_names_the_damaged_file_in_a_store(remote: str, bucket: Path, tmp_path: Path) -> None:
    shutil.copytree(bucket / "remote", tmp_path / "copy")
    flip(tmp_path / "copy" / "step-00000006" / "optimizer" / "__1_0.distcp")
    url = url_of(tmp_path / "copy")
    good, bad, old = ask("inspect", url, "--verify", code=1).out.splitlines()
    assert good == f"{url}/step-{STEPS:08d}: whole" and old == f"{url}/step-00000004: whole"
    assert bad.startswith(f"{url}/step-00000006: optimizer/__1_0.distcp is damaged: SHA-256 ")


def test_a_run_whose_checkpoints_lie_elsewhere_does_not_begin_anew(recipe: Path, bucket: Path) -> None:
    train_until(recipe, 4, "run.name=moving")
    run, where = recipe.parent / "moving", f"train.checkpoints={url_of(bucket)}"
    (outcome,) = train(recipe, "run.name=moving", where, code=2)
    assert f"{run} has its checkpoints in {run}/checkpoints, and there are none in folder://" in outcome.error_lines[-1]
    shutil.move(run / "checkpoints", bucket / "moving")
    (outcome,) = train(recipe, "run.name=moving", where)
    assert f"resumed {url_of(bucket)}/moving/step-00000004" in outcome.err
    (outcome,) = train(recipe, "run.name=moving", "train.steps=10", code=2)
    assert f"has its checkpoints in {url_of(bucket)}/moving" in outcome.error_lines[-1]


@pytest.mark.parametrize(
    ("url", "code", "said"),
    [
        ("oci://bucket/runs", 2, "oci:// needs a package that is not installed"),
        ("nowhere://bucket/runs", 2, "fsspec knows no file system nowhere://"),
        ("http://127.0.0.1:9/runs", 1, "http://127.0.0.1:9/runs/never: the object store fails (ClientConnectorError"),
        ("s3://me:topsecret@bucket/runs", 2, "s3://bucket/runs: the URL must hold no password"),
    ],
)
def test_a_store_that_takes_nothing_is_told_before_training(recipe: Path, url: str, code: int, said: str) -> None:
    for outcome in train(recipe, "run.name=never", f"train.checkpoints={url}", processes=2, code=code):
        (line,) = outcome.error_lines
        assert said in line and "topsecret" not in line
    assert not (recipe.parent / "never").exists()


def test_the_stages_of_a_pipeline_keep_theirs_apart_and_find_each_other(
    make_recipe: MakeRecipe, tmp_path: Path
) -> None:
    for stage in ("stage0", "stage1"):
        make_recipe(tmp_path, stage, train={"steps": 2, "save_every": 2, "sample_from": ""})
    path = tmp_path / "pipeline.yaml"
    path.write_text(f"pipeline: [stage0.yaml, stage1.yaml]\nrun: {{root: {tmp_path}, name: local}}\n")
    train(path, f"train.checkpoints={tmp_path / 'elsewhere'}")
    assert names(tmp_path / "elsewhere" / "local" / "stage0") == ["frozen", "latest", "step-00000002"]
    url = url_of(tmp_path / "bucket")
    (outcome,) = train(path, "run.name=remote", f"train.checkpoints={url}/")
    assert f"from {url}/remote/stage0: loaded" in outcome.err
    assert names(tmp_path / "bucket" / "remote") == ["stage0", "stage1"]
    for stage in ("stage0", "stage1"):
        assert not (tmp_path / "local" / stage / "checkpoints").exists()
        assert learnt(tmp_path / "remote" / stage) == learnt(tmp_path / "local" / stage)
    (outcome,) = train(path, "run.name=remote", f"train.checkpoints={url}/")
    assert outcome.err.count("is complete: nothing to do") == 2
    for number, model in enumerate((f"{url}/remote", str(tmp_path / "remote"))):
        ask("export", model, str(tmp_path / f"exported-{number}"))
        assert '"stage": "stage1"' in (tmp_path / f"exported-{number}" / "meta.json").read_text()
