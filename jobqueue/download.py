"""Files of the shared storage by way of Redis, to machines that cannot reach it.

The reader puts a wish for a part of a file into a free slot. A control worker puts what was wished for in its place,
and the reader takes it out, which frees the slot. There are so few slots that no more than 64 MiB are ever on the
server, and readers share them evenly. Nothing else is kept there: the reader knows what has arrived, and wishes again
for what got lost, so either side may break off at any moment, and any control worker may answer.

Keys (all of them expire)
  {loraq}:pull:slot:<n>  string  a wish, or the answer to it: kind (1 byte), id of the wish (8 bytes), then of a
                                 wish    JSON: file, start, size
                                 answer  size of the whole file (8 bytes), sha256 of the content (32), content
                                 error   JSON: what, final (whether it makes no sense to ask again)
  {loraq}:pull:by:<id>   string  the control worker that answers this wish
  {loraq}:pulls          zset    readers, by the server's time (s) of their last look
"""

from __future__ import annotations

import hashlib
import json
import math
import secrets
import time
from collections.abc import Generator, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, cast

from jobqueue.errors import DeniedError, LoraqError, NotFoundError, ServerError, StorageError
from jobqueue.location import Stretch
from jobqueue.published import ARCHIVE, Waits, listed, split
from jobqueue.records import PREFIX
from jobqueue.storage import MANIFEST, Storage
from jobqueue.store import Store
from jobqueue.transfer import LOOK_S, PIECE_BYTES, PIECE_TTL_S, SLOTS, ControlSide

if TYPE_CHECKING:
    from redis import Redis

READERS = f"{PREFIX}pulls"
FIRST_WISHES = 4  # of a reader that does not know yet how fast its line is
ACTIVE_S = 30  # a reader that has not looked for so long gets no share of the slots
ANSWER_S = 20  # a control worker that took up a wish has so long, then another may
PATIENCE_S = 60.0  # without any progress a reader gives up
ROUND_S = 10.0  # counts as waited at most from one look to the next: a laptop that slept has not waited
AGAIN_S = 1.0  # until a reader that met an error looks again
MOST_TEXT = 2**28  # bytes of a file that is read as text
MOST_WISH = 4096  # bytes
LINGERS_S = 3.0  # after the last reader has left, a control worker goes on looking as often
MANIFESTS = 32  # that a control worker has at hand
HEAD = 9  # bytes: kind and id
WISH, ANSWER, ERROR = b"w", b"a", b"e"
NOBODY = "no control worker answers"


def _slot(number: int) -> str:
    return f"{PREFIX}pull:slot:{number}"


def _heads(redis: Redis) -> tuple[int, list[bytes]]:
    """(the server's time in s, what begins each slot, b"" where it is free)"""
    pipe = redis.pipeline(transaction=False)
    pipe.time()
    for slot in range(SLOTS):
        pipe.getrange(_slot(slot), 0, HEAD - 1)
    (seconds, _), *heads = pipe.execute()
    return seconds, heads


def _replace(redis: Redis, slot: int, head: bytes, content: bytes) -> bool:
    """Puts it into a slot that still begins so, b"" to free it; False: it does not by now."""
    from redis import WatchError

    with redis.pipeline() as pipe:
        try:
            pipe.watch(_slot(slot))  # type: ignore[no-untyped-call]
            if cast(Any, pipe.getrange(_slot(slot), 0, HEAD - 1)) != head:
                return False
            pipe.multi()
            if content:
                pipe.set(_slot(slot), content, ex=PIECE_TTL_S)
            else:
                pipe.delete(_slot(slot))
            pipe.execute()
        except WatchError:
            return False
    return True


