"""A checked sweep -> the jobs that it becomes; reads local files, needs no server."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from jobqueue import advice, base_model, ensembles, sources
from jobqueue.ensemble_spec import EnsembleSpec, Members
from jobqueue.errors import Problem, SpecError
from jobqueue.job import OF_NO_BATCH, JobKind
from jobqueue.job_spec import ControlSpec, EvaluateSpec, ExportSpec, RateSpec, ReportSpec, TrainSpec, WorkSpec
from jobqueue.judge_spec import JudgeSpec
from jobqueue.lookups import Lookups
from jobqueue.memory import estimate, memory_class
from jobqueue.spec import EvaluationSpec, RunSpec
from jobqueue.sweep import Sweep, Trial

EVALUATOR = 4  # raised when the same answers would be scored otherwise: base models are then asked anew
BATCH = "{batch}"  # stands for the batch's name until the server has given it


@dataclass(frozen=True)
class PlannedJob:
    """One job to be. Ids are those within the batch, but for base evaluations, which serve many batches."""

    id: str  # "1", "1.export", "1.eval", "1.before", "1.original", "judge", "report"; "base-<hash>"
    kind: JobKind
    trial: str
    spec: WorkSpec | ControlSpec
    need_bytes: int  # estimated peak; 0: a control worker will say
    needs: tuple[str, ...] = ()  # must have succeeded before
    follows: tuple[str, ...] = ()  # must have ended before

    @property
    def shared(self) -> bool:
        return self.id.startswith(OF_NO_BATCH)

    @property
    def after(self) -> tuple[str, ...]:
        return self.needs + self.follows

    @property
    def queue(self) -> str:
        """The class that it waits in; "" where the memory is yet to be estimated."""
        if isinstance(self.spec, ControlSpec):
            return "control"
        if self.spec.resources.device == "cpu":
            return "cpu"
        return memory_class(self.need_bytes) if self.need_bytes else ""


@dataclass(frozen=True)
class Plan:
    """Everything that a submission will do."""

    sweep: Sweep
    jobs: tuple[PlannedJob, ...]
    files: dict[str, Path]  # source in the storage -> the local file to upload
    warnings: tuple[str, ...]
    advice: tuple[str, ...] = ()  # what is unusual about the trainings

    @property
    def key(self) -> str:
        """The same for everything that asks for the same: by name, configurations, and content of local files.

        Who is told of its end is no part of that: nothing is to be trained again for it.
        """
        asked = [self.sweep.name, *((job.id, job.spec.model_dump_json(exclude={"notify"})) for job in self.jobs)]
        return hashlib.sha256(json.dumps(asked).encode()).hexdigest()


def make_plan(sweep: Sweep, *, workers_are_here: bool) -> Plan:
    """The jobs of a sweep, each after those that it waits for.

    Args:
        sweep: the checked file.
        workers_are_here: the workers see this machine's files, so that a model which is missing here is missing.

    Raises:
        SpecError, DataError: before anything was sent.
    """
    look = Lookups(sweep, workers_are_here)
    look.all_named()
    jobs: dict[str, PlannedJob] = {}
    for number, trial in enumerate(sweep.trials, start=1):
        for job in _trial_jobs(str(number), trial, look):
            jobs.setdefault(job.id, job)  # trials share a base evaluation
    votes = []
    for ensemble in sweep.ensembles:
        members = _members(ensemble, len(sweep.trials))
        if ensemble.method == "vote":
            votes.append(members)
        else:
            jobs[ensemble.name] = _merged(members, sweep.trials, look)
    judge = _judge(sweep)
    if judge is not None:
        answered = tuple(job.id for job in jobs.values() if job.kind is JobKind.EVALUATE)
        jobs["judge"] = PlannedJob("judge", JobKind.JUDGE, "", RateSpec(batch=BATCH, judge=judge), 0, follows=answered)
    report_spec = ReportSpec(batch=BATCH, votes=tuple(votes), notify=sweep.notify)
    report = PlannedJob("report", JobKind.REPORT, "", report_spec, 0, follows=tuple(jobs))
    said = advice.of_batch(look.advice, len(sweep.trials))
    return Plan(sweep, (*jobs.values(), report), look.files, tuple(look.warnings), tuple(said))


def located(sweep: Sweep, *, tokens: bool, workers_are_here: bool) -> tuple[RunSpec, dict[str, Path]]:
    """The first configuration as a worker reads it, and the local files that it names, by their source in the storage.

    `tokens`: its base model and chat template too. Raises SpecError, DataError.
    """
    look, run = Lookups(sweep, workers_are_here), sweep.trials[0].run
    found: dict[str, Any] = {"data": look.data(run.data) if run.data else None}
    found["evaluation"] = look.data(run.evaluation) if run.evaluation else None
    if tokens:
        found["base_model"] = look.model(run.base_model)
        found["chat_template"] = sources.chat_template(run.chat_template, sweep.file)
    return run.model_copy(update=found), look.files


def _judge(sweep: Sweep) -> JudgeSpec | None:
    """The one judge of all configurations. Raises SpecError where there are several: their scores do not compare."""
    judges = [trial.run.evaluation.judge for trial in sweep.trials if trial.run.evaluation]
    judge = next((judge for judge in judges if judge), None)
    if any(other not in (judge, None) for other in judges):
        message = "one judge rates all configurations of a sweep; submit another file for another judge"
        raise SpecError([Problem(message, str(sweep.file), path="evaluation.judge")])
    return judge


def _trial_jobs(number: str, trial: Trial, look: Lookups) -> list[PlannedJob]:
    """Train, export, what the base model and the adapter are asked, what they still can of the original task: those
    that the configuration has."""
    run = trial.run
    model = look.model(run.base_model)
    look.check_revision(run.revision, model)
    jobs = []
    if run.data is not None:
        train = TrainSpec(
            base_model=model,
            revision=run.revision,
            method=run.method,
            dtype=run.dtype,
            chat_template=sources.chat_template(run.chat_template, look.sweep.file),
            data=look.data(run.data),
            from_adapter=look.adapter(run.from_adapter),
            ewc=look.ewc(run),
            lora=run.lora,
            training=run.training,
            resources=run.resources,
        )
        jobs.append(PlannedJob(number, JobKind.TRAIN, trial.label, train, need_of(train)))
        look.advise(trial, run.data)
        if run.export is not None:
            export = ExportSpec.of(train, f"{BATCH}.{number}", run.export)
            job_id = f"{number}.export"
            jobs.append(PlannedJob(job_id, JobKind.EXPORT, trial.label, export, need_of(export), needs=(number,)))
    if run.evaluation is not None:
        if run.data is not None and run.data.system_prompt != run.evaluation.system_prompt:
            look.warn("data and evaluation have different system prompts: the answers are asked for in another setting")
        base = _evaluation(run, run.evaluation, model, look)
        if run.data is None or run.evaluation.compare_with_base:
            jobs.append(_base(base, "" if run.data is not None else trial.label, look))
        if run.data is not None:
            jobs.append(_of_trained(number, "eval", trial, base))
    if run.original_task is not None:
        before = _evaluation(run, run.original_task, model, look)
        if run.original_task.compare_with_base:
            jobs.append(_before(number, before, look.adapter(run.from_adapter), look))
        jobs.append(_of_trained(number, "original", trial, before.model_copy(update={"original_task": True})))
    return jobs


def _base(spec: EvaluateSpec, label: str, look: Lookups) -> PlannedJob:
    job_id = _base_id(spec, look.version(spec.base_model, spec.revision))
    return PlannedJob(job_id, JobKind.EVALUATE, label, spec, need_of(spec))


def _before(number: str, spec: EvaluateSpec, from_adapter: str | None, look: Lookups) -> PlannedJob:
    """Asks what the training begins with: the base model, or once in the batch the earlier adapter."""
    if from_adapter is None:
        return _base(spec, "", look)
    spec = spec.model_copy(update={"from_adapter": from_adapter})
    job_id = look.asked_before.setdefault(spec.model_dump_json(), f"{number}.before")
    return PlannedJob(job_id, JobKind.EVALUATE, "", spec, need_of(spec))


def _of_trained(number: str, what: str, trial: Trial, spec: EvaluateSpec) -> PlannedJob:
    spec = spec.model_copy(update={"adapter_job": f"{BATCH}.{number}"})
    return PlannedJob(f"{number}.{what}", JobKind.EVALUATE, trial.label, spec, need_of(spec), needs=(number,))


def _members(ensemble: EnsembleSpec, count: int) -> Members:
    trains = tuple(f"{BATCH}.{number}" for number in ensembles.numbers(ensemble, count))
    said = ensemble.model_dump(include={"name", "method", "weights", "density"})
    return Members(trains=trains, best=ensemble.best, **said)


def _merged(members: Members, trials: Sequence[Trial], look: Lookups) -> PlannedJob:
    """The evaluation of one adapter that is made of several."""
    numbers = tuple(train.removeprefix(f"{BATCH}.") for train in members.trains)
    run = trials[int(numbers[0]) - 1].run
    assert run.evaluation is not None
    spec = _evaluation(run, run.evaluation, look.model(run.base_model), look)
    spec = spec.model_copy(update={"members": members})
    job = PlannedJob(members.name, JobKind.EVALUATE, ensembles.label(members), spec, need_of(spec))
    return replace(job, follows=numbers) if members.best else replace(job, needs=numbers)


def _evaluation(run: RunSpec, asked: EvaluationSpec, model: str, look: Lookups) -> EvaluateSpec:
    """Of the base model."""
    return EvaluateSpec(
        base_model=model,
        revision=run.revision,
        method=run.method,
        dtype=run.dtype,
        chat_template=sources.chat_template(run.chat_template, look.sweep.file),
        adapter_job=None,
        load_in_4bit=run.loads_in_4bit(asked),
        max_seq_length=run.training.max_seq_length,
        evaluation=look.data(asked.model_copy(update={"judge": None})),  # a job of its own
        resources=run.resources,
    )


def _base_id(spec: EvaluateSpec, model: str) -> str:
    """The same for all that must give the same scores: by model and its version, precision, questions and how they
    are asked."""
    asked = spec.evaluation.model_dump(
        exclude={"compare_with_base", "per_device_eval_batch_size", "load_in_4bit"}, exclude_none=True
    )
    key = [EVALUATOR, model, spec.chat_template or "", spec.load_in_4bit, spec.max_seq_length, asked]
    key += [spec.dtype] if spec.dtype else []  # nothing where it is left out: such scores are known by what came before
    return f"base-{hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()[:12]}"


def need_of(spec: WorkSpec) -> int:
    """Estimated peak bytes, 0 where this machine cannot read the model's config."""
    if spec.resources.memory is not None:
        return int(spec.resources.memory)
    config = base_model.read_config(spec.base_model) if base_model.is_path(spec.base_model) else None
    try:
        return estimate(config, spec) if config else 0
    except (KeyError, TypeError):
        return 0
