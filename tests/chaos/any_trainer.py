"""The trainer of a chaos host: the stub where the first job's model is a stub's, else the one with Unsloth.

So one worker runs both kinds: a trainer is kept for jobs of the same base model alone. The one with Unsloth beats as
the stub does, see tests/stub_trainer.py: a line in LORAQ_BEATS every 0.05 s as long as a job lasts, the model's loading
(step 0) included.
"""

from __future__ import annotations

import itertools
import json
import os
import runpy
import signal
import sys
import threading
import time
from pathlib import Path
from typing import Any

STUB = Path(__file__).parents[1] / "stub_trainer.py"
BEAT_S = 0.05


class Beats(threading.Thread):
    """Beats as long as a job lasts."""

    def __init__(self, job_id: str) -> None:
        super().__init__(daemon=True)
        self._file = Path(os.environ["LORAQ_BEATS"]) / job_id
        self._over = threading.Event()
        self.step = 0

    def run(self) -> None:
        while not self._over.wait(BEAT_S):
            with self._file.open("a") as file:
                file.write(f"{os.getpid()} {time.time():.3f} {self.step}\n")

    def end(self) -> None:
        self._over.set()
        self.join()


def become_unsloth(first: str) -> None:
    """loraq's trainer, which has read its first request already."""
    from gpu_worker.trainer import child

    open_channels, work = child._channels, child._run

    def channels() -> tuple[Any, child.Emit]:
        requests, emit = open_channels()
        return itertools.chain([first.encode()], requests), emit

    def run(request: Any, emit: child.Emit) -> Any:
        beats = Beats(request.job_id)

        def heard(event: Any) -> None:
            if getattr(event, "phase", "") == "train":
                beats.step = event.step + 1
            emit(event)

        beats.start()
        try:
            return work(request, heard)
        finally:
            beats.end()

    child._channels, child._run = channels, run
    child.main()


def main() -> None:
    signal.signal(signal.SIGUSR1, signal.SIG_IGN)
    first = sys.stdin.readline()
    if not first:
        return
    if json.loads(first)["spec"]["base_model"].startswith("/stub/"):
        sys.stdin = itertools.chain([first], sys.stdin)  # type: ignore[assignment]
        runpy.run_path(str(STUB), run_name="__main__")
    else:
        become_unsloth(first)


if __name__ == "__main__":
    main()
