"""When requests may start: not more often than a rate, and not before a time that the server named."""

import threading
import time


class Pace:
    """Shared by threads. Requests start at equal distances, so that a rate per minute is no burst each minute."""

    def __init__(self, per_minute: float = 0) -> None:
        """`per_minute` 0: no limit."""
        self._distance_s = 60 / per_minute if per_minute else 0.0
        self._next = 0.0
        """Time of the monotonic clock before which no request starts."""
        self._lock = threading.Lock()

    def wait(self) -> None:
        """Return when a request may start."""
        while (delay := self._reserve()) > 0:
            time.sleep(delay)

    def pause(self, seconds: float) -> None:
        """Let no request start for this time."""
        with self._lock:
            self._next = max(self._next, time.monotonic() + seconds)

    def _reserve(self) -> float:
        """0 if a request may start now, else the seconds until another look."""
        with self._lock:
            now = time.monotonic()
            if now < self._next:
                return self._next - now
            self._next = now + self._distance_s
            return 0.0
