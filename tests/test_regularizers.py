"""Regularizers: each against a closed form or NumPy alone, its gradient by differences, masks, meshes, the program."""

import contextlib
import dataclasses
import itertools
import json
import math
import re
import shlex
import sys
from functools import partial
from importlib.metadata import EntryPoint
from pathlib import Path
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import test_train
from orbax.checkpoint import v1 as ocp
from scipy.integrate import quad
from scipy.optimize import linear_sum_assignment
from scipy.special import log_softmax, logsumexp
from scipy.stats import norm
from small_model import new_model
from test_packing import MODEL, texts_of
from test_train import ROOT, TEXTS, TINY, metrics_of

from davae_jax.cli.plan import PlanCommand
from davae_jax.cli.train import parse_train
from davae_jax.data.batches import Batch
from davae_jax.data.packing import PackedBatches
from davae_jax.model.davae import abstract_model, split
from davae_jax.model.latent import Posterior, kl_per_dimension
from davae_jax.model.losses import adversarial_losses
from davae_jax.parallel.config import MeshConfig
from davae_jax.parallel.sharding import make_mesh
from davae_jax.regularizers import (
    MMD,
    REGISTRY,
    TCVAE,
    WGAN,
    BagOfWords,
    Capacity,
    LatentBatch,
    Learned,
    LogVariance,
    RegularizerError,
    RegularizersConfig,
    SIGReg,
    Sizes,
    SlicedWasserstein,
    active,
    batch_normalized,
    normalized_head,
    plugin_digest,
    register,
    regularizer_terms,
    weight_at,
)
from davae_jax.regularizers.decomposition import aggregate_log_density, decomposed_kl
from davae_jax.regularizers.divergences import epps_pulley, random_directions
from davae_jax.regularizers.registry import ENTRY_POINTS
from davae_jax.regularizers.terms import _fold_in_name, init_regularizer_params
from davae_jax.training.config import (
    FreeBitsConfig,
    LaggingConfig,
    NoiseConfig,
    OptimizerConfig,
    PosteriorConfig,
    TrainConfig,
)
from davae_jax.training.objective import StepContext, free_bits_kl, latent_batch
from davae_jax.training.optimizers import make_optimizer
from davae_jax.training.run.checkpointer import Checkpoints, _leaves
from davae_jax.training.run.saved_config import differences, to_dict
from davae_jax.training.state import abstract_state, init_state
from davae_jax.training.step import describe_non_finite, freeze_decoder_update, is_encoder_only_step, make_train_step
from davae_jax.utils.errors import InputError, OptionError

KEY = jax.random.key(5)
L, V = 3, 11
BUILT_IN = {
    name: cls(weight=1.0) for name, cls in REGISTRY.items() if cls.__module__.startswith("davae_jax.regularizers.")
}


@pytest.fixture(autouse=True, scope="module")
def quick_compilation():
    """What is computed here is small; most of the time would go into making it fast."""
    before = jax.config.read("jax_disable_most_optimizations")
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", before)


def batch_of(z, mean=None, logvar=None, prior=None, kept=None, **others):
    """A batch of these arrays; what is not given is drawn."""
    rng, n = np.random.default_rng(7), len(z)
    fill = lambda x, make: make if x is None else x  # noqa: E731
    given = dict(
        mean=fill(mean, rng.normal(size=z.shape)),
        logvar=fill(logvar, rng.normal(size=z.shape) - 1),
        z=z,
        prior=fill(prior, rng.normal(size=z.shape)),
        is_text=fill(kept, np.ones(n, bool)),
        step=3,
        steps=10,
        key=KEY,
        corpus_size=50,
        targets=rng.integers(0, V, (n, 4)),
        text_of_target=np.where(rng.random((n, 4)) < 0.8, np.arange(n)[:, None], -1),
    )
    given |= others
    still = ("steps", "key", "corpus_size")
    return LatentBatch(**{name: x if name in still else jnp.asarray(x) for name, x in given.items()})


def random_z(n=6, seed=0):
    return np.random.default_rng(seed).normal(size=(n, L)) * [0.5, 1.0, 2.0] + [0.3, 0.0, -1.0]


def own_of(regularizer):
    """Its parameters, larger than at the beginning so that everything in it counts."""
    if not isinstance(regularizer, Learned):
        return {}
    rng = np.random.default_rng(9)
    shapes = jax.eval_shape(lambda: regularizer.init(KEY, Sizes(L, V)))
    return jax.tree.map(lambda x: jnp.asarray(0.6 * rng.normal(size=x.shape), x.dtype), shapes)


def compiled(call, batch):
    """(arrays of the batch, others) → call(batch, others) in one program: one is made faster than many small ones."""
    numbers = dict(steps=batch.steps, corpus_size=batch.corpus_size)
    run = jax.jit(lambda batch, *others: call(batch._replace(**numbers), *others))
    return lambda batch, *others: run(batch._replace(steps=None, corpus_size=None), *others)


def value_of(regularizer, batch, params=None):
    """(value, logged) of one regularizer."""
    return compiled(regularizer, batch)(batch, {} if params is None else params)


# ---- distances of latents and prior


@pytest.mark.parametrize("kernel", ["imq", "rbf"])
def test_mmd_is_its_sums(kernel):
    """Pair by pair, in NumPy; the rows without a text hold what would show."""
    z, kept = random_z(), np.array([True, False, True, True, False, True])
    z[~kept] = 40.0
    batch = batch_of(z, kept=kept)
    scales = (0.3, 2.0)

    def k(a, b):
        squared, widths = np.square(a - b).sum(), 2 * L * np.array(scales)
        return (widths / (widths + squared)).sum() if kernel == "imq" else np.exp(-squared / widths).sum()

    x, y = z[kept], np.asarray(batch.prior)[kept]
    m = len(x)
    within = sum(k(a[i], a[j]) for a in (x, y) for i in range(m) for j in range(m) if i != j) / (m * (m - 1))
    expected = within - 2 * sum(k(a, b) for a in x for b in y) / m**2
    found, _ = value_of(MMD(kernel=kernel, scales=scales), batch)
    assert float(found) == pytest.approx(expected, rel=1e-5)


def test_mmd_is_unbiased():
    """Of N(a, s²) and N(0, 1), 20,000 times 4 draws of each: the mean is the closed form, to 4 standard errors."""
    a, s, n = np.array([1.0, 0.0, -0.5]), 0.6, 4
    drawn = jax.random.normal(KEY, (2, 20_000, n, L))
    z, prior = a + s * drawn[0], drawn[1]
    one = batch_of(np.zeros((n, L)))

    def mmd(z, prior):
        return MMD(kernel="rbf", scales=(0.5,))(one._replace(z=z, prior=prior), {})[0]

    found = np.asarray(jax.jit(jax.vmap(mmd))(z.astype(jnp.float32), prior))
    variance = 0.5 * L  # of the kernel exp(−d² / (2·variance))

    def expected(apart, spread):  # E k(x, y), x − y being N(apart, spread)
        return (variance / (variance + spread)) ** (L / 2) * math.exp(-apart / (2 * (variance + spread)))

    mmd2 = expected(0, 2 * s**2) + expected(0, 2) - 2 * expected(a @ a, 1 + s**2)
    error = float(found.std()) / math.sqrt(len(found))
    assert found.mean() == pytest.approx(mmd2, abs=4 * error)
    # What the biased form would add: k(x, x) = 1 on the diagonal, in place of the mean of the others.
    assert (2 - expected(0, 2 * s**2) - expected(0, 2)) / n > 20 * error


