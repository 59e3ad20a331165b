"""Two kinds of charts as SVG: curves over steps, and points with intervals. Colours are classes of page.css.

Small enough to draw by hand: what libraries make brings fonts, scripts or fixed colours, and the page has a light and a
dark look, fits a phone, and may be printed.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from markupsafe import Markup

WIDTH, HEIGHT = 420, 260  # in the units of the drawing: as wide as a phone, so that its text can be read there
LEFT, RIGHT, TOP, BOTTOM = 46, 10, 10, 40
COLOURS = 8
MOST_PLACES = 8  # values of a parameter that stand side by side; more of them on a scale
WIDE_RANGE = 20.0  # from there on a scale is logarithmic
DODGE = 0.6  # the share of a value's place over which its trials are spread


@dataclass(frozen=True)
class Curve:
    """A loss curve."""

    label: str
    place: int  # of its trial in the table, from 0: decides the colour
    points: Sequence[tuple[float, float]]


@dataclass(frozen=True)
class Point:
    """A trial's accuracy, in percent, at the value of a parameter."""

    x: Any
    text: str  # of the value
    y: float
    low: float
    high: float
    place: int
    title: str


def colour(place: int) -> str:
    """The class of the trial at that place; the first few have a colour of their own."""
    return f"c{place}" if place < COLOURS else "rest"


def line_chart(title: str, x_label: str, curves: Sequence[Curve]) -> Markup | None:
    """The curves, the first one drawn last, so that it lies on top; None where there are none."""
    points = [point for curve in curves for point in curve.points]
    if not points:
        return None
    x_ticks = ticks(0, max(x for x, _ in points))
    y_ticks = ticks(min(0, *(y for _, y in points)), max(y for _, y in points))
    frame = _Frame((x_ticks[0], x_ticks[-1]), (y_ticks[0], y_ticks[-1]))
    parts = [frame.axes([(x, f"{x:g}") for x in x_ticks], [(y, f"{y:g}") for y in y_ticks], x_label)]
    for curve in reversed(curves):
        path = " ".join(f"{frame.x(x):.1f},{frame.y(y):.1f}" for x, y in curve.points)
        parts.append(
            Markup('<polyline class="line {}" points="{}"><title>{}</title></polyline>').format(
                colour(curve.place), path, curve.label
            )
        )
    ends = "; ".join(f"{curve.label} from {curve.points[0][1]:.3g} to {curve.points[-1][1]:.3g}" for curve in curves)
    return _svg(title, ends, parts)


def point_chart(title: str, x_label: str, points: Sequence[Point], base: float | None) -> Markup | None:
    """The points with their intervals; `base`: a line at the base model's accuracy. None where there are none."""
    if not points:
        return None
    places, x_ticks, x_range = _across(points)
    y_ticks = ticks(
        min([p.low for p in points] + ([base] if base is not None else [])),
        max([p.high for p in points] + ([base] if base is not None else [])),
    )
    frame = _Frame(x_range, (y_ticks[0], y_ticks[-1]))
    parts = [frame.axes(x_ticks, [(y, f"{y:g}%") for y in y_ticks], x_label)]
    for point, at in zip(points, places, strict=True):
        x, y, low, high = frame.x(at), frame.y(point.y), frame.y(point.low), frame.y(point.high)
        whisker = f"M{x:.1f} {low:.1f}V{high:.1f}M{x - 4:.1f} {low:.1f}h8M{x - 4:.1f} {high:.1f}h8"
        parts.append(
            Markup(
                '<g class="point {}"><title>{}</title><path d="{}"/><circle cx="{:.1f}" cy="{:.1f}" r="4"/></g>'
            ).format(colour(point.place), point.title, whisker, x, y)
        )
    if base is not None:
        y = frame.y(base)
        parts.append(
            Markup(
                '<line class="base" x1="{}" x2="{}" y1="{:.1f}" y2="{:.1f}"/>'
                '<text class="note" x="{}" y="{:.1f}">base model {:.1f}%</text>'
            ).format(LEFT, WIDTH - RIGHT, y, y, LEFT + 4, y - 4, base)
        )
    return _svg(title, "; ".join(point.title for point in points), parts)


