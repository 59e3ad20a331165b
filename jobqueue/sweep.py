"""A sweep file -> its checked trials; every problem is reported at once, with file and line."""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from pydantic import ValidationError
from ruamel.yaml import YAML
from ruamel.yaml.comments import CommentedMap, CommentedSeq
from ruamel.yaml.error import MarkedYAMLError, YAMLError

from jobqueue import ensembles
from jobqueue.ensemble_spec import EnsembleSpec
from jobqueue.errors import Problem, SpecError
from jobqueue.mistakes import mistakes
from jobqueue.spec import RunSpec, SweepFile, SweepSpec

MAX_TRIALS = 10_000
Places = Mapping[str, Sequence[str | int]]  # varied key -> where it came from


@dataclass(frozen=True)
class Trial:
    """One configuration of a sweep."""

    label: str  # what differs from its siblings, e.g. "learning_rate=0.0002 r=16"; "" where nothing does
    differs: Mapping[str, Any]  # dotted key -> value
    run: RunSpec


@dataclass
class _Document:
    """The file as it was read, with the line of every key."""

    path: Path
    root: CommentedMap
    set_keys: set[str] = field(default_factory=set)  # dotted keys that came from --set
    problems: list[Problem] = field(default_factory=list)

    def line(self, loc: Sequence[str | int]) -> tuple[int | None, str]:
        """1-based line and dotted path of the deepest part of `loc` that the file has."""
        node: Any = self.root
        line: int | None = 1
        path: list[str] = []
        for part in loc:
            try:
                if isinstance(node, CommentedMap) and part in node:
                    line, node = node.lc.key(part)[0] + 1, node[part]
                elif isinstance(node, CommentedSeq) and isinstance(part, int):
                    line, node = node.lc.item(part)[0] + 1, node[part]
                else:
                    break
            except (KeyError, IndexError, TypeError, AttributeError):  # of a --set, or merged with `<<`
                dotted = ".".join([*path, str(part)])
                if any(key.startswith(dotted) or dotted.startswith(key) for key in self.set_keys):
                    line = None
                node = node[part]
            path.append(str(part))
            if ".".join(path) in self.set_keys:
                line = None
        return line, ".".join(path)

    def report(self, message: str, loc: Sequence[str | int] = ()) -> None:
        line, path = self.line(loc)
        missing = ".".join(map(str, loc)) if message.startswith("is missing") else path
        place = "--set" if line is None else str(self.path)
        problem = Problem(message, place, line, missing)
        if problem not in self.problems:
            self.problems.append(problem)

    def check(self) -> None:
        if self.problems:
            raise SpecError(self.problems)


@dataclass(frozen=True)
class Sweep:
    """A checked sweep file."""

    name: str
    file: Path  # relative names in the file are relative to its folder
    trials: Sequence[Trial]
    ensembles: Sequence[EnsembleSpec] = ()
    document: _Document | None = field(default=None, repr=False, compare=False)

    def placed(self, problem: Problem, trial: Trial) -> Problem:
        """A problem with a trial's value of `problem.path`, with the line where that value stands."""
        if self.document is None:
            return problem
        line, _ = self.document.line(self._loc(problem.path, trial))
        return replace(problem, line=line, file=problem.file if line else "--set")

    def _loc(self, path: str, trial: Trial) -> Sequence[str | int]:
        varied = next((key for key in trial.differs if f"{path}.".startswith(f"{key}.")), None)
        if varied is None or self.document is None:
            return path.split(".")
        value = trial.differs[varied]
        sweep = SweepSpec.model_validate(json.loads(json.dumps(self.document.root["sweep"], default=str)))
        if varied in sweep.grid:
            return "sweep", "grid", varied, sweep.grid[varied].index(value)
        entry = next(index for index, entry in enumerate(sweep.list or ()) if entry.get(varied) == value)
        return "sweep", "list", entry, varied


