"""Stacks the layers of a deep model, so that a training step compiles one layer instead of all of them.

A model of more than SCAN_ABOVE layers is trained in this form: each weight of the layers, and each of the optimizer's
moments, is one array with a leading axis of layers, over which `jax.lax.scan` runs. XLA takes about as long to compile
the update of a weight as a part of the layer itself, so stacking inside the step alone would not help. Checkpoints and
decoding have a weight for each layer: a decoding loop would copy each layer's weights out of the stack at every token.

In the params, the layers of a stack are {"layers": {"stacked": weights}} in place of {"layers": {0: weights, 1: …}}.
"""

from __future__ import annotations

import functools
import operator
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax
from jax.sharding import NamedSharding, PartitionSpec
from jaxtyping import Array, Int

Layer = TypeVar("Layer", bound=nnx.Module)
Tree = Any  # a pytree of arrays

SCAN_ABOVE = 8  # layers; the time that XLA takes to compile a training step grows with the layers up to this number
LAYER_AXIS = "layer"  # the logical axis of the layers, which no mesh axis shards
STACKED = "stacked"  # the key of a stack's weights


class Stack(nnx.Module):
    """Many layers of one kind as one module, each of whose weights has a leading axis of layers."""

    def __init__(self, layers: Sequence[nnx.Module]):
        """layers: of an abstract model."""

        def with_axis(variable: nnx.Variable) -> nnx.Variable:
            x = variable.get_value()
            value = jax.ShapeDtypeStruct((len(layers), *x.shape), x.dtype)
            return variable.replace(value, axes=(LAYER_AXIS, *variable.get_metadata("axes")))

        graphdef, state = nnx.split(layers[0])
        is_variable = lambda x: isinstance(x, nnx.Variable)  # noqa: E731
        self.stacked = nnx.merge(graphdef, jax.tree.map(with_axis, state, is_leaf=is_variable))
        self.length = len(layers)

    def __len__(self) -> int:
        return self.length


def apply_in_order(
    layers: Sequence[Layer] | Stack,
    apply: Callable[[Layer, Array, Any], tuple[Array, Any]],
    x: Array,
    inputs: Sequence,
) -> tuple[list[Array], list]:
    """Applies layers of one kind one after the other, the first to x, each other one to the output of the one before.

    Args:
      layers: a list, or a stack, of which one layer is compiled as the body of a loop. The results are the same but for
        rounding.
      apply: called as `apply(layer, x, inputs[i])`. It returns the layer's output and a second value of any kind.
      inputs: a pytree for each layer, all of the same structure.

    Returns:
      The outputs of all layers, and the second values.
    """
    if not isinstance(layers, Stack):
        outputs, extras = [], []
        for i, layer in enumerate(layers):
            with jax.named_scope(f"layer_{i}"):
                x, extra = apply(layer, x, inputs[i])
            outputs.append(x)
            extras.append(extra)
        return outputs, extras

    graphdef, weights = nnx.split(layers.stacked)

    def body(x, one):
        weights, given = one
        with jax.named_scope("layer"):
            x, extra = apply(nnx.merge(graphdef, weights), x, given)
        return x, (x, extra)

    _, results = lax.scan(body, x, (weights, _stack(*inputs)))
    outputs, extras = zip(*[jax.tree.map(operator.itemgetter(i), results) for i in range(len(layers))], strict=True)
    return list(outputs), list(extras)


def stack_layers(tree: Tree) -> Tree:
    """Returns params, or a state of params and moments, with the layers of each deep half stacked."""
    return jax.tree.map(lambda x: {STACKED: _stack(*x.values())} if _is_deep(x) else x, tree, is_leaf=_is_deep)


def unstack_layers(tree: Tree) -> Tree:
    """Returns the inverse of `stack_layers`, of arrays or of their shapes with shardings (`jax.ShapeDtypeStruct`)."""

    def unstack(x):
        if not _is_stack(x) or not (leaves := jax.tree.leaves(x)):  # none if an optimizer has no moments of them
            return x
        return {i: jax.tree.map(functools.partial(_layer_of, i), x[STACKED]) for i in range(leaves[0].shape[0])}

    return jax.tree.map(unstack, tree, is_leaf=_is_stack)


def stacked_halves(params: Tree) -> list[str]:
    """Returns which of encoder and decoder have stacked layers."""
    return [half for half in ("encoder", "decoder") if jax.tree.leaves(layer_axes(params, half))]


def layer_axes(tree: Tree, half: str) -> Tree:
    """Returns 0 for each array of a half's stacked layers and None for all others, for `jax.vmap` over the layers."""

    def axis(path, _):
        return 0 if is_stacked(path) and jax.tree_util.DictKey(half) in path else None

    return jax.tree.map_with_path(axis, tree)


def is_stacked(path: jax.tree_util.KeyPath) -> bool:
    """Returns whether the array at a path of params, or of moments, has an axis of layers."""
    return jax.tree_util.DictKey(STACKED) in path


def first_layers(tree: Tree) -> Tree:
    """Returns the params with the first layer's weights in place of stacked ones."""
    return jax.tree.map(lambda x: jax.tree.map(lambda w: w[0], x) if _is_stack(x) else x, tree, is_leaf=_is_stack)


def _is_deep(x: Any) -> bool:
    return isinstance(x, dict) and len(x) > SCAN_ABOVE and all(isinstance(key, int) for key in x)


def _is_stack(x: Any) -> bool:
    return isinstance(x, dict) and x.keys() == {STACKED}


def _stack(*layers: Tree) -> Tree:
    return jax.tree.map(lambda *leaves: jnp.stack(leaves), *layers)


def _layer_of(i: int, stacked: Array | jax.ShapeDtypeStruct) -> Array | jax.ShapeDtypeStruct:
    """Returns a layer's part of a stacked array, or its shape and sharding."""
    if not isinstance(stacked, jax.ShapeDtypeStruct):
        return _take(stacked, i)
    sharding = stacked.sharding
    if isinstance(sharding, NamedSharding):
        sharding = NamedSharding(sharding.mesh, PartitionSpec(*sharding.spec[1:]))
    return jax.ShapeDtypeStruct(stacked.shape[1:], stacked.dtype, sharding=sharding)


@jax.jit
def _take(stacked: Array, i: Int[Array, ""] | int) -> Array:
    """Returns stacked[i]; compiled once for all i."""
    return lax.dynamic_index_in_dim(stacked, i, keepdims=False)
