"""Being asked to stop: finish the step, save, exit 75. Asked again later, exit at once."""

import logging
import os
import signal
import time
from types import FrameType

log = logging.getLogger(__name__)
SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)
EXIT_PREEMPTED = 75
SAME_REQUEST_S = 5.0
"""A cluster and torchrun often both pass on one request; what comes this soon after the first is no second one."""


class StopRequest:
    """Set by SIGTERM, SIGUSR1 or SIGINT. The loop shares it with all ranks at the next step."""

    def __init__(self) -> None:
        self.asked = False
        self._asked_at = 0.0
        self._before = {number: signal.getsignal(number) for number in SIGNALS}
        for number in SIGNALS:
            signal.signal(number, self._on_signal)

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        if self.asked and time.monotonic() - self._asked_at > SAME_REQUEST_S:
            os._exit(EXIT_PREEMPTED)
        if self.asked:
            return
        self.asked, self._asked_at = True, time.monotonic()
        log.warning(
            "%s: stopping after this step, with a checkpoint; once more stops at once", signal.Signals(number).name
        )

    def restore(self) -> None:
        """Put the former handlers back."""
        for number, handler in self._before.items():
            signal.signal(number, handler)
