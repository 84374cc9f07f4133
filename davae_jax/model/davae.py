"""DAVAE: encoder, decoder and discriminator as one Flax NNX module, and its weights as a nested dict of arrays."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Int

from davae_jax.model import stack
from davae_jax.model.config import DAVAEConfig
from davae_jax.model.decoder import Decoder, Memory, Window
from davae_jax.model.discriminator import Discriminator
from davae_jax.model.encoder import Encoder
from davae_jax.model.latent import Posterior

# Nested dicts of weights and buffers; a list of layers is a dict with the keys 0, 1, …, a stack one with "stacked".
Params = dict[str, Any]


class DAVAE(nnx.Module):
    """The model. It computes in `dtype` and stores its weights in `param_dtype`.

    `encode`, `decode` and `discriminate` compile once per shape; inside a caller's `jax.jit` they are traced.
    """

    def __init__(self, config: DAVAEConfig, *, rngs: nnx.Rngs, dtype=jnp.float32, param_dtype=jnp.float32):
        kw = dict(rngs=rngs, dtype=jnp.dtype(dtype), param_dtype=jnp.dtype(param_dtype))
        self.config = config
        self.encoder = Encoder(config.encoder, config.latent_size, **kw)
        self.decoder = Decoder(config.decoder, config.latent_size, **kw)
        self.discriminator = Discriminator(config.latent_size, **kw)

    def encode(
        self,
        input_ids: Int[Array, "B S"],
        *,
        embedding_noise: Float[Array, "B S D"] | None = None,
        key: jax.Array | None = None,
    ) -> Posterior:
        """Returns the posterior of each text; id 0 is padding. A key enables dropout.

        Raises:
          ValueError: an id is outside the vocabulary, or the rows are longer than the encoder's positions.
        """
        _check_ids(input_ids, self.config.encoder.vocab_size)
        input_ids = jnp.asarray(input_ids)
        if input_ids.shape[1] > (longest := self.config.encoder.max_position_embeddings):
            raise ValueError(f"input_ids has length {input_ids.shape[1]}, more than the encoder's {longest} positions")
        return _encode(*split(self), input_ids, embedding_noise, key)

    def decode(
        self,
        input_ids: Int[Array, "B T"],
        latent: Float[Array, "B L"] | None,
        *,
        memory: Memory | None = None,
        window: Window = None,
        key: jax.Array | None = None,
    ) -> tuple[Float[Array, "B T V"], Memory]:
        """Returns float32 logits of each next token, and the memory to pass with the tokens that follow.

        Args:
          latent: one per row, or None for a plain language model.
          memory: the memory that the last call returned, or None at the beginning of a text.
          window: None for the full mask, "published" for the T most recent keys.
          key: enables dropout.

        Raises:
          ValueError: an id is outside the vocabulary, or `window` is neither of the two.
        """
        if window not in (None, "published"):
            raise ValueError(f'window must be None or "published", not {window!r}')
        _check_ids(input_ids, self.config.decoder.vocab_size)
        input_ids = jnp.asarray(input_ids)
        capacity = self.decoder.memory_capacity(memory, input_ids.shape[1])
        return _decode(*split(self), input_ids, latent, memory, window, capacity, key)

    def empty_memory(self, batch: int) -> Memory:
        """Returns a memory of length 0 and of the largest shape, the first carry of a `lax.scan` over segments.

        Outside of a scan it is not needed: with memory=None `decode` begins with a small one and enlarges it.
        """
        return self.decoder.empty_memory(batch)

    def discriminate(self, latent: Float[Array, "B L"]) -> Float[Array, "B"]:
        """Returns logits: above 0 for "drawn from the prior", below 0 for "from the encoder"."""
        return _discriminate(*split(self), jnp.asarray(latent))


@partial(jax.jit, static_argnums=0)
def _encode(graphdef, params, ids, embedding_noise, key):
    output = merge(graphdef, params).encoder(ids, embedding_noise, key)
    return output.posterior


@partial(jax.jit, static_argnums=(0, 5, 6))
def _decode(graphdef, params, ids, latent, memory, window, capacity, key):
    decoder = merge(graphdef, params).decoder
    output = decoder(ids, latent, memory, window, key)
    return decoder.logits(output.final), decoder.extend_memory(memory, output.hidden, capacity)


@partial(jax.jit, static_argnums=0)
def _discriminate(graphdef, params, latent):
    return merge(graphdef, params).discriminator(latent)


def _check_ids(ids, vocab_size: int) -> None:
    """Raises ValueError for ids outside the vocabulary, for which JAX would read NaN from the embedding table.

    JAX arrays are not checked, because that would wait for the device.
    """
    if isinstance(ids, jax.Array):
        return
    if (ids := np.asarray(ids)).size and not (ids.min() >= 0 and ids.max() < vocab_size):
        raise ValueError(f"input_ids contains ids from {ids.min()} to {ids.max()}; the vocabulary size is {vocab_size}")


def split(model: nnx.Module) -> tuple[nnx.GraphDef, Params]:
    """Returns the model's structure, which is hashable, and its weights and buffers as a nested dict of arrays.

    Only the nested dict passes through `jit` boundaries and into checkpoints.
    """
    graphdef, state = nnx.split(model)
    return graphdef, nnx.to_pure_dict(state)


def merge(graphdef: nnx.GraphDef, params: Params) -> DAVAE:
    """Returns the model of a structure and params: the inverse of `split`."""
    return nnx.merge(graphdef, params)


class InitKeys:
    """Generates the same keys as `nnx.Rngs(key)`, whose traced counter makes tracing quadratic in the weights."""

    def __init__(self, key: jax.Array):
        self.key, self.count = key, 0

    def params(self) -> jax.Array:
        self.count += 1
        return jax.random.fold_in(self.key, self.count - 1)


def abstract_model(config: DAVAEConfig, *, dtype=jnp.float32, param_dtype=jnp.float32) -> DAVAE:
    """Returns the model with `jax.ShapeDtypeStruct`s in place of arrays: nothing is allocated or initialized."""
    return nnx.eval_shape(lambda: DAVAE(config, rngs=InitKeys(jax.random.key(0)), dtype=dtype, param_dtype=param_dtype))


def abstract_training_model(config: DAVAEConfig, *, dtype=jnp.float32) -> DAVAE:
    """Returns the abstract model that a training step compiles, in which many layers are one stack (`model.stack`)."""
    model = abstract_model(config, dtype=dtype)
    for half in (model.encoder, model.decoder):
        if len(half.layers) > stack.SCAN_ABOVE:
            half.layers = stack.Stack(half.layers)
    return model


def weight_axes(model: nnx.Module) -> Params:
    """Returns the logical axis names of each weight and buffer, in the layout of the params."""
    return _map_variables(lambda variable: variable.get_metadata("axes"), model)


def trainable_mask(model: nnx.Module) -> Params:
    """Returns, in the layout of the params, True for each weight (`nnx.Param`) and False for each `Buffer`.

    The params contain both, and so do the optimizer's moments and the checkpoints. Only the type of a variable says
    whether it is trained.
    """
    return _map_variables(lambda variable: isinstance(variable, nnx.Param), model)


def zero_buffers(trainable: Params, updates: Params) -> Params:
    """Returns gradients or updates in the layout of the params, with zeros for everything that is not trained.

    trainable: from `trainable_mask`.
    updates: None for weights that have none.
    """
    zero_unless = lambda is_trained, x: x if is_trained or x is None else jnp.zeros_like(x)  # noqa: E731
    return jax.tree.map(zero_unless, trainable, updates)


def _map_variables(function: Callable[[nnx.Variable], Any], model: nnx.Module) -> Params:
    """Returns the function's value for each variable of a module, in the layout of the params."""
    state = nnx.state(model)
    is_variable = lambda x: isinstance(x, nnx.Variable)  # noqa: E731
    return nnx.to_pure_dict(jax.tree.map(lambda v: v.replace(function(v)), state, is_leaf=is_variable))
