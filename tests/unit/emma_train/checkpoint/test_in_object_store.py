"""Checkpoints in an object store, which cannot rename: a folder is a checkpoint once it has its meta.json."""

import os
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from upath import UPath

from emma_train.checkpoint import folder as folders
from emma_train.checkpoint import verify
from emma_train.checkpoint.retention import prune
from emma_train.config.schema import TrainConfig
from emma_train.errors import RunError, UserError
from emma_train.storage.paths import StoragePath, parse_path, storage_of
from tests.object_stores import FolderStore, answered, url_of


@pytest.fixture
def below(tmp_path: Path) -> Path:
    """The local folder in which the object store of the tests keeps its files."""
    return tmp_path / "bucket" / "run"


@pytest.fixture
def checkpoints(below: Path) -> StoragePath:
    folder = parse_path(url_of(below))
    for step in (10, 20, 30):
        write(folder, step)
    return folder


@pytest.fixture(autouse=True)
def _answering() -> Iterator[None]:
    yield
    FolderStore.request = staticmethod(answered)


def put(file: StoragePath, content: bytes) -> None:
    assert isinstance(file, UPath)
    file.fs.pipe_file(file.path, content)


def entries(folder: StoragePath, *names: str) -> dict[str, dict[str, object]]:
    return {name: verify.file_entry(folder / name) for name in names}


def write(checkpoints: StoragePath, step: int, frozen: str | None = None) -> StoragePath:
    folder = folders.start_folder(checkpoints, folders.step_name(step))
    put(folder / "weights" / "__0_0.distcp", b"x" * (100 + step))
    put(folder / "weights" / ".metadata", b"m")
    files = entries(folder, "weights/__0_0.distcp", "weights/.metadata")
    return folders.commit_checkpoint(folder, {"step": step, "stage": "stage1", "frozen": frozen, "metrics": {}}, files)


def write_frozen(checkpoints: StoragePath, name: str = "f00d") -> str:
    folder = folders.start_folder(checkpoints / folders.FROZEN, name)
    put(folder / "__0_0.distcp", b"frozen")
    return folders.commit_frozen(folder, entries(folder, "__0_0.distcp"))


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def steps(checkpoints: StoragePath) -> list[int]:
    return [int(folder.name.removeprefix("step-")) for folder in folders.list_steps(checkpoints)]


def test_a_folder_with_metadata_is_a_checkpoint(checkpoints: StoragePath, below: Path) -> None:
    assert names(below) == ["latest", "step-00000010", "step-00000020", "step-00000030"]
    assert (below / "latest").read_text() == "step-00000030\n"
    newest = checkpoints / "step-00000030"
    for path in (str(checkpoints), f"{checkpoints}/", f"{checkpoints}/latest", str(newest), checkpoints, newest):
        assert folders.find_checkpoint(path) == newest
    (below / "step-00000030" / "meta.json").unlink()
    assert steps(checkpoints) == [20, 10]
    assert folders.find_checkpoint(checkpoints) == checkpoints / "step-00000020"
    with pytest.raises(UserError, match="^MODEL: folder://.*step-00000030 holds no valid checkpoint"):
        folders.find_checkpoint(str(newest), "MODEL")


def test_metadata_are_written_last_and_removed_first(checkpoints: StoragePath) -> None:
    seen: list[tuple[str, str]] = []
    FolderStore.request = staticmethod(lambda kind, path: seen.append((kind, Path(path).name)))
    write(checkpoints, 30)
    changes = list(dict.fromkeys(request for request in seen if request[0] in ("put", "delete")))
    files = ["__0_0.distcp", ".metadata"]
    assert changes[0] == ("delete", "meta.json")
    assert set(changes[1:3]) == {("delete", name) for name in files}
    assert changes[3:] == [("put", name) for name in (*files, "meta.json", "latest")]


class Killed(BaseException):
    pass


@pytest.mark.parametrize("again", [False, True], ids=["a new step", "a step that is there"])
def test_a_kill_before_any_request_of_a_save_leaves_a_valid_checkpoint(tmp_path: Path, again: bool) -> None:
    """Each request of writing, committing and pruning in turn is the first that is not made."""
    step = 30 if again else 40
    for number in range(1000):
        below = tmp_path / str(number)
        checkpoints = parse_path(url_of(below))
        for before in (10, 20, 30):
            write(checkpoints, before)
        left = number

        def counted(kind: str, path: str) -> None:
            nonlocal left
            if kind in ("put", "copy", "delete"):
                if left <= 0:
                    raise Killed
                left -= 1

        def save(checkpoints: StoragePath = checkpoints) -> None:
            write(checkpoints, step, frozen=write_frozen(checkpoints))
            prune(checkpoints, TrainConfig(steps=99, keep=2))

        FolderStore.request = staticmethod(counted)
        try:
            save()
            break
        except Killed:
            pass
        finally:
            FolderStore.request = staticmethod(answered)
        newest = folders.newest_checkpoint(checkpoints)
        # Only where the very step is written again may the one before it be all that is left.
        assert newest is not None and newest.name >= ("step-00000020" if again else "step-00000030")
        assert verify.find_damage(newest) is None
        save()
        stay = sorted({step, 20 if again else 30})
        assert names(below) == ["frozen", "latest", *(folders.step_name(s) for s in stay)]
        assert names(below / "frozen") == ["f00d"]
    assert number >= 12


