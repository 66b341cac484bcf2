"""Processes that may use little: memory of a loader worker, space on a disk. Each ends with one line that says what to
do and exit code 1, never with a traceback or a hang."""

import shutil
import subprocess
from pathlib import Path

import pytest

from tests.distributed.failing import small_disk_command, starved_worker_command
from tests.distributed.spawn import run_ranks
from tests.helpers import ASSETS, tiny_recipe, write_export
from tests.integration.conftest import MakeRecipe
from tests.servers import serving
from tests.shards import every_task, write_shards

MAY_MOUNT = (
    shutil.which("unshare") is not None
    and subprocess.run(["unshare", "-m", "mount", "-t", "tmpfs", "tmpfs", "/mnt"], capture_output=True).returncode == 0
)
needs_mount = pytest.mark.skipif(not MAY_MOUNT, reason="may not mount a tmpfs")


def last_line(argv: list[str], folder: Path, size: str, before: str = ":", module: str = "emma_train") -> str:
    """The last line of a command that fails on a small disk, seen at `folder`."""
    folder.mkdir()
    (outcome,) = run_ranks(1, small_disk_command, argv, str(folder), size, before, module)
    assert outcome.value == 1, outcome.err
    assert "Traceback" not in outcome.err
    return outcome.error_lines[-1]


def test_a_loader_worker_that_cannot_allocate_ends_all_ranks(make_recipe: MakeRecipe, tmp_path: Path) -> None:
    big = {"mode": "square", "side": 2048}  # 12 MiB an image, while the worker gets 6
    data = {"slots": 2, "samples_per_step": 4, "workers": 1, "pack_tokens": 16384, "und": big, "gen": big}
    outcomes = run_ranks(2, starved_worker_command, ["train", str(make_recipe(tmp_path, data=data))], 6 << 20)
    assert [outcome.value for outcome in outcomes] == [1, 1], outcomes
    assert {outcome.error_lines[-1] for outcome in outcomes} == {
        "emma-train train: step 1: this machine or container has no memory left: give it more, or lower data.workers "
        "or data.prefetch"
    }
    assert not any("Traceback" in outcome.err for outcome in outcomes)
    assert not (tmp_path / "stage1" / "bad_samples.jsonl").exists()  # no sample is blamed


@needs_mount
def test_a_disk_that_fills_during_a_run_stops_it_before_more_is_lost(make_recipe: MakeRecipe, tmp_path: Path) -> None:
    """Another process fills the disk after the first checkpoint."""
    run = tmp_path / "run"
    recipe = make_recipe(
        tmp_path,
        run={"root": str(run), "name": "r"},
        train={"steps": 500, "save_every": 2, "save_async": False, "log_every": 1},
        data={"slots": 2, "samples_per_step": 4},
    )
    fill = f"(until [ -e {run}/r/checkpoints/latest ]; do sleep 0.01; done; cat /dev/zero > {run}/fill) 2>/dev/null &"
    line = last_line(["train", str(recipe)], run, "16m", fill)
    assert "no checkpoint could be written since step" in line and "No space left on device" in line
    assert "Repair the storage, then run the same command again: it goes on from step" in line


@needs_mount
@pytest.mark.parametrize("command", ["export", "generate", "index"])
def test_commands_name_a_full_disk(command: str, tmp_path: Path) -> None:
    model, disk = tmp_path / "model", tmp_path / "disk"
    write_export(model, tiny_recipe())
    shards = write_shards(tmp_path / "set", every_task(3), index=False)
    argv = {
        "export": ["export", str(model), f"{disk}/out"],
        "generate": ["generate", str(model), "--task", "t2i", "--prompt", "a cat", "--out", f"{disk}/out"],
        "index": ["index", str(disk), "--tokenizer", str(ASSETS / "tokenizer")],
    }[command]
    if command == "generate":
        argv += ["--steps", "1", "--size", "32", "32", "--device", "cpu"]
    module = "data_pipelines" if command == "index" else "emma_train"
    before = f"cp {shards}/*.tar {disk}; mkdir {disk}/out; cat /dev/zero > {disk}/fill 2>/dev/null; true"
    line = last_line(argv, disk, "1m", before, module)
    assert "no space is left on this disk: free some, or name a folder on another one" in line


@needs_mount
def test_a_cache_of_shards_without_space_is_named(make_recipe: MakeRecipe, tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    with serving(write_shards(tmp_path / "set", every_task(12))) as server:
        data = {"sources": [{"path": server.url}], "cache_dir": str(cache), "slots": 2, "samples_per_step": 4}
        line = last_line(["train", str(make_recipe(tmp_path, data={**data, "workers": 1}))], cache, "4k")
    assert f"data.cache_dir {cache}: cannot be written (No space left on device)" in line
