"""Damaged sources: every item is a correct record or a reject with its reason, and counts add up."""

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from data_pipelines.shards.images import image_members, load_resized
from emma_train.config.schema import ImageConfig
from emma_train.errors import UserError
from tests import public_formats as formats
from tests.fuzz_sources import SOURCES, Fuzz
from tests.imported import Imported
from tests.odd_images import IMAGES
from tests.shards import png


@pytest.mark.parametrize("name", IMAGES)
def test_images(tmp_path: Path, name: str) -> None:
    data, reason = IMAGES[name]
    text = pa.struct([("user", pa.string()), ("assistant", pa.string())])
    schema = [("images", pa.list_(formats.HUB_IMAGE)), ("texts", pa.list_(text))]
    image = {"bytes": data, "path": None}
    rows = [{"images": [i], "texts": [{"user": "?", "assistant": "!"}]} for i in (formats.hub_image(png(7)), image)]
    formats.write_table(tmp_path / "set/0.parquet", schema, rows)
    imported = Imported("finevision", tmp_path / "set", tmp_path / "out")
    if reason:
        (reject,) = imported.rejects
        assert reason in reject["reason"]
        assert reject["item"] == "0.parquet#1"
    else:
        assert imported.rejects == []
        (part,) = image_members(imported.members[1]).values()
        assert part == data
        assert load_resized(part, ImageConfig(side=32), 32).shape == (32, 32, 3)


ROWS: dict[str, tuple[dict[str, Any], str]] = {
    "no texts": ({"texts": []}, "no texts"),
    "null texts": ({"texts": None}, "no texts"),
    "empty answer": ({"texts": [{"user": "?", "assistant": " "}]}, "texts[0] has no answer"),
    "null question": ({"texts": [{"user": None, "assistant": "!"}]}, "texts[0] has no question"),
    "a mark too many": ({"texts": [{"user": "<image><image>", "assistant": "!"}]}, "2 <image> in the user turns for 1"),
    "NaN ratings": ({"relevance_ratings": [math.nan], "relevance_min": math.nan}, ""),
    "null ratings": ({"relevance_ratings": None, "relevance_min": None}, ""),
    "null images": ({"images": None}, ""),
}


@pytest.mark.parametrize("name", ROWS)
def test_rows_of_finevision(tmp_path: Path, name: str) -> None:
    change, reason = ROWS[name]
    text = pa.struct([("user", pa.string()), ("assistant", pa.string())])
    schema = [("images", pa.list_(formats.HUB_IMAGE)), ("texts", pa.list_(text))]
    schema += [("relevance_ratings", pa.list_(pa.float64())), ("relevance_min", pa.float64())]
    row = {"images": [formats.hub_image(png(7))], "texts": [{"user": "?", "assistant": "!"}]}
    row |= {"relevance_ratings": [3.0], "relevance_min": 3.0}
    formats.write_table(tmp_path / "set/0.parquet", schema, [row, {**row, **change}])
    imported = Imported("finevision", tmp_path / "set", tmp_path / "out")
    assert [reason in reject["reason"] for reject in imported.rejects] == [True] * bool(reason)
    if "ratings" in name:
        assert [columns["relevance_min"] for columns in imported.columns] == [3, None]


def test_items_of_json(tmp_path: Path) -> None:
    formats.write_llava_pretrain(tmp_path / "set", num=1)
    file = tmp_path / "set/blip_laion_cc_sbu_558k.json"
    (good,) = json.loads(file.read_text())
    turn = {"from": "human", "value": "?"}
    items = [
        good,
        good,  # an id may occur twice
        "text",
        {**good, "image": "../../etc/passwd"},
        {**good, "image": "/etc/passwd"},
        {**good, "image": "nowhere.jpg"},
        {**good, "image": 5},
        {**good, "conversations": []},
        {**good, "conversations": [turn]},
        {**good, "conversations": [{"from": "robot", "value": "?"}]},
        {**good, "conversations": [{**turn, "value": "<image> \ud800"}, {"from": "gpt", "value": "!"}]},
    ]
    file.write_text(json.dumps(items))
    imported = Imported("llava-json", tmp_path / "set", tmp_path / "out")
    assert len(imported.records) == 2
    expected = ["str where an object", "leads out", "leads out", "no such image", "is no text", "no list of turns"]
    expected += ["no answer to learn from", "role 'robot'", "surrogates not allowed"]
    for reject, reason in zip(imported.rejects, expected, strict=True):
        assert reason in reject["reason"]


def test_lines_that_are_no_json_do_not_end_the_file(tmp_path: Path) -> None:
    (tmp_path / "set").mkdir()
    line = json.dumps({"conversations": [{"from": "human", "value": "2?"}, {"from": "gpt", "value": "2"}]}).encode()
    deep = b"[" * 100_000
    (tmp_path / "set/a.jsonl").write_bytes(b"\n".join([line, line[:-9], b"", deep, b"\xff\xfe", line]))
    imported = Imported("llava-json", tmp_path / "set", tmp_path / "out")
    assert len(imported.records) == 2
    assert [reject["item"] for reject in imported.rejects] == ["a.jsonl#1", "a.jsonl#2", "a.jsonl#3"]


