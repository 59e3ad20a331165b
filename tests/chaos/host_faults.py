"""What the chaos driver does to the hosts and their storage, see faults.py."""

from __future__ import annotations

import contextlib
import signal
import time
from collections.abc import Callable

import psutil
from faults import Fault, Run, undo
from hosts import LEASE_S, STORAGE_TIMEOUT_S, Host, alive, beating


def _calm_host(run: Run, fault: Fault, fit: Callable[[Host], object] = bool) -> Host | None:
    calm = [host for host in run.hosts if host.name not in run.busy and host.runs and fit(host)]
    if not calm:
        return None
    fault.host = (chosen := run.dice.choice(calm)).name
    return chosen


def _must_be_gone(run: Run, processes: list[psutil.Process], after: str) -> None:
    """Nothing of a worker that was killed lives longer than the lease."""

    def look() -> None:
        run.problems.extend(f"{LEASE_S:g} s after {after} lives {command}" for command in alive(processes))

    run.later(LEASE_S, look)


def supervisor_kill(run: Run, fault: Fault) -> bool:
    host = _calm_host(run, fault)
    if host is None:
        return False
    _must_be_gone(run, host.processes(), "kill -9 of the supervisor")
    host.tell(signal.SIGKILL)
    undo(run, fault, run.dice.uniform(0.5, 3), host.name, host.start)
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
    undo(run, fault, seconds, host.name, lambda: tell(then))
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
    undo(run, fault, run.dice.uniform(0.5, 4), host.name, host.mount)
    return True


def storage_full(run: Run, fault: Fault) -> bool:
    if "storage" in run.busy or not run.disk.fill():
        return False
    undo(run, fault, run.dice.uniform(0.5, 3), "storage", run.disk.empty)
    return True


def storage_hangs(run: Run, fault: Fault) -> bool:
    """Of all hosts whose storage can, for less or more than they wait for it."""
    able = [host for host in run.hosts if host.may_hang]
    if "storage" in run.busy or not able:
        return False
    hang = able[0].shared / "hang"
    hang.touch()
    undo(run, fault, run.dice.uniform(0.5, 1.5 * STORAGE_TIMEOUT_S), "storage", lambda: hang.unlink(missing_ok=True))
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
    undo(run, fault, run.dice.uniform(0.5, 1.7 * LEASE_S), host.name, heal)
    return True
