"""Renders the report of an evaluation as one self-contained HTML page for screens, phones and print."""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float

from davae_jax.checkpoints.run_folder import config_folder
from davae_jax.evaluation.comparison import is_finite_number
from davae_jax.evaluation.evaluate import Evaluation
from davae_jax.evaluation.measures import ACTIVE_VARIANCE
from davae_jax.evaluation.table import sections
from davae_jax.evaluation.text_metrics import edit_distance, words, words_and_spaces
from davae_jax.reports import charts, projection
from davae_jax.reports.html import Figure, render
from davae_jax.utils.json_lines import read_log_lines

MAX_TEXTS = 6  # in each list of reconstructions, and in the list of neighbours
MAX_NEIGHBOURS, MAX_INTERPOLATIONS, MAX_SAMPLES = 4, 4, 24
MAX_POINTS = 2000  # in a projection or a curve
CURVES = {  # key in metrics.jsonl and held_out.jsonl → title
    "rec": "reconstruction, nats per token",
    "kl_unmasked": "KL, nats per text",
    "loss": "loss",
    "beta": "β, the weight of the KL",
}
Segments = list[tuple[str, str]]  # of a text: (kind, text); kind is "same", "lost" or "new"


def report(evaluation: Evaluation, model: Path) -> str:
    """Returns the HTML page. It includes training curves if `model` is a run folder."""
    m = evaluation.measures
    exact, reconstructions = reconstruction_cards(evaluation.texts, evaluation.reconstructions)
    projections, factor_projections = latent_projections(evaluation)
    return render(
        "report.html",
        title=model.resolve().name or str(model),
        kind="evaluation",
        subtitle=f"{m['n']:,} of {m.get('of', m['n']):,} texts of {m.get('data', '')}; "
        f"K = {m['iw_samples']}, seed {m['seed']}. Intervals are 95 % confidence intervals over the texts.",
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
    """Returns names and values of the six headline metrics."""
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
    """Draws the KL and variance of each dimension, sorted by decreasing KL."""
    order = np.argsort(m["kl_per_dim"])[::-1]
    kl, variance = np.array(m["kl_per_dim"])[order].tolist(), np.array(m["variance_per_dim"])[order]
    active = (variance > ACTIVE_VARIANCE).tolist()
    return [
        Figure(
            charts.bars(kl, active, title="KL of each dimension", unit="nats"),
            f"Nats, sorted, without the free-bits mask. Dark: active, variance of means above {ACTIVE_VARIANCE}.",
        ),
        Figure(
            charts.bars(variance.tolist(), active, title="variance of each dimension's posterior means", unit=""),
            "Variance of the posterior means over the texts, in the same order. The prior has variance 1.",
        ),
    ]


class FactorProjections(NamedTuple):
    """Holds projections of the latents, coloured by the classes of one factor."""

    factor: str
    legend: list[tuple[str, str]]
    figures: list[Figure]


def latent_projections(evaluation: Evaluation) -> tuple[list[Figure], list[FactorProjections]]:
    """Draws the posterior means by PCA and, if it is installed, UMAP: once, or coloured by each factor.

    Each factor has one more projection: to the plane that best separates its classes, which is fitted to half of the
    texts and shows the other half.
    """
    means = evaluation.posterior.mean
    shown = projection.subsample(np.arange(len(means)), MAX_POINTS)
    subset_note = f", {len(shown):,} of {len(means):,} texts, sampled" if len(shown) < len(means) else ""
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
    """Returns (title, rows, points) of the projection to the plane that best separates the classes.

    Returns [] if the half of the texts that it would show has only one class.
    """
    fit = projection.first_halves(classes)
    if len(np.unique(classes[~fit])) < 2:
        return []
    rows = projection.subsample(np.flatnonzero(~fit), MAX_POINTS)
    title = f"{len(rows):,} texts, in the plane that best separates the classes of the other half"
    return [(title, rows, projection.discriminant(means[fit], classes[fit], means[rows]))]


def class_legend(colours: Mapping[str, str]) -> list[tuple[str, str]]:
    """Returns names and colours of the classes, with a single entry for all classes that share the last colour."""
    items = [(name, colour) for name, colour in colours.items() if colour != charts.OTHER]
    others = len(colours) - len(items)
    return [*items, (f"{others} others", charts.OTHER)] if others else items


def training_curves(run: Path) -> list[Figure]:
    """Draws the metrics logged during training; returns [] if `run` is neither a run nor its checkpoint."""
    run = config_folder(run)  # of one of its checkpoints
    files = {"training": run / "metrics.jsonl", "held-out": run / "held_out.jsonl"}
    logs = {name: [line.values for line in read_log_lines(file, may_grow=True)] for name, file in files.items()}
    figures = []
    for key, title in CURVES.items():
        logged = {name: [line for line in log if is_finite_number(line.get(key))] for name, log in logs.items()}
        thinned = {name: thin(log) for name, log in logged.items() if log}
        if not thinned:
            continue
        series = {name: ([line["step"] for line in log], [line[key] for line in log]) for name, log in thinned.items()}
        caption = f"{title}; x: steps" + "".join(
            f"; {len(log):,} of {len(logged[name]):,} points of {name}"
            for name, log in thinned.items()
            if len(log) < len(logged[name])
        )
        legend = list(zip(series, charts.COLOURS)) if len(series) > 1 else []
        figures.append(Figure(charts.lines(series, title=title), caption, legend))
    return figures


def thin(log: Sequence[Any]) -> list[Any]:
    """Returns at most `MAX_POINTS` evenly spaced entries, including the first and the last."""
    return [log[i] for i in np.linspace(0, len(log) - 1, min(len(log), MAX_POINTS)).round().astype(int)]


# Texts.


def reconstruction_cards(texts: Sequence[str], reconstructions: Sequence[str]) -> tuple[int, dict[str, list[Segments]]]:
    """Returns the number of exact reconstructions, and the worst and best reconstructions with their changes."""
    pairs = list(zip(texts, reconstructions, strict=True))
    distances = np.array([edit_distance(words(a), words(b)) for a, b in pairs])
    lengths = np.array([max(len(words(text)), 1) for text in texts])
    order = np.argsort(distances / lengths, kind="stable")
    worst = [i for i in order[::-1] if distances[i]][:MAX_TEXTS]
    best = [i for i in order if i not in worst][:MAX_TEXTS]
    shown = {"Worst": worst, "Best": best}
    return int((distances == 0).sum()), {title: [changes(*pairs[i]) for i in rows] for title, rows in shown.items()}


def changes(old: str, new: str) -> Segments:
    """Returns a word-level diff of two texts, as segments that are the same, lost or new."""
    a, b = words_and_spaces(old), words_and_spaces(new)
    segments = []
    for kind, i, j, k, m in difflib.SequenceMatcher(None, a, b, autojunk=False).get_opcodes():
        if kind == "equal":
            segments.append(("same", "".join(a[i:j])))
        else:
            segments += [("lost", "".join(a[i:j])), ("new", "".join(b[k:m]))]
    return [(kind, segment) for kind, segment in segments if segment]


class Step(NamedTuple):
    """Holds consecutive latents on a line that decode to the same text."""

    position: str  # on the line: the weight of the end point, or the offset; a range if there are several latents
    colour: str
    segments: Segments  # of the text; "new" words are not in the text that it is compared with


def interpolation_steps(texts: Sequence[str]) -> list[Step]:
    """Returns the steps of one interpolation, given the decoded texts."""
    runs = equal_runs(texts)
    end = len(texts) - 1
    steps = []
    for index, (first, last, text) in enumerate(runs):
        segments = changes(runs[index - 1][2], text) if index else [("same", text)]
        weights = f"{first / end:.0%}" + (f"–{last / end:.0%}" if last > first else "")
        percent = round(100 * (first + last) / 2 / end)
        steps.append(Step(weights, mixed_colour(percent), [segment for segment in segments if segment[0] != "lost"]))
    return steps


def equal_runs(texts: Sequence[str]) -> list[tuple[int, int, str]]:
    """Returns (first index, last index, text) of each run of equal texts."""
    runs: list[tuple[int, int, str]] = []
    for i, text in enumerate(texts):
        if runs and runs[-1][2] == text:
            runs[-1] = (runs[-1][0], i, text)
        else:
            runs.append((i, i, text))
    return runs


def mixed_colour(percent: float) -> str:
    """Returns the colour at so many percent of the way from a strip's first colour to its last."""
    return f"color-mix(in srgb, {charts.COLOURS[1]} {percent}%, {charts.COLOURS[0]})"


def neighbours(texts: Sequence[str], means: Float[np.ndarray, "n L"]) -> list[tuple[str, list[tuple[str, float]]]]:
    """Returns a few texts, each with its nearest neighbours and their distances; [] for a single text."""
    n = len(means)
    if n < 2:
        return []
    neighbourhoods = []
    for i in np.linspace(0, n - 1, min(MAX_TEXTS, n)).astype(int):
        neighbourhoods.append((texts[i], [(texts[j], distance) for j, distance in zip(*nearest(means, i))]))
    return neighbourhoods


def nearest(means: Float[np.ndarray, "n L"], i: int) -> tuple[np.ndarray, np.ndarray]:
    """Returns the nearest rows to row i, and their distances."""
    distances = np.linalg.norm(means - means[i], axis=1)
    order = [j for j in np.argsort(distances, kind="stable") if j != i][:MAX_NEIGHBOURS]
    return np.array(order, int), distances[order]


def marked_samples(samples: Sequence[str], accepted: Sequence[bool] | None) -> list[tuple[str, str]]:
    """Returns the first samples, each with a mark that shows whether it is valid."""
    shown = samples[:MAX_SAMPLES]
    marks = [""] * len(shown) if accepted is None else ["✓ " if valid else "✗ " for valid in accepted]
    return list(zip(marks, shown, strict=False))
