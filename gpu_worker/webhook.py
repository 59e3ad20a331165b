"""One word to somebody outside, by HTTP or by a command, which has so much time and may not be trusted to answer."""

from __future__ import annotations

import contextlib
import http.client
import json
import os
import shlex
import signal
import subprocess
import tempfile
import threading
from collections.abc import Mapping
from concurrent.futures import Future
from typing import Any
from urllib.error import HTTPError, URLError
from urllib.request import HTTPRedirectHandler, Request, build_opener

ANSWER_S = 10.0  # until an endpoint has answered
COMMAND_S = 60.0
SOON = (408, 425, 429)  # statuses that pass, as those from 500 on
LONGEST_WAIT_S = 3600.0  # that an endpoint may ask for
MOST_QUOTED = 200  # characters of what a command has said


class UndeliveredError(Exception):
    """It did not get through.

    `again`: it may, later; `after_s`: in so many seconds, by the endpoint's word. The message never has the URL.
    """

    def __init__(self, message: str, *, again: bool, after_s: float = 0.0) -> None:
        super().__init__(message)
        self.again, self.after_s = again, after_s


class _NoRedirect(HTTPRedirectHandler):
    """What is told goes where the operator allows it, and nowhere else."""

    def redirect_request(self, *_: Any) -> None:
        return None


def post(url: str, payload: Mapping[str, Any], key: str) -> None:
    """Sends the payload; `key` is the same whenever the same is sent again. Raises UndeliveredError."""
    headers = {"Content-Type": "application/json", "User-Agent": "loraq", "Idempotency-Key": key}
    request = Request(url, json.dumps(payload).encode(), headers, method="POST")
    done: Future[None] = Future()

    def send() -> None:
        try:
            with build_opener(_NoRedirect).open(request, timeout=ANSWER_S):
                done.set_result(None)
        except BaseException as error:
            done.set_exception(error)

    # The timeout of a socket begins anew with each byte: in a thread, which can be given up.
    threading.Thread(target=send, name="webhook", daemon=True).start()
    try:
        done.result(ANSWER_S + 1)
    except HTTPError as error:
        error.close()
        raise _refusal(error) from None
    except TimeoutError:
        raise UndeliveredError(f"no answer within {ANSWER_S:g} s", again=True) from None
    except (URLError, OSError, http.client.HTTPException) as error:
        why = error.reason if isinstance(error, URLError) else error
        said = (why.strerror if isinstance(why, OSError) else "") or type(why).__name__
        raise UndeliveredError(f"it cannot be reached: {said}", again=True) from None


def _refusal(error: HTTPError) -> UndeliveredError:
    said = f"it answered {error.code} {http.client.responses.get(error.code, '')}".rstrip()
    if 300 <= error.code < 400:
        return UndeliveredError(f"{said}, and is not followed: name the address that it leads to", again=False)
    after = error.headers.get("Retry-After", "")
    after_s = min(float(after), LONGEST_WAIT_S) if after.isdecimal() else 0.0
    return UndeliveredError(said, again=error.code in SOON or error.code >= 500, after_s=after_s)


def run(command: str, payload: Mapping[str, Any]) -> None:
    """Runs the operator's command, with the payload on its standard input. Raises UndeliveredError."""
    text = json.dumps(payload)
    ours = {"LORAQ_BATCH": payload["batch"], "LORAQ_BATCH_STATE": payload["state"], "LORAQ_BATCH_JSON": text}
    with tempfile.TemporaryFile() as stdin, tempfile.TemporaryFile() as output:  # files: nobody waits for a pipe
        stdin.write(text.encode())
        stdin.seek(0)
        environment = {**os.environ, **ours}
        try:
            process = subprocess.Popen(
                shlex.split(command),
                stdin=stdin,
                stdout=output,
                stderr=output,
                env=environment,
                start_new_session=True,
            )
        except OSError as error:
            raise UndeliveredError(f"it cannot be started: {error.strerror}", again=True) from None
        try:
            code = process.wait(COMMAND_S)
        except subprocess.TimeoutExpired:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            raise UndeliveredError(f"it did not end within {COMMAND_S:g} s", again=True) from None
        if code:
            output.seek(0)
            last = output.read().decode(errors="replace").strip().rpartition("\n")[2][:MOST_QUOTED]
            raise UndeliveredError(f"it ended with {code}" + (f": {last}" if last else ""), again=True)