class Reader:
    """The storage, as far as jobs have published something there, for a machine that cannot reach it itself.

    Raises StorageError where no control worker answers, or none can read it; ServerError where the server is away for
    longer than PATIENCE_S, until then it is waited for; NotFoundError.
    """

    def __init__(self, store: Store) -> None:
        self._store, self._name = store, secrets.token_hex(8)

    def read_text(self, relative: str) -> str:
        [(size, begin)] = self._answers([Stretch(relative, 0, PIECE_BYTES)])
        if size > MOST_TEXT:
            raise StorageError(f"{relative} has {size:,} bytes, too many to be read", "Look after the storage.")
        rest = [Stretch(relative, at, min(PIECE_BYTES, size - at)) for at in range(PIECE_BYTES, size, PIECE_BYTES)]
        return b"".join([begin, *(content for _, content in self._answers(rest))]).decode(errors="replace")

    def read_parts(self, wanted: Sequence[Stretch], waits: Waits) -> Generator[bytes, None, None]:
        for _, content in self._answers(wanted, waits):
            yield content

    def _answers(self, wanted: Sequence[Stretch], waits: Waits = lambda why: None) -> Iterator[tuple[int, bytes]]:
        """(size of the whole file, content) of each."""
        reading, given, waited = _Reading(self._store, self._name, wanted), 0, 0.0
        looked_at = time.monotonic()
        try:
            while given < len(wanted):
                trouble: LoraqError | None = None
                try:
                    moved = reading.look(given)
                    trouble = reading.trouble
                except DeniedError:
                    raise
                except ServerError as error:
                    moved, trouble = given in reading.arrived, error
                while given in reading.arrived:
                    yield reading.arrived.pop(given)
                    given += 1
                now = time.monotonic()
                waited, looked_at = 0.0 if moved else waited + min(now - looked_at, ROUND_S), now
                if waited > PATIENCE_S:
                    do = "Start `loraq worker`, of this release, where the storage is, or set LORAQ_STORAGE here."
                    raise trouble or StorageError(f"{NOBODY}: {wanted[given].file} does not arrive", do)
                waits("" if moved else trouble.what if trouble else NOBODY if waited > ROUND_S else "")
                if given < len(wanted):
                    time.sleep(AGAIN_S if trouble else LOOK_S)
        finally:
            with suppress(ServerError):
                reading.leave()


@dataclass(frozen=True)
class _Wish:
    id: bytes
    index: int  # of what is wanted


