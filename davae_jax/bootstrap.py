"""95 % intervals of figures over texts, by drawing the texts anew with replacement (Efron 1979)."""

from __future__ import annotations

import numpy as np
from jaxtyping import Float, Int

DRAWS = 1000
Interval = tuple[float, float]


def counts_of(n: int, seed: int = 0) -> Int[np.ndarray, "R n"]:
    """How often each of n texts stands in each of the 1000 draws of n texts."""
    return np.random.default_rng(seed).multinomial(n, np.full(n, 1 / n), DRAWS)


def interval(values: Float[np.ndarray, " R"]) -> Interval:
    """From the 2.5th to the 97.5th percentile of a figure's values over the draws."""
    low, high = np.percentile(values, [2.5, 97.5])
    return float(low), float(high)


def of_ratio(counts: Int[np.ndarray, "R n"], top: Float[np.ndarray, " n"], bottom=None) -> Interval:
    """Of Σ top / Σ bottom; with no bottom, of the mean."""
    bottom = np.ones(counts.shape[1]) if bottom is None else bottom
    return interval(counts @ np.asarray(top, float) / (counts @ np.asarray(bottom, float)))


def of_active_units(counts: Int[np.ndarray, "R n"], means: Float[np.ndarray, "n L"], threshold: float) -> Interval:
    """Of the number of dimensions whose mean varies by more than the threshold."""
    means = np.asarray(means, float) - np.mean(means, axis=0)
    share = counts / counts.shape[1]
    variance = share @ means**2 - (share @ means) ** 2  # [R, L]
    return interval((variance > threshold).sum(1))
