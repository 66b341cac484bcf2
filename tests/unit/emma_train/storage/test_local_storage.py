"""Local folders: errors are the system's, and folders get their name when they are complete."""

from pathlib import Path

import pytest

from emma_train.storage.local_storage import LocalStorage

STORAGE = LocalStorage()


def test_files_are_written_listed_and_read(tmp_path: Path) -> None:
    STORAGE.write(tmp_path / "a", b"12345")
    STORAGE.make_folder(tmp_path / "b")
    assert sorted(STORAGE.listdir(tmp_path)) == [tmp_path / "a", tmp_path / "b"]
    assert STORAGE.listdir(tmp_path / "none") == []
    assert STORAGE.exists(tmp_path / "a") and not STORAGE.exists(tmp_path / "b")
    assert STORAGE.read(tmp_path / "a") == b"12345" and STORAGE.size(tmp_path / "a") == 5
    assert STORAGE.read_range(tmp_path / "a", 1, 3) == b"234"
    with STORAGE.open(tmp_path / "a") as file:
        assert file.read() == b"12345"


def test_nothing_is_probed_and_errors_are_the_systems(tmp_path: Path) -> None:
    STORAGE.check_writable(tmp_path / "nowhere", "probe")
    assert not (tmp_path / "nowhere").exists()
    with pytest.raises(FileNotFoundError):
        STORAGE.read(tmp_path / "nowhere")
    with pytest.raises(FileNotFoundError):
        STORAGE.start_folder(tmp_path / "nowhere" / "step-00000001")


def test_a_folder_has_its_name_once_it_is_published(tmp_path: Path) -> None:
    folder = tmp_path / "step-00000001"
    written = STORAGE.start_folder(folder)
    (written / "file").write_bytes(b"1")
    assert written == STORAGE.unpublished(folder) and not STORAGE.has_folder(folder)
    STORAGE.publish(written, folder, "{}")
    assert sorted(path.name for path in folder.iterdir()) == ["file", "meta.json"]
    assert STORAGE.set_aside(folder) == tmp_path / "step-00000001.damaged"
    STORAGE.remove(tmp_path / "step-00000001.damaged")
    assert list(tmp_path.iterdir()) == []
