"""What a monitor reads: from a real worker of a simulated GPU, by HTTP, as Prometheus does."""

from __future__ import annotations

import json
import os
import socket
import threading
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import pytest
from helpers import AGAIN, LEASE_S, RestartableServer, must_claim, new_job, submit, wait_for
from prometheus_client.parser import text_string_to_metric_families
from worker_process import ROOT, START_S, Site

from gpu_worker import exporter
from gpu_worker.exporter import CACHE_S, ClusterCollector, Exporter
from gpu_worker.metrics import METRICS, REDIS_UP
from jobqueue.errors import ServerError
from jobqueue.figures import Figures
from jobqueue.job import JobState, Settlement
from jobqueue.memory import GIB

Samples = dict[tuple[str, frozenset[tuple[str, str]]], float]
TOTAL = 24 * GIB
GAUGES = {"temperature": 61, "power": 250_500, "power_limit": 350_000}


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def text(port: int) -> str:
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=10) as answer:
        return str(answer.read().decode())


def scrape(port: int) -> Samples:
    families = text_string_to_metric_families(text(port))
    return {(s.name, frozenset(s.labels.items())): s.value for family in families for s in family.samples}


def at(samples: Samples, name: str, **labels: str) -> float:
    return samples[name, frozenset(labels.items())]


@contextmanager
def exported(here: Site, **settings: Any) -> Iterator[int]:
    """The port of an exporter in this process."""
    port, stop = free_port(), threading.Event()
    given = replace(here.settings, metrics_port=port, **settings)
    thread = threading.Thread(target=Exporter(here.store, given).run, args=(stop,))
    thread.start()
    try:
        wait_for(lambda: listens(port), 10, "it is served")
        yield port
    finally:
        stop.set()
        thread.join()


