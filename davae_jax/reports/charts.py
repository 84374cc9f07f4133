"""Charts as inline SVG: bars, points, lines. Strings in, strings out.

A chart is 320 units wide with text of 17, so that on a phone, where it fills the screen, its text is no smaller than
the page's. Colours of axes and bars come from the page's style, by class names.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from html import escape
from types import MappingProxyType

import numpy as np
from jaxtyping import Float

WIDTH, HEIGHT = 320, 240
LEFT, RIGHT, TOP, BOTTOM = 52, 8, 12, 28  # margins, which hold the axes' numbers; the left one grows with them
# Ten colours that differ in hue and in lightness (Tableau 10), and one for all classes after them.
COLOURS = ["#4e79a7", "#f28e2b", "#e15759", "#76b7b2", "#59a14f", "#edc948", "#b07aa1", "#ff9da7", "#9c755f", "#17807e"]
OTHER = "#a0a0a0"


def bars(values: Sequence[float], strong: Sequence[bool], *, title: str, unit: str) -> str:
    """One bar a value; those that are not strong are pale."""
    most = max([*values, 1e-9])
    y = _scale(0, most, HEIGHT - BOTTOM, TOP)
    axis, left = _y_axis(y, ticks(0, most))
    step = (WIDTH - left - RIGHT) / max(len(values), 1)
    gap = step * 0.15 if step > 4 else 0
    drawn = "".join(
        f'<rect class="{"bar" if is_strong else "bar pale"}" x="{left + i * step:.1f}" y="{y(value):.1f}"'
        f' width="{step - gap:.2f}" height="{max(HEIGHT - BOTTOM - y(value), 0.5):.1f}"/>'
        for i, (value, is_strong) in enumerate(zip(values, strong, strict=True))
    )
    ends = f"{_text(left, HEIGHT - 6, '1', 'start')}{_text(WIDTH - RIGHT, HEIGHT - 6, str(len(values)), 'end')}"
    return _svg(f"{title}, {unit}", axis + drawn + ends)


def scatter(
    points: Float[np.ndarray, "n 2"],
    classes: Sequence[str] | None,
    colours: Mapping[str, str] = MappingProxyType({}),
    *,
    title: str,
) -> str:
    """A dot a text, in its class's colour."""
    x, y = (_scale(*_range(points[:, axis]), *ends) for axis, ends in ((0, (8, WIDTH - 8)), (1, (WIDTH - 8, 8))))
    places = [f"M{x(a):.1f} {y(b):.1f}h0" for a, b in points.tolist()]
    named = classes or [""] * len(places)
    by_colour: dict[str, list[str]] = {}
    for place, name in zip(places, named, strict=True):
        by_colour.setdefault(colours.get(name, COLOURS[0]), []).append(place)
    dots = "".join(f'<path class="dots" stroke="{c}" d="{"".join(d)}"/>' for c, d in by_colour.items())
    frame = f'<rect class="frame" x="1" y="1" width="{WIDTH - 2}" height="{WIDTH - 2}"/>'
    return _svg(title, frame + dots, height=WIDTH)


def colours_of(classes: Sequence[str]) -> dict[str, str]:
    """A colour for each class, the most frequent first; past ten they share one."""
    names, counts = np.unique(np.asarray(classes), return_counts=True)
    if len(names) <= len(COLOURS):
        return dict(zip(names.tolist(), COLOURS, strict=False))
    order = np.argsort(-counts, kind="stable")
    return {name: COLOURS[i] if i < len(COLOURS) else OTHER for i, name in enumerate(names[order].tolist())}


