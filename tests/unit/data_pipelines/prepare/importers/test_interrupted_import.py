"""An import that is interrupted at any moment and run again has the same bytes as one that is not."""

import hashlib
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from data_pipelines.cli import main
from data_pipelines.prepare.importers import import_source
from emma_train.errors import UserError
from emma_train.storage import files
from tests import public_formats as formats
from tests.helpers import ASSETS
from tests.imported import Imported

TOKENIZER = str(ASSETS / "tokenizer")


class Crash(BaseException):
    """The process ends here."""


def hashes(folder: Path) -> dict[str, str]:
    paths = sorted(path for path in folder.rglob("*") if path.is_file())
    return {str(p.relative_to(folder)): hashlib.sha256(p.read_bytes()).hexdigest() for p in paths}


@pytest.mark.seconds
@pytest.mark.parametrize("name", ["img2dataset", "llava-pretrain", "finevision"])
def test_a_crash_before_or_after_any_file_gets_its_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    writers: dict[str, Any] = {
        "img2dataset": lambda folder: formats.write_img2dataset(folder, 7),
        "llava-pretrain": lambda folder: formats.write_llava_pretrain(folder, 5),
        "finevision": lambda folder: [formats.write_finevision(folder, config) for config in "ab"],
    }
    writers[name](tmp_path / "set")
    Imported(name, tmp_path / "set", tmp_path / "straight")
    expected = hashes(tmp_path / "straight")
    replace, rename = os.replace, Path.rename
    moments = 0
    while True:
        left = moments

        def crashing(call: Any, *arguments: Any) -> None:
            nonlocal left
            if left <= 1:
                if left == 1:
                    call(*arguments)
                raise Crash
            left -= 2
            call(*arguments)

        with monkeypatch.context() as patch:
            patch.setattr(files.os, "replace", lambda *a: crashing(replace, *a))
            patch.setattr(Path, "rename", lambda *a: crashing(rename, *a))
            try:
                Imported(name, tmp_path / "set", tmp_path / f"out{moments}")
            except Crash:
                pass
            else:
                break
        Imported(name, tmp_path / "set", tmp_path / f"out{moments}")
        assert hashes(tmp_path / f"out{moments}") == expected
        moments += 1
    assert moments >= 20


@pytest.mark.slow
def test_killed_and_run_again_with_another_number_of_workers(tmp_path: Path) -> None:
    for config in "abcd":
        formats.write_finevision(tmp_path / "set", config, num=12)
    command = [sys.executable, "-m", "data_pipelines", "import", "finevision", str(tmp_path / "set")]
    options = ["--tokenizer", TOKENIZER, "--shard-samples", "2"]
    out = tmp_path / "out"
    for num_shards in (1, 9):
        process = subprocess.Popen([*command, str(out), *options, "--workers", "1"], stderr=subprocess.DEVNULL)
        while process.poll() is None and len(list(out.glob("*.tar"))) < num_shards:
            time.sleep(0.001)
        process.send_signal(signal.SIGKILL)
        process.wait()
    assert main(["import", "finevision", str(tmp_path / "set"), str(out), *options, "--workers", "2"]) == 0
    assert main(["import", "finevision", str(tmp_path / "set"), str(tmp_path / "b"), *options, "--workers", "1"]) == 0
    assert hashes(out) == hashes(tmp_path / "b")


def test_another_source_or_other_options_are_refused(tmp_path: Path) -> None:
    formats.write_omniedit(tmp_path / "set")
    Imported("omniedit", tmp_path / "set", tmp_path / "out")
    with pytest.raises(UserError, match="another source or with other options"):
        Imported("omniedit", tmp_path / "set", tmp_path / "out", tags=("x",))
    formats.write_omniedit(tmp_path / "set", num=5)
    with pytest.raises(UserError, match="another source or with other options"):
        Imported("omniedit", tmp_path / "set", tmp_path / "out")
    (tmp_path / "foreign").mkdir()
    (tmp_path / "foreign/a.tar").write_bytes(b"")
    with pytest.raises(UserError, match="shards that this command did not write"):
        Imported("omniedit", tmp_path / "set", tmp_path / "foreign")


def test_counts_are_logged_with_reasons(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    formats.write_img2dataset(tmp_path / "set")
    with caplog.at_level("INFO", logger=import_source.__name__):
        Imported("img2dataset", tmp_path / "set", tmp_path / "out")
    assert "5 items = 4 records (0 of them text only) in 2 shards + 1 rejected" in caplog.text
    assert "1 rejected: img2dataset: failed_to_download: HTTP Error 404: Not Found" in caplog.text
