"""Computes the metrics of docs/evaluate.md. Each function in `MEASURES` computes one group from a model's outputs.

A function returns the metrics by key, and the 95 % confidence intervals of those that have one.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from davae_jax.evaluation import bootstrap, metrics, ngram, probes, text_metrics
from davae_jax.evaluation.outputs import ModelOutputs

ACTIVE_VARIANCE = 0.01  # a dimension is active if its means have a larger variance (Burda et al. 2016)
GroupResult = tuple[dict[str, Any], dict[str, bootstrap.Interval]]


def latent(outputs: ModelOutputs) -> GroupResult:
    """Computes KL, active units, mutual information, and the distance of the aggregate posterior from the prior."""
    (means, logvars), kl, n, seed = outputs.posterior, outputs.kl, outputs.n, outputs.seed
    log_densities = metrics.log_densities(*outputs.shard((means, logvars)), outputs.key)
    densities = metrics.LogDensities(*map(np.asarray, log_densities))
    information, from_prior = densities.information, densities.from_prior
    log_q_half = metrics.aggregate_density_by_halves(densities, means, logvars, seed, outputs.shard)
    half_data_bias = float((log_q_half - densities.aggregate).mean())
    values = {
        "kl": float(kl.sum(1).mean()),
        "kl_per_dim": kl.mean(0).tolist(),
        "kl_per_dim_intervals": list(map(list, bootstrap.column_intervals(kl, seed=seed))) if n > 1 else None,
        "active_units": metrics.active_units(means, ACTIVE_VARIANCE),
        "variance_per_dim": np.var(means, axis=0).tolist(),
        "mutual_information": float(information.mean()),
        "mutual_information_of_half": float(information.mean()) - half_data_bias,
        "mutual_information_ceiling": metrics.mutual_information_ceiling(n),
        "aggregate_kl": float(from_prior.mean()),
        "aggregate_kl_of_half": float(from_prior.mean()) + half_data_bias,
        "aggregate_mmd": metrics.mmd_to_prior(densities.z),
    }
    return values, {
        "kl": bootstrap.ratio_interval(kl.sum(1), seed=seed),
        "active_units": bootstrap.active_units_interval(means, ACTIVE_VARIANCE, seed=seed),
        "mutual_information": bootstrap.ratio_interval(information, seed=seed),
        "aggregate_kl": bootstrap.ratio_interval(from_prior, seed=seed),
    }


def likelihood(outputs: ModelOutputs) -> GroupResult:
    """Computes bounds on the likelihood, and perplexities with their denominators."""
    per_text, seed = outputs.per_text, outputs.seed
    # The end of each text counts as a word.
    words = np.array([len(text_metrics.words(text)) + 1 for text in outputs.originals])
    elbo = -per_text.rec_nll - per_text.kl.sum(1)
    perplexities = {
        "ppl_per_token": (per_text.iw_nll, per_text.tokens),
        "ppl_per_word": (per_text.iw_nll, words),
        "elbo_ppl_per_word": (-elbo, words),
    }
    values = {
        "iw_samples": outputs.iw_samples,
        "token_accuracy": float(per_text.hits.sum() / per_text.tokens.sum()),
        "rec_nll": float(per_text.rec_nll.mean()),
        "rec_nll_from_mean": float(per_text.mean_nll.mean()),
        "elbo": float(elbo.mean()),
        "iw_nll": float(per_text.iw_nll.mean()),
        "iw_nll_of_half": float(per_text.half_nll.mean()),
        "effective_sample_size": float(np.median(per_text.effective)),
        **{name: _exp(nll.sum() / count.sum()) for name, (nll, count) in perplexities.items()},
        "denominators": {
            "tokens": int(per_text.tokens.sum()),
            "words": int(words.sum()),
            "tokens_are": "decoder tokens, including the end token of each text, excluding <bos>",
            "words_are": "words separated by white space, each Chinese character or full-width sign as a word, "
            "including the end of each text",
        },
    }
    return values, {
        "token_accuracy": bootstrap.ratio_interval(per_text.hits, per_text.tokens, seed=seed),
        "rec_nll": bootstrap.ratio_interval(per_text.rec_nll, seed=seed),
        "elbo": bootstrap.ratio_interval(elbo, seed=seed),
        "rec_nll_from_mean": bootstrap.ratio_interval(per_text.mean_nll, seed=seed),
        "iw_nll": bootstrap.ratio_interval(per_text.iw_nll, seed=seed),
        "iw_nll_of_half": bootstrap.ratio_interval(per_text.half_nll, seed=seed),
        "effective_sample_size": bootstrap.median_interval(per_text.effective, seed=seed),
        **{
            name: tuple(_exp(end) for end in bootstrap.ratio_interval(nll, count, seed=seed))
            for name, (nll, count) in perplexities.items()
        },
    }


def reconstruction(outputs: ModelOutputs) -> GroupResult:
    """Computes BLEU and exact match of the greedy reconstructions from the posterior means."""
    reconstructions, texts, seed = outputs.reconstructions, outputs.texts, outputs.seed
    exact = np.array([a == b for a, b in zip(reconstructions, texts, strict=True)])
    values = {"bleu": bleu(reconstructions, texts), "exact_match": float(exact.mean())}
    return values, {
        "bleu": bleu_interval(reconstructions, texts, seed),
        "exact_match": bootstrap.proportion_interval(exact),
    }


def posterior_samples(outputs: ModelOutputs) -> GroupResult:
    """Computes BLEU of greedy texts from posterior samples and, as a lower limit, of the next text's reconstruction."""
    texts, seed = outputs.texts, outputs.seed
    generated = {
        "bleu_sampled": outputs.reconstructions_of_samples,
        "bleu_other_latent": outputs.reconstructions[1:] + outputs.reconstructions[:1],
    }
    values = {name: bleu(hypotheses, texts) for name, hypotheses in generated.items()}
    return values, {name: bleu_interval(hypotheses, texts, seed) for name, hypotheses in generated.items()}


