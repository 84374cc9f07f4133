"""The report of an evaluation: one HTML page that needs no other file, for a screen, a phone and paper."""

from __future__ import annotations

import difflib
import json
from collections.abc import Mapping, Sequence
from html import escape
from importlib import resources
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float

from davae_jax.evaluation.evaluate import Evaluation
from davae_jax.evaluation.measures import ACTIVE
from davae_jax.evaluation.table import sections
from davae_jax.evaluation.text_metrics import edit_distance, pieces, words
from davae_jax.reports import charts, projection

SHOWN = 6  # good reconstructions and bad ones, and texts with their neighbours
NEAREST, STRIPS, SAMPLES = 4, 4, 24
DRAWN = 2000  # dots of a map, and points of a curve, at most
CURVES = {  # values of metrics.jsonl, and of held_out.jsonl where they stand there
    "rec": "reconstruction, nats a token",
    "kl_unmasked": "KL, nats a text",
    "loss": "loss",
    "beta": "β, the KL's weight",
}


def report(found: Evaluation, model: Path) -> str:
    """The page. Training curves are those of `model` where it is a run's folder."""
    m = found.measures
    name = model.resolve().name or str(model)
    parts = [
        f"<h1>{escape(name)}</h1>",
        f'<p class="soft">{m["n"]:,} of {m.get("of", m["n"]):,} texts of {escape(str(m.get("data", "")))}; '
        f"K = {m['iw_samples']}, seed {m['seed']}. Intervals are of 95 %, over the texts.</p>",
        _heads(m),
        _warnings(m["warnings"]),
        "<h2>Figures</h2>",
        _figures(m),
        "<h2>KL of each dimension</h2>",
        _kl(m),
        "<h2>The latent in two dimensions</h2>",
        _maps(found),
        _section("Training", _curves(model)),
        "<h2>Reconstructions</h2>",
        _reconstructions(found),
        _section("Interpolations", _strips(found.interpolations)),
        _section("Nearest neighbours", _neighbours(found)),
        "<h2>Samples from the prior</h2>",
        _samples(found),
    ]
    style = resources.files("davae_jax.reports").joinpath("report.css").read_text(encoding="utf-8")
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{escape(name)}: evaluation</title>\n<style>\n{style}</style>\n</head>\n<body>\n"
        + "\n".join(part for part in parts if part)
        + "\n</body>\n</html>\n"
    )


def _section(title: str, inside: str) -> str:
    return f"<h2>{title}</h2>\n{inside}" if inside else ""


# Figures.


def _heads(m: dict[str, Any]) -> str:
    """The six that say most."""
    shown = [
        ("BLEU", f"{m['bleu']:.1f}"),
        ("token accuracy", f"{m['token_accuracy']:.1%}"),
        ("perplexity per word", f"{m['ppl_per_word']:.2f}"),
        ("KL, nats", f"{m['kl']:.1f}"),
        (f"active units of {m['latent_size']}", str(m["active_units"])),
        (f"mutual information, {m['mutual_information_ceiling']:.2f} at most", f"{m['mutual_information']:.2f}"),
    ]
    return f'<div class="heads">{"".join(f"<div>{name}<b>{value}</b></div>" for name, value in shown)}</div>'


def _warnings(said: Sequence[str]) -> str:
    if not said:
        return ""
    return f'<div class="warnings"><b>Warnings</b><ul>{"".join(f"<li>{escape(line)}</li>" for line in said)}</ul></div>'


def _figures(m: dict[str, Any]) -> str:
    parts = []
    for title, rows in sections(m).items():
        body = "".join(
            f'<tr><td>{escape(row.name)}</td><td class="value">{row.value}</td>'
            f'<td class="interval">{row.interval}</td><td class="note">{escape(row.note)}</td></tr>'
            for row in rows
        )
        parts.append(f"<h3>{escape(title)}</h3><table><tbody>{body}</tbody></table>")
    return "\n".join(parts)


# Charts.


def _kl(m: dict[str, Any]) -> str:
    order = np.argsort(m["kl_per_dim"])[::-1]
    kl, variance = np.array(m["kl_per_dim"])[order].tolist(), np.array(m["variance_per_dim"])[order]
    active = (variance > ACTIVE).tolist()
    chart = charts.bars(kl, active, title="KL of each dimension", unit="nats")
    beside = charts.bars(variance.tolist(), active, title="variance of each dimension's posterior means", unit="")
    said = (
        f"Nats, the largest first, nothing masked. Dark: active, its means vary by more than {ACTIVE} over the texts."
    )
    varies = "Variance of the posterior means over the texts, in the same order. The prior's is 1."
    return f'<div class="figures">{_figure(chart, said)}{_figure(beside, varies)}</div>'


