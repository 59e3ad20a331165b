"""A preview by a control worker, for a machine that cannot make it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from helpers import wait_for
from worker_process import START_S, Site

from jobqueue.errors import CapacityError, LoraqError
from jobqueue.job import JobKind, JobState
from jobqueue.memory import PREVIEW
from jobqueue.preview import Preview, preview
from jobqueue.service import Client
from jobqueue.sweep import Sweep, read_sweep
from jobqueue.tokenizer_files import chat_of

MODEL = Path(__file__).parents[2] / "cli" / "demo" / "model"
INFO = {
    "host": "box", "device": "control", "uuid": "", "usable_bytes": 0, "slots": 1, "running": [],
    "note": "", "every_s": 60,
}  # fmt: skip
ROW = {"question": "Which is a fish?", "options": ["oak", "trout"], "answer": "trout"}


@pytest.fixture
def sweep(tmp_path: Path) -> Sweep:
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in (ROW, ROW, {**ROW, "answer": None})))
    (tmp_path / "general.jsonl").write_text(json.dumps({"text": "An oak is a tree."}))
    data = {"source": "rows.jsonl", "replay": {"source": "general.jsonl", "fraction": 0.4}}
    file = tmp_path / "sweep.yaml"
    asked = {"source": "rows.jsonl", "limit": 1}
    file.write_text(json.dumps({"name": "b", "base_model": str(MODEL), "data": data, "evaluation": asked}))
    return read_sweep(file)


def control_lives(here: Site) -> None:
    wait_for(lambda: any(worker.alive for worker in here.store.workers()), START_S, "the control worker lives")


def previews(here: Site) -> list[str]:
    """The ids of the jobs."""
    keys = [key.rpartition(":job:")[2] for key in here.store._redis.keys("{loraq}:job:preview-*")]
    return [job_id for job_id in keys if ":" not in job_id]


def test_it_is_that_of_this_machine_and_leaves_no_batch(here: Site, sweep: Sweep) -> None:
    here.start("--control-only", LORAQ_MODEL_ROOTS=json.dumps([str(MODEL)]))
    client = Client(here.settings)
    control_lives(here)

    made = client.preview(sweep, 2)

    assert isinstance(made, Preview)
    assert made == preview(sweep, chat_of(str(MODEL)), 2)
    assert made.tokens is not None
    assert made.tokens.used == 2
    assert made.replayed == 1
    assert any("also trained on" in warning for warning in made.warnings)
    assert client.batches() == []
    [job_id] = previews(here)
    assert client.job(job_id).kind is JobKind.PREVIEW
    assert here.store._redis.pttl("{loraq}:job:" + job_id) > 0, "it is forgotten by itself"


def test_what_a_worker_may_not_read_is_refused(here: Site, sweep: Sweep) -> None:
    here.start("--control-only", LORAQ_MODEL_ROOTS=json.dumps([str(here.folder / "elsewhere")]))
    control_lives(here)
    with pytest.raises(LoraqError, match="is nothing that this worker may read"):
        Client(here.settings).preview(sweep)


def test_nobody_waits_for_ever(here: Site, sweep: Sweep) -> None:
    client = Client(here.settings)
    with pytest.raises(CapacityError, match="no control worker is alive to make the preview"):
        client.preview(sweep)
    here.store.heartbeat("box/control", "control", INFO)
    with pytest.raises(CapacityError, match="no control worker has begun the preview within 0"):
        client.preview(sweep, timeout_s=0.0)
    [job_id] = previews(here)
    job = client.job(job_id)
    assert (job.state, job.queue) == (JobState.CANCELLED, PREVIEW)
