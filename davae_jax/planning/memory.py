"""Computes the memory that a training run needs per device: the state exactly, activations as JAX saves them.

Dimension letters are those of `model/layers.py`; `rows` is the number of texts that one device processes at once.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Mapping

import jax
import jax.numpy as jnp
from jax.sharding import AbstractMesh

from davae_jax.model.davae import abstract_model, split
from davae_jax.model.stack import is_stacked
from davae_jax.parallel.chips import Chip
from davae_jax.parallel.config import MeshConfig
from davae_jax.parallel.sharding import make_abstract_mesh
from davae_jax.planning.shapes import (
    FLOAT32_BYTES,
    batch_shapes,
    bytes_per_device,
    cached_abstract_state,
)
from davae_jax.training.config import InitConfig, TrainConfig
from davae_jax.training.flops import longest_rows, num_shards, rows_per_device
from davae_jax.training.freezing import join_frozen, split_frozen, trains_table
from davae_jax.training.objective import StepContext, objective

USABLE_MEMORY = 0.9  # of a chip's memory: the rest is for the runtime and fragmentation
MAX_CHIPS = 1024  # the largest number that `min_chips` tries
TRACED_ROWS = 1009  # of the batch that is traced: a prime, so that no other dimension has the same size


def memory(config: TrainConfig, mesh: AbstractMesh) -> dict[str, int]:
    """Returns bytes per device by kind. The state is exact; activations are those that JAX saves, before XLA's fusions.

    gradients: float32, of the trained weights; twice if gradients are accumulated over micro-batches.
    saved activations: those that the backward pass reads, given the remat policy.
    copy for a save: what a save's copy of stacked layers (`model.stack`) needs beyond the memory of a step.
    recomputed layer (peak): all activations of the largest layer, which remat recomputes in the backward pass.
    logits: those of one chunk, and their gradient.
    gathered weights: the whole embedding table in the compute dtype and its unsharded gradient, the largest arrays
      that are gathered at once.
    """
    kept, of_step = state_memory(config, mesh), step_memory(config, mesh.shape)
    free = kept["gradients"] + sum(of_step.values())
    return kept | of_step | {"copy for a save": max(0, stacked_memory(config, mesh) - free)}


def stacked_memory(config: TrainConfig, mesh: AbstractMesh) -> int:
    """Returns the bytes per device of the stacked weights and moments."""
    leaves = jax.tree_util.tree_leaves_with_path(cached_abstract_state(config, mesh))
    return bytes_per_device([leaf for path, leaf in leaves if is_stacked(path)])


def state_memory(config: TrainConfig, mesh: AbstractMesh) -> dict[str, int]:
    """Returns the kinds of `memory` that do not depend on the batch."""
    state = cached_abstract_state(config, mesh)
    main = {name: params for name, params in state.params.items() if name != "discriminator"}
    trained, _ = split_frozen(main, config.init.freeze)
    discriminator = state.params["discriminator"]
    gradients = 2 if config.accumulate > 1 else 1
    return {
        "parameters": bytes_per_device(main),
        "gradients": gradients * bytes_per_device(trained),
        "optimizer state": bytes_per_device(state.optimizer),
        "discriminator and its optimizer": bytes_per_device((state.discriminator_optimizer, state.step))
        + (1 + gradients) * bytes_per_device(discriminator),
    }


def step_memory(config: TrainConfig, mesh: Mapping[str, int]) -> dict[str, int]:
    """Returns the kinds of `memory` that a step allocates."""
    rows, tensor = rows_per_device(config, mesh), mesh["tensor"]
    decoder = config.model.decoder
    vocab_size = decoder.vocab_size // num_shards(decoder.vocab_size, tensor)
    itemsize = jnp.dtype(config.dtype).itemsize
    outside_layers, *saved_per_layer = activations(config, rows, tensor)
    _, *all_per_layer = activations(dataclasses.replace(config, remat="none"), rows, tensor)
    layers = config.model.encoder.num_hidden_layers, decoder.num_layers
    table_gradient = FLOAT32_BYTES if trains_table(config) else 0
    gathered = vocab_size * decoder.hidden_size * (itemsize + table_gradient) if mesh["fsdp"] > 1 else 0
    chunk = min(config.logits_chunk, longest_rows(config)[1])
    return {
        "saved activations": outside_layers + sum(n * saved for n, saved in zip(layers, saved_per_layer, strict=True)),
        "recomputed layer (peak)": max(all_per_layer),
        "logits": 2 * rows * chunk * vocab_size * FLOAT32_BYTES,
        "gathered weights": gathered,
    }


def fits_memory(memory: dict[str, int], chip: Chip) -> bool:
    """Returns whether a chip has this much memory."""
    return sum(memory.values()) <= USABLE_MEMORY * chip.memory


def min_chips(config: TrainConfig, chip: Chip) -> tuple[int, dict[str, int]] | None:
    """Returns the smallest number of chips whose memory suffices, and their mesh; None if more than MAX_CHIPS.

    The batch size and the tensor axis are taken from the config. The fsdp axis is as large as the decoder's width
    allows, and the data axis takes the rest.
    """
    tensor = max(config.mesh.tensor, 1)
    one_device = make_abstract_mesh(MeshConfig(1, 1, 1), config.batch_size, 1, config.accumulate)
    state_bytes = sum(state_memory(config, one_device).values())
    for shards in range(1, MAX_CHIPS // tensor + 1):
        if config.batch_size % (shards * config.accumulate):
            continue
        fsdp = math.gcd(shards, config.model.decoder.hidden_size)
        shape = {"data": shards // fsdp, "fsdp": fsdp, "tensor": tensor}
        # A lower bound first, because the exact state takes a second: no axis does more than divide the state.
        if not fits_memory({"state": state_bytes // (fsdp * tensor)} | step_memory(config, shape), chip):
            continue
        mesh = make_abstract_mesh(MeshConfig(**shape), config.batch_size, shards * tensor, config.accumulate)
        if fits_memory(memory(config, mesh), chip):
            return shards * tensor, dict(mesh.shape)
    return None


def activations(config: TrainConfig, rows: int, tensor: int) -> tuple[int, int, int]:
    """Returns the bytes of the activations of `rows` texts that are saved for the backward pass.

    The result is (outside the layers, per encoder layer, per decoder layer).

    They are the differences between JAX's traces of the objective with one layer and with two. Dimensions that the
    tensor axis shards (heads, feed-forward, vocabulary) count as sharded in all of them.
    """
    base, extra_encoder, extra_decoder = (
        sum(_bytes_per_row(leaf, config, tensor) for leaf in _residuals(_shape_settings(config), layers))
        for layers in ((1, 1), (2, 1), (1, 2))
    )
    encoder, decoder = extra_encoder - base, extra_decoder - base
    return tuple(round(rows * per_row) for per_row in (base - encoder - decoder, encoder, decoder))


@functools.lru_cache(maxsize=32)
def _residuals(config: TrainConfig, layers: tuple[int, int]) -> list[jax.ShapeDtypeStruct]:
    """Returns the arrays that `jax.vjp` of the objective saves, for TRACED_ROWS texts and these numbers of layers."""
    model = config.model
    encoder = dataclasses.replace(model.encoder, num_hidden_layers=layers[0])
    decoder = dataclasses.replace(model.decoder, num_layers=layers[1])
    config = dataclasses.replace(config, model=dataclasses.replace(model, encoder=encoder, decoder=decoder))
    graphdef, params = split(abstract_model(config.model, dtype=config.dtype))

    def vjp(params, batch, key):
        context = StepContext(key, jnp.float32(1))
        trained, frozen = split_frozen(params, config.init.freeze)
        return jax.vjp(lambda p: objective(join_frozen(p, frozen), graphdef, batch, context, config).total, trained)[1]

    key = jax.eval_shape(lambda: jax.random.key(0))
    leaves = jax.tree.leaves(jax.eval_shape(vjp, params, batch_shapes(config, TRACED_ROWS), key))
    return [x for x in leaves if TRACED_ROWS in x.shape]


def _shape_settings(config: TrainConfig) -> TrainConfig:
    """Returns a config with the fields that the objective's shapes depend on, so that equal ones share a trace."""
    defaults = TrainConfig(model=config.model, data=config.data, init=InitConfig(freeze=config.init.freeze))
    names = ("dtype", "remat", "logits_chunk", "noise", "attention")
    return dataclasses.replace(defaults, **{name: getattr(config, name) for name in names})


def _bytes_per_row(x: jax.ShapeDtypeStruct, config: TrainConfig, tensor: int) -> float:
    """Returns the bytes of one text in a traced array, on one device of the tensor axis."""
    encoder, decoder = config.model.encoder, config.model.decoder
    sharded_widths = (encoder.intermediate_size, 4 * decoder.hidden_size, decoder.vocab_size)
    heads = (encoder.num_attention_heads, decoder.num_attention_heads)
    head_dims = [n for n in x.shape[1:3] if n in heads] if len(x.shape) == 4 else []
    width_dims = [n for n in x.shape[-1:] if n in sharded_widths]
    shards = max([num_shards(n, tensor) for n in head_dims + width_dims], default=1)
    return x.size * x.dtype.itemsize / TRACED_ROWS / shards
