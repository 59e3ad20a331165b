"""A real worker of the CPU, and what happens to its server: it goes on by itself, and no job is lost or run twice."""

from __future__ import annotations

import socket
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import redis
from helpers import SUCCEEDED, RestartableServer, restartable_server, wait_for
from proxy import Proxy, proxy
from worker_process import LEASE_S, START_S, Site, succeeded_once

from jobqueue.broker import make_app, send_tokens
from jobqueue.errors import StaleAttemptError
from jobqueue.job import Claim, FailureReason, JobState
from jobqueue.store import Store

LISTENS_S = 60.0  # until Celery listens again, on a busy machine
BY_TOKEN = {"device": "cpu", "queue": "cpu"}  # a class that a CPU worker listens to
TOKENS_ONLY = {"LORAQ_POLL_S": 600}  # an idle slot does not ask by itself: a worker that is deaf does nothing


@pytest.fixture
def between(server: RestartableServer) -> Iterator[Proxy]:
    with proxy(server.port) as opened:
        yield opened


def listens(admin: redis.Redis) -> bool:
    """Both processes of a worker wait for tokens."""
    return sum(client["cmd"] == "brpop" for client in admin.client_list()) == 2


def test_a_server_that_is_killed_six_times_ends_no_job_and_leaves_no_worker_deaf(
    here: Site, server: RestartableServer, admin: redis.Redis
) -> None:
    """celery#8091, #10205, #10502: deaf after Redis came back. celery#7185: a running job marked as ended."""
    here.start(**TOKENS_ONLY)
    here.submit("b.1", "sleep:5", **BY_TOKEN)
    here.beating("b.1")
    for restart in range(6):
        server.restart()
        assert here.store.job("b.1").state in (JobState.RUNNING, JobState.SUCCEEDED)
        if restart % 2:  # each other time before it has come back
            wait_for(lambda: listens(admin), LISTENS_S, "it listens again")
    job = here.ended("b.1")
    assert succeeded_once(job)
    assert (job.attempt, job.failures) == (1, 0)
    assert len(here.trainers_in_turn("b.1")) == 1

    here.submit("c.1", "sleep:0.1", **BY_TOKEN)
    assert succeeded_once(here.ended("c.1"))


def test_a_worker_that_starts_while_the_server_is_away_works_when_it_is_there(
    here: Site, server: RestartableServer
) -> None:
    server.end()
    worker = here.start()
    wait_for(lambda: "no heartbeat" in worker.log.read_text(), START_S, "it has asked in vain")
    server.start()
    here.submit("b.1", "sleep:0.1")

    assert succeeded_once(here.ended("b.1"))
    assert "started again" not in worker.log.read_text(), "its processes waited"


def test_twenty_connections_that_are_cut_cost_no_memory_and_the_worker_still_hears(
    here: Site, admin: redis.Redis
) -> None:
    """celery#10273: memory grows after reconnects. celery#8091: deaf after CLIENT KILL."""
    worker = here.start(**TOKENS_ONLY)
    here.submit("b.1", "sleep:0.1", **BY_TOKEN)
    here.ended("b.1")

    def cut(times: int) -> int:
        for _ in range(times):
            wait_for(lambda: listens(admin), LISTENS_S, "it listens")
            for kind in ("normal", "pubsub"):
                admin.execute_command("CLIENT", "KILL", "TYPE", kind)
        return int(worker.celery().memory_info().rss)

    first, last = cut(5), cut(15)
    assert last - first < 5_000_000
    here.submit("c.1", "sleep:0.1", **BY_TOKEN)
    assert succeeded_once(here.ended("c.1"))


def test_a_proxy_that_swallows_everything_for_longer_than_any_timeout_is_got_over(
    here: Site, between: Proxy, admin: redis.Redis
) -> None:
    """celery#8091, #10502: after a minute in which nothing comes back, and no connection breaks, the worker is deaf."""
    worker = here.start(**TOKENS_ONLY, LORAQ_REDIS_URL=between.url, LORAQ_TIMEOUT_S=1, LORAQ_LEASE_S=20)
    here.submit("b.1", "sleep:5.5", **BY_TOKEN)
    here.beating("b.1")
    between.swallows = True
    time.sleep(4)  # Celery waits 2 s for an answer, the store 1 s
    between.swallows = False

    assert between.swallowed > 5
    assert "not renewed" in worker.log.read_text()
    job = here.ended("b.1", LISTENS_S)
    assert succeeded_once(job)
    assert (job.attempt, len(here.trainers_in_turn("b.1"))) == (1, 1)
    wait_for(lambda: listens(admin), LISTENS_S, "it listens again")
    here.submit("c.1", "sleep:0.1", **BY_TOKEN)
    assert succeeded_once(here.ended("c.1"))


