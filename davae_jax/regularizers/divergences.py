"""Measures distances between the distribution of a batch's latents and the prior N(0, I)."""

# The help texts below fields are single lines, because the command line's help keeps their line breaks.
# ruff: noqa: E501
from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from davae_jax.regularizers.protocol import LatentBatch, Logs, Params, Regularizer
from davae_jax.regularizers.registry import register
from davae_jax.utils.errors import InputError
from davae_jax.utils.lazy import jax, jnp

if TYPE_CHECKING:
    from jaxtyping import Array, Bool, Float


SAFE_TO_SQUARE = 1e16  # sums of a million such squares do not overflow float32


@register("mmd")
@dataclass(frozen=True)
class MMD(Regularizer):
    """Squared maximum mean discrepancy between latents and as many samples of the prior: the unbiased U-statistic
    (Gretton et al. 2012, lemma 6), which may be negative.

    WAE (Tolstikhin et al. 2018): the loss is rec + λ·MMD, so --beta.start 0 --beta.max 0, and λ is the weight.
    InfoVAE (Zhao et al. 2019): rec + (1 − α)·KL + (α + λ − 1)·MMD, so --beta.max is 1 − α and the weight α + λ − 1.
    """

    kernel: Literal["imq", "rbf"] = "imq"
    """imq: Σ C / (C + d²). rbf: Σ exp(−d² / C). The sum is over the scales, d² is the squared distance, and C = 2·L·scale with L the latent size."""

    scales: tuple[float, ...] = (0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0)
    """Scales of the kernel; at 1, C is the mean squared distance of two samples of the prior. The default is that of the WAE authors' code."""

    def __post_init__(self):
        super().__post_init__()
        self.check("scales", lambda x: x and all(0 < s < float("inf") for s in x), "be above 0 and finite")

    def __call__(self, batch: LatentBatch, params: Params) -> tuple[Float[Array, ""], Logs]:
        if len(batch.z) < 2:
            raise InputError(f"regularizer {self.name}: compares pairs of texts, but the micro-batch has only one")
        return unbiased_mmd(batch.z, batch.prior, batch.is_text, self.kernel_value), {}

    def kernel_value(self, squared: Float[Array, "B B"], L: int) -> Float[Array, "B B"]:
        """Returns the kernel of pairs with these squared distances, in L dimensions."""
        widths = [2.0 * L * scale for scale in self.scales]
        if self.kernel == "imq":
            return sum(C / (C + squared) for C in widths)
        return sum(jnp.exp(-squared / C) for C in widths)


def unbiased_mmd(
    x: Float[Array, "B L"], y: Float[Array, "B L"], is_text: Bool[Array, "B"], kernel: Callable
) -> Float[Array, ""]:
    """Returns Σ_{i≠j} [k(x_i, x_j) + k(y_i, y_j)] / (m (m − 1)) − 2 Σ_{ij} k(x_i, y_j) / m² over the m rows that are
    texts."""
    pairs = is_text[:, None] & is_text
    distinct = pairs & ~jnp.eye(len(is_text), dtype=bool)
    m, L = is_text.sum().astype(x.dtype), x.shape[1]

    def kernel_sum(a, b, counted):
        return jnp.where(counted, kernel(squared_distances(a, b), L), 0).sum()

    within = (kernel_sum(x, x, distinct) + kernel_sum(y, y, distinct)) / jnp.maximum(m * (m - 1), 1)
    return within - 2 * kernel_sum(x, y, pairs) / jnp.maximum(m * m, 1)


def squared_distances(x: Float[Array, "B L"], y: Float[Array, "C L"]) -> Float[Array, "B C"]:
    """Returns the squared distances of all pairs as ‖x‖² + ‖y‖² − 2·x·y, which needs no array [B, C, L].

    Distances whose square overflows are infinite: latents are made smaller before they are squared, because ∞ − ∞ would
    be NaN. Ordinary latents keep their size.
    """
    largest = jnp.maximum(jnp.abs(x).max(), jnp.abs(y).max())
    scale = jax.lax.stop_gradient(jnp.maximum(1, largest / SAFE_TO_SQUARE)).astype(x.dtype)
    x, y = x / scale, y / scale
    product = jnp.matmul(x, y.T, precision=jax.lax.Precision.HIGHEST)
    return jnp.maximum(jnp.square(x).sum(1)[:, None] + jnp.square(y).sum(1) - 2 * product, 0) * jnp.square(scale)


