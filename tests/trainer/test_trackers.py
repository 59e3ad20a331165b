"""What experiment trackers write: in the job's output, a run for each job."""

from __future__ import annotations

import json
import sqlite3

import pytest
from trainer_child import Child, Done, train_spec

STEPS = {"max_steps": 4, "logging_steps": 1, "eval_steps": 3}
DATA = {"validation_split": 0.2}


def tracked(child: Child, tracker: str) -> Done:
    """The second of two jobs of one trainer."""
    for _ in range(2):
        done = child.run(train_spec(training=STEPS | {"report_to": tracker}, data=DATA))
    assert {path.name for path in done.folder.iterdir()} == {"adapter", tracker}
    return done


def losses(done: Done) -> list[float]:
    return [loss for _, loss, _ in done.outcome["losses"]]


def test_tensorboard_has_every_loss_and_validation(child: Child) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    done = tracked(child, "tensorboard")
    events = EventAccumulator(str(done.folder / "tensorboard"))
    events.Reload()
    assert [event.value for event in events.Scalars("train/loss")] == pytest.approx(losses(done))
    validations = [(event.step, pytest.approx(event.value)) for event in events.Scalars("eval/loss")]
    assert validations == [tuple(pair) for pair in done.outcome["validation"]["losses"]]
    assert [step for step, _ in validations] == [3, 4]


def test_mlflow_has_a_run_with_the_losses(child: Child) -> None:
    done = tracked(child, "mlflow")
    (file,) = (done.folder / "mlflow").glob("*/*/metrics/loss")
    assert [float(line.split()[1]) for line in file.read_text().splitlines()] == pytest.approx(losses(done))
    assert len(list((done.folder / "mlflow").glob("*/*/metrics/eval_loss"))) == 1


def test_wandb_writes_an_offline_run_where_there_is_no_key(child: Child) -> None:
    done = tracked(child, "wandb")
    (run,) = (done.folder / "wandb" / "wandb").glob("offline-run-*")
    (file,) = run.glob("*.wandb")
    assert file.stat().st_size > 1000


def test_trackio_has_a_run_with_the_losses(child: Child) -> None:
    done = tracked(child, "trackio")
    (file,) = (done.folder / "trackio").glob("*.db")
    with sqlite3.connect(file) as base:
        metrics = [json.loads(text) for (text,) in base.execute("select metrics from metrics order by step")]
    assert [m["train/loss"] for m in metrics if "train/loss" in m] == pytest.approx(losses(done))


def test_a_tracker_that_is_not_installed_is_a_mistake_of_the_spec_with_a_remedy(child: Child) -> None:
    failure = child.run(train_spec(training={"report_to": ["tensorboard", "comet_ml", "swanlab"]})).failure
    assert failure.reason == "bad_spec"
    assert failure.message == (
        "report_to: comet_ml, swanlab is not installed on this worker; "
        "run `pip install comet-ml swanlab` there, or leave it out"
    )
