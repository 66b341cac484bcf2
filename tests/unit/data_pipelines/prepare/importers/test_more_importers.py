"""X2I2, BAGEL, energon, parquet by a map, folders, stamps, clip art, field by field; sources that fit no importer."""

import csv
import json
from pathlib import Path

import pyarrow as pa
import pytest

from emma_train.errors import UserError
from tests import more_public_formats as formats
from tests.imported import Imported
from tests.public_formats import (
    jpeg,
    write_finevision,
    write_img2dataset,
    write_omniedit,
    write_table,
    write_tar,
)
from tests.shards import png


def test_x2i2(tmp_path: Path) -> None:
    formats.write_x2i2(tmp_path / "set")
    imported = Imported("x2i2", tmp_path / "set", tmp_path / "out")
    by_config = {}
    for record, members in zip(imported.records, imported.members, strict=True):
        by_config.setdefault(record["provenance"]["config"], []).append((record, members))
    ((edit, members),) = by_config["inpaint_edit"]
    assert edit["it2i"] == [{"images": ["img0"], "target": "img1", "kind": "edit", "text": "加一只猫"}]
    assert [members["img0.png"], members["img1.png"]] == [formats.x2i2_image(0, f"a/{i}.png") for i in range(2)]
    (subjects, _), (prompt, members) = by_config["video_icgen"]
    assert subjects["it2i"] == [{"images": ["img0", "img1"], "target": "img2", "kind": "ic", "text": "both"}]
    assert prompt["t2i"] == [{"target": "img0", "text": "a red fish"}]
    assert members["img0.png"] == formats.x2i2_image(1, "3.png")
    ((reflect, _),) = by_config["reflect"]
    assert reflect["it2i"] == [{"images": ["img0"], "target": "img1", "text": "a long instruction"}]
    (reject,) = imported.rejects
    assert reject["item"] == "video_interleave.jsonl#0"
    assert "images among its words" in reject["reason"]


def test_bagel(tmp_path: Path) -> None:
    rows = formats.write_bagel(tmp_path / "set")
    imported = Imported("bagel", tmp_path / "set", tmp_path / "out")
    pairs = [members for members in imported.members if "c0.txt" in members]
    assert [[m["c0.txt"].decode(), m["c1.txt"].decode()] for m in pairs] == [
        list(json.loads(row["captions"]).values()) for row in rows["t2i"]
    ]
    assert [members["img0.jpg"] for members in pairs] == [row["image"] for row in rows["t2i"]]
    edits = [(r, m) for r, m in zip(imported.records, imported.members, strict=True) if "it2i" in r]
    first, members = edits[0]
    assert [(*a["images"], a["target"], a["text"]) for a in first["it2i"]] == [
        ("img0", "img1", "make it red"),
        ("img0", "img1", "red, please"),
        ("img1", "img2", "now blue"),
    ]
    assert [members[f"img{i}.png"] for i in range(3)] == rows["editing"][0]["image_list"]
    (chat,) = [record for record in imported.records if "i2t" in record]
    assert chat["i2t"][0]["images"] == ["img0", "img1"]
    assert chat["i2t"][0]["turns"][0]["text"] == "Is <image> in <image>?"
    assert imported.manifest["samples"] == {"i2t": 3, "t2i": 2, "it2i": 2}


def test_energon_captions_questions_and_texts(tmp_path: Path) -> None:
    captions = [("a.jpg", jpeg(1)), ("a.txt", b"a cat"), ("b.png", png(2)), ("b.txt", b"a dog")]
    formats.write_energon(tmp_path / "a", "CaptioningSample", {"image": "png,jpg", "caption": "txt"}, captions)
    imported = Imported("energon", tmp_path / "a", tmp_path / "a-out")
    assert [(m["txt"], m.get("img0.jpg") or m["img0.png"]) for m in imported.members] == [
        (b"a cat", jpeg(1)),
        (b"a dog", png(2)),
    ]
    value = {"q": "What?", "a": [["A cat."], ["A dog.", "A pet."]]}
    questions = [("a.jpg", jpeg(1)), ("a.json", json.dumps(value).encode())]
    names = {"image": "jpg", "context": "json[q]", "answers": "json[a][1]"}
    formats.write_energon(tmp_path / "b", "VQASample", names, questions)
    (record,) = Imported("energon", tmp_path / "b", tmp_path / "b-out").records
    assert [[turn["text"] for turn in a["turns"]] for a in record["i2t"]] == [["What?", "A dog."], ["What?", "A pet."]]
    formats.write_energon(tmp_path / "c", "TextSample", {"text": "txt"}, [("a.txt", b"Once upon a time.")])
    imported = Imported("energon", tmp_path / "c", tmp_path / "c-out")
    assert imported.records[0]["i2t"] == [{"images": [], "turns": [{"role": "assistant", "text": "Once upon a time."}]}]
    assert imported.counts["text_only"] == 1


