"""What a finished run is worth: figures over texts it has never seen, and examples to look at."""

from __future__ import annotations

import unicodedata
from collections.abc import Container, Sequence

import jax
import numpy as np

from davae_jax.evaluation import metrics
from davae_jax.inference.text_vae import TextVAE
from davae_jax.model.latent import analogy, interpolate

SEED = 0


def figures(vae: TextVAE, texts: Sequence[str], language: Container[str] | None) -> dict[str, float | int | None]:
    """Figures over `texts`, which training has not shown. All texts are generated greedily from their latents.

    A reconstruction is held against the text as the tokenizer gives it back, with the published clean-up.
    bleu, exact_match: reconstruction from the posterior mean; BLEU is sacrebleu's, over characters.
    bleu_sampled: from a draw of the posterior.
    bleu_other_latent: the floor, the reconstruction of the next text held against this one.
    prior_valid, prior_distinct: of as many samples from the prior, the part that is in `language` (None without one)
      and the part that is left when repetitions are dropped.
    mutual_information, active_units: see `davae_jax.metrics`.
    """
    texts = list(texts)
    n = len(texts)
    posterior = vae.posterior(texts)
    expected = vae.decode_ids([ids[:-1] for ids in vae.decoder_ids(texts)], clean=True)  # without the end token
    noise = np.asarray(jax.random.normal(jax.random.key(SEED), posterior.mean.shape))
    latents = [posterior.mean, np.asarray(posterior.at(noise))]
    mean, sampled = (vae.generate(z, top_k=1) for z in latents)
    samples = vae.sample(n, seed=SEED, top_k=1)
    other = mean[1:] + mean[:1]
    return {
        "n": n,
        "bleu": bleu(mean, expected),
        "exact_match": float(np.mean([a == b for a, b in zip(mean, expected, strict=True)])),
        "bleu_sampled": bleu(sampled, expected),
        "bleu_other_latent": bleu(other, expected),
        "prior_valid": None if language is None else float(np.mean([sample in language for sample in samples])),
        "prior_distinct": len(set(samples)) / n,
        "mutual_information": metrics.mutual_information(*posterior, jax.random.key(SEED)),
        "mutual_information_ceiling": metrics.mutual_information_ceiling(n),
        "active_units": metrics.active_units(posterior.mean),
        "latent_size": vae.config.latent_size,
    }


def bleu(found: Sequence[str], expected: Sequence[str]) -> float:
    """Corpus BLEU (Papineni et al. 2002) by sacrebleu, each Chinese character a word."""
    import sacrebleu

    return sacrebleu.corpus_bleu(list(found), [list(expected)], tokenize="zh").score


def examples(vae: TextVAE, texts: Sequence[str], triple: Sequence[str], n: int = 4) -> dict[str, list]:
    """A few texts and what the model makes of them, for people to read; `triple` is for the analogy."""
    texts = list(texts)[:n]
    shown, (a, b, c) = np.split(vae.encode([*texts, *triple], std_scale=0.0), [len(texts)])
    line = interpolate(shown[0], shown[-1], 5)
    prior = np.asarray(jax.random.normal(jax.random.key(SEED), (n, vae.config.latent_size)))
    # All in one batch, so that one program is compiled.
    generated = iter(vae.generate(np.concatenate([shown, prior, line, analogy(a, b, c)[None]]), top_k=1))
    return {
        "reconstructions": [[text, next(generated)] for text in texts],
        "samples": [next(generated) for _ in prior],
        "interpolation": [next(generated) for _ in line],
        "analogy": [*triple, next(generated)],
    }


def format_examples(found: dict[str, list]) -> str:
    width = max(map(columns, (text for text, _ in found["reconstructions"])))
    lines = ["held-out text" + " " * (width - 13) + " → reconstruction from the posterior mean"]
    lines += [f"{text}{' ' * (width - columns(text))} → {back}" for text, back in found["reconstructions"]]
    lines += ["", "samples from the prior", *found["samples"]]
    lines += ["", "interpolation from the first to the last of these texts", *found["interpolation"]]
    a, b, c, d = found["analogy"]
    lines += ["", "analogy: as the first is to the second, so is the third to the fourth", a, b, c, d]
    return "\n".join(lines)


def format_figures(values: dict[str, float | int | None]) -> str:
    n, ceiling = values["n"], values["mutual_information_ceiling"]
    rows = [
        ("reconstruction from the posterior mean", f"BLEU {values['bleu']:.1f}, exact {values['exact_match']:.1%}"),
        ("from a posterior sample", f"BLEU {values['bleu_sampled']:.1f}"),
        ("from another text's latent (the floor)", f"BLEU {values['bleu_other_latent']:.1f}"),
        ("prior samples that differ", f"{values['prior_distinct']:.1%}"),
        ("mutual information", f"{values['mutual_information']:.2f} of {ceiling:.2f} nats at most"),
        ("active units", f"{values['active_units']} of {values['latent_size']}"),
    ]
    if values["prior_valid"] is not None:
        rows.insert(3, ("prior samples that the grammar accepts", f"{values['prior_valid']:.1%}"))
    return "\n".join([f"over {n} held-out texts", *(f"  {name:42}{value}" for name, value in rows)])


def columns(text: str) -> int:
    """Width on a terminal: Chinese characters take two columns."""
    return sum(2 if unicodedata.east_asian_width(c) in "WF" else 1 for c in text)
