"""Experiment trackers (`report_to`): what they write lands in the job's output, and so in the storage.

Where the worker's environment names a tracking server (MLFLOW_TRACKING_URI, WANDB_API_KEY or WANDB_MODE), it is used.
"""

from __future__ import annotations

import contextlib
import importlib.util
import logging
import os
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import get_args

from gpu_worker.trainer.failures import bad_spec
from jobqueue.spec import Tracker

log = logging.getLogger("loraq.trainer")
KNOWN = tuple(name for name in get_args(Tracker) if name not in ("none", "all"))
PACKAGES = {"comet_ml": "comet-ml"}  # by pip, where it is not the tracker's name


def check(report_to: Tracker | list[Tracker]) -> list[str]:
    """The trackers that are meant. Raises JobFailure: bad_spec where a package is missing."""
    asked = {report_to} if isinstance(report_to, str) else set(report_to)
    installed = {name for name in KNOWN if importlib.util.find_spec(name)}
    if missing := sorted(asked - installed - {"none", "all"}):
        packages = " ".join(PACKAGES.get(name, name) for name in missing)
        raise bad_spec(
            f"report_to: {', '.join(missing)} is not installed on this worker; "
            f"run `pip install {packages}` there, or leave it out"
        )
    return sorted(installed if "all" in asked else asked & installed)


@contextlib.contextmanager
def of(report_to: Tracker | list[Tracker], job_id: str, output: Path) -> Iterator[list[str]]:
    """The trackers' names for transformers, with their environment set for the time of one job.

    Raises JobFailure: bad_spec where a package is missing.
    """
    names = check(report_to)
    before = dict(os.environ)
    for name in names:
        for key, value in _environment(name, job_id.rpartition(".")[0] or job_id, output / name).items():
            os.environ.setdefault(key, value)
    if "trackio" in names:
        _trackio_file(job_id).unlink(missing_ok=True)  # of an attempt that was ended
    try:
        yield names
    finally:
        try:
            _close(names, job_id, output)
        except Exception as error:  # what was trained is worth more
            log.warning("report_to: a tracker could not be closed: %s: %s", type(error).__name__, error)
        os.environ.clear()
        os.environ.update(before)


def _close(names: list[str], job_id: str, output: Path) -> None:
    """Else the next job of this process would write into this one's run."""
    if "wandb" in names and "wandb" in sys.modules:
        sys.modules["wandb"].finish()
        sys.modules["wandb"].teardown()
    if "mlflow" in names and "mlflow" in sys.modules:
        sys.modules["mlflow"].end_run()
    if "trackio" in names:
        (output / "trackio").mkdir()
        with contextlib.suppress(FileNotFoundError):  # it reports to a Space
            shutil.move(_trackio_file(job_id), output / "trackio")


def _environment(name: str, batch: str, folder: Path) -> dict[str, str]:
    """What the tracker needs to write into `folder`."""
    if name == "tensorboard":
        return {"TENSORBOARD_LOGGING_DIR": str(folder)}
    if name == "mlflow":
        folder.mkdir()
        return {
            "MLFLOW_TRACKING_URI": folder.as_uri(),
            "MLFLOW_ALLOW_FILE_STORE": "true",  # a data base has no place in a storage of objects
            "MLFLOW_EXPERIMENT_NAME": batch,
        }
    if name == "wandb":
        folder.mkdir()
        offline = {} if "WANDB_API_KEY" in os.environ else {"WANDB_MODE": "offline"}
        return {"WANDB_DIR": str(folder), "WANDB_PROJECT": batch, "WANDB_SILENT": "true", **offline}
    return {}


def _trackio_file(project: str) -> Path:
    """Trackio settles where it writes when it is imported, for all jobs of this process; each has a data base."""
    from trackio.sqlite_storage import SQLiteStorage

    return Path(SQLiteStorage.get_project_db_path(project))
