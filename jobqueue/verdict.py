"""A batch's report in a sentence: which trial is best, by how much, and whether that is shown."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import TYPE_CHECKING

from jobqueue.job import JobState

if TYPE_CHECKING:
    from jobqueue.comparison import Comparison
    from jobqueue.results import Measure, Metric, TrialResult


def verdict(
    trials: Sequence[TrialResult],
    metric: Metric | None,
    versus_runner_up: Comparison | None,
    complete: bool,
    bases: Mapping[str, Mapping[Measure, float]] = MappingProxyType({}),
) -> str:
    """The report in a sentence or two: which trial is best, and by how much; `bases`: the base models' measures."""
    if metric is None:
        return _verdict_by_measure(trials, complete, bases) or _verdict_without_scores(trials, complete)
    so_far = "" if complete else " so far"
    scored = [trial for trial in trials if metric in trial.scores]
    if not scored:
        return f"No trial was scored{so_far}; the base model was."
    best = scored[0]
    said = f"Best{so_far}: " if len(trials) > 1 else ""
    if versus_runner_up and versus_runner_up.finding == "no difference shown":
        said = f"No trial is shown to be best{so_far}; the highest score: "
    said += f"{best.label or best.job} with {100 * best.scores[metric].accuracy:.1f}% ({metric})"
    if best.versus_base:
        said += f", {_against(best.versus_base, 'the base model')}"
    if versus_runner_up:
        said += f", {_against(versus_runner_up, f'the runner-up {scored[1].label or scored[1].job}')}"
    return said + "." + _on_original_task(best)


def _on_original_task(best: TrialResult) -> str:
    """A winner that has forgotten is no winner yet."""
    original = best.original
    if original is None or original.versus_before is None or original.metric is None:
        return ""
    before, now = (scores[original.metric].accuracy for scores in (original.scores_before, original.scores))
    against = _against(original.versus_before, "what it began with")
    return f" On the original task it has {100 * now:.1f}%, before {100 * before:.1f}%: {against}."


def _verdict_by_measure(
    trials: Sequence[TrialResult], complete: bool, bases: Mapping[str, Mapping[Measure, float]]
) -> str:
    """Without questions there is no test, and none is claimed."""
    best = trials[0] if trials else None
    measure = next(iter(best.measures), None) if best else None
    if best is None or measure is None:
        return ""
    name, value = "BLEU" if measure == "bleu" else measure, best.measures[measure]
    said = f"{'Highest' if measure == 'bleu' else 'Lowest'} {name}{'' if complete else ' so far'}: {value:.2f}"
    said += f", {best.label or best.job}" if len(trials) > 1 else ""
    before = bases.get(best.base or "", {}).get(measure)
    return f"{said} ({f'the base model: {before:.2f}; ' if before is not None else ''}not tested)."


def _verdict_without_scores(trials: Sequence[TrialResult], complete: bool) -> str:
    if all(trial.state in (JobState.FAILED, JobState.CANCELLED) for trial in trials):
        return "No trial succeeded." if trials else "There is no trial."
    if not complete:
        return "Nothing has been evaluated yet."
    said = "Nothing was evaluated, so it is not known which trial is better"
    names = [(trial, trial.label or trial.job) for trial in trials]
    validated = [(trial.validation_loss, name) for trial, name in names if trial.validation_loss is not None]
    if any(key.startswith("data.") for trial in trials for key in trial.differs):
        validated = []  # on other rows
    trained = [(trial.final_loss, name) for trial, name in names if trial.final_loss is not None]
    if not (validated or trained):
        return said + "."
    lowest, name = min(validated or trained)
    return f"{said}. The lowest {'validation' if validated else 'training'} loss, {lowest:.3f}, has {name}."


def _against(comparison: Comparison, other: str) -> str:
    points = comparison.points
    p = comparison.p_value if comparison.p_holm is None else comparison.p_holm
    if p is not None and comparison.finding == "no difference shown":
        return f"no difference shown from {other} ({points:+.1f} points, p = {p:.2g})"
    amount = f"{abs(points):.1f} points {'above' if points >= 0 else 'below'} {other}"
    if p is None:
        return f"{amount} (not tested)"
    return f"{amount} ({'p < 0.0001' if p < 0.0001 else f'p = {p:.2g}'})"
