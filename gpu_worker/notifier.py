"""Tells those who asked for it, and the operator's command, that a batch has ended.

The store keeps, beside the batch, that there is somebody to tell and how far that has come. A control worker takes a
batch for a while and tells; if it dies another takes it, and somebody may be told twice, never not at all. The batch
has ended by then: nothing here changes its jobs.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from functools import partial
from typing import Any

from gpu_worker import webhook
from gpu_worker.webhook import UndeliveredError
from jobqueue.errors import NotFoundError, ServerError
from jobqueue.job import Job, JobKind
from jobqueue.notification import Telling, Told, goes_to, payload
from jobqueue.outbox import ToTell
from jobqueue.settings import Settings
from jobqueue.storage import Storage
from jobqueue.store import Store

log = logging.getLogger(__name__)
LOOK_S = 2.0
HOLD_S = 300.0  # more than five webhooks and a command can take
FIRST_DELAY_S, LAST_DELAY_S = 5.0, 3600.0  # between two tries, each three times as long as the one before
MOST_TRIES = 10  # in about three and a half hours
COMMAND = "the operator's command"  # is called so, as what it is concerns nobody else

Send = Callable[[Mapping[str, Any]], None]


class Notifier:
    """Tells, one batch at a time. Any number of control workers may do so side by side."""

    def __init__(self, store: Store, storage: Storage, settings: Settings) -> None:
        self._store, self._storage, self._settings = store, storage, settings

    def run(self, stop: threading.Event) -> None:
        """Tells whatever there is to tell until `stop`."""
        while not stop.wait(LOOK_S):
            try:
                while not stop.is_set() and self.round():
                    pass
            except ServerError as error:
                log.warning("nobody is told: %s", error.what)
            except Exception:  # the next batch is to be told of all the same
                log.exception("telling of a batch's end broke off")

    def round(self) -> bool:
        """Whether there was a batch to tell of."""
        due = self._store.to_tell(HOLD_S)
        if due is not None:
            self._tell(due)
        return due is not None

    def _tell(self, due: ToTell) -> None:
        try:
            batch = self._store.batch(due.batch)
            jobs = self._store.jobs(batch.jobs)
        except NotFoundError:  # it was removed meanwhile
            return
        if not batch.ended:  # it was cancelled, and what runs of it has not stopped
            self._store.told(due, due.told, (), LOOK_S)
            return
        receivers = dict(self._receivers(jobs, key=f"{due.batch}-{due.ended_at}"))
        known = {told.target: told for told in due.told}
        waiting = [name for name in receivers if name not in known or known[name].state is Telling.RETRYING]
        news = payload(batch, jobs, self._storage.address(f"batches/{batch.name}/report.json"))
        after_s = 0.0
        for name in waiting:
            known[name], wanted_s = _tried(due.batch, name, receivers[name], news, known.get(name))
            after_s = max(after_s, wanted_s)
        for name in known.keys() - receivers:  # the command, in settings of before
            if known[name].state is Telling.RETRYING:
                known[name] = replace(known[name], state=Telling.GIVEN_UP)
        results = [known[name].state.value for name in waiting]
        again = [told.tries for told in known.values() if told.state is Telling.RETRYING]
        delay_s = max(after_s, min(FIRST_DELAY_S * 3 ** (min(again) - 1), LAST_DELAY_S)) if again else None
        self._store.told(due, list(known.values()), results, delay_s)

    def _receivers(self, jobs: list[Job], key: str) -> Iterator[tuple[str, Send]]:
        """Who is to be told, and how."""
        report = next((job for job in jobs if job.kind is JobKind.REPORT), None)
        for name in report.spec.get("notify", ()) if report else ():
            yield name, partial(self._post, name, key)
        if self._settings.on_batch_end:
            yield COMMAND, partial(webhook.run, self._settings.on_batch_end)

    def _post(self, name: str, key: str, news: Mapping[str, Any]) -> None:
        """Raises UndeliveredError, also where this worker may not. A spec can come from anybody, and is not trusted."""
        url = self._settings.webhooks.get(name)
        if url is None and "://" not in name:
            raise UndeliveredError("LORAQ_WEBHOOKS of the control worker has no such name", again=False)
        if url is None and not goes_to(name, self._settings.webhook_hosts):
            raise UndeliveredError("LORAQ_WEBHOOK_HOSTS of the control worker does not allow it", again=False)
        webhook.post(url or name, news, key)


def _tried(batch: str, name: str, send: Send, news: Mapping[str, Any], before: Told | None) -> tuple[Told, float]:
    """What has come of one more try, and how long the receiver wants to be left alone."""
    tries = before.tries + 1 if before else 1
    retry = Telling.RETRYING if tries < MOST_TRIES else Telling.GIVEN_UP
    shown = name.partition("?")[0]  # a query may hold a token
    try:
        send(news)
    except UndeliveredError as error:
        state = retry if error.again else Telling.GIVEN_UP
        log.warning("%s: %s is not told of its end (%s): %s", batch, shown, state, error)
        return Told(name, state, tries, time.time(), str(error)), error.after_s
    except Exception as error:  # of loraq's own, or of a host that starts no thread: the others are told all the same
        log.exception("%s: %s is not told of its end", batch, shown)
        return Told(name, retry, tries, time.time(), f"{type(error).__name__}: {error}"), 0.0
    log.info("%s: %s is told of its end", batch, shown)
    return Told(name, Telling.DELIVERED, tries, time.time()), 0.0
