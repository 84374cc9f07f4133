"""What a training run will need on machines that are not here: memory, work, traffic and time, without a device.

Letters as in layers.py; `rows` are the texts that one device works on at once. All texts count as of the longest
length, and the vocabularies are the config's: `planned` gives it those that a run will have.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import AbstractMesh

from davae_jax.data.batches import Batch
from davae_jax.model.config import DAVAEConfig
from davae_jax.model.davae import DAVAE, abstract_model, split
from davae_jax.parallel.chips import Chip
from davae_jax.parallel.config import MeshConfig
from davae_jax.parallel.sharding import RULES, make_abstract_mesh
from davae_jax.training.config import TrainConfig
from davae_jax.training.flops import _share, forward_products, longest_rows
from davae_jax.training.objective import StepContext, objective
from davae_jax.training.state import TrainState, abstract_state
from davae_jax.training.vocabularies import expected_vocabularies, with_vocabularies

FLOAT32 = 4  # bytes
USABLE = 0.9  # of a chip's memory: the rest is the runtime's, and what lies between arrays
MOST_CHIPS = 1024  # that a search for the smallest number goes to


class Traffic(NamedTuple):
    """What every device sends in one step over one axis of the mesh."""

    size: int  # devices on the axis
    bytes: int
    rate: float  # bytes/s of the links it goes over


class Plan(NamedTuple):
    config: TrainConfig
    chip: Chip
    chips: int
    mesh: dict[str, int]
    weights: dict[str, int]  # of encoder, decoder and discriminator
    memory: dict[str, int]  # bytes per device, by kind
    flops: dict[str, int]  # of one step on all devices, by part; recomputation is not in it
    recomputed: int  # FLOPs of one step on all devices that remat adds
    flops_per_device: int  # recomputation and what devices repeat of each other's work included
    traffic: dict[str, Traffic]  # by axis of the mesh
    tokens: int  # of the decoder, in one step
    compute_seconds: float
    communication_seconds: float
    efficiency: float
    fewest: tuple[int, dict[str, int]] | None  # chips that the run fits on, and the mesh

    @property
    def fits(self) -> bool:
        return fits(self.memory, self.chip)

    @property
    def seconds(self) -> tuple[float, float]:
        """Of one step: where communication hides behind compute, and where none does."""
        both = self.compute_seconds, self.communication_seconds
        return max(both), sum(both)


def make_plan(config: TrainConfig, chip: Chip, chips: int, efficiency: float) -> Plan:
    """The plan of a run on so many chips.

    efficiency: what is reached of the chip's peak FLOP/s and of its links' rates.

    Raises:
      InputError: the chips or the batch cannot be divided so (exit code 2).
    """
    mesh = make_abstract_mesh(config.mesh, config.batch_size, chips, config.accumulate)
    products = forward_products(config, mesh.shape)
    flops: dict[str, int] = {}
    for product in products:
        flops[product.part] = flops.get(product.part, 0) + (1 + product.backward) * product.flops
    per_device = sum((1 + p.backward + p.again) * p.flops // p.devices for p in products)
    sent = traffic(config, mesh, chip)
    return Plan(
        config=config,
        chip=chip,
        chips=chips,
        mesh=dict(mesh.shape),
        weights={
            name: sum(w.size for w in jax.tree.leaves(part)) for name, part in state_of(config, mesh).params.items()
        },
        memory=memory(config, mesh),
        flops=flops,
        recomputed=sum(p.again * p.flops for p in products),
        flops_per_device=per_device,
        traffic=sent,
        tokens=config.batch_size * longest_rows(config)[1],
        compute_seconds=per_device / (chip.flops * efficiency),
        communication_seconds=sum(axis.bytes / (axis.rate * efficiency) for axis in sent.values()),
        efficiency=efficiency,
        fewest=fewest_chips(config, chip),
    )


# ---- memory


def memory(config: TrainConfig, mesh: AbstractMesh) -> dict[str, int]:
    """Bytes per device by kind. Exact for what the state holds; activations are what JAX keeps, before XLA's fusions.

    gradients: float32, as the weights; twice where parts of a batch are added up.
    activations: what the backward pass keeps under the remat policy.
    layer at work: all that the largest layer makes, which remat makes again in the backward pass.
    logits: of one chunk, and their gradient.
    gathered weights: the embedding table whole, in the compute dtype, and its gradient before it is divided, which is
      the most that is gathered at once.
    """
    return held(config, mesh) | made(config, mesh.shape)


def held(config: TrainConfig, mesh: AbstractMesh) -> dict[str, int]:
    """The part of `memory` that does not depend on the batch."""
    state = state_of(config, mesh)
    main = {name: part for name, part in state.params.items() if name != "discriminator"}
    discriminator = state.params["discriminator"]
    gradients = 2 if config.accumulate > 1 else 1
    return {
        "parameters": bytes_per_device(main),
        "gradients": gradients * bytes_per_device(main),
        "optimizer state": bytes_per_device(state.optimizer),
        "discriminator, with its own": bytes_per_device((state.discriminator_optimizer, state.step))
        + (1 + gradients) * bytes_per_device(discriminator),
    }


def made(config: TrainConfig, mesh: Mapping[str, int]) -> dict[str, int]:
    """The part of `memory` that a step makes."""
    rows, tensor = _rows(config, mesh), mesh["tensor"]
    decoder = config.model.decoder
    words = decoder.vocab_size // _share(decoder.vocab_size, tensor)
    itemsize = jnp.dtype(config.dtype).itemsize
    base, *layers = activations(config, rows, tensor)
    _, *whole_layers = activations(dataclasses.replace(config, remat="none"), rows, tensor)
    counts = config.model.encoder.num_hidden_layers, decoder.num_layers
    gathered = words * decoder.hidden_size * (itemsize + FLOAT32) if mesh["fsdp"] > 1 else 0
    chunk = min(config.logits_chunk, longest_rows(config)[1])
    return {
        "activations kept": base + sum(n * kept for n, kept in zip(counts, layers, strict=True)),
        "layer at work": max(whole_layers),
        "logits": 2 * rows * chunk * words * FLOAT32,
        "gathered weights": gathered,
    }


def bytes_per_device(tree: Any) -> int:
    """Of abstract arrays with shardings."""
    leaves = jax.tree.leaves(tree)
    return sum(math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize for x in leaves)


def fits(memory: dict[str, int], chip: Chip) -> bool:
    return sum(memory.values()) <= USABLE * chip.memory


def fewest_chips(config: TrainConfig, chip: Chip) -> tuple[int, dict[str, int]] | None:
    """The smallest number that the run fits on, batch and tensor axis being as they are, and its mesh: over `fsdp` all
    that divides the decoder's width, over `data` the rest. None: it fits on none up to MOST_CHIPS.
    """
    tensor = max(config.mesh.tensor, 1)
    whole = sum(held(config, make_abstract_mesh(MeshConfig(1, 1, 1), config.batch_size, 1, config.accumulate)).values())
    for parts in range(1, MOST_CHIPS // tensor + 1):
        if config.batch_size % (parts * config.accumulate):
            continue
        fsdp = math.gcd(parts, config.model.decoder.hidden_size)
        shape = {"data": parts // fsdp, "fsdp": fsdp, "tensor": tensor}
        # Laying out the state takes a second; no axis can do more than divide it.
        if not fits({"state": whole // (fsdp * tensor)} | made(config, shape), chip):
            continue
        mesh = make_abstract_mesh(MeshConfig(**shape), config.batch_size, parts * tensor, config.accumulate)
        if fits(memory(config, mesh), chip):
            return parts * tensor, dict(mesh.shape)
    return None


def activations(config: TrainConfig, rows: int, tensor: int) -> tuple[int, int, int]:
    """Bytes that the backward pass keeps of `rows` texts: (outside the layers, of one encoder layer, of one decoder
    layer).

    Read off JAX's own trace of the objective with one layer and with two. The widths that the tensor axis splits
    (heads, feed-forward, words) are taken as split in whatever is kept.
    """
    one, encoder, decoder = (
        sum(_bytes_of_row(leaf, config, tensor) for leaf in _kept(_small(config), layers))
        for layers in ((1, 1), (2, 1), (1, 2))
    )
    per_row = one - (encoder - one) - (decoder - one), encoder - one, decoder - one
    return tuple(round(rows * n) for n in per_row)


ROWS = 1009  # of the traced batch: a prime, so that no other axis has its size


@functools.lru_cache(maxsize=8)
def _kept(config: TrainConfig, layers: tuple[int, int]) -> list[jax.ShapeDtypeStruct]:
    """What `jax.vjp` of the objective keeps of a batch of ROWS texts."""
    model = config.model
    encoder = dataclasses.replace(model.encoder, num_hidden_layers=layers[0])
    decoder = dataclasses.replace(model.decoder, num_layers=layers[1])
    config = dataclasses.replace(config, model=dataclasses.replace(model, encoder=encoder, decoder=decoder))
    graphdef, params = split(abstract_model(config.model, dtype=config.dtype))

    def residuals(params, batch, key):
        return jax.vjp(lambda p: objective(p, graphdef, batch, StepContext(key, jnp.float32(1)), config).total, params)[
            1
        ]

    key = jax.eval_shape(lambda: jax.random.key(0))
    leaves = jax.tree.leaves(jax.eval_shape(residuals, params, batch_shapes(config, ROWS), key))
    return [x for x in leaves if ROWS in x.shape]


def _small(config: TrainConfig) -> TrainConfig:
    """The fields that the objective's shapes depend on, so that configs which differ elsewhere share a trace."""
    same = TrainConfig(model=config.model, data=config.data)
    return dataclasses.replace(
        same, dtype=config.dtype, remat=config.remat, logits_chunk=config.logits_chunk, noise=config.noise
    )


