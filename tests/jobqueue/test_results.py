"""Settled jobs -> report: order, comparisons, the verdict, what is kept of curves and answers."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from typing import Any

import pytest

from jobqueue.aggregate import build_report, thinned
from jobqueue.answers import Answer
from jobqueue.job import Batch, FailureReason, Job, JobKind, JobState
from jobqueue.results import BatchReport
from jobqueue.statistics import wilson

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


def report(jobs: list[Job], answers: dict[str, dict[int, Answer]] | None = None) -> BatchReport:
    states = {state: sum(j.state is state for j in jobs) for state in JobState}
    batch = Batch("b", "ada", 0.0, 1, "org/m", states, tuple(j.id for j in jobs))
    return build_report(batch, jobs, answers or {})


def right(*questions: int, of: int = 100) -> dict[int, Answer]:
    """The answers of a model that has these questions right: A is, and else it says B."""
    return {
        index: Answer(
            index,
            "A",
            {"likelihood": "A" if index in questions else "B"},
            frozenset({"likelihood"} if index in questions else ()),
            f"What is {index}?",
            {"A": "this", "B": "that"},
        )
        for index in range(of)
    }


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
    """lm-eval#3831: an unpaired test on paired data; it would say p = 0.78 of 52 and 50 out of 100."""
    found = report(
        [train(1), evaluate("b.1.eval", 52), evaluate("base-0", 50)],
        {"b.1.eval": right(*range(40), *range(50, 62)), "base-0": right(*range(50))},
    )

    versus = found.trials[0].versus_base
    assert versus is not None
    assert (versus.points, versus.gained, versus.lost) == (2.0, 12, 10)
    assert versus.p_value == pytest.approx(0.8318, abs=1e-4)
    assert versus.finding == "no difference shown"
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


def test_each_trial_is_compared_with_the_base_model_in_its_dtype() -> None:
    half = {"dtype": "float16"}
    jobs = [
        train(1), evaluate("b.1.eval", 50), train(2), evaluate("b.2.eval", 50, spec=half),
        evaluate("base-1", 30, spec={"dtype": None}), evaluate("base-2", 40, spec=half),
    ]  # fmt: skip

    found = report(jobs)

    assert [trial.base for trial in found.trials] == ["base-1", "base-2"]
    assert [base.shown_as for base in found.bases] == ["base model (4-bit)", "base model (4-bit, float16)"]
    assert report(jobs[:-1]).trials[1].base is None, "not the base model in another dtype"


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


def test_a_batch_without_evaluation_is_ordered_by_the_validation_loss_where_the_rows_are_the_same() -> None:
    def validated(number: int, loss: float, validation: float, split: float = 0.1) -> Job:
        made = train(number, rate=number * 1e-4, loss=loss)
        of_validation = {"losses": [[5, 9.0], [10, validation]], "kept_step": 10}
        spec = {**made.spec, "data": {"source": "s", "validation_split": split}}
        return replace(made, outcome={**made.outcome, "validation": of_validation}, spec=spec)

    found = report([validated(1, 1.5, 1.9), validated(2, 1.2, 2.1), train(3, rate=3e-4)])
    assert [(trial.job, trial.validation_loss) for trial in found.trials] == [("b.1", 1.9), ("b.2", 2.1), ("b.3", None)]
    same_rows = report([validated(1, 1.5, 1.9), validated(2, 1.2, 2.1)])
    assert same_rows.verdict.endswith("The lowest validation loss, 1.900, has rate=0.0001.")
    other_rows = report([validated(1, 1.5, 1.9), validated(2, 1.2, 2.1, split=0.2)])
    assert other_rows.verdict.endswith("The lowest training loss, 1.200, has rate=0.0002.")


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


def test_trials_are_tested_as_some_of_many() -> None:
    """Three trials of which each gains 8 questions and loses 1: p = 0.039 alone, 0.12 among three."""
    jobs = [evaluate("base-0", 50)]
    answers = {"base-0": right(*range(50))}
    for number in (1, 2, 3):
        jobs += [train(number, rate=number * 1e-4), evaluate(f"b.{number}.eval", 57)]
        answers[f"b.{number}.eval"] = right(*range(1, 58))

    alone, many = report(jobs[:3], answers), report(jobs, answers)

    found = [trial.versus_base for trial in (alone.trials[0], *many.trials)]
    assert [(c.finding, round(c.p_holm or 0, 3)) for c in found if c] == [
        ("better", 0.039),
        ("no difference shown", 0.117),
        ("no difference shown", 0.117),
        ("no difference shown", 0.117),
    ]
    assert all(c and c.p_value == pytest.approx(0.0390625) for c in found)
    assert "no difference shown from the base model (+7.0 points, p = 0.12)" in many.verdict


