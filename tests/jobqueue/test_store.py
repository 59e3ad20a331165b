"""The contract of the store, against a real server: submitting, sharing, claiming."""

from __future__ import annotations

import json
import re
import secrets
from importlib import resources

import pytest
from helpers import LEASE_S, SUCCEEDED, claim, must_claim, new_job, snapshot, states, submit, wait_for

from jobqueue.connection import READS
from jobqueue.errors import NotFoundError
from jobqueue.job import JobState
from jobqueue.memory import GIB
from jobqueue.store import NewJob, Settlement, Store

FAILED = Settlement(JobState.FAILED, "nan_loss", "the loss is nan", counts=True)

GPU_WORKER = {"host": "h", "device": "NVIDIA", "uuid": "", "usable_bytes": 1, "slots": 1, "running": [], "every_s": 5}


def base(**changes: object) -> NewJob:
    return new_job("base-0a1b", kind="evaluate", batch="", **changes)


def with_base(name: str) -> list[NewJob]:
    """A batch that needs nothing but the evaluation of a base model, and its report."""
    report = new_job(f"{name}.report", kind="report", device="control", queue="control", follows=("base-0a1b",), need=0)
    return [base(), report]


def use_the_gpu(store: Store) -> None:
    """The best job is claimed and succeeds after 20 ms of the server's clock."""
    used = must_claim(store)
    claimed_at = store.job(used.job_id).claimed_at

    def passed() -> bool:
        seconds, micros = store._redis.time()
        return bool(seconds + micros / 1e6 > claimed_at + 0.02)

    wait_for(passed, 5, "20 ms have passed")
    store.settle(used, SUCCEEDED)


def submit_with_base(store: Store, name: str) -> None:
    jobs = with_base(name)
    assert store.submit(name, "ann", 1, "a/model", jobs, [job.id for job in jobs]) is not None


def three(store: Store) -> None:
    """A train job, the evaluation that needs it, the report that follows both."""
    submit(
        store,
        new_job("b.1"),
        new_job("b.1.eval", kind="evaluate", needs=("b.1",)),
        new_job("b.report", kind="report", device="control", queue="control", need=0, follows=("b.1", "b.1.eval")),
    )


# -- submitting


def test_a_submitted_batch_is_there_with_all_its_jobs_and_what_they_wait_for(store: Store) -> None:
    three(store)

    train, evaluation, report = store.jobs(["b.1", "b.1.eval", "b.report"])
    assert (train.state, train.waits) == (JobState.QUEUED, 0)
    assert (evaluation.state, evaluation.waits) == (JobState.WAITING, 1)
    assert (report.state, report.waits) == (JobState.WAITING, 2)
    assert store.batch("b").states == {JobState.WAITING: 2, JobState.QUEUED: 1}
    assert store.batch_names() == ["b"]


def test_submit_names_the_class_of_each_job_that_can_be_claimed_at_once(store: Store) -> None:
    woken = submit(store, new_job("b.1"), new_job("b.2", queue="gpu16"), new_job("b.2.eval", needs=("b.2",)))

    assert woken == ["gpu8", "gpu16"]


def test_a_taken_name_writes_nothing(store: Store) -> None:
    submit(store, new_job("b.1", spec={"first": True}))
    before = snapshot(store.url)

    assert submit(store, new_job("b.1", spec={"first": False}), new_job("b.2")) is None
    assert snapshot(store.url) == before


def test_a_spec_survives_byte_for_byte(store: Store) -> None:
    spec = json.dumps({"source": '{batch} %s \\ "ü 漢字 🦊" \u2028\x00', "n": 0.1, "big": 2**53, "list": []})
    ascii_and_not = json.dumps(json.loads(spec), ensure_ascii=False)
    submit(store, new_job("b.1", spec=spec), new_job("b.2", spec=ascii_and_not, queue="gpu16"))

    assert [job.spec for job in store.jobs(["b.1", "b.2"])] == [json.loads(spec)] * 2
    assert store._redis.hget("{loraq}:job:b.1", "spec") == spec
    assert store._redis.hget("{loraq}:job:b.2", "spec") == ascii_and_not
    assert must_claim(store).spec == json.loads(spec)


def test_names_that_are_not_there_say_so(store: Store) -> None:
    with pytest.raises(NotFoundError, match=r"no job 'b\.1'"):
        store.job("b.1")
    with pytest.raises(NotFoundError, match="no batch 'b'"):
        store.batch("b")


# -- the evaluation of a base model, which batches share


