"""Compares the metrics of several settings over their seeds: means, deviations, and significance tests."""

from __future__ import annotations

import math
import re
import sys
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

Results = dict[str, dict[int, dict[str, Any]]]  # setting → seed → what `davae evaluate --json` writes
SIGNIFICANCE = 0.05


class Metric(NamedTuple):
    """A column of the comparison."""

    key: str  # in an evaluation's JSON
    name: str
    template: str
    better: int  # 1: higher is better, −1: lower is better, 0: neither


METRICS = [
    Metric("kl", "rate: KL, nats", "{:z.2f}", 0),
    Metric("rec_nll", "distortion, nats", "{:.2f}", -1),
    Metric("iw_nll", "−log p(x), nats", "{:.2f}", -1),
    Metric("ppl_per_word", "perplexity per word", "{:.2f}", -1),
    Metric("active_units", "active units", "{:.1f}", 1),
    Metric("mutual_information", "mutual information, nats", "{:z.2f}", 1),
    Metric("bleu", "BLEU", "{:.1f}", 1),
    Metric("exact_match", "exact", "{:.1%}", 1),
    Metric("prior_distinct", "prior: different", "{:.1%}", 1),
    Metric("prior_valid", "prior: valid", "{:.1%}", 1),
    Metric("reverse_ppl", "reverse perplexity", "{:.2f}", -1),
]


class Cell(NamedTuple):
    """Holds the values of one metric over the runs of one setting."""

    values: list[float]  # finite values only
    p: (
        float | None
    )  # corrected p-value of the difference from the first setting; None for the first, or if not testable
    runs: int  # number of runs, including those without a finite value

    @property
    def mean(self) -> float:
        """Returns the mean over the runs; NaN if no run has a value."""
        return float(np.mean(self.values)) if self.values else math.nan

    @property
    def deviation(self) -> float:
        """Returns the sample standard deviation (n − 1) over the runs."""
        return float(np.std(self.values, ddof=1)) if len(self.values) > 1 else math.nan


def compare_settings(results: Results) -> dict[Metric, dict[str, Cell]]:
    """Returns a table of the metrics that any run has: metric → setting → cell.

    The p-values come from Welch's t-test against the first setting, corrected for the number of settings (Holm 1979).
    """
    table = {}
    for metric in METRICS:
        values = {
            name: [float(m[metric.key]) for _, m in sorted(runs.items()) if is_finite_number(m.get(metric.key))]
            for name, runs in results.items()
        }
        if not any(values.values()):
            continue
        first, *other_settings = values
        # A setting is not tested if some of its runs lack the value, because the remaining runs are a biased sample.
        incomplete = {name for name, runs in results.items() if len(values[name]) < len(runs)}
        p = holm(
            [None if {first, name} & incomplete else welch(values[first], values[name]) for name in other_settings]
        )
        cells = zip(values, [None, *p], strict=True)
        table[metric] = {name: Cell(values[name], p_value, len(results[name])) for name, p_value in cells}
    return table


def is_finite_number(x: Any) -> bool:
    """Returns whether x is a number that is finite in Python's floating point. JSON has integers that are not."""
    return isinstance(x, int | float) and not isinstance(x, bool) and abs(x) <= sys.float_info.max


def summary_statistics(results: Results) -> dict[str, dict[str, dict[str, Any]]]:
    """Returns the table of `compare_settings` as plain numbers, for JSON."""
    return {
        metric.key: {
            name: {"mean": cell.mean, "deviation": cell.deviation, "p": cell.p, "values": len(cell.values)}
            for name, cell in cells.items()
        }
        for metric, cells in compare_settings(results).items()
    }


