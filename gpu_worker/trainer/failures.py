"""Why a job fails: from an exception to a reason and a line that a user understands. No torch."""

from __future__ import annotations

import contextlib
import errno
from collections.abc import Iterator

from gpu_worker.protocol import Failed
from jobqueue.errors import ChatTemplateError, DataError, StorageError
from jobqueue.job import FailureReason

_DISK = {
    *(errno.ENOSPC, errno.EDQUOT, errno.EIO, errno.EROFS, errno.ESTALE, errno.EACCES, errno.EPERM, errno.ENOENT),
    *(errno.ENOTDIR, errno.ENODEV, errno.ENOTCONN, errno.ETIMEDOUT, errno.EREMOTEIO),  # of mounts that went
}
_NOT_WRITTEN = (  # in the words of safetensors (Rust) and of torch.save, whose exceptions carry no errno
    "No space left on device",
    "Disk quota exceeded",
    "Read-only file system",
    "Stale file handle",
    "Input/output error",
    "PytorchStreamWriter failed",
    "iostream error",
)
LONGEST_MESSAGE = 500  # characters


class JobFailure(Exception):
    """The job cannot go on, for a reason that is known where it is raised."""

    def __init__(self, reason: FailureReason, message: str, rung: int | None = None) -> None:
        super().__init__(message)
        self.reason, self.rung = reason, rung


def bad_spec(message: str) -> JobFailure:
    return JobFailure(FailureReason.BAD_SPEC, message)


def bad_data(message: str) -> JobFailure:
    return JobFailure(FailureReason.BAD_DATA, message)


def nan_loss(step: int) -> JobFailure:
    return _nan(f"the loss became NaN by step {step}")


def nan_weights(step: int) -> JobFailure:
    return _nan(f"the weights became NaN at step {step}, the last one")


def nan_gradients(step: int) -> JobFailure:
    return JobFailure(
        FailureReason.NAN_LOSS,
        f"gradients were NaN, or too large for float16, until step {step}, and steps were left out; "
        "dtype: bfloat16 on a GPU that has it, or a lower learning_rate, may help",
    )


def _nan(what: str) -> JobFailure:
    return JobFailure(FailureReason.NAN_LOSS, f"{what}; a lower learning_rate, or more warmup_steps, may help")


def one_line(text: str) -> str:
    """`text` without line breaks, cut to LONGEST_MESSAGE."""
    line = " ".join(text.split())
    return line if len(line) <= LONGEST_MESSAGE else line[: LONGEST_MESSAGE - 3] + "..."


@contextlib.contextmanager
def on_rung(rung: int, *, last: bool) -> Iterator[None]:
    """Where memory runs out in here, the next attempt begins one rung further down, unless this was the last."""
    try:
        yield
    except Exception as error:
        if not _out_of_memory(error):
            raise
        below = None if last else rung + 1
        raise JobFailure(FailureReason.OUT_OF_MEMORY, str(error) or "memory ran out", below) from error


def failed(error: BaseException) -> Failed:
    """What the worker is told. An exception that nobody foresaw is internal: its traceback is in the log."""
    reason, message = FailureReason.INTERNAL, f"{type(error).__name__}: {error}"
    if "CUDA error" in message:
        message = message.partition("\n")[0]  # hints for those who debug kernels follow
    if isinstance(error, JobFailure):
        return Failed(error.reason.value, one_line(str(error)), error.rung)
    if isinstance(error, ChatTemplateError):
        reason, message = FailureReason.BAD_SPEC, f"{error.what}; {error.do}"
    elif isinstance(error, DataError):
        reason, message = FailureReason.BAD_DATA, error.what
    elif isinstance(error, StorageError):
        reason, message = FailureReason.STORAGE, error.what
    elif _not_written(error):
        reason = FailureReason.STORAGE
    elif _out_of_memory(error):
        reason = FailureReason.OUT_OF_MEMORY
        message = str(error) or "memory ran out"
    return Failed(reason.value, one_line(message))


def _not_written(error: BaseException) -> bool:
    """A disk or a mount failed; torch.save tells it in the exception before the last only."""
    if isinstance(error, OSError):
        return error.errno in _DISK
    texts = [str(one) for one in (error, error.__context__) if one is not None]
    return any(words in text for text in texts for words in _NOT_WRITTEN)


def _out_of_memory(error: BaseException) -> bool:
    """torch.OutOfMemoryError by name, so that this needs no torch; CUDA libraries have their own words."""
    if isinstance(error, MemoryError) or type(error).__name__ in ("OutOfMemoryError", "CUDAOutOfMemoryError"):
        return True
    text = str(error)
    return isinstance(error, RuntimeError) and (
        "CUDA out of memory" in text
        or "CUBLAS_STATUS_ALLOC_FAILED" in text
        or "DefaultCPUAllocator: can't allocate memory" in text
    )
