"""The Celery side: one app, the queues, and the only task that travels, a wake-up without content.

The record in the store is the truth; a message only says "look". Lost or doubled messages do no harm, so nothing
here is acknowledged late, retried or stored.
"""

from __future__ import annotations

import logging
import ssl
from collections.abc import Iterable
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from celery import Celery

WAKE = "loraq.wake"  # never to be renamed: workers discard names that they do not know
MAX_TOKENS = 64  # in a class at a time

log = logging.getLogger(__name__)


def queue_name(memory_class: str) -> str:
    """The Celery queue, and so the Redis list, of a class."""
    return f"loraq.{memory_class}"


def make_app(url: str, timeout_s: float) -> Celery:
    """A Celery app on that Redis. Each setting is there for a fault that was seen without it.

    Args:
        url: as LORAQ_REDIS_URL.
        timeout_s: how long a call may take; twice that where Celery waits for a message, a second at a time.
    """
    from celery import Celery

    app = Celery("loraq", broker=url, set_as_current=False)
    if url.startswith("rediss://") and "ssl_" not in url:  # where it is told nothing, Celery trusts any certificate
        app.conf.broker_use_ssl = {"ssl_cert_reqs": ssl.CERT_REQUIRED}
    app.conf.update(
        task_acks_late=False,  # a late ack makes a second copy of a running job after a dropped connection
        worker_disable_prefetch=True,  # a message in a busy worker's hands wakes nobody
        worker_prefetch_multiplier=1,
        task_ignore_result=True,  # no result backend: publishing then fails fast where Redis is away
        task_serializer="json",
        accept_content=["json"],
        broker_connection_retry_on_startup=True,
        broker_connection_max_retries=None,
        broker_transport_options={
            "socket_timeout": max(2.0, 2 * timeout_s),
            "socket_connect_timeout": min(3.0, timeout_s),
            "socket_keepalive": True,
            "health_check_interval": 10,
            "visibility_timeout": 30,
        },
        task_create_missing_queues=True,
        worker_send_task_events=False,
        worker_hijack_root_logger=False,
        worker_redirect_stdouts=False,
        task_always_eager=False,
        enable_utc=True,
    )
    return app


def send_tokens(app: Celery, classes: Iterable[str]) -> None:
    """One wake-up for each entry. A failure is only logged: the sweeper sends again, and idle slots ask anyway."""
    from kombu.exceptions import OperationalError

    for memory_class in classes:
        try:
            app.send_task(WAKE, queue=queue_name(memory_class), retry=False, expires=600)
        except (OperationalError, OSError) as error:
            log.warning("no wake-up for %s: %s", memory_class, error)
            return
