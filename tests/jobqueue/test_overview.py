"""The whole cluster in one look: what runs, what waits and for what, and when all of it may be done."""

from __future__ import annotations

import json
import time
from typing import Any

import pytest
import redis
from helpers import SUCCEEDED, must_claim, new_job, snapshot, submit

from jobqueue.job import Job, JobState, Settlement
from jobqueue.memory import GIB
from jobqueue.overview import Overview, empty_in, left_s
from jobqueue.store import Store

INFO = {
    "host": "box", "device": "H100", "uuid": "GPU-1", "usable_bytes": 78 * GIB, "slots": 2, "running": [],
    "every_s": 60,
}  # fmt: skip
PROGRESS = {"phase": "train", "step": 20, "steps": 100, "seconds_per_step": 2.0}


def look(store: Store, owner: str = "", host: str = "", most: int = 100) -> Overview:
    return store.overview(owner, host, most)


def waits(store: Store) -> dict[str, str]:
    return {waiting.job.id: waiting.waits_for for waiting in look(store).queue}


def beat(store: Store, worker: str = "box/gpu0", **changes: Any) -> None:
    device = "control" if worker.endswith("control") else "gpu"
    store.heartbeat(worker, device, {**INFO, "host": worker.partition("/")[0], **changes})


def test_an_empty_server_has_nothing_and_is_left_as_it_is(store: Store) -> None:
    seen = look(store)

    assert (seen.workers, seen.running, seen.queue, seen.empty_in_s) == ((), (), (), 0.0)
    assert set(seen.counts.values()) == {0}
    assert snapshot(store.url) == {}


def test_every_job_that_has_not_ended_is_counted_and_listed_once_with_what_it_waits_for(store: Store) -> None:
    beat(store)
    beat(store, "box/control", device="control", usable_bytes=0)
    submit(
        store,
        new_job("a.1"), new_job("a.2"), new_job("a.3", priority=1), new_job("a.4", need=90 * GIB, queue="gpu141"),
        new_job("a.5"), new_job("a.6", need=0, queue=""), new_job("a.7", needs=("a.1", "a.2")),
        new_job("a.report", kind="report", queue="control", device="control", need=0, follows=("a.1", "a.2")),
    )  # fmt: skip
    store.hold(["a.5"])
    assert must_claim(store).job_id == "a.3"
    store.settle(must_claim(store), Settlement(JobState.QUEUED, "crashed", "it broke", counts=True, delay_s=60))

    assert waits(store) == {
        "a.2": "its turn",
        "a.4": "a larger worker: the largest that lives has 78.0 GiB",
        "a.1": f"{time.strftime('%H:%M:%S', time.localtime(store.job('a.1').not_before))}, after it failed (crashed)",
        "a.5": "its release",
        "a.6": "a worker's estimate of its memory",
        "a.7": "a.1 and 1 more",
        "a.report": "2 jobs",
    }
    seen = look(store)
    assert [job.id for job in seen.running] == ["a.3"]
    assert seen.counts == {JobState.RUNNING: 1, JobState.QUEUED: 3, JobState.HELD: 1, JobState.WAITING: 3}
    assert seen.classes == {"gpu8": 1, "gpu141": 1}
    assert sum(seen.counts.values()) == len(seen.running) + len(seen.queue)


@pytest.mark.parametrize(
    ("change", "why"),
    [
        ({}, "its turn"),
        ({"slots": 1}, "a slot"),
        ({"promised_bytes": 77.5 * GIB}, "1.0 GiB that no other job has"),
        ({"note": "sick: Xid 79", "takes_jobs": False}, "box/gpu0: sick: Xid 79"),
        ({"note": "it pauses: of a release before this one"}, "box/gpu0: it pauses: of a release before this one"),
        ({"note": "18.2 GiB held by other processes", "takes_jobs": True}, "its turn"),
        ({"every_s": 0}, "a worker"),
        ({"usable_bytes": GIB / 2}, "a larger worker: the largest that lives has 0.5 GiB"),
    ],
)
def test_a_job_that_could_be_claimed_says_what_it_lacks(store: Store, change: dict[str, Any], why: str) -> None:
    submit(store, new_job("a.1"), new_job("a.2"))
    must_claim(store, worker="box/gpu0")
    beat(store, **change)
    if change.get("every_s") == 0:
        time.sleep(0.002)

    assert waits(store) == {"a.2": why}


