"""Warnings on the measures of an evaluation that too few texts or samples make unreliable."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

from davae_jax.evaluation.probes import BINS, FOLDS
from davae_jax.tokenizers.decoder import END

MAX_BOUND_GAP = 0.1  # nats per text by which doubling the samples may still lower the bound
MAX_MI_GAP = (
    0.05  # nats by which doubling the texts may still raise the information; two or three times as much is missing
)

Values = Mapping[str, Any]


def collect_warnings(measures: Values) -> list[str]:
    """Returns the warnings on these measures, each beginning with the names of those that it is about."""
    return [line for key, check in CHECKS if key in measures for line in check(measures)]


def _dropped_texts(m: Values) -> Iterator[str]:
    ended = m["left_out_for_end_token"]
    if blank_or_long := m["left_out"] - ended:
        yield f"n: {blank_or_long} texts were left out, blank or too long for the encoder"
    if ended:
        yield (
            f"n: {ended} texts were left out that hold {END}: the likelihood of a text ends there, and the words after "
            "it would cost nothing"
        )


def _unknown_tokens(m: Values) -> Iterator[str]:
    if unknown := m["unknown_tokens"]:
        yield (
            f"iw_nll, ppl: {unknown} tokens stand for characters that the tokenizer does not know; the likelihood does "
            "not include which characters these are"
        )


def _few_texts(m: Values) -> Iterator[str]:
    if m["n"] < 100:
        yield f"all: over {m['n']} texts; below 100 the intervals themselves are too narrow"


def _mutual_information(m: Values) -> Iterator[str]:
    information, ceiling = m["mutual_information"], m["mutual_information_ceiling"]
    half_data_gap = information - m["mutual_information_of_half"]
    if information > 0.5 * ceiling or half_data_gap > MAX_MI_GAP:
        yield (
            f"mutual_information, aggregate_kl: {information:.2f} of log n = {ceiling:.2f}, and {half_data_gap:.2f} more than "
            "with half of the texts; the information is too low and the aggregate KL too high by at least as much, by "
            "more the closer it is to log n, and the intervals do not cover that; take more texts"
        )


def _active_units(m: Values) -> Iterator[str]:
    n, latent_size = m["n"], m["latent_size"]
    if not m["active_units"] and n > 1:
        yield (
            "active_units: none is active, so whatever is computed from the latent means nothing: probes, MIG, DCI, "
            "maps, neighbours and interpolations"
        )
    if n < 10 * latent_size:
        yield f"active_units: a variance from {n} texts; take ten texts for each of the {latent_size} dimensions"


def _likelihood(m: Values) -> Iterator[str]:
    k, effective, bound_gap = m["iw_samples"], m["effective_sample_size"], m["iw_nll_of_half"] - m["iw_nll"]
    if k < 10:
        yield f"iw_nll, ppl: with K = {k} samples the bound is hardly better than the ELBO; take --samples 50 or more"
    elif effective < 5 or bound_gap > MAX_BOUND_GAP:
        yield (
            f"iw_nll, ppl: the effective sample size is {effective:.1f} of {k}, and the second half of the samples "
            f"lowered −log p(x) by {bound_gap:.2f} nats per text; it is an upper bound that has not converged: take more "
            "--samples"
        )


def _diversity(m: Values) -> Iterator[str]:
    if m["prior_samples"] < 100:
        yield f"self_bleu, distinct, forward_ppl, reverse_ppl: of {m['prior_samples']} samples only"


def _factors(m: Values) -> Iterator[str]:
    n, latent_size, factors = m["n"], m["latent_size"], m["factors"]
    most_classes = max(factor["classes"] for factor in factors.values())
    if n < 5 * BINS * most_classes:
        yield f"mig: histograms of {BINS} × {most_classes} cells from {n} texts come out too high"
    if n < 5 * latent_size:
        yield f"probe_accuracy, dci: probes of {latent_size} dimensions fitted to {n} texts"
    if rare_classes := [
        f"{factor['rare_classes']} of {name}" for name, factor in factors.items() if factor["rare_classes"]
    ]:
        yield f"probe_accuracy: classes of fewer than {FOLDS} texts, {', '.join(rare_classes)}; too few to learn from"


# The measure that a check needs, and the check.
CHECKS: list[tuple[str, Callable[[Values], Iterator[str]]]] = [
    ("left_out", _dropped_texts),
    ("unknown_tokens", _unknown_tokens),
    ("n", _few_texts),
    ("mutual_information", _mutual_information),
    ("active_units", _active_units),
    ("iw_nll", _likelihood),
    ("self_bleu", _diversity),
    ("factors", _factors),
]
