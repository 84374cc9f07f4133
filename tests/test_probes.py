"""Probes, mutual information gap and DCI on latents with known factors; bootstrap intervals; projections."""

import math

import numpy as np
import pytest

from davae_jax.evaluation import bootstrap, probes
from davae_jax.reports import projection

N = 600


@pytest.fixture
def rng():
    return np.random.default_rng(0)


def test_linear_probe_of_separable_classes(rng):
    kinds = rng.integers(0, 4, N)
    means = rng.standard_normal((N, 6))
    corners = np.array([[4, 4], [4, -4], [-4, 4], [-4, -4]])
    means[:, :2] += corners[kinds]
    probe = probes.linear_probe(means, [f"kind {k}" for k in kinds])
    # An error requires a coordinate four standard deviations from its centre.
    assert probe.hits.mean() > 0.995
    assert probe.majority == np.bincount(kinds).max() / N
    norms = np.linalg.norm(probe.weights, axis=1)
    assert norms[:2].min() > 5 * norms[2:].max()


def test_linear_probe_of_noise_has_chance_accuracy(rng):
    """With this many dimensions, a probe scored on its training texts would seem accurate."""
    kinds = rng.integers(0, 2, 200).astype(str)
    probe = probes.linear_probe(rng.standard_normal((200, 100)), kinds)
    assert abs(probe.hits.mean() - 0.5) < 4 * 0.5 / math.sqrt(200)


@pytest.mark.parametrize("classes", [2, 3])
def test_fit_logistic_minimizes_the_loss(rng, classes):
    """The gradient of the mean cross-entropy + ½ · 0.001 · |weights|² is zero."""
    x, y = rng.standard_normal((50, 3)), rng.integers(0, classes, 50)
    fitted = probes.fit_logistic(x, y)
    p, weights = fitted.predict_proba(x), probes.softmax_weights(fitted)
    error = (p - np.eye(classes)[y]) / 50
    np.testing.assert_allclose(x.T @ error + probes.PENALTY * weights, 0, atol=1e-5)
    np.testing.assert_allclose(error.sum(0), 0, atol=1e-5)
    logits = x @ weights
    np.testing.assert_allclose(np.diff(logits - np.log(p)), np.diff(logits - np.log(p))[:1].repeat(50, 0), atol=1e-6)


def test_linear_probe_if_a_fold_has_one_class(rng):
    """Two texts of two classes: each fold is fitted to one text, whose class it predicts."""
    probe = probes.linear_probe(rng.standard_normal((2, 3)), ["a", "b"])
    assert not probe.hits.any()


def test_information_with_a_dimension():
    """A binary dimension that agrees with three quarters of each of two classes."""
    classes = np.repeat(["a", "b"], 400)
    right = np.tile([True, True, True, False], 200)
    means = np.where(right == (classes == "a"), 1.0, -1.0)[:, None]
    expected = math.log(2) + 0.75 * math.log(0.75) + 0.25 * math.log(0.25)
    assert probes.information_with_dimensions(means, classes)[0] == pytest.approx(expected)


def test_mutual_information_gap():
    classes = np.tile(["a", "b", "c"], 200)
    value = np.tile([-1.0, 0.0, 1.0], 200)
    steady = np.zeros(600)
    assert probes.mutual_information_gap(np.stack([value, steady], 1), classes) == pytest.approx(1)
    assert probes.mutual_information_gap(np.stack([value, -value], 1), classes) == pytest.approx(0, abs=1e-9)
    # The second dimension separates one of three classes.
    both = np.stack([value, np.where(value > 0, 1.0, 0.0)], 1)
    second = math.log(3) - 2 / 3 * math.log(2)
    assert probes.mutual_information_gap(both, classes) == pytest.approx(1 - second / math.log(3))
    assert math.isnan(probes.mutual_information_gap(both, np.repeat("a", 600)))


