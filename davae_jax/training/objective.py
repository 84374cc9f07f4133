"""The training objective: reconstruction + β·KL + λ·adversarial + Σ regularizers, and its gradient.

Everything after the encoder is computed per text. A batch of B rows with up to P texts each has N = B·P slots for
texts; slots without a text are masked out of every mean.
"""

from __future__ import annotations

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from davae_jax.data.batches import Batch
from davae_jax.model.davae import DAVAE, Params, merge
from davae_jax.model.decoder import Decoder
from davae_jax.model.latent import Posterior, hard_free_bits_kl, kl_per_dimension
from davae_jax.model.layers import Segments
from davae_jax.model.losses import chunked_nll, discriminator_loss, generator_loss
from davae_jax.regularizers import LatentBatch, active, batch_normalized, regularizer_terms
from davae_jax.training.config import FreeBitsConfig, TrainConfig
from davae_jax.training.freezing import join_frozen, split_frozen
from davae_jax.training.noise import embedding_noise, token_noise

Logs = dict[str, Array]  # scalars, and kl_per_dim [L]


class StepContext(NamedTuple):
    """The inputs of the objective besides the weights, the batch and the config."""

    key: jax.Array  # of this step; all random numbers are derived from it
    beta: Float[Array, ""]  # weight of the KL
    step: Int[Array, ""] | int = 0  # steps taken so far
    corpus_size: int | None = None  # number of training texts, which some regularizers need
    # For packed rows, the divisor of sums over texts; None: the batch's number of texts. With gradient accumulation it
    # is the mean number of texts per micro-batch, so that the mean of their gradients is that of the whole batch.
    texts: Float[Array, ""] | None = None


class LossTerms(NamedTuple):
    """The weighted terms of the objective. All are scalars, means over texts, in nats."""

    reconstruction: Float[Array, ""]
    kl: Float[Array, ""]
    adversarial: Float[Array, ""]
    regularizers: Float[Array, ""]
    discriminator: Float[Array, ""]  # L_d, whose gradient reaches only the discriminator
    adversaries: Float[Array, ""]  # losses of regularizers' adversaries; the gradient reaches only these
    logs: Logs

    @property
    def model_loss(self) -> Float[Array, ""]:
        """Returns the loss that encoder and decoder minimize; logged as "loss"."""
        return self.reconstruction + self.kl + self.adversarial + self.regularizers

    @property
    def total(self) -> Float[Array, ""]:
        """Returns the sum that is differentiated. Each parameter receives gradients only from terms it minimizes."""
        return self.model_loss + self.discriminator + self.adversaries


class EncodedTexts(NamedTuple):
    posterior: Posterior  # [N, L]
    pooled: Float[Array, "N D"]


def gradient(
    params: Params, graphdef: nnx.GraphDef, batch: Batch, context: StepContext, config: TrainConfig
) -> tuple[Params, Logs]:
    """Returns the objective's gradient and the values to log, computed in `config.accumulate` micro-batches.

    The objective is a mean over texts, so the mean of the micro-batches' gradients is the gradient of the whole batch.
    There are three differences: each micro-batch has its own random numbers, free bits that are clamped on the mean of
    the batch are clamped on that of the micro-batch, and regularizers see the statistics of the micro-batch. Frozen
    weights have no gradient: None.
    """
    trained, frozen = split_frozen(params, config.init.freeze)

    def total_and_logs(trained, batch, context):
        terms = objective(join_frozen(trained, frozen), graphdef, batch, context, config)
        return terms.total, terms.logs | {"loss": terms.model_loss}

    grad = jax.grad(total_and_logs, has_aux=True)
    n = config.accumulate
    if n == 1:
        return grad(trained, batch, context)

    if batch.decoder_segments is not None:  # micro-batches differ in their number of texts
        context = context._replace(texts=(batch.lengths > 0).sum() / n)

    def add_micro_batch(total, micro_batch):
        i, rows = micro_batch
        micro_batch_key = jax.random.fold_in(context.key, i)
        grads_and_logs = grad(trained, rows, context._replace(key=micro_batch_key))
        return jax.tree.map(jnp.add, total, grads_and_logs), None

    # Micro-batch i has the rows i, i + n, …, so that each device contributes its own rows to every micro-batch.
    micro_batches = jax.tree.map(lambda x: x.reshape(-1, n, *x.shape[1:]).swapaxes(0, 1), batch)
    shapes = jax.eval_shape(lambda: grad(trained, jax.tree.map(lambda x: x[0], micro_batches), context))
    zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)
    total, _ = jax.lax.scan(add_micro_batch, zeros, (jnp.arange(n), micro_batches))
    return jax.tree.map(lambda x: x / n, total)


