"""Cached generation: one compiled loop for a whole batch.

Every row begins at position 0, whatever its prompt's length, so all rows share one position. From the shortest prompt's
end on, each step feeds one token a row; a longer prompt's own tokens are forced until it ends. Two quirks of the
published loop are left out on purpose: it overwrites id 127 by 0 in the column where drawing begins, and it stops all
rows when the mass of one is 0.

The loop is compiled per bucket (batch, length and prefill rounded up to powers of two) and per way of choosing a token
(greedy, plain, filtered); the sampling settings themselves, the lengths and the seed are ordinary arguments.
"""

from __future__ import annotations

from collections.abc import Sequence

import jax
import numpy as np
from jaxtyping import Array, Float

from davae_jax.inference.decoding import run_decoding_loop
from davae_jax.inference.sampling import canonical_settings
from davae_jax.model.config import DAVAEConfig, check_sampling
from davae_jax.model.davae import DAVAE, split
from davae_jax.parallel.sharding import shard_batch
from davae_jax.utils.errors import InputError
from davae_jax.utils.shapes import power_of_two

LENGTH_LIMIT = 1 << 16  # tokens of a text; keys and values of more would fill any machine


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
      latent: one row a text; None for a plain language model (prompts are needed then).
      prompts: id lists, taken as given; None is [bos] for every row.
      max_length: in tokens, prompt included. This and the other settings default to the model's config.
      key: default `jax.random.key(0)`. Row i draws from `fold_in(key, first_row + i)`, so what a row draws does not
        depend on the rows beside it, and a long list may be generated in parts.

    Returns:
      A list of ids for each row: prompt and continuation, without the end token.

    Raises:
      InputError: a setting out of its range, or a prompt that is empty, too long, or holds the end token or an
        unknown id.
    """
    config = model.config
    max_length = config.max_out_length if max_length is None else max_length
    settings = sampling_settings(config, temperature, top_k, top_p, repetition_penalty)
    if prompts is None:
        if latent is None:
            raise InputError("generate needs a latent, prompts, or both", exit_code=2)
        if np.ndim(latent) != 2:
            raise InputError(f"the latent is {list(np.shape(latent))}, not [n, {config.latent_size}]", exit_code=2)
        prompts = [[config.bos_token_id]] * len(latent)
    prompts = [[int(i) for i in p] for p in prompts]
    check_prompts(prompts, max_length, config)
    if latent is not None and np.shape(latent) != (len(prompts), config.latent_size):
        raise InputError(
            f"the latent is {list(np.shape(latent))}, not {[len(prompts), config.latent_size]}", exit_code=2
        )
    if latent is not None and not np.isfinite(latent).all():
        raise InputError("the latent holds NaN or infinite values", exit_code=2)
    if not prompts:
        return []

    # Rows added to fill the bucket are finished before they begin.
    n = len(prompts)
    B, C = power_of_two(n, least=1), power_of_two(max_length)
    tokens = np.full((B, C), config.bos_token_id, np.int32)
    lengths = np.ones(B, np.int32)
    for row, prompt in enumerate(prompts):
        tokens[row, : len(prompt)] = prompt
        lengths[row] = len(prompt)
    if latent is not None:
        latent = np.concatenate([np.asarray(latent, np.float32), np.zeros((B - n, config.latent_size), np.float32)])
    start = int(lengths[:n].min()) - 1
    if settings["top_k"] == 1:
        mode = "greedy"
    else:
        mode = "plain" if settings["top_k"] == 0 and settings["top_p"] in (0, 1) else "filtered"

    graphdef, params = split(model)
    # Over a mesh each device has its part of the rows, and with them of the cache.
    latent, tokens, lengths, done = shard_batch((latent, tokens, lengths, np.arange(B) >= n), params)
    tokens, lengths = run_decoding_loop(
        graphdef,
        params,
        latent,
        tokens,
        lengths,
        done=done,
        start=start,
        max_length=max_length,
        key=jax.random.key(0) if key is None else key,
        first_row=first_row,
        settings=settings,
        mode=mode,
        prefill=min(power_of_two(start), C) if start else 0,
    )
    return [ids[:length].tolist() for ids, length in zip(np.asarray(tokens)[:n], np.asarray(lengths)[:n], strict=True)]


def sampling_settings(config: DAVAEConfig, temperature=None, top_k=None, top_p=None, repetition_penalty=None) -> dict:
    """The four settings, each from the config where it is None. Raises InputError on one out of its range."""
    given = dict(temperature=temperature, top_k=top_k, top_p=top_p, repetition_penalty=repetition_penalty)
    settings = {name: getattr(config, name) if value is None else value for name, value in given.items()}
    check_sampling(**settings)
    return canonical_settings(**settings)


def check_max_length(max_length: int) -> None:
    """Raises InputError (exit code 2) on a number of tokens that cannot be."""
    if not 1 <= max_length <= LENGTH_LIMIT:
        raise InputError(f"max_length must be 1 to {LENGTH_LIMIT}, not {max_length}", exit_code=2)


def check_prompts(prompts: Sequence[Sequence[int]], max_length: int, config: DAVAEConfig) -> None:
    """Raises InputError (exit code 2) on the first prompt that cannot be continued."""
    check_max_length(max_length)
    for row, prompt in enumerate(prompts, 1):
        if not prompt:
            problem = "is empty; it needs at least the beginning-of-text token"
        elif len(prompt) > max_length:
            problem = f"has {len(prompt)} tokens, more than max_length {max_length}"
        elif config.end_token_id in prompt:
            problem = f"holds the end token {config.end_token_id}"
        elif bad := [i for i in prompt if not 0 <= i < config.decoder.vocab_size]:
            problem = f"holds the id {bad[0]}, outside the vocabulary of {config.decoder.vocab_size}"
        else:
            continue
        raise InputError(f"prompt {row} {problem}", exit_code=2)
