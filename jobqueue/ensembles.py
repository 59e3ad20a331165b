"""Ensembles of trials: which trials are one's members, whether they can be, and the vote over their answers; pure."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from jobqueue.answers import Answer, Answers
from jobqueue.ensemble_spec import SAME_RANK, EnsembleSpec, Members
from jobqueue.evaluations import of_task
from jobqueue.job import OF_NO_BATCH, FailureReason, Job, JobState
from jobqueue.spec import BY_QUESTION, RunSpec

if TYPE_CHECKING:
    from jobqueue.sweep import Trial


def numbers(ensemble: EnsembleSpec, count: int) -> tuple[int, ...]:
    """The trials (from 1) that are members, or may become some, of `count`."""
    return ensemble.trials if isinstance(ensemble.trials, tuple) else tuple(range(1, count + 1))


def problems(ensemble: EnsembleSpec, trials: Sequence[Trial]) -> Iterator[tuple[str, str]]:
    """Why these trials cannot be such an ensemble: (message, key of its section)."""
    if ensemble.name in ("judge", "report") or ensemble.name.startswith(OF_NO_BATCH):
        yield f"other jobs have such names: judge, report, and all that begin with {', '.join(OF_NO_BATCH)}", "name"
    meant = numbers(ensemble, len(trials))
    strange = [number for number in meant if number > len(trials)]
    if strange:
        yield f"there is no trial {', '.join(map(str, strange))}; the file has {len(trials)}", "trials"
        return
    if len(set(meant)) < max(2, len(meant)):
        yield "needs two different trials at least" if len(meant) < 2 else "names a trial twice", "trials"
        return
    members = ensemble.best or len(meant)
    if not 2 <= members <= len(meant):
        yield f"{ensemble.trials} of {len(meant)} trials: between 2 and all of them can be members", "trials"
    if ensemble.weights is not None and len(ensemble.weights) != members:
        yield f"has {len(ensemble.weights)} values, and there are {members} members", "weights"
    runs = [trials[number - 1].run for number in meant]
    if any(run.data is None or run.evaluation is None for run in runs):
        yield "needs trials that are trained and evaluated: set data and evaluation", "trials"
        return
    yield from ((message, "trials") for message in _differing(ensemble, runs))
    metrics = [run.evaluation.metrics for run in runs if run.evaluation]
    if ensemble.method == "vote" and not all(set(BY_QUESTION) & set(asked) for asked in metrics):
        yield "a vote is over the picks of likelihood or generated, which evaluation.metrics lacks", "method"
    if ensemble.method != "vote":
        yield from ((message, "method") for message in _unmergeable(ensemble, runs))
    if ensemble.best is not None:
        yield from ((message, "trials") for message in _unranked(runs))


def _differing(ensemble: EnsembleSpec, runs: Sequence[RunSpec]) -> Iterator[str]:
    same = ["evaluation"]
    if ensemble.method != "vote":
        same += ["base_model", "revision", "method", "dtype", "chat_template"]
    for key in same:
        if any(getattr(run, key) != getattr(runs[0], key) for run in runs):
            yield f"{key} must be the same in all members" + ("; a vote can be over several" if len(same) > 1 else "")


def _unmergeable(ensemble: EnsembleSpec, runs: Sequence[RunSpec]) -> Iterator[str]:
    """What PEFT's add_weighted_adapter cannot merge, or not without loss of a part."""
    if runs[0].method == "full":
        yield "method full trains no adapters to merge; a vote is possible"
    if any(run.lora.bias != "none" or run.lora.loftq_config for run in runs):
        yield "merges weights of LoRA alone: lora.bias must be none, without lora.loftq_config; a vote is possible"
    if ensemble.method in SAME_RANK and len({run.lora.r for run in runs}) > 1:
        yield f"{ensemble.method} needs one lora.r in all members; cat and those that end in svd take several"
    if len({isinstance(run.lora.target_modules, str) for run in runs}) > 1:
        yield "lora.target_modules is all-linear in some members and a list in others; write it in one way"


def _unranked(runs: Sequence[RunSpec]) -> Iterator[str]:
    """Why the members cannot be told by their validation loss. Their score on the test questions would flatter."""
    if any(run.data is None or not run.data.validation_split for run in runs):
        yield "best:N is by the validation loss: set data.validation_split, or name the trials"
        return
    # what decides which rows are kept back, and what the loss on them means
    rows = [run.data.model_dump(exclude={"replay"}) for run in runs if run.data]
    seen = [(run.base_model, run.revision, run.chat_template, run.training.max_seq_length) for run in runs]
    if any(one != seen[0] for one in seen) or any(one != rows[0] for one in rows):
        yield "best:N compares validation losses, and these trials are not validated on the same rows; name the trials"


def validation_loss(train: Job) -> float:
    """Of the weights that were kept; infinite where there is none."""
    validation = train.outcome.get("validation") or {}
    kept = [loss for step, loss in validation.get("losses", ()) if step == validation.get("kept_step")]
    losses = [loss for loss in kept if loss is not None and math.isfinite(loss)]
    return losses[-1] if losses else math.inf


