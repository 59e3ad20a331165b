"""worker, up and down for real: the command in a process of its own, with a server and a worker behind it."""

from __future__ import annotations

import json
import os
import signal
import socket
import stat
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from urllib.parse import urlsplit

import psutil
import pytest
import redis

from cli import machine
from jobqueue import embedded
from jobqueue.configuration import read_settings
from jobqueue.embedded import Server
from jobqueue.errors import MachineError
from jobqueue.service import Client
from jobqueue.settings import Settings


class Machine:
    """A machine of one's own: a data folder, and the command with it."""

    def __init__(self, folder: Path) -> None:
        self.data = folder / "data"
        kept = {name: value for name, value in os.environ.items() if not name.startswith("LORAQ_")}
        self.environment = {
            **kept,
            "LORAQ_DATA_DIR": str(self.data),
            "LORAQ_CONFIG": os.devnull,
            "TMPDIR": str(folder),
        }

    def command(self, *args: str) -> list[str]:
        return [sys.executable, "-P", "-m", "cli.main", *args]

    def __call__(self, *args: str, **environment: str) -> subprocess.CompletedProcess[str]:
        env = {**self.environment, **environment}
        return subprocess.run(self.command(*args), env=env, capture_output=True, text=True, timeout=180)

    def processes(self) -> list[psutil.Process]:
        """Everything alive that works in this machine's data folder, or was started with it."""
        found = []
        for process in psutil.process_iter():
            try:
                at_work = Path(process.cwd()).is_relative_to(self.data)  # the server overwrites its environment
                if at_work or process.environ().get("LORAQ_DATA_DIR") == str(self.data):
                    found.append(process)
            except psutil.Error:
                pass
        return found

    @property
    def server(self) -> Server:
        server = embedded.recorded(self.data / "server.json")
        assert server is not None
        return server


@pytest.fixture
def here(tmp_path: Path) -> Iterator[Machine]:
    made = Machine(tmp_path)
    yield made
    for process in made.processes():
        process.kill()


def eventually(condition: Callable[[], bool], within_s: float = 20) -> bool:
    deadline = time.monotonic() + within_s
    while not condition() and time.monotonic() < deadline:
        time.sleep(0.05)
    return condition()


def test_up_starts_a_server_and_a_worker_and_down_leaves_nothing(here: Machine) -> None:
    # Given nothing
    assert here("ls").returncode == 5

    # When it is started
    up = here("up", "--cpu")
    assert up.returncode == 0, up.stderr
    assert "server started" in up.stdout
    assert "worker started: cpu" in up.stdout

    # Expect that commands find it, and that a second `up` changes nothing
    assert here("ls").returncode == 0
    before = {process.pid for process in here.processes()}
    again = here("up", "--cpu")
    assert "server is up already" in again.stdout
    assert "worker is up already" in again.stdout
    assert {process.pid for process in here.processes()} == before

    # When it is stopped
    down = here("down")
    assert down.returncode == 0, down.stderr
    assert "worker stopped" in down.stdout
    assert "server stopped" in down.stdout

    # Expect nothing left, and a second `down` that says so
    assert here.processes() == []
    assert not (here.data / "server.json").exists()
    assert not (here.data / "worker.json").exists()
    assert here("down").stdout == "nothing was up\n"


def test_a_data_folder_that_cannot_be_made_is_said_in_two_lines(here: Machine) -> None:
    (here.data.parent / "file").touch()
    for command in ("up", "down"):
        done = here(command, LORAQ_DATA_DIR=str(here.data.parent / "file" / "data"))

        assert done.returncode == 9
        what = f"cannot write in {here.data.parent / 'file' / 'data'}: Not a directory"
        assert done.stderr == f"{what}\nSet LORAQ_DATA_DIR to a folder of yours.\n"


