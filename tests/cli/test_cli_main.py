"""The group: help without the heavy imports, errors in two lines, exit codes."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import click
import pytest
from cli_fakes import Command, FakeClient
from click.testing import CliRunner
from helpers import new_job, submit

from cli.complete import VARIABLE
from cli.main import COMMANDS, LazyGroup, exit_codes, loraq
from jobqueue import errors
from jobqueue.store import Store

ROOT = Path(__file__).parents[2]

BLOCKED = """
import sys

class Blocker:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in sys.argv[1].split():
            raise ImportError(f"{name} is blocked")

sys.meta_path.insert(0, Blocker())
import cli.main
cli.main.loraq(sys.argv[2:], prog_name="loraq")
"""
WORK = "torch transformers datasets scipy statsmodels pandas numpy"
LOOKING = f"{WORK} celery kombu pydantic fsspec ruamel jinja2 plotille"
PLANNING = f"{WORK} celery kombu redis plotille"
HELP = f"{LOOKING} redis rich psutil asyncio"


def without(blocked: str, *arguments: str, **variables: str) -> str:
    """What the command prints in a process that can import nothing of `blocked`."""
    words = [sys.executable, "-c", BLOCKED, blocked, *arguments]
    environment = {**os.environ, **variables}
    done = subprocess.run(words, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.parametrize(
    "arguments",
    [["--help"], ["--version"], ["submit", "--help"], ["logs", "--help"], ["results", "-h"], ["completion", "bash"]],
)
def test_help_imports_nothing_heavy(arguments: list[str]) -> None:
    assert "loraq" in without(HELP, *arguments)


def test_completion_of_commands_imports_nothing_heavy() -> None:
    asked = {VARIABLE: "bash_complete", "COMP_WORDS": "loraq canc", "COMP_CWORD": "1"}
    assert "cancel" in without(HELP, **asked)


def test_looking_imports_neither_what_plans_nor_what_works(redis_url: str) -> None:
    store = Store(redis_url)
    submit(store, new_job("rank.1"), new_job("rank.2"))
    here = {"LORAQ_REDIS_URL": redis_url}

    for arguments in (
        ["ls"],
        ["ls", "--json"],
        ["ls", "rank"],
        ["show", "rank"],
        ["show", "rank.1", "--json"],
        ["top", "--json"],
    ):
        assert "rank" in without(LOOKING, *arguments, **here)
    assert "no worker" in without(LOOKING, "workers", **here).lower()
    asked = {VARIABLE: "bash_complete", "COMP_WORDS": "loraq show ra", "COMP_CWORD": "2"}
    assert "rank" in without(f"{LOOKING} rich", **asked, **here)


def test_a_dry_run_imports_nothing_that_talks_to_a_server() -> None:
    assert "Nothing was submitted." in without(PLANNING, "submit", "--dry-run", "cli/demo/sweep.yaml")


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
    what, do = result.stderr.splitlines()
    assert what == "The settings are wrong: LORAQ_LEASE_S must be a number, not 'soon'"
    assert "the variables LORAQ_*" in do


def test_a_variable_that_is_misspelt_is_told_with_whatever_else_is_wrong(
    command: Command, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "config.toml").write_text("leese_s = 30\n")
    monkeypatch.setenv("LORAQ_CONFIG", str(tmp_path / "config.toml"))
    monkeypatch.setenv("LORAQ_STORGE", "/mnt/team")

    result = command("ls")

    wrong = ("LORAQ_STORGE is no setting; did you mean LORAQ_STORAGE?", "leese_s is no setting; did you mean lease_s?")
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


@pytest.mark.parametrize("arguments", [["ls"], ["show", "x"], ["up", "--no-worker"], ["doctor"], ["worker", "--cpu"]])
def test_every_command_refuses_a_config_file_that_is_not_there(
    command: Command, monkeypatch: pytest.MonkeyPatch, arguments: list[str]
) -> None:
    monkeypatch.setenv("LORAQ_CONFIG", "/gone.toml")
    monkeypatch.setattr("cli.machine.require_worker_extra", lambda: None)

    result = command(*arguments)

    assert (result.exit_code, result.stdout) == (1, "")
    assert result.stderr == "LORAQ_CONFIG names /gone.toml, which is not there\nCorrect it, or unset it.\n"


def test_a_profile_chooses_the_server(
    command: Command, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, redis_url: str
) -> None:
    """Whatever variable is exported beside it."""
    submit(Store(redis_url), new_job("rank.1"))
    file = tmp_path / "config.toml"
    file.write_text(f'[profiles.lab]\nredis_url = "{redis_url}"\n[profiles.away]\nredis_url = "redis://127.0.0.1:1/0"')
    monkeypatch.setenv("LORAQ_CONFIG", str(file))
    monkeypatch.setenv("LORAQ_REDIS_URL", "redis://127.0.0.1:1/0")

    assert "rank" in command("--profile", "lab", "ls").stdout
    assert command("--profile", "away", "ls").exit_code == errors.ServerError.exit_code
    unknown = command("--profile", "lap", "ls")
    names = "The profiles there are: lab, away."
    assert (unknown.exit_code, unknown.stderr) == (1, f"there is no profile 'lap' in {file}\n{names}\n")
    late = command("ls", "--profile", "lab")
    assert late.exit_code == 2
    assert "--profile goes before the command." in late.stderr


def test_group_is_lazy() -> None:
    assert isinstance(loraq, LazyGroup)
    assert loraq.commands == {}