def test_tars_with_keys_that_repeat_or_are_not_utf8(tmp_path: Path) -> None:
    members = [("a.jpg", formats.jpeg(1)), ("a.txt", b"a cat"), ("b.jpg", formats.jpeg(2)), ("b.txt", b"a dog")]
    members += [*members[:2], ("c\udcff.jpg", formats.jpeg(3)), ("c\udcff.txt", b"a cow"), ("d.jpg", formats.jpeg(4))]
    members += [("e.jpg", formats.jpeg(4)), ("e.jpg", formats.jpeg(5)), ("e.txt", b"x"), ("f.jpg", formats.jpeg(6))]
    members += [("f.txt", b"\xff\xfe")]
    formats.write_tar(tmp_path / "set/00000.tar", members)
    imported = Imported("img2dataset", tmp_path / "set", tmp_path / "out")
    assert [record["provenance"]["row"] for record in imported.records] == ["a", "b"]
    expected = ["occurs twice", "surrogates", "no caption", "two members jpg", "can't decode"]
    for reject, reason in zip(imported.rejects, expected, strict=True):
        assert reason in reject["reason"]


def test_files_with_other_columns_and_files_that_are_no_parquet(tmp_path: Path) -> None:
    formats.write_finevision(tmp_path / "set", "ai2d")
    formats.write_omniedit(tmp_path / "set", num=5)
    (tmp_path / "set/broken.parquet").write_bytes(b"PAR1 not really PAR1")
    imported = Imported("finevision", tmp_path / "set", tmp_path / "out")
    assert len(imported.records) == 3
    broken, other = sorted(imported.rejects, key=lambda reject: reject["count"])
    assert broken["count"] == 0
    assert "no parquet file that can be read" in broken["reason"]
    assert (other["count"], other["reason"][:40]) == (5, "no column images, texts; it has omni_edi")
    assert imported.counts["broken_files"] == 1


WRITERS: dict[str, tuple[Callable[[Path], Any], str]] = {
    "llava-pretrain": (lambda folder: formats.write_llava_pretrain(folder, 8), "blip_laion_cc_sbu_558k.json"),
    "finevision": (lambda folder: formats.write_finevision(folder, "a", num=4), "a/train-00000-of-00001.parquet"),
    "img2dataset": (lambda folder: formats.write_img2dataset(folder, 8), "00000.tar"),
}


@pytest.mark.seconds
@pytest.mark.parametrize("name", WRITERS)
def test_files_that_are_cut_or_have_wrong_bytes(tmp_path: Path, name: str) -> None:
    """30 cuts and 30 flips: what is imported of a cut file equals what the intact file gives, and all of it can be
    indexed and decoded."""
    write, file = WRITERS[name]
    write(tmp_path / "set")
    intact = Imported(name, tmp_path / "set", tmp_path / "intact")
    known = {record["provenance"]["row"]: m for record, m in zip(intact.records, intact.members, strict=True)}
    data, rng, outcomes = (tmp_path / "set" / file).read_bytes(), np.random.default_rng(5), []
    for number in range(60):
        is_cut = number % 2 == 0
        position = int(rng.integers(0, len(data)))
        flipped = bytes([data[position] ^ int(rng.integers(1, 256))])
        changed = data[:position] if is_cut else data[:position] + flipped + data[position + 1 :]
        (tmp_path / "set" / file).write_bytes(changed)
        try:
            imported = Imported(name, tmp_path / "set", tmp_path / f"out{number}")
        except UserError:
            outcomes.append("refused")
            continue
        outcomes.append("complete" if len(imported.records) == len(intact.records) else "partial")
        for record, members in zip(imported.records, imported.members, strict=True):
            if is_cut:
                assert members == known[record["provenance"]["row"]]
            for image in image_members(members).values():
                load_resized(image, ImageConfig(side=32), 32)
    assert set(outcomes) >= {"partial"} if name != "finevision" else "refused" in outcomes


def test_a_page_of_parquet_that_cannot_be_read_costs_its_row_group_only(tmp_path: Path) -> None:
    formats.write_finevision(tmp_path / "set", "a", num=6)
    path = tmp_path / "set/a/train-00000-of-00001.parquet"
    column = pq.read_metadata(path).row_group(1).column(0)
    data = bytearray(path.read_bytes())
    start = column.dictionary_page_offset or column.data_page_offset
    data[start : start + 24] = b"\xff" * 24
    path.write_bytes(data)
    imported = Imported("finevision", tmp_path / "set", tmp_path / "out")
    assert [record["provenance"]["row"].split("#")[1] for record in imported.records] == ["0", "1", "4", "5"]
    (reject,) = imported.rejects
    assert reject["count"] == 2
    assert reject["reason"].startswith("rows 2 to 3 cannot be read")


@pytest.mark.seconds
def test_a_sample_of_the_fuzz_of_sources(tmp_path: Path) -> None:
    """`python -m tests.fuzz_sources` tries thousands (docs/reliability.md)."""
    fuzz, outcomes = Fuzz(tmp_path), {}
    for seed in range(2):
        for name in SOURCES:
            what, outcome = fuzz.try_case(name, seed)
            outcomes[f"{name}, seed {seed}: {what}"] = outcome
    assert {case: outcome for case, outcome in outcomes.items() if outcome.startswith("wrong")} == {}
    assert set(outcomes.values()) == {"complete", "with rejects", "refused"}
