"""A checked sweep -> the jobs that it becomes; reads local files, needs no server."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, get_args

from jobqueue import adapters, advice, base_model, ensembles, rows, sources
from jobqueue.data_spec import DataSpec, EwcSpec, QuestionFormat, RowsSpec
from jobqueue.ensemble_spec import EnsembleSpec, Members
from jobqueue.errors import DataError, Problem, SpecError
from jobqueue.job import JobKind
from jobqueue.judge_spec import JudgeSpec
from jobqueue.memory import estimate, memory_class
from jobqueue.sources import AnyData
from jobqueue.spec import (
    BY_QUESTION,
    ControlSpec,
    EvaluateSpec,
    EvaluationSpec,
    ExportSpec,
    RateSpec,
    ReportSpec,
    RunSpec,
    TrainSpec,
    WorkSpec,
)
from jobqueue.storage import blob_source
from jobqueue.sweep import Sweep, Trial

EVALUATOR = 3  # raised when the same answers would be scored otherwise: base models are then asked anew
OF_NO_BATCH = ("base-", "ask-")  # how the ids of jobs begin that belong to none
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
        """The same for everything that asks for the same: by name, configurations, and content of local files."""
        asked = [self.sweep.name, *((job.id, job.spec.model_dump_json()) for job in self.jobs)]
        return hashlib.sha256(json.dumps(asked).encode()).hexdigest()


@dataclass
class _Lookups:
    """What is looked up once for the whole sweep."""

    sweep: Sweep
    workers_are_here: bool
    files: dict[str, Path] = field(default_factory=dict)
    warnings: list[str] = field(default_factory=list)
    models: dict[str, str] = field(default_factory=dict)
    versions: dict[tuple[str, str | None], str] = field(default_factory=dict)
    checked: dict[tuple[Any, ...], rows.Checked] = field(default_factory=dict)
    advice: dict[str, list[str]] = field(default_factory=dict)  # what is said, of which trials
    asked_before: dict[str, str] = field(default_factory=dict)  # evaluation of an earlier adapter -> its job

    def warn(self, text: str) -> None:
        if text not in self.warnings:
            self.warnings.append(text)

    def data(self, spec: AnyData) -> AnyData:
        """With the source of a local file replaced by its content's address. Raises DataError."""
        if isinstance(spec, DataSpec) and spec.replay is not None:
            spec = spec.model_copy(update={"replay": self.data(spec.replay)})
        path = sources.data_file(spec, self.sweep.file.parent)
        if path is None:
            return spec
        self.check(spec, path)
        source = next((known for known, file in self.files.items() if file == path), "")
        if not source:
            source = blob_source(path)
            self.files[source] = path
        return spec.model_copy(update={"source": source})

    def check(self, spec: RowsSpec, path: Path) -> rows.Checked:
        """What a local file holds, read once for each way of reading it. Raises DataError."""
        reading = (path, type(spec), spec.model_dump_json(exclude={"source", "replay"}))
        if reading in self.checked:
            return self.checked[reading]
        summary = self.checked[reading] = rows.check_file(spec.model_copy(update={"source": str(path)}))
        if isinstance(spec, EvaluationSpec) and summary.format not in get_args(QuestionFormat):
            by_question = ", ".join(metric for metric in spec.metrics if metric in BY_QUESTION)
            if by_question:
                raise DataError(
                    f"{path} has the format {summary.format}, and {by_question} need questions with options",
                    "Give rows with a question, its options and the answer, or write `metrics: [perplexity]`.",
                )
        for reason, skipped in summary.skipped.items():
            lines = ", ".join(map(str, skipped.lines))
            unusable = f"{skipped.count} of {summary.rows} rows cannot be used"
            self.warnings.append(f"{path.name}: {unusable}: {reason} (line {lines})")
        return summary

    def advise(self, trial: Trial, data: DataSpec) -> None:
        """Notes what is unusual about a training, as far as it is seen from here."""
        own, others = self._here(data), data.replay and self._here(data.replay)
        count = own.trained if own else None
        if count and data.replay:
            mixed_in = data.replay.wanted(count)
            count += min(mixed_in, others.trained) if others else mixed_in
        said = [*advice.on_training(trial.run, count)]
        said += advice.on_duplicates(own.duplicates, own.trained) if own else ()
        for text in said:
            self.advice.setdefault(text, []).append(trial.label)

    def _here(self, spec: RowsSpec) -> rows.Checked | None:
        path = sources.data_file(spec, self.sweep.file.parent)
        return self.check(spec, path) if path else None

    def model(self, name: str) -> str:
        """The base model as the workers are to look for it. Raises SpecError."""
        if name not in self.models:
            try:
                located = base_model.locate(name, self.sweep.file.parent)
            except ValueError as error:
                raise SpecError([Problem(str(error), str(self.sweep.file), path="base_model")]) from None
            if base_model.is_path(located) and not Path(located).exists():
                if self.workers_are_here:
                    problem = Problem(f"there is no model at {located}", str(self.sweep.file), path="base_model")
                    raise SpecError([problem])
                self.warnings.append(f"{located} is not on this machine; every worker must have it")
            self.models[name] = located
        return self.models[name]

    def check_revision(self, revision: str | None, located: str) -> None:
        """Raises SpecError where the model is no hub model."""
        if revision is not None and base_model.is_path(located):
            message = f"only a hub model has one, and {located} is a path"
            raise SpecError([Problem(message, str(self.sweep.file), path="revision")])

    def version(self, located: str, revision: str | None) -> str:
        """The model as it is now."""
        if (located, revision) not in self.versions:
            self.versions[located, revision] = base_model.fingerprint(located, revision)
        return self.versions[located, revision]

    def adapter(self, name: str | None) -> str | None:
        """What training goes on from, as `adapters.locate` has it. Raises SpecError."""
        if name is None:
            return None
        place = str(self.sweep.file)
        try:
            located = adapters.locate(name, self.sweep.file.parent)
        except ValueError as error:
            raise SpecError([Problem(str(error), place, path="from_adapter")]) from None
        if base_model.is_path(located) and not Path(located).exists() and self.workers_are_here:
            raise SpecError([Problem(f"there is no adapter at {located}", place, path="from_adapter")])
        if base_model.is_path(located) and not self.workers_are_here:
            self.warn(f"{located} is a folder; every worker must have it")
        return located

    def ewc(self, run: RunSpec) -> EwcSpec | None:
        """With the rows of before, where they are named. Raises SpecError, DataError."""
        if run.ewc is None or run.ewc.data is None:
            if run.ewc and not adapters.TRIAL.fullmatch(self.adapter(run.from_adapter) or ""):
                message = f"which rows was {run.from_adapter} trained on? Only a trial (BATCH/NUMBER) says it by itself"
                raise SpecError([Problem(message, str(self.sweep.file), path="ewc.data")])
            return run.ewc
        return run.ewc.model_copy(update={"data": self.data(run.ewc.data)})