def test_dci_extremes():
    assert probes.disentanglement(np.eye(3)) == pytest.approx(1)
    np.testing.assert_allclose(probes.completeness(np.eye(3)), 1)
    assert probes.disentanglement(np.ones((4, 3))) == pytest.approx(0)
    np.testing.assert_allclose(probes.completeness(np.ones((4, 3))), 0, atol=1e-12)
    assert math.isnan(probes.disentanglement(np.ones((4, 1))))


def test_dci_by_hand():
    """One dimension serves only the first factor and has half of the importance; the other serves both equally."""
    importance = np.array([[2.0, 0.0], [1.0, 1.0]])
    assert probes.disentanglement(importance) == pytest.approx(0.5 * 1 + 0.5 * 0)
    first = -(2 / 3 * math.log2(2 / 3) + 1 / 3 * math.log2(1 / 3))
    np.testing.assert_allclose(probes.completeness(importance), [1 - first, 1])


def test_dci_of_aligned_dimensions(rng):
    factors = rng.integers(0, 2, (N, 3))
    means = 6.0 * factors + rng.standard_normal((N, 3))
    aligned = [probes.linear_probe(means, factors[:, j].astype(str)) for j in range(3)]
    importance = probes.importances(aligned)
    rotated = [
        probes.linear_probe(means @ np.linalg.qr(rng.standard_normal((3, 3)))[0], factors[:, j].astype(str))
        for j in range(3)
    ]
    assert probes.disentanglement(importance) > 0.6 > probes.disentanglement(probes.importances(rotated)) + 0.2
    # A rotation of the latent does not change the probe accuracy.
    assert all(probe.hits.mean() > 0.99 for probe in [*aligned, *rotated])


# Bootstrap intervals.


def test_mean_interval(rng):
    values = 3 + 2 * rng.standard_normal(400)
    low, high = bootstrap.ratio_interval(values)
    half = 1.96 * values.std() / 20
    assert (low, high) == pytest.approx((values.mean() - half, values.mean() + half), abs=0.12 * half)


def test_ratio_interval_has_nominal_coverage(rng):
    covered = 0
    for _ in range(200):
        below = rng.integers(5, 20, 80)
        low, high = bootstrap.ratio_interval(1.5 * below + rng.standard_normal(80) * 4, below)
        covered += low <= 1.5 <= high
    assert 0.88 <= covered / 200 <= 0.99  # 95 % within four standard errors


def test_resamples_have_the_original_size():
    actual = bootstrap.resampled_sums(np.stack([np.ones(50), np.arange(50)], axis=1), seed=3)
    assert actual.shape == (1000, 2)
    np.testing.assert_allclose(actual[:, 0], 50)
    assert len(set(actual[:, 1])) > 100
    np.testing.assert_array_equal(
        actual, bootstrap.resampled_sums(np.stack([np.ones(50), np.arange(50)], axis=1), seed=3)
    )


@pytest.mark.parametrize("seed", [-1, 2**32 + 5, 2**70])
def test_seeds_are_taken_modulo_two_to_the_32(rng, seed):
    """The model's random keys use the same convention."""
    values = rng.standard_normal((30, 2))
    np.testing.assert_array_equal(
        bootstrap.resampled_sums(values, seed), bootstrap.resampled_sums(values, seed % 2**32)
    )
    kinds = rng.integers(0, 2, 30).astype(str)
    hits = [probes.linear_probe(values, kinds, s).hits for s in (seed, seed % 2**32)]
    np.testing.assert_array_equal(*hits)


def test_proportion_interval():
    """Wilson: (p + z²/2n ± z √(p(1 − p)/n + z²/4n²)) / (1 + z²/n), which has positive width at 0 and 1."""
    n, z = 50, 1.959964
    for hits in (0, 20, 50):
        p = hits / n
        middle, half = p + z**2 / (2 * n), z * math.sqrt(p * (1 - p) / n + z**2 / (4 * n**2))
        expected = [(middle + sign * half) / (1 + z**2 / n) for sign in (-1, 1)]
        assert bootstrap.proportion_interval(np.arange(n) < hits) == pytest.approx(expected, abs=1e-6)
    assert bootstrap.proportion_interval(np.zeros(50, bool)) == pytest.approx((0, 0.0713), abs=1e-4)


