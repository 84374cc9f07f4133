"""Counts the floating point operations of a training step, which are those of its matrix products."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import NamedTuple

from davae_jax.parallel.sharding import RULES
from davae_jax.training.config import TrainConfig
from davae_jax.training.freezing import trains_table
from davae_jax.utils.shapes import round_up

# The products of one layer's attention, forward and backward, each of 2·B·N·T·K·H FLOPs. xla: content, position and
# context, and two gradients of each. mosaic_tpu: a tile of BQ queries and BK = 2·BQ keys needs BQ + BK columns of r, so
# that the three products of the position are half again as large; backward computes content and position anew.
ATTENTION_PRODUCTS = {"xla": (3, 6), "mosaic_tpu": (3.5, 9.5)}
ONE_DEVICE = {"data": 1, "fsdp": 1, "tensor": 1}


class Product(NamedTuple):
    """A matrix product of the forward pass. A multiply-add counts as 2 FLOPs."""

    component: str  # of the model, as listed by `davae plan`
    flops: int  # for the whole batch
    devices: int  # number of devices that it is sharded over; any others repeat the same computation
    backward: int = 2  # number of products of the same size in the backward pass
    recomputed: float = 0  # number of products of the same size that are computed besides


class AttentionShape(NamedTuple):
    """The sizes of one layer's attention: texts, heads, queries, keys and the width of a head."""

    B: int
    N: int
    T: int
    K: int
    H: int


def model_flops(config: TrainConfig, lengths: tuple[int, int]) -> int:
    """Returns the FLOPs of one step on rows of S encoder and T decoder tokens, padding included, recomputation not.

    This is what MFU counts (model FLOPs utilization, Chowdhery et al. 2022, appendix B).
    """
    return sum((1 + p.backward) * p.flops for p in forward_products(config, ONE_DEVICE, lengths))


def forward_products(
    config: TrainConfig, mesh: Mapping[str, int], lengths: tuple[int, int] | None = None
) -> list[Product]:
    """Returns every matrix product of a step's forward pass. `lengths` are S and T; default: those of the longest rows.

    A product y = W·x costs 2 FLOPs per weight and token, and its backward pass twice that (the gradients of W and of
    x): 6·weights·tokens in all. Attention adds, per layer and text, two products of S²·D in the encoder and three of
    T²·D in the decoder (content, position, context), computed in full although half of each is masked; the tied
    embedding adds 6·B·T·D·V as logits and nothing as a table. What `--init.freeze` names has no gradient of W, and
    a frozen encoder no backward pass. Recomputation is counted separately, in `recomputed`:
    remat "dots" repeats attention; "full" repeats whole layers except the decoder's last product, which its gradient
    does not need; kernels compute a part of attention anew; several chunks repeat the logits. Texts in segments attend
    to K = segment + memory positions instead of T. Norms, softmax, dropout and the optimizer are not counted.
    """
    model = config.model
    encoder, decoder = model.encoder, model.decoder
    B, (S, T), L = config.batch_size, lengths or longest_rows(config), model.latent_size
    segments, size, K = decoder_segments(config, T)
    T = segments * size
    batch_shards, fsdp, tensor = mesh["data"] * mesh["fsdp"], mesh["fsdp"], mesh["tensor"]

    def devices(width: int, batch: int = batch_shards) -> int:
        return batch * num_shards(width, tensor)

    layer, attention = int(config.remat == "full"), int(config.remat != "none")
    frozen = set(config.init.freeze)
    # A weight that is frozen has no gradient, and behind a frozen encoder there is nothing that needs one.
    of_decoder, of_encoder = 2 - ("decoder" in frozen), 0 if "encoder" in frozen else 2
    of_logits, of_posterior = 1 + trains_table(config), max(0, of_encoder - ("posterior" in frozen))
    in_encoder = dict(backward=of_encoder, recomputed=layer if of_encoder else 0)
    D, F, N = encoder.hidden_size, encoder.intermediate_size, encoder.num_attention_heads
    products = [
        Product("encoder", 2 * B * S * 4 * D * D, devices(D), **in_encoder),
        Product("encoder", 2 * B * S * 2 * D * F, devices(F), **in_encoder),
        Product("attention", 2 * B * S * S * 2 * D, devices(N), of_encoder, attention if of_encoder else 0),
    ] * encoder.num_hidden_layers
    products += [
        Product("encoder", 2 * B * D * D, batch_shards, of_encoder),
        Product("encoder", 2 * B * D * 2 * L, batch_shards, of_posterior),
    ]
    D, N, V = decoder.hidden_size, decoder.num_attention_heads, decoder.vocab_size
    products += [
        Product("decoder", 2 * B * T * 4 * D * D, devices(D), of_decoder, layer),
        Product("decoder", 2 * B * T * 4 * D * D, devices(4 * D), of_decoder, layer),
        Product("decoder", 2 * B * T * 4 * D * D, devices(4 * D), of_decoder),
        # The keys of positions do not depend on the batch: every data shard computes them, the fsdp axis together.
        Product("decoder", 2 * segments * K * D * D, devices(D, num_shards(D, fsdp)), of_decoder - 1, layer),
        Product("attention", 2 * B * T * K * 3 * D, devices(N), recomputed=_recomputed(config.attention, attention)),
    ] * decoder.num_layers
    products += [
        Product("logits", 2 * B * T * D * V, devices(V), of_logits, int(config.logits_chunk < T)),
        Product("latent", 2 * B * L * D, batch_shards, of_decoder - (of_encoder == 0)),
        # The discriminator runs three times: on the latents for each of the two losses, and on samples of the prior.
        Product("latent", 3 * 2 * B * (4 * L * L + 4 * L), devices(4 * L)),
    ]
    return products


