"""`quality`: one score of a record's answer, from scores that its source gives or from its text alone.

Sources such as FineVision rate each turn from 1 to 5 in several respects; their importers keep that in the columns
`source`: relevance_ratings [4, null, 5], relevance_min 4, ... The score is the smallest of all that are given; a record
without any has no score (null), never a guessed one.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import pyarrow as pa

from data_pipelines.prepare.operator import Annotate, Operator, for_each_record
from data_pipelines.prepare.stored_record import StoredRecord


def given_scores(columns: Mapping[str, Any], names: Sequence[str]) -> list[float]:
    """All numbers of the columns whose name ends in one of `names`; null, NaN and infinite ones are left out."""
    values = [value for name, value in columns.items() if name.endswith(tuple(names))]
    flat = [number for value in values for number in (value if isinstance(value, list) else [value])]
    numbers = [float(number) for number in flat if isinstance(number, int | float) and not isinstance(number, bool)]
    return [number for number in numbers if math.isfinite(number)]


def answers_of(record: StoredRecord) -> list[str]:
    """The answers of its i2t alternatives, and the texts of the others."""
    answers = []
    for task in record.rows:
        for alternative in record.json.get(task, []):
            turns = alternative.get("turns")
            texts = [t["text"] for t in turns if t["role"] == "assistant"] if turns else [alternative.get("text", "")]
            answers += texts
    return answers


def repetition(text: str) -> float:
    """Share of a text's 3-grams of words that occurred before in it; 0 for texts of fewer than four words."""
    words = text.lower().split()
    grams = [tuple(words[i : i + 3]) for i in range(len(words) - 2)]
    return 1 - len(set(grams)) / len(grams) if len(grams) > 1 else 0.0


def _start(settings: Mapping[str, Any]) -> Annotate:
    def annotate_one(record: StoredRecord) -> Mapping[str, Any]:
        answers = answers_of(record)
        scores = given_scores(record.columns.get("source", {}), settings["columns"])
        return {
            "score": min(scores) if scores else None,
            "mean_score": sum(scores) / len(scores) if scores else None,
            "num_scores": len(scores),
            "answer_words": sum(len(answer.split()) for answer in answers),
            "repetition": max(map(repetition, answers), default=0.0),
        }

    return for_each_record(annotate_one)


QUALITY = Operator(
    "quality",
    1,
    {
        "score": pa.float32(),
        "mean_score": pa.float32(),
        "num_scores": pa.int32(),
        "answer_words": pa.int32(),
        "repetition": pa.float32(),
    },
    _start,
    {"columns": ["_ratings", "_min"]},
    optional_reads=("source",),
)
"""The setting names the columns of the source that hold scores, by the ends of their names."""
