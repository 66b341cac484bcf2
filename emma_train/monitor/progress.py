"""Progress of a stage: a live bar on a terminal, a log line now and then elsewhere."""

import logging
import time
from collections.abc import Mapping

from rich.console import Console
from rich.progress import BarColumn, TextColumn
from rich.progress import Progress as RichProgress

from emma_train.monitor.console import stderr_console

log = logging.getLogger(__name__)


class Progress:
    """The progress of one stage; only rank 0 has one.

    On a terminal, a bar on the console that log lines are printed to as well (monitor/console.py). Elsewhere, a log
    line at the first and last step, and when `every_steps` steps or `every_seconds` seconds have passed since the
    last line, whichever is first.
    """

    def __init__(
        self,
        stage: str,
        total: int,
        start_step: int = 0,
        console: Console | None = None,
        every_steps: int = 100,
        every_seconds: float = 30.0,
    ) -> None:
        self.stage = stage
        self.total = total
        self._start_step = start_step
        self._start_time = time.monotonic()
        self._every_steps = every_steps
        self._every_seconds = every_seconds
        self._logged_step: int | None = None
        self._logged_time = self._start_time
        self._detail = ""
        console = console or stderr_console()
        self._live: RichProgress | None = None
        if console.is_terminal:
            self._live = RichProgress(
                TextColumn("[bold]{task.description}"),
                BarColumn(bar_width=None),
                TextColumn("{task.completed}/{task.total}"),
                TextColumn("[dim]{task.fields[detail]}"),
                console=console,
                expand=True,
            )
            self._task = self._live.add_task(stage, total=total, completed=start_step, detail="")
            self._live.start()

    def update(self, step: int, values: Mapping[str, float | int | str] | None = None) -> None:
        """`step` steps are done. values: the metrics of this step where it is logged; else the last ones stay."""
        if values:
            self._detail = loss_and_speed(values)
        detail = "  ".join(filter(None, [self._detail, f"eta {duration(self._eta(step))}"]))
        if self._live is not None:
            self._live.update(self._task, completed=step, detail=detail)
        elif self._is_due(step):
            self._logged_step, self._logged_time = step, time.monotonic()
            log.info("%s  step %d/%d  %s", self.stage, step, self.total, detail)

    def close(self) -> None:
        """Stop the live bar, which stays on the terminal as it is. May be called twice."""
        if self._live is not None:
            self._live.stop()

    def _eta(self, step: int) -> float | None:
        num_steps = step - self._start_step  # steps before a resume took no time of this process
        if num_steps <= 0:
            return None
        return (time.monotonic() - self._start_time) / num_steps * (self.total - step)

    def _is_due(self, step: int) -> bool:
        if self._logged_step is None or step >= self.total:
            return step != self._logged_step
        seconds = time.monotonic() - self._logged_time
        return step - self._logged_step >= self._every_steps or seconds >= self._every_seconds


def loss_and_speed(values: Mapping[str, float | int | str]) -> str:
    """The metrics of a step that the bar shows."""
    parts = []
    loss, tokens = values.get("loss"), values.get("tokens_per_s")
    if isinstance(loss, int | float):
        parts.append(f"loss {loss:.4g}")
    if isinstance(tokens, int | float):
        parts.append(f"{si(tokens)} tokens/s")
    return "  ".join(parts)


def si(value: float, num_digits: int = 3) -> str:
    """A number with a few digits and an SI prefix: 12345 -> "12.3k"."""
    for size, prefix in ((1e15, "P"), (1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= size * 0.9995:
            return f"{value / size:.{num_digits}g}{prefix}"
    return f"{value:.{num_digits}g}"


def duration(seconds: float | None) -> str:
    """Seconds as "0:42", "12:05", "3:07:00" or "2 d 03:00"; "?" for None."""
    if seconds is None or not seconds < float("inf"):
        return "?"
    minutes, second = divmod(max(0, round(seconds)), 60)
    hours, minute = divmod(minutes, 60)
    days, hour = divmod(hours, 24)
    if days:
        return f"{days} d {hour:02}:{minute:02}"
    return f"{hours}:{minute:02}:{second:02}" if hours else f"{minute}:{second:02}"
