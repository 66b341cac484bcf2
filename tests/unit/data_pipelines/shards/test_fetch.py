"""Existing shards are copied unchanged from paths, URLs and commands, once; errors contain no secrets."""

import gzip
import json
import shlex
from pathlib import Path

import pytest

from data_pipelines.cli import main
from data_pipelines.shards.index import read_manifest
from tests.helpers import tokenizer
from tests.servers import serving
from tests.shards import every_task, write_shards


@pytest.fixture(scope="module")
def theirs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three shards without index, each also compressed."""
    folder = write_shards(tmp_path_factory.mktemp("theirs") / "set", every_task(6), per_shard=6, index=False)
    for tar in folder.glob("*.tar"):
        (folder / f"{tar.name}.gz").write_bytes(gzip.compress(tar.read_bytes()))
    return folder


def assert_brought(out: Path, theirs: Path) -> None:
    for tar in sorted(theirs.glob("*.tar")):
        assert (out / tar.name).read_bytes() == tar.read_bytes()
    assert read_manifest(out)["samples"] == {"i2t": 6, "t2i": 6, "it2i": 6}
    assert main(["check", str(out), "--workers", "1"]) == 0


def import_shards(out: Path, *sources: str) -> int:
    return main(["import", "shards", str(out), *sources, "--tokenizer", str(tokenizer().path), "--workers", "1"])


def test_the_output_of_commands_and_files_become_one_set(theirs: Path, tmp_path: Path) -> None:
    zipped = f"pipe:zcat {shlex.quote(str(theirs))}/shard-00000{{0..1}}.tar.gz"
    assert import_shards(tmp_path, zipped, str(theirs / "shard-000002.tar")) == 0
    assert_brought(tmp_path, theirs)
    assert read_manifest(tmp_path)["provenance"]["sources"] == ["pipe:zcat ..."] * 2 + [
        str(theirs / "shard-000002.tar")
    ]


def test_urls_come_in_pieces_and_only_once(theirs: Path, tmp_path: Path) -> None:
    pytest.importorskip("aiohttp", reason="pip install 'emma-train[http]'")
    with serving(theirs) as server:
        url = f"{server.url}/shard-00000{{0..2}}.tar?sig=topsecret"
        assert import_shards(tmp_path, url) == 0
        assert_brought(tmp_path, theirs)
        num = len(server.gets)
        (tmp_path / "shard-000001.tar").unlink()
        assert import_shards(tmp_path, url) == 0
        assert {get.split()[0] for get in server.gets[num:]} == {"/shard-000001.tar"}
        assert_brought(tmp_path, theirs)
    assert not any("topsecret" in path.read_text() for path in tmp_path.glob("*.json"))


def test_what_does_not_come_is_told_and_the_rest_stays(
    theirs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """At first the command fails for one shard, after half of its bytes."""
    flag = tmp_path / "flag"
    breaks = f"pipe:head -c 4000 {theirs}/shard-000001.tar; test -e {flag} && tail -c +4001 {theirs}/shard-000001.tar"
    sources = [str(theirs / "shard-000000.tar"), breaks, str(theirs / "shard-000002.tar")]
    out = tmp_path / "out"
    assert import_shards(out, *sources) == 1
    message = capsys.readouterr().err
    assert (
        "1 of 3 shards could not be copied; the first: pipe:head ... ended with exit code 1 and wrote 4,000 bytes"
        in message
    )
    assert sorted(path.name for path in out.glob("*.tar*")) == ["shard-000000.tar", "shard-000002.tar"]
    flag.touch()
    assert import_shards(out, *sources) == 0
    assert_brought(out, theirs)


def test_other_sources_do_not_mix_with_those_of_a_folder(
    theirs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    one, other = (str(theirs / f"shard-00000{number}.tar") for number in range(2))
    assert import_shards(tmp_path / "a", one) == 0
    assert import_shards(tmp_path / "a", other) == 2
    assert "holds shards of other sources" in capsys.readouterr().err
    assert import_shards(theirs, one) == 2
    assert "holds shards that this command did not write" in capsys.readouterr().err
    assert not (theirs / "sources.json").exists()
    assert len(json.loads((tmp_path / "a" / "sources.json").read_text())) == 1


def test_a_source_that_is_not_there_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert import_shards(tmp_path / "out", f"{tmp_path}/none.tar") == 1
    assert f"the first: {tmp_path}/none.tar: cannot be read: no such file" in capsys.readouterr().err
