"""The records in Redis. Every change of state is a call of one function in store.lua; this file calls and reads."""

from __future__ import annotations

import hashlib
import json
import secrets
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import cache, cached_property
from importlib import resources
from typing import Any, Literal, cast
from urllib.parse import urlsplit

import redis
from redis.backoff import NoBackoff
from redis.retry import Retry

from jobqueue.durability import Keeping, look, wait_until_on_disk
from jobqueue.errors import NotFoundError, ServerError, StaleAttemptError, UnansweredError
from jobqueue.events import Event
from jobqueue.job import Batch, Claim, Job, JobState, Settlement, WorkerInfo
from jobqueue.memory import memory_class

PREFIX = "{loraq}:"
KEEP_EVENTS = 20_000  # entries of a job's stream; the whole log is a file in storage
BINARY_TIMEOUT_S = 60.0
CONFIRMED = 0.8  # of a call's time may pass until a submit is on the server's disk, beside the second that it may take
SILENT_HEARTBEATS = 3  # a worker that has missed so many is not alive


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


@cache
def _library() -> tuple[str, str]:
    """(version, source) of store.lua. The version is in every name, so that releases can share a server."""
    source = resources.files("jobqueue").joinpath("store.lua").read_text(encoding="utf-8")
    version = hashlib.sha256(source.encode()).hexdigest()[:12]
    return version, source.replace("VERSION", version)


def _where(url: str) -> str:
    parts = urlsplit(url)
    return f"{parts.hostname}:{parts.port or 6379}" if parts.hostname else url


