"""What PyTorch and JAX compute from the same inputs, module by module and under the same names, for `parity.py`.

The inputs are seeded random ids, rows of unequal length and padded, noise for the embeddings and for the latent.
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

from davae_jax.checkpoints import torch_file
from davae_jax.checkpoints.published_state import checked_name_table, read_published_state
from davae_jax.checkpoints.run_folder import weights_path
from davae_jax.checkpoints.to_torch import published_state
from davae_jax.model.attention import visible_keys
from davae_jax.model.config import DAVAEConfig
from davae_jax.model.davae import DAVAE, merge, split
from davae_jax.model.latent import Posterior, kl_per_dimension
from davae_jax.model.losses import adversarial_losses, published_loss
from davae_jax.utils.errors import InputError

Values = dict[str, np.ndarray]  # module → what it computes, float32; the twin's are in the order of computation
Progress = Callable[[str], None]  # told what begins

BETA = 0.5  # the KL's weight in the losses compared
NOISE_STD = 0.1  # standard deviation of the embedding noise
NUM_SEGMENTS = 3  # the pieces in which a text is read with memory
WINDOWS = {"published mask": "published", "full mask": None}
LOSSES = {
    f"loss, fb_mode {fb_mode}{', length weighted' * weighted}": (fb_mode, weighted)
    for fb_mode in (0, 1, 2)
    for weighted in (True, False)
}
KL_PER_DIM = "KL per dimension"
ADVERSARIAL_LOSSES = "adversarial losses"


class Inputs(NamedTuple):
    """What both sides read. Rows have unequal lengths, those of segment_ids excepted."""

    encoder_ids: np.ndarray  # [B, S], padded with 0
    decoder_ids: np.ndarray  # [B, T], padded with the end token's id, as the published loss has it
    segment_ids: np.ndarray  # [B, T], read in pieces
    noise: np.ndarray  # [B, S, D], added to the encoder's embeddings
    eps: np.ndarray  # [B, L]
    prior: np.ndarray  # [B, L], what the discriminator should take for the prior


def make_inputs(config: DAVAEConfig, batch_size: int, length: int, seed: int) -> Inputs:
    rng = np.random.default_rng(seed)
    end = config.end_token_id

    def decoder_ids():
        ids = rng.integers(0, config.decoder.vocab_size - 1, (batch_size, length), dtype=np.int32)
        return ids + (ids >= end)  # any id but the end token's

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
    folder: Path, config: DAVAEConfig, batch: Inputs, gradients: Path | None = None, step: Progress = lambda name: None
) -> Values:
    """Everything the twin computes. Each tensor's gradient goes to a file in `gradients`, under its published name."""
    try:
        import torch
    except ImportError:
        raise InputError("comparing needs PyTorch: pip install 'davae-jax[torch]'") from None
    from davae_jax.parity.twin import build_twin, kl_per_dim

    step("PyTorch: weights")
    twin = build_twin(config.to_dict(), _published_arrays(folder, config))
    b = Inputs(*(torch.from_numpy(x.astype(np.int64) if x.dtype == np.int32 else x) for x in batch))

    def read(ids, memory, window):
        decoded = twin.decode(ids, latent, memory, window)
        return decoded.logits, decoded.memory

    with torch.no_grad():
        step("PyTorch: states")
        encoded = twin.encode(b.encoder_ids, b.noise)
        latent = encoded.mean + b.eps * (encoded.logvar / 2).exp()
        decoded = twin.decode(b.decoder_ids, latent)
        values = _state_values(encoded, latent, decoded, decoded.logits)
        step("PyTorch: memory")
        values |= _segment_values(read, b.segment_ids.tensor_split(NUM_SEGMENTS, dim=1), torch.stack)
        step("PyTorch: losses")
        values["discriminator"] = twin.discriminate(latent)
        values[KL_PER_DIM] = kl_per_dim(*twin.encode(b.encoder_ids)[:2])
        values[ADVERSARIAL_LOSSES] = torch.stack(twin.adversarial_losses(latent, b.prior))
        for name, (fb_mode, weighted) in LOSSES.items():
            losses = twin.published_loss(b.encoder_ids, b.decoder_ids, b.eps, BETA, fb_mode, weighted)
            values[name] = torch.stack(losses)
    if gradients:
        step("PyTorch: gradients")
        mean, logvar, *_ = twin.encode(b.encoder_ids)
        total = twin.published_loss(b.encoder_ids, b.decoder_ids, b.eps, BETA, 0, True)[2]
        loss_d, loss_g = twin.adversarial_losses(mean + b.eps * (logvar / 2).exp(), b.prior)
        (total + loss_d + loss_g).backward()
        for name, parameter in twin.named_parameters():
            np.save(gradients / f"{name}.npy", parameter.grad.numpy())
            parameter.grad = None
    return {name: value.numpy() for name, value in values.items()}


def _published_arrays(folder: Path, config: DAVAEConfig) -> dict[str, np.ndarray]:
    """The weights under the published names, of a converted checkpoint or a published folder."""
    if weights_path(folder):
        return published_state(folder, config, np.dtype(np.float32))
    state = read_published_state(folder)
    checked_name_table(state, config, torch_file.find_weights_file(folder))
    return state


# Both sides


def _state_values(encoded, latent, decoded, logits) -> dict:
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


