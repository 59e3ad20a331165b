"""How long commands take from the Enter key to the prompt, beside Python's own start and the imports that they need.

    python benchmarks/start.py [--runs 20]

Writes benchmarks/results/start.json. Run it with the Python of an environment that has `pip install '.[local]'` and
nothing else, as a laptop has. It starts a server of its own, with the batch of `cli/demo/sweep.yaml` on it, whose jobs
are ended without any work. All commands take turns, so that what else the machine does befalls them alike; a first
round, which writes bytecode, does not count.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import resource
import secrets
import statistics
import subprocess
import sys
import tempfile
import time
from importlib.metadata import version
from pathlib import Path

from jobqueue import embedded
from jobqueue.job import JobState, Settlement
from jobqueue.memory import GIB, all_classes
from jobqueue.service import Client
from jobqueue.settings import Settings

ROOT = Path(__file__).parents[1]
SWEEP = ROOT / "cli" / "demo" / "sweep.yaml"
REPORT = ROOT / "examples" / "medqa-sweep" / "results.json"
RESULT = ROOT / "benchmarks" / "results" / "start.json"
YARDSTICKS = {
    "python": "",
    "import click, rich, redis": "import click, rich, redis",
    "import click, rich.table, redis": "import click, rich.table, redis",
}
COMMANDS = {
    "loraq --help": ["--help"],
    "loraq --version": ["--version"],
    "loraq ls": ["ls"],
    "loraq ls BATCH": ["ls", "demo"],
    "loraq show BATCH": ["show", "demo"],
    "loraq show JOB": ["show", "demo.1"],
    "loraq workers": ["workers"],
    "loraq results BATCH": ["results", "demo"],
    "loraq submit FILE --dry-run": ["submit", "--dry-run", str(SWEEP)],
}
COMPLETIONS = {"Tab after `loraq re`": "loraq re", "Tab after `loraq show d`": "loraq show d"}


def filled(server: embedded.Server, folder: Path) -> None:
    """Puts an ended batch with a report there."""
    client = Client(Settings(redis_url=server.url, storage=str(folder / "storage"), data_dir=folder))
    batch = client.submit(client.plan(client.read(SWEEP)), force=True)
    report = json.loads(REPORT.read_text())
    while claim := client.store.claim("box/gpu0", "gpu", 100 * GIB, 60, secrets.token_hex(8), all_classes()):
        outcome = report if claim.spec["kind"] == "report" else {}
        client.store.settle(claim, Settlement(JobState.SUCCEEDED, outcome=outcome))
    assert client.batch(batch.name).state is JobState.SUCCEEDED


def calls(server: embedded.Server, folder: Path) -> dict[str, tuple[list[str], dict[str, str]]]:
    """Name -> command line and environment."""
    own = {"LORAQ_REDIS_URL": server.url, "LORAQ_DATA_DIR": str(folder), "LORAQ_CONFIG": os.devnull}
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("LORAQ_", "PYTHON"))}
    environment = {**kept, **own}
    loraq = str(Path(sys.executable).with_name("loraq"))
    found = {name: ([sys.executable, "-c", code], environment) for name, code in YARDSTICKS.items()}
    found |= {name: ([loraq, *words], environment) for name, words in COMMANDS.items()}
    for name, line in COMPLETIONS.items():
        asked = {"_LORAQ_COMPLETE": "bash_complete", "COMP_WORDS": line, "COMP_CWORD": str(line.count(" "))}
        found[name] = ([loraq], {**environment, **asked})
    return found


def seconds(command: list[str], environment: dict[str, str]) -> tuple[float, float]:
    """(until it has ended, of a processor)"""
    before, started = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    took, after = time.perf_counter() - started, resource.getrusage(resource.RUSAGE_CHILDREN)
    if done.returncode:
        raise SystemExit(f"{' '.join(command)} failed: {done.stderr}")
    return round(took, 4), round(after.ru_utime - before.ru_utime + after.ru_stime - before.ru_stime, 4)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--runs", type=int, default=20)
    runs = parser.parse_args().runs
    with tempfile.TemporaryDirectory() as made:
        server = embedded.start(Path(made) / "server", die_with_parent=True)
        try:
            filled(server, Path(made))
            to_call = calls(server, Path(made))
            rounds = [{name: seconds(*call) for name, call in to_call.items()} for _ in range(runs + 1)][1:]
        finally:
            server.stop()
    raw = {name: [each[name] for each in rounds] for name in to_call}
    figures = {}
    for name, taken in raw.items():
        whole, processor = zip(*taken, strict=True)
        kinds = {"median": statistics.median(whole), "fastest": min(whole), "processor": statistics.median(processor)}
        figures[name] = {f"{kind}_ms": round(1000 * value) for kind, value in kinds.items()}
    packages = ("loraq", "click", "rich", "redis", "pydantic", "celery")
    result = {
        "figures": figures,
        "machine": {"system": platform.platform(), "cores": os.cpu_count(), "load": os.getloadavg()},
        "versions": {"python": platform.python_version(), **{name: version(name) for name in packages}},
        "seconds": raw,
    }
    RESULT.write_text(json.dumps(result, indent=1) + "\n")
    for name, figure in figures.items():
        print(f"{name:<34}", *(f"{value:>6}" for value in figure.values()))


if __name__ == "__main__":
    main()
