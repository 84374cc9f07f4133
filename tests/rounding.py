"""How much bfloat16 may change a model's numbers: bounds from its unit roundoff and the number of roundings.

Rounding a number to bfloat16 (8 significant bits) changes it by a relative amount of at most u = 2^-8, on average over
the numbers of an array by u/√3 (a uniform distribution on [−u, u]). Sums are accumulated in float32, whose roundoff of
2^-24 is negligible, so only the values that an operation stores, and the weights that it reads, are rounded.

The errors of different roundings are independent, so that the squares of their relative sizes add up. An error in the
residual stream is passed on by every later layer with about its relative size: LayerNorm removes the stream's scale,
and a layer adds an output that is smaller than the stream. k roundings one after another therefore result in a relative
error, in the root mean square (RMS) over an array, of

    ε(k) = u · √(k / 3).

It grows with the square root of the depth. A rounding inside a branch counts as one of the whole stream, of which the
branch is a part. `ROUNDINGS_PER_LAYER` counts the roundings of a layer.

From ε follow the errors of what is computed in float32 from an array x of d numbers with the error δ, ‖δ‖ = ε·‖x‖:

- logits are linear in the last hidden state: RMS(δ) = ε · RMS(logits);
- the log-likelihood of a token is logit_target − logsumexp(logits), so the errors of two independent logits add up:
  √2 · ε · RMS(logits), and those of n tokens average to 1/√n of it;
- a KL is differentiable in the d parameters x of a posterior, and its error ∇KL · δ is ‖∇KL‖ · ε · ‖x‖ · cos(angle).
  The cosine of the angle between independent directions has the standard deviation 1/√d.

All of these are standard deviations, of which three are the bound; of the KL three of each of its two factors. Errors
of several texts are compared as their RMS.
"""

import jax
import jax.numpy as jnp
import numpy as np

from davae_jax import DAVAE
from davae_jax.model.davae import abstract_model, merge, split
from davae_jax.model.latent import Posterior, kl_per_dimension
from davae_jax.model.losses import reconstruction_nll

U = 2.0**-8  # the unit roundoff of bfloat16
# Encoder, attention: weights and outputs of q, k, v (3: one path passes through weight, product and sum with the bias),
# probabilities, context, output (3), residual sum, LayerNorm: 10. MLP: 3, GELU, 3, residual sum, LayerNorm: 9.
# Decoder: the same, r and q + bias (2), and the sum with the latent: 22.
ROUNDINGS_PER_LAYER = {"encoder": 19, "decoder": 22}
# Embeddings (3 tables, 2 sums, LayerNorm) and pooler (weight, product, sum, tanh, the posterior's weights).
# Embedding, the latent's weights and its term, sum; LayerNorm, the output embedding.
ROUNDINGS_OUTSIDE = {"encoder": 11, "decoder": 6}
SIGMAS = 3


def relative_error(part: str, layers: int) -> float:
    """Returns ε(k) of the encoder's posterior or the decoder's logits, for k roundings."""
    return U * np.sqrt((ROUNDINGS_OUTSIDE[part] + layers * ROUNDINGS_PER_LAYER[part]) / 3)


def rms(x) -> float:
    return float(np.sqrt(np.mean(np.square(np.asarray(x, np.float64)))))


def in_bfloat16(model: DAVAE) -> DAVAE:
    """Returns the model with its weights rounded to bfloat16, which computes in bfloat16."""
    graphdef, like = split(abstract_model(model.config, dtype=jnp.bfloat16, param_dtype=jnp.bfloat16))
    return merge(graphdef, jax.tree.map(lambda weight, to: weight.astype(to.dtype), split(model)[1], like))


def assert_rounding_explains(exact: DAVAE, encoder_ids, decoder_ids, eps) -> None:
    """Asserts that a model's numbers in bfloat16 differ from those in float32 by at most the bounds, and not by less
    than a thirtieth of them, so that the bounds can fail."""
    for name, (error, bound) in errors_and_bounds(exact, in_bfloat16(exact), encoder_ids, decoder_ids, eps).items():
        assert bound / 30 < error < bound, (name, error, bound)


def errors_and_bounds(exact: DAVAE, rounded: DAVAE, encoder_ids, decoder_ids, eps) -> dict[str, tuple[float, float]]:
    """Returns (error, bound) of each quantity of a bfloat16 model, given the same model in float32.

    Both decoders get the latents of the float32 encoder, so that the two halves are measured apart.
    """
    config = exact.config
    posteriors = [model.encode(encoder_ids) for model in (exact, rounded)]
    latent = posteriors[0].at(eps)
    logits = [np.asarray(model.decode(decoder_ids, latent)[0]) for model in (exact, rounded)]
    targets = jnp.asarray(decoder_ids)[:, 1:]
    mask = targets != config.end_token_id
    nll = [np.asarray(reconstruction_nll(x[:, :-1], targets, mask)) for x in logits]
    kl = [np.asarray(kl_per_dimension(p).sum(-1), np.float64) for p in posteriors]

    parameters = [np.concatenate(p, -1) for p in posteriors]
    encoder = relative_error("encoder", config.encoder.num_hidden_layers)
    decoder = relative_error("decoder", config.decoder.num_layers)
    gradient = jax.grad(lambda p: kl_per_dimension(Posterior(*p)).sum())(tuple(posteriors[0]))
    slopes, lengths = (np.linalg.norm(np.concatenate(x, -1), axis=-1) for x in (gradient, posteriors[0]))
    tokens = np.asarray(mask.sum(1))
    return {
        "posterior": (rms(parameters[1] - parameters[0]), SIGMAS * encoder * rms(parameters[0])),
        "kl": (rms(kl[1] - kl[0]), SIGMAS**2 * encoder * rms(slopes * lengths) / np.sqrt(2 * config.latent_size)),
        "logits": (rms(logits[1] - logits[0]), SIGMAS * decoder * rms(logits[0])),
        "loss": (rms((nll[1] - nll[0]) / tokens), SIGMAS * decoder * rms(logits[0]) * rms(np.sqrt(2 / tokens))),
    }
