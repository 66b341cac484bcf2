"""Official statistics of DPG-Bench, from the answers that compute_dpg_bench.py writes to RESULTS_detail.txt.

The official arithmetic is kept as it is: the first row of the table of questions is skipped, a question whose parent
was answered no scores 0, and the categories come from the last image of a grid alone, without that rule.
"""

import csv
import re
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from emma_train.errors import UserError
from emma_train.evaluate.benchmark import BenchmarkItem
from emma_train.evaluate.official_scores import OfficialScores, one_file
from emma_train.evaluate.read_items import official_file

NUM_CELLS = 4
_LINE = re.compile(r"(.*), \((\d+), (\d+), \d+, \d+\), (.*)")
Cell = tuple[int, int]
"""(top, left) of an image in a grid."""


@dataclass
class DpgQuestions:
    """The questions about one prompt, by their number."""

    text: dict[int, str] = field(default_factory=dict)
    category: dict[int, str] = field(default_factory=dict)
    parents: dict[int, list[int]] = field(default_factory=dict)


def score_dpg(items: Sequence[BenchmarkItem], paths: Sequence[Path], data: Path) -> OfficialScores:
    """The score, and the means of first and second-level categories, all times 100."""
    path = one_file(paths, "results_detail.txt")
    if not path.stem.endswith("_detail"):
        path = one_file([path.with_name(path.name.replace(".txt", "_detail.txt"))], "results_detail.txt")
    table = official_file(data, "dpg_bench.csv", ("", "dpg_bench", ".."))
    questions, scores = read_dpg_questions(table), OfficialScores("dpg")
    answers = _read_answers(path, questions)
    totals: list[tuple[str, float]] = []
    by_category: dict[str, list[tuple[str, float]]] = defaultdict(list)
    for item in items:
        asked = questions.get(item.name)
        if asked is None or any(p and p not in asked.text for parents in asked.parents.values() for p in parents):
            scores.notes.append(f"{item.name}: the official scorer leaves it out, because it skips a question of it")
            continue
        cells = sorted(answers.get(item.name, {}).items())
        marks = [_cell_marks(asked, given) for _, given in cells]
        for number in range(NUM_CELLS):
            if number >= len(cells) or cells[number][1].keys() != set(asked.text.values()):
                scores.fail(f"{item.name} cell {number}", "answers are missing")
        shares = [sum(dependent.values()) / len(dependent) for _, dependent in marks]
        scores.by_item[item.name] = sum(shares) / NUM_CELLS
        totals.append((item.name, 100 * scores.by_item[item.name]))
        plain = marks[-1][0] if len(cells) == NUM_CELLS else dict.fromkeys(asked.text, 0.0)
        for number, category in asked.category.items():
            by_category[category].append((item.name, 100 * plain[number]))
    if not totals:
        raise UserError(f"{table}: has no questions about these prompts; give the file of the same download")
    scores.add_mean("overall", "DPG", totals, "0 to 100")
    by_first: dict[str, list[tuple[str, float]]] = defaultdict(list)
    for category, values in by_category.items():
        by_first[category.split("-")[0].strip()] += values
    for level, groups in (("L1", by_first), ("L2", by_category)):
        for category, values in sorted(groups.items()):
            scores.add_mean(f"{level} {category}", "accuracy", values, "0 to 100")
    return scores


def read_dpg_questions(path: Path) -> dict[str, DpgQuestions]:
    """The questions of each prompt in dpg_bench.csv, without its first row. Raises UserError."""
    questions: dict[str, DpgQuestions] = {}
    try:
        with open(path, newline="", encoding="utf-8") as file:
            previous = None
            for row in list(csv.DictReader(file))[1:]:
                if row["item_id"] != previous:
                    questions[row["item_id"]] = DpgQuestions()
                asked, number = questions[row["item_id"]], int(row["proposition_id"])
                asked.text[number] = row["question_natural_language"]
                asked.category[number] = row["tuple"].split("(")[0].strip()
                asked.parents[number] = [int(parent) for parent in row["dependency"].split(",")]
                previous = row["item_id"]
    except (OSError, ValueError, KeyError, AttributeError) as error:
        raise UserError(
            f"{path}: is no table of DPG-Bench ({type(error).__name__}: {error}); download it again"
        ) from None
    return questions


def _read_answers(path: Path, questions: dict[str, DpgQuestions]) -> dict[str, dict[Cell, dict[str, str]]]:
    """Prompt -> cell -> question -> answer."""
    answers: dict[str, dict[Cell, dict[str, str]]] = defaultdict(lambda: defaultdict(dict))
    for line in path.read_text(encoding="utf-8").splitlines():
        if (match := _LINE.fullmatch(line)) is None:
            continue
        name = match[1].replace("\\", "/").rsplit("/", 1)[-1].split(".")[0]
        asked = questions.get(name, DpgQuestions()).text.values()
        matching = [question for question in asked if match[4].startswith(f"{question}, ")]
        if matching:
            question = max(matching, key=len)
            answers[name][int(match[3]), int(match[2])][question] = match[4][len(question) + 2 :]
    return answers


def _cell_marks(asked: DpgQuestions, given: dict[str, str]) -> tuple[dict[int, float], dict[int, float]]:
    """1 for yes and 0 for any other answer, by question: as answered, and with the rule of parents."""
    plain = {number: float(given.get(text) == "yes") for number, text in asked.text.items()}
    dependent = dict(plain)
    for number, parents in asked.parents.items():
        if any(parent and dependent[parent] == 0 for parent in parents):
            dependent[number] = 0.0
    return plain, dependent
