"""What the tests of the trainer share."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))  # for bare_main and trainer_child

from bare_main import BareMain, bare
from trainer_child import Child

from gpu_worker.protocol import Ready


@pytest.fixture(scope="module")
def child(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Child]:
    """One trainer for the tests of a module: its start alone takes seconds."""
    running = Child(tmp_path_factory.mktemp("trainer"))
    ready = running.next_event()
    assert isinstance(ready, Ready), running.log.read_text()
    assert {"torch", "unsloth", "transformers", "trl", "peft"} <= ready.versions.keys()
    yield running
    running.close()


@pytest.fixture
def bare_main(monkeypatch: pytest.MonkeyPatch) -> BareMain:
    return bare(monkeypatch)
