"""One training step: the objective with the five measures, its gradient, and both optimizers' updates."""

from __future__ import annotations

import math
from collections.abc import Callable, Container
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jax.sharding import AbstractMesh, Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, Bool, Float, Int

from davae_jax.data import Batch
from davae_jax.decoder import Decoder
from davae_jax.encoder import EncoderOutput
from davae_jax.latent import Posterior, free_bits_kl, kl_per_dimension
from davae_jax.layers import Segments
from davae_jax.losses import adversarial_losses, chunked_nll
from davae_jax.model import DAVAE, Params, merge, split, weight_axes
from davae_jax.noise import embedding_noise, token_noise
from davae_jax.optimizers import make_optimizer
from davae_jax.packing import PackedBatch
from davae_jax.regularizers import (
    LatentBatch,
    Learned,
    Sizes,
    active,
    batch_normalized,
    init_own,
    normalized_head,
    penalty,
)
from davae_jax.schedules import beta_at, learning_rate
from davae_jax.sharding import RULES, weight_sharding
from davae_jax.train_config import LaggingConfig, TrainConfig, with_own_rate

Logs = dict[str, Array]  # scalars, and kl_per_dim [L]


class TrainState(NamedTuple):
    """All a run has to remember: the data's order and every draw follow from the seed and the step."""

    step: Int[Array, ""]  # steps taken
    params: Params
    optimizer: optax.OptState  # of encoder and decoder
    discriminator_optimizer: optax.OptState
    regularizers: dict[str, Params]  # parameters of the regularizers' own, by name; no part of the model
    regularizer_optimizers: dict[str, optax.OptState]


def optimizers(config: TrainConfig) -> tuple[optax.GradientTransformation, optax.GradientTransformation]:
    """For encoder and decoder, and another of its own rate for the discriminator."""
    main = make_optimizer(config.optimizer, config.steps, halves=config.lagging.encoder_steps > 0)
    return main, make_optimizer(config.adversarial.optimizer(config.optimizer), config.steps)


def regularizer_optimizers(config: TrainConfig) -> dict[str, optax.GradientTransformation]:
    """Of those regularizers that have parameters of their own."""
    return {
        name: make_optimizer(with_own_rate(config.optimizer, one.learning_rate), config.steps)
        for name, one in active(config.regularizers).items()
        if isinstance(one, Learned)
    }


def init_state(params: Params, config: TrainConfig) -> TrainState:
    main, discriminator = _halves(params)
    optimizer, discriminator_optimizer = optimizers(config)
    sizes = Sizes(len(params["encoder"]["posterior"]["weight"]) // 2, len(params["decoder"]["embedding"]["weight"]))
    own = init_own(active(config.regularizers), config.seed, sizes)
    of_own = {name: one.init(own[name]) for name, one in regularizer_optimizers(config).items()}
    opt_states = optimizer.init(main), discriminator_optimizer.init(discriminator)
    return TrainState(jnp.int32(0), params, *opt_states, own, of_own)


@jax.jit
def all_finite(params: Params) -> Bool[Array, ""]:
    return jax.tree.reduce(jnp.logical_and, jax.tree.map(lambda w: jnp.isfinite(w).all(), params))


def not_finite_in(values: dict[str, float], regularizers: Container[str]) -> str | None:
    """What a run has to stop for, in words: a regularizer by its name, where it and not the model is at fault."""
    own = [name for name in values if name.partition("/")[0] in regularizers] if math.isfinite(values["rec"]) else []
    skipped = {"grad_norm"} if values.get("skipped") else set()  # the spike guard has seen to it
    for name in (*own, "loss", "loss_d", *({"grad_norm"} - skipped)):
        if not math.isfinite(values[name]):
            return f"{'regularizer ' if name in own else ''}{name} is {values[name]}"
    return None


def abstract_state(model: DAVAE, config: TrainConfig, mesh: Mesh | AbstractMesh) -> TrainState:
    """Shape, dtype and sharding of everything in the state of an abstract model. What an optimizer keeps of a weight
    lies where the weight lies; what regularizers have of their own is small, and whole everywhere."""
    replicated = NamedSharding(mesh, PartitionSpec())

    def placed(x, place):
        return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place)

    params = jax.tree.map(
        lambda w, axes: placed(w, weight_sharding(axes, w.shape, mesh)), split(model)[1], weight_axes(model)
    )
    state = jax.eval_shape(partial(init_state, config=config), params)

    def like_weight(kept, weight):
        if isinstance(kept, optax.MaskedNode):  # Muon keeps nothing of what is Adam's, and the other way round
            return kept
        # Adafactor keeps sums over a weight's rows and columns: small, and whole everywhere.
        return placed(kept, weight.sharding if kept.shape == weight.shape else replicated)

    def of_optimizer(optimizer, opt_state, weights):
        return optax.tree.map_params(
            optimizer,
            like_weight,
            opt_state,
            weights,
            transform_non_params=lambda x: placed(x, replicated),
            is_leaf=lambda x: isinstance(x, optax.MaskedNode),
        )

    pairs = zip(optimizers(config), (state.optimizer, state.discriminator_optimizer), _halves(params), strict=True)
    opt_states = (of_optimizer(*pair) for pair in pairs)
    of_own = state.regularizers, state.regularizer_optimizers
    own = jax.tree.map(lambda x: placed(x, replicated), of_own)
    return TrainState(placed(state.step, replicated), params, *opt_states, *own)