def test_mmd_of_one_text_is_refused():
    with pytest.raises(InputError, match="regularizer mmd: compares pairs of texts, but the micro-batch has only"):
        MMD()(batch_of(random_z(1)), {})


def test_sigreg_is_the_closed_form_of_epps_and_pulley():
    """n ∫ |φ_n − φ|² φ dt = √(2π) [1/n ΣΣ exp(−(x_j − x_k)²/2) − √2 Σ exp(−x_j²/4) + n/√3]."""
    kept = np.array([True, True, False, True, True, True])
    z = random_z()
    z[~kept] = 3.0
    batch = batch_of(z, kept=kept)
    x = z[kept]
    n = len(x)
    pairs = np.exp(-np.square(x[:, None] - x) / 2).sum((0, 1)) / n
    expected = np.sqrt(2 * np.pi) * (pairs - np.sqrt(2) * np.exp(-np.square(x) / 4).sum(0) + n / np.sqrt(3))
    along = np.asarray(random_directions(KEY, 5, L))
    np.testing.assert_allclose(np.linalg.norm(along, axis=0), 1, rtol=1e-5)
    several = compiled(lambda batch: [epps_pulley(*x) for x in ((batch.z, batch, 201), (batch.z, batch, 17))], batch)
    fine, published = several(batch)
    np.testing.assert_allclose(fine, expected, rtol=1e-4)
    np.testing.assert_allclose(published, expected, rtol=1e-2)
    # The published rule, as it is written: 17 points from −5 to 5, complex numbers.
    t = np.linspace(-5, 5, 17)
    phi = np.exp(1j * x[..., None] * t).mean(0)
    ruled = n * np.trapezoid(np.abs(phi - np.exp(-(t**2) / 2)) ** 2 * np.exp(-(t**2) / 2), t)
    np.testing.assert_allclose(published, ruled, rtol=1e-4)
    phi = np.exp(1j * (x @ along)[..., None] * t).mean(0)
    ruled = n * np.trapezoid(np.abs(phi - np.exp(-(t**2) / 2)) ** 2 * np.exp(-(t**2) / 2), t)
    assert float(value_of(SIGReg(slices=5), batch)[0]) == pytest.approx(ruled.mean(), rel=1e-4)


@pytest.mark.parametrize("n", [2, 9])
def test_sigreg_of_the_prior_itself(n):
    """Its mean is √(2π) − √(2π/3) whatever n, to 4 standard errors."""
    z = jax.random.normal(KEY, (4000, n, L))
    one = batch_of(np.zeros((n, L)))
    found = np.asarray(jax.jit(jax.vmap(lambda z: SIGReg(slices=4)(one._replace(z=z), {})[0]))(z))
    expected = math.sqrt(2 * math.pi) - math.sqrt(2 * math.pi / 3)
    assert found.mean() == pytest.approx(expected, abs=4 * float(found.std()) / math.sqrt(len(found)))


def test_sliced_wasserstein_is_the_cheapest_assignment():
    """Of each direction, the assignment of latents to draws that costs least, searched for by SciPy."""
    kept = np.array([True, False, True, True, True, False])
    batch = batch_of(random_z(), kept=kept)
    along = np.asarray(random_directions(KEY, 7, L))
    costs = []
    for u in along.T:
        cost = np.square((np.asarray(batch.z)[kept] @ u)[:, None] - np.asarray(batch.prior)[kept] @ u)
        costs.append(cost[linear_sum_assignment(cost)].mean())
    found, _ = value_of(SlicedWasserstein(slices=7), batch)
    assert float(found) == pytest.approx(np.mean(costs), rel=1e-5)


def test_sliced_wasserstein_of_gaussians():
    """W2² of N(m, s²) and N(0, 1) is m² + (s − 1)²; a direction sees m²/L of the mean on average."""
    m, s, n = np.array([1.0, -2.0, 0.5]), 0.5, 4000
    drawn = np.random.default_rng(0).normal(size=(2, n, L))
    found, _ = value_of(SlicedWasserstein(slices=300), batch_of(m + s * drawn[0], prior=drawn[1]))
    assert float(found) == pytest.approx(m @ m / L + (s - 1) ** 2, rel=0.1)


def test_wgan_learns_the_distance():
    """The 1-Wasserstein distance of N(m, 1) and N(0, 1) is |m|; the penalty lets the critic overshoot a little."""
    n, wgan = 64, WGAN(weight=1.0, hidden=8, gradient_penalty=10.0)
    one = batch_of(np.zeros((n, 1)))

    def step(carry, i):
        params, mean, square = carry
        z, prior = jax.random.normal(jax.random.fold_in(KEY, i), (2, n, 1))
        batch = one._replace(z=z + 2.0, prior=prior, key=jax.random.fold_in(KEY, i))
        grad = jax.grad(lambda p: wgan.adversary(batch, p))(params)
        mean = jax.tree.map(lambda m, g: 0.9 * m + 0.1 * g, mean, grad)
        square = jax.tree.map(lambda v, g: 0.99 * v + 0.01 * g**2, square, grad)
        params = jax.tree.map(lambda p, m, v: p - 1e-2 * m / (jnp.sqrt(v) + 1e-8), params, mean, square)
        return (params, mean, square), wgan(batch, params)[0]

    params = wgan.init(KEY, Sizes(1, V))
    zeros = jax.tree.map(jnp.zeros_like, params)
    _, found = jax.jit(lambda c: jax.lax.scan(step, c, jnp.arange(500)))((params, zeros, zeros))
    assert abs(float(found[-100:].mean())) == pytest.approx(2.0, rel=0.15)


def test_wgan_is_its_formula():
    """In NumPy, the critic's slope by differences."""
    batch, wgan = batch_of(random_z(), kept=np.array([True, True, False, True, True, True])), WGAN(weight=1.0, hidden=5)
    params = own_of(wgan)
    layers = [{k: np.asarray(x, np.float64) for k, x in params[f"layer_{i}"].items()} for i in range(3)]

    def f(x):
        for i, layer in enumerate(layers):
            x = (np.where(x > 0, x, 0.2 * x) if i else x) @ layer["weight"] + layer["bias"]
        return x[..., 0]

    kept, z, prior = (np.asarray(x) for x in (batch.is_text, batch.z, batch.prior))
    distance = f(prior)[kept].mean() - f(z)[kept].mean()
    value, against = compiled(lambda batch, p: (wgan(batch, p)[0], wgan.adversary(batch, p)), batch)(batch, params)
    assert float(value) == pytest.approx(distance, rel=1e-4)
    part = np.asarray(jax.random.uniform(KEY, (6, 1)), np.float64)
    x, h = part * prior + (1 - part) * z, 1e-6
    slope = np.stack([(f(x + h * e) - f(x - h * e)) / (2 * h) for e in np.eye(L)], -1)
    expected = -distance + 10 * np.square(np.linalg.norm(slope, axis=-1) - 1)[kept].mean()
    assert float(against) == pytest.approx(expected, rel=1e-4)