def _bytes_of_row(x: jax.ShapeDtypeStruct, config: TrainConfig, tensor: int) -> float:
    encoder, decoder = config.model.encoder, config.model.decoder
    split_widths = (encoder.intermediate_size, 4 * decoder.hidden_size, decoder.vocab_size)
    heads = (encoder.num_attention_heads, decoder.num_attention_heads)
    by_heads = [n for n in x.shape[1:3] if n in heads] if len(x.shape) == 4 else []
    by_width = [n for n in x.shape[-1:] if n in split_widths]
    parts = max([_share(n, tensor) for n in by_heads + by_width], default=1)
    return x.size * x.dtype.itemsize / ROWS / parts


# ---- work


# ---- traffic


def traffic(config: TrainConfig, mesh: AbstractMesh, chip: Chip) -> dict[str, Traffic]:
    """Bytes that every device sends in one step, by axis, with rings: of n bytes over k devices an all-reduce sends
    2·n·(k−1)/k, an all-gather or reduce-scatter (n bytes whole) n·(k−1)/k.

    data: the gradients' all-reduce. fsdp: the weights' all-gathers in the compute dtype, forward and backward, the
    gradients' reduce-scatter, and the embeddings' exchange. tensor: the activations' all-reduces after each layer's two
    maps to the residual stream and before its two maps from it, those that remat repeats, and the gathering of q, k, v
    and their context where the heads do not divide. The word table is gathered, and its gradient reduced, for every
    chunk of the logits in the backward pass; all of it for each of the `accumulate` parts of a batch.
    """
    data, fsdp, tensor = (mesh.shape[name] for name in ("data", "fsdp", "tensor"))
    params = state_of(config, mesh).params
    itemsize = jnp.dtype(config.dtype).itemsize
    rows, (S, T) = _rows(config, mesh.shape), longest_rows(config)
    encoder, decoder = config.model.encoder, config.model.decoder

    reductions = {id(params["decoder"]["embedding"]["weight"]): math.ceil(T / config.logits_chunk)}
    over_data = over_fsdp = 0
    for weight in jax.tree.leaves(params):
        held, times = bytes_per_device(weight), reductions.get(id(weight), 1)
        over_data += 2 * times * held
        if "fsdp" in weight.sharding.spec:
            over_fsdp += fsdp * held * ((1 + times) * itemsize / FLOAT32 + times)
        else:
            over_fsdp += 2 * times * held
    for n, D in ((S, encoder.hidden_size), (T, decoder.hidden_size)):
        over_fsdp += 2 * rows * n * D * FLOAT32 * (D % fsdp == 0)

    full = int(config.remat == "full")
    over_tensor = 4 * rows * T * decoder.hidden_size * itemsize  # the words' lookup, and the gradient of the logits
    for n, D, N, layers, repeated in (
        (S, encoder.hidden_size, encoder.num_attention_heads, encoder.num_hidden_layers, 2),
        (T, decoder.hidden_size, decoder.num_attention_heads, decoder.num_layers, 1),
    ):
        reduced = 2 * (2 + 2 + full * repeated)
        gathered = 0 if N % tensor == 0 else 3 * (1 + full) + 1
        over_tensor += layers * rows * n * D * itemsize * (reduced + gathered)

    found, inner = {}, data * fsdp * tensor
    for name, k, whole in (("data", data, over_data), ("fsdp", fsdp, over_fsdp), ("tensor", tensor, over_tensor)):
        # The last axis has neighbours: an axis goes over the network where it and those after it exceed a group.
        rate = chip.link if inner <= chip.group else chip.network
        found[name] = Traffic(k, round(config.accumulate * whole * (k - 1) / k), rate)
        inner //= k
    return found


