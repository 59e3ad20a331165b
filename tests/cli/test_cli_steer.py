"""`loraq hold, release, retry, workers, drain, undrain`, against a live server."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from click.testing import CliRunner, Result
from helpers import claim, must_claim, new_job, snapshot, states, submit

from cli.main import loraq
from jobqueue.archive import archive
from jobqueue.job import JobState, Settlement
from jobqueue.memory import GIB
from jobqueue.settings import Settings
from jobqueue.storage import Storage
from jobqueue.store import Store

Run = Callable[..., Result]
INFO = {"host": "box", "device": "NVIDIA H100", "uuid": "", "usable_bytes": 78 * GIB, "slots": 1, "every_s": 5}


@pytest.fixture
def store(settings: Settings, monkeypatch: pytest.MonkeyPatch) -> Store:
    assert settings.redis_url is not None
    monkeypatch.setenv("LORAQ_REDIS_URL", settings.redis_url)
    monkeypatch.setenv("LORAQ_STORAGE", settings.storage_url)
    monkeypatch.setenv("COLUMNS", "140")
    return Store(settings.redis_url)


@pytest.fixture
def run(store: Store) -> Run:
    def call(*words: str) -> Result:
        return CliRunner().invoke(loraq, list(words), prog_name="loraq")

    return call


def test_a_held_batch_is_not_claimed_until_it_is_released(store: Store, run: Run) -> None:
    submit(store, new_job("b.1"), new_job("b.2"))
    held = run("hold", "b")

    assert held.stdout == "b: 2 jobs held.\n"
    assert states(store, "b.1", "b.2") == ["held", "held"]
    assert claim(store) is None
    assert "held" in run("ls", "b").stdout

    assert run("release", "b", "--json").exit_code == 0
    assert must_claim(store).job_id == "b.1"


def test_a_held_class_is_not_claimed_from(store: Store, run: Run) -> None:
    submit(store, new_job("b.1"))
    assert run("hold", "gpu8").exit_code == 0
    assert claim(store) is None

    assert run("release", "gpu8").exit_code == 0
    assert claim(store) is not None


def test_retry_begins_what_failed_again(store: Store, run: Run) -> None:
    submit(store, new_job("b.1"), new_job("b.2", needs=("b.1",)), new_job("b.report", kind="report", follows=("b.2",)))
    store.settle(must_claim(store), Settlement(JobState.FAILED, "crashed", "it broke", counts=True))
    assert states(store, "b.1", "b.2") == ["failed", "cancelled"]

    assert run("retry", "b").stdout == "b: 3 jobs to be run again.\n"

    assert states(store, "b.1", "b.2", "b.report") == ["queued", "waiting", "waiting"]
    assert store.job("b.1").failures == 0
    assert must_claim(store).attempt == 2
    assert run("retry", "b.2").stdout == "b.2: nothing has failed or was cancelled.\n"


def test_retry_of_what_failed_leaves_what_was_cancelled(store: Store, run: Run) -> None:
    submit(
        store,
        new_job("b.1"),
        new_job("b.1.eval", needs=("b.1",)),
        new_job("b.2"),
        new_job("b.2.eval", needs=("b.2",)),
        new_job("b.report", kind="report", follows=("b.1.eval", "b.2.eval"), queue="control", device="control"),
    )
    store.settle(must_claim(store), Settlement(JobState.FAILED, "crashed", "it broke", counts=True))
    store.cancel(["b.2.eval", "b.2"])
    store.settle(must_claim(store, device="control"), Settlement(JobState.SUCCEEDED))

    assert run("retry", "b", "--failed").stdout == "b: 3 jobs to be run again.\n"

    assert states(store, "b.1", "b.1.eval", "b.2", "b.2.eval") == ["queued", "waiting", "cancelled", "cancelled"]
    assert run("retry", "b.2", "--failed").stdout == "b.2: nothing has failed.\n"
    assert run("retry", "b").exit_code == 0
    assert states(store, "b.2", "b.2.eval") == ["queued", "waiting"]


def test_an_ended_batch_is_removed_and_one_that_has_not_ended_is_not(
    store: Store, run: Run, settings: Settings
) -> None:
    submit(store, new_job("b.1"))
    submit(store, new_job("c.1"))
    busy = run("rm", "b")
    assert (busy.exit_code, busy.stderr.splitlines()[0]) == (11, "b has not ended")

    store.settle(must_claim(store), Settlement(JobState.SUCCEEDED))
    folder = Path(settings.storage_url) / "batches" / "b"
    (folder / "b.1").mkdir(parents=True)
    assert run("rm", "b").stdout == "b: removed.\n"

    assert folder.exists()
    assert run("show", "b").exit_code == 6
    assert not [key for key in snapshot(store.url) if ":b" in key.removeprefix("{loraq}:batch").removeprefix("{loraq}")]
    assert states(store, "c.1") == ["queued"]

    store.settle(must_claim(store), Settlement(JobState.SUCCEEDED))
    (Path(settings.storage_url) / "batches" / "c").mkdir()
    assert run("rm", "c", "--files").stdout == "c: removed, with its files.\n"
    assert not (Path(settings.storage_url) / "batches" / "c").exists()


def test_files_that_are_not_there_are_not_said_to_be_removed(store: Store, run: Run, settings: Settings) -> None:
    """LORAQ_STORAGE names another folder than the workers have, say."""
    submit(store, new_job("b.1"))
    store.settle(must_claim(store), Settlement(JobState.SUCCEEDED))

    said = f"b: removed; of its files there is none in {settings.storage_url}.\n"
    assert run("rm", "b", "--files").stdout == said


def test_nothing_is_forgotten_where_files_are_to_go_from_a_storage_that_this_machine_does_not_know(
    store: Store, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    submit(store, new_job("b.1"))
    store.settle(must_claim(store), Settlement(JobState.SUCCEEDED))
    monkeypatch.delenv("LORAQ_STORAGE")
    refused = run("rm", "b", "--files")

    assert (refused.exit_code, refused.stdout) == (7, "")
    assert "LORAQ_STORAGE" in refused.stderr
    assert states(store, "b.1") == ["succeeded"]


def test_workers_are_listed_with_what_they_run_and_why_one_takes_nothing(store: Store, run: Run) -> None:
    assert "There is no worker" in run("workers").stdout
    submit(store, new_job("b.1"))
    must_claim(store, worker="box/gpu0")
    store.heartbeat("box/gpu0", "gpu", {**INFO, "slots": 16, "share": "mps", "running": [], "note": ""})
    store.heartbeat("box/gpu1", "gpu", {**INFO, "running": [], "note": "drained"})

    header, first, second = run("workers").stdout.splitlines()

    assert header.split() == ["worker", "device", "memory", "slots", "state", "running", "seen"]
    assert [part in first for part in ("box/gpu0", "16 mps", "at work", "b.1")] == [True] * 4
    assert ("box/gpu1" in second, "drained" in second) == (True, True)
    assert [worker["id"] for worker in json.loads(run("workers", "--json").stdout)] == ["box/gpu0", "box/gpu1"]


@pytest.mark.parametrize("target", ["box/gpu0", "box"])
def test_a_drained_worker_or_host_is_told_so_and_gets_nothing(store: Store, run: Run, target: str) -> None:
    submit(store, new_job("b.1"))
    info = {**INFO, "running": []}
    assert store.heartbeat("box/gpu0", "gpu", info) is False
    assert run("drain", target).stdout == f"{target}: 1 worker told to drain, within seconds.\n"

    assert store.heartbeat("box/gpu0", "gpu", info) is True
    assert claim(store, worker="box/gpu0") is None

    assert run("undrain", target).exit_code == 0
    assert store.heartbeat("box/gpu0", "gpu", info) is False
    assert claim(store, worker="box/gpu0") is not None


def test_a_worker_of_a_drained_host_is_not_said_to_take_jobs_again(store: Store, run: Run) -> None:
    store.heartbeat("box/gpu0", "gpu", {**INFO, "running": []})
    run("drain", "box")
    refused = run("undrain", "box/gpu0")

    assert (refused.exit_code, refused.stdout) == (1, "")
    assert refused.stderr.splitlines()[0] == "box/gpu0 stays drained, as the whole of box is"


@pytest.mark.parametrize("words", [["hold", "nothing"], ["retry", "nothing"], ["drain", "nobody"], ["release", "no.1"]])
def test_a_name_that_there_is_not_ends_with_exit_code_6_and_what_to_do(run: Run, words: list[str]) -> None:
    result = run(*words)

    assert result.exit_code == 6
    assert len(result.stderr.splitlines()) == 2


def test_every_name_that_there_is_not_is_told(run: Run) -> None:
    said = run("drain", "nobody", "no one").stderr.splitlines()

    assert ["nobody" in said[0], "no one" in said[1], len(said)] == [True, True, 3]


def test_an_archived_batch_is_shown_listed_and_removed_and_says_where_its_logs_are(
    store: Store, run: Run, settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    submit(store, new_job("b.1", spec={"kind": "train", "base_model": "m"}), new_job("b.2"))
    first = must_claim(store)
    store.append(first, [("log", "I train")], 0)
    store.settle(first, Settlement(JobState.FAILED, "nan_loss", "the loss is NaN"))
    store.settle(must_claim(store), Settlement(JobState.SUCCEEDED, outcome={"folder": "batches/b/b.2/1-aa"}))
    looks = (("ls", "b"), ("results", "b"), ("show", "b"), ("show", "b.1"))
    shown = [run(*words, "--json").stdout for words in looks]
    assert archive(store, Storage(settings.storage_url), "b")

    assert [run(*words, "--json").stdout for words in looks] == shown
    assert run("ls").stdout.startswith("There is no batch yet")
    for job, file in (("b.1", "batches/b/b.1/1-*/log.txt"), ("b.2", "batches/b/b.2/1-aa/log.txt")):
        logs = run("logs", job)
        assert logs.exit_code == 6
        assert logs.stderr.splitlines()[-1] == f"The storage has it: {file}"
    again = run("retry", "b")
    assert (again.exit_code, again.stderr.splitlines()[0]) == (6, "b ended long ago and was archived")

    monkeypatch.delenv("LORAQ_STORAGE")
    assert "Set LORAQ_STORAGE, as the workers have it" in run("results", "b").stderr
    assert run("rm", "b").stdout == "b: removed.\n"
    assert run("rm", "b").exit_code == 6
