"""One worker at a time for a device and a data folder.

Two would each promise all of the device's memory, since trainers are known by that folder, and the one that starts
would take the scratch of what runs for litter.
"""

from __future__ import annotations

import fcntl
import logging
import time
from pathlib import Path
from typing import IO

from jobqueue.errors import MachineError

log = logging.getLogger(__name__)
ENDS_S = 2.0  # what a worker that was killed may take until it is gone


def hold(cache: Path, label: str) -> IO[str]:
    """The folder's lock, which lasts until the file is closed or the process ends, however it does.

    Raises MachineError where another worker has it.
    """
    file = (cache / "lock").open("w")
    give_up_at = time.monotonic() + ENDS_S
    while True:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return file
        except BlockingIOError:
            if time.monotonic() >= give_up_at:
                file.close()
                raise MachineError(
                    f"another worker serves {label} from {cache}",
                    "End it; or, where that is on another host or with another GPU, set LORAQ_DATA_DIR to a folder of "
                    "this worker's own.",
                ) from None
            time.sleep(0.05)
        except OSError as error:  # a file system without locks
            log.warning("whether another worker uses %s cannot be told: %s", cache, error)
            return file
