"""Shared storage, in a folder and in an fsspec file system: what is half-done is never taken for done."""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path

import fsspec
import pytest

from jobqueue.errors import NotFoundError, StorageError
from jobqueue.job import Claim
from jobqueue.storage import Storage, attempt_folder, blob_source, job_folder


@pytest.fixture(params=["folder", "memory"])
def storage(request: pytest.FixtureRequest, tmp_path: Path) -> Storage:
    return Storage(f"memory://{tmp_path.name}" if request.param == "memory" else str(tmp_path / "storage"))


@pytest.fixture
def made(tmp_path: Path) -> Path:
    """What an attempt left behind."""
    folder = tmp_path / "made"
    (folder / "adapter").mkdir(parents=True)
    (folder / "adapter" / "weights.bin").write_bytes(b"\x00\xff" * 5000)
    (folder / "log.txt").write_text("ü\n")
    return folder


def claim(attempt: int = 1, nonce: str = "ab", batch: str = "b", job: str = "b.1") -> Claim:
    return Claim(job, attempt, nonce, {}, batch, 0, 60)


def files(storage: Storage) -> list[str]:
    return sorted(path for path in storage._fs.find(storage._root))


def test_a_published_folder_has_everything_and_a_manifest_with_right_hashes(storage: Storage, made: Path) -> None:
    written = storage.publish(made, attempt_folder(claim()), {"outcome": {"loss": 1}})

    found = storage.published("b.1", "b")
    assert found is not None
    assert found.folder == "batches/b/b.1/1-ab"
    assert found.manifest == written
    assert found.manifest["outcome"] == {"loss": 1}
    assert set(found.manifest["files"]) == {"adapter/weights.bin", "log.txt"}
    for name, entry in found.manifest["files"].items():
        with fsspec.open(storage.address(f"{found.folder}/{name}"), "rb") as file:
            content = file.read()
        assert entry == {"sha256": hashlib.sha256(content).hexdigest(), "bytes": len(content)}
        assert content == (made / name).read_bytes()
    assert not [name for name in files(storage) if name.endswith(".part")]


def test_a_folder_without_a_manifest_is_not_published_however_much_is_in_it(storage: Storage, made: Path) -> None:
    storage.publish(made, attempt_folder(claim()), {})
    storage._fs.rm(f"{storage._root}/batches/b/b.1/1-ab/manifest.json")

    assert storage.published("b.1", "b") is None


