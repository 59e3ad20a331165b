"""The trainer process's main loop without what it imports: in this process, with stand-ins for its modules."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterable
from types import SimpleNamespace
from typing import Any

import pytest

import gpu_worker.trainer
from gpu_worker.protocol import Event
from gpu_worker.trainer import child

BareMain = Callable[..., list[Event]]


def bare(monkeypatch: pytest.MonkeyPatch) -> BareMain:
    """A function of the lines of requests, and of modules that stand in for the trainer's; returns what is emitted."""
    idle: Any = lambda *_, **__: None  # noqa: E731

    def run(requests: Iterable[bytes], **stand_ins: SimpleNamespace) -> list[Event]:
        usual = {
            "usage": SimpleNamespace(allocated=lambda: 0, total=lambda: 1, versions=dict, hold_to=idle),
            "checkpoint": SimpleNamespace(listen=idle),
            "model": SimpleNamespace(free=idle, ON_GPU=False),
        }
        for name, module in (usual | stand_ins).items():
            monkeypatch.setitem(sys.modules, f"gpu_worker.trainer.{name}", module)
            monkeypatch.setattr(gpu_worker.trainer, name, module, raising=False)
        events: list[Event] = []
        monkeypatch.setattr(child, "_import", idle)
        monkeypatch.setattr(child, "_channels", lambda: (requests, events.append))
        monkeypatch.setattr(child.signal, "signal", idle)
        monkeypatch.setattr(child.logging, "basicConfig", idle)
        before = dict(os.environ)
        try:
            child.main()
        finally:
            os.environ.clear()
            os.environ.update(before)
        return events

    return run
