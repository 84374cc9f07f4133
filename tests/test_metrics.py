"""Metrics against results in closed form or by enumeration."""

import dataclasses
import itertools
import math
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.stats import multivariate_normal
from small_model import CONFIG, new_model

from davae_jax.evaluation import metrics
from davae_jax.evaluation.caveats import MAX_MI_GAP
from davae_jax.model.latent import Posterior
from davae_jax.parallel.config import MeshConfig
from davae_jax.parallel.sharding import make_mesh

KEY = jax.random.key(0)


def test_active_units():
    rng = np.random.default_rng(0)
    means = rng.standard_normal((5000, 4)) * [1.0, 0.2, 0.05, 0.0]  # variances 1, 0.04, 0.0025, 0
    assert metrics.active_units(means) == 2
    assert metrics.active_units(means, threshold=0.001) == 3


def test_mutual_information_of_separate_posteriors_is_the_ceiling():
    n = 200
    means = 100.0 * np.arange(n)[:, None] * np.ones((1, 3))
    actual = metrics.mutual_information(means, np.zeros((n, 3)), KEY)
    assert actual == pytest.approx(math.log(n), abs=1e-4) == metrics.mutual_information_ceiling(n)


def test_mutual_information_of_a_collapsed_posterior_is_zero():
    assert metrics.mutual_information(np.ones((300, 5)), np.zeros((300, 5)), KEY) == pytest.approx(0, abs=1e-4)


def test_mutual_information_of_a_mixture():
    """Two groups of texts at ±m with unit noise, against quadrature."""
    n, m = 4000, 1.3
    means = np.where(np.arange(n) % 2, m, -m)[:, None]
    z = np.linspace(-12, 12, 200_001)
    density = lambda z, mean: np.exp(-0.5 * (z - mean) ** 2) / math.sqrt(2 * math.pi)  # noqa: E731
    mixture = 0.5 * (density(z, m) + density(z, -m))
    expected = np.trapezoid(density(z, m) * np.log(density(z, m) / mixture), z)
    actual = metrics.mutual_information(means, np.zeros((n, 1)), KEY)
    assert actual == pytest.approx(expected, abs=5 * 0.5 / math.sqrt(n))


@pytest.mark.parametrize(
    ("n", "true", "min_bias"),
    [(1000, 6.9, 0.95), (1000, 5.0, 0.3), (500, 4.0, 0.15), (1000, 2.0, -0.1), (1000, 1.0, -0.1)],
)
def test_few_texts_bias_the_mutual_information(n, true, min_bias):
    """If q(z) is exactly the prior, estimates that deviate by more than chance give a warning.

    In 32 dimensions, the means have variance 1 − s² and the posteriors variance s², so that the mutual information is
    −32 log s and the aggregate KL is 0.
    """
    rng, variance = np.random.default_rng(0), math.exp(-2 * true / 32)
    means = rng.standard_normal((n, 32)) * math.sqrt(1 - variance)
    logvars = np.full((n, 32), math.log(variance))
    densities = metrics.log_densities(means, logvars, KEY)
    information = np.asarray(densities.information)
    estimate, error = (float(x) for x in (information.mean(), information.std() / math.sqrt(n)))
    assert true - estimate > min_bias
    half_data_gap = (
        metrics.aggregate_density_by_halves(densities, means, logvars) - np.asarray(densities.aggregate)
    ).mean()
    has_warning = estimate > 0.5 * math.log(n) or half_data_gap > MAX_MI_GAP
    assert has_warning == (min_bias > 0)
    assert has_warning or abs(true - estimate) < 3 * error + MAX_MI_GAP
    difference = np.asarray(densities.posterior - densities.prior)
    tolerance = float(5 * difference.std() / math.sqrt(n))
    assert np.asarray(densities.from_prior).mean() == pytest.approx(true - estimate, abs=tolerance)
    assert half_data_gap < max(true - estimate, MAX_MI_GAP)  # the half-data gap does not bound the bias