def lines(series: Mapping[str, tuple[Sequence[float], Sequence[float]]], *, title: str) -> str:
    """(x, y) of each named series, in the colours' order; a point is drawn as a dot. What is not finite is left out."""
    series = {name: _finite(*xy) for name, xy in series.items()}
    all_x, all_y = (np.concatenate([xy[axis] for xy in series.values()]) for axis in (0, 1))
    if not len(all_x):
        return ""
    low, high = _range(all_y)
    y = _scale(low, high, HEIGHT - BOTTOM, TOP)
    axis, left = _y_axis(y, ticks(low, high))
    x = _scale(*_range(all_x), left, WIDTH - RIGHT)
    drawn = ""
    for colour, (xs, ys) in zip(COLOURS, series.values(), strict=False):
        places = [f"{x(a):.1f} {y(b):.1f}" for a, b in zip(xs.tolist(), ys.tolist(), strict=True)]
        if len(places) > 1:
            drawn += f'<polyline class="line" stroke="{colour}" points="{", ".join(places)}"/>'
        if len(places) < 30:
            drawn += f'<path class="dots big" stroke="{colour}" d="{"".join(f"M{place}h0" for place in places)}"/>'
    ends = _text(left, HEIGHT - 6, _number(all_x.min()), "start")
    ends += _text(WIDTH - RIGHT, HEIGHT - 6, _number(all_x.max()), "end")
    return _svg(title, axis + drawn + ends)


def plane(
    points: Mapping[str, tuple[Sequence[float], Sequence[float]]], colours: Mapping[str, str], *, title: str
) -> str:
    """Dots at (x, y) of each named group, in its colour, with both axes; beside them the group's number, from 1 on.
    x, which is 0 or more, goes by its square root, so that few large ones do not crowd the others. What is not finite
    is left out."""
    return _svg(title, _plane(points, colours), height=WIDTH)


def _plane(points: Mapping[str, tuple[Sequence[float], Sequence[float]]], colours: Mapping[str, str]) -> str:
    points = {name: _finite(*xy) for name, xy in points.items()}
    xs, ys = (np.concatenate([xy[axis] for xy in points.values()]) for axis in (0, 1))
    if not len(xs):
        return ""
    largest, (low, high) = xs.max(), _wider(*_range(ys))
    y = _scale(low, high, WIDTH - BOTTOM, TOP)
    axis, left = _y_axis(y, ticks(low, high))
    of_root = _scale(*_wider(0.0, math.sqrt(max(largest, 0.0))), left, WIDTH - RIGHT)
    x = lambda value: of_root(math.sqrt(max(value, 0.0)))  # noqa: E731
    drawn, means = "", []
    for i, (name, (xs, ys)) in enumerate(points.items()):
        if len(xs):
            places = "".join(f"M{x(a):.1f} {y(b):.1f}h0" for a, b in zip(xs.tolist(), ys.tolist(), strict=True))
            drawn += f'<path class="dots big" stroke="{colours[name]}" d="{places}"/>'
            means.append((x(xs.mean()), y(ys.mean()), str(i + 1)))
    across, end = "", -math.inf
    for v in (m * 10.0**e for e in range(-3, 6) for m in (1, 2, 5)) if largest > 0 else ():
        if v <= largest and x(v) > max(end, x(0)) + 34:
            across, end = across + _text(x(v), WIDTH - 6, _number(v), "middle"), x(v)
    across += _text(x(0), WIDTH - 6, "0", "middle")
    return axis + across + drawn + _labels(means, left)


def _labels(places: Sequence[tuple[float, float, str]], left: float) -> str:
    """Small texts to the right of their places, or to the left or farther off where another one is already."""
    width, height = 14.0, 11.0
    put: list[tuple[float, float]] = []
    drawn = ""
    for x, y, text in sorted(places, key=lambda place: place[1]):
        ways = [(x + side * way, y + 4 + up) for way in (11, 25, 39) for up in (0, -11, 11) for side in (1, -1)]
        free = [
            (a, b)
            for a, b in ways
            if left + 6 < a < WIDTH - 4 and all(abs(a - c) >= width or abs(b - d) >= height for c, d in put)
        ]
        a, b = (free or ways)[0]
        put.append((a, b))
        drawn += _small(a, b, text, "middle")
    return drawn


