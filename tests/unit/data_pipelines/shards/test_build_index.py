"""Indexing foreign shards: in parallel, resumed after an interruption, with unusable records left out and counted."""

import contextlib
import hashlib
import io
import json
import logging
import os
import tarfile
import tracemalloc
import zlib
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
from PIL import Image

from data_pipelines.shards import build_index
from data_pipelines.shards.build_index import index_folder
from data_pipelines.shards.index import index_path, read_columns, read_manifest
from data_pipelines.shards.record import CAPTION_QUESTION
from data_pipelines.shards.tar import read_group
from emma_train.errors import UserError
from tests.helpers import ASSETS, tokenizer
from tests.shards import edit, every_task, png, prompt, question, write_shards

TOKENIZER = ASSETS / "tokenizer"


def write_tar(path: Path, members: dict[str, bytes]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as tar:
        for name, data in members.items():
            member = tarfile.TarInfo(name)
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))


def jpeg(width: int, height: int) -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (width, height), "teal").save(file, "JPEG")
    return file.getvalue()


PAIR = b'{"t2i": [{"target": "img0", "text": "x"}]}'


def conversation(*roles: str, text: str = "x", role: str = "", images: Sequence[str] = ()) -> bytes:
    """The JSON of a record with a turn of each role; `role` adds one more."""
    turns = [{"role": name, "text": text} for name in (*roles, role) if name]
    return json.dumps({"i2t": [{"images": list(images), "turns": turns}]}).encode()


def rows(folder: Path, shard: str, task: str) -> list[dict[str, Any]]:
    result: list[dict[str, Any]] = read_columns(folder, shard, task).to_pylist()
    return result


@pytest.mark.seconds
def test_processes_and_order_do_not_change_a_byte(tmp_path: Path) -> None:
    folders = [write_shards(tmp_path / name, every_task(8), per_shard=5, index=False) for name in "ab"]
    for folder, workers in zip(folders, (1, 2), strict=True):
        index_folder(folder, TOKENIZER, {"from": "here"}, workers=workers)
    one, other = ({p.name: p.read_bytes() for p in folder.iterdir()} for folder in folders)
    assert one == other
    assert len(one) == 5 + 5 + 1


def test_a_second_run_reads_no_tar_and_a_third_only_the_one_that_changed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = write_shards(tmp_path, every_task(4), per_shard=4)
    before, written = (folder / "manifest.json").read_text(), []
    real = build_index._write_index
    monkeypatch.setattr(build_index, "_write_index", lambda tar, text: (written.append(tar.name), real(tar, text))[1])
    index_folder(folder, TOKENIZER)
    assert written == []
    # A younger tar of the same content (a copy, a checkout) is hashed, and its index stays.
    os.utime(folder / "shard-000001.tar")
    index_folder(folder, TOKENIZER)
    assert written == []
    assert (folder / "manifest.json").read_text() == before
    tar = folder / "shard-000001.tar"
    data = bytearray(tar.read_bytes())
    start = data.index(b"a red fish")
    data[start : start + 10] = b"a big fish"
    tar.write_bytes(data)
    manifest = index_folder(folder, TOKENIZER)
    assert written == ["shard-000001.tar"]
    assert manifest["shards"][1]["sha256"] == hashlib.sha256(data).hexdigest()
    index_folder(folder, TOKENIZER, force=True)
    assert written[1:] == [f"shard-00000{i}.tar" for i in range(3)]


