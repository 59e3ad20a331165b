"""Serves the metrics of metrics.py for Prometheus, on a port of a control worker.

Every control worker serves the same figures of the whole cluster, from the records in Redis: one scrape target is
enough, and of several the maximum counts, not the sum. Counters live in Redis, so no restart of a worker resets them.
"""

from __future__ import annotations

import logging
import math
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence

from prometheus_client import CollectorRegistry, start_http_server
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily
from prometheus_client.registry import Collector

from gpu_worker import metrics
from gpu_worker.metrics import Metric
from jobqueue.errors import ServerError
from jobqueue.figures import Figures
from jobqueue.job import JobKind, JobState, WorkerInfo
from jobqueue.memory import all_classes
from jobqueue.notification import Telling
from jobqueue.settings import Settings
from jobqueue.store import Store

log = logging.getLogger(__name__)
CACHE_S = 5.0  # Redis is read no more often, whoever scrapes
AGAIN_S = 10.0  # after the port could not be had
Family = CounterMetricFamily | GaugeMetricFamily | HistogramMetricFamily


def families(figures: Figures) -> Iterator[Family]:
    """What a scrape gets. Series that can be there from the start are, with 0, so that a first increase is seen."""
    totals = _by_name(figures.totals)
    living = [state for state in JobState if not state.final]
    classes = sorted({*all_classes(), *figures.queued})
    ends: list[tuple[str, ...]] = [(kind, state) for kind in JobKind for state in JobState if state.final]
    alive = [_kind(worker) for worker in figures.workers if worker.alive]
    yield _numbers(metrics.REDIS_UP, {(): 1})
    yield _numbers(metrics.REDIS_MEMORY, {(): figures.memory_bytes})
    yield _numbers(metrics.REDIS_LIMIT, {(): figures.memory_limit_bytes})
    yield _numbers(
        metrics.JOBS, {(kind, state): figures.live.get((kind, state), 0) for kind in JobKind for state in living}
    )
    yield _numbers(metrics.QUEUE, {(name,): figures.queued.get(name, 0) for name in classes})
    yield _numbers(metrics.OLDEST, {(name,): figures.oldest_s.get(name, 0.0) for name in classes})
    yield _histogram(metrics.WAIT, totals["wait"], figures.waits_s)
    yield _numbers(metrics.ENDED, {**dict.fromkeys(ends, 0), **totals["ended"]})
    yield _numbers(metrics.ATTEMPTS, totals["attempt"])
    yield _histogram(metrics.DURATION, totals["took"], figures.durations_s)
    yield _numbers(metrics.OUT_OF_MEMORY, totals["memory"])
    yield _numbers(metrics.TOKENS, {(): 0, **totals["tokens"]})
    yield _numbers(metrics.TOLD, {**{(telling,): 0 for telling in Telling}, **totals["told"]})
    yield _numbers(metrics.WORKERS, {(kind,): alive.count(kind) for kind in ("gpu", "cpu", "control")})
    of_workers: dict[Metric, dict[tuple[str, ...], float]] = {metric: {} for metric in metrics.OF_WORKERS}
    for worker in figures.workers:
        for metric, labels, value in _of_worker(worker):
            of_workers[metric][worker.id, *labels] = value
    for metric, values in of_workers.items():
        yield _numbers(metric, values)


def _by_name(totals: Mapping[tuple[str, ...], int]) -> Mapping[str, dict[tuple[str, ...], int]]:
    """What was counted -> labels -> how often."""
    found: defaultdict[str, dict[tuple[str, ...], int]] = defaultdict(dict)
    for (name, *labels), value in totals.items():
        found[name][tuple(labels)] = value
    return found


def _numbers(metric: Metric, values: Mapping[tuple[str, ...], float]) -> Family:
    kind = CounterMetricFamily if metric.kind == "counter" else GaugeMetricFamily
    made: CounterMetricFamily | GaugeMetricFamily = kind(metric.name, metric.meaning, labels=metric.labels)
    for labels, value in values.items():
        made.add_metric(labels, value)
    return made


