"""Writes official statistics as people's tools read them: results.json in lm-eval's form, a table, one line an item."""

import json
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from emma_train.evaluate.benchmark import BenchmarkItem
from emma_train.evaluate.official_scores import OfficialScores
from emma_train.generate.results import lm_eval_results, results_table
from emma_train.storage.files import write_atomic


def write_scores(
    out: Path,
    scores: OfficialScores,
    items: Sequence[BenchmarkItem],
    settings: dict[str, Any],
    judged: Sequence[str],
    judge: Mapping[str, Any] | None = None,
) -> None:
    """Write results.json, the same as a table and samples.jsonl into the folder of the images.

    `settings`: the folder's settings.json, which names the checkpoint; `judged`: the scorer's files; `judge`: who wrote
    them and what became of its answers, where that is known.
    """
    fixed, about = settings["fixed"], settings["about"]
    extra = {
        "config": {"model": "emma", "model_args": about["model"], **fixed},
        "model_name": about["model"],
        "date": time.time(),
        "git_hash": about.get("git_hash"),
        "package_versions": about.get("package_versions"),
        "judge": {"files": list(judged), "failures": len(scores.failures), **(judge or {})},
        "failures": scores.failures,
        "notes": scores.notes,
    }
    results = {**lm_eval_results(scores.rows), **extra}
    write_atomic(out / "results.json", json.dumps(results, indent=1, allow_nan=False, ensure_ascii=False) + "\n")
    write_atomic((out / "results").with_suffix(".md"), results_table(scores.rows, extra))
    lines = [
        {"doc_id": item.number, "doc": {"name": item.name, "prompt": item.prompt}, "score": scores.by_item[item.name]}
        for item in items
        if item.name in scores.by_item
    ]
    text = "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)
    write_atomic(out / "samples.jsonl", text)
