"""The shards' HTTP store, which can answer slowly, not at all, or with a bit that has flipped."""

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler
from pathlib import Path

from tests.servers import FileServer

LONGEST_S = 300.0
"""A request waits no longer than this for a store that hangs."""


class FaultyStore(FileServer):
    """Serves a folder. Its faults are switched on and off while it runs."""

    def __init__(self, folder: Path, host: str) -> None:
        super().__init__(folder, host=host)
        self.http.handle_error = lambda request, address: None  # the client was killed, or its network is cut
        self.delay_s = 0.0
        """Wait before each answer."""
        self.hanging: str | None = None
        """Clients whose address begins with this get no answer; None: all get one."""
        self.flips_left = 0
        """So many of the next answers of shards have a flipped bit, but none that had one before: what is read again
        must be right."""
        self._flipped: set[str] = set()
        self.errors_left = 0
        """So many of the next answers are 503."""

    def answer(self, request: BaseHTTPRequestHandler, fault: str, wanted: str = "") -> None:
        time.sleep(self.delay_s)
        begun = time.monotonic()
        while self.hanging is not None and request.client_address[0].startswith(self.hanging):
            if time.monotonic() - begun > LONGEST_S:
                break
            time.sleep(0.1)
        with self.lock:
            if self.errors_left:
                self.errors_left -= 1
                fault = "503"
            elif self.flips_left and request.path.endswith(".tar") and f"{request.path} {wanted}" not in self._flipped:
                self.flips_left -= 1
                self._flipped.add(f"{request.path} {wanted}")
                fault = "flip"
        super().answer(request, fault, wanted)


@contextmanager
def faulty_store(folder: Path, host: str) -> Iterator[FaultyStore]:
    """A store while the block runs."""
    store = FaultyStore(folder, host)
    thread = threading.Thread(target=store.http.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True)
    thread.start()
    try:
        yield store
    finally:
        store.hanging = None
        store.http.shutdown()
        store.http.server_close()
