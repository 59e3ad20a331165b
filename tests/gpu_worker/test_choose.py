"""Which GPU a name means."""

from __future__ import annotations

import pytest

from gpu_worker import gpu
from gpu_worker.gpu import Device
from jobqueue.errors import MachineError

CARDS = [
    Device("gpu", "NVIDIA H100", "GPU-1b9f01b2-a3d9-353b-c3d6-98f29fe6fc32", 0),
    Device("gpu", "NVIDIA H100", "GPU-8b9f180d-2b4e-706a-586b-f0370dd390c1", 1),
]


@pytest.fixture(autouse=True)
def _cards(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu, "gpus", lambda: CARDS)


@pytest.mark.parametrize(
    ("name", "index"),
    [("0", 0), ("1", 1), ("8b9f", 1), ("GPU-1b9f", 0), (CARDS[1].uuid, 1)],
)
def test_an_index_goes_before_a_uuid_that_begins_with_the_same_digit(name: str, index: int) -> None:
    assert gpu.choose([name]) == [CARDS[index]]


@pytest.mark.parametrize("name", ["2", "GPU-", "GPU-77"])
def test_a_name_of_none_or_of_two_is_refused(name: str) -> None:
    with pytest.raises(MachineError, match="no GPU is called"):
        gpu.choose([name])


def test_no_name_means_all() -> None:
    assert gpu.choose([]) == CARDS
