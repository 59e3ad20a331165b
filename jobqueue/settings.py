"""Settings: what a user, a worker or a test may set. Where they are read from is in configuration.py."""

from __future__ import annotations

import getpass
import operator
import os
from collections.abc import Iterator
from dataclasses import dataclass, field, fields
from functools import cached_property
from math import inf
from pathlib import Path

from jobqueue import notification

HOLDS = {"above": operator.gt, "at least": operator.ge, "below": operator.lt}
ABOVE_0 = {"above": 0}
NOT_NEGATIVE = {"at least": 0}


def _data_dir() -> Path:
    return Path(os.environ.get("XDG_DATA_HOME") or Path.home() / ".local" / "share") / "loraq"


def _user() -> str:
    try:
        return getpass.getuser()
    except (KeyError, OSError):  # a container whose user id has no name
        return f"uid{os.getuid()}"


@dataclass(frozen=True, kw_only=True)
class Settings:
    """Values as they are given, the rest as without environment and file. `read_settings` reads those, and checks
    what is written there. No pydantic: this is part of the start of every command.

    Raises ValueError with all that is out of bounds.
    """

    profile: str | None = None
    """Which `[profiles.NAME]` of the configuration file counts."""
    redis_url: str | None = None
    """`redis://[:password@]host:port/db`; without one, the server that `loraq up` started."""
    storage: str | None = None
    """Shared storage as an fsspec URL or a folder; without one, a folder in `data_dir`. Who only submits to a server
    elsewhere needs none: files then go through the server."""
    data_dir: Path = field(default_factory=_data_dir)
    """Where this machine keeps the embedded server, caches and scratch."""
    owner: str = field(default_factory=_user)
    """Whose jobs these are: fair share is between owners."""

    timeout_s: float = field(default=5.0, metadata=ABOVE_0)
    """How long the server may take to answer a call, in seconds; a command gives up then, a worker tries again."""
    lease_s: float = field(default=60.0, metadata=ABOVE_0)
    """How long a claim lasts without a renewal, in seconds."""
    renew_s: float = field(default=5.0, metadata=ABOVE_0)
    """How often a running attempt renews."""
    sweep_s: float = field(default=2.0, metadata=ABOVE_0)
    """How often the control worker sweeps; at most a third of `lease_s`, as `renew_s`."""
    poll_s: float = field(default=2.0, metadata=ABOVE_0)
    """How often an idle slot asks for work without being woken."""
    heartbeat_s: float = field(default=5.0, metadata=ABOVE_0)
    """How often a worker says that it lives, and hears whether it is to drain."""
    grace_s: float = field(default=10.0, metadata=NOT_NEGATIVE)
    """From SIGTERM to SIGKILL of a trainer."""
    stall_s: float = field(default=1800.0, metadata=ABOVE_0)
    """A trainer that has said nothing for so long hangs: it is ended, and the job tried again."""
    storage_timeout_s: float = field(default=1800.0, metadata=ABOVE_0)
    """What a worker asks of the storage (an adapter written, a checkpoint read) and takes longer hangs."""
    max_failures: int = field(default=3, metadata={"at least": 1})
    """A job that has failed this often is not tried again."""
    archive_days: float = field(default=30.0, metadata=NOT_NEGATIVE | {"below": inf})
    """A batch whose jobs have ended so long ago leaves the server: its records go to the storage, and are read there.
    0: it stays until `loraq rm`."""
    model_roots: tuple[Path, ...] = (Path("/"),)
    """Folders below which a worker may read local models and data that a spec names."""
    judge_urls: tuple[str, ...] = ("https://api.openai.com/v1",)
    """Endpoints, as `evaluation.judge.base_url`, to which a control worker may send answers and a key of its own."""
    webhooks: dict[str, str] = field(default_factory=dict, repr=False)
    """Whom control workers can tell that a batch has ended: `{"team": "https://..."}`. Sweep files name them by
    `notify`, and do not see the URLs, which may hold a secret."""
    webhook_hosts: tuple[str, ...] = ()
    """Hosts (`ci.example.org`, or `ci.example.org:8080`) to which a URL in `notify` of a sweep file may go."""
    on_batch_end: str | None = None
    """A command that a control worker runs, without a shell, when a batch has ended, whoever submitted it; it gets JSON
    on its standard input. See docs/operations.md."""
    metrics_port: int | None = field(default=None, metadata={"at least": 1, "below": 65536})
    """Where a control worker serves Prometheus metrics; without one it does not. See docs/metrics.md."""
    metrics_address: str = "127.0.0.1"
    """The address that it listens on for that: whoever reaches it can read them, without a password."""
    celery_events: bool = False
    """Workers send Celery's events, which Flower shows; see docs/operations.md."""
    gguf_converter: Path | None = None
    """llama.cpp's convert_hf_to_gguf.py on a worker's machine, which then can export GGUF files."""
    gpu_hour_price: float | dict[str, float] | None = None
    """What a GPU costs per hour: `2.5`, or by a part of its name, `{"H100": 2.5, "T4": 0.35}`. `loraq results` then
    shows what each trial cost."""

    trainer_command: tuple[str, ...] | None = None
    """What a worker starts as a trainer; None: the one with Unsloth. For tests of the queue."""

    def __post_init__(self) -> None:
        """A folder must mean the same in every working directory."""
        object.__setattr__(self, "data_dir", self.data_dir.expanduser().absolute())
        if self.storage is not None and "://" not in self.storage:
            object.__setattr__(self, "storage", str(Path(self.storage).expanduser().absolute()))
        if wrong := list(self._out_of_bounds()):
            raise ValueError("; ".join(wrong))

    def _out_of_bounds(self) -> Iterator[str]:
        for each in fields(self):
            value = getattr(self, each.name)
            for words, bound in each.metadata.items():
                if value is not None and not HOLDS[words](value, bound):
                    yield f"{each.name} ({value:g}) must be {words} {bound}"
        prices = self.gpu_hour_price if isinstance(self.gpu_hour_price, dict) else {"": self.gpu_hour_price or 0}
        if not all(price >= 0 for price in prices.values()):
            yield "gpu_hour_price must be at least 0"
        yield from notification.wrong_webhooks(self.webhooks)
        if self.on_batch_end is not None:
            yield from notification.wrong_command(self.on_batch_end)
        # one renewal that fails must not cost the lease, and a jump of the clock may count as two sweeps: see store.lua
        for name in ("renew_s", "sweep_s"):
            if (value := getattr(self, name)) > self.lease_s / 3:
                yield f"{name} ({value:g}) must be at most a third of lease_s ({self.lease_s:g})"

    @cached_property
    def storage_url(self) -> str:
        return self.storage or str(self.data_dir / "storage")

    @property
    def server_file(self) -> Path:
        """Written by `loraq up`: how to reach the embedded server."""
        return self.data_dir / "server.json"
