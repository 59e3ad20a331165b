"""Which wake-ups a running Celery worker takes: those of the classes that its device can hold now, else none."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any

from celery.signals import worker_ready

from jobqueue.broker import queue_name

if TYPE_CHECKING:
    from celery import Celery

log = logging.getLogger(__name__)


class Wakeups:
    """A token that a worker takes and cannot use wakes nobody else, who then asks by himself only seconds later."""

    def __init__(self, app: Celery) -> None:
        self._app = app
        self._consumer: Any = None
        worker_ready.connect(self._ready, weak=False)

    def _ready(self, sender: Any, **_: object) -> None:
        self._consumer = sender

    def listen_to(self, classes: Iterable[str]) -> None:
        """From now on these only; before Celery is ready, and while it is away, it is said again and again."""
        if self._consumer is None:
            return
        wanted, now = {queue_name(name) for name in classes}, set(self._app.amqp.queues.consume_from)
        for queue in now - wanted:
            self._consumer.call_soon(self._change, self._consumer.cancel_task_queue, queue)
        for queue in wanted - now:
            self._consumer.call_soon(self._change, self._consumer.add_task_queue, queue)

    @staticmethod
    def _change(change: Callable[[str], None], queue: str) -> None:
        """In Celery's own thread. What fails for want of a connection is done when it is there again."""
        try:
            change(queue)
        except Exception as error:
            log.info("%s: not changed while Redis is away: %s", queue, error)
