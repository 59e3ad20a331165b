"""A cluster on this machine, and faults in it: server, hosts, batches of jobs, and a seed that says what goes wrong.

    python tests/chaos/driver.py --seed 1 --seconds 60

Exits with 1 and says what was wrong where an invariant does not hold, see invariants.py. A seed decides which faults
are dealt, to whom, and when; how the processes take them is theirs, so no two runs are the same.
"""

from __future__ import annotations

import argparse
import contextlib
import logging
import random
import signal
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path

import redis

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parents[1]))

import faults
import host_faults
from faults import Fault, Run
from helpers import RestartableServer, wait_for
from hosts import ANY_TRAINER, Disk, Host, alive
from invariants import Verdict, judge
from jobs import batch
from proxy import Proxy

from jobqueue.broker import make_app, send_tokens
from jobqueue.errors import LoraqError, ServerError
from jobqueue.job import Job
from jobqueue.store import Store

QUIET_S = 180.0  # what all jobs may need to their end once nothing goes wrong any more
START_S = 30.0

log = logging.getLogger(__name__)

# How often each comes in a deck that is shuffled and dealt to its end.
KINDS: dict[Callable[[Run, Fault], bool], int] = {
    faults.client_kill: 4,
    faults.server_kill: 2,
    faults.server_stop: 2,
    faults.memory_full: 2,
    host_faults.supervisor_kill: 2,
    host_faults.celery_kill: 3,
    host_faults.guardian_kill: 3,
    host_faults.trainer_kill: 3,
    host_faults.spare_kill: 2,
    host_faults.worker_stop_short: 3,
    host_faults.worker_stop_long: 1,
    host_faults.worker_stop_then_kill: 1,
    host_faults.drain: 3,
    host_faults.storage_away: 1,
    host_faults.storage_full: 1,
    host_faults.storage_hangs: 1,
    host_faults.cut_off: 2,
    faults.double_tokens: 3,
    faults.lose_tokens: 3,
    faults.second_sweeper: 2,
    faults.cancel: 1,
}


