"""A chat model on loopback, behind OpenAI's API, whose answers and faults a test decides.

with chat_server(lambda question: "yes") as server:      # a text is a completion
with chat_server(lambda question: Fault(status=503)):    # anything else that a server may do
"""

import base64
import json
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any


@dataclass
class Question:
    """What the server was asked."""

    number: int
    """From 1."""
    body: dict[str, Any]
    headers: dict[str, str]
    path: str

    @property
    def text(self) -> str:
        """Texts of the first user message."""
        return "\n".join(part["text"] for part in self._user["content"] if part["type"] == "text")

    @property
    def images(self) -> list[bytes]:
        """Images of the first user message."""
        urls = [part["image_url"]["url"] for part in self._user["content"] if part["type"] == "image_url"]
        return [base64.b64decode(url.partition(",")[2]) for url in urls]

    @property
    def _user(self) -> dict[str, Any]:
        return next(message for message in self.body["messages"] if message["role"] == "user")


@dataclass
class Fault:
    """An answer that is no plain completion."""

    status: int = 200
    body: bytes = b""
    headers: dict[str, str] = field(default_factory=dict)
    stall_s: float = 0
    """Before the answer."""
    cut: bool = False
    """Close the connection after half of the body."""
    trickle_s: float = 0
    """Between two bytes of the body."""


def completion(text: object, finish_reason: str = "stop", **message: object) -> bytes:
    """The body of a chat completion."""
    choice = {"index": 0, "finish_reason": finish_reason, "message": {"role": "assistant", "content": text, **message}}
    return json.dumps({"object": "chat.completion", "choices": [choice]}).encode()


Answer = Callable[[Question], str | Fault]


class ChatServer:
    def __init__(self, answer: Answer) -> None:
        self.questions: list[Question] = []
        self.times: list[float] = []
        """Of the questions' arrival, by the monotonic clock."""
        self.most_at_once = 0
        self._at_once, self._lock = 0, threading.Lock()
        server = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_POST(self) -> None:
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                with server._lock:
                    question = Question(len(server.questions) + 1, body, dict(self.headers), self.path)
                    server.questions.append(question)
                    server.times.append(time.monotonic())
                    server._at_once += 1
                    server.most_at_once = max(server.most_at_once, server._at_once)
                try:
                    self.send(answer(question))
                except (BrokenPipeError, ConnectionResetError):
                    self.close_connection = True  # the client did not wait
                finally:
                    with server._lock:
                        server._at_once -= 1

            def send(self, reaction: str | Fault) -> None:
                fault = Fault(body=completion(reaction)) if isinstance(reaction, str) else reaction
                time.sleep(fault.stall_s)
                self.send_response(fault.status)
                for name, value in fault.headers.items():
                    self.send_header(name, value)
                self.send_header("Content-Length", str(len(fault.body)))
                self.end_headers()
                if fault.trickle_s:
                    for i in range(len(fault.body)):
                        self.wfile.write(fault.body[i : i + 1])
                        self.wfile.flush()
                        time.sleep(fault.trickle_s)
                    return
                self.wfile.write(fault.body[: len(fault.body) // 2] if fault.cut else fault.body)
                self.wfile.flush()
                if fault.cut:
                    self.close_connection = True
                    self.connection.close()

            def log_message(self, *words: object) -> None:
                pass

        self.http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.http.daemon_threads = True
        self.url = f"http://127.0.0.1:{self.http.server_address[1]}/v1"


@contextmanager
def chat_server(answer: Answer) -> Iterator[ChatServer]:
    """A server while the block runs."""
    server = ChatServer(answer)
    thread = threading.Thread(target=server.http.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
    thread.start()
    try:
        yield server
    finally:
        server.http.shutdown()
        server.http.server_close()
        thread.join()
