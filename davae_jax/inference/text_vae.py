"""Texts in, texts out."""

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
from tqdm import tqdm

from davae_jax.checkpoints.hub import resolve_source
from davae_jax.checkpoints.pretrained import from_pretrained
from davae_jax.checkpoints.run_folder import CONFIG_FILE, config_folder
from davae_jax.inference.generation import check_prompts, generate, sampling_settings
from davae_jax.model.config import DAVAEConfig
from davae_jax.model.davae import DAVAE
from davae_jax.model.latent import Posterior, analogy, attribute_vector, combine, interpolate, neighbours, slerp
from davae_jax.tokenizers.cleanup import clean_up
from davae_jax.tokenizers.decoder import END, DecoderTokenizer
from davae_jax.tokenizers.encoder import EncoderTokenizer
from davae_jax.tokenizers.load import load_tokenizers
from davae_jax.utils.errors import InputError
from davae_jax.utils.shapes import power_of_two


class TextVAE:
    """A model with its two tokenizers.

    Every method takes texts in any number and works through them `batch_size` at a time; what comes out for a text
    depends on the seed and the text's place in the list, never on the batches.

    `**sampling` is any of max_length (tokens, `<bos>` and prompt included), temperature, top_k, top_p and
    repetition_penalty; what is left out comes from the checkpoint's config. All but `generate`,
    `simulate_batch` and `sample` are greedy unless one of the last four is given.
    """

    def __init__(self, model: DAVAE, encoder_tokenizer: EncoderTokenizer, decoder_tokenizer: DecoderTokenizer):
        self.model = model
        self.encoder_tokenizer = encoder_tokenizer
        self.decoder_tokenizer = decoder_tokenizer
        self.batch_size = 16
        self.progress = False  # a bar on the terminal
        self.label = "text {}".format  # how a warning names the text it is about, counted from 1

    @classmethod
    def from_pretrained(
        cls,
        source: str | Path,
        *,
        tokenizers: str | Path | None = None,
        dtype=jnp.float32,
        mesh: Mesh | None = None,
    ) -> TextVAE:
        """Loads model and tokenizers; `source`, `dtype` and `mesh` as for `davae_jax.from_pretrained`.

        Args:
          tokenizers: folder with spiece.model and vocab.txt; by default the source's own.

        Raises:
          InputError: nothing there, or the tokenizers do not fit the model.
        """
        folder = resolve_source(source)
        config = DAVAEConfig.from_json(config_folder(folder) / CONFIG_FILE)
        # The tokenizers first: a mistake there should not cost a minute of loading.
        pair = load_tokenizers(config_folder(folder) if tokenizers is None else Path(tokenizers), config)
        return cls(from_pretrained(folder, dtype=dtype, mesh=mesh), *pair)

    @property
    def config(self) -> DAVAEConfig:
        return self.model.config

    # Ids.

    def encoder_ids(self, texts: Sequence[str]) -> list[list[int]]:
        """WordPiece ids as published: special tokens doubled, cut at 510 ids.

        Warns, naming the text, where one is empty, wholly unknown, or cut.
        """
        all_ids = self.encoder_tokenizer.encode(_check_texts(texts))
        for i, ids in enumerate(all_ids, 1):
            if problem := self.encoder_tokenizer.problem(ids):
                warnings.warn(f"{self.label(i)}: {problem}", stacklevel=2)
        return all_ids

    def decoder_ids(self, texts: Sequence[str]) -> list[list[int]]:
        """SentencePiece ids as published, the end token last."""
        return [self.decoder_tokenizer.encode(text) for text in _check_texts(texts)]

    def decode_ids(self, ids: Sequence[Sequence[int]], *, clean: bool = False) -> list[str]:
        """Decoder ids to text; `clean` applies the published clean-up, as all generated text gets."""
        texts = [self.decoder_tokenizer.decode(row) for row in ids]
        return [clean_up(text) for text in texts] if clean else texts

    def prompt_ids(self, prompts: Sequence[str]) -> list[list[int]]:
        """`<bos>` and the prompt's pieces. Raises InputError on a prompt that holds the end token."""
        prompts = _check_texts(prompts)
        for i, prompt in enumerate(prompts, 1):
            if END in prompt:
                raise InputError(f"prompt {i} holds the end token {END}", exit_code=2)
        return [self.decoder_tokenizer.encode_prompt(prompt) for prompt in prompts]

    # Latents.

    def posterior(self, texts: Sequence[str]) -> Posterior:
        """Mean and log-variance of each text, NumPy arrays [n, L]."""
        parts = [(np.asarray(p.mean)[:n], np.asarray(p.logvar)[:n]) for p, _, n in self._posteriors(texts)]
        means, logvars = zip(*parts, strict=True) if parts else ([self._empty_latents()], [self._empty_latents()])
        return Posterior(np.concatenate(means), np.concatenate(logvars))

    def encode(
        self,
        texts: Sequence[str],
        *,
        eps: Float[Array, "n L"] | None = None,
        seed: int = 0,
        std_scale: float | None = None,
    ) -> Float[np.ndarray, "n L"]:
        """A latent of each text: mean + eps · exp(logvar/2) · std_scale.

        eps is drawn from the seed unless given; std_scale defaults to the config's (1.5 as published), 0 is the mean.
        """
        texts = _check_texts(texts)
        std_scale = self.config.std_scale if std_scale is None else check_std_scale(std_scale)
        eps = self._standard_normal(len(texts), seed) if eps is None else np.asarray(eps, np.float32)
        if eps.shape != (len(texts), self.config.latent_size):
            raise InputError(f"eps is {list(eps.shape)}, not {[len(texts), self.config.latent_size]}", exit_code=2)
        latents = [self._empty_latents()]
        for posterior, start, n in self._posteriors(texts):
            noise = np.zeros(posterior.mean.shape, np.float32)
            noise[:n] = eps[start : start + n]
            latents.append(np.asarray(_scaled_latents(posterior, noise, std_scale))[:n])
        return np.concatenate(latents)

    def _posteriors(self, texts: Sequence[str]) -> Iterator[tuple[Posterior, int, int]]:
        """(posterior, first text, number of texts) of each batch.

        Batch and length are rounded up, so that texts of all numbers and lengths share a few compiled programs; the
        rows past the number of texts are filler.
        """
        ids = self.encoder_ids(texts)
        for start, stop in self._batches(len(ids), "encode"):
            part = ids[start:stop]
            length = min(power_of_two(max(map(len, part))), self.config.encoder.max_position_embeddings)
            batch = np.zeros((power_of_two(len(part), least=1), length), np.int32)
            for row, row_ids in enumerate(part):
                batch[row, : len(row_ids)] = row_ids
            yield self.model.encode(batch), start, len(part)

    def _empty_latents(self) -> np.ndarray:
        return np.zeros((0, self.config.latent_size), np.float32)

    # Texts from latents.

    def generate(
        self, latent: Float[Array, "n L"], prompts: Sequence[str] | None = None, *, seed: int = 0, **sampling
    ) -> list[str]:
        """A text for each latent, prompt left out, cleaned up."""
        latent = np.asarray(latent, np.float32)
        ids = self.check(prompts, **sampling)
        if ids is not None and len(ids) != len(latent):
            raise InputError(f"{len(ids)} prompts for {len(latent)} latents", exit_code=2)
        key = _purpose_key(seed, "draw")
        texts = []
        for start, stop in self._batches(len(latent), "generate"):
            part = None if ids is None else ids[start:stop]
            out = generate(self.model, latent[start:stop], part, key=key, first_row=start, **sampling)
            skip = [1] * len(out) if part is None else [len(p) for p in part]
            texts += self.decode_ids([row[n:] for row, n in zip(out, skip, strict=True)], clean=True)
        return texts

    def simulate_batch(
        self, texts: Sequence[str], prompts: Sequence[str] | None = None, *, seed: int = 0, **sampling
    ) -> list[str]:
        """A variation of each text: encode, draw a latent (std_scale from the config), generate. As published."""
        texts = _check_texts(texts)
        self.check(prompts, **sampling)
        if prompts is not None and len(prompts) != len(texts):
            raise InputError(f"{len(prompts)} prompts for {len(texts)} texts", exit_code=2)
        return self.generate(self.encode(texts, seed=seed), prompts, seed=seed, **sampling)

    def reconstruct(self, texts: Sequence[str], *, seed: int = 0, **sampling) -> list[str]:
        """Each text through its posterior mean and back."""
        sampling = greedy_by_default(sampling)
        self.check(**sampling)
        return self.generate(self.encode(texts, std_scale=0.0), seed=seed, **sampling)

    def sample(self, n: int, *, seed: int = 0, **sampling) -> list[str]:
        """n texts from the prior: z ~ N(0, I). The first of them are the same however many there are."""
        if n < 0:
            raise InputError(f"n must be 0 or more, not {n}", exit_code=2)
        return self.generate(self._standard_normal(n, seed), seed=seed, **sampling)

    def interpolate(
        self, a: str, b: str, steps: int, *, spherical: bool = False, seed: int = 0, **sampling
    ) -> list[str]:
        """`steps` texts along the straight line, or the great arc, from a's posterior mean to b's, both included."""
        check_steps(steps)
        mean_a, mean_b = self.encode([a, b], std_scale=0.0)
        line = (slerp if spherical else interpolate)(mean_a, mean_b, steps)
        return self.generate(line, seed=seed, **greedy_by_default(sampling))

    def analogy(self, a: str, b: str, c: str, *, seed: int = 0, **sampling) -> str:
        """What is to c as b is to a: the text of mean(b) − mean(a) + mean(c)."""
        mean_a, mean_b, mean_c = self.encode([a, b, c], std_scale=0.0)
        return self.generate(analogy(mean_a, mean_b, mean_c)[None], seed=seed, **greedy_by_default(sampling))[0]

    def combine(self, texts: Sequence[str], weights: Sequence[float], *, seed: int = 0, **sampling) -> str:
        """The text of Σ weight · mean(text): with weights ½, ½ what lies between two, with −1, 1, 1 their analogy."""
        texts = _check_texts(texts)
        if len(texts) != len(weights) or not texts:
            raise InputError(f"{len(weights)} weights for {len(texts)} texts", exit_code=2)
        latent = combine(self.encode(texts, std_scale=0.0), weights)
        return self.generate(latent[None], seed=seed, **greedy_by_default(sampling))[0]

    def attribute_vector(self, having: Sequence[str], lacking: Sequence[str]) -> Float[np.ndarray, "L"]:
        """What texts that have an attribute have on average more than texts that lack it: a direction of the latent."""
        having, lacking = _check_texts(having), _check_texts(lacking)
        if not having or not lacking:
            raise InputError("an attribute needs a text that has it and one that lacks it", exit_code=2)
        return np.asarray(attribute_vector(*(self.encode(texts, std_scale=0.0) for texts in (having, lacking))))

    def shift(
        self,
        texts: Sequence[str],
        direction: Float[np.ndarray, "L"],
        strength: float = 1.0,
        *,
        seed: int = 0,
        **sampling,
    ) -> list[str]:
        """Each text with `strength` times a direction added to its posterior mean, an attribute vector's say."""
        if np.ndim(strength):
            raise InputError(f"strength is one number, not an array of {list(np.shape(strength))}", exit_code=2)
        direction = np.asarray(direction, np.float32)
        if direction.shape != (self.config.latent_size,):
            raise InputError(f"direction is {list(direction.shape)}, not {[self.config.latent_size]}", exit_code=2)
        latent = self.encode(texts, std_scale=0.0) + strength * direction
        return self.generate(latent, seed=seed, **greedy_by_default(sampling))

    def neighbours(self, text: str, n: int, radius: float, *, seed: int = 0, **sampling) -> list[str]:
        """n texts at the distance `radius` from a text's posterior mean, in directions that the seed draws."""
        if n < 0:
            raise InputError(f"n must be 0 or more, not {n}", exit_code=2)
        check_radius(radius)
        around = self.around(self.encode([text], std_scale=0.0), n, radius, seed=seed)
        return self.generate(around, seed=seed, **greedy_by_default(sampling))

    def around(
        self, latent: Float[np.ndarray, "k L"], n: int, radius: float, *, seed: int = 0
    ) -> Float[np.ndarray, "k*n L"]:
        """n latents at the distance `radius` from each, side by side; in each place the same directions."""
        key = _purpose_key(seed, "latent")
        return np.concatenate([self._empty_latents(), *(np.asarray(neighbours(z, n, radius, key)) for z in latent)])

    def _standard_normal(self, n: int, seed: int) -> Float[np.ndarray, "n L"]:
        """Standard normal noise; row i is the same however many rows there are."""
        return np.asarray(_normal_rows(_purpose_key(seed, "latent"), power_of_two(n), self.config.latent_size))[:n]

    def check(
        self, prompts: Sequence[str] | None = None, *, max_length: int | None = None, **settings
    ) -> list[list[int]] | None:
        """The prompts' ids. Raises InputError, before any work is done, on what `generate` would refuse."""
        sampling_settings(self.config, **settings)
        max_length = self.config.max_out_length if max_length is None else max_length
        ids = None if prompts is None else self.prompt_ids(prompts)
        check_prompts([[self.config.bos_token_id]] if ids is None else ids, max_length, self.config)
        return ids

    def _batches(self, n: int, what: str) -> Iterator[tuple[int, int]]:
        with tqdm(total=n, desc=what, unit="text", disable=not self.progress) as bar:
            for start in range(0, n, self.batch_size):
                stop = min(start + self.batch_size, n)
                yield start, stop
                bar.update(stop - start)