def listens(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


@pytest.fixture
def at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each scrape reads Redis."""
    monkeypatch.setattr(exporter, "CACHE_S", 0.0)


def test_every_metric_of_the_table_and_no_other_is_served_by_a_real_worker(here: Site) -> None:
    nvml = here.folder / "nvml"
    nvml.mkdir()
    (nvml / "0.json").write_text(json.dumps({"total": TOTAL, "free": TOTAL - 2 * GIB, "busy": 37, **GAUGES}))
    path, port = os.pathsep.join([str(ROOT / "tests" / "fake_nvml"), str(ROOT)]), free_port()
    changes = {"PYTHONPATH": path, "FAKE_NVML": nvml, "LORAQ_METRICS_PORT": port}
    here.start("--gpu", "0", "--slots", "2", "--spares", "1", "--share", "timeslice", **changes)
    here.submit("b.1", "oom:1/sleep:0.2")
    assert here.ended("b.1", 60).state is JobState.SUCCEEDED
    here.submit("c.1", "await:go/sleep:0.1")
    here.beating("c.1")
    gpu, control = (f"{socket.gethostname()}/{label}" for label in ("gpu0", "control"))

    def seen() -> Samples | None:
        samples = scrape(port)
        spares = samples.get(("loraq_worker_spare_trainers", frozenset({("worker", gpu)})))
        return samples if spares and at(samples, "loraq_worker_memory_admitted_bytes", worker=gpu) else None

    samples = wait_for(seen, START_S + CACHE_S, "the worker has told what it does")

    families = {family.name: family for family in text_string_to_metric_families(text(port))}
    assert {metric.name.removesuffix("_total"): metric.kind for metric in METRICS} == {
        name: family.type for name, family in families.items()
    }
    for metric in METRICS:
        family = families[metric.name.removesuffix("_total")]
        assert family.documentation == metric.meaning
        assert family.samples, metric.name
        for sample in family.samples:
            assert sample.labels.keys() - {"le"} == set(metric.labels), metric.name
    assert at(samples, "loraq_gpu_utilization_ratio", worker=gpu) == 0.37
    assert at(samples, "loraq_gpu_memory_used_bytes", worker=gpu) == 2 * GIB
    assert at(samples, "loraq_gpu_memory_total_bytes", worker=gpu) == TOTAL
    assert at(samples, "loraq_gpu_temperature_celsius", worker=gpu) == 61
    assert at(samples, "loraq_gpu_power_watts", worker=gpu) == 250.5
    assert GIB <= at(samples, "loraq_worker_memory_admitted_bytes", worker=gpu) <= TOTAL
    assert at(samples, "loraq_worker_slots", worker=gpu) == 2
    assert at(samples, "loraq_worker_slots_used", worker=gpu) == 1
    assert at(samples, "loraq_worker_storage_writable", worker=control) == 1
    assert at(samples, "loraq_workers", kind="gpu") == at(samples, "loraq_workers", kind="control") == 1
    assert at(samples, "loraq_jobs", kind="train", state="running") == 1
    assert at(samples, "loraq_out_of_memory_total", kind="train", next="smaller") >= 1
    assert at(samples, "loraq_redis_memory_used_bytes") > 0


def test_counts_follow_what_happens_to_jobs(here: Site, at_once: None) -> None:
    store = here.store
    submit(store, new_job("b.1"), new_job("b.2"), new_job("b.3", kind="evaluate", needs=("b.1",)))
    with exported(here) as port:
        samples = scrape(port)
        assert at(samples, "loraq_jobs", kind="train", state="queued") == 2
        assert at(samples, "loraq_jobs", kind="evaluate", state="waiting") == 1
        assert at(samples, "loraq_queue_jobs", **{"class": "gpu8"}) == 2
        assert at(samples, "loraq_queue_jobs", **{"class": "gpu141"}) == 0, "a class that was never used is there, too"
        assert at(samples, "loraq_jobs_ended_total", kind="train", state="failed") == 0

        store.settle(must_claim(store), AGAIN)
        store.hold(["b.2"])
        done = Settlement(JobState.SUCCEEDED, outcome={"training": {"tokens": 1234}})
        store.settle(must_claim(store), done)
        store.settle(must_claim(store), Settlement(JobState.FAILED, "nan_loss", "the loss is NaN", counts=True))
        samples = scrape(port)

    assert at(samples, "loraq_jobs", kind="train", state="held") == 1
    assert at(samples, "loraq_jobs", kind="evaluate", state="waiting") == 0
    assert at(samples, "loraq_queue_jobs", **{"class": "gpu8"}) == 0
    assert at(samples, "loraq_attempts_total", kind="train", outcome="queued", reason="crashed") == 1
    assert at(samples, "loraq_attempts_total", kind="train", outcome="succeeded", reason="") == 1
    assert at(samples, "loraq_attempts_total", kind="evaluate", outcome="failed", reason="nan_loss") == 1
    assert at(samples, "loraq_jobs_ended_total", kind="train", state="succeeded") == 1
    assert at(samples, "loraq_jobs_ended_total", kind="evaluate", state="failed") == 1
    assert at(samples, "loraq_trained_tokens_total") == 1234
    assert at(samples, "loraq_claim_wait_seconds_count", **{"class": "gpu8"}) == 3
    assert at(samples, "loraq_claim_wait_seconds_bucket", le="1.0", **{"class": "gpu8"}) == 3
    assert at(samples, "loraq_attempt_duration_seconds_count", kind="train", outcome="succeeded") == 1
    assert at(samples, "loraq_attempt_duration_seconds_bucket", kind="train", outcome="queued", le="+Inf") == 1


def test_a_settlement_that_is_said_twice_counts_once(here: Site) -> None:
    submit(here.store, new_job("b.1"))
    claim, end = must_claim(here.store), Settlement(JobState.SUCCEEDED, outcome={"training": {"tokens": 5}})
    here.store.settle(claim, end)
    here.store.settle(claim, end)

    totals = here.store.figures().totals
    assert totals["attempt", "train", "succeeded", ""] == totals["ended", "train", "succeeded"] == 1
    assert totals["tokens",] == 5


def test_the_oldest_job_of_a_class_is_the_one_that_could_be_claimed_first(here: Site) -> None:
    store = here.store
    submit(store, new_job("b.1", priority=-5), new_job("b.2", priority=5, owner="eve"))
    store._redis.zincrby("{loraq}:since:gpu8", -90_000, "b.1")
    store._redis.hincrby("{loraq}:job:b.1", "queued_at", -90_000)

    assert 90 <= store.figures().oldest_s["gpu8"] < 95
    assert must_claim(store).job_id == "b.2"
    assert must_claim(store).job_id == "b.1"
    figures = store.figures()
    assert "gpu8" not in figures.oldest_s | figures.queued
    assert figures.totals["wait", "gpu8", "300"] == 1
    assert 90_000 <= figures.totals["wait", "gpu8", "ms"] < 95_000


def test_a_delayed_job_waits_from_when_it_may_be_claimed(here: Site) -> None:
    store = here.store
    submit(store, new_job("b.1"))
    store.settle(must_claim(store), Settlement(JobState.QUEUED, "crashed", "it broke", delay_s=3600))

    assert "gpu8" not in store.figures().queued
    store._redis.zadd("{loraq}:delayed", {"b.1": 1})
    store.sweep(LEASE_S)
    figures = store.figures()
    assert (figures.queued["gpu8"], figures.oldest_s["gpu8"]) == (1, 0.0)


def test_sweeps_count_anew_what_a_release_that_counts_otherwise_has_moved(here: Site) -> None:
    store, redis = here.store, here.store._redis
    submit(store, new_job("b.1"), new_job("b.2"), new_job("b.3", kind="evaluate", needs=("b.1",)))
    right = {("train", "queued"): 2, ("evaluate", "waiting"): 1}
    redis.delete("{loraq}:live")  # as before there was such a count
    store.sweep(LEASE_S)
    assert store.figures().live == right

    must_claim(store)
    redis.hincrby("{loraq}:live", "train queued", 1)  # as if it had not been said that the job runs
    redis.hincrby("{loraq}:live", "train running", -1)
    store.sweep(LEASE_S)
    assert store.figures().live == right | {("train", "queued"): 1, ("train", "running"): 1}


def test_sweeps_put_right_what_another_release_has_left_behind(here: Site) -> None:
    store, redis = here.store, here.store._redis
    submit(store, new_job("b.1"), new_job("b.2"))
    redis.hset("{loraq}:job:b.1", "state", "succeeded")  # of a release that knows no such index
    redis.delete("{loraq}:job:b.2")
    redis.delete("{loraq}:queue:gpu8:ann")
    for _ in range(2):
        store.sweep(LEASE_S)

    figures = store.figures()
    assert not any(figures.live.values())
    assert "gpu8" not in figures.oldest_s | figures.queued


def test_a_histogram_whose_bounds_have_changed_loses_nothing(here: Site) -> None:
    submit(here.store, new_job("b.1"))
    must_claim(here.store)
    here.store._redis.hset("{loraq}:totals", mapping={"wait:gpu8:30": 2, "wait:gpu8:inf": 1, "wait:gpu8:100000": 4})

    [wait] = [each for each in exporter.families(here.store.figures()) if each.name == "loraq_claim_wait_seconds"]
    buckets = [(s.labels["le"], s.value) for s in wait.samples if s.name.endswith("_bucket")]
    assert [value for _, value in buckets] == sorted(value for _, value in buckets), "they are cumulative"
    assert dict(buckets).items() >= {"1.0": 1, "15.0": 1, "60.0": 3, "86400.0": 3, "+Inf": 8}.items()
    assert [s.value for s in wait.samples if s.name.endswith("_count")] == [8]


def test_counters_survive_workers_and_the_server(here: Site, server: RestartableServer) -> None:
    submit(here.store, new_job("b.1"))
    here.store.settle(must_claim(here.store), Settlement(JobState.SUCCEEDED))
    server.restart()
    assert here.store.figures().totals["ended", "train", "succeeded"] == 1


def test_two_control_workers_say_the_same(here: Site, at_once: None) -> None:
    submit(here.store, new_job("b.1"), new_job("b.2"))
    here.store.settle(must_claim(here.store), Settlement(JobState.SUCCEEDED))
    with exported(here) as one, exported(here) as other:
        first, second = scrape(one), scrape(other)

    moving = ("loraq_redis_memory", "loraq_queue_oldest")
    assert {key: value for key, value in first.items() if not key[0].startswith(moving)} == {
        key: value for key, value in second.items() if not key[0].startswith(moving)
    }


def test_a_silent_worker_says_that_alone(here: Site, at_once: None) -> None:
    info = {
        "host": "far", "device": "cpu", "uuid": "", "usable_bytes": 5, "slots": 1, "running": [], "every_s": 0.0,
        "storage_writable": True, "of_a_newer_release": 3.0,
    }  # fmt: skip
    here.store.heartbeat("far/cpu", "cpu", info)
    with exported(here) as port:
        silent = wait_for(lambda: at(seen := scrape(port), "loraq_worker_up", worker="far/cpu") == 0 and seen, 5, "it")
        here.store.heartbeat("far/cpu", "cpu", {**info, "every_s": 60.0})
        alive = scrape(port)

    assert ("loraq_worker_storage_writable", frozenset({("worker", "far/cpu")})) not in silent
    assert at(silent, "loraq_workers", kind="cpu") == 0
    assert at(alive, "loraq_worker_storage_writable", worker="far/cpu") == 1
    assert at(alive, "loraq_workers", kind="cpu") == 1
    assert "of_a_newer_release" not in str(alive.keys())


def test_redis_is_read_once_in_some_seconds_whoever_scrapes(here: Site) -> None:
    reads, now = [], [100.0]

    def read() -> Figures:
        reads.append(now[0])
        return here.store.figures()

    collector = ClusterCollector(read, clock=lambda: now[0])
    for _ in range(10):
        list(collector.collect())
    assert len(reads) == 1
    now[0] += CACHE_S
    list(collector.collect())
    assert len(reads) == 2


def test_while_redis_is_away_a_scrape_says_so(here: Site, server: RestartableServer, at_once: None) -> None:
    with exported(here) as port:
        assert at(scrape(port), REDIS_UP.name) == 1
        server.end()
        assert scrape(port) == {(REDIS_UP.name, frozenset()): 0.0}
        server.start()
        assert at(scrape(port), REDIS_UP.name) == 1


def test_an_error_of_the_server_is_kept_as_long_as_its_figures() -> None:
    def read() -> Figures:
        asked.append(1)
        raise ServerError("away")

    asked: list[int] = []
    collector = ClusterCollector(read, clock=lambda: 0.0)
    for _ in range(3):
        [family] = collector.collect()
        assert family.samples[0].value == 0
    assert len(asked) == 1


def test_it_is_served_on_this_machine_alone_unless_the_operator_says_otherwise(here: Site) -> None:
    with exported(here) as port, socket.socket() as probe:
        assert probe.connect_ex(("127.0.0.2", port)) != 0  # of the loopback interface, too, but not what was stated
    with exported(here, metrics_address="0.0.0.0") as port, socket.socket() as probe:
        assert probe.connect_ex(("127.0.0.2", port)) == 0


def test_a_port_that_another_has_is_waited_for(
    here: Site, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(exporter, "AGAIN_S", 0.1)
    stop = threading.Event()
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        port = int(other.getsockname()[1])
        settings = replace(here.settings, metrics_port=port)
        thread = threading.Thread(target=Exporter(here.store, settings).run, args=(stop,))
        thread.start()
        wait_for(lambda: "cannot be listened on" in caplog.text, 5, "it says so")
    try:
        wait_for(lambda: at(scrape(port), REDIS_UP.name) == 1 if listens(port) else None, 10, "it is served")
    finally:
        stop.set()
        thread.join()
