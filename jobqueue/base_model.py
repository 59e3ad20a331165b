"""Which base model a spec means: a hub id, a folder or a GGUF file; and what can be known of it without torch."""

from __future__ import annotations

import hashlib
import json
import os
import re
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Mapping
from pathlib import Path
from typing import Any

COMMIT = re.compile(r"^[0-9a-f]{40}$")
HUB_S = 5.0  # how long the hub may take to say what a model's commit is
HUB_ID = re.compile(r"^[A-Za-z0-9][\w.-]*(/[\w.-]+)?$")


def no_model(folder: Path) -> str:
    """What a folder is that holds no base model, "" where it may hold one."""
    if (folder / "config.json").is_file():
        return ""
    adapter = (folder / "adapter_config.json").is_file()
    return "an adapter, not a base model" if adapter else "no model: it has no config.json"


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


def fingerprint(located: str, revision: str | None = None) -> str:
    """Changes when the model does: for a path, of its files' names, sizes and times; for a hub id, with the commit that
    the revision is now, where that can be told."""
    path = Path(located)
    if not is_path(located):
        return f"{located}@{commit(located, revision) or revision or 'main'}"
    if not path.exists():
        return located
    files = [path] if path.is_file() else sorted(p for p in path.iterdir() if p.is_file())
    stats = [(file.name, file.stat().st_size, file.stat().st_mtime_ns) for file in files]
    return f"{located}#{hashlib.sha256(json.dumps(stats).encode()).hexdigest()[:16]}"


def commit(hub_id: str, revision: str | None) -> str | None:
    """The commit that a branch or tag of a hub model is now; None where the hub does not say.

    Asked over HTTP, so that a machine without huggingface_hub can; offline, the hub's cache says what is loaded.
    """
    revision = revision or "main"
    if COMMIT.match(revision):
        return revision
    home = Path(os.environ.get("HF_HOME") or Path.home() / ".cache" / "huggingface")
    if os.environ.get("HF_HUB_OFFLINE", "").upper() in ("1", "ON", "YES", "TRUE"):
        cache = Path(os.environ.get("HF_HUB_CACHE") or home / "hub")
        file = cache / f"models--{hub_id.replace('/', '--')}" / "refs" / revision
        return file.read_text().strip() if file.is_file() else None
    token = os.environ.get("HF_TOKEN") or _text_of(home / "token")
    url = f"{_endpoint()}/api/models/{hub_id}/revision/{urllib.parse.quote(revision, safe='')}"
    try:
        asked = urllib.request.Request(url, headers={"Authorization": f"Bearer {token}"} if token else {})
        with urllib.request.urlopen(asked, timeout=HUB_S) as answer:
            found = json.load(answer).get("sha")
    except (OSError, ValueError, AttributeError):  # no network, no such model, no access: the worker will say which
        return None
    return found if isinstance(found, str) and COMMIT.match(found) else None


def hub_answers() -> bool:
    """Whether the hub says anything at all, within a few seconds."""
    try:
        with urllib.request.urlopen(urllib.request.Request(_endpoint(), method="HEAD"), timeout=HUB_S):
            return True
    except urllib.error.HTTPError:  # which is an answer
        return True
    except (OSError, ValueError):
        return False


def _endpoint() -> str:
    return os.environ.get("HF_ENDPOINT", "https://huggingface.co").rstrip("/")


def _text_of(file: Path) -> str:
    try:
        return file.read_text(encoding="utf-8").strip()
    except OSError:
        return ""


def read_config(located: str, revision: str | None = None) -> Mapping[str, Any] | None:
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
            file = Path(hf_hub_download(located, "config.json", revision=revision))
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
