"""Trials' files on a machine of their user: whole or not there, never mixed, never outside of their folder."""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
import threading
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from helpers import must_claim, new_job, submit

from jobqueue import download, target, transfer
from jobqueue.archive import archive
from jobqueue.download import Provider
from jobqueue.errors import LoraqError, MachineError, NotFoundError, StorageError, TargetError
from jobqueue.job import JobState, Settlement
from jobqueue.pull import PARTS, Pulled
from jobqueue.service import Client
from jobqueue.settings import Settings
from jobqueue.storage import Storage, attempt_folder
from jobqueue.store import Store

PIECE = 16 * 1024
WEIGHTS = random.Random(7).randbytes(20 * PIECE + 5)
EVALUATION = {"source": "rows", "metrics": ["likelihood"]}
OF_MODEL = {"base_model": "m", "load_in_4bit": True, "dtype": None}
ADAPTER = {
    "adapter/adapter_config.json": b"{}",
    "adapter/adapter_model.safetensors": WEIGHTS,
    "adapter/tokenizer.json": b"tokens",
    "adapter/empty": b"",
    "adapter/same": b"tokens",
    "log.txt": b"trained\n",
    "tensorboard/events": b"curves",
}
DEADLINE_S = 60.0


@pytest.fixture(autouse=True)
def _small_and_quick(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for module in (download, transfer, target):
        monkeypatch.setattr(module, "PIECE_BYTES", PIECE)
    for module in (download, transfer):
        monkeypatch.setattr(module, "LOOK_S", 0.01)
    monkeypatch.setattr(transfer, "IDLE_S", 0.02)
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")


@pytest.fixture
def storage(settings: Settings) -> Storage:
    opened = Storage(settings.storage_url)
    opened.pin()
    return opened


@pytest.fixture
def near(settings: Settings) -> Client:
    """On a machine that can read the storage."""
    return Client(settings)


@pytest.fixture
def afar(settings: Settings, store: Store, storage: Storage) -> Iterator[Client]:
    """On a machine that cannot, with a control worker elsewhere."""
    alive(store)
    stop = threading.Event()
    running = threading.Thread(target=Provider(Store(store.url), storage, "control").run, args=(stop,))
    running.start()
    yield Client(Settings(redis_url=settings.redis_url, data_dir=settings.data_dir))
    stop.set()
    running.join(DEADLINE_S)


@pytest.fixture(params=["near", "afar"])
def client(request: pytest.FixtureRequest) -> Client:
    """Each way must do the same."""
    found: Client = request.getfixturevalue(request.param)
    return found


def alive(store: Store) -> None:
    info = {"host": "h", "device": "control", "uuid": "", "usable_bytes": 0, "slots": 1, "running": []}
    store.heartbeat("h/control", "control", {**info, "every_s": 60})


def run(store: Store, storage: Storage, made: dict[str, bytes], tmp_path: Path) -> str:
    """The next job, to its end: it leaves those files; the folder."""
    claim = must_claim(store)
    local = tmp_path / f"made-{claim.job_id}-{claim.attempt}"
    for name, content in made.items():
        (local / name).parent.mkdir(parents=True, exist_ok=True)
        (local / name).write_bytes(content)
    storage.publish(local, attempt_folder(claim), {"job": claim.job_id})
    store.settle(claim, Settlement(JobState.SUCCEEDED, outcome={"folder": attempt_folder(claim)}))
    return attempt_folder(claim)


def trained(store: Store, storage: Storage, tmp_path: Path, name: str = "b", *adapters: dict[str, bytes]) -> list[str]:
    """A batch of trainings alone; their folders."""
    adapters = adapters or (ADAPTER,)
    jobs = [new_job(f"{name}.{number}") for number in range(1, len(adapters) + 1)]
    submit(store, *jobs)
    return [run(store, storage, made, tmp_path) for made in adapters]


def pulled(client: Client, trial: str, folder: str | None = None, **options: Any) -> Pulled:
    [done] = client.pull(client.plan_pull(trial, Path(folder) if folder else None, **options))
    return done


def there(folder: str | Path) -> dict[str, bytes]:
    """All that lies in a folder, but for what pull notes for itself."""
    top = Path(folder)
    files = (path for path in top.rglob("*") if path.is_file() and path.name != target.RECEIPT)
    return {path.relative_to(top).as_posix(): path.read_bytes() for path in files}


def adapter(made: dict[str, bytes]) -> dict[str, bytes]:
    return {name.removeprefix("adapter/"): content for name, content in made.items() if name.startswith("adapter/")}


# -- what is copied


def test_an_adapter_lies_where_peft_looks_for_it_and_a_second_pull_copies_nothing(
    client: Client, store: Store, storage: Storage, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trained(store, storage, tmp_path)

    done = pulled(client, "b/1")

    assert there("b-1") == adapter(ADAPTER)
    assert (done.trial, done.target) == ("b/1", Path("b-1").resolve())
    assert done.bytes == sum(map(len, adapter(ADAPTER).values()))
    assert done.copied_bytes == sum(map(len, {*adapter(ADAPTER).values()})), "the same content was copied twice"
    assert sorted(path.name for path in Path().iterdir()) == ["b-1"]

    for kind in (Storage, download.Reader):
        monkeypatch.setattr(kind, "read_parts", lambda *_: pytest.fail("a file is read again"))
    before = {path: path.stat().st_mtime_ns for path in Path("b-1").iterdir()}
    assert pulled(client, "b/1").copied_bytes == 0
    assert {path: path.stat().st_mtime_ns for path in Path("b-1").iterdir()} == before


def test_every_part_has_a_place_of_its_own_and_one_does_not_bar_another(
    client: Client, store: Store, storage: Storage, tmp_path: Path
) -> None:
    questions = {"questions.jsonl": b"{}\n", "log.txt": b"scored\n"}
    evaluate = {"kind": "evaluate", "spec": {"kind": "evaluate", **OF_MODEL, "evaluation": EVALUATION}}
    own = {**evaluate["spec"], "adapter_job": "b.1"}  # type: ignore[dict-item]
    submit(
        store,
        new_job("b.1"),
        new_job("b.1.export", kind="export", spec={"kind": "export", "adapter_job": "b.1"}, needs=("b.1",)),
        new_job("b.1.eval", kind="evaluate", spec=own, needs=("b.1.export",)),
        new_job("base-0", batch="", kind="evaluate", spec=evaluate["spec"], needs=("b.1.eval",)),
    )
    run(store, storage, ADAPTER, tmp_path)
    run(store, storage, {"merged_16bit/config.json": b"{}", "log.txt": b"merged\n"}, tmp_path)
    run(store, storage, {**questions, "answers.jsonl": b"[]\n"}, tmp_path)
    run(store, storage, questions, tmp_path)

    logs = {
        "logs/b.1.txt": b"trained\n",
        "logs/b.1.export.txt": b"merged\n",
        "logs/b.1.eval.txt": b"scored\n",
        "logs/tensorboard/events": b"curves",
    }
    scores = {
        "scores/b.1.eval/questions.jsonl": b"{}\n",
        "scores/b.1.eval/answers.jsonl": b"[]\n",
        "scores/base-0/questions.jsonl": b"{}\n",
    }
    merged = {"merged_16bit/config.json": b"{}"}
    pulled(client, "b/1", "some", what=["log"])
    assert there("some") == logs
    pulled(client, "b/1", "some", what=["scores"])
    assert there("some") == logs | scores
    pulled(client, "b.1", "some")
    pulled(client, "b/1", "some", what=["export"])
    assert there("some") == adapter(ADAPTER) | logs | scores | merged
    assert pulled(client, "b/1", "some", what=PARTS).copied_bytes == len(b"scored\n")  # of the base model
    assert there("some") == adapter(ADAPTER) | logs | scores | merged | {"logs/base-0.txt": b"scored\n"}


def test_what_loraq_export_has_made_is_found_by_the_trial_and_by_its_own_name(
    client: Client, store: Store, storage: Storage, tmp_path: Path
) -> None:
    trained(store, storage, tmp_path)
    with pytest.raises(NotFoundError, match="b/1 has no export") as error:
        pulled(client, "b/1", what=["export"])
    assert "loraq export b/1" in error.value.do
    for batch, content in (("b-export", b"old"), ("b-export-2", b"new")):
        spec = {"kind": "export", "adapter_job": "b.1"}
        store.submit(batch, "ann", 1, "m", [new_job(f"{batch}.1.export", kind="export", spec=spec, batch=batch)],
                     [f"{batch}.1.export"])  # fmt: skip
        run(store, storage, {"gguf/b.1.gguf": content}, tmp_path)

    pulled(client, "b/1", what=["export"])
    pulled(client, "b-export/1")

    assert there("b-1") == {"gguf/b.1.gguf": b"new"}
    assert there("b-export-1") == {"gguf/b.1.gguf": b"old"}


def test_a_batch_that_was_archived_can_be_pulled(
    client: Client, store: Store, storage: Storage, tmp_path: Path
) -> None:
    trained(store, storage, tmp_path)
    assert archive(store, storage, "b")
    pulled(client, "b/1")
    assert there("b-1") == adapter(ADAPTER)


@pytest.mark.parametrize(
    ("trial", "what", "said", "do"),
    [
        ("c/1", "adapter", "there is no batch 'c'", "loraq ls"),
        ("b/7", "adapter", "b has no trial 7", "loraq ls b"),
        ("b", "adapter", "'b' is no trial", "BATCH/NUMBER"),
        ("../b/1", "adapter", "'../b/1' is no trial", "BATCH/NUMBER"),
        ("b/1", "scores", "b/1 has no scores", "--what"),
        ("b/2", "adapter", "b/2 has no adapter: b.2 is queued", "loraq watch b"),
    ],
)
def test_what_is_not_there_is_told(
    trial: str, what: Any, said: str, do: str, near: Client, store: Store, storage: Storage, tmp_path: Path
) -> None:
    submit(store, new_job("b.1"), new_job("b.2"))
    run(store, storage, ADAPTER, tmp_path)
    with pytest.raises(NotFoundError) as error:
        pulled(near, trial, what=[what])
    assert error.value.what == said
    assert do in error.value.do


def test_files_that_were_removed_are_told(client: Client, store: Store, storage: Storage, tmp_path: Path) -> None:
    [folder] = trained(store, storage, tmp_path)
    storage.remove(folder)
    with pytest.raises(NotFoundError, match=r"what b\.1 has made is no longer in the storage"):
        pulled(client, "b/1")


def test_without_storage_and_control_worker_it_is_said_what_to_do(
    settings: Settings, store: Store, storage: Storage, tmp_path: Path
) -> None:
    trained(store, storage, tmp_path)
    with pytest.raises(StorageError, match="no control worker is alive") as error:
        pulled(Client(Settings(redis_url=settings.redis_url)), "b/1")
    assert "LORAQ_STORAGE" in error.value.do


def test_a_storage_that_is_known_but_not_mounted_here_is_read_through_the_server(
    afar: Client, settings: Settings, store: Store, storage: Storage, tmp_path: Path
) -> None:
    trained(store, storage, tmp_path)
    (tmp_path / "mount").mkdir()
    pulled(Client(replace(settings, storage=str(tmp_path / "mount"))), "b/1")
    assert there("b-1") == adapter(ADAPTER)


# -- what is in the way


def test_other_files_are_left_alone_unless_forced_and_trials_are_never_mixed(
    client: Client, store: Store, storage: Storage, tmp_path: Path
) -> None:
    second = {
        "adapter/adapter_config.json": b"{}",
        "adapter/adapter_model.safetensors": b"of the second",
        "adapter/chat_template.jinja": b"of the second alone",
    }
    trained(store, storage, tmp_path, "b", ADAPTER, second)
    pulled(client, "b/2", "own")
    Path("own/notes.txt").write_text("mine")
    before = there("own")

    with pytest.raises(TargetError, match="holds b/2") as error:
        pulled(client, "b/1", "own")
    assert "--force" in error.value.do
    with pytest.raises(TargetError, match="holds b/2"):
        pulled(client, "b/1", "own", what=["log"])  # no file is in its way, but nobody would know whose log it is
    assert there("own") == before

    pulled(client, "b/1", "own", force=True)
    assert there("own") == adapter(ADAPTER) | {"notes.txt": b"mine"}


def test_a_file_that_two_trials_share_bars_neither(
    client: Client, store: Store, storage: Storage, tmp_path: Path
) -> None:
    more = {**ADAPTER, "adapter/more.json": b"more"}
    trained(store, storage, tmp_path, "b", ADAPTER, more)
    pulled(client, "b/1", "own")
    assert pulled(client, "b/2", "own").copied_bytes == len(b"more")
    assert there("own") == adapter(more)


def test_a_file_that_was_changed_is_told_and_replaced_only_by_force(
    client: Client, store: Store, storage: Storage, tmp_path: Path
) -> None:
    trained(store, storage, tmp_path)
    pulled(client, "b/1")
    Path("b-1/tokenizer.json").write_bytes(b"tokenS")
    with pytest.raises(TargetError, match=r"has another tokenizer\.json"):
        pulled(client, "b/1")
    done = pulled(client, "b/1", force=True)
    assert done.copied_bytes == len(b"tokens")
    assert there("b-1") == adapter(ADAPTER)


def test_a_folder_of_ones_own_is_filled_beside_what_is_in_it(
    client: Client, store: Store, storage: Storage, tmp_path: Path
) -> None:
    trained(store, storage, tmp_path)
    Path("notes.txt").write_text("mine")
    pulled(client, "b/1", ".")
    assert there(".") == adapter(ADAPTER) | {"notes.txt": b"mine"}


def test_a_file_where_the_folder_should_be_is_told(
    near: Client, store: Store, storage: Storage, tmp_path: Path
) -> None:
    trained(store, storage, tmp_path)
    Path("b-1").write_text("mine")
    with pytest.raises(TargetError, match="is no folder"):
        pulled(near, "b/1", force=True)
    assert Path("b-1").read_text() == "mine"


def test_no_link_in_the_target_leads_out_of_it(client: Client, store: Store, storage: Storage, tmp_path: Path) -> None:
    trained(store, storage, tmp_path)
    for name in ("elsewhere", "t"):
        Path(name).mkdir()
    Path("mine").write_text("mine")
    Path("t/logs").symlink_to("../elsewhere")
    with pytest.raises(TargetError, match="leads out of"):
        pulled(client, "b/1", "t", what=["log"], force=True)
    assert list(Path("elsewhere").iterdir()) == []

    Path("t/tokenizer.json").symlink_to("../mine")
    Path("t", target.RECEIPT).symlink_to("../mine")
    with pytest.raises(TargetError, match=r"another tokenizer\.json"):
        pulled(client, "b/1", "t")
    pulled(client, "b/1", "t", force=True)
    assert Path("mine").read_text() == "mine"
    assert Path("t/tokenizer.json").read_bytes() == b"tokens"


def test_what_arrives_is_not_written_through_links_that_somebody_has_laid(
    near: Client, store: Store, storage: Storage, tmp_path: Path
) -> None:
    trained(store, storage, tmp_path)
    plan = near.plan_pull("b/1")
    Path("mine").write_bytes(b"mine")
    Path("b-1.loraq-pull").mkdir()
    for sha256 in {file.sha256 for file in plan.target.files}:
        Path("b-1.loraq-pull", sha256).symlink_to("../mine")
    with pytest.raises(MachineError, match="cannot write"):
        near.pull(plan)
    assert Path("mine").read_bytes() == b"mine"


# -- what the storage says


@pytest.mark.parametrize(
    "name",
    ["../../x", "/etc/x", "adapter/../../x", "adapter//x", "adapter/./x", "adapter\\..\\x", "adapter/\x1b[2J", ""],
)
def test_a_manifest_with_a_name_that_leads_elsewhere_is_refused(
    name: str, client: Client, store: Store, storage: Storage, tmp_path: Path
) -> None:
    [folder] = trained(store, storage, tmp_path)
    manifest = json.loads(storage.read_text(f"{folder}/manifest.json"))
    manifest["files"][name] = manifest["files"]["log.txt"]
    storage.write_text(f"{folder}/manifest.json", json.dumps(manifest))
    with pytest.raises(StorageError, match="which is no file of that folder"):
        pulled(client, "b/1")
    assert list(Path().iterdir()) == []


@pytest.mark.parametrize(
    "text", ["", "[]", "{}", '{"files": []}', '{"files": {"a": 1}}', '{"files": {"a": {"sha256": "../x", "bytes": 1}}}',
             '{"files": {"a": {"sha256": "%s", "bytes": -1}}}' % (64 * "a")],
)  # fmt: skip
def test_what_is_no_manifest_is_refused(
    text: str, client: Client, store: Store, storage: Storage, tmp_path: Path
) -> None:
    [folder] = trained(store, storage, tmp_path)
    storage.write_text(f"{folder}/manifest.json", text)
    with pytest.raises(StorageError, match="is no manifest"):
        pulled(client, "b/1")


@pytest.mark.parametrize("content", [WEIGHTS[:-1], WEIGHTS[:-1] + b"?", WEIGHTS[:PIECE], b""])
def test_a_file_that_is_not_what_was_published_never_appears(
    content: bytes, client: Client, store: Store, storage: Storage, tmp_path: Path
) -> None:
    [folder] = trained(store, storage, tmp_path)
    weights = Path(storage.address(f"{folder}/adapter/adapter_model.safetensors"))
    weights.write_bytes(content)
    with pytest.raises(StorageError, match="is not what its manifest says"):
        pulled(client, "b/1")
    assert not Path("b-1").exists()

    weights.write_bytes(WEIGHTS)
    pulled(client, "b/1")
    assert there("b-1") == adapter(ADAPTER)


def test_a_record_with_another_folder_reads_nothing_there(
    client: Client, store: Store, storage: Storage, tmp_path: Path
) -> None:
    trained(store, storage, tmp_path)
    store._redis.hset("{loraq}:job:b.1", "outcome", json.dumps({"folder": "../elsewhere"}))
    with pytest.raises(StorageError, match="is no folder of a job"):
        pulled(client, "b/1")


# -- what breaks off


class Gone(Exception):
    """The laptop's lid is closed, or somebody has pressed Ctrl-C."""


def broken_off(client: Client, after: int = 8 * PIECE, folder: str | None = None) -> None:
    def progress(trial: str, arrived: int, size: int, why: str) -> None:
        if arrived >= after:
            raise Gone

    with pytest.raises(Gone):
        client.pull(client.plan_pull("b/1", Path(folder) if folder else None), progress=progress)


@pytest.mark.parametrize("folder", [None, "."])
def test_a_copy_that_broke_off_leaves_nothing_that_looks_complete_and_goes_on(
    folder: str | None, client: Client, store: Store, storage: Storage, tmp_path: Path
) -> None:
    trained(store, storage, tmp_path)

    broken_off(client, folder=folder)

    assert not Path("b-1").exists()
    assert not list(Path().rglob("adapter_*"))
    seen: list[tuple[int, int]] = []
    plan = client.plan_pull("b/1", Path(folder) if folder else None)
    [done] = client.pull(plan, progress=lambda trial, arrived, size, why: seen.append((arrived, size)))
    assert seen[0][0] >= 8 * PIECE
    assert seen[-1] == (done.bytes, done.bytes)
    assert done.copied_bytes == done.bytes - seen[0][0]
    assert there(done.target) == adapter(ADAPTER)
    assert not list(Path().glob("*loraq-pull"))
    assert not list(Path().glob(".loraq-pull"))


def test_what_was_damaged_on_this_disk_meanwhile_is_copied_again(
    client: Client, store: Store, storage: Storage, tmp_path: Path
) -> None:
    trained(store, storage, tmp_path)
    broken_off(client)
    [half] = [path for path in Path("b-1.loraq-pull").iterdir() if path.stat().st_size > PIECE]
    half.write_bytes(bytes(half.stat().st_size - 7))
    with pytest.raises(StorageError, match="is not what its manifest says"):
        pulled(client, "b/1")
    assert not Path("b-1").exists()
    pulled(client, "b/1")
    assert there("b-1") == adapter(ADAPTER)


def test_a_pull_that_is_killed_while_it_puts_files_in_place_goes_on(
    near: Client, store: Store, storage: Storage, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    second = {"adapter/adapter_config.json": b"{2}", "adapter/adapter_model.safetensors": b"2"}
    trained(store, storage, tmp_path, "b", ADAPTER, second)
    pulled(near, "b/2", "own")
    replace = os.replace

    def killed(source: Path, to: Path) -> None:
        if Path(to).name == "adapter_config.json":
            raise Gone
        replace(source, to)

    for folder in ("own", "new"):
        monkeypatch.setattr("jobqueue.target.os.replace", killed)
        with pytest.raises(Gone):
            pulled(near, "b/1", folder, force=True)
        assert not Path(folder, "adapter_config.json").exists(), "it looks complete"
        monkeypatch.undo()
        monkeypatch.chdir(tmp_path / "here")
        pulled(near, "b/1", folder, force=True)
        assert there(folder) == adapter(ADAPTER)


def test_two_pulls_into_one_folder_do_not_mix(near: Client, store: Store, storage: Storage, tmp_path: Path) -> None:
    trained(store, storage, tmp_path)
    begun, go_on = threading.Event(), threading.Event()

    def progress(trial: str, arrived: int, size: int, why: str) -> None:
        begun.set()
        go_on.wait(DEADLINE_S)

    first = threading.Thread(target=lambda: near.pull(near.plan_pull("b/1"), progress=progress))
    first.start()
    assert begun.wait(DEADLINE_S)
    with pytest.raises(LoraqError, match="another `loraq pull` fills"):
        pulled(near, "b/1")
    go_on.set()
    first.join(DEADLINE_S)
    assert there("b-1") == adapter(ADAPTER)


def test_where_there_is_no_room_for_all_of_them_nothing_is_begun(
    near: Client, store: Store, storage: Storage, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trained(store, storage, tmp_path, "b", ADAPTER, ADAPTER)
    size = sum(map(len, {*adapter(ADAPTER).values()}))
    usage = type("usage", (), {"free": 2 * size - 1})
    monkeypatch.setattr("jobqueue.target.shutil.disk_usage", lambda path: usage)
    plans = [near.plan_pull(f"b/{number}") for number in (1, 2)]
    with pytest.raises(MachineError, match=f"{2 * size:,} bytes are to come, and {2 * size - 1:,} are free") as error:
        near.pull(*plans)
    assert "TARGET" in error.value.do
    assert list(Path().iterdir()) == []
    usage.free = 2 * size  # type: ignore[attr-defined]
    assert len(near.pull(*plans)) == 2


def test_a_disk_that_is_full_in_between_is_told_and_what_arrived_is_kept(
    storage: Storage, settings: Settings, store: Store, tmp_path: Path
) -> None:
    trained(store, storage, tmp_path)
    program = (  # a limit of the process stands for that of the disk
        "import resource, signal, sys; from pathlib import Path; from jobqueue.service import Client;"
        "from jobqueue.settings import Settings; signal.signal(signal.SIGXFSZ, signal.SIG_IGN);"
        f"resource.setrlimit(resource.RLIMIT_FSIZE, ({6 * PIECE}, -1));"
        "client = Client(Settings(redis_url=sys.argv[1], storage=sys.argv[2]));"
        "client.pull(client.plan_pull('b/1'))"
    )
    command = [sys.executable, "-P", "-c", program, store.url, settings.storage_url]
    root = Path(__file__).parents[2]
    done = subprocess.run(
        command,
        capture_output=True,
        text=True,
        check=False,
        timeout=DEADLINE_S,
        env={**os.environ, "PYTHONPATH": str(root)},
    )
    assert "MachineError: cannot write" in done.stderr
    assert not Path("b-1").exists()


# -- who else is there


def test_several_machines_pull_at_once(afar: Client, store: Store, storage: Storage, tmp_path: Path) -> None:
    trained(store, storage, tmp_path)
    clients = [Client(afar.settings) for _ in range(5)]
    threads = [
        threading.Thread(target=pulled, args=(client, "b/1", f"t{number}")) for number, client in enumerate(clients)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(DEADLINE_S)
        assert not thread.is_alive()
    assert all(there(f"t{number}") == adapter(ADAPTER) for number in range(5))


def test_a_batch_that_is_removed_in_between_is_told(
    afar: Client, store: Store, storage: Storage, tmp_path: Path
) -> None:
    [folder] = trained(store, storage, tmp_path)

    def progress(trial: str, arrived: int, size: int, why: str) -> None:
        if arrived:
            storage.remove(folder)

    with pytest.raises(NotFoundError, match=r"is no file that a job has published|is not in the storage"):
        afar.pull(afar.plan_pull("b/1"), progress=progress)
    assert not Path("b-1").exists()


def test_results_of_an_archived_batch_are_shown_where_the_storage_is_out_of_reach(
    near: Client, afar: Client, store: Store, storage: Storage, tmp_path: Path
) -> None:
    trained(store, storage, tmp_path)
    jobs = near.jobs("b")
    assert archive(store, storage, "b")
    assert afar.jobs("b") == jobs
