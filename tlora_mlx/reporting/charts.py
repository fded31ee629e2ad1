"""Charts as inline SVG and heat maps as tables; their colours are the page's (``style.py``)."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from html import escape

WIDTH, HEIGHT = 520, 240
LEFT, RIGHT, TOP, BOTTOM = 58, 14, 12, 34

Points = Sequence[tuple[float, float]]


def ticks(low: float, high: float, number: int = 5) -> list[float]:
    """Round values between ``low`` and ``high``, about so many: steps of 1, 2 or 5 · 10ⁿ."""
    if high <= low:
        return [low]
    rough = (high - low) / number
    power = 10 ** math.floor(math.log10(rough))
    step = next(power * m for m in (1, 2, 5, 10) if power * m >= rough * 0.999)
    first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    return [i * step for i in range(first, last + 1)]


def line_chart(series: Mapping[str, Points], x_label: str, y_label: str) -> str:
    """Lines through (x, y) points, by label; empty ones are left out."""
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

    parts = [f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{escape(y_label)}">']
    for value in ticks(y_low, y_high):
        y = y_place(value)
        parts.append(
            f'<line class="grid" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>'
        )
        parts.append(
            f'<text x="{LEFT - 6}" y="{y + 4:.1f}" text-anchor="end">{short(value)}</text>'
        )
    for value in ticks(x_low, x_high, 6):
        x = x_place(value)
        place = f'x="{x:.1f}" y="{HEIGHT - BOTTOM + 16}"'
        parts.append(f'<text {place} text-anchor="middle">{short(value)}</text>')
    parts.append(
        f'<text class="label" x="{(LEFT + WIDTH - RIGHT) / 2}" y="{HEIGHT - 3}" '
        f'text-anchor="middle">{escape(x_label)}</text>'
    )
    for number, (label, points) in enumerate(series.items()):
        places = [(x_place(x), y_place(y), x, y) for x, y in points]
        line = " ".join(f"{x:.1f},{y:.1f}" for x, y, _, _ in places)
        parts.append(f'<polyline class="line c{number}" points="{line}"/>')
        if len(points) <= 60 or number:
            parts += [
                f'<circle class="dot c{number}" cx="{x:.1f}" cy="{y:.1f}" r="2.6"><title>'
                f"{escape(label)}, {escape(x_label)} {short(at)}: {short(value)}</title></circle>"
                for x, y, at, value in places
            ]
    parts.append("</svg>")
    labels = series if len(series) > 1 else ()  # one alone says what the caption says
    legend = "".join(
        f'<span class="key c{number}">{escape(label)}</span>' for number, label in enumerate(labels)
    )
    return f"<figure><figcaption>{escape(y_label)} {legend}</figcaption>{''.join(parts)}</figure>"


def heat_map(
    title: str,
    rows: Sequence[str],
    columns: Sequence[str],
    cells: Mapping[tuple[str, str], tuple[float, str, str]],
    color: Callable[[float], float] = lambda value: value,
) -> str:
    """A table whose cells are the deeper the larger their value.

    Args:
        cells: (value, text, what a pointer over it says) at (row, column).
        color: monotonic; the colours spread evenly over what it gives.
    """
    known = [color(value) for value, _, _ in cells.values()]
    low, high = (min(known), max(known)) if known else (0.0, 0.0)
    parts = [f'<table class="heat"><caption>{escape(title)}</caption><tr><th></th>']
    parts += [f"<th>{escape(column)}</th>" for column in columns]
    parts.append("</tr>")
    for row in rows:
        parts.append(f"<tr><th>{escape(row)}</th>")
        for column in columns:
            if (row, column) not in cells:
                parts.append("<td></td>")
                continue
            value, text, hint = cells[row, column]
            depth = (color(value) - low) / (high - low) if high > low else 0.5
            deep = ' class="deep"' if depth > 0.66 else ""
            parts.append(
                f'<td{deep} style="--depth:{0.06 + 0.94 * depth:.3f}" title="{escape(hint)}">'
                f"{escape(text)}</td>"
            )
        parts.append("</tr>")
    return "".join([*parts, "</table>"])


def short(value: float) -> str:
    """A number in few characters: 4 significant digits, thousands as 12k, small ones as 2e-05."""
    if value == 0:
        return "0"
    if abs(value) >= 1e6:
        return f"{value / 1e6:.3g}M"
    if abs(value) >= 1e4:
        return f"{value / 1e3:.4g}k"
    return f"{value:.4g}" if abs(value) >= 1e-3 else f"{value:.2g}"
