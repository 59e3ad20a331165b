"""A guardian with a trainer under it, as its worker holds it: start, send a job, hear of it, end it."""

from __future__ import annotations

import contextlib
import hashlib
import logging
import math
import os
import selectors
import shutil
import signal
import subprocess
import sys
import time
import uuid
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib.util import cache_from_source, find_spec
from pathlib import Path

from gpu_worker import guardian
from gpu_worker.gpu import Device
from gpu_worker.marks import CACHE, MARK, end_marked
from gpu_worker.protocol import EVENTS_FD, Event, Ready, Request, decode

log = logging.getLogger(__name__)
MPS_PIPES = "CUDA_MPS_PIPE_DIRECTORY"  # where whoever uses CUDA finds an MPS daemon, see gpu_worker/mps.py
NO_MPS = "/nonexistent"  # there it finds none, and takes turns with the others
MACHINE = Path("/etc/machine-id")  # systemd's, never changed
MAX_LINE = 8_000  # characters of a log line; the rest of it is cut
READ, READS = 1 << 16, 16  # bytes at once (what a pipe holds), and how often before whoever waits is answered


@dataclass(frozen=True)
class LogLine:
    """One line of what the trainer, or anything that it started, printed."""

    text: str


@dataclass(frozen=True)
class Ended:
    """The trainer is gone, and with it everything that it started."""

    code: int  # exit code, 128 + number of a signal

    def __str__(self) -> str:
        if self.code <= 128:
            return f"the trainer ended with exit code {self.code}"
        name = signal.Signals(self.code - 128).name
        hint = " (by hand, or by the kernel for want of memory)" if name == "SIGKILL" else ""
        return f"the trainer was ended by {name}{hint}"


Message = Event | LogLine | Ended


def worker_cache(data_dir: Path, device: Device) -> Path:
    """Where a worker keeps what it can make again; of this machine, as a home may be that of several hosts."""
    try:
        machine = MACHINE.read_text().strip()[:12]
    except OSError:  # in a container, say, whose host name is another one each time
        machine = ""
    return data_dir / "cache" / (machine or "machine") / device.label


def trainer_environment(device: str, cache: Path) -> dict[str, str]:
    """What a trainer is told by its environment; `cache` is this worker's own, so that no two trainers race in it."""
    ours = {"LORAQ_DEVICE": device, CACHE: str(cache), "PYTHONUNBUFFERED": "1", MPS_PIPES: NO_MPS}
    return {**os.environ, **ours, **_bytecode(cache)}


def _bytecode(cache: Path) -> dict[str, str]:
    """Has the next trainer find compiled what one has imported, where nothing is kept beside the source.

    Images of containers often forbid that (PYTHONDONTWRITEBYTECODE): each import of torch and Unsloth then compiles
    thousands of files anew. What was compiled of other packages goes: Python knows a source by its time and length,
    which two versions of a file may share where an image sets all times alike.
    """
    torch = find_spec("torch")
    if torch is None or torch.origin is None or Path(cache_from_source(torch.origin)).exists():
        return {}
    if not sys.dont_write_bytecode and os.access(Path(torch.origin).parent, os.W_OK):
        return {}
    packages = sorted(folder.name for folder in Path(torch.origin).parents[1].glob("*.dist-info"))
    kept = cache / "bytecode" / hashlib.sha256(" ".join([sys.version, *packages]).encode()).hexdigest()[:12]
    for old in set(kept.parent.glob("*")) - {kept}:
        shutil.rmtree(old, ignore_errors=True)
    return {"PYTHONDONTWRITEBYTECODE": "", "PYTHONPYCACHEPREFIX": str(kept)}


