"""Numbers in degenerate and extreme cases: padding, order and size of batches, log-variances from −100 to 100."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from small_model import CONFIG, new_model
from test_packing import CLEAN, KEYS, TEXTS, assert_close, assert_gradients_close
from test_packing import MODEL as PACKED_MODEL
from test_regularizers import BUILT_IN, batch_of, own_of

from davae_jax.checkpoints.weights import flatten
from davae_jax.data.batches import Batch, pad_batch
from davae_jax.data.packing import PackedBatches
from davae_jax.evaluation import metrics
from davae_jax.model.davae import merge, split
from davae_jax.model.latent import Posterior, kl_per_dimension, log_normal
from davae_jax.model.losses import published_loss
from davae_jax.regularizers import divergences
from davae_jax.training.objective import StepContext, encode, gradient, reconstruction
from davae_jax.training.step import describe_non_finite

PAD, BOS, END = CONFIG.pad_token_id, CONFIG.bos_token_id, CONFIG.end_token_id


MODEL = dataclasses.replace(PACKED_MODEL, decoder=dataclasses.replace(PACKED_MODEL.decoder, num_layers=1))
FLOAT32_MAX = float(np.finfo(np.float32).max)


@pytest.fixture(scope="module")
def model():
    return new_model(MODEL, scale=4.0)


# ---- padding, order and size of batches


def losses_of(model):
    """(params, plain batch, eps) → loss of each text: reconstruction per token and 0.3 · KL."""
    graphdef, _ = split(model)

    def losses(params, batch, eps):
        model = merge(graphdef, params)
        posterior = encode(model, batch, KEYS, CLEAN).posterior
        rec, length = reconstruction(model, batch, posterior.at(eps), None, CLEAN)
        return rec / length + 0.3 * kl_per_dimension(posterior).sum(-1)

    return losses


def rows_of(texts):
    return list(zip(texts.encoder_ids, texts.decoder_ids, strict=True))


# Texts of all lengths: the empty one, which is the end token alone, one token, and some that fill the longest row.
ROWS = [(np.array([2, 3]), np.array([BOS, END])), (np.array([2, 7, 3]), np.array([BOS, 7, END]))]
ROWS += rows_of(TEXTS)[:6]
SHAPE = tuple(max(len(row[side]) for row in ROWS) for side in (0, 1))
EPS = np.random.default_rng(1).normal(size=(len(ROWS), CONFIG.latent_size)).astype(np.float32)


def test_order_and_size_of_a_batch_and_padding_change_rounding_alone(model):
    """The loss of each text; the gradient of a batch is the sum of those of its texts."""
    losses, params = losses_of(model), split(model)[1]
    both = jax.jit(lambda *args: (losses(*args), jax.grad(lambda *args: losses(*args).sum())(*args)))
    expected, gradients = both(params, pad_batch(ROWS, SHAPE, PAD), EPS)
    longest = [row for row in ROWS if len(row[0]) == SHAPE[0]]
    assert longest and np.isfinite(expected).all() and len(set(np.asarray(expected).tolist())) == len(ROWS)

    order = np.random.default_rng(2).permutation(len(ROWS))
    wide = (16, 40)  # as many encoder positions as there are, and more decoder positions than any text has
    assert MODEL.encoder.max_position_embeddings >= 16 > SHAPE[0] and SHAPE[1] < 40
    found, shuffled = both(params, pad_batch([ROWS[i] for i in order], wide, PAD), EPS[order])
    assert_close(found, expected[order])
    assert_gradients_close(flatten(shuffled), flatten(gradients))

    total = None
    for i, row in enumerate(ROWS):
        found, alone = both(params, pad_batch([row], SHAPE, PAD), EPS[i : i + 1])
        assert_close(found, expected[i : i + 1])
        total = alone if total is None else jax.tree.map(jnp.add, total, alone)
    assert_gradients_close(flatten(total), flatten(gradients))


def test_a_row_of_padding_alone_has_no_loss_and_no_gradient(model):
    """In a batch of single texts, and for the published loss, which gives the other rows what it gave without it."""
    graphdef, params = split(model)
    empty = (np.zeros(0, int), np.zeros(0, int))
    batch = pad_batch([*ROWS[:2], empty], SHAPE, PAD)

    def reconstructed(latent):
        return reconstruction(merge(graphdef, params), batch, latent, None, CLEAN)

    (rec, length), slope = jax.jit(lambda z: (reconstructed(z), jax.grad(lambda z: reconstructed(z)[0][2])(z)))(EPS[:3])
    assert rec[2] == 0 and length.tolist() == [1, 2, 1] and (rec[:2] > 0).all() and not slope.any()
    posterior = model.encode(batch.encoder_ids)
    assert np.isfinite(posterior.mean).all() and np.isfinite(posterior.logvar).all()
    without = model.encode(batch.encoder_ids[:2])
    np.testing.assert_allclose(posterior.mean[:2], without.mean, rtol=1e-5, atol=1e-6)

    ids = np.full((3, SHAPE[1]), END)
    ids[0, :3], ids[1, :2] = (BOS, 7, 9), (BOS, 4)
    losses = [
        published_loss(model, batch.encoder_ids[:n], ids[:n], eps=EPS[:n], beta=0.0, length_weighted=True)
        for n in (2, 3)
    ]
    assert float(losses[1][2]) == pytest.approx(float(losses[0][2]), rel=1e-5)


@pytest.fixture(scope="module")
def packed():
    """A packed batch, and the gradient of the objective: (params, batch) → gradient, values to log."""
    batch = PackedBatches(TEXTS, 4, pad_id=PAD, row_length=20).batch(0)
    config = dataclasses.replace(CLEAN, free_bits=dataclasses.replace(CLEAN.free_bits, mode="off"))
    context = StepContext(jax.random.key(0), jnp.float32(0.3))
    run = jax.jit(gradient, static_argnums=(1, 4))
    return batch, lambda params, graphdef, batch: run(params, graphdef, batch, context, config)


def test_a_packed_row_of_padding_alone_counts_nowhere(model, packed):
    """Appended to a batch, it changes no logged value and no gradient. The draws of the other rows stay the same."""
    batch, objective_gradient = packed
    graphdef, params = split(model)
    fill = dict(decoder_ids=PAD, decoder_targets=PAD)
    longer = {
        name: np.concatenate([rows, np.full_like(rows[:1], fill.get(name, 0))])
        for name, rows in batch._asdict().items()
    }
    expected, expected_logs = objective_gradient(params, graphdef, batch)
    found, logs = objective_gradient(params, graphdef, Batch(**longer))
    for name, value in expected_logs.items():
        np.testing.assert_allclose(logs[name], value, rtol=1e-5, atol=1e-6, err_msg=name)
    assert_gradients_close(flatten(found), flatten(expected))


# ---- extreme log-variances

LOGVARS = (-100.0, -30.0, -10.0, 10.0, 30.0, 100.0)


@pytest.mark.parametrize("logvar", [*LOGVARS, -88.0, 88.0])
def test_kl_and_latent_of_extreme_log_variances(logvar):
    """The closed forms in float64, to four roundings of the largest term; infinite where float32 overflows."""
    mean, eps = np.array([[0.5, -3.0]]), np.array([[1.0, -2.0]])
    posterior = Posterior(*(jnp.full((1, 2), x, jnp.float32) for x in (mean, logvar)))
    kl, slope = kl_per_dimension(posterior), jax.grad(lambda p: kl_per_dimension(p).sum())(posterior)
    with np.errstate(over="ignore"):
        np.testing.assert_allclose(kl, np.float32(0.5 * (mean**2 + np.exp(logvar) - logvar - 1)), rtol=5e-7)
        np.testing.assert_allclose(slope.logvar, np.float32([[0.5 * (np.exp(logvar) - 1)] * 2]), rtol=5e-7)
    np.testing.assert_array_equal(slope.mean, mean)
    np.testing.assert_allclose(posterior.at(eps), mean + eps * np.exp(logvar / 2), rtol=1e-5)
    density = log_normal(posterior.at(eps), *posterior)
    # A noise below the mean's rounding is lost: between 0 and the exact square.
    exact = -0.5 * (logvar + np.log(2 * np.pi))
    assert (density <= exact + 1e-4).all()
    if logvar > -25:
        np.testing.assert_allclose(density, exact - 0.5 * eps**2, rtol=1e-3)


def extreme_values(regularizer, dtype):
    """Returns the regularizer's value [n] for the n log-variances, and its gradients in mean and log-variance."""
    mean, eps, prior = np.random.default_rng(1).normal(size=(3, 6, 3))
    kept = np.array([True, True, False, True, True, True])
    logvars = np.full((len(LOGVARS), 6, 3), -1.0)
    logvars[:, :, 1] = np.array(LOGVARS)[:, None]

    def cast(x):
        return jnp.asarray(np.asarray(x), dtype)

    def where_text(x):  # as `objective.latent_batch` does
        return jnp.where(kept[:, None], x, 0)

    with jax.enable_x64(dtype is np.float64):
        batch = batch_of(*(cast(x) for x in (mean, mean, mean, prior)), kept=kept)
        params, noise = jax.tree.map(cast, own_of(regularizer)), cast(eps)

        def value(mean, logvar):
            latents = dict(mean=mean, logvar=logvar, z=mean + noise * jnp.exp(logvar / 2))
            return regularizer(batch._replace(**jax.tree.map(where_text, latents)), params)[0]

        run = jax.jit(jax.vmap(jax.value_and_grad(value, (0, 1)), (None, 0)))
        return [np.asarray(x, np.float64) for x in jax.tree.leaves(run(cast(mean), cast(logvars)))]


