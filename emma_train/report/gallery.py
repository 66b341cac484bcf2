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
    rows: dict[tuple[str, str], dict[int, tuple[SampleSnapshot, dict[str, Any]]]] = defaultdict(dict)
    for i, snapshot in enumerate(columns):
        for sample in snapshot.samples:
            if sample.get("task") == task.name:
                rows[str(sample.get("prompt", "")), str(sample.get("file", ""))][i] = (snapshot, sample)
    # Prompts with most images first: they show how the model changes.
    shown = sorted(rows.items(), key=lambda item: -len(item[1]))[:MAX_ROWS]
    latest = [cells[max(cells)] for _, cells in shown]
    before = any(s.get("reference") for _, s in latest)
    after = any(s.get("target") for _, s in latest)

    is_new = [i == 0 or columns[i - 1].label != snapshot.label for i, snapshot in enumerate(columns)]
    gap = [' class="apart"' if new else "" for new in is_new]
    stages = "<th></th>" + ("<th></th>" if before else "")
    for label, group in groupby(columns, key=lambda snapshot: snapshot.label):
        stages += f'<th class="stage apart" colspan="{len(list(group))}">{escape(label)}</th>'
    steps = "<th></th>" + ("<th>before</th>" if before else "")
    for snapshot, apart in zip(columns, gap, strict=True):
        steps += f"<th{apart}>step {snapshot.step:,}</th>"
    steps += '<th class="apart">from the data</th>' if after else ""

    body = []
    for ((prompt, _), cells), (snapshot, sample) in zip(shown, latest, strict=True):
        line = f'<th scope="row">{escape(prompt) or "(no prompt)"}</th>'
        if before:
            line += f"<td>{_img(snapshot, sample.get('reference'), f'before the edit: {prompt}')}</td>"
        for i, column in enumerate(columns):
            alt = f"made at {column.label}, step {column.step}: {prompt}"
            line += f"<td{gap[i]}>{_img(column, cells[i][1].get('file'), alt) if i in cells else ''}</td>"
        if after:
            line += f'<td class="apart">{_img(snapshot, sample.get("target"), f"from the data: {prompt}")}</td>'
        body.append(f"<tr>{line}</tr>")
    more = f'<p class="note">{len(shown)} of {len(rows)} prompts are shown.</p>' if len(rows) > len(shown) else ""
    return (
        f'<div class="card image-grid" tabindex="0" role="region" aria-label="{escape(task.heading)}">'
        f"<h3>{escape(task.heading)}</h3><table><thead><tr>{stages}</tr><tr>{steps}</tr></thead>"
        f"<tbody>{''.join(body)}</tbody></table>{more}</div>"
    )


def _answers(snapshots: list[SampleSnapshot]) -> str:
    cards: dict[tuple[str, str], list[tuple[SampleSnapshot, dict[str, Any]]]] = defaultdict(list)
    for snapshot in snapshots:
        for sample in snapshot.samples:
            if sample.get("task") in tasks_of_loss("text"):
                cards[str(sample.get("prompt", "")), str(sample.get("reference", ""))].append((snapshot, sample))
    if not cards:
        return ""
    shown = sorted(cards.items(), key=lambda item: -len(item[1]))[: MAX_ROWS + 1]
    html = []
    for (question, image), answers in shown:
        lines = []
        changes = [b for a, b in zip(answers, answers[1:], strict=False) if _answer(a[1]) != _answer(b[1])]
        for snapshot, sample in _spread([answers[0], *changes], MAX_COLUMNS):
            right = is_right(sample)
            mark = "" if right is None else MARKS[right]
            lines.append(
                f'<li><span title="{escape(snapshot.label)}">{escape(snapshot.short)} · {snapshot.step:,}</span>'
                f"<q>{escape(_answer(sample)) or '(nothing)'}</q>{mark}</li>"
            )
        snapshot, sample = answers[-1]
        truth = sample.get("truth")
        truth_line = "" if truth is None else f'<p class="truth">truth: {escape(str(truth))}</p>'
        html.append(
            f'<div class="card answer">{_img(snapshot, image, f"asked about: {question}")}<div>'
            f"<h3>{escape(question)}</h3><ol>{''.join(lines)}</ol>"
            f"{truth_line}</div></div>"
        )
    more = f'<p class="note">{len(shown)} of {len(cards)} questions are shown.</p>' if len(cards) > len(shown) else ""
    return f'<div class="answers">{"".join(html)}</div>{more}'


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
