"""What tests share: one real server for the whole run, emptied before each test that uses it."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
import redis

from jobqueue.embedded import Server, start
from jobqueue.memory import GIB
from jobqueue.settings import Settings
from jobqueue.store import Store

sys.path.insert(0, str(Path(__file__).parent))  # for helpers: pytest's importlib mode leaves this folder out
# The models of tests are tiny. Threads that wait for each other at each of their operations, on cores that have more to
# do, made some tests ten times slower. The trainers that tests start inherit it.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ["HF_HUB_OFFLINE"] = "1"  # huggingface_hub reads it once; where it was online, a missing model took 23 s
for name in ("COLUMNS", "LINES"):  # those of whoever runs the tests; readline sets them for pytest's processes too
    os.environ.pop(name, None)

FOR_ONE_PROCESS = 3 * GIB  # of memory: pytest itself with torch, and the trainer that its tests share
MOST_PROCESSES = 8  # with more, the longest file alone decides how long all take


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_auto_num_workers() -> int:
    """One more than there are cores, as far as the memory goes: many tests wait for leases and servers."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    fit = psutil.virtual_memory().available // FOR_ONE_PROCESS
    return max(1, min(cores + 1, fit, MOST_PROCESSES))


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The order in which files are handed out to several processes: those whose tests compute and those whose tests
    wait mixed evenly, so that the cores have work all the time, and then what takes moments, so that all end together.
    """
    if "PYTEST_XDIST_WORKER" not in os.environ:
        return
    files = dict.fromkeys(item.path for item in items)
    groups: dict[str, list[Path]] = {}
    for file in files:
        groups.setdefault(_what_takes_time(file), []).append(file)
    place = {
        file: (kind == "nothing", number / len(group))
        for kind, group in groups.items()
        for number, file in enumerate(group)
    }
    items.sort(key=lambda item: place[item.path])


def _what_takes_time(file: Path) -> str:
    of_files = {"test_cli_local.py": "waiting", "test_state_machine.py": "computing"}
    of_folders = {"cli": "nothing", "jobqueue": "nothing", "ops": "nothing", "trainer": "computing"}
    folder = file.relative_to(Path(__file__).parent).parts[0]
    return of_files.get(file.name) or of_folders.get(folder, "waiting")


@pytest.fixture(autouse=True)
def _own_settings(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """No test sees, or changes, the settings and data of whoever runs it."""

    for name in list(os.environ):
        if name.startswith("LORAQ_"):
            monkeypatch.delenv(name)
    monkeypatch.setenv("LORAQ_CONFIG", os.devnull)
    monkeypatch.setenv("LORAQ_DATA_DIR", str(tmp_path / "data"))


@pytest.fixture(scope="session")
def server_process(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """The embedded server of this run; it ends with pytest, however pytest ends."""
    running = start(tmp_path_factory.mktemp("server"), die_with_parent=True)
    yield running
    running.stop()


@pytest.fixture(scope="session")
def server(server_process: Server) -> str:
    """URL of a real server that all tests of this process share."""
    with redis.Redis.from_url(server_process.url) as client:
        client.config_set("appendfsync", "always")  # else each submit waits for the second that the disk may take
    return server_process.url


@pytest.fixture
def redis_url(server: str) -> str:
    """URL of a real server that holds nothing: no key, no function."""
    with redis.Redis.from_url(server) as client:
        client.flushall()
        client.function_flush()
    return server


@pytest.fixture
def settings(redis_url: str, tmp_path: Path) -> Settings:
    """Settings for an empty server and an empty storage, with short times."""
    return Settings(redis_url=redis_url, storage=str(tmp_path / "storage"), data_dir=tmp_path / "data", owner="tester")


@pytest.fixture
def store(redis_url: str) -> Iterator[Store]:
    """The store of an empty server."""
    opened = Store(redis_url)
    yield opened
    opened.close()
