"""Settled jobs -> report: order, comparisons, statistics, the verdict."""

from __future__ import annotations

import builtins
import json
import math
from typing import Any

import pytest

from jobqueue.job import Batch, FailureReason, Job, JobKind, JobState
from jobqueue.results import BatchReport, build_report, mcnemar, wilson

EVALUATION = {"source": "questions.jsonl", "split": "test", "limit": None, "per_device_eval_batch_size": 16}


def job(job_id: str, kind: JobKind, state: JobState = JobState.SUCCEEDED, **fields: Any) -> Job:
    known: dict[str, Any] = {"batch": "b", "trial": "", "owner": "ada", "spec": {}, "priority": 0, "need_bytes": 0}
    known |= {"attempt": 1, "failures": 0, "worker": "box/gpu0", "reason": None, "message": "", "waits": 0}
    known |= dict.fromkeys(("submitted_at", "queued_at", "claimed_at", "ended_at", "not_before"), 0.0)
    return Job(id=job_id, kind=kind, state=state, cancel_requested=False, **known | fields)


def train(
    number: int, state: JobState = JobState.SUCCEEDED, rate: float = 1e-4, loss: float = 1.5, **fields: Any
) -> Job:
    spec = {"kind": "train", "base_model": "org/m", "training": {"learning_rate": rate, "seed": 1}}
    outcome = {
        "memory": {"gpu": "H100", "peak_reserved_bytes": 3000, "peak_for_training_bytes": 1000},
        "time": {"train_minutes": 2.5},
        "training": {"tokens_per_s": 5000.0, "final_loss": loss},
    }
    fields = {"spec": spec, "trial": f"rate={rate:g}", "outcome": outcome} | fields
    return job(f"b.{number}", JobKind.TRAIN, state, **fields)


def evaluate(job_id: str, correct: int | None, questions: int = 100, *, spec: Any = {}, **fields: Any) -> Job:  # noqa: B006
    base = job_id.startswith("base-")
    known = {
        "kind": "evaluate",
        "base_model": "org/m",
        "method": "qlora",
        "load_in_4bit": True,
        "evaluation": EVALUATION,
    }
    known |= {"adapter_job": None if base else job_id.removesuffix(".eval"), "max_seq_length": 2048}
    outcome = {}
    if correct is not None:
        outcome = {"questions": questions, "likelihood": {"correct": correct, "accuracy": correct / questions}}
    state = JobState.SUCCEEDED if correct is not None else JobState.RUNNING
    fields = {"state": state, "batch": "" if base else "b", "outcome": outcome} | fields
    return job(job_id, JobKind.EVALUATE, spec={**known, **spec}, **fields)


def report(jobs: list[Job], picks: dict[str, dict[int, bool]] | None = None) -> BatchReport:
    states = {state: sum(j.state is state for j in jobs) for state in JobState}
    batch = Batch("b", "ada", 0.0, 1, "org/m", states, tuple(j.id for j in jobs))
    return build_report(batch, jobs, picks or {})


def right(*questions: int, of: int = 100) -> dict[int, bool]:
    return {question: question in questions for question in range(of)}


# --- Statistics


@pytest.mark.parametrize(
    ("gained", "lost", "p"),
    [
        (0, 0, 1.0),
        (1, 0, 1.0),
        (5, 5, 1.0),
        (6, 0, 2 / 2**6),
        (1, 9, 2 * (1 + 10) / 2**10),
        (9, 1, 2 * (1 + 10) / 2**10),
        (12, 3, 2 * (1 + 15 + 105 + 455) / 2**15),
        (400, 300, 0.000178),
    ],
)
def test_mcnemar_is_exact_and_two_sided(gained: int, lost: int, p: float) -> None:
    assert mcnemar(gained, lost) == pytest.approx(p, rel=1e-2 if gained > 100 else 1e-12)


def test_mcnemar_without_scipy_is_not_known(monkeypatch: pytest.MonkeyPatch) -> None:
    real = builtins.__import__

    def without_scipy(name: str, *args: Any, **kwargs: Any) -> Any:
        if name.startswith("scipy"):
            raise ImportError(name)
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without_scipy)

    assert mcnemar(9, 1) is None
    found = report(
        [train(1), evaluate("b.1.eval", 60), evaluate("base-0", 50)],
        {"b.1.eval": right(*range(60)), "base-0": right(*range(50))},
    )
    assert found.trials[0].versus_base is not None
    assert (found.trials[0].versus_base.gained, found.trials[0].versus_base.p_value) == (10, None)
    assert "(not tested)" in found.verdict


