"""A folder is a complete checkpoint, or it is not used."""

import hashlib
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from emma_train.checkpoint import folder as folders
from emma_train.checkpoint import verify
from emma_train.checkpoint.retention import prune
from emma_train.config.schema import TrainConfig
from emma_train.errors import UserError
from emma_train.storage import local_storage
from tests.unit.emma_train.checkpoint.folders import listed, names, truncate, write, write_frozen


@pytest.fixture
def checkpoints(tmp_path: Path) -> Path:
    path = tmp_path / "run" / "checkpoints"
    for step in (10, 20, 30):
        write(path, step)
    return path


def test_a_committed_checkpoint_lists_every_file_with_its_size(checkpoints: Path) -> None:
    meta = folders.read_valid_meta(checkpoints / "step-00000020")
    assert meta is not None
    assert {name: entry["bytes"] for name, entry in meta["files"].items()} == {
        "weights/.metadata": 1,
        "weights/__0_0.distcp": 120,
    }
    assert meta["files"]["weights/.metadata"]["sha256"] == hashlib.sha256(b"m").hexdigest()
    assert (meta["step"], meta["stage"], meta["schema"]) == (20, "stage1", folders.SCHEMA)
    assert names(checkpoints) == ["latest", "step-00000010", "step-00000020", "step-00000030"]
    assert (checkpoints / "latest").read_text() == "step-00000030\n"


def lengthen(folder: Path) -> None:
    (folder / "weights" / "__0_0.distcp").write_bytes(b"x" * 999)


def edit_meta(folder: Path) -> None:
    path = folder / "meta.json"
    path.write_text(path.read_text().replace("stage1", "stage2"))


def rename(folder: Path) -> None:
    """Another run's checkpoint under this step's name."""
    shutil.rmtree(folder)
    shutil.copytree(folder.with_name("step-00000010"), folder)


TEARS: dict[str, tuple[Callable[[Path], object], str]] = {
    "missing file": (lambda folder: (folder / "weights" / "__0_0.distcp").unlink(), "__0_0.distcp is missing"),
    "short file": (truncate, "has 5 bytes, not 130"),
    "long file": (lengthen, "has 999 bytes, not 130"),
    "no meta": (lambda folder: (folder / "meta.json").unlink(), "missing or torn"),
    "half a meta": (lambda folder: (folder / "meta.json").write_text('{"step": 30, "fi'), "missing or torn"),
    "bytes that are no text": (lambda folder: (folder / "meta.json").write_bytes(b"\xff\xfe"), "missing or torn"),
    "edited meta": (edit_meta, "missing or torn"),
    "meta of another kind": (lambda folder: (folder / "meta.json").write_text("[]"), "missing or torn"),
    "foreign folder": (rename, "says step 10"),
    "still being written": (lambda folder: folder.rename(folder.with_name(folder.name + ".tmp")), ""),
}


@pytest.mark.parametrize("tear", TEARS)
def test_a_torn_checkpoint_is_skipped_for_the_one_before_it(
    checkpoints: Path, tear: str, caplog: pytest.LogCaptureFixture
) -> None:
    change, said = TEARS[tear]
    change(checkpoints / "step-00000030")
    assert folders.newest_checkpoint(checkpoints) == checkpoints / "step-00000020"
    for path in (checkpoints.parent, checkpoints, checkpoints / "latest"):
        assert folders.find_checkpoint(path) == checkpoints / "step-00000020"
    if said:
        assert "step-00000030 cannot be used" in caplog.text
        assert said in caplog.text


def test_a_run_folder_a_checkpoints_folder_latest_and_a_step_all_resolve(checkpoints: Path) -> None:
    newest = checkpoints / "step-00000030"
    for path in (checkpoints.parent, checkpoints, checkpoints / "latest", newest, str(checkpoints.parent)):
        assert folders.find_checkpoint(path) == newest
    assert folders.find_checkpoint(checkpoints / "step-00000010") == checkpoints / "step-00000010"


def test_nothing_to_resolve_is_one_line_that_names_the_field(checkpoints: Path) -> None:
    with pytest.raises(UserError, match="^init.from: .*nowhere does not exist; name a run folder"):
        folders.find_checkpoint(checkpoints / "nowhere")
    truncate(checkpoints / "step-00000030")
    with pytest.raises(UserError, match="^MODEL: .*step-00000030 holds no valid checkpoint .*has 5 bytes, not 130"):
        folders.find_checkpoint(checkpoints / "step-00000030", "MODEL")
    assert folders.newest_checkpoint(checkpoints.parent / "absent") is None


def test_steps_are_compared_as_numbers(checkpoints: Path) -> None:
    write(checkpoints, 1000)
    write(checkpoints, 200)
    assert folders.newest_checkpoint(checkpoints) == checkpoints / "step-00001000"


