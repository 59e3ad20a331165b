"""From an exception to a reason."""

from __future__ import annotations

import errno

import pytest

from gpu_worker.trainer.failures import LONGEST_MESSAGE, JobFailure, bad_data, bad_spec, failed
from jobqueue.errors import DataError, StorageError
from jobqueue.job import FailureReason


class OutOfMemoryError(RuntimeError):
    """Named as torch names it."""


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (bad_spec("x"), "bad_spec"),
        (bad_data("x"), "bad_data"),
        (DataError("x", "y"), "bad_data"),
        (StorageError("x", "y"), "storage"),
        (OSError(errno.ENOSPC, "No space left on device"), "storage"),
        (OSError(errno.ENOTDIR, "Not a directory"), "storage"),
        (OSError(errno.ENOTCONN, "Transport endpoint is not connected"), "storage"),
        (Exception("Error while serializing: I/O error: No space left on device (os error 28)"), "storage"),
        (OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB"), "out_of_memory"),
        (RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling cublasCreate"), "out_of_memory"),
        (RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: 9 bytes"), "out_of_memory"),
        (MemoryError(), "out_of_memory"),
        (JobFailure(FailureReason.NAN_LOSS, "x"), "nan_loss"),
        (RuntimeError("x"), "internal"),
        (KeyError("x"), "internal"),
        (OSError(errno.ECONNREFUSED, "x"), "internal"),
    ],
)
def test_every_exception_has_its_reason(error: Exception, reason: str) -> None:
    assert failed(error).reason == reason


def test_torch_on_a_full_disk_is_the_storages_fault() -> None:
    import torch

    with pytest.raises(RuntimeError) as caught:
        torch.save({"weights": torch.zeros(100_000)}, "/dev/full")

    assert failed(caught.value).reason == "storage"


def test_a_message_is_one_line_of_bounded_length() -> None:
    message = failed(RuntimeError("first\nsecond\n" + "x" * 9999)).message
    assert message.startswith("RuntimeError: first second x")
    assert "\n" not in message
    assert len(message) == LONGEST_MESSAGE
