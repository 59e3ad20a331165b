"""The judge task: has the answers of a batch's models rated; needs no GPU, runs on a control worker."""

from __future__ import annotations

import asyncio
import hashlib
import json
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from gpu_worker.journal import Journal
from gpu_worker.judge_client import PROMPT, Judge, JudgeError, Judgement, api_key, messages
from gpu_worker.lease import Lease
from gpu_worker.patience import Patience
from gpu_worker.protocol import Progress
from jobqueue.evaluations import of_task
from jobqueue.job import Claim, FailureReason, JobState
from jobqueue.job_spec import RateSpec
from jobqueue.judge_spec import JudgeSpec
from jobqueue.ratings import CRITERIA, JUDGEMENTS, Criterion, JudgeUsage, average
from jobqueue.settings import Settings
from jobqueue.storage import Storage, attempt_folder
from jobqueue.store import Store
from jobqueue.written import Written, drawn, of_job

LOOK_S = 0.2


@dataclass(frozen=True)
class Ask:
    """One question to one model of the judge. Equal answers make equal questions, whoever wrote them."""

    model: str
    folder: str  # of the storage, for all judgements of this model so asked
    name: str  # of the judgement in it
    request: list[dict[str, str]]  # the messages


def judge_batch(
    claim: Claim,
    store: Store,
    storage: Storage,
    settings: Settings,
    lease: Lease,
    patience: Patience,
    hasty: Patience,
    journal: Journal,
    check: Callable[[], None],
) -> dict[str, Any]:
    """Rate what the models of the claim's batch wrote; one line per answer goes into the attempt's judgements.jsonl.

    Each judgement is kept in the storage as it comes: nothing is asked twice, by a retry or by another batch.

    Args:
        patience: for what was asked and paid for.
        hasty: for what is soon done again.
        check: raises where the attempt is to end early.

    Returns the outcome. Raises JudgeError, StorageError, and what `check` raises.
    """
    task = RateSpec.model_validate(claim.spec, strict=False)
    spec = task.judge
    key = api_key(spec, settings.judge_urls)
    jobs = lease.insist(lambda: store.jobs(store.batch(task.batch).jobs))
    evaluations = [job for job in of_task(jobs) if job.state is JobState.SUCCEEDED]
    rows = hasty(
        "read the answers",
        lambda: [(job.id, row) for job in evaluations for row in drawn(of_job(job, storage), spec.limit, spec.seed)],
    )

    asks = {(job, row.index): list(_asks(row, spec)) for job, row in rows}
    wanted = {ask.name: ask for of_row in asks.values() for ask in of_row}
    known = hasty("read earlier judgements", lambda: _kept(wanted.values(), storage))
    missing = sorted(wanted.keys() - known.keys())  # by their hashes: whose answer is next, tells nothing
    journal.line(
        f"{len(rows)} answers of {len(evaluations)} models, {len(wanted)} judgements; {len(known)} are at hand"
    )

    def keep(ask: Ask, judgement: Judgement) -> None:
        name, text = f"{ask.folder}/{ask.name}.json", json.dumps(asdict(judgement))
        patience("keep a judgement", lambda: storage.write_text(name, text))

    made = asyncio.run(_ask_all(Judge(spec, key), [wanted[name] for name in missing], spec, keep, journal, check))
    all_of_them = {**known, **made}
    if wanted and not any(judgement.scores for judgement in all_of_them.values()):
        replies = [judgement.reply for judgement in all_of_them.values()]
        raise JudgeError(
            FailureReason.REFUSED,
            f"no scores could be read from any reply of {', '.join(spec.models)}, such as {replies[0]!r}",
            "Choose a model that follows instructions, and submit again.",
        )
    lines = [
        {"job": job, "index": index, "scores": scores}
        for (job, index), of_row in asks.items()
        if (scores := _by_model(of_row, all_of_them))
    ]
    folder = attempt_folder(claim)
    text = "".join(json.dumps(line) + "\n" for line in lines)
    hasty("write the judgements", lambda: storage.write_text(f"{folder}/{JUDGEMENTS}", text))
    usage = _usage(spec, wanted, all_of_them, len(known), lines)
    journal.line(f"{usage.unusable} judgements could not be read, {usage.retries} requests were sent again")
    return {"folder": folder, "models": spec.models, "usage": asdict(usage)}


