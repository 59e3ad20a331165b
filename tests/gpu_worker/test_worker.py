"""A real worker of the CPU at work: jobs that succeed, fail, are cancelled, and trainers that are killed under it."""

from __future__ import annotations

import json
import re
import threading
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import psutil
import pytest
from click.testing import CliRunner
from helpers import wait_for
from worker_process import START_S, Site, Worker, gone, succeeded_once, train_job

from cli.main import loraq
from gpu_worker.gpu import Device
from gpu_worker.trainer_process import worker_cache
from jobqueue.job import FailureReason, Job, JobState
from jobqueue.service import Client
from jobqueue.storage import blob_source
from jobqueue.transfer import Sender

SWEEP = """\
name: sweep
base_model: /stub/sleep:0.1
data: {source: rows.jsonl}
evaluation: {source: rows.jsonl}
resources: {memory: 1GiB}
sweep: {grid: {lora.r: [8, 16]}}
"""
ROW = '{"question": "?", "options": {"A": "a", "B": "b"}, "answer": "a", "answer_idx": "A"}\n'


@pytest.fixture(scope="module")
def here(one_site: Site) -> Site:
    return one_site


@pytest.fixture(scope="module")
def worker(here: Site) -> Worker:
    """One worker for all tests of this file: none of them harms more of it than its trainer."""
    return here.start()


def test_a_batch_succeeds_and_one_trainer_does_all_jobs_of_a_base_model(
    here: Site, worker: Worker, tmp_path: Path
) -> None:
    """axolotl#3079: two trials wrote into one folder; here each evaluation finds the adapter of its own trial."""
    file = tmp_path / "sweep.yaml"
    file.write_text(SWEEP)
    (tmp_path / "rows.jsonl").write_text(ROW * 8)
    client = Client(here.settings)
    batch = client.submit(client.plan(client.read(file)))

    wait_for(lambda: client.batch(batch.name).ended, START_S, "the batch ends")

    jobs = client.jobs(batch.name)
    assert {job.id: (job.state.value, job.attempt) for job in jobs} == dict.fromkeys(batch.jobs, ("succeeded", 1))
    assert len(jobs) == 6
    trained = [job for job in jobs if job.kind != "report"]
    assert len({job.outcome["pid"] for job in trained}) == 1, "the trainer was reused"
    for job in trained:
        manifest = here.storage.published(job.id, job.batch)
        assert manifest is not None
        assert "log.txt" in manifest.manifest["files"]
    assert client.job(f"{batch.name}.2.eval").outcome["adapter"] == f"{batch.name}.2"


def test_training_goes_on_from_a_trial_and_from_an_address(here: Site, worker: Worker, tmp_path: Path) -> None:
    file = tmp_path / "sweep.yaml"
    (tmp_path / "rows.jsonl").write_text(ROW * 8)
    one = {"base_model": "/stub/sleep:0.1", "data": {"source": "rows.jsonl"}, "resources": {"memory": "1GiB"}}
    client = Client(here.settings)

    def send(name: str, **changes: object) -> Job:
        file.write_text(json.dumps({"name": name, **one, **changes}))
        batch = client.submit(client.plan(client.read(file)))
        wait_for(lambda: client.batch(batch.name).ended, START_S, f"{name} ends")
        return client.job(f"{batch.name}.1")

    def trained(name: str, **changes: object) -> dict[str, object]:
        job = send(name, **changes)
        assert job.state is JobState.SUCCEEDED, job.message
        return job.outcome

    first = trained("first")
    questions = {"source": "rows.jsonl", "metrics": ["perplexity"]}
    ewc = {"ewc_lambda": 1.0}
    second = trained("second", from_adapter="first/1", original_task=questions, ewc=ewc)
    asked = {job.id: job.outcome["adapter"] for job in client.jobs("second") if job.kind == "evaluate"}
    assert asked == {"second.1.before": "first.1", "second.1.original": "second.1"}
    assert (first["adapter"], second["adapter"]) == (None, "first.1"), "the weights of the first"
    (tmp_path / "there").mkdir()
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        (tmp_path / "there" / name).write_text("weights of an address")
    handler = partial(SimpleHTTPRequestHandler, directory=tmp_path)
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        address = f"http://127.0.0.1:{server.server_port}"
        third = trained("third", from_adapter=f"{address}/there")
        failed = send("fourth", from_adapter=f"{address}/gone")
        server.shutdown()
    assert third["adapter"] == "weights of an address"
    assert failed.reason is FailureReason.BAD_SPEC
    assert f"there is no {address}/gone/adapter_config.json" in failed.message


