"""What a shell is told when somebody presses Tab, as bash asks for it."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest
from click.testing import CliRunner
from helpers import new_job, submit

from cli.complete import VARIABLE
from cli.main import loraq
from jobqueue.settings import Settings
from jobqueue.store import Store

WORKER = {
    "host": "box", "device": "a GPU", "uuid": "", "usable_bytes": 1, "slots": 1, "share": "", "running": [], "note": "",
    "every_s": 60,
}  # fmt: skip


def completed(line: str) -> list[str]:
    """What may stand at the end of that line."""
    asked = {VARIABLE: "bash_complete", "COMP_WORDS": line, "COMP_CWORD": str(len(line.split(" ")) - 1)}
    result = CliRunner().invoke(loraq, [], prog_name="loraq", env=asked)
    assert result.stderr == ""
    return [answer.partition(",")[2] for answer in result.stdout.splitlines() if answer]


@pytest.fixture
def store(settings: Settings, monkeypatch: pytest.MonkeyPatch) -> Store:
    assert settings.redis_url is not None
    monkeypatch.setenv("LORAQ_REDIS_URL", settings.redis_url)
    found = Store(settings.redis_url)
    submit(found, new_job("rank.1"), new_job("rank.2"))
    submit(found, new_job("rate.1"))
    found.heartbeat("box/gpu0", "gpu", WORKER)
    return found


@pytest.mark.parametrize(
    ("line", "found"),
    [
        ("loraq re", ["results", "retry", "release"]),
        ("loraq results --js", ["--json"]),
        ("loraq results ra", ["rate", "rank"]),
        ("loraq results rate ran", ["rank"]),
        ("loraq logs rank.", ["rank.1", "rank.2"]),
        ("loraq cancel nothing", []),
        ("loraq export ra", ["rate/1", "rank/1"]),
        ("loraq ask rank/", ["rank/1"]),
        ("loraq ask rat", ["rate/1"]),
        ("loraq drain ", ["box", "box/gpu0"]),
    ],
)
def test_names_are_completed(store: Store, line: str, found: list[str]) -> None:
    assert completed(line) == found


def test_a_server_that_is_away_completes_nothing_and_writes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LORAQ_REDIS_URL", "redis://127.0.0.1:1/0")
    assert completed("loraq watch a") == []


def test_profiles_are_completed_and_decide_which_server_is_asked(
    store: Store, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    file = tmp_path / "config.toml"
    file.write_text(f'[profiles.lab]\nredis_url = "{store.url}"\n[profiles.away]\nredis_url = "redis://127.0.0.1:1/0"')
    monkeypatch.setenv("LORAQ_CONFIG", str(file))
    monkeypatch.delenv("LORAQ_REDIS_URL")

    assert completed("loraq --profile ") == ["lab", "away"]
    assert completed("loraq --profile l") == ["lab"]
    assert completed("loraq --profile lab show ran") == ["rank"]
    assert completed("loraq --profile away show ran") == []
    file.write_text("profiles = 1")
    assert completed("loraq --profile ") == []


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_the_shell_takes_what_is_printed_for_it(shell: str, tmp_path: Path) -> None:
    result = CliRunner().invoke(loraq, ["completion", shell], prog_name="loraq")
    assert result.exit_code == 0
    assert VARIABLE in result.stdout
    if program := shutil.which(shell):  # not every machine has all three
        file = tmp_path / "script"
        file.write_text(result.stdout)
        subprocess.run([program, "-n", file], check=True)
