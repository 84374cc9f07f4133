"""Adds noise to the encoder's input: to the tokens, and to the embeddings (one of the model card's five techniques)."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int

from davae_jax.model.layers import Segments
from davae_jax.training.config import NoiseConfig


def token_noise(
    ids: Int[Array, "B S"],
    special: Bool[Array, "B S"],
    config: NoiseConfig,
    vocab_size: int,
    key: jax.Array,
    segments: Segments | None = None,
) -> Int[Array, "B S"]:
    """Drops, substitutes and shuffles tokens (Shen et al. 2020, "Educating Text Autoencoders", section 3).

    Args:
      ids: padded with 0.
      special: the tokens [CLS] and [SEP] at a text's beginning and end; their values and positions do not change.
      vocab_size: substitutes are uniform over the ids 1 … vocab_size − 1.
      segments: the texts of each row, if rows contain several texts; tokens stay within their text.
    """
    if not (config.drop or config.substitute or config.shuffle):
        return ids
    S = ids.shape[1]
    key_drop, key_replace, key_substitute, key_shuffle = jax.random.split(key, 4)
    is_word = (ids > 0) & ~special
    dropped = is_word & jax.random.bernoulli(key_drop, config.drop, ids.shape)
    replaced = is_word & jax.random.bernoulli(key_replace, config.substitute, ids.shape)
    ids = jnp.where(replaced, jax.random.randint(key_substitute, ids.shape, 1, vocab_size), ids)

    shift = jax.random.uniform(key_shuffle, ids.shape) * (config.shuffle + 1)
    position = jnp.arange(S) + jnp.where(is_word, shift, 0.0)
    # Special tokens after the words stay after them: they are moved past every position that a word can reach.
    if segments is None:
        follows_words = jnp.arange(S) >= jnp.argmax(is_word, axis=1)[:, None]
    else:
        last_word = lax.cummax(jnp.where(is_word, jnp.arange(S), -1), axis=1)
        follows_words = last_word >= jnp.arange(S) - segments.positions()
    follows_words &= ~is_word
    position = jnp.where(follows_words, position + S + config.shuffle + 1, position)
    position = jnp.where(dropped | (ids == 0), jnp.inf, position)
    if segments is None:
        order = jnp.argsort(position, axis=1, stable=True)
    else:
        text = jnp.where(segments.segment_ids > 0, segments.segment_ids, S + 1)
        order = jnp.lexsort((position, text), axis=1)
    return jnp.take_along_axis(jnp.where(dropped, 0, ids), order, axis=1)


def embedding_noise(key: jax.Array, shape: tuple[int, int, int], config: NoiseConfig) -> Float[Array, "B S D"] | None:
    """Returns N(0, σ²) noise for every embedding, or None if σ is 0."""
    return config.embedding * jax.random.normal(key, shape) if config.embedding else None