def test_what_was_in_the_server_is_there_after_down_and_up(here: Machine) -> None:
    here("up", "--no-worker")
    redis.Redis.from_url(here.server.url).set("kept", "yes")
    here("down")
    here("up", "--no-worker")

    assert redis.Redis.from_url(here.server.url, decode_responses=True).get("kept") == "yes"
    here("down")


def test_a_server_that_was_killed_is_back_where_it_was_for_its_worker_and_whoever_follows(here: Machine) -> None:
    here("up", "--cpu")
    first = here.server
    at_work = {process.pid for process in here.processes()} - {first.pid}
    os.kill(first.pid, signal.SIGKILL)
    up = here("up", "--cpu")

    assert "server started" in up.stdout
    assert "worker is up already" in up.stdout
    assert here.server.url == first.url
    assert at_work <= {process.pid for process in here.processes()}
    before = time.time()
    assert eventually(lambda: all(w["seen_at"] > before for w in json.loads(here("workers", "--json").stdout)))
    here("down")
    assert here.processes() == []


def occupied(port: int) -> socket.socket:
    """Somebody listens there. Who looks for the server that was there may have it for a moment: a connection to a port
    where nobody listens can come from that very port.
    """
    deadline = time.monotonic() + 20
    while True:
        try:
            return socket.create_server(("127.0.0.1", port))
        except OSError:
            assert time.monotonic() < deadline
            time.sleep(0.01)


def test_where_the_port_of_a_killed_server_is_taken_server_and_worker_are_replaced(here: Machine) -> None:
    here("up", "--cpu")
    first = {process.pid for process in here.processes()}
    os.kill(here.server.pid, signal.SIGKILL)
    assert eventually(lambda: embedded.recorded(here.data / "server.json") is None)
    parts = urlsplit(json.loads((here.data / "server.json").read_text())["url"])
    with occupied(parts.port or 0):
        up = here("up", "--cpu")

    assert "worker started" in up.stdout
    assert urlsplit(here.server.url).port != parts.port
    assert urlsplit(here.server.url).password != parts.password, "whoever took the port may have been sent it"
    assert first.isdisjoint(process.pid for process in here.processes())
    here("down")
    assert here.processes() == []


def test_down_kills_a_worker_that_does_not_stop(here: Machine) -> None:
    here("up", "--cpu")
    worker = machine.recorded_worker(Settings(data_dir=here.data))
    assert worker is not None
    os.kill(worker.pid, signal.SIGSTOP)

    assert not worker.stop(deadline_s=0.5)
    here("down")
    assert eventually(lambda: here.processes() == [])


def test_the_password_is_for_the_user_only(here: Machine) -> None:
    here("up", "--cpu")
    password = here.server.url.removeprefix("redis://:").partition("@")[0]
    shown = [" ".join(process.cmdline()) for process in here.processes()]
    files = [file for file in here.data.rglob("*") if file.is_file() and password in file.read_text(errors="replace")]
    here("down")

    assert not any(password in line for line in shown)
    assert {file.name for file in files} == {"server.json", "valkey.conf"}
    assert all(stat.S_IMODE(file.stat().st_mode) == 0o600 for file in files if file.exists())


def test_a_worker_that_ends_at_its_start_is_an_error_with_its_last_words(settings: Settings) -> None:
    assert settings.redis_url
    started, process = machine.start_worker(settings, settings.redis_url, ["--no-such-option"], die_with_parent=True)

    with pytest.raises(MachineError, match="unrecognized arguments: --no-such-option"):
        machine.wait_until_registered(Client(settings), process, Path(started.log), {})


def test_worker_needs_a_server(here: Machine) -> None:
    worker = here("worker", "--cpu")

    assert worker.returncode == 5
    assert "loraq up" in worker.stderr


def test_worker_becomes_the_worker_and_drains_at_sigterm(here: Machine) -> None:
    here("up", "--no-worker")
    process = subprocess.Popen(here.command("worker", "--cpu"), env=here.environment, stderr=subprocess.PIPE)
    try:
        assert eventually(lambda: len(here.processes()) == 4)  # server, supervisor, cpu, control
        assert "gpu_worker.main" in psutil.Process(process.pid).cmdline()
        process.terminate()
        process.communicate(timeout=60)
    finally:
        process.kill()

    assert process.returncode == 0
    here("down")