def board(
    points: Mapping[str, tuple[Sequence[float], Sequence[float]]],
    columns: Mapping[str, Mapping[str, Sequence[float]]],
    colours: Mapping[str, str],
    *,
    title: str,
) -> str:
    """An SVG file of its own: the plane of `points`, then a row for each group with its number, name and dots in each
    column. A column has its own scale, which stands below it; far outliers are arrows at its ends."""
    names, column, step = 205, 150, 9
    row = max(17.0, (WIDTH - TOP - BOTTOM) / len(points))
    bottom = TOP + 10 + row * len(points)
    width, height = WIDTH + 20 + names + (column + step) * len(columns), max(WIDTH, bottom + BOTTOM) + 20
    drawn = f'<rect x="0" y="0" width="{width}" height="{height:.0f}" fill="#fff"/>'
    drawn += f'<g transform="translate(0 20)">{_plane(points, colours)}</g>' + _small(LEFT, 14, title, "start")
    start = WIDTH + 20
    rows = {name: 20 + TOP + row * (i + 0.5) for i, name in enumerate(points)}
    for i, (name, y) in enumerate(rows.items()):
        drawn += f'<path class="dots big" stroke="{colours[name]}" d="M{start + 6} {y - 4:.1f}h0"/>'
        drawn += _small(start + 32, y, str(i + 1), "end") + _small(start + 40, y, name, "start")
    for i, (what, values) in enumerate(columns.items()):
        left = start + names + (column + step) * i
        everything = np.array([v for some in values.values() for v in some if math.isfinite(v)])
        drawn += _small(left + column / 2, 14, what, "middle")
        if not len(everything):
            continue
        low, high = _wider(*_range(_within_fences(everything)))
        x = _scale(low, high, left, left + column)
        for name, y in rows.items():
            for place, sign, anchor, out in (
                (left, "←", "start", any(v < low for v in values[name])),
                (left + column, "→", "end", any(v > high and math.isfinite(v) for v in values[name])),
            ):
                drawn += _small(place, y, sign, anchor) if out else ""
            drawn += f'<line class="grid" x1="{left}" x2="{left + column}" y1="{y - 4:.1f}" y2="{y - 4:.1f}"/>'
            dots = "".join(f"M{x(v):.1f} {y - 4:.1f}h0" for v in values[name] if low <= v <= high)
            drawn += f'<path class="dots big" stroke="{colours[name]}" d="{dots}"/>' if dots else ""
        drawn += _x_axis(x, ticks(low, high, 4), 20 + bottom, _small)
    style = (
        "text { font: 17px system-ui, sans-serif; fill: #5b6670; } .small { font-size: 12px; fill: #1d2329; }"
        " .grid { stroke: #d9dee3; } .dots { fill: none; stroke-linecap: round; stroke-opacity: .75; stroke-width: 6; }"
    )
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height:.0f}" width="{width}"'
        f' height="{height:.0f}" role="img"><title>{escape(title)}</title><style>{style}</style>{drawn}</svg>\n'
    )


def _within_fences(values: np.ndarray) -> np.ndarray:
    """Those no further from the middle half than 1.5 times its width (Tukey 1977)."""
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
    """A row for each named group: its name with its mark, and a dot for every value. What is not finite is left out."""
    groups = {name: [v for v in values if math.isfinite(v)] for name, values in groups.items()}
    everything = np.array([v for values in groups.values() for v in values])
    if not len(everything):
        return ""
    low, high = _wider(*_range(everything))
    x, row = _scale(low, high, 8, WIDTH - 8), 40
    height = row * len(groups) + BOTTOM
    drawn = ""
    for i, (name, values) in enumerate(groups.items()):
        y = row * i + 28
        drawn += _text(8, y - 11, (name if len(name) <= 36 else name[:35] + "…") + marks.get(name, ""), "start")
        drawn += f'<line class="grid" x1="8" x2="{WIDTH - 8}" y1="{y}" y2="{y}"/>'
        drawn += (
            f'<path class="dots big" stroke="{colours[name]}" d="{"".join(f"M{x(v):.1f} {y}h0" for v in values)}"/>'
        )
    return _svg(title, drawn + _x_axis(x, ticks(low, high), height - 6, _text), height=height)


