"""Official statistics of benchmarks for edits: GEdit-Bench and ImgEdit, from what their judges wrote."""

import csv
import json
import math
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from emma_train.errors import UserError
from emma_train.evaluate.benchmark import BenchmarkItem
from emma_train.evaluate.official_scores import OfficialScores, number_in, one_file

GEDIT_MARKS = ("semantics", "quality", "overall")
IMGEDIT_MARKS = 3
"""Marks of an answer of ImgEdit's judge, each from 1 to 5."""
Marks = tuple[float, float, float]


def score_gedit(items: Sequence[BenchmarkItem], paths: Sequence[Path], data: Path) -> OfficialScores:
    """The *_gpt_score.csv of test_gedit_score.py, or their folder. Per edit: semantics, quality and the square root of
    their product; the means of each task, and the means of the tasks' means, for each language, of all edits and of the
    intersection."""
    scores, marks = OfficialScores("gedit"), _read_gedit_marks(paths)
    groups: dict[tuple[str, str, str], list[tuple[str, Marks]]] = defaultdict(list)
    for item in items:
        task, language, _ = item.name.split("/")
        if item.name not in marks:
            scores.fail(item.name, "no marks")
        elif marks[item.name] is None:
            scores.fail(item.name, "the marks cannot be read")
        values = marks.get(item.name) or (0.0, 0.0, 0.0)
        scores.by_item[item.name] = values[2]
        groups[language, "", task].append((item.name, values))
        if item.metadata["Intersection_exist"]:
            groups[language, " intersection", task].append((item.name, values))
    for language, part in dict.fromkeys((language, part) for language, part, _ in groups):
        for index, mark in enumerate(GEDIT_MARKS):
            rows = [
                scores.add_mean(f"{language}{part} {task}", mark, [(n, v[index]) for n, v in values], "0 to 10")
                for (group_language, group_part, task), values in sorted(groups.items())
                if (group_language, group_part) == (language, part)
            ]
            scores.add_mean_of(f"{language}{part} average", mark, rows, "0 to 10")
    return scores


def _read_gedit_marks(paths: Sequence[Path]) -> dict[str, Marks | None]:
    """Task/language/key -> its marks; None where they cannot be read. Raises UserError."""
    files = [file for path in paths for file in (sorted(path.glob("*_gpt_score.csv")) if path.is_dir() else [path])]
    files = [file for file in files if not file.name.endswith("_combined_gpt_score.csv")]
    if not files:
        raise UserError(f"--score {paths[0]}: has no *_gpt_score.csv; give the scorer's folder eval_results_new")
    marks: dict[str, Marks | None] = {}
    for file in files:
        try:
            with open(file, newline="", encoding="utf-8") as content:
                rows = list(csv.DictReader(content))
        except (OSError, ValueError, csv.Error) as error:
            raise UserError(f"--score {file}: cannot be read ({error})") from None
        for number, row in enumerate(rows, 2):
            if not isinstance(edited := row.get("edited_image"), str) or "sementics_score" not in row:
                raise UserError(f"--score {file}: line {number} lacks edited_image or sementics_score (sic)")
            name = "/".join(edited.removesuffix(".png").split("/")[-3:])
            if name in marks:
                raise UserError(f"--score {file}: line {number} judges {name} again; give the files of one run")
            semantics, quality = (number_in(row.get(key), 0, 10) for key in ("sementics_score", "quality_score"))
            is_readable = semantics is not None and quality is not None
            marks[name] = (semantics, quality, math.sqrt(semantics * quality)) if is_readable else None  # type: ignore[operator,assignment]
    return marks


def score_imgedit(items: Sequence[BenchmarkItem], paths: Sequence[Path], data: Path) -> OfficialScores:
    """result.json of basic_bench.py: key -> answer. The mean of an answer's marks, then the mean of each type, both
    rounded to two digits (step1_get_avgscore.py, step2_typescore.py); the mean of the types is ours."""
    path, scores = one_file(paths, "result.json"), OfficialScores("imgedit")
    try:
        answers = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"--score {path}: is no JSON ({error}); give the result.json of the scorer") from None
    if not isinstance(answers, dict):
        raise UserError(f"--score {path}: is no JSON object; give the result.json of the scorer")
    by_type: dict[str, list[tuple[str, float]]] = defaultdict(list)
    for item in items:
        if (mark := imgedit_mark(answers.get(item.name))) is None:
            scores.fail(item.name, "the answer cannot be read" if item.name in answers else "no answer")
        scores.by_item[item.name] = mark or 0.0
        by_type[item.metadata["edit_type"]].append((item.name, mark or 0.0))
    rows = [scores.add_mean(kind, "mark", values, "1 to 5") for kind, values in by_type.items()]
    for row in rows:
        row["value"] = round(row["value"], 2)
    scores.add_mean_of("mean of types", "mark", rows, "1 to 5")
    return scores


def imgedit_mark(answer: Any) -> float | None:
    """The mean of an answer's three marks, rounded to two digits; None where it does not have three from 1 to 5."""
    if not isinstance(answer, str):
        return None
    lines = [line.strip().split(": ") for line in answer.splitlines()]
    marks = [int(parts[1]) for parts in lines if len(parts) == 2 and parts[1].isdigit()]
    if len(marks) != IMGEDIT_MARKS or not all(1 <= mark <= 5 for mark in marks):
        return None
    return round(sum(marks) / len(marks), 2)
