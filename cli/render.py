"""How things look: units, states, tables, JSON. The commands decide what to show, this decides how."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, is_dataclass, replace
from typing import Any, Literal

import click
from rich.console import Console, RenderableType
from rich.measure import Measurement
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from jobqueue.job import Batch, Job, JobState, WorkerInfo

WIDE = 10_000
"""Columns of an output that is no terminal: a file or a pipe gets whole lines."""
GAP = 2
WRAP = 28
LITTLE = 8  # columns of a higher rank rather go than that others are folded
NONE = "-"

STATE_STYLES: Mapping[JobState, str] = {
    JobState.WAITING: "dim",
    JobState.HELD: "magenta",
    JobState.QUEUED: "cyan",
    JobState.RUNNING: "bold blue",
    JobState.SUCCEEDED: "green",
    JobState.FAILED: "bold red",
    JobState.CANCELLED: "yellow",
}


def console(*, stderr: bool = False) -> Console:
    """Prints text as it is, without markup or colours of its own; unwrapped where it is no terminal."""
    made = Console(stderr=stderr, markup=False, emoji=False, highlight=False)
    if not made.is_terminal and "COLUMNS" not in os.environ:
        made.width = WIDE
    return made


# --- JSON -------------------------------------------------------------------------------------------------


def print_json(value: Any) -> None:
    """One JSON document on stdout: dataclasses by their fields, a batch with its state too."""
    click.echo(json.dumps(plain(value), indent=2, ensure_ascii=False, allow_nan=False))


def plain(value: Any) -> Any:
    """What JSON can hold."""
    if isinstance(value, Batch):
        return {**plain(asdict(value)), "state": value.state.value}
    if is_dataclass(value) and not isinstance(value, type):
        return plain(asdict(value))
    if hasattr(value, "model_dump"):  # a pydantic model
        return value.model_dump(mode="json")
    if isinstance(value, Mapping):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple, set, frozenset)):
        return [plain(item) for item in value]
    if isinstance(value, float):
        return value if abs(value) < float("inf") else None  # NaN and infinity are no JSON
    return value if value is None or isinstance(value, (str, int)) else str(value)


# --- Units ------------------------------------------------------------------------------------------------


def memory(count: float | None) -> str:
    """Bytes as GiB, small ones as MiB."""
    if not count:
        return NONE
    return f"{count / 2**30:.1f} GiB" if count >= 0.1 * 2**30 else f"{count / 2**20:.0f} MiB"


def of_memory(used: float | None, most: float | None) -> str:
    """`3.1/5.0 GiB`, or as much of it as is known."""
    if not used or not most:
        return memory(used) if used else ""
    return f"{used / 2**30:.1f}/{memory(most)}" if most >= 0.1 * 2**30 else f"{used / 2**20:.0f}/{memory(most)}"


def duration(seconds: float | None) -> str:
    """The two units that matter: `45 s`, `3 min 20 s`, `2 h 5 min`, `3 d 4 h`."""
    if seconds is None:
        return NONE
    rest = max(0, round(seconds))
    for unit, name, part, part_name in ((86400, "d", 3600, "h"), (3600, "h", 60, "min"), (60, "min", 1, "s")):
        if rest >= unit:
            less = rest % unit // part
            return f"{rest // unit} {name} {less} {part_name}" if less else f"{rest // unit} {name}"
    return f"{rest} s"


def minutes(value: float | None) -> str:
    """Minutes of training; the short runs of a test in seconds."""
    if value is None:
        return NONE
    return f"{value:.1f} min" if value >= 1 else f"{60 * value:.0f} s"


def age(since: float) -> str:
    """How long ago, in one unit."""
    return " ".join(duration(time.time() - since).split()[:2]) if since else NONE


def moment(at: float) -> str:
    """Local date and time."""
    return time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(at)) if at else NONE


def clock(at: float) -> str:
    """Local time of day."""
    return time.strftime("%H:%M:%S", time.localtime(at))


def percent(share: float | None, digits: int = 1) -> str:
    return NONE if share is None else f"{100 * share:.{digits}f}%"


def interval(bounds: tuple[float, float] | None) -> str:
    """Of a share, in percent: `[42.1, 48.3]`."""
    return NONE if bounds is None else f"[{100 * bounds[0]:.1f}, {100 * bounds[1]:.1f}]"


def points(difference: float | None) -> str:
    """A difference in percentage points, signed."""
    return NONE if difference is None else f"{difference:+.1f}"


def points_interval(bounds: tuple[float, float] | None) -> str:
    """Of a difference in percentage points: `[-1.2, +3.4]`."""
    return NONE if bounds is None else f"[{bounds[0]:+.1f}, {bounds[1]:+.1f}]"


def number(value: float | None, digits: int = 0) -> str:
    return NONE if value is None else f"{value:,.{digits}f}"


def p_value(value: float | None) -> str:
    if value is None:
        return NONE
    return "<0.0001" if value < 0.0001 else f"{value:.2g}" if value < 0.1 else f"{value:.2f}"


def counted(count: int, noun: str) -> str:
    """`1 job`, `4 jobs`, `2 batches`."""
    plural = f"{noun}es" if noun.endswith("ch") else f"{noun}s"
    return f"{count:,} {noun if count == 1 else plural}"


def bar(done: float, total: float, width: int = 16) -> ProgressBar:
    return ProgressBar(total=total, completed=done, width=width)


# --- Jobs -------------------------------------------------------------------------------------------------


def state(job: Job) -> Text:
    """A job's state in a word or two."""
    if job.cancel_requested and not job.state.final:
        return Text("stopping", "yellow")
    why = f" ({job.reason})" if job.reason and job.state is JobState.FAILED else ""
    return Text(f"{job.state}{why}", STATE_STYLES[job.state])


