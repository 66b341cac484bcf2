"""Writes an evaluation in the forms that people's tools read: results.json as lm-eval writes it, a table, the items as
JSON lines, and a contact sheet of the generated images."""

import json
import math
import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from PIL import Image, ImageDraw

from emma_train.generate.items import EvaluationItem
from emma_train.storage.files import make_folder, write_atomic

FILTER = "none"
"""lm-eval names the filter of answers in every key; there is none here."""
TASK_VERSION = 1
SHEET_SIDE, SHEET_COLUMNS, SHEET_IMAGES = 96, 12, 96
LINE_LETTERS, LINE_PIXELS, PROMPT_LINES = 17, 15, 4
GREEN, RED, GREY = (0, 128, 93), (213, 94, 0), (200, 200, 200)


def write_results(
    folder: Path, scores: Sequence[Mapping[str, Any]], items: Sequence[EvaluationItem], about: Mapping[str, Any]
) -> None:
    """Write results.json, the same as a Markdown table, samples.jsonl and, where there are images, sheet.png.

    `about`: model, settings and versions, merged into results.json.
    """
    make_folder(folder)
    results = lm_eval_results(scores)
    write_atomic(folder / "results.json", json.dumps({**results, **about}, indent=1, allow_nan=False) + "\n")
    write_atomic((folder / "results").with_suffix(".md"), results_table(scores, about))
    lines = [json.dumps(sample_line(number, item), ensure_ascii=False) for number, item in enumerate(items)]
    write_atomic(folder / "samples.jsonl", "\n".join(lines) + "\n")
    shown = [item for item in items if item.image is not None]
    if shown:
        contact_sheet(shown[:SHEET_IMAGES]).save(folder / "sheet.png")


def lm_eval_results(scores: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Scores with the keys of lm-eval's results.json, and `baseline` and `bar` beside them. A value that is not finite
    is null."""
    results: dict[str, dict[str, Any]] = {}
    numbers: dict[str, dict[str, int]] = {}
    higher: dict[str, dict[str, bool]] = {}
    extra: dict[str, dict[str, dict[str, float | None]]] = {"baseline": {}, "bar": {}}
    for score in scores:
        task, metric = f"{score['split']}_{score['task']}", score["metric"]
        entry = results.setdefault(task, {"alias": task.replace("_", " ")})
        entry[f"{metric},{FILTER}"] = _finite(score["value"])
        entry[f"{metric}_stderr,{FILTER}"] = _finite(score["stderr"])
        num = max(score["num"], numbers.get(task, {}).get("effective", 0))
        numbers[task] = {"original": num, "effective": num}
        higher.setdefault(task, {})[metric] = score["higher_is_better"]
        for key, by_task in extra.items():
            by_task.setdefault(task, {})[metric] = _finite(score[key])
    versions = dict.fromkeys(results, TASK_VERSION)
    return {"results": results, "versions": versions, "n-samples": numbers, "higher_is_better": higher, **extra}


def _finite(value: float | None) -> float | None:
    return value if value is not None and math.isfinite(value) else None


def results_table(scores: Sequence[Mapping[str, Any]], about: Mapping[str, Any]) -> str:
    """Scores as a Markdown table."""
    lines = [
        f"# {about.get('model_name', 'Model')}",
        "",
        "| split | score | value | standard error | n | baseline | bar |",
        "|---|---|---|---|---|---|---|",
    ]
    for score in scores:
        bar = "" if score["bar"] is None else f"{'≥' if score['higher_is_better'] else '≤'} {score['bar']:.3f}"
        baseline = "" if score["baseline"] is None else f"{score['baseline']:.3f}"
        numbers = f"{score['value']:.3f} | {score['stderr']:.3f} | {score['num']} | {baseline} | {bar}"
        lines.append(f"| {score['split']} | {score['name']} | {numbers} |")
    return "\n".join(lines) + "\n"


def sample_line(number: int, item: EvaluationItem) -> dict[str, Any]:
    """An item as a line of samples.jsonl, with lm-eval's names where it has them."""
    doc = {"split": item.split, "task": item.task, "kind": item.kind, "key": item.key, "prompt": item.prompt}
    wrong = [metric for metric, right in item.verdicts.items() if not right]
    line = {"doc_id": number, "doc": doc, "target": item.truth, "resps": [[item.output]], "seed": item.seed}
    return {**line, **item.verdicts, "reason": f"wrong: {', '.join(wrong)}" if wrong else ""}


def contact_sheet(items: Sequence[EvaluationItem]) -> Image.Image:
    """The generated images in rows, each above its prompt, framed in green if all of it is right and in red if not;
    in grey where nobody judged."""
    cell, text = SHEET_SIDE + 8, PROMPT_LINES * LINE_PIXELS + 4
    columns = min(SHEET_COLUMNS, len(items))
    sheet = Image.new("RGB", (columns * cell, math.ceil(len(items) / columns) * (cell + text)), "white")
    pen = ImageDraw.Draw(sheet)
    for number, item in enumerate(items):
        x, y = number % columns * cell, number // columns * (cell + text)
        frame = GREY if not item.verdicts else GREEN if all(item.verdicts.values()) else RED
        pen.rectangle((x + 1, y + 1, x + cell - 2, y + cell - 2), fill=frame)
        assert item.image is not None
        sheet.paste(Image.fromarray(item.image).resize((SHEET_SIDE, SHEET_SIDE), Image.Resampling.BOX), (x + 4, y + 4))
        prompt = textwrap.wrap(item.prompt, LINE_LETTERS, max_lines=PROMPT_LINES, placeholder=" ...")
        safe = "\n".join(prompt).encode("ascii", "replace").decode()
        pen.text((x + 4, y + cell), safe, fill="black")
    return sheet