def _histogram(metric: Metric, values: Mapping[tuple[str, ...], int], bounds_s: Sequence[float]) -> Family:
    """From (labels..., bound in seconds or "inf") -> how many, of which (labels..., "ms") is the sum.

    What was counted by a release with other bounds is in the buckets above its own.
    """
    made = HistogramMetricFamily(metric.name, metric.meaning, labels=metric.labels)
    for labels in dict.fromkeys(key[:-1] for key in values):
        counts = {float(bound): n for (*of, bound), n in values.items() if tuple(of) == labels and bound != "ms"}
        buckets = [
            ("+Inf" if bound == math.inf else f"{bound:.1f}", float(sum(n for b, n in counts.items() if b <= bound)))
            for bound in (*bounds_s, math.inf)
        ]
        made.add_metric(labels, buckets, values.get((*labels, "ms"), 0) / 1000)
    return made


def _kind(worker: WorkerInfo) -> str:
    return worker.device if worker.device in ("cpu", "control") else "gpu"


def _of_worker(worker: WorkerInfo) -> Iterator[tuple[Metric, tuple[str, ...], float]]:
    """Metric, labels beside the worker, value; of one that is silent only that: what it had reported is so no more."""
    yield metrics.UP, (), worker.alive
    if not worker.alive:
        return
    yield metrics.INFO, (worker.device, worker.uuid, worker.share), 1
    found: dict[Metric, float | None] = {
        metrics.SLOTS: worker.slots,
        metrics.USED: len(worker.running),
        metrics.TAKES: worker.takes_jobs,
        metrics.WRITABLE: worker.storage_writable,
    }
    if _kind(worker) == "control":
        found |= {metrics.SWEEP: worker.sweep_s, metrics.SWEPT_AT: worker.swept_at}
    else:
        found |= {metrics.USABLE: worker.usable_bytes, metrics.ADMITTED: worker.promised_bytes}
        found |= {metrics.SPARES: worker.spares}
    if _kind(worker) == "gpu" and worker.total_bytes:  # which it does not say while it does not answer
        found |= {metrics.GPU_USED: worker.used_bytes, metrics.GPU_TOTAL: worker.total_bytes}
        found |= {metrics.GPU_BUSY: None if worker.utilization is None else worker.utilization / 100}
        found |= {metrics.GPU_TEMPERATURE: worker.temperature_c, metrics.GPU_POWER: worker.power_w}
    for metric, value in found.items():
        if value is not None:
            yield metric, (), value


class ClusterCollector(Collector):
    """Reads the figures when somebody scrapes, at most every few seconds."""

    def __init__(self, read: Callable[[], Figures], clock: Callable[[], float] = time.monotonic) -> None:
        self._read, self._clock = read, clock
        self._lock = threading.Lock()
        self._known: Figures | None = None
        self._read_at = -CACHE_S

    def collect(self) -> Iterator[Family]:
        with self._lock:
            if self._clock() - self._read_at >= CACHE_S:
                try:
                    self._known = self._read()
                except ServerError as error:
                    log.warning("no metrics: %s", error.what)
                    self._known = None
                self._read_at = self._clock()
            known = self._known
        if known is not None:
            yield from families(known)
            return
        yield _numbers(metrics.REDIS_UP, {(): 0})

    def describe(self) -> Iterator[Family]:
        """Nothing, which spares Redis a question before anybody scrapes."""
        return iter(())


class Exporter:
    """Serves a control worker's /metrics, where the settings name a port."""

    def __init__(self, store: Store, settings: Settings) -> None:
        self._settings = settings
        self._registry = CollectorRegistry()
        self._registry.register(ClusterCollector(store.figures))

    def run(self, stop: threading.Event) -> None:
        """Until `stop`; a port that another has is waited for."""
        port, address = self._settings.metrics_port, self._settings.metrics_address
        assert port is not None
        said = False
        while True:
            try:
                server, thread = start_http_server(port, address, self._registry)
                break
            except OSError as error:
                if not said:
                    log.error("no metrics: %s:%d cannot be listened on: %s", address, port, error.strerror or error)
                said = True
                if stop.wait(AGAIN_S):
                    return
        log.info("metrics at http://%s:%d/metrics", address, port)
        stop.wait()
        server.shutdown()
        server.server_close()
        thread.join()
