"""A client that answers from memory, for what the command line makes of the answers."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from click.testing import Result

from jobqueue.aggregate import build_report
from jobqueue.answers import Answer
from jobqueue.errors import CapacityError, DataError, LoraqError, NotFoundError
from jobqueue.events import Event
from jobqueue.export_spec import ExportOptions
from jobqueue.exports import plan_export
from jobqueue.job import Batch, FailureReason, Job, JobKind, JobState, WorkerInfo
from jobqueue.notification import Told
from jobqueue.overview import Overview
from jobqueue.plan import Plan, make_plan
from jobqueue.preview import Preview
from jobqueue.results import BatchReport
from jobqueue.sweep import Sweep, read_sweep

EVALUATION = {"source": "questions.jsonl", "split": "test", "metrics": ["likelihood", "generated"]}


def make_job(job_id: str, state: JobState = JobState.SUCCEEDED, **fields: Any) -> Job:
    """A job of the batch that its id names; what is not given is as for a job that did well."""
    trial = job_id.removesuffix(".eval").removesuffix(".original").removesuffix(".export")
    batch = "" if job_id.startswith("base-") else trial.rpartition(".")[0]
    kind = JobKind.TRAIN
    spec: dict[str, Any] = {"kind": "train", "base_model": "org/tiny", "lora": {"r": 8}, "training": {"max_steps": 20}}
    if job_id.endswith((".eval", ".original", "report")) or not batch:
        kind = JobKind.REPORT if job_id.endswith("report") else JobKind.EVALUATE
        adapter = trial if batch else None
        spec = {"kind": "evaluate", "base_model": "org/tiny", "adapter_job": adapter, "load_in_4bit": True}
        spec |= {"evaluation": EVALUATION, "max_seq_length": 2048, "method": "qlora"}
        spec |= {"original_task": job_id.endswith(".original")}
    if job_id.endswith(".export"):
        kind = JobKind.EXPORT
        spec = {"kind": "export", "base_model": "org/tiny", "adapter_job": job_id.removesuffix(".export")}
    started = state not in (JobState.WAITING, JobState.QUEUED)
    known: dict[str, Any] = {
        "id": job_id,
        "kind": kind,
        "state": state,
        "batch": batch,
        "trial": "",
        "owner": "ada",
        "spec": spec,
        "priority": 0,
        "need_bytes": 3 * 2**30,
        "attempt": 1 if started else 0,
        "failures": 0,
        "submitted_at": time.time() - 600,
        "queued_at": time.time() - 600,
        "claimed_at": time.time() - 500 if started else 0.0,
        "ended_at": time.time() - 300 if state.final else 0.0,
        "not_before": 0.0,
        "worker": "box/gpu0" if started else "",
        "reason": None,
        "message": "",
        "cancel_requested": False,
        "waits": 0,
        "queue": "gpu8",
    }
    return Job(**known | fields)


def trained(steps: int = 20, loss: float = 1.25) -> dict[str, Any]:
    """The outcome of a train job."""
    gib = 2**30
    return {
        "memory": {
            "kind": "gpu",
            "gpu": "NVIDIA H100",
            "total_bytes": 80 * gib,
            "reserved_at_start_bytes": 2 * gib,
            "peak_reserved_bytes": 3 * gib,
            "peak_for_training_bytes": gib,
            "peak_allocated_bytes": int(2.5 * gib),
            "peak_percent": 3.75,
            "peak_for_training_percent": 1.25,
        },
        "time": {"load_s": 9.5, "data_s": 1.0, "train_s": 150.0, "save_s": 0.5, "total_s": 161.0, "train_minutes": 2.5},
        "training": {
            "steps": steps,
            "tokens_per_s": 5123.4,
            "final_loss": loss,
            "trained_parameters": 11_000_000,
            "seed": 3407,
            "padding_free": False,
        },
        "losses": [[1, 2.0, 1e-4], [steps // 2, 1.5, 1e-4], [steps, loss, 0.0]],
        "validation": {"rows": 40, "losses": [[10, 1.25], [steps, 1.375]], "best_step": 10, "kept_step": 10},
        "versions": {"unsloth": "2026.1.1"},
    }


def scored(likelihood: int, generated: int, questions: int = 100) -> dict[str, Any]:
    """The outcome of an evaluation."""

    def part(correct: int) -> dict[str, Any]:
        share = correct / questions
        return {"correct": correct, "accuracy": share, "interval": [share - 0.09, share + 0.09]}

    return {"questions": questions, "likelihood": part(likelihood), "generated": part(generated)}


def exported(difference: float = 0.004, base_difference: float | None = 2.5) -> dict[str, Any]:
    """The outcome of an export."""
    made = {
        "tokens": 120, "same_tokens": 119, "difference": difference, "tolerance": 0.25,
        "base_difference": base_difference,
    }  # fmt: skip
    return {
        "folder": "batches/x/1-a",
        "exports": [
            {"format": "merged_16bit", "path": "merged_16bit", **made},
            {"format": "gguf q8_0", "path": "gguf/medqa.1-Q8_0.gguf", **made},
        ],
    }


def make_batch(name: str, jobs: Sequence[Job]) -> Batch:
    states = [job.state for job in jobs]
    return Batch(
        name=name,
        owner="ada",
        submitted_at=time.time() - 600,
        trials=sum(job.kind is JobKind.TRAIN for job in jobs),
        base_model="org/tiny",
        states={state: states.count(state) for state in JobState if state in states},
        jobs=tuple(job.id for job in jobs),
    )


def two_trials(name: str = "medqa") -> list[Job]:
    """A finished batch in which one trial is better, and one that failed."""

    def train(number: int, rate: float, state: JobState = JobState.SUCCEEDED, **fields: Any) -> Job:
        made = make_job(f"{name}.{number}", state, trial=f"learning_rate={rate:g} r=8", **fields)
        spec = {**made.spec, "training": {"max_steps": 20, "learning_rate": rate}}
        return replace(made, spec=spec, history=[{"claimed_at": 0.0, "ended_at": 1080.0}])

    def evaluate(number: int, rate: float, state: JobState = JobState.SUCCEEDED, **fields: Any) -> Job:
        made = make_job(f"{name}.{number}.eval", state, trial=f"learning_rate={rate:g} r=8", **fields)
        return replace(made, history=[{"claimed_at": 1080.0, "ended_at": 1200.0}])

    return [
        train(1, 1e-4, outcome=trained(loss=1.5)),
        evaluate(1, 1e-4, outcome=scored(40, 38)),
        train(2, 2e-4, outcome=trained(loss=1.25)),
        evaluate(2, 2e-4, outcome=scored(52, 50)),
        train(3, 0.1, JobState.FAILED, reason=FailureReason.NAN_LOSS, message="the loss was NaN at step [12]"),
        evaluate(3, 0.1, JobState.CANCELLED),
        make_job("base-0123456789ab", outcome=scored(30, 29)),
        make_job(f"{name}.report"),
    ]


def answers_of(*right: int, of: int = 100, question: str = "Which one?") -> dict[int, Answer]:
    """The answers of a model that has these questions right: A is, and else it says B."""
    metrics = frozenset({"likelihood", "generated"})
    return {
        index: Answer(
            index,
            "A",
            dict.fromkeys(metrics, "A" if index in right else "B"),
            metrics if index in right else frozenset(),
            question,
            {"A": "the <b>first</b>", "B": "the second & last"},
        )
        for index in range(of)
    }


def two_trials_answers(name: str = "medqa", **fields: Any) -> dict[str, dict[int, Answer]]:
    """What the models of `two_trials` answered: the first trial is not shown to be better than the base model."""
    return {
        "base-0123456789ab": answers_of(*range(30), **fields),
        f"{name}.1.eval": answers_of(*range(15, 55), **fields),
        f"{name}.2.eval": answers_of(*range(2, 54), **fields),
    }


@dataclass
class FakeClient:
    """Answers what the service would; `looks` are the successive states of the batch that is watched."""

    known: dict[str, list[Job]] = field(default_factory=dict)
    looks: list[list[Job]] = field(default_factory=list)
    streams: list[list[Event] | LoraqError] = field(default_factory=list)
    submitted: list[Plan] = field(default_factory=list)
    forced: bool = False
    answers: dict[str, dict[int, Answer]] = field(default_factory=dict)
    price: float | dict[str, float] | None = None
    risks: list[str] = field(default_factory=list)
    present: list[WorkerInfo] = field(default_factory=list)
    told: tuple[Told, ...] = ()  # who was told that a batch has ended
    previewed: Preview | None = None  # by a worker
    question: Job | None = None  # what `ask` makes
    asked: tuple[Any, ...] = ()  # what it was called with
    cancelled: list[str] = field(default_factory=list)

    def read(self, file: Path, sets: Sequence[str] = ()) -> Sweep:
        return read_sweep(file, sets)

    def plan(self, sweep: Sweep) -> Plan:
        return make_plan(sweep, workers_are_here=False)

    def warnings(self) -> list[str]:
        return self.risks

    def plan_export(self, trial: str, options: ExportOptions) -> Plan:
        return plan_export(trial, options, self.job)

    def find(self, plan: Plan) -> Batch | None:
        return self.batch(plan.sweep.name) if plan.key in [before.key for before in self.submitted] else None

    def submit(self, plan: Plan, *, force: bool = False, again: bool = False, progress: Any = None) -> Batch:
        self.submitted.append(plan)
        self.forced = force
        if not self.known:
            self.known[plan.sweep.name] = two_trials(plan.sweep.name)
        return self.batch(plan.sweep.name)

    def preview(self, sweep: Sweep, row: int | None = None, **options: Any) -> Preview:
        if self.previewed is None:
            raise CapacityError("no control worker is alive to make the preview", "Start one.")
        self.asked = (sweep.name, row, options)
        return self.previewed

    def ask(self, trial: str, prompts: Sequence[str], **options: Any) -> Job:
        if not prompts:
            raise DataError("there is no prompt", "")
        self.asked = (trial, prompts, options)
        assert self.question is not None
        return self.question

    def batches(self) -> list[Batch]:
        return [make_batch(name, jobs) for name, jobs in self.known.items()]

    def batch(self, name: str) -> Batch:
        if name not in self.known:
            raise NotFoundError(f"there is no batch {name!r}", "See `loraq ls`.")
        return replace(make_batch(name, self.known[name]), told=self.told)

    def jobs(self, batch: str) -> list[Job]:
        self.batch(batch)
        if self.looks:
            self.known[batch] = self.looks.pop(0)
        return self.known[batch]

    def job(self, job_id: str) -> Job:
        if self.question is not None and self.question.id == job_id:
            return replace(self.question, state=JobState.RUNNING) if self.streams else self.question
        for jobs in self.known.values():
            for job in jobs:
                if job.id == job_id:
                    return job
        raise NotFoundError(f"there is no job {job_id!r}", "See `loraq ls BATCH`.")

    def cancel(self, target: str) -> list[Job]:
        self.cancelled.append(target)
        jobs = self.known[target] if target in self.known else [self.job(target)]
        return [replace(job, cancel_requested=True) for job in jobs if not job.state.final]

    def workers(self) -> list[WorkerInfo]:
        return self.present

    def overview(self, most: int = 0) -> Overview:
        return Overview(time.time(), "", "", tuple(self.present), (), {}, {}, {}, (), (), None)

    def events(self, job_id: str, after: str = "0", block_s: float = 0) -> list[Event]:
        """The next of `streams`, which must begin after `after`; nothing when they are used up."""
        if not self.streams:
            return []
        events = self.streams[0]
        if isinstance(events, LoraqError):
            if not block_s:  # what is stored is read before anything is followed
                return []
            raise self.streams.pop(0)  # type: ignore[misc]
        assert not events or float(events[0].id) > float(after), "an entry would be shown twice"
        return self.streams.pop(0)  # type: ignore[return-value]

    def report(self, batch: str) -> BatchReport:
        return build_report(self.batch(batch), self.jobs(batch), self.answers).priced(self.price)


def make_events(*entries: tuple[str, Any], first: int = 1, attempt: int = 1) -> list[Event]:
    """Entries of a stream: (kind, text or data)."""
    made = []
    for number, (kind, body) in enumerate(entries, start=first):
        text, data = ("", body) if kind in ("progress", "answer") else (body, {})
        made.append(Event(str(number), kind, attempt, 1_000_000.0 + number, text, data))  # type: ignore[arg-type]
    return made


Command = Callable[..., Result]
"""`command("ls", "--json", columns=80)`."""
