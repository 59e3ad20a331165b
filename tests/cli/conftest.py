"""Runs commands against a client that answers from memory."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from cli.main import loraq

sys.path.insert(0, str(Path(__file__).parent))  # pytest's importlib mode leaves the helpers of tests out

from cli_fakes import Command, FakeClient


@pytest.fixture
def client(monkeypatch: pytest.MonkeyPatch) -> FakeClient:
    """Stands for jobqueue.service.Client in every command of the test."""
    fake = FakeClient()
    monkeypatch.setattr("jobqueue.service.Client", lambda settings: fake)
    monkeypatch.setattr("cli.watch.LOOK_S", 0.0)
    monkeypatch.setattr("cli.watch.RETRY_S", 0.0)
    return fake


@pytest.fixture
def command(monkeypatch: pytest.MonkeyPatch) -> Command:
    """Runs `loraq` with arguments, as into a pipe; `columns` makes it a terminal of that width."""

    def run(*arguments: str, columns: int | None = None) -> Result:
        if columns:
            monkeypatch.setenv("COLUMNS", str(columns))
            monkeypatch.setenv("TTY_COMPATIBLE", "1")
            monkeypatch.setenv("NO_COLOR", "1")
        return CliRunner().invoke(loraq, list(arguments), prog_name="loraq")

    return run
