"""Generates the example texts that a training run prints: reconstructions, prior samples, interpolation, analogy."""

from __future__ import annotations

from collections.abc import Sequence

import jax
import numpy as np

from davae_jax.evaluation.table import display_width
from davae_jax.inference.text_vae import TextVAE
from davae_jax.model.latent import analogy, interpolate

SEED = 0
COUNT = 4  # number of reconstructions, and of samples


def examples(vae: TextVAE, texts: Sequence[str], triple: Sequence[str]) -> dict[str, list]:
    """Generates a few example texts by greedy decoding.

    Args:
      texts: the first COUNT of them are reconstructed from their posterior means.
      triple: the texts a, b and c of the analogy.

    Returns:
      reconstructions: pairs of a text and its reconstruction.
      samples: texts from the prior.
      interpolation: texts on the line from the first to the last of the texts.
      analogy: a, b, c, and the text decoded from mean(b) − mean(a) + mean(c).
    """
    texts = list(texts)[:COUNT]
    means, (a, b, c) = np.split(vae.encode([*texts, *triple], std_scale=0.0), [len(texts)])
    line = interpolate(means[0], means[-1], 5)
    prior = np.asarray(jax.random.normal(jax.random.key(SEED), (COUNT, vae.config.latent_size)))
    # All latents are decoded in one batch, so that only one program is compiled.
    generated = iter(vae.generate(np.concatenate([means, prior, line, analogy(a, b, c)[None]]), top_k=1))
    return {
        "reconstructions": [[text, next(generated)] for text in texts],
        "samples": [next(generated) for _ in prior],
        "interpolation": [next(generated) for _ in line],
        "analogy": [*triple, next(generated)],
    }


def format_examples(generated: dict[str, list]) -> str:
    """Formats the result of `examples` for the terminal."""
    width = max(display_width(text) for text, _ in generated["reconstructions"])
    lines = ["held-out text" + " " * (width - 13) + " → reconstruction from the posterior mean"]
    lines += [
        f"{text}{' ' * (width - display_width(text))} → {reconstruction}"
        for text, reconstruction in generated["reconstructions"]
    ]
    lines += ["", "samples from the prior", *generated["samples"]]
    lines += ["", "interpolation from the first to the last of these texts", *generated["interpolation"]]
    lines += ["", "analogy: as the first is to the second, so is the third to the fourth", *generated["analogy"]]
    return "\n".join(lines)
