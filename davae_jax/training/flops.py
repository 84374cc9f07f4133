"""Floating point operations of a model: its matrix products, counted."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import NamedTuple

from davae_jax.training.config import TrainConfig
from davae_jax.utils.shapes import round_up

ONE_DEVICE = {"data": 1, "fsdp": 1, "tensor": 1}


class Product(NamedTuple):
    """A matrix product of the forward pass, a multiply-add counted as 2."""

    part: str
    flops: int  # of the whole batch
    devices: int  # that share it; the others repeat it
    backward: int = 2  # products of its size in the backward pass
    again: int = 0  # how often the backward pass makes it once more


def model_flops(config: TrainConfig, lengths: tuple[int, int]) -> int:
    """Of one step on a batch of S encoder and T decoder tokens a row, padding counted, nothing computed again: what
    MFU counts (model FLOPs utilization, Chowdhery et al. 2022, appendix B)."""
    return sum((1 + p.backward) * p.flops for p in forward_products(config, ONE_DEVICE, lengths))


def forward_products(
    config: TrainConfig, mesh: Mapping[str, int], lengths: tuple[int, int] | None = None
) -> list[Product]:
    """Every matrix product of a step's forward pass; of rows of these lengths S and T, or of the longest.

    A product y = W·x costs 2 FLOPs a weight and token, and its backward pass twice that (the gradients of W and of x):
    6·weights·tokens in all. Attention adds, in each layer and for each text, two products of S²·D in the encoder and
    three of T²·D in the decoder (content, position, context), computed whole although half of them is masked; the tied
    embedding adds 6·B·T·D·V as logits and nothing as a table. What remat and the logits' chunks compute again is
    counted apart (`again`): dots repeats attention, full repeats whole layers but for the decoder's last product, which
    its gradient does not need. Texts in segments see K = segment + memory positions instead of T. Norms, softmax,
    dropout and the optimizer are not counted.
    """
    model = config.model
    encoder, decoder = model.encoder, model.decoder
    B, (S, T), L = config.batch_size, lengths or longest_rows(config), model.latent_size
    segments, K = 1, T
    if (segment := config.data.segment_length) and segment < T:
        segments, K = math.ceil(T / segment), segment + decoder.max_memory_length
        T = segments * segment
    parts, fsdp, tensor = mesh["data"] * mesh["fsdp"], mesh["fsdp"], mesh["tensor"]

    def over(width: int, batch: int = parts) -> int:
        return batch * _share(width, tensor)

    layer, attention = int(config.remat == "full"), int(config.remat != "none")
    D, F, N = encoder.hidden_size, encoder.intermediate_size, encoder.num_attention_heads
    products = [
        Product("encoder", 2 * B * S * 4 * D * D, over(D), again=layer),
        Product("encoder", 2 * B * S * 2 * D * F, over(F), again=layer),
        Product("attention", 2 * B * S * S * 2 * D, over(N), again=attention),
    ] * encoder.num_hidden_layers
    products += [Product("encoder", 2 * B * D * (D + 2 * L), parts)]
    D, N = decoder.hidden_size, decoder.num_attention_heads
    products += [
        Product("decoder", 2 * B * T * 4 * D * D, over(D), again=layer),
        Product("decoder", 2 * B * T * 4 * D * D, over(4 * D), again=layer),
        Product("decoder", 2 * B * T * 4 * D * D, over(4 * D)),
        # The positions' keys belong to no text: every part of the batch makes them, the fsdp axis together.
        Product("decoder", 2 * segments * K * D * D, over(D, _share(D, fsdp)), backward=1, again=layer),
        Product("attention", 2 * B * T * K * 3 * D, over(N), again=attention),
    ] * decoder.num_layers
    products += [
        Product(
            "logits", 2 * B * T * D * decoder.vocab_size, over(decoder.vocab_size), again=int(config.logits_chunk < T)
        ),
        Product("latent", 2 * B * L * D, parts),
        # Three looks: at the latents for either loss, and at the prior's draws.
        Product("latent", 3 * 2 * B * (4 * L * L + 4 * L), over(4 * L)),
    ]
    return products


def _share(width: int, devices: int) -> int:
    """How many of the devices a width is split over: all or, where it does not divide, none."""
    return devices if width % devices == 0 else 1


def longest_rows(config: TrainConfig) -> tuple[int, int]:
    """(S, T) of the longest texts; the decoder does not read a text's last token."""
    longest = round_up(config.data.max_length, 8)
    return min(longest, config.model.encoder.max_position_embeddings), longest - 1
