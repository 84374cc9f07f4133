"""Renders a comparison of settings as an HTML page and as an SVG figure."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from davae_jax.checkpoints.study_folder import RATE_AND_DISTORTION
from davae_jax.evaluation.comparison import (
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

BETTER = {1: "; higher is better", -1: "; lower is better", 0: ""}
PAPER_COLUMNS = {"mutual_information": "MI, nats", "active_units": "active units", "iw_nll": "−log p(x)"}


def figure(title: str, results: Results) -> str:
    """Returns an SVG file for a paper: rate against distortion, and three metrics by setting."""
    by_key = {metric.key: cells for metric, cells in compare_settings(results).items()}
    columns = {
        name: {setting: cell.values for setting, cell in by_key[key].items()}
        for key, name in PAPER_COLUMNS.items()
        if key in by_key
    }
    title = f"{title}: x: rate (square-root scale), y: distortion, nats"
    return charts.board(_points(results), columns, _colours(results), title=title)


def page(title: str, results: Results, options: Mapping[str, Sequence[str]], notes: Sequence[str] = ()) -> str:
    """Returns a self-contained HTML page: rate against distortion, each metric by setting, and the table.

    Args:
      options: the training options of each setting.
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
        # Colours repeat after ten settings, so settings are also numbered.
        settings_legend=[(f"{i} {name}", colours[name]) for i, name in enumerate(results, 1)],
        plane=Figure(
            charts.plane(_points(results), colours, title="x: rate, y: distortion; nats"),
            "x: KL (square-root scale), y: reconstruction loss, nats per text; one dot per seed",
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
    """Returns the rates and distortions of each setting's runs."""

    def values(key: str, runs: Mapping[int, Mapping[str, Any]]) -> list[float]:
        return [m[key] if is_finite_number(m.get(key)) else math.nan for m in runs.values()]

    return {name: tuple(values(key, runs) for key in RATE_AND_DISTORTION) for name, runs in results.items()}