def test_a_control_worker_takes_files_from_machines_that_cannot_reach_the_storage(
    here: Site, worker: Worker, tmp_path: Path
) -> None:
    file = tmp_path / "rows.jsonl"
    file.write_bytes(bytes(5 * 2**20))  # two pieces
    Sender(here.store, file, blob_source(file)).send()
    assert Path(here.storage.fetch_source(blob_source(file), tmp_path / "fetched")).read_bytes() == file.read_bytes()


def test_a_job_whose_submitter_knew_no_size_is_estimated_by_the_control_worker(here: Site, worker: Worker) -> None:
    here.submit("unsized.1", "tiny-0.1B", queue="", need=0)

    job = here.ended("unsized.1")

    assert job.state is JobState.SUCCEEDED
    assert job.need_bytes > 2**30


def test_a_trainer_that_is_killed_costs_one_failure_and_the_job_is_run_again(here: Site, worker: Worker) -> None:
    here.submit("trainer.1", "sleep:1")
    psutil.Process(here.beating("trainer.1")).kill()

    job = here.ended("trainer.1")

    assert succeeded_once(job)
    assert (job.attempt, job.failures) == (2, 1)
    assert job.history[0]["reason"] == FailureReason.CRASHED
    assert "SIGKILL" in job.history[0]["message"]
    assert len(here.trainers_in_turn("trainer.1")) == 2


def test_a_guardian_that_is_killed_takes_its_trainer_and_its_children_along(here: Site, worker: Worker) -> None:
    here.submit("guardian.1", "deaf/child/sleep:2")
    here.beating("guardian.1")
    before = here.left(trainers_only=True)
    worker.guardian().kill()

    assert len(before) == 3, "guardian, trainer, child"
    wait_for(lambda: gone(before), 3, "they have ended")
    job = here.ended("guardian.1")
    assert succeeded_once(job)
    assert (job.attempt, job.failures) == (2, 1)
    assert len(here.trainers_in_turn("guardian.1")) == 2


def test_a_running_job_is_cancelled_though_its_trainer_is_deaf_and_has_a_child_elsewhere(
    here: Site, worker: Worker
) -> None:
    """celery#7529, #1106: the subprocess went on. ray#23971: it kept its memory, and the next job died."""
    here.submit("cancel.1", "deaf/child/sleep:60")
    here.beating("cancel.1")
    assert Client(here.settings).cancel("cancel.1")[0].cancel_requested

    job = here.ended("cancel.1", 10)

    assert (job.state, job.message, job.failures) == (JobState.CANCELLED, "on request", 0)
    assert here.left(trainers_only=True) == [], "when the cancel is confirmed, nothing is left"


def test_a_poison_job_ends_at_its_cap_with_its_last_words(here: Site, worker: Worker) -> None:
    """celery#9082: such a job was redelivered without end."""
    here.submit("poison.1", "say:one/say:two/sleep:0.1/kill")

    job = here.ended("poison.1")

    assert (job.state, job.reason) == (JobState.FAILED, FailureReason.CRASHED)
    assert (job.attempt, job.failures, len(job.history)) == (3, 3, 3)
    assert job.message == (
        "the trainer was ended by SIGKILL (by hand, or by the kernel for want of memory); its last words: two"
    )
    assert job.outcome == {"last_lines": ["stub: poison.1", "one", "two"]}
    shown = CliRunner().invoke(loraq, ["show", "poison.1"], env=here.environment()).stdout
    assert "Last lines of the log\nstub: poison.1\none\ntwo\n" in shown
    assert re.search(r"what to do +Read `loraq logs JOB`", shown)
    assert len(set(here.trainers_in_turn("poison.1"))) == 3


