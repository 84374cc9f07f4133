"""Draws charts as inline SVG: bars, points, lines. Every function returns a string.

A chart is 320 units wide with text of size 17. On a phone, where the chart fills the screen, its text is therefore at
least as large as the text of the page. Class names refer to the page's style sheet for colours of axes and bars.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from html import escape
from types import MappingProxyType

import numpy as np
from jaxtyping import Float

WIDTH, HEIGHT = 320, 240
LEFT, RIGHT, TOP, BOTTOM = 52, 8, 12, 28  # margins for tick labels; the left one grows with their width
# Ten colours that differ in hue and lightness (Tableau 10), and one for all further classes.
COLOURS = ["#4e79a7", "#f28e2b", "#e15759", "#76b7b2", "#59a14f", "#edc948", "#b07aa1", "#ff9da7", "#9c755f", "#17807e"]
OTHER = "#a0a0a0"

Points = Mapping[str, tuple[Sequence[float], Sequence[float]]]  # group → (x values, y values)
Scale = Callable[[float], float]  # maps a value to a coordinate


def bars(values: Sequence[float], strong: Sequence[bool], *, title: str, unit: str) -> str:
    """Draws one bar per value; bars that are not strong are pale."""
    max_value = max([*values, 1e-9])
    y = _scale(0, max_value, HEIGHT - BOTTOM, TOP)
    axis, left = _y_axis(y, ticks(0, max_value))
    step = (WIDTH - left - RIGHT) / max(len(values), 1)
    gap = step * 0.15 if step > 4 else 0
    elements = "".join(
        f'<rect class="{"bar" if is_strong else "bar pale"}" x="{left + i * step:.1f}" y="{y(value):.1f}"'
        f' width="{step - gap:.2f}" height="{max(HEIGHT - BOTTOM - y(value), 0.5):.1f}"/>'
        for i, (value, is_strong) in enumerate(zip(values, strong, strict=True))
    )
    ends = f"{_text(left, HEIGHT - 6, '1', 'start')}{_text(WIDTH - RIGHT, HEIGHT - 6, str(len(values)), 'end')}"
    return _svg(f"{title}, {unit}", axis + elements + ends)


def scatter(
    points: Float[np.ndarray, "n 2"],
    classes: Sequence[str] | None,
    colours: Mapping[str, str] = MappingProxyType({}),
    *,
    title: str,
) -> str:
    """Draws one dot per point, in the colour of its class."""
    x, y = (_scale(*_range(points[:, axis]), *ends) for axis, ends in ((0, (8, WIDTH - 8)), (1, (WIDTH - 8, 8))))
    by_colour: dict[str, list[tuple[float, float]]] = {}
    for (a, b), name in zip(points.tolist(), classes or [""] * len(points), strict=True):
        by_colour.setdefault(colours.get(name, COLOURS[0]), []).append((x(a), y(b)))
    dots = "".join(_dots(colour, positions, size="dots") for colour, positions in by_colour.items())
    frame = f'<rect class="frame" x="1" y="1" width="{WIDTH - 2}" height="{WIDTH - 2}"/>'
    return _svg(title, frame + dots, height=WIDTH)


def assign_colours(classes: Sequence[str]) -> dict[str, str]:
    """Returns a colour for each class. If there are more than ten, all but the ten most frequent share one colour."""
    names, counts = np.unique(np.asarray(classes), return_counts=True)
    if len(names) <= len(COLOURS):
        return dict(zip(names.tolist(), COLOURS, strict=False))
    order = np.argsort(-counts, kind="stable")
    return {name: COLOURS[i] if i < len(COLOURS) else OTHER for i, name in enumerate(names[order].tolist())}


def lines(series: Mapping[str, tuple[Sequence[float], Sequence[float]]], *, title: str) -> str:
    """Draws each named series of (x, y) as a line, with colours in the order of `COLOURS`; short series also have dots.

    Points that are not finite are dropped. Returns "" if there are none.
    """
    series = {name: _finite(*xy) for name, xy in series.items()}
    all_x, all_y = (np.concatenate([xy[axis] for xy in series.values()]) for axis in (0, 1))
    if not len(all_x):
        return ""
    low, high = _range(all_y)
    y = _scale(low, high, HEIGHT - BOTTOM, TOP)
    axis, left = _y_axis(y, ticks(low, high))
    x = _scale(*_range(all_x), left, WIDTH - RIGHT)
    elements = ""
    for colour, (xs, ys) in zip(COLOURS, series.values(), strict=False):
        positions = [(x(a), y(b)) for a, b in zip(xs.tolist(), ys.tolist(), strict=True)]
        if len(positions) > 1:
            points = ", ".join(f"{a:.1f} {b:.1f}" for a, b in positions)
            elements += f'<polyline class="line" stroke="{colour}" points="{points}"/>'
        if len(positions) < 30:
            elements += _dots(colour, positions)
    ends = _text(left, HEIGHT - 6, _number(all_x.min()), "start")
    ends += _text(WIDTH - RIGHT, HEIGHT - 6, _number(all_x.max()), "end")
    return _svg(title, axis + elements + ends)


def plane(points: Points, colours: Mapping[str, str], *, title: str) -> str:
    """Draws the (x, y) of each group as dots in its colour, with both axes and the group's number, counted from 1.

    x must not be negative. The x axis has a square-root scale, so that a few large values do not compress the rest.
    Points that are not finite are dropped.
    """
    return _svg(title, _plane(points, colours), height=WIDTH)


def _plane(points: Points, colours: Mapping[str, str]) -> str:
    points = {name: _finite(*xy) for name, xy in points.items()}
    xs, ys = (np.concatenate([xy[axis] for xy in points.values()]) for axis in (0, 1))
    if not len(xs):
        return ""
    largest, (low, high) = xs.max(), _wider(*_range(ys))
    y = _scale(low, high, WIDTH - BOTTOM, TOP)
    axis, left = _y_axis(y, ticks(low, high))
    root_scale = _scale(*_wider(0.0, math.sqrt(max(largest, 0.0))), left, WIDTH - RIGHT)

    def x(value: float) -> float:
        return root_scale(math.sqrt(max(value, 0.0)))

    elements, means = "", []
    for i, (name, (xs, ys)) in enumerate(points.items()):
        if len(xs):
            elements += _dots(colours[name], [(x(a), y(b)) for a, b in zip(xs.tolist(), ys.tolist(), strict=True)])
            means.append((x(xs.mean()), y(ys.mean()), str(i + 1)))
    return axis + _root_axis(x, largest) + elements + _labels(means, left)


def _root_axis(x: Scale, largest: float) -> str:
    """Draws the tick labels of a square-root axis: 0, and those of 1, 2 and 5 times powers of ten that fit."""
    elements, last = "", x(0)
    for value in (m * 10.0**e for e in range(-3, 6) for m in (1, 2, 5)) if largest > 0 else ():
        if value <= largest and x(value) > last + 34:
            elements, last = elements + _text(x(value), WIDTH - 6, _number(value), "middle"), x(value)
    return elements + _text(x(0), WIDTH - 6, "0", "middle")


def _labels(anchors: Sequence[tuple[float, float, str]], left: float) -> str:
    """Draws small labels to the right of their anchors, or to the left or farther away if they would overlap."""
    width, height = 14.0, 11.0
    occupied: list[tuple[float, float]] = []
    elements = ""
    for x, y, text in sorted(anchors, key=lambda anchor: anchor[1]):
        positions = [
            (x + side * distance, y + 4 + up) for distance in (11, 25, 39) for up in (0, -11, 11) for side in (1, -1)
        ]
        free = [
            (a, b)
            for a, b in positions
            if left + 6 < a < WIDTH - 4 and all(abs(a - c) >= width or abs(b - d) >= height for c, d in occupied)
        ]
        a, b = (free or positions)[0]
        occupied.append((a, b))
        elements += _small(a, b, text, "middle")
    return elements


def board(
    points: Points,
    columns: Mapping[str, Mapping[str, Sequence[float]]],
    colours: Mapping[str, str],
    *,
    title: str,
) -> str:
    """Draws a self-contained SVG file: the plane of `points`, and one row per group.

    A row shows the group's number, its name, and its values as dots in each column. Each column has its own scale, with
    tick labels below it; arrows at its ends indicate outliers.
    """
    names, column, step = 205, 150, 9
    row = max(17.0, (WIDTH - TOP - BOTTOM) / len(points))
    bottom = TOP + 10 + row * len(points)
    width, height = WIDTH + 20 + names + (column + step) * len(columns), max(WIDTH, bottom + BOTTOM) + 20
    elements = f'<rect x="0" y="0" width="{width}" height="{height:.0f}" fill="#fff"/>'
    elements += f'<g transform="translate(0 20)">{_plane(points, colours)}</g>' + _small(LEFT, 14, title, "start")
    start = WIDTH + 20
    rows = {name: 20 + TOP + row * (i + 0.5) for i, name in enumerate(points)}
    for i, (name, y) in enumerate(rows.items()):
        elements += _dots(colours[name], [(start + 6, y - 4)])
        elements += _small(start + 32, y, str(i + 1), "end") + _small(start + 40, y, name, "start")
    for i, (name, values) in enumerate(columns.items()):
        left = start + names + (column + step) * i
        elements += _small(left + column / 2, 14, name, "middle")
        elements += _column(values, colours, rows, left=left, right=left + column, bottom=20 + bottom)
    style = (
        "text { font: 17px system-ui, sans-serif; fill: #5b6670; } .small { font-size: 12px; fill: #1d2329; }"
        " .grid { stroke: #d9dee3; } .dots { fill: none; stroke-linecap: round; stroke-opacity: .75; stroke-width: 6; }"
    )
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height:.0f}" width="{width}"'
        f' height="{height:.0f}" role="img"><title>{escape(title)}</title><style>{style}</style>{elements}</svg>\n'
    )


def _column(
    values: Mapping[str, Sequence[float]],
    colours: Mapping[str, str],
    rows: Mapping[str, float],
    *,
    left: float,
    right: float,
    bottom: float,
) -> str:
    """Draws each group's values as dots in its row, on a common scale; outliers are drawn as arrows."""
    finite = np.array([v for group in values.values() for v in group if math.isfinite(v)])
    if not len(finite):
        return ""
    low, high = _wider(*_range(_within_fences(finite)))
    x = _scale(low, high, left, right)
    elements = ""
    for name, y in rows.items():
        if any(v < low for v in values[name]):
            elements += _small(left, y, "←", "start")
        if any(v > high and math.isfinite(v) for v in values[name]):
            elements += _small(right, y, "→", "end")
        elements += f'<line class="grid" x1="{left}" x2="{right}" y1="{y - 4:.1f}" y2="{y - 4:.1f}"/>'
        elements += _dots(colours[name], [(x(v), y - 4) for v in values[name] if low <= v <= high])
    return elements + _x_axis(x, ticks(low, high, 4), bottom, _small)


