"""What the model generated while it trained: a grid of sample images for each task, and answers as cards."""

import base64
import io
import json
from collections import defaultdict
from dataclasses import dataclass
from html import escape
from itertools import groupby
from pathlib import Path
from typing import Any, TypeVar

from PIL import Image

from emma_train.sequence.tasks import TASKS, Task, tasks_of_loss

Item = TypeVar("Item")

MAX_IMAGE_PX = 192
MAX_COLUMNS = 6
MAX_ROWS = 8

MARKS = {
    True: '<b class="ok" role="img" aria-label="right">✓</b>',
    False: '<b class="bad" role="img" aria-label="wrong">✗</b>',
}


@dataclass(frozen=True)
class SampleSnapshot:
    """The samples of one step. label, short: names of its stage, for the head of a column and the line of an answer."""

    label: str
    short: str
    step: int
    folder: Path
    samples: list[dict[str, Any]]


Cells = dict[int, tuple[SampleSnapshot, dict[str, Any]]]
"""Samples of one prompt by their column in the grid."""


def read_snapshots(label: str, short: str, run: Path, missing: list[str]) -> list[SampleSnapshot]:
    """The sample folders of one run folder in the order of steps. Adds a line to `missing` for what cannot be read."""
    snapshots = []
    for folder in sorted((run / "samples").glob("step-*")):
        digits = folder.name.removeprefix("step-")
        if not digits.isdigit() or not folder.is_dir():
            continue
        try:
            samples = json.loads((folder / "samples.json").read_text(encoding="utf-8"))
        except (OSError, ValueError):
            missing.append(f"{label}: samples/{folder.name}/samples.json is missing or not readable")
            continue
        if isinstance(samples, list):
            snapshots.append(
                SampleSnapshot(label, short, int(digits), folder, [s for s in samples if isinstance(s, dict)])
            )
    return snapshots


def samples_html(snapshots: list[SampleSnapshot]) -> str:
    """A grid of images for each task that makes images (a row per prompt, a column per step), and cards of answers."""
    grids = [_image_grid(task, snapshots) for task in TASKS.values() if task.makes_image]
    return "".join(grids) + _answers(snapshots)


def image_uri(path: Path) -> str | None:
    """An image as a data URI of at most 192 pixels a side, None where it cannot be read."""
    try:
        with Image.open(path) as file:
            image = file.convert("RGBA" if "A" in file.getbands() else "RGB")
            image.thumbnail((MAX_IMAGE_PX, MAX_IMAGE_PX))
            buffer = io.BytesIO()
            image.save(buffer, "WEBP", quality=90)
    except (OSError, ValueError):
        return None
    return "data:image/webp;base64," + base64.b64encode(buffer.getvalue()).decode("ascii")


def _image_grid(task: Task, snapshots: list[SampleSnapshot]) -> str:
    snapshots = [m for m in snapshots if any(s.get("task") == task.name for s in m.samples)]
    if not snapshots:
        return ""
    columns = _spread(snapshots, MAX_COLUMNS)
    rows: dict[tuple[str, str], Cells] = defaultdict(dict)
    for i, snapshot in enumerate(columns):
        for sample in snapshot.samples:
            if sample.get("task") == task.name:
                rows[str(sample.get("prompt", "")), str(sample.get("file", ""))][i] = (snapshot, sample)
    # Prompts with most images first: they show how the model changes.
    shown = sorted(rows.items(), key=lambda item: -len(item[1]))[:MAX_ROWS]
    latest = [cells[max(cells)][1] for _, cells in shown]
    before, after = (any(sample.get(key) for sample in latest) for key in ("reference", "target"))
    # A gap stands before the first column of each stage.
    gaps = [
        ' class="apart"' if i == 0 or columns[i - 1].label != column.label else "" for i, column in enumerate(columns)
    ]
    head = _grid_head(columns, gaps, before, after)
    body = "".join(_grid_row(prompt, cells, columns, gaps, before, after) for (prompt, _), cells in shown)
    more = f'<p class="note">{len(shown)} of {len(rows)} prompts are shown.</p>' if len(rows) > len(shown) else ""
    return (
        f'<div class="card image-grid" tabindex="0" role="region" aria-label="{escape(task.heading)}">'
        f"<h3>{escape(task.heading)}</h3><table><thead>{head}</thead><tbody>{body}</tbody></table>{more}</div>"
    )