def test_an_upload_that_breaks_off_is_not_published(
    storage: Storage, made: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    put, sent = storage._put, []

    def breaks(path: Path, target: str) -> None:
        if sent:
            raise OSError("connection lost")
        sent.append(path)
        put(path, target)

    monkeypatch.setattr(storage, "_put", breaks)

    with pytest.raises(StorageError, match="connection lost"):
        storage.publish(made, attempt_folder(claim()), {})
    assert len(sent) == 1
    assert storage.published("b.1", "b") is None


def test_the_newest_complete_attempt_counts_by_number(storage: Storage, made: Path) -> None:
    for attempt in (2, 10, 9):
        storage.publish(made, attempt_folder(claim(attempt)), {"n": attempt})
    storage.publish(made, attempt_folder(claim(11)), {"n": 11})
    storage._fs.rm(f"{storage._root}/batches/b/b.1/11-ab/manifest.json")

    found = storage.published("b.1", "b")
    assert found is not None
    assert found.manifest["n"] == 10


def test_what_another_submission_has_published_does_not_count_for_this_one(storage: Storage, made: Path) -> None:
    storage.publish(made, attempt_folder(claim(1)), {"submission": "this"})
    storage.publish(made, attempt_folder(claim(7)), {"submission": "that"})

    found = storage.published("b.1", "b", "this")
    assert found is not None
    assert found.folder == "batches/b/b.1/1-ab"
    assert storage.published("b.1", "b", "a third") is None


def test_other_things_in_a_jobs_folder_do_no_harm(storage: Storage, made: Path) -> None:
    storage.publish(made, attempt_folder(claim()), {"n": 1})
    for stray in (".nfs00000001", ".DS_Store", "notes-by-hand"):
        storage._fs.pipe_file(f"{storage._root}/batches/b/b.1/{stray}", b"x")

    found = storage.published("b.1", "b")
    assert found is not None
    assert found.manifest["n"] == 1


def test_nothing_is_published_of_a_job_that_never_ran(storage: Storage) -> None:
    assert storage.published("b.1", "b") is None
    assert storage.published("base-0a", "") is None


def test_evaluations_of_base_models_lie_outside_of_batches() -> None:
    assert job_folder("base-0a", "") == "evaluations/base-0a"
    assert attempt_folder(claim(3, "cd", batch="", job="base-0a")) == "evaluations/base-0a/3-cd"


def test_two_attempts_never_write_into_one_folder(storage: Storage, made: Path) -> None:
    """axolotl#3079"""
    storage.publish(made, attempt_folder(claim(1, "ab")), {})
    storage.publish(made, attempt_folder(claim(1, "cd")), {})

    assert storage._fs.exists(f"{storage._root}/batches/b/b.1/1-ab/manifest.json")
    assert storage._fs.exists(f"{storage._root}/batches/b/b.1/1-cd/manifest.json")


def test_an_adapter_is_fetched_as_a_folder_of_this_machine(storage: Storage, made: Path, tmp_path: Path) -> None:
    storage.publish(made, attempt_folder(claim()), {})

    folder = storage.fetch("batches/b/b.1/1-ab/adapter", tmp_path / "fetched")

    assert [path.name for path in folder.iterdir()] == ["weights.bin"]
    assert (folder / "weights.bin").read_bytes() == (made / "adapter" / "weights.bin").read_bytes()
    assert folder == tmp_path / "fetched"


# -- data files


def test_a_data_file_is_kept_by_its_content_and_read_back(storage: Storage, tmp_path: Path) -> None:
    file = tmp_path / "rows ü.jsonl"
    file.write_bytes(b"{}\n")
    source = blob_source(file)

    storage.put_blob(file, source)

    assert source == f"loraq://{hashlib.sha256(b'{}' + bytes([10])).hexdigest()}/rows ü.jsonl"
    assert storage.fetch_source(source, tmp_path / "fetched") == str(tmp_path / "fetched" / "rows ü.jsonl")
    assert (tmp_path / "fetched" / "rows ü.jsonl").read_bytes() == b"{}\n"


def test_a_data_file_is_uploaded_once(storage: Storage, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "rows.jsonl"
    file.write_text("{}\n")
    storage.put_blob(file, blob_source(file))
    monkeypatch.setattr(storage, "_put", lambda *_: pytest.fail("uploaded again"))

    storage.put_blob(file, blob_source(file))


def test_a_data_file_that_is_there_in_part_is_uploaded_again(storage: Storage, tmp_path: Path) -> None:
    file = tmp_path / "rows.jsonl"
    file.write_text("{}\n" * 10)
    source = blob_source(file)
    target = f"{storage._root}/blobs/{source.removeprefix('loraq://')}"
    storage._fs.makedirs(target.rpartition("/")[0])
    storage._fs.pipe_file(target, b"{}")

    storage.put_blob(file, source)

    assert storage._fs.cat_file(target) == file.read_bytes()


@pytest.mark.parametrize("source", ["owner/name", "s3://bucket/rows.jsonl", "/data/rows.jsonl"])
def test_other_sources_are_left_as_they_are(storage: Storage, source: str, tmp_path: Path) -> None:
    assert storage.fetch_source(source, tmp_path / "fetched") == source


# -- when it cannot be used


def test_text_that_is_not_there_says_so(storage: Storage) -> None:
    with pytest.raises(NotFoundError, match=r"report\.json is not in the storage"):
        storage.read_text("batches/b/report.json")


def test_text_is_replaced_whole(storage: Storage) -> None:
    storage.write_text("batches/b/report.json", json.dumps({"n": "ü" * 100}))
    storage.write_text("batches/b/report.json", "{}")

    assert storage.read_text("batches/b/report.json") == "{}"
    assert len(files(storage)) == 1


def test_a_folder_that_cannot_be_written_is_named_with_what_to_do(tmp_path: Path, made: Path) -> None:
    (tmp_path / "a-file").write_text("in the way")
    storage = Storage(str(tmp_path / "a-file" / "storage"))

    for write in (lambda: storage.write_text("x", "y"), lambda: storage.publish(made, "f", {})):
        with pytest.raises(StorageError, match="cannot write in the storage") as error:
            write()
        assert "LORAQ_STORAGE" in error.value.do
    assert os.listdir(tmp_path / "made")


def test_a_storage_of_an_unknown_kind_is_refused(tmp_path: Path) -> None:
    with pytest.raises(StorageError, match="nonsense"):
        Storage("nonsense://bucket/x")
