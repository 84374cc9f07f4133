"""Evaluates how well factors can be predicted from latents: linear probes, mutual information gap, DCI."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
from jaxtyping import Bool, Float, Int

if TYPE_CHECKING:
    from sklearn.linear_model import LogisticRegression

FOLDS, PENALTY, BINS = 5, 1e-3, 20


class Probe(NamedTuple):
    """Holds the linear probe of one factor and its cross-validated predictions."""

    hits: Bool[np.ndarray, " n"]  # whether a probe fitted to other texts predicts the class
    majority: float  # frequency of the most frequent class, the accuracy of a constant prediction
    weights: Float[np.ndarray, "L C"]  # of a probe fitted to all texts, with dimensions scaled to variance 1


def linear_probe(means: Float[np.ndarray, "n L"], classes: Sequence[str], seed: int = 0) -> Probe:
    """Fits multinomial logistic regression from the posterior means to a factor, in five folds (Alain & Bengio 2017).

    Args:
      classes: the factor's class of each text, at least two different ones.
      seed: determines the random folds.
    """
    from sklearn.model_selection import PredefinedSplit

    x, y = standardize(means), np.unique(np.asarray(classes), return_inverse=True)[1]
    folds = PredefinedSplit(np.random.default_rng(seed % 2**32).permutation(len(x)) % FOLDS)
    predicted = np.zeros(len(y), int)
    for train, test in folds.split():
        has_classes = len(np.unique(y[train])) > 1
        predicted[test] = fit_logistic(x[train], y[train]).predict(x[test]) if has_classes else y[train[0]]
    return Probe(predicted == y, np.bincount(y).max() / len(y), softmax_weights(fit_logistic(x, y)))


def standardize(means: Float[np.ndarray, "n L"]) -> Float[np.ndarray, "n L"]:
    """Scales each dimension to mean 0 and variance 1.

    A dimension that hardly varies stays near 0, so that a probe cannot use its noise.
    """
    means = np.asarray(means, np.float64)
    return (means - means.mean(0)) / np.maximum(means.std(0), 1e-2)


def fit_logistic(x: Float[np.ndarray, "n L"], y: Int[np.ndarray, " n"]) -> LogisticRegression:
    """Minimizes the mean softmax cross-entropy + ½ · 0.001 · |weights|²; biases are not penalized."""
    from sklearn.linear_model import LogisticRegression

    # scikit-learn minimizes C · Σ cross-entropy + ½ |w|². For two classes it has one weight vector w, equivalent to
    # the softmax weights −w/2 and w/2, whose squared norm is half of |w|².
    two_classes = len(np.unique(y)) == 2
    return LogisticRegression(C=(2 if two_classes else 1) / (PENALTY * len(x)), tol=1e-6, max_iter=1000).fit(x, y)


def softmax_weights(fitted: LogisticRegression) -> Float[np.ndarray, "L C"]:
    """Returns the softmax weights of a fitted logistic regression, one column per class."""
    w = fitted.coef_
    return np.concatenate([-w / 2, w / 2]).T if len(w) == 1 else w.T


def information_with_dimensions(means: Float[np.ndarray, "n L"], classes: Sequence[str]) -> Float[np.ndarray, "L"]:
    """Estimates I(factor; dimension) of each dimension in nats, with the posterior means in 20 bins of equal width.

    This is the estimator of Locatello et al. (2019). With few texts it is too high, by about (C − 1) · 19 / 2n.
    """
    from sklearn.metrics import mutual_info_score

    def binned(values: np.ndarray) -> np.ndarray:
        return np.digitize(values, np.linspace(values.min(), values.max(), BINS + 1)[1:-1])

    return np.array([mutual_info_score(classes, binned(values)) for values in np.asarray(means, np.float64).T])


def mutual_information_gap(means: Float[np.ndarray, "n L"], classes: Sequence[str]) -> float:
    """Returns the MIG of one factor (Chen et al. 2018).

    It is the mutual information of the factor with the most informative dimension, minus that with the second, divided
    by the factor's entropy. NaN if the factor has one class or the latent has one dimension.
    """
    share = np.unique(np.asarray(classes), return_counts=True)[1] / len(classes)
    if len(share) < 2 or means.shape[1] < 2:
        return math.nan
    second, first = np.sort(information_with_dimensions(means, classes))[-2:]
    return float((first - second) / -(share * np.log(share)).sum())


def importances(probes: Sequence[Probe]) -> Float[np.ndarray, "L J"]:
    """Returns the importance of each dimension for each factor: the norm of the probe's weights over the classes."""
    return np.stack([np.linalg.norm(probe.weights, axis=1) for probe in probes], axis=1)


def disentanglement(importance: Float[np.ndarray, "L J"]) -> float:
    """Returns DCI disentanglement (Eastwood & Williams 2018).

    1 if every dimension is important for one factor only, 0 if each is equally important for all factors.
    Dimensions are weighted by their share of the total importance. NaN for fewer than two factors.
    """
    if importance.shape[1] < 2 or not importance.sum():
        return math.nan
    return float(_concentration(importance) @ importance.sum(1) / importance.sum())


def completeness(importance: Float[np.ndarray, "L J"]) -> Float[np.ndarray, " J"]:
    """Returns DCI completeness of each factor (Eastwood & Williams 2018).

    1 if a single dimension is important for the factor, 0 if all are equally important.
    """
    return _concentration(importance.T)


def _concentration(rows: Float[np.ndarray, "a b"]) -> Float[np.ndarray, " a"]:
    """Returns 1 − the entropy of each normalized row, with the row's length as base; 0 for a row of zeros."""
    total = rows.sum(1, keepdims=True)
    p = np.divide(rows, total, out=np.full(rows.shape, 1 / rows.shape[1]), where=total > 0)
    entropy = -(p * np.log(np.maximum(p, 1e-300))).sum(1)
    return 1 - entropy / math.log(rows.shape[1]) if rows.shape[1] > 1 else np.full(len(rows), math.nan)
