"""An endpoint that speaks OpenAI's protocol, on this machine: it rates answers, or fails as a test wants it."""

from __future__ import annotations

import contextlib
import json
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from local_server import LocalServer, QuietHandler, running

KEY = "sk-of-a-test-0123456789"


@dataclass(frozen=True)
class Reply:
    """What the endpoint answers; `hangs`: nothing, until the test is over."""

    status: int = 200
    body: str = ""
    headers: dict[str, str] = field(default_factory=dict)
    hangs: bool = False


@dataclass(frozen=True)
class Asked:
    """A request as it came."""

    at: float
    key: str
    body: dict[str, Any]

    @property
    def data(self) -> dict[str, str]:
        """What is to be rated."""
        return dict(json.loads(self.body["messages"][1]["content"]))


def says(text: str) -> Reply:
    """The judge's words, as the protocol wraps them: 100 tokens read, 10 written."""
    message = {"choices": [{"message": {"content": text}}], "usage": {"prompt_tokens": 100, "completion_tokens": 10}}
    return Reply(body=json.dumps(message))


def scores(relevance: int, accuracy: int, fluency: int) -> Reply:
    return says(json.dumps({"relevance": relevance, "accuracy": accuracy, "fluency": fluency}))


def refuses(status: int, message: str, **headers: str) -> Reply:
    return Reply(
        status, json.dumps({"error": {"message": message}}), {k.replace("_", "-"): v for k, v in headers.items()}
    )


class JudgeServer(LocalServer):
    """Answers with `answer(request, number)`; `number` counts all requests from 1."""

    def __init__(self) -> None:
        self.asked: list[Asked] = []
        self.answer: Callable[[Asked, int], Reply] = lambda asked, number: scores(4, 4, 4)
        self._lock = threading.Lock()
        judge = self

        class Handler(QuietHandler):
            protocol_version = "HTTP/1.1"

            def do_POST(self) -> None:
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                asked = Asked(time.monotonic(), self.headers.get("Authorization", "").removeprefix("Bearer "), body)
                with judge._lock:
                    judge.asked.append(asked)
                    number = len(judge.asked)
                found = self.path == "/v1/chat/completions"
                reply = judge.answer(asked, number) if found else refuses(404, f"no {self.path}")
                if reply.hangs:
                    judge.over.wait()
                    return
                content = reply.body.encode()
                with contextlib.suppress(OSError):  # who asked may have gone
                    self.send_response(reply.status)
                    for name, value in {**reply.headers, "Content-Length": str(len(content))}.items():
                        self.send_header(name, value)
                    self.end_headers()
                    self.wfile.write(content)

        super().__init__(Handler)
        self.url = f"http://{self.host}/v1"


def judge_server() -> contextlib.AbstractContextManager[JudgeServer]:
    return running(JudgeServer())