def worker_state(worker: WorkerInfo) -> Text:
    """What it does, or why it takes nothing."""
    if not worker.alive:
        return Text("silent", "bold red")
    if worker.note:
        return Text(worker.note, "yellow")
    return Text("at work", "bold blue") if worker.running else Text("idle", "green")


def batch_state(value: JobState) -> Text:
    return Text(value, STATE_STYLES[value])


def counts(states: Mapping[JobState, int]) -> str:
    """`3 queued, 2 running, 1 succeeded`."""
    return ", ".join(f"{states[state]} {state}" for state in JobState if states.get(state)) or "no jobs"


def step(progress: Mapping[str, Any]) -> str:
    """`20/200` of a progress event."""
    if progress.get("step") is None:
        return ""
    return f"{progress['step']}/{progress['steps']}" if progress.get("steps") else str(progress["step"])


def progress(event: Mapping[str, Any]) -> str:
    """A progress event on one line, without what it does not know."""
    parts = [f"{event.get('phase', '')} {step(event)}".strip()]
    if event.get("loss") is not None:
        parts.append(f"loss {event['loss']:.3f}")
    if event.get("tokens_per_s"):
        parts.append(f"{number(event['tokens_per_s'])} tokens/s")
    if event.get("reserved_bytes"):
        parts.append(memory(event["reserved_bytes"]))
    return "  ".join(parts)


def facts(out: Console, pairs: Mapping[str, Any]) -> None:
    """Names and values, one line each; what is not known is left out."""
    known = {name: Text(value) if isinstance(value, str) else value for name, value in pairs.items() if value}
    if not out.is_terminal:  # a grid fills each line up to its longest
        width = max(map(len, known), default=0) + GAP
        for name, value in known.items():
            out.print(Text(name.ljust(width)) + value, soft_wrap=True)
        return
    grid = Table.grid(padding=(0, GAP, 0, 0))
    grid.add_column(style="dim", no_wrap=True)
    grid.add_column(overflow="fold")
    for name, value in known.items():
        grid.add_row(name, value)
    out.print(grid)


# --- Tables -----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Column:
    """A column of a table that adapts to the terminal."""

    header: str
    right: bool = False
    wrap: bool = False  # may break at spaces, where it is longer than WRAP; nothing else is ever broken
    cut: int = 0  # may be cut to so many characters, with an ellipsis; 0: never
    rank: int = 0  # the higher, the sooner it goes where the terminal is too narrow; 0 always stays
    below: str | None = None  # header of the column in whose cells it stands as a second line, where room is short


Row = Sequence[RenderableType]
Section = tuple[list[Column], list[list[RenderableType]]]
"""Columns and rows of a table."""