class Chaos:
    """One run. The faults come from this thread, submissions from another."""

    def __init__(self, folder: Path, seed: int, hosts: int = 4, real_every: int = 0) -> None:
        """`real_every`: each so many batches one has a real train, see jobs.py; 0: none has."""
        self.folder, self.seed, self.real_every = folder, seed, real_every
        self.dice = random.Random(seed)
        self.server = RestartableServer(folder / "server")
        self.server.start()
        self.disk = Disk(folder / "storage")
        self.hosts = [self._host(number) for number in range(1, hosts + 1)]
        self.app = make_app(self.server.url, 5)
        self.busy: set[str] = set()
        self.faults: list[Fault] = []
        self.problems: list[str] = []
        self.ids: list[str] = []
        self.batches = 0
        self._states: dict[str, str] = {}
        self._due: list[tuple[float, Callable[[], None]]] = []
        self._deck: list[Callable[..., bool]] = []
        self._enough = threading.Event()

    def _host(self, number: int) -> Host:
        """The first is plain; the second has slots, a spare, a proxy to the server; the third a storage that hangs."""
        kind = (number - 1) % 3
        way = Proxy(self.server.port) if kind == 1 else None
        return Host(
            f"h{number}",
            self.folder,
            way.url if way else self.server.url,
            options=("--slots", "3", "--spares", "1") if kind == 1 else ("--spares", "1") if kind == 2 else (),
            trainer=ANY_TRAINER,
            proxy=way,
            may_hang=kind == 2,
        )

    # -- what a fault may use

    def later(self, seconds: float, action: Callable[[], None]) -> None:
        self._due.append((time.monotonic() + seconds, action))

    def unfinished(self) -> list[str]:
        return [job_id for job_id in self.ids if self._states.get(job_id) not in ("succeeded", "failed", "cancelled")]

    def wake(self, classes: list[str]) -> None:
        with contextlib.suppress(Exception):  # a token that was not sent is a token that was lost
            send_tokens(self.app, classes)

    # -- jobs

    def _submit(self, backlog: int, most: int) -> None:
        """Batches, so that about `backlog` jobs have not ended, until `most` were submitted or it is enough."""
        dice = random.Random(f"jobs {self.seed}")
        store = Store(self.server.url, timeout_s=2)
        jobs = batch(self.batches, dice, self.real_every)
        while not self._enough.wait(0.2):
            try:
                self._states |= {job.id: job.state.value for job in store.jobs(self.unfinished())}
                if len(self.unfinished()) >= backlog or len(self.ids) >= most:
                    continue
                name, ids = f"b{self.batches}", [job.id for job in jobs]
                made = store.submit(name, jobs[0].owner, 2, "a/model", jobs, ids, key=name)
            except ServerError:
                continue  # and once more with the same key
            if made is None:
                self.problems.append(f"{name} is taken")
                return
            self.wake(list(made.classes))
            self.ids += [job_id for job_id in ids if job_id not in self.ids]
            self._states.pop(ids[4], None)  # the base model's evaluation may run again
            self.batches += 1
            jobs = batch(self.batches, dice, self.real_every)
        store.close()

    # -- faults

    def _deal(self) -> None:
        """The next fault of the deck that can be done now."""
        if not self._deck:
            self._deck = [kind for kind, weight in KINDS.items() for _ in range(weight)]
            self.dice.shuffle(self._deck)
        for kind in self._deck:
            fault = Fault(kind.__name__, time.time())
            if kind(self, fault):
                self._deck.remove(kind)
                if not fault.lasts:
                    fault.ended = time.time()
                self.faults.append(fault)
                log.info("%s %s%s", fault.kind, fault.host, fault.job)
                return

    def _tend(self) -> None:
        """Undoes what is due."""
        now = time.monotonic()
        due = [action for at, action in self._due if at <= now]
        self._due = [(at, action) for at, action in self._due if at > now]
        for action in due:
            action()

    def _rest(self, seconds: float) -> None:
        until = time.monotonic() + seconds
        while time.monotonic() < until:
            self._tend()
            time.sleep(0.05)

    # -- the whole

    def run(self, seconds: float, *, pause_s: tuple[float, float], backlog: int = 14, jobs: int = 0) -> Verdict:
        """Faults for so many seconds, then rest, and what is to be said of it; `jobs` or a few more, 0: no end."""
        for host in self.hosts:
            host.start()
        submitter = threading.Thread(target=self._submit, args=(backlog, jobs or 10**9))
        submitter.start()
        store = Store(self.server.url)
        try:
            wait_for(lambda: any(host.trainers() for host in self.hosts), START_S, "the first trainer is at work")
            until = time.monotonic() + seconds
            while time.monotonic() < until:
                self._deal()
                self._rest(self.dice.uniform(*pause_s))
            until = time.monotonic() + QUIET_S
            while self._due or (len(self.ids) < jobs and time.monotonic() < until):
                self._rest(0.2)
            self._enough.set()
            submitter.join()
            ended = self._await_the_end(store)
            self._stop_hosts()
            return judge(self, store, ended)
        finally:
            self._enough.set()
            submitter.join()
            store.close()

    def _await_the_end(self, store: Store) -> list[Job]:
        """All jobs, when they have ended; what waits for another attempt need not wait as long as it should."""
        until = time.monotonic() + QUIET_S
        while True:
            self._tend()
            try:
                store._redis.zunionstore("{loraq}:delayed", {"{loraq}:delayed": 0.0})
                jobs = store.jobs(self.ids)
            except (LoraqError, redis.RedisError):
                jobs = []
            if (jobs and all(job.state.final for job in jobs)) or time.monotonic() > until:
                return jobs
            time.sleep(0.2)

    def _stop_hosts(self) -> None:
        for host in self.hosts:
            host.tell(signal.SIGTERM)
        for host in self.hosts:
            with contextlib.suppress(AssertionError):
                wait_for(lambda host=host: not host.runs, START_S, "it has ended")
            if host.runs or not host.ended_well:
                self.problems.append(f"{host.name} at the end: runs {host.runs}, exit code {host.exit_code}")
            if left := alive(host.left()):
                self.problems.append(f"{host.name} left {left}")

    def close(self) -> None:
        for host in self.hosts:
            host.close()
            if host.proxy:
                host.proxy.close()
        self.server.end()
        self.disk.close()


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--seconds", type=float, default=60)
    parser.add_argument("--hosts", type=int, default=4)
    parser.add_argument("--pause", type=float, default=2.5, help="between two faults, in seconds, at most")
    parser.add_argument("--real-every", type=int, default=0, help="batches for each real training, 0: none")
    chosen = parser.parse_args()
    folder = Path(tempfile.mkdtemp(prefix=f"loraq-chaos-{chosen.seed}-"))
    logging.basicConfig(filename=folder / "driver.log", level=logging.INFO, format="%(asctime)s %(message)s")
    chaos = Chaos(folder, chosen.seed, chosen.hosts, chosen.real_every)
    try:
        verdict = chaos.run(chosen.seconds, pause_s=(chosen.pause / 5, chosen.pause))
    finally:
        chaos.close()
    print(verdict.text())
    print(f"its logs are in {folder}")
    sys.exit(bool(verdict.problems))


if __name__ == "__main__":
    main()
