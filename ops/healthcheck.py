"""The image's HEALTHCHECK: exit code 0 when a worker of this host has lately reported itself."""

from __future__ import annotations

import socket
import sys

from gpu_worker.identity import boot
from jobqueue.errors import LoraqError
from jobqueue.service import Client


def main() -> int:
    here = socket.gethostname(), boot()
    try:
        alive = [worker.id for worker in Client().workers() if worker.alive and (worker.host, worker.boot) == here]
    except LoraqError as error:
        print(error.what)
        return 1
    print(f"alive: {', '.join(alive)}" if alive else f"no worker of {here[0]} is alive")
    return 0 if alive else 1


if __name__ == "__main__":
    sys.exit(main())