def factors(outputs: ModelOutputs) -> GroupResult:
    """Computes linear probes, MIG and DCI for each factor with at least two classes."""
    means = outputs.posterior.mean
    labels = {name: classes for name, classes in outputs.labels.items() if len(set(classes)) > 1}
    if not labels:
        return {}, {}
    fitted = {name: probes.linear_probe(means, classes, outputs.seed) for name, classes in labels.items()}
    importance = probes.importances(list(fitted.values()))
    by_factor = {
        name: {
            "classes": len(set(labels[name])),
            "rare_classes": sum(count < probes.FOLDS for count in Counter(labels[name]).values()),
            "probe_accuracy": float(probe.hits.mean()),
            "majority": float(probe.majority),
            "mig": probes.mutual_information_gap(means, labels[name]),
            "completeness": float(complete),
        }
        for (name, probe), complete in zip(fitted.items(), probes.completeness(importance), strict=True)
    }
    values = {
        "factors": by_factor,
        "mig": float(np.mean([factor["mig"] for factor in by_factor.values()])),
        "dci_disentanglement": probes.disentanglement(importance),
        "dci_completeness": float(np.mean([factor["completeness"] for factor in by_factor.values()])),
        "dci_informativeness": float(np.mean([factor["probe_accuracy"] for factor in by_factor.values()])),
    }
    intervals = {f"probe_{name}": bootstrap.proportion_interval(probe.hits) for name, probe in fitted.items()}
    hits = np.mean([probe.hits for probe in fitted.values()], axis=0)
    return values, intervals | {"dci_informativeness": bootstrap.ratio_interval(hits, seed=outputs.seed)}


