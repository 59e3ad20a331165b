"""`loraq results` in its formats."""

from __future__ import annotations

import csv
import json

import pytest
from cli_fakes import Command, FakeClient, make_job, scored, trained, two_trials
from click import unstyle

from jobqueue.job import JobState
from jobqueue.results import BatchReport


@pytest.fixture(autouse=True)
def _finished(client: FakeClient) -> None:
    client.known["medqa"] = two_trials()


def test_best_first_then_failed_then_the_base_model(command: Command) -> None:
    lines = command("results", "medqa").stdout.splitlines()

    assert lines[0] == "medqa: org/tiny, 100 questions"
    assert [line.split()[0] for line in lines[3:7]] == [
        "learning_rate=0.0002",
        "learning_rate=0.0001",
        "learning_rate=0.1",
        "base",
    ]
    assert all(cell in lines[3] for cell in ("52.0%", "[43.0, 61.0]", "+22.0", "3.0 GiB"))
    assert "learning_rate=0.1 r=8 failed (nan_loss): the loss was NaN at step [12]" in lines
    assert any(line.startswith("Best: learning_rate=0.0002 r=8 with 52.0% (likelihood), 22.0 points") for line in lines)


@pytest.mark.parametrize("columns", [60, 80, 140, 200])
def test_table_adapts_to_the_terminal(command: Command, columns: int) -> None:
    text = unstyle(command("results", "medqa", columns=columns).stdout)

    assert all(len(line) <= columns for line in text.splitlines())
    assert "52.0%" in text
    assert ("5,123" in text) is (columns >= 140)


def test_unfinished_batch_says_so(command: Command, client: FakeClient) -> None:
    client.known["medqa"] = [
        make_job("medqa.1", trial="r=8", outcome=trained()),
        make_job("medqa.1.eval", trial="r=8", outcome=scored(40, 38)),
        make_job("medqa.2", JobState.RUNNING, trial="r=16"),
    ]

    text = command("results", "medqa").stdout

    assert "Best so far: r=8" in text
    assert "The batch is still at work: `loraq watch medqa`." in text


def test_json_can_be_read_back(command: Command) -> None:
    for arguments in (["--json"], ["--format", "json"]):
        document = json.loads(command("results", "medqa", *arguments).stdout)

        report = BatchReport.from_dict(document)
        assert json.loads(json.dumps(report.to_dict())) == document
        assert document["trials"][0]["scores"]["likelihood"]["correct"] == 52


def test_csv_has_plain_numbers(command: Command) -> None:
    rows = list(csv.DictReader(command("results", "medqa", "--format", "csv").stdout.splitlines()))

    assert [row["kind"] for row in rows] == ["trial", "trial", "trial", "base"]
    assert (float(rows[0]["likelihood"]), float(rows[0]["points"]), rows[0]["peak_bytes"]) == (
        0.52,
        22.0,
        str(3 * 2**30),
    )
    assert rows[2]["message"] == "the loss was NaN at step [12]"
    assert rows[2]["likelihood"] == ""


def test_markdown_is_a_table(command: Command) -> None:
    lines = command("results", "medqa", "--format", "markdown").stdout.splitlines()

    assert lines[0].startswith("| trial | job | state | likelihood |")
    assert {line.count("|") for line in lines[:6]} == {lines[0].count("|")}
    assert lines[-1].startswith("Best: ")


def test_results_of_no_batch_is_an_error(command: Command) -> None:
    assert command("results", "nothing").exit_code == 6