def test_a_class_that_is_held_and_a_worker_that_is_drained_are_known_before_the_worker_knows(store: Store) -> None:
    beat(store)
    submit(store, new_job("a.1"))
    store.mark("drained", "box", True)
    assert (waits(store), look(store).workers[0].note) == ({"a.1": "box/gpu0: drained"}, "drained")

    store.mark("held_classes", "gpu8", True)
    assert waits(store) == {"a.1": "the release of gpu8"}
    assert look(store).held_classes == ("gpu8",)


def test_what_a_worker_runs_is_what_the_server_knows(store: Store) -> None:
    beat(store, running=["long.ago"])
    submit(store, new_job("a.1"))
    must_claim(store, worker="box/gpu0")

    assert look(store).workers[0].running == ("a.1",)


def test_an_owner_and_a_host_can_be_looked_at_alone(store: Store) -> None:
    beat(store)
    beat(store, "attic/gpu0")
    submit(store, new_job("a.1"), new_job("a.2"), new_job("a.3", needs=("a.2",)))
    submit(store, new_job("b.1", owner="bob"), new_job("b.2", owner="bob"))
    must_claim(store, worker="box/gpu0")
    must_claim(store, worker="attic/gpu0")

    of_bob = look(store, owner="bob")
    assert {job.owner for job in of_bob.running} | {waiting.job.owner for waiting in of_bob.queue} == {"bob"}
    assert sum(of_bob.counts.values()) == 2
    in_the_attic = look(store, host="attic")
    assert [worker.id for worker in in_the_attic.workers] == ["attic/gpu0"]
    assert {job.worker for job in in_the_attic.running} == {"attic/gpu0"}
    assert [worker.id for worker in look(store, host="box/gpu0").workers] == ["box/gpu0"]
    assert (of_bob.empty_in_s, in_the_attic.empty_in_s) == (None, None)


def test_lists_are_cut_and_counts_are_not(store: Store) -> None:
    submit(store, *(new_job(f"a.{number}") for number in range(30)))
    for _ in range(10):
        must_claim(store, worker="box/gpu0")

    seen = look(store, most=3)

    assert (len(seen.running), len(seen.queue)) == (3, 3)
    assert [waiting.job.id for waiting in seen.queue] == ["a.10", "a.11", "a.12"], "the next to be claimed"
    assert (seen.counts[JobState.RUNNING], seen.counts[JobState.QUEUED]) == (10, 20)
    assert look(store, most=0).queue == ()


def test_a_look_is_one_command_that_reads_and_costs_little_however_much_waits(store: Store, redis_url: str) -> None:
    submit(
        store,
        *(new_job(f"a.{number}", trial="x" * 40, spec={"kind": "train", "x": "y" * 2000}) for number in range(3000)),
    )
    look(store)  # the functions are there
    with redis.Redis.from_url(redis_url) as admin:
        admin.config_resetstat()
        look(store, most=40)
        calls = {name: stats["calls"] for name, stats in admin.info("commandstats").items()}

    assert calls["cmdstat_fcall_ro"] == 1, "which the server would refuse a write"
    assert calls["cmdstat_hmget"] <= 41, "only what is listed is read"


