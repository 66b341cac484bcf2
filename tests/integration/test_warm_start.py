"""A stage starts from a checkpoint of its own stage; tokenizer and autoencoder are compared by content."""

import shutil
import tarfile
from pathlib import Path

import pytest

from emma_train.checkpoint import folder as folders
from tests.distributed.ranks import command
from tests.distributed.spawn import run_ranks
from tests.helpers import ASSETS, ROOT
from tests.runs import checkpoint, train

FIXTURE = ROOT / "tests" / "assets" / "e0297de"
RECIPE = FIXTURE / "recipe.yaml"


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A run of stage 1 that was stopped at step 4, by an older version."""
    with tarfile.open(FIXTURE / "micro.tar.xz") as archive:
        archive.extractall(tmp_path, filter="data")
    return tmp_path / "micro"


def test_a_stage_starts_from_its_own_stage_with_other_settings(run: Path) -> None:
    start = (f"run.root={run.parent}", f"init.from={run}", "run.name=warm", "train.steps=1")
    (outcome,) = train(RECIPE, *start, "optimizer.lr=2e-4")
    assert "stage1 starts from a checkpoint of stage1 itself: its weights only, at step 0" in outcome.err
    meta = folders.read_meta(checkpoint(run.parent / "warm", 1)) or {}
    assert (meta["stage"], meta["parent"]["stage"], meta["parent"]["step"]) == ("stage1", "stage1", 4)
    assert meta["commit"] is None or len(meta["commit"].rstrip("+")) == 12


def copied(source: Path, target: Path, weights: str, old: bytes, new: bytes) -> Path:
    """A copy of a folder in which one file holds other bytes of the same length."""
    shutil.copytree(source, target)
    content = (target / weights).read_bytes()
    assert old in content and len(old) == len(new)
    (target / weights).write_bytes(content.replace(old, new, 1))
    return target


@pytest.fixture(scope="module")
def parts(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[str]]:
    """Overrides: the same files elsewhere, another autoencoder and another tokenizer."""
    root = tmp_path_factory.mktemp("parts")
    same = [shutil.copytree(ASSETS / name, root / name) for name in ("autoencoder", "tokenizer")]
    weights = "diffusion_pytorch_model.safetensors"
    tail = (ASSETS / "autoencoder" / weights).read_bytes()[-16:]
    other = copied(ASSETS / "autoencoder", root / "ae2", weights, tail, bytes(16))
    tokenizer = Path(shutil.copytree(ASSETS / "tokenizer", root / "tokenizer2")) / "tokenizer.json"
    tokenizer.write_text(tokenizer.read_text() + "\n")
    return {
        "data.tokenizer": [f"data.tokenizer={tokenizer}"],
        "same": [f"model.autoencoder.path={same[0]}", f"data.tokenizer={same[1]}"],
        "model.autoencoder.path": [f"model.autoencoder.path={other}"],
    }


def test_a_tokenizer_that_changed_is_refused_by_what_reads_a_run(run: Path, tmp_path: Path) -> None:
    tokenizer = Path(shutil.copytree(ASSETS / "tokenizer", tmp_path / "tokenizer"))
    train(RECIPE, f"run.root={run.parent}", "train.steps=5", f"data.tokenizer={tokenizer}")
    with (tokenizer / "tokenizer.json").open("a") as file:
        file.write("\n")
    asked = ["--task", "t2i", "--prompt", "a cat", "--steps", "1", "--size", "32", "32", "--device", "cpu"]
    for argv in (["export", str(run), str(tmp_path / "exported")], ["generate", str(run), *asked]):
        (outcome,) = run_ranks(1, command, argv)
        assert outcome.value == 2, outcome.err
        assert "its weights belong to another data.tokenizer: its content has the hash " in outcome.error_lines[-1]


def test_content_decides_and_not_the_path(run: Path, tmp_path: Path, parts: dict[str, list[str]]) -> None:
    root = f"run.root={run.parent}"
    (outcome,) = train(RECIPE, root, "train.steps=5", *parts["same"])
    assert "without hashes of tokenizer and autoencoder: not compared" in outcome.err
    for start in ([], ["stage.name=stage2", "run.name=next", f"init.from={run}"]):
        for key in ("model.autoencoder.path", "data.tokenizer"):
            (outcome,) = train(RECIPE, root, "train.steps=6", *parts[key], *start, code=2)
            assert f"its weights belong to another {key}: its content has the hash " in outcome.error_lines[-1]
    (outcome,) = train(RECIPE, root, "train.steps=6")
    assert "not compared" not in outcome.err
