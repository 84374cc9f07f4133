"""The table that maps the published file's tensors to the model's weights; conversion reads it in both directions.

A pattern is (name in the file, path in the model, transform); `{i}` is the layer's index. The names are those of the
published pytorch_model.bin; the shapes on both sides come from the model itself.
"""

from __future__ import annotations

from enum import Enum, auto
from typing import NamedTuple

import numpy as np

from davae_jax.checkpoints.weights import flatten
from davae_jax.model.config import DAVAEConfig
from davae_jax.model.davae import abstract_model, split

INV_FREQ = "vae_model.decoder.transformer.position_embeddings.inv_freq"
POSITION_IDS = "vae_model.encoder.embeddings.position_ids"  # 0, 1, 2, …: redundant, but exported if the source had it
BUFFERS = {"inv_freq": INV_FREQ, "position_ids": POSITION_IDS}


class Transform(Enum):
    """The conversion of an array of the file to an array of the model. Every transform is a reshape, hence a view."""

    NONE = auto()
    SPLIT_QKV = auto()  # the file stacks queries, keys and values as [3D, …], the model keeps [3, D, …]

    def file_shape(self, model_shape: tuple[int, ...]) -> tuple[int, ...]:
        if self is Transform.SPLIT_QKV:
            return model_shape[0] * model_shape[1], *model_shape[2:]
        return model_shape


class NamePattern(NamedTuple):
    name: str  # in the published file
    path: str  # in the model
    transform: Transform = Transform.NONE


def _under(name_prefix: str, path_prefix: str, *groups: list[NamePattern]) -> list[NamePattern]:
    """Prepends the prefixes to the names and paths of all patterns."""
    return [
        NamePattern(name_prefix + name, path_prefix + path, transform)
        for group in groups
        for name, path, transform in group
    ]


def _weight_and_bias(name: str, path: str) -> list[NamePattern]:
    """Returns the patterns of the two tensors of a Linear or a LayerNorm."""
    return [NamePattern(f"{name}.{tensor}", f"{path}.{tensor}") for tensor in ("weight", "bias")]


ENCODER_EMBEDDINGS = _under(
    "vae_model.encoder.embeddings.",
    "encoder.",
    [
        NamePattern("word_embeddings.weight", "word.weight"),
        NamePattern("position_embeddings.weight", "position.weight"),
        NamePattern("token_type_embeddings.weight", "token_type.weight"),
    ],
    _weight_and_bias("LayerNorm", "norm"),
)
ENCODER_LAYER = _under(
    "vae_model.encoder.encoder.layer.{i}.",
    "encoder.layers.{i}.",
    _weight_and_bias("attention.self.query", "query"),
    _weight_and_bias("attention.self.key", "key"),
    _weight_and_bias("attention.self.value", "value"),
    _weight_and_bias("attention.output.dense", "attention_out"),
    _weight_and_bias("attention.output.LayerNorm", "attention_norm"),
    _weight_and_bias("intermediate.dense", "mlp_in"),
    _weight_and_bias("output.dense", "mlp_out"),
    _weight_and_bias("output.LayerNorm", "mlp_norm"),
)
POSTERIOR = _under(
    "vae_model.encoder.",
    "encoder.",
    _weight_and_bias("pooler.dense", "pooler"),
    [NamePattern("linear.weight", "posterior.weight")],
)
DECODER_INPUT = _under(
    "vae_model.decoder.",
    "decoder.",
    [
        NamePattern("word_embeddings.weight", "embedding.weight"),
        NamePattern("transformer.r_w_bias", "r_w_bias"),
        NamePattern("transformer.r_r_bias", "r_r_bias"),
        NamePattern("transformer.linear_emb.weight", "latent_projection.weight"),
        NamePattern("transformer.position_embeddings.inv_freq", "inv_freq"),
    ],
)
DECODER_LAYER = _under(
    "vae_model.decoder.transformer.layers.{i}.",
    "decoder.layers.{i}.",
    _weight_and_bias("input_layernorm", "attention_norm"),
    [
        NamePattern("attention.query_key_value.weight", "qkv_weight", Transform.SPLIT_QKV),
        NamePattern("attention.query_key_value.bias", "qkv_bias", Transform.SPLIT_QKV),
    ],
    _weight_and_bias("attention.relative", "relative"),
    _weight_and_bias("attention.dense", "attention_out"),
    _weight_and_bias("post_attention_layernorm", "mlp_norm"),
    _weight_and_bias("mlp.dense_h_to_4h", "mlp_in"),
    _weight_and_bias("mlp.dense_4h_to_h", "mlp_out"),
)
DECODER_NORM = _weight_and_bias("vae_model.decoder.transformer.final_layernorm", "decoder.norm")
DISCRIMINATOR = [
    *_weight_and_bias("vae_model.Disc.0", "discriminator.hidden"),
    *_weight_and_bias("vae_model.Disc.2", "discriminator.output"),
]


class NameRow(NamedTuple):
    """One tensor of the published file and the weight of the model that it becomes."""

    name: str  # in the published file
    path: str  # in the model
    file_shape: tuple[int, ...]
    model_shape: tuple[int, ...]

    def to_model(self, array: np.ndarray) -> np.ndarray:
        """Returns a view of the file's array in the model's shape."""
        return array.reshape(self.model_shape)

    def to_file(self, array: np.ndarray) -> np.ndarray:
        """Returns a view of the model's array in the file's shape."""
        return array.reshape(self.file_shape)


def name_table(config: DAVAEConfig) -> list[NameRow]:
    """Returns a row for each weight of the config's model, in the published file's order."""
    shapes = {path: leaf.shape for path, leaf in flatten(split(abstract_model(config))[1]).items()}
    patterns = [
        *ENCODER_EMBEDDINGS,
        *_repeat(ENCODER_LAYER, config.encoder.num_hidden_layers),
        *POSTERIOR,
        *DECODER_INPUT,
        *_repeat(DECODER_LAYER, config.decoder.num_layers),
        *DECODER_NORM,
        *DISCRIMINATOR,
    ]
    table = []
    for name, path, transform in patterns:
        model_shape = shapes.pop(path)
        table.append(NameRow(name, path, transform.file_shape(model_shape), model_shape))
    assert not shapes, f"weights without a row: {sorted(shapes)}"
    return table


def _repeat(patterns: list[NamePattern], layers: int) -> list[NamePattern]:
    """Returns the patterns of one layer once for each layer, numbered."""
    return [
        NamePattern(name.format(i=i), path.format(i=i), transform)
        for i in range(layers)
        for name, path, transform in patterns
    ]
