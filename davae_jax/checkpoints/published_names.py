"""The published file's tensors and where each goes: one table, read both ways.

A row is (name in the file, path in the model, transform). `{i}` stands for every layer's number. Names are those of
the published pytorch_model.bin; shapes on both sides come from the model itself.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from davae_jax.checkpoints.weights import flatten
from davae_jax.model.config import DAVAEConfig
from davae_jax.model.davae import abstract_model, split

INV_FREQ = "vae_model.decoder.transformer.position_embeddings.inv_freq"
POSITION_IDS = "vae_model.encoder.embeddings.position_ids"  # 0, 1, 2 …; carries nothing, written back where it was
BUFFERS = {"inv_freq": INV_FREQ, "position_ids": POSITION_IDS}


def _linear(name: str, path: str) -> list[tuple[str, str, str]]:
    return [(f"{name}.{part}", f"{path}.{part}", "same") for part in ("weight", "bias")]


_E, _e = "vae_model.encoder.", "encoder."
_D, _d = "vae_model.decoder.", "decoder."
_EL, _el = _E + "encoder.layer.{i}.", _e + "layers.{i}."
_DL, _dl = _D + "transformer.layers.{i}.", _d + "layers.{i}."

# A LayerNorm has a weight and a bias like a Linear.
ENCODER = [
    (_E + "embeddings.word_embeddings.weight", _e + "word.weight", "same"),
    (_E + "embeddings.position_embeddings.weight", _e + "position.weight", "same"),
    (_E + "embeddings.token_type_embeddings.weight", _e + "token_type.weight", "same"),
    *_linear(_E + "embeddings.LayerNorm", _e + "norm"),
]
ENCODER_LAYER = [
    *_linear(_EL + "attention.self.query", _el + "query"),
    *_linear(_EL + "attention.self.key", _el + "key"),
    *_linear(_EL + "attention.self.value", _el + "value"),
    *_linear(_EL + "attention.output.dense", _el + "attention_out"),
    *_linear(_EL + "attention.output.LayerNorm", _el + "attention_norm"),
    *_linear(_EL + "intermediate.dense", _el + "mlp_in"),
    *_linear(_EL + "output.dense", _el + "mlp_out"),
    *_linear(_EL + "output.LayerNorm", _el + "mlp_norm"),
]
POSTERIOR = [
    *_linear(_E + "pooler.dense", _e + "pooler"),
    (_E + "linear.weight", _e + "posterior.weight", "same"),
]
DECODER = [
    (_D + "word_embeddings.weight", _d + "embedding.weight", "same"),
    (_D + "transformer.r_w_bias", _d + "r_w_bias", "same"),
    (_D + "transformer.r_r_bias", _d + "r_r_bias", "same"),
    (_D + "transformer.linear_emb.weight", _d + "latent_projection.weight", "same"),
    (INV_FREQ, _d + "inv_freq", "same"),
]
DECODER_LAYER = [
    *_linear(_DL + "input_layernorm", _dl + "attention_norm"),
    (_DL + "attention.query_key_value.weight", _dl + "qkv_weight", "three"),
    (_DL + "attention.query_key_value.bias", _dl + "qkv_bias", "three"),
    *_linear(_DL + "attention.relative", _dl + "relative"),
    *_linear(_DL + "attention.dense", _dl + "attention_out"),
    *_linear(_DL + "post_attention_layernorm", _dl + "mlp_norm"),
    *_linear(_DL + "mlp.dense_h_to_4h", _dl + "mlp_in"),
    *_linear(_DL + "mlp.dense_4h_to_h", _dl + "mlp_out"),
]
REST = [
    *_linear(_D + "transformer.final_layernorm", _d + "norm"),
    *_linear("vae_model.Disc.0", "discriminator.hidden"),
    *_linear("vae_model.Disc.2", "discriminator.output"),
]


class NameRow(NamedTuple):
    name: str  # in the published file
    path: str  # in the model
    file_shape: tuple[int, ...]
    model_shape: tuple[int, ...]

    def to_model(self, array: np.ndarray) -> np.ndarray:
        """Both transforms are views. "three": the file stacks q, k and v as [3D, …], the model keeps [3, D, …]."""
        return array.reshape(self.model_shape)

    def to_file(self, array: np.ndarray) -> np.ndarray:
        return array.reshape(self.file_shape)


def name_table(config: DAVAEConfig) -> list[NameRow]:
    """The table spelled out for a config, in the published file's order."""
    shapes = {path: leaf.shape for path, leaf in flatten(split(abstract_model(config))[1]).items()}
    table = [
        *ENCODER,
        *_repeat(ENCODER_LAYER, config.encoder.num_hidden_layers),
        *POSTERIOR,
        *DECODER,
        *_repeat(DECODER_LAYER, config.decoder.num_layers),
        *REST,
    ]
    result = []
    for name, path, transform in table:
        shape = shapes.pop(path)
        result.append(NameRow(name, path, (shape[0] * shape[1], *shape[2:]) if transform == "three" else shape, shape))
    assert not shapes, f"weights without a row: {sorted(shapes)}"
    return result


def _repeat(table, layers: int):
    return [(name.format(i=i), path.format(i=i), how) for i in range(layers) for name, path, how in table]
