"""Index and manifest: every record is read by its offset, and a folder that differs from its manifest is refused."""

import hashlib
import json
import shutil
import tarfile
import zlib
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import pyarrow.parquet as pq
import pytest
import webdataset

from data_pipelines.shards.build_index import index_folder
from data_pipelines.shards.check import check_folder
from data_pipelines.shards.images import image_parts
from data_pipelines.shards.index import INDEX_SCHEMA, index_path, read_columns, read_manifest
from data_pipelines.shards.stats import folder_stats
from data_pipelines.shards.tar import groups, read_group
from emma_train.errors import UserError
from tests.helpers import ASSETS, tokenizer
from tests.shards import damage, edit, every_task, prompt, question, write_shards

EMOJI = ASSETS / "emoji"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Twelve records in three shards."""
    return write_shards(tmp_path / "set", every_task(4), per_shard=4)


def by_tarfile(tar: Path) -> dict[str, dict[str, bytes]]:
    """Members by key and part, read with Python's tarfile."""
    members: dict[str, dict[str, bytes]] = {}
    with tarfile.open(tar) as archive:
        for member in archive:
            key, _, part = member.name.partition(".")
            stream = archive.extractfile(member)
            assert stream is not None
            members.setdefault(key, {})[part] = stream.read()
    return members


@pytest.mark.parametrize("split", ["train", "heldout_drawings", "heldout_concepts"])
def test_every_indexed_record_read_by_its_offset_is_what_tarfile_sees(split: str) -> None:
    num_rows = 0
    for shard in read_manifest(EMOJI / split)["shards"]:
        tar = EMOJI / split / shard["name"]
        data, expected = tar.read_bytes(), by_tarfile(tar)
        rows = pq.read_table(index_path(tar)).to_pylist()
        assert {row["key"] for row in rows} == expected.keys()
        for row in rows:
            record = data[row["offset"] : row["offset"] + row["size"]]
            assert zlib.crc32(record) == row["crc32"]
            assert read_group(record) == expected[row["key"]]
        num_rows += len(rows)
    assert num_rows == sum(read_manifest(EMOJI / split)["samples"].values()) > 200


def test_webdataset_sees_the_same_samples_as_we_do() -> None:
    for tar in sorted((EMOJI / "heldout_concepts").glob("*.tar")):
        with open(tar, "rb") as file:
            ours = {group.key: group.members for group in groups(file)}
        theirs = {}
        for sample in webdataset.WebDataset(str(tar), shardshuffle=False, empty_check=False):
            theirs[sample["__key__"]] = {k: v for k, v in sample.items() if not k.startswith("__")}
        assert theirs == ours
        assert list(theirs) == list(ours)


def test_energon_sees_the_same_samples_as_we_do(tmp_path: Path) -> None:
    energon = pytest.importorskip("megatron.energon", reason="pip install megatron-energon")
    from megatron.energon.flavors import BaseWebdatasetFactory

    shutil.copytree(EMOJI / "heldout_concepts", tmp_path / "set")
    tars = sorted(path.name for path in (tmp_path / "set").glob("*.tar"))
    BaseWebdatasetFactory.prepare_dataset(tmp_path / "set", tars, split_parts_ratio=[("train", 1.0)], workers=1)
    meta = "__module__: megatron.energon\n__class__: CrudeWebdataset\n"
    (tmp_path / "set" / ".nv-meta" / "dataset.yaml").write_text(meta)

    def keep(sample: dict[str, Any]) -> dict[str, Any]:
        return dict(sample)

    class AsTheyAre(energon.DefaultTaskEncoder):  # type: ignore[misc]
        decoder = None
        cookers = [energon.Cooker(energon.stateless(keep))]

        def batch(self, samples: list[Any]) -> list[Any]:
            return samples

    dataset = energon.get_train_dataset(
        tmp_path / "set",
        worker_config=energon.WorkerConfig(rank=0, world_size=1, num_workers=0),
        batch_size=1,
        shuffle_buffer_size=None,
        max_samples_per_sequence=None,
        repeat=False,
        task_encoder=AsTheyAre(),
    )
    theirs = {}
    for (sample,) in energon.get_loader(dataset):
        theirs[sample["__key__"]] = {k: v for k, v in sample.items() if not k.startswith("__")}
    ours = {}
    for tar in tars:
        with open(tmp_path / "set" / tar, "rb") as file:
            ours |= {group.key: group.members for group in groups(file)}
    assert theirs == ours


