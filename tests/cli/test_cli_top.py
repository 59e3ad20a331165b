"""`loraq top`: one frame as text or JSON, and the display as it is on a terminal."""

from __future__ import annotations

import contextlib
import fcntl
import io
import json
import os
import pty
import re
import signal
import struct
import subprocess
import sys
import termios
import threading
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from cli_fakes import make_job
from click.testing import CliRunner
from helpers import RestartableServer, must_claim, new_job, restartable_server, submit, wait_for
from rich.console import Console
from rich.text import Text

from cli import top as top_module
from cli.main import loraq
from cli.top_frame import frame, shares
from jobqueue.job import JobState, WorkerInfo
from jobqueue.memory import GIB
from jobqueue.overview import Overview, Waiting
from jobqueue.store import Store

ROOT = Path(__file__).parents[2]
INFO = {"host": "box", "device": "NVIDIA H100", "uuid": "GPU-1", "usable_bytes": 78 * GIB, "slots": 4, "running": [],
        "every_s": 60, "total_bytes": 80 * GIB, "used_bytes": 31 * GIB, "utilization": 97}  # fmt: skip
START_S = 20.0


def overview(running: int = 3, waiting: int = 3, **changes: Any) -> Overview:
    progress = {"phase": "train", "step": 5, "steps": 20, "loss": 1.25, "tokens_per_s": 5123.4,
                "seconds_per_step": 60.0, "peak_bytes": 3 * GIB, "promised_bytes": 5 * GIB}  # fmt: skip
    worker = WorkerInfo(
        "athene/gpu0", "athene", "NVIDIA H100 80GB HBM3", "GPU-1", 78 * GIB, 4, ("b.0",), 0.0, alive=True
    )
    load = {"total_bytes": 80 * GIB, "used_bytes": 31 * GIB, "promised_bytes": 40 * GIB, "utilization": 97,
            "temperature_c": 62, "power_w": 412.0, "power_limit_w": 700.0}  # fmt: skip
    sick = replace(
        worker, id="athene/gpu1", note="sick: Xid 79 at 12:03, GPU has fallen off the bus", running=(), takes_jobs=False
    )
    control = replace(worker, id="athene/control", device="control", uuid="")
    jobs = [
        make_job(f"b.{n}", JobState.RUNNING, trial="r=8", worker="athene/gpu0", progress=progress)
        for n in range(running)
    ]
    queue = [Waiting(make_job(f"w.{n}", JobState.QUEUED), "a slot") for n in range(waiting)]
    counts = {JobState.RUNNING: running, JobState.QUEUED: waiting, JobState.HELD: 0, JobState.WAITING: 0}
    ended = {JobState.SUCCEEDED: 14, JobState.FAILED: 1}
    workers = (replace(worker, **load), replace(sick, **load), control)
    seen = Overview(1.0, "", "", workers, (), counts, {"gpu8": waiting}, ended, tuple(jobs), tuple(queue), 7800.0)
    return replace(seen, **changes)


def drawn(seen: Overview, width: int, height: int | None = None) -> list[str]:
    out = Console(width=width, height=height or 50, force_terminal=True, color_system=None, file=io.StringIO())
    out.print(frame(out, seen, [Text("head")], height))
    return out.file.getvalue().splitlines()  # type: ignore[attr-defined,no-any-return]


@pytest.mark.parametrize("width", [40, 60, 80, 120, 200])
def test_a_frame_fits_the_terminal_and_says_what_matters_first(width: int) -> None:
    lines = drawn(overview(), width)
    text = "\n".join(lines)

    assert all(len(line) <= width for line in lines)
    for part in ("athene/gpu0", "97%", "sick: Xid", "b.2", "5/20", "15 min", "w.2", "a slot", "3 queued, 3 running"):
        assert part in text
    wide = {"31.0/80.0 GiB": 60, "3.0/5.0 GiB": 60, "5,123": 80, "40.0 GiB": 80, "62 °C": 200, "412/700 W": 200}
    assert {part: part in text for part in wide} == {part: width >= least for part, least in wide.items()}
    assert "all done in about 2 h 10 min" in " ".join(text.split())
    assert "athene/control" not in text


def test_a_server_that_was_started_anew_is_told_while_nothing_starts() -> None:
    said = "the server was started anew: nothing starts for 35 s"
    assert said in "\n".join(drawn(overview(quiet_s=35), 100))
    assert said not in "\n".join(drawn(overview(), 100))


@pytest.mark.parametrize("height", [3, 8, 12, 16, 24, 100])
def test_a_frame_is_as_high_as_the_terminal_and_says_how_much_more_there_is(height: int) -> None:
    lines = drawn(overview(running=50, waiting=3000, queue=overview(waiting=40).queue), 100, height)

    assert len(lines) <= max(height, 7)
    for begins, what, count in (("b.", "running jobs", 50), ("w.", "waiting jobs", 3000)):
        shown = [n for n, line in enumerate(lines) if line.startswith(begins)]
        if shown and len(shown) < count:
            assert lines[shown[-1] + 1].rstrip() == f"and {count - len(shown):,} more"
        elif not shown:
            assert f"{count:,} {what}" in map(str.rstrip, lines)