def test_commit_writes_meta_then_renames_then_points(checkpoints: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    order: list[str] = []
    write_atomic, rename = local_storage.write_atomic, os.replace

    def noted_write(path: Path, content: str | bytes) -> None:
        order.append(path.name)
        write_atomic(path, content)

    def noted_rename(source: Path, target: Path) -> None:
        if Path(source).is_dir():
            assert (Path(source) / "meta.json").is_file()
            order.append("rename")
        rename(source, target)

    monkeypatch.setattr(local_storage, "write_atomic", noted_write)
    monkeypatch.setattr(os, "replace", noted_rename)
    write(checkpoints, 40)
    assert order == ["meta.json", "rename", "latest"]


@pytest.mark.parametrize("crash", ["meta.json", "rename", "latest"])
def test_a_crash_at_any_point_of_commit_leaves_a_valid_newest(
    checkpoints: Path, monkeypatch: pytest.MonkeyPatch, crash: str
) -> None:
    def dies(name: str) -> Callable[..., None]:
        kept = local_storage.write_atomic if name != "rename" else os.replace

        def run(first: Path, second: object) -> None:
            if name == crash and (name == "rename" or first.name == crash):
                raise KeyboardInterrupt
            kept(first, second)  # type: ignore[arg-type]

        return run

    if crash == "rename":
        folder = folders.start_folder(checkpoints, "step-00000040")
        (folder / "meta.json").write_text(json.dumps({"files": {}}))
    else:
        monkeypatch.setattr(local_storage, "write_atomic", dies(crash))
        with pytest.raises(KeyboardInterrupt):
            write(checkpoints, 40)
    monkeypatch.undo()
    assert folders.newest_checkpoint(checkpoints) == checkpoints / (
        "step-00000040" if crash == "latest" else "step-00000030"
    )
    # The next attempt is not disturbed by what is left.
    assert write(checkpoints, 40) == folders.newest_checkpoint(checkpoints)


class Killed(BaseException):
    pass


@pytest.mark.seconds
@pytest.mark.parametrize("again", [False, True], ids=["a new step", "a step that is there"])
def test_a_kill_before_any_operation_of_a_save_leaves_a_valid_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, again: bool
) -> None:
    """Each file operation of writing, committing and pruning in turn is the first that is not made."""
    operations = ("replace", "fsync", "unlink", "rmdir", "mkdir", "open")
    kept = {name: getattr(os, name) for name in operations}
    step = 30 if again else 40

    def save(checkpoints: Path) -> None:
        write(checkpoints, step, frozen=write_frozen(checkpoints))
        prune(checkpoints, TrainConfig(steps=99, keep=2))

    for number in range(1000):
        checkpoints = tmp_path / str(number)
        for before in (10, 20, 30):
            write(checkpoints, before)
        left = number

        def counted(name: str) -> Callable[..., object]:
            def run(*arguments: object, **more: object) -> object:
                nonlocal left
                if left == 0:
                    raise Killed
                left -= 1
                return kept[name](*arguments, **more)

            return run

        for name in operations:
            monkeypatch.setattr(os, name, counted(name))
        try:
            save(checkpoints)
            break
        except Killed:
            pass
        finally:
            monkeypatch.undo()
        newest = folders.newest_checkpoint(checkpoints)
        # Only where the very step is written again may the one before it be all that is left, for two renames.
        assert newest is not None and newest.name >= ("step-00000020" if again else "step-00000030")
        assert verify.find_damage(newest) is None
        save(checkpoints)
        assert names(checkpoints) == [
            "frozen",
            "latest",
            *(folders.step_name(s) for s in sorted({step, 20 if again else 30})),
        ]
        assert len(names(checkpoints / "frozen")) == 1
    assert number > 25


def test_a_checkpoint_may_be_written_again(checkpoints: Path) -> None:
    folder = folders.start_folder(checkpoints, "step-00000030")
    (folder / "other").write_bytes(b"new")
    folders.commit_checkpoint(folder, {"step": 30}, listed(folder))
    meta = folders.read_valid_meta(checkpoints / "step-00000030")
    assert meta is not None and meta["files"].keys() == {"other"}
    assert "step-00000030.removed" not in names(checkpoints)


FROZEN_TEARS: dict[str, tuple[Callable[[Path], object], str]] = {
    "absent": (shutil.rmtree, "are missing"),
    "no meta": (lambda folder: (folder / "meta.json").unlink(), "are missing"),
    "short": (lambda folder: os.truncate(folder / "__0_0.distcp", 1), "has 1 bytes, not 6"),
    "other content": (lambda folder: replace_frozen(folder), "is not what its name says"),
}


def replace_frozen(folder: Path) -> None:
    other = folder.parent / write_frozen(folder.parents[1], b"others")
    shutil.rmtree(folder)
    other.rename(folder)


@pytest.mark.parametrize("tear", FROZEN_TEARS)
def test_a_checkpoint_is_not_valid_without_the_frozen_weights_that_it_refers_to(checkpoints: Path, tear: str) -> None:
    digest = write_frozen(checkpoints)
    write(checkpoints, 40, frozen=digest)
    assert folders.newest_checkpoint(checkpoints) == checkpoints / "step-00000040"
    change, said = FROZEN_TEARS[tear]
    change(checkpoints / "frozen" / digest)
    assert said in str(folders.find_problem(checkpoints / "step-00000040"))
    assert folders.newest_checkpoint(checkpoints) == checkpoints / "step-00000030"


def test_references_survive_moving_the_run(checkpoints: Path, tmp_path: Path) -> None:
    write(checkpoints, 40, frozen=write_frozen(checkpoints))
    moved = shutil.move(checkpoints.parent, tmp_path / "elsewhere")
    assert folders.find_checkpoint(moved) == Path(moved) / "checkpoints" / "step-00000040"


def test_frozen_weights_have_one_name_for_one_content(checkpoints: Path) -> None:
    assert write_frozen(checkpoints) == write_frozen(checkpoints) != write_frozen(checkpoints, b"others")
    assert len(list((checkpoints / "frozen").iterdir())) == 2


def test_a_copied_checkpoint_stays_valid(checkpoints: Path, tmp_path: Path) -> None:
    copied = shutil.copytree(checkpoints / "step-00000010", tmp_path / "elsewhere")
    assert folders.find_checkpoint(copied) == copied
