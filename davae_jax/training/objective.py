"""The training objective."""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from davae_jax.data.batches import Batch
from davae_jax.data.packing import PackedBatch
from davae_jax.model.davae import DAVAE, Params, merge
from davae_jax.model.decoder import Decoder
from davae_jax.model.encoder import EncoderOutput
from davae_jax.model.latent import Posterior, hard_free_bits_kl, kl_per_dimension
from davae_jax.model.layers import Segments
from davae_jax.model.losses import adversarial_losses, chunked_nll
from davae_jax.regularizers import (
    LatentBatch,
    active,
    batch_normalized,
    penalty,
)
from davae_jax.training.config import TrainConfig
from davae_jax.training.noise import embedding_noise, token_noise

Logs = dict[str, Array]  # scalars, and kl_per_dim [L]


def gradient(
    params: Params,
    graphdef: nnx.GraphDef,
    batch: Batch | PackedBatch,
    key: jax.Array,
    beta,
    config: TrainConfig,
    step: Int[Array, ""] | int = 0,
    corpus_size: int | None = None,
):
    """The objective's gradient and logs, computed in `config.accumulate` parts of the batch, one after the other.

    The objective is a mean over texts, so the mean of the parts' gradients is the whole batch's (up to draws, of which
    each part has its own, to free bits clamped on a batch's mean, and to regularizers, whose statistics are a part's).
    Parts of packed rows differ in their number of texts; each divides by what a part has on average.
    """
    grad = jax.grad(objective, has_aux=True)
    n = config.accumulate
    if n == 1:
        return grad(params, graphdef, batch, key, beta, config, None, step, corpus_size)

    texts = (batch.lengths > 0).sum() / n if isinstance(batch, PackedBatch) else None

    def add(total, part):
        i, rows = part
        found = grad(params, graphdef, rows, jax.random.fold_in(key, i), beta, config, texts, step, corpus_size)
        return jax.tree.map(jnp.add, total, found), None

    # Part i has the rows i, i + n, …: each device gives of its own rows to every part.
    parts = jax.tree.map(lambda x: x.reshape(-1, n, *x.shape[1:]).swapaxes(0, 1), batch)
    one = lambda: jax.tree.map(lambda x: x[0], parts)  # noqa: E731
    shapes = jax.eval_shape(lambda: grad(params, graphdef, one(), key, beta, config, None, step, corpus_size))
    zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)
    total, _ = jax.lax.scan(add, zeros, (jnp.arange(n), parts))
    return jax.tree.map(lambda x: x / n, total)


def objective(
    params: Params,
    graphdef: nnx.GraphDef,
    batch: Batch | PackedBatch,
    key: jax.Array,
    beta: Float[Array, ""],
    config: TrainConfig,
    texts: Float[Array, ""] | None = None,
    step: Int[Array, ""] | int = 0,
    corpus_size: int | None = None,
) -> tuple[Float[Array, ""], Logs]:
    """Mean over the batch's texts of rec / length + β·KL + λ·L_g, plus L_d and the regularizers that are on.

    L_d reaches the discriminator alone and the rest everything but the discriminator, so that one backward pass gives
    the gradients of both optimizers. The end token is trained; padding is masked by length.

    params: the model's, and under "regularizers" the parameters of these, where they have some.
    texts: what packed texts' sums are divided by; None: their number.
    step, corpus_size: for the regularizers.
    """
    own = params.get("regularizers", {})
    params = {name: part for name, part in params.items() if name != "regularizers"}
    keys = dict(zip(("token", "embedding", "encoder", "latent", "decoder", "prior"), jax.random.split(key, 6)))
    model = merge(graphdef, params)
    mean = mean_over_texts(batch, texts)
    encoded = encode(model, batch, keys, config)
    posterior = Posterior(encoded.mean, encoded.logvar)
    if config.posterior.mean_scale:
        # Over this part's own texts: `texts` is what parts have on average.
        over_part = mean_over_texts(batch)
        posterior, mean_std = batch_normalized(posterior, config.posterior.mean_scale, over_part)
    latent = posterior.sample(keys["latent"])
    rec, length = reconstruction(model, batch, latent, keys["decoder"], config)
    rec_per_token = rec / length

    kl_BL = kl_per_dimension(posterior)
    kl = free_bits_kl(kl_BL, config, mean_over_texts(batch))
    weighted = rec_per_token if config.length_weighted else rec
    loss = mean(weighted + beta * kl)
    logs = {"rec": mean(rec_per_token), "kl": mean(kl), "kl_unmasked": mean(kl_BL.sum(-1))}
    logs["kl_per_dim"] = mean(kl_BL)

    # The discriminator is trained even where λ is 0: its loss then only measures how far latents are from the prior.
    prior = jax.random.normal(keys["prior"], latent.shape)
    frozen = merge(graphdef, params | {"discriminator": jax.lax.stop_gradient(params["discriminator"])})
    loss_d, _ = adversarial_losses(model, latent, prior, mean)
    _, loss_g = adversarial_losses(frozen, latent, prior, mean)
    loss = loss + config.adversarial.weight * loss_g
    if config.posterior.mean_scale:
        logs |= {"mean_std": mean_std, "pooled": over_part(encoded.pooled.astype(jnp.float32))}
    against = loss_d
    if regularizers := active(config.regularizers):
        latents = latent_batch(batch, posterior, latent, prior)._replace(
            step=jnp.asarray(step), steps=config.steps, key=key, corpus_size=corpus_size
        )
        added, adversaries, values = penalty(regularizers, latents, own)
        loss, against, logs = loss + added, against + adversaries, logs | values
    return loss + against, logs | {"loss": loss, "loss_d": loss_d, "loss_g": loss_g}


