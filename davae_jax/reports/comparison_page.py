"""The page of a comparison."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from html import escape
from importlib import resources

from davae_jax.evaluation.comparison import PLANE, Results, _cell, _is_number, _star, caveats, compared, format_table
from davae_jax.reports import charts


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
    style = resources.files("davae_jax.reports").joinpath("report.css").read_text(encoding="utf-8")
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{escape(title)}: comparison</title>\n<style>\n{style}</style>\n</head>\n<body>\n"
        + "\n".join(part for part in parts if part)
        + "\n</body>\n</html>\n"
    )


def _figure(chart: str, caption: str) -> str:
    return f"<figure>{chart}<figcaption>{escape(caption)}</figcaption></figure>"
