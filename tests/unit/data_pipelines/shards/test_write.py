import tarfile
from pathlib import Path

import pytest

from data_pipelines.shards.write import ShardWriter


def write(folder: Path, count: int, **limits: int) -> list[Path]:
    with ShardWriter(folder, **limits) as writer:  # type: ignore[arg-type]
        for i in range(count):
            writer.write(f"key-{i}", {"n": i}, {"img0": bytes([i]) * 100})
    return writer.shards


def test_the_same_records_give_the_same_bytes(tmp_path: Path) -> None:
    first, second = (write(tmp_path / name, 7, max_samples=3) for name in "ab")
    assert [p.name for p in first] == ["shard-000000.tar", "shard-000001.tar", "shard-000002.tar"]
    assert [p.read_bytes() for p in first] == [p.read_bytes() for p in second]


def test_limits_by_samples_and_by_bytes(tmp_path: Path) -> None:
    assert len(write(tmp_path / "a", 6, max_samples=3)) == 2
    assert len(write(tmp_path / "b", 6, max_bytes=200)) == 3


def test_parts_of_a_record_lie_together_and_carry_no_clock(tmp_path: Path) -> None:
    (shard,) = write(tmp_path, 2)
    with tarfile.open(shard) as tar:
        members = tar.getmembers()
    assert [m.name for m in members] == ["key-0.img0.webp", "key-0.json", "key-1.img0.webp", "key-1.json"]
    assert {(m.mtime, m.uname, m.gname, m.uid) for m in members} == {(0, "emma", "emma", 0)}


def test_a_failure_leaves_whole_shards_only(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match="boom"), ShardWriter(tmp_path, max_samples=2) as writer:
        for i in range(3):
            writer.write(f"k{i}", {}, {})
        raise RuntimeError("boom")
    assert [p.name for p in tmp_path.iterdir()] == ["shard-000000.tar"]


def test_a_key_with_a_dot_is_refused(tmp_path: Path) -> None:
    with ShardWriter(tmp_path) as writer, pytest.raises(ValueError, match="dot"):
        writer.write("a.b", {}, {})