# ---- the KL and its parts


def gaussians(seed, n):
    rng = np.random.default_rng(seed)
    return rng.normal(size=(n, L)), rng.normal(size=(n, L)) - 1, rng.normal(size=(n, L))


@pytest.mark.parametrize("sampling", ["stratified", "weighted"])
def test_tcvae_of_a_batch_that_is_the_corpus(sampling):
    """Then the stratified q(z) is the mixture of all posteriors, here by SciPy; the weighted one is 1/n of it."""
    mean, logvar, z = gaussians(1, 6)
    kept = np.array([True, True, True, False, True, True])
    n = kept.sum()
    given = norm.logpdf(z[kept][:, None], mean[kept], np.exp(logvar[kept] / 2))  # [i, j, l]
    low = math.log(n) if sampling == "stratified" else 2 * math.log(n)
    joint = logsumexp(given.sum(-1), axis=1) - low
    marginals = logsumexp(given, axis=1) - low
    own = norm.logpdf(z, mean, np.exp(logvar / 2)).sum(-1)[kept]
    prior = norm.logpdf(z[kept])
    expected = {
        "mi": (own - joint).mean(),
        "tc": (joint - marginals.sum(-1)).mean(),
        "dimensions": (marginals - prior).sum(-1).mean(),
    }
    batch = batch_of(z, mean, logvar, kept=kept, corpus_size=int(n))
    found, logs = value_of(TCVAE(mi=0.5, tc=3.0, dimensions=2.0, sampling=sampling), batch)
    for name, value in expected.items():
        assert float(logs[name]) == pytest.approx(value, rel=1e-4), name
    weighted = 0.5 * expected["mi"] + 3 * expected["tc"] + 2 * expected["dimensions"]
    assert float(found) == pytest.approx(weighted, rel=1e-4)
    # Whatever the estimate of q(z), the three add up to the draw's log q(z|x) − log p(z).
    assert sum(map(float, logs.values())) == pytest.approx((own - prior.sum(-1)).mean(), rel=1e-4)


def test_tcvae_of_a_gaussian():
    """Means of N(0, Σ − s²) and variance s²: q(z) is N(0, Σ), whose total correlation is −½ log |correlations|."""
    n, s, correlation = 1500, 0.4, 0.8
    cov = np.array([[1.0, correlation], [correlation, 1.0]])
    rng = np.random.default_rng(0)
    mean = rng.multivariate_normal(np.zeros(2), cov - s**2 * np.eye(2), n)
    z = mean + s * rng.normal(size=mean.shape)
    batch = batch_of(z, mean, np.full(mean.shape, 2 * math.log(s)), corpus_size=n)
    parts = compiled(partial(decomposed_kl, sampling="stratified"), batch)(batch)
    assert float(parts.tc) == pytest.approx(-0.5 * math.log(np.linalg.det(cov)), abs=0.05)
    # The information: the entropy of N(0, Σ) less that of N(0, s²).
    assert float(parts.mi) == pytest.approx(0.5 * math.log(np.linalg.det(cov) / s**4), abs=0.07)
    assert float(parts.dimensions) == pytest.approx(0, abs=0.05)


def test_stratified_sampling_is_unbiased():
    """All batches of 3 of a corpus of 6: the mean of a text's estimates of q(z) is q(z); of the weighted ones it is
    not."""
    mean, logvar, z = gaussians(2, 6)
    exact = np.exp(norm.logpdf(z[0], mean, np.exp(logvar / 2)).sum(-1)).mean()
    batches = [[0, *others] for others in itertools.combinations(range(1, 6), 2)]
    batch, estimates = batch_of(z[:3], corpus_size=6), {}
    for sampling in ("stratified", "weighted"):
        run = compiled(partial(aggregate_log_density, sampling=sampling), batch)
        found = [run(batch._replace(z=z[b], mean=mean[b], logvar=logvar[b]))[0][0] for b in np.array(batches)]
        estimates[sampling] = np.exp(found).mean()
    assert estimates["stratified"] == pytest.approx(exact, rel=1e-5)
    assert estimates["weighted"] != pytest.approx(exact, rel=0.1)


def test_capacity():
    """|KL − C|, the KL of each dimension by numerical integration, C half way up at a quarter of the steps."""
    mean, logvar, z = gaussians(3, 4)
    kept = np.array([True, True, True, False])

    def kl(m, v):
        q, p = norm(m, math.exp(v / 2)), norm()
        return quad(lambda x: q.pdf(x) * (q.logpdf(x) - p.logpdf(x)), m - 12, m + 12)[0]

    expected = np.vectorize(kl)(mean, logvar)[kept].sum(-1).mean()
    batch = batch_of(z, mean, logvar, kept=kept, steps=100)
    run = compiled(Capacity(start=1.0, end=5.0, until=0.5), batch)
    for step, C in ((0, 1.0), (25, 3.0), (50, 5.0), (80, 5.0)):
        found, logs = run(batch._replace(step=step), {})
        assert float(logs["capacity"]) == pytest.approx(C)
        assert float(found) == pytest.approx(abs(expected - C), rel=1e-4)


def test_log_variance():
    mean, logvar, z = gaussians(3, 4)
    kept = np.array([True, False, True, True])
    found, _ = value_of(LogVariance(), batch_of(z, mean, logvar, kept=kept))
    assert float(found) == pytest.approx(sum(np.abs(row).sum() for row in logvar[kept]) / 3, rel=1e-5)


@pytest.mark.parametrize("hidden", [0, 5])
@pytest.mark.parametrize("per_token", [True, False])
def test_bag_of_words(hidden, per_token):
    """Text by text, in NumPy; two texts share a row."""
    kept = np.array([True, True, False, True])
    of_target = np.array([[0, 0, 1, -1], [3, 3, 3, 3]])
    batch = batch_of(random_z(4), kept=kept, targets=np.array([[4, 4, 9, 1], [0, 7, 7, 10]]), text_of_target=of_target)
    bag = BagOfWords(weight=1.0, hidden=hidden, per_token=per_token)
    params = jax.tree.map(np.asarray, own_of(bag))
    x = np.asarray(batch.z)
    if hidden:
        x = np.tanh(x @ params["hidden"]["weight"] + params["hidden"]["bias"])
    log_p = log_softmax(x @ params["output"]["weight"] + params["output"]["bias"], axis=-1)
    words = {0: [4, 4], 1: [9], 3: [0, 7, 7, 10]}
    expected = [-log_p[text, ids].sum() / (len(ids) if per_token else 1) for text, ids in words.items()]
    assert float(value_of(bag, batch, params)[0]) == pytest.approx(np.mean(expected), rel=1e-5)


# ---- means of a fixed spread


