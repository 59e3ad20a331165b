"""How well a server keeps what it has accepted: whether it is on its disk, whether it may be dropped again."""

from __future__ import annotations

import contextlib
import time
from dataclasses import dataclass

import redis

EVERY_S = 1.1  # so long after a write, a server with `appendfsync everysec` has begun to write it out, if its disk can
LOOK_S = 0.1


@dataclass(frozen=True)
class Keeping:
    """What a server says of itself."""

    eviction: str  # maxmemory-policy; "" where INFO is not permitted
    limited: bool  # it has a maxmemory
    append_only: bool
    fsync: str  # always, everysec or no; everysec, which is the default, where CONFIG is not permitted

    @property
    def drops_jobs(self) -> bool:
        """At its memory limit it drops any key. The policies volatile-* drop keys that expire; no record does."""
        return self.limited and self.eviction.startswith("allkeys")

    @property
    def warnings(self) -> list[str]:
        """What is to be set in another way, one line each."""
        if not self.eviction:
            return ["does not say how it keeps jobs (INFO is not permitted): make sure of appendonly and noeviction"]
        found = []
        if self.eviction != "noeviction":
            found.append(f"may drop keys at its memory limit: set maxmemory-policy noeviction, not {self.eviction}")
        if not self.append_only:
            found.append("has no append-only file: a restart of it loses jobs; set appendonly yes")
        elif self.fsync == "no":
            found.append("does not wait for its disk: a power cut loses jobs; set appendfsync everysec, not no")
        return found


def look(connection: redis.Redis) -> Keeping:
    """Asks the server. INFO is enough, since managed servers often refuse CONFIG."""
    try:
        info = connection.info("memory", "persistence")
    except redis.exceptions.NoPermissionError:
        return Keeping("", False, False, "everysec")
    fsync = None
    with contextlib.suppress(redis.ResponseError):
        fsync = connection.config_get("appendfsync").get("appendfsync")
    return Keeping(info["maxmemory_policy"], bool(info["maxmemory"]), bool(info["aof_enabled"]), fsync or "everysec")


def wait_until_on_disk(connection: redis.Redis, seconds: float) -> bool:
    """Waits for what this connection wrote last to be on the server's disk; False: it did not get there in time.

    In time means: `seconds`, which must be below the connection's timeout, after the second that a server may take.
    True at once where the server keeps it in memory only, or leaves the time to the kernel: see `Keeping.warnings`.

    WAITAOF is asked where the server has it (7.2 and later). By itself it does not do: with `appendfsync everysec`,
    Redis 7.4 and Valkey (9.1 too) answer before the file is written out (redis/redis#13793). So a second is waited
    for, and then until no such write is under way.
    """
    began = time.monotonic()
    deadline = began + seconds + EVERY_S + 3 * LOOK_S
    try:
        keeping = look(connection)
        if not keeping.append_only or keeping.fsync != "everysec":  # with `always` nothing is answered before
            return True
        with contextlib.suppress(redis.ResponseError):  # an older server, or one that does not permit it
            if connection.waitaof(1, 0, int(seconds * 1000))[0] < 1:
                return False
        idle = 0
        while idle < 2:  # looks; between two of them the server begins what there is to write out
            if time.monotonic() > deadline:
                return False
            time.sleep(LOOK_S)
            state = connection.info("persistence")
            under_way = state["aof_pending_bio_fsync"] or state["aof_buffer_length"]
            idle = 0 if under_way or time.monotonic() - began < EVERY_S else idle + 1
    except (redis.ConnectionError, redis.TimeoutError, OSError):
        return False
    return True