@pytest.mark.parametrize("n", [7, 8])
def test_median_interval(rng, n):
    """Compares with the medians of the explicit resamples."""
    values = rng.standard_normal(n)
    counts = np.concatenate(list(bootstrap.resample_counts(n, seed=4)))
    medians = [np.median(np.repeat(values, row)) for row in counts]
    assert bootstrap.median_interval(values, seed=4) == pytest.approx(bootstrap.interval(np.array(medians)))


def test_column_intervals(rng):
    values = rng.standard_normal((60, 3))
    expected = [bootstrap.ratio_interval(column, seed=2) for column in values.T]
    np.testing.assert_allclose(bootstrap.column_intervals(values, seed=2), expected)


def test_active_units_interval(rng):
    means = rng.standard_normal((500, 3)) * [1.0, 0.1, 0.0]  # the second variance equals the threshold
    low, high = bootstrap.active_units_interval(means, 0.01)
    assert (low, high) == (1, 2)


# Projections.


def test_pca(rng):
    rotation = np.linalg.qr(rng.standard_normal((5, 5)))[0]
    means = (rng.standard_normal((4000, 5)) * [3, 2, 1, 1, 1]) @ rotation + 7
    flat, explained = projection.pca(means)
    np.testing.assert_allclose(flat.std(0), [3, 2], rtol=0.05)
    assert explained == pytest.approx(13 / 16, abs=0.02)
    np.testing.assert_allclose(
        np.abs(flat.T @ (means - means.mean(0)) @ rotation.T / 4000)[[0, 1], [0, 1]], [9, 4], rtol=0.1
    )
    # A one-dimensional latent, and a single text.
    assert projection.pca(np.ones((3, 1)))[0].tolist() == [[0, 0]] * 3
    assert projection.pca(np.ones((1, 4)))[0].tolist() == [[0, 0]]


def test_discriminant(rng):
    """Two classes differ by two standard deviations along a direction of small variance; so do their projections."""
    classes = np.tile(["a", "b"], 1000)
    means = rng.standard_normal((2000, 4)) * [5, 5, 5, 0.5]
    means[classes == "a", 3] += 1.0
    flat = projection.discriminant(means[::3], classes[::3], means[1::3])
    gap = flat[classes[1::3] == "a", 0].mean() - flat[classes[1::3] == "b", 0].mean()
    assert abs(gap) == pytest.approx(2, abs=0.3)
    # A plane fitted to noise does not separate other texts.
    noise, kinds = rng.standard_normal((200, 90)), np.tile(["a", "b"], 100)
    flat = projection.discriminant(noise[:100], kinds[:100], noise[100:])
    gap = flat[kinds[100:] == "a", 0].mean() - flat[kinds[100:] == "b", 0].mean()
    assert abs(gap) < 4 * flat[:, 0].std() * math.sqrt(2 / 50)


def test_first_halves_are_stratified(rng):
    """Each class is split evenly at random, even if the classes alternate."""
    classes = np.array(["a", "b"] * 50 + ["c"] * 7 + ["d"])
    first = projection.first_halves(classes)
    for name, count in (("a", 25), ("b", 25), ("c", 4), ("d", 1)):
        assert first[classes == name].sum() == count
    assert 0 < first[:100:2].sum() - first[:50:2].sum() < 25  # a random half, not the first one
    np.testing.assert_array_equal(first, projection.first_halves(classes))


def test_subsample():
    rows = np.arange(10, 5010)
    np.testing.assert_array_equal(projection.subsample(rows[:2000], 2000), rows[:2000])
    actual = projection.subsample(rows, 2000)
    assert len(set(actual)) == 2000 and (np.diff(actual) > 0).all() and set(actual) <= set(rows)
    # The sample is uniform: half of it is from the first half, within five standard errors.
    assert abs((actual < 2510).mean() - 0.5) < 5 * math.sqrt(0.25 / 2000)
