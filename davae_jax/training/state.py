"""Defines the state of a run, which checkpoints contain, its initial value and its sharding over a mesh."""

from __future__ import annotations

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.sharding import AbstractMesh, Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, Int

from davae_jax.model.davae import DAVAE, Params, split, weight_axes
from davae_jax.parallel.sharding import weight_sharding
from davae_jax.regularizers import Learned, Sizes, active, init_regularizer_params
from davae_jax.training.config import TrainConfig, with_constant_rate
from davae_jax.training.freezing import split_frozen
from davae_jax.training.optimizers import make_optimizer


class TrainState(NamedTuple):
    """Everything that changes in a run. The data order and all random numbers follow from the seed and the step.

    The fields' names are part of the format of checkpoints.
    """

    step: Int[Array, ""]  # number of steps taken
    params: Params
    optimizer: optax.OptState  # of encoder and decoder, without what is frozen
    discriminator_optimizer: optax.OptState
    regularizers: dict[str, Params]  # parameters of regularizers, by name; not part of the model
    regularizer_optimizers: dict[str, optax.OptState]


def optimizers(config: TrainConfig) -> tuple[optax.GradientTransformation, optax.GradientTransformation]:
    """Returns the optimizer of encoder and decoder, and the discriminator's."""
    main = make_optimizer(config.optimizer, config.steps, separate_decoder=config.lagging.encoder_steps > 0)
    return main, make_optimizer(config.adversarial.optimizer(config.optimizer), config.steps)


def regularizer_optimizers(config: TrainConfig) -> dict[str, optax.GradientTransformation]:
    """Returns the optimizer of each active regularizer that has parameters, by name."""
    return {
        name: make_optimizer(with_constant_rate(config.optimizer, regularizer.learning_rate), config.steps)
        for name, regularizer in active(config.regularizers).items()
        if isinstance(regularizer, Learned)
    }


def init_state(params: Params, config: TrainConfig) -> TrainState:
    """Returns the state before the first step, for a model's initial weights."""
    main, discriminator = split_discriminator(split_frozen(params, config.init.freeze)[0])
    optimizer, discriminator_optimizer = optimizers(config)
    sizes = Sizes(len(params["encoder"]["posterior"]["weight"]) // 2, len(params["decoder"]["embedding"]["weight"]))
    regularizers = init_regularizer_params(active(config.regularizers), config.seed, sizes)
    regularizer_states = {name: opt.init(regularizers[name]) for name, opt in regularizer_optimizers(config).items()}
    return TrainState(
        jnp.int32(0),
        params,
        optimizer.init(main),
        discriminator_optimizer.init(discriminator),
        regularizers,
        regularizer_states,
    )


def abstract_state(model: DAVAE, config: TrainConfig, mesh: Mesh | AbstractMesh) -> TrainState:
    """Returns shape, dtype and sharding of every array in the state of an abstract model.

    An optimizer's moments are sharded like their weight. The parameters of regularizers are small and replicated.
    """
    replicated = NamedSharding(mesh, PartitionSpec())

    def with_sharding(x, sharding):
        return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding)

    def replicate(x):
        return with_sharding(x, replicated)

    def like_weight(moment, weight):
        if isinstance(moment, optax.MaskedNode):  # Muon has no moments for AdamW's weights, and vice versa
            return moment
        # Adafactor keeps sums over a weight's rows and columns, which are small: replicated.
        return with_sharding(moment, weight.sharding if moment.shape == weight.shape else replicated)

    def optimizer_layout(optimizer, opt_state, weights):
        return optax.tree.map_params(
            optimizer,
            like_weight,
            opt_state,
            weights,
            transform_non_params=replicate,
            is_leaf=lambda x: isinstance(x, optax.MaskedNode),
        )

    def weight_layout(weight, axes):
        return with_sharding(weight, weight_sharding(axes, weight.shape, mesh))

    params = jax.tree.map(weight_layout, split(model)[1], weight_axes(model))
    state = jax.eval_shape(partial(init_state, config=config), params)
    main_optimizer, discriminator_optimizer = optimizers(config)
    main, discriminator = split_discriminator(split_frozen(params, config.init.freeze)[0])
    return TrainState(
        replicate(state.step),
        params,
        optimizer_layout(main_optimizer, state.optimizer, main),
        optimizer_layout(discriminator_optimizer, state.discriminator_optimizer, discriminator),
        *jax.tree.map(replicate, (state.regularizers, state.regularizer_optimizers)),
    )


def split_discriminator(params: Params) -> tuple[Params, Params]:
    """Returns the parameters of encoder and decoder, and those of the discriminator, which has a separate optimizer."""
    main = {name: weights for name, weights in params.items() if name != "discriminator"}
    return main, {"discriminator": params["discriminator"]}