@pytest.mark.parametrize(
    ("correct", "questions", "low", "high"),
    [(0, 10, 0.0, 0.2775), (10, 10, 0.7225, 1.0), (81, 263, 0.2553, 0.3662), (572, 1273, 0.4222, 0.4768)],
)
def test_wilson_interval(correct: int, questions: int, low: float, high: float) -> None:
    """The third line is the example of Newcombe (1998), table I."""
    assert wilson(correct, questions) == pytest.approx((low, high), abs=1e-4)


# --- Report


def test_trials_are_ordered_best_first_and_unscored_ones_last() -> None:
    found = report(
        [
            train(1),
            evaluate("b.1.eval", 40),
            train(2, JobState.FAILED, 2e-4, reason=FailureReason.NAN_LOSS, message="NaN at step 3", outcome={}),
            evaluate("b.2.eval", None, state=JobState.FAILED, reason=FailureReason.DEPENDENCY),
            train(10, rate=3e-4),
            evaluate("b.10.eval", 60),
            evaluate("base-0", 30),
        ]
    )

    assert [trial.job for trial in found.trials] == ["b.10", "b.1", "b.2"]
    assert found.complete
    assert (found.metric, found.questions) == ("likelihood", 100)
    failed = found.trials[-1]
    assert (failed.state, failed.reason, failed.message) == (JobState.FAILED, FailureReason.NAN_LOSS, "NaN at step 3")
    assert failed.scores == {}
    assert failed.versus_base is None


def test_a_trial_has_its_costs_and_what_differs() -> None:
    found = report([train(1), train(2, rate=2e-4, attempt=3)])

    second = found.trials[1]
    assert second.differs == {"training.learning_rate": 2e-4}
    assert (second.peak_bytes, second.training_bytes, second.train_minutes, second.tokens_per_s) == (
        3000,
        1000,
        2.5,
        5000.0,
    )
    assert (second.final_loss, second.gpu, second.worker, second.attempts) == (1.5, "H100", "box/gpu0", 3)


def test_differences_are_paired_by_question() -> None:
    found = report(
        [train(1), evaluate("b.1.eval", 52), evaluate("base-0", 50)],
        {"b.1.eval": right(*range(40), *range(50, 62)), "base-0": right(*range(50))},
    )

    versus = found.trials[0].versus_base
    assert versus is not None
    assert (versus.points, versus.gained, versus.lost) == (2.0, 12, 10)
    assert versus.p_value == pytest.approx(0.8318, abs=1e-4)
    assert versus.shown is False
    assert "no difference shown from the base model (+2.0 points, p = 0.83)" in found.verdict


def test_best_and_runner_up_are_tested_against_each_other() -> None:
    jobs = [train(1), evaluate("b.1.eval", 50), train(2, rate=2e-4), evaluate("b.2.eval", 60), evaluate("base-0", 20)]
    picks = {"b.1.eval": right(*range(50)), "b.2.eval": right(*range(60)), "base-0": right(*range(20))}

    found = report(jobs, picks)

    assert found.versus_runner_up is not None
    assert (found.versus_runner_up.gained, found.versus_runner_up.lost) == (10, 0)
    assert found.verdict == (
        "Best: rate=0.0002 with 60.0% (likelihood), 40.0 points above the base model (p < 0.0001), "
        "10.0 points above the runner-up rate=0.0001 (p = 0.002)."
    )


def test_trials_with_other_questions_are_not_tested_against_each_other() -> None:
    other = {"evaluation": {**EVALUATION, "limit": 50}}
    jobs = [train(1), evaluate("b.1.eval", 50), train(2), evaluate("b.2.eval", 30, 50, spec=other)]

    found = report(jobs, {"b.1.eval": right(*range(50)), "b.2.eval": right(*range(30), of=50)})

    assert found.versus_runner_up is not None
    assert found.versus_runner_up.p_value is None


def test_each_trial_is_compared_with_the_base_model_in_its_precision() -> None:
    sixteen = {"load_in_4bit": False, "method": "lora"}
    jobs = [
        train(1),
        evaluate("b.1.eval", 50),
        train(2),
        evaluate("b.2.eval", 50, spec=sixteen),
        # made by another batch, for which speed was set otherwise
        evaluate("base-4", 30, spec={"evaluation": {**EVALUATION, "per_device_eval_batch_size": 2}}),
        evaluate("base-16", 40, spec=sixteen),
    ]

    found = report(jobs)

    assert [(t.base, t.versus_base and t.versus_base.points) for t in found.trials] == [
        ("base-4", 20.0),
        ("base-16", 10.0),
    ]
    assert [(base.job, base.load_in_4bit) for base in found.bases] == [("base-4", True), ("base-16", False)]