@pytest.mark.parametrize("name", BUILT_IN)
def test_regularizers_of_extreme_log_variances(name, monkeypatch):
    """One dimension has them. The value and the gradient are those of float64 wherever float32 can represent them;
    a value that it cannot represent is not finite, and ends the run with the regularizer's name."""
    directions = np.random.default_rng(4).normal(size=(3, 8))
    monkeypatch.setattr(
        divergences, "random_directions", lambda *_: jnp.asarray(directions / np.linalg.norm(directions, axis=0))
    )
    results = [extreme_values(BUILT_IN[name], dtype) for dtype in (np.float32, np.float64)]
    for logvar, (found, *slopes), (expected, *expected_slopes) in zip(
        LOGVARS, *(zip(*result, strict=True) for result in results), strict=True
    ):
        if abs(expected) > FLOAT32_MAX:
            assert not np.isfinite(found), logvar
            assert name in describe_non_finite({"rec": 1.0, name: found, "loss": found}, {name})
            continue
        assert np.isfinite(found) and all(np.isfinite(slope).all() for slope in slopes), logvar
        if name == "sigreg" and logvar >= 30:  # cos(t·z) of a z whose rounding exceeds its period: any phase is right
            continue
        assert found == pytest.approx(expected, rel=1e-3), logvar
        # The gradients of log q(z|x) and log q(z), each exp(−logvar/2) · noise, cancel but for their rounding.
        cancelled = 2**-22 * np.exp(15) if (name, logvar) == ("tcvae", -30) else 0
        for slope, exact in zip(slopes, expected_slopes, strict=True):
            np.testing.assert_allclose(slope, exact, rtol=1e-2, atol=2e-3 * np.abs(exact).max() + cancelled + 1e-30)


