"""A server and a worker of this checkout, for as long as a benchmark runs."""

from __future__ import annotations

import argparse
import gzip
import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from jobqueue import embedded
from jobqueue.processes import start_process
from jobqueue.service import Client

LORAQ = [sys.executable, "-P", "-m", "cli.main"]
STOP_S = 60.0  # for the worker, until it is killed


def arguments() -> argparse.ArgumentParser:
    """Of a benchmark on real data; `train` and `test` are for `Session.rows`."""
    parser = argparse.ArgumentParser()
    parser.add_argument("model", type=Path)
    parser.add_argument("train")
    parser.add_argument("test")
    parser.add_argument("out", type=Path)
    return parser


class Session:
    """`with Session(out, ["--gpu", "0"]) as session:` starts both; both end with the block, or with this process.

    Args:
        out: folder of the benchmark's files; the worker's log goes there, and at the end those of the jobs.
        worker: options of `loraq worker`.
        settings: LORAQ_* variables without the prefix, for the worker and the commands.
    """

    def __init__(self, out: Path, worker: Sequence[str], **settings: object) -> None:
        out.mkdir(parents=True, exist_ok=True)
        self.folder = Path(tempfile.mkdtemp(prefix="loraq-bench-"))
        self.storage = self.folder / "data" / "storage"
        self._log = out / "worker.log"
        self._options = list(worker)
        os.environ |= {
            "LORAQ_DATA_DIR": str(self.folder / "data"),
            "LORAQ_STORAGE": str(self.storage),
            "LORAQ_CONFIG": os.devnull,
            **{f"LORAQ_{name.upper()}": str(value) for name, value in settings.items()},
        }

    def __enter__(self) -> Self:
        self._server = embedded.start(self.folder / "server", die_with_parent=True)
        os.environ["LORAQ_REDIS_URL"] = self._server.url
        self.client = Client()
        command = [*LORAQ, "worker", *self._options]
        self.worker = start_process(command, folder=self.folder, log=self._log, die_with_parent=True)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.worker.terminate()
        try:
            self.worker.wait(STOP_S)
        except subprocess.TimeoutExpired:
            self.worker.kill()  # and all below it end with it
            self.worker.wait()
        self._server.stop()
        self._keep_logs()
        shutil.rmtree(self.folder, ignore_errors=True)

    def _keep_logs(self) -> None:
        """One of each attempt: what it printed."""
        logs = self._log.with_name("logs")
        logs.mkdir(exist_ok=True)
        for log in self.storage.rglob("log.txt"):
            shutil.copy(log, logs / f"{log.parent.parent.name}-{log.parent.name}.txt")

    def loraq(self, *words: str, **environment: str) -> str:
        """What the command prints. Raises CalledProcessError."""
        return subprocess.run(
            [*LORAQ, *words], check=True, stdout=subprocess.PIPE, text=True, env={**os.environ, **environment}
        ).stdout

    def submit(self, name: str, sweep: str) -> None:
        """A sweep file of that text."""
        file = self.folder / f"{name}.yaml"
        file.write_text(sweep)
        print(self.loraq("submit", str(file)), flush=True)

    def wait(self, batch: str) -> None:
        """Until all of the batch has ended, however; prints what becomes of its jobs."""
        subprocess.run([*LORAQ, "watch", batch], check=False)

    def ended(self, batch: str) -> bool:
        """Whether all of the batch has ended, however."""
        return all(job.state.final for job in self.client.jobs(batch))

    def jobs(self, batch: str) -> list[dict[str, Any]]:
        found: list[dict[str, Any]] = json.loads(self.loraq("ls", batch, "--json"))
        return found

    def trains(self, batch: str) -> list[dict[str, Any]]:
        """The batch's trainings, in order of their trials."""
        return [job for job in self.jobs(batch) if job["kind"] == "train"]

    def rows(self, sources: str, name: str) -> Path:
        """One file of the session's folder out of several, comma-separated, .gz or not."""
        with (self.folder / name).open("w", encoding="utf-8") as out:
            for source in map(Path, sources.split(",")):
                with (gzip.open if source.suffix == ".gz" else open)(source, "rt", encoding="utf-8") as file:
                    out.writelines(file)
        return self.folder / name
