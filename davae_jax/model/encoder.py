"""The encoder: a BERT (post-norm), and a linear map from its pooled output to the posterior's mean and log-variance."""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from davae_jax.model.attention import dot_product_attention
from davae_jax.model.config import EncoderConfig, Remat
from davae_jax.model.latent import Posterior
from davae_jax.model.layers import (
    Embedding,
    LayerNorm,
    Linear,
    Segments,
    apply_remat,
    dropout,
    residual_stddev,
    same_segment,
    split_keys,
)
from davae_jax.model.stack import apply_in_order
from davae_jax.parallel.sharding import constrain


class EncoderOutput(NamedTuple):
    """The outputs of the encoder. For rows with P texts `pooled` is [B, P, D], `mean` and `logvar` are [B, P, L].

    hidden: 1 + layers arrays: the embeddings (noise included), then the output of each layer.
    pooled: tanh of a linear map of each text's first token.
    mean, logvar: mean and log-variance of the posterior, in float32.
    """

    hidden: tuple[Float[Array, "B S D"], ...]
    pooled: Float[Array, "B D"]
    mean: Float[Array, "B L"]
    logvar: Float[Array, "B L"]

    @property
    def posterior(self) -> Posterior:
        """q(z | text)."""
        return Posterior(self.mean, self.logvar)


class Encoder(nnx.Module):
    """BERT (Devlin et al. 2018), pooled by tanh(Linear(first token)), then a bias-free Linear to (mean, logvar)."""

    def __init__(self, config: EncoderConfig, latent_size: int, *, rngs, dtype, param_dtype):
        D = config.hidden_size
        kw = dict(rngs=rngs, dtype=dtype, param_dtype=param_dtype)
        weight = kw | {"stddev": config.initializer_range}
        self.word = Embedding(config.vocab_size, D, **weight)
        self.position = Embedding(config.max_position_embeddings, D, (None, "embed"), **weight)
        self.token_type = Embedding(config.type_vocab_size, D, (None, "embed"), **weight)
        self.norm = LayerNorm(D, eps=config.layer_norm_eps, **kw)
        self.layers = nnx.List([EncoderLayer(config, **kw) for _ in range(config.num_hidden_layers)])
        self.pooler = Linear(D, D, ("mlp", "embed"), **weight)
        # Computed in float32 for every dtype of the model: bfloat16 keeps only 8 significant bits of a log-variance.
        self.posterior = Linear(D, 2 * latent_size, (None, "embed"), bias=False, **weight | {"dtype": jnp.float32})
        self.dropout_rate = config.hidden_dropout_prob

    def __call__(
        self,
        ids: Int[Array, "B S"],
        embedding_noise: Float[Array, "B S D"] | None = None,
        key: jax.Array | None = None,
        remat: Remat = "none",
        segments: Segments | None = None,
    ) -> EncoderOutput:
        """Encodes rows of ids; id 0 is padding, which no token attends to.

        Args:
          embedding_noise: added to the embeddings after their LayerNorm and dropout.
          key: enables dropout of the embeddings, the attention probabilities and both outputs of each layer.
          remat: which activations of a layer are saved for the backward pass (`layers.apply_remat`).
          segments: for rows with several texts. A token then sees only tokens of its text, and positions count from
            the beginning of the text.
        """
        key_input, *layer_keys = split_keys(key, 1 + len(self.layers))
        with jax.named_scope("embeddings"):
            positions = jnp.arange(ids.shape[1]) if segments is None else segments.positions()
            h = self.word(ids) + self.position(positions) + self.token_type(jnp.zeros((), jnp.int32))
            h = dropout(self.norm(h), self.dropout_rate, key_input)
            if embedding_noise is not None:
                h = h + embedding_noise.astype(h.dtype)
            h = constrain(h, "batch", None, None)
        # As published, masking adds −10000 to a score; the decoder replaces the score instead.
        mask = (ids > 0)[:, None, None, :]
        if segments is not None:
            mask &= same_segment(segments.segment_ids)
        score_bias = jnp.where(mask, 0.0, -10000.0)

        def apply_layer(layer: EncoderLayer, x: Float[Array, "B S D"], key: jax.Array | None):
            return apply_remat(lambda x, key: layer(x, score_bias, key), remat)(x, key), None

        outputs, _ = apply_in_order(self.layers, apply_layer, h, layer_keys)
        last = outputs[-1]
        first = last[:, 0] if segments is None else jnp.take_along_axis(last, segments.starts[..., None], axis=1)
        pooled = jnp.tanh(self.pooler(first))
        mean, logvar = jnp.split(self.posterior(pooled), 2, axis=-1)
        return EncoderOutput((h, *outputs), pooled, mean, logvar)


class EncoderLayer(nnx.Module):
    """A Transformer layer of BERT: attention and MLP, each added to its input before a LayerNorm."""

    def __init__(self, config: EncoderConfig, *, rngs, dtype, param_dtype):
        D, F = config.hidden_size, config.intermediate_size
        kw = dict(rngs=rngs, dtype=dtype, param_dtype=param_dtype)
        weight = kw | {"stddev": config.initializer_range}
        residual = kw | {"stddev": residual_stddev(config.initializer_range, config.num_hidden_layers)}
        self.query = Linear(D, D, ("heads", "embed"), **weight)
        self.key = Linear(D, D, ("heads", "embed"), **weight)
        self.value = Linear(D, D, ("heads", "embed"), **weight)
        self.attention_out = Linear(D, D, ("embed", "heads"), **residual)
        self.attention_norm = LayerNorm(D, eps=config.layer_norm_eps, **kw)
        self.mlp_in = Linear(D, F, ("mlp", "embed"), **weight)
        self.mlp_out = Linear(F, D, ("embed", "mlp"), **residual)
        self.mlp_norm = LayerNorm(D, eps=config.layer_norm_eps, **kw)
        self.num_heads = config.num_attention_heads
        self.dropout_rate = config.hidden_dropout_prob
        self.attention_dropout_rate = config.attention_probs_dropout_prob

    def __call__(
        self, x_BSD: Float[Array, "B S D"], score_bias: Float[Array, "B 1 #S S"], key: jax.Array | None = None
    ) -> Float[Array, "B S D"]:
        key_probs, key_attention, key_mlp = split_keys(key, 3)
        B, S, D = x_BSD.shape
        q, k, v = (
            constrain(f(x_BSD).reshape(B, S, self.num_heads, -1), "batch", None, "head", None)
            for f in (self.query, self.key, self.value)
        )
        context = dot_product_attention(
            q, k, v, score_bias, dropout_rate=self.attention_dropout_rate, key=key_probs
        ).reshape(B, S, D)
        attended = constrain(self.attention_out(context), "batch", None, None)
        x = self.attention_norm(x_BSD + dropout(attended, self.dropout_rate, key_attention))
        inner = constrain(self.mlp_in(x), "batch", None, "mlp")
        mlp = constrain(self.mlp_out(jax.nn.gelu(inner, approximate=False)), "batch", None, None)
        return self.mlp_norm(x + dropout(mlp, self.dropout_rate, key_mlp))
