"""The contract of the store, against a real server: submitting, sharing, claiming."""

from __future__ import annotations

import json

import pytest
from helpers import SUCCEEDED, claim, must_claim, new_job, snapshot, states, submit, wait_for

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
