"""Estimates the memory traffic of the decoder's attention with each of its implementations, and the time it takes."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

import jax.numpy as jnp

from davae_jax.parallel.chips import Chip
from davae_jax.planning.shapes import FLOAT32_BYTES
from davae_jax.training.config import TrainConfig
from davae_jax.training.flops import (
    ATTENTION_PRODUCTS,
    AttentionShape,
    attention_shape,
    decoder_segments,
    longest_rows,
)
from davae_jax.utils.errors import OptionError
from davae_jax.utils.shapes import round_up

# How often arrays of the scores' size, in float32, go through memory (forward, backward) in XLA's programs for a TPU
# v5e (benchmarks/attention.py) and for an H100. For TPUs, XLA counts what stays in the chip's fast memory too.
SCORES = {"tpu": (18, 14), "gpu": (8, 13)}
# How often arrays of the size of q do with the kernels, of which they read or write 4 and 8: XLA's program for a v5e
# and 8 texts copies them before, to pad them and to change their layout, and after.
KERNEL_ARRAYS = (17, 20)
LANES = 128  # to which TPUs pad the width of a head


def with_planned_attention(config: TrainConfig, chip: Chip) -> TrainConfig:
    """Returns the config with the implementation that a run on such chips uses.

    `auto` is assumed to choose the one with the least memory traffic, the last one of the chip's. The run measures.

    Raises:
      OptionError: the one that --attention names does not run on the chip.
    """
    name = chip.attention[-1] if config.attention == "auto" else config.attention
    if name not in chip.attention:
        raise OptionError("--attention", f"{name} does not run on {chip.name}, which runs {', '.join(chip.attention)}")
    return dataclasses.replace(config, attention=name)


def attention_flops(implementation: str, shape: AttentionShape, *, backward: bool) -> float:
    """Returns the FLOPs of one layer's matrix products, forward, and backward if asked for."""
    B, N, T, K, H = shape
    forward, back = ATTENTION_PRODUCTS[implementation]
    return 2 * B * N * T * K * H * (forward + back * backward)


def attention_bytes(
    implementation: str, shape: AttentionShape, itemsize: int, platform: str, *, backward: bool
) -> float:
    """Returns the bytes that one layer moves between the chip and its memory, forward, and backward if asked for."""
    B, N, T, K, H = shape
    if implementation == "xla":
        forward, back = SCORES[platform]
        return FLOAT32_BYTES * B * N * T * K * (forward + back * backward)
    row = B * N * round_up(H, LANES) * itemsize
    # Half of the arrays have a row for each query, the others for each key.
    rows = (round_up(T, LANES) + round_up(K, LANES)) / 2
    return row * rows * (KERNEL_ARRAYS[0] + KERNEL_ARRAYS[1] * backward)


def roofline_seconds(chip: Chip, flops: float, moved: float) -> float:
    """Returns the time that products or memory traffic take at the chip's full rates, whichever is longer."""
    return max(flops / chip.flops, moved / chip.bandwidth)


def attention_traffic(config: TrainConfig, mesh: Mapping[str, int], chip: Chip) -> float:
    """Returns the bytes that the decoder's attention moves on each device in one step, with what remat repeats."""
    return _of_a_step(config, mesh, attention_bytes, jnp.dtype(config.dtype).itemsize, chip.platform)


def memory_wait(config: TrainConfig, mesh: Mapping[str, int], chip: Chip, efficiency: float) -> float:
    """Returns the seconds by which the attention's memory traffic of a step, at the memory's full rate, takes longer
    than its products at `efficiency` of the peak: 0 if they take longer."""
    products = _of_a_step(config, mesh, attention_flops) / (chip.flops * efficiency)
    return max(0.0, attention_traffic(config, mesh, chip) / chip.bandwidth - products)


def _of_a_step(config: TrainConfig, mesh: Mapping[str, int], of_layer, *arguments) -> float:
    """Returns the sum of a cost over all layers, segments and micro-batches of a step, with what remat repeats."""
    shape = attention_shape(config, mesh)
    segments, _, _ = decoder_segments(config, longest_rows(config)[1])
    once = of_layer(config.attention, shape, *arguments, backward=True)
    if config.remat != "none":
        once += of_layer(config.attention, shape, *arguments, backward=False)
    return config.model.decoder.num_layers * segments * config.accumulate * once
