"""Computes a training step, the gradient of the objective and the updates of all optimizers, in one program."""

from __future__ import annotations

import math
from collections.abc import Callable, Container
from functools import partial

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jax.sharding import NamedSharding, PartitionSpec
from jaxtyping import Array, Bool, Int

from davae_jax.data.batches import Batch
from davae_jax.model.davae import Params, merge, trainable_mask, zero_buffers
from davae_jax.model.latent import kl_per_dimension
from davae_jax.parallel.sharding import batch_sharding
from davae_jax.regularizers import normalized_head
from davae_jax.training.config import LaggingConfig, TrainConfig
from davae_jax.training.freezing import join_frozen, split_frozen
from davae_jax.training.objective import Logs, StepContext, gradient, reconstruction
from davae_jax.training.schedules import beta_at, learning_rate
from davae_jax.training.state import TrainState, optimizers, regularizer_optimizers, split_discriminator

TrainStep = Callable[[TrainState, Batch], tuple[TrainState, Logs]]
HeldOutLoss = Callable[[Params, Batch], Logs]


def make_train_step(
    graphdef: nnx.GraphDef,
    config: TrainConfig,
    abstract: TrainState | None = None,
    corpus_size: int | None = None,
) -> TrainStep:
    """Returns the compiled step (state, batch) → (next state, values to log). The state's buffers are reused.

    Args:
      abstract: the shardings of the state on a mesh. Batches are then split over the mesh and logs are replicated; call
        the step under `jax.set_mesh`. None: everything is on the first device.
      corpus_size: number of training texts; some regularizers need it.
    """
    step = partial(train_step, graphdef=graphdef, config=config, corpus_size=corpus_size)
    if abstract is None:
        return jax.jit(step, donate_argnums=0)
    shardings = jax.tree.map(lambda x: x.sharding, abstract)
    mesh = shardings.step.mesh
    return jax.jit(
        step,
        donate_argnums=0,
        in_shardings=(shardings, batch_sharding(mesh)),
        out_shardings=(shardings, NamedSharding(mesh, PartitionSpec())),
    )


def train_step(
    state: TrainState, batch: Batch, *, graphdef: nnx.GraphDef, config: TrainConfig, corpus_size: int | None
) -> tuple[TrainState, Logs]:
    """Returns the state after the step, and the values to log. Random numbers follow from the seed and the step."""
    optimizer, discriminator_optimizer = optimizers(config)
    context = StepContext(
        key=jax.random.fold_in(jax.random.key(config.seed), state.step),
        beta=beta_at(state.step, config.steps, config.beta),
        step=state.step,
        corpus_size=corpus_size,
    )
    trained = state.params | ({"regularizers": state.regularizers} if state.regularizers else {})
    grads, logs = gradient(trained, graphdef, batch, context, config)
    regularizers, regularizer_states = update_regularizers(state, grads.pop("regularizers", {}), config)
    grads = zero_buffers(trainable_mask(merge(graphdef, state.params)), grads)

    lagging = config.lagging.encoder_steps > 0
    if lagging:
        encoder_only = is_encoder_only_step(state.step, config.steps, config.lagging)
        grads["decoder"] = jax.tree.map(lambda g: jnp.where(encoder_only, 0, g), grads["decoder"])
    main_grads, discriminator_grads = split_discriminator(grads)
    trained, frozen = split_frozen(state.params, config.init.freeze)
    main, discriminator = split_discriminator(trained)
    updates, optimizer_state = optimizer.update(main_grads, state.optimizer, main)
    if lagging:
        updates, optimizer_state = freeze_decoder_update(encoder_only, updates, state.optimizer, optimizer_state)
    discriminator_updates, discriminator_state = discriminator_optimizer.update(
        discriminator_grads, state.discriminator_optimizer, discriminator
    )
    trained = optax.apply_updates(main, updates) | optax.apply_updates(discriminator, discriminator_updates)
    params = join_frozen(trained, frozen)
    if config.posterior.mean_scale:
        head = params["encoder"]["posterior"]
        statistics = logs.pop("mean_std"), logs.pop("pooled")
        head["weight"] = normalized_head(head["weight"], config.posterior.mean_scale, *statistics)

    logs |= {
        "beta": context.beta,
        "lr": learning_rate(config.optimizer, config.steps)(state.step),
        "grad_norm": optax.tree.norm(main_grads),
        "tokens": jnp.maximum(batch.lengths - 1, 0).sum(),
    }
    if config.optimizer.spike:
        logs["skipped"] = jnp.float32(optimizer_state.skipped - state.optimizer.skipped)
    next_state = TrainState(
        state.step + 1, params, optimizer_state, discriminator_state, regularizers, regularizer_states
    )
    return next_state, logs


