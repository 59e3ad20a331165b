"""Which base model a spec means: a hub id, a folder or a GGUF file; and what can be known of it without torch."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

HUB_ID = re.compile(r"^[A-Za-z0-9][\w.-]*(/[\w.-]+)?$")


def locate(name: str, folder: Path) -> str:
    """A hub id as it is, anything that is a path made absolute (relative to `folder`, the sweep file's).

    Raises ValueError with a message for the user where it can be neither.
    """
    path = Path(name).expanduser()
    path = path if path.is_absolute() else folder / path
    looks_like_path = name.startswith(("/", "./", "../", "~")) or name.endswith(".gguf")
    if path.exists() and (looks_like_path or path.is_dir()):
        return str(path.resolve())
    if looks_like_path:
        if name.startswith(("/", "~")):
            return str(path)  # a worker may have it though this machine does not
        raise ValueError(f"there is no model at {path}")
    if not HUB_ID.match(name):
        raise ValueError(f"{name!r} is neither a hub id (owner/name) nor a folder that exists")
    return name


def is_path(located: str) -> bool:
    return located.startswith("/")


def fingerprint(located: str) -> str:
    """Changes when the model does: for a path, of its files' names, sizes and times; for a hub id, the id."""
    path = Path(located)
    if not is_path(located) or not path.exists():
        return located
    files = [path] if path.is_file() else sorted(p for p in path.iterdir() if p.is_file())
    stats = [(file.name, file.stat().st_size, file.stat().st_mtime_ns) for file in files]
    return f"{located}#{hashlib.sha256(json.dumps(stats).encode()).hexdigest()[:16]}"


def read_config(located: str) -> Mapping[str, Any] | None:
    """The model's config.json, or None where this machine cannot read it.

    A hub model's is read from the hub's cache or the hub where huggingface_hub is installed (workers have it).
    """
    if is_path(located):
        file = Path(located) / "config.json"
    else:
        try:
            from huggingface_hub import hf_hub_download
        except ImportError:
            return None
        try:
            file = Path(hf_hub_download(located, "config.json"))
        except Exception:  # offline, no such model, no access: the worker that loads it will say which
            return None
    try:
        config = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return config if isinstance(config, dict) else None


def guess_from_size(located: str) -> int:
    """Peak bytes of a job where there is no config: for a GGUF file from its size, else from a size in the name.

    Half of 4 bits per weight up to 16, so twice a GGUF's size covers what is loaded; `8B` in a name is 8e9 weights.
    """
    path = Path(located)
    if is_path(located) and path.is_file():
        return 2 * path.stat().st_size + 4 * 2**30
    match = re.search(r"(?<![\w.])(\d+(?:\.\d+)?)[bB](?![a-zA-Z])", located.replace("-", " ").replace("_", " "))
    weights = float(match.group(1)) * 1e9 if match else 8e9
    return int(weights * 1.2 + 4 * 2**30)
