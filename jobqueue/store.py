"""The records in Redis as they are changed: each change is one call of a function in store.lua."""

from __future__ import annotations

import json
import secrets
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal, cast

import redis

from jobqueue.durability import Keeping, look, wait_until_on_disk
from jobqueue.errors import StaleAttemptError
from jobqueue.job import Claim, Job, Settlement
from jobqueue.memory import memory_class
from jobqueue.outbox import Outbox

KEEP_EVENTS = 20_000  # entries of a job's stream; the whole log is a file in storage
CONFIRMED = 0.8  # of a call's time may pass until a submit is on the server's disk, beside the second that it may take


@dataclass(frozen=True)
class NewJob:
    """A job as it is submitted."""

    id: str
    kind: str
    batch: str
    trial: str
    owner: str
    spec: str  # JSON
    device: str  # auto, gpu, cpu, control
    priority: int
    queue: str  # "" until its memory is estimated
    need: int  # bytes
    needs: tuple[str, ...]  # jobs that must succeed before
    follows: tuple[str, ...]  # jobs that must have ended before
    submission: str = ""  # random, the same for all jobs of one submit: tells whose files lie in the storage


@dataclass(frozen=True)
class Submitted:
    """What a submit has led to."""

    batch: str
    classes: tuple[str, ...]  # to wake
    new: bool  # False: the same had been submitted before
    on_disk: bool  # False: the server has not confirmed that within the time that was given


@dataclass(frozen=True)
class Sweep:
    """What a sweep of the store found for the sweeper to act on."""

    expired: list[tuple[str, int, str]]  # job, attempt, nonce
    unsized: list[str]  # jobs whose memory is to be estimated
    queues: dict[str, int]  # class -> jobs that can be claimed