def _recomputed(implementation: str, remat: int) -> float:
    """Returns what an implementation of attention computes besides a forward and a backward pass, in forward passes.

    Args:
      remat: how often the forward pass is repeated.
    """
    forward, backward = ATTENTION_PRODUCTS.get(implementation, ATTENTION_PRODUCTS["xla"])
    return ((1 + remat) * forward + backward) / sum(ATTENTION_PRODUCTS["xla"]) * 3 - 3


def num_shards(width: int, devices: int) -> int:
    """Returns the number of devices that a dimension is sharded over: all, or one if they do not divide it."""
    return devices if width % devices == 0 else 1


def rows_per_device(config: TrainConfig, mesh: Mapping[str, int]) -> int:
    """Returns how many texts one device processes at once."""
    shards = math.prod(mesh[axis] for axis in RULES["batch"])
    return math.ceil(config.batch_size / shards / config.accumulate)


def decoder_segments(config: TrainConfig, T: int) -> tuple[int, int, int]:
    """Returns how the decoder reads T tokens: (number of segments, tokens of each, keys that each attends to)."""
    segment = config.data.segment_length
    if not segment or segment >= T:
        return 1, T, T
    return math.ceil(T / segment), segment, segment + config.model.decoder.max_memory_length


def attention_shape(config: TrainConfig, mesh: Mapping[str, int]) -> AttentionShape:
    """Returns the sizes of the decoder's attention on one device, for the longest rows."""
    decoder = config.model.decoder
    _, T, K = decoder_segments(config, longest_rows(config)[1])
    N, H = decoder.num_attention_heads, decoder.hidden_size // decoder.num_attention_heads
    return AttentionShape(rows_per_device(config, mesh), N // num_shards(N, mesh["tensor"]), T, K, H)


def longest_rows(config: TrainConfig) -> tuple[int, int]:
    """Returns the lengths (S, T) of the longest texts. The decoder does not read a text's last token."""
    longest = round_up(config.data.max_length, 8)
    return min(longest, config.model.encoder.max_position_embeddings), longest - 1
