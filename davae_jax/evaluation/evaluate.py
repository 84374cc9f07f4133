"""What a model makes of texts it has not seen: every measure of docs/evaluate.md, and the texts behind them."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Container, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import numpy as np
from jaxtyping import Float
from tqdm import tqdm

from davae_jax.data.tokenize import tokenize
from davae_jax.evaluation import bootstrap, metrics, ngram, probes, text_metrics
from davae_jax.evaluation.caveats import warnings_of
from davae_jax.evaluation.figures import bleu
from davae_jax.evaluation.per_text import PerText, per_text
from davae_jax.inference.generation import LENGTH_LIMIT
from davae_jax.inference.text_vae import TextVAE
from davae_jax.model.davae import split
from davae_jax.model.latent import Posterior, interpolate
from davae_jax.parallel.sharding import shard_batch
from davae_jax.tokenizers.decoder import END, UNK
from davae_jax.utils.errors import InputError

ACTIVE = 0.01  # variance of a dimension's means above which it is active (Burda et al. 2016)
PRIOR_SAMPLES = 1000  # at most
SAMPLING = ("temperature", "top_k", "top_p", "repetition_penalty")  # of the prior's samples, the checkpoint's own
LINES, STEPS = 32, 9  # interpolations between texts, and texts on each


class Evaluation(NamedTuple):
    measures: dict[str, Any]  # what `davae evaluate --json` writes
    texts: list[str]  # as the tokenizer gives them back
    labels: dict[str, list[str]]
    posterior: Posterior  # NumPy [n, L]
    reconstructions: list[str]  # greedy, from the posterior means
    samples: list[str]  # from the prior
    accepted: list[bool] | None  # which samples the grammar accepts, where there is one
    lines: list[list[str]]  # greedy texts between the means of two texts, ends included


def evaluate(
    vae: TextVAE,
    texts: Sequence[str],
    *,
    samples: int = 50,
    seed: int = 0,
    labels: Mapping[str, Sequence[str]] | None = None,
    language: Container[str] | None = None,
    source: str = "the texts",
) -> Evaluation:
    """All measures of a model over texts.

    Args:
      texts: left out, and counted, are blank ones, those too long for the encoder, and those that hold the end token.
      samples: K of the importance-weighted likelihood.
      labels: of each text, its class in each of several factors; each is probed for.
      language: the texts that are valid, where that is known.
      source: names the texts in messages.

    Raises:
      InputError: no text is left; samples below 1, or labels of more or fewer texts (exit code 2).
    """
    given = list(texts)
    if samples < 1:
        raise InputError(f"samples must be at least 1, not {samples}", exit_code=2)
    for name, values in (labels or {}).items():
        if len(values) != len(given):
            raise InputError(f"labels: {len(values)} of {name!r} for {len(given)} texts", exit_code=2)
    whole, ended = without_end_tokens(given, source)
    kept = tokenize(whole, vae.encoder_tokenizer, vae.decoder_tokenizer, max_length=LENGTH_LIMIT, source=source)
    rows = kept.lines - 1
    originals = [given[i] for i in rows]
    labels = {name: [str(values[i]) for i in rows] for name, values in (labels or {}).items()}
    n = len(rows)
    each = per_text(vae.model, kept, samples=samples, seed=seed, batch_size=vae.batch_size, progress=vae.progress)

    texts = vae.decode_ids([row[1:-1].tolist() for row in kept.decoder_ids], clean=True)
    longest = max(vae.config.max_out_length, *(len(row) for row in kept.decoder_ids))
    greedy = partial(vae.generate, top_k=1, max_length=longest)
    reconstructions = greedy(each.mean)
    prior = vae.sample(min(n, PRIOR_SAMPLES), seed=seed, max_length=longest)
    lines = _lines(each.mean, greedy)

    accepted = None if language is None else [text in language for text in prior]
    parts: dict[str, Callable[[], Found]] = {
        "mutual information": lambda: of_latent(each, seed, partial(shard_batch, params=split(vae.model)[1])),
        "likelihood": lambda: of_likelihood(each, [len(text_metrics.words(text)) + 1 for text in originals], seed),
        "BLEU": lambda: of_reconstructions(reconstructions, texts, seed),
        "probes": lambda: of_probes(each.mean, labels, seed),
        "self-BLEU": lambda: of_samples(prior, texts, accepted),
        "n-gram models": lambda: (ngram.forward_and_reverse(*map(_all_words, (texts, prior))), {}),
        "interpolations": lambda: of_lines(lines, seed),
    }
    found, intervals = {}, {}
    with tqdm(parts.items(), unit="part", disable=not vae.progress) as bar:
        for name, part in bar:
            bar.set_description(name)
            values, ends = part()
            found |= values
            intervals |= ends if n > 1 else {}  # one text drawn with replacement is always itself
    measures = {
        "n": n,
        "left_out": len(given) - n,
        "left_out_for_end_token": ended,
        "unknown_tokens": unknown_tokens(originals, kept.decoder_ids, vae.decoder_tokenizer.unk_id),
        "iw_samples": samples,
        "seed": seed,
        "sampling": {name: getattr(vae.config, name) for name in SAMPLING},
        "latent_size": vae.config.latent_size,
        **found,
        "intervals": {name: list(ends) for name, ends in intervals.items()},
    }
    measures["warnings"] = warnings_of(measures)
    return Evaluation(
        measures, texts, labels, Posterior(each.mean, each.logvar), reconstructions, prior, accepted, lines
    )


def without_end_tokens(texts: Sequence[str], source: str) -> tuple[list[str], int]:
    """(the texts, empty ones in the place of those that hold the literal end token; how many these are).

    The likelihood of a text ends with its first end token: what follows would cost nothing, and its words count.

    Raises:
      InputError: no text is left, of texts named by `source`.
    """
    whole = ["" if END in text else text for text in texts]
    ended = sum(END in text for text in texts)
    if ended and not any(text.strip() for text in whole):
        raise InputError(f"{source}: all texts hold {END}, which ends a text")
    return whole, ended


def unknown_tokens(texts: Sequence[str], decoder_ids: Sequence[np.ndarray], unk_id: int) -> int:
    """Tokens that stand for characters which the decoder's tokenizer does not know, not for `<unk>` in the text."""
    found = sum(int((row == unk_id).sum()) for row in decoder_ids)
    return max(0, found - sum(text.count(UNK) for text in texts))


