"""What a sweep varies: its configurations by what differs in them, and where in the file each value stands; pure."""

from __future__ import annotations

import contextlib
import itertools
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from pydantic import ValidationError

from jobqueue.random_spec import ParameterSpec, RandomSpec
from jobqueue.spec import SweepSpec

Place = Sequence[str | int]
"""Keys and indices that lead to a value of the file."""


@dataclass(frozen=True)
class Variation:
    """What one configuration has that others have not."""

    differs: Mapping[str, Any]  # dotted key -> value
    places: Mapping[str, Place]  # the same keys -> where their values stand


def as_far_as_readable(given: Any) -> SweepSpec:
    """The section `sweep`; the check of the whole file says what is wrong with the rest."""
    section = _section(given)
    entries = section.get("list")
    grid = {key: values for key, values in _section(section.get("grid")).items() if values not in ([], None)}
    return SweepSpec.model_construct(
        grid={key: values if isinstance(values, list) else [values] for key, values in grid.items()},
        list=[_section(entry) for entry in entries] if isinstance(entries, list) else [],
        random=_random(_section(section.get("random"))),
    )


def _random(given: Mapping[str, Any]) -> RandomSpec | None:
    """All of it, or one configuration of those parameters that are right."""
    for asked in (given, {"samples": 1, "parameters": _section(given.get("parameters"))}):
        with contextlib.suppress(ValidationError):
            return RandomSpec.model_validate(asked)
    parameters: dict[str, ParameterSpec] = {}
    for key, parameter in _section(given.get("parameters")).items():
        with contextlib.suppress(ValidationError):
            parameters |= RandomSpec.model_validate({"samples": 1, "parameters": {key: parameter}}).parameters
    return RandomSpec(samples=1, parameters=parameters) if parameters else None


def _section(given: Any) -> dict[str, Any]:
    return given if isinstance(given, dict) else {}


def count(sweep: SweepSpec) -> int:
    """How many configurations there are."""
    entries = sweep.random.samples if sweep.random else len(sweep.list) or 1
    return entries * math.prod(map(len, sweep.grid.values()))


def variations(sweep: SweepSpec) -> Iterator[Variation]:
    """Every combination of the grid, for each entry of the list, or each that was drawn."""
    for entry in _entries(sweep):
        for values in itertools.product(*(enumerate(values) for values in sweep.grid.values())):
            combined = dict(zip(sweep.grid, values, strict=True))
            yield Variation(
                {**entry.differs, **{key: value for key, (_, value) in combined.items()}},
                {**entry.places, **{key: ("sweep", "grid", key, index) for key, (index, _) in combined.items()}},
            )


def _entries(sweep: SweepSpec) -> list[Variation]:
    if sweep.random:
        places = {key: ("sweep", "random", "parameters", key) for key in sweep.random.parameters}
        return [Variation(drawn, places) for drawn in sweep.random.drawn]
    listed = [
        Variation(entry, {key: ("sweep", "list", index, key) for key in entry})
        for index, entry in enumerate(sweep.list)
    ]
    return listed or [Variation({}, {})]


def varied_everywhere(sweep: SweepSpec) -> set[str]:
    """The keys that every configuration has a value of its own for."""
    return set(sweep.grid).union(set.intersection(*(set(entry.differs) for entry in _entries(sweep))))


def extremes(sweep: SweepSpec) -> Iterator[Variation]:
    """What may be drawn but need not have been: the first configuration with each end of each parameter."""
    first = next(variations(sweep))
    for key, parameter in sweep.random.parameters.items() if sweep.random else ():
        for end in parameter.ends:
            yield replace(first, differs={**first.differs, key: end})


def mistakes(sweep: SweepSpec) -> Iterator[tuple[str, Place]]:
    """What cannot be meant so, and where."""
    lists: dict[tuple[str, ...], Sequence[Any]] = {("sweep", "grid", key): values for key, values in sweep.grid.items()}
    for key, parameter in sweep.random.parameters.items() if sweep.random else ():
        lists["sweep", "random", "parameters", key] = parameter.values or []
    for at, values in lists.items():
        if len({json.dumps(value) for value in values}) < len(values):
            yield "has a value twice", at
    for key in sweep.grid:
        for place in dict.fromkeys(entry.places[key] for entry in _entries(sweep) if key in entry.differs):
            yield "is varied by the grid too", place


def label(differs: Mapping[str, Any]) -> str:
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
