"""The report of an evaluation: one HTML page that needs no other file, for a screen, a phone and paper."""

from __future__ import annotations

import difflib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float

from davae_jax.evaluation.evaluate import Evaluation
from davae_jax.evaluation.measures import ACTIVE_VARIANCE
from davae_jax.evaluation.table import sections
from davae_jax.evaluation.text_metrics import edit_distance, words, words_and_spaces
from davae_jax.reports import charts, projection
from davae_jax.reports.html import Figure, render

MAX_TEXTS = 6  # best reconstructions, worst ones, and texts with their neighbours
MAX_NEIGHBOURS, MAX_INTERPOLATIONS, MAX_SAMPLES = 4, 4, 24
MAX_POINTS = 2000  # of a map or a curve
CURVES = {  # keys of metrics.jsonl and held_out.jsonl, and their titles
    "rec": "reconstruction, nats per token",
    "kl_unmasked": "KL, nats per text",
    "loss": "loss",
    "beta": "β, the KL's weight",
}
Segments = list[tuple[str, str]]  # of a text: (kind, part), kind being "same", "lost" or "new"


def report(evaluation: Evaluation, model: Path) -> str:
    """Returns the page. It has training curves if `model` is a run folder."""
    m = evaluation.measures
    exact, reconstructions = reconstruction_cards(evaluation.texts, evaluation.reconstructions)
    projections, factor_projections = latent_projections(evaluation)
    return render(
        "report.html",
        title=model.resolve().name or str(model),
        kind="evaluation",
        subtitle=f"{m['n']:,} of {m.get('of', m['n']):,} texts of {m.get('data', '')}; "
        f"K = {m['iw_samples']}, seed {m['seed']}. Intervals are of 95 %, over the texts.",
        measures=m,
        headline=headline(m),
        sections=sections(m),
        kl_charts=kl_charts(m),
        projections=projections,
        factor_projections=factor_projections,
        curves=training_curves(model),
        exact=f"{exact:,} of {len(evaluation.texts):,}",
        reconstructions=reconstructions,
        interpolations=[interpolation_steps(line) for line in evaluation.interpolations[:MAX_INTERPOLATIONS]],
        neighbours=neighbours(evaluation.texts, evaluation.posterior.mean),
        sampling=", ".join(f"{name} {value:g}" for name, value in m["sampling"].items()),
        grammar_is_known=evaluation.accepted is not None,
        samples=marked_samples(evaluation.samples, evaluation.accepted),
    )


