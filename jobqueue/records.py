"""The records in Redis as they are read. What changes them is in store.py."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any, Literal, cast

from jobqueue.connection import Connection
from jobqueue.errors import ArchivedError, NotFoundError
from jobqueue.events import Event
from jobqueue.job import Batch, Job, JobState, WorkerInfo, told_apart
from jobqueue.notification import read_told

if TYPE_CHECKING:
    from jobqueue.figures import Figures
    from jobqueue.overview import Overview

PREFIX = "{loraq}:"


class Records(Connection):
    """Jobs, batches and workers on one server. Raises ServerError as a Connection does."""

    def submitted(self, key: str) -> str | None:
        """The batch that a submit with this key has made."""
        with self._errors():
            return cast("str | None", self._redis.hget(f"{PREFIX}submits", key))

    def marked(self, what: Literal["held_classes", "drained"]) -> set[str]:
        with self._errors():
            return cast("set[str]", self._redis.smembers(f"{PREFIX}{what}"))

    def batch(self, name: str) -> Batch:
        """Raises NotFoundError; ArchivedError where it was archived."""
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
            told=read_told(record.get("told")),
        )

    def batch_names(self, limit: int = 10_000) -> list[str]:
        """Newest first."""
        with self._errors():
            return cast("list[str]", self._redis.zrange(f"{PREFIX}batches", 0, limit - 1, desc=True))

    def ended_before(self, age_s: float) -> Iterator[str]:
        """Names of the batches all of whose own jobs ended longer ago, the first submitted first."""
        before = (self._clock() - age_s) * 1000
        with self._errors():
            names = cast("list[str]", self._redis.zrange(f"{PREFIX}batches", "-inf", int(before), byscore=True))
        for name in names:
            with self._errors():
                ids = json.loads(self._redis.hget(f"{PREFIX}batch:{name}", "jobs") or "[]")
                pipe = self._redis.pipeline(transaction=False)
                for job_id in ids:
                    if job_id.startswith(f"{name}."):
                        pipe.hmget(f"{PREFIX}job:{job_id}", "state", "ended_at")
                own = pipe.execute()
            if own and all(state and JobState(state).final and float(ended_at) < before for state, ended_at in own):
                yield name

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
        """Raises NotFoundError; ArchivedError where it is, or could be, of a batch that was archived."""
        found = self.jobs([job_id])
        if not found:
            raise self._archived(job_id) or NotFoundError(
                f"there is no job {job_id!r}", "See `loraq ls BATCH` for the jobs that there are."
            )
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
        """Every worker that has not left, the silent ones with alive=False.

        The `id` is host/device; of those that share that, it tells them apart, but for the only one that lives.
        """
        now = self._clock()
        with self._errors():
            records = cast("dict[str, str]", self._redis.hgetall(f"{PREFIX}workers"))
        return told_apart([WorkerInfo.from_record(uid, record, now) for uid, record in sorted(records.items())])

    def overview(self, owner: str, host: str, most: int) -> Overview:
        """The whole cluster, in one call that changes nothing; see `Client.overview`."""
        from jobqueue.overview import Overview

        return Overview.from_answer(json.loads(self._call("overview", owner, host, most)), owner, host)

    def figures(self) -> Figures:
        """What monitors want to know, in one call that changes nothing."""
        from jobqueue.figures import Figures

        return Figures.from_answer(json.loads(self._call("figures")))

    def correction(self, kind: str) -> float:
        """What an estimate for that kind of job is to be multiplied with; 1 where none has been measured."""
        with self._errors():
            return float(self._redis.hget(f"{PREFIX}peaks", kind) or 1.0)

    def tokens(self, queue: str) -> int:
        """Wake-up messages that lie in a Celery queue."""
        with self._errors():
            return self._redis.llen(queue)

    def _no_batch(self, name: str) -> NotFoundError:
        missing = NotFoundError(f"there is no batch {name!r}", "See `loraq ls` for the batches that there are.")
        return self._archived(name) or missing

    def _archived(self, target: str) -> ArchivedError | None:
        """Where a batch of that name was archived, or one that could have a job of that id (both may have dots)."""
        parts = target.split(".")
        names = [".".join(parts[:count]) for count in range(len(parts), 0, -1)]
        with self._errors():
            scores = self._redis.zmscore(f"{PREFIX}archived", names)
        found = [name for name, at in zip(names, scores, strict=True) if at is not None]
        return ArchivedError(*found) if found else None
