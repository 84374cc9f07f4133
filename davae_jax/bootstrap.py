"""95 % intervals of figures over texts, by drawing the texts anew with replacement (Efron 1979).

All figures are made of sums over texts, so a draw of texts is how often each of them counts.
"""

from __future__ import annotations

import numpy as np
from jaxtyping import Float

DRAWS = 1000
Interval = tuple[float, float]


def sums(values: Float[np.ndarray, "n m"], seed: int = 0) -> Float[np.ndarray, "R m"]:
    """Σ over the texts of each column, in each of 1000 draws of n texts. One seed, one set of draws."""
    values, rng = np.asarray(values, float), np.random.default_rng(seed % 2**32)
    n = len(values)
    at_once = max(1, 2**24 // n)  # draws: 128 MiB of counts
    sizes = [min(at_once, DRAWS - start) for start in range(0, DRAWS, at_once)]
    return np.concatenate([rng.multinomial(n, np.full(n, 1 / n), size) @ values for size in sizes])


def interval(values: Float[np.ndarray, " R"]) -> Interval:
    """From the 2.5th to the 97.5th percentile of a figure's values over the draws."""
    low, high = np.percentile(values, [2.5, 97.5])
    return float(low), float(high)


def of_ratio(top: Float[np.ndarray, " n"], bottom: Float[np.ndarray, " n"] | None = None, *, seed: int = 0) -> Interval:
    """Of Σ top / Σ bottom; with no bottom, of the mean."""
    bottom = np.ones(len(top)) if bottom is None else bottom
    above, below = sums(np.stack([top, bottom], axis=1), seed).T
    return interval(above / below)


def of_active_units(means: Float[np.ndarray, "n L"], threshold: float, *, seed: int = 0) -> Interval:
    """Of the number of dimensions whose mean varies by more than the threshold."""
    n, L = means.shape
    centred = np.asarray(means, float) - np.mean(means, axis=0)
    first, second = np.split(sums(np.concatenate([centred, centred**2], axis=1), seed) / n, [L], axis=1)
    return interval((second - first**2 > threshold).sum(1))
