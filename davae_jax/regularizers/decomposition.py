"""Decomposes the KL to the prior into three terms with separate weights."""

# The help texts below fields are single lines, because the command line's help keeps their line breaks.
# ruff: noqa: E501
from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, NamedTuple

from davae_jax.regularizers.protocol import LatentBatch, Logs, Params, Regularizer
from davae_jax.regularizers.registry import register
from davae_jax.utils.lazy import jax, jnp

if TYPE_CHECKING:
    from jaxtyping import Array, Float


@register("tcvae")
@dataclass(frozen=True)
class TCVAE(Regularizer):
    """β-TCVAE (Chen et al. 2018): the mean KL is mutual information + total correlation + dimension-wise KL.

      MI = E log q(z|x)/q(z),   TC = E log q(z)/Π_l q(z_l),   DW = Σ_l E log q(z_l)/p(z_l)

    with z a sample of q(z|x) and q(z) estimated from the batch. Replaces the KL of the loss: use --beta.start 0
    --beta.max 0, and the KL's β as the weight. Needs memory for B² · L numbers.
    """

    mi: float = 1.0
    """Weight of the mutual information between text and latent."""

    tc: float = 6.0
    """Weight of the total correlation, which measures the dependence between dimensions; the paper's β."""

    dimensions: float = 1.0
    """Weight of the dimension-wise KL of the aggregate posterior to the prior."""

    sampling: Literal["stratified", "weighted"] = "stratified"
    """Estimate of q(z). weighted: the paper's section 4.1, biased. stratified: its appendix C.2, unbiased; its weights are averaged over the choice of the last text."""

    def __post_init__(self):
        super().__post_init__()
        self.check("mi tc dimensions", math.isfinite, "be finite")

    def __call__(self, batch: LatentBatch, params: Params) -> tuple[Float[Array, ""], Logs]:
        terms = decomposed_kl(batch, self.sampling)
        value = self.mi * terms.mi + self.tc * terms.tc + self.dimensions * terms.dimensions
        return value, terms._asdict()


class KLTerms(NamedTuple):
    """The three terms of the mean KL, in nats."""

    mi: Float[Array, ""]
    tc: Float[Array, ""]
    dimensions: Float[Array, ""]


def decomposed_kl(batch: LatentBatch, sampling: str) -> KLTerms:
    """Computes the three terms. Their sum is the mean of log q(z|x) − log p(z), for either estimate of q(z)."""
    from davae_jax.model.latent import log_normal  # needs JAX

    log_q_z, log_q_zl = aggregate_log_density(batch, sampling)
    log_p_zl = log_normal(batch.z, 0.0, jnp.zeros(()))
    log_q_z_given_x = log_normal(batch.z, batch.mean, batch.logvar).sum(-1)
    return KLTerms(
        mi=batch.average(log_q_z_given_x - log_q_z),
        tc=batch.average(log_q_z - log_q_zl.sum(-1)),
        dimensions=batch.average((log_q_zl - log_p_zl).sum(-1)),
    )


def aggregate_log_density(batch: LatentBatch, sampling: str) -> tuple[Float[Array, "B"], Float[Array, "B L"]]:
    """Estimates log q(z) and log q(z_l) of each text's latent from the posteriors of the batch.

    q is the aggregate posterior, the mean of the posteriors of all texts of the corpus.
    """
    from davae_jax.model.latent import log_normal  # needs JAX

    if batch.corpus_size is None:
        raise ValueError("needs the number of training texts")
    log_q_BBL = log_normal(batch.z[:, None], batch.mean, batch.logvar)  # of latent i, under the posterior of text j
    # A latent that belongs to no text may have the density 0 everywhere, whose logarithm has no gradient.
    log_q_BBL = jnp.where(batch.is_text[:, None, None], log_q_BBL, 0)
    n, N = batch.count, max(batch.corpus_size, 2)
    if sampling == "weighted":
        log_weight = jnp.full((len(batch.z),) * 2, -math.log(N)) - jnp.log(n)
    else:
        # The text that z was sampled for has weight 1/N. The other n − 1 represent the rest of the corpus.
        is_own_text = jnp.eye(len(batch.z), dtype=bool)
        log_weight = jnp.where(is_own_text, -math.log(N), math.log1p(-1 / N) - jnp.log(jnp.maximum(n - 1, 1)))
    log_weight = jnp.where(batch.is_text, log_weight, -jnp.inf)
    log_q_z = jax.nn.logsumexp(log_q_BBL.sum(-1) + log_weight, axis=1)
    return log_q_z, jax.nn.logsumexp(log_q_BBL + log_weight[..., None], axis=1)
