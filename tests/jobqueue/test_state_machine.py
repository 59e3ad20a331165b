"""The store against a model of it: whatever is asked of it in whatever order, records and indexes stay right.

Hypothesis makes up the orders, and cuts one that fails down to a few calls, which it prints. Nothing here waits: a
lease ends, and a delay is over, when a rule moves its time in Redis.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace

import pytest
import redis
from helpers import new_job
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    Bundle,
    RuleBasedStateMachine,
    consumes,
    initialize,
    invariant,
    multiple,
    precondition,
    rule,
)
from store_model import FINAL, Model, Record

from jobqueue.errors import StaleAttemptError
from jobqueue.job import Claim, FailureReason, JobState, Settlement
from jobqueue.memory import GIB
from jobqueue.retry import after_failure
from jobqueue.store import Store

P = "{loraq}:"
HOUR_S = 3600.0  # of leases and delays: longer than any test
BASE = "base-aa"  # an evaluation that batches share
CLASSES = ("gpu8", "gpu16")
ENDS = {
    "succeeded": Settlement(JobState.SUCCEEDED, outcome={"ok": True}),
    "failed": Settlement(JobState.FAILED, "bad_data", "no rows", counts=True),
    "again": Settlement(JobState.QUEUED, "crashed", "it broke", counts=True),
    "later": Settlement(JobState.QUEUED, "storage", "it is away", delay_s=HOUR_S, counts=True),
    "drained": Settlement(JobState.QUEUED, "preempted", "told to stop"),
    "cancelled": Settlement(JobState.CANCELLED, message="on request"),
}
TRIALS = st.lists(st.tuples(st.booleans(), st.sampled_from(("gpu8", "gpu16", ""))), max_size=2)
URL = ""


@pytest.fixture(scope="module", autouse=True)
def _server(server: str) -> Iterator[None]:
    global URL
    URL = server
    yield
    with redis.Redis.from_url(server) as client:
        client.flushall()


class StoreMachine(RuleBasedStateMachine):
    """Rules are what clients, workers and sweepers do, and what time does."""

    claims: Bundle[Claim] = Bundle("claims")  # all that were ever given, late ones too
    lapses: Bundle[Claim] = Bundle("lapses")  # what a sweeper found and has not yet acted on

    def __init__(self) -> None:
        super().__init__()
        self.store = Store(URL)
        self.redis = self.store._redis
        self.redis.flushall()
        self.model = Model()
        self.owners: dict[str, Claim] = {}
        self.batches = self.given = 0
        self.ended: dict[str, tuple[str, int]] = {}
        self.drained: set[str] = set()

    def a_job(self, data: st.DataObject, *states: str) -> Record | None:
        found = [job for job in self.model.jobs.values() if not states or job.state in states]
        return data.draw(st.sampled_from(found)) if found else None

    def any(self, *states: str) -> bool:
        return any(job.state in states for job in self.model.jobs.values())

    # -- clients

    @initialize(trials=TRIALS)
    def begin(self, trials: list[tuple[bool, str]]) -> None:
        self.submit(trials, BASE, "ann", 0)

    @precondition(lambda self: self.batches < 4)
    @rule(
        trials=TRIALS,
        base=st.sampled_from((BASE, BASE, None)),
        owner=st.sampled_from(("ann", "bob")),
        priority=st.integers(0, 1),
    )
    def submit(self, trials: list[tuple[bool, str]], base: str | None, owner: str, priority: int) -> None:
        if not trials and not base:
            return
        self.batches += 1
        name = f"b{self.batches}"
        jobs = []
        for number, (evaluated, queue) in enumerate(trials, start=1):
            need = GIB if queue else 0
            train = new_job(f"{name}.{number}", owner=owner, priority=priority, queue=queue, need=need)
            jobs.append(train)
            if evaluated:
                jobs.append(new_job(f"{train.id}.eval", kind="evaluate", owner=owner, needs=(train.id,)))
        if base:
            jobs.append(new_job(base, kind="evaluate", batch="", owner=owner))
        follows = tuple(job.id for job in jobs)
        where = {"device": "control", "queue": "control", "need": 0}
        jobs.append(new_job(f"{name}.report", kind="report", owner=owner, follows=follows, **where))
        made = self.store.submit(name, owner, len(trials), "a/model", jobs, [job.id for job in jobs], key=name)
        again = self.store.submit(name, owner, len(trials), "a/model", jobs, [job.id for job in jobs], key=name)
        assert made is not None
        assert made.new
        assert again is not None
        assert not again.new
        for job in jobs:
            self.ended.pop(job.id, None)
            self.model.add(job)

    @rule(data=st.data(), count=st.integers(1, 3))
    def cancel(self, data: st.DataObject, count: int) -> None:
        chosen = [job for _ in range(count) if (job := self.a_job(data))]
        expected = []
        for job in chosen:
            if job.state == "running":
                job.cancel = True
            elif job.state in ("queued", "waiting", "held"):
                self.model.finish(job.new.id, "cancelled")
            else:
                continue
            expected.append(job.new.id)
        if chosen:
            assert self.store.cancel([job.new.id for job in chosen])[0] == expected

    @precondition(lambda self: self.any("running"))
    @rule(data=st.data())
    def cancel_what_runs(self, data: st.DataObject) -> None:
        if job := self.a_job(data, "running"):
            assert self.store.cancel([job.new.id])[0] == [job.new.id]
            job.cancel = True

    @rule()
    def release_base(self) -> None:
        job = self.model.jobs.get(BASE)
        if job is None:
            return
        wanted = any(BASE in other.waits_for and other.state not in FINAL for other in self.model.jobs.values())
        asked, _ = self.store.release_base(BASE)
        assert asked == ([BASE] if not wanted and job.state not in FINAL else [])
        if asked and job.state == "running":
            job.cancel = True
        elif asked:
            self.model.finish(BASE, "cancelled")

    @rule(data=st.data())
    def hold(self, data: st.DataObject) -> None:
        job = self.a_job(data)
        if job is None:
            return
        changes = job.state not in FINAL and not job.hold
        assert self.store.hold([job.new.id]) == ([job.new.id] if changes else [])
        if changes:
            job.hold = True
            job.state = "held" if job.state == "queued" else job.state

    @precondition(lambda self: any(job.hold for job in self.model.jobs.values()))
    @rule(data=st.data())
    def release(self, data: st.DataObject) -> None:
        if job := self.a_job(data, "held", "waiting", "running", "queued"):
            assert self.store.release([job.new.id])[0] == ([job.new.id] if job.hold else [])
            job.hold = False
            job.state = "queued" if job.state == "held" else job.state

    @precondition(lambda self: self.any("failed", "cancelled"))
    @rule(data=st.data())
    def retry(self, data: st.DataObject) -> None:
        """As the client does it: what failed or was cancelled, with what it needs, and the report."""
        batch = self.a_job(data)
        if batch is None or not batch.new.batch:
            return
        own = [job for job in self.model.jobs.values() if job.new.batch == batch.new.batch]
        again = [job for job in own if job.state in ("failed", "cancelled") and job.new.kind != "report"]
        report = own[-1]
        assert report.new.kind == "report"
        if not again:
            return
        begun, _ = self.store.retry([job.new.id for job in (*again, report)])
        chosen = [*again, report]  # the report too where it runs: it is begun anew
        assert begun == [job.new.id for job in chosen]
        for job in chosen:
            self.ended.pop(job.new.id, None)
            if job.state in FINAL:
                job.hold = False
            job.cancel, job.lapsed, job.failures = False, False, 0
            job.state, job.delayed = "waiting", False
        for job in chosen:
            self.model.begin(job)

    @rule(name=st.sampled_from(("host1", "host2/0", "host3/0#mark")), on=st.booleans())
    def drain(self, name: str, on: bool) -> None:
        assert self.store.mark("drained", name, on) is (on != (name in self.drained))
        self.drained = self.drained | {name} if on else self.drained - {name}

    # -- workers

    @rule(target=claims, worker=st.integers(1, 3), count=st.integers(1, 4))
    def claim(self, worker: int, count: int) -> Claim:
        return multiple(*(got for _ in range(count) if (got := self.claimed(worker, "gpu", CLASSES, 10 * GIB))))

    @rule(worker=st.integers(1, 3))
    def claim_for_a_full_gpu(self, worker: int) -> None:
        assert self.claimed(worker, "gpu", CLASSES, 0) is None

    @rule(target=claims, worker=st.integers(1, 3))
    def claim_for_control(self, worker: int) -> Claim:
        got = self.claimed(worker, "control", ("control",), 0)
        return got or multiple()

    def claimed(self, worker: int, device: str, queues: tuple[str, ...], free: int) -> Claim | None:
        self.given += 1
        drained = bool({f"host{worker}", f"host{worker}/0", f"host{worker}/0#mark"} & self.drained)
        before = {job.new.id: job for job in self.model.claimable(queues, free) if not drained}
        got = self.store.claim(f"host{worker}/0#mark", device, free, HOUR_S, f"n{self.given}", queues)
        if got is None:
            assert not before, "there was something to claim"
            return None
        assert got.job_id in before
        job = before[got.job_id]
        siblings = [other for other in before.values() if other.new.owner == job.new.owner and other is not job]
        assert all(other.new.priority <= job.new.priority for other in before.values())
        assert all((-other.new.priority, other.seq) > (-job.new.priority, job.seq) for other in siblings)
        assert (got.attempt, got.failures) == (job.attempt + 1, job.failures)
        if job.new.kind == "report":
            others = self.store.jobs([other for other in job.new.follows if other.startswith(job.new.batch)])
            assert all(other.state.final for other in others), "a report before what it follows has ended"
        job.state, job.attempt, job.nonce = "running", got.attempt, got.nonce
        job.cancel, job.lapsed, job.attempt_said = False, False, 0
        self.owners[got.job_id] = got
        return got

    @precondition(lambda self: self.any("running"))
    @rule(data=st.data())
    def claim_again_since_no_answer_came(self, data: st.DataObject) -> None:
        if job := self.a_job(data, "running"):
            claim = self.owners[job.new.id]
            again = self.store.claim("host/0", "gpu", 0, HOUR_S, claim.nonce, CLASSES)
            assert again == replace(claim, failures=job.failures)
            job.lapsed = False

    @rule(claim=claims)
    def renew(self, claim: Claim) -> None:
        job = self.model.jobs[claim.job_id]
        if self.model.owns(claim):
            assert self.store.renew(claim) is job.cancel
            job.lapsed = False
        else:
            with pytest.raises(StaleAttemptError):
                self.store.renew(claim)

    @precondition(lambda self: self.any("running"))
    @rule(data=st.data())
    def renew_what_runs(self, data: st.DataObject) -> None:
        if job := self.a_job(data, "running"):
            self.renew(self.owners[job.new.id])

    @rule(claim=claims, count=st.integers(1, 3), repeated=st.integers(0, 2))
    def append(self, claim: Claim, count: int, repeated: int) -> None:
        """Log lines, the first of them perhaps sent before, as when no answer had come."""
        job = self.model.jobs[claim.job_id]
        first = max(0, job.attempt_said - repeated)
        lines = [f"line {number}" for number in range(first, job.attempt_said + count)]
        entries = [("log", line) for line in lines]
        if not self.model.owns(claim):
            with pytest.raises(StaleAttemptError):
                self.store.append(claim, entries, first)
            return
        self.store.append(claim, entries, first)
        job.said += [(claim.attempt, line) for line in lines[job.attempt_said - first :]]
        job.attempt_said += count

    @rule(claim=claims, end=st.sampled_from(sorted(ENDS)))
    def settle(self, claim: Claim, end: str) -> None:
        self.end(claim, ENDS[end])

    @precondition(lambda self: self.any("running"))
    @rule(data=st.data(), end=st.sampled_from(sorted(ENDS)))
    def settle_what_runs(self, data: st.DataObject, end: str) -> None:
        if job := self.a_job(data, "running"):
            self.end(self.owners[job.new.id], ENDS[end])

    @rule(claim=claims, end=st.sampled_from(sorted(ENDS)), forged=st.sampled_from(((0, True), (1, False), (-1, True))))
    def settle_forged(self, claim: Claim, end: str, forged: tuple[int, bool]) -> None:
        """By someone who knows the attempt or the nonce, not both."""
        later, guessed = forged
        nonce = "guessed" if guessed else claim.nonce
        self.end(replace(claim, nonce=nonce, attempt=claim.attempt + later), ENDS[end])

    def end(self, claim: Claim, end: Settlement) -> None:
        job = self.model.jobs[claim.job_id]
        if job.settled == (claim.attempt, claim.nonce, end.state.value):
            assert self.store.settle(claim, end) == [], "said twice, done once"
            return
        if not self.model.owns(claim):
            with pytest.raises(StaleAttemptError):
                self.store.settle(claim, end)
            return
        self.store.settle(claim, end)
        self.settled(job, claim, end)

    def settled(self, job: Record, claim: Claim, end: Settlement) -> None:
        state = end.state.value
        if job.cancel and state == "queued":
            state = "cancelled"
        elif not job.cancel and state == "cancelled":
            state = "queued"  # wanted again
        job.settled, job.failures = (claim.attempt, claim.nonce, end.state.value), job.failures + end.counts
        if state == "queued":
            self.model.enqueue(job, delayed=end.delay_s > 0)
        else:
            self.model.finish(claim.job_id, state)

    # -- sweepers, and time

    @precondition(lambda self: self.any("running"))
    @rule(data=st.data())
    def a_lease_ends(self, data: st.DataObject) -> None:
        if job := self.a_job(data, "running"):
            self.redis.zadd(f"{P}running", {job.new.id: 1})
            job.lapsed = True

    @precondition(lambda self: any(job.delayed for job in self.model.jobs.values()))
    @rule(data=st.data())
    def a_delay_is_over(self, data: st.DataObject) -> None:
        if (job := self.a_job(data, "queued")) and job.delayed:
            self.redis.zadd(f"{P}delayed", {job.new.id: 1}, xx=True)
            self.redis.hset(f"{P}job:{job.new.id}", "not_before", 1)
            self.sweep()

    @rule(target=lapses)
    def sweep(self) -> Claim:
        found = self.store.sweep(HOUR_S)
        jobs = self.model.jobs
        for job_id, score in self.redis.zrange(f"{P}delayed", 0, -1, withscores=True):
            assert score > 1, f"{job_id} is due and still delayed"
        for job in jobs.values():
            if job.state == "queued" and job.delayed:
                job.delayed = self.redis.zscore(f"{P}delayed", job.new.id) is not None
        lapsed = [
            (job.new.id, job.attempt, job.nonce) for job in jobs.values() if job.lapsed and job.state == "running"
        ]
        assert sorted(found.expired) == sorted(lapsed)
        assert set(found.unsized) == {job.new.id for job in jobs.values() if job.place == "unsized"}
        for queue, count in found.queues.items():
            assert count == sum(job.place.startswith(f"queue:{queue}:") for job in jobs.values())
        return multiple(*(Claim(*lapse, {}, "", jobs[lapse[0]].failures, HOUR_S) for lapse in found.expired))

    @rule(lapse=consumes(lapses))
    def expire(self, lapse: Claim) -> None:
        """A sweeper acts on what it found, perhaps long ago."""
        job = self.model.jobs[lapse.job_id]
        end = after_failure(FailureReason.LOST, "silent", lapse.failures, 3)
        if job.settled == (lapse.attempt, lapse.nonce, end.state.value):
            self.store.settle(lapse, end, only_expired=True)
        elif self.model.owns(lapse) and job.lapsed:
            self.store.settle(lapse, end, only_expired=True)
            self.settled(job, lapse, end)
        else:
            with pytest.raises(StaleAttemptError):
                self.store.settle(lapse, end, only_expired=True)

    @precondition(lambda self: self.any("running"))
    @rule(data=st.data())
    def expire_what_runs(self, data: st.DataObject) -> None:
        """As a sweeper that found the lease ended, and is so slow that it may have been renewed since."""
        if job := self.a_job(data, "running"):
            self.expire(self.owners[job.new.id])

    @precondition(lambda self: any(job.place == "unsized" for job in self.model.jobs.values()))
    @rule(data=st.data(), queue=st.sampled_from(CLASSES))
    def size(self, data: st.DataObject, queue: str) -> None:
        job = self.a_job(data)
        if job is None or job.new.queue:
            return
        self.store.size(job.new.id, GIB, queue)
        if job.place == "unsized":
            job.queue = queue
            job.new = replace(job.new, need=GIB)
            job.waits_for.discard("size")
            self.model.look(job)

    @precondition(lambda self: self.any("waiting"))
    @rule(data=st.data())
    def refuse(self, data: st.DataObject) -> None:
        if job := self.a_job(data):
            self.store.refuse(job.new.id, "bad_spec", "no such model")
            if job.state == "waiting":
                self.model.finish(job.new.id, "failed")

    # -- what must hold after each of them

    @invariant()
    def records_and_indexes_are_right(self) -> None:
        names = sorted(self.model.jobs)
        pipe = self.redis.pipeline()
        for name in names:
            pipe.hmget(f"{P}job:{name}", "state", "attempt", "nonce", "failures", "waits", "cancel")
        records = pipe.execute()
        live = {what: int(count) for what, count in self.redis.hgetall(f"{P}live").items() if count != "0"}
        assert live == Counter(
            f"{job.new.kind} {job.state}" for job in self.model.jobs.values() if job.state not in FINAL
        )
        running = {job.nonce: name for name, job in self.model.jobs.items() if job.state == "running"}
        assert self.redis.hgetall(f"{P}claims") == running
        places: dict[str, list[str]] = {name: [] for name in names}
        for index in (*self.redis.scan_iter(f"{P}queue:*"), f"{P}delayed", f"{P}running"):
            for name in self.redis.zrange(index, 0, -1):
                places[name].append(index.removeprefix(P))
        for name in self.redis.smembers(f"{P}unsized"):
            places[name].append("unsized")
        since = {name for index in self.redis.scan_iter(f"{P}since:*") for name in self.redis.zrange(index, 0, -1)}
        assert since == {name for name, job in self.model.jobs.items() if job.place.startswith("queue:")}
        for name, (state, attempt, nonce, failures, waits, cancel) in zip(names, records, strict=True):
            job = self.model.jobs[name]
            assert state == job.state, name
            assert places[name] == job.places, name
            assert (int(attempt), nonce or "", int(failures)) == (job.attempt, job.nonce, job.failures), name
            if state in ("waiting", "queued", "held"):
                assert int(waits) == len(job.waits_for), f"{name} waits for {job.waits_for}"
            if state == "running":
                assert cancel == ("1" if job.cancel else ""), name
            if state in FINAL:
                assert self.ended.setdefault(name, (state, int(attempt))) == (state, int(attempt)), name

    def teardown(self) -> None:
        try:
            self.work_off()
            for name, job in self.model.jobs.items():
                said = [(e.attempt, e.text) for e in self.store.events(name, "0", 0) if e.kind == "log"]
                assert said == job.said, f"{name}: lines are missing, doubled or of the wrong attempt"
        finally:
            self.store.close()

    def work_off(self) -> None:
        """Nothing that is queued is lost: whoever goes on brings every job to its end."""
        for _ in range(4 * len(self.model.jobs) + 1):
            open_jobs = [job.id for job in self.store.jobs(sorted(self.model.jobs)) if not job.state.final]
            if not open_jobs:
                return
            self.store.release(open_jobs)
            for name in open_jobs:
                self.store.size(name, GIB, "gpu8")
            for name in self.redis.zrange(f"{P}delayed", 0, -1):
                self.redis.zadd(f"{P}delayed", {name: 1})
            for name in self.redis.zrange(f"{P}running", 0, -1):
                self.redis.zadd(f"{P}running", {name: 1})
            for lapse in self.store.sweep(HOUR_S).expired:
                end = Settlement(JobState.QUEUED, "lost", "silent")
                self.store.settle(Claim(*lapse, {}, "", 0, HOUR_S), end, only_expired=True)
            for device, queues in (("gpu", CLASSES), ("control", ("control",))):
                while got := self.store.claim("last/0", device, 10 * GIB, HOUR_S, json.dumps(open_jobs), queues):
                    self.store.settle(got, ENDS["succeeded"])
        raise AssertionError(f"these never end: {open_jobs}")


TestStore = StoreMachine.TestCase
TestStore.settings = settings(
    max_examples=200,
    stateful_step_count=50,
    deadline=None,
    derandomize=True,
    suppress_health_check=list(HealthCheck),
)
