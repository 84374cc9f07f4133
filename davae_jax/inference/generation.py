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
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float, Int

from davae_jax.inference.sampling import count_ids, filter_logits, penalized_log_probs, traceable
from davae_jax.model.attention import visible_keys
from davae_jax.model.config import DAVAEConfig, check_sampling
from davae_jax.model.davae import DAVAE, merge, split
from davae_jax.model.decoder import Decoder
from davae_jax.parallel.sharding import shard_batch
from davae_jax.utils.errors import InputError, OptionError
from davae_jax.utils.shapes import power_of_two

LONGEST = 1 << 16  # tokens of a text; keys and values of more would fill any machine
Cache = list[tuple[Array, Array]]  # keys and values [B, N, K, H] of each layer


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
    tokens, lengths = _generate(
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
    return traceable(**settings)


def check_max_length(max_length: int) -> None:
    """Raises InputError (exit code 2) on a number of tokens that cannot be."""
    if not 1 <= max_length <= LONGEST:
        raise OptionError("max_length", f"must be 1 to {LONGEST}, not {max_length}")


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
        raise OptionError(f"prompt {row}", problem)


@partial(jax.jit, static_argnames=("graphdef", "mode", "prefill"))
def _generate(
    graphdef,
    params,
    latent,
    tokens,
    prompt_lengths,
    *,
    done,
    start,
    max_length,
    key,
    first_row,
    settings,
    mode,
    prefill,
) -> tuple[Int[Array, "B C"], Int[Array, "B"]]:
    """Fills `tokens` in place of what follows each prompt; returns them with each row's length, end token left out.

    start: the position of the last token that all prompts have. done: rows to leave alone.
    """
    model = merge(graphdef, params)
    decoder, end = model.decoder, model.config.end_token_id
    B, C = tokens.shape
    keys = jax.vmap(jax.random.fold_in, (None, 0))(key, first_row + jnp.arange(B))
    latent_term = decoder.latent_term(latent)
    r_layers = relative_keys(decoder, C)
    cache = empty_cache(decoder, B, C)
    if prefill:
        # Rows of the cache past the shared prompt hold filler; each is written anew before any query sees it.
        _, cache = cached_step(decoder, tokens[:, :prefill], latent_term, cache, r_layers, 0)
    counts = count_ids(tokens, jnp.broadcast_to(jnp.arange(C) <= start, tokens.shape), model.config.decoder.vocab_size)

    def unfinished(state):
        position, _, _, done, _, _ = state
        return (position + 1 < max_length) & ~done.all()

    def step(state):
        position, tokens, lengths, done, counts, cache = state
        current = lax.dynamic_slice_in_dim(tokens, position, 1, axis=1)
        final, cache = cached_step(decoder, current, latent_term, cache, r_layers, position)
        drawn = choose(decoder.logits(final[:, 0]), counts, keys, position, settings, mode)
        following = lax.dynamic_slice_in_dim(tokens, position + 1, 1, axis=1)[:, 0]
        drawn = jnp.where(position + 1 < prompt_lengths, following, drawn)
        tokens = lax.dynamic_update_slice_in_dim(tokens, drawn[:, None], position + 1, axis=1)
        done = done | (drawn == end)
        lengths = jnp.where(done, lengths, jnp.maximum(lengths, position + 2))
        counts = counts.at[jnp.arange(B), drawn].add(1)
        return position + 1, tokens, lengths, done, counts, cache

    state = (jnp.asarray(start), tokens, prompt_lengths, done, counts, cache)
    _, tokens, lengths, _, _, _ = lax.while_loop(unfinished, step, state)
    return tokens, lengths


def cached_step(
    decoder: Decoder, ids: Int[Array, "B T"], latent_term, cache: Cache, r_layers: list[Array], position
) -> tuple[Float[Array, "B T D"], Cache]:
    """Reads T tokens that stand at `position` and after; returns the final hidden states and the filled cache."""
    T, C = ids.shape[1], cache[0][0].shape[2]
    visible = visible_keys(T, C, offset=position)
    x = decoder.embedding(ids) + latent_term
    new_cache = []
    for i, layer in enumerate(decoder.layers):
        with jax.named_scope(f"layer_{i}"):
            # Of all distances, those that the cache's columns have from the last of the T queries.
            r_NKH = lax.dynamic_slice_in_dim(r_layers[i], C - T - position, C, axis=1)
            x, layer_cache = layer(
                x,
                r_NKH,
                decoder.r_w_bias[...],
                decoder.r_r_bias[...],
                visible,
                cache=cache[i],
                position=position,
            )
            x = x + decoder.after_layer(latent_term)
        new_cache.append(layer_cache)
    return decoder.norm(x), new_cache


def relative_keys(decoder: Decoder, capacity: int) -> list[Float[Array, "N 2C H"]]:
    """r of the distances C−1 … −C for each layer; the negative ones are filler for columns not yet written."""
    features = decoder.position_features(jnp.arange(capacity - 1, -capacity - 1, -1))
    return [layer.relative_keys(features) for layer in decoder.layers]


def empty_cache(decoder: Decoder, batch: int, capacity: int) -> Cache:
    heads, width = decoder.r_w_bias.shape
    shape = (batch, heads, capacity, width)
    dtype = decoder.layers[0].dtype
    return [(jnp.zeros(shape, dtype), jnp.zeros(shape, dtype)) for _ in decoder.layers]


def choose(logits: Float[Array, "B V"], counts, keys, position, settings: dict, mode: str) -> Int[Array, "B"]:
    """The next id of each row. Greedy is top_k 1: only the best id is left, so no other setting matters."""
    if mode == "greedy":
        return jnp.argmax(logits, axis=-1).astype(jnp.int32)
    logits = logits / settings["temperature"]
    if mode == "filtered":
        logits = filter_logits(logits, settings["top_k"], settings["top_p"])
    log_probs = penalized_log_probs(logits, counts, settings["repetition_penalty"])
    step_keys = jax.vmap(jax.random.fold_in, (0, None))(keys, position)
    return jax.vmap(jax.random.categorical)(step_keys, log_probs).astype(jnp.int32)
