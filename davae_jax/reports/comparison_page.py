"""The page of a comparison, and its figure."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from davae_jax.evaluation.comparison import (
    RATE_AND_DISTORTION,
    Results,
    caveats,
    compare_settings,
    format_cell,
    is_finite_number,
    significance_mark,
    table_note,
)
from davae_jax.reports import charts
from davae_jax.reports.html import Figure, render

BETTER = {1: "; more is better", -1: "; less is better", 0: ""}
PAPER_COLUMNS = {"mutual_information": "MI, nats", "active_units": "active units", "iw_nll": "−log p(x)"}


def figure(title: str, results: Results) -> str:
    """Returns one SVG file for a paper: rate against distortion, and three measures by setting."""
    by_key = {metric.key: cells for metric, cells in compare_settings(results).items()}
    columns = {
        name: {setting: cell.values for setting, cell in by_key[key].items()}
        for key, name in PAPER_COLUMNS.items()
        if key in by_key
    }
    title = f"{title}: rate across (by its root), distortion up, nats"
    return charts.board(_points(results), columns, _colours(results), title=title)


def page(title: str, results: Results, options: Mapping[str, Sequence[str]], notes: Sequence[str] = ()) -> str:
    """Returns one HTML page that needs no other file: rate against distortion, each measure by setting, the table.

    Args:
      options: of each setting, the options of its training.
      notes: further warnings.
    """
    table, colours = compare_settings(results), _colours(results)
    strips = [
        Figure(
            charts.strips(
                {name: cell.values for name, cell in cells.items()},
                colours,
                {name: significance_mark(cell) for name, cell in cells.items()},
                title=metric.name,
            ),
            metric.name + BETTER[metric.better],
        )
        for metric, cells in table.items()
    ]
    rows = [
        (name, len(runs), [format_cell(metric, cells[name]) for metric, cells in table.items()])
        for name, runs in results.items()
    ]
    return render(
        "comparison.html",
        title=title,
        kind="comparison",
        caveats=caveats(results, notes),
        # The numbers tell apart settings that have the same colour.
        settings_legend=[(f"{i} {name}", colours[name]) for i, name in enumerate(results, 1)],
        plane=Figure(
            charts.plane(_points(results), colours, title="rate across, distortion up; nats"),
            "KL across (by its square root), reconstruction up, nats per text; one dot per seed",
        ),
        strips=strips,
        about=table_note(results),
        columns=[metric.name for metric in table],
        rows=rows,
        options=options,
    )


def _colours(results: Results) -> dict[str, str]:
    return {name: charts.COLOURS[i % len(charts.COLOURS)] for i, name in enumerate(results)}


def _points(results: Results) -> dict[str, tuple[list[float], list[float]]]:
    """Returns rate and distortion of each setting's runs."""

    def values(key: str, runs: Mapping[int, Mapping[str, Any]]) -> list[float]:
        return [m[key] if is_finite_number(m.get(key)) else math.nan for m in runs.values()]

    return {name: tuple(values(key, runs) for key in RATE_AND_DISTORTION) for name, runs in results.items()}