@dataclass
class _Reading:
    """Some parts on their way to one reader."""

    store: Store
    reader: str
    wanted: Sequence[Stretch]
    arrived: dict[int, tuple[int, bytes]] = field(default_factory=dict)
    trouble: LoraqError | None = None  # that the last look met
    _standing: dict[int, _Wish] = field(default_factory=dict)  # slot -> what is wished for there
    _heads: list[bytes] = field(default_factory=list)
    _window: int = FIRST_WISHES  # how many answers it can take before they expire

    def look(self, first: int) -> bool:
        """Takes what is there, and wishes for what comes next, `first` before all; whether anything has moved.

        Raises NotFoundError, ServerError.
        """
        self.trouble, before = None, len(self.arrived)
        with self.store.binary() as redis:
            now, heads = _heads(redis)
            share = self._share(redis, now)
            for slot, wish in list(self._standing.items()):
                if heads[slot][1:] != wish.id:
                    del self._standing[slot]  # it has expired, or the server has forgotten it
                elif heads[slot][:1] != WISH:
                    self._take(redis, slot, wish, heads[slot])
            self._wish(redis, first, share, [slot for slot, head in enumerate(heads) if not head])
        others_move = not (self._standing or self.trouble) and heads != self._heads  # they have all of the slots
        self._heads = heads
        return len(self.arrived) > before or others_move

    def _share(self, redis: Redis, now: int) -> int:
        """How many slots are this reader's: as many as any other's, and no more than it can empty before they expire.

        Says as well that it is here.
        """
        pipe = redis.pipeline()
        pipe.zadd(READERS, {self.reader: now})
        pipe.zremrangebyscore(READERS, "-inf", now - ACTIVE_S)
        pipe.zcard(READERS)
        pipe.expire(READERS, 2 * ACTIVE_S)
        readers: int = pipe.execute()[2]
        return max(1, min(SLOTS // readers, self._window))

    def _wish(self, redis: Redis, first: int, share: int, free: Sequence[int]) -> None:
        under_way = {*self.arrived, *(wish.index for wish in self._standing.values())}
        coming = range(first, min(first + SLOTS, len(self.wanted)))
        missing = [index for index in coming if index not in under_way]
        for slot, index in zip(free[: max(0, share - len(self._standing))], missing, strict=False):
            wish = _Wish(secrets.token_bytes(HEAD - 1), index)
            self._standing[slot] = wish  # before it is known: the answer may get lost
            body = json.dumps(self.wanted[index]._asdict()).encode()
            if not redis.set(_slot(slot), WISH + wish.id + body, nx=True, ex=PIECE_TTL_S):
                del self._standing[slot]

    def _take(self, redis: Redis, slot: int, wish: _Wish, head: bytes) -> None:
        wanted, began = self.wanted[wish.index], time.monotonic()
        packed = cast(bytes, redis.getrange(_slot(slot), 0, HEAD + 40 + max(wanted.size, MOST_WISH)))
        if packed[:HEAD] != head:
            return
        body = packed[HEAD:]
        size, digest, content = int.from_bytes(body[:8], "big"), body[8:40], body[40:]
        if head[:1] == ERROR:
            self.trouble = _said(body)
        elif hashlib.sha256(content).digest() == digest and len(content) <= wanted.size:
            self.arrived[wish.index] = size, content
            if len(content) == PIECE_BYTES:  # less says little of the line
                self._window = int(PIECE_TTL_S / 4 / max(time.monotonic() - began, 1e-3))
        else:
            self.trouble = StorageError(f"a part of {wanted.file} was damaged on its way", "Try again.")
        del self._standing[slot]
        _replace(redis, slot, head, b"")
        if isinstance(self.trouble, NotFoundError):
            raise self.trouble

    def leave(self) -> None:
        """Frees its slots at once, for others."""
        with self.store.binary() as redis:
            redis.zrem(READERS, self.reader)
            for slot, wish in self._standing.items():
                for kind in (WISH, ANSWER, ERROR):
                    _replace(redis, slot, kind + wish.id, b"")


def _said(body: bytes) -> StorageError | NotFoundError:
    """What a control worker has to say instead."""
    try:
        said = json.loads(body)
        what, final = str(said["what"])[:500], bool(said["final"])
    except (ValueError, TypeError, KeyError):
        what, final = "a control worker's answer cannot be read", False
    what = "".join(character if character.isprintable() else " " for character in what)
    if final:
        return NotFoundError(what, "It may have been removed with `loraq rm --files`.")
    return StorageError(f"a control worker cannot read it: {what}", "`loraq workers` may say more; then try again.")


class Provider(ControlSide):
    """From the storage to the slots."""

    def __init__(self, store: Store, storage: Storage, name: str) -> None:
        super().__init__(store, storage, name)
        self._files: dict[str, frozenset[str]] = {}  # of each folder, by its manifest
        self._read_at = -math.inf

    def round(self) -> bool:
        """Whether anybody reads, or has until now: a manifest is followed by files."""
        with self.store.binary() as redis:
            if not redis.exists(READERS):
                return time.monotonic() - self._read_at < LINGERS_S
            _, heads = _heads(redis)
        self._read_at = time.monotonic()
        for slot, head in enumerate(heads):
            if head[:1] == WISH:
                self._attend(slot, head)
        return True

    def _attend(self, slot: int, head: bytes) -> None:
        with self.store.binary() as redis:
            if not redis.set(f"{PREFIX}pull:by:{head[1:].hex()}", self.name, nx=True, ex=ANSWER_S):
                return
            packed = cast(bytes, redis.getrange(_slot(slot), 0, MOST_WISH))
        if packed[:HEAD] != head:
            return
        answer = self._answer(packed)
        try:
            with self.store.binary() as redis:
                _replace(redis, slot, head, answer)
        except ServerError as error:  # at its memory limit, it may still take a word
            with self.store.binary() as redis:
                _replace(redis, slot, head, _error(head, error.what, final=False))
            raise

    def _answer(self, packed: bytes) -> bytes:
        head = packed[:HEAD]
        try:
            wish = json.loads(packed[HEAD:])
            part = Stretch(str(wish["file"]), int(wish["start"]), int(wish["size"]))
            if part.start < 0 or not 0 <= part.size <= PIECE_BYTES:
                return _error(head, "that is no part of a file", final=True)
            if not self._may_be_read(part.file):
                return _error(head, f"{part.file} is no file that a job has published", final=True)
            size, content = self.storage.read_part(part)
        except NotFoundError:
            return _error(head, f"{part.file} is not in the storage", final=True)
        except StorageError as error:
            return _error(head, error.what, final=False)
        except (ValueError, TypeError, KeyError):
            return _error(head, "the wish cannot be read", final=True)
        digest = hashlib.sha256(content).digest()
        return b"".join((ANSWER, head[1:], size.to_bytes(8, "big"), digest, content))

    def _may_be_read(self, file: str) -> bool:
        """Whether it is an archived batch's records, or a complete folder's file; nothing else leaves the storage."""
        if ARCHIVE.fullmatch(file):
            return self.storage.holds(file.rpartition("/")[0], "archive.json")
        folder, name = split(file)
        if not folder or not self.storage.holds(folder, name):
            return False
        with suppress(NotFoundError):  # it has no manifest
            return name == MANIFEST or name in self._listed(folder)
        return False

    def _listed(self, folder: str) -> frozenset[str]:
        if folder not in self._files:
            if len(self._files) >= MANIFESTS:
                del self._files[next(iter(self._files))]
            self._files[folder] = frozenset(listed(self.storage, folder))
        return self._files[folder]


def _error(head: bytes, what: str, *, final: bool) -> bytes:
    return ERROR + head[1:] + json.dumps({"what": what, "final": final}).encode()