# The measures, each group with its intervals.

Found = tuple[dict[str, Any], dict[str, bootstrap.Interval]]


def of_latent(each: PerText, seed: int, place: Callable[[Any], Any] = lambda arrays: arrays) -> Found:
    """KL, active units, mutual information, and how far all posteriors together are from the prior.

    place: lays arrays over devices by rows.
    """
    n = len(each.mean)
    drawn = metrics.log_densities(*place((each.mean, each.logvar)), jax.random.key(seed % 2**32))
    densities = metrics.LogDensities(*map(np.asarray, drawn))
    information, from_prior = densities.information, densities.from_prior
    rise = float((metrics.of_halves(densities, each.mean, each.logvar, seed, place) - densities.aggregate).mean())
    found = {
        "kl": float(each.kl.sum(1).mean()),
        "kl_per_dim": each.kl.mean(0).tolist(),
        "kl_per_dim_intervals": [list(ends) for ends in bootstrap.of_columns(each.kl, seed=seed)] if n > 1 else None,
        "active_units": metrics.active_units(each.mean, ACTIVE),
        "variance_per_dim": np.var(each.mean, axis=0).tolist(),
        "mutual_information": float(information.mean()),
        "mutual_information_of_half": float(information.mean()) - rise,
        "mutual_information_ceiling": metrics.mutual_information_ceiling(n),
        "aggregate_kl": float(from_prior.mean()),
        "aggregate_kl_of_half": float(from_prior.mean()) + rise,
        "aggregate_mmd": metrics.mmd_to_prior(densities.z),
    }
    return found, {
        "kl": bootstrap.of_ratio(each.kl.sum(1), seed=seed),
        "active_units": bootstrap.of_active_units(each.mean, ACTIVE, seed=seed),
        "mutual_information": bootstrap.of_ratio(information, seed=seed),
        "aggregate_kl": bootstrap.of_ratio(from_prior, seed=seed),
    }


