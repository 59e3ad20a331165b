"""`loraq watch` and `loraq logs`."""

from __future__ import annotations

import io
from dataclasses import replace
from typing import Any

import pytest
from cli_fakes import Command, FakeClient, make_events, make_job
from rich.console import Console

from cli.watch import running_table
from jobqueue.errors import ServerError
from jobqueue.job import FailureReason, Job, JobState


def running(step: int, job_id: str = "medqa.1", **fields: Any) -> Job:
    progress = {
        "phase": "train",
        "step": step,
        "steps": 20,
        "loss": 1.25,
        "tokens_per_s": 5123.4,
        "reserved_bytes": 2**31,
    }
    return make_job(job_id, JobState.RUNNING, trial="r=8 learning_rate=0.0002", progress=progress, **fields)


def test_watch_in_a_pipe_prints_each_change_once(command: Command, client: FakeClient) -> None:
    client.known["medqa"] = []
    waiting = make_job("medqa.1.eval", JobState.WAITING)
    oom = {"reason": FailureReason.OUT_OF_MEMORY, "message": "too big [x]"}
    client.looks = [
        [make_job("medqa.1", JobState.QUEUED), waiting],
        [running(1), waiting],
        [running(2), waiting],
        [make_job("medqa.1", JobState.QUEUED, attempt=1, **oom), waiting],
        [running(1, attempt=2), waiting],
        [make_job("medqa.1", attempt=2), make_job("medqa.1.eval", JobState.FAILED, **oom)],
    ]

    result = command("watch", "medqa")

    assert result.exit_code == 0
    lines = result.stdout.splitlines()
    assert lines[:2] == ["1 waiting, 1 queued", "medqa.1: running on box/gpu0"]
    assert "medqa.1: queued again (out_of_memory): too big [x]" in lines
    assert "medqa.1: running on box/gpu0, attempt 2" in lines
    assert lines[-3:] == [
        "medqa.1: succeeded after 3 min 20 s",
        "medqa.1.eval: failed (out_of_memory): too big [x]",
        "medqa has ended: 1 succeeded, 1 failed. `loraq show medqa` says why.",
    ]
    assert sum("running" in line for line in lines) == 2


def test_watch_on_a_terminal_shows_progress_and_ends(command: Command, client: FakeClient) -> None:
    client.known["medqa"] = []
    client.looks = [[running(5)], [running(6)], [make_job("medqa.1")]]

    result = command("watch", "medqa", columns=120)

    assert result.exit_code == 0
    assert "5/20" in result.stdout
    assert "medqa.1: succeeded after 3 min 20 s" in result.stdout
    assert "medqa has ended: 1 succeeded." in result.stdout


def test_watch_ends_with_the_command_that_compares_the_trials(command: Command, client: FakeClient) -> None:
    client.known["medqa"] = []
    client.looks = [[running(6)], [make_job("medqa.1"), make_job("medqa.report")]]

    result = command("watch", "medqa")

    assert result.stdout.splitlines()[-1] == "`loraq results medqa` compares its trials."


