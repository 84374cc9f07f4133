"""The KL to the prior in three parts, each with a weight of its own."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from davae_jax.regularizers.protocol import LatentBatch, Logs, Params, Regularizer
from davae_jax.regularizers.registry import register


@register("tcvae")
@dataclass(frozen=True)
class TCVAE(Regularizer):
    """β-TCVAE (Chen et al. 2018): the mean KL is mutual information + total correlation + dimension-wise KL.

      MI = E log q(z|x)/q(z),   TC = E log q(z)/Π_l q(z_l),   DW = Σ_l E log q(z_l)/p(z_l)

    with z a draw of q(z|x) and q(z) estimated from the batch. In place of the KL: --beta.start 0 --beta.max 0, and the
    weight the β that the KL had. Takes memory for B² · L numbers.
    """

    mi: float = 1.0
    """Weight of the mutual information of text and latent."""

    tc: float = 6.0
    """Weight of the total correlation, how far the dimensions are from independent. The paper's β."""

    dimensions: float = 1.0
    """Weight of the KL of each dimension's aggregate to the prior, summed."""

    sampling: Literal["stratified", "weighted"] = "stratified"
    """How q(z) is estimated. weighted: the paper's section 4.1, biased. stratified: its appendix C.2, unbiased, the
    weights averaged over which other text is the last one."""

    def __post_init__(self):
        super().__post_init__()
        self.check("mi tc dimensions", math.isfinite, "be finite")

    def __call__(self, batch: LatentBatch, params: Params) -> tuple[Float[Array, ""], Logs]:
        parts = decomposed_kl(batch, self.sampling)
        value = self.mi * parts.mi + self.tc * parts.tc + self.dimensions * parts.dimensions
        return value, parts._asdict()


class Parts(NamedTuple):
    """nats"""

    mi: Float[Array, ""]
    tc: Float[Array, ""]
    dimensions: Float[Array, ""]


def decomposed_kl(batch: LatentBatch, sampling: str) -> Parts:
    """The three parts; their sum is the mean of log q(z|x) − log p(z), whatever the estimate of q(z)."""
    joint, marginals = aggregate_log_density(batch, sampling)
    of_prior = log_normal(batch.z, 0.0, 0.0)
    own = log_normal(batch.z, batch.mean, batch.logvar).sum(-1)
    return Parts(
        mi=batch.average(own - joint),
        tc=batch.average(joint - marginals.sum(-1)),
        dimensions=batch.average((marginals - of_prior).sum(-1)),
    )


def aggregate_log_density(batch: LatentBatch, sampling: str) -> tuple[Float[Array, "B"], Float[Array, "B L"]]:
    """log q(z) and log q(z_l) of each text's latent, q being the mean of the posteriors of all texts of the corpus,
    estimated from those of the batch."""
    if batch.corpus_size is None:
        raise ValueError("needs the number of texts that are trained on")
    given = log_normal(batch.z[:, None], batch.mean, batch.logvar)  # [n, n, L], of latent i under text j
    n, N = batch.count, max(batch.corpus_size, 2)
    if sampling == "weighted":
        log_weight = jnp.full((len(batch.z),) * 2, -math.log(N)) - jnp.log(n)
    else:
        # Its own text has 1/N; the other n − 1 share what is left, and stand for all the rest of the corpus.
        itself = jnp.eye(len(batch.z), dtype=bool)
        log_weight = jnp.where(itself, -math.log(N), math.log1p(-1 / N) - jnp.log(jnp.maximum(n - 1, 1)))
    log_weight = jnp.where(batch.is_text, log_weight, -jnp.inf)
    joint = jax.nn.logsumexp(given.sum(-1) + log_weight, axis=1)
    return joint, jax.nn.logsumexp(given + log_weight[..., None], axis=1)


def log_normal(z: Float[Array, "... L"], mean, logvar) -> Float[Array, "... L"]:
    """log N(z; mean, exp(logvar)) of each dimension."""
    return -0.5 * (jnp.square(z - mean) * jnp.exp(-logvar) + logvar + math.log(2 * math.pi))