def read_sweep(path: Path, sets: Sequence[str] = ()) -> Sweep:
    """Read and check a sweep file.

    Args:
        path: the YAML (1.2) file.
        sets: `key=value` with dotted keys, the values in YAML; they override the file.

    Raises:
        SpecError: with every problem of the file.
    """
    return _checked(_read(path), sets)


def sweep_of_data(source: str, base_model: str, sets: Sequence[str] = ()) -> Sweep:
    """A file, URL or hub id as a sweep of one configuration that trains on it; `sets` as above. Raises SpecError."""
    root = CommentedMap(name="preview", base_model=base_model, data=CommentedMap(source=source))
    return _checked(_Document(Path("preview"), root), sets)


def _checked(document: _Document, sets: Sequence[str]) -> Sweep:
    for item in sets:
        _set(document, item)
    file = _validate(document, SweepFile, *_with_first(document))
    known = list(document.problems)
    trials = _trials(document)
    if file is None:  # what all configurations share has been said
        document.problems = known + [new for new in document.problems if _is_new(new, known)]
    document.check()
    assert isinstance(file, SweepFile)  # else there was a problem
    _check_ensembles(document, file.ensembles, trials)
    return Sweep(file.name, document.path, trials, file.ensembles, document)


def _is_new(problem: Problem, known: Sequence[Problem]) -> bool:
    """Whether it is about a varied value of which nothing was said yet."""
    return problem.path.startswith("sweep.") and (problem.line, problem.path) not in {(p.line, p.path) for p in known}


def _check_ensembles(document: _Document, given: Sequence[EnsembleSpec], trials: Sequence[Trial]) -> None:
    for index, ensemble in enumerate(given):
        if any(other.name == ensemble.name for other in given[:index]):
            document.report("is the name of another one", ("ensembles", index, "name"))
        for message, key in ensembles.problems(ensemble, trials):
            document.report(message, ("ensembles", index, key))
    document.check()


def _yaml() -> YAML:
    yaml = YAML(typ="rt")  # round trip: it keeps line numbers; YAML 1.2, where `no` is text and `2e-4` a number
    yaml.version = (1, 2)
    return yaml


