"""Generates token ids: checks a request, pads it to the size of a compiled program, and runs the decoding loop."""

from __future__ import annotations

from collections.abc import Sequence

import jax
import numpy as np
from jaxtyping import Array, Float

from davae_jax.inference.decoding import DecodingBatch, run_decoding_loop, sampling_mode
from davae_jax.inference.sampling import canonical_settings
from davae_jax.model.config import DAVAEConfig, check_sampling
from davae_jax.model.davae import DAVAE, split
from davae_jax.parallel.sharding import shard_batch
from davae_jax.utils.errors import InputError, OptionError
from davae_jax.utils.shapes import power_of_two

LENGTH_LIMIT = 1 << 16  # tokens per text; the keys and values of longer ones would exceed any machine's memory


class NotFiniteError(InputError):
    """A model whose weights are finite computes NaN or infinity: a few of them are huge, or a latent is."""

    def __init__(self, source: str = "the model"):
        super().__init__(f"{source}: computes NaN or infinity; are its weights damaged, or is a latent far from 0?")


def generate(
    model: DAVAE,
    latent: Float[Array, "B L"] | None,
    prompts: Sequence[Sequence[int]] | None = None,
    *,
    max_length: int | None = None,
    temperature: float | None = None,
    top_k: int | None = None,
    top_p: float | None = None,
    repetition_penalty: float | None = None,
    key: jax.Array | None = None,
    first_row: int = 0,
) -> list[list[int]]:
    """Continues each prompt, given its latent.

    Args:
      latent: one row per text; None for a plain language model (prompts are then required).
      prompts: lists of ids, used as they are; None is [bos] for every row.
      max_length: the maximum number of tokens per row, including the prompt. It and the sampling settings default to
        the model's config.
      key: default `jax.random.key(0)`. Row i samples with `fold_in(key, first_row + i)`, so its result does not depend
        on the other rows, and a long list can be generated in several calls.

    Returns:
      A list of ids for each row: prompt and continuation, without the end token.

    Raises:
      InputError: a setting is out of its range, or a prompt is empty, too long, or contains the end token or an id
        outside the vocabulary.
      NotFiniteError: the model computes NaN or infinity, from which any text could be sampled.
    """
    config = model.config
    max_length = config.max_out_length if max_length is None else max_length
    settings = sampling_settings(config, temperature, top_k, top_p, repetition_penalty)
    prompts = _check_request(latent, prompts, max_length, config)
    if not prompts:
        return []

    graphdef, params = split(model)
    batch = _pad_to_bucket(latent, prompts, max_length, config)
    start = min(map(len, prompts)) - 1
    tokens, lengths, finite = run_decoding_loop(
        graphdef,
        params,
        shard_batch(batch, params),  # on a mesh, each device has a shard of the rows and of their cache
        start=start,
        max_length=max_length,
        key=jax.random.key(0) if key is None else key,
        first_row=first_row,
        settings=settings,
        mode=sampling_mode(settings),
        prefill=min(power_of_two(start), batch.tokens.shape[1]) if start else 0,
    )
    if not np.asarray(finite).all():
        raise NotFiniteError
    rows = zip(np.asarray(tokens), np.asarray(lengths), strict=True)
    return [ids[:length].tolist() for _, (ids, length) in zip(prompts, rows, strict=False)]


def sampling_settings(config: DAVAEConfig, temperature=None, top_k=None, top_p=None, repetition_penalty=None) -> dict:
    """Returns the four sampling settings, with the config's value in place of None.

    Raises:
      InputError: a setting is out of its range.
    """
    given = dict(temperature=temperature, top_k=top_k, top_p=top_p, repetition_penalty=repetition_penalty)
    settings = {name: getattr(config, name) if value is None else value for name, value in given.items()}
    check_sampling(**settings)
    return canonical_settings(**settings)


def check_max_length(max_length: int) -> None:
    """Raises InputError (exit code 2) if the maximum number of tokens is out of its range."""
    if not 1 <= max_length <= LENGTH_LIMIT:
        raise OptionError("max_length", f"must be 1 to {LENGTH_LIMIT}, not {max_length}")


def check_prompts(prompts: Sequence[Sequence[int]], max_length: int, config: DAVAEConfig) -> None:
    """Raises InputError (exit code 2) for the first prompt that cannot be continued to `max_length` tokens."""
    check_max_length(max_length)
    for row, prompt in enumerate(prompts, 1):
        if not prompt:
            problem = "is empty; it needs at least the beginning-of-text token"
        elif len(prompt) > max_length:
            problem = f"has {len(prompt)} tokens, more than max_length {max_length}"
        elif config.end_token_id in prompt:
            problem = f"contains the end token {config.end_token_id}"
        elif unknown := [i for i in prompt if not 0 <= i < config.decoder.vocab_size]:
            problem = f"contains the id {unknown[0]}, outside the vocabulary of {config.decoder.vocab_size}"
        else:
            continue
        raise OptionError(f"prompt {row}", problem)


def _check_request(latent, prompts, max_length: int, config: DAVAEConfig) -> list[list[int]]:
    """Returns the prompts as lists of ints, or [bos] for each latent if none are given.

    Raises:
      InputError: as `generate` describes, or a latent has the wrong shape or contains values that are not finite.
    """
    if prompts is None:
        if latent is None:
            raise InputError("generate needs a latent, prompts, or both", exit_code=2)
        if np.ndim(latent) != 2:
            raise InputError(
                f"the latent must have shape [n, {config.latent_size}], not {list(np.shape(latent))}", exit_code=2
            )
        prompts = [[config.bos_token_id]] * len(latent)
    prompts = [[int(i) for i in prompt] for prompt in prompts]
    check_prompts(prompts, max_length, config)
    expected = (len(prompts), config.latent_size)
    if latent is not None and np.shape(latent) != expected:
        raise InputError(f"the latent must have shape {list(expected)}, not {list(np.shape(latent))}", exit_code=2)
    if latent is not None and not np.isfinite(latent).all():
        raise InputError("the latent contains NaN or infinity", exit_code=2)
    return prompts


def _pad_to_bucket(latent, prompts: list[list[int]], max_length: int, config: DAVAEConfig) -> DecodingBatch:
    """Returns the batch with its numbers of rows and of columns rounded up to powers of two, as NumPy arrays."""
    n, B, C = len(prompts), power_of_two(len(prompts), least=1), power_of_two(max_length)
    tokens = np.full((B, C), config.bos_token_id, np.int32)
    lengths = np.ones(B, np.int32)
    for row, prompt in enumerate(prompts):
        tokens[row, : len(prompt)] = prompt
        lengths[row] = len(prompt)
    if latent is not None:
        latent = np.concatenate([np.asarray(latent, np.float32), np.zeros((B - n, config.latent_size), np.float32)])
    return DecodingBatch(latent, tokens, lengths, done=np.arange(B) >= n)
