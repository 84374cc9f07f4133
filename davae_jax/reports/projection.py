"""Projects latents to two dimensions for charts."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from jaxtyping import Bool, Float, Int


def pca(means: Float[np.ndarray, "n L"]) -> tuple[Float[np.ndarray, "n 2"], float]:
    """Projects to the two directions of largest variance.

    Returns:
      The points, and the fraction of the variance that they preserve. Each axis is oriented so that the point farthest
      from 0 is positive.
    """
    centred = np.asarray(means, np.float64) - np.mean(means, axis=0)
    _, scales, directions = np.linalg.svd(centred, full_matrices=False)
    flat = centred @ directions[:2].T
    flat = np.pad(flat, ((0, 0), (0, 2 - flat.shape[1])))  # one text, or a latent of one dimension
    total = (scales**2).sum()
    up = np.where(np.abs(flat.max(0)) < np.abs(flat.min(0)), -1, 1)
    return flat * up, float((scales[:2] ** 2).sum() / total) if total else 0.0


def discriminant(
    means: Float[np.ndarray, "n L"], classes: Sequence[str], others: Float[np.ndarray, "m L"]
) -> Float[np.ndarray, "m 2"]:
    """Projects other latents to the plane that best separates the classes of `means` (Fisher 1936).

    The unit is the standard deviation within the classes. With many dimensions and few texts, some plane separates
    any classes, so the projected texts must not be those that the plane was fitted to.
    """
    means = np.asarray(means, np.float64)
    y = np.unique(np.asarray(classes), return_inverse=True)[1]
    centres = np.stack([means[y == c].mean(0) for c in range(y.max() + 1)])
    within = means - centres[y]
    spread = within.T @ within / len(means)
    spread += 1e-3 * max(np.trace(spread) / len(spread), 1e-9) * np.eye(len(spread))
    whiten = np.linalg.inv(np.linalg.cholesky(spread)).T
    directions = np.linalg.svd((centres[y] - means.mean(0)) @ whiten, full_matrices=False)[2][:2]
    flat = (others - means.mean(0)) @ whiten @ directions.T
    return np.pad(flat, ((0, 0), (0, 2 - flat.shape[1])))


def first_halves(classes: Sequence[str]) -> Bool[np.ndarray, " n"]:
    """Selects half of the texts of each class at random, rounding up. Returns a mask of the selected texts."""
    rng, classes = np.random.default_rng(0), np.asarray(classes)
    first = np.zeros(len(classes), bool)
    for name in np.unique(classes):
        rows = rng.permutation(np.flatnonzero(classes == name))
        first[rows[: (len(rows) + 1) // 2]] = True
    return first


def subsample(rows: Int[np.ndarray, " n"], limit: int) -> Int[np.ndarray, " m"]:
    """Returns at most `limit` rows in order, sampled without replacement if there are more."""
    if len(rows) <= limit:
        return rows
    return np.sort(np.random.default_rng(0).choice(rows, limit, replace=False))


def umap(means: Float[np.ndarray, "n L"]) -> Float[np.ndarray, "n 2"] | None:
    """Projects by UMAP (McInnes et al. 2018). None if umap-learn is not installed or there are fewer than 20 texts."""
    if len(means) < 20:
        return None
    try:  # imports the class, because any folder named umap on the search path can be imported as a module
        from umap import UMAP
    except ImportError:
        return None
    return np.asarray(UMAP(random_state=0, n_jobs=1).fit_transform(means), np.float64)