def test_a_failure_that_the_trainer_names_is_the_jobs_and_the_worker_goes_on(here: Site, worker: Worker) -> None:
    here.submit("named.1", "fail:bad_data")

    job = here.ended("named.1")

    assert (job.state, job.reason, job.message) == (JobState.FAILED, FailureReason.BAD_DATA, "as asked")
    assert (job.attempt, job.failures) == (1, 1)
    assert worker.celery().is_running()


def test_the_log_of_a_job_is_in_its_stream_in_order_and_in_its_folder(here: Site, worker: Worker) -> None:
    here.submit("log.1", "sleep:0.2")
    job = here.ended("log.1")

    events = here.store.events("log.1", "0", 0)
    assert [event.text for event in events if event.kind == "log"] == ["stub: log.1"]
    assert [event.data["step"] for event in events if event.kind == "progress"] == [1, 2, 3, 4]
    assert [event.text for event in events if event.kind == "state"][-1] == "succeeded"
    assert here.storage.read_text(f"{job.outcome['folder']}/log.txt") == "stub: log.1\n"


def test_the_log_of_a_job_has_every_attempt_in_turn(here: Site, worker: Worker) -> None:
    """skypilot#5399: only the first stage was shown."""
    here.submit("turns.1", "sleep:0.7/oom:1/sleep:0.1")
    job = here.ended("turns.1")

    logged = [(event.attempt, event.text) for event in here.store.events("turns.1", "0", 0) if event.kind == "log"]
    assert logged == [(1, "stub: turns.1"), (2, "stub: turns.1")]
    assert succeeded_once(job)


def test_a_job_that_an_earlier_attempt_had_finished_is_settled_from_what_it_published(
    here: Site, worker: Worker, tmp_path: Path
) -> None:
    new = train_job("done.1", "sleep:5", submission="this")
    (tmp_path / "file").write_text("x")
    outcome = {"folder": "batches/done/done.1/1-aa", "loss": 1.5}
    manifest = {"job": "done.1", "submission": "this", "spec": json.loads(new.spec), "outcome": outcome}
    here.storage.publish(tmp_path, "batches/done/done.1/1-aa", manifest)
    here.store.submit("done", "ann", 1, "m", [new], ["done.1"])

    job = here.ended("done.1")

    assert succeeded_once(job)
    assert job.outcome == outcome
    assert here.lines("done.1") == []


def test_what_a_job_of_another_server_has_published_under_that_name_is_not_taken_for_the_jobs(
    here: Site, worker: Worker, tmp_path: Path
) -> None:
    (tmp_path / "file").write_text("x")
    spec = json.loads(train_job("other.1", "sleep:0.1").spec)
    manifest = {"job": "other.1", "submission": "that", "spec": spec, "outcome": {"folder": "old"}}
    here.storage.publish(tmp_path, "batches/other/other.1/1-aa", manifest)
    here.submit("other.1", "sleep:0.1", submission="this")

    job = here.ended("other.1")

    assert job.outcome["folder"] != "old"
    assert len(here.trainers_in_turn("other.1")) == 1


def test_nothing_is_left_in_the_scratch_folder(here: Site, worker: Worker) -> None:
    here.submit("scratch.1", "exit:3")
    here.ended("scratch.1")

    scratch = worker_cache(here.settings.data_dir, Device("cpu", "cpu")) / "scratch"
    wait_for(lambda: not list(scratch.iterdir()), 5, "the scratch folder is empty")