def _read(path: Path) -> _Document:
    try:
        root = _yaml().load(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise SpecError([Problem("there is no such file", str(path))]) from None
    except UnicodeDecodeError:
        raise SpecError([Problem("cannot be read: it is not UTF-8", str(path))]) from None
    except OSError as error:
        raise SpecError([Problem(f"cannot be read: {error.strerror}", str(path))]) from None
    except MarkedYAMLError as error:
        line = error.problem_mark.line + 1 if error.problem_mark else None
        message = " ".join(str(error.problem or error.context).split())
        raise SpecError([Problem(f"is not valid YAML: {message}", str(path), line)]) from None
    except YAMLError as error:
        raise SpecError([Problem(f"is not valid YAML: {error}", str(path))]) from None
    if not isinstance(root, CommentedMap):
        raise SpecError([Problem("must be a mapping of keys (name, base_model, data, ...)", str(path), 1)])
    return _Document(path, root)


def _set(document: _Document, item: str) -> None:
    key, sign, text = item.partition("=")
    if not sign or not key.strip():
        document.problems.append(Problem(f"{item!r} must look like key=value", "--set"))
        return
    try:
        value = _yaml().load(text)
    except YAMLError:
        document.problems.append(Problem(f"the value {text!r} is not valid YAML", "--set", path=key))
        return
    if not _put(document.root, key.strip(), value):
        document.problems.append(Problem(f"{key!r} goes into something that is no section", "--set"))
    document.set_keys.add(key.strip())


def _put(root: Any, dotted: str, value: Any) -> bool:
    """Set root[a][b][c] = value for "a.b.c", making sections that are not there."""
    *parents, last = dotted.split(".")
    for parent in parents:
        if not isinstance(root, dict):
            return False
        if root.get(parent) is None:
            root[parent] = CommentedMap()
        root = root[parent]
    if not isinstance(root, dict):
        return False
    root[last] = value
    return True


def _validate(document: _Document, model: type[RunSpec], value: Any, places: Places) -> RunSpec | None:
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


def _trials(document: _Document) -> list[Trial]:
    """Every combination of the grid, for each entry of the list, each checked as a whole."""
    plain = _plain(document)
    sweep = _sweep(plain.pop("sweep", None))
    plain.pop("ensembles", None)
    entries = sweep.list or [{}]
    for key, values in sweep.grid.items():
        if len({json.dumps(value) for value in values}) < len(values):
            document.report("has a value twice", ("sweep", "grid", key))
        for index, entry in enumerate(entries):
            if key in entry:
                document.report("is varied by the grid too", ("sweep", "list", index, key))
    count = len(entries)
    for values in sweep.grid.values():
        count *= len(values)
    if count > MAX_TRIALS:
        document.report(f"makes {count:,} configurations; at most {MAX_TRIALS:,} are possible", ("sweep",))
        return []
    trials = []
    for index, differs in _combinations(sweep):
        checked = _validate(document, RunSpec, *_varied(document, plain, sweep, index, differs))
        if checked is not None:
            trials.append(Trial(_label(differs), differs, checked))
    return trials


def _with_first(document: _Document) -> tuple[Any, Places]:
    """The file with the values of its first configuration: what it needs may be among what is varied."""
    plain = _plain(document)
    if not plain:
        return document.root, {}
    sweep = _sweep(plain.get("sweep"))
    return _varied(document, plain, sweep, *next(_combinations(sweep)))


def _plain(document: _Document) -> Any:
    """The file without YAML's own classes; nothing where it is no JSON, which the check of the whole file says."""
    try:
        return json.loads(json.dumps(document.root, default=str))
    except (TypeError, ValueError):
        return {}


def _sweep(given: Any) -> SweepSpec:
    """What is varied, as far as it can be read: the check of the whole file says what is wrong with the rest."""
    grid, entries = (_section(given).get(part) for part in ("grid", "list"))
    lists = {key: values if isinstance(values, list) else [values] for key, values in _section(grid).items()}
    return SweepSpec(
        grid={key: values for key, values in lists.items() if values},
        list=[_section(entry) for entry in entries] if isinstance(entries, list) else [],
    )


def _section(given: Any) -> dict[str, Any]:
    return given if isinstance(given, dict) else {}


def _varied(
    document: _Document, plain: Any, sweep: SweepSpec, index: int, differs: Mapping[str, Any]
) -> tuple[Any, Places]:
    """A copy of `plain` with what differs in it."""
    run = json.loads(json.dumps(plain))
    places: dict[str, Sequence[str | int]] = {}
    for key, value in differs.items():
        at = ("sweep", "grid", key) if key in sweep.grid else ("sweep", "list", index, key)
        if key not in ("name", "sweep", "ensembles") and _put(run, key, value):
            places[key] = at
        else:
            document.report("cannot be varied", at)
    return run, places


def _combinations(sweep: SweepSpec) -> Iterator[tuple[int, dict[str, Any]]]:
    """(index in the list, what differs) of each trial."""
    for index, entry in enumerate(sweep.list or [{}]):
        for values in itertools.product(*sweep.grid.values()):
            yield index, {**entry, **dict(zip(sweep.grid, values, strict=True))}


def _label(differs: Mapping[str, Any]) -> str:
    """What differs, by the last part of each key, or the whole key where that would be ambiguous."""
    last = [key.rsplit(".", 1)[-1] for key in differs]
    return " ".join(
        f"{short if last.count(short) == 1 else key}={_short(value)}"
        for (key, value), short in zip(differs.items(), last, strict=True)
    )


def _short(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:g}"
    return value if isinstance(value, str) else json.dumps(value)
