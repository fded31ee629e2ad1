"""Charts as inline SVG and heat maps as tables; their colours are in ``templates/style.css``."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from markupsafe import Markup

from tlora_mlx.reporting.rendering import render

WIDTH, HEIGHT = 520, 240
LEFT, RIGHT, TOP, BOTTOM = 58, 14, 12, 34

# The first line of a chart has dots only if it has at most this many points.
MOST_DOTS = 60
# Axes extend beyond the largest value, and must stay finite.
LARGEST = 1e300
# On colours deeper than this, text is drawn in the contrasting colour.
DEEP = 0.66

Points = Sequence[tuple[float, float]]


class _Tick(NamedTuple):
    place: float
    text: str


class _Point(NamedTuple):
    x: float
    y: float
    hint: str


class _Line(NamedTuple):
    points: list[_Point]
    dotted: bool


class _Cell(NamedTuple):
    text: str
    hint: str
    depth: float
    deep: bool


def is_finite(value: Any) -> bool:
    """Whether a value from JSON is a number that can be plotted."""
    number = isinstance(value, (int, float)) and not isinstance(value, bool)
    return number and abs(value) <= LARGEST


def ticks(low: float, high: float, number: int = 5) -> list[float]:
    """About ``number`` round values between ``low`` and ``high``, in steps of 1, 2 or 5 · 10ⁿ."""
    if high <= low:
        return [low]
    rough = (high - low) / number
    power = 10 ** math.floor(math.log10(rough))
    step = next(power * m for m in (1, 2, 5, 10) if power * m >= rough * 0.999)
    first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    return [i * step for i in range(first, last + 1)]


def line_chart(series: Mapping[str, Points], x_label: str, y_label: str) -> Markup:
    """Draw a line chart.

    Args:
        series: (x, y) points by label; empty series are left out, but one must have points.
        x_label: the x axis's label.
        y_label: the y axis's label and the chart's caption.

    Returns:
        A ``<figure>``. Dots with hints are on a short first line and on all later lines.
    """
    series = {label: points for label, points in series.items() if points}
    xs = [x for points in series.values() for x, _ in points]
    ys = [y for points in series.values() for _, y in points]
    x_low, x_high = min(xs), max(xs)
    y_low, y_high = min(ys), max(ys)
    margin = 0.06 * (y_high - y_low) or abs(y_high) * 0.1 or 1.0
    y_low, y_high = (max(y_low - margin, 0.0) if y_low >= 0 else y_low - margin), y_high + margin

    def x_place(x: float) -> float:
        return LEFT + (WIDTH - LEFT - RIGHT) * ((x - x_low) / ((x_high - x_low) or 1))

    def y_place(y: float) -> float:
        return TOP + (HEIGHT - TOP - BOTTOM) * (1 - (y - y_low) / (y_high - y_low))

    def line(number: int, label: str, points: Points) -> _Line:
        placed = [
            _Point(x_place(x), y_place(y), f"{label}, {x_label} {short(x)}: {short(y)}")
            for x, y in points
        ]
        return _Line(placed, dotted=number > 0 or len(placed) <= MOST_DOTS)

    return render(
        "line_chart.svg.j2",
        width=WIDTH,
        height=HEIGHT,
        left=LEFT,
        right=WIDTH - RIGHT,
        bottom=HEIGHT - BOTTOM,
        x_label=x_label,
        y_label=y_label,
        x_ticks=[_Tick(x_place(x), short(x)) for x in ticks(x_low, x_high, 6)],
        y_ticks=[_Tick(y_place(y), short(y)) for y in ticks(y_low, y_high)],
        lines=[line(number, *item) for number, item in enumerate(series.items())],
        legend=list(series) if len(series) > 1 else [],  # for a single line, the caption is enough
    )


def heat_map(
    title: str,
    rows: Sequence[str],
    columns: Sequence[str],
    cells: Mapping[tuple[str, str], tuple[float, str, str]],
    color: Callable[[float], float] = lambda value: value,
) -> Markup:
    """Draw a table in which larger values have deeper colours.

    Args:
        title: the caption.
        rows: the rows' headings, from top to bottom.
        columns: the columns' headings, from left to right.
        cells: (value, text, tooltip) by (row, column); other cells stay empty.
        color: a monotonic function; colours are spread evenly over its results.

    Returns:
        A ``<table>``.
    """
    known = [color(value) for value, _, _ in cells.values()]
    low, high = (min(known), max(known)) if known else (0.0, 0.0)

    def cell(place: tuple[str, str]) -> _Cell | None:
        if place not in cells:
            return None
        value, text, hint = cells[place]
        depth = (color(value) - low) / (high - low) if high > low else 0.5
        return _Cell(text, hint, 0.06 + 0.94 * depth, depth > DEEP)

    return render(
        "heat_map.html.j2",
        title=title,
        columns=columns,
        rows=[(row, [cell((row, column)) for column in columns]) for row in rows],
    )


def short(value: float) -> str:
    """A number in few characters: 4 significant digits, thousands as 12k, small ones as 2e-05."""
    if value == 0:
        return "0"
    if abs(value) >= 1e6:
        return f"{value / 1e6:.3g}M"
    if abs(value) >= 1e4:
        return f"{value / 1e3:.4g}k"
    return f"{value:.4g}" if abs(value) >= 1e-3 else f"{value:.2g}"
