"""A connection to the server: calls of store.lua's functions, and what goes wrong on the way."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache, cached_property
from importlib import resources
from typing import Any
from urllib.parse import urlsplit

import redis
from redis.backoff import NoBackoff
from redis.retry import Retry

from jobqueue.errors import DeniedError, ServerError, UnansweredError

BINARY_TIMEOUT_S = 60.0
READS = frozenset(
    {"figures", "overview"}
)  # functions of store.lua that write nothing: whoever may only read may call them


@cache
def _library() -> tuple[str, str]:
    """(version, source) of store.lua. The version is in every name, so that releases can share a server."""
    source = resources.files("jobqueue").joinpath("store.lua").read_text(encoding="utf-8")
    version = hashlib.sha256(source.encode()).hexdigest()[:12]
    return version, source.replace("VERSION", version)


def _where(url: str) -> str:
    parts = urlsplit(url)
    return f"{parts.hostname}:{parts.port or 6379}" if parts.hostname else url


class Connection:
    """One server.

    Raises ServerError where the server cannot be reached or refuses; a call is tried once, so that a caller
    knows within seconds, and whoever needs to go on (a worker) tries again itself.
    """

    def __init__(self, url: str, *, timeout_s: float = 5.0) -> None:
        self.url = url
        self._timeout_s = timeout_s
        try:
            self._redis = redis.Redis.from_url(
                url,
                decode_responses=True,
                socket_timeout=timeout_s,
                socket_connect_timeout=min(3.0, timeout_s),
                socket_keepalive=True,
                health_check_interval=10,
                retry=Retry(NoBackoff(), 0),
            )
        except ValueError as error:
            raise ServerError(
                f"the server's address is not one: {error}",
                "Write LORAQ_REDIS_URL as redis://HOST:6379/0, or redis://:PASSWORD@HOST:6379/0.",
            ) from None

    def close(self) -> None:
        self._redis.close()
        if "_binary_pool" in self.__dict__:
            self._binary_pool.disconnect()

    @contextmanager
    def binary(self) -> Iterator[redis.Redis]:
        """A connection for bytes, with time for megabytes; what goes wrong on it is a ServerError."""
        with self._errors():
            yield redis.Redis(connection_pool=self._binary_pool)

    @cached_property
    def _binary_pool(self) -> redis.ConnectionPool:
        pool = self._redis.connection_pool
        options = {**pool.connection_kwargs, "decode_responses": False, "socket_timeout": BINARY_TIMEOUT_S}
        return redis.ConnectionPool(pool.connection_class, **options)

    @property
    def where(self) -> str:
        """Host and port, without the password."""
        return _where(self.url)

    def server(self) -> tuple[str, float]:
        """What runs there, as "Valkey 8.1.0", and its clock in seconds since the epoch."""
        with self._errors():
            info = self._redis.info("server")
        name = "Valkey" if "valkey_version" in info else "Redis"
        return f"{name} {info.get('valkey_version') or info['redis_version']}", self._clock()

    def _clock(self) -> float:
        """The server's, in seconds since the epoch."""
        with self._errors():
            seconds, micros = self._redis.time()
        return float(seconds + micros / 1e6)

    def _not_after(self) -> int:
        """The server's time, in ms, at which this client will have given up the call that it now makes."""
        return int(1000 * (self._clock() + self._timeout_s))

    def _call_in_time(self, name: str, *args: object, connection: redis.Redis | None = None) -> Any:
        """As `_call`. Raises ServerError where the server would carry it out only after this client has given it up."""
        return self._call(name, self._not_after(), *args, connection=connection)

    def _call(self, name: str, *args: object, connection: redis.Redis | None = None) -> Any:
        client = connection or self._redis
        call = client.fcall_ro if name in READS else client.fcall
        version, source = _library()
        words = [str(arg).encode("utf-8", "backslashreplace") for arg in args]  # text from anywhere may be no Unicode
        with self._errors():
            try:
                return call(f"{name}_{version}", 0, *words)
            except redis.ResponseError as error:
                if "not found" not in str(error).lower():
                    raise
            try:
                client.function_load(source)
            except redis.ResponseError as error:
                if "already exists" not in str(error):  # another client was quicker
                    raise
            return call(f"{name}_{version}", 0, *words)

    @contextmanager
    def _errors(self) -> Iterator[None]:
        try:
            yield
        except redis.AuthenticationError as error:
            raise DeniedError(
                f"Redis at {self.where} refuses the login: {error}",
                "Check the user and password in LORAQ_REDIS_URL, or in redis_url of the configuration file.",
            ) from error
        except redis.exceptions.NoPermissionError as error:
            raise DeniedError(
                f"Redis at {self.where} does not permit that: {error}",
                "Ask whoever runs it for a user who may: docs/operations.md has what each needs.",
            ) from error
        except (redis.ConnectionError, redis.TimeoutError, OSError) as error:
            do = "Check that the server runs, and its address: LORAQ_REDIS_URL, or redis_url in the configuration file."
            if "CERTIFICATE_VERIFY_FAILED" in str(error):
                do = "Name the certificate of its authority, rediss://...?ssl_ca_certs=FILE, and the host as it does."
            raise UnansweredError(f"Redis at {self.where} does not answer: {error}", do) from error
        except redis.ReadOnlyError as error:
            raise ServerError(
                f"Redis at {self.where} is a replica, or its primary by now is another; it takes no writes",
                "Set LORAQ_REDIS_URL to the primary.",
            ) from error
        except redis.OutOfMemoryError as error:
            raise ServerError(
                f"Redis at {self.where} is at its memory limit; nothing was written",
                "Remove ended batches with `loraq rm`, or raise maxmemory; what runs goes on, and is settled.",
            ) from error
        except redis.ResponseError as error:
            if "TOOLATE" in str(error):
                raise ServerError(
                    f"Redis at {self.where} answered too late; nothing was written", "Try again in a moment."
                ) from None
            if "OOM" in str(error):
                raise ServerError(
                    f"Redis at {self.where} is at its memory limit; nothing was written",
                    "Raise its maxmemory; what runs goes on, and is settled.",
                ) from error
            old = "unknown command" in str(error)
            raise ServerError(
                f"Redis at {self.where} refuses: {error}",
                "loraq needs Redis or Valkey, version 7 or later." if old else "The server's log may say more.",
            ) from error
