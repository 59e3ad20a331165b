"""Which worker it is: the same after a restart, another one on another machine of the same name."""

from __future__ import annotations

from pathlib import Path

import pytest

from gpu_worker.gpu import Device
from gpu_worker.identity import boot, identity
from gpu_worker.worker import Worker
from jobqueue.errors import MachineError
from jobqueue.settings import Settings

GPU = Device("gpu", "NVIDIA H100", "GPU-1")


@pytest.fixture(autouse=True)
def _name(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("socket.gethostname", lambda: "box")


def folder(root: Path, name: str) -> Path:
    made = root / name
    made.mkdir(exist_ok=True)
    return made


def test_a_worker_that_is_started_again_is_the_same(tmp_path: Path) -> None:
    first = identity(tmp_path, GPU)

    assert first.startswith("box/gpu0#")
    assert identity(tmp_path, GPU) == first
    assert [file.name for file in tmp_path.iterdir()] == ["id"]


def test_two_machines_of_one_name_have_workers_of_their_own(tmp_path: Path) -> None:
    assert identity(folder(tmp_path, "one"), GPU) != identity(folder(tmp_path, "other"), GPU)


def test_a_machine_that_was_copied_with_its_data_folder_is_told_apart_by_its_gpu(tmp_path: Path) -> None:
    assert identity(tmp_path, GPU) != identity(tmp_path, Device("gpu", "NVIDIA H100", "GPU-2"))


def test_a_machine_is_known_by_its_boot() -> None:
    assert boot() == boot() == Path("/proc/sys/kernel/random/boot_id").read_text().strip()


def test_a_worker_that_can_write_nowhere_says_what_to_set(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")

    with pytest.raises(MachineError, match=r"cannot write in .*/file/data/cache/.*: Not a directory") as refusal:
        Worker(Device("cpu", "cpu"), Settings(data_dir=tmp_path / "file" / "data"), "redis://127.0.0.1:1/0")
    assert "LORAQ_DATA_DIR" in refusal.value.do