class TrainerProcess:
    """One trainer, from its start to its end; it may do several jobs, one after the other.

    Args:
        part: of a client of MPS, called with its mark before it is ended, maybe in the middle of its work.
    """

    def __init__(
        self,
        command: list[str],
        environment: Mapping[str, str],
        folder: Path,
        grace_s: float,
        part: Callable[[str], None] | None = None,
    ) -> None:
        self.mark = uuid.uuid4().hex
        self._part, self.in_mps, self.started_at = part, part is not None, time.monotonic()
        request_read, self._request = os.pipe()
        self._events, events_write = os.pipe()
        self._log, log_write = os.pipe()
        for descriptor in (self._request, self._events, self._log):
            os.set_blocking(descriptor, False)
        self._grace_s = grace_s
        try:
            self.guardian = subprocess.Popen(
                [
                    *(sys.executable, "-P", "-S", guardian.__file__),
                    *(str(grace_s), str(request_read), str(events_write), *command),
                ],
                stdin=subprocess.PIPE,
                stdout=log_write,
                stderr=log_write,
                pass_fds=[request_read, events_write],
                env={**environment, EVENTS_FD: str(events_write), MARK: self.mark},
                cwd=folder,
                start_new_session=True,
            )
        except BaseException:
            for descriptor in (self._request, self._events, self._log):
                os.close(descriptor)
            raise
        finally:
            for descriptor in (request_read, events_write, log_write):
                os.close(descriptor)
        self._selector = selectors.DefaultSelector()
        self._selector.register(self._events, selectors.EVENT_READ)
        self._selector.register(self._log, selectors.EVENT_READ)
        self._rest = {self._events: b"", self._log: b""}
        self._unsent = b""  # of the request
        self._ended = False
        self.rested = False  # it has been without a job for a while
        self.ready = False  # it has imported everything

    # -- telling

    def send(self, request: Request) -> None:
        """The next job; returns at once. Raises BrokenPipeError where the trainer is gone.

        What a pipe does not hold of it follows with `messages`: a trainer that still imports reads nothing.
        """
        self._unsent = request.line()
        self._push()
        if self._unsent:
            self._selector.register(self._request, selectors.EVENT_WRITE)

    def _push(self) -> None:
        with contextlib.suppress(BlockingIOError):
            self._unsent = self._unsent[os.write(self._request, self._unsent) :]

    def set_deadline(self, seconds: float) -> None:
        """When the guardian is to end everything, on `guardian.now()`'s clock."""
        self._tell(f"deadline {seconds!r}")

    def rest(self) -> None:
        """Until the next job: no deadline."""
        self.rested = True
        self.set_deadline(math.inf)

    def ask_checkpoint(self) -> None:
        """Of a trainer that trains: at the end of its step."""
        self._tell("checkpoint")

    def stop(self) -> None:
        """SIGTERM to the trainer, SIGKILL to everything after the grace time; does not wait."""
        if self._part is not None:
            self._part(self.mark)
        self._tell("stop")

    def _tell(self, line: str) -> None:
        assert self.guardian.stdin is not None
        with contextlib.suppress(BrokenPipeError, ValueError):
            self.guardian.stdin.write(line.encode() + b"\n")
            self.guardian.stdin.flush()

    # -- hearing

    def messages(self, seconds: float) -> list[Message]:
        """What came within `seconds`, in order; Ended once, as the last, when nothing of the trainer is left.

        The trainer flushes its log before it reports the end of a job, so that log is read to its present end
        before a report is handed on.
        """
        found: list[Message] = []
        if self._ended:
            return found
        ready = {key.fd for key, _ in self._selector.select(seconds)}
        if self._request in ready:
            try:
                self._push()
            except BrokenPipeError:  # it reads no more: its end will tell
                self._unsent = b""
            if not self._unsent:
                self._selector.unregister(self._request)
        if self._events in ready:
            events = [self._event(line) for line in self._lines(self._events)]
            found += [LogLine(text) for text in self._log_lines()]
            found += events
        elif self._log in ready:
            found += [LogLine(text) for text in self._log_lines()]
        if self.guardian.poll() is not None:  # what lies in the pipes came before its end
            found += [LogLine(text) for text in self._log_lines()]
            found += [self._event(line) for line in self._lines(self._events)]
            found.append(Ended(self._clean_up()))
        return found

    def _event(self, line: bytes) -> Message:
        """Half an event, of a trainer that was killed while it wrote, is no more than a line of its log."""
        try:
            event = decode(line)
        except ValueError:
            return LogLine(f"not an event: {line[:MAX_LINE]!r}")
        self.ready |= isinstance(event, Ready)
        return event

    def _log_lines(self) -> list[str]:
        lines = []
        for line in self._lines(self._log):
            text = line.decode("utf-8", errors="replace").rstrip("\r").rpartition("\r")[2]  # a bar's last state
            if text.strip():
                lines.append(text[:MAX_LINE])
        rest = self._rest[self._log]
        if len(rest) > READ:  # a line that does not end: of a progress bar the last state, of others the beginning
            self._rest[self._log] = rest[rest.rfind(b"\r", 0, -1) + 1 :][:READ]
        return lines

    def _lines(self, descriptor: int) -> list[bytes]:
        """The complete lines that can be read now, at least as much as lay in the pipe at the call."""
        data = self._rest[descriptor]
        for _ in range(READS):
            try:
                piece = os.read(descriptor, READ)
            except BlockingIOError:
                break
            if not piece:
                if descriptor in self._selector.get_map():
                    self._selector.unregister(descriptor)
                data += b"\n" if data and not data.endswith(b"\n") else b""
                break
            data += piece
        *lines, self._rest[descriptor] = data.split(b"\n")
        return lines

    # -- ending

    @property
    def ended(self) -> bool:
        """Whether it is known that nothing of it is left."""
        return self._ended

    def alive(self) -> bool:
        """Whether it can do another job; of what it has said meanwhile, a warning is logged, the rest dropped."""
        said = self.messages(0)
        for message in said:
            if isinstance(message, Ready) and message.warning:
                log.warning("a spare trainer: %s", message.warning)
        return not self._ended and not any(isinstance(message, Ended) for message in said)

    def kill(self) -> int:
        """Ends everything now and waits until nothing is left. Returns the exit code."""
        if not self._ended:
            if self._part is not None and self.guardian.poll() is None:
                self._part(self.mark)
            assert self.guardian.stdin is not None
            with contextlib.suppress(BrokenPipeError):
                self.guardian.stdin.close()  # the lifeline: the guardian kills all and ends
            try:
                self.guardian.wait(self._grace_s + 5)
            except subprocess.TimeoutExpired:
                self.guardian.kill()
                self.guardian.wait()
            self._clean_up()
        return self._exit_code

    def _clean_up(self) -> int:
        """After the guardian's end, also by kill -9: whatever of the trainer is still there is ended."""
        self._ended = True
        code = self.guardian.wait()
        self._exit_code = code if code >= 0 else 128 - code
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.guardian.pid, signal.SIGKILL)
        end_marked(self.mark)
        self._selector.close()
        for descriptor in (self._request, self._events, self._log):
            os.close(descriptor)
        if self.guardian.stdin:
            with contextlib.suppress(BrokenPipeError):
                self.guardian.stdin.close()
        return self._exit_code
