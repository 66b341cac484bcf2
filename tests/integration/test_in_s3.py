"""Checkpoints in S3, against a server on loopback that speaks S3's protocol."""

from collections.abc import Iterator
from pathlib import Path

import fsspec
import pytest

from emma_train.checkpoint import folder as folders
from emma_train.checkpoint import verify
from tests.distributed.spawn import run_command
from tests.integration.conftest import MakeRecipe
from tests.runs import checkpoint, differences, learnt, stored
from tests.servers import s3_serving


@pytest.fixture
def bucket() -> Iterator[fsspec.AbstractFileSystem]:
    with s3_serving() as system:
        yield system


@pytest.mark.slow
def test_a_run_that_goes_on_from_s3_is_the_one_that_never_stopped(
    make_recipe: MakeRecipe, tmp_path: Path, bucket: fsspec.AbstractFileSystem
) -> None:
    recipe = make_recipe(tmp_path, "stage0", train={"steps": 6, "save_every": 2, "log_every": 1, "keep": 2})
    run_command("train", str(recipe), "run.name=straight", processes=2)
    where, url = "train.checkpoints=s3://bucket/runs", "s3://bucket/runs/remote"
    run_command("train", str(recipe), "run.name=remote", where, "train.steps=4", processes=2)
    # A damaged byte and an interrupted save: the run resumes from the previous checkpoint.
    damaged = "bucket/runs/remote/step-00000004/optimizer/__1_0.distcp"
    content = bytearray(bucket.cat_file(damaged))
    content[len(content) // 2] ^= 1
    bucket.pipe_file(damaged, bytes(content))
    bucket.pipe_file("bucket/runs/remote/step-00000006/weights/__7_0.distcp", b"torn")
    listed = run_command("inspect", url, "--verify", code=1).out.splitlines()
    assert listed[0].startswith(f"{url}/step-00000004: optimizer/__1_0.distcp is damaged: SHA-256 ")
    assert listed[1] == f"{url}/step-00000002: whole"

    outcome = run_command("train", str(recipe), "run.name=remote", where, processes=2)
    assert "step-00000004: set aside as meta.json.damaged" in outcome.err
    assert f"resumed {url}/step-00000002" in outcome.err
    straight, newest = checkpoint(tmp_path / "straight", 6), folders.find_checkpoint(url)
    assert verify.find_damage(newest) is None
    assert differences(stored(newest), stored(straight)) == []
    assert learnt(tmp_path / "remote") == learnt(tmp_path / "straight")
    names = sorted(path.rpartition("/")[2] for path in bucket.ls("bucket/runs/remote", detail=False))
    assert names == ["frozen", "latest", "step-00000004", "step-00000006"]
    assert "step-00000006/weights/__7_0.distcp" not in " ".join(bucket.find("bucket/runs/remote"))

    out = str(tmp_path / "alone")
    assert run_command("inspect", url, "--self-contained", out).out.strip() == out
    assert differences(stored(tmp_path / "alone"), stored(straight)) == []


def test_a_bucket_that_is_not_there_is_neither_made_nor_trained_for(
    make_recipe: MakeRecipe, tmp_path: Path, bucket: fsspec.AbstractFileSystem, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = make_recipe(tmp_path, "stage0")
    outcome = run_command("train", str(recipe), "train.checkpoints=s3://bukcet/runs", code=2)
    (line,) = outcome.error_lines
    assert "train.checkpoints: s3://bukcet/runs/stage0: there is no such bucket" in line
    assert bucket.ls("", detail=False) == ["bucket"]
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name)
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    outcome = run_command("train", str(recipe), "train.checkpoints=s3://bucket/runs", code=2)
    (line,) = outcome.error_lines
    assert "s3://bucket/runs/stage0: the object store fails (NoCredentialsError)" in line
    assert not (tmp_path / "stage0").exists()