TEARS: dict[str, tuple[Callable[[Path], object], str]] = {
    "missing file": (lambda folder: (folder / "weights" / "__0_0.distcp").unlink(), "__0_0.distcp is missing"),
    "short file": (lambda folder: os.truncate(folder / "weights" / "__0_0.distcp", 5), "has 5 bytes, not 130"),
    "half a meta": (lambda folder: (folder / "meta.json").write_text('{"step": 30, "fi'), "missing or torn"),
    "foreign folder": (lambda folder: os.replace(folder.with_name("step-00000010"), f"{folder}/../step-00000040"), ""),
}


@pytest.mark.parametrize("tear", TEARS)
def test_a_torn_checkpoint_is_skipped(
    checkpoints: StoragePath, below: Path, tear: str, caplog: pytest.LogCaptureFixture
) -> None:
    change, said = TEARS[tear]
    change(below / "step-00000030")
    checkpoint = folders.find_checkpoint(checkpoints)
    assert checkpoint.name == ("step-00000020" if said else "step-00000030")
    assert "cannot be used" in caplog.text and said in caplog.text


def test_a_damaged_checkpoint_that_was_set_aside_is_removed_once_there_is_a_newer_one(
    checkpoints: StoragePath, below: Path
) -> None:
    assert storage_of(checkpoints).set_aside(checkpoints / "step-00000030").name == "meta.json.damaged"
    assert steps(checkpoints) == [20, 10]
    write(checkpoints, 25)
    prune(checkpoints, TrainConfig(steps=99, keep=1))
    assert names(below) == ["latest", "step-00000025", "step-00000030"]
    assert names(below / "step-00000030") == ["meta.json.damaged", "weights"]
    write(checkpoints, 40)
    prune(checkpoints, TrainConfig(steps=99, keep=1))
    assert names(below) == ["latest", "step-00000040"]


def test_frozen_weights_need_their_name_in_the_metadata_and_go_with_the_last_checkpoint_that_uses_them(
    checkpoints: StoragePath, below: Path
) -> None:
    write(checkpoints, 40, frozen=write_frozen(checkpoints))
    newest = checkpoints / "step-00000040"
    assert verify.find_damage(newest) is None
    os.replace(below / "frozen" / "f00d", below / "frozen" / "beef")
    assert "frozen weights that it refers to are missing" in str(folders.find_problem(newest))
    write(checkpoints, 50, frozen="beef")
    assert "is not what its name says" in str(folders.find_problem(checkpoints / "step-00000050"))
    os.replace(below / "frozen" / "beef", below / "frozen" / "f00d")
    (below / "frozen" / "torn").mkdir()
    (below / "frozen" / "torn" / "__0_0.distcp").write_bytes(b"x")
    prune(checkpoints, TrainConfig(steps=99, keep=2))
    assert names(below / "frozen") == ["f00d"]
    assert steps(checkpoints) == [50, 40, 30]


def test_moving_between_object_stores_and_local_folders_changes_nothing(
    checkpoints: StoragePath, below: Path, tmp_path: Path
) -> None:
    """A checkpoint of an object store is valid in a local folder (`aws s3 sync`), and the other way round."""
    write(checkpoints, 40, frozen=write_frozen(checkpoints))
    assert folders.newest_checkpoint(below) == below / "step-00000040"
    assert verify.find_damage(below / "step-00000040") is None
    local = tmp_path / "local"
    local.mkdir()
    folder = folders.start_folder(local, folders.step_name(50))
    (folder / "shard").write_bytes(b"s")
    folders.commit_checkpoint(folder, {"step": 50}, entries(folder, "shard"))
    assert verify.find_damage(parse_path(url_of(local / "step-00000050"))) is None


@pytest.mark.parametrize("kind", ["get", "head", "list"])
def test_an_object_store_that_fails_is_not_taken_for_an_empty_or_damaged_one(
    checkpoints: StoragePath, below: Path, kind: str
) -> None:
    """Otherwise a run would start from the beginning, or remove checkpoints that it needs."""

    def failing(asked: str, path: str) -> None:
        if asked == kind:
            raise ConnectionError("https://user:secret@endpoint is gone")

    before = sorted(below.rglob("*"))
    FolderStore.request = staticmethod(failing)
    calls: list[Callable[[], object]] = [
        lambda: folders.newest_checkpoint(checkpoints),
        lambda: folders.find_checkpoint(checkpoints),
        lambda: prune(checkpoints, TrainConfig(steps=99, keep=1)),
    ]
    if kind != "list":  # listing only saves requests when a checkpoint is known
        calls.append(lambda: verify.find_damage(checkpoints / "step-00000030"))
    for call in calls:
        with pytest.raises(RunError, match=r"^folder://.*: the object store fails \(ConnectionError\)$"):
            call()
    if kind == "list":
        assert verify.find_damage(checkpoints / "step-00000030") is None
    FolderStore.request = staticmethod(answered)
    assert sorted(below.rglob("*")) == before