def _across(points: Sequence[Point]) -> tuple[list[float], list[tuple[float, str]], tuple[float, float]]:
    """Where each point stands, the ticks, and the range: side by side, or on a scale where there are many values."""
    values = {point.text: point.x for point in points}
    numbers = [value for value in values.values() if isinstance(value, (int, float)) and not isinstance(value, bool)]
    numeric = len(numbers) == len(values)
    if numeric and len(values) > MOST_PLACES:
        return _scaled([float(point.x) for point in points])
    order = sorted(values, key=lambda text: (float(values[text]), "") if numeric else (0.0, text))
    at = []
    for point in points:
        same = [other.place for other in points if other.text == point.text]
        shift = (same.index(point.place) + 0.5) / len(same) - 0.5
        at.append(order.index(point.text) + DODGE * shift)
    return at, [(float(place), text) for place, text in enumerate(order)], (-0.5, len(order) - 0.5)


def _scaled(numbers: Sequence[float]) -> tuple[list[float], list[tuple[float, str]], tuple[float, float]]:
    least, most = min(numbers), max(numbers)
    if least > 0 and most / least >= WIDE_RANGE:
        exponents = range(math.floor(math.log10(least)), math.ceil(math.log10(most)) + 1)
        marks = [(float(exponent), f"{10.0**exponent:g}") for exponent in exponents]
        return [math.log10(number) for number in numbers], marks, (marks[0][0], marks[-1][0])
    steps = ticks(least, most)
    return list(numbers), [(step, f"{step:g}") for step in steps], (steps[0], steps[-1])


def ticks(low: float, high: float, about: int = 5) -> list[float]:
    """Round numbers that enclose the range, `about` so many."""
    span = (high - low) or abs(high) or 1.0
    raw = span / about
    size = 10.0 ** math.floor(math.log10(raw))
    step = next(factor * size for factor in (1, 2, 2.5, 5, 10) if factor * size >= raw * 0.999)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [round(number * step, 12) for number in range(first, max(last, first + 1) + 1)]


@dataclass(frozen=True)
class _Frame:
    """Maps values to the drawing."""

    x_range: tuple[float, float]
    y_range: tuple[float, float]

    def x(self, value: float) -> float:
        low, high = self.x_range
        return LEFT + (value - low) / (high - low) * (WIDTH - LEFT - RIGHT)

    def y(self, value: float) -> float:
        low, high = self.y_range
        return HEIGHT - BOTTOM - (value - low) / (high - low) * (HEIGHT - TOP - BOTTOM)

    def axes(self, x_ticks: Sequence[tuple[float, str]], y_ticks: Sequence[tuple[float, str]], x_label: str) -> Markup:
        parts = []
        for value, text in y_ticks:
            y = self.y(value)
            parts.append(
                Markup(
                    '<line class="grid" x1="{}" x2="{}" y1="{:.1f}" y2="{:.1f}"/>'
                    '<text class="tick end" x="{}" y="{:.1f}">{}</text>'
                ).format(LEFT, WIDTH - RIGHT, y, y, LEFT - 6, y + 4, text)
            )
        for value, text in x_ticks:
            parts.append(
                Markup('<text class="tick middle" x="{:.1f}" y="{}">{}</text>').format(
                    self.x(value), HEIGHT - BOTTOM + 16, text
                )
            )
        middle = (LEFT + WIDTH - RIGHT) / 2
        parts.append(Markup('<text class="label middle" x="{}" y="{}">{}</text>').format(middle, HEIGHT - 6, x_label))
        return Markup("").join(parts)


def _svg(title: str, description: str, parts: Sequence[Markup]) -> Markup:
    """A figure; who cannot see it is read its description."""
    return Markup(
        '<figure><figcaption>{}</figcaption><svg viewBox="0 0 {} {}" role="img" aria-label="{}">{}</svg></figure>'
    ).format(title, WIDTH, HEIGHT, f"{title}: {description}", Markup("").join(parts))
