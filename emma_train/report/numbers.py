"""Numbers of a report: read from JSON, and written in a few digits."""

import math
from typing import Any

from emma_train.monitor.progress import si


def as_number(value: Any) -> float | None:
    """A number as float; None for anything else, booleans too."""
    return float(value) if isinstance(value, int | float) and not isinstance(value, bool) else None


def short_number(value: float, num_digits: int = 3) -> str:
    """A value in a few digits: "0.0312", "1e-4", "12.3k"."""
    if not math.isfinite(value):
        return str(value)
    if value and abs(value) < 1e-3:
        mantissa, exponent = f"{value:.{num_digits - 2}e}".split("e")
        return f"{mantissa.removesuffix('.' + '0' * (num_digits - 2))}e{int(exponent)}"
    return si(value, num_digits)
