"""The part of the schema that says which trials are scored together as one; see spec.py for the whole."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated, Literal

from pydantic import Field, PositiveInt

from jobqueue.data_spec import Clash, Part

Merge = Literal[
    "linear", "cat", "svd", "ties", "ties_svd", "dare_linear", "dare_linear_svd", "dare_ties", "dare_ties_svd",
    "magnitude_prune", "magnitude_prune_svd",
]  # fmt: skip
PRUNED = ("ties", "dare_", "magnitude_prune")  # how those begin that keep a share of the weights
SAME_RANK = ("linear", "ties", "dare_linear", "dare_ties", "magnitude_prune")
BestTrials = Annotated[str, Field(pattern=r"^best:[1-9][0-9]*$")]


class EnsembleSpec(Part):
    """Several trials of the sweep as one: scored and tested like a trial."""

    name: Annotated[str, Field(pattern=r"^[A-Za-z][A-Za-z0-9_-]*$", max_length=80)]
    """Shown in the results; its adapter is that of the job BATCH.NAME."""
    trials: Literal["all"] | BestTrials | Annotated[tuple[PositiveInt, ...], Field(min_length=2)] = "all"
    """all, the numbers of some, or best:N: those with the lowest validation loss (never the highest test score)."""
    method: Literal["vote"] | Merge
    """vote: the option that most members pick; else their adapters become one, by PEFT's `combination_type`."""
    weights: Annotated[tuple[float, ...], Field(min_length=2)] | None = None
    """One for each member, in the order of `trials` (of best:N, the best first); None: all the same."""
    density: Annotated[float, Field(gt=0, le=1)] | None = None
    """Share of the weights that ties, dare and magnitude_prune keep, which need it."""

    def clashes(self) -> Iterator[Clash]:
        if (self.density is None) == self.method.startswith(PRUNED):
            yield "method", f"{self.method} {'needs a density' if self.density is None else 'has no density'}"

    @property
    def best(self) -> int | None:
        """How many are to be chosen; None: it is said which."""
        best = isinstance(self.trials, str) and self.trials.startswith("best:")
        return int(self.trials.removeprefix("best:")) if best and isinstance(self.trials, str) else None


class Members(Part):
    """The trials of an ensemble, as jobs."""

    name: str
    trains: tuple[str, ...]
    """Their training jobs."""
    method: Literal["vote"] | Merge
    best: int | None = None
    weights: tuple[float, ...] | None = None
    density: float | None = None
