"""Compares scores with earlier ones of the same model, as those that are committed beside it."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from emma_train.errors import UserError

TOLERANCE = 0.01
"""How far a score may be from an earlier one on another kind of processor, whose sums end in other digits."""
MOST_SHOWN = 5
Score = Mapping[str, Any]


def read_scores_file(path: Path) -> list[dict[str, Any]]:
    """The scores in a file that `evaluate` wrote. Raises UserError."""
    try:
        scores = json.loads(path.read_text(encoding="utf-8"))["scores"]
        for score in scores:
            float(score["value"]), score["split"], score["name"], score["num"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"--compare {path}: is not a scores.json of emma-train evaluate ({error!r})") from None
    return list(scores)


def compare_scores(scores: Sequence[Score], earlier: Sequence[Score]) -> tuple[str, list[str]]:
    """A line that counts the scores that are equal, and a text for each that is missing, new or elsewhere.

    A score is elsewhere if it differs by more than TOLERANCE and by more than one of its items.
    """
    now, before = _by_name(scores), _by_name(earlier)
    wrong = [f"{name} is missing" for name in before if name not in now]
    wrong += [f"{name} is new" for name in now if name not in before]
    num_equal, largest = 0, 0.0
    for name in now.keys() & before.keys():
        value, wanted = float(now[name]["value"]), float(before[name]["value"])
        num_equal += value == wanted
        largest = max(largest, abs(value - wanted))
        if not abs(value - wanted) <= max(TOLERANCE, 1 / max(before[name]["num"], 1)):
            wrong.append(f"{name} is {value:.4f}, not {wanted:.4f}")
    rest = f"; the others differ by at most {largest:.4f}" if num_equal < len(now) else ""
    return f"{num_equal} of {len(before)} scores are equal to the last digit{rest}", sorted(wrong)


def describe_differences(wrong: Sequence[str], path: Path) -> str:
    """One line about the scores that are not those of a file."""
    more = f" and {len(wrong) - MOST_SHOWN} more" if len(wrong) > MOST_SHOWN else ""
    return f"{len(wrong)} scores are not those of {path}: {'; '.join(wrong[:MOST_SHOWN])}{more}"


def _by_name(scores: Sequence[Score]) -> dict[str, Score]:
    return {f"{score['split']} {score['name']}": score for score in scores}
