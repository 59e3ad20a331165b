"""Local files to the shared storage by way of Redis, for machines that cannot reach the storage.

The sender cuts a file into pieces and puts each into a free slot; there are so few slots that no more than 64 MiB
are ever on the server. A control worker takes a piece out of its slot, checks it, and writes it to the storage. Once
all are there it joins them. What has arrived is known from the storage alone: a transfer that broke off, on either
side, goes on with the pieces that are missing, and a piece that got lost is sent again.

Keys (all of them expire; <sha256> is that of the file)
  {loraq}:slot:<n>                 string  one piece on its way: see `Piece`
  {loraq}:transfers                set     files on their way
  {loraq}:transfer:<sha256>        hash    name, size, state (asked open done failed), message
  {loraq}:transfer:<sha256>:have   set     numbers of the pieces that are in the storage
  {loraq}:transfer:<sha256>:joins  string  the control worker that joins the pieces
"""

from __future__ import annotations

import hashlib
import logging
import re
import threading
import time
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from jobqueue.errors import ServerError, StorageError
from jobqueue.records import PREFIX
from jobqueue.storage import BLOB, Storage
from jobqueue.store import Store

if TYPE_CHECKING:
    from redis import Redis

PIECE_BYTES = 4 * 2**20
SLOTS = 16  # pieces at a time on the server, of all senders together
PIECE_TTL_S = 120  # of a piece that nobody takes
TRANSFER_TTL_S = 600  # of the record of a transfer whose sender is silent
LOST_S = 20.0  # a piece that was taken out of its slot so long ago and is not in the storage is sent again
PATIENCE_S = 60.0  # without any progress a sender gives up
JOIN_S = 600  # a control worker that joins pieces has so long
LOOK_S = 0.1  # how often a sender, and a control worker with something to do, look
IDLE_S = 1.0  # how often a control worker without anything to do looks
NAME = re.compile(r"[^/\\\0]+")
TRANSFERS = f"{PREFIX}transfers"

log = logging.getLogger(__name__)
Progress = Callable[[int, int], None]
"""Called with the bytes that have arrived, and all of them."""


def _key(sha256: str) -> str:
    return f"{PREFIX}transfer:{sha256}"


def _slot(number: int) -> str:
    return f"{PREFIX}slot:{number}"


@dataclass(frozen=True)
class Piece:
    """What a slot holds: sha256 of the file, number (8 bytes), sha256 of the content, content."""

    file: bytes
    number: int
    content: bytes

    HEAD = 72

    def pack(self) -> bytes:
        digest = hashlib.sha256(self.content).digest()
        return b"".join((self.file, self.number.to_bytes(8, "big"), digest, self.content))

    @classmethod
    def unpack(cls, packed: bytes) -> Piece | None:
        """None where the content is not what was sent."""
        piece = cls(packed[:32], int.from_bytes(packed[32:40], "big"), packed[cls.HEAD :])
        return piece if hashlib.sha256(piece.content).digest() == packed[40 : cls.HEAD] else None


