"""Decodes a batch with a cache: one compiled loop, which computes one token of every row per step.

Every row begins at position 0, independently of the length of its prompt, so all rows share one position. From the end
of the shortest prompt on, each step reads one token of every row; in a row with a longer prompt, the prompt's own token
replaces the sampled one until the prompt ends. Two behaviours of the published loop are not reproduced: it overwrites
id 127 by 0 in the first generated column, and it stops all rows when the probability mass of one of them is 0.

The loop is compiled once per bucket (batch size, length and prefill, each rounded up to a power of two) and per
`SamplingMode`. The sampling settings, the lengths and the key are ordinary arguments.
"""

from __future__ import annotations

import dataclasses
from functools import partial
from typing import Any, Literal

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax
from jaxtyping import Array, Bool, Float, Int

from davae_jax.inference.sampling import count_ids, filter_logits, penalized_log_probs
from davae_jax.model.attention import causal_mask
from davae_jax.model.davae import Params, merge
from davae_jax.model.decoder import Decoder, DecoderLayer

KeyValueCache = list[tuple[Array, Array]]  # keys and values [B, N, C, H] of each layer, C the capacity in tokens
SamplingMode = Literal["greedy", "plain", "filtered"]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class DecodingBatch:
    """The prompts and latents of a batch, padded to the size that the loop is compiled for.

    latent: one row per text; None for a plain language model.
    tokens: the prompts, each at the beginning of its row. C is the capacity in tokens, at least max_length.
    prompt_lengths: the number of tokens of each prompt, at least 1.
    done: True in rows that only fill up the batch; nothing is generated there.
    """

    latent: Float[Array, "B L"] | None
    tokens: Int[Array, "B C"]
    prompt_lengths: Int[Array, "B"]
    done: Bool[Array, "B"]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class DecodingState:
    """The state that the decoding loop carries from step to step.

    position: the column of `tokens` that the next step reads; every column up to it is known. It is shared by all rows.
    tokens: prompts and generated ids. Columns after `position` contain the rest of longer prompts, or filler.
    lengths: the number of ids of each row's result: prompt and continuation, without the end token.
    done: True in rows whose end token has been sampled, and in rows that only fill up the batch.
    finite: False in rows for which the model has computed NaN or infinity before they were done.
    counts: how often each id occurs in columns 0 to `position` of a row, for the repetition penalty.
    cache: keys and values of each layer for columns 0 to `position` − 1. Later columns contain filler, which no query
      sees before the step that overwrites it.
    """

    position: Int[Array, ""]
    tokens: Int[Array, "B C"]
    lengths: Int[Array, "B"]
    done: Bool[Array, "B"]
    finite: Bool[Array, "B"]
    counts: Float[Array, "B V"]
    cache: KeyValueCache


@partial(jax.jit, static_argnames=("graphdef", "mode", "prefill"))
def run_decoding_loop(
    graphdef: nnx.GraphDef,
    params: Params,
    batch: DecodingBatch,
    *,
    start: Int[Array, ""] | int,
    max_length: Int[Array, ""] | int,
    key: jax.Array,
    first_row: Int[Array, ""] | int,
    settings: dict[str, Any],
    mode: SamplingMode,
    prefill: int,
) -> tuple[Int[Array, "B C"], Int[Array, "B"], Bool[Array, "B"]]:
    """Continues the prompts of a batch.

    Args:
      start: the position at which the loop begins: the last one that all prompts contain.
      max_length: the maximum number of tokens per row, including the prompt.
      key: row i samples with `fold_in(key, first_row + i)`.
      settings: temperature, top_k, top_p and repetition_penalty.
      prefill: the number of columns, at least `start`, that are read at once before the loop; 0 is off.

    Returns:
      The ids, the number of ids of each row's result, and whether all logits of each row were finite.
    """
    model = merge(graphdef, params)
    decoder = model.decoder
    B, C = batch.tokens.shape
    keys = jax.vmap(jax.random.fold_in, (None, 0))(key, first_row + jnp.arange(B))
    latent_term = decoder.latent_term(batch.latent)
    relative_keys = all_relative_keys(decoder, C)

    def unfinished(state: DecodingState) -> Bool[Array, ""]:
        return (state.position + 1 < max_length) & ~state.done.all()

    def step(state: DecodingState) -> DecodingState:
        position = state.position
        current = lax.dynamic_slice_in_dim(state.tokens, position, 1, axis=1)
        final, cache = cached_step(decoder, current, latent_term, state.cache, relative_keys, position)
        logits = decoder.logits(final[:, 0])
        finite = state.finite & (state.done | jnp.isfinite(logits).all(-1))
        sampled = choose_next_ids(logits, state.counts, keys, position, settings, mode)
        prompt_ids = lax.dynamic_slice_in_dim(state.tokens, position + 1, 1, axis=1)[:, 0]
        next_ids = jnp.where(position + 1 < batch.prompt_lengths, prompt_ids, sampled)
        tokens = lax.dynamic_update_slice_in_dim(state.tokens, next_ids[:, None], position + 1, axis=1)
        done = state.done | (next_ids == model.config.end_token_id)
        lengths = jnp.where(done, state.lengths, jnp.maximum(state.lengths, position + 2))
        counts = state.counts.at[jnp.arange(B), next_ids].add(1)
        return DecodingState(position + 1, tokens, lengths, done, finite, counts, cache)

    cache = empty_cache(decoder, B, C)
    if prefill:
        _, cache = cached_step(decoder, batch.tokens[:, :prefill], latent_term, cache, relative_keys, 0)
    is_known = jnp.broadcast_to(jnp.arange(C) <= start, batch.tokens.shape)
    counts = count_ids(batch.tokens, is_known, model.config.decoder.vocab_size)
    finite = jnp.ones_like(batch.done)
    state = DecodingState(jnp.asarray(start), batch.tokens, batch.prompt_lengths, batch.done, finite, counts, cache)
    state = lax.while_loop(unfinished, step, state)
    return state.tokens, state.lengths, state.finite