def make_train_step(
    graphdef: nnx.GraphDef,
    config: TrainConfig,
    abstract: TrainState | None = None,
    corpus_size: int | None = None,
) -> Callable[[TrainState, Batch | PackedBatch], tuple]:
    """The compiled step: (state, batch) → (next state, logs). The state's buffers are reused.

    abstract: where the state lies on a mesh; batches are split over it, logs are on every device. To be called under
      `jax.set_mesh`. None: all on the first device.
    corpus_size: texts that are trained on; some regularizers need it.
    """
    optimizer, discriminator_optimizer = optimizers(config)
    own_optimizers = regularizer_optimizers(config)
    rate = learning_rate(config.optimizer, config.steps)

    def train_step(state: TrainState, batch: Batch | PackedBatch) -> tuple[TrainState, Logs]:
        key = jax.random.fold_in(jax.random.key(config.seed), state.step)
        beta = beta_at(state.step, config.steps, config.beta)
        trained = state.params | ({"regularizers": state.regularizers} if own_optimizers else {})
        grads, logs = gradient(trained, graphdef, batch, key, beta, config, state.step, corpus_size)
        own_grads = grads.pop("regularizers", {})
        # The position frequencies are stored with the weights, but not trained.
        grads["decoder"]["inv_freq"] = jnp.zeros_like(grads["decoder"]["inv_freq"])
        if config.lagging.encoder_steps:
            waits = decoder_waits(state.step, config.steps, config.lagging)
            grads["decoder"] = jax.tree.map(lambda g: jnp.where(waits, 0, g), grads["decoder"])
        main_grads, discriminator_grads = _halves(grads)
        main, discriminator = _halves(state.params)
        updates, opt_state = optimizer.update(main_grads, state.optimizer, main)
        if config.lagging.encoder_steps:
            updates, opt_state = held(waits, updates, (state.optimizer, opt_state))
        d_updates, d_opt_state = discriminator_optimizer.update(
            discriminator_grads, state.discriminator_optimizer, discriminator
        )
        params = optax.apply_updates(main, updates) | optax.apply_updates(discriminator, d_updates)
        if config.posterior.mean_scale:
            head = params["encoder"]["posterior"]
            found = logs.pop("mean_std"), logs.pop("pooled")
            head["weight"] = normalized_head(head["weight"], config.posterior.mean_scale, *found)
        own, own_opt_states = {}, {}
        for name, own_optimizer in own_optimizers.items():
            before = state.regularizers[name]
            moved, own_opt_states[name] = own_optimizer.update(
                own_grads[name], state.regularizer_optimizers[name], before
            )
            own[name] = optax.apply_updates(before, moved)
        logs |= {"beta": beta, "lr": rate(state.step), "grad_norm": optax.tree.norm(main_grads)}
        logs["tokens"] = jnp.maximum(batch.lengths - 1, 0).sum()
        if config.optimizer.spike:
            logs["skipped"] = jnp.float32(opt_state.skipped - state.optimizer.skipped)
        return TrainState(state.step + 1, params, opt_state, d_opt_state, own, own_opt_states), logs

    if abstract is None:
        return jax.jit(train_step, donate_argnums=0)
    places = jax.tree.map(lambda x: x.sharding, abstract)
    mesh = places.step.mesh
    logs_place = NamedSharding(mesh, PartitionSpec())
    return jax.jit(
        train_step,
        donate_argnums=0,
        in_shardings=(places, NamedSharding(mesh, PartitionSpec(RULES["batch"]))),
        out_shardings=(places, logs_place),
    )


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
    kl = counted_kl(kl_BL, config, mean_over_texts(batch))
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


