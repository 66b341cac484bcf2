"""Official statistics of benchmarks for prompts: GenEval, WISE and GenEval 2, from what their scorers wrote."""

import json
import math
import re
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from emma_train.errors import UserError
from emma_train.evaluate.benchmark import BenchmarkItem
from emma_train.evaluate.official_scores import OfficialScores, number_in, one_file
from emma_train.evaluate.read_items import read_json_lines

GENEVAL_SAMPLES = 4
WISE_WEIGHTS = (0.7, 0.2, 0.1)
"""Consistency, realism, aesthetic quality; each from 0 to 2."""
WISE_CATEGORIES = {
    "first": (("culture", 400, 0.4), ("time", 567, 0.167), ("space", 700, 0.133), ("biology", 800, 0.1),
              ("physics", 900, 0.1), ("chemistry", 1000, 0.1)),
    "verified": (("culture", 400, 0.4), ("time", 520, 0.12), ("space", 640, 0.12), ("biology", 760, 0.12),
                 ("physics", 880, 0.12), ("chemistry", 1000, 0.12)),
}  # fmt: skip
"""Set -> (category, its last prompt_id, its weight in the overall score)."""
GENEVAL2_SKILLS = ("object", "attribute", "count", "position", "verb")


def score_geneval(items: Sequence[BenchmarkItem], paths: Sequence[Path], data: Path) -> OfficialScores:
    """results.jsonl of evaluate_images.py. Overall: the mean of the tags' means (summary_scores.py)."""
    path, scores = one_file(paths, "results.jsonl"), OfficialScores("geneval")
    correct: dict[tuple[int, int], bool] = {}
    for number, line in enumerate(read_json_lines(path), 1):
        name = re.search(r"(\d+)/samples/(\d+)\.png$", str(line.get("filename")))
        if name is None or int(name[1]) >= len(items) or int(name[2]) >= GENEVAL_SAMPLES:
            raise UserError(f"{path}: line {number} is of {line.get('filename')}, which is no image of --data")
        image = (int(name[1]), int(name[2]))
        if image in correct:
            raise UserError(f"{path}: line {number} is of {line['filename']} again; score the images in one run")
        if isinstance(line.get("correct"), bool):
            correct[image] = line["correct"]
    by_tag: dict[str, list[tuple[str, float]]] = defaultdict(list)
    by_prompt: dict[str, list[bool]] = defaultdict(list)
    for item in items:
        verdicts = [correct.get((item.number, sample)) for sample in range(GENEVAL_SAMPLES)]
        for sample, verdict in enumerate(verdicts):
            if verdict is None:
                scores.fail(f"{item.name}/{sample}", "no verdict")
        right = [bool(verdict) for verdict in verdicts]
        scores.by_item[item.name] = sum(right) / len(right)
        by_tag[item.metadata["tag"]] += [(item.name, float(verdict)) for verdict in right]
        by_prompt[json.dumps(item.metadata, sort_keys=True)] += right
    rows = [scores.add_mean(tag, "accuracy", values, "share of images") for tag, values in by_tag.items()]
    scores.add_mean_of("overall", "accuracy", rows, "mean of the tags")
    every = [value for values in by_tag.values() for value in values]
    scores.add_mean("images", "accuracy", every, "share of images")
    prompts = [(prompt, float(any(right))) for prompt, right in by_prompt.items()]
    scores.add_mean("prompts", "any right", prompts, "share of prompts")
    return scores


