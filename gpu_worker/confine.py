"""What a worker reads on behalf of a spec: nothing outside the storage, the allowed folders, hubs and web addresses.

A spec comes over the network from whoever may submit; paths in it are resolved before they are compared.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

from jobqueue.adapters import STORED
from jobqueue.base_model import HUB_ID
from jobqueue.errors import LoraqError
from jobqueue.storage import BLOB

SCHEMES = ("http", "https", "s3", "gs", "gcs", "az", "abfs", "abfss", "hf")
STORED_ADAPTER = re.compile(rf"{STORED}batches/[\w.-]+/[\w.-]+/[\w.-]+/adapter")
BLOB_NAME = re.compile(rf"{re.escape(BLOB)}[0-9a-f]{{64}}/[^/]+")


def check_source(source: str, roots: Sequence[Path]) -> None:
    """Raises LoraqError unless `source` is submitted data, a hub id, an address of a known kind, or below `roots`."""
    scheme, _, rest = source.partition("://")
    if source.startswith(BLOB):
        allowed = bool(BLOB_NAME.fullmatch(source)) and not source.endswith(("/.", "/.."))
    elif source.startswith(STORED):
        allowed = bool(STORED_ADAPTER.fullmatch(source)) and ".." not in source
    elif rest:
        allowed = scheme in SCHEMES and "::" not in source
    elif source.startswith("/"):
        allowed = any(Path(source).resolve().is_relative_to(root.resolve()) for root in roots)
    else:
        allowed = bool(HUB_ID.match(source)) and ".." not in source
    if not allowed:
        raise LoraqError(f"{source} is nothing that this worker may read (its model_roots say what is)")
