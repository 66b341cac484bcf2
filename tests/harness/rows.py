"""Rows for evaluation harnesses from the held-out drawings of the emoji world: real questions about real images."""

import base64
import json
import tarfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq

SPLIT = Path(__file__).parents[2] / "recipes" / "tiny" / "assets" / "emoji" / "heldout_drawings"
CHOICE_KIND = "background"
"""Its answers are eight colours, so it can be asked with choices."""
NUM_OPTIONS = 4
NUM_ROWS = 240


@dataclass(frozen=True)
class Row:
    """A question about an image with its answer."""

    key: str
    image: bytes
    """A WebP file."""
    question: str
    answer: str
    kind: str


def read_rows() -> list[Row]:
    """Questions of the split about one image, by key: every fourth or so, which keeps a run on a CPU short."""
    rows = []
    with tarfile.open(SPLIT / "shard-000000.tar") as tar:
        files = {member.name: tar.extractfile(member).read() for member in tar}  # type: ignore[union-attr]
    for name in sorted(name for name in files if name.endswith(".json")):
        key = name.removesuffix(".json")
        for number, asked in enumerate(json.loads(files[name]).get("i2t", [])):
            question, answer = (turn["text"] for turn in asked["turns"])
            image = files[f"{key}.{asked['images'][0]}.webp"]
            rows.append(Row(f"{key}/{number}", image, question, answer, asked["kind"]))
    return [rows[i * len(rows) // NUM_ROWS] for i in range(NUM_ROWS)]


def choice_rows(rows: list[Row]) -> list[Row]:
    """Those that can be asked with choices."""
    return [row for row in rows if row.kind == CHOICE_KIND]


def all_choices(rows: list[Row]) -> list[str]:
    """Every answer of the questions with choices."""
    return sorted({row.answer for row in choice_rows(rows)})


def options_of(row: Row, number: int, choices: list[str]) -> list[str]:
    """Four options; the right one is A, B, C, D in turn."""
    others = [choice for choice in choices if choice != row.answer]
    options = [others[(number + i) % len(others)] for i in range(NUM_OPTIONS - 1)]
    options.insert(number % NUM_OPTIONS, row.answer)
    return options


def write_rows(folder: Path) -> None:
    """Parquet files for lmms-eval, and TSV files for VLMEvalKit."""
    folder.mkdir(parents=True, exist_ok=True)
    rows = read_rows()
    choices = all_choices(rows)
    answers = [{"question": r.question, "answer": r.answer, "kind": r.kind} for r in rows]
    _parquet(folder / "answers.parquet", rows, answers)
    chosen = choice_rows(rows)
    options = [options_of(row, number, choices) for number, row in enumerate(chosen)]
    labels = [
        {"question": row.question, "choices": choices, "label": choices.index(row.answer), "answer": row.answer}
        for row in chosen
    ]
    _parquet(folder / "choices.parquet", chosen, labels)
    letters = [
        {"question": row.question, "options": given, "answer": str(given.index(row.answer))}
        for row, given in zip(chosen, options, strict=True)
    ]
    _parquet(folder / "options.parquet", chosen, letters)
    table = [{"index": i, "image": _base64(r), "category": r.kind, **answers[i]} for i, r in enumerate(rows)]
    pd.DataFrame(table).to_csv(folder / "EmojiChartQA.tsv", sep="\t", index=False)
    table = [
        {
            "index": number,
            "image": _base64(row),
            "question": row.question,
            **dict(zip("ABCD", given, strict=True)),
            "answer": "ABCD"[given.index(row.answer)],
            "category": row.kind,
            "split": "dev",
        }
        for number, (row, given) in enumerate(zip(chosen, options, strict=True))
    ]
    pd.DataFrame(table).to_csv(folder / "EmojiMCQ.tsv", sep="\t", index=False)


def _parquet(path: Path, rows: Sequence[Row], columns: Sequence[Mapping[str, Any]]) -> None:
    """With the column `image` as the library datasets reads it."""
    images = [{"bytes": row.image, "path": None} for row in rows]
    values = {name: [line[name] for line in columns] for name in columns[0]}
    table = pa.table({"image": pa.array(images, pa.struct([("bytes", pa.binary()), ("path", pa.string())])), **values})
    info: dict[str, Any] = {"info": {"features": {"image": {"_type": "Image"}}}}
    for name in values:
        kind = table.schema.field(name).type
        info["info"]["features"][name] = (
            {"feature": {"dtype": "string", "_type": "Value"}, "_type": "List"}
            if pa.types.is_list(kind)
            else {"dtype": str(kind), "_type": "Value"}
        )
    pq.write_table(table.replace_schema_metadata({"huggingface": json.dumps(info)}), path)


def _base64(row: Row) -> str:
    return base64.b64encode(row.image).decode()
