"""Predicts the words of a text from its latent alone."""

# The help texts below fields are single lines, because the command line's help keeps their line breaks.
# ruff: noqa: E501
from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from davae_jax.regularizers.protocol import LatentBatch, Learned, Logs, Params, Sizes
from davae_jax.regularizers.registry import register
from davae_jax.utils.lazy import jax, jnp

if TYPE_CHECKING:
    from jaxtyping import Array, Float


@register("bag_of_words")
@dataclass(frozen=True)
class BagOfWords(Learned):
    """Bag-of-words loss (Zhao et al. 2017): −log p of each token of a text under one softmax over the vocabulary, which
    is computed from the latent alone and ignores the tokens' positions. Needs memory for B · V numbers.
    """

    hidden: int = 0
    """Width of a tanh hidden layer (the paper: 400); 0: a single linear layer."""

    per_token: bool = True
    """Average over the tokens of a text, as --length-weighted does for the reconstruction loss; off: sum, as in the paper."""

    def __post_init__(self):
        super().__post_init__()
        self.check("hidden", lambda n: n >= 0, "be at least 0")

    def init(self, key: jax.Array, sizes: Sizes) -> Params:
        hidden_key, output_key = jax.random.split(key)
        initializer = jax.nn.initializers.lecun_normal()

        def linear(key: jax.Array, inputs: int, outputs: int) -> Params:
            return {"weight": initializer(key, (inputs, outputs)), "bias": jnp.zeros(outputs)}

        if not self.hidden:
            return {"output": linear(output_key, sizes.latent, sizes.vocabulary)}
        return {
            "hidden": linear(hidden_key, sizes.latent, self.hidden),
            "output": linear(output_key, self.hidden, sizes.vocabulary),
        }

    def __call__(self, batch: LatentBatch, params: Params) -> tuple[Float[Array, ""], Logs]:
        x = batch.z
        if self.hidden:
            x = jnp.tanh(x @ params["hidden"]["weight"] + params["hidden"]["bias"])
        log_p_BV = jax.nn.log_softmax(x @ params["output"]["weight"] + params["output"]["bias"])
        B, is_token = len(batch.z), batch.text_of_target >= 0
        text = jnp.where(is_token, batch.text_of_target, 0)
        nll = jnp.where(is_token, -log_p_BV[text, batch.targets], 0)
        nll_per_text = jnp.zeros(B, nll.dtype).at[text].add(nll)
        if self.per_token:
            tokens = jnp.zeros(B, nll.dtype).at[text].add(is_token.astype(nll.dtype))
            nll_per_text = nll_per_text / jnp.maximum(tokens, 1)
        return batch.average(nll_per_text), {}
