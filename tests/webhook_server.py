"""An endpoint on this machine that is told of a batch's end, or fails as a test wants it."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from local_server import LocalServer, QuietHandler, running


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


class WebhookServer(LocalServer):
    """Answers with `answer(number)`; `number` counts all requests from 1."""

    def __init__(self) -> None:
        self.heard: list[Heard] = []
        self.answer: Callable[[int], Answer] = lambda number: Answer()
        hook = self

        class Handler(QuietHandler):
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

        super().__init__(Handler)
        self.url = f"http://{self.host}/hooks/s3cret"


def webhook_server() -> contextlib.AbstractContextManager[WebhookServer]:
    return running(WebhookServer())
