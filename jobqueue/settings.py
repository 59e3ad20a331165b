"""Settings: read once, from LORAQ_* variables and from the user's file, the variables winning."""

from __future__ import annotations

import getpass
import os
from functools import cached_property
from pathlib import Path
from typing import Self

from pydantic import Field, NonNegativeFloat, field_validator, model_validator
from pydantic_settings import (
    BaseSettings,
    PydanticBaseSettingsSource,
    SettingsConfigDict,
    TomlConfigSettingsSource,
)


def config_file() -> Path:
    """`$LORAQ_CONFIG`, else `loraq/config.toml` in the user's configuration folder."""
    default = Path(os.environ.get("XDG_CONFIG_HOME") or Path.home() / ".config") / "loraq" / "config.toml"
    return Path(os.environ.get("LORAQ_CONFIG") or default)


def _data_dir() -> Path:
    return Path(os.environ.get("XDG_DATA_HOME") or Path.home() / ".local" / "share") / "loraq"


def _user() -> str:
    try:
        return getpass.getuser()
    except (KeyError, OSError):  # a container whose user id has no name
        return f"uid{os.getuid()}"


class Settings(BaseSettings):
    """What a user, a worker or a test may set. `LORAQ_LEASE_S=10` sets `lease_s`."""

    model_config = SettingsConfigDict(env_prefix="LORAQ_", extra="forbid", frozen=True, env_ignore_empty=True)

    redis_url: str | None = None
    """`redis://[:password@]host:port/db`; without one, the server that `loraq up` started."""
    storage: str | None = None
    """Shared storage as an fsspec URL or a folder; without one, a folder in `data_dir`. Who only submits to a server
    elsewhere needs none: files then go through the server."""
    data_dir: Path = Field(default_factory=_data_dir)
    """Where this machine keeps the embedded server, caches and scratch."""
    owner: str = Field(default_factory=_user)
    """Whose jobs these are: fair share is between owners."""

    timeout_s: float = Field(default=5.0, gt=0)
    """How long the server may take to answer a call, in seconds; a command gives up then, a worker tries again."""
    lease_s: float = Field(default=60.0, gt=0)
    """How long a claim lasts without a renewal, in seconds."""
    renew_s: float = Field(default=5.0, gt=0)
    """How often a running attempt renews."""
    sweep_s: float = Field(default=2.0, gt=0)
    """How often the control worker sweeps; at most a third of `lease_s`, as `renew_s`."""
    poll_s: float = Field(default=2.0, gt=0)
    """How often an idle slot asks for work without being woken."""
    heartbeat_s: float = Field(default=5.0, gt=0)
    """How often a worker says that it lives, and hears whether it is to drain."""
    grace_s: float = Field(default=10.0, ge=0)
    """From SIGTERM to SIGKILL of a trainer."""
    stall_s: float = Field(default=1800.0, gt=0)
    """A trainer that has said nothing for so long hangs: it is ended, and the job tried again."""
    storage_timeout_s: float = Field(default=1800.0, gt=0)
    """What a worker asks of the storage (an adapter written, a checkpoint read) and takes longer hangs."""
    max_failures: int = Field(default=3, ge=1)
    """A job that has failed this often is not tried again."""
    archive_days: float = Field(default=30.0, ge=0, allow_inf_nan=False)
    """A batch whose jobs have ended so long ago leaves the server: its records go to the storage, and are read there.
    0: it stays until `loraq rm`."""
    model_roots: tuple[Path, ...] = (Path("/"),)
    """Folders below which a worker may read local models and data that a spec names."""
    judge_urls: tuple[str, ...] = ("https://api.openai.com/v1",)
    """Endpoints, as `evaluation.judge.base_url`, to which a control worker may send answers and a key of its own."""
    gguf_converter: Path | None = None
    """llama.cpp's convert_hf_to_gguf.py on a worker's machine, which then can export GGUF files."""
    gpu_hour_price: NonNegativeFloat | dict[str, NonNegativeFloat] | None = None
    """What a GPU costs per hour: `2.5`, or by a part of its name, `{"H100": 2.5, "T4": 0.35}`. `loraq results` then
    shows what each trial cost."""

    trainer_command: tuple[str, ...] | None = None
    """What a worker starts as a trainer; None: the one with Unsloth. For tests of the queue."""

    @field_validator("data_dir")
    @classmethod
    def _absolute(cls, value: Path) -> Path:
        return value.expanduser().absolute()

    @field_validator("storage")
    @classmethod
    def _absolute_folder(cls, value: str | None) -> str | None:
        """A folder must mean the same in every working directory."""
        return value if value is None or "://" in value else str(Path(value).expanduser().absolute())

    @model_validator(mode="after")
    def _within_a_lease(self) -> Self:
        """Whoever looks at the clock less often than twice a lease takes it for one that jumped: see store.lua."""
        for name in ("renew_s", "sweep_s"):
            if (value := getattr(self, name)) > self.lease_s / 3:
                raise ValueError(f"{name} ({value:g}) must be at most a third of lease_s ({self.lease_s:g})")
        return self

    @cached_property
    def storage_url(self) -> str:
        return self.storage or str(self.data_dir / "storage")

    @property
    def server_file(self) -> Path:
        """Written by `loraq up`: how to reach the embedded server."""
        return self.data_dir / "server.json"

    @classmethod
    def settings_customise_sources(
        cls,
        settings_cls: type[BaseSettings],
        init_settings: PydanticBaseSettingsSource,
        env_settings: PydanticBaseSettingsSource,
        dotenv_settings: PydanticBaseSettingsSource,
        file_secret_settings: PydanticBaseSettingsSource,
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        return init_settings, env_settings, TomlConfigSettingsSource(settings_cls, config_file())