def prior_samples(outputs: ModelOutputs) -> GroupResult:
    """Computes the fraction of distinct prior samples and, if the language is known, of valid ones."""
    samples, valid = outputs.prior_samples, outputs.valid_prior_samples
    values = {"prior_samples": len(samples), "prior_distinct": len(set(samples)) / len(samples)}
    if valid is None:
        return values, {}
    values["prior_valid"] = float(np.mean(valid))
    return values, {"prior_valid": bootstrap.proportion_interval(np.array(valid))}


def diversity(outputs: ModelOutputs) -> GroupResult:
    """Computes self-BLEU and distinct n-grams of the prior samples and of equally many texts."""
    samples, real = _split_texts(outputs.prior_samples), _split_texts(outputs.texts[: len(outputs.prior_samples)])
    values = {"self_bleu": text_metrics.self_bleu(samples), "self_bleu_texts": text_metrics.self_bleu(real)}
    for n in (1, 2, 3):
        values[f"distinct_{n}"] = text_metrics.distinct(samples, n)
        values[f"distinct_{n}_texts"] = text_metrics.distinct(real, n)
    return values, {}


def trigrams(outputs: ModelOutputs) -> GroupResult:
    """Computes forward and reverse perplexity between the texts and the prior samples under trigram models."""
    return ngram.forward_and_reverse(_split_texts(outputs.texts), _split_texts(outputs.prior_samples)), {}


def interpolation(outputs: ModelOutputs) -> GroupResult:
    """Computes the mean path length and largest step of the interpolations, divided by the distance of the ends."""
    paths = np.array([text_metrics.path_length(_split_texts(line)) for line in outputs.interpolations]).reshape(-1, 2)
    paths = paths[~np.isnan(paths).any(1)]
    length, largest = paths.mean(0).tolist() if len(paths) else (math.nan, math.nan)
    values = {"interpolation_length": length, "interpolation_largest_step": largest, "interpolations": len(paths)}
    bounds = bootstrap.column_intervals(paths, seed=outputs.seed) if len(paths) > 1 else []
    return values, dict(zip(("interpolation_length", "interpolation_largest_step"), bounds))


MEASURES: dict[str, Callable[[ModelOutputs], GroupResult]] = {
    "latent": latent,
    "likelihood": likelihood,
    "reconstruction": reconstruction,
    "posterior samples": posterior_samples,
    "factors": factors,
    "prior samples": prior_samples,
    "diversity": diversity,
    "trigrams": trigrams,
    "interpolation": interpolation,
}


def bleu(hypotheses: Sequence[str], references: Sequence[str]) -> float:
    """Returns corpus BLEU (Papineni et al. 2002) from 0 to 100, by sacrebleu with each Chinese character as a word."""
    import sacrebleu

    return sacrebleu.corpus_bleu(list(hypotheses), [list(references)], tokenize="zh").score


def bleu_interval(hypotheses: Sequence[str], references: Sequence[str], seed: int) -> bootstrap.Interval:
    """Returns the confidence interval of corpus BLEU.

    The n-gram counts of BLEU are sums over texts, so the BLEU of a resample follows from each text's counts.
    """
    from sacrebleu.metrics import BLEU

    scorer = BLEU(tokenize="zh")
    by_text = [scorer.corpus_score([a], [[b]]) for a, b in zip(hypotheses, references, strict=True)]
    counts = np.array([[*score.counts, *score.totals, score.sys_len, score.ref_len] for score in by_text])
    scores = []
    for row in bootstrap.resampled_sums(counts, seed).round().astype(int).tolist():
        hits, totals, (sys_len, ref_len) = row[:4], row[4:8], row[8:]
        scores.append(BLEU.compute_bleu(hits, totals, sys_len, ref_len, smooth_method="exp").score)
    return bootstrap.interval(np.array(scores))


def _split_texts(texts: Sequence[str]) -> list[list[str]]:
    return [text_metrics.words(text) for text in texts]


def _exp(x: float) -> float:
    return math.exp(x) if x < 700 else math.inf