def _maps(found: Evaluation) -> str:
    """Posterior means by PCA and UMAP, a chart for each factor; and in the plane that parts its classes most."""
    means = found.posterior.mean
    drawn = projection.some(np.arange(len(means)), DRAWN)
    of_all = f", {len(drawn):,} of {len(means):,} texts, drawn" if len(drawn) < len(means) else ""
    flat, part = projection.pca(means)
    ways = [(f"PCA, {part:.0%} of the variance{of_all}", flat)]
    if (by_umap := projection.umap(means)) is not None:
        ways.append((f"UMAP{of_all}", by_umap))
    factors = {name: np.array(classes) for name, classes in found.labels.items() if len(set(classes)) > 1}
    if not factors:
        maps = [_figure(charts.scatter(points[drawn], None, title=title), title) for title, points in ways]
        return f'<div class="figures">{"".join(maps)}</div>'
    parts = []
    for name, classes in factors.items():
        colours = charts.colours_of(classes)

        def draw(points, rows, said, name=name, classes=classes, colours=colours):
            return _figure(charts.scatter(points, classes[rows].tolist(), colours, title=f"{name}, {said}"), said)

        maps = [draw(points[drawn], drawn, said) for said, points in ways]
        fit = projection.halves(classes)
        # Of classes of one text each, none is left to show.
        if len(np.unique(classes[~fit])) > 1:
            rows = projection.some(np.flatnonzero(~fit), DRAWN)
            said = f"{len(rows):,} of the texts, in the plane that parts the classes of other ones most"
            maps.append(draw(projection.discriminant(means[fit], classes[fit], means[rows]), rows, said))
        shown = f'<div class="figures">{"".join(maps)}</div>'
        parts.append(f'<div class="map"><h3>{escape(name)}</h3>{_legend(colours)}{shown}</div>')
    return f'<div class="maps">{"".join(parts)}</div>'


def _legend(colours: Mapping[str, str]) -> str:
    items = [(name, colour) for name, colour in colours.items() if colour != charts.OTHER]
    if len(items) < len(colours):
        items.append((f"{len(colours) - len(items)} others", charts.OTHER))
    dots = (f'<li><i style="background:{colour}"></i>{escape(name)}</li>' for name, colour in items)
    return f'<ul class="legend">{"".join(dots)}</ul>'


def _figure(chart: str, caption: str) -> str:
    return f"<figure>{chart}<figcaption>{escape(caption)}</figcaption></figure>"


def _curves(run: Path) -> str:
    """Of a run's folder, what it logged while it trained; "" of any other model."""
    trained, held_out = (read_log(run / file) for file in ("metrics.jsonl", "held_out.jsonl"))
    drawn = []
    for key, title in CURVES.items():
        logs = {"training": trained, "held out": held_out}
        logged = {name: [line for line in log if key in line] for name, log in logs.items()}
        kept = {name: thinned(log) for name, log in logged.items() if log}
        series = {name: ([line["step"] for line in log], [line[key] for line in log]) for name, log in kept.items()}
        if series:
            legend = _legend_of(series) if len(series) > 1 else ""
            said = f"{title}; steps across" + "".join(
                f"; {len(log):,} of {len(logged[name]):,} points of {name}"
                for name, log in kept.items()
                if len(log) < len(logged[name])
            )
            drawn.append(_figure(charts.lines(series, title=title), said) + legend)
    return f'<div class="figures">{"".join(f"<div>{chart}</div>" for chart in drawn)}</div>' if drawn else ""


def thinned(log: Sequence[Any]) -> list[Any]:
    """At most `DRAWN` of them, evenly from the first to the last."""
    return [log[i] for i in np.linspace(0, len(log) - 1, min(len(log), DRAWN)).round().astype(int)]


def _legend_of(series) -> str:
    dots = (f'<li><i style="background:{c}"></i>{name}</li>' for c, name in zip(charts.COLOURS, series, strict=False))
    return f'<ul class="legend">{"".join(dots)}</ul>'


def read_log(file: Path) -> list[dict[str, Any]]:
    """The lines of a run's log; without the last where the run is writing it just now. [] where there is none."""
    try:
        lines = file.read_text(encoding="utf-8").splitlines()
    except OSError:
        return []
    found = []
    for line in lines:
        try:
            found.append(json.loads(line))
        except ValueError:
            break
    return found


# Texts.