def test_an_index_row_counts_what_the_layout_lays_out(folder: Path) -> None:
    _, record, _ = edit("e000")
    rows = pq.read_table(index_path(folder / "shard-000000.tar")).to_pylist()
    row = next(r for r in rows if r["key"] == "e000")
    for number, alternative in enumerate(record["it2i"]):
        # user turn, image marks, instruction, assistant turn: counted with the tokenizer alone
        words = f"<|im_start|>user\n<|vision_start|><|vision_end|>{alternative['text']}<|im_end|>"
        ids = tokenizer().encode(words) + tokenizer().encode("\n<|im_start|>assistant\n<|vision_start|>")
        assert row["text_tokens"][number] == len(ids)
    assert row["supervised_tokens"] == [0, 0]
    assert (row["context"], row["target"]) == ([[0], [1]], [1, 0])
    assert (row["widths"], row["heights"]) == ([32, 32], [32, 32])
    answer = next(r for r in rows if r["key"] == "q000")
    assert answer["supervised_tokens"] == [len(tokenizer().encode("a cat")) + 1]  # and <|im_end|>


def test_the_manifest_counts_rows_and_indexing_again_changes_nothing(folder: Path) -> None:
    before = (folder / "manifest.json").read_text()
    assert json.loads(before)["samples"] == {"i2t": 4, "t2i": 4, "it2i": 4}
    assert [sum(s["rows"].values()) for s in json.loads(before)["shards"]] == [4, 4, 4]
    index_folder(folder, ASSETS / "tokenizer")
    assert (folder / "manifest.json").read_text() == before


def test_an_image_number_is_the_place_of_its_name() -> None:
    names = ("json", "img1.webp", "img0.webp", "note.txt")
    assert image_parts(dict.fromkeys(names, b"")) == ["img0.webp", "img1.webp"]


def test_a_missing_manifest_says_how_to_make_one(folder: Path) -> None:
    (folder / "manifest.json").unlink()
    with pytest.raises(UserError, match=r"manifest\.json: cannot read .*emma-data index"):
        read_manifest(folder)


def test_a_torn_manifest_is_named(folder: Path) -> None:
    (folder / "manifest.json").write_text('{"schema": 1, "sha')
    with pytest.raises(UserError, match=r"manifest\.json: not valid JSON"):
        read_manifest(folder)


def test_a_manifest_of_another_schema_is_refused(folder: Path) -> None:
    manifest = json.loads((folder / "manifest.json").read_text())
    (folder / "manifest.json").write_text(json.dumps({**manifest, "schema": 99}))
    with pytest.raises(UserError, match="schema 99, this version reads 2"):
        read_manifest(folder)


@pytest.mark.parametrize("name", ["shard-000001.tar", "shard-000001.idx.parquet"])
def test_a_missing_shard_or_index_is_named(folder: Path, name: str) -> None:
    (folder / name).unlink()
    with pytest.raises(UserError, match=rf"{name}: missing, but .*manifest\.json lists it"):
        read_manifest(folder)


def test_a_shard_of_another_size_is_named_with_both_sizes(folder: Path) -> None:
    tar = folder / "shard-000002.tar"
    size = tar.stat().st_size
    tar.write_bytes(tar.read_bytes()[:-512])
    with pytest.raises(UserError, match=rf"shard-000002\.tar: has {size - 512} bytes, the manifest says {size}"):
        read_manifest(folder)


def test_check_finds_each_kind_of_damage_and_nothing_in_a_whole_folder(folder: Path) -> None:
    assert check_folder(folder) == []
    damage(folder / "shard-000000.tar", "q000.img0.png")
    problems = check_folder(folder)
    assert len(problems) == 2
    assert "record q000 differs from its crc32" in problems[0]
    assert "differs from its sha256" in problems[1]
    shutil.copy(index_path(folder / "shard-000001.tar"), index_path(folder / "shard-000002.tar"))
    assert any("shard-000002.idx.parquet: content differs" in problem for problem in check_folder(folder))


@pytest.mark.seconds
def test_processes_find_the_same_problems_in_the_same_order(folder: Path) -> None:
    damage(folder / "shard-000000.tar", "q000.img0.png")
    (folder / "shard-000001.tar").write_bytes(bytes((folder / "shard-000001.tar").stat().st_size))
    tar = folder / "shard-000002.tar"
    tar.write_bytes(tar.read_bytes()[:4000].ljust(tar.stat().st_size, b"\xff"))
    alone = check_folder(folder)
    assert check_folder(folder, workers=3) == alone
    text = "\n".join(alone)
    assert "shard-000001.tar: record p001 of the index is not in it" in text
    assert "shard-000002.tar: broken tar, it" in text


def test_a_key_that_occurs_twice_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"shard-000001\.tar: key p000 occurs twice"):
        write_shards(tmp_path, [prompt("p000"), prompt("p001"), prompt("p000")], per_shard=2)


def test_a_folder_of_which_no_record_can_be_used_is_refused_with_a_reason(tmp_path: Path) -> None:
    key, record, _ = question("q000")
    with pytest.raises(UserError, match=r"no record can be indexed; record q000: KeyError: 'img0'"):
        write_shards(tmp_path, [(key, record, {})])