def test_base_model_with_the_same_sequence_length_is_preferred() -> None:
    jobs = [
        train(1),
        evaluate("b.1.eval", 50, spec={"max_seq_length": 512}),
        evaluate("base-a", 30),
        evaluate("base-b", 40, spec={"max_seq_length": 512}),
    ]

    assert report(jobs).trials[0].base == "base-b"


def test_generated_is_primary_only_without_likelihood() -> None:
    only_generated = {"questions": 10, "generated": {"correct": 4, "accuracy": 0.4, "interval": [0.1, 0.7]}}

    found = report([train(1), evaluate("b.1.eval", None, state=JobState.SUCCEEDED, outcome=only_generated)])

    assert found.metric == "generated"
    assert found.trials[0].scores["generated"].interval == (0.1, 0.7)


def test_interval_is_made_where_the_outcome_has_none() -> None:
    found = report([train(1), evaluate("b.1.eval", 40)])

    assert found.trials[0].scores["likelihood"].interval == wilson(40, 100)


def test_unfinished_batch() -> None:
    found = report([train(1), evaluate("b.1.eval", 40), train(2, JobState.RUNNING, outcome={})])
    nothing = report([train(1, JobState.RUNNING, outcome={}), evaluate("b.1.eval", None, state=JobState.WAITING)])

    assert not found.complete
    assert found.verdict == "Best so far: rate=0.0001 with 40.0% (likelihood)."
    assert nothing.verdict == "Nothing has been evaluated yet."


def test_report_job_does_not_keep_a_batch_open() -> None:
    assert report([train(1), job("b.report", JobKind.REPORT, JobState.RUNNING)]).complete


def test_batch_without_evaluation_keeps_the_order_of_the_file() -> None:
    found = report([train(1, loss=1.5), train(2, rate=2e-4, loss=1.2)])

    assert [trial.job for trial in found.trials] == ["b.1", "b.2"]
    assert found.metric is None
    assert found.verdict == (
        "Nothing was evaluated, so it is not known which trial is better. "
        "The lowest training loss, 1.200, has rate=0.0002."
    )


def test_batch_without_training_ranks_the_base_models() -> None:
    jobs = [
        evaluate("base-a", 30, trial="label of another batch"),
        evaluate("base-b", 45, spec={"base_model": "org/other"}),
    ]

    found = report(jobs, {"base-a": right(*range(30)), "base-b": right(*range(45))})

    assert [(trial.label, trial.job) for trial in found.trials] == [
        ("base_model=org/other", "base-b"),
        ("base_model=org/m", "base-a"),
    ]
    assert found.bases == ()
    assert found.versus_runner_up is not None
    assert found.versus_runner_up.gained == 15


def test_failed_batch_and_failed_base() -> None:
    failed = report([train(1, JobState.FAILED, outcome={}), evaluate("b.1.eval", None, state=JobState.FAILED)])
    base_failed = report(
        [train(1), evaluate("b.1.eval", 40), evaluate("base-0", None, state=JobState.FAILED, message="no such model")]
    )

    assert failed.verdict == "No trial succeeded."
    assert base_failed.trials[0].versus_base is None
    assert base_failed.bases[0].message == "no such model"
    assert base_failed.verdict == "rate=0.0001 with 40.0% (likelihood)."


def test_worse_than_the_base_model_is_said() -> None:
    jobs = [train(1), evaluate("b.1.eval", 20), evaluate("base-0", 50)]

    assert (
        "30.0 points below the base model (p < 0.0001)"
        in report(jobs, {"b.1.eval": right(*range(20)), "base-0": right(*range(50))}).verdict
    )


def test_report_survives_json() -> None:
    found = report(
        [train(1, loss=math.nan), evaluate("b.1.eval", 40), train(2), evaluate("b.2.eval", 41), evaluate("base-0", 30)],
        {"b.1.eval": right(*range(40)), "base-0": right(*range(30))},
    )

    text = json.dumps(found.to_dict(), allow_nan=False)

    assert BatchReport.from_dict(json.loads(text)) == found


def test_from_dict_refuses_something_else() -> None:
    with pytest.raises(ValueError, match="trials"):
        BatchReport.from_dict({"batch": "b"})
