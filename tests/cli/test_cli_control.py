"""`loraq ls`, `show` and `cancel`."""

from __future__ import annotations

import json
from dataclasses import fields, replace

import pytest
from cli_fakes import Command, FakeClient, make_job, trained, two_trials

from jobqueue.job import Batch, FailureReason, Job, JobState, WorkerInfo
from jobqueue.memory import GIB
from jobqueue.notification import Telling, Told

LONG = "llama-3.2-1b-medqa-learning-rate-and-rank"


@pytest.fixture(autouse=True)
def _batches(client: FakeClient) -> None:
    client.known = {"medqa": two_trials(), LONG: two_trials(LONG)[:4]}


def test_ls_without_a_batch(command: Command) -> None:
    header, first, second = command("ls").stdout.splitlines()

    assert header.split() == ["batch", "state", "trials", "done", "owner", "age", "base", "model"]
    assert first.split() == ["medqa", "failed", "3", "8/8", "ada", "10", "min", "org/tiny"]
    assert second.split()[0] == LONG


def test_ls_of_nothing_says_what_to_do(command: Command, client: FakeClient) -> None:
    client.known = {}

    assert "loraq submit" in command("ls").stdout
    assert json.loads(command("ls", "--json").stdout) == []


def test_json_has_the_fields_of_the_dataclasses(command: Command) -> None:
    batches = json.loads(command("ls", "--json").stdout)
    jobs = json.loads(command("ls", "medqa", "--json").stdout)
    job = json.loads(command("show", "medqa.1", "--json").stdout)
    batch = json.loads(command("show", "medqa", "--json").stdout)

    assert set(batches[0]) == set(batch) == {field.name for field in fields(Batch)} | {"state"}
    assert set(jobs[0]) == set(job) == {field.name for field in fields(Job)}
    assert batches[0]["states"] == {"succeeded": 6, "failed": 1, "cancelled": 1}
    assert jobs[4]["reason"] == "nan_loss"


@pytest.mark.parametrize("columns", [40, 60, 80, 140])
def test_narrow_terminal_never_breaks_ids(command: Command, columns: int) -> None:
    text = command("ls", LONG, columns=columns).stdout

    shown = [line.split()[0] for line in text.splitlines() if line.startswith(LONG)]
    assert shown == [f"{LONG}.1", f"{LONG}.1.eval", f"{LONG}.2", f"{LONG}.2.eval"]
    assert ("no room for:" in text) is (columns < 140)


def test_piped_table_has_whole_lines_and_no_control_codes(command: Command, client: FakeClient) -> None:
    client.known["medqa"][0] = make_job("medqa.1", trial=" ".join(f"key{i}={i}" for i in range(40)))

    lines = command("ls", "medqa").stdout.splitlines()

    assert len(lines) == 1 + len(client.known["medqa"])
    assert "key39=39" in lines[1]
    assert "\x1b" not in "".join(lines)


def test_show_of_a_job_has_attempts_memory_time_and_spec(command: Command, client: FakeClient) -> None:
    history = [
        {
            "attempt": 1,
            "worker": "old/gpu1",
            "claimed_at": 1000.0,
            "ended_at": 1065.0,
            "state": "queued",
            "reason": "out_of_memory",
            "message": "needed [2 GiB] more",
        }
    ]
    client.known["medqa"][0] = make_job("medqa.1", attempt=2, failures=1, history=history, outcome=trained())

    text = command("show", "medqa.1").stdout
    lines = [" ".join(line.split()) for line in text.splitlines()]

    assert not any(line.endswith(" ") for line in text.partition("Attempts")[0].splitlines())
    assert "peak reserved 3.0 GiB (3.8% of the GPU)" in lines
    assert "training 150.0 s (2.5 min)" in lines
    assert "max_steps: 20" in lines
    assert {"seed 3407", "padding free no", "trained parameters 11,000,000"} <= set(lines)
    validation = lines.index("Validation loss on 40 rows")
    assert lines[validation + 1 : validation + 3] == ["step 10 1.2500 (best, kept)", "step 20 1.3750"]
    assert any("queued again out_of_memory: needed [2 GiB] more" in line and "1 min 5 s" in line for line in lines)