def test_a_file_that_is_no_tar_is_named(tmp_path: Path) -> None:
    (tmp_path / "shard-000000.tar").write_bytes(b"not a tar" * 100)
    with pytest.raises(UserError, match=r"shard-000000\.tar: broken tar"):
        index_folder(tmp_path, ASSETS / "tokenizer")


def test_a_folder_without_tars_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"holds no \*\.tar"):
        index_folder(tmp_path, ASSETS / "tokenizer")


def test_an_index_with_columns_of_an_older_version_is_read() -> None:
    """Indexes of version 0.1 have columns part_names, part_offsets and part_sizes, which nothing uses."""
    index = EMOJI / "heldout_concepts" / "shard-000000.idx.parquet"
    assert "part_names" in pq.read_schema(index).names
    table = read_columns(EMOJI / "heldout_concepts", "shard-000000.tar", "i2t")
    assert table.column_names == INDEX_SCHEMA.names and len(table) > 0


SHARD = "shard-000000.tar"
SHAPES: dict[str, tuple[Any, str]] = {
    "null": (lambda manifest: None, "is null, no manifest"),
    "list": (lambda manifest: [], "is a list, no manifest"),
    "text": (lambda manifest: "x", "is a text, no manifest"),
    "no shards": (lambda manifest: without(manifest, "shards"), "has no shards"),
    "empty": (lambda manifest: {**manifest, "shards": []}, "lists no shard"),
    "shards a dict": (lambda manifest: {**manifest, "shards": {}}, "has an object as shards"),
    "a shard is null": (lambda manifest: {**manifest, "shards": [None]}, r"shards\[0\] is null"),
    "no tokenizer": (lambda manifest: without(manifest, "tokenizer_sha256"), "has no tokenizer_sha256"),
    "no samples": (lambda manifest: without(manifest, "samples"), "has no samples"),
    "twice": (lambda manifest: {**manifest, "shards": manifest["shards"] * 2}, f"lists {SHARD} twice"),
    "elsewhere": (lambda manifest: with_shard(manifest, name="../x.tar"), "is no name of a tar in the folder"),
    "tags a list": (lambda manifest: with_shard(manifest, tags=[]), r"shards\[0\] has a list as tags"),
    "tags by name": (lambda manifest: with_shard(manifest, tags={"i2t": 3}), r"shards\[0\]\.tags are no numbers"),
    "rows a text": (lambda manifest: with_shard(manifest, rows={"i2t": "3"}), r"shards\[0\]\.rows are no numbers"),
    **{
        f"a shard without {key}": (
            lambda manifest, key=key: {**manifest, "shards": [without(manifest["shards"][0], key)]},
            rf"shards\[0\] has no {key}",
        )
        for key in ("name", "bytes", "sha256", "index_sha256", "rows", "tags", "left_out")
    },
}
"""Manifests that are JSON, but no manifests: how to make them, and what is said of them."""


def without(values: dict[str, Any], key: str) -> dict[str, Any]:
    return {name: value for name, value in values.items() if name != key}


def with_shard(manifest: dict[str, Any], **values: Any) -> dict[str, Any]:
    return {**manifest, "shards": [{**manifest["shards"][0], **values}]}


@pytest.mark.parametrize("shape", SHAPES)
def test_a_manifest_of_another_form_is_one_line(folder: Path, shape: str) -> None:
    make, message = SHAPES[shape]
    path = folder / "manifest.json"
    path.write_text(json.dumps(make(json.loads(path.read_text()))))
    for read in (read_manifest, check_folder, folder_stats):
        with pytest.raises(UserError, match=f"manifest.json: .*{message}.*; `emma-data index` writes it again"):
            read(folder)


def test_every_flipped_bit_of_an_index_is_an_error(folder: Path) -> None:
    """Parquet itself notices few of them; its other values are plausible ones."""
    entry = read_manifest(folder)["shards"][0]
    path = index_path(folder / SHARD)
    original, rng = path.read_bytes(), np.random.default_rng(0)
    assert len(read_columns(folder, SHARD, "i2t", version=entry["index_sha256"])) == 2
    for position in rng.integers(0, 8 * len(original), 120).tolist():
        data = bytearray(original)
        data[position // 8] ^= 1 << position % 8
        path.write_bytes(data)
        with pytest.raises(UserError, match=r"idx\.parquet: content differs from its sha256 in manifest\.json"):
            read_columns(folder, SHARD, "i2t", version=entry["index_sha256"])
    path.write_bytes(original)
    assert len(read_columns(folder, SHARD, "i2t", version=entry["index_sha256"])) == 2


def test_a_local_index_is_hashed_once(folder: Path) -> None:
    entry = read_manifest(folder)["shards"][0]
    with patch("hashlib.file_digest", wraps=hashlib.file_digest) as digest:
        for task in ("i2t", "t2i", "it2i"):
            read_columns(folder, SHARD, task, version=entry["index_sha256"])
    assert digest.call_count == 1
