"""A sweep file -> its checked trials; every problem is reported at once, with file and line."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from pydantic import ValidationError
from ruamel.yaml.comments import CommentedMap

from jobqueue import ensembles, sweep_file, variations
from jobqueue.ensemble_spec import EnsembleSpec
from jobqueue.errors import Problem
from jobqueue.mistakes import mistakes
from jobqueue.spec import RunSpec, SweepFile
from jobqueue.sweep_file import Document
from jobqueue.variations import Place, Variation

MAX_TRIALS = 10_000
OF_THE_FILE = ("ensembles", "notify")  # keys that no configuration has
WHOLE_FILE = ("name", "sweep", *OF_THE_FILE)  # keys that all configurations share


@dataclass(frozen=True)
class Trial:
    """One configuration of a sweep."""

    label: str  # what differs from its siblings, e.g. "learning_rate=0.0002 r=16"; "" where nothing does
    differs: Mapping[str, Any]  # dotted key -> value
    run: RunSpec
    places: Mapping[str, Place] = field(default_factory=dict, repr=False, compare=False)  # where they stand


@dataclass(frozen=True)
class Sweep:
    """A checked sweep file."""

    name: str
    file: Path  # relative names in the file are relative to its folder
    trials: Sequence[Trial]
    ensembles: Sequence[EnsembleSpec] = ()
    notify: tuple[str, ...] = ()  # webhooks that are told of the batch's end
    document: Document | None = field(default=None, repr=False, compare=False)

    def placed(self, problem: Problem, trial: Trial) -> Problem:
        """A problem with a trial's value of `problem.path`, with the line where that value stands."""
        if self.document is None:
            return problem
        varied = next((key for key in trial.places if f"{problem.path}.".startswith(f"{key}.")), None)
        line, _ = self.document.line(trial.places[varied] if varied else problem.path.split("."))
        return replace(problem, line=line, file=problem.file if line else "--set")


def read_sweep(path: Path, sets: Sequence[str] = ()) -> Sweep:
    """Read and check a sweep file.

    Args:
        path: the YAML (1.2) file.
        sets: `key=value` with dotted keys, the values in YAML; they override the file.

    Raises:
        SpecError: with every problem of the file.
    """
    return _checked(sweep_file.read(path), sets)


def sweep_of_data(source: str, base_model: str, sets: Sequence[str] = ()) -> Sweep:
    """A file, URL or hub id as a sweep of one configuration that trains on it; `sets` as above. Raises SpecError."""
    root = CommentedMap(name="preview", base_model=base_model, data=CommentedMap(source=source))
    return _checked(Document(Path("preview"), root), sets)


def _checked(document: Document, sets: Sequence[str]) -> Sweep:
    for item in sets:
        document.set_key(item)
    _check_sets(document)
    file = _validate(document, SweepFile, *_with_first(document))
    known = list(document.problems)
    trials = _trials(document)
    if file is None:  # what all configurations share has been said
        document.problems = known + [new for new in document.problems if _is_new(new, known)]
    document.check()
    assert isinstance(file, SweepFile)  # else there was a problem
    _check_ensembles(document, file.ensembles, trials)
    return Sweep(file.name, document.path, trials, file.ensembles, file.notify, document)


def _check_sets(document: Document) -> None:
    """Whoever sets a key that the sweep varies would get what he did not ask for."""
    varied = variations.varied_everywhere(variations.as_far_as_readable(document.plain().get("sweep")))
    for key in sorted(varied & document.set_keys):
        document.report("has no effect: the sweep gives each configuration a value of its own", key.split("."))


def _is_new(problem: Problem, known: Sequence[Problem]) -> bool:
    """Whether it is about a varied value of which nothing was said yet."""
    return problem.path.startswith("sweep.") and (problem.line, problem.path) not in {(p.line, p.path) for p in known}


def _check_ensembles(document: Document, given: Sequence[EnsembleSpec], trials: Sequence[Trial]) -> None:
    for index, ensemble in enumerate(given):
        if any(other.name == ensemble.name for other in given[:index]):
            document.report("is the name of another one", ("ensembles", index, "name"))
        for message, key in ensembles.problems(ensemble, trials):
            document.report(message, ("ensembles", index, key))
    document.check()


def _validate(document: Document, model: type[RunSpec], value: Any, places: Mapping[str, Place]) -> RunSpec | None:
    """`value` as a `model`, or None and its problems in the document."""
    try:
        # By way of JSON: strictness then knows lists and tuples, and YAML's own classes are left behind.
        return model.model_validate_json(json.dumps(value, default=str))
    except ValidationError as error:
        for loc, message in mistakes(model, error):
            dotted = ".".join(map(str, loc))
            at = next((p for key, p in places.items() if dotted == key or dotted.startswith(key + ".")), None)
            if at is None:  # a rule over several keys: blame the varied key of that section
                at = next((p for key, p in places.items() if key.startswith(dotted + ".")), loc)
            document.report(message, at)
    except (TypeError, ValueError) as error:  # a key that is no text, a value that is no JSON
        document.report(f"cannot be read: {error}")
    return None


def _trials(document: Document) -> list[Trial]:
    """All configurations, each checked as a whole."""
    shared = document.plain()
    sweep = variations.as_far_as_readable(shared.pop("sweep", None))
    for key in OF_THE_FILE:
        shared.pop(key, None)
    for message, place in variations.mistakes(sweep):
        document.report(message, place)
    if (count := variations.count(sweep)) > MAX_TRIALS:
        document.report(f"makes {count:,} configurations; at most {MAX_TRIALS:,} are possible", ("sweep",))
        return []
    for variation in variations.extremes(sweep):
        _validate(document, RunSpec, *_with(document, shared, variation))
    trials = []
    for variation in variations.variations(sweep):
        checked = _validate(document, RunSpec, *_with(document, shared, variation))
        if checked is not None:
            label = variations.label(variation.differs)
            trials.append(Trial(label, variation.differs, checked, variation.places))
    return trials


def _with_first(document: Document) -> tuple[Any, Mapping[str, Place]]:
    """The file with the values of its first configuration: what it needs may be among what is varied."""
    plain = document.plain()
    if not plain:
        return document.root, {}
    sweep = variations.as_far_as_readable(plain.get("sweep"))
    return _with(document, plain, next(variations.variations(sweep)))


def _with(document: Document, shared: Any, variation: Variation) -> tuple[Any, Mapping[str, Place]]:
    """A copy of `shared` with what differs in it."""
    run = json.loads(json.dumps(shared))
    places: dict[str, Place] = {}
    for key, value in variation.differs.items():
        place = variation.places[key]
        at = place[:3] if place[1] == "grid" else place  # of a grid the key, not each of its values
        if key not in WHOLE_FILE and sweep_file.put(run, key, value):
            places[key] = at
        else:
            document.report("cannot be varied", at)
    return run, places
