"""`loraq results --plot`: loss curves, and accuracy against each swept parameter, in the terminal."""

from __future__ import annotations

from collections.abc import Sequence

import plotille
from rich.console import Console
from rich.table import Table
from rich.text import Text

from cli import render
from cli.trials import Row, in_order, labels, shown
from jobqueue.results import Score

WIDEST, NARROWEST = 110, 24  # columns of a plot; a pipe has no width of its own
HEIGHT = 16
MARKS = "123456789"  # one for each curve that is drawn
MARKED = 8  # points of a curve that carry its mark
COLOURS = ("bright_blue", "bright_red", "bright_green", "bright_magenta", "bright_cyan", "bright_yellow")
AXIS = 23  # columns that plotille takes for the y axis and the name of the x axis


def plot(out: Console, rows: Sequence[Row]) -> None:
    """The plots of each batch, one below the other."""
    rows = [row for row in rows if not row.trial.members]  # an ensemble has no curve, and no parameter of its own
    for report in dict.fromkeys(row.report.batch for row in rows):
        own = [row for row in rows if row.report.batch == report]
        _losses(out, own)
        for key in own[0].trial.differs:
            _accuracies(out, own, key)


def _colour(place: int) -> str:
    return COLOURS[place % len(COLOURS)]


def _losses(out: Console, rows: Sequence[Row]) -> None:
    known = [(name, row.trial.losses) for name, row in zip(labels(rows), rows, strict=True) if row.trial.losses]
    drawn = [(place, *curve) for place, curve in enumerate(known[: len(MARKS)])]
    out.print(f"{rows[0].report.batch}: training loss by step", style="bold")
    if not drawn:
        out.print("There is no loss yet.\n")
        return
    coloured = out.color_system is not None
    figure = plotille.Figure()
    figure.width, figure.height = max(NARROWEST, min(out.width, WIDEST) - AXIS), HEIGHT
    figure.color_mode, figure.with_colors, figure.origin = "names", coloured, False
    figure.x_label, figure.y_label = "step", "loss"
    figure.x_ticks_fkt = lambda value, _: f"{value:.0f}"
    figure.y_ticks_fkt = lambda value, _: f"{value:.3g}"
    figure.set_x_limits(min_=0, max_=max(step for _, _, losses in drawn for step, _ in losses))
    values = [loss for _, _, losses in drawn for _, loss in losses]
    margin = 0.05 * (max(values) - min(values)) or 0.5
    figure.set_y_limits(min_=max(0.0, min(values) - margin), max_=max(values) + margin)
    for place, _, losses in drawn:
        colour = _colour(place) if coloured else None
        figure.plot([step for step, _ in losses], [loss for _, loss in losses], lc=colour)
    for place, _, losses in drawn:  # above the lines, and of each curve at steps of its own
        every = max(1, len(losses) // MARKED)
        marked = losses[place * every // len(drawn) :: every]
        colour = _colour(place) if coloured else None
        figure.scatter([step for step, _ in marked], [loss for _, loss in marked], lc=colour, marker=MARKS[place])
    out.print(Text.from_ansi(figure.show()), no_wrap=True, overflow="crop")
    for place, name, losses in drawn:
        mark = Text(MARKS[place], _colour(place))
        out.print(Text.assemble(mark, f" {name}: {losses[0][1]:.3f} to {losses[-1][1]:.3f}"))
    if len(drawn) < len(known):
        out.print(f"and {len(known) - len(drawn)} more, not drawn", style="dim")
    out.print()


def _accuracies(out: Console, rows: Sequence[Row], key: str) -> None:
    """A line for each trial, by the parameter's value: its 95% interval and, in it, its accuracy."""
    scored = [(row, score) for row in rows if (score := _score(row))]
    if not scored:
        return
    report = rows[0].report
    bases = [score for base in report.bases for metric, score in base.scores.items() if metric == report.metric]
    base = bases[0] if len(bases) == 1 else None
    every = [score.interval for _, score in scored] + ([base.interval] if base else [])
    low, high = min(bounds[0] for bounds in every), max(bounds[1] for bounds in every)
    scored.sort(key=lambda pair: in_order(pair[0].settings.get(key)))
    others = _others([row for row, _ in scored], key)
    lines = [
        (shown(row.settings.get(key)), other, score, _colour(rows.index(row)))
        for (row, score), other in zip(scored, others, strict=True)
    ]
    left = max(len(value) for value, *_ in lines) + max([10, *map(len, others)]) + 3 * render.GAP + len("100.0%")
    width = max(NARROWEST, min(out.width, WIDEST) - left)
    grid = Table.grid(padding=(0, render.GAP, 0, 0))
    for _ in range(4):
        grid.add_column(no_wrap=True)
    scale = f"{100 * low:.0f}%"
    grid.add_row("", "", Text(scale + f"{100 * high:.0f}%".rjust(width - len(scale)), "dim"), "")
    for value, other, score, colour in lines:
        bar = Text(_bar(score, low, high, width), colour)
        grid.add_row(value, Text(other, "dim"), bar, render.percent(score.accuracy))
    if base:
        grid.add_row("", "base model", Text(_bar(base, low, high, width), "dim"), render.percent(base.accuracy))
    out.print(f"{report.batch}: {report.metric} accuracy by {key}", style="bold")
    out.print(grid)
    out.print()


def _score(row: Row) -> Score | None:
    return row.trial.scores.get(row.report.metric) if row.report.metric else None


def _others(rows: Sequence[Row], key: str) -> list[str]:
    """What else differs, as labels have it."""
    keys = [name for name in rows[0].trial.differs if name != key]
    return [" ".join(f"{name.rpartition('.')[2]}={shown(row.settings.get(name))}" for name in keys) for row in rows]


def _bar(score: Score, low: float, high: float, width: int) -> str:
    """`  ├───●───┤`, from `low` to `high` over `width` characters."""

    def at(share: float) -> int:
        return round((share - low) / ((high - low) or 1.0) * (width - 1))

    first, last = at(score.interval[0]), at(score.interval[1])
    characters = [" "] * first + ["─"] * (last - first + 1)
    characters[first], characters[last] = "├", "┤"
    characters[at(score.accuracy)] = "●"
    return "".join(characters)