def test_two_batches_share_one_evaluation_of_the_base_model(store: Store) -> None:
    submit_with_base(store, "one")
    submit_with_base(store, "two")

    only = must_claim(store)
    assert only.job_id == "base-0a1b"
    assert claim(store) is None
    store.settle(only, SUCCEEDED)
    assert states(store, "one.report", "two.report") == ["queued", "queued"]


def test_a_base_model_that_was_evaluated_is_not_evaluated_again(store: Store) -> None:
    submit_with_base(store, "one")
    store.settle(must_claim(store), SUCCEEDED)

    submit_with_base(store, "two")

    assert claim(store) is None
    assert store.job("base-0a1b").outcome == {"ok": True}
    assert states(store, "two.report") == ["queued"]


@pytest.mark.parametrize("how", ["failed", "cancelled"])
def test_an_evaluation_of_a_base_model_that_did_not_succeed_is_run_for_the_next_batch(store: Store, how: str) -> None:
    submit_with_base(store, "one")
    if how == "failed":
        store.settle(must_claim(store), FAILED)
    else:
        store.cancel(["base-0a1b"])
    before = store.job("base-0a1b")

    submit_with_base(store, "two")

    again = store.job("base-0a1b")
    assert (before.state.value, again.state, again.reason, again.failures) == (how, JobState.QUEUED, None, 0)
    assert states(store, "two.report") == ["waiting"]
    assert must_claim(store).attempt == before.attempt + 1


def test_the_base_model_is_evaluated_for_the_batch_that_came_after_a_cancel_reached_the_worker(store: Store) -> None:
    submit_with_base(store, "one")
    running = must_claim(store)
    store.cancel(["one.report"])
    store.release_base("base-0a1b")
    assert store.renew(running) is True  # the worker is about to end it

    submit_with_base(store, "two")
    store.settle(running, Settlement(JobState.CANCELLED, message="on request"))

    assert must_claim(store).job_id == "base-0a1b"
    assert states(store, "two.report") == ["waiting"]


def test_a_base_model_is_released_by_the_last_batch_only(store: Store) -> None:
    submit_with_base(store, "one")
    submit_with_base(store, "two")

    store.cancel(["one.report"])
    assert store.release_base("base-0a1b") == ([], [])
    assert states(store, "base-0a1b") == ["queued"]

    store.cancel(["two.report"])
    assert store.release_base("base-0a1b") == (["base-0a1b"], [])
    assert states(store, "base-0a1b") == ["cancelled"]


def test_a_batch_that_was_removed_does_not_keep_a_base_model_from_being_released(store: Store) -> None:
    submit_with_base(store, "one")
    submit_with_base(store, "two")
    store.cancel(["one.report"])
    assert store.remove("one")
    store.cancel(["two.report"])

    assert store.release_base("base-0a1b") == (["base-0a1b"], [])


def test_the_end_of_a_base_model_s_evaluation_says_nothing_to_a_new_batch_of_a_removed_one_s_name(store: Store) -> None:
    submit_with_base(store, "one")
    submit_with_base(store, "two")
    base = must_claim(store)
    assert base.job_id == "base-0a1b"
    store.cancel(["one.report"])
    assert store.remove("one")
    one = new_job("one.report", kind="report", device="control", queue="control", need=0, follows=("one.1",))
    submit(store, new_job("one.1"), one)

    store.settle(base, SUCCEEDED)
    assert states(store, "one.report", "two.report") == ["waiting", "queued"]


# -- which job is claimed


def test_jobs_are_claimed_by_priority_and_then_first_come(store: Store) -> None:
    """skypilot#5493: jobs were started in no order."""
    submit(
        store, new_job("b.1"), new_job("b.2", priority=5), new_job("b.3", priority=-1), new_job("b.4", queue="gpu16")
    )
    submit(store, new_job("c.1", priority=5))

    assert [must_claim(store).job_id for _ in range(5)] == ["b.2", "c.1", "b.1", "b.4", "b.3"]
    assert claim(store) is None


def test_the_owner_who_has_used_least_is_served_first(store: Store) -> None:
    submit(store, new_job("a.1"), new_job("a.2"), new_job("a.3", priority=1))
    use_the_gpu(store)
    submit(store, new_job("b.1", owner="bob"))

    assert [must_claim(store).job_id for _ in range(3)] == ["b.1", "a.1", "a.2"]


def test_priority_goes_before_fairness(store: Store) -> None:
    submit(store, new_job("a.1", priority=2), new_job("a.2"), new_job("a.3", priority=1))
    use_the_gpu(store)
    submit(store, new_job("b.1", owner="bob"))

    assert [must_claim(store).job_id for _ in range(3)] == ["a.3", "b.1", "a.2"]


