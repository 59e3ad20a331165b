"""Which worker this is, whatever its machine is called: containers and cloned machines may share a name."""

from __future__ import annotations

import hashlib
import os
import secrets
import socket
from pathlib import Path

from gpu_worker.gpu import Device

BOOT = Path("/proc/sys/kernel/random/boot_id")


def identity(cache: Path, device: Device) -> str:
    """host/device#mark; the same after a restart, another one for another data folder or another GPU."""
    file = cache / "id"
    if not file.exists():
        new = file.with_suffix(f".{os.getpid()}")
        new.write_text(secrets.token_hex(8))
        new.replace(file)
    mark = hashlib.sha256((file.read_text() + device.uuid).encode()).hexdigest()[:6]
    return f"{socket.gethostname()}/{device.label}#{mark}"


def boot() -> str:
    """What the containers of one running machine share, and nobody else; "" where there is no such thing."""
    try:
        return BOOT.read_text().strip()
    except OSError:  # no Linux
        return ""
