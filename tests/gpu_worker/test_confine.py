"""What a spec may make a worker read."""

from __future__ import annotations

from pathlib import Path

import pytest

from gpu_worker.confine import check_source
from jobqueue.errors import LoraqError

HASH = "0" * 64


@pytest.fixture
def root(tmp_path: Path) -> Path:
    (tmp_path / "models" / "tiny").mkdir(parents=True)
    (tmp_path / "secret").mkdir()
    (tmp_path / "models" / "link").symlink_to(tmp_path / "secret")
    return tmp_path


@pytest.mark.parametrize(
    "source",
    [
        f"loraq://{HASH}/train.jsonl.gz",
        "unsloth/Llama-3.2-1B-Instruct",
        "gpt2",
        "https://example.org/rows.jsonl",
        "s3://bucket/rows.parquet",
        "storage:batches/medqa/medqa.1/1-ab12/adapter",
        "{root}/models/tiny",
        "{root}/models",
    ],
)
def test_submitted_data_hubs_addresses_and_allowed_folders_are_read(root: Path, source: str) -> None:
    check_source(source.format(root=root), [root / "models"])


@pytest.mark.parametrize(
    "source",
    [
        "/etc/passwd",
        "{root}/secret",
        "{root}/models/../secret",
        "{root}/models/link",
        "file:///etc/passwd",
        "storage:batches/../../etc/adapter",
        "storage:batches/medqa/medqa.1/../adapter",
        "storage:/etc/passwd",
        "local:///etc/passwd",
        "simplecache::file:///etc/passwd",
        "https://example.org::file:///etc/passwd",
        "loraq://../../../etc/passwd",
        f"loraq://{HASH}/..",
        f"loraq://{HASH}/a/b",
        "../../etc/passwd",
        "..",
        "owner/..",
        "",
    ],
)
def test_everything_else_is_refused(root: Path, source: str) -> None:
    with pytest.raises(LoraqError, match="nothing that this worker may read"):
        check_source(source.format(root=root), [root / "models"])


def test_by_default_every_folder_of_the_worker_may_be_read(root: Path) -> None:
    check_source(str(root / "secret"), [Path("/")])