def test_aggregate_density_by_halves():
    """Compares both halves with explicit sums over their posteriors."""
    rng = np.random.default_rng(0)
    means, logvars = rng.standard_normal((7, 2)), rng.standard_normal((7, 2))
    densities = metrics.log_densities(means, logvars, KEY)
    actual = metrics.aggregate_density_by_halves(densities, means, logvars, seed=3)
    rows = np.random.default_rng(3).permutation(7)
    for half in (rows[:4], rows[4:]):
        for i in half:
            densities_in_half = [multivariate_normal.pdf(densities.z[i], means[j], np.exp(logvars[j])) for j in half]
            assert actual[i] == pytest.approx(math.log(np.mean(densities_in_half)), abs=1e-4)
    assert np.isnan(metrics.aggregate_density_by_halves(densities, means[:1], logvars[:1])).all()


def test_log_densities_are_sharded():
    """On eight devices, the values are the same, and each device does an eighth of the work."""
    rng = np.random.default_rng(0)
    posteriors = tuple(rng.standard_normal((2, 64, 5)).astype(np.float32))
    rows = jax.sharding.NamedSharding(make_mesh(MeshConfig(), 8), jax.sharding.PartitionSpec("data"))
    shard = partial(jax.device_put, device=rows)
    single, sharded = (metrics.log_densities(*arrays, KEY) for arrays in (posteriors, shard(posteriors)))
    for a, b in zip(single, sharded, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5)
    halves = [
        metrics.aggregate_density_by_halves(single, *posteriors),
        metrics.aggregate_density_by_halves(sharded, *posteriors, shard=shard),
    ]
    np.testing.assert_allclose(*halves, rtol=1e-5)
    flops = [
        metrics._compute_densities.lower(np.asarray(single.z), *arrays).compile().cost_analysis()["flops"]
        for arrays in (posteriors, shard(posteriors))
    ]
    assert flops[1] < 0.2 * flops[0]


def normal_density(z, mean, variance=1.0):
    return np.exp(-0.5 * (z - mean) ** 2 / variance) / np.sqrt(2 * np.pi * variance)


def test_aggregate_kl_of_a_mixture():
    """The same two groups: KL(½N(m, s²) + ½N(−m, s²) ‖ N(0, 1)) by quadrature."""
    n, m, variance = 4000, 1.3, 0.3
    means = np.where(np.arange(n) % 2, m, -m)[:, None]
    z = np.linspace(-12, 12, 200_001)
    q = 0.5 * (normal_density(z, m, variance) + normal_density(z, -m, variance))
    log_ratio = np.log(q + 1e-300) - np.log(normal_density(z, 0))
    expected = np.trapezoid(q * log_ratio, z)
    spread = np.sqrt(np.trapezoid(q * (log_ratio - expected) ** 2, z))
    logvars = np.full((n, 1), np.log(variance))
    assert expected > 0.4
    assert metrics.aggregate_kl(means, logvars, KEY) == pytest.approx(expected, abs=5 * spread / math.sqrt(n))
    # The mean KL of the posteriors is the sum of the aggregate KL and the mutual information.
    densities = metrics.log_densities(means, logvars, KEY)
    mean_kl = np.asarray(densities.posterior - densities.prior).mean()
    kl = 0.5 * (m**2 + variance - np.log(variance) - 1)
    assert mean_kl == pytest.approx(kl, abs=0.1)
    actual = metrics.aggregate_kl(means, logvars, KEY) + metrics.mutual_information(means, logvars, KEY)
    assert actual == pytest.approx(mean_kl, abs=1e-4)


def test_aggregate_kl_of_the_prior_is_zero():
    assert metrics.aggregate_kl(np.zeros((300, 5)), np.zeros((300, 5)), KEY) == pytest.approx(0, abs=1e-4)


