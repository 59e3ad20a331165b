"""What the tests of the worker share: a server and a storage of their own, for each test or for all of a module."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import redis
from helpers import RestartableServer, restartable_server

sys.path.insert(0, str(Path(__file__).parent))  # for worker_process: pytest's importlib mode leaves this folder out

from worker_process import Site, site


@pytest.fixture
def server(tmp_path: Path) -> Iterator[RestartableServer]:
    """Of this test alone, and not the run's: it may be killed."""
    with restartable_server(tmp_path / "server") as running:
        yield running


@pytest.fixture
def admin(server: RestartableServer) -> Iterator[redis.Redis]:
    with redis.Redis.from_url(server.url, decode_responses=True) as client:
        yield client


@pytest.fixture
def here(server: RestartableServer, tmp_path: Path) -> Iterator[Site]:
    with site(server.url, tmp_path / "site") as opened:
        yield opened


@pytest.fixture(scope="module")
def one_site(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    """For all tests of a module."""
    folder = tmp_path_factory.mktemp("site")
    with restartable_server(folder / "server") as running, site(running.url, folder / "site") as opened:
        yield opened
