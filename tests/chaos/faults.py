"""What the chaos driver does to the server, the hosts, the tokens and the jobs.

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

import psutil
import redis
from celery import Celery
from helpers import RestartableServer
from hosts import LEASE_S, STORAGE_TIMEOUT_S, Disk, Host, alive, beating

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


def _calm_host(run: Run, fault: Fault, fit: Callable[[Host], object] = bool) -> Host | None:
    calm = [host for host in run.hosts if host.name not in run.busy and host.runs and fit(host)]
    if not calm:
        return None
    fault.host = (chosen := run.dice.choice(calm)).name
    return chosen


def _undo(run: Run, fault: Fault, seconds: float, what: str, action: Callable[[], None]) -> None:
    """`what` is busy until the action, which comes in `seconds`, is done."""
    run.busy.add(what)
    fault.lasts = True

    def done() -> None:
        action()
        run.busy.discard(what)
        fault.ended = time.time()

    run.later(seconds, done)


def _must_be_gone(run: Run, processes: list[psutil.Process], after: str) -> None:
    """Nothing of a worker that was killed lives longer than the lease."""

    def look() -> None:
        run.problems.extend(f"{LEASE_S:g} s after {after} lives {command}" for command in alive(processes))

    run.later(LEASE_S, look)


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
    _undo(run, fault, run.dice.uniform(0.2, 2.5), "server", run.server.start)
    return True


def server_stop(run: Run, fault: Fault) -> bool:
    if "server" in run.busy:
        return False
    run.server.tell(signal.SIGSTOP)
    _undo(run, fault, run.dice.uniform(1, 6), "server", lambda: run.server.tell(signal.SIGCONT))
    return True


def memory_full(run: Run, fault: Fault) -> bool:
    if "server" in run.busy:
        return False

    def limit(value: int) -> None:
        with _client(run) as client, contextlib.suppress(redis.RedisError):
            client.config_set("maxmemory", value)

    limit(1_000_000)
    _undo(run, fault, run.dice.uniform(0.5, 3), "server", lambda: limit(0))
    return True


# -- the hosts


def supervisor_kill(run: Run, fault: Fault) -> bool:
    host = _calm_host(run, fault)
    if host is None:
        return False
    _must_be_gone(run, host.processes(), "kill -9 of the supervisor")
    host.tell(signal.SIGKILL)
    _undo(run, fault, run.dice.uniform(0.5, 3), host.name, host.start)
    return True


def celery_kill(run: Run, fault: Fault) -> bool:
    host = _calm_host(run, fault)
    served = host.celery(run.dice.choice(("cpu", "cpu", "control"))) if host else []
    for process in served:
        with contextlib.suppress(psutil.Error):
            _must_be_gone(run, process.children(recursive=True), "kill -9 of the Celery process")
            process.kill()
    return bool(served)


def _trainer_at_work(run: Run, fault: Fault) -> psutil.Process | None:
    """Of any host that is left alone at the moment."""
    hosts = [host for host in run.hosts if host.name not in run.busy]
    run.dice.shuffle(hosts)
    for host in hosts:
        if at_work := [trainer for trainer in host.trainers() if trainer.pid in beating(host.beats)]:
            fault.host = host.name
            return at_work[0]
    return None


def spare_kill(run: Run, fault: Fault) -> bool:
    """Or its guardian; of those that rest, whether a job had them before or not."""
    hosts = [host for host in run.hosts if host.name not in run.busy]
    run.dice.shuffle(hosts)
    for host in hosts:
        if at_rest := [trainer for trainer in host.trainers() if trainer.pid not in beating(host.beats)]:
            fault.host = host.name
            if run.dice.random() < 0.5:
                _kill_guardian_of(at_rest[0])
            else:
                with contextlib.suppress(psutil.Error):
                    at_rest[0].kill()
            return True
    return False


def _kill_guardian_of(trainer: psutil.Process) -> None:
    with contextlib.suppress(psutil.Error):
        parent = trainer.parent()
        if parent and any("guardian.py" in word for word in parent.cmdline()):
            parent.kill()


def guardian_kill(run: Run, fault: Fault) -> bool:
    if trainer := _trainer_at_work(run, fault):
        _kill_guardian_of(trainer)
    return trainer is not None


def trainer_kill(run: Run, fault: Fault) -> bool:
    if trainer := _trainer_at_work(run, fault):
        with contextlib.suppress(psutil.Error):
            trainer.kill()
    return trainer is not None


def _stop(run: Run, fault: Fault, seconds: float, then: signal.Signals) -> bool:
    host = _calm_host(run, fault)
    served = host.celery(run.dice.choice(("cpu", "cpu", "cpu", "control"))) if host else []
    if not host or not served:
        return False

    def tell(number: signal.Signals) -> None:
        with contextlib.suppress(psutil.Error):
            served[0].send_signal(number)

    tell(signal.SIGSTOP)
    _undo(run, fault, seconds, host.name, lambda: tell(then))
    return True


def worker_stop_short(run: Run, fault: Fault) -> bool:
    return _stop(run, fault, run.dice.uniform(0.5, LEASE_S / 2), signal.SIGCONT)


def worker_stop_long(run: Run, fault: Fault) -> bool:
    return _stop(run, fault, LEASE_S + run.dice.uniform(0.5, 4), signal.SIGCONT)


def worker_stop_then_kill(run: Run, fault: Fault) -> bool:
    return _stop(run, fault, run.dice.uniform(0.5, 2), signal.SIGKILL)


def drain(run: Run, fault: Fault) -> bool:
    host = _calm_host(run, fault)
    if host is None:
        return False
    host.tell(signal.SIGTERM)
    run.busy.add(host.name)
    fault.lasts = True
    give_up_at = time.monotonic() + 5 * LEASE_S

    def look() -> None:
        if host.runs and time.monotonic() < give_up_at:
            run.later(0.2, look)
            return
        if host.runs or not host.ended_well:
            run.problems.append(f"{host.name} drained: runs {host.runs}, exit code {host.exit_code}")
            host.tell(signal.SIGKILL)
        elif left := alive(host.left()):
            run.problems.append(f"{host.name} drained and left {left}")
        host.start()
        run.busy.discard(host.name)
        fault.ended = time.time()

    run.later(0.2, look)
    return True


def storage_away(run: Run, fault: Fault) -> bool:
    host = _calm_host(run, fault)
    if host is None:
        return False
    host.unmount()
    _undo(run, fault, run.dice.uniform(0.5, 4), host.name, host.mount)
    return True


def storage_full(run: Run, fault: Fault) -> bool:
    if "storage" in run.busy or not run.disk.fill():
        return False
    _undo(run, fault, run.dice.uniform(0.5, 3), "storage", run.disk.empty)
    return True


def storage_hangs(run: Run, fault: Fault) -> bool:
    """Of all hosts whose storage can, for less or more than they wait for it."""
    able = [host for host in run.hosts if host.may_hang]
    if "storage" in run.busy or not able:
        return False
    hang = able[0].shared / "hang"
    hang.touch()
    _undo(run, fault, run.dice.uniform(0.5, 1.5 * STORAGE_TIMEOUT_S), "storage", lambda: hang.unlink(missing_ok=True))
    return True


def cut_off(run: Run, fault: Fault) -> bool:
    """The way to the server swallows all that comes, for less or more than a lease; nobody is told."""
    host = _calm_host(run, fault, lambda host: host.proxy)
    if host is None or (proxy := host.proxy) is None:
        return False

    def heal() -> None:
        proxy.swallows = False
        proxy.break_all()  # they lack what was swallowed

    proxy.swallows = True
    _undo(run, fault, run.dice.uniform(0.5, 1.7 * LEASE_S), host.name, heal)
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


# How often each comes in a deck that is shuffled and dealt to its end.
KINDS: dict[Callable[[Run, Fault], bool], int] = {
    client_kill: 4,
    server_kill: 2,
    server_stop: 2,
    memory_full: 2,
    supervisor_kill: 2,
    celery_kill: 3,
    guardian_kill: 3,
    trainer_kill: 3,
    spare_kill: 2,
    worker_stop_short: 3,
    worker_stop_long: 1,
    worker_stop_then_kill: 1,
    drain: 3,
    storage_away: 1,
    storage_full: 1,
    storage_hangs: 1,
    cut_off: 2,
    double_tokens: 3,
    lose_tokens: 3,
    second_sweeper: 2,
    cancel: 1,
}
