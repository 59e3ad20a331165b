"""What the tests of the trainer share."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))  # for bare_main and trainer_child

from bare_main import BareMain, bare
from trainer_child import Child

from gpu_worker.protocol import Ready


@pytest.fixture(scope="session")
def resting(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[[], Child]]:
    """Gives a trainer that has no job: the one of the module before, or another where that has ended or is at work."""
    started: list[Child] = []

    def given() -> Child:
        if not started or not started[-1].rests():
            if started:
                started[-1].close()
            running = Child(tmp_path_factory.mktemp("trainer"))
            started.append(running)
            ready = running.next_event()
            assert isinstance(ready, Ready), running.log.read_text()
            assert {"torch", "unsloth", "transformers", "trl", "peft"} <= ready.versions.keys()
        return started[-1]

    yield given
    if started:
        started[-1].close()


@pytest.fixture(scope="module")
def child(resting: Callable[[], Child]) -> Child:
    """One trainer for the tests of a module, and for later modules, as it is for jobs: its start takes ten seconds."""
    return resting()


@pytest.fixture
def bare_main(monkeypatch: pytest.MonkeyPatch) -> BareMain:
    return bare(monkeypatch)
