"""Latents in two dimensions, to look at."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from jaxtyping import Bool, Float, Int


def pca(means: Float[np.ndarray, "n L"]) -> tuple[Float[np.ndarray, "n 2"], float]:
    """(the two directions of largest variance, their part of all variance). The larger side points up and right."""
    centred = np.asarray(means, np.float64) - np.mean(means, axis=0)
    _, scales, directions = np.linalg.svd(centred, full_matrices=False)
    flat = centred @ directions[:2].T
    flat = np.pad(flat, ((0, 0), (0, 2 - flat.shape[1])))  # of a latent of one dimension, or one text
    total = (scales**2).sum()
    up = np.where(np.abs(flat.max(0)) < np.abs(flat.min(0)), -1, 1)
    return flat * up, float((scales[:2] ** 2).sum() / total) if total else 0.0


def discriminant(
    means: Float[np.ndarray, "n L"], classes: Sequence[str], shown: Float[np.ndarray, "m L"]
) -> Float[np.ndarray, "m 2"]:
    """`shown` in the plane where the classes of `means` lie furthest apart, in units of their spread (Fisher 1936).

    Of many dimensions and few texts some plane parts any classes, so what is shown should be other texts.
    """
    means = np.asarray(means, np.float64)
    y = np.unique(np.asarray(classes), return_inverse=True)[1]
    centres = np.stack([means[y == c].mean(0) for c in range(y.max() + 1)])
    within = means - centres[y]
    spread = within.T @ within / len(means)
    spread += 1e-3 * max(np.trace(spread) / len(spread), 1e-9) * np.eye(len(spread))
    whiten = np.linalg.inv(np.linalg.cholesky(spread)).T
    directions = np.linalg.svd((centres[y] - means.mean(0)) @ whiten, full_matrices=False)[2][:2]
    flat = (shown - means.mean(0)) @ whiten @ directions.T
    return np.pad(flat, ((0, 0), (0, 2 - flat.shape[1])))


def first_halves(classes: Sequence[str], seed: int = 0) -> Bool[np.ndarray, " n"]:
    """Which texts are of the first half: of each class a half, drawn; of an odd number, one more."""
    rng, named = np.random.default_rng(seed), np.asarray(classes)
    first = np.zeros(len(named), bool)
    for name in np.unique(named):
        rows = rng.permutation(np.flatnonzero(named == name))
        first[rows[: (len(rows) + 1) // 2]] = True
    return first


def subsample(rows: Int[np.ndarray, " n"], most: int, seed: int = 0) -> Int[np.ndarray, " m"]:
    """The rows, in their order; where they are more than `most`, so many of them, drawn."""
    if len(rows) <= most:
        return rows
    return np.sort(np.random.default_rng(seed).choice(rows, most, replace=False))


def umap(means: Float[np.ndarray, "n L"]) -> Float[np.ndarray, "n 2"] | None:
    """By UMAP (McInnes et al. 2018), where the package umap-learn is installed and the texts are enough for it."""
    if len(means) < 20:
        return None
    try:  # not whether there is a `umap`: any folder of that name would be one
        from umap import UMAP
    except ImportError:
        return None
    return np.asarray(UMAP(random_state=0, n_jobs=1).fit_transform(means), np.float64)
