"""What is wrong with a setup: server, storage and workers, each looked at as those who use them do."""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from jobqueue.errors import LoraqError, ServerError, StorageError

if TYPE_CHECKING:
    from jobqueue.service import Client

CLOCK_S = 5.0  # by which a clock may be wrong; times that are shown are wrong by as much


@dataclass(frozen=True)
class Finding:
    """One thing that was looked at."""

    level: Literal["ok", "note", "problem"]
    subject: str
    what: str
    do: str = ""
    exit_code: int = 0
    """Of the error that a command would end with; 0 where none would."""


def problem(subject: str, error: LoraqError) -> Finding:
    return Finding("problem", subject, error.what, error.do, error.exit_code)


def examine(client: Client) -> Iterator[Finding]:
    """Looks at one after the other; what cannot be seen without a server is left out where there is none."""
    try:
        yield from _server(client)
    except ServerError as error:
        yield problem("server", error)
        return
    yield from _storage(client)
    yield from _workers(client)


def _server(client: Client) -> Iterator[Finding]:
    store = client.store
    store.server()  # connects
    asked = time.time()
    name, clock = store.server()
    answered = time.time()
    yield Finding("ok", "server", f"{name} at {store.where} answers in {1000 * (answered - asked):.0f} ms")
    ahead = clock - (asked + answered) / 2
    if abs(ahead) > CLOCK_S:
        which = "ahead of" if ahead > 0 else "behind"
        yield Finding("note", "clock", f"the server's is {abs(ahead):.0f} s {which} this machine's", "Set both by NTP.")
    for text in client.warnings():
        yield Finding("problem", "server", text, exit_code=ServerError.exit_code)


def _storage(client: Client) -> Iterator[Finding]:
    if not client.storage_is_known:
        yield Finding(
            "note",
            "storage",
            "this machine does not know the workers' storage: files go through the server",
            "Set LORAQ_STORAGE, as they have it, for score cards, and to copy files faster.",
        )
        return
    try:
        client.storage.try_out()
    except StorageError as error:
        yield problem("storage", error)
    else:
        yield Finding("ok", "storage", f"{client.storage.url} can be written and read")


def _workers(client: Client) -> Iterator[Finding]:
    found = client.workers()
    alive = [worker for worker in found if worker.alive]
    if not any(worker.trains for worker in alive):
        do = "`loraq worker` on a GPU host, or `loraq up` on this machine."
        yield Finding("problem", "workers", "none is alive that trains: jobs wait", do)
    if alive and not any(not worker.trains for worker in alive):
        do = "Start one `loraq worker` without --no-control."
        yield Finding("problem", "workers", "no control worker is alive: nobody makes reports or finds lost jobs", do)
    for worker in found:
        if not worker.alive:
            yield Finding("note", "workers", f"{worker.id} is silent", "Its jobs go on elsewhere; look at the host.")
        elif worker.note:
            yield Finding("note", "workers", f"{worker.id} takes nothing or less: {worker.note}")
    if alive:
        names = ", ".join(worker.id for worker in alive)
        yield Finding("ok", "workers", f"{len(alive)} alive: {names}")