@pytest.mark.parametrize(("mean", "std"), [(0.0, 1.0), (0.7, 0.6), (0.0, 0.1), (0.0, 2.0)])
def test_mmd_of_a_gaussian_to_the_prior(mean, std):
    """For z ~ N(m, s² I), the kernel's expectations are Gaussian integrals: (h²/(h² + v))^(L/2) exp(−d²/2(h² + v))."""
    L, n, draws = 6, 300, 60
    rng = np.random.default_rng(0)
    between = lambda variance, square: (L / (L + variance)) ** (L / 2) * np.exp(-square / (2 * (L + variance)))  # noqa: E731
    expected = between(2 * std**2, 0) - 2 * between(1 + std**2, L * mean**2) + between(2, 0)
    actual = [metrics.mmd_to_prior(mean + std * rng.standard_normal((n, L))) for _ in range(draws)]
    assert np.mean(actual) == pytest.approx(expected, abs=4 * np.std(actual) / math.sqrt(draws))
    assert (expected < 1e-12) == ((mean, std) == (0.0, 1.0))


# A model with a known likelihood: x = Wz + b + σ·noise.


def linear_gaussian(L, seed=0, noise=0.7):
    """Returns log p(x|z) as a function of z, log p(x), and the mean and covariance of the posterior."""
    rng = np.random.default_rng(seed)
    W, b, x = rng.standard_normal((5, L)), rng.standard_normal(5), rng.standard_normal((3, 5))
    log_p_x = multivariate_normal.logpdf(x, b, W @ W.T + noise**2 * np.eye(5))
    covariance = np.linalg.inv(np.eye(L) + W.T @ W / noise**2)
    mean = (x - b) @ W @ covariance / noise**2

    def log_likelihood(z):
        return metrics.log_density(jnp.asarray(x), z @ W.T + b, jnp.full(5, 2 * math.log(noise)))

    return log_likelihood, log_p_x, mean, covariance


def test_one_sample_of_the_exact_posterior_gives_the_exact_likelihood():
    log_likelihood, log_p_x, mean, covariance = linear_gaussian(L=1)
    posterior = Posterior(jnp.asarray(mean), jnp.full((3, 1), math.log(covariance[0, 0])))
    log_p, log_ratio = metrics.importance_samples(posterior, log_likelihood, jax.random.split(KEY, 3), 4)
    np.testing.assert_allclose(log_p + log_ratio, np.tile(log_p_x, (4, 1)), atol=1e-4)
    np.testing.assert_allclose(metrics.log_mean_weight((log_p + log_ratio)[:1]), log_p_x, atol=1e-4)
    np.testing.assert_allclose(metrics.effective_sample_size(log_p + log_ratio), 4, atol=1e-3)


def test_the_likelihood_of_a_linear_gaussian_model():
    """The approximate posterior is shifted, too wide and diagonal."""
    log_likelihood, log_p_x, mean, covariance = linear_gaussian(L=3)
    variance = 2 * np.diag(covariance)
    posterior = Posterior(jnp.asarray(mean + 0.3 * np.sqrt(variance)), jnp.tile(jnp.log(variance), (3, 1)))
    log_p, log_ratio = metrics.importance_samples(posterior, log_likelihood, jax.random.split(KEY, 3), 20_000)
    log_weights = log_p + log_ratio
    effective = np.asarray(metrics.effective_sample_size(log_weights))
    assert (effective < 15_000).all() and (effective > 500).all()
    actual = metrics.log_mean_weight(log_weights)
    assert (np.abs(actual - log_p_x) < 5 / np.sqrt(effective)).all()
    # The mean log weight is the ELBO: the log-likelihood minus KL(q ‖ true posterior).
    q_mean, precision = np.asarray(posterior.mean) - mean, np.linalg.inv(covariance)
    quadratic = np.einsum("bi,ij,bj->b", q_mean, precision, q_mean)
    log_volumes = np.linalg.slogdet(covariance)[1] - np.log(variance).sum()
    gap = 0.5 * (np.trace(precision @ np.diag(variance)) + quadratic - 3 + log_volumes)
    spread = np.std(log_weights, axis=0) / math.sqrt(len(log_weights))
    assert (np.abs(log_weights.mean(0) - (log_p_x - gap)) < 5 * spread).all()


def test_effective_sample_size():
    weights = np.array([[1.0, 5.0, 1.0], [1.0, 0.0, 2.0], [1.0, 0.0, 3.0]])
    actual = metrics.effective_sample_size(jnp.log(weights + 1e-30))
    np.testing.assert_allclose(actual, [3, 1, 36 / 14], rtol=1e-5)


