"""What planning a sweep reads on this machine, each thing once: data files, base models, adapters."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, get_args

from jobqueue import adapters, advice, base_model, rows, sources
from jobqueue.data_spec import DataSpec, EwcSpec, QuestionFormat, RowsSpec
from jobqueue.errors import DataError, Problem, SpecError
from jobqueue.sources import AnyData
from jobqueue.spec import BY_QUESTION, EvaluationSpec, RunSpec
from jobqueue.storage import blob_source
from jobqueue.sweep import Sweep, Trial


@dataclass
class Lookups:
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

    def all_named(self) -> None:
        """Looks up all that the sweep names, so that everything wrong is said at once. Raises SpecError, DataError."""
        problems: dict[Problem, None] = {}
        of_data: dict[str, tuple[Problem, str]] = {}  # what is wrong with it -> the same with its place, what to do
        for trial in self.sweep.trials:
            for path, look_up in self._named(trial.run):
                try:
                    look_up()
                except SpecError as error:
                    problems |= dict.fromkeys(self.sweep.placed(problem, trial) for problem in error.problems)
                except DataError as error:
                    problem = Problem(error.what, str(self.sweep.file), path=path)
                    of_data.setdefault(error.what, (self.sweep.placed(problem, trial) if path else problem, error.do))
        if problems:
            raise SpecError([*problems, *(problem for problem, _ in of_data.values())])
        if of_data:
            found = sorted((problem for problem, _ in of_data.values()), key=lambda problem: problem.line or 0)
            what = [str(problem) if problem.path else problem.message for problem in found]
            raise DataError("\n".join(what), "\n".join(dict.fromkeys(do for _, do in of_data.values())))

    def _named(self, run: RunSpec) -> Iterator[tuple[str, Callable[[], object]]]:
        """Look-ups, each with the key that names what is looked up; "" where a data file says by itself where it is
        wrong."""
        yield "base_model", partial(self.check_model, run.base_model)
        yield "chat_template", partial(sources.chat_template, run.chat_template, self.sweep.file)
        yield "from_adapter", partial(self.adapter, run.from_adapter)
        sections: dict[str, RowsSpec | None] = {
            "data": run.data,
            "data.replay": run.data.replay if run.data else None,
            "ewc.data": run.ewc.data if run.ewc else None,
            "evaluation": run.evaluation,
            "original_task": run.original_task,
        }
        for key, section in sections.items():
            if section is not None:
                yield f"{key}.source", partial(sources.data_file, section, self.sweep.file.parent)
                alone = section.model_copy(update={"replay": None}) if isinstance(section, DataSpec) else section
                yield "", partial(self.data, alone)

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
        reading = (path, type(spec), spec.model_dump_json(exclude={"source", "replay", "judge"}))
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

    def check_model(self, name: str) -> None:
        """Raises SpecError, also where the workers see that folder and it holds no model."""
        located = Path(self.model(name))
        if not located.is_dir() or not (what := base_model.no_model(located)):
            return
        if self.workers_are_here:
            raise SpecError([Problem(f"{located} is {what}", str(self.sweep.file), path="base_model")])
        self.warn(f"{located} on this machine is {what}; every worker must have one there")

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
