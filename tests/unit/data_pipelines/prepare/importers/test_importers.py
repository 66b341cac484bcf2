"""Each importer reads back what the writer of its format meant, field by field."""

import json
from pathlib import Path
from typing import Any

import pytest

from tests import public_formats
from tests.imported import Imported
from tests.shards import png


def turns(item: dict[str, Any]) -> list[dict[str, str]]:
    roles = {"human": "user", "gpt": "assistant"}
    return [{"role": roles[turn["from"]], "text": turn["value"]} for turn in item["conversations"]]


@pytest.mark.parametrize("name", ["llava-pretrain", "llava-json"])
def test_llava_json(tmp_path: Path, name: str) -> None:
    items = public_formats.write_llava_pretrain(tmp_path / "set")
    imported = Imported(name, tmp_path / "set", tmp_path / "out", tags=("general",))
    assert [record["i2t"] for record in imported.records] == [[{"images": ["img0"], "turns": turns(i)}] for i in items]
    assert [members["img0.jpg"] for members in imported.members] == [public_formats.jpeg(i) for i in range(len(items))]
    assert [record["provenance"]["row"] for record in imported.records] == [item["id"] for item in items]
    assert {tuple(record["tags"]) for record in imported.records} == {("general",)}
    assert imported.manifest["samples"] == {"i2t": 4, "t2i": 0, "it2i": 0}
    assert imported.rejects == []


def test_json_lines_with_folders_of_images_and_roles_of_chat_apis(tmp_path: Path) -> None:
    (tmp_path / "set/images").mkdir(parents=True)
    for i in range(2):
        (tmp_path / f"set/images/{i}.png").write_bytes(png(i))
    messages = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": [{"type": "text", "text": "Compare "}, {"type": "image"}, {"type": "image"}]},
        {"role": "assistant", "content": "Same."},
    ]
    items = [
        {"image": ["0.png", "images/1.png"], "messages": messages, "score": 0.5},
        {"conversations": [{"from": "human", "value": "2 + 2?"}, {"from": "gpt", "value": "4"}], "score": 1},
        {"video": "a.mp4", "conversations": [{"from": "human", "value": "?"}, {"from": "gpt", "value": "4"}]},
    ]
    (tmp_path / "set/data.jsonl").write_text("".join(json.dumps(item) + "\n" for item in items))
    imported = Imported("llava-json", tmp_path / "set", tmp_path / "out")
    first, second = (record["i2t"][0] for record in imported.records)
    assert first["images"] == ["img0", "img1"]
    assert [turn["text"] for turn in first["turns"]] == ["Be brief.", "Compare <image><image>", "Same."]
    assert [turn["role"] for turn in first["turns"]] == ["system", "user", "assistant"]
    assert second["images"] == []
    assert [column["score"] for column in imported.columns] == [0.5, 1.0]
    assert imported.counts["text_only"] == 1
    assert [(reject["item"], reject["reason"]) for reject in imported.rejects] == [
        ("data.jsonl#2", "a video, which no task uses")
    ]


def test_llava_onevision(tmp_path: Path) -> None:
    rows = public_formats.write_onevision(tmp_path / "set")
    imported = Imported("llava-onevision", tmp_path / "set", tmp_path / "out")
    for record, members, row in zip(imported.records, imported.members, rows, strict=True):
        names = ["img0"] if row["image"] else []
        assert record["i2t"] == [{"images": names, "turns": turns(row)}]
        assert [members.get("img0.png")] == [row["image"] and row["image"]["bytes"]]
        assert record["provenance"]["config"] == "ai2d(gpt4v)"
        assert record["provenance"]["row"] == row["id"]
    assert imported.counts["text_only"] == 1
    assert imported.provenance["sources"][0]["configs"] == ["ai2d(gpt4v)"]
    assert imported.columns[0] == {"source": "ai2d(gpt4v)"}
    one_config = Imported("llava-onevision", tmp_path / "set" / "ai2d(gpt4v)", tmp_path / "one")
    assert {record["provenance"]["config"] for record in one_config.records} == {"ai2d(gpt4v)"}


def test_finevision_by_names_of_columns(tmp_path: Path) -> None:
    rows = public_formats.write_finevision(tmp_path / "set", "ai2d")
    rows += public_formats.write_finevision(tmp_path / "set", "aokvqa", reverse=True)
    imported = Imported("finevision", tmp_path / "set", tmp_path / "out", workers=1)
    for record, members, columns, row in zip(imported.records, imported.members, imported.columns, rows, strict=True):
        (alternative,) = record["i2t"]
        said = [text for turn in row["texts"] for text in (turn["user"], turn["assistant"])]
        assert [turn["text"] for turn in alternative["turns"]] == said
        assert [turn["role"] for turn in alternative["turns"]] == ["user", "assistant"] * 2
        assert alternative["images"] == [f"img{k}" for k in range(len(row["images"]))]
        assert [members[f"img{k}.png"] for k in range(len(row["images"]))] == [i["bytes"] for i in row["images"]]
        assert columns == {name: value for name, value in row.items() if name not in ("images", "texts")}
    assert imported.counts["text_only"] == 2


def test_omniedit(tmp_path: Path) -> None:
    rows = public_formats.write_omniedit(tmp_path / "set")
    imported = Imported("omniedit", tmp_path / "set", tmp_path / "out")
    for record, members, columns, row in zip(imported.records, imported.members, imported.columns, rows, strict=True):
        assert [alternative["text"] for alternative in record["it2i"]] == row["edited_prompt_list"]
        assert {(*a["images"], a["target"], a["kind"]) for a in record["it2i"]} == {("img0", "img1", "swap")}
        assert members["img0.jpg"] == row["src_img"]["bytes"]
        assert members["img1.jpg"] == row["edited_img"]["bytes"]
        dropped = ("src_img", "edited_img", "edited_prompt_list", "omni_edit_id")
        assert columns == {name: value for name, value in row.items() if name not in dropped}
    assert imported.manifest["samples"]["it2i"] == len(rows)


@pytest.mark.parametrize("score", ["AESTHETIC_SCORE", "aesthetic"])
def test_img2dataset_with_the_names_of_columns_of_laion(tmp_path: Path, score: str) -> None:
    rows = public_formats.write_img2dataset(tmp_path / "set", score=score)
    imported = Imported("img2dataset", tmp_path / "set", tmp_path / "out")
    good = [row for row in rows if row["status"] == "success"]
    for record, members, columns, row in zip(imported.records, imported.members, imported.columns, good, strict=True):
        assert "i2t" not in record  # a caption pair: the recipe chooses the question
        assert members["txt"].decode() == row["caption"]
        assert members["img0.jpg"] == public_formats.jpeg(int(row["key"]))
        assert columns["aesthetic"] == row[score]
        assert (columns["listed_width"], columns["listed_height"]) == (row["WIDTH"], row["HEIGHT"])
        for name in ("url", "similarity", "punsafe", "hash", "original_width", "original_height", "sha256"):
            assert columns[name] == row[name]
    assert imported.columns[1]["pwatermark"] is None
    assert imported.manifest["samples"] == {"i2t": 4, "t2i": 4, "it2i": 0}
    (reject,) = imported.rejects
    assert reject == {
        "item": "000000001",
        "reason": "img2dataset: failed_to_download: HTTP Error 404: Not Found",
        "count": 1,
    }
