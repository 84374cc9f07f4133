"""Renders the lines of `davae traverse` as one self-contained HTML page of strips of texts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from davae_jax.reports.html import render
from davae_jax.reports.report import Step, changes, equal_runs, mixed_colour


class Line(NamedTuple):
    """Holds a line through the latent of a text."""

    title: str  # its direction
    steps: list[Step]


def page(rows: Sequence[Mapping[str, Any]], steps: int, model: str, directions: Path | None) -> str:
    """Returns the page.

    Args:
      rows: those that the command writes, `steps` for each line.
      directions: the file of the directions that are not dimensions.
    """
    lines = [rows[i : i + steps] for i in range(0, len(rows), steps)]
    through: dict[str | None, list[Line]] = {}  # text → its lines
    for line in lines:
        title = f"dimension {line[0]['dim']}" if "dim" in line[0] else f"row {line[0]['direction']} of {directions}"
        through.setdefault(line[0]["text"], []).append(Line(title, traversal_steps(line)))
    title = Path(model).resolve().name or model
    return render("traversal.html", title=title, kind="traversal", lines_of_texts=list(through.items()))


def traversal_steps(line: Sequence[Mapping[str, Any]]) -> list[Step]:
    """Returns the steps of one line. "new" words are not in the text in the middle."""
    offsets, texts = [row["offset"] for row in line], [row["decoded"] for row in line]
    middle, end = texts[len(texts) // 2], len(texts) - 1
    steps = []
    for first, last, text in equal_runs(texts):
        position = _signed(offsets[first]) + (f" … {_signed(offsets[last])}" if last > first else "")
        segments = [segment for segment in changes(middle, text) if segment[0] != "lost"]
        steps.append(Step(position, mixed_colour(round(100 * (first + last) / 2 / end)), segments))
    return steps


def _signed(offset: float) -> str:
    return f"{offset:+g}" if offset else "0"
