"""The part of the schema that draws configurations at random; see spec.py for the whole."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from functools import cached_property
from random import Random
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field

from jobqueue.data_spec import Clash, Part

DIGITS = 4  # significant ones of a number that is drawn: people read it, and it has to be the same when it is copied
TRIES = 100  # for each configuration, which is to be another one


class ParameterSpec(Part):
    """What a key may be: some values, or numbers from `min` to `max`, whole ones where both are whole."""

    values: Annotated[list[Any], Field(min_length=1)] | None = None
    """One of these; a list in this section's stead means the same."""
    min: int | float | None = None
    """The smallest number."""
    max: int | float | None = None
    """The largest."""
    scale: Literal["linear", "log"] = "linear"
    """log: as many between 1e-5 and 1e-4 as between 1e-4 and 1e-3."""

    def clashes(self) -> Iterator[Clash]:
        if self.values is not None:
            yield from ((name, "does not go with values") for name in ("min", "max") if getattr(self, name) is not None)
        elif self.min is None or self.max is None:
            missing = [name for name in ("min", "max") if getattr(self, name) is None]
            yield "", f"needs values, or {' and '.join(missing)}"
        elif self.min >= self.max:
            yield "max", f"must be above min ({self.min:g})"
        elif self.scale == "log" and self.min <= 0:
            yield "min", "must be above 0 where the scale is log"

    def draw(self, chance: Random) -> Any:
        """One of them, each value or number as likely as another; by `scale`."""
        if self.values is not None:
            return self.values[int(chance.random() * len(self.values))]
        least, most = self.ends
        whole = isinstance(least, int) and isinstance(most, int)
        low, high = (least - 0.5, most + 0.5) if whole else (least, most)
        if self.scale == "log":
            low, high = math.log(low), math.log(high)
        drawn = low + (high - low) * chance.random()
        drawn = math.exp(drawn) if self.scale == "log" else drawn
        rounded = round(drawn) if whole else float(f"{drawn:.{DIGITS}g}")
        return min(max(rounded, least), most)

    @property
    def ends(self) -> list[Any]:
        """All values, or the smallest and the largest number: where these can be had, so can what lies between them."""
        return self.values if self.values is not None else [self.min, self.max]


def _section(given: Any) -> Any:
    return {"values": given} if isinstance(given, list) else given


class RandomSpec(Part):
    """Configurations that are drawn at random: the same for the same seed, and the first of more are those of fewer."""

    samples: Annotated[int, Field(ge=1, le=10_000)]
    """How many; no two are the same."""
    seed: int = 3407
    """Another seed draws others."""
    parameters: Annotated[dict[str, Annotated[ParameterSpec, BeforeValidator(_section)]], Field(min_length=1)]
    """Dotted key -> what it may be: `[8, 16]`, or a section, see below, e.g. `{min: 1e-5, max: 1e-3, scale: log}`."""

    def clashes(self) -> Iterator[Clash]:
        if (found := len(self.drawn)) < self.samples:
            yield "samples", f"must be at most {found}: there are no more that differ"

    @cached_property
    def drawn(self) -> list[dict[str, Any]]:
        """Dotted key -> value, of each; fewer than `samples` where there are not so many."""
        chance, found = Random(self.seed), dict[str, dict[str, Any]]()
        for _ in range(TRIES * self.samples):
            drawn = {key: parameter.draw(chance) for key, parameter in self.parameters.items()}
            found.setdefault(json.dumps(drawn), drawn)
            if len(found) == self.samples:
                break
        return list(found.values())
