"""Small files that unpack without limit: each is rejected with that reason, in little memory; the others are read."""

import os
import struct
import tracemalloc
import zipfile
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from data_pipelines.prepare.importers import parquet_rows
from data_pipelines.prepare.importers.image_files import MAX_IMAGE_BYTES, ImageFiles
from data_pipelines.prepare.importers.parquet_rows import ExpansionError, safe_batch_rows
from data_pipelines.shards.tar import MAX_MEMBER_BYTES, BrokenTar, groups
from tests import public_formats as formats
from tests.imported import Imported
from tests.shards import png

HUGE = 1 << 40


def zip_with(path: Path, name: str, data: bytes, method: int = zipfile.ZIP_DEFLATED) -> None:
    with zipfile.ZipFile(path, "w", method) as archive:
        archive.writestr(name, data)
        archive.writestr("good.png", png(1))


def understate_size(path: Path, real: int, size: int) -> None:
    """Let the headers of a zip say another unpacked size."""
    path.write_bytes(path.read_bytes().replace(struct.pack("<I", real), struct.pack("<I", size)))


@pytest.mark.parametrize("kind", ["large", "understated", "bzip2"])
def test_a_zip_bomb_is_rejected_before_it_is_unpacked(tmp_path: Path, kind: str) -> None:
    path, size = tmp_path / "images.zip", (MAX_IMAGE_BYTES + 1) if kind == "large" else 64 << 20
    zip_with(path, "bomb.png", bytes(size), zipfile.ZIP_BZIP2 if kind == "bzip2" else zipfile.ZIP_DEFLATED)
    if kind == "understated":
        understate_size(path, size, 1000)
    assert path.stat().st_size < 1 << 20
    images = ImageFiles(path)
    reasons = {"large": "bytes unpacked, more than", "understated": "Bad CRC-32", "bzip2": "compressed by method 12"}
    tracemalloc.start()
    with pytest.raises(ValueError, match=reasons[kind]):
        images.read("bomb.png")
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 4 << 20
    if kind != "bzip2":
        assert images.read("good.png") == png(1)


def test_files_with_holes_are_rejected_before_they_are_read(tmp_path: Path) -> None:
    for name in ("a", "b", "c"):
        (tmp_path / f"set/{name}.png").parent.mkdir(exist_ok=True)
        (tmp_path / f"set/{name}.png").write_bytes(png(1))
        (tmp_path / f"set/{name}.txt").write_text("a caption")
    os.truncate(tmp_path / "set/b.png", HUGE)
    os.truncate(tmp_path / "set/c.txt", HUGE)
    imported = Imported("folder", tmp_path / "set", tmp_path / "out")
    assert len(imported.records) == 1
    assert [reject["reason"].split(":")[0] for reject in imported.rejects] == ["b.png", "c.txt"]


def test_a_tar_with_a_hole_ends_where_the_hole_begins(tmp_path: Path) -> None:
    path = tmp_path / "set/00000.tar"
    members = [(f"{key}.{end}", data) for key in "ab" for end, data in (("jpg", formats.jpeg(1)), ("txt", b"a cat"))]
    formats.write_tar(path, members)
    end = path.read_bytes().rstrip(b"\0")
    end += bytes(-len(end) % 512)
    header = bytearray(end[:512])
    header[:5], header[124:136] = b"c.jpg", b"\x80" + (HUGE).to_bytes(11, "big")
    header[148:156] = b"%06o\0 " % (sum(header) - sum(header[148:156]) + 8 * 32)
    path.write_bytes(end + header)
    os.truncate(path, HUGE + len(end) + 4096)
    with pytest.raises(BrokenTar, match=f"more than {MAX_MEMBER_BYTES:,}"), open(path, "rb") as file:
        list(groups(file))
    imported = Imported("img2dataset", tmp_path / "set", tmp_path / "out")
    assert len(imported.records) == 1  # nobody knows whether the second one is complete
    assert "has a member of 1,099,511,627,776 bytes" in imported.rejects[-1]["reason"]
    assert imported.counts["broken_files"] == 1


def test_a_row_group_of_parquet_that_unpacks_without_limit_is_rejected(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(parquet_rows, "MAX_EXPANDED_BYTES", 1 << 20)
    text = pa.list_(pa.struct([("user", pa.string()), ("assistant", pa.string())]))
    schema = pa.schema([("images", pa.list_(formats.HUB_IMAGE)), ("texts", text)])
    path = tmp_path / "set/0.parquet"
    path.parent.mkdir()
    with pq.ParquetWriter(path, schema, compression="zstd", use_dictionary=False) as writer:
        for data in (png(1), bytes(4 << 20), png(2)):
            row = {"images": [formats.hub_image(data)], "texts": [{"user": "?", "assistant": "!"}]}
            writer.write_table(pa.Table.from_pylist([row], schema))
    imported = Imported("finevision", tmp_path / "set", tmp_path / "out")
    assert len(imported.records) == 2
    (reject,) = imported.rejects
    assert reject["count"] == 1 and "rows 1 to 1" in reject["reason"] and "a decompression bomb" in reject["reason"]


def test_a_value_that_stands_in_many_rows_is_read_a_few_rows_at_a_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(parquet_rows, "MAX_EXPANDED_BYTES", 2 << 20)
    monkeypatch.setattr(parquet_rows, "MAX_BATCH_BYTES", 10 << 20)
    values = pa.DictionaryArray.from_arrays(pa.array([0] * 1000), pa.array([b"x" * (1 << 20)]))
    pq.write_table(pa.table({"image": values, "text": ["a text"] * 1000}), tmp_path / "a.parquet", compression="zstd")
    metadata = pq.read_metadata(tmp_path / "a.parquet")
    assert safe_batch_rows(metadata, 0, ["image", "text"], 32) == 9
    assert safe_batch_rows(metadata, 0, ["text"], 32) == 32
    pq.write_table(pa.table({"image": [bytes(3 << 20)]}), tmp_path / "b.parquet", compression="zstd")
    with pytest.raises(ExpansionError, match="column image unpacks from"):
        safe_batch_rows(pq.read_metadata(tmp_path / "b.parquet"), 0, ["image"], 32)
