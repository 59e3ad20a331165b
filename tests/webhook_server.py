"""An endpoint on this machine that is told of a batch's end, or fails as a test wants it."""

from __future__ import annotations

import contextlib
import json
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any


@dataclass(frozen=True)
class Answer:
    """`hangs`: nothing is answered until the test is over; `drips`: a header without end, byte by byte."""

    status: int = 200
    headers: dict[str, str] = field(default_factory=dict)
    hangs: bool = False
    drips: bool = False


@dataclass(frozen=True)
class Heard:
    """A request as it came."""

    path: str
    key: str
    body: dict[str, Any]


class WebhookServer:
    """Answers with `answer(number)`; `number` counts all requests from 1."""

    def __init__(self) -> None:
        self.heard: list[Heard] = []
        self.answer: Callable[[int], Answer] = lambda number: Answer()
        self.over = threading.Event()
        hook = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                hook.heard.append(Heard(self.path, self.headers["Idempotency-Key"], body))
                reply = hook.answer(len(hook.heard))
                with contextlib.suppress(OSError):  # who told may have gone
                    if reply.drips:
                        self.wfile.write(b"HTTP/1.1 200 OK\r\nX-Long: ")
                        while not hook.over.wait(0.05):
                            self.wfile.write(b"x")
                    if reply.hangs:
                        hook.over.wait()
                        return
                    self.send_response(reply.status)
                    for name, value in reply.headers.items():
                        self.send_header(name, value)
                    self.end_headers()

            do_GET = do_POST  # what a followed redirect would become

            def log_message(self, *_: object) -> None:
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.host = f"127.0.0.1:{self._server.server_address[1]}"
        self.url = f"http://{self.host}/hooks/s3cret"

    def serve(self) -> None:
        self._server.serve_forever(poll_interval=0.05)

    def close(self) -> None:
        self.over.set()
        self._server.shutdown()
        self._server.server_close()


@contextlib.contextmanager
def webhook_server() -> Iterator[WebhookServer]:
    server = WebhookServer()
    thread = threading.Thread(target=server.serve)
    thread.start()
    try:
        yield server
    finally:
        server.close()
        thread.join()
