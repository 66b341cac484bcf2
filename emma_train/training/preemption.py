"""Stopping on a signal: finish the step, save, exit 75. A second signal, or too long a save, exits at once."""

import contextlib
import logging
import os
import select
import signal
import threading
import time
from types import TracebackType

log = logging.getLogger(__name__)
SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)
EXIT_PREEMPTED = 75
_END = b"\0"
"""Ends the watcher; no signal has this number."""
SAME_REQUEST_S = 5.0
"""A cluster and torchrun often both forward one request: a signal this soon after the first is not a second request."""


class StopRequest:
    """Set by SIGTERM, SIGUSR1 or SIGINT inside its `with` block. The loop shares it with all ranks at the next step.

    A separate thread watches the signals, so that a second signal or the deadline ends the process even while the
    training thread waits for another rank or for storage.
    """

    def __init__(self) -> None:
        self.asked = False
        self.within_s = 240.0
        """Seconds from the first request after which the process ends in any case."""

    def __enter__(self) -> "StopRequest":
        self._signals, written = os.pipe()
        os.set_blocking(written, False)
        self._written, self._written_before = written, signal.set_wakeup_fd(written, warn_on_full_buffer=False)
        # The wake-up file gets the signal number. The handlers only prevent the default action, which ends the process.
        self._before = {number: signal.signal(number, lambda *_: None) for number in SIGNALS}
        self._watcher = threading.Thread(target=self._watch, name="signals", daemon=True)
        self._watcher.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        signal.set_wakeup_fd(self._written_before)
        # Closing the pipe would not do: forked loader workers have it open too, and one of them may still live.
        os.write(self._written, _END)
        self._watcher.join()
        os.close(self._written)
        os.close(self._signals)

    def _watch(self) -> None:
        asked_at = 0.0
        while True:
            left_s = max(0.0, asked_at + self.within_s - time.monotonic()) if self.asked else None
            if not select.select([self._signals], [], [], left_s)[0]:
                _exit_now(f"no checkpoint within {self.within_s:g} s (train.stop_within_s): ending with the one before")
            numbers = os.read(self._signals, 64)
            if _END[0] in numbers:
                return
            asked = [number for number in numbers if number in SIGNALS]
            if asked and not self.asked:
                self.asked, asked_at = True, time.monotonic()
                name = signal.Signals(asked[0]).name
                log.warning("%s: stopping after this step, with a checkpoint; once more stops at once", name)
            elif asked and time.monotonic() - asked_at > SAME_REQUEST_S:
                _exit_now(f"{signal.Signals(asked[0]).name} again: stopping at once, with the checkpoint before")


def _exit_now(reason: str) -> None:
    log.error(reason)
    logging.shutdown()
    os._exit(EXIT_PREEMPTED)


def _detach_worker() -> None:
    """In a forked loader worker: a signal to the worker must not wake the trainer's watcher."""
    with contextlib.suppress(ValueError):
        signal.set_wakeup_fd(-1)


os.register_at_fork(after_in_child=_detach_worker)