def table(out: Console, columns: Sequence[Column], rows: Sequence[Row], *, header: bool = True) -> Table:
    """The columns that `out` is wide enough for, the most important first: ids are never broken."""
    cells: list[list[RenderableType]] = [
        [Text(cell) if isinstance(cell, str) else cell for cell in row] for row in rows
    ]
    filled = [i for i in range(len(columns)) if not columns[i].rank or any(str(row[i]) for row in cells)]
    shown, cells = [columns[i] for i in filled], [[row[i] for i in filled] for row in cells]
    sizes = _sizes(out, shown, cells, header)
    if _width([size for size, column in zip(sizes, shown, strict=True) if column.rank <= LITTLE]) > out.width:
        shown, cells = _folded(shown, cells)
        sizes = _sizes(out, shown, cells, header)
    kept: list[int] = []
    for i in sorted(range(len(shown)), key=lambda i: shown[i].rank):
        if not shown[i].rank or _width([sizes[j] for j in (*kept, i)]) <= out.width:
            kept = sorted([*kept, i])
    least = sum(sizes[i].minimum + GAP for i in kept) - GAP
    if least > out.width:  # better the terminal breaks the line; else it is left alone, and follows the terminal's
        out.width = least
    made = Table(box=None, pad_edge=False, padding=(0, GAP, 0, 0), show_header=header, header_style="bold")
    for i in kept:
        column = shown[i]
        justify: Literal["left", "right"] = "right" if column.right else "left"
        made.add_column(
            column.header, justify=justify, no_wrap=not (column.wrap or column.cut), min_width=sizes[i].minimum
        )
    for row in cells:
        for i in kept:
            cell = row[i]
            if shown[i].cut and isinstance(cell, Text):
                cell.no_wrap, cell.overflow = True, "ellipsis"
        made.add_row(*(row[i] for i in kept))
    left_out = [" ".join(shown[i].header.split()) for i in range(len(shown)) if i not in kept and shown[i].header]
    if left_out:
        made.caption, made.caption_justify = f"no room for: {', '.join(left_out)}", "left"
    return made


def _folded(columns: Sequence[Column], cells: Sequence[Row]) -> tuple[list[Column], list[list[RenderableType]]]:
    """With each column that may stand below another one as the second line of its cells."""
    headers = [column.header for column in columns]
    under = {i: headers.index(column.below) for i, column in enumerate(columns) if column.below in headers}
    kept = [i for i in range(len(columns)) if i not in under]
    lower = {i: [j for j, onto in under.items() if onto == i] for i in kept}

    def joined(row: Row, i: int) -> RenderableType:
        parts = [row[j] for j in (i, *lower[i])]
        filled = [part for part in parts if str(part) not in ("", NONE)]
        lines = [Text(str(part), "" if part is parts[0] else "dim") for part in filled or parts[:1]]
        return Text("\n").join(lines) if lower[i] else row[i]

    folded = [
        replace(columns[i], header="\n".join([headers[i], *(headers[j] for j in lower[i])])) if lower[i] else columns[i]
        for i in kept
    ]
    return folded, [[joined(row, i) for i in kept] for row in cells]


def _width(sizes: Sequence[Measurement]) -> int:
    """Of a table with these columns, of which each may wrap down to WRAP characters where it can."""
    return sum(min(size.maximum, max(WRAP, size.minimum)) + GAP for size in sizes) - GAP


def _sizes(out: Console, columns: Sequence[Column], cells: Sequence[Row], header: bool) -> list[Measurement]:
    return [_size(out, column, [row[i] for row in cells], header) for i, column in enumerate(columns)]


def _size(out: Console, column: Column, cells: Sequence[RenderableType], header: bool) -> Measurement:
    """The fewest and the most characters that a column takes."""
    title = [Text(column.header)] if header else []
    sizes = [Measurement.get(out, out.options.update(width=WIDE), cell) for cell in [*title, *cells]]
    most = max((size.maximum for size in sizes), default=0)
    if column.cut:
        return Measurement(min(column.cut, most), min(column.cut, most))
    return Measurement(max((size.minimum for size in sizes), default=0) if column.wrap else most, most)