def latent_batch(
    batch: Batch | PackedBatch, posterior: Posterior, latent: Float[Array, "B L"], prior: Float[Array, "B L"]
) -> LatentBatch:
    """What regularizers get of a batch; of packed rows, [B, P, L], the places one behind the other."""
    B = len(batch.lengths)
    if isinstance(batch, PackedBatch):
        targets, segments, P = batch.decoder_targets, batch.decoder_segments, batch.lengths.shape[1]
        of_target = jnp.where(segments > 0, jnp.arange(B)[:, None] * P + segments - 1, -1)
    else:
        targets = batch.decoder_ids[:, 1:]
        real = jnp.arange(1, targets.shape[1] + 1) < batch.lengths[:, None]
        of_target = jnp.where(real, jnp.arange(B)[:, None], -1)
    is_text = (batch.lengths > 0).reshape(-1)

    def of_texts(x):  # 0 where there is none, so that nothing there can reach a value or a gradient
        return jnp.where(is_text[:, None], x.reshape(-1, x.shape[-1]), 0)

    return LatentBatch(
        mean=of_texts(posterior.mean),
        logvar=of_texts(posterior.logvar),
        z=of_texts(latent),
        prior=prior.reshape(-1, prior.shape[-1]),
        is_text=is_text,
        targets=targets,
        text_of_target=of_target,
        **dict(step=None, steps=None, key=None, corpus_size=None),
    )


def mean_over_texts(batch: Batch | PackedBatch, texts: Float[Array, ""] | None = None) -> Callable[[Array], Array]:
    """The mean of [B, …] over the texts; of packed ones, of [B, P, …] over the places that hold a text.

    texts: `objective`.
    """
    if not isinstance(batch, PackedBatch):
        return mean_over_rows
    is_text = batch.lengths > 0
    texts = is_text.sum() if texts is None else texts

    def mean(x):
        kept = is_text.reshape(*is_text.shape, *[1] * (x.ndim - 2))
        return jnp.where(kept, x, 0).sum((0, 1)) / texts

    return mean


def mean_over_rows(x: Float[Array, "B *L"]) -> Float[Array, "*L"]:
    return x.mean(0)


