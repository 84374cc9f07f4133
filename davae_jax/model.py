"""DAVAE: encoder, decoder and discriminator as one Flax NNX module, and its states as plain nested dicts."""

from __future__ import annotations

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from davae_jax.config import DAVAEConfig
from davae_jax.decoder import Decoder, Memory, Window
from davae_jax.discriminator import Discriminator
from davae_jax.encoder import Encoder
from davae_jax.latent import Posterior

Params = dict[str, Any]  # nested dicts of arrays; a list of layers is a dict with the keys 0, 1, …


class DAVAE(nnx.Module):
    """The model. `dtype` is what it computes in, `param_dtype` what its weights are kept in.

    Calling `encode`, `decode` or `discriminate` compiles once per shape; inside a caller's `jax.jit` they are traced.
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
        """The posterior of each text; id 0 is padding. A key turns dropout on."""
        return _encode(*split(self), jnp.asarray(input_ids), embedding_noise, key)

    def decode(
        self,
        input_ids: Int[Array, "B T"],
        latent: Float[Array, "B L"] | None,
        *,
        memory: Memory | None = None,
        window: Window = None,
        key: jax.Array | None = None,
    ) -> tuple[Float[Array, "B T V"], Memory]:
        """float32 logits of each next token, and the memory to pass with the tokens that follow.

        latent: [B, L], or None for a plain language model.
        memory: what the last call returned, or None at a text's beginning.
        window: None for the full mask, "published" for the T most recent keys. A key turns dropout on.
        """
        if window not in (None, "published"):
            raise ValueError(f'window must be None or "published", not {window!r}')
        return _decode(*split(self), jnp.asarray(input_ids), latent, memory, window, key)

    def discriminate(self, latent: Float[Array, "B L"]) -> Float[Array, "B"]:
        """Logits: above 0 for "drawn from the prior", below for "from the encoder"."""
        return _discriminate(*split(self), jnp.asarray(latent))


@partial(jax.jit, static_argnums=0)
def _encode(graphdef, params, ids, embedding_noise, key):
    output = merge(graphdef, params).encoder(ids, embedding_noise, key)
    return Posterior(output.mean, output.logvar)


@partial(jax.jit, static_argnums=(0, 5))
def _decode(graphdef, params, ids, latent, memory, window, key):
    decoder = merge(graphdef, params).decoder
    output = decoder(ids, latent, memory, window, key)
    return decoder.logits(output.final), decoder.remember(memory, output.hidden)


@partial(jax.jit, static_argnums=0)
def _discriminate(graphdef, params, latent):
    return merge(graphdef, params).discriminator(latent).astype(jnp.float32)


def split(model: nnx.Module) -> tuple[nnx.GraphDef, Params]:
    """The model as a hashable description and a nested dict of plain arrays, which is what crosses jit and disk."""
    graphdef, state = nnx.split(model)
    return graphdef, nnx.to_pure_dict(state)


def merge(graphdef: nnx.GraphDef, params: Params) -> DAVAE:
    """The inverse of `split`."""
    return nnx.merge(graphdef, params)


def abstract_model(config: DAVAEConfig, *, dtype=jnp.float32, param_dtype=jnp.float32) -> DAVAE:
    """The model with shapes in place of arrays: nothing is allocated or drawn."""
    return nnx.eval_shape(lambda: DAVAE(config, rngs=nnx.Rngs(0), dtype=dtype, param_dtype=param_dtype))


def weight_axes(model: nnx.Module) -> Params:
    """The logical axis names of every weight, in the layout of the params."""
    return nnx.to_pure_dict(jax.tree.map(_axes_of, nnx.state(model), is_leaf=lambda x: isinstance(x, nnx.Variable)))


def _axes_of(variable: nnx.Variable):
    return variable.replace(variable.get_metadata("axes"))