def test_densities_of_very_small_variances():
    """The latents are the means after rounding. Posteriors so narrow do not overlap: q(z) is 1/n of the text's own."""
    means = np.array([[0.3, -1.0], [0.4, 2.0], [-2.0, 0.1]], np.float32)
    densities = metrics.log_densities(means, np.full((3, 2), -100.0, np.float32), jax.random.key(0))
    np.testing.assert_allclose(densities.information, np.log(3), rtol=1e-4)
    np.testing.assert_allclose(densities.posterior, 100 - np.log(2 * np.pi), rtol=1e-5)


@pytest.mark.parametrize("logvar", LOGVARS)
def test_the_objective_of_extreme_log_variances(logvar, model, packed):
    """All posteriors have them: the pooler is saturated, and each log-variance is the sum of its weights."""
    batch, objective_gradient = packed
    graphdef, params = split(model)
    params = jax.tree.map(jnp.array, params)
    encoder, L = params["encoder"], MODEL.latent_size
    encoder["pooler"]["bias"] += 20.0
    weight = encoder["posterior"]["weight"]
    encoder["posterior"]["weight"] = weight.at[L:].set(logvar / weight.shape[1])
    gradients, logs = objective_gradient(params, graphdef, batch)
    values = {name: float(value) for name, value in logs.items() if not value.ndim}
    values["grad_norm"] = 1.0
    means = np.asarray(weight[:L].sum(1), np.float64)
    kl = 0.5 * (means**2 + np.exp(logvar) - logvar - 1).sum()
    if kl > FLOAT32_MAX:
        assert not np.isfinite(values["kl"]) and describe_non_finite(values, ()).startswith("loss")
        return
    assert values["kl"] == pytest.approx(kl, rel=1e-4)
    assert describe_non_finite(values, ()) is None
    assert all(np.isfinite(g).all() for g in jax.tree.leaves(gradients))
    assert np.abs(gradients["encoder"]["posterior"]["weight"][L:]).max() > 0
