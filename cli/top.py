"""`loraq top`: the whole cluster, refreshed in place, also through a server's restart."""

from __future__ import annotations

import contextlib
import os
import select
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

import click

from cli import complete
from cli.main import connect

if TYPE_CHECKING:
    from rich.console import Console
    from rich.text import Text

    from jobqueue.overview import Overview

CALM_S, SLOW_S = 60.0, 10.0
"""Where nothing has happened for so long, the server is asked so seldom, until a key is pressed."""


@click.command()
@click.option("--once", is_flag=True, help="Print one frame and end; so does an output that is no terminal.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON document.")
@click.option(
    "--interval", type=click.FloatRange(0.2), default=2.0, show_default=True, help="Seconds between two looks."
)
@click.option("--owner", default="", help="Only the jobs of one owner.")
@click.option(
    "--host", metavar="WORKER|HOST", default="", shell_complete=complete.workers, help="Only one host, or worker."
)
def top(once: bool, as_json: bool, interval: float, owner: str, host: str) -> None:
    """Show workers, what runs and what waits, refreshed.

    With how busy each GPU is, the memory that is used and promised, and what each job waits for. q or ctrl-C ends it,
    any other key looks at once. Where nothing happens for a minute, it looks every 10 s.
    """
    from cli.render import console, print_json
    from cli.top_frame import frame
    from jobqueue import names

    client, out = connect(), console()
    on_terminal = out.is_terminal and not (once or as_json or out.is_dumb_terminal)
    look = partial(client.overview, owner, host)
    seen = look(out.height) if on_terminal else look()
    if host and not seen.workers:
        raise names.no_worker(host, client.store)
    if as_json:
        print_json(_document(seen))
    elif not on_terminal:
        out.print(frame(out, seen, []))
    else:
        with contextlib.suppress(KeyboardInterrupt):
            _show(out, _Looks(lambda: look(out.height), seen, interval), client.store.where)


def _document(seen: Overview) -> dict[str, Any]:
    """As JSON, without the fields of jobs that an overview leaves empty."""
    from cli.render import plain

    made: dict[str, Any] = plain(seen)
    for job in (*made["running"], *(waiting["job"] for waiting in made["queue"])):
        for name in ("spec", "outcome", "history"):
            del job[name]
    return made


class _Looks:
    """Looks at the server again and again, from a thread of its own: a server that hangs must not keep keys waiting."""

    def __init__(self, look: Callable[[], Overview], first: Overview, interval: float) -> None:
        self.seen, self.interval = first, interval
        self.problem = ""  # why the server gave no answer to the last look
        self._look, self._news_at = look, time.monotonic()
        self._failed: Exception | None = None
        self._wanted = threading.Event()
        self._read, self._write = os.pipe()
        threading.Thread(target=self._run, name="looks", daemon=True).start()

    def wait(self, keys: Sequence[int]) -> bytes:
        """Until there is something new to show, or keys were pressed: which. Raises what a look has raised."""
        ready, _, _ = select.select([self._read, *keys], [], [])
        if self._read in ready:
            os.read(self._read, 4096)
        if self._failed is not None:
            raise self._failed
        return b"".join(os.read(key, 4096) or b"q" for key in keys if key in ready)  # nothing: the terminal is gone

    def show_again(self, *_: object) -> None:
        os.write(self._write, b".")

    def now(self) -> None:
        """Look at once, and often again."""
        self._wanted.set()

    @property
    def pause_s(self) -> float:
        """Between two looks."""
        calm = time.monotonic() - self._news_at > CALM_S
        return max(SLOW_S, self.interval) if calm else self.interval

    def _run(self) -> None:
        while self._failed is None:
            if self._wanted.wait(self.pause_s):
                self._wanted.clear()
                self._news_at = time.monotonic()
            self._once()
            self.show_again()

    def _once(self) -> None:
        from jobqueue.errors import ServerError

        try:
            before, self.seen, self.problem = _happens(self.seen), self._look(), ""
            if before != _happens(self.seen):
                self._news_at = time.monotonic()
        except ServerError as error:
            self.problem = error.what.rstrip(".")
        except Exception as error:
            self._failed = error


def _happens(seen: Overview) -> object:
    """What of an overview is news: not that a worker still lives."""
    return seen.counts, seen.ended, seen.running, [(worker.alive, worker.note) for worker in seen.workers]


def _show(out: Console, looks: _Looks, where: str) -> None:
    """Frame after frame until q."""
    from rich.live import Live

    from cli.render import console
    from cli.top_frame import frame

    signal.signal(signal.SIGWINCH, looks.show_again)
    # Not without leaving the terminal as it was
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    with _keys() as keys, Live(console=out, screen=True, auto_refresh=False) as live:
        while True:
            # Measured on a console of its own: a table may make that wider than the terminal, which then cuts it
            live.update(frame(console(), looks.seen, _head(looks, where), out.height), refresh=True)
            pressed = looks.wait(keys)
            if b"q" in pressed.lower():
                return
            if pressed:
                looks.now()


def _head(looks: _Looks, where: str) -> list[Text]:
    from rich.text import Text

    from cli.render import clock

    seen = looks.seen
    only = "".join(f", only {name}" for name in (seen.owner, seen.host) if name)
    head = [Text.assemble(("loraq top", "bold"), f"  {clock(seen.now)}  {where}{only}  ", ("q ends", "dim"))]
    if looks.problem:
        head.append(Text(f"no answer since {clock(seen.now)}, asked again: {looks.problem}", "bold red"))
    for line in head:
        line.no_wrap, line.overflow = True, "ellipsis"
    return head


@contextlib.contextmanager
def _keys() -> Iterator[list[int]]:
    """Descriptors that keys come from, each at once; none where standard input is no terminal."""
    if not sys.stdin.isatty():
        yield []
        return
    import termios
    import tty

    keys = sys.stdin.fileno()
    before = termios.tcgetattr(keys)
    tty.setcbreak(keys)
    try:
        yield [keys]
    finally:
        termios.tcsetattr(keys, termios.TCSADRAIN, before)
