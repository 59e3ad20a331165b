"""One frame of `loraq top`: an overview as sections that fit a terminal."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from rich.console import Console, Group, RenderableType
from rich.text import Text

from cli import render
from cli.render import Column, Section
from cli.watch import running_cells
from jobqueue.job import JobState, WorkerInfo
from jobqueue.overview import Overview

BAR = 10  # columns
ABOVE = 2  # lines of a section over its first row: an empty one, and its header
SECTIONS = ("worker", "running job", "waiting job")
NO_WORKER = "no worker; `loraq worker` on a GPU host, or `loraq up`, starts one"


def frame(out: Console, seen: Overview, head: Sequence[Text], height: int | None = None) -> RenderableType:
    """`head`, totals, devices, running jobs and the queue; of each list what `height` lines have room for (None: all).

    As wide as `out`, which becomes wider where even the narrowest does not fit.
    """
    bars = out.is_terminal
    sections = (
        _devices(seen, out.width, bars),
        running_cells(seen.running, seen.now, everywhere=True, bars=bars),
        _queue(seen, out.width),
    )
    running = seen.counts[JobState.RUNNING]
    wanted = [len(sections[0][1]), running, sum(seen.counts.values()) - running]
    head = [*head, *_totals(seen)]
    rooms = wanted
    if height is not None:
        above = sum(len(line.wrap(out, out.width)) for line in head) + ABOVE * sum(map(bool, wanted))
        rooms = shares(height - above, wanted)
    parts: list[RenderableType] = [*head]
    for (columns, rows), what, count, room in zip(sections, SECTIONS, wanted, rooms, strict=True):
        whole = count <= min(room, len(rows))
        shown = rows if whole else rows[: max(0, room - 1)]  # the last line says how many more there are
        if shown:
            made = render.table(out, columns, shown)
            made.caption = None  # it would cost a line to name what there is no room for
            parts += [Text(), made]
        if count > len(shown):  # below the rows of another section, "more" would be of that
            parts.append(Text(f"and {count - len(shown):,} more" if shown else render.counted(count, what), "dim"))
    return Group(*parts)


def shares(room: int, wanted: Sequence[int]) -> list[int]:
    """`room` lines, given out one by one to those that want more."""
    given = [0] * len(wanted)
    for _ in range(min(room, sum(wanted))):
        neediest = min((i for i in range(len(wanted)) if given[i] < wanted[i]), key=given.__getitem__)
        given[neediest] += 1
    return given


def _totals(seen: Overview) -> list[Text]:
    ended = f"; last hour: {render.counts(seen.ended)}" if any(seen.ended.values()) else ""
    lines = [Text.assemble((render.counts(seen.counts), "bold"), ended), _devices_in_all(seen)]
    if seen.held_classes:
        held = ", ".join(seen.held_classes)
        lines.append(Text(f"held, so that nothing of it starts: {held}", "yellow"))
    if seen.quiet_s:
        quiet = render.duration(seen.quiet_s)
        lines.append(Text(f"the server was started anew: nothing starts for {quiet}, as jobs may still run", "yellow"))
    return lines


def _devices_in_all(seen: Overview) -> Text:
    workers = [worker for worker in seen.workers if worker.trains]
    if not workers:
        return Text(NO_WORKER, "yellow")
    does = Counter(_does(worker) for worker in workers)
    noun = "GPU" if all(worker.uuid for worker in workers) else "worker"
    text = f"{render.counted(len(workers), noun)}: {', '.join(f'{does[what]} {what}' for what in does)}"
    return Text(text + (f"; all done in about {render.duration(seen.empty_in_s)}" if seen.empty_in_s else ""))


def _does(worker: WorkerInfo) -> str:
    if not worker.alive:
        return "silent"
    return "busy" if worker.running else "free" if worker.takes_jobs else "taking no job"


def _devices(seen: Overview, width: int, bars: bool) -> Section:
    columns = [
        Column("worker"),
        Column("device", rank=8),
        Column("", rank=7),
        Column("busy", right=True, rank=1),
        Column("memory", right=True, rank=2),
        Column("promised", right=True, rank=6),
        Column("temp", right=True, rank=9),
        Column("power", right=True, rank=10),
        Column("slots", rank=3),
        Column("state", cut=min(28, width // 3)),
    ]
    rows: list[list[RenderableType]] = []
    for worker in seen.workers:
        if not worker.trains and worker.alive and not worker.note:
            continue
        busy = worker.utilization if worker.alive else None
        rows.append(
            [
                worker.id,
                worker.device,
                render.bar(busy, 100, BAR) if bars and busy is not None else "",
                f"{busy}%" if busy is not None else "",
                render.of_memory(worker.used_bytes, worker.total_bytes),
                render.memory(worker.promised_bytes) if worker.promised_bytes else "",
                f"{worker.temperature_c} °C" if worker.temperature_c is not None else "",
                _power(worker),
                f"{len(worker.running)}/{worker.slots} {worker.share}".strip(),
                render.worker_state(worker),
            ]
        )
    return columns, rows


def _power(worker: WorkerInfo) -> str:
    limit = f"/{worker.power_limit_w:.0f}" if worker.power_limit_w else ""
    return f"{worker.power_w:.0f}{limit} W" if worker.power_w is not None else ""


def _queue(seen: Overview, width: int) -> Section:
    columns = [
        Column("job"),
        Column("state", rank=2),
        Column("waits for", cut=min(40, width // 4), rank=1),
        Column("class", rank=3),
        Column("needs", right=True, rank=4),
        Column("age", right=True, rank=5),
        Column("owner", rank=6),
        Column("trial", cut=16, rank=7),
    ]
    rows: list[list[RenderableType]] = []
    for waiting in seen.queue:
        job = waiting.job
        needs = render.memory(job.need_bytes) if job.need_bytes else ""
        age, what = render.age(job.submitted_at), waiting.waits_for
        rows.append([job.id, render.state(job), what, job.queue, needs, age, job.owner, job.trial])
    return columns, rows
