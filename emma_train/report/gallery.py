"""What the model made and said while it trained: sample images as a film strip, answers as cards, scores as bars."""

import base64
import io
import json
import math
from collections import defaultdict
from dataclasses import dataclass
from html import escape
from itertools import groupby
from pathlib import Path
from typing import Any, TypeVar

from PIL import Image

from emma_train.report.charts import number, reaches, score_bar

T = TypeVar("T")

MAX_IMAGE_PX = 192
MAX_COLUMNS = 6
MAX_ROWS = 8

MARKS = {
    True: '<b class="ok" role="img" aria-label="right">✓</b>',
    False: '<b class="bad" role="img" aria-label="wrong">✗</b>',
}
TASK_TITLES = {"t2i": "Images from text", "it2i": "Edited images", "i2t": "Answers about images"}


@dataclass(frozen=True)
class Moment:
    """The samples of one step. label, short: the stage's names, for the head of a column and the line of an answer."""

    label: str
    short: str
    step: int
    folder: Path
    samples: list[dict[str, Any]]


def read_moments(label: str, short: str, run: Path, missing: list[str]) -> list[Moment]:
    """The sample folders of one stage in the order of steps; what cannot be read goes to `missing`."""
    moments = []
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
            moments.append(Moment(label, short, int(digits), folder, [s for s in samples if isinstance(s, dict)]))
    return moments


def samples_html(moments: list[Moment]) -> str:
    """A film strip for each task that makes images (rows are prompts, columns steps) and cards for answers."""
    return _film("t2i", moments) + _film("it2i", moments) + _answers(moments)


def scores_html(scores: list[dict[str, Any]]) -> str:
    """Scores as bars. A score: name, value, and where known split, bar, baseline, higher_is_better, unit."""
    rows = []
    for score in scores:
        value, bar, baseline = (as_number(score.get(key)) for key in ("value", "bar", "baseline"))
        higher = score.get("higher_is_better", True) is not False
        if value is None:
            value = math.nan
        notes = [str(score.get("split", "")).replace("_", " "), "" if higher else "lower is better"]
        if bar is None:
            verdict = ""
        elif reaches(value, bar, higher):
            verdict = f'<span class="ok">✓ reaches {number(bar)}</span>'
        else:
            verdict = f'<span class="bad">✗ misses {number(bar)}</span>'
        if baseline is not None:
            verdict += f"{' · ' if verdict else ''}baseline {number(baseline)}"
        unit = f"<p>{escape(str(score['unit']))}</p>" if score.get("unit") else ""
        rows.append(
            f'<div class="score"><div><h3>{escape(str(score.get("name", "?")))}</h3>'
            f"<p>{escape(' · '.join(filter(None, notes)))}</p></div>"
            f'<div class="gauge">{score_bar(value, bar, baseline, higher)}<p>{verdict}</p></div>'
            f'<div class="value"><b>{number(value)}</b>{unit}</div></div>'
        )
    return (
        f'<div class="card scores">{"".join(rows)}</div><p class="key"><span>▼ the bar to reach</span>'
        "<span>❘ the baseline: what chance or a trivial answer gets</span></p>"
    )


def as_number(value: Any) -> float | None:
    """A number as float, None for anything else (and for booleans)."""
    return float(value) if isinstance(value, int | float) and not isinstance(value, bool) else None


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