def test_energon_crude_through_a_map(tmp_path: Path) -> None:
    turns = [{"from": "human", "value": "<image>?"}, {"from": "gpt", "value": "A cat."}]
    members = [("x/a.jpg", jpeg(1)), ("x/a.json", json.dumps({"conversations": turns}).encode())]
    formats.write_energon(tmp_path / "set", "CrudeWebdataset", {}, members)
    with pytest.raises(UserError, match=r"samples are CrudeWebdataset.*--map"):
        Imported("energon", tmp_path / "set", tmp_path / "out")
    fields = {"image": "jpg", "turns": "json:conversations"}
    imported = Imported("energon", tmp_path / "set", tmp_path / "out", fields=fields)
    (alternative,) = imported.records[0]["i2t"]
    assert [turn["text"] for turn in alternative["turns"]] == ["<image>?", "A cat."]
    assert imported.records[0]["provenance"]["row"] == "x/a"


def test_parquet_by_a_map(tmp_path: Path) -> None:
    rows = formats.write_any_parquet(tmp_path / "set")
    fields = {"source": "before", "target": "after", "instruction": "how"}
    imported = Imported("hf-parquet", tmp_path / "set", tmp_path / "out", fields=fields)
    for record, members, columns, row in zip(imported.records, imported.members, imported.columns, rows, strict=True):
        assert record["it2i"] == [{"images": ["img0"], "target": "img1", "text": row["how"]}]
        assert [members["img0.png"], members["img1.png"]] == [row["before"]["bytes"], row["after"]["bytes"]]
        assert columns == {"how": row["how"], "clip": row["clip"]}
    with pytest.raises(UserError, match="--map caption=how: makes no sample"):
        Imported("hf-parquet", tmp_path / "set", tmp_path / "other", fields={"caption": "how"})
    with pytest.raises(UserError, match="--map colour=...: no such field"):
        Imported("hf-parquet", tmp_path / "set", tmp_path / "other", fields={"colour": "how"})


def test_a_column_named_key_does_not_replace_the_keys_of_records(tmp_path: Path) -> None:
    rows = [{"key": "a", "text": "one", "b": 1}, {"key": "a", "text": "two", "b": 2}]
    write_table(tmp_path / "set/0.parquet", [("key", pa.string()), ("text", pa.string()), ("b", pa.int64())], rows)
    imported = Imported("hf-parquet", tmp_path / "set", tmp_path / "out", fields={"text": "text"})
    assert imported.columns == [{"source_key": "a", "text": row["text"], "b": row["b"]} for row in rows]


def test_folder_with_texts_beside_images(tmp_path: Path) -> None:
    (tmp_path / "set/sub").mkdir(parents=True)
    for name in ("a.png", "b.png", "sub/c [1].png"):
        (tmp_path / "set" / name).write_bytes(png(len(name)))
    (tmp_path / "set/a.txt").write_text("one")
    (tmp_path / "set/sub/c [1].one.txt").write_text("two\n")
    (tmp_path / "set/sub/c [1].two.txt").write_text("zwei")
    imported = Imported("folder", tmp_path / "set", tmp_path / "out")
    assert imported.members[0]["txt"] == b"one"
    assert (imported.members[1]["c0.txt"], imported.members[1]["c1.txt"]) == (b"two", b"zwei")
    assert imported.members[1]["img0.png"] == png(len("sub/c [1].png"))
    assert [(reject["item"], reject["reason"]) for reject in imported.rejects] == [
        ("b.png", "no b.txt with its caption")
    ]