def test_batch_normalized_means():
    """The deviation is γ over the texts alone, around 0, and the mean KL L·γ²/2 where the variances are 1, even of a
    collapsed posterior that is far off."""
    kept = np.array([True, True, False, True, True])
    mean = 1e-3 * np.random.default_rng(0).normal(size=(5, L)) + [0.0, 10.0, 0.0]
    mean[~kept] = 77.0
    gamma = 0.7
    batch = batch_of(mean, kept=kept)
    found, deviation = batch_normalized(Posterior(jnp.asarray(mean), jnp.zeros((5, L))), gamma, batch.average)
    np.testing.assert_allclose(np.asarray(found.mean)[kept].std(0), gamma, rtol=1e-3)
    np.testing.assert_allclose(np.asarray(found.mean)[kept].mean(0), 0, atol=1e-3)
    np.testing.assert_allclose(deviation, mean[kept].std(0), rtol=1e-2)
    kl = 0.5 * np.square(np.asarray(found.mean)[kept]).sum(-1).mean()
    np.testing.assert_allclose(kl, L * gamma**2 / 2, rtol=1e-2)


def test_the_head_takes_over_the_statistics():
    """Moved a tenth of the way again and again, the weights alone give what the batch's normalization makes of them
    without their part along what texts have in common; the log-variances' rows stay."""
    rng = np.random.default_rng(1)
    pooled, first = 5.0 + rng.normal(size=(20, 5)), jnp.asarray(0.02 * rng.normal(size=(2 * L, 5)))
    head, gamma = first, 0.6

    def scaled(head):
        mean = Posterior(jnp.asarray(pooled) @ head[:L].T, None)
        return batch_normalized(mean, gamma, lambda x: x.mean(0))

    common = pooled.mean(0) / np.linalg.norm(pooled.mean(0))
    expected = scaled(head - jnp.outer(head @ common, common))[0].mean
    for _ in range(150):
        head = normalized_head(head, gamma, scaled(head)[1], jnp.asarray(pooled).mean(0))
    np.testing.assert_allclose(pooled @ np.asarray(head)[:L].T, expected, atol=1e-2 * gamma)
    np.testing.assert_allclose(scaled(head)[0].mean, expected, atol=1e-2 * gamma)
    np.testing.assert_array_equal(head[L:], first[L:])


# ---- of all of them


@pytest.mark.parametrize("name", BUILT_IN)
def test_gradients_by_differences(name):
    """In float64, along random directions of the posterior (z moves with it), and of the own parameters."""
    regularizer = BUILT_IN[name]
    mean, logvar, eps = gaussians(4, 5)
    kept = np.array([True, True, True, False, True])
    with jax.enable_x64(True):
        batch = batch_of(eps, kept=kept)
        params = jax.tree.map(lambda x: x.astype(jnp.float64), own_of(regularizer))
        calls = [lambda batch, params: regularizer(batch, params)[0]]
        calls += [regularizer.adversary] if hasattr(regularizer, "adversary") else []
        for call in calls:

            def value(x, call=call):
                m, v, params = x
                return call(batch._replace(mean=m, logvar=v, z=m + eps * jnp.exp(v / 2)), params)

            assert_slope(value, (jnp.asarray(mean), jnp.asarray(logvar), params))


def assert_slope(value, at, h=1e-6):
    """The gradient along a random direction is the difference quotient, and not 0. In float64."""

    def slopes(x, along):
        loss, grad = jax.value_and_grad(value)(x)
        slope = jax.tree.reduce(jnp.add, jax.tree.map(lambda g, d: (g * d).sum(), grad, along))
        up, down = (jax.tree.map(lambda x, d, s=s: x + s * h * d, x, along) for s in (1, -1))
        return loss, slope, (value(up) - value(down)) / (2 * h)

    along = jax.tree.map(lambda x: np.random.default_rng(x.size).normal(size=x.shape), at)
    loss, slope, expected = jax.jit(slopes)(at, along)
    assert loss.dtype == jnp.float64 and abs(float(slope)) > 1e-6
    assert float(slope) == pytest.approx(float(expected), rel=1e-5)


@pytest.mark.parametrize("mode", ["off", "hard", "clamp", "total"])
def test_gradients_of_the_kl_by_differences(mode):
    """Over texts of which one does not count; the target lies so that some dimensions are above it and some below."""
    mean, logvar, _ = gaussians(4, 5)
    kept = np.array([True, True, True, False, True])
    with jax.enable_x64(True):
        over_texts = batch_of(mean, kept=kept).average
        config = TrainConfig(free_bits=FreeBitsConfig(mode=mode, target=0.0))
        each = np.asarray(kl_per_dimension(Posterior(mean, logvar)))
        group = {"off": each, "hard": each[kept], "clamp": each[kept].mean(0), "total": each[kept].sum(1).mean()}[mode]
        target = float(np.median(group)) * (0.9 if mode == "total" else 1)
        config = dataclasses.replace(config, free_bits=FreeBitsConfig(mode=mode, target=target))

        def value(x):
            return over_texts(free_bits_kl(kl_per_dimension(Posterior(*x)), config.free_bits, over_texts))

        assert_slope(value, (jnp.asarray(mean), jnp.asarray(logvar)))
        if mode == "total":  # below the target nothing is left to learn
            config = dataclasses.replace(config, free_bits=FreeBitsConfig(mode=mode, target=2 * float(group)))
            assert not any(g.any() for g in jax.grad(value)((jnp.asarray(mean), jnp.asarray(logvar))))


def test_gradients_of_the_batch_normalized_posterior_by_differences():
    mean, logvar, eps = gaussians(4, 5)
    kept = np.array([True, True, True, False, True])
    with jax.enable_x64(True):
        over_texts = batch_of(mean, kept=kept).average

        def value(x):
            normalized, _ = batch_normalized(Posterior(*x), 0.7, over_texts)
            return over_texts(jnp.sin(normalized.at(eps)).sum(-1) + kl_per_dimension(normalized).sum(-1))

        assert_slope(value, (jnp.asarray(mean), jnp.asarray(logvar)))


def test_gradients_of_the_adversarial_losses_by_differences():
    """The encoder's of the latents; the discriminator's of its weights, and none of the latents."""
    rng = np.random.default_rng(3)
    with jax.enable_x64(True):
        z, prior, inner, outer = map(jnp.asarray, (*rng.normal(size=(2, 5, L)), *rng.normal(size=(2, 4, L))))

        def losses(z, weights):
            discriminator = lambda x: jax.nn.relu(x @ weights[0].T) @ weights[1][:, 0]  # noqa: E731
            return adversarial_losses(SimpleNamespace(discriminator=discriminator), z, prior)

        assert_slope(lambda z: losses(z, (inner, outer))[1], z)
        assert_slope(lambda weights: losses(z, weights)[0], (inner, outer))
        assert not jax.grad(lambda z: losses(z, (inner, outer))[0])(z).any()


