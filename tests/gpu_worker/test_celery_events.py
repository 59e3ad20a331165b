"""Celery's events, as Flower hears them: none by default, of workers and wake-ups where they are switched on."""

from __future__ import annotations

import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from helpers import wait_for
from worker_process import START_S, Site

from jobqueue.broker import WAKE, make_app, send_tokens
from jobqueue.job import JobState

HOST = socket.gethostname()


@contextmanager
def heard(here: Site) -> Iterator[list[dict[str, Any]]]:
    """What is said from now on."""
    app, events = make_app(here.store.url, 5.0), list[dict[str, Any]]()
    stop = threading.Event()
    with app.connection_for_read() as connection:
        receiver = app.events.Receiver(connection, handlers={"*": events.append})

        def listen() -> None:
            while not stop.is_set():
                with_deadline = receiver.itercapture(limit=None, timeout=0.2, wakeup=False)
                try:
                    for _ in with_deadline:
                        pass
                except TimeoutError:
                    continue

        thread = threading.Thread(target=listen)
        thread.start()
        try:
            yield events
        finally:
            stop.set()
            thread.join()


def types(events: list[dict[str, Any]], worker: str) -> set[str]:
    return {event["type"] for event in events if event["hostname"] == f"{worker}@{HOST}"}


def woken_job(here: Site) -> None:
    """One job that a token has woken a worker for."""
    wait_for(lambda: here.listening() == 2, START_S, "the workers wait for tokens")
    here.submit("b.1", "sleep:0.1")
    send_tokens(make_app(here.store.url, 5.0), ["gpu8", "cpu", "control"])
    assert here.ended("b.1").state is JobState.SUCCEEDED


def test_events_of_workers_and_wake_ups_are_sent_where_they_are_switched_on(here: Site) -> None:
    with heard(here) as events:
        here.start(LORAQ_CELERY_EVENTS=1, LORAQ_POLL_S=30)
        woken_job(here)

        wanted = {"worker-heartbeat", "task-received", "task-succeeded"}
        wait_for(lambda: wanted <= types(events, "cpu"), START_S, "Flower hears of the worker and its task")
        wait_for(lambda: "worker-heartbeat" in types(events, "control"), START_S, "and of the control worker")
        assert {event["name"] for event in events if event["type"] == "task-received"} == {WAKE}
    assert not here.store._redis.keys("*celeryev*"), "nothing is kept for those who do not listen"


def test_none_are_sent_by_default(here: Site) -> None:
    with heard(here) as events:
        here.start()
        woken_job(here)
        assert not events
