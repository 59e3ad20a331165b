"""Workers by their names, which machines may share: containers, and those that were cloned."""

from __future__ import annotations

import pytest
from helpers import claim, must_claim, new_job, submit

from jobqueue.errors import LoraqError
from jobqueue.memory import GIB
from jobqueue.service import Client
from jobqueue.settings import Settings

WORKER = {
    "host": "h", "device": "NVIDIA", "uuid": "", "usable_bytes": 2 * GIB, "slots": 1, "running": [], "every_s": 5,
}  # fmt: skip


@pytest.fixture
def client(settings: Settings) -> Client:
    return Client(settings)


@pytest.fixture
def twins(client: Client) -> tuple[str, str]:
    """Two machines that are both called h, with a GPU each."""
    for mark in ("aaaaaa", "bbbbbb"):
        info = {**WORKER, "boot": mark, "running": [f"{mark}.1"]}
        client.store.heartbeat(f"h/gpu0#{mark}", "gpu", info)
    return "h/gpu0#aaaaaa", "h/gpu0#bbbbbb"


def test_two_workers_of_one_name_are_told_apart_and_drained_one_by_one(client: Client, twins: tuple[str, str]) -> None:
    one, other = twins
    assert {worker.id: worker.running for worker in client.workers()} == {one: ("aaaaaa.1",), other: ("bbbbbb.1",)}

    assert [worker.uid for worker in client.drain(one)] == [one]
    submit(client.store, new_job("x.1"))
    assert claim(client.store, one) is None
    assert must_claim(client.store, other).job_id == "x.1"
    assert client.job("x.1").worker == "h/gpu0"
    assert {worker.id: (worker.running, worker.takes_jobs) for worker in client.overview().workers} == {
        one: ((), False),
        other: (("x.1",), True),
    }
    client.drain(one, undo=True)
    submit(client.store, new_job("y.1"))
    assert must_claim(client.store, one).job_id == "y.1"


@pytest.mark.parametrize("undo", [False, True])
@pytest.mark.parametrize("target", ["h", "h/gpu0"])
def test_a_name_of_two_machines_drains_none_and_says_which_there_are(
    client: Client, twins: tuple[str, str], target: str, undo: bool
) -> None:
    with pytest.raises(LoraqError) as error:
        client.drain(target, undo=undo)

    assert str(error.value) == (
        f"{target} is the name of several machines or workers\nSay which of {' '.join(twins)} is meant."
    )
    assert client.store.marked("drained") == set()


def test_a_name_that_was_drained_while_it_was_one_machines_is_drained_for_both_and_undrained(
    client: Client,
) -> None:
    client.store.heartbeat("h/gpu0#aaaaaa", "gpu", {**WORKER, "boot": "a"})
    client.drain("h/gpu0")
    assert client.store.heartbeat("h/gpu0#bbbbbb", "gpu", {**WORKER, "boot": "b"}) is True

    with pytest.raises(LoraqError, match="h/gpu0#bbbbbb stays drained, as the whole of h/gpu0 is"):
        client.drain("h/gpu0#bbbbbb", undo=True)
    assert len(client.drain("h/gpu0", undo=True)) == 2
    assert client.store.marked("drained") == set()


def test_containers_of_one_machine_and_name_are_one_host(client: Client) -> None:
    for worker in ("h/gpu0#aaaaaa", "h/gpu1#bbbbbb"):
        client.store.heartbeat(worker, "gpu", {**WORKER, "boot": "same"})

    assert [worker.id for worker in client.drain("h")] == ["h/gpu0", "h/gpu1"]


def test_what_a_worker_that_was_killed_left_takes_no_name_from_the_one_that_lives(client: Client) -> None:
    """As a container without a data folder that outlives it."""
    for mark, every_s in (("aaaaaa", 0), ("bbbbbb", 60)):
        info = {**WORKER, "boot": mark, "every_s": every_s}
        client.store.heartbeat(f"h/gpu0#{mark}", "gpu", info)

    assert {worker.id: worker.alive for worker in client.workers()} == {"h/gpu0#aaaaaa": False, "h/gpu0": True}
    assert len(client.drain("h/gpu0")) == 2
    assert client.store.marked("drained") == {"h/gpu0"}
