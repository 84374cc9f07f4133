"""One training step: the objective with the five measures, its gradient, and both optimizers' updates."""

from __future__ import annotations

import math
from collections.abc import Callable, Container

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jax.sharding import NamedSharding, PartitionSpec
from jaxtyping import Array, Bool, Int

from davae_jax.data.batches import Batch
from davae_jax.data.packing import PackedBatch
from davae_jax.model.davae import Params, merge
from davae_jax.model.latent import Posterior, kl_per_dimension
from davae_jax.parallel.sharding import RULES
from davae_jax.regularizers import (
    normalized_head,
)
from davae_jax.training.config import LaggingConfig, TrainConfig
from davae_jax.training.objective import Logs, gradient, reconstruction
from davae_jax.training.schedules import beta_at, learning_rate
from davae_jax.training.state import TrainState, optimizers, regularizer_optimizers, split_discriminator


def not_finite_in(values: dict[str, float], regularizers: Container[str]) -> str | None:
    """What a run has to stop for, in words: a regularizer by its name, where it and not the model is at fault."""
    own = [name for name in values if name.partition("/")[0] in regularizers] if math.isfinite(values["rec"]) else []
    skipped = {"grad_norm"} if values.get("skipped") else set()  # the spike guard has seen to it
    for name in (*own, "loss", "loss_d", *({"grad_norm"} - skipped)):
        if not math.isfinite(values[name]):
            return f"{'regularizer ' if name in own else ''}{name} is {values[name]}"
    return None


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
        main_grads, discriminator_grads = split_discriminator(grads)
        main, discriminator = split_discriminator(state.params)
        updates, opt_state = optimizer.update(main_grads, state.optimizer, main)
        if config.lagging.encoder_steps:
            updates, opt_state = freeze_decoder_update(waits, updates, (state.optimizer, opt_state))
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


def decoder_waits(step: Int[Array, ""], steps: int, config: LaggingConfig) -> Bool[Array, ""]:
    """Whether a step, counted from 0, is one of the encoder alone."""
    in_turn = step % (config.encoder_steps + 1) != config.encoder_steps
    return in_turn & (step < config.until * steps)


def freeze_decoder_update(waits: Bool[Array, ""], updates: Params, states: tuple[optax.OptState, optax.OptState]):
    """Updates and the optimizer's next state, the decoder's part of both as if the step had not been: its moments and
    the number of steps that they are of (`optimizers.make_optimizer`, `halves`)."""

    def kept(path, before, after):
        of_decoder = any(getattr(part, "key", None) == "decoder" for part in path)
        return jnp.where(waits, before, after) if of_decoder else after

    still = jax.tree.map(lambda u: jnp.where(waits, 0, u).astype(u.dtype), updates["decoder"])
    return updates | {"decoder": still}, jax.tree.map_with_path(kept, *states)