@pytest.mark.parametrize(
    ("room", "wanted", "given"),
    [(10, [2, 3, 4], [2, 3, 4]), (6, [2, 9, 9], [2, 2, 2]), (7, [1, 9, 9], [1, 3, 3]), (0, [1, 1], [0, 0]),
     (-3, [5], [0])],
)  # fmt: skip
def test_lines_are_shared_out_evenly(room: int, wanted: list[int], given: list[int]) -> None:
    assert shares(room, wanted) == given


def test_what_happens_is_news_and_that_a_worker_still_lives_is_not() -> None:
    seen = overview()
    later = replace(
        seen, now=9.0, workers=tuple(replace(worker, seen_at=9.0, utilization=3) for worker in seen.workers)
    )

    assert top_module._happens(seen) == top_module._happens(later)
    assert top_module._happens(seen) != top_module._happens(overview(waiting=4))


# -- with a server


def _on_its_terminal() -> None:
    fcntl.ioctl(0, termios.TIOCSCTTY, 0)
    signal.signal(
        signal.SIGINT, signal.SIG_DFL
    )  # tests that run in the background of a shell inherit that it is ignored


class Shown:
    """`loraq top` on a terminal of its own."""

    def __init__(self, url: str, folder: Path, *options: str, columns: int = 100, lines: int = 30) -> None:
        self._terminal, inner = pty.openpty()
        self.resize(columns, lines, inner)
        self.modes = termios.tcgetattr(inner)
        environment = {name: value for name, value in os.environ.items() if name not in ("COLUMNS", "LINES")}
        environment |= {"LORAQ_REDIS_URL": url, "LORAQ_DATA_DIR": str(folder), "LORAQ_TIMEOUT_S": "1",
                        "TERM": "xterm-256color", "PYTHONPATH": str(ROOT), "NO_COLOR": "1"}  # fmt: skip
        command = [sys.executable, "-P", "-m", "cli.main", "top", "--interval", "0.2", *options]
        self.process = subprocess.Popen(
            command, env=environment, stdin=inner, stdout=inner, stderr=inner, start_new_session=True,
            preexec_fn=_on_its_terminal,
        )  # fmt: skip
        self._inner, self._said = inner, b""
        threading.Thread(target=self._read, daemon=True).start()

    def _read(self) -> None:
        with contextlib.suppress(OSError):
            while said := os.read(self._terminal, 65536):
                self._said += said

    @property
    def frames(self) -> list[str]:
        """Each begins where the cursor goes home; without colours."""
        return [
            re.sub(r"\x1b\[[\d;?]*[a-zA-Z]", "", part) for part in self._said.decode(errors="replace").split("\x1b[H")
        ]

    def shows(self, text: str, seconds: float = START_S) -> str:
        """The first whole frame from now on that has it."""
        known = len(self.frames) - 1
        return wait_for(
            lambda: next((f for f in self.frames[known:-1] if text in f), ""), seconds, f"{text!r} is shown"
        )

    def size(self) -> tuple[int, int]:
        """Columns and lines of the last whole frame."""
        lines = self.frames[-2].splitlines() if len(self.frames) > 1 else []
        return max(map(len, lines), default=0), len(lines)

    def press(self, keys: str) -> None:
        os.write(self._terminal, keys.encode())

    def resize(self, columns: int, lines: int, inner: int | None = None) -> None:
        fcntl.ioctl(inner or self._terminal, termios.TIOCSWINSZ, struct.pack("HHHH", lines, columns, 0, 0))

    def ended(self) -> int:
        return self.process.wait(START_S)

    def left_as_it_was(self) -> bool:
        """The terminal: its modes, its cursor, and what was on it before."""
        said = self._said.rpartition(b"\x1b[?1049l")
        return termios.tcgetattr(self._inner)[3] == self.modes[3] and bool(said[1]) and b"\x1b[?25h" in self._said

    def close(self) -> None:
        self.process.kill()
        self.process.wait()
        os.close(self._inner)


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RestartableServer]:
    """Of this module, as it is stopped and started."""
    with restartable_server(tmp_path_factory.mktemp("server")) as running:
        yield running


@pytest.fixture
def store(server: RestartableServer) -> Iterator[Store]:
    opened = Store(server.url)
    opened._redis.flushall()
    submit(opened, new_job("b.1"), new_job("b.2"))
    must_claim(opened, worker="box/gpu0")
    opened.heartbeat("box/gpu0", "gpu", INFO)
    yield opened
    opened.close()


@pytest.fixture
def shown(server: RestartableServer, store: Store, tmp_path: Path) -> Iterator[Shown]:
    made = Shown(server.url, tmp_path)
    try:
        yield made
    finally:
        made.close()