def test_a_job_that_does_not_fit_is_passed_over_until_there_is_room(store: Store) -> None:
    submit(store, new_job("b.1", need=6 * GIB), new_job("b.2", need=2 * GIB))

    assert must_claim(store, free=2 * GIB).job_id == "b.2"
    assert claim(store, free=6 * GIB - 1) is None
    assert must_claim(store, free=6 * GIB).job_id == "b.1"


def test_small_jobs_behind_many_that_do_not_fit_are_still_found(store: Store) -> None:
    submit(store, *(new_job(f"b.{n}", need=6 * GIB) for n in range(40)), new_job("b.small", need=GIB))

    assert must_claim(store, free=2 * GIB).job_id == "b.small"


def test_a_worker_is_given_jobs_of_its_classes_only(store: Store) -> None:
    report = new_job("b.3", kind="report", queue="control", device="control", need=0)
    submit(store, new_job("b.1", queue="gpu80"), new_job("b.2", queue="cpu", device="cpu"), report)
    store.heartbeat("host/gpu0", "gpu", GPU_WORKER)

    assert claim(store, queues=["gpu8", "gpu16"]) is None
    assert must_claim(store, "host/control", "control", free=0).job_id == "b.3"
    assert must_claim(store, "host/cpu", "cpu", queues=["cpu"]).job_id == "b.2"
    assert must_claim(store, queues=["gpu8", "gpu80"]).job_id == "b.1"


def test_a_cpu_worker_takes_what_was_meant_for_gpus_only_while_no_gpu_worker_lives(store: Store) -> None:
    submit(store, new_job("b.1"), new_job("b.2", device="gpu", queue="gpu16", priority=9))

    store.heartbeat("host/gpu0", "gpu", GPU_WORKER)
    assert claim(store, "host/cpu", "cpu", queues=["cpu"]) is None

    store.leave("host/gpu0")
    assert claim(store, "host/cpu", "cpu", queues=["cpu"]) is None, "it may be about to start again"

    seen_at = store._redis.zscore("{loraq}:gpu_workers", "host/gpu0")
    store._redis.zadd("{loraq}:gpu_workers", {"host/gpu0": seen_at - 31_000})
    assert must_claim(store, "host/cpu", "cpu", queues=["cpu"]).job_id == "b.1"
    assert claim(store, "host/cpu", "cpu", queues=["cpu"]) is None, "b.2 asked for a GPU"


def test_the_largest_batch_is_submitted_whole_and_wakes_no_more_slots_than_tokens_may_lie_there(store: Store) -> None:
    jobs = [new_job(f"big.{number}") for number in range(10_000)]
    report = new_job("big.report", follows=tuple(job.id for job in jobs), queue="control")

    woken = submit(store, *jobs, report)

    assert woken == ["gpu8"] * 64
    assert store.job("big.report").waits == 10_000
    assert store.batch("big").states == {JobState.QUEUED: 10_000, JobState.WAITING: 1}
    assert must_claim(store).job_id == "big.0"


# -- sharing a device


def test_a_big_job_that_has_waited_for_long_is_not_overtaken_where_it_would_fit(store: Store) -> None:
    submit(store, new_job("big.1", need=20 * GIB, queue="gpu24"))
    submit(store, new_job("small.1"), new_job("small.2"), new_job("small.3"))
    classes = ["gpu8", "gpu16", "gpu24"]

    def next_one(free: int, whole: int) -> str | None:
        found = store.claim("host/gpu0", "gpu", free, LEASE_S, secrets.token_hex(8), classes, whole_bytes=whole)
        return found and found.job_id

    assert next_one(10 * GIB, 24 * GIB) == "small.1", "it has not waited for long"
    store._redis.hset("{loraq}:job:big.1", "queued_at", 0)
    assert next_one(10 * GIB, 24 * GIB) is None, "the device is to run empty"
    assert next_one(10 * GIB, 16 * GIB) == "small.2", "it would not fit there in any case"
    assert next_one(24 * GIB, 24 * GIB) == "big.1"
    assert next_one(4 * GIB, 24 * GIB) == "small.3"


