"""Compares the measures of several settings, each over its seeds: a table, and which differences are significant."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

Results = dict[str, dict[int, dict[str, Any]]]  # setting → seed → what `davae evaluate --json` writes
SIGNIFICANCE = 0.05  # of significance
RATE_AND_DISTORTION = "kl", "rec_nll"


class Metric(NamedTuple):
    key: str  # in an evaluation
    name: str
    template: str
    better: int  # 1: more is better, −1: less, 0: neither


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
    """A measure's values over the runs of one setting."""

    values: list[float]  # of the runs that have the measure
    p: float | None  # corrected p-value of the difference from the first setting; None for that one, or if not testable
    runs: int  # all of the setting's

    @property
    def mean(self) -> float:
        return float(np.mean(self.values)) if self.values else math.nan

    @property
    def deviation(self) -> float:
        """Standard deviation over the runs, with n − 1."""
        return float(np.std(self.values, ddof=1)) if len(self.values) > 1 else math.nan


def compare_settings(results: Results) -> dict[Metric, dict[str, Cell]]:
    """Returns a table of the measures that any run has: measure → setting → cell.

    p-values are of Welch's t-test against the first setting, corrected for the number of settings (Holm 1979).
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
        # A setting is not tested if some of its runs lack the value: the remaining ones are no fair sample.
        incomplete = {name for name, runs in results.items() if len(values[name]) < len(runs)}
        p = holm(
            [None if {first, name} & incomplete else welch(values[first], values[name]) for name in other_settings]
        )
        cells = zip(values, [None, *p], strict=True)
        table[metric] = {name: Cell(values[name], p_value, len(results[name])) for name, p_value in cells}
    return table


def is_finite_number(x: Any) -> bool:
    """Whether x is a finite number."""
    return isinstance(x, (int, float)) and math.isfinite(x)


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

    None with fewer than two values on a side, and where neither side varies: two or three equal values do not show how
    much they would vary.
    """
    from scipy.stats import ttest_ind_from_stats

    if min(len(a), len(b)) < 2 or np.ptp(a) == np.ptp(b) == 0:
        return None
    # From means and deviations, because ttest_ind warns where all values of a side are equal, which is no fault here.
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

    Warnings of evaluations that differ in their numbers only are one line, with the number of runs and the first one's
    numbers.
    """
    seeds = min(map(len, results.values()))
    lines = list(notes)
    if seeds < 3:
        lines.append(
            f"{seeds} seed{'s' * (seeds != 1)} of some settings: differences by chance are hard to tell; give 3 or more"
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
        f"{len(similar)} of {len(evaluations)} runs: {similar[0]}" + " (figures of the first)" * (len(set(similar)) > 1)
        for similar in groups.values()
    ]


def format_table(results: Results, notes: Sequence[str] = ()) -> str:
    """Returns the table in Markdown, a row a setting, with what it means and the warnings below."""
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
    """Returns the line that explains the cells of a table."""
    return (
        f"mean ± deviation over the seeds; * differs from “{next(iter(results))}”: p < {SIGNIFICANCE} by Welch's t-test, "
        "corrected for the number of settings by Holm's method, each measure by itself"
    )


def format_cell(metric: Metric, cell: Cell) -> str:
    """Returns mean ± deviation, with a mark if it differs from the first setting's."""
    if not cell.values:
        return "–"
    spread = "" if math.isnan(cell.deviation) else f" ± {metric.template.format(cell.deviation)}"
    coverage = f" ({len(cell.values)} of {cell.runs})" if len(cell.values) < cell.runs else ""
    return f"{metric.template.format(cell.mean)}{spread}{significance_mark(cell)}{coverage}"


def significance_mark(cell: Cell) -> str:
    return "*" * (cell.p is not None and cell.p < SIGNIFICANCE)