def of_likelihood(each: PerText, words: Sequence[int], seed: int) -> Found:
    """Bounds on the likelihood, and perplexities with what they are divided by.

    words: of each text, its end counted.
    """
    words = np.asarray(words)
    elbo = -each.rec_nll - each.kl.sum(1)
    by_token, by_word, elbo_by_word = (
        bootstrap.of_ratio(nll, below, seed=seed)
        for nll, below in ((each.iw_nll, each.tokens), (each.iw_nll, words), (-elbo, words))
    )
    found = {
        "token_accuracy": float(each.hits.sum() / each.tokens.sum()),
        "rec_nll": float(each.rec_nll.mean()),
        "rec_nll_from_mean": float(each.mean_nll.mean()),
        "elbo": float(elbo.mean()),
        "iw_nll": float(each.iw_nll.mean()),
        "iw_nll_of_half": float(each.half_nll.mean()),
        "effective_sample_size": float(np.median(each.effective)),
        "ppl_per_token": _exp(each.iw_nll.sum() / each.tokens.sum()),
        "ppl_per_word": _exp(each.iw_nll.sum() / words.sum()),
        "elbo_ppl_per_word": _exp(-elbo.sum() / words.sum()),
        "denominators": {
            "tokens": int(each.tokens.sum()),
            "words": int(words.sum()),
            "tokens_are": "the decoder's tokens, each text's end token counted, <bos> not",
            "words_are": "what white space parts, each Chinese character or full-width sign one by itself, "
            "and each text's end",
        },
    }
    return found, {
        "token_accuracy": bootstrap.of_ratio(each.hits, each.tokens, seed=seed),
        "rec_nll": bootstrap.of_ratio(each.rec_nll, seed=seed),
        "elbo": bootstrap.of_ratio(elbo, seed=seed),
        "rec_nll_from_mean": bootstrap.of_ratio(each.mean_nll, seed=seed),
        "iw_nll": bootstrap.of_ratio(each.iw_nll, seed=seed),
        "iw_nll_of_half": bootstrap.of_ratio(each.half_nll, seed=seed),
        "effective_sample_size": bootstrap.of_median(each.effective, seed=seed),
        "ppl_per_token": tuple(map(_exp, by_token)),
        "ppl_per_word": tuple(map(_exp, by_word)),
        "elbo_ppl_per_word": tuple(map(_exp, elbo_by_word)),
    }


def of_reconstructions(found: Sequence[str], texts: Sequence[str], seed: int) -> Found:
    """BLEU over characters of the greedy reconstructions, and the part that is the text itself."""
    exact = np.array([a == b for a, b in zip(found, texts, strict=True)])
    values = {"bleu": bleu(found, texts), "exact_match": float(exact.mean())}
    return values, {"bleu": bleu_interval(found, texts, seed), "exact_match": bootstrap.of_proportion(exact)}


def bleu_interval(found: Sequence[str], texts: Sequence[str], seed: int) -> bootstrap.Interval:
    """Of corpus BLEU: its n-gram counts are sums over texts, so that each draw's BLEU follows from theirs."""
    from sacrebleu.metrics import BLEU

    scorer = BLEU(tokenize="zh")
    each = [scorer.corpus_score([a], [[b]]) for a, b in zip(found, texts, strict=True)]
    table = np.array([[*one.counts, *one.totals, one.sys_len, one.ref_len] for one in each])
    scores = []
    for row in bootstrap.sums(table, seed).round().astype(int).tolist():
        hits, totals, (sys_len, ref_len) = row[:4], row[4:8], row[8:]
        scores.append(BLEU.compute_bleu(hits, totals, sys_len, ref_len, smooth_method="exp").score)
    return bootstrap.interval(np.array(scores))


