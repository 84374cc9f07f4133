"""Estimates the resources of a training run without its hardware: memory, FLOPs, communication and time.

All texts are assumed to have the maximum length.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Collection
from typing import NamedTuple

import jax

from davae_jax.checkpoints.hub import local_source
from davae_jax.checkpoints.run_folder import complete_checkpoints
from davae_jax.parallel.chips import Chip
from davae_jax.parallel.sharding import make_abstract_mesh
from davae_jax.planning.attention import attention_traffic, memory_wait, with_planned_attention
from davae_jax.planning.communication import Traffic, traffic
from davae_jax.planning.memory import fits_memory, memory, min_chips
from davae_jax.planning.shapes import cached_abstract_state
from davae_jax.training.config import TrainConfig
from davae_jax.training.flops import forward_products, longest_rows
from davae_jax.training.initial_state import check_model_options, whole_model_config
from davae_jax.training.run.vocabularies import expected_vocabularies, with_vocabularies


class Plan(NamedTuple):
    config: TrainConfig
    chip: Chip
    chips: int
    mesh: dict[str, int]
    weights: dict[str, int]  # numbers of weights of encoder, decoder and discriminator
    memory: dict[str, int]  # bytes per device, by kind
    flops: dict[str, int]  # of one step on all devices, by model component, without recomputation
    recomputed: int  # FLOPs that remat and the logits' chunks add in one step, on all devices
    flops_per_device: int  # with recomputation, and with work that several devices repeat
    traffic: dict[str, Traffic]  # by axis of the mesh
    attention: str  # the implementation of the decoder's attention
    attention_bytes: int  # that it moves between a device and its memory in one step
    tokens: int  # decoder tokens per step
    compute_seconds: float
    memory_seconds: float  # by which attention's memory traffic takes longer than its compute
    communication_seconds: float
    efficiency: float
    min_chips: tuple[int, dict[str, int]] | None  # the smallest number of chips with enough memory, and their mesh

    @property
    def fits(self) -> bool:
        return fits_memory(self.memory, self.chip)

    @property
    def seconds(self) -> tuple[float, float]:
        """Returns the time of one step: with communication and compute fully overlapped, and without any overlap."""
        both = self.compute_seconds + self.memory_seconds, self.communication_seconds
        return max(both), sum(both)


def make_plan(config: TrainConfig, chip: Chip, chips: int, efficiency: float) -> Plan:
    """Plans a run on `chips` chips. `efficiency` is the attained fraction of their peak FLOP/s and link rates.

    Raises:
      InputError: the mesh does not divide the chips or the batch, or the chips do not run the implementation of
        attention that the config names (exit code 2).
    """
    config = with_planned_attention(config, chip)
    mesh = make_abstract_mesh(config.mesh, config.batch_size, chips, config.accumulate)
    products = forward_products(config, mesh.shape)
    flops: dict[str, int] = {}
    for product in products:
        flops[product.component] = flops.get(product.component, 0) + (1 + product.backward) * product.flops
    per_device = sum(round((1 + p.backward + p.recomputed) * p.flops / p.devices) for p in products)
    params = cached_abstract_state(config, mesh).params
    traffic_by_axis = traffic(config, mesh, chip)
    return Plan(
        config=config,
        chip=chip,
        chips=chips,
        mesh=dict(mesh.shape),
        weights={name: sum(w.size for w in jax.tree.leaves(weights)) for name, weights in params.items()},
        memory=memory(config, mesh),
        flops=flops,
        recomputed=sum(round(p.recomputed * p.flops) for p in products),
        flops_per_device=per_device,
        traffic=traffic_by_axis,
        attention=config.attention,
        attention_bytes=round(attention_traffic(config, mesh.shape, chip)),
        tokens=config.batch_size * longest_rows(config)[1],
        compute_seconds=per_device / (chip.flops * efficiency),
        memory_seconds=memory_wait(config, mesh.shape, chip, efficiency),
        communication_seconds=sum(axis.bytes / (axis.rate * efficiency) for axis in traffic_by_axis.values()),
        efficiency=efficiency,
        min_chips=min_chips(config, chip),
    )


def with_planned_vocabularies(config: TrainConfig, preset: str, given: Collection[str] = ()) -> tuple[TrainConfig, str]:
    """Returns (the config with the sizes of the vocabularies that the run will have, a description of their source).

    If --init.model names a folder, the config has all sizes of that model. Nothing is downloaded for a plan: a model
    on the hub is taken to have the sizes of the config.

    Args:
      given: the fields of the model's config that were set explicitly, as for `check_model_options`.

    Raises:
      InputError: --init.model names no model, or has other sizes than those given (exit code 2).
    """
    source = config.init.model
    if source:
        is_resumed = config.run_dir is not None and complete_checkpoints(config.run_dir)
        if folder := config.run_dir if is_resumed else local_source(source):
            check_model_options(config, given)
            return dataclasses.replace(config, model=whole_model_config(config, folder)), f"of {folder}"
    encoder_vocab_size, decoder_vocab_size, origin = expected_vocabularies(config, preset)
    model = with_vocabularies(config.model, encoder_vocab_size, decoder_vocab_size)
    if source:
        origin = f"assumed, as are all other sizes: {source} is not downloaded for a plan"
    return dataclasses.replace(config, model=model), origin
