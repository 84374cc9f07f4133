"""Measures of several settings side by side, each over its seeds: a table, plots, and which differences are more than
chance."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

Results = dict[str, dict[int, dict[str, Any]]]  # setting → seed → what `davae evaluate --json` writes
LEVEL = 0.05  # of significance
PLANE = "kl", "rec_nll"  # rate and distortion


class Measure(NamedTuple):
    key: str  # in an evaluation
    name: str
    form: str
    better: int  # 1: more is better, −1: less, 0: neither


MEASURES = [
    Measure("kl", "rate: KL, nats", "{:z.2f}", 0),
    Measure("rec_nll", "distortion, nats", "{:.2f}", -1),
    Measure("iw_nll", "−log p(x), nats", "{:.2f}", -1),
    Measure("ppl_per_word", "perplexity per word", "{:.2f}", -1),
    Measure("active_units", "active units", "{:.1f}", 1),
    Measure("mutual_information", "mutual information, nats", "{:z.2f}", 1),
    Measure("bleu", "BLEU", "{:.1f}", 1),
    Measure("exact_match", "exact", "{:.1%}", 1),
    Measure("prior_distinct", "prior: different", "{:.1%}", 1),
    Measure("prior_valid", "prior: valid", "{:.1%}", 1),
    Measure("reverse_ppl", "reverse perplexity", "{:.2f}", -1),
]


class Cell(NamedTuple):
    values: list[float]  # of each seed that has the measure
    p: float | None  # that it is as the first setting; None for that one, and where it cannot be told
    runs: int  # all of the setting's; more than values where some have no such measure

    @property
    def mean(self) -> float:
        return float(np.mean(self.values)) if self.values else math.nan

    @property
    def deviation(self) -> float:
        """Of the seeds, by n − 1."""
        return float(np.std(self.values, ddof=1)) if len(self.values) > 1 else math.nan


def compared(found: Results) -> dict[Measure, dict[str, Cell]]:
    """Of each measure that any run has, every setting's values, and the probability that they differ from the first
    setting's by chance alone: Welch's t-test, corrected for the number of settings (Holm 1979)."""
    table = {}
    for measure in MEASURES:
        values = {
            name: [float(m[measure.key]) for _, m in sorted(runs.items()) if _is_number(m.get(measure.key))]
            for name, runs in found.items()
        }
        if not any(values.values()):
            continue
        first, *others = values
        lacking = {name for name, runs in found.items() if len(values[name]) < len(runs)}
        # A setting of which some runs have no such value is not held against others by those that are left.
        p = holm([None if {first, name} & lacking else welch(values[first], values[name]) for name in others])
        cells = zip(values, [None, *p], strict=True)
        table[measure] = {name: Cell(values[name], q, len(found[name])) for name, q in cells}
    return table


def _is_number(x: Any) -> bool:
    return isinstance(x, (int, float)) and math.isfinite(x)


def statistics(found: Results) -> dict[str, dict[str, dict[str, Any]]]:
    """`compared` as numbers to be written: of each measure and setting the mean, the deviation and the corrected p."""
    return {
        measure.key: {
            name: {"mean": cell.mean, "deviation": cell.deviation, "p": cell.p, "values": len(cell.values)}
            for name, cell in cells.items()
        }
        for measure, cells in compared(found).items()
    }


def welch(a: Sequence[float], b: Sequence[float]) -> float | None:
    """The two-sided p of Welch's t-test (1947); None with fewer than two values on a side, and where neither side
    varies: two or three equal values do not tell how much it would."""
    from scipy.stats import ttest_ind_from_stats

    if min(len(a), len(b)) < 2 or np.ptp(a) == np.ptp(b) == 0:
        return None
    # From means and deviations: ttest_ind itself warns of a side whose values are equal, which is no fault here.
    sides = [(np.mean(x), np.std(x, ddof=1), len(x)) for x in (a, b)]
    p = float(ttest_ind_from_stats(*sides[0], *sides[1], equal_var=False).pvalue)
    return p if math.isfinite(p) else None


def holm(p: Sequence[float | None]) -> list[float | None]:
    """p-values of as many tests, so corrected that the chance of any false finding stays at the level (Holm 1979)."""
    known = sorted((value, i) for i, value in enumerate(p) if value is not None)
    corrected: list[float | None] = [None] * len(p)
    highest = 0.0
    for rank, (value, i) in enumerate(known):
        highest = max(highest, min(1.0, (len(known) - rank) * value))
        corrected[i] = highest
    return corrected


def caveats(found: Results, notes: Sequence[str] = ()) -> list[str]:
    """What is too little to mean anything, and what the evaluations themselves warn of: each kind once, with the
    number of runs and the first one's figures.

    notes: what else is to be said.
    """
    n = min(map(len, found.values()))
    said = list(notes)
    if n < 3:
        said.append(
            f"{n} seed{'s' * (n != 1)} of some settings: what differs by chance is hard to tell; give 3 or more"
        )
    for measure, cells in compared(found).items():
        said += [
            f"{measure.name}: {cell.runs - len(cell.values)} of {cell.runs} runs of “{name}” have no finite value"
            for name, cell in cells.items()
            if len(cell.values) < cell.runs
        ]
    runs = sum(map(len, found.values()))
    kinds: dict[str, list[str]] = {}
    for warning in (w for of_setting in found.values() for m in of_setting.values() for w in m.get("warnings", [])):
        kinds.setdefault(re.sub(r"\d[\d.,]*", "0", warning), []).append(warning)
    return said + [
        f"{len(alike)} of {runs} runs: {alike[0]}" + " (figures of the first)" * (len(set(alike)) > 1)
        for alike in kinds.values()
    ]


def format_table(found: Results, notes: Sequence[str] = ()) -> str:
    """As Markdown, a row a setting: mean ± deviation over the seeds; * where it differs from the first setting's."""
    table = compared(found)
    settings = list(found)
    lines = [
        "| setting | seeds | " + " | ".join(measure.name for measure in table) + " |",
        "|---" * (len(table) + 2) + "|",
    ]
    for name in settings:
        cells = [_cell(measure, cells[name]) for measure, cells in table.items()]
        lines.append(" | ".join(["| " + name.replace("|", "\\|"), str(len(found[name])), *cells]) + " |")
    first = settings[0]
    lines += [
        "",
        f"mean ± deviation over the seeds; * differs from “{first}”: p < {LEVEL} by Welch's t-test, corrected",
    ]
    lines[-1] += " for the number of settings by Holm's method, each measure by itself"
    return "\n".join([*lines, *(f"warning: {line}" for line in caveats(found, notes))])


def _cell(measure: Measure, cell: Cell) -> str:
    if not cell.values:
        return "–"
    spread = "" if math.isnan(cell.deviation) else f" ± {measure.form.format(cell.deviation)}"
    some = f" ({len(cell.values)} of {cell.runs})" if len(cell.values) < cell.runs else ""
    return f"{measure.form.format(cell.mean)}{spread}{_star(cell)}{some}"


def _star(cell: Cell) -> str:
    return "*" * (cell.p is not None and cell.p < LEVEL)
