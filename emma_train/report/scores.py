"""Scores of a report as bars."""

import base64
import io
import math
from html import escape
from pathlib import Path
from typing import Any

from PIL import Image

from emma_train.report.numbers import as_number, short_number

SUMMARIES = ("all", "both")
"""Metrics that sum up the facts of a prompt or an edit; the others of their tasks are folded away."""


def scores_html(scores: list[dict[str, Any]]) -> str:
    """Scores as bars, single facts of images below in a part that opens. Keys of a score: name, value; optional: split,
    bar, baseline, higher_is_better, unit, stderr, num, metric."""
    facts = [score for score in scores if _is_fact(score)]
    folded = f"<details><summary>Each fact of generated images</summary>{_bars_html(facts)}</details>" if facts else ""
    key = (
        '<p class="key"><span>▼ the bar to reach</span>'
        "<span>❘ the baseline: what chance or a trivial answer gets</span></p>"
    )
    return f"{_bars_html([score for score in scores if not _is_fact(score)])}{key}{folded}"


def _is_fact(score: dict[str, Any]) -> bool:
    return str(score.get("name", "")).startswith(("image, ", "edit, ")) and score.get("metric") not in SUMMARIES


def _bars_html(scores: list[dict[str, Any]]) -> str:
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
            verdict = f'<span class="ok">✓ reaches {short_number(bar)}</span>'
        else:
            verdict = f'<span class="bad">✗ misses {short_number(bar)}</span>'
        if baseline is not None:
            verdict += f"{' · ' if verdict else ''}baseline {short_number(baseline)}"
        unit = f"<p>{escape(str(score['unit']))}</p>" if score.get("unit") else ""
        unit += _error_html(score)
        rows.append(
            f'<div class="score"><div><h3>{escape(str(score.get("name", "?")))}</h3>'
            f"<p>{escape(' · '.join(filter(None, notes)))}</p></div>"
            f'<div class="gauge">{score_bar(value, bar, baseline, higher)}<p>{verdict}</p></div>'
            f'<div class="value"><b>{short_number(value)}</b>{unit}</div></div>'
        )
    return f'<div class="card scores">{"".join(rows)}</div>'


def _error_html(score: dict[str, Any]) -> str:
    """Standard error and number of items, where the score has them."""
    stderr, num = as_number(score.get("stderr")), as_number(score.get("num"))
    parts = ["" if stderr is None else f"± {short_number(stderr)}", "" if num is None else f"n {num:,.0f}"]
    return f"<p>{escape(' · '.join(filter(None, parts)))}</p>" if any(parts) else ""


def sheet_html(sheet: Path) -> str:
    """The contact sheet of an evaluation, smaller, in the page itself; empty if it cannot be read."""
    try:
        image = Image.open(sheet).convert("RGB")
    except (OSError, ValueError):
        return ""
    buffer = io.BytesIO()
    image.save(buffer, "WEBP", quality=80)
    data = base64.b64encode(buffer.getvalue()).decode()
    text = "Images of the evaluation with their prompts"
    return f'<div class="card image-grid"><img class="sheet" alt="{text}" src="data:image/webp;base64,{data}"></div>'


def score_bar(value: float, bar: float | None, baseline: float | None, higher_is_better: bool) -> str:
    """One score as a bar, with a mark for the value to reach (`bar`) and one for the baseline."""
    known = [v for v in (value, bar, baseline) if v is not None and math.isfinite(v)]
    top = 1.0 if higher_is_better and max(known, default=0.0) <= 1 else (max(known, default=1.0) * 1.12 or 1.0)

    def at(v: float) -> str:
        return f"{100 * min(max(v / top, 0.0), 1.0):.2f}%"

    state = "plain" if bar is None else "met" if reaches(value, bar, higher_is_better) else "missed"
    marks = f'<i class="base" style="left:{at(baseline)}"></i>' if baseline is not None else ""
    marks += f'<i class="goal" style="left:{at(bar)}"></i>' if bar is not None else ""
    width = at(value) if math.isfinite(value) else "0"
    return f'<div class="track {state}"><b style="width:{width}"></b>{marks}</div>'


def reaches(value: float, bar: float, higher_is_better: bool) -> bool:
    """Whether a score meets its bar; a value that is not finite does not."""
    return value >= bar if higher_is_better else value <= bar
