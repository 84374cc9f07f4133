"""The published losses, which reproduce the published program's numbers, and the reconstruction loss of training."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Bool, Float, Int

from davae_jax.model.davae import DAVAE, merge, split
from davae_jax.model.decoder import Decoder
from davae_jax.model.latent import hard_free_bits_kl, kl_per_dimension, with_unit_variance


def published_loss(
    model: DAVAE,
    encoder_ids: Int[Array, "B S"],
    decoder_ids: Int[Array, "B T"],
    *,
    eps: Float[Array, "B L"],
    beta: float,
    fb_mode: int | None = None,
    length_weighted: bool | None = None,
) -> tuple[Float[Array, ""], Float[Array, ""], Float[Array, ""]]:
    """Computes the published training loss, without dropout.

    The loss of a text is rec / sent_length + β·KL (length_weighted) or rec + β·KL, and the total is the sum over the
    batch. As published, padding has the id of the end token, so `sent_length` counts all other ids and the end token
    is never trained. The function is for comparisons with the published program; training masks by length instead
    (`training.objective`).

    Args:
      encoder_ids, decoder_ids: padded with 0 and with the end token's id.
      eps: standard normal noise of the latent.
      beta: weight of the KL.
      fb_mode: 0 the sum of the KL; 1 free bits with a hard mask at config.dim_target_kl; 2 unit variance, where
        KL = ½ Σ mean². Default: the config's.
      length_weighted: default: the config's `length_weighted_loss`.

    Returns:
      (mean over the batch of rec / sent_length, mean KL as weighted by fb_mode, total), all in nats.
    """
    config = model.config
    fb_mode = config.fb_mode if fb_mode is None else fb_mode
    length_weighted = config.length_weighted_loss if length_weighted is None else length_weighted
    if fb_mode not in (0, 1, 2):
        raise ValueError(f"fb_mode must be 0, 1 or 2, not {fb_mode!r}")
    return _published_loss(*split(model), encoder_ids, decoder_ids, eps, beta, fb_mode, bool(length_weighted))


@partial(jax.jit, static_argnums=(0, 6, 7))
def _published_loss(graphdef, params, encoder_ids, decoder_ids, eps, beta, fb_mode, length_weighted):
    model = merge(graphdef, params)
    encoded = model.encoder(encoder_ids)
    posterior = encoded.posterior
    if fb_mode == 2:
        posterior = with_unit_variance(posterior)
    kl_BL = kl_per_dimension(posterior)
    kl = hard_free_bits_kl(kl_BL, model.config.dim_target_kl) if fb_mode == 1 else kl_BL.sum(-1)

    pad = model.config.end_token_id
    output = model.decoder(decoder_ids, posterior.at(eps))
    logits = model.decoder.logits(output.final[:, :-1])
    rec = reconstruction_nll(logits, decoder_ids[:, 1:], decoder_ids[:, 1:] != pad)
    sent_length = jnp.maximum((decoder_ids != pad).sum(-1), 1)  # a row of padding alone has the loss 0
    rec_per_token = rec / sent_length
    total = ((rec_per_token if length_weighted else rec) + beta * kl).sum()
    return rec_per_token.mean(), kl.mean(), total


def reconstruction_nll(
    logits: Float[Array, "B T V"], targets: Int[Array, "B T"], mask: Bool[Array, "B T"]
) -> Float[Array, "B"]:
    """Returns Σ_t −log p(target_t) over the targets where the mask is True, in nats.

    For rows with P texts the mask is [B, T, P], True where a target belongs to a text, and the sums are [B, P].
    """
    nll = optax.softmax_cross_entropy_with_integer_labels(logits.astype(jnp.float32), targets)
    return jnp.where(mask, nll if mask.ndim == 2 else nll[..., None], 0).sum(1)


def chunked_nll(
    decoder: Decoder, final: Float[Array, "B T D"], targets: Int[Array, "B T"], mask: Bool[Array, "B T"], chunk: int
) -> Float[Array, "B"]:
    """Returns `reconstruction_nll` of the decoder's logits, computed for `chunk` positions at a time.

    At most [B, chunk, V] logits are in memory at once: the backward pass recomputes those of each chunk.

    Args:
      final: `DecoderOutput.final`.
    """
    T = targets.shape[1]
    if chunk >= T:
        return reconstruction_nll(decoder.logits(final), targets, mask)

    def split_into_chunks(x):
        x = jnp.pad(x, ((0, 0), (0, -T % chunk), *[(0, 0)] * (x.ndim - 2)))
        return x.reshape(x.shape[0], -1, chunk, *x.shape[2:]).swapaxes(0, 1)

    @jax.checkpoint
    def chunk_nll(final, targets, mask):
        return reconstruction_nll(decoder.logits(final), targets, mask)

    def add(total, xs):
        return total + chunk_nll(*xs), None

    zero = jnp.zeros((targets.shape[0], *mask.shape[2:]), jnp.float32)
    return jax.lax.scan(add, zero, jax.tree.map(split_into_chunks, (final, targets, mask)))[0]


def adversarial_losses(
    model: DAVAE, latent: Float[Array, "B L"], prior_sample: Float[Array, "B L"]
) -> tuple[Float[Array, ""], Float[Array, ""]]:
    """Returns (L_d, L_g), the adversarial losses of Goodfellow et al. 2014 as published, means over the batch."""
    return discriminator_loss(model, latent, prior_sample), generator_loss(model, latent)


def discriminator_loss(
    model: DAVAE, latent: Float[Array, "B L"], prior_sample: Float[Array, "B L"], mean: Callable = jnp.mean
) -> Float[Array, ""]:
    """Returns L_d = BCE(D(stop_gradient(z)), 0) + BCE(D(n), 1), which trains the discriminator.

    BCE is the binary cross-entropy on logits, n ~ N(0, I).

    Args:
      mean: takes the mean over texts; for packed rows, a mean that ignores empty slots.
    """
    fake = model.discriminator(jax.lax.stop_gradient(latent))
    real = model.discriminator(prior_sample)
    bce = optax.sigmoid_binary_cross_entropy
    return mean(bce(fake, jnp.zeros_like(fake))) + mean(bce(real, jnp.ones_like(real)))


def generator_loss(model: DAVAE, latent: Float[Array, "B L"], mean: Callable = jnp.mean) -> Float[Array, ""]:
    """Returns L_g = BCE(D(z), 1), which trains the encoder; see `discriminator_loss`."""
    logits = model.discriminator(latent)
    return mean(optax.sigmoid_binary_cross_entropy(logits, jnp.ones_like(logits)))
