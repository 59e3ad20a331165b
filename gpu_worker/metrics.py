"""The metrics that there are, by name; exporter.py serves them, docs/metrics.md lists them."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Metric:
    """One line of docs/metrics.md."""

    name: str
    kind: str  # gauge, counter or histogram
    labels: tuple[str, ...]
    meaning: str


REDIS_UP = Metric("loraq_redis_up", "gauge", (), "1 where Redis answers; where it does not, this is all there is.")
REDIS_MEMORY = Metric("loraq_redis_memory_used_bytes", "gauge", (), "Memory that Redis uses.")
REDIS_LIMIT = Metric("loraq_redis_memory_max_bytes", "gauge", (), "Its maxmemory; 0: no limit.")
JOBS = Metric("loraq_jobs", "gauge", ("kind", "state"), "Jobs that have not ended: waiting, held, queued or running.")
QUEUE = Metric("loraq_queue_jobs", "gauge", ("class",), "Jobs of a memory class that a worker could claim now.")
OLDEST = Metric(
    "loraq_queue_oldest_seconds", "gauge", ("class",), "How long the first of them has been waiting; 0: there is none."
)
WAIT = Metric(
    "loraq_claim_wait_seconds", "histogram", ("class",), "From when a job could be claimed until it was, each time."
)
ENDED = Metric("loraq_jobs_ended_total", "counter", ("kind", "state"), "Jobs that succeeded, failed or were cancelled.")
ATTEMPTS = Metric(
    "loraq_attempts_total",
    "counter",
    ("kind", "outcome", "reason"),
    "Attempts that ended; outcome `queued`: the job is tried again. Reasons are those of failures.md (`lost`: its "
    "worker fell silent), empty where there is none.",
)
DURATION = Metric(
    "loraq_attempt_duration_seconds", "histogram", ("kind", "outcome"), "How long attempts took, loading included."
)
OUT_OF_MEMORY = Metric(
    "loraq_out_of_memory_total",
    "counter",
    ("kind", "next"),
    "Attempts that ran out of memory, by what the next one gets: `smaller` micro-batches, `more_memory`, or `none`.",
)
TOKENS = Metric("loraq_trained_tokens_total", "counter", (), "Tokens of the trainings that succeeded.")
TOLD = Metric("loraq_notifications_total", "counter", ("outcome",), "Tries to tell somebody that a batch has ended.")
WORKERS = Metric("loraq_workers", "gauge", ("kind",), "Workers that are alive: gpu, cpu or control.")
INFO = Metric("loraq_worker_info", "gauge", ("worker", "device", "uuid", "share"), "What a worker serves; always 1.")
UP = Metric("loraq_worker_up", "gauge", ("worker",), "0 where a worker has fallen silent; a day later it is forgotten.")
SLOTS = Metric("loraq_worker_slots", "gauge", ("worker",), "Jobs that it runs side by side at most.")
USED = Metric("loraq_worker_slots_used", "gauge", ("worker",), "Jobs that it runs.")
USABLE = Metric("loraq_worker_memory_usable_bytes", "gauge", ("worker",), "What its jobs may hold together.")
TAKES = Metric("loraq_worker_takes_jobs", "gauge", ("worker",), "0 where it takes none: `loraq workers` says why.")
WRITABLE = Metric(
    "loraq_worker_storage_writable", "gauge", ("worker",), "0 where it cannot write in the storage or on its own disk."
)
ADMITTED = Metric("loraq_worker_memory_admitted_bytes", "gauge", ("worker",), "What is promised to the jobs that run.")
SPARES = Metric("loraq_worker_spare_trainers", "gauge", ("worker",), "Trainers that stand ready for a first job.")
GPU_BUSY = Metric(
    "loraq_gpu_utilization_ratio", "gauge", ("worker",), "Share of the time in which a kernel ran, by NVML; 0 to 1."
)
GPU_USED = Metric("loraq_gpu_memory_used_bytes", "gauge", ("worker",), "Memory of the GPU that anybody holds.")
GPU_TOTAL = Metric("loraq_gpu_memory_total_bytes", "gauge", ("worker",), "Memory of the GPU.")
GPU_TEMPERATURE = Metric("loraq_gpu_temperature_celsius", "gauge", ("worker",), "Temperature of the GPU.")
GPU_POWER = Metric("loraq_gpu_power_watts", "gauge", ("worker",), "Power that the GPU draws.")
SWEEP = Metric("loraq_sweep_duration_seconds", "gauge", ("worker",), "How long a control worker's last sweep took.")
SWEPT_AT = Metric("loraq_sweep_timestamp_seconds", "gauge", ("worker",), "When that ended, since the epoch.")

OF_WORKERS = (
    *(INFO, UP, SLOTS, USED, USABLE, TAKES, WRITABLE, ADMITTED, SPARES),
    *(GPU_BUSY, GPU_USED, GPU_TOTAL, GPU_TEMPERATURE, GPU_POWER, SWEEP, SWEPT_AT),
)
METRICS = (
    *(REDIS_UP, REDIS_MEMORY, REDIS_LIMIT, JOBS, QUEUE, OLDEST, WAIT, ENDED, ATTEMPTS, DURATION, OUT_OF_MEMORY, TOKENS),
    *(TOLD, WORKERS, *OF_WORKERS),
)