def test_what_has_ended_within_the_hour_is_counted_and_then_forgotten(store: Store) -> None:
    submit(store, new_job("a.1"), new_job("a.2"), new_job("a.3", needs=("a.2",)))
    store.settle(must_claim(store), SUCCEEDED)
    store.settle(must_claim(store), Settlement(JobState.FAILED, "bad_data", "none", counts=True))
    assert look(store).ended == {JobState.SUCCEEDED: 1, JobState.FAILED: 1, JobState.CANCELLED: 1}

    assert sum(look(store, owner="bob").ended.values()) == 0
    store.retry(["a.2", "a.3"])
    store.settle(must_claim(store), SUCCEEDED)
    assert look(store).ended == {JobState.SUCCEEDED: 2, JobState.FAILED: 1, JobState.CANCELLED: 1}

    for end in store._redis.zrange("{loraq}:ended", 0, -1):
        store._redis.zadd("{loraq}:ended", {end: 1})
    assert sum(look(store).ended.values()) == 0
    store.sweep(60)
    assert not store._redis.exists("{loraq}:ended")


def test_the_end_of_all_is_told_from_what_running_jobs_still_take(store: Store) -> None:
    submit(store, *(new_job(f"a.{number}") for number in range(4)))
    beat(store)
    for _ in range(2):
        store.append(must_claim(store), [("progress", json.dumps(PROGRESS))], 0)

    # 100 steps of 2 s each: 160 s are left of the two that run, and then the two others take 200 s
    assert look(store).empty_in_s == pytest.approx(400, abs=5)


def test_no_end_is_told_where_it_would_be_a_guess(store: Store) -> None:
    submit(store, new_job("a.1"), new_job("a.2", kind="evaluate"))
    beat(store)
    assert look(store).empty_in_s is None, "nothing runs"
    claim = must_claim(store)
    assert look(store).empty_in_s is None, "nobody knows how long it takes"
    store.append(claim, [("progress", json.dumps(PROGRESS))], 0)
    assert look(store).empty_in_s is None, "nor an evaluation"
    store.cancel(["a.2"])
    assert look(store).empty_in_s is not None

    store.mark("held_classes", "gpu80", True)
    assert look(store).empty_in_s is None, "something is held"
    store.mark("held_classes", "gpu80", False)
    submit(store, new_job("big.1", need=90 * GIB, queue="gpu141"))
    assert look(store).empty_in_s is None, "no worker will ever take it"


def test_kinds_of_which_none_runs_take_what_they_took_in_the_last_hour() -> None:
    record = {"id": "a.1", "kind": "train", "state": "running", "claimed_at": "60000", "progress": json.dumps(PROGRESS)}
    seen = Overview(
        100.0, "", "", (), (), {JobState.RUNNING: 1, JobState.HELD: 0}, {}, {}, (Job.from_record(record),), (), None
    )

    # it has run for 40 s, and 160 s are left; then three evaluations of 30 s
    assert empty_in(seen, {"train": 1, "evaluate": 3}, [("evaluate", "succeeded", 4, 120.0)]) == pytest.approx(250)


@pytest.mark.parametrize(
    ("progress", "left"),
    [({}, None), ({"step": 3}, None), (PROGRESS, 160.0), ({**PROGRESS, "seconds_per_step": None}, None),
     ({**PROGRESS, "step": 101}, 0.0)],
)  # fmt: skip
def test_the_time_that_is_left_of_a_phase(progress: dict[str, Any], left: float | None) -> None:
    assert left_s(progress) == left


def test_a_worker_of_an_older_release_says_nothing_of_its_device(store: Store) -> None:
    beat(store)
    old = look(store).workers[0]
    beat(store, total_bytes=80 * GIB, used_bytes=3 * GIB, utilization=97, temperature_c=60, of_a_newer_release=1)
    new = look(store).workers[0]

    assert (old.total_bytes, old.utilization, old.power_w) == (0, None, None)
    assert (new.total_bytes, new.used_bytes, new.utilization, new.temperature_c) == (80 * GIB, 3 * GIB, 97, 60)