class Store:
    """The job records on one server.

    Raises ServerError where the server cannot be reached or refuses; a call is tried once, so that a caller
    knows within seconds, and whoever needs to go on (a worker) tries again itself.
    """

    def __init__(self, url: str, *, timeout_s: float = 5.0) -> None:
        self.url = url
        self._timeout_s = timeout_s
        try:
            self._redis = redis.Redis.from_url(
                url,
                decode_responses=True,
                socket_timeout=timeout_s,
                socket_connect_timeout=min(3.0, timeout_s),
                socket_keepalive=True,
                health_check_interval=10,
                retry=Retry(NoBackoff(), 0),
            )
        except ValueError as error:
            raise ServerError(
                f"the server's address is not one: {error}",
                "Write LORAQ_REDIS_URL as redis://HOST:6379/0, or redis://:PASSWORD@HOST:6379/0.",
            ) from None

    def close(self) -> None:
        self._redis.close()
        if "_binary_pool" in self.__dict__:
            self._binary_pool.disconnect()

    @contextmanager
    def binary(self) -> Iterator[redis.Redis]:
        """A connection for bytes, with time for megabytes; what goes wrong on it is a ServerError."""
        with self._errors():
            yield redis.Redis(connection_pool=self._binary_pool)

    @cached_property
    def _binary_pool(self) -> redis.ConnectionPool:
        pool = self._redis.connection_pool
        options = {**pool.connection_kwargs, "decode_responses": False, "socket_timeout": BINARY_TIMEOUT_S}
        return redis.ConnectionPool(pool.connection_class, **options)

    @property
    def where(self) -> str:
        """Host and port, without the password."""
        return _where(self.url)

    # -- a client's calls

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
            if answer[0] == -1:
                raise ServerError(
                    f"Redis at {self.where} answered too late; nothing was written", "Submit again in a moment."
                )
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
        return self._call(
            "submit",
            self._not_after(),
            key or secrets.token_hex(16),
            name,
            owner,
            trials,
            base_model,
            json.dumps([asdict(job) for job in jobs]),
            json.dumps(ids),
            connection=connection,
        )

    def keeping(self) -> Keeping:
        """How well the server keeps what it accepts."""
        with self._errors():
            return look(self._redis)

    def submitted(self, key: str) -> str | None:
        """The batch that a submit with this key has made."""
        with self._errors():
            return cast("str | None", self._redis.hget(f"{PREFIX}submits", key))

    def cancel(self, ids: Sequence[str]) -> tuple[list[str], list[str]]:
        """(jobs that were stopped or asked to stop, classes to wake); ended jobs are left alone."""
        return self._split(self._call("cancel", *ids))

    def release_base(self, job_id: str) -> tuple[list[str], list[str]]:
        """As `cancel`, for the evaluation of a base model, unless another batch still waits for it."""
        return self._split(self._call("release_base", job_id))

    def hold(self, ids: Sequence[str]) -> list[str]:
        """Jobs that are not to be claimed until they are released; those that this changed."""
        return self._split(self._call("hold", *ids))[0]

    def release(self, ids: Sequence[str]) -> tuple[list[str], list[str]]:
        """(jobs that this changed, classes to wake)"""
        return self._split(self._call("release", *ids))

    def retry(self, ids: Sequence[str]) -> tuple[list[str], list[str]]:
        """(ended jobs that begin again, classes to wake); give them in an order where each comes after its needs."""
        return self._split(self._call("retry", *ids))

    def remove(self, name: str) -> bool:
        """Forgets an ended batch and its own jobs. False: one of them has not ended. Raises NotFoundError."""
        answer = self._call("remove", name)
        if answer == 0:
            raise self._no_batch(name)
        return bool(answer == 1)

    def mark(self, what: Literal["held_classes", "drained"], member: str, on: bool) -> bool:
        """Holds a memory class, or drains a worker or a host, or ends that. False: it was so already."""
        return bool(self._call("mark", what, "add" if on else "remove", member))

    def marked(self, what: Literal["held_classes", "drained"]) -> set[str]:
        with self._errors():
            return cast("set[str]", self._redis.smembers(f"{PREFIX}{what}"))

    def batch(self, name: str) -> Batch:
        with self._errors():
            record = cast("dict[str, str]", self._redis.hgetall(f"{PREFIX}batch:{name}"))
            if not record:
                raise self._no_batch(name)
            ids = json.loads(record["jobs"])
            pipe = self._redis.pipeline(transaction=False)
            for job_id in ids:
                pipe.hget(f"{PREFIX}job:{job_id}", "state")
            by_id = {job_id: JobState(state) for job_id, state in zip(ids, pipe.execute(), strict=True) if state}
        if by_id.get(f"{name}.report", JobState.WAITING).final:
            # A base model's evaluation that had failed may be at work again, for another batch: not this one's any more
            by_id = {job_id: state for job_id, state in by_id.items() if state.final or job_id.startswith(f"{name}.")}
        states = list(by_id.values())
        return Batch(
            name=name,
            owner=record["owner"],
            submitted_at=float(record["submitted_at"]) / 1000,
            trials=int(record["trials"]),
            base_model=record["base_model"],
            states={state: states.count(state) for state in JobState if state in states},
            jobs=tuple(ids),
        )

    def batch_names(self, limit: int = 10_000) -> list[str]:
        """Newest first."""
        with self._errors():
            return cast("list[str]", self._redis.zrange(f"{PREFIX}batches", 0, limit - 1, desc=True))

    def jobs(self, ids: Sequence[str]) -> list[Job]:
        """The jobs of these ids, in their order; ids that there are not are left out."""
        with self._errors():
            pipe = self._redis.pipeline(transaction=False)
            for job_id in ids:
                pipe.hgetall(f"{PREFIX}job:{job_id}")
                pipe.lrange(f"{PREFIX}job:{job_id}:history", 0, -1)
            answers = pipe.execute()
        found = []
        for record, history in zip(answers[::2], answers[1::2], strict=True):
            if record:
                found.append(Job.from_record({**record, "history": f"[{','.join(history)}]"}))
        return found

    def job(self, job_id: str) -> Job:
        found = self.jobs([job_id])
        if not found:
            raise NotFoundError(f"there is no job {job_id!r}", "See `loraq ls BATCH` for the jobs that there are.")
        return found[0]

    def events(self, job_id: str, after: str, block_s: float) -> list[Event]:
        """At most 1,000 entries after that stream id; waits up to `block_s` (under the socket's timeout) for one."""
        block = max(1, int(min(block_s, 0.6 * self._timeout_s) * 1000)) if block_s else None
        with self._errors():
            answer = self._redis.xread({f"{PREFIX}job:{job_id}:events": after}, count=1000, block=block)
        # RESP2 answers pairs, RESP3 a mapping whose values are nested once more
        streams: Any = answer.values() if isinstance(answer, dict) else [entries for _, entries in answer or []]
        found = [entry for entries in streams for entry in entries]
        flat = found[0] if found and isinstance(found[0], list) else found
        return [Event.from_entry(entry_id, fields) for entry_id, fields in flat]

    def last_words(self, job_id: str, attempt: int) -> str:
        """The newest line that the attempt has sent of its log; "" where there is none among its newest entries."""
        with self._errors():
            entries: Any = self._redis.xrevrange(f"{PREFIX}job:{job_id}:events", count=100)
        said = (
            fields["body"] for _, fields in entries if fields["kind"] == "log" and fields["attempt"] == str(attempt)
        )
        return next(said, "")

    def workers(self) -> list[WorkerInfo]:
        """Every worker that has not left, the silent ones with alive=False."""
        with self._errors():
            seconds, micros = self._redis.time()
            records = cast("dict[str, str]", self._redis.hgetall(f"{PREFIX}workers"))
        found = []
        for worker_id, record in sorted(records.items()):
            seen, _, text = record.partition(" ")
            info = json.loads(text)
            # what was said in the future was said before the clock went back
            silent_s = abs(seconds + micros / 1e6 - float(seen) / 1000)
            found.append(
                WorkerInfo(
                    id=worker_id,
                    seen_at=float(seen) / 1000,
                    alive=silent_s <= SILENT_HEARTBEATS * info.pop("every_s"),
                    running=tuple(info.pop("running")),
                    **info,
                )
            )
        return found

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

    def renew(self, claim: Claim) -> bool:
        """Extends the lease; True: the user asked to cancel. Raises StaleAttemptError where it is lost."""
        answer = self._call("renew", claim.job_id, claim.attempt, claim.nonce, int(claim.lease_s * 1000))
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
            "expired" if only_expired else "",
        )
        if answer[0] == 0:
            raise self._stale(claim)
        return cast("list[str]", answer[1:])

    def learn(self, kind: str, ratio: float) -> None:
        """A job of that kind was measured to take so many times its estimate."""
        self._call("learn", kind, ratio)

    def correction(self, kind: str) -> float:
        """What an estimate for that kind of job is to be multiplied with; 1 where none has been measured."""
        with self._errors():
            return float(self._redis.hget(f"{PREFIX}peaks", kind) or 1.0)

    def heartbeat(self, worker: str, device: str, info: Mapping[str, Any]) -> bool:
        """`info` is a WorkerInfo's fields, and `every_s`: how often it comes. True: the worker is to drain."""
        return bool(self._call("heartbeat", worker, device, json.dumps(info)))

    def leave(self, worker: str) -> None:
        self._call("leave", worker)

    # -- the sweeper's calls

    def sweep(self, lease_s: float) -> Sweep:
        found = json.loads(self._call("sweep", int(lease_s * 1000)))
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

    def tokens(self, queue: str) -> int:
        """Wake-up messages that lie in a Celery queue."""
        with self._errors():
            return self._redis.llen(queue)

    def orderly(self) -> None:
        """Say that the server's next stop loses nothing, so that its next start is trusted at once."""
        self._call("orderly")

    # -- how a function is called

    def _not_after(self) -> int:
        """The server's time, in ms, at which this client will have given up the call that it now makes."""
        with self._errors():
            seconds, micros = self._redis.time()
        return int(seconds * 1000 + micros / 1000 + self._timeout_s * 1000)

    def _call(self, name: str, *args: object, connection: redis.Redis | None = None) -> Any:
        client = connection or self._redis
        version, source = _library()
        words = [str(arg).encode("utf-8", "backslashreplace") for arg in args]  # text from anywhere may be no Unicode
        with self._errors():
            try:
                return client.fcall(f"{name}_{version}", 0, *words)
            except redis.ResponseError as error:
                if "not found" not in str(error).lower():
                    raise
            try:
                client.function_load(source)
            except redis.ResponseError as error:
                if "already exists" not in str(error):  # another client was quicker
                    raise
            return client.fcall(f"{name}_{version}", 0, *words)

    @contextmanager
    def _errors(self) -> Iterator[None]:
        try:
            yield
        except redis.AuthenticationError as error:
            raise ServerError(
                f"Redis at {self.where} refuses the login: {error}",
                "Check the password in LORAQ_REDIS_URL.",
            ) from error
        except (redis.ConnectionError, redis.TimeoutError, OSError) as error:
            raise UnansweredError(
                f"Redis at {self.where} does not answer: {error}",
                "Check that the server runs and that LORAQ_REDIS_URL is right.",
            ) from error
        except redis.ReadOnlyError as error:
            raise ServerError(
                f"Redis at {self.where} is a replica, or its primary by now is another; it takes no writes",
                "Set LORAQ_REDIS_URL to the primary.",
            ) from error
        except redis.OutOfMemoryError as error:
            raise ServerError(
                f"Redis at {self.where} is at its memory limit; nothing was written",
                "Remove ended batches with `loraq rm`, or raise maxmemory; what runs goes on, and is settled.",
            ) from error
        except redis.ResponseError as error:
            if "OOM" in str(error):
                raise ServerError(
                    f"Redis at {self.where} is at its memory limit; nothing was written",
                    "Raise its maxmemory; what runs goes on, and is settled.",
                ) from error
            old = "unknown command" in str(error)
            raise ServerError(
                f"Redis at {self.where} refuses: {error}",
                "loraq needs Redis or Valkey, version 7 or later." if old else "The server's log may say more.",
            ) from error

    @staticmethod
    def _split(answer: list[str]) -> tuple[list[str], list[str]]:
        bar = answer.index("|")
        return answer[:bar], answer[bar + 1 :]

    @staticmethod
    def _no_batch(name: str) -> NotFoundError:
        return NotFoundError(f"there is no batch {name!r}", "See `loraq ls` for the batches that there are.")

    @staticmethod
    def _stale(claim: Claim) -> StaleAttemptError:
        return StaleAttemptError(f"attempt {claim.attempt} of {claim.job_id} no longer owns the job")
