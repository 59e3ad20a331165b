"""From an exception to a reason."""

from __future__ import annotations

import errno
import weakref

import pytest

from gpu_worker.protocol import Request
from gpu_worker.trainer import child
from gpu_worker.trainer.failures import LONGEST_MESSAGE, JobFailure, bad_data, bad_spec, failed
from jobqueue.errors import DataError, StorageError
from jobqueue.job import FailureReason


class Model:
    """Stands for what holds the memory."""


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


def test_a_failed_job_leaves_nothing_behind_though_its_exception_lives_on(monkeypatch: pytest.MonkeyPatch) -> None:
    """pytorch#27600: memory was kept after it had run out, since the exception held the frames that held the model."""
    errors: list[BaseException] = []
    models: list[weakref.ref[Model]] = []

    def inner() -> None:
        model = Model()
        models.append(weakref.ref(model))
        raise OutOfMemoryError("CUDA out of memory")

    def outcome(*_: object) -> None:
        model = Model()
        models.append(weakref.ref(model))
        try:
            inner()
        except OutOfMemoryError as error:
            errors.append(error)
            failure = JobFailure(FailureReason.OUT_OF_MEMORY, "memory ran out", 1)
            errors.append(failure)
            raise failure from error

    monkeypatch.setattr(child, "_outcome", outcome)
    end = child._run(Request("job", {}, "/nowhere"), lambda event: None)
    assert (end.reason, end.rung) == ("out_of_memory", 1)  # type: ignore[union-attr]
    assert len(errors) == len(models) == 2
    assert [model() for model in models] == [None, None]


def test_a_message_is_one_line_of_bounded_length() -> None:
    message = failed(RuntimeError("first\nsecond\n" + "x" * 9999)).message
    assert message.startswith("RuntimeError: first second x")
    assert "\n" not in message
    assert len(message) == LONGEST_MESSAGE