@pytest.mark.parametrize("columns", [None, 120])
def test_watch_outlives_the_server(
    columns: int | None, command: Command, client: FakeClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    client.known["medqa"] = []
    answers = [[running(5)], ServerError("no answer"), ServerError("no answer"), [make_job("medqa.1")]]

    def jobs(batch: str) -> list[Job]:
        answer = answers.pop(0)
        if isinstance(answer, ServerError):
            raise answer
        client.known[batch] = answer
        return answer

    monkeypatch.setattr(client, "jobs", jobs)

    result = command("watch", "medqa", **({"columns": columns} if columns else {}))

    assert result.exit_code == 0
    # On a terminal it stands on lines of its own, above the display that is refreshed
    said, other = (result.stdout, result.stderr) if columns else (result.stderr, result.stdout)
    assert said.count("no answer") == 1
    assert "answers again" in said
    assert "answer" not in other


def test_interrupted_watch_leaves_the_batch_alone(
    command: Command, client: FakeClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    client.known["medqa"] = [running(5)]

    def interrupt(_: float) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("time.sleep", interrupt)

    result = command("watch", "medqa")

    assert result.exit_code == 130
    assert "medqa goes on" in result.stdout
    assert "loraq cancel medqa" in result.stdout


def test_watch_of_no_batch_is_an_error(command: Command, client: FakeClient) -> None:
    assert command("watch", "nothing").exit_code == 6


@pytest.mark.parametrize(
    ("width", "has_trial", "has_tokens"), [(40, False, False), (80, True, False), (120, True, True)]
)
def test_running_table_fits_the_terminal(width: int, has_trial: bool, has_tokens: bool) -> None:
    jobs = [running(5, f"a-batch-of-mine.{n}") for n in range(3)] + [make_job("a-batch-of-mine.4", JobState.QUEUED)]
    out = Console(width=width, height=20, force_terminal=True, color_system=None, file=io.StringIO())

    out.print(running_table(out, jobs))

    text = out.file.getvalue()  # type: ignore[attr-defined]
    assert all(f"a-batch-of-mine.{n}" in text for n in range(3))
    assert "a-batch-of-mine.4" not in text
    assert "1 queued, 3 running" in text
    assert ("learning_rate" in text) is has_trial
    assert ("5,123" in text) is has_tokens
    assert all(len(line) <= width for line in text.splitlines())


def test_more_running_jobs_than_lines() -> None:
    out = Console(width=100, height=10, force_terminal=True, color_system=None, file=io.StringIO())

    out.print(running_table(out, [running(5, f"b.{n}") for n in range(50)]))

    text = out.file.getvalue()  # type: ignore[attr-defined]
    assert len(text.splitlines()) <= 10
    assert "and 44 more running" in text


def test_a_job_shows_how_long_it_still_takes_and_what_it_has_needed_of_its_promise() -> None:
    out = Console(width=140, height=10, force_terminal=True, color_system=None, file=io.StringIO())
    job = running(4)
    known = {"seconds_per_step": 5.0, "peak_bytes": 3 * 2**30, "promised_bytes": 5 * 2**30}

    out.print(running_table(out, [replace(job, progress=job.progress | known)]))

    text = out.file.getvalue()  # type: ignore[attr-defined]
    assert "1 min 20 s" in text, "16 steps at 5 s"
    assert "3.0/5.0 GiB" in text


def test_a_table_goes_on_to_follow_the_width_of_the_terminal() -> None:
    out = Console(force_terminal=True, file=io.StringIO(), _environ={"COLUMNS": "100", "LINES": "20"})
    running_table(out, [running(5)])

    assert out._width == 100, "as the environment says, not what the table once had"
    free = Console(force_terminal=True, file=io.StringIO(), _environ={})
    running_table(free, [running(5)])

    assert free._width is None


def test_logs_are_printed_as_they_are(command: Command, client: FakeClient) -> None:
    client.known["medqa"] = [make_job("medqa.1")]
    client.streams = [
        make_events(
            ("state", "running on box/gpu0"),
            ("log", "[bold]{'loss': 1.5}[/bold] :smile: \x1b[31mred\x1b[0m \x07"),
            ("log", "x" * 300),
            ("progress", {"phase": "train", "step": 1, "steps": 20}),
        ),
        make_events(("state", "running on box/gpu1"), ("log", ""), ("log", "again"), first=5, attempt=2),
    ]

    lines = command("logs", "medqa.1").stdout.splitlines()

    assert lines[0].endswith("attempt 1: running on box/gpu0 ---")
    assert lines[1].rstrip() == "[bold]{'loss': 1.5}[/bold] :smile: red"
    assert lines[2] == "x" * 300
    assert lines[3].endswith("attempt 2: running on box/gpu1 ---")
    assert lines[4:] == ["", "again"]


@pytest.mark.parametrize(("lines", "shown"), [("0", []), ("1", ["c"]), ("2", ["b", "c"]), ("9", ["a", "b", "c"])])
def test_last_lines(command: Command, client: FakeClient, lines: str, shown: list[str]) -> None:
    client.known["medqa"] = [make_job("medqa.1")]
    client.streams = [make_events(("log", "a"), ("log", "b"), ("progress", {"phase": "train"}), ("log", "c"))]

    printed = command("logs", "medqa.1", "-n", lines).stdout.splitlines()

    assert [line for line in printed if not line.startswith("---")] == shown


def test_following_outlives_the_server_without_gap_or_repeat(command: Command, client: FakeClient) -> None:
    client.known["medqa"] = [make_job("medqa.1")]
    client.streams = [
        make_events(("log", "line 1")),
        ServerError("no answer"),
        ServerError("no answer"),
        make_events(("log", "line 2"), ("progress", {"phase": "train", "step": 1, "steps": 9}), first=2),
        make_events(("log", "line 4"), ("state", "succeeded"), first=4),
        make_events(("log", "line 6"), first=6),
    ]

    result = command("logs", "medqa.1", "-f")

    assert result.exit_code == 0
    assert [line for line in result.stdout.splitlines() if "line" in line] == [f"line {n}" for n in (1, 2, 4, 6)]
    assert "train 1/9" in result.stdout
    assert result.stderr.count("no answer") == 1
    assert result.stderr.count("answers again") == 1


def test_logs_of_a_job_that_has_printed_nothing_say_why(command: Command, client: FakeClient) -> None:
    client.known["medqa"] = [make_job("medqa.1", JobState.QUEUED)]

    result = command("logs", "medqa.1")

    assert (result.stdout, result.stderr) == ("", "medqa.1 is queued: it has printed nothing.\n")


def test_logs_of_no_job_is_an_error(command: Command, client: FakeClient) -> None:
    assert command("logs", "nothing.1").exit_code == 6