def score_wise(items: Sequence[BenchmarkItem], paths: Sequence[Path], data: Path) -> OfficialScores:
    """*_scores.jsonl of gpt_eval.py (three marks) or of vllm_eval.py, for the verified set (one)."""
    scores, lines = OfficialScores("wise"), {}
    for path in paths:
        for line in read_json_lines(path):
            if not isinstance(line.get("prompt_id"), int):
                raise UserError(f"{path}: a line has no number 'prompt_id'; give the *_scores.jsonl of the scorer")
            lines[line["prompt_id"]] = line
    is_verified = any("score" in line for line in lines.values())
    categories = WISE_CATEGORIES["verified" if is_verified else "first"]
    by_category: dict[str, list[tuple[str, float]]] = defaultdict(list)
    for item in items:
        prompt_id = int(item.name)
        if (value := _wiscore(lines.get(prompt_id, {}), is_verified)) is None:
            scores.fail(item.name, "the marks cannot be read" if prompt_id in lines else "no marks")
        category = next((name for name, last, _ in categories if prompt_id <= last), None)
        if category is None:
            raise UserError(f"--data {data}: prompt_id {prompt_id} belongs to no category")
        scores.by_item[item.name] = value or 0.0
        by_category[category].append((item.name, value or 0.0))
    rows = {name: scores.add_mean(name, "WiScore", values, "0 to 1") for name, values in by_category.items()}
    if len(rows) == len(categories):
        weights = [weight for _, _, weight in categories]
        scores.add_weighted("overall", "WiScore", [rows[name] for name, _, _ in categories], weights, "0 to 1")
    return scores


def _wiscore(line: dict[str, Any], is_verified: bool) -> float | None:
    if is_verified:
        mark = number_in(line.get("score"), 0, 1)
        return mark if mark in (0, 1) else None
    marks = [number_in(line.get(name), 0, 2) for name in ("consistency", "realism", "aesthetic_quality")]
    if None in marks:
        return None
    return sum(weight * (mark or 0) for weight, mark in zip(WISE_WEIGHTS, marks, strict=True)) / 2


def score_geneval2(items: Sequence[BenchmarkItem], paths: Sequence[Path], data: Path) -> OfficialScores:
    """The --output_file of evaluation.py with --method soft_tifa_am or soft_tifa_gm: a list of probabilities for each
    prompt. Both means, and what soft_tifa_analysis.py says of skills (AM) and numbers of atoms (GM)."""
    path, scores = one_file(paths, "geneval2_scores.json"), OfficialScores("geneval2")
    try:
        lists = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise UserError(f"--score {path}: is no JSON ({error}); give the --output_file of the scorer") from None
    if not isinstance(lists, list) or len(lists) > len(items):
        raise UserError(f"--score {path}: is no list of at most {len(items)} lists; score the same prompts")
    means: dict[str, list[tuple[str, float]]] = {"AM": [], "GM": []}
    by_skill: dict[str, list[tuple[str, float]]] = {skill: [] for skill in GENEVAL2_SKILLS}
    by_atoms: dict[int, list[tuple[str, float]]] = defaultdict(list)
    for item in items:
        skills = item.metadata["skills"]
        values = _probabilities(lists[item.number] if item.number < len(lists) else None, len(skills))
        if values is None:
            scores.fail(item.name, "no probabilities of its questions")
            values = [0.0] * len(skills)
        arithmetic, geometric = 100 * sum(values) / len(values), 100 * _geometric_mean(values)
        scores.by_item[item.name] = arithmetic
        means["AM"].append((item.name, arithmetic))
        means["GM"].append((item.name, geometric))
        by_atoms[item.metadata["atom_count"]].append((item.name, geometric))
        for skill, value in zip(skills, values, strict=True):
            by_skill[skill].append((item.name, 100 * value))
    for kind, pairs in means.items():
        scores.add_mean("overall", f"Soft-TIFA {kind}", pairs, "0 to 100")
    for skill, pairs in by_skill.items():
        if pairs:
            scores.add_mean(skill, "Soft-TIFA AM", pairs, "0 to 100")
    for atoms, pairs in sorted(by_atoms.items()):
        scores.add_mean(f"{atoms} atoms", "Soft-TIFA GM", pairs, "0 to 100")
    return scores


def _probabilities(values: Any, num: int) -> list[float] | None:
    """The probabilities of a prompt's questions; None where there are not so many numbers from 0 to 1."""
    if not isinstance(values, list) or len(values) != num:
        return None
    numbers = [number_in(value, 0, 1 + 1e-6) for value in values]  # sums of probabilities may round beyond 1
    return None if None in numbers else [number or 0.0 for number in numbers]


def _geometric_mean(values: Sequence[float]) -> float:
    return math.exp(sum(map(math.log, values)) / len(values)) if min(values) > 0 else 0.0