@pytest.mark.parametrize("has_map", [False, True])
def test_folder_with_a_table(tmp_path: Path, has_map: bool) -> None:
    (tmp_path / "set/images").mkdir(parents=True)
    for i in range(3):
        (tmp_path / f"set/images/{i}.png").write_bytes(png(i))
    names = ("bild", "wort") if has_map else ("file_name", "text")
    with open(tmp_path / "set/metadata.csv", "w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow([*names, "score"])
        writer.writerows([[f"images/{i}.png", f'a "{i}",\nü', i] for i in range(2)])
        writer.writerows([["images/9.png", "none", 0], ["../x.png", "none", 0], ["images/2.png"]])
    options = {"fields": {"image": "bild", "caption": "wort"}} if has_map else {}
    imported = Imported("folder", tmp_path / "set", tmp_path / "out", **options)
    assert [members["txt"].decode() for members in imported.members] == ['a "0",\nü', 'a "1",\nü']
    assert [members["img0.png"] for members in imported.members] == [png(0), png(1)]
    assert [columns["score"] for columns in imported.columns] == ["0", "1"]
    assert ["no such image" in r["reason"] or r["reason"] for r in imported.rejects] == [
        True,
        "../x.png: a path that leads out of the folder of images",
        "another number of fields than the header",
    ]


def test_stamps(tmp_path: Path) -> None:
    formats.write_stamps(tmp_path / "set")
    imported = Imported("tuxpaint-stamps", tmp_path / "set", tmp_path / "out")
    duck, owl = imported.records
    assert duck["t2i"] == [{"target": "img0", "text": "A duck."}]
    assert owl["t2i"] == [{"target": "img0", "text": "An owl."}]
    assert [[turn["text"] for turn in a["turns"]] for a in owl["i2t"]] == [
        ["Describe this picture.", "An owl."],
        ["Describe this picture in German.", "Eine Eule."],
        ["Describe this picture in simplified Chinese.", "猫头鹰。"],
    ]
    assert imported.members[1]["img0.png"] == png(0)
    assert [reject["item"] for reject in imported.rejects] == ["owl_mirror.png"]


def test_clip_art(tmp_path: Path) -> None:
    formats.write_clip_art(tmp_path / "set")
    imported = Imported("openclipart", tmp_path / "set", tmp_path / "out")
    assert [members["txt"] for members in imported.members] == [b"a drawing of red apple (food, fruit)"]
    assert imported.columns == [{"category": "food/fruit"}]
    assert [reject["reason"] for reject in imported.rejects] == ["a file name without words"]


def test_gpt_image_edit_is_refused_by_every_importer(tmp_path: Path) -> None:
    rows = formats.write_gpt_image_edit(tmp_path / "a")
    formats.write_gpt_image_edit(tmp_path / "b", name="edits")
    renamed = [{"name": row["id"], "dataset_source": row["dataset_source"], "text": row["instruction"]} for row in rows]
    write_table(tmp_path / "c/0.parquet", [(name, pa.string()) for name in renamed[0]], renamed)
    chat = [{"from": "human", "value": "?"}, {"from": "gpt", "value": "!"}]
    (tmp_path / "d").mkdir()
    (tmp_path / "d/chat.json").write_text(json.dumps([{"id": "ultraedit_x_1", "conversations": chat}]))
    write_tar(tmp_path / "e/0.tar", [("hqedit_edit_1.png", png(1)), ("hqedit_edit_1.txt", b"a cat")])
    (tmp_path / "f").mkdir()
    (tmp_path / "f/omniedit_gpt_rewrite.json").write_text("[]")
    cases = (
        ("folder", "a", {}, "rule path: gpt-edit/omniedit/"),
        ("x2i2", "b", {}, "rule columns"),
        ("hf-parquet", "c", {"fields": {"text": "text"}}, "rule dataset_source: omniedit"),
        ("llava-json", "d", {}, "rule id: ultraedit_"),
        ("img2dataset", "e", {}, "rule id: hqedit_"),
        ("energon", "e", {"fields": {"image": "png", "caption": "txt"}}, "rule id: hqedit_"),
        ("finevision", "f", {}, "rule annotation file: omniedit_gpt_rewrite.json"),
    )
    for importer, folder, options, rule in cases:
        with pytest.raises(UserError, match=rf"is data of GPT-Image-Edit-1\.5M \({rule}"):
            Imported(importer, tmp_path / folder, tmp_path / "out" / f"{importer}-{folder}", **options)


def test_a_source_that_does_not_fit_is_described_with_the_nearest_importer(tmp_path: Path) -> None:
    write_finevision(tmp_path / "fine", "ai2d")
    write_omniedit(tmp_path / "omni")
    write_img2dataset(tmp_path / "laion")
    formats.write_x2i2(tmp_path / "x2i2")
    write_tar(tmp_path / "foreign/0.tar", [("a.src.jpg", jpeg(1)), ("a.json", b'{"prompt": "x", "n": 1}')])
    (tmp_path / "empty").mkdir()
    cases = (
        ("omniedit", "fine", r"files: 1 \.parquet; columns: images, texts, source, .*nearest importer is finevision"),
        ("finevision", "omni", r"columns: omni_edit_id, task, src_img.*nearest importer is omniedit"),
        ("llava-json", "laion", r"members: jpg, txt, json; JSON keys: url, caption.*nearest importer is img2dataset"),
        ("llava-json", "x2i2", r"keys: .*instruction.*nearest importer is x2i2"),
        (
            "img2dataset",
            "foreign",
            r"members: src.jpg, json; JSON keys: prompt, n; .*energon with --map; the first item",
        ),
        ("folder", "empty", "files: none; name its fields with --map"),
    )
    for importer, folder, message in cases:
        with pytest.raises(UserError, match=message):
            Imported(importer, tmp_path / folder, tmp_path / "out" / f"{importer}-{folder}")