def _wider(low: float, high: float) -> tuple[float, float]:
    """With a little room at both ends."""
    room = 0.05 * (high - low) or 0.5
    return low - room, high + room


def ticks(low: float, high: float, most: int = 5) -> list[float]:
    """Round numbers from low to high, `most` at most: multiples of 1, 2 or 5 times a power of ten."""
    if not high > low:
        return [low]
    size = 10 ** math.floor(math.log10((high - low) / most))
    step = next(s * size for s in (1, 2, 5, 10, 20, 50) if (high - low) / (s * size) < most)
    first = math.ceil(low / step - 1e-9)
    return [i * step for i in range(first, math.floor(high / step + 1e-9) + 1)]


def _x_axis(x, at: Sequence[float], y: float, text) -> str:
    """The ticks' numbers below their places, in the text size that `text` writes."""
    return "".join(text(x(v), y, number, "middle") for v, number in zip(at, numbers_of(at), strict=True))


def _y_axis(y, at: Sequence[float]) -> tuple[str, float]:
    """(lines across at the ticks with their numbers, how far from the left the chart begins beside them)."""
    numbers = numbers_of(at)
    left = max([LEFT, *(_width(number) + 7 for number in numbers)])
    drawn = (
        f'<line class="grid" x1="{left:.0f}" x2="{WIDTH - RIGHT}" y1="{y(v):.1f}" y2="{y(v):.1f}"/>'
        + _text(left - 5, y(v) + 5, number, "end")
        for v, number in zip(at, numbers, strict=True)
    )
    return "".join(drawn), left


def numbers_of(at: Sequence[float]) -> list[str]:
    """The ticks as text, with as many digits as tell them apart."""
    largest = max(map(abs, at))
    step = min((b - a for a, b in itertools.pairwise(at)), default=0.0)
    place = lambda value: math.floor(math.log10(value) + 1e-6)  # of its first digit  # noqa: E731
    digits = 1 + place(largest) - place(step) if largest and step else 1
    return [_number(v, max(4, digits)) for v in at]


def _width(text: str) -> float:
    """At most, of a number in a font of 17: digits of the widest common fonts are 11 wide, points and signs 7."""
    return sum(7.0 if c in ".-+" else 11.0 for c in text)


def _svg(title: str, inside: str, height: int = HEIGHT) -> str:
    said = escape(title)
    return f'<svg viewBox="0 0 {WIDTH} {height}" role="img" aria-label="{said}"><title>{said}</title>{inside}</svg>'


def _text(x: float, y: float, text: str, anchor: str) -> str:
    return f'<text x="{x:.0f}" y="{y:.0f}" text-anchor="{anchor}">{escape(text)}</text>'


def _number(value: float, digits: int = 4) -> str:
    return f"{value:.{digits}g}" if abs(value) < 10_000 else f"{value / 1000:.{digits}g}k"


def _scale(low: float, high: float, start: float, stop: float):
    """The map from low…high to start…stop."""
    span = (high - low) or 1.0
    return lambda value: start + (value - low) / span * (stop - start)


def _range(values: np.ndarray) -> tuple[float, float]:
    return float(values.min()), float(values.max())


def _finite(x: Sequence[float], y: Sequence[float]) -> tuple[np.ndarray, np.ndarray]:
    x, y = np.asarray(x, float), np.asarray(y, float)
    kept = np.isfinite(x) & np.isfinite(y)
    return x[kept], y[kept]