def _within_fences(values: np.ndarray) -> np.ndarray:
    """Returns the values within 1.5 interquartile ranges of the quartiles (Tukey 1977)."""
    low, high = np.quantile(values, (0.25, 0.75))
    room = 1.5 * (high - low)
    return values[(values >= low - room) & (values <= high + room)]


def _small(x: float, y: float, text: str, anchor: str) -> str:
    return f'<text class="small" x="{x:.0f}" y="{y:.0f}" text-anchor="{anchor}">{escape(text)}</text>'


def strips(
    groups: Mapping[str, Sequence[float]],
    colours: Mapping[str, str],
    marks: Mapping[str, str] = MappingProxyType({}),
    *,
    title: str,
) -> str:
    """Draws one row per group: its name with its mark, and a dot for each finite value."""
    groups = {name: [v for v in values if math.isfinite(v)] for name, values in groups.items()}
    finite = np.array([v for values in groups.values() for v in values])
    if not len(finite):
        return ""
    low, high = _wider(*_range(finite))
    x, row = _scale(low, high, 8, WIDTH - 8), 40
    height = row * len(groups) + BOTTOM
    elements = ""
    for i, (name, values) in enumerate(groups.items()):
        y = row * i + 28
        elements += _text(8, y - 11, (name if len(name) <= 36 else name[:35] + "…") + marks.get(name, ""), "start")
        elements += f'<line class="grid" x1="8" x2="{WIDTH - 8}" y1="{y}" y2="{y}"/>'
        elements += _dots(colours[name], [(x(v), y) for v in values])
    return _svg(title, elements + _x_axis(x, ticks(low, high), height - 6, _text), height=height)


