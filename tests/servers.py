"""Servers on loopback for tests of remote files: HTTP with slow, short or failed answers, and S3."""

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlsplit

import fsspec
import pytest

Fault = Callable[[int, str], str]
"""(number of the GET, from 1; path) -> what goes wrong: "" for nothing, a status, slow, short, reset, flip (one
bit) or whole."""


class FileServer:
    """Serves `folder` at `url`; counts the GETs that it answers."""

    def __init__(self, folder: Path, fault: Fault = lambda number, path: "", host: str = "127.0.0.1") -> None:
        self.folder, self.fault = folder, fault
        self.gets: list[str] = []
        """Path and range of each GET."""
        self.slow_s = 1.0
        self.lock = threading.Lock()
        server = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_HEAD(self) -> None:
                server.answer(self, "")

            def do_GET(self) -> None:
                path, wanted = unquote(urlsplit(self.path).path), self.headers.get("Range", "")
                with server.lock:
                    server.gets.append(f"{path} {wanted}".strip())
                    number = len(server.gets)
                server.answer(self, server.fault(number, path), wanted)

            def log_message(self, *words: object) -> None:
                pass

        self.http = ThreadingHTTPServer((host, 0), Handler)
        self.http.daemon_threads = True
        self.url = f"http://{host}:{self.http.server_address[1]}"

    def answer(self, request: BaseHTTPRequestHandler, fault: str, wanted: str = "") -> None:
        path = self.folder / unquote(urlsplit(request.path).path).lstrip("/")
        if fault.isdigit() or not path.is_file():
            request.send_response(int(fault) if fault.isdigit() else 404)
            request.send_header("Content-Length", "0")
            request.end_headers()
            return
        if fault == "slow":
            time.sleep(self.slow_s)
        data, status = path.read_bytes(), 200
        if wanted and fault != "whole":
            first, last = wanted.removeprefix("bytes=").split("-")
            data, status = data[int(first) : int(last) + 1], 206
        if fault == "flip":
            data = data[: len(data) // 2] + bytes([data[len(data) // 2] ^ 1]) + data[len(data) // 2 + 1 :]
        request.send_response(status)
        request.send_header("Content-Length", str(len(data)))
        request.send_header("Accept-Ranges", "bytes")
        request.end_headers()
        if request.command == "HEAD":
            return
        if fault in ("short", "reset"):
            data = data[: len(data) // 2]
        request.wfile.write(data)
        if fault in ("short", "reset"):
            request.wfile.flush()
            request.close_connection = True
            request.connection.close()


@contextmanager
def serving(folder: Path, fault: Fault = lambda number, path: "") -> Iterator[FileServer]:
    """A server while the block runs."""
    server = FileServer(folder, fault)
    thread = threading.Thread(target=server.http.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
    thread.start()
    try:
        yield server
    finally:
        server.http.shutdown()
        server.http.server_close()
        thread.join()


@contextmanager
def s3_serving() -> Iterator[fsspec.AbstractFileSystem]:
    """The file system of s3://, with a bucket of that name, while the block runs; skips where it cannot be."""
    pytest.importorskip("s3fs", reason="pip install 'emma-train[s3]'")
    moto = pytest.importorskip("moto.server", reason="pip install 'moto[s3]' flask flask-cors")
    server = moto.ThreadedMotoServer(port=0)
    server.start()
    try:
        host, port = server.get_host_and_port()
        with pytest.MonkeyPatch.context() as environment:
            environment.setenv("AWS_ACCESS_KEY_ID", "AKIDEXAMPLE")
            environment.setenv("AWS_SECRET_ACCESS_KEY", "topsecret")
            environment.setenv("AWS_ENDPOINT_URL", f"http://{host}:{port}")
            system = fsspec.filesystem("s3", use_listings_cache=False)
            system.makedirs("bucket", exist_ok=True)  # the server's memory outlives it
            yield system
    finally:
        server.stop()
        fsspec.filesystem("s3").clear_instance_cache()
