"""Files by way of a real server to a real storage: whole, each piece once, however often either side breaks off."""

from __future__ import annotations

import random
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import redis
from helpers import wait_for

from jobqueue import transfer
from jobqueue.errors import StorageError
from jobqueue.settings import Settings
from jobqueue.storage import Storage, blob_source
from jobqueue.store import Store
from jobqueue.transfer import SLOTS, Mover, Piece, Sender

PIECE = 16 * 1024
COUNT = 41  # pieces of the file, the last one short
DEADLINE_S = 60.0


@pytest.fixture(autouse=True)
def _small_and_quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(transfer, "PIECE_BYTES", PIECE)
    for name, seconds in {"LOOK_S": 0.01, "IDLE_S": 0.02, "LOST_S": 0.5, "PATIENCE_S": 20.0}.items():
        monkeypatch.setattr(transfer, name, seconds)


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "rows of data.jsonl"
    path.write_bytes(random.Random(7).randbytes(PIECE * (COUNT - 1) + 123))
    return path


@pytest.fixture
def storage(tmp_path: Path) -> Storage:
    return Storage(str(tmp_path / "storage"))


@pytest.fixture
def raw(redis_url: str) -> Iterator[redis.Redis]:
    with redis.Redis.from_url(redis_url) as client:
        yield client


Start = Callable[[Mover], None]


@pytest.fixture
def start() -> Iterator[Start]:
    """Runs movers until the test ends."""
    stop, threads = threading.Event(), []

    def run(mover: Mover) -> None:
        threads.append(threading.Thread(target=mover.run, args=(stop,)))
        threads[-1].start()

    yield run
    stop.set()
    for thread in threads:
        thread.join(DEADLINE_S)


def slots(raw: redis.Redis) -> list[str]:
    return [key.decode() for key in raw.keys("{loraq}:slot:*")]  # type: ignore[union-attr]


def arrived(storage: Storage, file: Path) -> bytes:
    return Path(storage.address("blobs/" + blob_source(file).removeprefix("loraq://"))).read_bytes()