def test_settings_are_those_of_all_trials_and_the_rest_differs() -> None:
    found = report([train(1), evaluate("b.1.eval", 40), train(2, rate=2e-4), evaluate("b.2.eval", 41)])

    assert found.settings["training.seed"] == 1
    assert found.settings["evaluation.source"] == "questions.jsonl"
    assert [trial.differs for trial in found.trials] == [
        {"training.learning_rate": 2e-4},
        {"training.learning_rate": 1e-4},
    ]
    assert not found.settings.keys() & found.trials[0].differs.keys()


def test_cost_is_that_of_all_attempts_and_of_the_evaluation() -> None:
    def attempt(minutes: float) -> dict[str, float]:
        return {"claimed_at": 60.0, "ended_at": 60.0 + 60 * minutes}

    found = report(
        [train(1, history=[attempt(10), attempt(45)]), evaluate("b.1.eval", 40, history=[attempt(5)]), train(2)]
    )

    assert found.trials[0].gpu_minutes == 60
    assert [found.priced(price).trials[0].cost for price in (None, 2.5, {"H100": 3.0, "A100": 2.0}, {"T4": 0.3})] == [
        None,
        2.5,
        3.0,
        None,
    ]
    assert found.priced(2.5).trials[1].cost is None


def test_loss_curve_is_kept_and_long_ones_are_thinned() -> None:
    losses = [[10, 2.0, 1e-4], [20, 1.5, 0.0]]
    outcome = {"training": {"final_loss": 1.5}, "losses": losses}

    assert report([train(1, outcome=outcome)]).trials[0].losses == ((10, 2.0), (20, 1.5))
    assert thinned([(step, float(step)) for step in range(1, 8)], 3) == ((3, 2.0), (6, 5.0), (7, 7.0))
    assert len(thinned([(step, 1.0) for step in range(1001)], 200)) <= 200
    assert thinned([], 200) == ()


def test_questions_that_changed_and_the_options_that_were_confused() -> None:
    found = report(
        [train(1), evaluate("b.1.eval", 3), evaluate("base-0", 2)],
        {"b.1.eval": right(1, 2, 3, of=5), "base-0": right(0, 1, of=5)},
    )

    assert [(q.index, q.gained, q.base_pick, q.pick) for q in found.changed] == [
        (2, True, "B", "A"),
        (3, True, "B", "A"),
        (0, False, "A", "B"),
    ]
    assert found.changed[0].question == "What is 2?"
    assert [(c.label, c.letters, c.picks, c.counts) for c in found.confusions] == [
        ("base model", ("A",), ("A", "B"), ((2, 3),)),
        ("rate=0.0001", ("A",), ("A", "B"), ((3, 2),)),
    ]


def test_the_same_jobs_make_the_same_report() -> None:
    jobs = [train(1), evaluate("b.1.eval", 50), train(2), evaluate("b.2.eval", 60), evaluate("base-0", 20)]
    answers = {"b.1.eval": right(*range(50)), "b.2.eval": right(*range(60)), "base-0": right(*range(20))}

    first = json.dumps(report(jobs, answers).to_dict())
    again = json.dumps(report(jobs[::-1], dict(reversed(answers.items()))).to_dict())

    assert first == again


# --- Perplexity and BLEU


def measured(job_id: str, perplexity: float | None, bleu: float | None = None) -> Job:
    outcome: dict[str, Any] = {"questions": 0}
    outcome |= {"perplexity": {"perplexity": perplexity, "tokens": 9}}
    outcome |= {"bleu": {"bleu": bleu, "signature": "nrefs:1"}} if bleu is not None else {}
    return evaluate(job_id, 0, outcome=outcome)