def _segment_values(read: Callable, pieces: Sequence, stack: Callable) -> dict:
    """Logits of each piece and the memory at the end. `read(ids, memory, window)` gives logits and the memory."""
    logits, first = read(pieces[0], None, None)
    values = {"segment 0": logits}
    for mask, window in WINDOWS.items():
        memory = first
        for i, ids in enumerate(pieces[1:], 1):
            values[f"segment {i}, {mask}"], memory = read(ids, memory, window)
        values[f"memory, {mask}"] = stack(memory)
    return values


# JAX


def jax_values(model: DAVAE, b: Inputs, step: Progress) -> Values:
    step("JAX: states")
    values = dict(_jax_states(*split(model), b))
    latent = values["latent"]

    def read(ids, memory, window):
        return model.decode(ids, latent, memory=memory, window=window)

    def stack(memory):
        return jnp.stack(memory.hidden)[:, :, memory.capacity - int(memory.length) :]

    step("JAX: memory")
    values |= _segment_values(read, np.array_split(b.segment_ids, NUM_SEGMENTS, axis=1), stack)
    step("JAX: losses")
    values["discriminator"] = model.discriminate(latent)
    values[KL_PER_DIM] = kl_per_dimension(model.encode(b.encoder_ids))
    values[ADVERSARIAL_LOSSES] = jnp.stack(adversarial_losses(model, latent, b.prior))
    values |= _jax_losses(*split(model), b)
    return {name: np.asarray(value, np.float32) for name, value in values.items()}


@partial(jax.jit, static_argnums=0)
def _jax_states(graphdef, params, b: Inputs):
    model = merge(graphdef, params)
    encoded = model.encoder(b.encoder_ids, b.noise)
    latent = Posterior(encoded.mean, encoded.logvar).at(b.eps)
    decoded = model.decoder(b.decoder_ids, latent)
    return _state_values(encoded, latent, decoded, model.decoder.logits(decoded.final))


@partial(jax.jit, static_argnums=0)
def _jax_losses(graphdef, params, b: Inputs):
    # All in one program: the compiler merges what they share.
    return {name: jnp.stack(_jax_loss(merge(graphdef, params), b, *how)) for name, how in LOSSES.items()}


@partial(jax.jit, static_argnums=0)
def jax_gradients(graphdef, params, b: Inputs):
    """Of the published loss and both adversarial ones together, which reach every weight.

    fb_mode 0: no dimension's KL is masked, so none can fall on the other side of the mask.
    """

    def total(params):
        model = merge(graphdef, params)
        encoded = model.encoder(b.encoder_ids)
        latent = Posterior(encoded.mean, encoded.logvar).at(b.eps)
        return _jax_loss(model, b, 0, True)[2] + sum(adversarial_losses(model, latent, b.prior))

    return jax.grad(total)(params)


def _jax_loss(model, b: Inputs, fb_mode: int, weighted: bool):
    how = dict(eps=b.eps, beta=BETA, fb_mode=fb_mode, length_weighted=weighted)
    return published_loss(model, b.encoder_ids, b.decoder_ids, **how)


def isolated_jax_values(model: DAVAE, b: Inputs, twin: Values, dtype: str, step: Progress) -> Values:
    """Each module on the twin's input of that module. The losses and the memory have no such form."""
    encoder, decoder = model.encoder, model.decoder
    values = {}

    def given(name):
        return jnp.asarray(twin[name], dtype)

    step("JAX: encoder in isolation")
    score_bias = jnp.where(b.encoder_ids > 0, 0.0, -10000.0)[:, None, None, :]
    x = given("encoder embeddings")
    for i, layer in enumerate(encoder.layers):
        name = f"encoder layer {i}"
        values[name] = _encoder_layer(*split(layer), x, score_bias)
        x = given(name)
    values["pooled"] = jnp.tanh(encoder.pooler(x[:, 0]))
    posterior = encoder.posterior(given("pooled")).astype(jnp.float32)
    values["posterior mean"], values["posterior logvar"] = jnp.split(posterior, 2, axis=-1)
    values["latent"] = Posterior(twin["posterior mean"], twin["posterior logvar"]).at(b.eps)

    step("JAX: decoder in isolation")
    T = b.decoder_ids.shape[1]
    latent_term = decoder.latent_term(twin["latent"])
    features, visible = decoder.position_features(jnp.arange(T - 1, -1, -1)), visible_keys(T, T, offset=0)
    shared = features, decoder.r_w_bias[...], decoder.r_r_bias[...], visible, decoder.after_layer(latent_term)
    values["decoder input"] = decoder.embedding(b.decoder_ids) + latent_term
    x = given("decoder input")
    for i, layer in enumerate(decoder.layers):
        name = f"decoder layer {i}"
        values[name] = _decoder_layer(*split(layer), x, *shared)
        x = given(name)
    values["final norm"] = decoder.norm(x)
    values["logits"] = decoder.logits(given("final norm"))
    values["discriminator"] = model.discriminate(twin["latent"])
    values[ADVERSARIAL_LOSSES] = jnp.stack(adversarial_losses(model, jnp.asarray(twin["latent"]), b.prior))
    return {name: np.asarray(value, np.float32) for name, value in values.items()}


# Every layer has the same shapes and gives its weights as arguments, so each of the two compiles once.


@partial(jax.jit, static_argnums=0)
def _encoder_layer(graphdef, params, x, score_bias):
    return nnx.merge(graphdef, params)(x, score_bias)


@partial(jax.jit, static_argnums=0)
def _decoder_layer(graphdef, params, x, features, r_w_bias, r_r_bias, visible, latent_term):
    layer = nnx.merge(graphdef, params)
    return layer(x, layer.relative_keys(features), r_w_bias, r_r_bias, visible)[0] + latent_term
