"""What the figures of an evaluation cannot be trusted for: too few texts or samples for an estimate."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from davae_jax.evaluation.probes import BINS, FOLDS
from davae_jax.tokenizers.decoder import END

SETTLED = 0.1  # nats a text that twice the samples may lower the bound by
STEADY = 0.05  # nats that twice the texts may raise the information by; what is missing is two or three times as much


def warnings_of(measures: Mapping[str, Any]) -> list[str]:
    """What these figures cannot be trusted for, each line beginning with the measures that it is about."""
    n, k, effective = measures["n"], measures["iw_samples"], measures["effective_sample_size"]
    fell = measures["iw_nll_of_half"] - measures["iw_nll"]
    said = []
    ended = measures["left_out_for_end_token"]
    if left := measures["left_out"] - ended:
        said.append(f"n: {left} texts were left out, blank or too long for the encoder")
    if ended:
        said.append(
            f"n: {ended} texts were left out that hold {END}: a text's likelihood ends there, and the words behind it "
            "would cost nothing"
        )
    if unknown := measures["unknown_tokens"]:
        said.append(
            f"iw_nll, ppl: {unknown} tokens stand for characters that the tokenizer does not know; the likelihood does "
            "not pay for saying which"
        )
    if n < 100:
        said.append(f"all: over {n} texts; below 100 the intervals themselves are too narrow")
    ceiling, information = measures["mutual_information_ceiling"], measures["mutual_information"]
    rose = information - measures["mutual_information_of_half"]
    if information > 0.5 * ceiling or rose > STEADY:
        said.append(
            f"mutual_information, aggregate_kl: {information:.2f} of log n = {ceiling:.2f}, and {rose:.2f} more than "
            "of half of the texts; the information is too low and the aggregate KL too high by at least as much, by "
            "more the nearer to log n, and the intervals do not cover that; take a larger --n"
        )
    if not measures["active_units"] and n > 1:
        said.append(
            "active_units: none is active, so what is read off the latent means nothing: probes, MIG, DCI, maps, "
            "neighbours and interpolations"
        )
    if n < 10 * measures["latent_size"]:
        said.append(
            f"active_units: a variance from {n} texts; take ten for each of the {measures['latent_size']} dimensions"
        )
    if k < 10:
        said.append(f"iw_nll, ppl: K = {k} samples are hardly more than the ELBO; take --samples 50 or more")
    elif effective < 5 or fell > SETTLED:
        said.append(
            f"iw_nll, ppl: of {k} samples only {effective:.1f} count, and the second half of them lowered −log p(x) by "
            f"{fell:.2f} nats a text; it is an upper bound, and not settled: take more --samples"
        )
    if measures["prior_samples"] < 100:
        said.append(f"self_bleu, distinct, forward_ppl, reverse_ppl: of {measures['prior_samples']} samples only")
    if "factors" in measures:
        most = max(factor["classes"] for factor in measures["factors"].values())
        if n < 5 * BINS * most:
            said.append(f"mig: histograms of {BINS} × {most} cells from {n} texts come out too high")
        if n < 5 * measures["latent_size"]:
            said.append(f"probe_accuracy, dci: probes of {measures['latent_size']} dimensions learnt from {n} texts")
        rare = {name: factor["rare_classes"] for name, factor in measures["factors"].items()}
        if counts := [f"{count} of {name}" for name, count in rare.items() if count]:
            said.append(
                f"probe_accuracy: classes of fewer than {FOLDS} texts, {', '.join(counts)}; hardly to be learnt"
            )
    return said
