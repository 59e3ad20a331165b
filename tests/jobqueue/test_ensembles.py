"""Ensembles: what a sweep file may ask for, the jobs that it becomes, who is chosen, and how votes are counted."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from jobqueue.aggregate import build_report
from jobqueue.answers import Answer
from jobqueue.ensembles import chosen, validation_loss, vote, voted
from jobqueue.errors import SpecError
from jobqueue.job import Batch, FailureReason, Job, JobKind, JobState
from jobqueue.job_spec import EvaluateSpec, ReportSpec
from jobqueue.plan import Plan, make_plan
from jobqueue.results import BatchReport
from jobqueue.submission import new_job
from jobqueue.sweep import read_sweep

ROW = {"question": "?", "options": {"A": "a", "B": "b"}, "answer": "a", "answer_idx": "A"}
VALIDATED = {"source": "train.jsonl", "validation_split": 0.5}
OPTIONS = {"A": "one", "B": "two", "C": "three"}


def plan(folder: Path, *given: dict[str, Any], **changes: Any) -> Plan:
    for name in ("train.jsonl", "test.jsonl"):
        (folder / name).write_text("".join(json.dumps(ROW | {"question": f"{n}?"}) + "\n" for n in range(40)))
    fields = {
        "name": "b", "base_model": "org/m", "data": {"source": "train.jsonl"}, "evaluation": {"source": "test.jsonl"},
        "sweep": {"grid": {"training.learning_rate": [1e-4, 2e-4, 4e-4]}}, "ensembles": given, **changes,
    }  # fmt: skip
    file = folder / "sweep.yaml"
    file.write_text(json.dumps(fields, indent=1))
    return make_plan(read_sweep(file), workers_are_here=False)


def test_a_merge_is_an_evaluation_that_needs_its_trains_and_a_vote_is_the_reports(tmp_path: Path) -> None:
    made = plan(
        tmp_path,
        {"name": "mean", "method": "cat", "trials": [1, 3], "weights": [0.75, 0.25]},
        {"name": "poll", "method": "vote"},
    )
    jobs = {job.id: job for job in made.jobs}
    merged, report = jobs["mean"], jobs["report"]
    assert (merged.kind, merged.needs, merged.trial) == (JobKind.EVALUATE, ("1", "3"), "mean (cat of 2)")
    assert "poll" not in jobs
    assert "mean" in report.follows
    spec = EvaluateSpec.model_validate_json(new_job(merged, "b-2", "ann", "").spec)
    assert spec.members is not None
    assert (spec.members.trains, spec.members.weights, spec.adapter_job) == (("b-2.1", "b-2.3"), (0.75, 0.25), None)
    single = jobs["1.eval"].spec
    assert isinstance(single, EvaluateSpec)
    assert spec.evaluation == single.evaluation
    votes = ReportSpec.model_validate_json(new_job(report, "b-2", "ann", "").spec).votes
    assert [members.trains for members in votes] == [("b-2.1", "b-2.2", "b-2.3")]


def test_the_best_are_chosen_once_all_have_ended_of_those_that_succeeded(tmp_path: Path) -> None:
    best = {"name": "top", "method": "ties", "density": 0.5, "trials": "best:2"}
    job = {job.id: job for job in plan(tmp_path, best, data=VALIDATED).jobs}["top"]
    assert (job.needs, job.follows, job.trial) == ((), ("1", "2", "3"), "top (ties of the best 2)")
    trains = [train(1, 2.0), train(2, 1.0), train(3, 1.5), train(4, 0.1, JobState.FAILED)]
    assert [one.id for one in chosen(trains, 2)] == ["b.2", "b.3"]
    assert [one.id for one in chosen(trains[:3], None)] == ["b.1", "b.2", "b.3"]
    with pytest.raises(ValueError, match="3 of its trials have succeeded, and 4 are to be members"):
        chosen(trains, None)


def test_the_validation_loss_is_that_of_the_weights_that_were_kept() -> None:
    kept = {"losses": [[10, 1.5], [20, 1.0], [30, 1.25]], "kept_step": 20}
    assert validation_loss(job("b.1", JobKind.TRAIN, outcome={"validation": kept})) == 1.0
    assert validation_loss(job("b.1", JobKind.TRAIN)) == float("inf")


@pytest.mark.parametrize(
    ("ensemble", "changes", "message"),
    [
        ({"method": "vote", "trials": [1, 5]}, {}, "there is no trial 5; the file has 3"),
        ({"method": "vote", "trials": [1, 1]}, {}, "names a trial twice"),
        ({"method": "vote", "trials": "best:4"}, {"data": VALIDATED}, "best:4 of 3 trials"),
        ({"method": "vote", "weights": [1.0, 2.0]}, {}, "has 2 values, and there are 3 members"),
        ({"method": "vote", "trials": "best:2"}, {}, "by the validation loss: set data.validation_split"),
        ({"method": "vote", "trials": "some"}, {}, "must"),
        ({"method": "ties"}, {}, "ties needs a density"),
        ({"method": "vote", "name": "base-1"}, {}, "all that begin with base-, ask-, preview-"),
        ({"method": "vote", "name": "judge"}, {}, "other jobs have such names: judge"),
        ({"method": "cat", "density": 0.5}, {}, "cat has no density"),
        ({"method": "vote"}, {"evaluation": None}, "set data and evaluation"),
        ({"method": "vote"}, {"evaluation": {"source": "test.jsonl", "metrics": ["perplexity"]}}, "a vote is over the"),
        ({"method": "linear"}, {"sweep": {"grid": {"lora.r": [8, 16]}}}, "linear needs one lora.r in all members; cat"),
        ({"method": "cat"}, {"method": "full"}, "method full trains no adapters to merge"),
        ({"method": "cat"}, {"lora": {"bias": "all"}}, "lora.bias must be none"),
        ({"method": "cat"}, {"sweep": {"grid": {"base_model": ["org/m", "org/n"]}}}, "base_model must be the same"),
        ({"method": "cat"}, {"sweep": {"grid": {"dtype": ["bfloat16", "float16"]}}}, "dtype must be the same"),
        ({"method": "vote"}, {"sweep": {"grid": {"evaluation.limit": [1, 2]}}}, "evaluation must be the same"),
        (
            {"method": "vote", "trials": "best:2"},
            {"sweep": {"grid": {"data.validation_split": [0.25, 0.5]}}},
            "these trials are not validated on the same rows",
        ),
    ],
)
def test_what_cannot_be_is_said_at_submit(
    tmp_path: Path, ensemble: dict[str, Any], changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(SpecError) as raised:
        plan(tmp_path, {"name": "top", **ensemble}, **changes)
    assert [str(problem).count(message) for problem in raised.value.problems] == [1], raised.value.what
    assert raised.value.problems[0].path.startswith("ensembles.0")
    assert raised.value.problems[0].line


def test_all_mistakes_come_at_once(tmp_path: Path) -> None:
    twice = [{"name": "top", "method": "linear"}, {"name": "top", "method": "vote", "trials": [7, 8]}]
    with pytest.raises(SpecError) as raised:
        plan(tmp_path, *twice, lora={"bias": "all"})
    assert len(raised.value.problems) == 3


@pytest.mark.parametrize("allowed", [{"method": "svd"}, {"method": "cat"}, {"method": "dare_ties_svd", "density": 0.5}])
def test_adapters_of_several_ranks_can_be_merged_by_what_takes_them(tmp_path: Path, allowed: dict[str, Any]) -> None:
    made = plan(tmp_path, {"name": "top", **allowed}, sweep={"grid": {"lora.r": [8, 16]}})
    assert "top" in [job.id for job in made.jobs]


def test_a_vote_may_be_over_several_base_models(tmp_path: Path) -> None:
    plan(tmp_path, {"name": "top", "method": "vote"}, sweep={"grid": {"base_model": ["org/m", "org/n"]}})


# -- votes


def answer(pick: str | None, index: int = 0, right: str = "A", **scores: float) -> Answer:
    picks = {"likelihood": pick, "generated": pick}
    return Answer(index, right, picks, frozenset(picks if pick == right else ()), "?", OPTIONS, scores)


def pick(*answers: Answer, weights: Sequence[float] | None = None, metric: str = "likelihood") -> str | None:
    return vote([{0: answer} for answer in answers], weights)[0].picks[metric]


def test_most_votes_win_and_who_has_none_abstains() -> None:
    assert pick(answer("B"), answer("A"), answer("B")) == "B"
    assert pick(answer(None), answer("C"), answer(None)) == "C"
    assert pick(answer(None), answer(None)) is None
    assert pick(answer("A"), answer("B"), answer("B"), weights=[3.0, 1.0, 1.0]) == "A"


def test_a_tie_goes_to_the_likelier_option_else_to_the_earliest_member() -> None:
    assert pick(answer("A"), answer("B")) == "A"
    assert pick(answer("B"), answer("A")) == "B"
    tied = answer("A", A=-1.0, B=-9.0, C=-8.0), answer("B", A=-5.0, B=-4.0, C=-9.0)
    assert pick(*tied) == "A"  # -6 against -13
    assert pick(answer("A", A=-3.0, B=-3.5, C=-9.0), answer("B", A=-9.0, B=-1.0, C=-9.0)) == "B"
    assert pick(*tied[::-1], metric="generated") == "A"
    assert pick(tied[0], answer("B")) == "A"  # scores of one are no scores of all


def test_a_vote_is_right_by_the_options_text_and_of_the_questions_that_all_were_asked() -> None:
    first = {index: answer("A", index) for index in range(3)}
    second = {index: answer("A", index, right="B") for index in (0, 2)}
    counted = vote([first, second])
    assert sorted(counted) == [0, 2]
    assert counted[0].right == {"likelihood", "generated"}
    same = Answer(0, "B", {"likelihood": "A"}, frozenset({"likelihood"}), "?", {"A": "x", "B": "x"})
    assert vote([{0: same}, {0: same}])[0].right == {"likelihood"}


# -- reports


def job(job_id: str, kind: JobKind, state: JobState = JobState.SUCCEEDED, **fields: Any) -> Job:
    known: dict[str, Any] = {"batch": "b", "trial": "", "owner": "ada", "spec": {}, "priority": 0, "need_bytes": 0}
    known |= {"attempt": 1, "failures": 0, "worker": "box/gpu0", "reason": None, "message": "", "waits": 0}
    known |= dict.fromkeys(("submitted_at", "queued_at", "claimed_at", "ended_at", "not_before"), 0.0)
    return Job(id=job_id, kind=kind, state=state, cancel_requested=False, **known | fields)


def train(number: int, loss: float, state: JobState = JobState.SUCCEEDED) -> Job:
    outcome = {"validation": {"losses": [[10, loss]], "kept_step": 10}}
    return job(f"b.{number}", JobKind.TRAIN, state, trial=f"rate={number}", outcome=outcome, spec={"kind": "train"})


def evaluation(job_id: str, right: Sequence[int] | None, *, members: Any = None, state: JobState | None = None) -> Job:
    base = job_id.startswith("base-")
    spec = {
        "base_model": "org/m",
        "revision": None,
        "method": "qlora",
        "load_in_4bit": True,
        "evaluation": {"source": "x"},
    }
    spec |= {"adapter_job": None if base or members else job_id.removesuffix(".eval"), "members": members}
    outcome = {} if right is None else {"questions": 100, "likelihood": {"correct": len(right)}}
    state = state or (JobState.RUNNING if right is None else JobState.SUCCEEDED)
    label = "mean (cat of 3)" if members else ""
    return job(job_id, JobKind.EVALUATE, state, batch="" if base else "b", trial=label, spec=spec, outcome=outcome)


def answers(right: Sequence[int]) -> dict[int, Answer]:
    return {
        index: Answer(index, "A", {"likelihood": "A" if index in right else "B"},
                      frozenset({"likelihood"} if index in right else ()), "?", OPTIONS)
        for index in range(100)
    }  # fmt: skip


BASE = range(30)
RIGHT = {"b.1.eval": range(60), "b.2.eval": range(20, 80), "b.3.eval": [*range(50), *range(70, 100)]}
VOTES = {"name": "poll", "trains": ["b.1", "b.2", "b.3"], "method": "vote", "best": None, "weights": None}


def batch(**changes: Any) -> list[Job]:
    merged = {**VOTES, "name": "mean", "method": "cat"}
    jobs = {
        **{f"b.{number}": train(number, loss) for number, loss in ((1, 1.0), (2, 3.0), (3, 2.0))},
        **{name: evaluation(name, list(right)) for name, right in RIGHT.items()},
        "b.mean": evaluation("b.mean", range(90), members=merged),
        "base-0": evaluation("base-0", BASE),
        "b.report": job("b.report", JobKind.REPORT, spec={"kind": "report", "votes": [VOTES]}),
    }
    return list((jobs | {name.replace("_", "."): value for name, value in changes.items()}).values())


def report(jobs: list[Job]) -> BatchReport:
    known = {name: answers(right) for name, right in RIGHT.items()}
    known |= {"b.mean": answers(range(90)), "base-0": answers(BASE)}
    states = {state: sum(one.state is state for one in jobs) for state in JobState}
    described = Batch("b", "ada", 0.0, 3, "org/m", states, tuple(one.id for one in jobs))
    ended = {one.id for one in jobs if one.state is JobState.SUCCEEDED}
    return build_report(described, jobs, {name: found for name, found in known.items() if name in ended})


def test_ensembles_are_rows_with_the_same_statistics_and_the_comparison_with_the_best_trial() -> None:
    made = report(batch())
    rows = {trial.job: trial for trial in made.trials}
    assert [trial.job for trial in made.trials] == ["b.mean", "b.3", "b.poll", "b.1", "b.2"]
    poll, mean = rows["b.poll"], rows["b.mean"]
    majority = [q for q in range(100) if sum(q in right for right in RIGHT.values()) >= 2]
    assert poll.scores["likelihood"].correct == len(majority)
    assert (poll.label, poll.members) == ("poll (vote of 3)", ("rate=1", "rate=2", "rate=3"))
    assert mean.versus_base is not None
    assert (mean.versus_base.gained, mean.versus_base.lost) == (60, 0)
    assert mean.versus_single is not None
    best = set(RIGHT["b.3.eval"])
    assert (mean.versus_single.gained, mean.versus_single.lost) == (
        len(set(range(90)) - best),
        len(best - set(range(90))),
    )
    family = [c for trial in made.trials for c in (trial.versus_base, trial.versus_single) if c is not None]
    assert len(family) == 5 + 2
    smallest = min(family, key=lambda c: c.p_value or 0.0)
    assert smallest.p_value is not None
    assert smallest.p_holm == pytest.approx(7 * smallest.p_value), "corrected for all seven"
    assert all(trial.versus_single is None for trial in made.trials if not trial.members)
    assert BatchReport.from_dict(json.loads(json.dumps(made.to_dict()))) == made
    assert "mean (cat of 3) with 90.0% (likelihood)" in made.verdict


def test_the_best_by_validation_loss_vote() -> None:
    votes = {"kind": "report", "votes": [{**VOTES, "best": 2}]}
    original = evaluation("b.1.original", range(5))
    original.spec.update(adapter_job="b.1", original_task=True)
    [(poll, counted)] = voted(
        batch(b_report=job("b.report", JobKind.REPORT, spec=votes), b_1_original=original),
        {name: answers(right) for name, right in RIGHT.items()} | {"b.1.original": answers(range(5))},
    )
    assert poll.trial == "poll (vote of the best 2)"
    expected = vote([answers(RIGHT["b.1.eval"]), answers(RIGHT["b.3.eval"])])
    assert counted == expected


def test_a_vote_over_several_dtypes_has_no_base_model_to_compare_it_with() -> None:
    known = {name: answers(right) for name, right in RIGHT.items()}
    other = evaluation("b.2.eval", list(RIGHT["b.2.eval"]))
    other.spec["dtype"] = "float16"
    found = [voted(jobs, known)[0][0].spec["base_model"] for jobs in (batch(), batch(b_2_eval=other))]
    assert found == ["org/m", "several"]


def test_a_vote_without_all_of_its_members_says_so_and_one_of_a_batch_at_work_waits() -> None:
    failed = evaluation("b.2.eval", None, state=JobState.FAILED)
    poll = next(trial for trial in report(batch(b_2_eval=failed)).trials if trial.job == "b.poll")
    assert (poll.state, poll.reason) == (JobState.CANCELLED, FailureReason.DEPENDENCY)
    assert poll.message == "not all of its members were evaluated"
    made = report(batch(b_2_eval=evaluation("b.2.eval", None)))
    poll = next(trial for trial in made.trials if trial.job == "b.poll")
    assert (poll.state, poll.message, dict(poll.scores)) == (JobState.WAITING, "", {})