def _reconstructions(found: Evaluation) -> str:
    apart = np.array(
        [edit_distance(words(a), words(b)) for a, b in zip(found.texts, found.reconstructions, strict=True)]
    )
    lengths = np.array([max(len(words(text)), 1) for text in found.texts])
    order = np.argsort(apart / lengths, kind="stable")
    bad = [i for i in order[::-1] if apart[i]][:SHOWN]
    good = [i for i in order if i not in bad][:SHOWN]
    exact = int((apart == 0).sum())

    def card(i: int) -> str:
        old, new = found.texts[i], found.reconstructions[i]
        return f'<div class="card"><p>{difference(old, new)}</p></div>'

    parts = [
        f"<p>{exact:,} of {len(apart):,} are the text itself. <del>What is lost</del>, <ins>what is new</ins>.</p>"
    ]
    for title, rows in (("The furthest from their texts", bad), ("The nearest", good)):
        if rows:
            parts.append(f'<h3>{title}</h3><div class="cards">{"".join(map(card, rows))}</div>')
    return "\n".join(parts)


def difference(old: str, new: str) -> str:
    """Both texts as one, as HTML: what of the old is lost is marked, and what of the new is new."""
    a, b = pieces(old), pieces(new)
    said = []
    for kind, i, j, k, m in difflib.SequenceMatcher(None, a, b, autojunk=False).get_opcodes():
        lost, added = escape("".join(a[i:j])), escape("".join(b[k:m]))
        if kind == "equal":
            said.append(lost)
        else:
            said.append((f"<del>{lost}</del>" if lost else "") + (f"<ins>{added}</ins>" if added else ""))
    return "".join(said)


def _strips(found: Sequence[Sequence[str]]) -> str:
    """Some interpolations; steps that give the same text are one line, what is new since the last is marked."""
    cards = []
    for line in found[:STRIPS]:
        steps: list[tuple[int, int, str]] = []
        for i, text in enumerate(line):
            if steps and steps[-1][2] == text:
                steps[-1] = (steps[-1][0], i, text)
            else:
                steps.append((i, i, text))
        last = len(line) - 1
        items = []
        for place, (first, end, text) in enumerate(steps):
            said = escape(text) if not place else _new_in(steps[place - 1][2], text)
            weights = f"{first / last:.0%}" + (f"–{end / last:.0%}" if end > first else "")
            part = round(100 * (first + end) / 2 / last)
            colour = f"color-mix(in srgb, {charts.COLOURS[1]} {part}%, {charts.COLOURS[0]})"
            items.append(f'<li style="border-color:{colour}"><span>{weights}</span><span>{said}</span></li>')
        cards.append(f'<div class="card"><ol class="strip">{"".join(items)}</ol></div>')
    about = (
        "<p>Greedy texts on the straight line between the means of two texts; <ins>new since the line above</ins>.</p>"
    )
    return f'{about}<div class="cards">{"".join(cards)}</div>' if cards else ""


def _new_in(old: str, new: str) -> str:
    a, b = pieces(old), pieces(new)
    said = []
    for kind, _, _, k, m in difflib.SequenceMatcher(None, a, b, autojunk=False).get_opcodes():
        text = escape("".join(b[k:m]))
        said.append(text if kind == "equal" or not text else f"<ins>{text}</ins>")
    return "".join(said)


def _neighbours(found: Evaluation) -> str:
    """A few texts, and those whose means are nearest."""
    means = found.posterior.mean
    n = len(means)
    cards = []
    for i in np.linspace(0, n - 1, min(SHOWN, n)).astype(int):
        near, far = nearest(means, i)
        if len(near):
            items = (f'<li>{escape(found.texts[j])} <span class="far">{d:.2f}</span></li>' for j, d in zip(near, far))
            cards.append(
                f'<div class="card"><p><b>{escape(found.texts[i])}</b></p><ol class="near">{"".join(items)}</ol></div>'
            )
    about = "<p>Of the texts measured, those with the nearest posterior means, and how far these are.</p>"
    return f'{about}<div class="cards">{"".join(cards)}</div>' if cards else ""


def nearest(means: Float[np.ndarray, "n L"], i: int) -> tuple[np.ndarray, np.ndarray]:
    """The rows nearest to row i, and their distances."""
    far = np.linalg.norm(means - means[i], axis=1)
    order = [j for j in np.argsort(far, kind="stable") if j != i][:NEAREST]
    return np.array(order, int), far[order]


def _samples(found: Evaluation) -> str:
    shown = found.samples[:SAMPLES]
    marks = [""] * len(shown) if found.accepted is None else ["✓ " if yes else "✗ " for yes in found.accepted]
    settings = ", ".join(f"{name} {value:g}" for name, value in found.measures["sampling"].items())
    about = f"<p>Settings of the checkpoint: {escape(settings)}." + (
        "" if found.accepted is None else " ✓: the grammar accepts the text."
    )
    items = "".join(f"<li>{mark}{escape(text)}</li>" for mark, text in zip(marks, shown, strict=False))
    return f'{about}</p><ol class="texts">{items}</ol>'
