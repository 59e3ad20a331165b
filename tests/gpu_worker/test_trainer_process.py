"""A trainer as its worker holds it: what it prints and reports arrives whole and in order, and it ends when told."""

from __future__ import annotations

import os
import py_compile
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable, Iterator
from importlib.machinery import PathFinder
from pathlib import Path

import pytest
from helpers import wait_for

from gpu_worker import guardian, trainer_process
from gpu_worker.gpu import Device
from gpu_worker.marks import marked
from gpu_worker.protocol import Failed, Progress, Ready, Request, Result
from gpu_worker.trainer_process import (
    MAX_LINE,
    Ended,
    LogLine,
    Message,
    TrainerProcess,
    trainer_environment,
    worker_cache,
)

HEAD = """\
import json, os, sys
out = os.fdopen(int(os.environ["LORAQ_EVENTS_FD"]), "wb", buffering=0)
def say(**fields): sys.stdout.flush(); out.write(json.dumps(fields).encode() + b"\\n")
def raw(data): sys.stdout.buffer.write(data); sys.stdout.buffer.flush()
"""
REQUEST = Request("b.1", {"base_model": "m"}, "/nowhere")

Start = Callable[..., TrainerProcess]


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Start]:
    """Starts a trainer that runs `code`."""
    started: list[TrainerProcess] = []

    def make(code: str, grace_s: float = 0.3) -> TrainerProcess:
        command = [sys.executable, "-c", HEAD + textwrap.dedent(code)]
        started.append(TrainerProcess(command, trainer_environment("cpu", tmp_path), tmp_path, grace_s))
        return started[-1]

    yield make
    for trainer in started:
        trainer.kill()
        assert marked(trainer.mark) == []


def hear(trainer: TrainerProcess, until: type[object] = Ended, seconds: float = 15) -> list[Message]:
    """Everything up to the first message of that type."""
    found: list[Message] = []

    def heard() -> bool:
        found.extend(trainer.messages(0.2))
        return any(isinstance(message, until) for message in found)

    wait_for(heard, seconds, f"a message {until.__name__}")
    return found


def log(messages: list[Message]) -> list[str]:
    return [message.text for message in messages if isinstance(message, LogLine)]


def test_a_trainer_does_one_job_after_the_other(start: Start) -> None:
    trainer = start("""
        say(type="ready", versions={"python": "3"})
        for line in sys.stdin:
            job = json.loads(line)["job_id"]
            print("doing", job)
            say(type="progress", phase="train", step=1)
            say(type="result", outcome={"job": job})
    """)
    assert hear(trainer, Ready) == [Ready({"python": "3"})]

    for job in ("b.1", "b.2"):
        trainer.send(Request(job, {}, "/nowhere"))
        heard = hear(trainer, Result)
        assert heard == [LogLine(f"doing {job}"), Progress("train", step=1), Result({"job": job})]


def test_the_log_is_complete_and_in_order_before_the_result(start: Start) -> None:
    trainer = start("""
        for n in range(20000):
            print("line", n)
        say(type="result", outcome={})
        print("after")
    """)
    heard = hear(trainer)

    result = heard.index(Result({}))
    assert log(heard[:result])[:20000] == [f"line {n}" for n in range(20000)]
    assert log(heard)[20000:] == ["after"]
    assert heard[-1] == Ended(0)


def test_what_children_print_and_standard_error_are_in_the_log_too(start: Start) -> None:
    trainer = start("""
        import subprocess
        print("one", flush=True)
        subprocess.run(["sh", "-c", "echo two; echo three >&2"])
        print("four", file=sys.stderr)
    """)

    assert log(hear(trainer)) == ["one", "two", "three", "four"]


@pytest.mark.parametrize(
    ("data", "lines"),
    [
        (rb"10%\r50%\r100%\nnext\n", ["100%", "next"]),
        (rb"windows\r\n", ["windows"]),
        (rb"10%\r100%\r\n", ["100%"]),
        (rb"\xff\xfe binary \x00\x1b[31m\n", ["\ufffd\ufffd binary \x00\x1b[31m"]),
        (rb"\xe6\xbc\xa2\n", ["漢"]),
        (rb"\n \n\nblank lines go\n", ["blank lines go"]),
        (rb"no newline at the end", ["no newline at the end"]),
        (rb"50%\rno newline", ["no newline"]),
        (b"x" * 9000 + rb"\nnext\n", ["x" * MAX_LINE, "next"]),
    ],
)
def test_a_log_line_is_what_a_terminal_would_have_shown_last(start: Start, data: bytes, lines: list[str]) -> None:
    trainer = start(f"raw(b'{data.decode()}')")

    assert log(hear(trainer)) == lines


def test_a_character_that_is_cut_in_two_by_the_pipe_arrives_whole(start: Start) -> None:
    trainer = start("""
        raw(b"\\xe6\\xbc")
        say(type="progress", phase="load")
        sys.stdin.readline()
        raw(b"\\xa2\\n")
    """)
    hear(trainer, Progress)
    trainer.send(REQUEST)

    assert log(hear(trainer)) == ["漢"]


