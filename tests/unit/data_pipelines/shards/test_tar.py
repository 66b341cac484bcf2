"""The tar reader against Python's tarfile: the same members at the same offsets, for every kind of header."""

import io
import random
import tarfile
import tracemalloc
import zlib
from collections.abc import Iterable
from pathlib import Path

import pytest
import webdataset
from hypothesis import given
from hypothesis import strategies as st

from data_pipelines.shards.tar import BrokenTar, groups, read_group, split_name

Member = tuple[str, bytes]


def write(members: Iterable[Member], kind: int = tarfile.USTAR_FORMAT, **info: object) -> bytes:
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w", format=kind) as tar:
        for name, data in members:
            member = tarfile.TarInfo(name)
            member.size = len(data)
            for key, value in info.items():
                setattr(member, key, value)
            tar.addfile(member, io.BytesIO(data))
    return file.getvalue()


def by_tarfile(data: bytes) -> list[tuple[str, bytes]]:
    with tarfile.open(fileobj=io.BytesIO(data)) as tar:
        return [(m.name, tar.extractfile(m).read()) for m in tar if m.isfile()]  # type: ignore[union-attr]


def assert_read_alike(data: bytes, num: int) -> None:
    """Compares the streamed groups with tarfile, and each group read from its range of bytes alone."""
    read_groups = list(groups(io.BytesIO(data)))
    assert [(f"{g.key}.{part}", content) for g in read_groups for part, content in g.members.items()] == by_tarfile(
        data
    )
    assert len(read_groups) == num
    for group in read_groups:
        alone = data[group.offset : group.offset + group.size]
        assert zlib.crc32(alone) == group.crc32
        assert read_group(alone) == group.members


names = st.text(st.characters(codec="utf-8", exclude_characters="\0/."), min_size=1, max_size=70)


@given(
    keys=st.lists(names, min_size=1, max_size=5, unique=True),
    folder=st.sampled_from(["", "./", "v1.0/images/", "深/" * 40]),
    sizes=st.lists(st.sampled_from([0, 1, 511, 512, 513, 3000]), min_size=1, max_size=3),
    kind=st.sampled_from([tarfile.PAX_FORMAT, tarfile.GNU_FORMAT]),
    mtime=st.sampled_from([0, 1.5]),
)
def test_members_are_those_of_tarfile(keys: list[str], folder: str, sizes: list[int], kind: int, mtime: float) -> None:
    """Long or non-ASCII names and fractional times, which webdataset writes, need extended headers."""
    parts = ["json", "img0.webp", "img1.png"]
    members = [
        (f"{folder}{k}.{part}", random.Random(k).randbytes(s))
        for k in keys
        for part, s in zip(parts, sizes, strict=False)
    ]
    if any((key.startswith("__") and key.endswith("__")) for key in keys):
        return
    assert_read_alike(write(members, kind, mtime=mtime), len(keys))


def test_a_ustar_name_may_have_a_prefix() -> None:
    long = "folder/" * 20 + "key"
    assert_read_alike(write([(f"{long}.json", b"{}"), (f"{long}.jpg", b"x" * 600)]), 1)


def test_what_is_no_member_of_a_record_is_passed_over_within_a_record_too() -> None:
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w", format=tarfile.PAX_FORMAT, pax_headers={"comment": "all"}) as tar:

        def add(name: str, data: bytes = b"x", kind: bytes = tarfile.REGTYPE) -> None:
            member = tarfile.TarInfo(name)
            member.size, member.type = (len(data), kind) if kind == tarfile.REGTYPE else (0, kind)
            tar.addfile(member, io.BytesIO(data))

        add("folder.d", kind=tarfile.DIRTYPE)
        add("__meta__.json")
        add("a.json", b"{}")
        add("README", b"r" * 700)
        add("._a.jpg")
        add("a.jpg", b"image")
        add("link.jpg", kind=tarfile.SYMTYPE)
        add("b.json", b"[]")
    data = file.getvalue()
    records = list(groups(io.BytesIO(data)))
    assert [(g.key, g.members) for g in records] == [("a", {"json": b"{}", "jpg": b"image"}), ("b", {"json": b"[]"})]
    for group in records:
        alone = data[group.offset : group.offset + group.size]
        assert (zlib.crc32(alone), read_group(alone)) == (group.crc32, group.members)


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("a.jpg", ("a", "jpg")),
        ("a.img0.webp", ("a", "img0.webp")),
        ("./v1.0/a.json", ("./v1.0/a", "json")),
        ("a", ("", "")),
        (".hidden", ("", "")),
        ("__meta__.json", ("", "")),
        ("folder.d/", ("", "")),
        ("a.", ("", "")),
    ],
)
def test_names_split_at_the_first_dot_of_the_file(name: str, expected: tuple[str, str]) -> None:
    assert split_name(name) == expected