def cached_step(
    decoder: Decoder,
    ids: Int[Array, "B T"],
    latent_term: Float[Array, "B 1 D"] | float,
    cache: KeyValueCache,
    relative_keys: list[Float[Array, "N 2C H"]],
    position: Int[Array, ""] | int,
) -> tuple[Float[Array, "B T D"], KeyValueCache]:
    """Reads T tokens, the first of which is at `position`. Returns the final hidden states and the filled cache.

    relative_keys: the result of `all_relative_keys`.
    """
    T, C = ids.shape[1], cache[0][0].shape[2]
    mask = causal_mask(T, C, offset=position)

    def apply_layer(layer: DecoderLayer, x: Float[Array, "B T D"], inputs):
        r_N2CH, layer_cache = inputs
        # Column j of the cache is at the distance position + T − 1 − j from the last of the T queries.
        r_NKH = lax.dynamic_slice_in_dim(r_N2CH, C - T - position, C, axis=1)
        biases = decoder.r_w_bias[...], decoder.r_r_bias[...]
        return layer(x, r_NKH, *biases, mask, cache=layer_cache, position=position)

    output, cache = decoder.apply_layers(ids, latent_term, apply_layer, list(zip(relative_keys, cache, strict=True)))
    return output.final, cache


def all_relative_keys(decoder: Decoder, capacity: int) -> list[Float[Array, "N 2C H"]]:
    """Returns r of the distances C−1, C−2, …, −C for each layer; those of negative distances are filler.

    They depend on no data, so they are computed once, before the loop.
    """
    features = decoder.position_features(jnp.arange(capacity - 1, -capacity - 1, -1))
    return [layer.relative_keys(features) for layer in decoder.layers]


def empty_cache(decoder: Decoder, batch_size: int, capacity: int) -> KeyValueCache:
    """Returns a cache of zeros for `capacity` tokens of each row."""
    num_heads, head_width = decoder.r_w_bias.shape
    shape = (batch_size, num_heads, capacity, head_width)
    dtype = decoder.layers[0].dtype
    return [(jnp.zeros(shape, dtype), jnp.zeros(shape, dtype)) for _ in decoder.layers]


def sampling_mode(settings: dict[str, Any]) -> SamplingMode:
    """Returns the cheapest mode that implements the settings."""
    if settings["top_k"] == 1:
        return "greedy"
    return "plain" if settings["top_k"] == 0 and settings["top_p"] in (0, 1) else "filtered"


def choose_next_ids(
    logits: Float[Array, "B V"],
    counts: Float[Array, "B V"],
    keys: Array,
    position: Int[Array, ""],
    settings: dict[str, Any],
    mode: SamplingMode,
) -> Int[Array, "B"]:
    """Returns the next id of each row.

    Args:
      counts: how often each id occurs in the row so far.
      keys: a key for each row.
      mode: "greedy" is top_k 1, which leaves only the most likely id, so that no other setting matters; "plain" samples
        from all ids; "filtered" applies top-k and nucleus filtering first.
    """
    if mode == "greedy":
        return jnp.argmax(logits, axis=-1).astype(jnp.int32)
    logits = logits / settings["temperature"]
    if mode == "filtered":
        logits = filter_logits(logits, settings["top_k"], settings["top_p"])
    log_probs = penalized_log_probs(logits, counts, settings["repetition_penalty"])
    step_keys = jax.vmap(jax.random.fold_in, (0, None))(keys, position)
    return jax.vmap(jax.random.categorical)(step_keys, log_probs).astype(jnp.int32)