@pytest.mark.parametrize(
    "junk", ["hello", "{", "[]", "3", '{"type": "unknown"}', '{"type": []}', '{"type": "result"}', "\\xff\\xfe"]
)
def test_junk_where_events_belong_is_a_log_line_and_not_the_end(start: Start, junk: str) -> None:
    trainer = start(f"""
        print("before")
        sys.stdout.flush()
        out.write(b'{junk}' + b"\\n")
        say(type="result", outcome={{"fine": 1}})
    """)
    heard = hear(trainer)

    assert Result({"fine": 1}) in heard
    assert log(heard)[0] == "before"
    assert log(heard)[1].startswith("not an event: ")


def test_half_an_event_of_a_trainer_that_was_killed_does_not_hide_how_it_ended(start: Start) -> None:
    trainer = start("""
        out.write(b'{"type": "result", "outco')
        os.kill(os.getpid(), 9)
    """)
    heard = hear(trainer)

    assert heard[-1] == Ended(137)
    assert not [message for message in heard if isinstance(message, (Result, Failed))]


def test_a_result_larger_than_the_pipe_arrives_whole(start: Start) -> None:
    trainer = start("""say(type="result", outcome={"text": "y" * 3_000_000})""")

    [result] = [message for message in hear(trainer) if isinstance(message, Result)]
    assert len(result.outcome["text"]) == 3_000_000


def test_a_request_larger_than_the_pipe_keeps_nobody_waiting_and_arrives_whole(start: Start) -> None:
    trainer = start("""
        import time
        time.sleep(2)
        say(type="result", outcome={"length": len(json.loads(sys.stdin.readline())["spec"]["prompts"])})
    """)
    began = time.monotonic()
    trainer.send(Request("b.1", {"prompts": "x" * 1_000_000}, "/nowhere"))
    assert time.monotonic() - began < 1

    assert Result({"length": 1_000_000}) in hear(trainer, Result)


def test_a_trainer_that_ends_without_reading_a_large_request_is_heard_of(start: Start) -> None:
    trainer = start("import time; time.sleep(0.5)")
    trainer.send(Request("b.1", {"prompts": "x" * 1_000_000}, "/nowhere"))

    assert hear(trainer) == [Ended(0)]


def test_a_trainer_that_floods_its_log_leaves_its_worker_time_to_stop_it(start: Start) -> None:
    trainer = start("""
        import subprocess
        subprocess.run(["yes", "again and again"])
    """)
    longest = 0.0
    for _ in range(5):
        began = time.monotonic()
        trainer.messages(0.5)
        longest = max(longest, time.monotonic() - began)
    trainer.stop()

    assert longest < 3
    assert isinstance(hear(trainer)[-1], Ended)


def test_a_line_that_never_ends_does_not_fill_the_memory(start: Start) -> None:
    trainer = start("""
        for n in range(200):
            raw(b"z" * 100_000)
        say(type="progress", phase="load")
        sys.stdin.readline()
        raw(b" end\\n")
    """)
    hear(trainer, Progress)

    assert len(trainer._rest[trainer._log]) <= 1 << 16
    trainer.send(REQUEST)
    assert log(hear(trainer)) == ["z" * MAX_LINE]


def test_the_last_state_of_a_bar_without_a_newline_is_kept_however_long_it_ran(start: Start) -> None:
    trainer = start("""
        for n in range(20001):
            raw(b"\\rstep %d of 20000" % n)
        raw(b"\\n")
    """)

    assert log(hear(trainer)) == ["step 20000 of 20000"]


def test_the_end_is_told_once_with_how_it_came(start: Start) -> None:
    trainer = start("os.kill(os.getpid(), 9)")

    assert hear(trainer) == [Ended(128 + signal.SIGKILL)]
    assert trainer.messages(0) == []
    assert str(Ended(137)) == ("the trainer was ended by SIGKILL (by hand, or by the kernel for want of memory)")
    assert str(Ended(3)) == "the trainer ended with exit code 3"


def test_sending_to_a_trainer_that_is_gone_raises_and_telling_does_not(start: Start) -> None:
    trainer = start("")
    wait_for(lambda: trainer.guardian.poll() is not None, 10, "the trainer has ended")

    with pytest.raises(BrokenPipeError):
        trainer.send(REQUEST)
    trainer.stop()
    trainer.set_deadline(guardian.now())
    assert hear(trainer) == [Ended(0)]


def test_what_went_wrong_before_there_was_a_job_is_in_the_worker_s_log(
    start: Start, caplog: pytest.LogCaptureFixture
) -> None:
    trainer = start("""
        print("nobody asks for this")
        say(type="ready", warning="it is cold")
        sys.stdin.read()
    """)
    wait_for(lambda: trainer.alive() and bool(caplog.records), 10, "it is ready")
    assert [record.getMessage() for record in caplog.records] == ["a spare trainer: it is cold"]