# The likelihood of a small model, whose two-dimensional latent is integrated by quadrature.

SMALL = dataclasses.replace(
    CONFIG,
    decoder=dataclasses.replace(CONFIG.decoder, vocab_size=6),
    latent_size=2,
    end_token_id=3,
    pad_token_id=4,
    bos_token_id=5,
)


@pytest.fixture(scope="module")
def model():
    return new_model(SMALL, scale=4.0)


def test_iw_log_likelihood_of_all_short_texts(model):
    """All texts of up to two tokens, against quadrature over the latent; the probabilities sum to at most 1."""
    end, bos = SMALL.end_token_id, SMALL.bos_token_id
    letters = [i for i in range(6) if i != end]
    texts = [text for length in range(3) for text in itertools.product(letters, repeat=length)]
    rows = np.array([[bos, *text, *[end] * (3 - len(text))] for text in texts])
    assert len(rows) == 1 + 5 + 25

    nodes, weights = np.polynomial.hermite_e.hermegauss(24)
    z = np.stack(np.meshgrid(nodes, nodes), axis=-1).reshape(-1, 2).astype(np.float32)
    weights = np.outer(weights, weights).ravel() / (2 * math.pi)
    longest = rows[-25:, :3]  # every shorter text is a prefix of one of these
    logits, _ = model.decode(np.tile(longest, (len(z), 1)), np.repeat(z, 25, axis=0))
    log_p = np.asarray(jax.nn.log_softmax(logits)).reshape(len(z), 25, 3, 6)
    index_of = {tuple(row[1:]): i for i, row in enumerate(longest.tolist())}
    expected = []
    for text in texts:
        i = index_of[text + (letters[0],) * (2 - len(text))]
        log_p_text = sum(log_p[:, i, t, token] for t, token in enumerate((*text, end)))
        expected.append(weights @ np.exp(log_p_text))
    expected = np.array(expected)
    total = expected.sum()
    assert 0.3 < total < 1  # the remaining mass belongs to longer texts
    assert expected.max() > 20 * np.median(expected)

    encoder_ids = np.tile(np.array([[2, 7, 3]]), (len(rows), 1))
    runs = [
        np.exp(metrics.iw_log_likelihood(model, encoder_ids, rows, samples=150, key=key))
        for key in jax.random.split(KEY, 10)
    ]
    actual, error = np.mean(runs, axis=0), np.std(runs, axis=0, ddof=1) / math.sqrt(10)
    assert np.median(error / actual) < 0.1
    # Seven standard errors, because ten runs estimate them only roughly; the rarest texts hardly matter.
    assert (np.abs(actual - expected) < 7 * error + 1e-6).all()
    assert actual.sum() == pytest.approx(total, abs=5 * float(np.sqrt((error**2).sum())))
    assert actual.sum() < 1


def test_iw_log_likelihood_rises_with_samples_and_ignores_padding(model):
    bos, end, pad = SMALL.bos_token_id, SMALL.end_token_id, SMALL.pad_token_id
    encoder_ids = np.array([[2, 9, 3], [2, 4, 3]])
    short, long = np.array([[bos, 1, 2, end]] * 2), np.array([[bos, 1, 2, end, pad, 0]] * 2)
    a = metrics.iw_log_likelihood(model, encoder_ids, short, samples=30, key=KEY)
    b = metrics.iw_log_likelihood(model, encoder_ids, long, samples=30, key=KEY)
    np.testing.assert_allclose(a, b, rtol=1e-5)
    keys = [jax.random.key(seed) for seed in range(20)]
    single_sample, thirty_samples = (
        np.mean([metrics.iw_log_likelihood(model, encoder_ids, short, samples=k, key=key) for key in keys])
        for k in (1, 30)
    )
    assert single_sample < thirty_samples


def test_text_mask():
    targets = jnp.array([[5, 60, 60], [60, 1, 1], [4, 5, 6]])
    assert metrics.text_mask(targets, 60).tolist() == [[True, True, False], [True, False, False], [True, True, True]]
