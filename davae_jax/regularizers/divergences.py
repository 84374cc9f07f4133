"""How far the latents of a batch, taken together, are from the prior N(0, I)."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from davae_jax.regularizers.protocol import LatentBatch, Logs, Params, Regularizer
from davae_jax.regularizers.registry import register
from davae_jax.utils.errors import InputError


@register("mmd")
@dataclass(frozen=True)
class MMD(Regularizer):
    """Maximum mean discrepancy of latents and as many draws of the prior, squared, the unbiased U-statistic (Gretton et
    al. 2012, lemma 6), which may be below 0.

    WAE (Tolstikhin et al. 2018): the loss is rec + λ·MMD. That is --beta.start 0 --beta.max 0, and λ the weight.
    InfoVAE (Zhao et al. 2019): rec + (1 − α)·KL + (α + λ − 1)·MMD. That is --beta.max at 1 − α and the weight at
    α + λ − 1.
    """

    kernel: Literal["imq", "rbf"] = "imq"
    """imq: Σ C / (C + d²). rbf: Σ exp(−d² / C). d² is the squared distance; C = 2·L·scale, L the latent size."""

    scales: tuple[float, ...] = (0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0)
    """The sum's; at 1, C is the mean squared distance of two draws of the prior. Those of the WAE's program."""

    def __post_init__(self):
        super().__post_init__()
        self.check("scales", lambda x: x and all(0 < s < float("inf") for s in x), "be above 0 and finite")

    def __call__(self, batch: LatentBatch, params: Params) -> tuple[Float[Array, ""], Logs]:
        if len(batch.z) < 2:
            raise InputError(f"regularizer {self.name}: compares pairs of texts, and a part of the batch has one alone")
        return unbiased_mmd(batch.z, batch.prior, batch.is_text, self.of_distance), {}

    def of_distance(self, squared: Float[Array, "B B"], L: int) -> Float[Array, "B B"]:
        """The kernel."""
        widths = [2.0 * L * scale for scale in self.scales]
        if self.kernel == "imq":
            return sum(C / (C + squared) for C in widths)
        return sum(jnp.exp(-squared / C) for C in widths)


def unbiased_mmd(x: Float[Array, "B L"], y: Float[Array, "B L"], kept: Bool[Array, "B"], kernel) -> Float[Array, ""]:
    """Σ_{i≠j} [k(x_i, x_j) + k(y_i, y_j)] / (m (m − 1)) − 2 Σ_{ij} k(x_i, y_j) / m², of the m rows that are kept."""
    both = kept[:, None] & kept
    other = both & ~jnp.eye(len(kept), dtype=bool)
    m, L = kept.sum().astype(x.dtype), x.shape[1]

    def total(a, b, pairs):
        return jnp.where(pairs, kernel(squared_distances(a, b), L), 0).sum()

    within = (total(x, x, other) + total(y, y, other)) / jnp.maximum(m * (m - 1), 1)
    return within - 2 * total(x, y, both) / jnp.maximum(m * m, 1)


def squared_distances(x: Float[Array, "B L"], y: Float[Array, "C L"]) -> Float[Array, "B C"]:
    """By ‖x‖² + ‖y‖² − 2·x·y: no array of [n, m, L]."""
    product = jnp.matmul(x, y.T, precision=jax.lax.Precision.HIGHEST)
    return jnp.maximum(jnp.square(x).sum(1)[:, None] + jnp.square(y).sum(1) - 2 * product, 0)


def directions(key: jax.Array, slices: int, L: int) -> Float[Array, "L K"]:
    """Random ones, of length 1, uniform on the sphere."""
    drawn = jax.random.normal(key, (L, slices))
    return drawn / jnp.linalg.norm(drawn, axis=0)


@register("sigreg")
@dataclass(frozen=True)
class SIGReg(Regularizer):
    """Sketched isotropic Gaussian regularization (LeJEPA: Balestriero & LeCun 2025): the mean over random directions of
    the Epps-Pulley statistic of the latents' projections,

      n ∫ |φ_n(t) − exp(−t²/2)|² exp(−t²/2) dt,    φ_n(t) = 1/n Σ exp(i t x),

    by the trapezoidal rule on [−5, 5]. Of exact draws of the prior its mean is √(2π) − √(2π/3) = 1.06 whatever n.
    """

    slices: int = 256
    """Directions, new ones every step."""

    knots: int = 17
    """Points of the rule, an odd number."""

    def __post_init__(self):
        super().__post_init__()
        self.check("slices", lambda n: n >= 1, "be at least 1")
        self.check("knots", lambda n: n >= 3 and n % 2, "be odd and at least 3")

    def __call__(self, batch: LatentBatch, params: Params) -> tuple[Float[Array, ""], Logs]:
        projected = batch.z @ directions(batch.key, self.slices, batch.z.shape[1]).astype(batch.z.dtype)
        return epps_pulley(projected, batch, self.knots).mean(), {}


def epps_pulley(x: Float[Array, "B K"], batch: LatentBatch, knots: int, end: float = 5.0) -> Float[Array, "K"]:
    """The statistic (Epps & Pulley 1983) of each column's texts."""
    t = jnp.linspace(0, end, knots // 2 + 1, dtype=x.dtype)  # the integrand is even
    step = t[1] - t[0]
    rule = jnp.full(t.shape, 2 * step).at[0].set(step).at[-1].set(step)
    normal = jnp.exp(-jnp.square(t) / 2)
    angle = x[..., None] * t
    real, imaginary = batch.average(jnp.cos(angle)) - normal, batch.average(jnp.sin(angle))
    return batch.count * (jnp.square(real) + jnp.square(imaginary)) @ (rule * normal)


@register("sliced_wasserstein")
@dataclass(frozen=True)
class SlicedWasserstein(Regularizer):
    """The squared 2-Wasserstein distance of projections of latents and of as many draws of the prior, sorted, mean over
    random directions (Kolouri et al. 2019, sliced-Wasserstein autoencoders). Biased upwards, by about 1/n of its own
    scale: of two samples of one distribution it is not 0.
    """

    slices: int = 128
    """Directions, new ones every step."""

    def __post_init__(self):
        super().__post_init__()
        self.check("slices", lambda n: n >= 1, "be at least 1")

    def __call__(self, batch: LatentBatch, params: Params) -> tuple[Float[Array, ""], Logs]:
        along = directions(batch.key, self.slices, batch.z.shape[1]).astype(batch.z.dtype)
        far = math.sqrt(jnp.finfo(batch.z.dtype).max) / 4  # finite: where both hold no text they differ by 0

        def ordered(x):
            return jnp.sort(jnp.where(batch.is_text[:, None], x @ along, far), axis=0)

        squared = jnp.square(ordered(batch.z) - ordered(batch.prior))
        return (squared.sum(0) / batch.count).mean(), {}