class Store(Outbox):
    """The job records on one server.

    Raises ServerError where the server cannot be reached or refuses; a call is tried once, so that a caller
    knows within seconds, and whoever needs to go on (a worker) tries again itself.
    """

    # -- a client's calls, which the server does not carry out any more once the client has given them up

    def submit(
        self,
        name: str,
        owner: str,
        trials: int,
        base_model: str,
        jobs: Sequence[NewJob],
        ids: Sequence[str],
        key: str = "",
    ) -> Submitted | None:
        """All jobs of a batch at once, in an order where each comes after those it waits for.

        Sent again with the same `key` it writes nothing and answers with the batch that there is. Without one it is
        always another batch. None where the name is taken (and nothing was written). Waits until what was accepted is
        on the server's disk.
        """
        pool = self._redis.connection_pool
        # one connection for both: the server knows what it has written
        with self._errors(), redis.Redis(connection_pool=pool, single_connection_client=True) as connection:
            answer = self._submit(connection, name, owner, trials, base_model, jobs, ids, key)
            if answer[0] == 0:
                return None
            on_disk = wait_until_on_disk(connection, CONFIRMED * self._timeout_s)
        if answer[0] == 1:
            return Submitted(name, tuple(answer[1:]), True, on_disk)
        return Submitted(answer[1], (), False, on_disk)

    def _submit(
        self,
        connection: redis.Redis,
        name: str,
        owner: str,
        trials: int,
        base_model: str,
        jobs: Sequence[NewJob],
        ids: Sequence[str],
        key: str,
    ) -> Any:
        return self._call_in_time(
            "submit",
            key or secrets.token_hex(16),
            name,
            owner,
            trials,
            base_model,
            json.dumps([asdict(job) for job in jobs]),
            json.dumps(ids),
            connection=connection,
        )

    def ask(self, job: NewJob) -> list[str]:
        """A job of no batch, forgotten a day after its end; the classes to wake. Sent twice it is one job."""
        return cast("list[str]", self._call_in_time("ask", json.dumps(asdict(job))))

    def keeping(self) -> Keeping:
        """How well the server keeps what it accepts."""
        with self._errors():
            return look(self._redis)

    def cancel(self, ids: Sequence[str]) -> tuple[list[str], list[str]]:
        """(jobs that were stopped or asked to stop, classes to wake); ended jobs are left alone."""
        return self._split(self._call_in_time("cancel", *ids))

    def release_base(self, job_id: str) -> tuple[list[str], list[str]]:
        """As `cancel`, for the evaluation of a base model, unless another batch still waits for it."""
        return self._split(self._call_in_time("release_base", job_id))

    def hold(self, ids: Sequence[str]) -> list[str]:
        """Jobs that are not to be claimed until they are released; those that this changed."""
        return self._split(self._call_in_time("hold", *ids))[0]

    def release(self, ids: Sequence[str]) -> tuple[list[str], list[str]]:
        """(jobs that this changed, classes to wake)"""
        return self._split(self._call_in_time("release", *ids))

    def retry(self, ids: Sequence[str]) -> tuple[list[str], list[str]]:
        """(what had failed or was cancelled and begins again, classes to wake); give each after those that it needs."""
        return self._split(self._call_in_time("retry", *ids))

    def remove(self, name: str) -> bool:
        """Forgets an ended batch and its own jobs, or that it was archived. False: one of the jobs has not ended.

        Raises NotFoundError.
        """
        answer = self._call_in_time("remove", name)
        if answer == 0:
            raise self._no_batch(name)
        return bool(answer == 1)

    def archive(self, name: str, written: Sequence[Job]) -> bool:
        """Forgets an ended batch, its name excepted, if its own jobs are as they were `written`; True: it is archived.

        Raises NotFoundError where it is not there, and was not archived before.
        """
        seen = " ".join(f"{job.attempt}:{round(job.ended_at * 1000)}" for job in written)
        answer = self._call("archive", name, seen)
        if answer == 0:
            raise self._no_batch(name)
        return bool(answer > 0)

    def mark(self, what: Literal["held_classes", "drained"], member: str, on: bool) -> bool:
        """Holds a memory class, or drains a worker or a host, or ends that. False: it was so already."""
        return bool(self._call_in_time("mark", what, "add" if on else "remove", member))

    # -- a worker's calls

    def claim(
        self,
        worker: str,
        device: str,
        free_bytes: int,
        lease_s: float,
        nonce: str,
        queues: Sequence[str],
        *,
        whole_bytes: int = 0,
    ) -> Claim | None:
        """The best queued job that fits into `free_bytes`, or None: nothing for this worker now.

        A job that has waited for long and would fit into `whole_bytes`, what there is when nothing else runs, is not
        overtaken: the worker is to run empty until it fits.

        Asked again with the nonce of a running claim, whose answer was lost, it answers with that claim, renewed.
        """
        room = (free_bytes, max(whole_bytes, free_bytes))
        answer = self._call("claim", self._not_after(), worker, device, *room, int(lease_s * 1000), nonce, *queues)
        if not answer:
            return None
        job_id, attempt, spec, batch, failures, submission, need, rung = answer
        return Claim(
            job_id,
            int(attempt),
            nonce,
            json.loads(spec),
            batch,
            int(failures),
            lease_s,
            submission,
            int(need),
            int(rung),
        )

    def claim_again(self, worker: str, lease_s: float, nonce: str) -> Claim | None:
        """The running claim with that nonce, whose answer was lost, renewed; None: it was not given, and is not now."""
        return self.claim(worker, "control", 0, lease_s, nonce, [])

    def renew(self, claim: Claim) -> bool:
        """Extends the lease; True: the user asked to cancel. Raises StaleAttemptError where it is lost."""
        answer = self._call("renew", claim.job_id, claim.attempt, claim.nonce)
        if answer == 0:
            raise self._stale(claim)
        return bool(answer == 2)

    def append(self, claim: Claim, entries: Sequence[tuple[str, str]], first: int) -> None:
        """(kind, body) entries to the job's stream, the first of them the attempt's number `first`, from 0.

        May be said again where no answer came. Raises StaleAttemptError where the lease is lost.
        """
        flat = [part for entry in entries for part in entry]
        if flat and self._call("append", claim.job_id, claim.attempt, claim.nonce, KEEP_EVENTS, first, *flat) == 0:
            raise self._stale(claim)

    def settle(self, claim: Claim, end: Settlement, *, only_expired: bool = False) -> list[str]:
        """Ends the attempt; the classes to wake. Raises StaleAttemptError where it is no longer its own to end."""
        answer = self._call(
            "settle",
            claim.job_id,
            claim.attempt,
            claim.nonce,
            end.state.value,
            end.reason,
            end.message,
            json.dumps(end.outcome) if end.outcome else "",
            int(end.delay_s * 1000),
            int(end.counts),
            end.rung,
            end.need_bytes,
            memory_class(end.need_bytes),
            _tokens(end.outcome or {}),
            "expired" if only_expired else "",
        )
        if answer[0] == 0:
            raise self._stale(claim)
        return cast("list[str]", answer[1:])

    def learn(self, kind: str, ratio: float) -> None:
        """A job of that kind was measured to take so many times its estimate."""
        self._call("learn", kind, ratio)

    def heartbeat(self, worker: str, device: str, info: Mapping[str, Any]) -> bool:
        """`info` is a WorkerInfo's fields, and `every_s`: how often it comes. True: the worker is to drain."""
        return bool(self._call("heartbeat", worker, device, json.dumps(info)))

    def leave(self, worker: str) -> None:
        self._call("leave", worker)

    # -- the sweeper's calls

    def sweep(self, every_s: float) -> Sweep:
        """Leases are taken back 2 * `every_s` after their end: as much as a jump of the server's clock may count."""
        found = json.loads(self._call("sweep", max(1, int(every_s * 1000))))
        return Sweep(
            expired=[(job_id, int(attempt), nonce) for job_id, attempt, nonce in found["expired"]],
            unsized=list(found["unsized"]),
            queues=dict(found["queues"]),
        )

    def size(self, job_id: str, need_bytes: int, queue: str) -> list[str]:
        """The estimate that an unsized job waited for; the classes to wake."""
        return cast("list[str]", self._call("size", job_id, need_bytes, queue))

    def refuse(self, job_id: str, reason: str, message: str) -> list[str]:
        """A waiting job that can never run fails; the classes to wake."""
        return cast("list[str]", self._call("refuse", job_id, reason, message))

    def orderly(self) -> None:
        """Say that the server's next stop loses nothing, so that its next start is trusted at once."""
        self._call("orderly")

    @staticmethod
    def _split(answer: list[str]) -> tuple[list[str], list[str]]:
        bar = answer.index("|")
        return answer[:bar], answer[bar + 1 :]

    @staticmethod
    def _stale(claim: Claim) -> StaleAttemptError:
        return StaleAttemptError(f"attempt {claim.attempt} of {claim.job_id} no longer owns the job")


def _tokens(outcome: Mapping[str, Any]) -> int:
    """How many a training has trained; nothing that it says of them may keep it from its end."""
    training = outcome.get("training")
    tokens = training.get("tokens") if isinstance(training, dict) else None
    return tokens if isinstance(tokens, int) and tokens > 0 else 0
