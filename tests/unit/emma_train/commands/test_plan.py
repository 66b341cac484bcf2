"""Index rows that the plan is measured on."""

from pathlib import Path

import pytest

from emma_train.commands.plan import read_index_rows
from emma_train.config.schema import SourceConfig
from emma_train.errors import UserError
from tests.shards import question, write_shards


def test_rows_have_the_required_tags_and_none_of_the_excluded(tmp_path: Path) -> None:
    tags = [["stem"], ["photo"], [], ["stem", "photo"]]
    contents = [question(f"q{i:02d}", answers=["a"] * (1 + i % 4), tags=tags[i % 4]) for i in range(20)]
    folder = str(write_shards(tmp_path, contents, per_shard=7))

    def num_alternatives(**wanted: list[str]) -> list[int]:
        rows = read_index_rows(SourceConfig(path=folder, **wanted), "i2t")
        assert rows is not None
        return [len(row["text_tokens"]) for row in rows]

    assert num_alternatives() == [1, 2, 3, 4] * 5
    assert num_alternatives(require_tags=["stem"]) == [1, 4] * 5
    assert num_alternatives(exclude_tags=["photo"]) == [1, 3] * 5
    assert num_alternatives(require_tags=["stem"], exclude_tags=["photo"]) == [1] * 5
    assert read_index_rows(SourceConfig(path=folder), "t2i") == []


def test_a_source_elsewhere_has_no_rows_and_a_broken_one_is_an_error(tmp_path: Path) -> None:
    assert read_index_rows(SourceConfig(path="s3://bucket/set"), "i2t") is None
    folder = write_shards(tmp_path / "set", [question("q")])
    next(folder.glob("*.idx.parquet")).unlink()
    with pytest.raises(UserError, match="missing"):
        read_index_rows(SourceConfig(path=str(folder)), "i2t")