def test_without_questions_the_lowest_perplexity_is_first_and_nothing_is_called_tested() -> None:
    jobs = [
        train(1), measured("b.1.eval", 12.5), train(2, rate=2e-4), measured("b.2.eval", 7.25, 30.0),
        train(3, rate=3e-4), measured("b.3.eval", None), measured("base-1", 20.0),
    ]  # fmt: skip
    made = report(jobs)
    assert [trial.job for trial in made.trials] == ["b.2", "b.1", "b.3"]
    assert [dict(trial.measures) for trial in made.trials] == [
        {"perplexity": 7.25, "bleu": 30.0}, {"perplexity": 12.5}, {},
    ]  # fmt: skip
    assert dict(made.bases[0].measures) == {"perplexity": 20.0}
    assert made.verdict == "Lowest perplexity: 7.25, rate=0.0002 (the base model: 20.00; not tested)."
    assert BatchReport.from_dict(json.loads(json.dumps(made.to_dict()))) == made


def test_the_highest_bleu_is_first_where_there_is_nothing_else() -> None:
    def only_bleu(job_id: str, value: float) -> Job:
        return evaluate(job_id, 0, outcome={"questions": 0, "bleu": {"bleu": value}})

    made = report([train(1), only_bleu("b.1.eval", 10.0), train(2), only_bleu("b.2.eval", 11.0)])
    assert [trial.job for trial in made.trials] == ["b.2", "b.1"]
    assert made.verdict.startswith("Highest BLEU: 11.00")


def test_a_trial_is_compared_with_the_base_of_its_revision_whatever_that_is_called() -> None:
    def of(revision: str | None) -> dict[str, Any]:
        return {"spec": {"revision": revision}}

    jobs = [train(1), evaluate("b.1.eval", 60, **of("v2"))]
    bases = [evaluate("base-1", 30, **of(None)), evaluate("base-2", 40, **of("v2"))]
    assert report([*jobs, *bases]).trials[0].base == "base-2"
    assert report([*jobs, bases[0]]).trials[0].base == "base-1"  # another batch asked for that commit as main


def original(job_id: str, correct: int | None, **spec: Any) -> Job:
    task = {"evaluation": {**EVALUATION, "source": "general.jsonl"}, **spec}
    if job_id.endswith(".original"):
        task |= {"adapter_job": job_id.removesuffix(".original"), "original_task": True}
    elif job_id.endswith(".before"):
        task |= {"adapter_job": None}
    return evaluate(job_id, correct, spec=task)


def test_a_winner_that_forgets_the_original_task_is_seen() -> None:
    jobs = [train(1), evaluate("b.1.eval", 90), original("b.1.original", 40)]
    jobs += [train(2), evaluate("b.2.eval", 60), original("b.2.original", 68)]
    jobs += [evaluate("base-1", 30), original("base-2", 70)]
    answers = {"b.1.original": right(*range(40)), "b.2.original": right(*range(68)), "base-2": right(*range(70))}

    made = report(jobs, answers)

    assert [trial.label for trial in made.trials] == [job.trial for job in (jobs[0], jobs[3])]
    assert [base.job for base in made.bases] == ["base-1"], "the other one was asked the original task alone"
    forgets, keeps = (trial.original for trial in made.trials)
    assert forgets is not None
    assert keeps is not None
    assert (forgets.before, forgets.scores_before["likelihood"].correct, forgets.scores["likelihood"].correct) == (
        "base-2", 70, 40,
    )  # fmt: skip
    assert forgets.versus_before is not None
    assert (forgets.versus_before.lost, forgets.versus_before.finding) == (30, "worse")
    assert keeps.versus_before is not None
    assert keeps.versus_before.p_holm == keeps.versus_before.p_value == 0.5, "the larger of two"
    assert keeps.versus_before.finding == "no difference shown"
    assert made.verdict.endswith(
        "On the original task it has 40.0%, before 70.0%: 30.0 points below what it began with (p < 0.0001)."
    )
    assert "original_task.source" in made.settings
    assert BatchReport.from_dict(json.loads(json.dumps(made.to_dict()))) == made


def test_what_goes_on_from_an_adapter_is_measured_against_that() -> None:
    earlier = {"kind": "train", "base_model": "org/m", "from_adapter": "storage:a"}
    jobs = [train(1, spec=earlier), original("b.1.original", 40)]
    jobs += [original("b.1.before", 55, from_adapter="storage:a"), original("base-2", 70)]
    found = report(jobs).trials[0].original
    assert found is not None
    assert found.before == "b.1.before"
    assert found.versus_before is not None
    assert found.versus_before.points == -15
    assert report(jobs).metric is None, "the original task does not say which trial is best"


def test_without_its_original_task_a_batch_is_as_before() -> None:
    assert report([train(1), evaluate("b.1.eval", 90), evaluate("base-1", 30)]).trials[0].original is None
