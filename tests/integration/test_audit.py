"""`emma-train audit`: equal runs over world sizes and restarts, and planted differences of every kind."""

import json
import shutil
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch.distributed.checkpoint as dcp
import yaml

from emma_train.checkpoint import dcp as checkpoint_dcp
from emma_train.checkpoint import folder as folders
from emma_train.checkpoint.verify import file_entry
from emma_train.cli import main
from tests.distributed.failing import other_noise_command
from tests.distributed.spawn import run_ranks
from tests.integration.conftest import MakeRecipe
from tests.runs import checkpoint, train

STEPS = 6
Record = dict[str, Any]


@pytest.fixture(scope="module")
def recipe(make_recipe: MakeRecipe, tmp_path_factory: pytest.TempPathFactory) -> Path:
    train = {"steps": STEPS, "save_every": 2, "log_every": 2}
    return make_recipe(tmp_path_factory.mktemp("audit"), mix={"i2t": 1, "t2i": 1, "it2i": 1}, train=train)


@pytest.fixture(scope="module")
def straight(recipe: Path) -> Path:
    """The run that nothing disturbed."""
    train(recipe, "run.name=straight")
    return recipe.parent / "straight"


@pytest.fixture(scope="module")
def chain(recipe: Path) -> Path:
    """Two ranks as far as step 5, whose checkpoint is lost; one rank goes on from step 4 and computes step 5 again."""
    run = recipe.parent / "chain"
    train(recipe, "run.name=chain", "train.steps=5", processes=2)
    shutil.rmtree(checkpoint(run, 5))
    train(recipe, "run.name=chain")
    return run


@pytest.fixture
def copy(straight: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(straight, tmp_path / "copy"))


def audit(capsys: pytest.CaptureFixture[str], *words: object) -> tuple[int, dict[str, Any]]:
    """Exit code and JSON."""
    code = main(["audit", *map(str, words), "--json"])
    return code, json.loads(capsys.readouterr().out)


def edit(path: Path, step: int, change: Callable[[Record], None]) -> None:
    """Change the record of a step in a file of JSON lines."""
    records = [json.loads(line) for line in path.read_text().splitlines() if line]
    for record in records:
        if record["step"] == step:
            change(record)
    path.write_text("\n".join(map(json.dumps, records)) + "\n")


