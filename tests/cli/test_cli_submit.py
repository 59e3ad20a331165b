"""`loraq submit`: dry run, the real one, waiting for it."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import click
import pytest
from cli_fakes import Command, FakeClient, make_job, two_trials

from jobqueue.job import JobState, WorkerInfo

SWEEP = """\
name: medqa
base_model: org/tiny
data: {source: org/questions}
evaluation: {source: org/questions}
sweep:
  grid: {lora.r: [8, 16]}
"""


@pytest.fixture
def sweep_file(tmp_path: Path) -> str:
    file = tmp_path / "sweep.yaml"
    file.write_text(SWEEP)
    return str(file)


def test_dry_run_shows_the_jobs_and_submits_nothing(command: Command, client: FakeClient, sweep_file: str) -> None:
    result = command("submit", sweep_file, "--dry-run")

    assert result.exit_code == 0, result.stderr
    rows = [line.split() for line in result.stdout.splitlines()]
    assert ["1", "train", "r=8", "by", "a", "worker"] in rows
    assert ["2.eval", "evaluate", "r=16", "2", "by", "a", "worker"] in rows
    assert "medqa: 6 jobs for 2 trials. Nothing was submitted." in result.stdout
    assert client.submitted == []


def test_dry_run_fits_a_narrow_terminal(command: Command, sweep_file: str) -> None:
    lines = click.unstyle(command("submit", sweep_file, "--dry-run", columns=40).stdout).splitlines()

    assert max(map(len, lines)) <= 40
    assert [line.split()[0] for line in lines[:4]] == ["id", "kind", "1", "train"]


def test_dry_run_names_the_votes_that_are_no_jobs(command: Command, sweep_file: str) -> None:
    ensembles = "ensembles=[{name: mean, method: cat}, {name: poll, method: vote}]"
    out = command("submit", sweep_file, "--dry-run", "--set", ensembles).stdout
    assert ["mean", "evaluate", "mean", "(cat", "of", "2)"] in [line.split()[:6] for line in out.splitlines()]
    assert "The report counts the votes of poll." in out


def test_dry_run_as_json(command: Command, client: FakeClient, sweep_file: str) -> None:
    document = json.loads(command("submit", sweep_file, "--dry-run", "--json", "--set", "training.max_steps=7").stdout)

    assert set(document) == {"name", "file", "jobs", "warnings"}
    assert set(document["jobs"][0]) == {"id", "kind", "trial", "spec", "need_bytes", "needs", "follows"}
    assert document["jobs"][0]["spec"]["training"]["max_steps"] == 7


def test_submit_says_what_to_type_next(command: Command, client: FakeClient, sweep_file: str) -> None:
    result = command("submit", sweep_file, "--force")

    assert result.exit_code == 0
    assert result.stdout.splitlines()[0] == "Submitted medqa: 8 jobs for 3 trials."
    assert "loraq watch medqa" in result.stdout
    assert "loraq results medqa" in result.stdout
    assert client.forced


def test_warnings_go_to_stderr(command: Command, client: FakeClient, tmp_path: Path) -> None:
    (tmp_path / "sweep.yaml").write_text(SWEEP.replace("org/tiny", "/no/such/model"))

    result = command("submit", str(tmp_path / "sweep.yaml"), "--json")

    assert json.loads(result.stdout)["name"] == "medqa"
    assert result.stderr.startswith("warning: /no/such/model")


def test_that_every_worker_is_drained_or_sick_is_said(command: Command, client: FakeClient, sweep_file: str) -> None:
    client.known["medqa"] = [make_job("medqa.1", JobState.QUEUED)]
    drained = WorkerInfo("h/gpu0", "h", "NVIDIA", "", 2**34, 1, (), 0.0, alive=True, note="drained")
    sick, well = replace(drained, note="sick: Xid 79 at 12:03"), replace(drained, note="2 GiB held by other processes")
    text = "no worker takes a job now; `loraq workers` says why"

    for present, said in (([drained, sick], True), ([drained, well], False)):
        client.present = present
        assert (text in command("submit", sweep_file).stderr) is said


def test_that_nobody_is_there_to_train_is_said(command: Command, client: FakeClient, sweep_file: str) -> None:
    client.known["medqa"] = [make_job("medqa.1", JobState.QUEUED)]
    worker = WorkerInfo("h/gpu0", "h", "NVIDIA", "", 2**34, 1, (), 0.0, alive=False)
    client.present = [worker, replace(worker, id="h/control", device="control", alive=True)]
    alone = command("submit", sweep_file)
    client.present = [replace(worker, alive=True)]
    with_one = command("submit", sweep_file)

    assert (alone.exit_code, with_one.exit_code) == (0, 0)
    assert "no worker that trains is alive" in alone.stderr
    assert "no worker" not in with_one.stderr


def test_what_was_submitted_before_is_said_and_not_submitted_again(
    command: Command, client: FakeClient, sweep_file: str
) -> None:
    command("submit", sweep_file)
    second = command("submit", sweep_file)
    third = command("submit", sweep_file, "--again")

    assert second.exit_code == 0
    assert "medqa is that already (failed); `loraq retry medqa` runs again what did not succeed" in second.stderr
    assert "Submitted" not in second.stdout
    assert "already" not in third.stderr


def test_mistakes_are_all_reported_with_their_lines(command: Command, client: FakeClient, tmp_path: Path) -> None:
    (tmp_path / "sweep.yaml").write_text(
        SWEEP.replace("lora.r", "lora.rank").replace("source: org/questions}", "sorce: x}")
    )

    result = command("submit", str(tmp_path / "sweep.yaml"))

    assert result.exit_code == 3
    assert "sweep.yaml:3: data.sorce: unknown key 'sorce'; did you mean source?" in result.stderr
    assert "sweep.yaml:4: " in result.stderr
    assert client.submitted == []


def test_missing_file_is_a_spec_error(command: Command, client: FakeClient) -> None:
    result = command("submit", "nowhere.yaml")

    assert result.exit_code == 3
    assert "nowhere.yaml: there is no such file" in result.stderr


def test_wait_ends_with_the_results(command: Command, client: FakeClient, sweep_file: str) -> None:
    client.known["medqa"] = two_trials()[:4]

    result = command("submit", sweep_file, "--wait")

    assert result.exit_code == 0, result.stderr
    assert "medqa has ended: 4 succeeded." in result.stdout
    assert "Best: learning_rate=0.0002 r=8" in result.stdout


def test_wait_fails_with_the_batch(command: Command, client: FakeClient, sweep_file: str) -> None:
    result = command("submit", sweep_file, "--wait", "--json")

    assert result.exit_code == 10
    assert json.loads(result.stdout)["batch"] == "medqa"
    assert "did not succeed" in result.stderr
    assert client.batch("medqa").state is JobState.FAILED


def test_what_is_unusual_is_said_and_stops_nothing(command: Command, client: FakeClient, sweep_file: str) -> None:
    fast = ("--set", "training.learning_rate=0.1")
    words = "learning_rate 0.1 is above the usual range for method qlora (5e-06 to 0.0005)"

    result = command("submit", sweep_file, "--force", *fast)

    assert result.exit_code == 0
    assert result.stderr.splitlines() == [f"warning: {words}"], "once, though there are two trials"
    assert words in command("submit", sweep_file, "--dry-run", *fast).stderr
    assert json.loads(command("submit", sweep_file, "--dry-run", "--json", *fast).stdout)["warnings"] == [words]


def test_a_webhook_that_nobody_could_call_is_said(command: Command, client: FakeClient, sweep_file: str) -> None:
    client.known["medqa"] = [make_job("medqa.1", JobState.QUEUED)]
    control = WorkerInfo(
        "h/control", "h", "control", "", 0, 4, (), 0.0, alive=True, webhooks=["team", "ci.example.org"]
    )
    elsewhere, url = "https://elsewhere.example/x", "https://ci.example.org/x"

    def said(*notify: str) -> list[str]:
        result = command("submit", sweep_file, "--again", "--set", f"notify=[{', '.join(notify)}]")
        return [line for line in result.stderr.splitlines() if "would not be told" in line]

    client.present = [control]
    assert said("team", url) == []
    assert [line.split()[1] for line in said("team", "nobody", elsewhere)] == ["nobody", elsewhere]
    client.present = [replace(control, alive=False)]
    assert len(said("team")) == 1
