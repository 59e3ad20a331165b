"""The report task over records and answers as workers leave them."""

from __future__ import annotations

import json
import time
from pathlib import Path
from threading import Event
from types import SimpleNamespace
from typing import Any, cast

import pytest

from gpu_worker import report
from gpu_worker.lease import Lease
from gpu_worker.patience import Patience
from gpu_worker.report import make_report
from jobqueue.job import Batch, Claim, Job, JobState
from jobqueue.settings import Settings
from jobqueue.storage import Storage
from jobqueue.store import Store

CLAIM = Claim("b.report", 1, "n", {"kind": "report", "batch": "b"}, "b", 0, 60.0)
AT_ONCE = cast("Patience", lambda what, work: work())
HARD = "<script>alert(1)</script> & which of\u2028A,\x85B?"  # markup, and line separators of Unicode's


class Records:
    """A store that knows one batch."""

    def __init__(self, jobs: list[Job]) -> None:
        self._jobs = jobs

    def batch(self, name: str) -> Batch:
        states = {state: sum(job.state is state for job in self._jobs) for state in JobState}
        return Batch(name, "ada", 0.0, 3, "org/m", states, tuple(job.id for job in self._jobs))

    def jobs(self, ids: tuple[str, ...]) -> list[Job]:
        return [job for job in self._jobs if job.id in ids]


def job(job_id: str, state: str, spec: dict[str, Any], outcome: dict[str, Any] | None = None, **fields: str) -> Job:
    batch = "" if job_id.startswith("base") else "b"
    record = {"id": job_id, "kind": spec["kind"], "state": state, "batch": batch, "trial": f"trial of {job_id}"}
    return Job.from_record({**record, "spec": json.dumps(spec), "outcome": json.dumps(outcome or {}), **fields})


def train(number: int, state: str, **fields: str) -> Job:
    spec = {"kind": "train", "base_model": "org/m", "lora": {"r": 2**number}}
    outcome = {"losses": [[1, 2.5, 0.1], [2, 1.5, 0.0]], "training": {"final_loss": 1.5}}
    return job(f"b.{number}", state, spec, outcome if state == "succeeded" else None, **fields)


def evaluation(job_id: str, right: list[bool], storage: Storage) -> Job:
    adapter = None if job_id.startswith("base") else job_id.removesuffix(".eval")
    spec = {"kind": "evaluate", "base_model": "org/m", "load_in_4bit": True, "adapter_job": adapter, "evaluation": {}}
    lines = [
        {
            "index": index,
            "answer": "A",
            "picks": {"likelihood": "A" if well else "B"},
            "right": ["likelihood"] if well else [],
            "question": HARD,
            "options": {"A": "yes", "B": "no"},
        }
        for index, well in enumerate(right)
    ]
    written = "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)  # as evaluations do
    storage.write_text(f"{job_id}/questions.jsonl", written)
    part = {"correct": sum(right), "accuracy": sum(right) / len(right), "interval": [0.1, 0.9]}
    outcome = {"questions": len(right), "likelihood": part, "folder": job_id}
    return job(job_id, "succeeded", spec, outcome)


@pytest.fixture
def storage(tmp_path: Path) -> Storage:
    return Storage(str(tmp_path))


def records(storage: Storage) -> Store:
    """One trial that is better, one that failed, one that was cancelled."""
    jobs = [
        train(1, "succeeded"),
        evaluation("b.1.eval", [True] * 16 + [False] * 4, storage),
        train(2, "failed", reason="nan_loss", message="the loss became NaN by step 2"),
        train(3, "cancelled", message="on request"),
        evaluation("base-1", [True] * 4 + [False] * 16, storage),
        job("b.report", "running", {"kind": "report", "batch": "b"}),
    ]
    return cast("Store", Records(jobs))


def test_report_lists_every_trial_with_its_reason(storage: Storage) -> None:
    made = make_report(CLAIM, records(storage), storage, AT_ONCE)

    assert [(t["job"], t["state"], t["reason"], t["message"]) for t in made["trials"]] == [
        ("b.1", "succeeded", None, ""),
        ("b.2", "failed", "nan_loss", "the loss became NaN by step 2"),
        ("b.3", "cancelled", None, "on request"),
    ]
    assert made["complete"]
    assert made["trials"][0]["losses"] == ((1, 2.5), (2, 1.5))


def test_report_has_the_tests_and_the_questions(storage: Storage) -> None:
    made = make_report(CLAIM, records(storage), storage, AT_ONCE)

    versus = made["trials"][0]["versus_base"]
    assert (versus["gained"], versus["lost"], versus["finding"]) == (12, 0, "better")
    assert versus["p_value"] == versus["p_holm"] == pytest.approx(2 / 2**12)
    assert versus["interval"][0] < versus["points"] == 60 < versus["interval"][1]
    assert [question["question"] for question in made["changed"]] == [HARD] * 12


def test_same_batch_same_bytes(storage: Storage, tmp_path: Path) -> None:
    make_report(CLAIM, records(storage), storage, AT_ONCE)
    first = (tmp_path / "batches/b/report.json").read_bytes()

    make_report(CLAIM, records(storage), storage, AT_ONCE)

    assert (tmp_path / "batches/b/report.json").read_bytes() == first
    assert json.loads(first)["batch"] == "b"


def test_answers_that_are_gone_leave_a_report_without_tests(storage: Storage, tmp_path: Path) -> None:
    there = records(storage)
    (tmp_path / "base-1/questions.jsonl").unlink()

    [best, *_] = make_report(CLAIM, there, storage, AT_ONCE)["trials"]

    assert (best["versus_base"]["points"], best["versus_base"]["finding"]) == (60.0, "not tested")


def test_the_time_that_the_statistics_take_is_not_the_storages(
    storage: Storage, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Found by the soak: scipy's first import on a busy machine passed for a storage that hangs."""
    build = report.build_report

    def slowly(*args: Any) -> Any:
        time.sleep(2.5)
        return build(*args)

    monkeypatch.setattr(report, "build_report", slowly)
    lease = cast("Lease", SimpleNamespace(lost=Event(), cancelled=Event()))
    settings = Settings(data_dir=tmp_path, storage_timeout_s=1.5)

    assert make_report(CLAIM, records(storage), storage, Patience(lease, settings, Event().is_set))["complete"]