def _asks(row: Written, spec: JudgeSpec) -> Iterator[Ask]:
    for model in spec.models:
        judge = _hash([PROMPT, spec.base_url, model, spec.temperature])
        for sample in range(spec.samples):
            request = messages(row, sample, spec.rubric)
            name = _hash([judge, sample, request])
            yield Ask(model, f"judgements/{judge}", name, request)


def _hash(value: object) -> str:
    return hashlib.sha256(json.dumps(value).encode()).hexdigest()[:32]


def _kept(asks: Iterable[Ask], storage: Storage) -> dict[str, Judgement]:
    """Of these, what the storage has."""
    folders: dict[str, list[str]] = {}
    for ask in asks:
        folders.setdefault(ask.folder, []).append(f"{ask.name}.json")
    texts = [found for folder, names in folders.items() for found in storage.read_texts(folder, names).items()]
    return {name.removesuffix(".json"): Judgement(**json.loads(text)) for name, text in texts}


async def _ask_all(
    judge: Judge,
    asks: Sequence[Ask],
    spec: JudgeSpec,
    keep: Callable[[Ask, Judgement], None],
    journal: Journal,
    check: Callable[[], None],
) -> dict[str, Judgement]:
    """By name. Those that could be read are kept one by one; the first error ends the others."""
    made: dict[str, Judgement] = {}
    waiting = iter(asks)

    async def work() -> None:
        for ask in waiting:
            judgement = await judge.ask(ask.model, ask.request)
            if judgement.scores:
                await asyncio.to_thread(keep, ask, judgement)
            made[ask.name] = judgement

    def report() -> None:
        journal.event(Progress("judge", step=len(made), steps=len(asks)))
        journal.flush()

    async def watch() -> None:
        while True:
            check()
            report()
            await asyncio.sleep(LOOK_S)

    try:
        async with judge, asyncio.TaskGroup() as group:
            watching = group.create_task(watch())
            await asyncio.wait([group.create_task(work()) for _ in range(spec.concurrency)])
            watching.cancel()
    except ExceptionGroup as several:
        raise several.exceptions[0] from None
    report()
    return made


def _by_model(asks: Sequence[Ask], judgements: Mapping[str, Judgement]) -> dict[str, list[Mapping[Criterion, int]]]:
    """The scores of one answer: for each model of the judge, those of its samples."""
    found: dict[str, list[Mapping[Criterion, int]]] = {}
    for ask in asks:
        if scores := judgements[ask.name].scores:
            found.setdefault(ask.model, []).append(scores)
    return found


def _usage(
    spec: JudgeSpec,
    asks: Mapping[str, Ask],
    judgements: Mapping[str, Judgement],
    reused: int,
    lines: Sequence[Mapping[str, Any]],
) -> JudgeUsage:
    tokens = {model: [0, 0] for model in spec.models}
    for name, judgement in judgements.items():
        tokens[asks[name].model][0] += judgement.input_tokens
        tokens[asks[name].model][1] += judgement.output_tokens
    costs = [spec.cost(model, *counts) for model, counts in tokens.items()]
    samples = [scores for line in lines for scores in line["scores"].values()]
    models = [[average(of_model) for of_model in line["scores"].values()] for line in lines]
    return JudgeUsage(
        judgements=len(judgements),
        reused=reused,
        unusable=sum(judgement.scores is None for judgement in judgements.values()),
        retries=sum(judgement.retries for judgement in judgements.values()),
        input_tokens=sum(counts[0] for counts in tokens.values()),
        output_tokens=sum(counts[1] for counts in tokens.values()),
        cost=None if None in costs else round(math.fsum(cost or 0.0 for cost in costs), 6),
        between_samples=_spread(samples),
        between_models=_spread(models),
    )


def _spread(groups: Sequence[Sequence[Mapping[Criterion, float]]]) -> float | None:
    """Highest less lowest score of one answer by one criterion, on average; None where nothing was rated twice."""
    ranges = [
        max(scores[name] for scores in group) - min(scores[name] for scores in group)
        for group in groups
        if len(group) > 1
        for name in CRITERIA
    ]
    return round(math.fsum(ranges) / len(ranges), 6) if ranges else None