# ---- what they share


@functools.lru_cache(maxsize=4)
def _model(config: DAVAEConfig, dtype: str) -> DAVAE:
    return abstract_model(config, dtype=dtype)


@functools.lru_cache(maxsize=16)
def state_of(config: TrainConfig, mesh: AbstractMesh) -> TrainState:
    return abstract_state(_model(config.model, config.dtype), config, mesh)


def planned(config: TrainConfig, preset: str) -> tuple[TrainConfig, str]:
    """(the config with the vocabularies that a run will have, whose these are): `expected_vocabularies`."""
    entries, pieces, whose = expected_vocabularies(config, preset)
    return dataclasses.replace(config, model=with_vocabularies(config.model, entries, pieces)), whose


def batch_shapes(config: TrainConfig, rows: int) -> Batch:
    """The widest batch of so many texts."""
    S, T = longest_rows(config)
    ids = functools.partial(jax.ShapeDtypeStruct, dtype=jnp.int32)
    return Batch(ids((rows, S)), ids((rows, T)), ids((rows, T)), ids((rows, 1)))


def _rows(config: TrainConfig, mesh: dict[str, int]) -> int:
    parts = math.prod(mesh[axis] for axis in RULES["batch"])
    return math.ceil(config.batch_size / parts / config.accumulate)