def test_a_chain_of_world_sizes_with_a_step_computed_again_is_equal(
    straight: Path, chain: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    steps = [json.loads(line)["step"] for line in (chain / "digests.jsonl").read_text().splitlines() if line]
    assert steps == [1, 2, 3, 4, 5, 5, 6]  # every step, though every second one is logged
    code, result = audit(capsys, straight, chain)
    (stage,) = result["stages"]
    assert (code, result["outcome"], stage["differences"]) == (0, "equal", [])
    assert (stage["steps"], stage["exact"], stage["losses"]["compared"]) == (STEPS, False, 4)  # 1, 2, 4 and 6
    assert 0 < stage["losses"]["difference"] < 1e-5
    assert stage["weights"]["compared"] == 3  # 2, 4 and 6
    assert 0 < stage["weights"]["difference"] < 1e-4
    assert main(["audit", str(straight), str(chain)]) == 0
    assert capsys.readouterr().out.splitlines()[-1] == "equal"
    assert audit(capsys, chain)[0] == 0


def test_one_world_size_must_be_equal_in_all_bits(
    straight: Path, copy: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    code, result = audit(capsys, straight, copy)
    assert code == 0
    assert result["stages"][0]["exact"]
    edit(copy / "metrics.jsonl", 4, lambda line: line.update({"loss/t2i": line["loss/t2i"] * (1 + 1e-7)}))
    code, result = audit(capsys, straight, copy)
    (difference,) = result["stages"][0]["differences"]
    assert (code, difference["step"], difference["quantity"]) == (1, 4, "loss/t2i")
    assert audit(capsys, straight, copy, "--loss-margin", "1e-6")[0] == 0


@pytest.mark.parametrize("digest", ["data/digest", "packs/digest", "noise/digest"])
def test_one_digest_that_differs_is_named(
    straight: Path, copy: Path, digest: str, capsys: pytest.CaptureFixture[str]
) -> None:
    edit(copy / "digests.jsonl", 3, lambda line: line.update({digest: "0123456789abcdef"}))
    code, result = audit(capsys, straight, copy)
    (difference,) = result["stages"][0]["differences"]
    assert (code, difference["step"], difference["quantity"]) == (1, 3, digest)
    assert difference["values"][1] == "0123456789abcdef"


def test_a_loss_beyond_the_margin_is_named(
    chain: Path, straight: Path, copy: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    edit(copy / "metrics.jsonl", 4, lambda line: line.update({"loss": line["loss"] * (1 + 3e-5)}))
    code, result = audit(capsys, chain, copy)
    (difference,) = result["stages"][0]["differences"]
    assert (code, difference["step"], difference["quantity"]) == (1, 4, "loss")
    assert difference["values"][1] == pytest.approx(difference["values"][0] * (1 + 3e-5), rel=1e-6)
    assert audit(capsys, chain, copy, "--loss-margin", "1e-4")[0] == 0


def nudge(folder: Path, name: str, amount: float) -> None:
    """Add a number to one element of a tensor of a checkpoint, and keep the checkpoint valid."""
    weights = folder / "weights"
    state = _stored(weights)
    state[name].view(-1)[-1] += amount
    shutil.rmtree(weights)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        dcp.save(state, storage_writer=dcp.FileSystemWriter(str(weights)), no_dist=True)
    meta = folders.read_meta(folder)
    assert meta is not None
    files = {key: entry for key, entry in meta["files"].items() if not key.startswith("weights/")}
    files |= {f"weights/{path.name}": file_entry(path) for path in weights.iterdir()}
    (folder / "meta.json").write_text(folders.with_checksum({**meta, "files": files}))


def _stored(weights: Path) -> dict[str, Any]:
    from emma_train.checkpoint.dcp_reader import CheckpointTensors

    tensors = CheckpointTensors([weights])
    return {name: tensors.read(name) for name in tensors.specs}


def test_one_weight_that_differs_is_named_with_its_tensor(
    chain: Path, copy: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    name = sorted(checkpoint_dcp.tensor_names(checkpoint(copy, 4) / "weights"))[-1]
    nudge(checkpoint(copy, 4), name, 5e-5)
    assert audit(capsys, chain, copy)[0] == 0
    nudge(checkpoint(copy, 4), name, 2e-4)
    code, result = audit(capsys, chain, copy)
    (difference,) = result["stages"][0]["differences"]
    assert (code, difference["step"], difference["quantity"], difference["tensor"]) == (1, 4, "weights", name)
    first, second = difference["values"]
    assert second - first == pytest.approx(2.5e-4, rel=0.1)
    assert audit(capsys, chain, copy, "--weight-margin", "1e-3")[0] == 0


def test_biases_of_keys_change_no_loss_and_count_only_where_all_bits_must_be_equal(
    chain: Path, straight: Path, copy: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    nudge(checkpoint(copy, 4), "model.vision.layers.0.k_proj.bias", 0.1)
    assert audit(capsys, chain, copy)[0] == 0
    code, result = audit(capsys, straight, copy)
    assert (code, result["stages"][0]["differences"][0]["tensor"]) == (1, "model.vision.layers.0.k_proj.bias")


def test_a_step_that_was_computed_again_with_other_data_is_named_in_the_run_alone(
    chain: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = Path(shutil.copytree(chain, tmp_path / "again"))
    lines = (run / "digests.jsonl").read_text().splitlines()
    again = max(number for number, line in enumerate(lines) if '"step": 5' in line)
    lines[again] = json.dumps({**json.loads(lines[again]), "packs/digest": "f" * 16})
    (run / "digests.jsonl").write_text("\n".join(lines))
    code, result = audit(capsys, run)
    (difference,) = result["stages"][0]["differences"]
    assert (code, difference["step"], difference["quantity"]) == (1, 5, "packs/digest")


def test_a_missing_step_is_named(straight: Path, copy: Path, capsys: pytest.CaptureFixture[str]) -> None:
    lines = (copy / "digests.jsonl").read_text().splitlines()
    (copy / "digests.jsonl").write_text("\n".join(line for line in lines if '"step": 3,' not in line))
    for words in ((copy,), (straight, copy)):
        code, result = audit(capsys, *words)
        (difference,) = result["stages"][0]["differences"]
        assert (code, difference["step"], difference["quantity"]) == (1, 3, "steps")


def test_runs_that_cannot_be_compared(straight: Path, copy: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = yaml.safe_load((copy / "config.yaml").read_text())
    config["data"]["seed"] = 99
    (copy / "config.yaml").write_text(yaml.safe_dump(config))
    code, result = audit(capsys, straight, copy)
    assert (code, result["outcome"]) == (2, "not comparable")
    assert "data.seed (1 and 99)" in result["reason"]
    assert main(["audit", str(straight), str(copy)]) == 2
    assert "data.seed" in capsys.readouterr().err
    assert audit(capsys, straight, copy.parent / "nothing")[0] == 2
    (copy / "digests.jsonl").unlink()
    code, result = audit(capsys, straight, copy)
    assert (code, "digests.jsonl: does not exist" in result["reason"]) == (2, True)


def test_a_damaged_checkpoint_is_refused(straight: Path, copy: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shard = next((checkpoint(copy, 4) / "weights").glob("*.distcp"))
    content = bytearray(shard.read_bytes())
    content[len(content) // 2] ^= 1
    shard.write_bytes(content)
    code, result = audit(capsys, straight, copy)
    assert (code, "is damaged" in result["reason"]) == (2, True)


def test_pipelines_are_compared_stage_by_stage(
    straight: Path, chain: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name, stages in (("one", ("stage0", "stage1")), ("other", ("stage0", "stage1", "stage2"))):
        for stage in stages:
            shutil.copytree(straight, tmp_path / name / stage)
    edit(tmp_path / "other" / "stage1" / "digests.jsonl", 2, lambda line: line.update({"noise/digest": "0"}))
    code, result = audit(capsys, tmp_path / "one", tmp_path / "other")
    assert code == 1
    assert [(s["name"], len(s["differences"])) for s in result["stages"]] == [("stage0", 0), ("stage1", 1)]


@pytest.mark.slow
def test_a_rank_that_draws_other_noise_after_a_resume_is_found(
    recipe: Path, straight: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The second rank draws from torch's generator instead of the samples' seeds; data are right, losses look well."""
    train(recipe, "run.name=noisy", "train.steps=4", processes=2)
    words = ["train", str(recipe), "run.name=noisy"]
    assert {outcome.value for outcome in run_ranks(2, other_noise_command, words)} == {0}
    code, result = audit(capsys, straight, recipe.parent / "noisy")
    difference = result["stages"][0]["differences"][0]
    assert (code, difference["step"], difference["quantity"]) == (1, 5, "noise/digest")
