"""One worker at a time for a device and a data folder.

Two would each promise all of the device's memory, since trainers are known by that folder, and the one that starts
would take the scratch of what runs for litter.
"""

from __future__ import annotations

import logging
from pathlib import Path
from typing import IO

from jobqueue.errors import MachineError
from jobqueue.processes import locked

log = logging.getLogger(__name__)
ENDS_S = 2.0  # what a worker that was killed may take until it is gone


def hold(cache: Path, label: str) -> IO[str]:
    """The folder's lock, which lasts until the file is closed or the process ends, however it does.

    Raises MachineError where another worker has it.
    """
    file = (cache / "lock").open("w")
    try:
        if locked(file.fileno(), ENDS_S):
            return file
    except OSError as error:  # a file system without locks
        log.warning("whether another worker uses %s cannot be told: %s", cache, error)
        return file
    file.close()
    raise MachineError(
        f"another worker serves {label} from {cache}",
        "End it; or, where that is on another host or with another GPU, set LORAQ_DATA_DIR to a folder of "
        "this worker's own.",
    )