def test_show_says_what_a_job_waits_for(command: Command, client: FakeClient) -> None:
    client.known["medqa"] = [
        make_job("medqa.1", JobState.RUNNING, progress={"phase": "train", "step": 3, "steps": 20, "loss": 1.5}),
        make_job("medqa.1.eval", JobState.WAITING, waits=1, needs=("medqa.1",)),
        make_job("medqa.2", JobState.WAITING, need_bytes=0, queue=""),
        make_job("medqa.report", JobState.WAITING, waits=3),
    ]

    def line(job_id: str, name: str) -> str:
        text = command("show", job_id).stdout
        return next(" ".join(line.split()) for line in text.splitlines() if line.startswith(name))

    assert line("medqa.1", "progress") == "progress train 3/20 loss 1.500"
    assert line("medqa.1.eval", "waits for") == "waits for medqa.1"
    assert line("medqa.2", "waits for") == "waits for a worker's estimate of its memory"
    assert line("medqa.report", "waits for") == "waits for medqa.1 medqa.1.eval medqa.2"


def test_show_says_that_no_living_worker_could_hold_a_queued_job(command: Command, client: FakeClient) -> None:
    client.known["medqa"] = [make_job("medqa.1", JobState.QUEUED, need_bytes=200 * GIB)]

    def waits_for() -> str:
        text = " ".join(command("show", "medqa.1").stdout.split())
        return text[text.index("waits for") :][:70]

    assert waits_for().startswith("waits for a worker needs 200.0 GiB")
    gpu = WorkerInfo("h/gpu0", "h", "NVIDIA", "", 79 * GIB, 1, (), 0.0, alive=True)
    control = WorkerInfo("h/control", "h", "control", "", 999 * GIB, 1, (), 0.0, alive=True)
    client.present = [gpu, replace(gpu, id="h/gpu1", usable_bytes=999 * GIB, alive=False), control]
    assert waits_for().startswith("waits for a larger worker: the largest that lives has 79.0 GiB")


def test_show_of_a_batch_whose_name_looks_like_a_job(command: Command, client: FakeClient) -> None:
    client.known["llama3.1"] = two_trials("llama3.1")[:2]

    assert "llama3.1.1.eval" in command("show", "llama3.1").stdout
    assert command("show", "llama3.2").exit_code == 6


def test_show_of_a_failed_batch_has_the_messages(command: Command) -> None:
    assert "medqa.3: the loss was NaN at step [12]" in command("show", "medqa").stdout


def test_show_of_a_batch_says_who_was_told_of_its_end(command: Command, client: FakeClient) -> None:
    assert "Told of its end" not in command("show", "medqa").stdout
    client.told = (
        Told("team", Telling.DELIVERED, 1, 1e9),
        Told("https://ci.example.org/x", Telling.GIVEN_UP, 10, 1e9, "it answered 502 Bad Gateway"),
    )

    lines = [" ".join(line.split()) for line in command("show", "medqa").stdout.splitlines()]
    at = lines.index("Told of its end")
    assert lines[at + 1].startswith("team delivered 2001-09-0")
    assert lines[at + 2].startswith("https://ci.example.org/x given up 2001-09-0")
    assert lines[at + 2].endswith("(try 10): it answered 502 Bad Gateway")
    assert json.loads(command("show", "medqa", "--json").stdout)["told"][0]["state"] == "delivered"


def test_cancel_goes_on_after_an_unknown_target(command: Command, client: FakeClient) -> None:
    client.known["medqa"] = [make_job("medqa.1", JobState.RUNNING), make_job("medqa.1.eval", JobState.WAITING)]

    result = command("cancel", "nothing", "medqa", LONG)

    assert result.exit_code == 6
    assert result.stdout.splitlines() == [
        "medqa: 2 jobs stopped or told to stop.",
        f"{LONG}: nothing left to stop.",
    ]
    assert "nothing" in result.stderr


def test_cancel_as_json(command: Command, client: FakeClient) -> None:
    client.known["medqa"] = [make_job("medqa.1", JobState.RUNNING), make_job("medqa.2")]

    jobs = json.loads(command("cancel", "medqa", "--json").stdout)

    assert [(job["id"], job["cancel_requested"]) for job in jobs] == [("medqa.1", True)]


def test_cancel_needs_a_target(command: Command) -> None:
    assert command("cancel").exit_code == 2


def test_states_say_why_and_that_a_job_is_stopping(command: Command, client: FakeClient) -> None:
    client.known["medqa"] = [
        make_job("medqa.1", JobState.RUNNING, cancel_requested=True),
        make_job("medqa.2", JobState.FAILED, reason=FailureReason.OUT_OF_MEMORY, message="too big"),
    ]

    text = command("ls", "medqa").stdout

    assert "stopping" in text
    assert "failed (out_of_memory)" in text
