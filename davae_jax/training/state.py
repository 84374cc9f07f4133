"""The state of a run: weights, optimizer states, step."""

from __future__ import annotations

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.sharding import AbstractMesh, Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, Bool, Int

from davae_jax.model.davae import DAVAE, Params, split, weight_axes
from davae_jax.parallel.sharding import weight_sharding
from davae_jax.regularizers import (
    Learned,
    Sizes,
    active,
    init_own,
)
from davae_jax.training.config import TrainConfig, with_own_rate
from davae_jax.training.optimizers import make_optimizer


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
    main, discriminator = split_discriminator(params)
    optimizer, discriminator_optimizer = optimizers(config)
    sizes = Sizes(len(params["encoder"]["posterior"]["weight"]) // 2, len(params["decoder"]["embedding"]["weight"]))
    own = init_own(active(config.regularizers), config.seed, sizes)
    of_own = {name: one.init(own[name]) for name, one in regularizer_optimizers(config).items()}
    opt_states = optimizer.init(main), discriminator_optimizer.init(discriminator)
    return TrainState(jnp.int32(0), params, *opt_states, own, of_own)


@jax.jit
def all_finite(params: Params) -> Bool[Array, ""]:
    return jax.tree.reduce(jnp.logical_and, jax.tree.map(lambda w: jnp.isfinite(w).all(), params))


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

    pairs = zip(
        optimizers(config), (state.optimizer, state.discriminator_optimizer), split_discriminator(params), strict=True
    )
    opt_states = (of_optimizer(*pair) for pair in pairs)
    of_own = state.regularizers, state.regularizer_optimizers
    own = jax.tree.map(lambda x: placed(x, replicated), of_own)
    return TrainState(placed(state.step, replicated), params, *opt_states, *own)


def split_discriminator(params: Params) -> tuple[Params, Params]:
    """Encoder and decoder, and the discriminator: each has its own optimizer."""
    main = {name: part for name, part in params.items() if name != "discriminator"}
    return main, {"discriminator": params["discriminator"]}