def test_an_index_of_another_tokenizer_or_a_torn_one_is_written_again(tmp_path: Path) -> None:
    folder = write_shards(tmp_path / "set", every_task(4), per_shard=4)
    index = index_path(folder / "shard-000000.tar")
    complete = index.read_bytes()
    index.write_bytes(complete[: len(complete) // 2])
    index_folder(folder, TOKENIZER)
    assert index.read_bytes() == complete
    other = json.loads((TOKENIZER / "tokenizer.json").read_text())
    other["model"]["merges"] = other["model"]["merges"][:-40]
    (tmp_path / "tokenizer.json").write_text(json.dumps(other))
    manifest = index_folder(folder, tmp_path / "tokenizer.json")
    assert (
        json.loads(pq.read_metadata(index).metadata[build_index.ENTRY_KEY])["tokenizer_sha256"]
        == manifest["tokenizer_sha256"]
    )


def test_an_empty_tar_is_broken_and_one_without_its_end_is_told(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    write_shards(tmp_path, every_task(2), per_shard=3)
    tar = tmp_path / "shard-000001.tar"
    tar.write_bytes(tar.read_bytes()[: 10 * 512])
    with caplog.at_level(logging.WARNING), contextlib.suppress(UserError):
        index_folder(tmp_path, TOKENIZER)
    assert f"{tar}: does not end with zeros, as a tar does; was it cut off?" in caplog.text
    tar.write_bytes(b"")
    with pytest.raises(UserError, match=r"shard-000001\.tar: broken tar, it is empty; write it again"):
        index_folder(tmp_path, TOKENIZER)


def test_an_index_with_a_flipped_bit_is_written_again(tmp_path: Path) -> None:
    write_shards(tmp_path, every_task(4))
    index = tmp_path / "shard-000000.idx.parquet"
    content = index.read_bytes()
    for part in (0.05, 0.1, 0.2, 0.3):
        damaged = bytearray(content)
        damaged[int(len(content) * part)] ^= 4
        index.write_bytes(damaged)
        index_folder(tmp_path, TOKENIZER)
        assert index.read_bytes() == content


def test_an_interrupted_run_goes_on_and_keeps_provenance(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = write_shards(tmp_path, every_task(4), per_shard=4, index=False)
    real, written = build_index._write_index, []

    def killed_at_the_third(tar: Path, text: Any) -> dict[str, Any]:
        if len(written) == 2:
            raise KeyboardInterrupt
        written.append(tar.name)
        return real(tar, text)

    monkeypatch.setattr(build_index, "_write_index", killed_at_the_third)
    with pytest.raises(KeyboardInterrupt):
        index_folder(folder, TOKENIZER, {"from": "here"})
    with pytest.raises(UserError, match="indexing was interrupted; run `emma-data index` again"):
        read_manifest(folder)
    monkeypatch.setattr(build_index, "_write_index", lambda tar, text: (written.append(tar.name), real(tar, text))[1])
    manifest = index_folder(folder, TOKENIZER)
    assert written == [f"shard-00000{i}.tar" for i in range(3)]
    assert manifest["provenance"] == {"from": "here"}
    assert read_manifest(folder) == manifest


@pytest.mark.seconds
def test_a_broken_tar_is_told_when_all_others_are_done(tmp_path: Path) -> None:
    folder = write_shards(tmp_path, every_task(4), per_shard=4, index=False)
    for number in (0, 1):
        tar = folder / f"shard-00000{number}.tar"
        tar.write_bytes(tar.read_bytes()[:3000])
    with pytest.raises(UserError, match=r"shard-000000\.tar: broken tar, it ends within .*1 more.*shard-000001\.tar"):
        index_folder(folder, TOKENIZER, workers=2)
    assert index_path(folder / "shard-000002.tar").exists()


def _die(tar: Path, tokenizer: Path, again: bool) -> None:
    os._exit(9)


@pytest.mark.seconds
def test_a_process_that_dies_is_told_and_what_is_done_stays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = write_shards(tmp_path, every_task(4), per_shard=4, index=False)
    monkeypatch.setattr(build_index, "_index_or_error", _die)
    with pytest.raises(UserError, match="an indexing process died .*fewer --workers, it goes on"):
        index_folder(folder, TOKENIZER, workers=2)


@pytest.mark.seconds
@pytest.mark.parametrize("workers", [1, 2])
def test_a_key_in_two_shards_is_told_with_both(tmp_path: Path, workers: int) -> None:
    contents = [prompt(f"p{i:03d}") for i in (0, 1, 2, 3, 1, 4)]
    folder = write_shards(tmp_path, contents, per_shard=2, index=False)
    with pytest.raises(UserError, match=r"shard-000002\.tar: key p001 occurs twice, in shard-000000\.tar too"):
        index_folder(folder, TOKENIZER, workers=workers)


def test_images_with_captions_of_others_are_understood_and_made(tmp_path: Path) -> None:
    """As img2dataset writes them, with its JSON, and with several captions."""
    meta = json.dumps({"url": "http://x", "caption": "c", "tags": ["portrait"]}).encode()
    write_tar(
        tmp_path / "00000.tar",
        {
            "000/0001.jpg": jpeg(64, 48),
            "000/0001.txt": b"a small dog\n",
            "000/0001.json": meta,
            "000/0002.a.txt": "一只猫".encode(),
            "000/0002.b.txt": b"a cat",
            "000/0002.webp": png(1),
        },
    )
    manifest = index_folder(tmp_path, TOKENIZER)
    assert manifest["samples"] == {"i2t": 2, "t2i": 2, "it2i": 0}
    assert manifest["shards"][0]["tags"]["t2i"] == {"": 1, "portrait": 1}
    one, two = rows(tmp_path, "00000.tar", "t2i")
    assert (one["key"], one["widths"], one["heights"], one["target"]) == ("000/0001", [64], [48], [0])
    assert (two["key"], two["target"], two["context"]) == ("000/0002", [0, 0], [[], []])
    answers = rows(tmp_path, "00000.tar", "i2t")
    assert [row["supervised_tokens"] for row in answers] == [
        [len(tokenizer().encode(text)) + 1 for text in texts] for texts in (["a small dog"], ["一只猫", "a cat"])
    ]
    asked = f"<|im_start|>user\n<|vision_start|><|vision_end|>{CAPTION_QUESTION}<|im_end|>\n<|im_start|>assistant\n"
    asked += "a cat<|im_end|>"
    assert answers[1]["text_tokens"][1] == len(tokenizer().encode(asked))


@pytest.mark.parametrize(
    ("members", "reason"),
    [
        ({"jpg": jpeg(8, 8)}, "has no task"),
        ({"jpg": jpeg(8, 8), "txt": b"  \n"}, "has no task"),
        ({"jpg": jpeg(8, 8), "txt": b"\xff\xfe"}, "UnicodeDecodeError"),
        ({"jpg": b"no image", "txt": b"a cat"}, "UnidentifiedImageError"),
        ({"json": b"[1]"}, "its JSON is no object"),
        ({"json": b"{", "jpg": jpeg(8, 8)}, "JSONDecodeError"),
        ({"json": b'{"t2i": [{"target": "img0", "text": "x"}]}'}, "KeyError: 'img0'"),
        ({"json": b'{"t2i": "x"}'}, "its t2i is no list of objects"),
        ({"json": b'{"t2i": [{"target": "img0"}]}', "img0.jpg": jpeg(8, 8)}, "KeyError: 'text'"),
        ({"json": b'{"i2t": [{"images": [], "turns": [{"role": "user"}]}]}'}, "a turn of its i2t has no text"),
        ({"json": b'{"i2t": [{"images": [], "turns": "x"}]}'}, "no list of turns"),
        ({"json": conversation("user", "assistant", role="tool")}, "a turn of its i2t has the role 'tool'; known are"),
        ({"json": conversation("user")}, "an alternative of its i2t has no answer to learn from"),
        ({"json": conversation("user", "assistant", text=" ")}, "no answer to learn from"),
        ({"json": conversation("assistant", images=["jpg"]), "jpg": jpeg(8, 8)}, "no user turn for its images"),
        (
            {"json": conversation("user", "assistant", text="<image> <image>")},
            "2 <image> in the user turns for 0 images",
        ),
        ({"json": b'{"t2i": [{"target": "jpg", "text": ""}]}', "jpg": jpeg(8, 8)}, "no text to make an image of"),
        ({"json": b'{"it2i": [{"target": "jpg", "text": "x"}]}', "jpg": jpeg(8, 8)}, "no reference image to edit"),
        ({"json": b"[" * 100_000}, "its JSON is nested too deeply"),
        ({"json": PAIR, "img0.png": png(1), "img0.jpg": jpeg(8, 8)}, "two of its images have one name: img0.jpg, img0"),
        ({"json": b'{"tags": ["a|b"], "t2i": [{"target": "img0", "text": "x"}]}', "img0.jpg": jpeg(8, 8)}, "tags"),
    ],
)
def test_what_cannot_be_used_is_left_out_counted_and_told(
    tmp_path: Path, members: dict[str, bytes], reason: str, caplog: pytest.LogCaptureFixture
) -> None:
    good = {"a.jpg": jpeg(8, 8), "a.txt": b"a cat"}
    write_tar(tmp_path / "0.tar", {**good, **{f"b.{part}": data for part, data in members.items()}})
    with caplog.at_level(logging.WARNING):
        (shard,) = index_folder(tmp_path, TOKENIZER)["shards"]
    assert shard["rows"] == {"i2t": 1, "t2i": 1, "it2i": 0}
    assert shard["left_out"] == 1
    assert shard["left_out_first"].startswith("record b: ") and reason in shard["left_out_first"]
    assert "0.tar: 1 records left out; record b" in caplog.text


def test_a_record_with_two_members_of_one_name_is_left_out(tmp_path: Path) -> None:
    """webdataset refuses it; here the last member was read, whatever the first one said."""
    with tarfile.open(tmp_path / "0.tar", "w") as tar:
        for name, data in (
            ("a.jpg", jpeg(8, 8)),
            ("a.txt", b"a"),
            ("b.txt", b"b"),
            ("b.txt", b"c"),
            ("b.jpg", jpeg(8, 8)),
        ):
            member = tarfile.TarInfo(name)
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))
    (shard,) = index_folder(tmp_path, TOKENIZER)["shards"]
    assert (shard["rows"]["t2i"], shard["left_out"]) == (1, 1)
    assert shard["left_out_first"] == "record b: ValueError: it has two members txt"


def test_conversations_with_the_names_of_llava_are_indexed_as_ours(tmp_path: Path) -> None:
    question, answer = "What is this?", "a cat"
    ours = [{"role": "user", "text": question}, {"role": "assistant", "text": answer}]
    theirs = [{"from": "human", "value": question}, {"from": "gpt", "value": answer}]
    mixed = [{"role": "human", "text": question}, {"role": "gpt", "text": answer}]
    for number, turns in enumerate((ours, theirs, mixed)):
        record = {"i2t": [{"images": ["img0"], "turns": turns}]}
        folder = write_shards(tmp_path / str(number), [("q", record, {"img0.png": png(0)})])
        (row,) = rows(folder, "shard-000000.tar", "i2t")
        asked = f"<|im_start|>user\n<|vision_start|><|vision_end|>{question}<|im_end|>\n<|im_start|>assistant\n"
        assert row["text_tokens"] == [len(tokenizer().encode(f"{asked}{answer}<|im_end|>"))]
        assert row["supervised_tokens"] == [len(tokenizer().encode(answer)) + 1]


def test_a_bomb_is_left_out(tmp_path: Path) -> None:
    """A PNG of a few bytes that claims four billion pixels."""
    header = bytearray(png(0))
    header[16:24] = (65536).to_bytes(4, "big") * 2
    header[29:33] = zlib.crc32(header[12:29]).to_bytes(4, "big")
    write_tar(tmp_path / "0.tar", {"a.jpg": jpeg(8, 8), "a.txt": b"a", "b.png": bytes(header), "b.txt": b"b"})
    (shard,) = index_folder(tmp_path, TOKENIZER)["shards"]
    assert (shard["rows"]["t2i"], shard["left_out"]) == (1, 1)
    assert "an image of more than" in shard["left_out_first"]


def test_the_manifest_counts_tag_combinations_of_each_task(tmp_path: Path) -> None:
    tags: list[list[str]] = [[], ["stem"], ["b", "stem"], ["stem", "b", "b"], ["b"]]
    contents = [question(f"q{i:03d}", tags=tags[i % 5]) for i in range(23)] + [prompt("p000"), edit("e000")]
    folder = write_shards(tmp_path, contents, per_shard=10)
    manifest = read_manifest(folder)
    total: dict[str, Counter[str]] = {task: Counter() for task in ("i2t", "t2i", "it2i")}
    for shard in manifest["shards"]:
        for task, counts in shard["tags"].items():
            assert sum(counts.values()) == shard["rows"][task]
            assert counts == dict(Counter("|".join(row["tags"]) for row in rows(folder, shard["name"], task)))
            total[task].update(counts)
    assert total["i2t"] == {"": 5, "stem": 5, "b|stem": 9, "b": 4}
    assert total["t2i"] == total["it2i"] == {"": 1}


def test_every_record_is_read_by_its_range(tmp_path: Path) -> None:
    folder = write_shards(tmp_path, every_task(6), per_shard=7)
    num = 0
    for shard in read_manifest(folder)["shards"]:
        data = (folder / shard["name"]).read_bytes()
        with tarfile.open(folder / shard["name"]) as tar:
            expected = {m.name: tar.extractfile(m).read() for m in tar}  # type: ignore[union-attr]
        for task in ("i2t", "t2i", "it2i"):
            for row in rows(folder, shard["name"], task):
                members = read_group(data[row["offset"] : row["offset"] + row["size"]])
                assert all(content == expected[f"{row['key']}.{part}"] for part, content in members.items())
                num += len(members)
    assert num == 6 * (2 + 2 + 3)


def test_columns_of_one_task_are_read_and_no_others(tmp_path: Path) -> None:
    folder = write_shards(tmp_path, every_task(5))
    table = read_columns(folder, "shard-000000.tar", "it2i", ["key", "size"])
    assert table.column_names == ["key", "size"]
    assert table["key"].to_pylist() == [f"e{i:03d}" for i in range(5)]
    file = pq.ParquetFile(index_path(folder / "shard-000000.tar"))
    assert [set(file.read_row_group(i, ["task"])["task"].to_pylist()) for i in range(3)] == [{"i2t"}, {"t2i"}, {"it2i"}]
    only = write_shards(tmp_path / "only", [prompt("p000")])
    assert read_columns(only, "shard-000000.tar", "i2t").num_rows == 0
    with pytest.raises(UserError, match=r"shard-000009\.idx\.parquet: cannot be read"):
        read_columns(only, "shard-000009.tar", "i2t")


def test_memory_of_indexing_does_not_grow_with_the_size_of_records(tmp_path: Path) -> None:
    """Forty records of 0.3 MB take no more memory than twenty: the tar is not in memory."""
    peaks = []
    for number in (20, 40):
        folder = tmp_path / str(number)
        pad = {"pad.bin": bytes(300_000)}
        write_shards(
            folder, [(k, r, {**p, **pad}) for k, r, p in map(prompt, (f"p{i:03d}" for i in range(number)))], index=False
        )
        index_folder(folder, TOKENIZER, force=True)
        tracemalloc.start()
        index_folder(folder, TOKENIZER, force=True)
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    assert peaks[1] < peaks[0] + 300_000 < 3_000_000
