"""Files of a real storage by way of a real server: whole, within bounds, however often either side breaks off."""

from __future__ import annotations

import hashlib
import json
import random
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from urllib.parse import urlsplit

import pytest
import redis
from helpers import wait_for
from proxy import proxy

from jobqueue import download, transfer
from jobqueue.download import ANSWER, HEAD, SLOTS, WISH, Provider, Reader
from jobqueue.errors import NotFoundError, ServerError, StorageError
from jobqueue.location import Stretch
from jobqueue.storage import Storage
from jobqueue.store import Store

PIECE = 16 * 1024
COUNT = 41  # parts of the file, the last one short
DEADLINE_S = 60.0
FOLDER = "batches/b/b.1/1-ab"
FILE = f"{FOLDER}/adapter/weights"


@pytest.fixture(autouse=True)
def _small_and_quick(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (download, transfer):
        monkeypatch.setattr(module, "PIECE_BYTES", PIECE)
        monkeypatch.setattr(module, "LOOK_S", 0.01)
    monkeypatch.setattr(transfer, "IDLE_S", 0.02)
    for name, value in {"AGAIN_S": 0.05, "ANSWER_S": 1, "PATIENCE_S": 20.0}.items():
        monkeypatch.setattr(download, name, value)


@pytest.fixture
def content() -> bytes:
    return random.Random(7).randbytes(PIECE * (COUNT - 1) + 123)


@pytest.fixture
def storage(tmp_path: Path, content: bytes) -> Storage:
    """With one complete folder."""
    (tmp_path / "made" / "adapter").mkdir(parents=True)
    (tmp_path / "made" / "adapter" / "weights").write_bytes(content)
    opened = Storage(str(tmp_path / "storage"))
    opened.pin()
    opened.publish(tmp_path / "made", FOLDER, {"job": "b.1"})
    return opened


@pytest.fixture
def raw(redis_url: str) -> Iterator[redis.Redis]:
    with redis.Redis.from_url(redis_url) as client:
        yield client
        client.config_set("maxmemory", 0)


Start = Callable[[Provider], threading.Event]


@pytest.fixture
def start() -> Iterator[Start]:
    """Runs control workers' sides until the test ends; each is ended by its event."""
    running: list[tuple[threading.Event, threading.Thread]] = []

    def run(provider: Provider) -> threading.Event:
        stop = threading.Event()
        running.append((stop, threading.Thread(target=provider.run, args=(stop,))))
        running[-1][1].start()
        return stop

    yield run
    for stop, thread in running:
        stop.set()
        thread.join(DEADLINE_S)


def parts(file: str = FILE, size: int = PIECE * (COUNT - 1) + 123) -> list[Stretch]:
    return [Stretch(file, at, min(PIECE, size - at)) for at in range(0, size, PIECE)]


def read(reader: Reader, wanted: list[Stretch] | None = None, waits: Callable[[str], None] = print) -> bytes:
    return b"".join(reader.read_parts(wanted or parts(), waits))


def slots(raw: redis.Redis) -> list[str]:
    return [key.decode() for key in raw.keys("{loraq}:pull:slot:*")]  # type: ignore[union-attr]


def fill(provider: Provider, raw: redis.Redis) -> None:
    """Until a reader that has just begun has wishes in all slots, and none is answered."""
    wait_for(lambda: len(slots(raw)) == download.FIRST_WISHES, DEADLINE_S, "it begins with a few")
    provider.round()
    wait_for(lambda: len(slots(raw)) == SLOTS, DEADLINE_S, "all slots are full")


def test_a_file_arrives_in_order_and_leaves_nothing_on_the_server(
    store: Store, storage: Storage, content: bytes, start: Start, raw: redis.Redis
) -> None:
    start(Provider(store, storage, "control"))

    assert read(Reader(store)) == content

    assert slots(raw) == []
    assert not raw.exists(download.READERS)
    assert all(raw.ttl(key) != -1 for key in raw.keys("{loraq}:pull*"))  # type: ignore[union-attr]


def test_no_more_than_16_slots_are_used_and_all_of_them_expire(
    store: Store, storage: Storage, raw: redis.Redis
) -> None:
    provider, used = Provider(store, storage, "control"), set[int]()
    reader = threading.Thread(target=read, args=(Reader(store),))
    reader.start()
    fill(provider, raw)

    def round_() -> bool:
        used.add(len(slots(raw)))
        assert all(0 < ttl <= 120 for ttl in map(raw.ttl, slots(raw)) if ttl != -2)  # type: ignore[operator]
        provider.round()
        return not reader.is_alive()

    wait_for(round_, DEADLINE_S, "all has arrived")
    assert max(used) <= SLOTS


def test_who_stops_reading_frees_the_slots_at_once(
    store: Store, storage: Storage, start: Start, raw: redis.Redis
) -> None:
    start(Provider(store, storage, "control"))
    reading = Reader(store).read_parts(parts(), print)
    for _ in range(5):
        next(reading)
    assert slots(raw)
    reading.close()  # as by Ctrl-C
    assert slots(raw) == []
    assert not raw.exists(download.READERS)


def test_text_of_several_parts_is_read_whole(store: Store, storage: Storage, start: Start) -> None:
    text = json.dumps({"jobs": ["ä" * PIECE] * 5}, ensure_ascii=False)
    storage.write_text("batches/old/archive.json", text)
    start(Provider(store, storage, "control"))
    assert Reader(store).read_text("batches/old/archive.json") == text


@pytest.mark.parametrize(
    "file",
    [
        "storage.json",
        "blobs/" + 64 * "0" + "/rows.jsonl",
        "batches/b/report.json",
        "batches/b/archive.json/../report.json",
        "batches/../storage.json",
        f"{FOLDER}/../../../../storage.json",
        f"{FOLDER}/adapter/../../2-cd/secret",
        f"{FOLDER}/unlisted",
        f"{FOLDER}/link",
        f"{FOLDER}/up/secret",
        "batches/b/b.1/2-cd/secret",  # of an attempt that has published nothing
        "/etc/passwd",
        f"{FOLDER}//etc/passwd",
        f"{FOLDER}/adapter\0",
        "",
    ],
)
def test_nothing_but_what_a_job_has_published_can_be_read(
    file: str, store: Store, storage: Storage, start: Start, tmp_path: Path
) -> None:
    top = tmp_path / "storage"
    for path in ("batches/b/report.json", f"{FOLDER}/unlisted", "batches/b/b.1/2-cd/secret", "outside/secret"):
        (top / path).parent.mkdir(parents=True, exist_ok=True)
        (top / path).write_text("secret")
    (top / FOLDER / "link").symlink_to(top / "outside" / "secret")
    (top / FOLDER / "up").symlink_to(top / "outside")
    manifest = json.loads((top / FOLDER / "manifest.json").read_text())
    entry = manifest["files"]["adapter/weights"]
    manifest["files"] |= dict.fromkeys(("link", "up/secret"), entry)
    (top / FOLDER / "manifest.json").write_text(json.dumps(manifest))
    start(Provider(store, storage, "control"))

    with pytest.raises(NotFoundError, match="no file that a job has published"):
        read(Reader(store), [Stretch(file, 0, 10)])


@pytest.mark.parametrize(("at", "size"), [(-1, 10), (0, PIECE + 1), (0, -1)])
def test_no_more_than_a_piece_can_be_wished_for(
    at: int, size: int, store: Store, storage: Storage, start: Start
) -> None:
    start(Provider(store, storage, "control"))
    with pytest.raises(NotFoundError, match="no part of a file"):
        read(Reader(store), [Stretch(FILE, at, size)])


@pytest.mark.parametrize("junk", [b"", b"{", b"[]", b'{"file": 1}', b"\xff" * 5000])
def test_what_is_no_wish_does_not_keep_a_control_worker_from_others(
    junk: bytes, store: Store, storage: Storage, content: bytes, start: Start, raw: redis.Redis
) -> None:
    raw.set("{loraq}:pull:slot:0", WISH + b"12345678" + junk, ex=120)
    raw.set("{loraq}:pull:slot:1", b"?", ex=120)
    start(Provider(store, storage, "control"))
    assert read(Reader(store)) == content


def test_a_part_that_was_damaged_or_lost_is_wished_for_again(
    store: Store, storage: Storage, content: bytes, start: Start, raw: redis.Redis, monkeypatch: pytest.MonkeyPatch
) -> None:
    provider = Provider(store, storage, "control")
    answer, faults = provider._answer, ["damaged", "of another", "lost", "killed"]

    def faulty(packed: bytes) -> bytes:
        made = answer(packed)
        if not faults or made[:1] != ANSWER:
            return made
        match faults.pop():
            case "damaged":
                return made[:-1] + bytes([made[-1] ^ 1])
            case "of another":
                return made[:1] + b"anothers" + made[HEAD:]
            case "lost":
                raw.delete(*slots(raw))
                return made
            case _:
                raise RuntimeError("kill -9, as it were: the wish is marked, and nobody answers it")

    monkeypatch.setattr(provider, "_answer", faulty)
    start(provider)

    assert read(Reader(store)) == content
    assert faults == []


def test_several_readers_get_an_even_share_and_several_control_workers_each_answer_once(
    redis_url: str, storage: Storage, content: bytes, start: Start, raw: redis.Redis
) -> None:
    reads: list[tuple[int, int]] = []
    read_part = storage.read_part

    def counting(part: Stretch) -> tuple[int, bytes]:
        reads.append((threading.get_ident(), part.start))
        time.sleep(0.005)
        return read_part(part)

    storage.read_part = counting  # type: ignore[method-assign]
    done: dict[int, int] = {}

    def one(number: int) -> None:
        assert read(Reader(Store(redis_url))) == content
        done[number] = len(reads)

    readers = [threading.Thread(target=one, args=(number,)) for number in range(4)]
    for reader in readers:
        reader.start()
    wait_for(lambda: raw.zcard(download.READERS) == 4, DEADLINE_S, "all of them are there")
    for name in ("one", "two"):
        start(Provider(Store(redis_url), storage, name))
    for reader in readers:
        reader.join(DEADLINE_S)
        assert not reader.is_alive()

    assert len(reads) == 4 * COUNT
    assert len({thread for thread, _ in reads}) == 2
    assert min(done.values()) > 2 * COUNT, "the first to be done had far more than its share"


def test_a_second_reader_gets_half_of_the_slots_once_the_first_ones_parts_are_there(
    redis_url: str, storage: Storage, raw: redis.Redis
) -> None:
    provider = Provider(Store(redis_url), storage, "control")
    first = Reader(Store(redis_url)).read_parts(parts(), print)
    second = Reader(Store(redis_url)).read_parts(parts(), print)
    came: list[str] = []

    def take(name: str, reading: Iterator[bytes], count: int) -> None:
        for _ in range(count):
            next(reading)
            came.append(name)

    one = threading.Thread(target=take, args=("first", first, 34))
    one.start()
    fill(provider, raw)
    before = len(came)
    two = threading.Thread(target=take, args=("second", second, 12))
    two.start()
    wait_for(lambda: raw.zcard(download.READERS) == 2, DEADLINE_S, "the second one is there")
    wait_for(lambda: provider.round() and not two.is_alive(), DEADLINE_S, "the second has its parts")

    assert came.count("first") - before <= SLOTS + 16, "the first one took the slots again that were the second's"
    wait_for(lambda: provider.round() and not one.is_alive(), DEADLINE_S, "the first has its parts")
    first.close()
    second.close()


def test_a_connection_that_breaks_now_and_then_costs_nothing(
    redis_url: str, storage: Storage, content: bytes, start: Start
) -> None:
    start(Provider(Store(redis_url), storage, "control"))
    with proxy(urlsplit(redis_url).port or 0) as between:
        got = bytearray()
        for number, part in enumerate(
            Reader(Store(between.url.replace("redis://", _login(redis_url)))).read_parts(parts(), print)
        ):
            got += part
            if number % 7 == 3:
                between.break_all()
    assert bytes(got) == content


def _login(url: str) -> str:
    password = urlsplit(url).password
    return f"redis://:{password}@" if password else "redis://"


def test_a_server_that_forgets_everything_in_between_costs_nothing(
    store: Store, storage: Storage, content: bytes, start: Start, raw: redis.Redis
) -> None:
    start(Provider(store, storage, "control"))
    got = bytearray()
    for number, part in enumerate(Reader(store).read_parts(parts(), print)):
        got += part
        if number % 10 == 5:
            raw.flushall()
    assert bytes(got) == content


def test_a_server_at_its_memory_limit_is_waited_for_and_told_at_last(
    store: Store, storage: Storage, content: bytes, start: Start, raw: redis.Redis, monkeypatch: pytest.MonkeyPatch
) -> None:
    start(Provider(store, storage, "control"))
    said: list[str] = []

    def waits(why: str) -> None:
        said.append(why)
        if "memory limit" in why:
            raw.config_set("maxmemory", 0)

    reading = Reader(store).read_parts(parts(), waits)
    got = bytearray(next(reading))
    raw.config_set("maxmemory", 1)
    got += b"".join(reading)
    assert bytes(got) == content
    assert any("memory limit" in why for why in said)

    raw.config_set("maxmemory", 1)
    monkeypatch.setattr(download, "PATIENCE_S", 0.3)
    with pytest.raises(ServerError, match="memory limit"):
        read(Reader(store))


def test_where_the_big_answers_find_no_room_the_reader_hears_of_it(
    store: Store, storage: Storage, raw: redis.Redis, start: Start, monkeypatch: pytest.MonkeyPatch
) -> None:
    from jobqueue.errors import ServerError as Full

    replace, said = download._replace, []

    def refusing(redis_: object, slot: int, head: bytes, content: bytes) -> bool:
        if content[:1] == ANSWER:
            raise Full("Redis is at its memory limit", "")
        return replace(redis_, slot, head, content)  # type: ignore[arg-type]

    monkeypatch.setattr(download, "_replace", refusing)
    monkeypatch.setattr(download, "PATIENCE_S", 0.5)
    start(Provider(store, storage, "control"))
    with pytest.raises(StorageError, match="memory limit"):
        read(Reader(store), waits=said.append)
    assert any("memory limit" in why for why in said)


def test_without_a_control_worker_a_reader_gives_up_and_says_what_to_do(
    store: Store, storage: Storage, monkeypatch: pytest.MonkeyPatch, raw: redis.Redis
) -> None:
    monkeypatch.setattr(download, "PATIENCE_S", 0.3)
    with pytest.raises(StorageError, match="no control worker answers") as error:
        read(Reader(store))
    assert "LORAQ_STORAGE" in error.value.do
    assert slots(raw) == []


@pytest.mark.parametrize("fault", ["the mount has gone", "it cannot be read"])
def test_a_storage_that_is_away_is_waited_for_and_told_at_last(
    fault: str,
    store: Store,
    storage: Storage,
    content: bytes,
    start: Start,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    away, here, top = tmp_path / "away", [], tmp_path / "storage"
    start(Provider(store, storage, "control"))

    def go() -> None:
        top.rename(away)
        top.write_text("") if fault == "it cannot be read" else top.mkdir()

    def come_back(why: str) -> None:
        if "storage" in why and not here:
            top.unlink() if top.is_file() else top.rmdir()
            away.rename(top)
            here.append(why)

    go()
    assert read(Reader(store), waits=come_back) == content
    assert here

    go()
    monkeypatch.setattr(download, "PATIENCE_S", 0.3)
    with pytest.raises(StorageError, match="a control worker cannot read it: "):
        read(Reader(store))


def test_a_laptop_that_slept_goes_on(
    store: Store, storage: Storage, content: bytes, start: Start, raw: redis.Redis, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its slots have expired, and its clock has jumped."""
    start(Provider(store, storage, "control"))
    clock, slept = time.monotonic, [0.0]
    monkeypatch.setattr("jobqueue.download.time.monotonic", lambda: clock() + slept[0])
    got = bytearray()
    for number, part in enumerate(Reader(store).read_parts(parts(), print)):
        got += part
        if number % 10 == 5:
            slept[0] += 3600
            for slot in slots(raw):
                raw.delete(slot)
            raw.delete(download.READERS)
    assert bytes(got) == content


def test_a_slow_line_takes_no_more_slots_than_it_can_empty_in_time(
    store: Store, storage: Storage, raw: redis.Redis, monkeypatch: pytest.MonkeyPatch, start: Start
) -> None:
    start(Provider(store, storage, "control"))
    clock, later = time.monotonic, [0.0]
    monkeypatch.setattr("jobqueue.download.time.monotonic", lambda: clock() + later[0])
    sha256 = hashlib.sha256

    def slowly(content: bytes) -> object:
        if threading.current_thread() is threading.main_thread():
            later[0] += 9  # to take a piece
        return sha256(content)

    monkeypatch.setattr("jobqueue.download.hashlib.sha256", slowly)
    used = [len(slots(raw)) for _ in Reader(store).read_parts(parts(), print)]
    assert max(used[download.FIRST_WISHES :]) == 3  # 30 s of the 120 that a piece lives


def test_the_hash_of_what_was_read_is_that_of_the_file(
    store: Store, storage: Storage, start: Start, content: bytes
) -> None:
    start(Provider(store, storage, "control"))
    manifest = json.loads(Reader(store).read_text(f"{FOLDER}/manifest.json"))
    entry = manifest["files"]["adapter/weights"]
    assert hashlib.sha256(read(Reader(store))).hexdigest() == entry["sha256"]
    assert entry["bytes"] == len(content)
