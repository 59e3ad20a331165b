"""A trainer process for the tests, spoken to as a worker does, and small jobs for it."""

from __future__ import annotations

import os
import queue
import subprocess
import sys
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from gpu_worker.protocol import EVENTS_FD, Answer, Checkpoint, Event, Failed, Progress, Request, Result, decode
from gpu_worker.trainer.child import ENDS_TRAINER

ROOT = Path(__file__).parents[2]
DEMO = ROOT / "cli" / "demo"
DEADLINE_S = 180.0


class Child:
    """A running trainer. Every wait has a deadline."""

    def __init__(self, folder: Path, **more: str) -> None:
        """`more`: of its environment."""
        self.folder = folder
        self.jobs = self._ended = 0
        self._goes_on = True
        reading, writing = os.pipe()
        environment = {
            **{name: value for name, value in os.environ.items() if not name.startswith("LORAQ_")},
            EVENTS_FD: str(writing),
            "LORAQ_CACHE_DIR": str(folder / "cache"),
            "PYTHONPATH": os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")])),
            "HF_HOME": str(folder / "hub"),
            "HF_HUB_OFFLINE": "1",
            "CUDA_VISIBLE_DEVICES": "",  # these tests are about a CPU
            **more,
        }
        self.log = folder / "log.txt"
        with self.log.open("wb") as log:
            self.process = subprocess.Popen(
                [sys.executable, "-P", "-m", "gpu_worker.trainer.child"],
                stdin=subprocess.PIPE, stdout=log, stderr=log, cwd=folder, env=environment, pass_fds=[writing],
            )  # fmt: skip
        os.close(writing)
        self.events: queue.Queue[Event | None] = queue.Queue()
        threading.Thread(target=self._read, args=(reading,), daemon=True).start()

    def _read(self, descriptor: int) -> None:
        with os.fdopen(descriptor, "rb") as lines:
            for line in lines:
                self.events.put(decode(line))
        self.events.put(None)

    def next_event(self) -> Event | None:
        """The next event; None once the trainer has closed its end."""
        try:
            event = self.events.get(timeout=DEADLINE_S)
        except queue.Empty:
            raise AssertionError(f"no event within {DEADLINE_S} s; the log:\n{self.log.read_text()[-3000:]}") from None
        if isinstance(event, (Result, Failed)):
            self._ended += 1
            self._goes_on = event.goes_on if isinstance(event, Result) else event.reason not in ENDS_TRAINER
        return event

    def rests(self) -> bool:
        """Whether it takes another job: it lives, stays alive, and every job that it was handed was seen to end."""
        return self.process.poll() is None and self._goes_on and self._ended == self.jobs

    def send(
        self,
        spec: dict[str, Any],
        adapter: Path | None = None,
        output: Path | None = None,
        resume: Path | None = None,
        gguf_converter: Path | None = None,
        members: Sequence[Path] = (),
    ) -> Path:
        """Hand it a job; returns the job's output folder."""
        self.jobs += 1
        if output is None:
            output = self.folder / f"job{self.jobs}"
            output.mkdir()
        adapter_, resume_, converter = (str(path) if path else None for path in (adapter, resume, gguf_converter))
        request = Request(
            f"job{self.jobs}", spec, str(output), adapter_, resume_, gguf_converter=converter,
            members=tuple(map(str, members)),
        )  # fmt: skip
        assert self.process.stdin is not None
        self.process.stdin.write(request.line())
        self.process.stdin.flush()
        return output

    def run(
        self,
        spec: dict[str, Any],
        adapter: Path | None = None,
        output: Path | None = None,
        resume: Path | None = None,
        gguf_converter: Path | None = None,
        members: Sequence[Path] = (),
    ) -> Done:
        """Hand it a job and wait for its end."""
        folder = self.send(spec, adapter, output, resume, gguf_converter, members)
        progress: list[Progress] = []
        checkpoints: list[Path] = []
        answers: list[Answer] = []
        while True:
            event = self.next_event()
            assert event is not None, f"the trainer ended; its log:\n{self.log.read_text()[-3000:]}"
            if isinstance(event, Progress):
                progress.append(event)
            elif isinstance(event, Checkpoint):
                checkpoints.append(Path(event.folder))
            elif isinstance(event, Answer):
                answers.append(event)
            elif isinstance(event, (Result, Failed)):
                return Done(event, progress, folder, checkpoints, answers)

    def close(self) -> None:
        self.process.kill()
        self.process.wait(DEADLINE_S)


class Done:
    """How a job ended."""

    def __init__(
        self,
        end: Result | Failed,
        progress: list[Progress],
        folder: Path,
        checkpoints: list[Path],
        answers: list[Answer],
    ) -> None:
        self.end = end
        self.progress = progress
        self.folder = folder
        self.checkpoints = checkpoints
        self.answers = answers

    @property
    def outcome(self) -> dict[str, Any]:
        assert isinstance(self.end, Result), self.end
        return self.end.outcome

    @property
    def failure(self) -> Failed:
        assert isinstance(self.end, Failed), self.end
        return self.end


def train_spec(**changes: Any) -> dict[str, Any]:
    """A small training job on the demo model; `training` and `data` are merged, the rest replaced."""
    training = {
        "max_steps": 4, "per_device_train_batch_size": 4, "gradient_accumulation_steps": 2, "learning_rate": 2e-3,
        "logging_steps": 2, "warmup_steps": 0, "max_seq_length": 256,
    } | changes.pop("training", {})  # fmt: skip
    data = {"source": str(DEMO / "train.jsonl"), "limit": 64} | changes.pop("data", {})
    return {
        "kind": "train", "base_model": str(DEMO / "model"), "method": "lora", "data": data, "lora": {},
        "training": training, "resources": {}, **changes,
    }  # fmt: skip


def evaluate_spec(**changes: Any) -> dict[str, Any]:
    """A small evaluation on the demo model; `evaluation` is merged, the rest replaced."""
    evaluation = {"source": str(DEMO / "test.jsonl"), "limit": 24} | changes.pop("evaluation", {})
    return {
        "kind": "evaluate", "base_model": str(DEMO / "model"), "method": "lora", "adapter_job": None,
        "load_in_4bit": False, "max_seq_length": 256, "evaluation": evaluation, "resources": {}, **changes,
    }  # fmt: skip


def ask_spec(*prompts: str, **changes: Any) -> dict[str, Any]:
    """A question to the demo model and an adapter of it."""
    return {
        "kind": "ask", "base_model": str(DEMO / "model"), "method": "lora", "adapter_job": "batch.1",
        "load_in_4bit": False, "max_seq_length": 256, "prompts": prompts, "max_new_tokens": 24, **changes,
    }  # fmt: skip
