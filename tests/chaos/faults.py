"""What the chaos driver does to the server, the tokens and the jobs; host_faults.py has what it does to the hosts.

A fault answers whether it could be done now. What has to be undone is busy until then, and spared by others.
"""

from __future__ import annotations

import contextlib
import random
import signal
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import redis
from celery import Celery
from helpers import RestartableServer
from hosts import LEASE_S, Disk, Host

from jobqueue.broker import queue_name
from jobqueue.settings import Settings
from jobqueue.store import Store
from jobqueue.sweeper import Sweeper

CLASSES = ("cpu", "control", "gpu8")


@dataclass
class Fault:
    """One thing that was done. Times in seconds since the epoch."""

    kind: str
    began: float
    ended: float = 0.0  # when it was undone, and the host or server up again; 0: not yet
    host: str = ""  # "" where it was the server, or everybody
    job: str = ""
    lasts: bool = False  # it is undone later


class Run(Protocol):
    """The driver, as far as a fault needs it."""

    dice: random.Random
    server: RestartableServer
    disk: Disk  # below the storage
    hosts: list[Host]
    busy: set[str]  # names of hosts, "server", "storage"
    problems: list[str]
    app: Celery

    def later(self, seconds: float, action: Callable[[], None]) -> None: ...
    def unfinished(self) -> list[str]: ...
    def wake(self, classes: list[str]) -> None: ...


def _client(run: Run) -> redis.Redis:
    return redis.Redis.from_url(run.server.url, socket_timeout=2, socket_connect_timeout=2)


def undo(run: Run, fault: Fault, seconds: float, what: str, action: Callable[[], None]) -> None:
    """`what` is busy until the action, which comes in `seconds`, is done."""
    run.busy.add(what)
    fault.lasts = True

    def done() -> None:
        action()
        run.busy.discard(what)
        fault.ended = time.time()

    run.later(seconds, done)


# -- the server


def client_kill(run: Run, fault: Fault) -> bool:
    if "server" in run.busy:
        return False
    with _client(run) as client, contextlib.suppress(redis.RedisError):
        for kind in ("normal", "pubsub"):
            client.execute_command("CLIENT", "KILL", "TYPE", kind)
    return True


def server_kill(run: Run, fault: Fault) -> bool:
    if "server" in run.busy:
        return False
    run.server.end()
    undo(run, fault, run.dice.uniform(0.2, 2.5), "server", run.server.start)
    return True


def server_stop(run: Run, fault: Fault) -> bool:
    if "server" in run.busy:
        return False
    run.server.tell(signal.SIGSTOP)
    undo(run, fault, run.dice.uniform(1, 6), "server", lambda: run.server.tell(signal.SIGCONT))
    return True


def memory_full(run: Run, fault: Fault) -> bool:
    if "server" in run.busy:
        return False

    def limit(value: int) -> None:
        with _client(run) as client, contextlib.suppress(redis.RedisError):
            client.config_set("maxmemory", value)

    limit(1_000_000)
    undo(run, fault, run.dice.uniform(0.5, 3), "server", lambda: limit(0))
    return True


# -- tokens, sweeps, jobs


def double_tokens(run: Run, fault: Fault) -> bool:
    if "server" in run.busy:
        return False
    run.wake([run.dice.choice(CLASSES) for _ in range(6)])
    return True


def lose_tokens(run: Run, fault: Fault) -> bool:
    if "server" in run.busy:
        return False
    with _client(run) as client, contextlib.suppress(redis.RedisError):
        client.delete(*map(queue_name, CLASSES))
    return True


def second_sweeper(run: Run, fault: Fault) -> bool:
    """Beside those of the control workers, and without a pause between its rounds."""
    stop = threading.Event()
    settings = Settings(redis_url=run.server.url, lease_s=LEASE_S, renew_s=1, sweep_s=0.02, max_failures=50)
    sweeper = Sweeper(Store(run.server.url), run.app, settings)
    threading.Thread(target=sweeper.run, args=(stop,), daemon=True).start()
    run.later(2, stop.set)
    return True


def cancel(run: Run, fault: Fault) -> bool:
    candidates = [job for job in run.unfinished() if not job.startswith("base-")]
    if "server" in run.busy or not candidates:
        return False
    fault.job = run.dice.choice(candidates)
    store = Store(run.server.url, timeout_s=2)
    with contextlib.suppress(Exception):  # asked for or not: either is right when no answer comes
        run.wake(store.cancel([fault.job])[1])
    store.close()
    return True
