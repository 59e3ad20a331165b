"""Every error that loraq raises for a user, in one tree.

    LoraqError                1   anything else
      SpecError               3   the sweep file, or a --set, is wrong
      DataError               4   a data file is missing, empty or lacks its columns
        ChatTemplateError     4   the base model has no chat template, or one that is not valid
      ServerError             5   Redis cannot be reached, or refuses
        DeniedError           5   Redis does not let this user do that
        UnansweredError       5   it is not known whether Redis has carried out a call
      NotFoundError           6   no such job or batch
        ArchivedError         6   its records are in the storage, no longer on the server
      StorageError            7   the shared storage cannot be read or written
      CapacityError           8   no worker can ever hold the job
      MachineError            9   this machine lacks what the command needs
      BatchFailedError       10   a batch that was waited for did not succeed
      BusyError              11   a batch that was to be removed has not ended
      TargetError            12   files that were to be written are there already, with other content
      StaleAttemptError       -   a write by an attempt that has lost its job (workers only)

The number is the exit code of the command (2 is Click's for a wrong command line). A message is two lines:
what happened, and what to do about it.
"""

from __future__ import annotations

from dataclasses import dataclass


class LoraqError(Exception):
    """Base of all: `what` happened, and what to `do` about it."""

    exit_code = 1

    def __init__(self, what: str, do: str = "") -> None:
        super().__init__(f"{what}\n{do}" if do else what)
        self.what = what
        self.do = do


@dataclass(frozen=True)
class Problem:
    """One thing that is wrong with a sweep file."""

    message: str
    file: str
    line: int | None = None
    """1-based; None where the problem has no place in the file (a --set)."""
    path: str = ""
    """Dotted key, e.g. `training.learning_rate`."""

    def __str__(self) -> str:
        place = self.file if self.line is None else f"{self.file}:{self.line}"
        return f"{place}: {self.path}: {self.message}" if self.path else f"{place}: {self.message}"


class SpecError(LoraqError):
    """The sweep file is wrong; all `problems` at once, in the order of the file."""

    exit_code = 3

    def __init__(self, problems: list[Problem]) -> None:
        self.problems = sorted(problems, key=lambda problem: problem.line or 0)
        count = len(problems)
        super().__init__(
            "\n".join(map(str, self.problems)),
            f"{count} problem{'s' if count > 1 else ''}; nothing was submitted. "
            f"Correct {'them' if count > 1 else 'it'} and try again.",
        )


class DataError(LoraqError):
    """A data file is missing, empty or lacks its columns."""

    exit_code = 4


class ChatTemplateError(DataError):
    """The base model has no chat template, or one that is not valid."""


class ServerError(LoraqError):
    """Redis cannot be reached, or refuses."""

    exit_code = 5


class DeniedError(ServerError):
    """Redis does not let this user in, or do that."""


class UnansweredError(ServerError):
    """Redis did not answer: whether it has carried out, or will, what it was asked is not known."""


class NotFoundError(LoraqError):
    """There is no such job or batch."""

    exit_code = 6


class ArchivedError(NotFoundError):
    """The batch ended long ago: it can be read in the storage, and nothing else be done with it."""

    def __init__(self, batch: str, *others: str, do: str = "") -> None:
        super().__init__(
            f"{batch} ended long ago and was archived",
            do or f"It can be read (`loraq results {batch}`, `loraq show {batch}`); to run it again, submit it again.",
        )
        self.batch = batch
        self.batches = (batch, *others)
        """A job that was asked for can be of any of these: ids and names may have dots."""


class StorageError(LoraqError):
    """The shared storage cannot be read or written."""

    exit_code = 7


class CapacityError(LoraqError):
    """No worker can ever hold the job."""

    exit_code = 8


class MachineError(LoraqError):
    """This machine lacks what the command needs."""

    exit_code = 9


class BatchFailedError(LoraqError):
    """A batch that was waited for did not succeed."""

    exit_code = 10


class BusyError(LoraqError):
    """A batch that was to be removed has not ended."""

    exit_code = 11


class TargetError(LoraqError):
    """Files that were to be written are there already, with other content."""

    exit_code = 12


class StaleAttemptError(LoraqError):
    """The attempt no longer owns its job: its lease ended, or the job was given to another."""
