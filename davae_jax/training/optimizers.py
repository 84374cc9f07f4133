"""Makes the optimizers of a run from optax's, with an optional guard against gradient spikes."""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, Int

from davae_jax.model.davae import Params
from davae_jax.model.stack import first_layers, layer_axes, stacked_halves
from davae_jax.training.config import OptimizerConfig
from davae_jax.training.schedules import learning_rate


def make_optimizer(config: OptimizerConfig, steps: int, separate_decoder: bool = False) -> optax.GradientTransformation:
    """Returns the optimizer: clipping by the global norm, then the update. Weight decay applies to matrices only.

    Args:
      steps: the number of steps of the whole training, for the learning rate schedule.
      separate_decoder: keep the decoder's moments and step count apart from the encoder's.
    """
    clip = optax.clip_by_global_norm(config.clip) if config.clip else optax.identity()
    optimizer = optax.chain(clip, per_layer(_update(config, steps, separate_decoder)))
    return skip_spikes(optimizer, config.spike) if config.spike else optimizer


class SpikeState(NamedTuple):
    usual: Float[Array, ""]  # running mean of the gradient's norm
    seen: Int[Array, ""]  # number of steps
    skipped: Int[Array, ""]  # number of skipped steps
    inner: optax.OptState


def skip_spikes(optimizer: optax.GradientTransformation, factor: float) -> optax.GradientTransformation:
    """Returns an optimizer that leaves weights and optimizer state unchanged if the gradient norm spikes.

    A spike is a norm above `factor` times its running mean over about the last 100 steps. No step is skipped during the
    first 100. Every skipped step raises the mean by a tenth, so that a norm that remains high is accepted eventually.
    """
    memory = 100

    def init(params: Params) -> SpikeState:
        return SpikeState(jnp.float32(0), jnp.int32(0), jnp.int32(0), optimizer.init(params))

    def update(grads: Params, state: SpikeState, params: Params):
        norm = optax.tree.norm(grads)
        spike = (state.seen >= memory) & ~(norm <= factor * state.usual)
        updates, inner = optimizer.update(grads, state.inner, params)
        updates = jax.tree.map(lambda u: jnp.where(spike, 0, u).astype(u.dtype), updates)
        inner = jax.tree.map(lambda old, new: jnp.where(spike, old, new), state.inner, inner)
        rate = 1 / jnp.minimum(state.seen + 1, memory)
        usual = jnp.where(spike, 1.1 * state.usual, state.usual + rate * (norm - state.usual))
        return updates, SpikeState(usual, state.seen + 1, state.skipped + spike, inner)

    return optax.GradientTransformation(init, update)


def per_layer(optimizer: optax.GradientTransformation) -> optax.GradientTransformation:
    """Returns an optimizer that updates each layer of a stack as it would a weight of its own (`model.stack`).

    What counts the axes of a weight, or takes its norm, then sees one layer's. Steps are counted once for all.
    """

    def init(params: Params) -> optax.OptState:
        if not (halves := stacked_halves(params)):
            return optimizer.init(params)
        one_layer = jax.eval_shape(lambda p: optimizer.init(first_layers(p)), params)
        function = optimizer.init
        for half in halves:
            function = jax.vmap(function, (layer_axes(params, half),), layer_axes(one_layer, half))
        return function(params)

    def update(grads: Params, state: optax.OptState, params: Params):
        function = optimizer.update
        for half in stacked_halves(params):
            axes, state_axes = layer_axes(params, half), layer_axes(state, half)
            function = jax.vmap(function, (axes, state_axes, axes), (axes, state_axes))
        return function(grads, state, params)

    return optax.GradientTransformation(init, update)


def _update(config: OptimizerConfig, steps: int, separate_decoder: bool) -> optax.GradientTransformation:
    match config.name:
        case "adamw":
            direction = optax.scale_by_adam(config.b1, config.b2, config.eps)
        case "adafactor":
            update = optax.adafactor(None, multiply_by_parameter_scale=False, momentum=None)
            direction = optax.chain(update, optax.scale(-1.0))
        case "muon":
            # consistent_rms gives updates of the same size as AdamW's, so that one learning rate serves both.
            adam = dict(adam_b1=config.b1, adam_b2=config.b2, eps=config.eps)
            update = optax.contrib.muon(1.0, muon_weight_dimension_numbers=_muon_axes, consistent_rms=0.2, **adam)
            direction = optax.chain(update, optax.scale(-1.0))
    if separate_decoder:
        direction = optax.partition({"decoder": direction, "others": direction}, _partition_label)
    # Learning rate and decay act as in AdamW for every optimizer: the decay is also multiplied by the learning rate.
    return optax.chain(
        direction,
        optax.add_decayed_weights(config.weight_decay, _is_matrix),
        optax.scale_by_learning_rate(learning_rate(config, steps)),
    )


def _partition_label(params: Params):
    return jax.tree.map_with_path(lambda path, w: "decoder" if path[0].key == "decoder" else "others", params)


def _is_matrix(params: Params):
    """Returns a mask of the weights that decay. Some biases have two axes; they are recognized by their names."""
    return jax.tree.map_with_path(lambda path, w: w.ndim > 1 and "bias" not in jax.tree_util.keystr(path[-1:]), params)


def _muon_axes(params: Params):
    """Returns the axes of the matrices inside the layers, which Muon updates; AdamW updates all other weights."""

    def axes(path, w, is_matrix):
        in_layer = any(getattr(key, "key", None) == "layers" for key in path)
        return optax.contrib.MuonDimensionNumbers(w.ndim - 1, w.ndim - 2) if in_layer and is_matrix else None

    return jax.tree.map_with_path(axes, params, _is_matrix(params))