def _dots(colour: str, positions: Sequence[tuple[float, float]], size: str = "dots big") -> str:
    """Draws a dot at each position. All dots are one path of zero-length lines with round caps."""
    path = "".join(f"M{x:.1f} {y:.1f}h0" for x, y in positions)
    return f'<path class="{size}" stroke="{colour}" d="{path}"/>' if positions else ""


def _wider(low: float, high: float) -> tuple[float, float]:
    """Returns the range with a small margin at both ends."""
    room = 0.05 * (high - low) or 0.5
    return low - room, high + room


def ticks(low: float, high: float, limit: int = 5) -> list[float]:
    """Returns up to `limit` round numbers from low to high: multiples of 1, 2 or 5 times a power of ten."""
    if not high > low:
        return [low]
    size = 10 ** math.floor(math.log10((high - low) / limit))
    step = next(s * size for s in (1, 2, 5, 10, 20, 50) if (high - low) / (s * size) < limit)
    first = math.ceil(low / step - 1e-9)
    return [i * step for i in range(first, math.floor(high / step + 1e-9) + 1)]


def _x_axis(x: Scale, tick_values: Sequence[float], y: float, text: Callable[..., str]) -> str:
    """Draws the tick labels at height y with the function `text`."""
    return "".join(
        text(x(v), y, number, "middle") for v, number in zip(tick_values, format_ticks(tick_values), strict=True)
    )


