"""The guardian as a process: it ends a trainer and all that it started, whoever else dies."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import tempfile
import textwrap
import time
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest
from helpers import wait_for

from gpu_worker import guardian
from gpu_worker.marks import MARK, marked

GRACE_S = 0.4
DEAF = "import signal; signal.signal(signal.SIGTERM, signal.SIG_IGN); signal.signal(signal.SIGINT, signal.SIG_IGN)"
WAIT = "print('up', flush=True); import time; time.sleep(600)"
CHILD = f"""
import subprocess, sys
subprocess.Popen([sys.executable, "-c", "{DEAF}; import time; time.sleep(600)"], start_new_session=True)
"""
# a daemon: its parent is gone, so that it belongs to the nearest subreaper
DAEMON = """
import os
if os.fork() == 0:
    os.setsid()
    if os.fork() == 0:
        import signal, time
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        time.sleep(600)
    os._exit(0)
os.wait()
"""


class Guarded:
    """A guardian over a trainer that runs `code`."""

    def __init__(self, code: str, grace_s: float) -> None:
        self.mark = uuid.uuid4().hex
        request, self._request = os.pipe()
        self._events, events = os.pipe()
        command = [sys.executable, "-P", "-S", guardian.__file__, str(grace_s), str(request), str(events)]
        self.process = subprocess.Popen(
            [*command, sys.executable, "-c", textwrap.dedent(code)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            pass_fds=[request, events],
            env={**os.environ, MARK: self.mark},
            start_new_session=True,
        )
        os.close(request)
        os.close(events)

    def up(self, processes: int = 2) -> Guarded:
        """When the trainer has said so and all of its children are there, the guardian counted."""
        assert self.process.stdout is not None
        assert self.process.stdout.readline() == b"up\n"
        wait_for(lambda: len(self.left()) == processes, 10, f"{processes} processes are there")
        return self

    def say(self, line: str) -> None:
        assert self.process.stdin is not None
        self.process.stdin.write(line.encode() + b"\n")
        self.process.stdin.flush()

    def let_go(self) -> None:
        assert self.process.stdin is not None
        self.process.stdin.close()

    def left(self) -> list[psutil.Process]:
        return marked(self.mark)

    def end(self, seconds: float = 10) -> int:
        return self.process.wait(seconds)

    def close(self) -> None:
        for process in self.left():
            with contextlib.suppress(psutil.Error):
                process.kill()
        self.process.wait(5)
        for stream in (self.process.stdin, self.process.stdout):
            assert stream is not None
            with contextlib.suppress(BrokenPipeError):
                stream.close()
        os.close(self._request)
        os.close(self._events)


Guard = Callable[..., Guarded]


@pytest.fixture
def guard() -> Iterator[Guard]:
    opened: list[Guarded] = []

    def make(code: str, grace_s: float = GRACE_S) -> Guarded:
        opened.append(Guarded(code, grace_s))
        return opened[-1]

    yield make
    for each in opened:
        each.close()


def test_at_the_deadline_a_deaf_trainer_is_killed_with_its_deaf_child_in_another_session(guard: Guard) -> None:
    guarded = guard(f"{DEAF}{CHILD}{WAIT}").up(3)
    guarded.say(f"deadline {guardian.now() + 0.3!r}")
    began = time.monotonic()

    assert guarded.end() == 128 + signal.SIGKILL
    assert 0.2 < time.monotonic() - began < 2
    assert guarded.left() == []


def test_a_deadline_that_was_moved_on_kills_nobody(guard: Guard) -> None:
    guarded = guard(WAIT).up()
    early = guardian.now() + 0.2
    guarded.say(f"deadline {early!r}")
    guarded.say("deadline inf")

    wait_for(lambda: guardian.now() > early + 0.3, 5, "the first deadline has passed")
    assert guarded.process.poll() is None
    assert len(guarded.left()) == 2


def test_when_its_worker_is_gone_everything_is_killed_at_once(guard: Guard) -> None:
    guarded = guard(f"{DEAF}{CHILD}{WAIT}", grace_s=60).up(3)
    began = time.monotonic()
    guarded.let_go()

    assert guarded.end() == 128 + signal.SIGKILL
    assert time.monotonic() - began < 2
    assert guarded.left() == []


def test_a_daemon_that_left_the_session_and_lost_its_parent_dies_too(guard: Guard) -> None:
    guarded = guard(f"{DAEMON}{WAIT}").up(3)
    guarded.let_go()

    guarded.end()
    assert guarded.left() == []


def test_kill_9_of_the_guardian_takes_the_trainer_along(guard: Guard) -> None:
    guarded = guard(f"{DEAF}; {WAIT}").up()
    guarded.process.kill()

    assert guarded.end() == -signal.SIGKILL
    wait_for(lambda: guarded.left() == [], 2, "nothing is left")


def test_stop_lets_a_trainer_end_in_its_own_way(guard: Guard) -> None:
    polite = "import signal, sys; signal.signal(signal.SIGTERM, lambda *_: sys.exit(7))"
    guarded = guard(f"{polite}\n{WAIT}", grace_s=60).up()
    guarded.say("stop")

    assert guarded.end() == 7


def test_stop_kills_a_deaf_trainer_after_the_grace_time_and_not_before(guard: Guard) -> None:
    guarded = guard(f"{DEAF}\n{WAIT}").up()
    guarded.say("stop")
    began = time.monotonic()

    assert guarded.end() == 128 + signal.SIGKILL
    assert GRACE_S * 0.8 < time.monotonic() - began < GRACE_S + 2


def test_a_stop_said_again_does_not_lengthen_the_grace_time(guard: Guard) -> None:
    guarded = guard(f"{DEAF}\n{WAIT}").up()
    began = time.monotonic()

    def stopped() -> bool:
        with contextlib.suppress(BrokenPipeError):
            guarded.say("stop")
        return guarded.process.poll() is not None

    wait_for(stopped, GRACE_S + 2, "it has ended though somebody went on saying stop")
    assert time.monotonic() - began > GRACE_S * 0.8


@pytest.mark.parametrize(("code", "expected"), [("raise SystemExit(3)", 3), ("", 0), ("import os; os.abort()", 134)])
def test_the_trainers_end_is_passed_on_and_what_it_left_behind_is_killed(
    guard: Guard, code: str, expected: int
) -> None:
    guarded = guard(f"{CHILD}\n{code}")

    assert guarded.end() == expected
    assert guarded.left() == []


def test_a_trainer_that_was_killed_leaves_no_temporary_files(guard: Guard) -> None:
    guarded = guard(f"import os, tempfile; print(tempfile.mkdtemp(), flush=True)\n{WAIT}")
    left = Path(guarded.process.stdout.readline().decode().strip())
    guarded.up()
    assert left.is_dir()
    guarded.let_go()
    guarded.end()

    assert not left.exists()
    assert left.parent != Path(tempfile.gettempdir())
    assert not left.parent.exists()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_to_the_guardian_is_not_its_workers_word(guard: Guard, number: signal.Signals) -> None:
    guarded = guard(WAIT).up()
    guarded.process.send_signal(number)
    guarded.say("stop")

    assert guarded.end() == 128 + signal.SIGTERM, "the trainer was ended by `stop`, the guardian had gone on"


def test_a_trainer_can_be_stopped_by_sigterm_though_its_guardian_ignores_it(guard: Guard) -> None:
    guarded = guard("import signal; print(signal.getsignal(signal.SIGTERM) == signal.SIG_DFL)")

    assert guarded.process.stdout.read() == b"True\n"
