"""How factors of the texts can be read off their latents: a linear probe, the mutual information gap, DCI."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Float, Int
from scipy.optimize import minimize
from scipy.special import log_softmax

FOLDS, PENALTY, BINS = 5, 1e-3, 20


class Probe(NamedTuple):
    hits: Bool[np.ndarray, " n"]  # whether each text's class was read right, by a probe that had not seen the text
    majority: float  # the part that the most frequent class has: what reading nothing would get
    weights: Float[np.ndarray, "L C"]  # of a probe of all texts, on dimensions of variance 1


def linear_probe(means: Float[np.ndarray, "n L"], classes: Sequence[str], seed: int = 0) -> Probe:
    """Multinomial logistic regression from the posterior means to a factor, in five folds (Alain & Bengio 2017)."""
    names, y = np.unique(np.asarray(classes), return_inverse=True)
    x = standardised(means)
    fold = np.random.default_rng(seed % 2**32).permutation(len(x)) % FOLDS
    hits = np.zeros(len(x), bool)
    for k in range(FOLDS):
        if (fold == k).any() and (fold != k).any():
            weights, bias = fit_logistic(x[fold != k], y[fold != k], len(names))
            hits[fold == k] = (x[fold == k] @ weights + bias).argmax(1) == y[fold == k]
    return Probe(hits, np.bincount(y).max() / len(y), fit_logistic(x, y, len(names))[0])


def standardised(means: Float[np.ndarray, "n L"]) -> Float[np.ndarray, "n L"]:
    """Each dimension with mean 0 and variance 1; one that hardly varies stays near 0: no probe is to live of noise."""
    means = np.asarray(means, np.float64)
    return (means - means.mean(0)) / np.maximum(means.std(0), 1e-2)


def fit_logistic(x: Float[np.ndarray, "n L"], y: Int[np.ndarray, " n"], classes: int):
    """(weights [L, C], bias [C]) that minimise the mean cross-entropy + ½ · 0.001 · |weights|²."""
    L, one_hot = x.shape[1], np.eye(classes)[y]

    def loss(flat):
        weights, bias = flat[: L * classes].reshape(L, classes), flat[L * classes :]
        log_p = log_softmax(x @ weights + bias, axis=1)
        error = (np.exp(log_p) - one_hot) / len(x)
        value = -(one_hot * log_p).sum() / len(x) + 0.5 * PENALTY * (weights**2).sum()
        return value, np.concatenate([(x.T @ error + PENALTY * weights).ravel(), error.sum(0)])

    found = minimize(loss, np.zeros((L + 1) * classes), jac=True, method="L-BFGS-B", options={"maxiter": 200}).x
    return found[: L * classes].reshape(L, classes), found[L * classes :]


def information_with_dimensions(means: Float[np.ndarray, "n L"], classes: Sequence[str]) -> Float[np.ndarray, "L"]:
    """I(factor; dimension) of each dimension in nats, its posterior means in 20 bins of equal width.

    As Locatello et al. (2019) estimate it. With few texts it is too high, by about (C − 1) · 19 / 2n.
    """
    y = np.unique(np.asarray(classes), return_inverse=True)[1]
    found = []
    for values in np.asarray(means, np.float64).T:
        edges = np.linspace(values.min(), values.max(), BINS + 1)[1:-1]
        joint = np.zeros((BINS, y.max() + 1))
        np.add.at(joint, (np.digitize(values, edges), y), 1 / len(y))
        apart = joint.sum(1, keepdims=True) * joint.sum(0)
        seen = joint > 0
        found.append((joint[seen] * np.log(joint[seen] / apart[seen])).sum())
    return np.array(found)


def mutual_information_gap(means: Float[np.ndarray, "n L"], classes: Sequence[str]) -> float:
    """MIG of one factor (Chen et al. 2018): how much more the best dimension says of it than the second best, as a
    part of the factor's entropy. NaN for a factor of one class, or a latent of one dimension."""
    share = np.unique(np.asarray(classes), return_counts=True)[1] / len(classes)
    if len(share) < 2 or means.shape[1] < 2:
        return math.nan
    second, first = np.sort(information_with_dimensions(means, classes))[-2:]
    return float((first - second) / -(share * np.log(share)).sum())


def importances(probes: Sequence[Probe]) -> Float[np.ndarray, "L J"]:
    """How much each factor's probe leans on each dimension: the norm of its weights over the classes."""
    return np.stack([np.linalg.norm(probe.weights, axis=1) for probe in probes], axis=1)


def disentanglement(importance: Float[np.ndarray, "L J"]) -> float:
    """1 where every dimension serves one factor, 0 where each serves all alike (Eastwood & Williams 2018).

    Dimensions weigh by their part of all importance. NaN for fewer than two factors.
    """
    if importance.shape[1] < 2 or not importance.sum():
        return math.nan
    return float(_concentration(importance) @ importance.sum(1) / importance.sum())


def completeness(importance: Float[np.ndarray, "L J"]) -> Float[np.ndarray, " J"]:
    """Of each factor: 1 where one dimension holds it, 0 where all do alike (Eastwood & Williams 2018)."""
    return _concentration(importance.T)


def _concentration(rows: Float[np.ndarray, "a b"]) -> Float[np.ndarray, " a"]:
    """1 − the entropy of each row, to the base of its length. Of a row of zeros, 0."""
    total = rows.sum(1, keepdims=True)
    p = np.divide(rows, total, out=np.full(rows.shape, 1 / rows.shape[1]), where=total > 0)
    entropy = -(p * np.log(np.maximum(p, 1e-300))).sum(1)
    return 1 - entropy / math.log(rows.shape[1]) if rows.shape[1] > 1 else np.full(len(rows), math.nan)