def _grid_head(columns: list[SampleSnapshot], gaps: list[str], before: bool, after: bool) -> str:
    """Two rows: names of the stages, and steps. before, after: columns of reference and true images."""
    stages = "<th></th>" + ("<th></th>" if before else "")
    for label, group in groupby(columns, key=lambda snapshot: snapshot.label):
        stages += f'<th class="stage apart" colspan="{len(list(group))}">{escape(label)}</th>'
    steps = "<th></th>" + ("<th>before</th>" if before else "")
    for snapshot, gap in zip(columns, gaps, strict=True):
        steps += f"<th{gap}>step {snapshot.step:,}</th>"
    steps += '<th class="apart">from the data</th>' if after else ""
    return f"<tr>{stages}</tr><tr>{steps}</tr>"


def _grid_row(
    prompt: str, cells: Cells, columns: list[SampleSnapshot], gaps: list[str], before: bool, after: bool
) -> str:
    """The images of one prompt; reference and true image are those of its latest sample."""
    snapshot, sample = cells[max(cells)]
    html = f'<th scope="row">{escape(prompt) or "(no prompt)"}</th>'
    if before:
        html += f"<td>{_img(snapshot, sample.get('reference'), f'before the edit: {prompt}')}</td>"
    for i, (column, gap) in enumerate(zip(columns, gaps, strict=True)):
        alt = f"made at {column.label}, step {column.step}: {prompt}"
        html += f"<td{gap}>{_img(column, cells[i][1].get('file'), alt) if i in cells else ''}</td>"
    if after:
        html += f'<td class="apart">{_img(snapshot, sample.get("target"), f"from the data: {prompt}")}</td>'
    return f"<tr>{html}</tr>"


def _answers(snapshots: list[SampleSnapshot]) -> str:
    cards: dict[tuple[str, str], list[tuple[SampleSnapshot, dict[str, Any]]]] = defaultdict(list)
    for snapshot in snapshots:
        for sample in snapshot.samples:
            if sample.get("task") in tasks_of_loss("text"):
                cards[str(sample.get("prompt", "")), str(sample.get("reference", ""))].append((snapshot, sample))
    if not cards:
        return ""
    shown = sorted(cards.items(), key=lambda item: -len(item[1]))[: MAX_ROWS + 1]
    html = "".join(_answer_card(question, image, answers) for (question, image), answers in shown)
    more = f'<p class="note">{len(shown)} of {len(cards)} questions are shown.</p>' if len(cards) > len(shown) else ""
    return f'<div class="answers">{html}</div>{more}'


def _answer_card(question: str, image: str, answers: list[tuple[SampleSnapshot, dict[str, Any]]]) -> str:
    """A question with its image, and those answers that differ from the one before."""
    changes = [b for a, b in zip(answers, answers[1:], strict=False) if _answer(a[1]) != _answer(b[1])]
    lines = []
    for snapshot, sample in _spread([answers[0], *changes], MAX_COLUMNS):
        right = is_right(sample)
        lines.append(
            f'<li><span title="{escape(snapshot.label)}">{escape(snapshot.short)} · {snapshot.step:,}</span>'
            f"<q>{escape(_answer(sample)) or '(nothing)'}</q>{'' if right is None else MARKS[right]}</li>"
        )
    snapshot, sample = answers[-1]
    truth = sample.get("truth")
    truth_line = "" if truth is None else f'<p class="truth">truth: {escape(str(truth))}</p>'
    return (
        f'<div class="card answer">{_img(snapshot, image, f"asked about: {question}")}<div>'
        f"<h3>{escape(question)}</h3><ol>{''.join(lines)}</ol>"
        f"{truth_line}</div></div>"
    )


def is_right(sample: dict[str, Any]) -> bool | None:
    """Whether an answer equals the known one but for case, spaces and a final full stop; None if none is known."""
    truth = sample.get("truth")
    return None if truth is None else _normalized(_answer(sample)) == _normalized(str(truth))


def _answer(sample: dict[str, Any]) -> str:
    return str(sample.get("answer", ""))


def _normalized(text: str) -> str:
    return " ".join(text.casefold().split()).rstrip(".")


def _img(snapshot: SampleSnapshot, name: object, alt: str) -> str:
    path = snapshot.folder / str(name or "")
    # Files outside of the sample's folder are not shown.
    uri = image_uri(path) if name and path.parent == snapshot.folder else None
    return f'<img src="{uri}" alt="{escape(alt)}" width="96" height="96">' if uri else "<span>no image</span>"


def _spread(items: list[Item], limit: int) -> list[Item]:
    """At most `limit` of the items, evenly spread, with the first and the last."""
    if len(items) <= limit:
        return items
    return [items[round(i * (len(items) - 1) / (limit - 1))] for i in range(limit)]
