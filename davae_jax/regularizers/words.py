"""The latent has to tell a text's words by itself."""

from __future__ import annotations

from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from davae_jax.regularizers.protocol import LatentBatch, Learned, Logs, Params, Sizes
from davae_jax.regularizers.registry import register


@register("bag_of_words")
@dataclass(frozen=True)
class BagOfWords(Learned):
    """Bag-of-words loss (Zhao et al. 2017): −log p of each of a text's tokens, whatever its place, by one softmax over
    the vocabulary made from the latent alone. Takes memory for B · V numbers.
    """

    hidden: int = 0
    """Width of a hidden layer with tanh, as in the paper (400); 0: one linear map."""

    per_token: bool = True
    """Mean over a text's tokens, as --length-weighted has it for the reconstruction; with --no their sum, as in the
    paper."""

    def __post_init__(self):
        super().__post_init__()
        self.check("hidden", lambda n: n >= 0, "be at least 0")

    def init(self, key: jax.Array, sizes: Sizes) -> Params:
        first, second = jax.random.split(key)
        normal, params, width = jax.nn.initializers.lecun_normal(), {}, sizes.latent
        if self.hidden:
            params["hidden"] = {"weight": normal(first, (width, self.hidden)), "bias": jnp.zeros(self.hidden)}
            width = self.hidden
        output = {"weight": normal(second, (width, sizes.vocabulary)), "bias": jnp.zeros(sizes.vocabulary)}
        return params | {"output": output}

    def __call__(self, batch: LatentBatch, params: Params) -> tuple[Float[Array, ""], Logs]:
        x = batch.z
        if self.hidden:
            x = jnp.tanh(x @ params["hidden"]["weight"] + params["hidden"]["bias"])
        log_p = jax.nn.log_softmax(x @ params["output"]["weight"] + params["output"]["bias"])
        n, counted = len(batch.z), batch.text_of_target >= 0
        place = jnp.where(counted, batch.text_of_target, 0)
        nll = jnp.where(counted, -log_p[place, batch.targets], 0)
        of_text = jnp.zeros(n, nll.dtype).at[place].add(nll)
        if self.per_token:
            tokens = jnp.zeros(n, nll.dtype).at[place].add(counted.astype(nll.dtype))
            of_text = of_text / jnp.maximum(tokens, 1)
        return batch.average(of_text), {}