def _y_axis(y: Scale, tick_values: Sequence[float]) -> tuple[str, float]:
    """Draws a line and a label at each tick. Returns them, and the left edge of the plotting area."""
    numbers = format_ticks(tick_values)
    left = max([LEFT, *(_width(number) + 7 for number in numbers)])
    elements = (
        f'<line class="grid" x1="{left:.0f}" x2="{WIDTH - RIGHT}" y1="{y(v):.1f}" y2="{y(v):.1f}"/>'
        + _text(left - 5, y(v) + 5, number, "end")
        for v, number in zip(tick_values, numbers, strict=True)
    )
    return "".join(elements), left


def format_ticks(tick_values: Sequence[float]) -> list[str]:
    """Formats tick values with enough digits to distinguish them."""
    largest = max(map(abs, tick_values))
    step = min((b - a for a, b in itertools.pairwise(tick_values)), default=0.0)

    def first_digit(value: float) -> int:
        return math.floor(math.log10(value) + 1e-6)

    digits = 1 + first_digit(largest) - first_digit(step) if largest and step else 1
    return [_number(v, max(4, digits)) for v in tick_values]


def _width(text: str) -> float:
    """Returns an upper bound on the width of a number at font size 17.

    In the widest common fonts, a digit is 11 units wide, a point or sign 7.
    """
    return sum(7.0 if c in ".-+" else 11.0 for c in text)


def _svg(title: str, inside: str, height: int = HEIGHT) -> str:
    label = escape(title)
    return f'<svg viewBox="0 0 {WIDTH} {height}" role="img" aria-label="{label}"><title>{label}</title>{inside}</svg>'


def _text(x: float, y: float, text: str, anchor: str) -> str:
    return f'<text x="{x:.0f}" y="{y:.0f}" text-anchor="{anchor}">{escape(text)}</text>'


def _number(value: float, digits: int = 4) -> str:
    return f"{value:.{digits}g}" if abs(value) < 10_000 else f"{value / 1000:.{digits}g}k"


def _scale(low: float, high: float, start: float, stop: float) -> Scale:
    """Returns the linear map of low…high to start…stop."""
    span = (high - low) or 1.0
    return lambda value: start + (value - low) / span * (stop - start)


def _range(values: np.ndarray) -> tuple[float, float]:
    return float(values.min()), float(values.max())


def _finite(x: Sequence[float], y: Sequence[float]) -> tuple[np.ndarray, np.ndarray]:
    x, y = np.asarray(x, float), np.asarray(y, float)
    finite = np.isfinite(x) & np.isfinite(y)
    return x[finite], y[finite]
