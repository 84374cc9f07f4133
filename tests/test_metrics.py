"""The measures, against cases whose answer is known in closed form or by enumeration."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from small_model import CONFIG, new_model

from davae_jax import metrics

KEY = jax.random.key(0)


def test_active_units():
    rng = np.random.default_rng(0)
    means = rng.standard_normal((5000, 4)) * [1.0, 0.2, 0.05, 0.0]  # variances 1, 0.04, 0.0025, 0
    assert metrics.active_units(means) == 2
    assert metrics.active_units(means, threshold=0.001) == 3


def test_mutual_information_of_texts_far_apart_is_the_ceiling():
    n = 200
    means = 100.0 * np.arange(n)[:, None] * np.ones((1, 3))
    found = metrics.mutual_information(means, np.zeros((n, 3)), KEY)
    assert found == pytest.approx(math.log(n), abs=1e-4) == metrics.mutual_information_ceiling(n)


def test_mutual_information_of_a_collapsed_posterior_is_zero():
    assert metrics.mutual_information(np.ones((300, 5)), np.zeros((300, 5)), KEY) == pytest.approx(0, abs=1e-4)


def test_mutual_information_of_a_mixture():
    """Texts of two kinds at ±m with unit noise: log 2 less the entropy of guessing the kind, by quadrature."""
    n, m = 4000, 1.3
    means = np.where(np.arange(n) % 2, m, -m)[:, None]
    z = np.linspace(-12, 12, 200_001)
    density = lambda z, mean: np.exp(-0.5 * (z - mean) ** 2) / math.sqrt(2 * math.pi)  # noqa: E731
    mixture = 0.5 * (density(z, m) + density(z, -m))
    expected = np.trapezoid(density(z, m) * np.log(density(z, m) / mixture), z)
    found = metrics.mutual_information(means, np.zeros((n, 1)), KEY)
    assert found == pytest.approx(expected, abs=5 * 0.5 / math.sqrt(n))


@pytest.fixture(scope="module")
def model():
    return new_model(scale=4.0)


def test_iw_log_likelihood_sums_to_one_over_all_texts(model):
    """p(text) summed over every text of at most two tokens, and of all longer ones together."""
    V, end, bos = CONFIG.decoder.vocab_size, CONFIG.end_token_id, CONFIG.bos_token_id
    one = [[bos, a, end, end] for a in range(V) if a != end]
    rows = np.array([[bos, end, end, end], *one])
    encoder_ids = np.tile(np.array([[2, 7, 3]]), (len(rows), 1))
    found = np.exp(metrics.iw_log_likelihood(model, encoder_ids, rows, samples=400, key=KEY))
    z = jax.random.normal(jax.random.key(5), (4000, CONFIG.latent_size))
    first = jax.nn.softmax(model.decode(np.full((4000, 1), bos), z)[0][:, 0])
    assert found[0] == pytest.approx(float(first[:, end].mean()), rel=0.1)
    # p(a, end) = E[p(a|z) p(end|a, z)], another estimate of it, from the prior.
    for a in (1, 30):
        ids = np.full((4000, 2), bos)
        ids[:, 1] = a
        second = jax.nn.softmax(model.decode(ids, z)[0][:, 1])[:, end]
        assert found[1 + a] == pytest.approx(float((first[:, a] * second).mean()), rel=0.15)


def test_iw_log_likelihood_rises_with_samples_and_ignores_padding(model):
    bos, end = CONFIG.bos_token_id, CONFIG.end_token_id
    encoder_ids = np.array([[2, 9, 3], [2, 4, 3]])
    short, long = np.array([[bos, 5, 6, end]] * 2), np.array([[bos, 5, 6, end, 61, 61]] * 2)
    a = metrics.iw_log_likelihood(model, encoder_ids, short, samples=3, key=KEY)
    b = metrics.iw_log_likelihood(model, encoder_ids, long, samples=3, key=KEY)
    np.testing.assert_allclose(a, b, rtol=1e-5)
    keys = [jax.random.key(seed) for seed in range(40)]
    one, many = (
        np.mean([metrics.iw_log_likelihood(model, encoder_ids, short, samples=k, key=key) for key in keys])
        for k in (1, 30)
    )
    assert one < many


def test_text_mask():
    targets = jnp.array([[5, 60, 60], [60, 1, 1], [4, 5, 6]])
    assert metrics.text_mask(targets, 60).tolist() == [[True, True, False], [True, False, False], [True, True, True]]