def chosen(trains: Sequence[Job], best: int | None) -> list[Job]:
    """The members, those with the lowest validation loss first; where there is none, in the order of the file.

    Raises ValueError where fewer have succeeded than are to be members.
    """
    ready = [train for train in trains if train.state is JobState.SUCCEEDED]
    wanted = len(trains) if best is None else best
    if len(ready) < wanted:
        raise ValueError(f"{len(ready)} of its trials have succeeded, and {wanted} are to be members")
    if best is None:
        return ready
    return sorted(ready, key=validation_loss)[:best]


def label(members: Members) -> str:
    """As results show it."""
    count = f"the best {members.best}" if members.best else len(members.trains)
    return f"{members.name} ({members.method} of {count})"


def vote(members: Sequence[Answers], weights: Sequence[float] | None = None) -> dict[int, Answer]:
    """What most of them pick, of each question that all of them were asked; no pick where none of them has one.

    A tie goes to the option with the highest log-likelihood, summed over the members; where no likelihoods are at hand,
    to the pick of the earliest member that is among the tied.
    """
    common = set.intersection(*(set(answers) for answers in members)) if members else set()
    weights = weights or [1.0] * len(members)
    return {index: _voted([answers[index] for answers in members], weights) for index in sorted(common)}


def _voted(answers: Sequence[Answer], weights: Sequence[float]) -> Answer:
    first = answers[0]
    metrics = [metric for metric in first.picks if all(metric in answer.picks for answer in answers)]
    picks = {metric: _pick(answers, weights, metric) for metric in metrics}
    right = frozenset(metric for metric, pick in picks.items() if pick is not None and _same(first, pick))
    return Answer(first.index, first.answer, picks, right, first.question, first.options)


def _same(answer: Answer, pick: str) -> bool:
    """By the option's text: rows exist in which two letters have the same."""
    options = answer.options
    return pick == answer.answer or (pick in options and options[pick].strip() == options[answer.answer].strip())


def _pick(answers: Sequence[Answer], weights: Sequence[float], metric: str) -> str | None:
    votes = Counter[str]()
    for answer, weight in zip(answers, weights, strict=True):
        pick = answer.picks[metric]
        if pick is not None:
            votes[pick] += weight  # type: ignore[assignment]  # a Counter takes any number
    most = max(votes.values(), default=0.0)
    tied = [pick for pick, count in votes.items() if math.isclose(count, most)]  # in the order of the members
    if len(tied) < 2 or not all(pick in answer.scores for pick in tied for answer in answers):
        return tied[0] if tied else None
    return max(tied, key=lambda pick: math.fsum(_score(answer, pick, metric) for answer in answers))


def _score(answer: Answer, pick: str, metric: str) -> float:
    size = len(answer.options[pick]) if metric == "likelihood_normalised" else 1
    return answer.scores[pick] / size


def voted(jobs: Sequence[Job], answers: Mapping[str, Answers]) -> list[tuple[Job, Answers]]:
    """The votes that a batch's report is to count, each as an evaluation that no worker had to do, and its answers."""
    asked = [members for job in jobs for members in job.spec.get("votes", ())]
    return [_evaluation(members, {job.id: job for job in jobs}, answers) for members in asked]


def _evaluation(
    members: Mapping[str, Any], jobs: Mapping[str, Job], answers: Mapping[str, Answers]
) -> tuple[Job, Answers]:
    by_train = {job.spec.get("adapter_job"): job for job in of_task(jobs.values())}
    trains = [jobs[train] for train in members["trains"]]
    evaluations = [by_train[train.id] for train in trains]
    ended = all(job.state.final for job in (*trains, *evaluations))
    state, message, votes = JobState.WAITING, "", dict[int, Answer]()
    try:
        evaluations = [by_train[train.id] for train in chosen(trains, members["best"])]
        if any(job.state is not JobState.SUCCEEDED for job in evaluations):
            raise ValueError("not all of its members were evaluated")
        if all(job.id in answers for job in evaluations):
            votes, state = vote([answers[job.id] for job in evaluations], members["weights"]), JobState.SUCCEEDED
    except ValueError as error:
        state, message = (JobState.CANCELLED, str(error)) if ended else (state, "")
    first = evaluations[0]
    of_model = ("base_model", "revision", "dtype", "load_in_4bit")
    models = [[job.spec.get(key) for key in of_model] for job in evaluations]
    job = replace(
        first,
        id=f"{first.batch}.{members['name']}",
        trial=label(Members.model_validate(members, strict=False)),
        # over several base models there is none to compare it with
        spec={
            **first.spec,
            "members": members,
            **({"base_model": "several"} if any(model != models[0] for model in models) else {}),
        },
        state=state,
        reason=FailureReason.DEPENDENCY if message else None,
        message=message,
        attempt=0,
        worker="",
        history=[],
        outcome={"questions": len(votes), **_counted(votes)},
    )
    return job, votes


def _counted(votes: Answers) -> dict[str, Any]:
    """As an evaluation's outcome has it."""
    metrics = {metric for answer in votes.values() for metric in answer.picks}
    return {metric: {"correct": sum(metric in answer.right for answer in votes.values())} for metric in metrics}