def test_a_shard_as_webdataset_writes_it_by_default_has_the_samples_that_webdataset_reads(tmp_path: Path) -> None:
    path = tmp_path / "shard.tar"
    with webdataset.TarWriter(str(path)) as writer:
        for number in range(20):
            writer.write(
                {"__key__": f"{number:04d}", "jpg": bytes([number]) * 700, "txt": "深い", "json": {"n": number}}
            )
    theirs = {}
    for sample in webdataset.WebDataset(str(path), shardshuffle=False, empty_check=False):
        theirs[sample["__key__"]] = {k: v for k, v in sample.items() if not k.startswith("__")}
    data = path.read_bytes()
    assert {g.key: g.members for g in groups(io.BytesIO(data))} == theirs
    assert_read_alike(data, 20)


@given(cut=st.integers(1, 5000))
def test_a_tar_that_ends_too_early_is_broken_or_loses_whole_members_only(cut: int) -> None:
    archive = write([(f"{k}.{part}", b"x" * 900) for k in "ab" for part in ("json", "jpg")])
    end = 4 * (512 + 1024)
    data = archive[: max(1, end - cut)]
    try:
        records = [g.members for g in groups(io.BytesIO(data))]
    except BrokenTar as error:
        assert "ends within" in str(error)
        return
    # Cut between members or within padding, it is a shorter tar.
    assert all(content == b"x" * 900 for members in records for content in members.values())


def test_what_is_no_tar_is_broken() -> None:
    with pytest.raises(BrokenTar, match="has no tar header at byte 0"):
        list(groups(io.BytesIO(b"not a tar" * 100)))
    archive = bytearray(write([("a.json", b"{}"), ("a.jpg", b"x")]))
    archive[1024 + 130] ^= 1
    with pytest.raises(BrokenTar, match="has no tar header at byte 1024"):
        list(groups(io.BytesIO(bytes(archive))))


class _Endless:
    """A tar of many members that is never in memory."""

    def __init__(self, members: int) -> None:
        self.block, self.left, self.rest = write([("aaaaaa.jpg", bytes(100_000))])[: 512 + 100_352], members, b""
        self.number = 0

    def read(self, size: int, /) -> bytes:
        while len(self.rest) < size and self.number < self.left:
            member = tarfile.TarInfo(f"{self.number:06d}.jpg")
            member.size = 100_000
            self.rest += member.tobuf(tarfile.USTAR_FORMAT) + self.block[512:]
            self.number += 1
        data, self.rest = self.rest[:size], self.rest[size:]
        return data


def test_memory_does_not_grow_with_the_tar() -> None:
    peaks = []
    for members in (20, 400):
        tracemalloc.start()
        assert sum(1 for _ in groups(_Endless(members))) == members
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    assert peaks[1] < 1.2 * peaks[0]


@pytest.mark.parametrize("content", [b"0 path=a\n", b"x path=a\n", b"9 p\xff=b\n", b"\0" * 9, b"11 size=zz\n"])
def test_an_extended_header_that_cannot_be_read_is_a_broken_tar(content: bytes) -> None:
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w") as tar:
        for name, kind, data in (("a.json", tarfile.REGTYPE, b"{}"), ("x", tarfile.XHDTYPE, content)):
            member = tarfile.TarInfo(name)
            member.size, member.type = len(data), kind
            tar.addfile(member, io.BytesIO(data))
    with pytest.raises(BrokenTar, match="has an extended header before byte 2048 that cannot be read"):
        list(groups(io.BytesIO(file.getvalue())))