def random_directions(key: jax.Array, slices: int, L: int) -> Float[Array, "L K"]:
    """Returns unit vectors, uniform on the sphere, as columns."""
    vectors = jax.random.normal(key, (L, slices))
    return vectors / jnp.linalg.norm(vectors, axis=0)


@register("sigreg")
@dataclass(frozen=True)
class SIGReg(Regularizer):
    """Sketched isotropic Gaussian regularization (LeJEPA: Balestriero & LeCun 2025): the mean over random directions of
    the Epps-Pulley statistic of the latents' projections,

      n ∫ |φ_n(t) − exp(−t²/2)|² exp(−t²/2) dt,    φ_n(t) = 1/n Σ exp(i t x),

    by the trapezoidal rule on [−5, 5]. For samples of the prior itself its mean is √(2π) − √(2π/3) = 1.06 for every n.
    """

    slices: int = 256
    """Number of random directions, resampled every step."""

    knots: int = 17
    """Number of integration points, odd."""

    def __post_init__(self):
        super().__post_init__()
        self.check("slices", lambda n: n >= 1, "be at least 1")
        self.check("knots", lambda n: n >= 3 and n % 2, "be odd and at least 3")

    def __call__(self, batch: LatentBatch, params: Params) -> tuple[Float[Array, ""], Logs]:
        projected = batch.z @ random_directions(batch.key, self.slices, batch.z.shape[1]).astype(batch.z.dtype)
        return epps_pulley(projected, batch, self.knots).mean(), {}


def epps_pulley(x: Float[Array, "B K"], batch: LatentBatch, knots: int) -> Float[Array, "K"]:
    """Returns the Epps-Pulley statistic (1983) of each column over the texts."""
    t = jnp.linspace(0, 5.0, knots // 2 + 1, dtype=x.dtype)  # the integrand is even, so half of the interval is enough
    spacing = t[1] - t[0]
    trapezoid = jnp.full(t.shape, 2 * spacing).at[0].set(spacing).at[-1].set(spacing)
    normal = jnp.exp(-jnp.square(t) / 2)
    angle = x[..., None] * t
    real, imaginary = batch.average(jnp.cos(angle)) - normal, batch.average(jnp.sin(angle))
    return batch.count * (jnp.square(real) + jnp.square(imaginary)) @ (trapezoid * normal)


@register("sliced_wasserstein")
@dataclass(frozen=True)
class SlicedWasserstein(Regularizer):
    """Sliced Wasserstein distance (Kolouri et al. 2019, sliced-Wasserstein autoencoders): the squared 2-Wasserstein
    distance between projections of latents and of equally many samples of the prior, averaged over random directions.

    Biased upwards by about 1/n of its scale: it is not 0 for two samples of the same distribution.
    """

    slices: int = 128
    """Number of random directions, resampled every step."""

    def __post_init__(self):
        super().__post_init__()
        self.check("slices", lambda n: n >= 1, "be at least 1")

    def __call__(self, batch: LatentBatch, params: Params) -> tuple[Float[Array, ""], Logs]:
        directions_LK = random_directions(batch.key, self.slices, batch.z.shape[1]).astype(batch.z.dtype)
        is_last = jnp.arange(len(batch.z))[:, None] >= batch.is_text.sum()

        def sorted_projections(x):
            # Rows without a text are sorted to the end in both, and set to the same value there.
            projected = jnp.sort(jnp.where(batch.is_text[:, None], x @ directions_LK, jnp.inf), axis=0)
            return jnp.where(is_last, 0, projected)

        squared = jnp.square(sorted_projections(batch.z) - sorted_projections(batch.prior))
        return (squared.sum(0) / batch.count).mean(), {}
