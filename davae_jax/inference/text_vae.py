"""`TextVAE`: a model with its tokenizers, whose methods take and return texts."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array, Float

from davae_jax.checkpoints.hub import resolve_source
from davae_jax.checkpoints.pretrained import from_pretrained
from davae_jax.checkpoints.run_folder import CONFIG_FILE, config_folder
from davae_jax.inference.arguments import (
    check_count,
    check_radius,
    check_std_scale,
    check_steps,
    check_texts,
    check_traversal,
    greedy_by_default,
    unit_direction,
)
from davae_jax.inference.generation import NotFiniteError, check_prompts, generate, sampling_settings
from davae_jax.model.config import DAVAEConfig, WeightFormat
from davae_jax.model.davae import DAVAE
from davae_jax.model.latent import (
    Posterior,
    analogy,
    attribute_vector,
    combine,
    interpolate,
    neighbours,
    slerp,
    traverse,
)
from davae_jax.model.quantized import check_format
from davae_jax.tokenizers.cleanup import clean_up
from davae_jax.tokenizers.decoder import END, DecoderTokenizer
from davae_jax.tokenizers.encoder import EncoderTokenizer
from davae_jax.tokenizers.load import load_tokenizers
from davae_jax.utils.errors import InputError, OptionError
from davae_jax.utils.progress import progress_bar
from davae_jax.utils.shapes import power_of_two


class TextVAE:
    """A model with its two tokenizers.

    The methods take any number of texts and process them in batches. The result for a text depends on the seed and on
    the text's index in the list, and not on the batch size.

    `**sampling` is any of max_length (in tokens, including `<bos>` and the prompt), temperature, top_k, top_p and
    repetition_penalty; the defaults are those of the checkpoint's config. All methods but `generate`, `simulate_batch`
    and `sample` decode greedily unless one of the last four settings is given.

    Attributes:
      batch_size: number of texts per batch.
      progress: whether to show a progress bar.
      label: a function from the number of a text, counted from 1, to its name in warnings.
      source: the name of the model in errors.
    """

    def __init__(self, model: DAVAE, encoder_tokenizer: EncoderTokenizer, decoder_tokenizer: DecoderTokenizer):
        self.model = model
        self.encoder_tokenizer = encoder_tokenizer
        self.decoder_tokenizer = decoder_tokenizer
        self.batch_size = 16
        self.progress = False
        self.label = "text {}".format
        self.source = "the model"

    @classmethod
    def from_pretrained(
        cls,
        source: str | Path,
        *,
        tokenizers: str | Path | None = None,
        dtype=jnp.float32,
        weights: WeightFormat = "float32",
        mesh: Mesh | None = None,
    ) -> TextVAE:
        """Loads a model and its tokenizers.

        Args:
          source, dtype, weights, mesh: as for `davae_jax.from_pretrained`.
          tokenizers: a folder with spiece.model and vocab.txt; the default is the source.

        Raises:
          InputError: a file is missing or damaged, or the tokenizers do not fit the model.
        """
        check_format(weights)
        folder = resolve_source(source)
        config = DAVAEConfig.from_json(config_folder(folder) / CONFIG_FILE)
        # The tokenizers are loaded first, so that an error in them does not come after a minute of loading weights.
        pair = load_tokenizers(config_folder(folder) if tokenizers is None else Path(tokenizers), config)
        vae = cls(from_pretrained(folder, dtype=dtype, weights=weights, mesh=mesh), *pair)
        vae.source = str(source)
        return vae

    @property
    def config(self) -> DAVAEConfig:
        """Returns the model's config."""
        return self.model.config

    # Ids.

    def encoder_ids(self, texts: Sequence[str]) -> list[list[int]]:
        """Returns WordPiece ids as published: with doubled special tokens, truncated to 510 ids.

        Warns, with the text's label, if a text is empty, has no known character, or is truncated.
        """
        all_ids = self.encoder_tokenizer.encode(check_texts(texts))
        for i, ids in enumerate(all_ids, 1):
            if problem := self.encoder_tokenizer.problem(ids):
                warnings.warn(f"{self.label(i)}: {problem}", stacklevel=2)
        return all_ids

    def decoder_ids(self, texts: Sequence[str]) -> list[list[int]]:
        """Returns SentencePiece ids as published, with the end token at the end."""
        return [self.decoder_tokenizer.encode(text) for text in check_texts(texts)]

    def decode_ids(self, ids: Sequence[Sequence[int]], *, clean: bool = False) -> list[str]:
        """Returns the text of each list of decoder ids; `clean` applies the published clean-up of generated texts."""
        texts = [self.decoder_tokenizer.decode(row) for row in ids]
        return [clean_up(text) for text in texts] if clean else texts

    def prompt_ids(self, prompts: Sequence[str]) -> list[list[int]]:
        """Returns the ids of `<bos>` and each prompt. Raises InputError if a prompt contains the end token."""
        prompts = check_texts(prompts)
        for i, prompt in enumerate(prompts, 1):
            if END in prompt:
                raise OptionError(f"prompt {i}", f"contains the end token {END}")
        return [self.decoder_tokenizer.encode_prompt(prompt) for prompt in prompts]

    # Latents.

    def posterior(self, texts: Sequence[str]) -> Posterior:
        """Returns the posterior's mean and log-variance of each text, as NumPy arrays [n, L]."""
        batches = [(np.asarray(p.mean)[:n], np.asarray(p.logvar)[:n]) for p, _, n in self._posteriors(texts)]
        means, logvars = zip(*batches, strict=True) if batches else ([self._empty_latents()], [self._empty_latents()])
        return Posterior(np.concatenate(means), np.concatenate(logvars))

    def encode(
        self,
        texts: Sequence[str],
        *,
        eps: Float[Array, "n L"] | None = None,
        seed: int = 0,
        std_scale: float | None = None,
    ) -> Float[np.ndarray, "n L"]:
        """Returns a latent of each text: mean + eps · exp(logvar/2) · std_scale.

        Args:
          eps: standard normal noise; sampled with the seed by default.
          std_scale: default: the config's (1.5 as published); 0 gives the mean.
        """
        texts = check_texts(texts)
        std_scale = self.config.std_scale if std_scale is None else check_std_scale(std_scale)
        eps = self._standard_normal(len(texts), seed) if eps is None else np.asarray(eps, np.float32)
        if eps.shape != (len(texts), self.config.latent_size):
            expected = [len(texts), self.config.latent_size]
            raise OptionError("eps", f"must have shape {expected}, not {list(eps.shape)}")
        latents = [self._empty_latents()]
        for posterior, start, n in self._posteriors(texts):
            noise = np.zeros(posterior.mean.shape, np.float32)
            noise[:n] = eps[start : start + n]
            latents.append(np.asarray(_scaled_latents(posterior, noise, std_scale))[:n])
            if not np.isfinite(latents[-1]).all():
                raise NotFiniteError(self.source)
        return np.concatenate(latents)

    def _posteriors(self, texts: Sequence[str]) -> Iterator[tuple[Posterior, int, int]]:
        """Yields (posterior, index of the first text, number of texts n) of each batch.

        The numbers of rows and of columns are rounded up, so that batches of all sizes share a few compiled programs.
        Only the first n rows of a posterior are those of texts.
        """
        ids = self.encoder_ids(texts)
        for start, stop in self._batches(len(ids), "encode"):
            batch_ids = ids[start:stop]
            length = min(power_of_two(max(map(len, batch_ids))), self.config.encoder.max_position_embeddings)
            batch = np.zeros((power_of_two(len(batch_ids), least=1), length), np.int32)
            for row, row_ids in enumerate(batch_ids):
                batch[row, : len(row_ids)] = row_ids
            yield self.model.encode(batch), start, len(batch_ids)

    def _empty_latents(self) -> np.ndarray:
        return np.zeros((0, self.config.latent_size), np.float32)

    # Texts from latents.

    def generate(
        self, latent: Float[Array, "n L"], prompts: Sequence[str] | None = None, *, seed: int = 0, **sampling
    ) -> list[str]:
        """Returns a text for each latent: the continuation of the prompt, without it, cleaned up as published."""
        latent = np.asarray(latent, np.float32)
        ids = self.check(prompts, **sampling)
        if ids is not None and len(ids) != len(latent):
            raise InputError(f"{len(ids)} prompts for {len(latent)} latents", exit_code=2)
        key = _purpose_key(seed, "tokens")
        texts = []
        for start, stop in self._batches(len(latent), "generate"):
            prompt_ids = None if ids is None else ids[start:stop]
            try:
                out = generate(self.model, latent[start:stop], prompt_ids, key=key, first_row=start, **sampling)
            except NotFiniteError:
                raise NotFiniteError(self.source) from None
            skip = [1] * len(out) if prompt_ids is None else [len(p) for p in prompt_ids]
            texts += self.decode_ids([row[n:] for row, n in zip(out, skip, strict=True)], clean=True)
        return texts

    def simulate_batch(
        self, texts: Sequence[str], prompts: Sequence[str] | None = None, *, seed: int = 0, **sampling
    ) -> list[str]:
        """Returns a variation of each text, as published: encode, sample with the config's std_scale, generate."""
        texts = check_texts(texts)
        self.check(prompts, **sampling)
        if prompts is not None and len(prompts) != len(texts):
            raise InputError(f"{len(prompts)} prompts for {len(texts)} texts", exit_code=2)
        return self.generate(self.encode(texts, seed=seed), prompts, seed=seed, **sampling)

    def decode(self, latent: Float[Array, "n L"], *, seed: int = 0, **sampling) -> list[str]:
        """Returns the text of each latent: `generate`, but greedy unless a sampling setting is given."""
        return self.generate(latent, seed=seed, **greedy_by_default(sampling))

    def reconstruct(self, texts: Sequence[str], *, seed: int = 0, **sampling) -> list[str]:
        """Returns each text as decoded from its posterior mean."""
        self.check(**greedy_by_default(sampling))
        return self.decode(self.encode(texts, std_scale=0.0), seed=seed, **sampling)

    def sample(self, n: int, *, seed: int = 0, **sampling) -> list[str]:
        """Returns n texts from the prior, z ~ N(0, I). Text i is the same for every n."""
        check_count(n)
        return self.generate(self._standard_normal(n, seed), seed=seed, **sampling)

    def interpolate(
        self, a: str, b: str, steps: int, *, spherical: bool = False, seed: int = 0, **sampling
    ) -> list[str]:
        """Returns `steps` texts on the straight line, or the great arc, between the posterior means of a and b."""
        check_steps(steps)
        mean_a, mean_b = self.encode([a, b], std_scale=0.0)
        line = (slerp if spherical else interpolate)(mean_a, mean_b, steps)
        return self.decode(line, seed=seed, **sampling)

    def analogy(self, a: str, b: str, c: str, *, seed: int = 0, **sampling) -> str:
        """Returns the text of mean(b) − mean(a) + mean(c), which is to c as b is to a."""
        mean_a, mean_b, mean_c = self.encode([a, b, c], std_scale=0.0)
        return self.decode(analogy(mean_a, mean_b, mean_c)[None], seed=seed, **sampling)[0]

    def combine(self, texts: Sequence[str], weights: Sequence[float], *, seed: int = 0, **sampling) -> str:
        """Returns the text of Σ weight · mean(text): with weights ½, ½ between two texts, with −1, 1, 1 an analogy."""
        texts = check_texts(texts)
        if len(texts) != len(weights) or not texts:
            raise InputError(f"{len(weights)} weights for {len(texts)} texts", exit_code=2)
        latent = combine(self.encode(texts, std_scale=0.0), weights)
        return self.decode(latent[None], seed=seed, **sampling)[0]

    def attribute_vector(self, having: Sequence[str], lacking: Sequence[str]) -> Float[np.ndarray, "L"]:
        """Returns the mean latent of texts that have an attribute minus that of texts that lack it, for `shift`."""
        having, lacking = check_texts(having), check_texts(lacking)
        if not having or not lacking:
            raise InputError("an attribute needs at least one text that has it and one that lacks it", exit_code=2)
        return attribute_vector(*(self.encode(texts, std_scale=0.0) for texts in (having, lacking)))

    def shift(
        self,
        texts: Sequence[str],
        direction: Float[np.ndarray, "L"],
        strength: float = 1.0,
        *,
        seed: int = 0,
        **sampling,
    ) -> list[str]:
        """Returns each text after adding `strength` · `direction` (e.g. an attribute vector) to its posterior mean."""
        if np.ndim(strength):
            raise OptionError("strength", f"must be a scalar, not an array of shape {list(np.shape(strength))}")
        direction = np.asarray(direction, np.float32)
        if direction.shape != (self.config.latent_size,):
            raise OptionError("direction", f"must have shape {[self.config.latent_size]}, not {list(direction.shape)}")
        latent = self.encode(texts, std_scale=0.0) + strength * direction
        return self.decode(latent, seed=seed, **sampling)

    def traverse(
        self,
        start: str | None,
        direction: int | Float[np.ndarray, "L"],
        *,
        step: float = 1.0,
        each_side: int = 3,
        seed: int = 0,
        **sampling,
    ) -> list[str]:
        """Returns 2 · `each_side` + 1 texts along a line through the latent of `start`, whose text is in the middle.

        Args:
          start: a text, of which the posterior mean is taken, or None for the prior's mean.
          direction: a latent dimension, counted from 0, or a vector, whose length does not count.
          step: distance of neighbouring latents, in standard deviations of the prior: 1 in every direction.
        """
        check_traversal(step, each_side)
        unit = unit_direction(direction, self.config.latent_size)
        z = np.zeros(self.config.latent_size) if start is None else self.encode([start], std_scale=0.0)[0]
        return self.decode(traverse(z, unit, step, each_side), seed=seed, **sampling)

    def neighbours(self, text: str, n: int, radius: float, *, seed: int = 0, **sampling) -> list[str]:
        """Returns n texts at the distance `radius` from a text's posterior mean, in random directions."""
        check_count(n)
        check_radius(radius)
        around = self.around(self.encode([text], std_scale=0.0), n, radius, seed=seed)
        return self.decode(around, seed=seed, **sampling)

    def around(
        self, latent: Float[np.ndarray, "k L"], n: int, radius: float, *, seed: int = 0
    ) -> Float[np.ndarray, "k*n L"]:
        """Returns n latents at the distance `radius` around each latent, in the same n directions for all of them."""
        key = _purpose_key(seed, "latent")
        return np.concatenate([self._empty_latents(), *(neighbours(z, n, radius, key) for z in latent)])

    def _standard_normal(self, n: int, seed: int) -> Float[np.ndarray, "n L"]:
        """Returns standard normal noise, in which row i is the same for every n."""
        return np.asarray(_normal_rows(_purpose_key(seed, "latent"), power_of_two(n), self.config.latent_size))[:n]

    def check(
        self, prompts: Sequence[str] | None = None, *, max_length: int | None = None, **settings
    ) -> list[list[int]] | None:
        """Checks the arguments of `generate` before any work is done, and returns the ids of the prompts.

        Raises:
          InputError: `generate` would not accept a prompt or a setting.
        """
        sampling_settings(self.config, **settings)
        max_length = self.config.max_out_length if max_length is None else max_length
        ids = None if prompts is None else self.prompt_ids(prompts)
        check_prompts([[self.config.bos_token_id]] if ids is None else ids, max_length, self.config)
        return ids

    def _batches(self, n: int, description: str) -> Iterator[tuple[int, int]]:
        """Yields (start, stop) of each batch of n texts, and shows a progress bar named `description`."""
        with progress_bar(total=n, desc=description, unit="text", disable=not self.progress) as bar:
            for start in range(0, n, self.batch_size):
                stop = min(start + self.batch_size, n)
                yield start, stop
                bar.update(stop - start)


@jax.jit
def _scaled_latents(posterior: Posterior, eps: Float[Array, "B L"], std_scale: float) -> Float[Array, "B L"]:
    """Returns `posterior.at(eps, std_scale)`, compiled once for all values of `std_scale`."""
    return posterior.at(eps, std_scale)


@partial(jax.jit, static_argnums=(1, 2))
def _normal_rows(key: jax.Array, rows: int, latent_size: int) -> Float[Array, "rows L"]:
    """Returns standard normal rows, each sampled with a separate key."""
    keys = jax.vmap(jax.random.fold_in, (None, 0))(key, jnp.arange(rows))
    return jax.vmap(lambda k: jax.random.normal(k, (latent_size,)))(keys)


def _purpose_key(seed: int, purpose: str) -> jax.Array:
    """Returns a key that belongs to a seed and a purpose, so that latents and tokens are sampled independently."""
    # A key has 32 bits of the seed. JAX also discards the higher bits of a 64-bit seed, and rejects larger seeds.
    return jax.random.fold_in(jax.random.key(seed % 2**32), ["latent", "tokens"].index(purpose))