def make_held_out_loss(
    graphdef: nnx.GraphDef, config: TrainConfig, abstract: TrainState
) -> Callable[[Params, Batch], Logs]:
    """The compiled loss of texts that are not trained on: no noise, the highest β, all of the KL, and one draw of each
    latent that is the same every time, so that checkpoints can be compared."""

    def losses(params: Params, batch: Batch) -> Logs:
        model = merge(graphdef, params)
        encoded = model.encoder(batch.encoder_ids)
        posterior = Posterior(encoded.mean, encoded.logvar)
        latent = posterior.sample(jax.random.key(config.seed))
        rec, length = reconstruction(model, batch, latent, None, config)
        rec_per_token = rec / length
        kl = kl_per_dimension(posterior).sum(-1)
        loss = (rec_per_token if config.length_weighted else rec) + config.beta.max * kl
        return {"loss": loss.mean(), "rec": rec_per_token.mean(), "kl": kl.mean()}

    places = jax.tree.map(lambda x: x.sharding, abstract.params)
    mesh = abstract.step.sharding.mesh
    rows = NamedSharding(mesh, PartitionSpec(RULES["batch"]))
    return jax.jit(losses, in_shardings=(places, rows), out_shardings=NamedSharding(mesh, PartitionSpec()))


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
    output = model.decoder(ids, latent, key=key, remat=config.remat, segments=segments)
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
        return (decoder.remember(memory, output.hidden, memory.capacity), rec), None

    segments = cut(ids), cut(targets), cut(mask)
    begin = decoder.empty_memory(len(ids)), jnp.zeros(len(ids), jnp.float32)
    (_, rec), _ = jax.lax.scan(read, begin, (jnp.arange(len(segments[0])), *segments))
    return rec


def counted_kl(
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
            return free_bits_kl(kl_BL, config.free_bits.target)
        case "clamp":
            return jnp.broadcast_to(jnp.maximum(mean(kl_BL), config.free_bits.target).sum(), kl_BL.shape[:-1])
        case "total":
            return jnp.broadcast_to(jnp.maximum(mean(kl_BL.sum(-1)), config.free_bits.target), kl_BL.shape[:-1])
        case "off":
            return kl_BL.sum(-1)


def decoder_waits(step: Int[Array, ""], steps: int, config: LaggingConfig) -> Bool[Array, ""]:
    """Whether a step, counted from 0, is one of the encoder alone."""
    in_turn = step % (config.encoder_steps + 1) != config.encoder_steps
    return in_turn & (step < config.until * steps)


def held(waits: Bool[Array, ""], updates: Params, states: tuple[optax.OptState, optax.OptState]):
    """Updates and the optimizer's next state, the decoder's part of both as if the step had not been: its moments and
    the number of steps that they are of (`optimizers.make_optimizer`, `halves`)."""

    def kept(path, before, after):
        of_decoder = any(getattr(part, "key", None) == "decoder" for part in path)
        return jnp.where(waits, before, after) if of_decoder else after

    still = jax.tree.map(lambda u: jnp.where(waits, 0, u).astype(u.dtype), updates["decoder"])
    return updates | {"decoder": still}, jax.tree.map_with_path(kept, *states)


def _halves(params: Params) -> tuple[Params, Params]:
    """Encoder and decoder, and the discriminator: each has its own optimizer."""
    main = {name: part for name, part in params.items() if name != "discriminator"}
    return main, {"discriminator": params["discriminator"]}