@dataclass
class Sender:
    """One file to the storage of the workers."""

    store: Store
    path: Path
    source: str
    progress: Progress = lambda arrived, size: None
    _sent: dict[int, float] = field(default_factory=dict)  # number -> when, of pieces that have not arrived yet

    def send(self) -> None:
        """Returns once the file is there. Raises ServerError, and StorageError where no control worker takes it."""
        self._size = self.path.stat().st_size
        self._sha256, _, self._name = self.source.removeprefix(BLOB).partition("/")
        count = -(-self._size // PIECE_BYTES)
        self._begin()
        arrived, changed_at = -1, time.monotonic()
        while True:
            state, name, message, have, joining = self._look()
            if state == "done" and name == self._name:
                self.progress(self._size, self._size)
                return
            if state == "failed":
                raise StorageError(f"{self.path.name} did not reach the workers' storage: {message}", "Submit again.")
            if state in ("", "done"):
                self._begin()  # it expired while this machine slept, or the same content came under another name
            if len(have) != arrived or joining:
                arrived, changed_at = len(have), time.monotonic()
                self.progress(min(arrived * PIECE_BYTES, self._size), self._size)
            if time.monotonic() - changed_at > PATIENCE_S:
                raise StorageError(
                    f"no worker takes {self.path.name} over to the storage",
                    "Start `loraq worker` on a host that has the storage, or set LORAQ_STORAGE here.",
                )
            if state == "open":
                self._fill(have, count)
            time.sleep(LOOK_S)

    def _begin(self) -> None:
        with self.store.binary() as redis:
            pipe = redis.pipeline()
            asked = {"name": self._name, "size": self._size, "state": "asked", "message": ""}
            pipe.hset(_key(self._sha256), mapping=cast(Any, asked))
            pipe.expire(_key(self._sha256), TRANSFER_TTL_S)
            pipe.sadd(TRANSFERS, self._sha256)
            pipe.expire(TRANSFERS, TRANSFER_TTL_S)
            pipe.execute()

    def _look(self) -> tuple[str, str, str, set[int], bool]:
        """(state, name, message, pieces that have arrived, whether they are being joined), and a sign of life."""
        with self.store.binary() as redis:
            pipe = redis.pipeline()
            pipe.hmget(_key(self._sha256), "state", "name", "message")
            pipe.smembers(f"{_key(self._sha256)}:have")
            pipe.exists(f"{_key(self._sha256)}:joins")
            for key in (_key(self._sha256), f"{_key(self._sha256)}:have", TRANSFERS):
                pipe.expire(key, TRANSFER_TTL_S)
            record, have, joining, *_ = pipe.execute()
        state, name, message = ((value or b"").decode() for value in record)
        return state, name, message, {int(number) for number in have}, bool(joining)

    def _fill(self, have: set[int], count: int) -> None:
        """Puts pieces that have not arrived into the free slots."""
        with self.store.binary() as redis:
            heads = _heads(redis)
        on_server = {head[32:40] for head in heads if head[:32] == bytes.fromhex(self._sha256)}
        now = time.monotonic()
        for number, sent_at in list(self._sent.items()):
            lost = number.to_bytes(8, "big") not in on_server and now - sent_at > LOST_S
            if number in have or lost:
                del self._sent[number]
        missing = (n for n in range(count) if n not in have and n not in self._sent)
        for slot in (slot for slot, head in enumerate(heads) if not head):
            number = next(missing, -1)
            if number < 0:
                return
            with self.path.open("rb") as file:
                file.seek(number * PIECE_BYTES)
                piece = Piece(bytes.fromhex(self._sha256), number, file.read(PIECE_BYTES))
            with self.store.binary() as redis:
                if redis.set(_slot(slot), piece.pack(), nx=True, ex=PIECE_TTL_S):
                    self._sent[number] = time.monotonic()


def _heads(redis: Redis) -> list[bytes]:
    """What begins the piece in each slot, b"" where there is none."""
    pipe = redis.pipeline(transaction=False)
    for slot in range(SLOTS):
        pipe.getrange(_slot(slot), 0, Piece.HEAD - 1)
    return cast("list[bytes]", pipe.execute())


class ControlSide(ABC):
    """A control worker's side of a transfer. Any number of them may work side by side."""

    def __init__(self, store: Store, storage: Storage, name: str) -> None:
        self.store, self.storage, self.name = store, storage, name

    @abstractmethod
    def round(self) -> bool:
        """One look, and what is to do; whether anything is under way."""

    def run(self, stop: threading.Event) -> None:
        """Moves what comes until `stop`."""
        pause = IDLE_S
        while not stop.wait(pause):
            try:
                pause = LOOK_S if self.round() else IDLE_S
            except ServerError as error:
                log.warning("no file is moved: %s", error.what)
                pause = IDLE_S
            except Exception:  # the next file is needed all the same
                log.exception("moving files broke off")
                pause = IDLE_S


class Mover(ControlSide):
    """From the slots to the storage."""

    def round(self) -> bool:
        """Whether any file is on its way."""
        with self.store.binary() as redis:
            members = cast("set[bytes]", redis.smembers(TRANSFERS))
        names = [name.decode() for name in sorted(members) if re.fullmatch(b"[0-9a-f]{64}", name)]
        for sha256 in names:
            try:
                self._attend(sha256)
            except StorageError as error:
                self._end(sha256, "failed", error.what)
        if names:
            self._take(names)
        return bool(names)

    def _attend(self, sha256: str) -> None:
        """Opens a transfer that is asked for, and joins the pieces of one that has all of them."""
        key = _key(sha256)
        with self.store.binary() as redis:
            record = {k.decode(): v.decode() for k, v in cast("dict[bytes, bytes]", redis.hgetall(key)).items()}
            arrived: int = cast(Any, redis.scard(f"{key}:have"))
        if record.get("state") not in ("asked", "open"):
            with self.store.binary() as redis:
                redis.srem(TRANSFERS, sha256)
            return
        name = record.get("name", "")
        if not NAME.fullmatch(name) or name in (".", "..") or not record.get("size", "").isdecimal():
            self._end(sha256, "failed", f"{name!r} is no name for a file")
            return
        source, size = f"{BLOB}{sha256}/{name}", int(record["size"])
        count = -(-size // PIECE_BYTES)
        if record["state"] == "asked":
            if self.storage.has_blob(source, size):
                self._end(sha256, "done")
            else:
                self._open(sha256, self.storage.pieces(sha256))
        elif arrived >= count:
            self._join(sha256, source, size, count)

    def _open(self, sha256: str, have: set[int]) -> None:
        with self.store.binary() as redis:
            pipe = redis.pipeline()
            if have:
                pipe.sadd(f"{_key(sha256)}:have", *have)
                pipe.expire(f"{_key(sha256)}:have", TRANSFER_TTL_S)
            pipe.hset(_key(sha256), "state", "open")
            pipe.execute()

    def _join(self, sha256: str, source: str, size: int, count: int) -> None:
        with self.store.binary() as redis:
            if not redis.set(f"{_key(sha256)}:joins", self.name, nx=True, ex=JOIN_S):
                return
        try:
            try:
                self.storage.join_pieces(source, count)
            except StorageError:
                if not self.storage.has_blob(source, size):  # else another control worker was quicker
                    raise
            log.info("%s has arrived (%d bytes)", source, size)
            self._end(sha256, "done")
        finally:
            with self.store.binary() as redis:
                redis.delete(f"{_key(sha256)}:joins")

    def _end(self, sha256: str, state: str, message: str = "") -> None:
        with self.store.binary() as redis:
            pipe = redis.pipeline()
            pipe.hset(_key(sha256), mapping={"state": state, "message": message})
            pipe.expire(_key(sha256), TRANSFER_TTL_S)
            pipe.srem(TRANSFERS, sha256)
            pipe.delete(f"{_key(sha256)}:have")
            pipe.execute()

    def _take(self, names: list[str]) -> None:
        """Every piece of these files from its slot to the storage; pieces of transfers that have ended are cleared."""
        with self.store.binary() as redis:
            heads = _heads(redis)
        for slot, head in enumerate(heads):
            with self.store.binary() as redis:
                known = head[:32].hex() in names or (head and redis.sismember(TRANSFERS, head[:32].hex()))
                packed = cast("bytes | None", redis.getdel(_slot(slot))) if head else None
            piece = Piece.unpack(packed) if packed else None
            if not known or piece is None:  # another one was quicker, or it is damaged: then it is sent again
                continue
            self._keep(piece)

    def _keep(self, piece: Piece) -> None:
        sha256 = piece.file.hex()
        try:
            self.storage.put_piece(sha256, piece.number, piece.content)
        except StorageError as error:
            self._end(sha256, "failed", error.what)
            return
        with self.store.binary() as redis:
            pipe = redis.pipeline()
            pipe.sadd(f"{_key(sha256)}:have", piece.number)
            pipe.expire(f"{_key(sha256)}:have", TRANSFER_TTL_S)
            pipe.execute()
