"""What tests share: one real server for the whole run, emptied before each test that uses it."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import redis

from jobqueue.embedded import Server, start
from jobqueue.settings import Settings
from jobqueue.store import Store

sys.path.insert(0, str(Path(__file__).parent))  # for helpers: pytest's importlib mode leaves this folder out
# The models of tests are tiny. Threads that wait for each other at each of their operations, on cores that have more to
# do, made some tests ten times slower. The trainers that tests start inherit it.
os.environ.setdefault("OMP_NUM_THREADS", "1")


@pytest.fixture(autouse=True)
def _own_settings(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """No test sees, or changes, the settings and data of whoever runs it."""

    for name in list(os.environ):
        if name.startswith("LORAQ_"):
            monkeypatch.delenv(name)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("LORAQ_CONFIG", str(tmp_path / "no-config.toml"))
    monkeypatch.setenv("LORAQ_DATA_DIR", str(tmp_path / "data"))


@pytest.fixture(scope="session")
def server_process(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """The embedded server of this run; it ends with pytest, however pytest ends."""
    running = start(tmp_path_factory.mktemp("server"), die_with_parent=True)
    yield running
    running.stop()


@pytest.fixture(scope="session")
def server(server_process: Server) -> str:
    """URL of a real server that all tests of this run share."""
    return server_process.url


@pytest.fixture
def redis_url(server: str) -> str:
    """URL of a real server that holds nothing: no key, no function."""
    with redis.Redis.from_url(server) as client:
        client.config_set("appendfsync", "always")  # else each submit waits for the second that the disk may take
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
