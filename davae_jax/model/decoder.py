"""The decoder: a pre-norm Transformer-XL (Dai et al. 2019) with a recurrent memory; the latent is added at every layer.

A linear map of the latent is added to the state of each token before the first layer and after every layer. Attention
uses distances between tokens and no absolute positions (`attention.relative_attention`), so the keys and values of past
tokens stay valid as the text grows.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import lax
from jaxtyping import Array, Bool, Float, Int

from davae_jax.model.attention import causal_mask, relative_attention
from davae_jax.model.config import Attention, DecoderConfig, Remat
from davae_jax.model.layers import (
    Buffer,
    Embedding,
    LayerNorm,
    Linear,
    apply_remat,
    dropout,
    gather_per_token,
    matmul_transposed,
    param,
    residual_stddev,
    same_segment,
    split_keys,
)
from davae_jax.model.stack import apply_in_order
from davae_jax.parallel.sharding import constrain
from davae_jax.utils.shapes import power_of_two

Window = Literal["published"] | None


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Memory:
    """The recurrent memory: the hidden states of the last M tokens, in a buffer of capacity C.

    hidden: 1 + layers arrays: the input of the first layer (embedding and latent), then each layer's output with the
      latent added. The newest row is the last one; only the last `length` of the C rows are used.
    length: M, an int32 scalar. `int(memory.length)` works outside jit; inside it may be traced.
    """

    hidden: tuple[Float[Array, "B C D"], ...]
    length: Int[Array, ""]

    @property
    def capacity(self) -> int:
        """Returns C, the number of rows of the buffer."""
        return self.hidden[0].shape[1]


class DecoderOutput(NamedTuple):
    """The decoder's hidden states.

    hidden: 1 + layers arrays, as in `Memory`.
    final: the output of the final LayerNorm, from which `Decoder.logits` computes the logits.
    """

    hidden: tuple[Float[Array, "B T D"], ...]
    final: Float[Array, "B T D"]


class Decoder(nnx.Module):
    """Transformer-XL with tied embeddings and a bias-free Linear(L → D) for the latent, shared by all layers."""

    def __init__(self, config: DecoderConfig, latent_size: int, *, rngs, dtype, param_dtype):
        D, N = config.hidden_size, config.num_attention_heads
        kw = dict(rngs=rngs, dtype=dtype, param_dtype=param_dtype)
        weight = kw | {"stddev": config.initializer_range}
        zeros = nnx.initializers.zeros
        self.embedding = Embedding(config.vocab_size, D, **weight)
        stddev = config.latent_initializer_scale * config.initializer_range
        self.latent_projection = Linear(latent_size, D, ("embed", None), bias=False, **kw | {"stddev": stddev})
        self.r_w_bias = param((N, D // N), (None, None), init=zeros, rngs=rngs, dtype=param_dtype)
        self.r_r_bias = param((N, D // N), (None, None), init=zeros, rngs=rngs, dtype=param_dtype)
        self.inv_freq = Buffer(inverse_frequencies(D), axes=(None,))
        self.layers = nnx.List([DecoderLayer(config, **kw) for _ in range(config.num_layers)])
        self.norm = LayerNorm(D, eps=config.layer_norm_eps, **kw)
        self.dropout_rate = config.embedding_dropout_prob
        self.max_memory_length = config.max_memory_length
        self.latent_every_layer = config.latent_every_layer

    def __call__(
        self,
        ids: Int[Array, "B T"],
        latent: Float[Array, "B L"] | None,
        memory: Memory | None = None,
        window: Window = None,
        key: jax.Array | None = None,
        remat: Remat = "none",
        segment_ids: Int[Array, "B T"] | None = None,
        attention: Attention = "xla",
    ) -> DecoderOutput:
        """Reads T new tokens that follow the memory.

        Args:
          latent: one per row, or None for a plain language model.
          memory: the recurrent memory of the tokens before these; None at the beginning of a text.
          window: None lets a query see all keys up to its own; "published" only the T most recent ones.
          key: enables dropout of the position features, of the input, and of two outputs in each layer.
          remat: which activations of a layer are saved for the backward pass (`layers.apply_remat`).
          segment_ids: for rows that contain up to P texts, the number of each token's text (1 … P; 0 is padding). The
            latent is then [B, P, L], a token sees only tokens of its text, and there is no memory.
          attention: how attention is computed.
        """
        T = ids.shape[1]
        C = 0 if memory is None else memory.capacity
        key_position, key_input, *layer_keys = split_keys(key, 2 + len(self.layers))
        distances = jnp.arange(C + T - 1, -1, -1)
        features = dropout(self.position_features(distances), self.dropout_rate, key_position)
        mask = causal_mask(
            T,
            C + T,
            offset=C,
            window=T if window == "published" else None,
            first_key=0 if memory is None else C - memory.length,
        )
        if segment_ids is not None:
            mask = mask & same_segment(segment_ids)

        def apply_layer(layer: DecoderLayer, x: Float[Array, "B T D"], inputs):
            def run(x, inputs):
                key, memory_BCD = inputs
                r_NKH = layer.relative_keys(features)
                past = None if memory is None else layer.memory_keys_values(memory_BCD)
                biases = self.r_w_bias[...], self.r_r_bias[...]
                return layer(x, r_NKH, *biases, mask, past=past, key=key, attention=attention)[0]

            return apply_remat(run, remat)(x, inputs), None

        inputs = list(zip(layer_keys, [None] * len(self.layers) if memory is None else memory.hidden[:-1], strict=True))
        latent_term = self.latent_term(latent, segment_ids)
        return self.apply_layers(ids, latent_term, apply_layer, inputs, input_key=key_input)[0]

    def apply_layers(
        self,
        ids: Int[Array, "B T"],
        latent_term: Float[Array, "B #T D"] | float,
        apply_layer: Callable[[DecoderLayer, Float[Array, "B T D"], Any], tuple[Float[Array, "B T D"], Any]],
        inputs: Sequence,
        *,
        input_key: jax.Array | None = None,
    ) -> tuple[DecoderOutput, list]:
        """Runs the decoder's stages in order: embedding + latent, each layer + latent, final LayerNorm.

        Training and cached decoding both call this method; they differ only in how they apply a layer.

        Args:
          latent_term: the return value of `latent_term`.
          apply_layer: called as `apply_layer(layer, x, inputs[i])`. It returns the layer's output, the latent not yet
            added, and a second value of the caller's choice (in cached decoding, the layer's keys and values).
          inputs: what else each layer needs.
          input_key: enables dropout of the input.

        Returns:
          The hidden states, and a list of the second values that `apply_layer` returned.
        """
        x = constrain(self.embedding(ids) + latent_term, "batch", None, None)
        x = dropout(x, self.dropout_rate, input_key)

        def apply_with_latent(layer: DecoderLayer, x: Float[Array, "B T D"], given):
            x, extra = apply_layer(layer, x, given)
            return x + self.post_layer_term(latent_term), extra

        outputs, extras = apply_in_order(self.layers, apply_with_latent, x, inputs)
        return DecoderOutput((x, *outputs), self.norm(outputs[-1])), extras

    def logits(self, final: Float[Array, "... D"]) -> Float[Array, "... V"]:
        """Returns the logits of the tied embedding, in float32."""
        with jax.named_scope("logits"):
            return constrain(self.embedding.logits(final), "batch", *[None] * (final.ndim - 2), "vocab")

    def latent_term(
        self, latent: Float[Array, "B L"] | None, segment_ids: Int[Array, "B T"] | None = None
    ) -> Float[Array, "B #T D"] | float:
        """Returns the term that is added to each token's state before the first layer; 0 without a latent.

        With `segment_ids` the latent is [B, P, L], and each token gets the term of its text.
        """
        if latent is None:
            return 0.0
        projected = self.latent_projection(latent)
        return projected[:, None, :] if segment_ids is None else gather_per_token(projected, segment_ids)

    def post_layer_term(self, latent_term: Float[Array, "B #T D"] | float) -> Float[Array, "B #T D"] | float:
        """Returns the term that is added after each layer: `latent_term`, or 0 if not `config.latent_every_layer`."""
        return latent_term if self.latent_every_layer else 0.0

    def position_features(self, distances: Int[Array, "K"]) -> Float[Array, "K D"]:
        """Returns [sin(d·f), cos(d·f)], all sines before all cosines, where f is `inv_freq`.

        Negative distances, of keys that the mask hides, give values that are finite and not used.
        """
        phase = distances[:, None].astype(jnp.float32) * self.inv_freq[...].astype(jnp.float32)
        return jnp.concatenate([jnp.sin(phase), jnp.cos(phase)], axis=-1)

    def empty_memory(self, batch: int) -> Memory:
        """Returns a memory of length 0 with the largest buffer, for the first step of a `lax.scan` over segments."""
        rows = jnp.zeros((batch, self.max_memory_length, self.embedding.weight.shape[1]), self.embedding.dtype)
        return Memory((rows,) * (1 + len(self.layers)), jnp.int32(0))

    def memory_capacity(self, memory: Memory | None, T: int) -> int:
        """Returns the size of the buffer after T more tokens: a power of two, at most max_memory_length.

        Segments of any length thus share a few compiled programs. If the memory's length is traced, the size of its
        buffer is used instead.
        """
        old = 0 if memory is None else memory.capacity
        if memory is not None and not isinstance(memory.length, jax.core.Tracer):
            old = int(memory.length)
        return min(self.max_memory_length, power_of_two(old + T))

    def extend_memory(self, memory: Memory | None, hidden: tuple[Float[Array, "B T D"], ...], capacity: int) -> Memory:
        """Returns the memory after T new tokens: the last min(max_memory_length, M + T) rows of old and new ones.

        No gradient flows through it (Dai et al. 2019, section 3.2).

        Args:
          hidden: `DecoderOutput.hidden` of the new tokens.
          capacity: from `memory_capacity`.
        """
        T = hidden[0].shape[1]
        old = 0 if memory is None else memory.capacity
        rows = []
        for i, new in enumerate(hidden):
            new = lax.stop_gradient(new)
            both = new if memory is None else jnp.concatenate([memory.hidden[i].astype(new.dtype), new], axis=1)
            both = both[:, max(0, old + T - capacity) :]
            rows.append(jnp.pad(both, ((0, 0), (capacity - both.shape[1], 0), (0, 0))))
        length = T if memory is None else memory.length + T
        return Memory(tuple(rows), jnp.minimum(length, self.max_memory_length).astype(jnp.int32))


class DecoderLayer(nnx.Module):
    """A pre-norm Transformer-XL layer: LayerNorm and relative attention, then LayerNorm and MLP, each added to x."""

    def __init__(self, config: DecoderConfig, *, rngs, dtype, param_dtype):
        D = config.hidden_size
        kw = dict(rngs=rngs, dtype=dtype, param_dtype=param_dtype)
        weight = kw | {"stddev": config.initializer_range}
        residual = kw | {"stddev": residual_stddev(config.initializer_range, config.num_layers)}
        normal = nnx.initializers.normal(config.initializer_range)
        self.attention_norm = LayerNorm(D, eps=config.layer_norm_eps, **kw)
        # One weight for q, k and v. Its shape is [3, D, D] so that sharding never splits across the three.
        self.qkv_weight = param((3, D, D), (None, "heads", "embed"), init=normal, rngs=rngs, dtype=param_dtype)
        self.qkv_bias = param((3, D), (None, "heads"), init=nnx.initializers.zeros, rngs=rngs, dtype=param_dtype)
        # The bias of `relative` shifts all scores of a query alike, so softmax ignores it; it exists for export.
        self.relative = Linear(D, D, ("heads", "embed"), **weight)
        self.attention_out = Linear(D, D, ("embed", "heads"), **residual)
        self.mlp_norm = LayerNorm(D, eps=config.layer_norm_eps, **kw)
        self.mlp_in = Linear(D, 4 * D, ("mlp", "embed"), **weight)
        self.mlp_out = Linear(4 * D, D, ("embed", "mlp"), **residual)
        self.num_heads = config.num_attention_heads
        self.dropout_rate = config.output_dropout_prob
        self.dtype = dtype

    def __call__(
        self,
        x_BTD: Float[Array, "B T D"],
        r_NKH: Float[Array, "N K H"],
        r_w_bias: Float[Array, "N H"],
        r_r_bias: Float[Array, "N H"],
        mask: Bool[Array, "*#BN T K"],
        *,
        past: tuple[Array, Array] | None = None,
        cache: tuple[Array, Array] | None = None,
        position: Int[Array, ""] | int = 0,
        key: jax.Array | None = None,
        attention: Attention = "xla",
    ):
        """Applies the layer to T new tokens.

        Args:
          r_NKH: from `relative_keys`.
          r_w_bias, r_r_bias: the biases of the decoder, shared by all layers.
          mask: True where a query sees a key.
          past: keys and values [B, N, M, H] of the recurrent memory, which come before the new ones.
          cache: buffers of keys and values [B, N, K, H]; the new ones are written at `position`.
          key: enables dropout.
          attention: how attention is computed.

        Returns:
          The output, the latent not yet added, and the keys and values that the queries attended to.
        """
        key_attention, key_mlp = split_keys(key, 2)
        q, k, v = self._project(self.attention_norm(x_BTD), slice(0, 3))
        if past is not None:
            k, v = (jnp.concatenate([old, new], axis=2) for old, new in zip(past, (k, v), strict=True))
        if cache is not None:
            k, v = (lax.dynamic_update_slice_in_dim(c, n, position, axis=2) for c, n in zip(cache, (k, v), strict=True))
            # Without the barrier, XLA's CPU backend writes the updated cache twice: for the loop's state and to read.
            k, v = lax.optimization_barrier((k, v))
        context = relative_attention(q, k, v, r_NKH, r_w_bias, r_r_bias, mask, attention)
        attended = self.attention_out(context.swapaxes(1, 2).reshape(x_BTD.shape))
        attended = constrain(attended, "batch", None, None)
        x = x_BTD + dropout(attended, self.dropout_rate, key_attention)
        inner = constrain(self.mlp_in(self.mlp_norm(x)), "batch", None, "mlp")
        mlp = constrain(self.mlp_out(jax.nn.gelu(inner, approximate=True)), "batch", None, None)
        return x + dropout(mlp, self.dropout_rate, key_mlp), (k, v)

    def relative_keys(self, features: Float[Array, "K D"]) -> Float[Array, "N K H"]:
        """Returns r of each distance. It depends on no data, so a decoding loop computes it once."""
        return self.relative(features).reshape(features.shape[0], self.num_heads, -1).swapaxes(0, 1)

    def memory_keys_values(self, memory_BMD: Float[Array, "B M D"]):
        """Returns keys and values of the memory's rows, after the LayerNorm that new tokens pass through too."""
        return self._project(self.attention_norm(memory_BMD), slice(1, 3))

    def _project(self, h: Float[Array, "B T D"], which: slice) -> list[Float[Array, "B N T H"]]:
        """Returns those of queries, keys and values (0, 1, 2) that the slice selects."""
        weight, bias = self.qkv_weight[...][which], self.qkv_bias[...][which].astype(self.dtype)
        n, D = bias.shape
        y = matmul_transposed(h, weight) + bias
        y = y.reshape(*h.shape[:-1], n, self.num_heads, D // self.num_heads)
        return [constrain(y[..., i, :, :].swapaxes(1, 2), "batch", "head", None, None) for i in range(n)]


def inverse_frequencies(width: int) -> Float[Array, "D/2"]:
    """Returns f_i = 1 / 10000^(2i/D) in float32, for checkpoints that do not store them.

    Computed by NumPy, because compiled and uncompiled JAX would round differently. The power is computed in float64
    and rounded, because NumPy's float32 power differs between CPUs in the last bit.
    """
    powers = np.float64(10000) ** (np.arange(0, width, 2) / width)
    return jnp.asarray(1 / powers.astype(np.float32))
