"""Compares the model with the published program: hidden states, posterior, logits, memory, losses, gradients."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from rounding import assert_rounding_explains

from davae_jax.checkpoints.published.published_names import name_table
from davae_jax.checkpoints.weights import flatten
from davae_jax.model.davae import merge, split
from davae_jax.model.latent import Posterior, hard_free_bits_kl, kl_per_dimension, with_unit_variance
from davae_jax.model.losses import adversarial_losses, published_loss, reconstruction_nll

HIDDEN = 1e-4  # largest |difference| of hidden states and logits
LOSS = 1e-5  # relative

pytestmark = pytest.mark.parametrize("name", ["small", "memory"])


@pytest.fixture
def case(name, load_model, golden_arrays):
    return load_model(name), golden_arrays(name)


def assert_close(actual, expected, bound=HIDDEN):
    assert actual.shape == expected.shape
    assert np.abs(np.asarray(actual) - expected).max() <= bound


def posterior_of(model, ids, noise=None):
    graphdef, params = split(model)
    return jax.jit(lambda p, ids, noise: merge(graphdef, p).encoder(ids, noise))(params, ids, noise)


def test_encoder_and_posterior(case):
    model, io = case
    output = posterior_of(model, io["encoder_input_ids"])
    assert_close(output.hidden[-1], io["encoder_last_hidden_state"])
    assert_close(output.pooled, io["encoder_pooled"])
    posterior = model.encode(io["encoder_input_ids"])
    assert_close(posterior.mean, io["posterior_mean"])
    assert_close(posterior.logvar, io["posterior_logvar"])
    assert_close(posterior.at(io["eps"]), io["latent_z"])
    noised = posterior_of(model, io["encoder_input_ids"], io["embedding_noise"])
    assert_close(noised.pooled, io["encoder_pooled_noised"])
    assert np.abs(noised.pooled - output.pooled).max() > 0.01


def test_bfloat16_against_float32(case):
    """Posterior, KL, logits and loss, to the bounds that rounding.py derives."""
    model, io = case
    assert_rounding_explains(model, io["encoder_input_ids"], io["decoder_input_ids"], io["eps"])


def test_kl(case):
    model, io = case
    posterior = model.encode(io["encoder_input_ids"])
    kl = kl_per_dimension(posterior)
    np.testing.assert_allclose(kl.sum(-1), io["kl"], rtol=LOSS)
    np.testing.assert_allclose(hard_free_bits_kl(kl, model.config.dim_target_kl), io["kl_free_bits"], rtol=LOSS)
    fixed = with_unit_variance(posterior)
    np.testing.assert_allclose(kl_per_dimension(fixed).sum(-1), io["kl_deterministic"], rtol=LOSS)
    assert_close(fixed.at(io["eps"]), io["latent_z_deterministic"])


def test_decoder(case):
    model, io = case
    ids, columns = io["decoder_input_ids"], io["logit_columns"]
    logits, _ = model.decode(ids, io["latent_z"])
    assert logits.dtype == jnp.float32
    assert_close(logits[..., columns], io["decoder_logits_cols"])
    assert_close(jax.nn.logsumexp(logits, -1), io["decoder_logsumexp"])
    np.testing.assert_array_equal(logits.argmax(-1), io["decoder_argmax"])
    plain, _ = model.decode(ids, None)
    assert_close(plain[..., columns], io["decoder_logits_cols_no_latent"])
    # Without memory both masks are plain causal attention.
    windowed, _ = model.decode(ids, io["latent_z"], window="published")
    assert_close(windowed, np.asarray(logits), 1e-6)
    nll = reconstruction_nll(logits[:, :-1], ids[:, 1:], ids[:, 1:] != 50000)
    np.testing.assert_allclose(nll, io["reconstruction_nll"], rtol=LOSS)


@pytest.mark.parametrize(("window", "infix"), [("published", ""), (None, "_fullmask")])
def test_memory(case, window, infix):
    model, io = case
    ids, memory = io["segment_input_ids"], None
    for i in range(3):
        logits, memory = model.decode(ids[:, 9 * i : 9 * i + 9], io["latent_z"], memory=memory, window=window)
        assert_close(logits[..., io["logit_columns"]], io[f"segment{i}{infix}_logits_cols"])
        if window == "published":
            M = int(memory.length)
            assert io[f"segment{i}_mem_length"] == M
            assert_close(memory.hidden[0][:, -M:], io[f"segment{i}_mem_first"])
            assert_close(memory.hidden[-1][:, -M:], io[f"segment{i}_mem_last"])


@pytest.mark.parametrize("fb_mode", [0, 1, 2])
@pytest.mark.parametrize("length_weighted", [True, False])
def test_published_loss(case, fb_mode, length_weighted):
    model, io = case
    losses = published_loss(
        model,
        io["encoder_input_ids"],
        io["decoder_input_ids"],
        eps=io["eps"],
        beta=0.5,
        fb_mode=fb_mode,
        length_weighted=length_weighted,
    )
    np.testing.assert_allclose(losses, io[f"loss_fb{fb_mode}_lw{int(length_weighted)}"], rtol=LOSS)


def has_no_effect(name: str) -> bool:
    """Returns whether a bias shifts all scores of a query alike: its gradient is 0, the golden one rounding noise."""
    return name.endswith(("attention.self.key.bias", "attention.relative.bias"))


def test_gradients(case):
    model, io = case
    graphdef, params = split(model)

    def total(params, fb_mode):
        kw = dict(eps=io["eps"], beta=0.5, fb_mode=fb_mode, length_weighted=True)
        return published_loss(merge(graphdef, params), io["encoder_input_ids"], io["decoder_input_ids"], **kw)[2]

    both = jax.jit(lambda p: [jax.grad(total)(p, fb_mode) for fb_mode in (0, 1)])(params)
    for fb_mode, gradients in enumerate(map(flatten, both)):
        checked = 0
        for row in name_table(model.config):
            if (key := f"gradnorm_fb{fb_mode}/{row.name}") not in io:
                continue
            norm, first, total_sum = io[key].astype(np.float64)
            gradient = row.to_file(np.asarray(gradients[row.path], np.float64))
            if has_no_effect(row.name):
                assert np.linalg.norm(gradient) < 1e-5, row.name
            else:
                assert abs(np.linalg.norm(gradient) - norm) <= 1e-4 * norm, row.name
                assert abs(gradient.flat[0] - first) <= 1e-4 * norm, row.name
                assert abs(gradient.sum() - total_sum) <= 1e-3 * norm, row.name
            checked += 1
        assert checked == sum(key.startswith(f"gradnorm_fb{fb_mode}/") for key in io) == 104


def test_adversarial(case):
    model, io = case
    graphdef, params = split(model)
    latent, prior = jnp.asarray(io["latent_z"]), io["prior_sample"]
    np.testing.assert_allclose(adversarial_losses(model, latent, prior), io["loss_adv"], rtol=LOSS)

    grad_d = jax.grad(lambda p: adversarial_losses(merge(graphdef, p), latent, prior)[0])(params)["discriminator"]
    for published, name in (("0", "hidden"), ("2", "output")):
        for part in ("weight", "bias"):
            expected = io[f"adv_grad_d/{published}.{part}"]
            assert_close(grad_d[name][part], expected, 1e-4 * np.linalg.norm(expected))
    grad_z = jax.grad(lambda z: adversarial_losses(model, z, prior)[1])(latent)
    assert_close(grad_z, io["adv_grad_g_z"], 1e-4 * np.linalg.norm(io["adv_grad_g_z"]))
    # The discriminator's loss has no gradient for the encoder.
    assert not np.any(jax.grad(lambda z: adversarial_losses(model, z, prior)[0])(latent))


def test_posterior_sample_is_reparameterized(case):
    _, io = case
    posterior = Posterior(io["posterior_mean"], io["posterior_logvar"])
    key = jax.random.key(3)
    eps = jax.random.normal(key, posterior.mean.shape)
    expected = io["posterior_mean"] + 1.5 * np.asarray(eps) * np.exp(io["posterior_logvar"] / 2)
    np.testing.assert_allclose(posterior.sample(key, 1.5), expected, rtol=1e-6, atol=1e-6)
