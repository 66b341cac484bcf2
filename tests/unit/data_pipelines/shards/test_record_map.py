"""Tars of others are indexed, checked and trained on through a map of their members; the tars do not change."""

import hashlib
import json
from pathlib import Path
from typing import Any

import pytest

from data_pipelines.cli import main
from data_pipelines.loader.reader import SampleReader
from data_pipelines.loader.requests import read_requests
from data_pipelines.planner.candidates import SampleRef
from data_pipelines.planner.sources import Sources
from data_pipelines.shards.build_index import index_folder
from data_pipelines.shards.check import check_folder
from data_pipelines.shards.index import read_columns
from data_pipelines.shards.record_map import MAP_FILE, RecordMap, mapped_value, read_map
from emma_train.config.schema import DataConfig
from emma_train.errors import UserError
from emma_train.sequence.tokens import TextTokenizer
from tests.helpers import ASSETS
from tests.public_formats import jpeg, write_tar

TOKENIZER = ASSETS / "tokenizer"
CASES: dict[str, tuple[RecordMap, dict[str, Any], dict[str, bytes], str]] = {
    "caption": (RecordMap(caption="json:meta[caption]"), {"meta": {"caption": "a cat"}}, {"jpg": jpeg(1)}, "t2i"),
    "turns": (
        RecordMap(turns="json:conversations"),
        {"conversations": [{"from": "human", "value": "<image>?"}, {"from": "gpt", "value": "a cat"}]},
        {"image.jpg": jpeg(1)},
        "i2t",
    ),
    "edit": (
        RecordMap(source="src.jpg", target="tgt.png,tgt.jpg", instruction="json:how"),
        {"how": ["a dog", "to a dog"]},
        {"src.jpg": jpeg(1), "tgt.jpg": jpeg(2)},
        "it2i",
    ),
    "prompt": (RecordMap(target="jpg"), {"prompt": "a cat"}, {"jpg": jpeg(1)}, "t2i"),
}


def foreign(folder: Path, values: dict[str, Any], images: dict[str, bytes]) -> Path:
    members = [("a.json", json.dumps(values).encode()), *((f"a.{name}", data) for name, data in images.items())]
    write_tar(folder / "set-0.tar", [*members, ("b.json", b"{}"), ("b.jpg", jpeg(9))])
    return folder


@pytest.mark.parametrize("name", CASES)
def test_index_check_and_train(tmp_path: Path, name: str) -> None:
    record_map, values, images, task = CASES[name]
    folder = foreign(tmp_path, values, images)
    before = hashlib.sha256((folder / "set-0.tar").read_bytes()).hexdigest()
    manifest = index_folder(folder, TOKENIZER, record_map=record_map)
    assert manifest["samples"][task] == 1
    assert manifest["shards"][0]["left_out"] == 1
    assert manifest["shards"][0]["sha256"] == before
    assert check_folder(folder) == []
    (row,) = read_columns(folder, "set-0.tar", task).to_pylist()
    reader = SampleReader(DataConfig(), TextTokenizer(TOKENIZER), 16, 2, None)
    where = row["key"], task, str(folder / "set-0.tar"), before, row["offset"], row["size"], row["crc32"]
    sample = reader.read(SampleRef(*where, epoch=0, alternative=0, num_tokens=0, num_visual=0))
    assert len(sample.images) == len(row["context"][0]) + (row["target"][0] >= 0)
    (request,) = read_requests(folder, task, DataConfig(), 32)
    assert (request.truth or request.text) == {"edit": "a dog"}.get(name, "a cat")
    data, tokenizer = DataConfig(), TextTokenizer(TOKENIZER)
    assert Sources(data, tokenizer)._manifest(str(folder)) == manifest
    (folder / MAP_FILE).unlink()
    with pytest.raises(UserError, match=r"map.json is missing or is not the map in manifest.json"):
        Sources(data, tokenizer)._manifest(str(folder))


def test_a_map_is_kept_and_another_one_indexes_again(tmp_path: Path) -> None:
    folder = foreign(tmp_path, {"one": "a cat", "two": "two cats"}, {"jpg": jpeg(1)})
    arguments = ["index", str(folder), "--tokenizer", str(TOKENIZER), "--workers", "1"]
    assert main(arguments) == 2
    assert main([*arguments, "--caption", "json:one"]) == 0
    one = read_columns(folder, "set-0.tar", "t2i")["text_tokens"].to_pylist()
    assert main(arguments) == 0
    assert read_map(folder) == RecordMap(caption="json:one")
    assert main([*arguments, "--caption", "json:two"]) == 0
    assert read_columns(folder, "set-0.tar", "t2i")["text_tokens"].to_pylist() != one


def test_the_end_of_indexing_says_what_was_indexed(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    folder = foreign(tmp_path, {"one": "a cat"}, {"jpg": jpeg(1)})
    with pytest.raises(UserError, match=r"its members: json, jpg; keys of its JSON: one; --caption, --turns, or"):
        index_folder(folder, TOKENIZER)
    with caplog.at_level("INFO"):
        index_folder(folder, TOKENIZER, record_map=RecordMap(caption="json:one"))
    assert "indexed 1 i2t, 1 t2i, 0 it2i of 1 shards; 1 records left out" in caplog.text


@pytest.mark.parametrize(
    "fields", [{}, {"caption": "txt", "turns": "json:x"}, {"source": "a.jpg"}, {"instruction": "txt"}]
)
def test_maps_that_make_no_sample(fields: dict[str, str]) -> None:
    with pytest.raises(UserError, match="give one of them"):
        RecordMap(**fields)


def test_names_reach_into_json() -> None:
    values = {"json": b'{"a": [{"b": 1}, null], "c": null}', "d.e": 2}
    assert mapped_value(values, "json:a[0][b]") == 1
    assert mapped_value(values, "json[a][0]:b") == 1
    assert mapped_value(values, "json:c,d.e") == 2
    with pytest.raises(ValueError, match="its json is no JSON"):
        mapped_value({"json": b"{"}, "json:a")
