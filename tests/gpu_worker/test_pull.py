"""`loraq pull` without the storage, with a real control worker, while either of them or the line between breaks."""

from __future__ import annotations

import hashlib
import json
import random
import subprocess
import sys
from pathlib import Path

import psutil
import pytest
from helpers import wait_for
from proxy import proxy
from worker_process import START_S, Site, Worker

from jobqueue.service import Client
from jobqueue.settings import Settings
from jobqueue.transfer import PIECE_BYTES

MIB = 2**20
SIZE = 120 * MIB + 5
NAME = "adapter/adapter_model.txt"


@pytest.fixture
def worker(here: Site) -> Worker:
    """It has trained b.1, and its adapter is large."""
    started = here.start("--cpu")
    here.submit("b.1", "say:trained")
    folder = here.ended("b.1").outcome["folder"]
    content = random.Random(7).randbytes(SIZE)
    Path(here.storage.address(f"{folder}/{NAME}")).write_bytes(content)
    manifest = json.loads(here.storage.read_text(f"{folder}/manifest.json"))
    manifest["files"][NAME] = {"sha256": hashlib.sha256(content).hexdigest(), "bytes": SIZE}
    here.storage.write_text(f"{folder}/manifest.json", json.dumps(manifest))
    return started


def control(worker: Worker) -> psutil.Process:
    def found() -> list[psutil.Process]:
        return [child for child in worker.supervisor.children() if "control" in child.cmdline()]

    return wait_for(found, START_S, "the control worker runs")[0]


def is_whole(here: Site, folder: Path) -> bool:
    manifest = json.loads(here.storage.read_text(f"{here.store.job('b.1').outcome['folder']}/manifest.json"))
    content = (folder / "adapter_model.txt").read_bytes()
    return hashlib.sha256(content).hexdigest() == str(manifest["files"][NAME]["sha256"])


def test_a_control_worker_that_is_killed_in_mid_transfer_is_replaced_and_the_pull_goes_on(
    here: Site, worker: Worker, tmp_path: Path
) -> None:
    client = Client(Settings(redis_url=here.store.url, data_dir=tmp_path / "laptop"))
    killed: list[int] = []

    def progress(trial: str, arrived: int, size: int, why: str) -> None:
        if arrived > 20 * MIB and not killed:
            killed.append(control(worker).pid)
            control(worker).kill()
            if taken_up := here.store._redis.keys("{loraq}:pull:by:*"):
                here.store._redis.delete(*taken_up)  # or 20 s later

    [done] = client.pull(client.plan_pull("b/1", tmp_path / "to"), progress=progress)

    assert killed
    assert control(worker).pid != killed[0]
    assert done.copied_bytes == SIZE
    assert is_whole(here, tmp_path / "to")


def test_a_laptop_goes_on_where_its_line_broke_and_where_it_was_killed_itself(
    here: Site, worker: Worker, tmp_path: Path
) -> None:
    parts = tmp_path / "b-1.loraq-pull"
    with proxy(int(here.store.url.rpartition(":")[2].partition("/")[0])) as between:
        environment = here.environment(
            LORAQ_REDIS_URL=between.url, LORAQ_STORAGE="", LORAQ_DATA_DIR=tmp_path / "laptop"
        )
        command = [sys.executable, "-P", "-m", "cli.main", "pull", "b/1"]

        def arrived() -> int:
            return sum(path.stat().st_size for path in parts.iterdir()) if parts.exists() else 0

        first = subprocess.Popen(command, cwd=tmp_path, env=environment)
        for mib in (8, 24, 40):
            wait_for(lambda mib=mib: arrived() >= mib * MIB, START_S, f"{mib} MiB have arrived")  # type: ignore[misc]
            between.break_all()
        wait_for(lambda: arrived() >= 56 * MIB, START_S, "more has arrived")
        first.kill()
        first.wait()
        kept = arrived()
        assert not (tmp_path / "b-1").exists()

        done = subprocess.run(
            [*command, "--json"], cwd=tmp_path, env=environment, capture_output=True, text=True, check=True
        )

    again = json.loads(done.stdout)["copied_bytes"] - (SIZE - kept)
    assert 0 <= again < PIECE_BYTES, "a piece at most, in the midst of which it was killed"
    assert is_whole(here, tmp_path / "b-1")
    assert not parts.exists()
