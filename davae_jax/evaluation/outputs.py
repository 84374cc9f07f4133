"""Collects the texts and model outputs that the metrics are computed from."""

from __future__ import annotations

from collections.abc import Container, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import jax
import numpy as np
from jaxtyping import Float

from davae_jax.data.tokenize import TokenizedTexts
from davae_jax.evaluation.per_text import PerText, per_text
from davae_jax.inference.text_vae import TextVAE
from davae_jax.model.davae import split
from davae_jax.model.latent import Posterior, interpolate, kl_per_dimension
from davae_jax.parallel.sharding import shard_batch

MAX_PRIOR_SAMPLES = 1000
MAX_INTERPOLATIONS, INTERPOLATION_STEPS = 32, 9  # pairs of texts, and texts on each line, ends included


@dataclass
class ModelOutputs:
    """Holds texts and computes a model's outputs for them. Each output is computed on first use and cached."""

    vae: TextVAE
    originals: list[str]  # the n texts as given
    tokenized: TokenizedTexts  # the same as ids
    labels: dict[str, list[str]]  # factor → the class of each text
    language: Container[str] | None  # the set of valid texts; None if unknown
    iw_samples: int  # number of importance samples per text (K)
    seed: int
    sampling: Mapping[str, float]  # sampling settings for the prior samples
    with_likelihood: bool  # whether to compute likelihoods, which yield the posteriors as well

    @property
    def n(self) -> int:
        """Returns the number of texts."""
        return len(self.originals)

    @property
    def key(self) -> jax.Array:
        """Returns the random key of the seed."""
        return jax.random.key(self.seed % 2**32)

    @cached_property
    def texts(self) -> list[str]:
        """Returns the texts after tokenization and the published clean-up; generated texts are compared with these."""
        return self.vae.decode_ids([row[1:-1].tolist() for row in self.tokenized.decoder_ids], clean=True)

    @cached_property
    def per_text(self) -> PerText:
        """Computes posteriors and likelihood bounds of each text."""
        vae = self.vae
        options = dict(samples=self.iw_samples, seed=self.seed, batch_size=vae.batch_size, progress=vae.progress)
        return per_text(vae.model, self.tokenized, **options)

    @cached_property
    def posterior(self) -> Posterior:
        """Computes the posteriors as NumPy arrays [n, L]."""
        if self.with_likelihood:
            return Posterior(self.per_text.mean, self.per_text.logvar)
        return self.vae.posterior(self.originals)

    @cached_property
    def kl(self) -> Float[np.ndarray, "n L"]:
        """Computes the KL of each posterior and dimension in nats, without the free-bits mask of training."""
        return self.per_text.kl if self.with_likelihood else np.asarray(kl_per_dimension(self.posterior))

    @cached_property
    def max_length(self) -> int:
        """Returns the token limit of generated texts: the larger of the config's limit and the longest text."""
        return max(self.vae.config.max_out_length, *(len(row) for row in self.tokenized.decoder_ids))

    def greedy(self, latents: Float[np.ndarray, "m L"]) -> list[str]:
        """Decodes latents greedily."""
        return self.vae.generate(latents, top_k=1, max_length=self.max_length)

    @cached_property
    def reconstructions(self) -> list[str]:
        """Decodes the posterior means greedily."""
        return self.greedy(self.posterior.mean)

    @cached_property
    def reconstructions_of_samples(self) -> list[str]:
        """Decodes one sample of each posterior greedily."""
        noise = np.asarray(jax.random.normal(self.key, self.posterior.mean.shape))
        return self.greedy(np.asarray(self.posterior.at(noise)))

    @cached_property
    def prior_samples(self) -> list[str]:
        """Samples texts from the prior: as many as there are texts, but at most `MAX_PRIOR_SAMPLES`."""
        n = min(self.n, MAX_PRIOR_SAMPLES)
        return self.vae.sample(n, seed=self.seed, max_length=self.max_length, **self.sampling)

    @cached_property
    def valid_prior_samples(self) -> list[bool] | None:
        """Returns whether each prior sample is valid; None if the language is unknown."""
        return None if self.language is None else [text in self.language for text in self.prior_samples]

    @cached_property
    def interpolations(self) -> list[list[str]]:
        """Decodes points on the lines between the posterior means of texts 0 and 1, 2 and 3, and so on, greedily."""
        means, pairs = self.posterior.mean, min(MAX_INTERPOLATIONS, self.n // 2)
        ends = means[0 : 2 * pairs : 2], means[1 : 2 * pairs : 2]
        latents = interpolate(*ends, INTERPOLATION_STEPS).swapaxes(0, 1)
        texts = self.greedy(latents.reshape(-1, means.shape[1]))
        return [texts[i : i + INTERPOLATION_STEPS] for i in range(0, len(texts), INTERPOLATION_STEPS)]

    def shard(self, arrays: Sequence[Any]) -> Any:
        """Shards arrays over the model's devices by rows."""
        return shard_batch(arrays, params=split(self.vae.model)[1])

    def computed(self, name: str, default: Any) -> Any:
        """Returns an output if it has been computed, else `default`."""
        return self.__dict__.get(name, default)
