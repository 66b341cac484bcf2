import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from data_pipelines.cli import main
from tests.helpers import ASSETS
from tests.shards import every_task, prompt, write_shards

TOKENIZER = ["--tokenizer", str(ASSETS / "tokenizer")]
FAST = ["--size", "32", "--samples", "8", "6", "2", "--shard-samples", "10"]


@pytest.fixture(scope="module")
def imported(tmp_path_factory: pytest.TempPathFactory, package: Path) -> Path:
    out = tmp_path_factory.mktemp("cli") / "set"
    assert main(["import", "fluent-emoji", str(out), *sources(package), *FAST]) == 0
    return out


def sources(package: Path) -> list[str]:
    return ["--package", str(package), "--unicode-table", str(package / "data-by-emoji.json")]


@pytest.mark.seconds
def test_import_writes_shards_indexes_and_a_manifest_with_provenance(imported: Path) -> None:
    train = imported / "train"
    assert len(list(train.glob("*.tar"))) == len(list(train.glob("*.idx.parquet"))) == 2
    provenance = json.loads((train / "manifest.json").read_text())["provenance"]
    assert provenance["sources"][0] == {"dataset": "fluentui-emoji", "version": "9.9.9", "licence": "MIT"}
    assert provenance["side"] == 32


@pytest.mark.seconds
def test_stats_counts_records_and_tasks(imported: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["stats", str(imported)]) == 0
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    header = next(line for line in lines if line[:1] == ["split"])
    numbers = dict(zip(header, next(line for line in lines if line[:2] == ["train", "2"]), strict=False))
    assert [numbers[name] for name in ("shards", "records", "i2t", "it2i", "stem")] == ["2", "16", "16", "6", "2"]


@pytest.mark.seconds
def test_check_passes_a_whole_set_and_fails_a_damaged_one(
    imported: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["check", str(imported)]) == 0
    copy = tmp_path / "copy"
    shutil.copytree(imported / "train", copy)
    shard = copy / "shard-000000.tar"
    data = bytearray(shard.read_bytes())
    data[600] ^= 255
    shard.write_bytes(data)
    capsys.readouterr()
    assert main(["check", str(copy)]) == 1
    assert "shard-000000" in capsys.readouterr().out


@pytest.mark.seconds
def test_index_keeps_the_provenance(imported: Path, tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(imported / "train", copy)
    for path in copy.glob("*.parquet"):
        path.unlink()
    assert main(["index", str(copy), *TOKENIZER]) == 0
    assert json.loads((copy / "manifest.json").read_text()) == json.loads(
        (imported / "train" / "manifest.json").read_text()
    )


@pytest.mark.parametrize(
    ("arguments", "names"),
    [
        (["import", "fluent-emoji", "{new}", "--package", "{empty}", "--unicode-table", "{empty}/t"], "no icons"),
        (["import", "fluent-emoji", "{new}", "--package", "{set}/train/manifest.json"], "not a readable .tgz"),
        (["import", "fluent-emoji", "{set}", "{sources}"], "already holds shards"),
        (["import", "fluent-emoji", "{set}/train/manifest.json", "{sources}"], "cannot make this folder (File exists)"),
        (["import", "fluent-emoji", "{new}", "{sources}", "--world", "tiny"], "has no drawing of"),
        (["import", "fluent-emoji", "{new}", "{sources}", "--size", "3"], "--size is 3"),
        (["import", "fluent-emoji", "{new}", "{sources}", "--tokenizer", "{empty}/none.json"], "none.json"),
        (["stats", "{empty}"], "no *.tar"),
        (["check", "{empty}/missing"], "no *.tar"),
        (["index", "{set}", "--tokenizer", "{empty}/none.json"], "none.json"),
        (["index", "{set}", *TOKENIZER, "--workers", "0"], "--workers is 0"),
        (["check", "{set}", "--workers", "0"], "--workers is 0"),
        (["cache-latents", "{empty}", "--autoencoder", "{empty}"], "no *.tar"),
    ],
)
def test_bad_input_is_one_line_and_exit_2(
    arguments: list[str],
    names: str,
    package: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    written = write_shards(tmp_path / "set" / "train", every_task(2)).parent
    filled: list[str] = []
    for argument in arguments:
        if argument == "{sources}":
            filled += sources(package)
        else:
            filled.append(argument.format(new=tmp_path / "new", empty=tmp_path / "empty", set=written))
    assert main(filled) == 2
    (line,) = capsys.readouterr().err.splitlines()[-1:]
    assert line.startswith("error: ")
    assert names in line


def test_without_npm_the_error_names_the_way_out(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    assert main(["import", "fluent-emoji", str(tmp_path / "new")]) == 2
    assert "--package" in capsys.readouterr().err


def test_an_unknown_command_exits_2_from_the_shell() -> None:
    done = subprocess.run([sys.executable, "-m", "data_pipelines", "nonsense"], capture_output=True, check=False)
    assert done.returncode == 2


@pytest.mark.parametrize(
    "command", [["index", *TOKENIZER], ["cache-latents", "--autoencoder", str(ASSETS / "autoencoder"), "--side", "64"]]
)
def test_a_folder_that_cannot_be_written_is_one_line(
    command: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = write_shards(tmp_path / "set", [prompt("p000", side=64)])
    monkeypatch.setattr("os.access", lambda *_: False)
    assert main([command[0], str(folder), *command[1:]]) == 2
    assert f"error: {folder}: cannot write into this folder" in capsys.readouterr().err.splitlines()[-1]