@pytest.mark.parametrize("name", BUILT_IN)
def test_places_without_a_text_count_nowhere(name):
    """The value of a batch with such places is that of the texts alone."""
    kept = np.array([True, False, True, True, False, True, True])
    rng = np.random.default_rng(8)
    mean, logvar, z, prior = rng.normal(size=(4, 7, L))
    targets, of_target = rng.integers(0, V, (7, 4)), np.where(kept, np.arange(7), -1)[:, None].repeat(4, 1)
    of_kept = (np.cumsum(kept) - 1)[:, None].repeat(4, 1)
    whole = batch_of(z, mean, logvar, prior, kept, targets=targets, text_of_target=of_target)
    alone = batch_of(
        z[kept], mean[kept], logvar[kept], prior[kept], targets=targets[kept], text_of_target=of_kept[kept]
    )
    regularizer = BUILT_IN[name]
    params = own_of(regularizer)
    numbers = dict(steps=10, corpus_size=50)
    both = jax.jit(lambda p, *batches: [regularizer(b._replace(**numbers), p)[0] for b in batches])
    found, expected = map(float, both(params, *(b._replace(steps=None, corpus_size=None) for b in (whole, alone))))
    assert found == pytest.approx(expected, rel=1e-5)


def test_several_at_once():
    """The sum with weights; each draws its own numbers, whichever others are on."""
    batch = batch_of(random_z())
    two = {"sigreg": SIGReg(weight=2.0), "wgan": WGAN(weight=0.5, ramp=(0.2, 0.6))}
    own = {"wgan": own_of(two["wgan"])}
    total, adversaries, logs = compiled(partial(regularizer_terms, two), batch)(batch, own)
    alone = compiled(partial(regularizer_terms, {"sigreg": two["sigreg"]}), batch)(batch, {})[2]["sigreg"]
    assert logs.keys() == {"sigreg", "wgan", "wgan/adversary", "wgan/weight"}
    assert float(logs["sigreg"]) == float(alone)
    assert float(logs["wgan/weight"]) == pytest.approx(0.5 * 0.25)  # step 3 of 10, between 2 and 6
    assert float(total) == pytest.approx(2 * float(alone) + 0.125 * float(logs["wgan"]), rel=1e-6)
    assert float(adversaries) == float(logs["wgan/adversary"])


def test_an_adversary_and_the_latents_learn_from_their_own_losses():
    batch, wgan = batch_of(random_z()), WGAN(weight=0.5)
    params = own_of(wgan)

    def both(z, params):
        total, adversaries, _ = regularizer_terms({"wgan": wgan}, batch._replace(z=z), {"wgan": params})
        return total + adversaries

    drawn = batch._replace(key=_fold_in_name(KEY, "wgan"))
    found = jax.jit(jax.grad(both, (0, 1)))(batch.z, params)
    of_z = jax.grad(lambda z: 0.5 * wgan(drawn._replace(z=z), params)[0])
    of_params = jax.grad(lambda p: wgan.adversary(drawn, p))
    expected = jax.jit(lambda z, p: (of_z(z), of_params(p)))(batch.z, params)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6), found, expected)


def test_ramps():
    weights = lambda ramp: [float(weight_at(SIGReg(weight=4.0, ramp=ramp), i, 8)) for i in range(8)]  # noqa: E731
    assert weights((0.0, 0.0)) == [4] * 8
    assert weights((0.25, 0.75)) == [0, 0, 0, 1, 2, 3, 4, 4]
    assert weights((0.5, 0.5)) == [0] * 4 + [4] * 4
    with pytest.raises(OptionError) as error:
        SIGReg(ramp=(0.5, 0.2))
    assert error.value.option == "--regularizers.sigreg.ramp"


# ---- in a training step


B, P = 8, 3
CONFIG = TrainConfig(
    steps=8,
    batch_size=B,
    noise=NoiseConfig(embedding=0.1),
    free_bits=FreeBitsConfig(mode="total"),
    optimizer=OptimizerConfig(learning_rate=1e-2, warmup=0.0),
    posterior=PosteriorConfig(mean_scale=0.5),
    lagging=LaggingConfig(encoder_steps=1, until=0.5),
    regularizers=RegularizersConfig(
        wgan=WGAN(weight=0.5, hidden=4), bag_of_words=BagOfWords(weight=0.1), mmd=MMD(weight=1.0)
    ),
)


