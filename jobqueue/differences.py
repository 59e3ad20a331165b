"""What differs between the trials of a batch: their specs, key by key; pure."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from jobqueue.job import Job

OWN = ("adapter_job", "original_task", "kind")  # of each job, and no setting


def differences(runs: Sequence[tuple[Job, Job | None, Job | None]]) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """The dotted keys of the trials' specs: those with one value in all of them, and for each trial the others.

    Args:
        runs: of each trial the training, and what its adapter was asked: the evaluation and the original task.
    """
    flat: list[dict[str, Any]] = []
    for job, evaluation, original in runs:
        keys = dict(_flat(evaluation.spec)) if evaluation else {}
        keys |= dict(_flat(original.spec["evaluation"], "original_task.")) if original else {}
        flat.append({key: value for key, value in {**keys, **dict(_flat(job.spec))}.items() if key not in OWN})
    names = dict.fromkeys(key for keys in flat for key in keys)
    varied = [key for key in names if any(keys.get(key) != flat[0].get(key) for keys in flat)]
    common = {key: flat[0].get(key) for key in names if key not in varied}
    return common, [{key: keys.get(key) for key in varied} for keys in flat]


def _flat(section: Mapping[str, Any], prefix: str = "") -> list[tuple[str, Any]]:
    found: list[tuple[str, Any]] = []
    for key, value in section.items():
        found += _flat(value, f"{prefix}{key}.") if isinstance(value, dict) else [(prefix + key, value)]
    return found