def test_one_device_only_runs_empty_for_a_job_that_waits(store: Store) -> None:
    submit(store, new_job("big.1", need=20 * GIB, queue="gpu24"))
    submit(store, new_job("small.1"), new_job("small.2"), new_job("small.3"))
    store._redis.hset("{loraq}:job:big.1", "queued_at", 0)

    def next_one(worker: str, free: int) -> str | None:
        classes = ["gpu8", "gpu24"]
        found = store.claim(worker, "gpu", free, LEASE_S, secrets.token_hex(8), classes, whole_bytes=24 * GIB)
        return found and found.job_id

    assert next_one("host/gpu0", 10 * GIB) is None
    assert next_one("host/gpu1", 10 * GIB) == "small.1", "the other device goes on"
    assert next_one("host/gpu0", 10 * GIB) is None
    store._redis.hset("{loraq}:job:big.1", "kept_until", 0)  # gpu0 has not asked for long
    assert next_one("host/gpu1", 10 * GIB) is None
    assert next_one("host/gpu0", 10 * GIB) == "small.2"
    assert next_one("host/gpu0", 22 * GIB) == "big.1", "whoever has the room takes it"


def test_a_device_that_does_not_run_empty_in_its_turn_goes_on_and_another_one_runs_empty(store: Store) -> None:
    """One job of ten hours on it, and the big job waited for ten hours, though other devices had short ones."""
    submit(store, new_job("big.1", need=20 * GIB, queue="gpu24"))
    submit(store, *(new_job(f"small.{number}") for number in range(1, 5)))
    big = "{loraq}:job:big.1"
    store._redis.hset(big, "queued_at", 0)

    def next_one(worker: str) -> str | None:
        found = store.claim(
            worker, "gpu", 10 * GIB, LEASE_S, secrets.token_hex(8), ["gpu8", "gpu24"], whole_bytes=24 * GIB
        )
        return found and found.job_id

    def minutes_pass(minutes: int) -> None:
        store._redis.hincrby(big, "kept_since", -minutes * 60_000)

    assert next_one("host/gpu0") is None
    minutes_pass(9)
    assert next_one("host/gpu1") == "small.1"
    minutes_pass(2)
    assert next_one("host/gpu0") is None, "as long as no other takes its place"
    assert next_one("host/gpu1") is None
    assert next_one("host/gpu0") == "small.2"
    minutes_pass(14)
    assert next_one("host/gpu0") == "small.3", "a second turn is longer"
    minutes_pass(2)
    assert next_one("host/gpu0") is None
    assert next_one("host/gpu1") == "small.4"


def test_what_goes_before_a_big_job_by_priority_does_not_wait_for_it(store: Store) -> None:
    submit(store, new_job("big.1", need=20 * GIB, queue="gpu24"))
    submit(store, new_job("urgent.1", priority=5))
    store._redis.hset("{loraq}:job:big.1", "queued_at", 0)

    found = store.claim("host/gpu0", "gpu", 10 * GIB, LEASE_S, "n", ["gpu8", "gpu24"], whole_bytes=24 * GIB)

    assert found is not None
    assert found.job_id == "urgent.1"


def test_a_claim_says_what_the_job_needs_and_where_its_ladder_begins(store: Store) -> None:
    submit(store, new_job("b.1", need=3 * GIB))
    first = must_claim(store)
    store.settle(first, Settlement(JobState.QUEUED, "out_of_memory", "full", rung=2))
    second = must_claim(store)
    store.settle(second, Settlement(JobState.QUEUED, "out_of_memory", "full", rung=2, need_bytes=12 * GIB))
    third = must_claim(store)

    assert [(c.need_bytes, c.rung) for c in (first, second, third)] == [(3 * GIB, 0), (3 * GIB, 2), (12 * GIB, 2)]
    job = store.job("b.1")
    assert (job.queue, job.rung) == ("gpu16", 2)
    store.settle(third, Settlement(JobState.FAILED, "out_of_memory", "full", counts=True))
    store.retry(["b.1"])
    assert must_claim(store).rung == 0


def test_a_correction_grows_at_once_and_falls_slowly(store: Store) -> None:
    assert store.correction("train:qlora:m") == 1
    seen = []
    for ratio in (1.2, 0.8, 0.8, 1.5):
        store.learn("train:qlora:m", ratio)
        seen.append(store.correction("train:qlora:m"))

    assert seen == pytest.approx([1.2, 1.1, 1.025, 1.5])
    store.learn("train:qlora:m", 40)
    assert store.correction("train:qlora:m") == 2, "what is so far off is no matter of a factor"
    assert store.correction("train:qlora:other") == 1


def test_what_writes_nothing_is_called_so_that_those_may_who_only_read() -> None:
    source = resources.files("jobqueue").joinpath("store.lua").read_text(encoding="utf-8")
    assert set(re.findall(r"register\('(\w+)', \w+, \{ 'no-writes' \}\)", source)) == READS