def test_every_mesh_gives_the_same_values():
    """All that are built in, value and gradient, on packed rows over eight devices and on one."""
    rng = np.random.default_rng(0)
    mean, logvar, z, prior = (jnp.asarray(x) for x in rng.normal(size=(4, B, P, L)).astype(np.float32))
    lengths = rng.integers(0, 2, (B, P)).astype(np.int32)
    targets, segments = rng.integers(0, V, (B, 4)), rng.integers(0, P + 1, (B, 4))
    batch = Batch(None, None, targets, lengths, decoder_segments=segments * (lengths[:, :1] > 0))
    own = {name: own_of(one) for name, one in BUILT_IN.items() if isinstance(one, Learned)}

    def loss(arrays, batch, own):
        mean, logvar, z, prior = (x.reshape(-1, L) for x in arrays)
        latents = latent_batch(batch, Posterior(mean, logvar), z, prior, StepContext(KEY, 1.0, 3, 50), CONFIG)
        latents = latents._replace(steps=10)
        total, adversaries, logs = regularizer_terms(BUILT_IN, latents, own)
        return total + adversaries, logs

    grad = jax.grad(loss, has_aux=True)
    given = (mean, logvar, z, prior), batch, own
    expected = jax.jit(grad)(*given)
    mesh = jax.make_mesh((8,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    rows, whole = (jax.NamedSharding(mesh, jax.P(axes)) for axes in ("data", None))
    with jax.set_mesh(mesh):
        found = jax.jit(grad, in_shardings=(rows, rows, whole))(*given)
    assert found[1].keys() >= BUILT_IN.keys()
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5)


def test_nothing_in_an_empty_place_reaches_a_gradient():
    lengths = np.array([[3, 0], [4, 5]], np.int32)
    segments = np.array([[1, 1, 0], [1, 2, 2]])
    batch = Batch(None, None, np.ones((2, 3), int), lengths, decoder_segments=segments)
    bad = jnp.where(jnp.asarray(lengths).reshape(-1, 1) > 0, 0.3, jnp.nan) * jnp.ones(L)
    context = StepContext(KEY, 1.0, 0, 9)

    def loss(x):
        latents = latent_batch(batch, Posterior(x, x), x, jnp.ones_like(x), context, CONFIG)
        return regularizer_terms({"tcvae": TCVAE(weight=1.0)}, latents._replace(steps=1), {})[0]

    value, grad = jax.jit(jax.value_and_grad(loss))(bad)
    assert np.isfinite(value) and np.isfinite(grad).all() and not np.asarray(grad)[1].any()
    of_target = latent_batch(batch, Posterior(bad, bad), bad, bad, context, CONFIG).text_of_target
    assert of_target.tolist() == [[0, 0, -1], [2, 3, 3]]


@pytest.fixture(scope="module")
def batches():
    return PackedBatches(texts_of(0, 60, longest=6), B, pad_id=MODEL.pad_token_id, row_length=16)


def taken(batches, mesh_config=None):
    """The compiled step, states before and after each of three, and their logs; without a mesh or on eight devices."""
    small = dataclasses.replace(MODEL, decoder=dataclasses.replace(MODEL.decoder, num_layers=1))
    graphdef, params = split(new_model(small))
    state, abstract, mesh = init_state(params, CONFIG), None, contextlib.nullcontext()
    if mesh_config is not None:
        mesh = make_mesh(mesh_config, B)
        abstract = abstract_state(abstract_model(small), CONFIG, mesh)
        state = jax.tree.map(lambda x, like: jax.device_put(x, like.sharding), state, abstract)
        mesh = jax.set_mesh(mesh)
    step, states, logs = make_train_step(graphdef, CONFIG, abstract, batches.count), [], []
    with mesh:
        for i in range(3):
            states.append(jax.device_get(state))
            state, found = step(state, batches.batch(i))
            logs.append({name: float(x) for name, x in found.items() if not x.ndim})
    return step, [*states, jax.device_get(state)], logs


@pytest.fixture(scope="module")
def one_device(batches):
    return taken(batches)


def changed(before, after):
    return any(bool((a != b).any()) for a, b in zip(jax.tree.leaves(before), jax.tree.leaves(after), strict=True))


def test_a_step_with_regularizers(one_device):
    _, states, logs = one_device
    names = {"wgan", "wgan/adversary", "bag_of_words", "mmd"}
    assert logs[0].keys() >= names and not logs[0].keys() & {"mean_std", "pooled"}
    for before, after in itertools.pairwise(states):
        assert changed(before.regularizers["wgan"], after.regularizers["wgan"])
        assert changed(before.regularizers["bag_of_words"], after.regularizers["bag_of_words"])
        assert after.params.keys() == {"encoder", "decoder", "discriminator"}
        assert changed(before.params["encoder"], after.params["encoder"])
    assert states[0].regularizers.keys() == states[0].regularizer_optimizers.keys() == {"wgan", "bag_of_words"}


def test_the_is_encoder_only_step(one_device):
    """Of every two steps the first is the encoder's alone, of 8 until the fourth; nor do the decoder's moments move."""
    _, states, _ = one_device
    moments = lambda state: [  # noqa: E731
        x for path, x in jax.tree.leaves_with_path(state.optimizer) if "'decoder'" in jax.tree_util.keystr(path)
    ]
    moved = [changed(a.params["decoder"], b.params["decoder"]) for a, b in itertools.pairwise(states)]
    assert moved == [False, True, False] and len(moments(states[0])) > 10
    assert [changed(moments(a), moments(b)) for a, b in itertools.pairwise(states)] == moved
    waits = [bool(is_encoder_only_step(jnp.int32(i), 8, LaggingConfig(encoder_steps=2, until=0.5))) for i in range(8)]
    assert waits == [True, True, False, True, False, False, False, False]


@pytest.mark.parametrize("name", ["adamw", "adafactor", "muon"])
def test_a_frozen_decoder_keeps_its_moments(name):
    """The decoder's updates after three steps without it are those of an optimizer that has not seen these steps."""
    config = OptimizerConfig(name=name, schedule="constant", warmup=0.0, weight_decay=0.01)
    rng = np.random.default_rng(0)
    params = {half: {"w": jnp.asarray(rng.normal(size=(3, 4)), jnp.float32)} for half in ("decoder", "encoder")}
    draw = lambda: jax.tree.map(lambda w: jnp.asarray(0.01 * rng.normal(size=w.shape), w.dtype), params)  # noqa: E731
    still = lambda grads: grads | {"decoder": jax.tree.map(jnp.zeros_like, grads["decoder"])}  # noqa: E731
    optimizer, plain = make_optimizer(config, 10, separate_decoder=True), make_optimizer(config, 10)
    state, alone = optimizer.init(params), plain.init({"decoder": params["decoder"]})
    for waits in (True, True, True, False, False, True, False):
        grads = draw()
        updates, after = optimizer.update(still(grads) if waits else grads, state, params)
        updates, state = freeze_decoder_update(jnp.bool_(waits), updates, state, after)
        if waits:
            assert not updates["decoder"]["w"].any() and updates["encoder"]["w"].any()
            continue
        expected, alone = plain.update({"decoder": grads["decoder"]}, alone, {"decoder": params["decoder"]})
        np.testing.assert_allclose(updates["decoder"]["w"], expected["decoder"]["w"], rtol=1e-5)


def test_resume_restores_regularizer_state(one_device, batches, tmp_path):
    """Saved after the first step and read again: two steps later all is the same bit for bit, and what regularizers
    have of their own is no part of the weights that every command reads."""
    step, states, _ = one_device
    with Checkpoints(tmp_path, keep=1) as checkpoints:
        checkpoints.save(jax.device_put(states[1]))
    here = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    like = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=here), states[0])
    state = jax.device_get(Checkpoints(tmp_path, keep=1).restore(like)[0])
    for i in (1, 2):
        state, _ = step(state, batches.batch(i))
    assert not changed(state, states[3])
    stored = ocp.load_checkpointables(tmp_path / "checkpoints" / "1")
    assert stored["params"].keys() == {"encoder", "decoder", "discriminator"}
    assert sum(name.startswith(("regularizers.", "regularizer_optimizers.")) for name in stored["state"]) > 20


def test_own_parameters_are_whole_on_every_device():
    mesh = make_mesh(MeshConfig(data=2, fsdp=4), B)
    state = abstract_state(abstract_model(MODEL), CONFIG, mesh)
    own = jax.tree.leaves((state.regularizers, state.regularizer_optimizers))
    assert len(own) > 20 and all(x.sharding.is_fully_replicated for x in own)


@pytest.mark.slow
def test_a_step_on_eight_devices(one_device, batches):
    _, states, logs = taken(batches, MeshConfig(data=2, fsdp=4))
    for found, expected in zip(logs, one_device[2], strict=True):
        assert found.keys() == expected.keys()
        for name in found:
            assert found[name] == pytest.approx(expected[name], rel=2e-4, abs=1e-5), name
    own, expected = (s[3].regularizers for s in (states, one_device[1]))
    for a, b in zip(jax.tree.leaves(own), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-3)


def test_parts_of_a_batch(batches):
    """With --accumulate the shapes and names are the same."""
    config = dataclasses.replace(CONFIG, accumulate=2)
    graphdef, params = split(abstract_model(MODEL))
    state = jax.eval_shape(partial(init_state, config=config), params)
    after, logs = jax.eval_shape(make_train_step(graphdef, config, None, 60), state, batches.batch(0))
    assert jax.tree.structure(after) == jax.tree.structure(state)
    assert logs.keys() >= {"wgan", "wgan/adversary", "bag_of_words", "mmd", "rec"}


def test_inactive_regularizers_are_not_traced(batches):
    """Nor does it change a draw, a name of a checkpoint's arrays, or train.json."""
    graphdef, params = split(abstract_model(MODEL))
    off = TrainConfig(steps=8, batch_size=B)

    def program(config):
        state = jax.eval_shape(partial(init_state, config=config), params)
        return str(jax.make_jaxpr(make_train_step(graphdef, config))(state, batches.batch(0))), state

    plain, state = program(off)
    assert program(dataclasses.replace(off, regularizers=RegularizersConfig(mmd=MMD(scales=(3.0,)))))[0] == plain
    assert not any("regularizer" in name for name in _leaves(state))
    assert to_dict(off)["regularizers"] == {}


# ---- the program


