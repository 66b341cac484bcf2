"""Being asked to stop: finish the step, save, exit 75. A second signal exits at once."""

import logging
import os
import signal
from types import FrameType

log = logging.getLogger(__name__)
SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)
EXIT_PREEMPTED = 75


class StopRequest:
    """Set by SIGTERM, SIGUSR1 or SIGINT. The loop shares it with all ranks at the next step."""

    def __init__(self) -> None:
        self.asked = False
        self._before = {number: signal.getsignal(number) for number in SIGNALS}
        for number in SIGNALS:
            signal.signal(number, self._on_signal)

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        if self.asked:
            os._exit(EXIT_PREEMPTED)
        self.asked = True
        log.warning("%s: stopping after this step, with a checkpoint; once more stops at once", signal.Signals(number).name)

    def restore(self) -> None:
        """Put the former handlers back."""
        for number, handler in self._before.items():
            signal.signal(number, handler)
