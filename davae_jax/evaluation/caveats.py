"""Warns about metrics that are unreliable because there are too few texts or samples."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

from davae_jax.evaluation.probes import BINS, FOLDS
from davae_jax.tokenizers.decoder import END

# Nats per text by which the second half of the importance samples may lower the bound without a warning.
MAX_BOUND_GAP = 0.1
# Nats by which the estimated mutual information may differ between all texts and half of them without a warning. The
# error of the estimate is two to three times as large.
MAX_MI_GAP = 0.05

Values = Mapping[str, Any]


def collect_warnings(measures: Values) -> list[str]:
    """Returns the warnings about an evaluation. Each begins with the metrics that it concerns."""
    return [line for key, check in CHECKS if key in measures for line in check(measures)]


def _dropped_texts(m: Values) -> Iterator[str]:
    ended = m["left_out_for_end_token"]
    if blank_or_long := m["left_out"] - ended:
        yield f"n: {blank_or_long} texts were dropped because they are blank or too long for the encoder"
    if ended:
        yield (
            f"n: {ended} texts were dropped because they contain {END}: the likelihood of a text ends there, so the "
            "words after it would cost nothing"
        )


def _unknown_tokens(m: Values) -> Iterator[str]:
    if unknown := m["unknown_tokens"]:
        yield (
            f"iw_nll, ppl: {unknown} tokens replace characters that the tokenizer does not know; the likelihood omits "
            "the cost of spelling these characters"
        )


def _few_texts(m: Values) -> Iterator[str]:
    if m["n"] < 100:
        yield f"all: there are only {m['n']} texts; with fewer than 100, the intervals are too narrow"


def _mutual_information(m: Values) -> Iterator[str]:
    information, ceiling = m["mutual_information"], m["mutual_information_ceiling"]
    half_data_gap = information - m["mutual_information_of_half"]
    if information > 0.5 * ceiling or half_data_gap > MAX_MI_GAP:
        yield (
            f"mutual_information, aggregate_kl: the estimate is {information:.2f} nats; its ceiling is log n = "
            f"{ceiling:.2f}, and half of the texts give {half_data_gap:.2f} less. It underestimates the mutual "
            "information and overestimates the aggregate KL by at least that difference, and by more near the ceiling. "
            "The intervals do not cover this bias; use more texts"
        )


def _active_units(m: Values) -> Iterator[str]:
    n, latent_size = m["n"], m["latent_size"]
    if not m["active_units"] and n > 1:
        yield (
            "active_units: no unit is active, so results computed from the latent are meaningless: probes, MIG, DCI, "
            "projections, neighbours and interpolations"
        )
    if n < 10 * latent_size:
        yield (
            f"active_units: variances are estimated from only {n} texts; use at least ten texts per dimension, "
            f"{10 * latent_size} in total"
        )


def _likelihood(m: Values) -> Iterator[str]:
    k, effective, bound_gap = m["iw_samples"], m["effective_sample_size"], m["iw_nll_of_half"] - m["iw_nll"]
    if k < 10:
        yield f"iw_nll, ppl: with K = {k} samples, the bound is hardly tighter than the ELBO; use --samples 50 or more"
    elif effective < 5 or bound_gap > MAX_BOUND_GAP:
        yield (
            f"iw_nll, ppl: the bound has not converged: the effective sample size is {effective:.1f} of {k}, and the "
            f"second half of the samples lowered −log p(x) by {bound_gap:.2f} nats per text; use more --samples"
        )


def _diversity(m: Values) -> Iterator[str]:
    if m["prior_samples"] < 100:
        yield f"self_bleu, distinct, forward_ppl, reverse_ppl: there are only {m['prior_samples']} samples"


def _factors(m: Values) -> Iterator[str]:
    n, latent_size, factors = m["n"], m["latent_size"], m["factors"]
    max_classes = max(factor["classes"] for factor in factors.values())
    if n < 5 * BINS * max_classes:
        yield f"mig: with {BINS} × {max_classes} histogram cells and {n} texts, the mutual information is overestimated"
    if n < 5 * latent_size:
        yield f"probe_accuracy, dci: the probes have {latent_size} dimensions, but only {n} texts to fit"
    if rare_classes := [
        f"{factor['rare_classes']} of {name!r}" for name, factor in factors.items() if factor["rare_classes"]
    ]:
        yield f"probe_accuracy: some classes have fewer than {FOLDS} texts, too few to learn: {', '.join(rare_classes)}"


# Pairs of a key that a check requires and the check.
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
