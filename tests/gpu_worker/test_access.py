"""A server with users of their own rights, and one behind TLS."""

from __future__ import annotations

import shutil
import ssl
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import urlsplit

import pytest
import redis
import trustme
from helpers import restartable_server, wait_for
from kombu import pools
from kombu.exceptions import OperationalError
from proxy import proxy
from worker_process import START_S, Site

from jobqueue.broker import make_app
from jobqueue.errors import ServerError
from jobqueue.job import JobState
from jobqueue.service import Client
from jobqueue.settings import Settings
from jobqueue.store import Store

USERS = Path(__file__).parents[2] / "ops" / "users.acl"
SWEEP = """\
name: b
base_model: /stub/sleep:0.2
data: {source: rows.jsonl}
evaluation: {source: rows.jsonl}
resources: {memory: 1GiB, device: cpu}
sweep: {grid: {training.seed: [1, 2]}}
"""
ROW = '{"question": "?", "options": {"A": "a", "B": "b"}, "answer": "a", "answer_idx": "A"}\n'
# Managed servers refuse it to everyone, and it is asked for what INFO does not say.
NOT_NEEDED = {"config|get"}


class Guarded:
    """A server with the users of ops/users.acl, whose passwords are their names."""

    def __init__(self, url: str) -> None:
        self._url = url
        self.admin = redis.Redis.from_url(url, decode_responses=True)
        for user in ("submitter", "worker", "monitor"):
            self.admin.execute_command("ACL", "SETUSER", user, "on", f">{user}")

    def url(self, user: str) -> str:
        return self._url.replace("redis://", f"redis://{user}:{user}@")

    def refused(self) -> list[tuple[str, str]]:
        """(user, command or key) of everything that was not permitted."""
        log = self.admin.acl_log()
        return [(entry["username"], entry["object"]) for entry in log if entry["object"] not in NOT_NEEDED]


@pytest.fixture
def guarded(tmp_path: Path) -> Iterator[Guarded]:
    file = shutil.copy(USERS, tmp_path / "users.acl")
    with restartable_server(tmp_path / "server", "--aclfile", str(file)) as server:
        yield Guarded(server.url)


@pytest.fixture
def submitter(guarded: Guarded, tmp_path: Path) -> Client:
    storage = str(tmp_path / "site" / "storage")
    return Client(Settings(redis_url=guarded.url("submitter"), storage=storage, data_dir=tmp_path / "laptop"))


def test_each_user_may_do_what_it_is_for_and_nothing_else(guarded: Guarded, submitter: Client, tmp_path: Path) -> None:
    (tmp_path / "rows.jsonl").write_text(ROW * 3)
    (tmp_path / "b.yaml").write_text(SWEEP)
    (tmp_path / "site").mkdir()
    site = Site(guarded.url("worker"), tmp_path / "site")
    try:
        site.start()
        batch = submitter.submit(submitter.plan(submitter.read(tmp_path / "b.yaml")))
        monitor = Client(Settings(redis_url=guarded.url("monitor"), data_dir=tmp_path / "watcher"))
        wait_for(lambda: all(job.state.final for job in monitor.jobs("b")), START_S, "the batch ends")

        assert {job.state for job in monitor.jobs("b")} == {JobState.SUCCEEDED}
        assert [each.name for each in monitor.batches()] == [batch.name]
        assert {worker.alive for worker in monitor.overview().workers} == {True}
        assert monitor.events("b.1")
        assert monitor.warnings() == []
        assert monitor.store.figures().workers
        submitter.retry("b")
        afar = Client(Settings(redis_url=guarded.url("submitter"), data_dir=tmp_path / "laptop"))
        afar.pull(afar.plan_pull("b/1", tmp_path / "pulled"))
        assert (tmp_path / "pulled" / "adapter_model.txt").read_text() == "b.1"
        assert guarded.refused() == []

        with pytest.raises(ServerError, match=r"does not permit that: .*monitor") as refusal:
            monitor.cancel("b")
        with pytest.raises(ServerError, match=r"does not permit that: .*monitor"):
            monitor.plan_pull("b/1")  # by way of the server, where wishes are written
        assert "docs/operations.md" in refusal.value.do
        for command in (["FLUSHALL"], ["KEYS", "*"], ["SET", "else", "1"], ["CONFIG", "SET", "dir", "/tmp"]):
            for user in ("submitter", "worker", "monitor"):
                with pytest.raises(redis.exceptions.NoPermissionError):
                    redis.Redis.from_url(guarded.url(user)).execute_command(*command)
        submitter.remove("b")
    finally:
        site.close()


def test_none_of_the_users_can_log_in_before_it_has_a_password(tmp_path: Path) -> None:
    file = shutil.copy(USERS, tmp_path / "users.acl")
    with restartable_server(tmp_path / "server", "--aclfile", str(file)) as server:
        for user in ("submitter", "worker", "monitor"):
            for password in ("", user):
                address = server.url.replace("redis://", f"redis://{user}:{password}@")
                with pytest.raises(redis.AuthenticationError):
                    redis.Redis.from_url(address).ping()


def test_the_users_can_be_read_by_a_server_of_version_7_0(tmp_path: Path) -> None:
    """It ends at a command that it does not know: WAITAOF came with 7.2, and is of the category connection there."""
    single = {word[1:] for word in USERS.read_text().split() if word.startswith("+") and "@" not in word}

    assert single <= {"fcall", "fcall_ro", "function|load", "time", "info"}
    file = shutil.copy(USERS, tmp_path / "users.acl")
    with restartable_server(tmp_path / "server", "--aclfile", str(file)) as server, redis.from_url(server.url) as admin:
        for user in ("submitter", "worker"):
            assert admin.execute_command("ACL", "DRYRUN", user, "WAITAOF", "1", "0", "1") == b"OK"


def test_a_server_behind_tls_is_used_by_store_and_celery_and_only_with_a_certificate_that_is_known(
    guarded: Guarded, tmp_path: Path
) -> None:
    """Celery trusted any certificate, and told whoever showed one the password, where the address said no more."""
    authority, tls = trustme.CA(), ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    authority.issue_cert("127.0.0.1").configure_cert(tls)
    known = tmp_path / "ca.pem"
    authority.cert_pem.write_to_path(str(known))
    with proxy(urlsplit(guarded.url("worker")).port or 0, tls) as front:
        bare = f"rediss://worker:worker@127.0.0.1:{front.port}/0"

        store = Store(f"{bare}?ssl_ca_certs={known}")
        assert store.server()
        make_app(store.url, 2).send_task("loraq.wake", queue="loraq.cpu", retry=False)
        assert guarded.admin.llen("loraq.cpu") == 1

        with pytest.raises(ServerError, match="does not answer") as refusal:
            Store(bare).server()
        assert "ssl_ca_certs=FILE" in refusal.value.do
        pools.reset()  # kombu's, which take servers of one address for the same
        with pytest.raises(OperationalError, match="CERTIFICATE_VERIFY_FAILED"):
            make_app(bare, 2).send_task("loraq.wake", queue="loraq.cpu", retry=False)
