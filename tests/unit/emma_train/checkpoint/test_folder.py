"""A checkpoint is whole or it is not there."""

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from emma_train.checkpoint import folder as folders
from emma_train.config.errors import UserError


def write(checkpoints: Path, step: int) -> Path:
    folder = folders.begin(checkpoints, step)
    (folder / "__0_0.distcp").write_bytes(b"x" * (100 + step))
    (folder / ".metadata").write_bytes(b"m")
    return folders.commit(folder, {"step": step, "stage": "stage1"})


@pytest.fixture
def checkpoints(tmp_path: Path) -> Path:
    path = tmp_path / "run" / "checkpoints"
    for step in (10, 20, 30):
        write(path, step)
    return path


def names(checkpoints: Path) -> list[str]:
    return sorted(p.name for p in checkpoints.iterdir())


def test_a_committed_checkpoint_lists_every_file_with_its_size(checkpoints: Path) -> None:
    meta = folders.whole(checkpoints / "step-00000020")
    assert meta is not None
    assert meta["files"] == {".metadata": 1, "__0_0.distcp": 120}
    assert (meta["step"], meta["stage"], meta["schema"]) == (20, "stage1", folders.SCHEMA)
    assert names(checkpoints) == ["latest", "step-00000010", "step-00000020", "step-00000030"]
    assert (checkpoints / "latest").read_text() == "step-00000030\n"


def truncate(folder: Path) -> None:
    os.truncate(folder / "__0_0.distcp", 5)


def lengthen(folder: Path) -> None:
    (folder / "__0_0.distcp").write_bytes(b"x" * 999)


TEARS: dict[str, Callable[[Path], object]] = {
    "missing file": lambda folder: (folder / "__0_0.distcp").unlink(),
    "short file": truncate,
    "long file": lengthen,
    "no meta": lambda folder: (folder / "meta.json").unlink(),
    "half a meta": lambda folder: (folder / "meta.json").write_text('{"step": 30, "fi'),
    "meta without files": lambda folder: (folder / "meta.json").write_text('{"step": 30}'),
    "meta of another kind": lambda folder: (folder / "meta.json").write_text("[]"),
    "still being written": lambda folder: folder.rename(folder.with_name(folder.name + ".tmp")),
}


@pytest.mark.parametrize("tear", TEARS)
def test_a_torn_checkpoint_is_skipped_for_the_one_before_it(
    checkpoints: Path, tear: str, caplog: pytest.LogCaptureFixture
) -> None:
    TEARS[tear](checkpoints / "step-00000030")
    assert folders.newest(checkpoints) == checkpoints / "step-00000020"
    for path in (checkpoints.parent, checkpoints, checkpoints / "latest"):
        assert folders.resolve(path) == checkpoints / "step-00000020"
    if tear != "still being written":
        assert "step-00000030 is incomplete" in caplog.text


def test_a_run_folder_a_checkpoints_folder_latest_and_a_step_all_resolve(checkpoints: Path) -> None:
    newest = checkpoints / "step-00000030"
    for path in (checkpoints.parent, checkpoints, checkpoints / "latest", newest, str(checkpoints.parent)):
        assert folders.resolve(path) == newest
    assert folders.resolve(checkpoints / "step-00000010") == checkpoints / "step-00000010"


def test_nothing_to_resolve_is_one_line_that_names_the_field(checkpoints: Path) -> None:
    with pytest.raises(UserError, match="^init.from: .*nowhere does not exist; name a run folder"):
        folders.resolve(checkpoints / "nowhere")
    truncate(checkpoints / "step-00000030")
    with pytest.raises(UserError, match="^MODEL: .*step-00000030 holds no whole checkpoint"):
        folders.resolve(checkpoints / "step-00000030", "MODEL")
    assert folders.newest(checkpoints.parent / "absent") is None


def test_steps_are_compared_as_numbers(checkpoints: Path) -> None:
    write(checkpoints, 1000)
    write(checkpoints, 200)
    assert folders.newest(checkpoints) == checkpoints / "step-00001000"


def test_commit_writes_meta_then_renames_then_points(checkpoints: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    order: list[str] = []
    write_atomic, rename = folders.write_atomic, os.replace

    def noted_write(path: Path, text: str) -> None:
        order.append(path.name)
        write_atomic(path, text)

    def noted_rename(source: Path, target: Path) -> None:
        if Path(source).is_dir():
            assert (Path(source) / "meta.json").is_file()
            order.append("rename")
        rename(source, target)

    monkeypatch.setattr(folders, "write_atomic", noted_write)
    monkeypatch.setattr(folders.os, "replace", noted_rename)
    write(checkpoints, 40)
    assert order == ["meta.json", "rename", "latest"]


@pytest.mark.parametrize("crash", ["meta.json", "rename", "latest"])
def test_a_crash_at_any_point_of_commit_leaves_a_whole_newest(
    checkpoints: Path, monkeypatch: pytest.MonkeyPatch, crash: str
) -> None:
    def dies(name: str) -> Callable[..., None]:
        kept = folders.write_atomic if name != "rename" else os.replace

        def run(first: Path, second: object) -> None:
            if name == crash and (name == "rename" or first.name == crash):
                raise KeyboardInterrupt
            kept(first, second)  # type: ignore[arg-type]

        return run

    if crash == "rename":
        folder = folders.begin(checkpoints, 40)
        (folder / "meta.json").write_text(json.dumps({"files": {}}))
    else:
        monkeypatch.setattr(folders, "write_atomic", dies(crash))
        with pytest.raises(KeyboardInterrupt):
            write(checkpoints, 40)
    monkeypatch.undo()
    assert folders.newest(checkpoints) == checkpoints / ("step-00000040" if crash == "latest" else "step-00000030")
    # The next attempt is not disturbed by what is left.
    assert write(checkpoints, 40) == folders.newest(checkpoints)


def test_a_checkpoint_may_be_written_again(checkpoints: Path) -> None:
    folder = folders.begin(checkpoints, 30)
    (folder / "other").write_bytes(b"new")
    folders.commit(folder, {"step": 30})
    meta = folders.whole(checkpoints / "step-00000030")
    assert meta is not None and meta["files"] == {"other": 3}


@pytest.mark.parametrize(("keep", "left"), [(1, [30]), (2, [20, 30]), (9, [10, 20, 30]), (0, [30])])
def test_prune_keeps_the_newest(checkpoints: Path, keep: int, left: list[int]) -> None:
    folders.begin(checkpoints, 40)
    folders.prune(checkpoints, keep)
    assert names(checkpoints) == ["latest", *(folders.step_name(step) for step in left)]


def test_a_torn_folder_does_not_push_out_the_whole_one_that_a_run_needs(checkpoints: Path) -> None:
    # A run that resumed from 20 because 30 is torn, and saves at 25 with keep=1.
    truncate(checkpoints / "step-00000030")
    write(checkpoints, 25)
    folders.prune(checkpoints, keep=1)
    assert folders.newest(checkpoints) == checkpoints / "step-00000025"


def test_a_copied_checkpoint_stays_whole(checkpoints: Path, tmp_path: Path) -> None:
    copied = shutil.copytree(checkpoints / "step-00000010", tmp_path / "elsewhere")
    assert folders.resolve(copied) == copied
