"""Several hosts, each a network namespace with an address of its own; one of them is cut off, and joined again."""

from __future__ import annotations

import os
import secrets
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import urlsplit

import pytest
import redis
from helpers import submit, wait_for

sys.path.insert(0, str(Path(__file__).parent / "chaos"))  # for hosts, invariants: pytest's importlib mode leaves it out

from hosts import LEASE_S, Host, alive
from invariants import overlaps, stints
from jobs import train

from jobqueue.embedded import server_binary
from jobqueue.errors import StaleAttemptError
from jobqueue.job import Claim, JobState, Settlement
from jobqueue.processes import start_process
from jobqueue.store import Store

NETWORK = "10.231.77"  # exists inside of the namespaces only
START_S = 30.0


def ip(*words: str) -> None:
    done = subprocess.run(["ip", *words], capture_output=True, text=True, check=False)
    if done.returncode:
        pytest.fail(
            f"`ip {' '.join(words)}` failed: {done.stderr.strip()} (this test needs the right to make namespaces)"
        )


class Network:
    """A bridge in the server's namespace, and a cable to it from each host's."""

    def __init__(self, hosts: list[str]) -> None:
        self._mark = f"loraq-{os.getpid()}"
        self._hosts, self._names = hosts, ["server", *hosts]

    def open(self) -> None:
        for name in self._names:
            ip("netns", "add", self._space(name))
            ip("-n", self._space(name), "link", "set", "lo", "up")
        server = self._space("server")
        ip("-n", server, "link", "add", "bridge", "type", "bridge")
        ip("-n", server, "address", "add", f"{self.address('server')}/24", "dev", "bridge")
        ip("-n", server, "link", "set", "bridge", "up")
        for name in self._hosts:
            there = self._space(name)
            ip("link", "add", name, "netns", server, "type", "veth", "peer", "name", "eth0", "netns", there)
            ip("-n", server, "link", "set", name, "master", "bridge", "up")
            ip("-n", there, "address", "add", f"{self.address(name)}/24", "dev", "eth0")
            ip("-n", there, "link", "set", "eth0", "up")

    def _space(self, name: str) -> str:
        return f"{self._mark}-{name}"

    def address(self, name: str) -> str:
        return f"{NETWORK}.{self._names.index(name) + 1}"

    def inside(self, name: str) -> list[str]:
        return [shutil.which("ip") or "ip", "netns", "exec", self._space(name)]

    def cut_off(self, name: str) -> None:
        ip("-n", self._space("server"), "link", "set", name, "down")

    def join(self, name: str) -> None:
        ip("-n", self._space("server"), "link", "set", name, "up")

    def close(self) -> None:
        for name in self._names:
            subprocess.run(["ip", "netns", "delete", self._space(name)], check=False, capture_output=True)


@pytest.fixture
def network() -> Iterator[Network]:
    if os.geteuid() != 0 or shutil.which("ip") is None:
        missing = "this test makes network namespaces: it needs root and the command `ip` (apt-get install iproute2)"
        if os.environ.get("CI"):
            pytest.fail(missing)
        pytest.skip(missing)  # on a developer's machine; where changes are judged it must run
    made = Network(["h1", "h2"])
    try:
        made.open()
        yield made
    finally:
        made.close()


@pytest.fixture
def url(network: Network, tmp_path: Path) -> Iterator[str]:
    """Of a server that listens on its namespace's address; beside it a socket, on which this process listens in."""
    address, password = network.address("server"), secrets.token_hex(8)
    options = {
        "--bind": address,
        "--port": "6379",
        "--requirepass": password,
        "--unixsocket": str(tmp_path / "socket"),
        "--save": "",
        "--dir": str(tmp_path),
    }
    command = [*network.inside("server"), str(server_binary()), *(word for pair in options.items() for word in pair)]
    process = start_process(command, folder=tmp_path, log=tmp_path / "server.log", die_with_parent=True)
    wait_for(lambda: (tmp_path / "socket").exists(), START_S, "the server listens")
    try:
        yield f"redis://:{password}@{address}:6379/0"
    finally:
        process.kill()
        process.wait()


@pytest.fixture
def store(url: str, tmp_path: Path) -> Iterator[Store]:
    opened = Store(url)
    password = urlsplit(url).password
    opened._redis = redis.Redis(unix_socket_path=str(tmp_path / "socket"), password=password, decode_responses=True)
    yield opened
    opened.close()


@pytest.fixture
def hosts(network: Network, url: str, tmp_path: Path) -> Iterator[dict[str, Host]]:
    made = {name: Host(name, tmp_path, url, network.inside(name)) for name in ("h1", "h2")}
    try:
        for host in made.values():
            host.start()
        yield made
    finally:
        for host in made.values():
            host.close()


def test_a_host_that_is_cut_off_for_longer_than_a_lease_loses_its_job_and_comes_back(
    network: Network, store: Store, hosts: dict[str, Host], tmp_path: Path
) -> None:
    submit(store, train("b.1", "b", "/stub/deaf/child/sleep:60/save"))
    beats = tmp_path / "beats" / "b.1"
    wait_for(lambda: len(stints(beats)) == 1 and stints(beats)[0].beats > 20, START_S, "the job trains")
    before = store.job("b.1")
    late = Claim("b.1", 1, str(store._redis.hget("{loraq}:job:b.1", "nonce")), {}, "b", 0, LEASE_S)
    name = before.worker.partition("/")[0]
    old = hosts[name].left(trainers_only=True)
    assert len(old) == 3, "guardian, trainer, child"

    network.cut_off(name)
    wait_for(lambda: store.job("b.1").attempt == 2, 4 * LEASE_S, "another host takes the job")
    assert alive(old) == []
    other = store.job("b.1").worker.partition("/")[0]
    assert other in hosts
    assert other != name
    wait_for(lambda: len(stints(beats)) == 2 and stints(beats)[1].beats > 20, START_S, "it trains there")
    network.join(name)

    for late_call in (
        lambda: store.renew(late),
        lambda: store.append(late, [("log", "late")], 0),
        lambda: store.settle(late, Settlement(JobState.SUCCEEDED, outcome={"folder": "late"})),
    ):
        with pytest.raises(StaleAttemptError):
            late_call()
    submit(store, train("c.1", "c", "/stub/sleep:0.5"))  # the other is busy: only this one can take it
    wait_for(lambda: store.job("c.1").state.final, 2 * LEASE_S, "the host takes jobs again, by itself")
    assert store.job("c.1").worker == before.worker
    assert store.job("c.1").state is JobState.SUCCEEDED

    store.cancel(["b.1"])
    wait_for(lambda: store.job("b.1").state.final, START_S, "the job is cancelled")
    found = stints(beats)
    assert len(found) == 2
    assert overlaps(found) == []
    attempts = [event.attempt for event in store.events("b.1", "0", 0)]
    assert attempts == sorted(attempts), "a line of the first attempt came after the second had begun"
    resumed = [event.text for event in store.events("b.1", "0", 0) if "going on from step" in event.text]
    assert len(resumed) == 1