def test_a_file_arrives_whole_and_leaves_nothing_behind(
    store: Store,
    storage: Storage,
    file: Path,
    start: Start,
    raw: redis.Redis,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(transfer, "LOST_S", 600)  # on a machine that stands still a piece is sent again, and expires
    seen: list[tuple[int, int]] = []
    start(Mover(store, storage, "control"))

    Sender(store, file, blob_source(file), lambda done, size: seen.append((done, size))).send()

    assert arrived(storage, file) == file.read_bytes()
    assert seen[-1] == (file.stat().st_size, file.stat().st_size)
    assert [done for done, _ in seen] == sorted(done for done, _ in seen)
    assert slots(raw) == []
    assert all(0 < raw.ttl(key) <= 600 for key in raw.keys("{loraq}:transfer*"))  # type: ignore[operator, union-attr]
    assert not (tmp_path / "storage" / "incoming").exists() or not list((tmp_path / "storage" / "incoming").iterdir())


def test_what_has_arrived_is_known_as_long_as_the_sender_is_there_however_slow_the_next_piece_is(
    store: Store, storage: Storage, file: Path, raw: redis.Redis
) -> None:
    mover, source = Mover(store, storage, "control"), blob_source(file)
    have = f"{{loraq}}:transfer:{source.removeprefix('loraq://').split('/')[0]}:have"
    sender = threading.Thread(target=Sender(store, file, source).send)
    sender.start()
    wait_for(lambda: mover.round() and raw.exists(have), DEADLINE_S, "some pieces have arrived")
    raw.expire(have, 5)

    wait_for(lambda: raw.ttl(have) > 500, DEADLINE_S, "it lives on")  # type: ignore[operator]
    while sender.is_alive():
        mover.round()
    assert arrived(storage, file) == file.read_bytes()


def test_no_more_than_16_pieces_are_on_the_server_and_they_expire(
    store: Store, storage: Storage, file: Path, raw: redis.Redis, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(transfer, "PATIENCE_S", 1.0)
    mover = Mover(store, storage, "control")
    monkeypatch.setattr(mover, "_take", lambda names: None)
    given_up: list[StorageError] = []

    def send() -> None:
        try:
            Sender(store, file, blob_source(file)).send()
        except StorageError as error:
            given_up.append(error)

    sender = threading.Thread(target=send)
    sender.start()
    wait_for(lambda: mover.round() and len(slots(raw)) == SLOTS, DEADLINE_S, "all slots are full")
    sender.join(DEADLINE_S)
    assert len(given_up) == 1
    assert len(slots(raw)) == SLOTS
    assert all(0 < raw.ttl(slot) <= 120 for slot in slots(raw))  # type: ignore[operator]


def test_a_transfer_that_broke_off_goes_on_with_what_is_missing(
    store: Store, storage: Storage, file: Path, start: Start, monkeypatch: pytest.MonkeyPatch, raw: redis.Redis
) -> None:
    class Gone(Exception):
        """The laptop's lid is closed."""

    def half(done: int, size: int) -> None:
        if done > size / 2:
            raise Gone

    start(Mover(store, storage, "control"))
    with pytest.raises(Gone):
        Sender(store, file, blob_source(file), half).send()
    wait_for(lambda: not slots(raw), DEADLINE_S, "what was on its way has arrived")
    raw.flushall()  # even the server may have forgotten it
    there = storage.pieces(blob_source(file)[8:72])
    assert COUNT / 2 < len(there) < COUNT

    sent: list[int] = []
    pack = Piece.pack
    monkeypatch.setattr(Piece, "pack", lambda piece: (sent.append(piece.number), pack(piece))[1])
    Sender(store, file, blob_source(file)).send()

    assert arrived(storage, file) == file.read_bytes()
    assert set(sent) == set(range(COUNT)) - there


def test_what_the_storage_has_is_not_sent_again(
    store: Store, storage: Storage, file: Path, start: Start, monkeypatch: pytest.MonkeyPatch
) -> None:
    storage.put_blob(file, blob_source(file))
    monkeypatch.setattr(Piece, "pack", lambda piece: pytest.fail("a piece was sent"))
    start(Mover(store, storage, "control"))
    Sender(store, file, blob_source(file)).send()


def test_a_damaged_piece_and_one_that_a_control_worker_lost_are_sent_again(
    store: Store, storage: Storage, file: Path, start: Start, monkeypatch: pytest.MonkeyPatch
) -> None:
    pack, put = Piece.pack, storage.put_piece
    damaged, lost = [3, 17], [5]

    def damaging(piece: Piece) -> bytes:
        packed = pack(piece)
        if piece.number in damaged:
            damaged.remove(piece.number)
            return packed[:-1] + bytes([packed[-1] ^ 1])
        return packed

    def losing(sha256: str, number: int, content: bytes) -> None:
        if number in lost:
            lost.remove(number)
            raise RuntimeError("kill -9, as it were: the piece is out of its slot, and nowhere else")
        put(sha256, number, content)

    monkeypatch.setattr(Piece, "pack", damaging)
    monkeypatch.setattr(storage, "put_piece", losing)
    start(Mover(store, storage, "control"))
    Sender(store, file, blob_source(file)).send()

    assert (damaged, lost) == ([], [])
    assert arrived(storage, file) == file.read_bytes()


def test_pieces_of_a_transfer_that_has_ended_do_not_keep_others_waiting(
    store: Store, storage: Storage, file: Path, start: Start, raw: redis.Redis
) -> None:
    for slot in range(SLOTS):
        raw.set(f"{{loraq}}:slot:{slot}", Piece(bytes(32), slot, b"left over").pack(), ex=120)
    start(Mover(store, storage, "control"))
    Sender(store, file, blob_source(file)).send()
    assert arrived(storage, file) == file.read_bytes()
    assert storage.pieces("00" * 32) == set()


def test_several_senders_and_control_workers_share_the_work(
    redis_url: str, storage: Storage, file: Path, start: Start, tmp_path: Path
) -> None:
    other = tmp_path / "other.jsonl"
    other.write_bytes(random.Random(8).randbytes(PIECE * 9 + 1))
    for name in ("one", "two", "three"):
        start(Mover(Store(redis_url), storage, name))
    senders = [
        threading.Thread(target=Sender(Store(redis_url), path, blob_source(path)).send) for path in (file, file, other)
    ]
    for sender in senders:
        sender.start()
    for sender in senders:
        sender.join(DEADLINE_S)
        assert not sender.is_alive()
    assert arrived(storage, file) == file.read_bytes()
    assert arrived(storage, other) == other.read_bytes()


def test_the_same_content_under_two_names_at_once_arrives_under_both(
    redis_url: str, storage: Storage, file: Path, start: Start, tmp_path: Path
) -> None:
    twin = tmp_path / "twin.jsonl"
    twin.write_bytes(file.read_bytes())
    start(Mover(Store(redis_url), storage, "control"))
    senders = [threading.Thread(target=Sender(Store(redis_url), f, blob_source(f)).send) for f in (file, twin)]
    for sender in senders:
        sender.start()
    for sender in senders:
        sender.join(DEADLINE_S)
        assert not sender.is_alive()
    assert arrived(storage, file) == arrived(storage, twin) == file.read_bytes()


def test_a_file_that_changes_on_its_way_is_refused(store: Store, storage: Storage, file: Path, start: Start) -> None:
    source = blob_source(file)
    content = file.read_bytes()
    file.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    start(Mover(store, storage, "control"))
    with pytest.raises(StorageError, match="what arrived is not the file that was announced"):
        Sender(store, file, source).send()
    assert not storage.has_blob(source, len(content))
    file.write_bytes(content)
    Sender(store, file, source).send()
    assert storage.has_blob(source, len(content))


def test_without_a_control_worker_a_sender_gives_up_and_says_what_to_do(
    store: Store, file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(transfer, "PATIENCE_S", 0.2)
    with pytest.raises(StorageError, match="no worker takes rows of data") as error:
        Sender(store, file, blob_source(file)).send()
    assert "LORAQ_STORAGE" in error.value.do


def test_a_storage_that_cannot_be_written_is_told_to_the_sender(
    store: Store, storage: Storage, file: Path, start: Start, tmp_path: Path
) -> None:
    (tmp_path / "storage").write_text("a file where the folder should be")
    start(Mover(store, storage, "control"))
    with pytest.raises(StorageError, match="did not reach the workers' storage: cannot"):
        Sender(store, file, blob_source(file)).send()


@pytest.mark.parametrize("name", ["../../x", "..", "a/b", ""])
def test_a_name_that_leads_out_of_the_storage_is_refused(
    name: str, store: Store, storage: Storage, file: Path, start: Start, tmp_path: Path
) -> None:
    start(Mover(store, storage, "control"))
    with pytest.raises(StorageError, match="is no name for a file"):
        Sender(store, file, f"{blob_source(file).rpartition('/')[0]}/{name}").send()
    assert not (tmp_path / "storage").exists()


def test_a_client_that_does_not_know_the_storage_submits_through_the_server(
    redis_url: str, storage: Storage, start: Start, tmp_path: Path
) -> None:
    from jobqueue.service import Client

    row = '{"question": "?", "options": ["a", "b"], "answer": "a"}\n'
    (tmp_path / "rows.jsonl").write_text(row)
    (tmp_path / "sweep.yaml").write_text("name: b\nbase_model: org/m\ndata: {source: rows.jsonl}\n")
    start(Mover(Store(redis_url), storage, "control"))
    client = Client(Settings(redis_url=redis_url, data_dir=tmp_path / "data", owner="ada"))

    batch = client.submit(client.plan(client.read(tmp_path / "sweep.yaml")))

    train = client.job(batch.jobs[0])
    assert Path(storage.fetch_source(train.spec["data"]["source"], tmp_path / "fetched")).read_text() == row
    assert not (tmp_path / "data").exists()
