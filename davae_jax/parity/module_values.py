"""Computes the values of every module in PyTorch and in JAX, from the same inputs and under the same names.

The inputs are random: padded ids of rows of unequal length, noise for the embeddings and for the latent.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from davae_jax.checkpoints.published import torch_file
from davae_jax.checkpoints.published.published_state import checked_name_table, read_published_state
from davae_jax.checkpoints.published.to_torch import published_state
from davae_jax.checkpoints.run_folder import weights_path
from davae_jax.model.attention import causal_mask
from davae_jax.model.config import DAVAEConfig
from davae_jax.model.davae import DAVAE, merge, split
from davae_jax.model.latent import Posterior, kl_per_dimension
from davae_jax.model.losses import adversarial_losses, published_loss
from davae_jax.utils.errors import InputError

Values = dict[str, np.ndarray]  # module → its output in float32; the twin's in the order of computation
Progress = Callable[[str], None]  # called with the name of each stage as it starts

BETA = 0.5  # the KL's weight in the losses compared
NOISE_STD = 0.1  # standard deviation of the embedding noise
NUM_SEGMENTS = 3  # number of segments in which a text is decoded with memory
WINDOWS = {"published mask": "published", "full mask": None}
LOSSES = {
    f"loss, fb_mode {fb_mode}{', length weighted' * weighted}": (fb_mode, weighted)
    for fb_mode in (0, 1, 2)
    for weighted in (True, False)
}
KL_PER_DIM = "KL per dimension"
ADVERSARIAL_LOSSES = "adversarial losses"


class Inputs(NamedTuple):
    """The inputs of both models. Rows have unequal lengths, except those of segment_ids."""

    encoder_ids: np.ndarray  # [B, S], padded with 0
    decoder_ids: np.ndarray  # [B, T], padded with the end token's id, as in the published loss
    segment_ids: np.ndarray  # [B, T], decoded in segments
    noise: np.ndarray  # [B, S, D], added to the encoder's embeddings
    eps: np.ndarray  # [B, L]
    prior: np.ndarray  # [B, L], samples from the prior for the discriminator


def make_inputs(config: DAVAEConfig, batch_size: int, length: int, seed: int) -> Inputs:
    """Samples the inputs; `length` is the length of the first row, which is the longest."""
    rng = np.random.default_rng(seed)
    end = config.end_token_id

    def decoder_ids():  # any ids but the end token's
        ids = rng.integers(0, config.decoder.vocab_size - 1, (batch_size, length), dtype=np.int32)
        return ids + (ids >= end)

    def padded(ids, pad):
        lengths = rng.integers(length // 2, length, batch_size)
        lengths[0] = length
        return np.where(np.arange(length) < lengths[:, None], ids, pad).astype(np.int32)

    def normal(*shape):
        return rng.standard_normal((batch_size, *shape), dtype=np.float32)

    return Inputs(
        encoder_ids=padded(rng.integers(1, config.encoder.vocab_size, (batch_size, length)), 0),
        decoder_ids=padded(decoder_ids(), end),
        segment_ids=decoder_ids(),
        noise=NOISE_STD * normal(length, config.encoder.hidden_size),
        eps=normal(config.latent_size),
        prior=normal(config.latent_size),
    )


# PyTorch


def twin_values(
    folder: Path,
    config: DAVAEConfig,
    inputs: Inputs,
    gradients: Path | None = None,
    report_progress: Progress = lambda name: None,
) -> Values:
    """Returns the values of the PyTorch twin, and writes each tensor's gradient to `gradients`/PUBLISHED_NAME.npy.

    Raises:
      InputError: PyTorch is not installed, or the folder's weights do not fit the config.
    """
    try:
        import torch
    except ImportError:
        raise InputError("the comparison needs PyTorch: pip install 'davae-jax[torch]'") from None
    from davae_jax.parity.twin import build_twin, kl_per_dim

    report_progress("PyTorch: weights")
    twin = build_twin(config.to_dict(), _published_arrays(folder, config))
    b = Inputs(*(torch.from_numpy(x.astype(np.int64) if x.dtype == np.int32 else x) for x in inputs))

    def decode(ids, memory, window):
        decoded = twin.decode(ids, latent, memory, window)
        return decoded.logits, decoded.memory

    with torch.no_grad():
        report_progress("PyTorch: states")
        encoded = twin.encode(b.encoder_ids, b.noise)
        latent = encoded.mean + b.eps * (encoded.logvar / 2).exp()
        decoded = twin.decode(b.decoder_ids, latent)
        values = _state_values(encoded, latent, decoded, decoded.logits)
        report_progress("PyTorch: memory")
        values |= _segment_values(decode, b.segment_ids.tensor_split(NUM_SEGMENTS, dim=1), torch.stack)
        report_progress("PyTorch: losses")
        values["discriminator"] = twin.discriminate(latent)
        values[KL_PER_DIM] = kl_per_dim(*twin.encode(b.encoder_ids)[:2])
        values[ADVERSARIAL_LOSSES] = torch.stack(twin.adversarial_losses(latent, b.prior))
        for name, (fb_mode, weighted) in LOSSES.items():
            losses = twin.published_loss(b.encoder_ids, b.decoder_ids, b.eps, BETA, fb_mode, weighted)
            values[name] = torch.stack(losses)
    if gradients:
        report_progress("PyTorch: gradients")
        mean, logvar, *_ = twin.encode(b.encoder_ids)
        total = twin.published_loss(b.encoder_ids, b.decoder_ids, b.eps, BETA, 0, True)[2]
        loss_d, loss_g = twin.adversarial_losses(mean + b.eps * (logvar / 2).exp(), b.prior)
        (total + loss_d + loss_g).backward()
        for name, parameter in twin.named_parameters():
            np.save(gradients / f"{name}.npy", parameter.grad.numpy())
            parameter.grad = None
    return {name: value.numpy() for name, value in values.items()}


def _published_arrays(folder: Path, config: DAVAEConfig) -> dict[str, np.ndarray]:
    """Returns the weights of a converted checkpoint or a published folder by their published names."""
    if weights_path(folder):
        return published_state(folder, config, np.dtype(np.float32))
    state = read_published_state(folder)
    checked_name_table(state, config, torch_file.find_weights_file(folder))
    return state


# Both sides


def _state_values(encoded, latent, decoded, logits) -> dict:
    """Names the values of one pass through encoder and decoder."""
    return {
        "encoder embeddings": encoded.hidden[0],
        **{f"encoder layer {i}": h for i, h in enumerate(encoded.hidden[1:])},
        "pooled": encoded.pooled,
        "posterior mean": encoded.mean,
        "posterior logvar": encoded.logvar,
        "latent": latent,
        "decoder input": decoded.hidden[0],
        **{f"decoder layer {i}": h for i, h in enumerate(decoded.hidden[1:])},
        "final norm": decoded.final,
        "logits": logits,
    }


def _segment_values(decode: Callable, segments: Sequence, stack: Callable) -> dict:
    """Returns the logits of each segment and the memory after the last one.

    Args:
      decode: called with (ids, memory, window), returns (logits, memory).
      stack: makes one array of a memory.
    """
    logits, first_memory = decode(segments[0], None, None)
    values = {"segment 0": logits}
    for mask, window in WINDOWS.items():
        memory = first_memory
        for i, ids in enumerate(segments[1:], 1):
            values[f"segment {i}, {mask}"], memory = decode(ids, memory, window)
        values[f"memory, {mask}"] = stack(memory)
    return values


# JAX


def jax_values(model: DAVAE, b: Inputs, report_progress: Progress) -> Values:
    """Returns the values of the JAX model, end to end."""
    report_progress("JAX: states")
    values = dict(_jax_states(*split(model), b))
    latent = values["latent"]

    def decode(ids, memory, window):
        return model.decode(ids, latent, memory=memory, window=window)

    def stack(memory):
        return jnp.stack(memory.hidden)[:, :, memory.capacity - int(memory.length) :]

    report_progress("JAX: memory")
    values |= _segment_values(decode, np.array_split(b.segment_ids, NUM_SEGMENTS, axis=1), stack)
    report_progress("JAX: losses")
    values["discriminator"] = model.discriminate(latent)
    values[KL_PER_DIM] = kl_per_dimension(model.encode(b.encoder_ids))
    values[ADVERSARIAL_LOSSES] = jnp.stack(adversarial_losses(model, latent, b.prior))
    values |= _jax_losses(*split(model), b)
    return {name: np.asarray(value, np.float32) for name, value in values.items()}


@partial(jax.jit, static_argnums=0)
def _jax_states(graphdef, params, b: Inputs):
    model = merge(graphdef, params)
    encoded = model.encoder(b.encoder_ids, b.noise)
    latent = encoded.posterior.at(b.eps)
    decoded = model.decoder(b.decoder_ids, latent)
    return _state_values(encoded, latent, decoded, model.decoder.logits(decoded.final))


@partial(jax.jit, static_argnums=0)
def _jax_losses(graphdef, params, b: Inputs):
    # One program for all losses: the compiler merges their common parts.
    return {name: jnp.stack(_jax_loss(merge(graphdef, params), b, *settings)) for name, settings in LOSSES.items()}


@partial(jax.jit, static_argnums=0)
def jax_gradients(graphdef, params, b: Inputs):
    """Returns the gradients of the published loss plus both adversarial losses, which depends on every weight.

    With fb_mode 0 no dimension's KL is masked, so that rounding cannot change a mask.
    """

    def total(params):
        model = merge(graphdef, params)
        encoded = model.encoder(b.encoder_ids)
        latent = encoded.posterior.at(b.eps)
        return _jax_loss(model, b, 0, True)[2] + sum(adversarial_losses(model, latent, b.prior))

    return jax.grad(total)(params)


def _jax_loss(model, b: Inputs, fb_mode: int, weighted: bool):
    return published_loss(
        model, b.encoder_ids, b.decoder_ids, eps=b.eps, beta=BETA, fb_mode=fb_mode, length_weighted=weighted
    )


def isolated_jax_values(model: DAVAE, b: Inputs, twin: Values, dtype: str, report_progress: Progress) -> Values:
    """Returns the values of JAX's modules, each computed from the twin's values. Losses and memory are not included."""
    encoder, decoder = model.encoder, model.decoder
    values = {}

    def twin_value(name):
        return jnp.asarray(twin[name], dtype)

    report_progress("JAX: encoder in isolation")
    score_bias = jnp.where(b.encoder_ids > 0, 0.0, -10000.0)[:, None, None, :]
    x = twin_value("encoder embeddings")
    for i, layer in enumerate(encoder.layers):
        name = f"encoder layer {i}"
        values[name] = _encoder_layer(*split(layer), x, score_bias)
        x = twin_value(name)
    values["pooled"] = jnp.tanh(encoder.pooler(x[:, 0]))
    posterior = encoder.posterior(twin_value("pooled")).astype(jnp.float32)
    values["posterior mean"], values["posterior logvar"] = jnp.split(posterior, 2, axis=-1)
    values["latent"] = Posterior(twin["posterior mean"], twin["posterior logvar"]).at(b.eps)

    report_progress("JAX: decoder in isolation")
    T = b.decoder_ids.shape[1]
    latent_term = decoder.latent_term(twin["latent"])
    features, visible = decoder.position_features(jnp.arange(T - 1, -1, -1)), causal_mask(T, T, offset=0)
    shared = features, decoder.r_w_bias[...], decoder.r_r_bias[...], visible, decoder.post_layer_term(latent_term)
    values["decoder input"] = decoder.embedding(b.decoder_ids) + latent_term
    x = twin_value("decoder input")
    for i, layer in enumerate(decoder.layers):
        name = f"decoder layer {i}"
        values[name] = _decoder_layer(*split(layer), x, *shared)
        x = twin_value(name)
    values["final norm"] = decoder.norm(x)
    values["logits"] = decoder.logits(twin_value("final norm"))
    values["discriminator"] = model.discriminate(twin["latent"])
    values[ADVERSARIAL_LOSSES] = jnp.stack(adversarial_losses(model, jnp.asarray(twin["latent"]), b.prior))
    return {name: np.asarray(value, np.float32) for name, value in values.items()}


# The weights are arguments and all layers have the same shapes, so that each of the two functions compiles once.


@partial(jax.jit, static_argnums=0)
def _encoder_layer(graphdef, params, x, score_bias):
    return nnx.merge(graphdef, params)(x, score_bias)


@partial(jax.jit, static_argnums=0)
def _decoder_layer(graphdef, params, x, features, r_w_bias, r_r_bias, visible, latent_term):
    layer = nnx.merge(graphdef, params)
    return layer(x, layer.relative_keys(features), r_w_bias, r_r_bias, visible)[0] + latent_term
