"""Computes 95 % confidence intervals by the bootstrap, which resamples the texts with replacement (Efron 1979).

All metrics here are functions of sums over texts, so a resample is represented by the count of each text.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from jaxtyping import Bool, Float

RESAMPLES = 1000
CONFIDENCE = 0.95
Interval = tuple[float, float]


def resample_counts(n: int, seed: int = 0) -> Iterator[Float[np.ndarray, "r n"]]:
    """Yields 1000 resamples of n texts, several at a time, as counts of each text. They depend only on the seed."""
    rng = np.random.default_rng(seed % 2**32)
    chunk = max(1, 2**24 // n)  # 128 MiB of counts
    for start in range(0, RESAMPLES, chunk):
        yield rng.multinomial(n, np.full(n, 1 / n), min(chunk, RESAMPLES - start))


def resampled_sums(values: Float[np.ndarray, "n m"], seed: int = 0) -> Float[np.ndarray, "R m"]:
    """Returns the sum of each column over the texts of each resample."""
    values = np.asarray(values, float)
    return np.concatenate([counts @ values for counts in resample_counts(len(values), seed)])


def interval(values: Float[np.ndarray, " R"]) -> Interval:
    """Returns the 2.5th and 97.5th percentiles of a metric's values over the resamples."""
    low, high = np.percentile(values, [2.5, 97.5])
    return float(low), float(high)


def ratio_interval(
    numerators: Float[np.ndarray, " n"], denominators: Float[np.ndarray, " n"] | None = None, *, seed: int = 0
) -> Interval:
    """Returns the interval of Σ numerators / Σ denominators, or of the mean if there are no denominators."""
    denominators = np.ones(len(numerators)) if denominators is None else denominators
    numerator, denominator = resampled_sums(np.stack([numerators, denominators], axis=1), seed).T
    return interval(numerator / denominator)


def column_intervals(values: Float[np.ndarray, "n m"], *, seed: int = 0) -> list[Interval]:
    """Returns the interval of each column's mean."""
    return [interval(column) for column in resampled_sums(values, seed).T / len(values)]


def median_interval(values: Float[np.ndarray, " n"], *, seed: int = 0) -> Interval:
    """Returns the interval of the median. For an even number of texts, the median is the mean of the middle two."""
    n, order = len(values), np.argsort(values)
    medians = []
    for counts in resample_counts(n, seed):
        cumulative = counts[:, order].cumsum(1)
        middle = [values[order[(cumulative > rank).argmax(1)]] for rank in ((n - 1) // 2, n // 2)]
        medians.append(np.mean(middle, axis=0))
    return interval(np.concatenate(medians))


def proportion_interval(hits: Bool[np.ndarray, " n"]) -> Interval:
    """Returns the interval of the fraction of hits, in closed form (Wilson 1927).

    If all texts are hits, or all are misses, the bootstrap interval would have zero width.
    """
    from scipy.stats import binomtest

    bounds = binomtest(int(np.sum(hits)), len(hits)).proportion_ci(CONFIDENCE, method="wilson")
    return float(bounds.low), float(bounds.high)


def active_units_interval(means: Float[np.ndarray, "n L"], threshold: float, *, seed: int = 0) -> Interval:
    """Returns the interval of the number of dimensions whose mean has a variance above the threshold."""
    n, L = means.shape
    centred = np.asarray(means, float) - np.mean(means, axis=0)
    first, second = np.split(resampled_sums(np.concatenate([centred, centred**2], axis=1), seed) / n, [L], axis=1)
    return interval((second - first**2 > threshold).sum(1))