def of_samples(samples: Sequence[str], texts: Sequence[str], accepted: Sequence[bool] | None = None) -> Found:
    """How samples of the prior differ from each other and from the texts; of the texts, the same figures beside.

    accepted: which of the samples the grammar accepts, where there is one.
    """
    drawn, real = map(_all_words, (samples, texts[: len(samples)]))
    values: dict[str, float | int] = {
        "prior_samples": len(samples),
        "prior_distinct": len(set(samples)) / len(samples),
        "self_bleu": text_metrics.self_bleu(drawn),
        "self_bleu_texts": text_metrics.self_bleu(real),
    }
    for n in (1, 2, 3):
        values |= {
            f"distinct_{n}": text_metrics.distinct(drawn, n),
            f"distinct_{n}_texts": text_metrics.distinct(real, n),
        }
    if accepted is None:
        return values, {}
    values["prior_valid"] = float(np.mean(accepted))
    return values, {"prior_valid": bootstrap.of_proportion(np.array(accepted))}


def of_lines(lines: Sequence[Sequence[str]], seed: int) -> Found:
    """Means over the interpolations of the way's length and largest step, as multiples of the ends' distance."""
    ways = np.array([text_metrics.path_length(_all_words(line)) for line in lines]).reshape(-1, 2)
    ways = ways[~np.isnan(ways).any(1)]
    length, largest = ways.mean(0).tolist() if len(ways) else (math.nan, math.nan)
    found = {"interpolation_length": length, "interpolation_largest_step": largest, "interpolations": len(ways)}
    ends = bootstrap.of_columns(ways, seed=seed) if len(ways) > 1 else []
    return found, dict(zip(("interpolation_length", "interpolation_largest_step"), ends))


def of_probes(means: Float[np.ndarray, "n L"], labels: Mapping[str, Sequence[str]], seed: int) -> Found:
    """Linear probes, MIG and DCI of each factor that has two classes or more."""
    labels = {name: classes for name, classes in labels.items() if len(set(classes)) > 1}
    if not labels:
        return {}, {}
    fitted = {name: probes.linear_probe(means, classes, seed) for name, classes in labels.items()}
    importance = probes.importances(list(fitted.values()))
    factors = {
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
    found = {
        "factors": factors,
        "mig": float(np.mean([factor["mig"] for factor in factors.values()])),
        "dci_disentanglement": probes.disentanglement(importance),
        "dci_completeness": float(np.mean([factor["completeness"] for factor in factors.values()])),
        "dci_informativeness": float(np.mean([factor["probe_accuracy"] for factor in factors.values()])),
    }
    intervals = {f"probe_{name}": bootstrap.of_proportion(probe.hits) for name, probe in fitted.items()}
    read = np.mean([probe.hits for probe in fitted.values()], axis=0)
    return found, intervals | {"dci_informativeness": bootstrap.of_ratio(read, seed=seed)}


def _lines(means: Float[np.ndarray, "n L"], greedy) -> list[list[str]]:
    """Greedy texts on the straight lines between the texts 0 and 1, 2 and 3, and so on."""
    pairs = min(LINES, len(means) // 2)
    latents = np.asarray(interpolate(means[0 : 2 * pairs : 2], means[1 : 2 * pairs : 2], STEPS)).swapaxes(0, 1)
    texts = greedy(latents.reshape(-1, means.shape[1]))
    return [texts[i : i + STEPS] for i in range(0, len(texts), STEPS)]


def _all_words(texts: Sequence[str]) -> list[list[str]]:
    return [text_metrics.words(text) for text in texts]


def _exp(x: float) -> float:
    return math.exp(x) if x < 700 else math.inf