@pytest.mark.parametrize(
    "options",
    [
        ["--cpu", "--gpu", "0"],
        ["--control-only", "--cpu"],
        ["--cpu", "--share", "mps"],
        ["--share", "off", "--slots", "2"],
    ],
)
def test_worker_refuses_options_that_exclude_each_other(here: Machine, options: list[str]) -> None:
    assert here("worker", *options).returncode == 2


def test_without_the_worker_extra_the_remedy_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "find_spec", lambda name: None)

    with pytest.raises(MachineError, match=r"loraq\[worker\]"):
        machine.require_worker_extra()
    with pytest.raises(MachineError, match=r"loraq\[control\]"):
        machine.require_control_extra()


def test_no_gpu_is_found_where_none_may_be_used(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")

    assert not machine.has_nvidia_gpu()


def test_gpus_are_named_with_their_memory_also_beside_one_that_is_lost(tmp_path: Path) -> None:
    (tmp_path / "0.json").write_text(json.dumps({"total": 80 * 2**30, "free": 0}))
    (tmp_path / "1.json").write_text(json.dumps({"error": "GPU_IS_LOST"}))
    fake = Path(__file__).parents[1] / "fake_nvml"
    paths = os.pathsep.join([str(fake), str(Path(__file__).parents[2])])
    environment = {**os.environ, "PYTHONPATH": paths, "FAKE_NVML": str(tmp_path), "CUDA_VISIBLE_DEVICES": "0,1"}
    script = "from cli import machine; print(*machine.gpu_names(), machine.has_nvidia_gpu(), sep='\\n')"
    ended = subprocess.run(
        [sys.executable, "-c", script], env=environment, cwd=tmp_path, capture_output=True, text=True, check=True
    )
    first, second, found = ended.stdout.splitlines()
    assert first == "NVIDIA Fake 80GB, 80 GiB"
    assert second.startswith("GPU 1, which does not answer (")
    assert found == "True"


def test_a_worker_sees_the_settings_of_the_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    given = Settings(data_dir=tmp_path, lease_s=70, model_roots=(Path("/models"), Path("/data")), owner="ann")
    environment = machine.worker_environment(given, "redis://:secret@host:1/0")
    for name, value in environment.items():
        if name.startswith("LORAQ_"):
            monkeypatch.setenv(name, value)
    seen = read_settings()

    assert seen == replace(given, redis_url="redis://:secret@host:1/0", storage=given.storage_url)
    assert json.loads(environment["LORAQ_MODEL_ROOTS"]) == ["/models", "/data"]


@pytest.mark.parametrize(
    ("url", "name"),
    [("redis://:p%40ss@host:1/0", "host:1/0"), ("redis://host/0", "host/0"), ("rediss://u:p@host", "host")],
)
def test_a_servers_name_has_no_password(url: str, name: str) -> None:
    assert machine.server_name(url) == name


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM, signal.SIGINT])
def test_nothing_of_the_demo_outlives_it(here: Machine, number: signal.Signals) -> None:
    process = subprocess.Popen(
        here.command("demo"),
        env=here.environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        # What a shell starts in the background ignores it, as these tests then would.
        preexec_fn=partial(signal.signal, signal.SIGINT, signal.SIG_DFL),
    )
    assert process.stdout is not None
    lines = [process.stdout.readline() for _ in range(3)]
    assert lines[2].startswith("submitted"), lines
    inside = psutil.Process(process.pid).children(recursive=True)
    process.send_signal(number)
    process.communicate(timeout=60)

    assert len(inside) >= 4
    assert eventually(lambda: not any(one.is_running() and one.status() != "zombie" for one in inside))
    if number != signal.SIGKILL:
        assert not list(here.data.parent.glob("loraq-demo-*"))