def objective(
    params: Params, graphdef: nnx.GraphDef, batch: Batch, context: StepContext, config: TrainConfig
) -> LossTerms:
    """Returns the terms of the loss: per text rec / length + β·KL + λ·L_g, L_d and the active regularizers.

    One backward pass serves all optimizers: L_d sees latents whose gradient is stopped, L_g sees a discriminator whose
    gradient is stopped. The end token is trained; padding is masked by length.

    Args:
      params: the model's parameters, and under "regularizers" those of regularizers that have parameters.
    """
    params = dict(params)
    regularizer_params = params.pop("regularizers", {})
    keys = dict(zip(("token", "embedding", "encoder", "latent", "decoder", "prior"), jax.random.split(context.key, 6)))
    model = merge(graphdef, params)
    is_text = None if batch.decoder_segments is None else (batch.lengths > 0).reshape(-1)
    mean = partial(mean_over_texts, is_text=is_text, count=context.texts)
    # Statistics that are not added to the loss are means over the texts of this micro-batch.
    micro_batch_mean = partial(mean_over_texts, is_text=is_text)

    encoded = encode(model, batch, keys, config)
    posterior, logs = encoded.posterior, {}
    if config.posterior.mean_scale:
        posterior, mean_std = batch_normalized(posterior, config.posterior.mean_scale, micro_batch_mean)
        logs = {"mean_std": mean_std, "pooled": micro_batch_mean(encoded.pooled.astype(jnp.float32))}
    latent = posterior.sample(keys["latent"])
    rec, length = reconstruction(model, batch, latent, keys["decoder"], config)
    rec_per_token = rec / length
    kl_NL = kl_per_dimension(posterior)
    kl = free_bits_kl(kl_NL, config.free_bits, micro_batch_mean)

    # The discriminator is trained even if λ is 0; its loss then only measures how far the latents are from the prior.
    prior = jax.random.normal(keys["prior"], latent.shape)
    frozen = merge(graphdef, params | {"discriminator": jax.lax.stop_gradient(params["discriminator"])})
    loss_d = discriminator_loss(model, latent, prior, mean)
    loss_g = generator_loss(frozen, latent, mean)

    regularizer_loss, adversaries, regularizer_logs = jnp.float32(0), jnp.float32(0), {}
    if regularizers := active(config.regularizers):
        latents = latent_batch(batch, posterior, latent, prior, context, config)
        regularizer_loss, adversaries, regularizer_logs = regularizer_terms(regularizers, latents, regularizer_params)
    return LossTerms(
        reconstruction=mean(rec_per_token if config.length_weighted else rec),
        kl=context.beta * mean(kl),
        adversarial=config.adversarial.weight * loss_g,
        regularizers=regularizer_loss,
        discriminator=loss_d,
        adversaries=adversaries,
        logs=logs
        | {
            "rec": mean(rec_per_token),
            "kl": mean(kl),
            "kl_unmasked": mean(kl_NL.sum(-1)),
            "kl_per_dim": mean(kl_NL),
            "loss_d": loss_d,
            "loss_g": loss_g,
        }
        | regularizer_logs,
    )


def mean_over_texts(
    x: Float[Array, "N *L"], is_text: Bool[Array, "N"] | None = None, count: Float[Array, ""] | None = None
) -> Float[Array, "*L"]:
    """Returns the mean over the texts.

    Args:
      is_text: which entries of x belong to a text; None: all, and nothing is masked.
      count: what the masked sum is divided by; by default the number of texts.
    """
    if is_text is None:
        return x.mean(0)
    mask = is_text.reshape(-1, *[1] * (x.ndim - 1))
    return jnp.where(mask, x, 0).sum(0) / (is_text.sum() if count is None else count)


def encode(model: DAVAE, batch: Batch, keys: dict[str, jax.Array], config: TrainConfig) -> EncodedTexts:
    """Returns the posterior of every text, under the training noise on tokens and embeddings."""
    ids, segments = batch.encoder_ids, None
    if batch.encoder_segments is not None:
        segments = Segments(batch.encoder_segments, batch.encoder_starts)
    special = (ids == model.config.cls_token_id) | (ids == model.config.sep_token_id)
    ids = token_noise(ids, special, config.noise, model.config.encoder.vocab_size, keys["token"], segments)
    shape = (*ids.shape, model.config.encoder.hidden_size)
    noise = embedding_noise(keys["embedding"], shape, config.noise)
    output = model.encoder(ids, noise, keys["encoder"], config.remat, segments)
    mean, logvar, pooled = (x.reshape(-1, x.shape[-1]) for x in (output.mean, output.logvar, output.pooled))
    return EncodedTexts(Posterior(mean, logvar), pooled)