def _raise(error):
    raise error


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (lambda batch: (batch.z.sum(-1), {}), "the value must be a real scalar, not float32 of shape (6,)"),
        (lambda batch: (1j * batch.z.sum(), {}), "the value must be a real scalar, not complex64 of shape ()"),
        (lambda batch: ("0", {}), "the value must be a real scalar, not str"),
        (lambda batch: batch.z.sum(), "must return (value, dict of scalars to log), not float32 of shape ()"),
        (
            lambda batch: (1.0, {"a": batch.z}),
            "the logged value 'a' must be a real scalar, not float32 of shape (6, 3)",
        ),
        (lambda batch: batch.zz, "AttributeError: 'LatentBatch' object has no attribute 'zz'"),
        (lambda batch: sys.exit(0), "SystemExit: 0"),
        (lambda batch: next(iter(())), "StopIteration: StopIteration"),
        (lambda batch: _raise(InputError("its own reason")), "its own reason"),
    ],
)
def test_invalid_return_values_raise(given, said):
    class Bad(SIGReg):
        def __call__(self, batch, params):
            return given(batch)

    with pytest.raises(RegularizerError) as e:
        regularizer_terms({"bad": Bad(weight=1.0)}, batch_of(random_z()), {})
    assert str(e.value) == f"regularizer bad: {said}"


def test_invalid_registrations_raise():
    def said(name, cls):
        with pytest.raises(InputError) as e:
            register(name)(cls)
        assert name not in REGISTRY or REGISTRY[name] is not cls
        return str(e.value)

    class NotFrozen(SIGReg):
        pass

    @dataclasses.dataclass(frozen=True)
    class Fine(SIGReg):
        pass

    assert "not a frozen dataclass" in said("thing", NotFrozen)
    assert "this name is registered already, by davae_jax.regularizers.divergences" in said("mmd", Fine)
    assert "another value in the logs has this name" in said("loss", Fine)
    assert "not a Python identifier" in said("a-b", Fine)
    assert "not a subclass of Regularizer" in said("thing", dict)


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        (
            ["--regularizers.foo.weight", "1"],
            "--regularizers.foo.weight names an unknown regularizer 'foo'; available: ",
        ),
        (["--regularizers.mmd.kernel", "cubic"], "--regularizers.mmd.kernel"),
        (["--regularizers.mmd.weight", "-1"], "--regularizers.mmd.weight "),
        (["--regularizers.mmd.wieght", "1"], "--regularizers.mmd.wieght"),
        (["--regularizers.bag-of-words.hidden", "-1"], "--regularizers.bag-of-words.hidden "),
        (["--plugin", "missing.py"], "--plugin missing.py: no such file"),
        (["--plugin"], "--plugin "),
        (["--posterior.mean-scale", "-1"], "--posterior.mean-scale "),
        (
            ["--posterior.mean-scale", "1", "--batch-size", "4", "--accumulate", "4"],
            "--posterior.mean-scale ",
        ),
    ],
)
def test_bad_options(argv, said, capsys):
    with pytest.raises(InputError) as e:
        parse_train(argv)
    printed = capsys.readouterr().err  # by tyro, where the option cannot be parsed
    assert said in printed + str(e.value) and e.value.exit_code == 2 and "\n" not in str(e.value)


def test_a_plugin_that_cannot_be_imported(tmp_path):
    (tmp_path / "bad.py").write_text("import nowhere_at_all\n")
    with pytest.raises(InputError, match=r"bad.py: cannot be imported \(ModuleNotFoundError: No module named"):
        parse_train(["--plugin", str(tmp_path / "bad.py")])


@pytest.mark.parametrize(
    ("code", "error"), [("import sys\nsys.exit(0)\n", "SystemExit: 0"), ("raise GeneratorExit", "Gen")]
)
def test_a_plugin_that_exits(code, error, tmp_path):
    (tmp_path / "exit.py").write_text(code)
    with pytest.raises(InputError, match=rf"exit.py: cannot be imported \({error}"):
        parse_train(["--plugin", str(tmp_path / "exit.py")])


def test_a_plugin_whose_error_cannot_be_described(tmp_path):
    (tmp_path / "bad.py").write_text("class E(Exception):\n    def __str__(self): return 5\nraise E")
    with pytest.raises(InputError, match=r"bad.py: cannot be imported \(E: E\)"):
        parse_train(["--plugin", str(tmp_path / "bad.py")])


def test_a_plugin_without_a_regularizer_is_warned_of(tmp_path, registry):
    (tmp_path / "empty.py").write_text("x = 1\n")
    with pytest.warns(UserWarning, match=r"empty.py: registers no regularizer; is @register missing\?"):
        parse_train(["--plugin", str(tmp_path / "empty.py")])


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (None, "NoneType"),
        (np.zeros(3, np.float32), "float32 of shape (3,)"),
        ({"w": "x"}, "str in ['w']"),
        ({"a": {"w": np.zeros(3, np.int32)}}, "int32 of shape (3,) in ['a']['w']"),
    ],
)
def test_invalid_parameters_raise(given, said):
    class Bad(WGAN):
        def init(self, key, sizes):
            return given

    with pytest.raises(RegularizerError) as e:
        init_regularizer_params({"bad": Bad(weight=1.0)}, 0, Sizes(3, 5))
    assert str(e.value) == f"regularizer bad: init must return a nested dict of float arrays, not {said}"


def test_a_plan_takes_the_options_of_a_plugin(tmp_path, registry):
    (tmp_path / "bad.py").write_text(BAD)
    command = PlanCommand.parse(["--plugin", str(tmp_path / "bad.py"), "--regularizers.bad.weight", "2"], "davae plan")
    assert active(command.config.regularizers)["bad"].weight == 2
    with pytest.raises(InputError, match="unknown regularizer 'foo'"):
        PlanCommand.parse(["--regularizers.foo.weight", "2"], "davae plan")


def test_installed_packages_may_have_regularizers(registry, monkeypatch):
    """Their entry points name the classes; a package that cannot be imported is skipped with a warning."""
    REGISTRY.pop("installed", None)

    @register("installed")
    @dataclasses.dataclass(frozen=True)
    class Installed(SIGReg):
        target: float = 1.0

    del REGISTRY["installed"]
    broken = EntryPoint("broken", "nowhere_at_all:Class", ENTRY_POINTS)
    installed = SimpleNamespace(name="installed", value="package:Installed", load=lambda: Installed)
    monkeypatch.setattr("importlib.metadata.entry_points", lambda group: [broken, installed] if group else [])
    argv = ["--regularizers.installed.weight", "2", "--regularizers.installed.target", "0.5"]
    for _ in range(2):
        with pytest.warns(UserWarning, match="regularizer broken of nowhere_at_all:Class: ModuleNotFoundError"):
            _, config = parse_train(argv)
        assert active(config.regularizers) == {"installed": Installed(weight=2.0, target=0.5)}
        assert to_dict(config)["regularizers"]["installed"]["target"] == 0.5
        del REGISTRY["installed"]  # as `davae compare` does between settings


def test_options_are_static_without_plugins():
    _, config = parse_train([])
    assert type(config) is TrainConfig and type(config.regularizers) is RegularizersConfig
    assert [field.name for field in dataclasses.fields(RegularizersConfig)] == list(BUILT_IN)


