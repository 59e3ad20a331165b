"""A server and a worker of this checkout, for as long as a benchmark runs; and what is said of every run."""

from __future__ import annotations

import argparse
import gzip
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from jobqueue import embedded
from jobqueue.service import Client

LORAQ = [sys.executable, "-P", "-m", "cli.main"]


def arguments() -> argparse.ArgumentParser:
    """Of a benchmark on real data; `train` and `test` are for `Session.rows`."""
    parser = argparse.ArgumentParser()
    parser.add_argument("model", type=Path)
    parser.add_argument("train")
    parser.add_argument("test")
    parser.add_argument("out", type=Path)
    return parser


class Session:
    """`with Session(out, ["--gpu", "0"]) as session:` starts both; both end with the block.

    Args:
        out: folder of the benchmark's files; the worker's log goes there.
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
            "LORAQ_CONFIG": str(self.folder / "none"),
            **{f"LORAQ_{name.upper()}": str(value) for name, value in settings.items()},
        }

    def __enter__(self) -> Self:
        self._server = embedded.start(self.folder / "server", die_with_parent=True)
        os.environ["LORAQ_REDIS_URL"] = self._server.url
        self.client = Client()
        with self._log.open("a") as log:
            self.worker = subprocess.Popen([*LORAQ, "worker", *self._options], stdout=log, stderr=log)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.worker.terminate()
        self.worker.wait()

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
        """Until all of the batch has ended, however."""
        subprocess.run([*LORAQ, "watch", batch], stdout=subprocess.DEVNULL, stderr=subprocess.STDOUT, check=False)

    def jobs(self, batch: str) -> list[dict[str, Any]]:
        found: list[dict[str, Any]] = json.loads(self.loraq("ls", batch, "--json"))
        return found

    def rows(self, sources: str, name: str) -> Path:
        """One file of the session's folder out of several, comma-separated, .gz or not."""
        with (self.folder / name).open("w", encoding="utf-8") as out:
            for source in map(Path, sources.split(",")):
                with (gzip.open if source.suffix == ".gz" else open)(source, "rt", encoding="utf-8") as file:
                    out.writelines(file)
        return self.folder / name