def headline(m: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Returns names and values of the six measures to read first."""
    return [
        ("BLEU", f"{m['bleu']:.1f}"),
        ("token accuracy", f"{m['token_accuracy']:.1%}"),
        ("perplexity per word", f"{m['ppl_per_word']:.2f}"),
        ("KL, nats", f"{m['kl']:.1f}"),
        (f"active units of {m['latent_size']}", str(m["active_units"])),
        (f"mutual information, {m['mutual_information_ceiling']:.2f} at most", f"{m['mutual_information']:.2f}"),
    ]


# Charts.


def kl_charts(m: Mapping[str, Any]) -> list[Figure]:
    """Draws KL and variance of each dimension, the dimension of the largest KL first."""
    order = np.argsort(m["kl_per_dim"])[::-1]
    kl, variance = np.array(m["kl_per_dim"])[order].tolist(), np.array(m["variance_per_dim"])[order]
    active = (variance > ACTIVE_VARIANCE).tolist()
    return [
        Figure(
            charts.bars(kl, active, title="KL of each dimension", unit="nats"),
            f"Nats, the largest first, nothing masked. Dark: active, with means that vary by more than {ACTIVE_VARIANCE}.",
        ),
        Figure(
            charts.bars(variance.tolist(), active, title="variance of each dimension's posterior means", unit=""),
            "Variance of the posterior means over the texts, in the same order. The prior's is 1.",
        ),
    ]


class FactorProjections(NamedTuple):
    """Maps of the latent in which a factor's classes have colours."""

    factor: str
    legend: list[tuple[str, str]]
    figures: list[Figure]


def latent_projections(evaluation: Evaluation) -> tuple[list[Figure], list[FactorProjections]]:
    """Draws the posterior means by PCA and, where it is installed, UMAP: once, or in the colours of each factor.

    For a factor there is one more map: the plane that separates its classes best, fitted to half of the texts and
    showing the other half.
    """
    means = evaluation.posterior.mean
    shown = projection.subsample(np.arange(len(means)), MAX_POINTS)
    subset_note = f", {len(shown):,} of {len(means):,} texts, drawn" if len(shown) < len(means) else ""
    flat, variance = projection.pca(means)
    projections = [(f"PCA, {variance:.0%} of the variance{subset_note}", shown, flat[shown])]
    if (flat := projection.umap(means)) is not None:
        projections.append((f"UMAP{subset_note}", shown, flat[shown]))
    factors = {name: np.array(classes) for name, classes in evaluation.labels.items() if len(set(classes)) > 1}
    if not factors:
        return [Figure(charts.scatter(points, None, title=title), title) for title, _, points in projections], []
    by_factor = []
    for name, classes in factors.items():
        colours = charts.assign_colours(classes)
        figures = [
            Figure(charts.scatter(points, classes[rows].tolist(), colours, title=f"{name}, {title}"), title)
            for title, rows, points in [*projections, *separating_plane(means, classes)]
        ]
        by_factor.append(FactorProjections(name, class_legend(colours), figures))
    return [], by_factor


def separating_plane(means: Float[np.ndarray, "n L"], classes: np.ndarray) -> list[tuple[str, np.ndarray, np.ndarray]]:
    """Returns (title, texts, points) of the plane that separates the classes best.

    Nothing if the half of the texts that it would show has one class only.
    """
    fit = projection.first_halves(classes)
    if len(np.unique(classes[~fit])) < 2:
        return []
    rows = projection.subsample(np.flatnonzero(~fit), MAX_POINTS)
    title = f"{len(rows):,} of the texts, in the plane that separates the classes of other texts best"
    return [(title, rows, projection.discriminant(means[fit], classes[fit], means[rows]))]


def class_legend(colours: Mapping[str, str]) -> list[tuple[str, str]]:
    """Returns names and colours of the classes, with one entry for all that share the last colour."""
    items = [(name, colour) for name, colour in colours.items() if colour != charts.OTHER]
    others = len(colours) - len(items)
    return [*items, (f"{others} others", charts.OTHER)] if others else items


def training_curves(run: Path) -> list[Figure]:
    """Draws what a run logged while it trained; nothing if `run` is no run folder."""
    logs = {"training": read_log(run / "metrics.jsonl"), "held out": read_log(run / "held_out.jsonl")}
    figures = []
    for key, title in CURVES.items():
        logged = {name: [line for line in log if key in line] for name, log in logs.items()}
        thinned = {name: thin(log) for name, log in logged.items() if log}
        if not thinned:
            continue
        series = {name: ([line["step"] for line in log], [line[key] for line in log]) for name, log in thinned.items()}
        caption = f"{title}; steps across" + "".join(
            f"; {len(log):,} of {len(logged[name]):,} points of {name}"
            for name, log in thinned.items()
            if len(log) < len(logged[name])
        )
        legend = list(zip(series, charts.COLOURS)) if len(series) > 1 else []
        figures.append(Figure(charts.lines(series, title=title), caption, legend))
    return figures


def thin(log: Sequence[Any]) -> list[Any]:
    """Returns at most `MAX_POINTS` entries, evenly from the first to the last."""
    return [log[i] for i in np.linspace(0, len(log) - 1, min(len(log), MAX_POINTS)).round().astype(int)]


def read_log(file: Path) -> list[dict[str, Any]]:
    """Reads the lines of a run's log, up to one that a running program has not finished. [] without such a file."""
    try:
        lines = file.read_text(encoding="utf-8").splitlines()
    except OSError:
        return []
    rows = []
    for line in lines:
        try:
            rows.append(json.loads(line))
        except ValueError:
            break
    return rows


# Texts.


def reconstruction_cards(texts: Sequence[str], reconstructions: Sequence[str]) -> tuple[int, dict[str, list[Segments]]]:
    """Returns how many reconstructions equal their text, and the worst and the best ones, with their changes."""
    pairs = list(zip(texts, reconstructions, strict=True))
    distances = np.array([edit_distance(words(a), words(b)) for a, b in pairs])
    lengths = np.array([max(len(words(text)), 1) for text in texts])
    order = np.argsort(distances / lengths, kind="stable")
    worst = [i for i in order[::-1] if distances[i]][:MAX_TEXTS]
    best = [i for i in order if i not in worst][:MAX_TEXTS]
    shown = {"The furthest from their texts": worst, "The nearest": best}
    return int((distances == 0).sum()), {title: [changes(*pairs[i]) for i in rows] for title, rows in shown.items()}


def changes(old: str, new: str) -> Segments:
    """Returns the two texts merged into one, word by word: what they share, what is lost, and what is new."""
    a, b = words_and_spaces(old), words_and_spaces(new)
    segments = []
    for kind, i, j, k, m in difflib.SequenceMatcher(None, a, b, autojunk=False).get_opcodes():
        if kind == "equal":
            segments.append(("same", "".join(a[i:j])))
        else:
            segments += [("lost", "".join(a[i:j])), ("new", "".join(b[k:m]))]
    return [(kind, segment) for kind, segment in segments if segment]


class Step(NamedTuple):
    """Neighbouring latents of an interpolation that give the same text."""

    weights: str  # of the end, in percent: of the first latent, and of the last where there are several
    colour: str
    segments: Segments  # of the text; "new" is what the step before does not have


def interpolation_steps(texts: Sequence[str]) -> list[Step]:
    """Returns the steps of one interpolation, from the texts of its latents."""
    runs: list[tuple[int, int, str]] = []  # first and last latent, and their text
    for i, text in enumerate(texts):
        if runs and runs[-1][2] == text:
            runs[-1] = (runs[-1][0], i, text)
        else:
            runs.append((i, i, text))
    end = len(texts) - 1
    steps = []
    for index, (first, last, text) in enumerate(runs):
        segments = changes(runs[index - 1][2], text) if index else [("same", text)]
        weights = f"{first / end:.0%}" + (f"–{last / end:.0%}" if last > first else "")
        percent = round(100 * (first + last) / 2 / end)
        colour = f"color-mix(in srgb, {charts.COLOURS[1]} {percent}%, {charts.COLOURS[0]})"
        steps.append(Step(weights, colour, [segment for segment in segments if segment[0] != "lost"]))
    return steps


def neighbours(texts: Sequence[str], means: Float[np.ndarray, "n L"]) -> list[tuple[str, list[tuple[str, float]]]]:
    """Returns a few texts, each with the texts whose means are nearest and their distances; [] for a single text."""
    n = len(means)
    if n < 2:
        return []
    neighbourhoods = []
    for i in np.linspace(0, n - 1, min(MAX_TEXTS, n)).astype(int):
        neighbourhoods.append((texts[i], [(texts[j], distance) for j, distance in zip(*nearest(means, i))]))
    return neighbourhoods


def nearest(means: Float[np.ndarray, "n L"], i: int) -> tuple[np.ndarray, np.ndarray]:
    """Returns the rows nearest to row i, and their distances."""
    distances = np.linalg.norm(means - means[i], axis=1)
    order = [j for j in np.argsort(distances, kind="stable") if j != i][:MAX_NEIGHBOURS]
    return np.array(order, int), distances[order]


def marked_samples(samples: Sequence[str], accepted: Sequence[bool] | None) -> list[tuple[str, str]]:
    """Returns the first samples, each with the mark that says whether the grammar accepts it."""
    shown = samples[:MAX_SAMPLES]
    marks = [""] * len(shown) if accepted is None else ["✓ " if valid else "✗ " for valid in accepted]
    return list(zip(marks, shown, strict=False))