def update_regularizers(
    state: TrainState, grads: Params, config: TrainConfig
) -> tuple[dict[str, Params], dict[str, optax.OptState]]:
    """Returns the updated parameters of the regularizers, and the states of their optimizers."""
    params, opt_states = {}, {}
    for name, optimizer in regularizer_optimizers(config).items():
        old_params = state.regularizers[name]
        updates, opt_states[name] = optimizer.update(grads[name], state.regularizer_optimizers[name], old_params)
        params[name] = optax.apply_updates(old_params, updates)
    return params, opt_states


def is_encoder_only_step(step: Int[Array, ""], steps: int, config: LaggingConfig) -> Bool[Array, ""]:
    """Returns whether a step, counted from 0, updates the encoder alone (He et al. 2019)."""
    waiting = step % (config.encoder_steps + 1) != config.encoder_steps
    return waiting & (step < config.until * steps)


def freeze_decoder_update(
    frozen: Bool[Array, ""], updates: Params, old_state: optax.OptState, new_state: optax.OptState
) -> tuple[Params, optax.OptState]:
    """Returns the updates and the optimizer's next state, both unchanged for the decoder if `frozen`.

    The decoder's moments and their step count are kept apart from the encoder's (`optimizers.make_optimizer`), so that
    they remain as if the step had not happened.
    """

    def select(path, old, new):
        is_decoder = any(getattr(entry, "key", None) == "decoder" for entry in path)
        return jnp.where(frozen, old, new) if is_decoder else new

    decoder = jax.tree.map(lambda u: jnp.where(frozen, 0, u).astype(u.dtype), updates["decoder"])
    return updates | {"decoder": decoder}, jax.tree.map_with_path(select, old_state, new_state)


def make_held_out_loss(graphdef: nnx.GraphDef, config: TrainConfig, abstract: TrainState) -> HeldOutLoss:
    """Returns the compiled loss of held-out texts: (params, batch) → scalars "loss", "rec" and "kl".

    There is no noise, β is at its maximum and the full KL counts. The latents are sampled with the same key every time,
    so that checkpoints can be compared.
    """

    def held_out_loss(params: Params, batch: Batch) -> Logs:
        model = merge(graphdef, params)
        encoded = model.encoder(batch.encoder_ids)
        posterior = encoded.posterior
        latent = posterior.sample(jax.random.key(config.seed))
        rec, length = reconstruction(model, batch, latent, None, config)
        rec_per_token = rec / length
        kl = kl_per_dimension(posterior).sum(-1)
        loss = (rec_per_token if config.length_weighted else rec) + config.beta.max * kl
        return {"loss": loss.mean(), "rec": rec_per_token.mean(), "kl": kl.mean()}

    shardings = jax.tree.map(lambda x: x.sharding, abstract.params)
    mesh = abstract.step.sharding.mesh
    rows = batch_sharding(mesh)
    return jax.jit(held_out_loss, in_shardings=(shardings, rows), out_shardings=NamedSharding(mesh, PartitionSpec()))


@jax.jit
def all_finite(arrays: Params) -> Bool[Array, ""]:
    """Returns whether no array of the tree contains NaN or infinity."""
    return jax.tree.reduce(jnp.logical_and, jax.tree.map(lambda x: jnp.isfinite(x).all(), arrays))


def describe_non_finite(values: dict[str, float], regularizers: Container[str]) -> str | None:
    """Returns a description of the first value that is not finite, or None if training may continue.

    If the reconstruction loss is finite, regularizers are checked first. The gradient norm is not checked if the spike
    guard has skipped the update.
    """
    names = [name for name in values if name.partition("/")[0] in regularizers] if math.isfinite(values["rec"]) else []
    regularizer_names = set(names)
    names += ["loss", "loss_d", *([] if values.get("skipped") else ["grad_norm"])]
    for name in names:
        if not math.isfinite(values[name]):
            return f"{'regularizer ' if name in regularizer_names else ''}{name} is {values[name]}"
    return None