def check_steps(steps: int, *, name: str = "steps") -> None:
    """Raises InputError (exit code 2) on a number of interpolation steps that makes no sense."""
    if not 2 <= steps <= 10_000:
        raise InputError(f"{name} must be 2 (both ends) to 10000, not {steps}", exit_code=2)


def greedy_by_default(sampling: dict) -> dict:
    """The settings with top_k 1, unless they say how to draw: with top_k 1 none of the others would matter."""
    told = sampling.keys() & {"temperature", "top_k", "top_p", "repetition_penalty"}
    return sampling if told else {"top_k": 1, **sampling}


def check_std_scale(std_scale: float) -> float:
    """`std_scale` itself. Raises InputError where it is no width."""
    if not 0 <= std_scale < float("inf"):
        raise InputError(f"std_scale must be a number of 0 or more, not {std_scale}", exit_code=2)
    return std_scale


def check_radius(radius: float, *, name: str = "radius") -> float:
    """`radius` itself. Raises InputError (exit code 2) where it is no distance."""
    if not 0 <= radius <= float(np.finfo(np.float32).max):
        raise InputError(f"{name} must be a number of 0 or more, not {radius}", exit_code=2)
    return radius


@jax.jit
def _scaled_latents(posterior: Posterior, eps, std_scale):
    return posterior.at(eps, std_scale)


@partial(jax.jit, static_argnums=(1, 2))
def _normal_rows(key: jax.Array, rows: int, latent_size: int):
    keys = jax.vmap(jax.random.fold_in, (None, 0))(key, jnp.arange(rows))
    return jax.vmap(lambda k: jax.random.normal(k, (latent_size,)))(keys)


def _purpose_key(seed: int, purpose: str) -> jax.Array:
    """A key for one purpose of a seed, so that the latent's noise and the tokens' draws share nothing."""
    # A key holds 32 bits of its seed. JAX drops the others of a 64-bit seed too, and stops at larger ones.
    return jax.random.fold_in(jax.random.key(seed % 2**32), ["latent", "draw"].index(purpose))


def _check_texts(texts: Sequence[str]) -> list[str]:
    if isinstance(texts, str):
        raise TypeError("give a list of texts, not one text")
    texts = list(texts)
    for text in texts:
        if not isinstance(text, str):
            raise TypeError(f"a text must be a string, not a {type(text).__name__}")
    return texts