def reconstruction(
    model: DAVAE, batch: Batch, latent: Float[Array, "N L"], key: jax.Array | None, config: TrainConfig
) -> tuple[Float[Array, "N"], Int[Array, "N"]]:
    """Returns Σ −log p over each text's targets, in nats, and the number of its targets (at least 1).

    Dropout is applied if a key is given.
    """
    ids, targets, segments = batch.decoder_ids, batch.decoder_targets, target_segments(batch)
    (B, P), T = batch.lengths.shape, ids.shape[1]
    how = dict(key=key, remat=config.remat, attention=config.attention)
    if batch.decoder_segments is None:
        mask = segments > 0
        if config.data.segment_length and config.data.segment_length < T:
            rec = reconstruction_in_segments(model.decoder, ids, targets, mask, latent, key, config)
            return rec, jnp.maximum(mask.sum(1), 1)
        output = model.decoder(ids, latent, **how)
    else:
        mask = segments[..., None] == jnp.arange(1, P + 1)
        output = model.decoder(ids, latent.reshape(B, P, -1), segment_ids=segments, **how)
    rec = chunked_nll(model.decoder, output.final, targets, mask, config.logits_chunk)
    return rec.reshape(-1), jnp.maximum(mask.sum(1), 1).reshape(-1)


def target_segments(batch: Batch) -> Int[Array, "B T"]:
    """Returns the index of each target's text within its row, from 1; 0 is padding."""
    if batch.decoder_segments is not None:
        return batch.decoder_segments
    return (jnp.arange(batch.decoder_targets.shape[1]) < batch.lengths - 1).astype(jnp.int32)


def reconstruction_in_segments(
    decoder: Decoder,
    ids: Int[Array, "B T"],
    targets: Int[Array, "B T"],
    mask: Bool[Array, "B T"],
    latent: Float[Array, "B L"],
    key: jax.Array | None,
    config: TrainConfig,
) -> Float[Array, "B"]:
    """Returns Σ −log p of the targets when the decoder reads its input one segment after the other.

    All segments of a text share its latent. The recurrent memory carries hidden states from each segment to the next;
    no gradient flows through it (Dai et al. 2019, section 3.2).
    """
    size = config.data.segment_length
    window = "published" if config.data.segment_mask == "published" else None

    def split_into_segments(x):
        x = jnp.pad(x, ((0, 0), (0, -x.shape[1] % size)))
        return x.reshape(x.shape[0], -1, size).swapaxes(0, 1)

    def read_segment(carry, segment):
        memory, rec = carry
        i, ids, targets, mask = segment
        segment_key = None if key is None else jax.random.fold_in(key, i)
        output = decoder(ids, latent, memory, window, segment_key, config.remat, attention=config.attention)
        rec = rec + chunked_nll(decoder, output.final, targets, mask, config.logits_chunk)
        return (decoder.extend_memory(memory, output.hidden, memory.capacity), rec), None

    segments = [split_into_segments(x) for x in (ids, targets, mask)]
    start = decoder.empty_memory(len(ids)), jnp.zeros(len(ids), jnp.float32)
    (_, rec), _ = jax.lax.scan(read_segment, start, (jnp.arange(len(segments[0])), *segments))
    return rec


def free_bits_kl(kl_NL: Float[Array, "N L"], config: FreeBitsConfig, mean=None) -> Float[Array, "N"]:
    """Returns the KL of each text that is multiplied by β.

    hard: the published free bits; of each text, only dimensions whose KL is above the target count.
    clamp: the free bits of Kingma et al. 2016 (appendix C.8): a dimension's mean over the batch counts as the target
      if it is below.
    total: the same with the whole KL as one group of dimensions.

    Args:
      mean: the mean over the batch's texts, of an array [N, …]; by default over all N.
    """
    mean = mean or partial(jnp.mean, axis=0)
    match config.mode:
        case "hard":
            return hard_free_bits_kl(kl_NL, config.target)
        case "clamp":
            return jnp.broadcast_to(jnp.maximum(mean(kl_NL), config.target).sum(), kl_NL.shape[:-1])
        case "total":
            return jnp.broadcast_to(jnp.maximum(mean(kl_NL.sum(-1)), config.target), kl_NL.shape[:-1])
        case "off":
            return kl_NL.sum(-1)


def latent_batch(
    batch: Batch,
    posterior: Posterior,
    latent: Float[Array, "N L"],
    prior: Float[Array, "N L"],
    context: StepContext,
    config: TrainConfig,
) -> LatentBatch:
    """Returns the batch of latents that regularizers receive. Slots without a text contain zeros."""
    B, P = batch.lengths.shape
    segments = target_segments(batch)
    is_text = (batch.lengths > 0).reshape(-1)

    def zero_where_empty(x):  # so that an empty slot affects no value and no gradient
        return jnp.where(is_text[:, None], x, 0)

    return LatentBatch(
        mean=zero_where_empty(posterior.mean),
        logvar=zero_where_empty(posterior.logvar),
        z=zero_where_empty(latent),
        prior=prior,
        is_text=is_text,
        step=jnp.asarray(context.step),
        steps=config.steps,
        key=context.key,
        corpus_size=context.corpus_size,
        targets=batch.decoder_targets,
        text_of_target=jnp.where(segments > 0, jnp.arange(B)[:, None] * P + segments - 1, -1),
    )
