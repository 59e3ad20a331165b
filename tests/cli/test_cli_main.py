"""The group: help without the heavy imports, errors in two lines, exit codes."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import click
import pytest
from cli_fakes import Command, FakeClient
from click.testing import CliRunner

from cli.main import COMMANDS, LazyGroup, exit_codes, loraq
from jobqueue import errors

ROOT = Path(__file__).parents[2]

BLOCKED_HELP = """
import sys

class Blocker:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in {"torch", "celery", "redis", "pydantic", "rich", "ruamel", "transformers"}:
            raise ImportError(f"{name} is blocked")

sys.meta_path.insert(0, Blocker())
import cli.main
cli.main.loraq(sys.argv[1:], prog_name="loraq")
"""


@pytest.mark.parametrize(
    "arguments", [["--help"], ["--version"], ["submit", "--help"], ["logs", "--help"], ["results", "-h"]]
)
def test_help_imports_nothing_heavy(arguments: list[str]) -> None:
    done = subprocess.run(
        [sys.executable, "-c", BLOCKED_HELP, *arguments], cwd=ROOT, capture_output=True, text=True, check=False
    )

    assert done.returncode == 0, done.stderr
    assert "loraq" in done.stdout


def test_help_lists_every_command_and_exit_code(command: Command) -> None:
    text = command("--help").stdout

    assert all(name in text for name in COMMANDS)
    assert all(str(code) in text for code, _ in exit_codes())
    assert "There is no such job or batch." in text


@pytest.mark.parametrize("name", list(COMMANDS))
def test_stored_help_is_that_of_the_command(name: str) -> None:
    found = loraq.get_command(click.Context(loraq), name)

    assert found is not None
    assert (found.help or "").startswith(COMMANDS[name][1].rstrip("."))


def test_mistyped_command_is_suggested(command: Command) -> None:
    result = command("sbmit")

    assert result.exit_code == 2
    assert "submit" in result.stderr


@pytest.mark.parametrize(
    ("kind", "code"),
    [(kind, kind.exit_code) for kind in errors.LoraqError.__subclasses__() if kind is not errors.SpecError],
)
def test_error_is_two_lines_and_its_exit_code(
    command: Command, client: FakeClient, monkeypatch: pytest.MonkeyPatch, kind: type[errors.LoraqError], code: int
) -> None:
    def fail() -> None:
        raise kind("it [broke]", "mend it")

    monkeypatch.setattr(client, "batches", fail)

    result = command("ls")

    assert result.exit_code == code
    assert (result.stdout, result.stderr) == ("", "it [broke]\nmend it\n")


def test_error_is_red_on_a_terminal(client: FakeClient) -> None:
    result = CliRunner().invoke(loraq, ["show", "nothing"], color=True)

    assert "\x1b[31m\x1b[1mthere is no batch 'nothing'" in result.stderr


def test_unexpected_exception_is_one_line_without_traceback(
    command: Command, client: FakeClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(client, "batches", lambda: 1 // 0)

    result = command("ls")
    debugged = command("--debug", "ls")

    assert result.exit_code == debugged.exit_code == 1
    assert result.stderr.splitlines()[0].startswith("ZeroDivisionError: ")
    assert "--debug" in result.stderr
    assert "Traceback" not in result.stderr
    assert "Traceback" in debugged.stderr


def test_interrupt_is_130(command: Command, client: FakeClient, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt() -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(client, "batches", interrupt)

    result = command("ls")

    assert (result.exit_code, result.stderr) == (130, "")


def test_closed_pipe_is_quiet() -> None:
    """`loraq --help | head -1`"""
    script = "import sys; sys.stdin.read(); import cli.main; cli.main.loraq(['--help'])"
    process = subprocess.Popen(
        [sys.executable, "-c", script], cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    assert process.stdout is not None
    process.stdout.close()
    process.stdout = None

    _, said = process.communicate(timeout=30)

    assert said == b""


def test_wrong_settings_are_an_error_with_a_remedy(command: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LORAQ_LEASE_S", "soon")

    result = command("ls")

    assert result.exit_code == 1
    assert "lease_s" in result.stderr
    assert "config.toml" in result.stderr


def test_a_variable_that_is_misspelt_is_told_with_whatever_else_is_wrong(
    command: Command, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "config.toml").write_text("leese_s = 30\n")
    monkeypatch.setenv("LORAQ_CONFIG", str(tmp_path / "config.toml"))
    monkeypatch.setenv("LORAQ_STORGE", "/mnt/team")

    result = command("ls")

    wrong = ("LORAQ_STORGE is none; did you mean LORAQ_STORAGE?", "leese_s is none; did you mean lease_s?")
    what = f"The settings are wrong: {'; '.join(wrong)}"
    assert (result.exit_code, result.stderr.splitlines()[0]) == (1, what)


def test_a_variable_of_something_else_may_begin_like_a_setting(
    command: Command, client: FakeClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LORAQ_CACHE_DIR", "/tmp")  # of a trainer
    for name in re.findall(r"\$\{(LORAQ_\w+)", (ROOT / "compose.yaml").read_text()):
        monkeypatch.setenv(name, "redis://localhost:1/0" if name == "LORAQ_REDIS_URL" else "/mnt")

    assert command("ls").exit_code == 0


def test_config_file_that_is_no_toml(command: Command, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "config.toml").write_text("lease_s = = 3")
    monkeypatch.setenv("LORAQ_CONFIG", str(tmp_path / "config.toml"))

    result = command("ls")

    assert result.exit_code == 1
    assert "not valid TOML" in result.stderr


def test_group_is_lazy() -> None:
    assert isinstance(loraq, LazyGroup)
    assert loraq.commands == {}
