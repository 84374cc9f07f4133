"""Decoding with cached keys and values: one compiled loop for a whole batch."""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int

from davae_jax.inference.sampling import count_ids, filter_logits, penalized_log_probs
from davae_jax.model.attention import causal_mask
from davae_jax.model.davae import merge
from davae_jax.model.decoder import Decoder, DecoderLayer

KeyValueCache = list[tuple[Array, Array]]  # keys and values [B, N, K, H] of each layer


@partial(jax.jit, static_argnames=("graphdef", "mode", "prefill"))
def run_decoding_loop(
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
    r_layers = all_relative_keys(decoder, C)
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
        drawn = choose_next_ids(decoder.logits(final[:, 0]), counts, keys, position, settings, mode)
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
    decoder: Decoder,
    ids: Int[Array, "B T"],
    latent_term: Float[Array, "B 1 D"] | float,
    cache: KeyValueCache,
    relative_keys: list[Float[Array, "N 2C H"]],
    position: Int[Array, ""] | int,
) -> tuple[Float[Array, "B T D"], KeyValueCache]:
    """Reads T tokens, the first of which stands at `position`. Returns the final hidden states and the filled cache.

    relative_keys: of each layer, from `all_relative_keys`.
    """
    T, C = ids.shape[1], cache[0][0].shape[2]
    mask = causal_mask(T, C, offset=position)

    def apply_layer(i: int, layer: DecoderLayer, x: Float[Array, "B T D"]):
        # Column j of the cache is at the distance position + T − 1 − j from the last of the T queries.
        r_NKH = lax.dynamic_slice_in_dim(relative_keys[i], C - T - position, C, axis=1)
        biases = decoder.r_w_bias[...], decoder.r_r_bias[...]
        return layer(x, r_NKH, *biases, mask, cache=cache[i], position=position)

    output, cache = decoder.apply_layers(ids, latent_term, apply_layer)
    return output.final, cache


def all_relative_keys(decoder: Decoder, capacity: int) -> list[Float[Array, "N 2C H"]]:
    """r of the distances C−1 … −C for each layer; the negative ones are filler for columns not yet written."""
    features = decoder.position_features(jnp.arange(capacity - 1, -capacity - 1, -1))
    return [layer.relative_keys(features) for layer in decoder.layers]


def empty_cache(decoder: Decoder, batch: int, capacity: int) -> KeyValueCache:
    heads, width = decoder.r_w_bias.shape
    shape = (batch, heads, capacity, width)
    dtype = decoder.layers[0].dtype
    return [(jnp.zeros(shape, dtype), jnp.zeros(shape, dtype)) for _ in decoder.layers]


def choose_next_ids(logits: Float[Array, "B V"], counts, keys, position, settings: dict, mode: str) -> Int[Array, "B"]:
    """The next id of each row. Greedy is top_k 1: only the best id is left, so no other setting matters."""
    if mode == "greedy":
        return jnp.argmax(logits, axis=-1).astype(jnp.int32)
    logits = logits / settings["temperature"]
    if mode == "filtered":
        logits = filter_logits(logits, settings["top_k"], settings["top_p"])
    log_probs = penalized_log_probs(logits, counts, settings["repetition_penalty"])
    step_keys = jax.vmap(jax.random.fold_in, (0, None))(keys, position)
    return jax.vmap(jax.random.categorical)(step_keys, log_probs).astype(jnp.int32)