def test_a_claim_whose_answer_is_lost_is_asked_for_again_and_costs_nothing(here: Site, between: Proxy) -> None:
    here.submit("b.1", "sleep:0.5")
    between.lose_answer_to("claim_", f"{socket.gethostname()}/cpu")
    here.start(LORAQ_REDIS_URL=between.url)

    job = here.ended("b.1")

    assert between.lost == 1
    assert succeeded_once(job)
    assert (job.attempt, job.failures) == (1, 0)
    assert len(here.trainers_in_turn("b.1")) == 1


def test_a_claim_whose_answer_is_lost_to_a_worker_that_then_stops_costs_nothing(here: Site, between: Proxy) -> None:
    """It was nobody's until its lease had ended, and then counted as lost."""
    slow = {"LORAQ_LEASE_S": 180, "LORAQ_SWEEP_S": 60}
    worker = here.start(LORAQ_REDIS_URL=between.url, **TOKENS_ONLY, **slow)
    wait_for(lambda: len(here.store.workers()) == 2, START_S, "it has started")
    between.lose_answer_to("claim_", f"{socket.gethostname()}/cpu")
    here.submit("b.1", "sleep:0.5", **BY_TOKEN)
    send_tokens(make_app(here.store.url, 5), ["cpu"])
    wait_for(lambda: between.lost == 1, START_S, "its claim is given, and it does not know")

    assert worker.stop() == 0
    job = here.store.job("b.1")
    assert (job.state, job.reason, job.failures) == (JobState.QUEUED, FailureReason.PREEMPTED, 0)
    here.start()
    assert succeeded_once(here.ended("b.1"))
    assert len(here.trainers_in_turn("b.1")) == 1


def test_a_job_that_ends_while_the_server_is_full_is_settled_and_not_run_again(here: Site, admin: redis.Redis) -> None:
    here.start()
    here.submit("b.1", "sleep:5")
    here.submit("c.1", "sleep:0.1")
    here.beating("b.1")
    admin.config_set("maxmemory", 1)  # for longer than a lease

    wait_for(lambda: here.store.job("b.1").state.final, START_S, "it ends")
    job = here.store.job("b.1")
    assert succeeded_once(job)
    assert (job.attempt, job.failures) == (1, 0)
    assert here.store.job("c.1").state is JobState.QUEUED, "nothing is begun that could not be written down"

    admin.config_set("maxmemory", 0)
    assert succeeded_once(here.ended("c.1"))
    assert here.store.job("b.1").attempt == 1


def test_after_a_failover_that_lost_the_last_second_no_two_trainers_of_a_job_overlap(
    here: Site, server: RestartableServer, admin: redis.Redis, between: Proxy, tmp_path: Path
) -> None:
    """The replica is promoted before the worker ends `a` and claims `b`: of both it knows nothing. An integer fence
    goes back that way: the claim of `b` that is lost, and the one that comes after it, both have number 1."""
    here.start(LORAQ_REDIS_URL=between.url)
    replicated = ("--replicaof", f"127.0.0.1 {server.port}")
    with (
        restartable_server(tmp_path / "replica", *replicated) as replica,
        redis.Redis.from_url(replica.url) as promoted,
    ):
        admin.config_set("repl-diskless-sync-delay", 0)
        wait_for(lambda: promoted.info("replication")["master_link_status"] == "up", START_S, "the replica follows")
        here.submit("a.1", "sleep:1.5", submission="s")
        here.submit("b.1", "sleep:4")
        here.beating("a.1")
        assert admin.wait(1, 5000) == 1, "the replica has what there is up to now"
        promoted.replicaof("NO", "ONE")

        here.beating("b.1")
        lost = Claim("b.1", 1, str(admin.hget("{loraq}:job:b.1", "nonce")), {}, "b", 0, LEASE_S)
        between.target = replica.port
        server.end()
        turned_at = time.time()
        here.store = Store(between.url)

        with pytest.raises(StaleAttemptError):
            here.store.settle(lost, SUCCEEDED)
        wait_for(lambda: len(here.trainers_in_turn("b.1")) == 2, START_S, "another trainer takes b")
        assert here.beats_of("b.1", 1)[0] > turned_at + LEASE_S, "no claim is given for a lease"
        assert here.beats_of("b.1", 0)[-1] < turned_at + LEASE_S, "the first is dead by then"
        assert here.store.job("b.1").attempt == 1, "the fence went back"
        for late in (here.store.renew, lambda claim: here.store.settle(claim, SUCCEEDED)):
            with pytest.raises(StaleAttemptError):
                late(lost)

        job = here.ended("b.1")
        assert succeeded_once(job)
        assert len(here.trainers_in_turn("b.1")) == 2
        settled = here.ended("a.1")
        assert succeeded_once(settled)
        assert len(here.trainers_in_turn("a.1")) == 1, "its end was lost, not what it had published"
