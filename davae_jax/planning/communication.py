"""Estimates the bytes that each device of a training run sends per step, by mesh axis."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import AbstractMesh

from davae_jax.model.davae import Params
from davae_jax.parallel.chips import Chip
from davae_jax.planning.shapes import FLOAT32_BYTES, bytes_per_device, cached_abstract_state
from davae_jax.training.config import TrainConfig
from davae_jax.training.flops import longest_rows, rows_per_device
from davae_jax.training.freezing import split_frozen


class Traffic(NamedTuple):
    """The communication of each device over one mesh axis in one step."""

    size: int  # devices on the axis
    bytes: int
    rate: float  # bytes/s of the links that the axis uses


def traffic(config: TrainConfig, mesh: AbstractMesh, chip: Chip) -> dict[str, Traffic]:
    """Returns the traffic by axis, with ring algorithms: over k devices an all-reduce of n bytes sends 2·n·(k−1)/k, an
    all-gather or reduce-scatter, n bytes unsharded, n·(k−1)/k. All of it repeats for each of the `accumulate`
    micro-batches.
    """
    params = cached_abstract_state(config, mesh).params
    data, fsdp = _weight_bytes(config, params, mesh.shape["fsdp"])
    fsdp += _embedding_bytes(config, mesh.shape)
    tensor = _activation_bytes(config, mesh.shape)
    axes, devices = {}, math.prod(mesh.shape[axis] for axis in ("data", "fsdp", "tensor"))
    for axis, unsharded in (("data", data), ("fsdp", fsdp), ("tensor", tensor)):
        k = mesh.shape[axis]
        # Neighbours of the last axis are adjacent devices: an axis uses the network if it and the axes after it span
        # more devices than a group.
        rate = chip.link if devices <= chip.group else chip.network
        axes[axis] = Traffic(k, round(config.accumulate * unsharded * (k - 1) / k), rate)
        devices //= k
    return axes


def _weight_bytes(config: TrainConfig, params: Params, fsdp: int) -> tuple[int, float]:
    """Returns the bytes over the data axis and over the fsdp axis that weights and their gradients need.

    data: all-reduces of the gradients. fsdp: all-gathers of the weights in the compute dtype, forward and backward,
    and reduce-scatters of the gradients; all-reduces if a weight is not sharded. The word table is gathered, and its
    gradient reduced, for each chunk of the logits in the backward pass. Frozen weights have no gradient; all are
    counted as gathered for a backward pass, which a frozen encoder does not have.
    """
    itemsize, T = jnp.dtype(config.dtype).itemsize, longest_rows(config)[1]
    word_table, chunks = params["decoder"]["embedding"]["weight"], math.ceil(T / config.logits_chunk)
    trained, frozen = (jax.tree.leaves(part) for part in split_frozen(params, config.init.freeze))
    over_data = over_fsdp = 0
    for weight in trained + frozen:
        size, uses = bytes_per_device(weight), chunks if weight is word_table else 1
        reductions = uses if any(weight is other for other in trained) else 0
        over_data += 2 * reductions * size
        if "fsdp" in weight.sharding.spec:
            over_fsdp += fsdp * size * ((1 + uses) * itemsize / FLOAT32_BYTES + reductions)
        else:
            over_fsdp += 2 * reductions * size
    return over_data, over_fsdp


def _embedding_bytes(config: TrainConfig, mesh: Mapping[str, int]) -> int:
    """Returns the bytes over the fsdp axis for exchanging token embeddings and their gradients."""
    rows, (S, T) = rows_per_device(config, mesh), longest_rows(config)
    widths = config.model.encoder.hidden_size, config.model.decoder.hidden_size
    return sum(
        2 * rows * length * D * FLOAT32_BYTES * (D % mesh["fsdp"] == 0)
        for length, D in zip((S, T), widths, strict=True)
    )


def _activation_bytes(config: TrainConfig, mesh: Mapping[str, int]) -> int:
    """Returns the bytes over the tensor axis: all-reduces of activations after each layer's two maps to the residual
    stream and before its two maps from it, those that remat repeats, and all-gathers of q, k, v and their context if
    the axis does not divide the heads.
    """
    rows, (S, T) = rows_per_device(config, mesh), longest_rows(config)
    encoder, decoder = config.model.encoder, config.model.decoder
    itemsize, full_remat = jnp.dtype(config.dtype).itemsize, int(config.remat == "full")
    # The embedding lookup, and the gradient of the logits.
    total = 4 * rows * T * decoder.hidden_size * itemsize
    for length, D, N, layers, repeated in (
        (S, encoder.hidden_size, encoder.num_attention_heads, encoder.num_hidden_layers, 2),
        (T, decoder.hidden_size, decoder.num_attention_heads, decoder.num_layers, 1),
    ):
        reduced = 2 * (2 + 2 + full_remat * repeated)
        gathered = 0 if N % mesh["tensor"] == 0 else 3 * (1 + full_remat) + 1
        total += layers * rows * length * D * itemsize * (reduced + gathered)
    return total