def test_a_run_is_that_of_the_same_regularizers():
    """Runs of before there were any can be gone on with."""
    parsed = lambda *argv: to_dict(parse_train(argv)[1])  # noqa: E731
    plain, with_mmd = parsed(), parsed("--regularizers.mmd.weight", "1")
    old = {name: x for name, x in plain.items() if name not in ("regularizers", "plugin", "posterior", "lagging")}
    old["beta"] = {name: x for name, x in old["beta"].items() if name != "shape"}
    assert differences(old, plain) == differences(plain, old) == []
    assert differences(plain, parsed("--regularizers.mmd.scales", "1", "2")) == []  # it is off
    assert [d.split()[0] for d in differences(old, with_mmd)] == ["regularizers.mmd"]
    (said,) = differences(with_mmd, parsed("--regularizers.mmd.weight", "2"))
    assert said == "regularizers.mmd.weight (1.0, now 2.0)"
    assert differences(old, parsed("--posterior.mean-scale", "0.5")) == ["posterior.mean_scale (0.0, now 0.5)"]


# Not finite from the third step on, or of the wrong shape.
BAD = """
from dataclasses import dataclass
import jax.numpy as jnp
from davae_jax.regularizers import Regularizer, register

@register("bad")
@dataclass(frozen=True)
class Bad(Regularizer):
    shaped: bool = False

    def __call__(self, batch, params):
        norm = jnp.square(batch.mean).sum(-1)
        return norm if self.shaped else jnp.where(batch.step >= 2, jnp.nan, batch.average(norm)), {}
"""


@pytest.fixture
def registry():
    """What plugins register is forgotten after the test."""
    registered = dict(REGISTRY)
    yield
    REGISTRY.clear()
    REGISTRY.update(registered)


@pytest.fixture
def train(registry, tmp_path):
    """Runs train.py in this process: (folder, options) → exit code, output, errors."""
    (tmp_path / "bad.py").write_text(BAD)
    texts = tmp_path / "texts.txt"
    texts.write_text("\n".join(TEXTS) + "\n", encoding="utf-8")

    def run(folder, *options):
        return test_train.train("--data.train", texts, "--run-dir", folder, *TINY, "--log.held-out", 0, *options)

    return run


def test_the_documents_example(train, tmp_path, monkeypatch):
    """The file and the command that docs/regularizers.md begins with, as they stand there."""
    text = (ROOT / "docs" / "regularizers.md").read_text(encoding="utf-8")
    (file, *_), (command, *_) = (re.findall(rf"```{kind}\n(.*?)```", text, re.S) for kind in ("python", "bash"))
    monkeypatch.chdir(tmp_path)
    Path("variance.py").write_text(file, encoding="utf-8")
    assert len(file.splitlines()) <= 22
    options = shlex.split(command.replace("\\\n", ""))[2:]
    options += ["--regularizers.wgan.weight", "0.5", "--regularizers.wgan.hidden", "4"]  # a second one beside it
    run = tmp_path / "runs" / "variance"  # as the command has it
    code, _, err = train(run, "--steps", 2, *options)
    assert code == 0, err
    (row,) = metrics_of(run)
    assert row["variance"] == pytest.approx((row["variance/variance"] - 0.3) ** 2, rel=0.05)  # means of two steps
    stored = json.loads((run / "train.json").read_text(encoding="utf-8"))
    assert stored["regularizers"].keys() == {"variance", "wgan"} and np.isfinite(row["wgan/adversary"])
    assert stored["regularizers"]["variance"] == {"weight": 2.0, "ramp": [0.0, 0.0], "target": 0.3}
    assert stored["plugin"] == ["variance.py"] and stored["digest_of_plugins"] == [plugin_digest(Path("variance.py"))]
    Path("variance.py").write_text(file + "\n", encoding="utf-8")
    code, _, err = train(run, "--steps", 2, *options)
    assert code == 2 and "was made with another config: digest_of_plugins (" in err


def test_non_finite_values_are_named():
    fine = {"rec": 1.0, "loss": 2.0, "loss_d": 1.0, "grad_norm": 3.0, "mmd": 0.1, "wgan": 0.1, "wgan/adversary": 2.0}
    said = lambda **bad: describe_non_finite(fine | bad, {"mmd", "wgan"})  # noqa: E731
    nan, inf = math.nan, math.inf
    assert said() is None
    assert said(mmd=nan, loss=nan, grad_norm=nan) == "regularizer mmd is nan"
    assert said(**{"wgan/adversary": inf}) == "regularizer wgan/adversary is inf"
    assert said(rec=nan, mmd=nan, loss=nan) == "loss is nan"  # the model is at fault
    assert said(grad_norm=inf) == "grad_norm is inf"


@pytest.mark.slow
def test_a_value_that_is_not_finite_ends_the_run(train, tmp_path):
    """In the third step: the regularizer is named, not the loss that it made."""
    options = ["--plugin", tmp_path / "bad.py", "--regularizers.bad.weight", 0.1, "--steps", 4, "--log.every", 1]
    code, _, err = train(tmp_path / "run", *options)
    (line,) = [line for line in err.splitlines() if "error" in line]
    assert code == 1 and line.startswith("train.py: error: step 3: regularizer bad is nan; its batch is lines ")
    assert line.endswith("the last good checkpoint is none yet")
    assert [row["step"] for row in metrics_of(tmp_path / "run")] == [1, 2]


@pytest.mark.slow
def test_a_value_of_the_wrong_shape_ends_the_run(train, tmp_path):
    options = ["--plugin", tmp_path / "bad.py", "--regularizers.bad.weight", 1, "--regularizers.bad.shaped"]
    code, _, err = train(tmp_path / "run", "--steps", 2, *options)
    (line,) = [line for line in err.splitlines() if "error" in line]
    said = "regularizer bad: the value must be a real scalar, not float32 of shape (4,)"
    assert code == 1 and line == f"train.py: error: step 1: {said}"


SPIKE = """
from dataclasses import dataclass

import jax.numpy as jnp

from davae_jax.regularizers import Regularizer, register


@register("spike")
@dataclass(frozen=True)
class Spike(Regularizer):
    def __call__(self, batch, params):
        return batch.average(batch.mean.sum(-1)) * jnp.where(batch.step == 103, 1e6, 0.0), {}
"""


@pytest.mark.slow
def test_a_run_says_which_step_it_skips(train, tmp_path):
    """One term of the loss is enormous in the 104th step, behind the hundred in which the guard skips nothing."""
    (tmp_path / "spike.py").write_text(SPIKE)
    options = ["--plugin", tmp_path / "spike.py", "--regularizers.spike.weight", 1, "--optimizer.spike", 10]
    code, out, err = train(tmp_path / "run", "--steps", 106, "--log.every", 1, *options)
    assert code == 0, err
    (said,) = re.findall(r"step (\d+): skipped, the gradient norm is (\S+)", out + err)
    rows = metrics_of(tmp_path / "run")
    assert said[0] == "104" and [row["step"] for row in rows if row["skipped"]] == [104]
    assert rows[103]["grad_norm"] == pytest.approx(float(said[1]), rel=1e-2) and rows[103]["grad_norm"] > 1e4
    assert rows[104]["grad_norm"] < 100  # nothing of it is left in the weights
