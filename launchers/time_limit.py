"""Time limits as sbatch takes them."""

import re

from emma_train.errors import UserError

FORMS = "minutes, minutes:seconds, hours:minutes:seconds, days-hours, days-hours:minutes or days-hours:minutes:seconds"


def limit_seconds(text: str) -> float:
    """Seconds of a time limit; infinite for UNLIMITED and INFINITE, and for 0, which SLURM takes as no limit.

    Raises UserError on a text that is none of SLURM's forms.
    """
    if text.upper() in ("UNLIMITED", "INFINITE"):
        return float("inf")
    match = re.fullmatch(r"(?:(\d+)-)?(\d+)(?::(\d+))?(?::(\d+))?", text)
    if match is None:
        raise UserError(f"launch: --time is {text!r}; write {FORMS}")
    days, *numbers = match.groups()
    parts = [int(number) for number in numbers if number is not None]
    # With days the first number is hours. Without, one or two numbers begin with minutes and three with hours.
    first_is_hours = days is not None or len(parts) == 3
    hours, minutes, seconds = (parts if first_is_hours else [0, *parts]) + [0] * (3 - len(parts) - (not first_is_hours))
    return float((int(days or 0) * 24 + hours) * 3600 + minutes * 60 + seconds) or float("inf")


def check_grace(text: str, grace_s: int) -> None:
    """Raise UserError where a job would be told to stop as soon as it starts."""
    limit = limit_seconds(text)
    if grace_s >= limit:
        raise UserError(
            f"launch: --time {text} is {limit:g} s, and the run is to stop {grace_s} s before (--grace-s): it would "
            "never train; raise --time or lower --grace-s"
        )