def welch(a: Sequence[float], b: Sequence[float]) -> float | None:
    """Returns the two-sided p-value of Welch's t-test (1947).

    None if either side has fewer than two values, or if neither side varies: a few equal values do not reveal the
    variance.
    """
    from scipy.stats import ttest_ind_from_stats

    if min(len(a), len(b)) < 2 or np.ptp(a) == np.ptp(b) == 0:
        return None
    # Uses means and deviations, because ttest_ind warns if all values of one side are equal, which is valid here.
    sides = [(np.mean(x), np.std(x, ddof=1), len(x)) for x in (a, b)]
    p = float(ttest_ind_from_stats(*sides[0], *sides[1], equal_var=False).pvalue)
    return p if math.isfinite(p) else None


def holm(p: Sequence[float | None]) -> list[float | None]:
    """Corrects p-values so that the chance of any false positive among them stays at the level (Holm 1979)."""
    known = sorted((value, i) for i, value in enumerate(p) if value is not None)
    corrected: list[float | None] = [None] * len(p)
    highest = 0.0
    for rank, (value, i) in enumerate(known):
        highest = max(highest, min(1.0, (len(known) - rank) * value))
        corrected[i] = highest
    return corrected


def caveats(results: Results, notes: Sequence[str] = ()) -> list[str]:
    """Returns warnings: the notes, too few seeds, missing values, and the warnings of the evaluations themselves.

    Warnings that differ only in their numbers are merged into one line, with the number of runs and the numbers of the
    first of them.
    """
    seeds = min(map(len, results.values()))
    lines = list(notes)
    if seeds < 3:
        lines.append(
            f"some settings have only {seeds} seed{'s' * (seeds != 1)}, too few to tell differences from "
            "chance; use 3 or more"
        )
    for metric, cells in compare_settings(results).items():
        lines += [
            f"{metric.name}: {cell.runs - len(cell.values)} of {cell.runs} runs of “{name}” have no finite value"
            for name, cell in cells.items()
            if len(cell.values) < cell.runs
        ]
    evaluations = [m for runs in results.values() for m in runs.values()]
    groups: dict[str, list[str]] = {}
    for warning in (line for m in evaluations for line in m.get("warnings", [])):
        groups.setdefault(re.sub(r"\d[\d.,]*", "0", warning), []).append(warning)
    return lines + [
        f"{len(similar)} of {len(evaluations)} runs: {similar[0]}"
        + " (values of the first run)" * (len(set(similar)) > 1)
        for similar in groups.values()
    ]


def format_table(results: Results, notes: Sequence[str] = ()) -> str:
    """Returns the table in Markdown, with one row per setting, followed by an explanation and the warnings."""
    table = compare_settings(results)
    lines = [
        "| setting | seeds | " + " | ".join(metric.name for metric in table) + " |",
        "|---" * (len(table) + 2) + "|",
    ]
    for name, runs in results.items():
        cells = [format_cell(metric, cells[name]) for metric, cells in table.items()]
        lines.append(" | ".join(["| " + name.replace("|", "\\|"), str(len(runs)), *cells]) + " |")
    return "\n".join([*lines, "", table_note(results), *(f"warning: {line}" for line in caveats(results, notes))])


def table_note(results: Results) -> str:
    """Returns the line below the table that explains its cells."""
    return (
        f"mean ± standard deviation over the seeds; * differs from “{next(iter(results))}” with p < {SIGNIFICANCE} "
        "(Welch's t-test, corrected for the number of settings by Holm's method, separately for each metric)"
    )


def format_cell(metric: Metric, cell: Cell) -> str:
    """Returns the mean ± deviation, with a mark if it differs significantly from the first setting."""
    if not cell.values:
        return "–"
    spread = "" if math.isnan(cell.deviation) else f" ± {metric.template.format(cell.deviation)}"
    coverage = f" ({len(cell.values)} of {cell.runs})" if len(cell.values) < cell.runs else ""
    return f"{metric.template.format(cell.mean)}{spread}{significance_mark(cell)}{coverage}"


def significance_mark(cell: Cell) -> str:
    """Returns "*" if the cell differs significantly from the first setting, else ""."""
    return "*" * (cell.p is not None and cell.p < SIGNIFICANCE)