def test_a_trainer_that_cannot_be_started_leaves_no_pipe_open(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A host without memory for a process tries again for hours, and has no file left when it could go on."""

    def no_memory(*_: object, **__: object) -> None:
        raise BlockingIOError(11, "Resource temporarily unavailable")

    before = os.listdir("/proc/self/fd")
    monkeypatch.setattr(subprocess, "Popen", no_memory)
    with pytest.raises(BlockingIOError):
        TrainerProcess(["true"], {}, tmp_path, 1)

    assert len(os.listdir("/proc/self/fd")) == len(before)


def test_kill_ends_a_deaf_trainer_and_its_child_and_may_be_said_twice(start: Start) -> None:
    trainer = start("""
        import signal, subprocess, time
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        subprocess.Popen(["sleep", "600"], start_new_session=True)
        say(type="ready")
        time.sleep(600)
    """)
    hear(trainer, Ready)
    wait_for(lambda: len(marked(trainer.mark)) == 3, 10, "the guardian, the trainer and its child are seen")
    descriptors = len(os.listdir("/proc/self/fd"))

    assert trainer.kill() == 137
    assert marked(trainer.mark) == []
    assert trainer.kill() == 137
    assert len(os.listdir("/proc/self/fd")) < descriptors


def test_after_kill_9_of_the_guardian_the_end_is_told_when_nothing_is_left(start: Start) -> None:
    trainer = start("""
        import signal, subprocess, time
        subprocess.Popen(["sh", "-c", "trap '' TERM; sleep 600"], start_new_session=True)
        say(type="ready")
        time.sleep(600)
    """)
    hear(trainer, Ready)
    trainer.guardian.kill()

    assert hear(trainer)[-1] == Ended(137)
    assert marked(trainer.mark) == []


def test_hosts_that_share_a_home_do_not_share_what_is_a_machine_s_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each worker that began cleared the scratch of the other hosts' jobs."""
    identity, found = tmp_path / "machine-id", set()
    monkeypatch.setattr(trainer_process, "MACHINE", identity)
    for machine in ("3d1219c7c4c5404aaa1f6d2a48adfda4\n", "0f0f0f0f0f0f404aaa1f6d2a48adfda4\n", ""):
        identity.write_text(machine)
        found.add(worker_cache(tmp_path, Device("gpu", "a GPU", index=0)))
    identity.unlink()
    assert len(found) == 3
    assert worker_cache(tmp_path, Device("gpu", "a GPU", index=0)) in found, (
        "in containers one for all that start there"
    )


def test_trainers_keep_what_they_compile_where_the_environment_forbids_it_beside_the_source(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """In a container each of sixteen trainers compiled all of torch and Unsloth anew, half a minute of a core each."""
    source = tmp_path / "site" / "torch"
    source.mkdir(parents=True)
    (source / "__init__.py").write_text("")
    monkeypatch.syspath_prepend(str(source.parent))
    monkeypatch.setattr(trainer_process, "find_spec", PathFinder.find_spec)  # not by what this process has imported
    importing = [sys.executable, "-c", "import torch"]

    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    monkeypatch.setenv("PYTHONDONTWRITEBYTECODE", "1")
    environment = trainer_environment("cpu", tmp_path / "cache")
    subprocess.run(importing, env={**environment, "PYTHONPATH": str(source.parent)}, check=True)
    assert list((tmp_path / "cache" / "bytecode").rglob("torch/__init__.*.pyc"))
    assert not list(source.rglob("*.pyc"))

    py_compile.compile(str(source / "__init__.py"))  # as pip does when it installs
    monkeypatch.setattr(sys, "dont_write_bytecode", False)
    assert "PYTHONPYCACHEPREFIX" not in trainer_environment("cpu", tmp_path / "cache")


def test_bytecode_of_other_packages_is_neither_used_nor_kept(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Images may give all files one time: a new version's source then looks like the old one's, where it is as long."""
    site, cache = tmp_path / "site", tmp_path / "cache"
    (site / "torch").mkdir(parents=True)
    monkeypatch.syspath_prepend(str(site))
    monkeypatch.setattr(trainer_process, "find_spec", PathFinder.find_spec)
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    says = []
    for version in ("2.9.0", "2.9.1"):
        for old in site.glob("*.dist-info"):
            old.rmdir()
        (site / f"torch-{version}.dist-info").mkdir()
        source = site / "torch" / "__init__.py"
        source.write_text(f"print('{version}')")
        os.utime(source, (0, 0))
        environment = {**trainer_environment("cpu", cache), "PYTHONPATH": str(site)}
        importing = subprocess.run(
            [sys.executable, "-c", "import torch"], env=environment, capture_output=True, text=True
        )
        says.append(importing.stdout)

    assert says == ["2.9.0\n", "2.9.1\n"]
    assert len(list(cache.rglob("torch/__init__.*.pyc"))) == 1