def _film(task: str, moments: list[Moment]) -> str:
    moments = [m for m in moments if any(s.get("task") == task for s in m.samples)]
    if not moments:
        return ""
    columns = _spread(moments, MAX_COLUMNS)
    rows: dict[tuple[str, str], dict[int, tuple[Moment, dict[str, Any]]]] = defaultdict(dict)
    for i, moment in enumerate(columns):
        for sample in moment.samples:
            if sample.get("task") == task:
                rows[str(sample.get("prompt", "")), str(sample.get("file", ""))][i] = (moment, sample)
    # The prompts that were drawn most often first: they show the change.
    shown = sorted(rows.items(), key=lambda item: -len(item[1]))[:MAX_ROWS]
    latest = [cells[max(cells)] for _, cells in shown]
    before = any(s.get("reference") for _, s in latest)
    after = any(s.get("target") for _, s in latest)

    is_new = [i == 0 or columns[i - 1].label != moment.label for i, moment in enumerate(columns)]
    gap = [' class="apart"' if new else "" for new in is_new]
    stages = "<th></th>" + ("<th></th>" if before else "")
    for label, group in groupby(columns, key=lambda moment: moment.label):
        stages += f'<th class="stage apart" colspan="{len(list(group))}">{escape(label)}</th>'
    steps = "<th></th>" + ("<th>before</th>" if before else "")
    for moment, apart in zip(columns, gap, strict=True):
        steps += f"<th{apart}>step {moment.step:,}</th>"
    steps += '<th class="apart">from the data</th>' if after else ""

    body = []
    for ((prompt, _), cells), (moment, sample) in zip(shown, latest, strict=True):
        line = f'<th scope="row">{escape(prompt) or "(no prompt)"}</th>'
        if before:
            line += f"<td>{_img(moment, sample.get('reference'), f'before the edit: {prompt}')}</td>"
        for i, column in enumerate(columns):
            alt = f"made at {column.label}, step {column.step}: {prompt}"
            line += f"<td{gap[i]}>{_img(column, cells[i][1].get('file'), alt) if i in cells else ''}</td>"
        if after:
            line += f'<td class="apart">{_img(moment, sample.get("target"), f"from the data: {prompt}")}</td>'
        body.append(f"<tr>{line}</tr>")
    more = f'<p class="note">{len(shown)} of {len(rows)} prompts are shown.</p>' if len(rows) > len(shown) else ""
    return (
        f'<div class="card film" tabindex="0" role="region" aria-label="{escape(TASK_TITLES[task])}">'
        f"<h3>{escape(TASK_TITLES[task])}</h3><table><thead><tr>{stages}</tr><tr>{steps}</tr></thead>"
        f"<tbody>{''.join(body)}</tbody></table>{more}</div>"
    )


def _answers(moments: list[Moment]) -> str:
    cards: dict[tuple[str, str], list[tuple[Moment, dict[str, Any]]]] = defaultdict(list)
    for moment in moments:
        for sample in moment.samples:
            if sample.get("task") == "i2t":
                cards[str(sample.get("prompt", "")), _image_name(sample)].append((moment, sample))
    if not cards:
        return ""
    shown = sorted(cards.items(), key=lambda item: -len(item[1]))[: MAX_ROWS + 1]
    html = []
    for (question, image), told in shown:
        lines = []
        said = [told[0]] + [b for a, b in zip(told, told[1:], strict=False) if _answer(a[1]) != _answer(b[1])]
        for moment, sample in _spread(said, MAX_COLUMNS):
            right = is_right(sample)
            mark = "" if right is None else MARKS[right]
            lines.append(
                f'<li><span title="{escape(moment.label)}">{escape(moment.short)} · {moment.step:,}</span>'
                f"<q>{escape(_answer(sample)) or '(nothing)'}</q>{mark}</li>"
            )
        moment, sample = told[-1]
        truth = truth_of(sample)
        told_truth = "" if truth is None else f'<p class="truth">truth: {escape(truth)}</p>'
        html.append(
            f'<div class="card answer">{_img(moment, image, f"asked about: {question}")}<div>'
            f"<h3>{escape(question)}</h3><ol>{''.join(lines)}</ol>"
            f"{told_truth}</div></div>"
        )
    more = f'<p class="note">{len(shown)} of {len(cards)} questions are shown.</p>' if len(cards) > len(shown) else ""
    return f'<div class="answers">{"".join(html)}</div>{more}'


def is_right(sample: dict[str, Any]) -> bool | None:
    """Whether an answer is right: as the writer of the sample said, else by equality but for case and space."""
    if isinstance(sample.get("correct"), bool):
        return bool(sample["correct"])
    truth = truth_of(sample)
    return None if truth is None else _plain(_answer(sample)) == _plain(truth)


def truth_of(sample: dict[str, Any]) -> str | None:
    """The true answer of an i2t sample, under `truth` or `target`."""
    truth = sample.get("truth", sample.get("target"))
    return None if truth is None else str(truth)


def _answer(sample: dict[str, Any]) -> str:
    return str(sample.get("answer", ""))


def _plain(text: str) -> str:
    return " ".join(text.casefold().split()).rstrip(".")


def _image_name(sample: dict[str, Any]) -> str:
    return str(sample.get("reference") or sample.get("file") or "")


def _img(moment: Moment, name: object, alt: str) -> str:
    path = moment.folder / str(name or "")
    # A sample names files of its own folder only.
    uri = image_uri(path) if name and path.parent == moment.folder else None
    return f'<img src="{uri}" alt="{escape(alt)}" width="96" height="96">' if uri else "<span>no image</span>"


def _spread(items: list[T], limit: int) -> list[T]:
    """At most `limit` of the items, evenly spread, the first and the last among them."""
    if len(items) <= limit:
        return items
    return [items[round(i * (len(items) - 1) / (limit - 1))] for i in range(limit)]