def encode(model: DAVAE, batch: Batch | PackedBatch, keys: dict, config: TrainConfig) -> EncoderOutput:
    """What the encoder makes of the texts, with the noise of training on tokens and embeddings."""
    ids, segments = batch.encoder_ids, None
    if isinstance(batch, PackedBatch):
        segments = Segments(batch.encoder_segments, batch.encoder_starts)
    special = (ids == model.config.cls_token_id) | (ids == model.config.sep_token_id)
    ids = token_noise(ids, special, config.noise, model.config.encoder.vocab_size, keys["token"], segments)
    shape = (*ids.shape, model.config.encoder.hidden_size)
    noise = embedding_noise(keys["embedding"], shape, config.noise)
    return model.encoder(ids, noise, keys["encoder"], config.remat, segments)


def reconstruction(
    model: DAVAE, batch: Batch | PackedBatch, latent: Float[Array, "B L"], key: jax.Array, config: TrainConfig
) -> tuple[Float[Array, "B"], Int[Array, "B"]]:
    """Of each text the sum of its targets' −log p, in nats, and their number; packed, [B, P] and at least 1."""
    if isinstance(batch, PackedBatch):
        ids, targets, segments = batch.decoder_ids, batch.decoder_targets, batch.decoder_segments
        mask = segments[..., None] == jnp.arange(1, batch.lengths.shape[1] + 1)
        length = jnp.maximum(mask.sum(1), 1)
    else:
        ids, targets, segments = batch.decoder_ids[:, :-1], batch.decoder_ids[:, 1:], None
        mask = jnp.arange(1, batch.decoder_ids.shape[1]) < batch.lengths[:, None]
        length = mask.sum(1)
        if config.data.segment_length and ids.shape[1] > config.data.segment_length:
            return in_segments(model.decoder, ids, targets, mask, latent, key, config), length
    output = model.decoder(ids, latent, key=key, remat=config.remat, segment_ids=segments)
    return chunked_nll(model.decoder, output.final, targets, mask, config.logits_chunk), length


def in_segments(
    decoder: Decoder,
    ids: Int[Array, "B T"],
    targets: Int[Array, "B T"],
    mask: Bool[Array, "B T"],
    latent: Float[Array, "B L"],
    key: jax.Array | None,
    config: TrainConfig,
) -> Float[Array, "B"]:
    """Σ −log p of the targets, read a segment after the other: all of a text with the one latent, and between them the
    recurrent memory, through which no gradient flows (Dai et al. 2019, section 3.2)."""
    size = config.data.segment_length
    window = "published" if config.data.segment_mask == "published" else None

    def cut(x):
        x = jnp.pad(x, ((0, 0), (0, -x.shape[1] % size)))
        return x.reshape(x.shape[0], -1, size).swapaxes(0, 1)

    def read(carry, segment):
        memory, rec = carry
        i, ids, targets, mask = segment
        own_key = None if key is None else jax.random.fold_in(key, i)
        output = decoder(ids, latent, memory, window, own_key, config.remat)
        rec = rec + chunked_nll(decoder, output.final, targets, mask, config.logits_chunk)
        return (decoder.extend_memory(memory, output.hidden, memory.capacity), rec), None

    segments = cut(ids), cut(targets), cut(mask)
    begin = decoder.empty_memory(len(ids)), jnp.zeros(len(ids), jnp.float32)
    (_, rec), _ = jax.lax.scan(read, begin, (jnp.arange(len(segments[0])), *segments))
    return rec


def free_bits_kl(
    kl_BL: Float[Array, "B L"], config: TrainConfig, mean: Callable[[Array], Array] = mean_over_rows
) -> Float[Array, "B"]:
    """The KL that β weighs, of each text.

    hard: the published free bits, those dimensions of a text alone whose KL is above the target.
    clamp: free bits of Kingma et al. 2016 (appendix C.8): a dimension's mean over the batch counts as the target where
      it is below.
    total: the same of the whole KL, as one group of dimensions.

    mean: `mean_over_texts`.
    """
    match config.free_bits.mode:
        case "hard":
            return hard_free_bits_kl(kl_BL, config.free_bits.target)
        case "clamp":
            return jnp.broadcast_to(jnp.maximum(mean(kl_BL), config.free_bits.target).sum(), kl_BL.shape[:-1])
        case "total":
            return jnp.broadcast_to(jnp.maximum(mean(kl_BL.sum(-1)), config.free_bits.target), kl_BL.shape[:-1])
        case "off":
            return kl_BL.sum(-1)
