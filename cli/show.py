"""`loraq show`: a batch or a job in full."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from io import StringIO
from typing import TYPE_CHECKING, Any

import click

from cli import complete
from cli.main import connect

if TYPE_CHECKING:
    from rich.console import Console

    from jobqueue.job import Batch, Job
    from jobqueue.notification import Told
    from jobqueue.service import Client

LOOKS_LIKE_A_JOB = re.compile(
    r"(base|ask|preview)-[0-9a-f]+|.*\.(\d+|\d+\.(eval|before|original|export)|judge|report)|.*/\d+"
)


@click.command()
@click.argument("target", metavar="BATCH|JOB", shell_complete=complete.jobs)
@click.option("--json", "as_json", is_flag=True, help="Print one JSON document.")
def show(target: str, as_json: bool) -> None:
    """Show a batch or a job in full.

    Of a job: its spec, its attempts and why they ended, and what it took in memory and time.
    """
    from cli.render import console, print_json
    from jobqueue.job import Job

    client = connect()
    found = find(client, target)
    if as_json:
        print_json(found)
    elif isinstance(found, Job):
        _print_job(console(), found, _waits_for(client, found))
    else:
        _print_batch(console(), found, client.jobs(target))


def find(client: Client, target: str) -> Batch | Job:
    """The batch or the job of that name. Raises NotFoundError."""
    from jobqueue.errors import NotFoundError

    looks: list[Callable[[str], Batch | Job]] = [client.batch, client.job]
    if LOOKS_LIKE_A_JOB.fullmatch(target):
        looks.reverse()
    try:
        return looks[0](target)
    except NotFoundError as error:
        try:
            return looks[1](target)  # a batch may be called llama3.1, and a job has the name of its ensemble
        except NotFoundError:
            raise error from None


def _waits_for(client: Client, job: Job) -> str:
    """The jobs that it still waits for, or what else keeps it from running."""
    from jobqueue.job import JobState
    from jobqueue.overview import waits_for

    if job.state is JobState.WAITING and job.batch and job.kind.control:
        others = [other.id for other in client.jobs(job.batch) if other.id != job.id and not other.state.final]
        return " ".join(others[:3]) + (f" and {len(others) - 3} more" if len(others) > 3 else "")
    if job.state is JobState.RUNNING or job.state.final:
        return ""
    seen = client.overview(most=0)
    return waits_for(job, seen.workers, seen.held_classes, seen.now, seen.quiet_s)


def _whence(job: Job) -> str:
    """Who says how much memory it needs."""
    return "as its file says" if job.spec.get("resources", {}).get("memory") else "estimated"


def _print_batch(out: Console, batch: Batch, jobs: Sequence[Job]) -> None:
    from cli.control import print_jobs
    from cli.render import age, batch_state, counts, facts, moment
    from jobqueue.job import FailureReason

    pairs = {
        "batch": batch.name,
        "state": batch_state(batch.state),
        "base model": batch.base_model,
        "trials": str(batch.trials),
        "owner": batch.owner,
        "submitted": f"{moment(batch.submitted_at)} ({age(batch.submitted_at)} ago)",
        "jobs": counts(batch.states),
    }
    facts(out, pairs)
    out.print()
    print_jobs(out, jobs)
    for job in jobs:
        if job.message and job.reason is not FailureReason.DEPENDENCY:
            out.print(f"\n{job.id}: {job.message}", style="yellow", soft_wrap=True)
    if batch.told:
        _title(out, "Told of its end")
        facts(out, {told.target: _telling(told) for told in batch.told})


def _telling(told: Told) -> str:
    from cli.render import moment

    why = f": {told.message}" if told.message else ""
    return f"{told.state.replace('_', ' ')} {moment(told.at)} (try {told.tries}){why}"


def _print_job(out: Console, job: Job, waits_for: str) -> None:
    from cli.render import age, duration, facts, memory, moment, progress, state
    from jobqueue.job import JobState
    from jobqueue.retry import TABLE

    took = f", after {duration(job.seconds)}" if job.seconds else ""
    pairs = {
        "job": job.id,
        "kind": job.kind,
        "state": state(job),
        "message": job.message,
        "what to do": TABLE[job.reason].remedy if job.reason and job.state is JobState.FAILED else "",
        "trial": job.trial,
        "batch": job.batch,
        "owner": job.owner,
        "waits for": waits_for,
        "needs": f"{memory(job.need_bytes)} on the GPU ({_whence(job)})" if job.need_bytes else "",
        "queue": job.queue,
        "priority": str(job.priority) if job.priority else "",
        "submitted": f"{moment(job.submitted_at)} ({age(job.submitted_at)} ago)",
        "not before": moment(job.not_before) if job.not_before and not job.state.final else "",
        "started": moment(job.claimed_at) if job.claimed_at else "",
        "ended": f"{moment(job.ended_at)}{took}" if job.state.final else "",
        "worker": job.worker,
        "progress": progress(job.progress) if job.progress and not job.state.final else "",
        "failures": str(job.failures) if job.failures else "",
    }
    facts(out, pairs)
    if job.history:
        _title(out, "Attempts")
        _print_attempts(out, job.history)
    if lines := job.outcome.get("last_lines"):
        _title(out, "Last lines of the log")
        for line in lines:
            out.print(line, markup=False, highlight=False, soft_wrap=True)
    elif job.outcome:
        _print_outcome(out, job.outcome)
    if folder := job.outcome.get("folder"):
        _title(out, "Files")
        written = {made["format"]: f"{folder}/{made['path']}" for made in job.outcome.get("exports") or ()}
        places = {"in the storage": folder, "adapter": f"{folder}/adapter" if job.has_adapter else "", **written}
        facts(out, {**places, "to copy it here": f"loraq pull {job.of_trial}" if job.has_adapter else ""})
    _title(out, "Spec")
    _print_yaml(out, job.spec)


def _title(out: Console, text: str) -> None:
    out.print(f"\n{text}", style="bold")


def _print_attempts(out: Console, history: Sequence[Mapping[str, Any]]) -> None:
    from cli.render import Column, duration, moment, table

    columns = [
        Column("attempt", right=True),
        Column("ended as"),
        Column("why", wrap=True),
        Column("took", right=True, rank=1),
        Column("started", rank=3),
        Column("worker", rank=2),
    ]
    rows = []
    for ended in history:
        why = ": ".join(filter(None, (ended.get("reason"), ended.get("message"))))
        start, end = float(ended.get("claimed_at") or 0), float(ended.get("ended_at") or 0)
        state = "queued again" if ended.get("state") == "queued" else str(ended.get("state", ""))
        took = duration(end - start) if start and end else ""
        rows.append([str(ended.get("attempt", "")), state, why, took, moment(start), str(ended.get("worker", ""))])
    out.print(table(out, columns, rows))


def _print_outcome(out: Console, outcome: Mapping[str, Any]) -> None:
    """Memory as Unsloth's notebooks report it, time, and what came out."""
    from cli.export import compared
    from cli.render import counted, facts, memory, number, percent

    used, time, training = (outcome.get(part) or {} for part in ("memory", "time", "training"))
    total = used.get("total_bytes")

    def share(count: float | None) -> str:
        whole = "the GPU" if used.get("kind") == "gpu" else "the memory"
        of_total = f" ({percent(count / total)} of {whole})" if count and total else ""
        return f"{memory(count)}{of_total}" if count else ""

    if used:
        _title(out, "Memory")
        gpu, capacity = used.get("gpu") or "", f"({memory(total)})" if total else ""
        pairs = {"GPU": f"{gpu} {capacity}".strip()}
        for key in ("reserved_at_start", "peak_reserved", "peak_for_training", "peak_allocated"):
            name = key if training else key.replace("for_training", "above_the_start")
            pairs[name.replace("_", " ")] = share(used.get(f"{key}_bytes"))
        facts(out, pairs)
    if time:
        _title(out, "Time")
        names = {"load_s": "loading", "train_s": "training", "save_s": "saving"}
        spans = {key: value for key, value in time.items() if key.endswith("_s")}
        facts(out, {names.get(key, key.removesuffix("_s")): _seconds(value) for key, value in spans.items()})
    if training:
        _title(out, "Training")
        known = {key: value for key, value in training.items() if value is not None}
        facts(out, {key.replace("_", " "): str(v) if key == "seed" else _plain(v) for key, v in known.items()})
    validation = outcome.get("validation") or {}
    if validation.get("losses"):
        _title(out, f"Validation loss on {counted(validation['rows'], 'row')}")
        marks = {validation.get("best_step"): "best"}
        if (kept := validation.get("kept_step")) is not None:
            marks[kept] = f"{marks[kept]}, kept" if kept in marks else "kept"
        losses = {step: f"{loss:.4f}" for step, loss in validation["losses"]}
        facts(
            out,
            {f"step {step}": f"{loss} ({marks[step]})" if step in marks else loss for step, loss in losses.items()},
        )
    if exports := outcome.get("exports"):
        _title(out, "Compared with the adapter")
        facts(out, {made["format"]: compared(made) for made in exports})
    scores = {key: part for key, part in outcome.items() if isinstance(part, dict) and "accuracy" in part}
    if scores:
        _title(out, f"Scores on {number(outcome.get('questions'))} questions")
        facts(out, {metric.replace("_", " "): _score(part) for metric, part in scores.items()})


def _seconds(value: float) -> str:
    return f"{value:.1f} s" + (f" ({value / 60:.1f} min)" if value >= 60 else "")


def _plain(value: Any) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return f"{value:,.4g}" if abs(value) < 1000 else f"{value:,.0f}"
    return f"{value:,}" if isinstance(value, int) else str(value)


def _score(part: Mapping[str, Any]) -> str:
    from cli.render import interval, percent

    bounds = part.get("interval")
    return percent(part["accuracy"]) + (f" {interval(bounds)}" if bounds else "")


def _print_yaml(out: Console, spec: Mapping[str, Any]) -> None:
    """The spec as a user would write it, coloured on a terminal."""
    from ruamel.yaml import YAML

    yaml, text = YAML(), StringIO()
    yaml.default_flow_style = False
    yaml.width = 10_000
    yaml.dump(dict(spec), text)
    if out.is_terminal:
        from rich.syntax import Syntax

        out.print(
            Syntax(
                text.getvalue().rstrip(),
                "yaml",
                theme="ansi_dark",
                background_color="default",
                word_wrap=True,
            )
        )
    else:
        out.print(text.getvalue().rstrip())