@pytest.mark.parametrize("end", ["q", "Q", "\x03"])
def test_keys_end_it_and_leave_the_terminal_as_it_was(shown: Shown, end: str) -> None:
    shown.shows("b.2")
    shown.press(end)

    assert shown.ended() == 0
    wait_for(shown.left_as_it_was, 5, "the terminal is as before")


def test_a_signal_that_ends_it_leaves_the_terminal_as_it_was(shown: Shown) -> None:
    shown.shows("b.2")
    shown.process.send_signal(signal.SIGTERM)

    assert shown.ended() == 128 + signal.SIGTERM
    wait_for(shown.left_as_it_was, 5, "the terminal is as before")


def test_it_is_refreshed_and_fits_the_terminal_whatever_becomes_of_that(shown: Shown, store: Store) -> None:
    assert "97%" in shown.shows("1 queued, 1 running")
    submit(store, new_job("later.1"))
    shown.shows("later.1")
    for columns, lines in ((40, 12), (20, 4), (130, 30)):
        shown.resize(columns, lines)
        wait_for(lambda c=columns, n=lines: shown.size() == (c, n), START_S, f"{lines} lines of {columns} columns")
    assert "b.1" in shown.shows("later.1")


def test_it_outlives_the_server_and_hears_keys_meanwhile(shown: Shown, server: RestartableServer, store: Store) -> None:
    shown.shows("1 queued, 1 running")
    server.end()
    away = shown.shows("no answer since")
    assert "b.1" in away, "with what was known"
    server.start()
    back = wait_for(lambda: next((f for f in shown.frames[-2:-1] if "no answer" not in f), ""), START_S, "it goes on")
    assert "b.1" in back

    server.tell(signal.SIGSTOP)
    try:
        shown.shows("no answer since")
        shown.press("q")
        assert shown.process.wait(5) == 0, "though the server hangs"
    finally:
        server.tell(signal.SIGCONT)


def test_where_nothing_happens_the_server_is_asked_seldom_until_a_key_is_pressed(
    server: RestartableServer, store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(top_module, "CALM_S", 0.2)
    monkeypatch.setattr(top_module, "SLOW_S", 600.0)
    looked: list[Overview] = []

    def look() -> Overview:
        looked.append(store.overview("", "", 10))
        return looked[-1]

    looks = top_module._Looks(look, look(), 0.02)
    assert looks.pause_s == 0.02
    wait_for(lambda: looks.pause_s == 600.0, 5, "nothing has happened")
    for _ in range(2):  # the first may come before it has begun to wait
        known = len(looked)
        looks.now()
        wait_for(lambda known=known: len(looked) > known, 5, "it looks at once")
    assert looks.pause_s == 0.02, "and often again"


def run(server: RestartableServer, *words: str) -> Any:
    return CliRunner().invoke(loraq, ["top", *words], env={"LORAQ_REDIS_URL": server.url}, prog_name="loraq")


def test_into_a_pipe_it_prints_one_frame(server: RestartableServer, store: Store) -> None:
    piped, once = run(server), run(server, "--once")

    assert piped.exit_code == once.exit_code == 0
    for part in ("1 queued, 1 running", "box/gpu0", "97%", "31.0/80.0 GiB", "b.1", "b.2", "its turn"):
        assert part in piped.stdout
    assert "\x1b" not in piped.stdout
    assert len(piped.stdout.splitlines()) == len(once.stdout.splitlines())


def test_json_has_the_same_without_what_is_not_looked_at(server: RestartableServer, store: Store) -> None:
    found = json.loads(run(server, "--json").stdout)

    assert found["counts"] == {"running": 1, "queued": 1, "held": 0, "waiting": 0}
    assert found["workers"][0]["utilization"] == 97
    assert [job["id"] for job in found["running"]] == ["b.1"]
    assert [(waiting["job"]["id"], waiting["waits_for"]) for waiting in found["queue"]] == [("b.2", "its turn")]
    assert not {"spec", "outcome", "history"} & found["running"][0].keys()


def test_filters(server: RestartableServer, store: Store) -> None:
    submit(store, new_job("c.1", owner="bob"))

    assert [
        waiting["job"]["id"] for waiting in json.loads(run(server, "--json", "--owner", "bob").stdout)["queue"]
    ] == ["c.1"]
    assert json.loads(run(server, "--json", "--host", "box").stdout)["running"]
    nobody = run(server, "--host", "bux")
    assert (nobody.exit_code, nobody.stdout) == (6, "")
    assert "box" in nobody.stderr, "which is close"


def test_no_server_at_first_is_an_error(server: RestartableServer) -> None:
    result = CliRunner().invoke(loraq, ["top", "--once"], env={"LORAQ_REDIS_URL": "redis://127.0.0.1:1/0"})

    assert (result.exit_code, result.stdout) == (5, "")
