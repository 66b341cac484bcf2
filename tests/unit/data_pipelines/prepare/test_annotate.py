"""Annotation: one row a record, rejects with reasons, settings, a user's own operator."""

import json
from collections.abc import Sequence
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from data_pipelines.cli import main
from data_pipelines.prepare.annotate import OperatorChoice, annotate_batch, annotate_tasks, column_file, reject_file
from data_pipelines.prepare.jobs import unfinished
from data_pipelines.prepare.operator import METADATA_KEY, Columns, Operator, Rejected, load_operator
from data_pipelines.prepare.stored_record import StoredRecord
from emma_train.errors import UserError
from tests.shards import damage, every_task, write_shards

ODD = """
import pyarrow

def odd(records):
    numbers = [int(record.key[1:]) for record in records]
    if 3 in numbers:
        raise RuntimeError("never caught")
    return {"odd": [n % 2 == 1 for n in numbers]}

odd.columns = {"odd": pyarrow.bool_()}

def untyped(records):
    return {}
"""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return write_shards(tmp_path / "set", every_task(4), per_shard=5)


def rows(tar: Path, operator: str) -> list[dict]:
    return pq.read_table(column_file(tar, operator)).to_pylist()


def test_columns_have_one_row_a_record_in_the_order_of_the_tar(folder: Path, capsys: pytest.CaptureFixture) -> None:
    assert main(["annotate", "size", str(folder), "--workers", "1"]) == 0
    tars = sorted(folder.glob("*.tar"))
    keys = [row["key"] for tar in tars for row in rows(tar, "size")]
    assert keys == [f"{letter}{i:03d}" for i in range(4) for letter in "qpe"]
    assert {row["width"] for tar in tars for row in rows(tar, "size")} == {32}
    assert "12 records read, 12 kept, 0 rejected" in capsys.readouterr().out
    identity = json.loads(pq.read_schema(column_file(tars[0], "size")).metadata[METADATA_KEY])
    assert identity == {"operator": "size", "version": 1, "settings": {}}


def test_an_unreadable_record_is_rejected_with_its_reason_and_the_counts_add_up(
    folder: Path, capsys: pytest.CaptureFixture
) -> None:
    damage(folder / "shard-000000.tar", "p000.img0.png")
    assert main(["annotate", "phash", str(folder), "--workers", "1"]) == 0
    assert "12 records read, 11 kept, 1 rejected" in capsys.readouterr().out
    lines = reject_file(folder / "shard-000000.tar", "phash").read_text().splitlines()
    assert [json.loads(line) for line in lines] == [
        {"key": "p000", "reason": "ValueError: its bytes differ from the index's crc32"}
    ]
    assert "p000" not in [row["key"] for row in rows(folder / "shard-000000.tar", "phash")]


def test_a_dry_run_counts_and_writes_nothing(folder: Path, capsys: pytest.CaptureFixture) -> None:
    before = sorted(folder.iterdir())
    assert main(["annotate", "size", str(folder), "--dry-run"]) == 0
    assert capsys.readouterr().out.startswith(
        "size: 3 shards, 0 finished (0 records kept, 0 rejected), 3 to do with 12"
    )
    assert sorted(folder.iterdir()) == before


def test_another_setting_makes_shards_be_done_again_and_another_file_too(folder: Path, tmp_path: Path) -> None:
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("a photo of a bench\n")
    choice = OperatorChoice("decontaminate", settings=(("prompts", (str(prompts),)),))
    command = ["annotate", "decontaminate", str(folder), "--workers", "1", "--set", f"prompts=[{prompts}]"]
    assert main(command) == 0 and unfinished(annotate_tasks([folder], choice))[0] == []
    prompts.write_text("a photo of a dog\n")
    assert len(unfinished(annotate_tasks([folder], choice))[0]) == 3


def test_a_users_own_function_is_an_operator(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    (tmp_path / "odd_operators.py").write_text(ODD)
    monkeypatch.syspath_prepend(tmp_path)
    choice = OperatorChoice("odd", "odd_operators:odd")
    assert choice.load().columns == {"odd": pa.bool_()} and choice.load().identity["settings"]["source"]
    with pytest.raises(UserError, match="is no function with types of its columns"):
        load_operator("odd", "odd_operators:untyped")
    with pytest.raises(UserError, match="has no missing"):
        load_operator("odd", "odd_operators:missing")
    with pytest.raises(UserError, match="no module odd_operator on PYTHONPATH"):
        load_operator("odd", "odd_operator:odd")


def test_settings_are_checked() -> None:
    operator = load_operator("decontaminate")
    assert operator.with_settings({"max_bits": 3}).settings["max_bits"] == 3
    with pytest.raises(UserError, match="has no such setting; it has prompts, hashes, images, max_bits"):
        operator.with_settings({"bits": 3})
    with pytest.raises(UserError, match="'three' is str, must be int"):
        operator.with_settings({"max_bits": "three"})
    with pytest.raises(UserError, match="there is none of this name"):
        load_operator("sise")


def records(num: int) -> list[StoredRecord]:
    return [StoredRecord(str(i), {}, None) for i in range(num)]  # type: ignore[arg-type]


def test_a_batch_that_raises_is_tried_record_by_record() -> None:
    sizes = []

    def annotate(batch: Sequence[StoredRecord]) -> Columns:
        sizes.append(len(batch))
        return {"inverse": [1 / int(record.key) for record in batch]}

    operator = Operator("inverse", 1, {"inverse": pa.float64()}, lambda _: annotate)
    table, rejected = annotate_batch(operator, annotate, records(3))
    assert table["inverse"].to_pylist() == [1.0, 0.5] and table["key"].to_pylist() == ["1", "2"]
    assert rejected == [("0", "ZeroDivisionError: division by zero")] and sizes == [3, 1, 1, 1]


def test_a_rejected_value_rejects_its_record_alone() -> None:
    operator = Operator("score", 1, {"score": pa.int32(), "text": pa.string()}, lambda _: lambda batch: {})
    values = {"score": [1, Rejected("no answer"), 3], "text": ["a", None, "c"]}
    table, rejected = annotate_batch(operator, lambda batch: values, records(3))
    assert table.to_pylist() == [{"key": "0", "score": 1, "text": "a"}, {"key": "2", "score": 3, "text": "c"}]
    assert rejected == [("1", "no answer")]


def test_wrong_columns_of_an_operator_end_the_job() -> None:
    operator = Operator("score", 1, {"score": pa.int32()}, lambda _: lambda batch: {})
    with pytest.raises(UserError, match="column score is not of type int32"):
        annotate_batch(operator, lambda batch: {"score": ["high"]}, records(1))
    with pytest.raises(UserError, match="returned {'score': 1} values by column for 2 records"):
        annotate_batch(operator, lambda batch: {"score": [1]}, records(2))


def test_an_operator_that_reads_another_needs_its_columns() -> None:
    operator = Operator("score", 1, {"score": pa.int32()}, lambda _: lambda batch: {}, reads=("size",))
    one, other = records(2)
    one.columns = {"size": {"width": 3}}

    def annotate(batch: Sequence[StoredRecord]) -> Columns:
        return {"score": [record.columns["size"]["width"] for record in batch]}

    table, rejected = annotate_batch(operator, annotate, [one, other])
    assert table["score"].to_pylist() == [3] and rejected == [("1", "the operator size rejected it")]
