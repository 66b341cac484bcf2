"""The progress of a job: a bar on a terminal, a log line every ten seconds elsewhere."""

import logging
import time
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

log = logging.getLogger(__name__)
LOG_EVERY_S = 10.0


class JobProgress:
    """Shards (or what `unit` names) done, records per second, rejects and the time that is left."""

    def __init__(self, title: str, num_units: int, console: Console | None = None, unit: str = "shards") -> None:
        self.title, self.num_units, self.unit = title, num_units, unit
        self.units = self.records = self.rejected = 0
        self._start = self._logged = time.monotonic()
        self._console = console or Console(stderr=True)
        self._bar = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[rate]:,.0f} records/s, {task.fields[rejected]:,} rejected"),
            TimeRemainingColumn(),
            console=self._console,
        )
        self._task = self._bar.add_task(title, total=num_units, rate=0.0, rejected=0)

    def __enter__(self) -> "JobProgress":
        if self._console.is_terminal and self.num_units:
            self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bar.live.is_started:
            self._bar.stop()

    def advance(self, records: int, rejected: int) -> None:
        """A unit is done."""
        self.units, self.records, self.rejected = self.units + 1, self.records + records, self.rejected + rejected
        now = time.monotonic()
        rate = self.records / max(now - self._start, 1e-9)
        self._bar.update(self._task, completed=self.units, rate=rate, rejected=self.rejected)
        if not self._console.is_terminal and now > self._logged + LOG_EVERY_S:
            self._logged = now
            left = (now - self._start) / self.units * (self.num_units - self.units)
            log.info(
                "%s: %d of %d %s, %.0f records/s, %d rejected, %.0f s left",
                self.title, self.units, self.num_units, self.unit, rate, self.rejected, left,
            )  # fmt: skip