def make_plan(sweep: Sweep, *, workers_are_here: bool) -> Plan:
    """The jobs of a sweep, each after those that it waits for.

    Args:
        sweep: the checked file.
        workers_are_here: the workers see this machine's files, so that a model which is missing here is missing.

    Raises:
        SpecError, DataError: before anything was sent.
    """
    look = _Lookups(sweep, workers_are_here)
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
    report_spec = ReportSpec(batch=BATCH, votes=tuple(votes))
    report = PlannedJob("report", JobKind.REPORT, "", report_spec, 0, follows=tuple(jobs))
    said = advice.of_batch(look.advice, len(sweep.trials))
    return Plan(sweep, (*jobs.values(), report), look.files, tuple(look.warnings), tuple(said))


def located(sweep: Sweep, *, tokens: bool, workers_are_here: bool) -> tuple[RunSpec, dict[str, Path]]:
    """The first configuration as a worker reads it, and the local files that it names, by their source in the storage.

    `tokens`: its base model and chat template too. Raises SpecError, DataError.
    """
    look, run = _Lookups(sweep, workers_are_here), sweep.trials[0].run
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


def _trial_jobs(number: str, trial: Trial, look: _Lookups) -> list[PlannedJob]:
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


def _base(spec: EvaluateSpec, label: str, look: _Lookups) -> PlannedJob:
    job_id = _base_id(spec, look.version(spec.base_model, spec.revision))
    return PlannedJob(job_id, JobKind.EVALUATE, label, spec, need_of(spec))


def _before(number: str, spec: EvaluateSpec, from_adapter: str | None, look: _Lookups) -> PlannedJob:
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


def _merged(members: Members, trials: Sequence[Trial], look: _Lookups) -> PlannedJob:
    """The evaluation of one adapter that is made of several."""
    numbers = tuple(train.removeprefix(f"{BATCH}.") for train in members.trains)
    run = trials[int(numbers[0]) - 1].run
    assert run.evaluation is not None
    spec = _evaluation(run, run.evaluation, look.model(run.base_model), look)
    spec = spec.model_copy(update={"members": members})
    job = PlannedJob(members.name, JobKind.EVALUATE, ensembles.label(members), spec, need_of(spec))
    return replace(job, follows=numbers) if members.best else replace(job, needs=numbers)


def _evaluation(run: RunSpec, asked: EvaluationSpec, model: str, look: _Lookups) -> EvaluateSpec:
    """Of the base model."""
    return EvaluateSpec(
        base_model=model,
        revision=run.revision,
        method=run.method,
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
