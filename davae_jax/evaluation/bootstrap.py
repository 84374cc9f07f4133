"""95 % intervals of figures over texts, by drawing the texts anew with replacement (Efron 1979).

All figures are made of sums over texts, so a draw of texts is how often each of them counts.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from jaxtyping import Bool, Float

DRAWS = 1000
LEVEL = 0.95
Interval = tuple[float, float]


def draws(n: int, seed: int = 0) -> Iterator[Float[np.ndarray, "r n"]]:
    """How often each of n texts stands in each of 1000 draws of n, some draws at a time. One seed, one set of draws."""
    rng = np.random.default_rng(seed % 2**32)
    at_once = max(1, 2**24 // n)  # 128 MiB of counts
    for start in range(0, DRAWS, at_once):
        yield rng.multinomial(n, np.full(n, 1 / n), min(at_once, DRAWS - start))


def sums(values: Float[np.ndarray, "n m"], seed: int = 0) -> Float[np.ndarray, "R m"]:
    """Σ over the texts of each column, in each of the draws."""
    values = np.asarray(values, float)
    return np.concatenate([counts @ values for counts in draws(len(values), seed)])


def interval(values: Float[np.ndarray, " R"]) -> Interval:
    """From the 2.5th to the 97.5th percentile of a figure's values over the draws."""
    low, high = np.percentile(values, [2.5, 97.5])
    return float(low), float(high)


def of_ratio(top: Float[np.ndarray, " n"], bottom: Float[np.ndarray, " n"] | None = None, *, seed: int = 0) -> Interval:
    """Of Σ top / Σ bottom; with no bottom, of the mean."""
    bottom = np.ones(len(top)) if bottom is None else bottom
    above, below = sums(np.stack([top, bottom], axis=1), seed).T
    return interval(above / below)


def of_columns(values: Float[np.ndarray, "n m"], *, seed: int = 0) -> list[Interval]:
    """Of each column's mean."""
    return [interval(column) for column in sums(values, seed).T / len(values)]


def of_median(values: Float[np.ndarray, " n"], *, seed: int = 0) -> Interval:
    """Of the median; of an even number of texts, the mean of the two in the middle."""
    n, order = len(values), np.argsort(values)
    found = []
    for counts in draws(n, seed):
        upto = counts[:, order].cumsum(1)
        middle = [values[order[(upto > place).argmax(1)]] for place in ((n - 1) // 2, n // 2)]
        found.append(np.mean(middle, axis=0))
    return interval(np.concatenate(found))


def of_proportion(hits: Bool[np.ndarray, " n"]) -> Interval:
    """Of the part of texts that are hits, without draws (Wilson 1927).

    Draws of texts that are all hits, or all misses, are all alike, and would say that there is no doubt.
    """
    from scipy.stats import binomtest

    found = binomtest(int(np.sum(hits)), len(hits)).proportion_ci(LEVEL, method="wilson")
    return float(found.low), float(found.high)


def of_active_units(means: Float[np.ndarray, "n L"], threshold: float, *, seed: int = 0) -> Interval:
    """Of the number of dimensions whose mean varies by more than the threshold."""
    n, L = means.shape
    centred = np.asarray(means, float) - np.mean(means, axis=0)
    first, second = np.split(sums(np.concatenate([centred, centred**2], axis=1), seed) / n, [L], axis=1)
    return interval((second - first**2 > threshold).sum(1))
