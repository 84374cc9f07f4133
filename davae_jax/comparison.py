"""Measures of several settings side by side, each over its seeds: a table, plots, and which differences are more than
chance."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from html import escape
from importlib import resources
from typing import Any, NamedTuple

import numpy as np

from davae_jax import charts

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


def _colours(found: Results) -> dict[str, str]:
    """The numbers beside the dots tell apart what has the same colour."""
    return {name: charts.COLOURS[i % len(charts.COLOURS)] for i, name in enumerate(found)}


def _plane(found: Results) -> dict[str, tuple[list[float], list[float]]]:
    """Rate and distortion of each setting's runs."""
    return {
        name: tuple([m[key] if _is_number(m.get(key)) else math.nan for m in runs.values()] for key in PLANE)
        for name, runs in found.items()
    }


def figure(title: str, found: Results) -> str:
    """What matters most as one SVG file, for a paper: rate against distortion, and three measures by setting."""
    by_key = {measure.key: cells for measure, cells in compared(found).items()}
    columns = {
        name: {setting: cell.values for setting, cell in by_key[key].items()}
        for key, name in (("mutual_information", "MI, nats"), ("active_units", "active units"), ("iw_nll", "−log p(x)"))
        if key in by_key
    }
    title = f"{title}: rate across (by its root), distortion up, nats"
    return charts.board(_plane(found), columns, _colours(found), title=title)


def page(title: str, found: Results, settings: Mapping[str, Sequence[str]], notes: Sequence[str] = ()) -> str:
    """One HTML page that needs no other file: rate against distortion, each measure by setting, the table."""
    table = compared(found)
    colours = _colours(found)
    plane = charts.plane(_plane(found), colours, title="rate across, distortion up; nats")
    about_plane = "KL across (by its square root), reconstruction up, nats a text; a dot a seed"
    legend = "".join(
        f'<li><i style="background:{colours[name]}"></i>{i + 1} {escape(name)}</li>' for i, name in enumerate(found)
    )
    dots = [
        _figure(
            charts.strips(
                {name: cell.values for name, cell in cells.items()},
                colours,
                {name: _star(cell) for name, cell in cells.items()},
                title=measure.name,
            ),
            measure.name + {1: "; more is better", -1: "; less is better", 0: ""}[measure.better],
        )
        for measure, cells in table.items()
    ]
    heads = "".join(f"<th>{escape(measure.name)}</th>" for measure in table)
    rows = "".join(
        f"<tr><td>{escape(name)}</td><td>{len(found[name])}</td>"
        + "".join(f'<td class="value">{_cell(measure, cells[name])}</td>' for measure, cells in table.items())
        + "</tr>"
        for name in found
    )
    options = "".join(
        f"<tr><td>{escape(name)}</td><td><code>{escape(' '.join(words))}</code></td></tr>"
        for name, words in settings.items()
    )
    said = "".join(f"<li>{escape(line)}</li>" for line in caveats(found, notes))
    about = format_table(found).partition("\n\n")[2].splitlines()[0]
    parts = [
        f"<h1>{escape(title)}</h1>",
        f'<div class="warnings"><b>Warnings</b><ul>{said}</ul></div>' if said else "",
        "<h2>Rate and distortion</h2>",
        f'<ul class="legend">{legend}</ul>',
        f'<div class="figures">{_figure(plane, about_plane)}</div>',
        "<h2>Each measure</h2>",
        f'<div class="figures">{"".join(dots)}</div>',
        "<h2>Table</h2>",
        f'<p class="soft">{escape(about)}</p>',
        '<div class="wide"><table><thead><tr><th>setting</th><th>seeds</th>'
        f"{heads}</tr></thead><tbody>{rows}</tbody></table></div>",
        "<h2>Options of train.py</h2>",
        f'<div class="wide"><table><tbody>{options}</tbody></table></div>',
    ]
    style = resources.files("davae_jax").joinpath("report.css").read_text(encoding="utf-8")
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{escape(title)}: comparison</title>\n<style>\n{style}</style>\n</head>\n<body>\n"
        + "\n".join(part for part in parts if part)
        + "\n</body>\n</html>\n"
    )


def _figure(chart: str, caption: str) -> str:
    return f"<figure>{chart}<figcaption>{escape(caption)}</figcaption></figure>"
