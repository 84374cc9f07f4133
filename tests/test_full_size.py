"""The published size, 1.2 B values, in one pass: it is converted, exported, compared and generated from once each.

The order of the tests matters, because the fixtures build on one another and only one model fits in memory: conversion,
export, the PyTorch twin (which is freed), the JAX model. Takes minutes, 13 GB of memory and 10 GB of temporary files.

`DAVAE_FULL_CHECKPOINT` may name a folder that make_checkpoint.py made from golden/full/config.json; otherwise the tests
make one.
"""

import gc
import shutil
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import GOLDEN
from rounding import assert_rounding_explains

import davae_jax
from davae_jax.checkpoints.published.to_torch import export
from davae_jax.checkpoints.published.torch_file import read_tensors
from davae_jax.checkpoints.weights import stored_shapes
from davae_jax.model.davae import merge, split
from davae_jax.model.losses import published_loss, reconstruction_nll
from davae_jax.parity.compare import check_model, format_report
from davae_jax.parity.module_values import make_inputs, twin_values
from davae_jax.tokenizers.load import load_tokenizers

pytestmark = [pytest.mark.slow, pytest.mark.full_size]

# Imports included; the peak counts mapped pages as well. Not getrusage's: on Linux a process inherits the peak of the
# process that started it, here pytest's after whatever ran before.
CONVERT = """
import sys
from pathlib import Path
from davae_jax.checkpoints.published.from_torch import convert
convert(sys.argv[1], sys.argv[2])
peak = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM:"))
print(int(peak.split()[1]) * 1024)
"""
MAX_LENGTH = 24  # of generated rows


@pytest.fixture(scope="module")
def converted(full_checkpoint, tmp_path_factory):
    """(folder, peak resident bytes) of the conversion, in a process of its own."""
    folder = tmp_path_factory.mktemp("full") / "converted"
    run = subprocess.run(
        [sys.executable, "-c", CONVERT, full_checkpoint, folder], capture_output=True, text=True, cwd=GOLDEN.parents[1]
    )
    assert run.returncode == 0, run.stderr
    yield folder, int(run.stdout)
    shutil.rmtree(folder.parent)


@pytest.fixture(scope="module")
def twin(full_checkpoint, tmp_path_factory):
    """(inputs, values, folder of gradients) of the PyTorch twin of the published file."""
    pytest.importorskip("torch")
    gradients = tmp_path_factory.mktemp("gradients")
    config = davae_jax.DAVAEConfig.from_json(full_checkpoint / "config.json")
    inputs = make_inputs(config, batch_size=2, length=48, seed=0)
    values = twin_values(full_checkpoint, config, inputs, gradients)
    gc.collect()
    yield inputs, values, gradients
    shutil.rmtree(gradients)


@pytest.fixture(scope="module")
def model(converted, twin):
    """The JAX model of the converted checkpoint, loaded when the twin is no longer in memory."""
    return davae_jax.from_pretrained(converted[0])


@pytest.fixture(scope="module")
def expected():
    return dict(np.load(GOLDEN / "full" / "expected.npz"))


def test_conversion_memory_and_size(full_checkpoint, converted):
    folder, peak = converted
    on_disk = (full_checkpoint / "pytorch_model.bin").stat().st_size
    assert peak < 1.5 * on_disk
    stored = sum(f.stat().st_size for f in folder.rglob("*") if f.is_file())
    assert abs(stored / on_disk - 1) < 0.02  # the source's dtype, uncompressed
    assert {leaf.dtype for leaf in stored_shapes(folder / "params").values()} == {np.dtype(np.float16)}


def test_conversion_and_export_are_bit_exact(full_checkpoint, converted, tmp_path):
    """The exported file holds the published tensors. Both ways are reshapes, which `test_known_answers` checks."""
    exported = export(converted[0], tmp_path / "exported")
    actual, published = (read_tensors(folder / "pytorch_model.bin") for folder in (exported, full_checkpoint))
    assert list(actual) == list(published)
    for name, array in published.items():
        assert actual[name].dtype == array.dtype, name
        assert np.array_equal(actual[name], array), name
    del actual
    shutil.rmtree(exported)


def test_parity_gradients_included(twin, model):
    """Every module, the losses, the memory and the gradient of every tensor against the PyTorch twin."""
    inputs, values, gradients = twin
    report = check_model(model, inputs, values, gradients=gradients)
    assert report.ok, format_report(report)


def test_known_answers(model, expected):
    """The published program's numbers."""
    graphdef, params = split(model)
    encoded = jax.jit(lambda p, ids: merge(graphdef, p).encoder(ids)[1:])(params, expected["encoder_input_ids"])
    pooled, mean, logvar = encoded
    posterior = davae_jax.Posterior(mean, logvar)
    assert np.abs(pooled - expected["encoder_pooled"]).max() <= 1e-4
    assert np.abs(mean - expected["posterior_mean"]).max() <= 1e-4
    assert np.abs(logvar - expected["posterior_logvar"]).max() <= 1e-4
    assert np.abs(posterior.at(expected["eps"]) - expected["latent_z"]).max() <= 1e-4

    ids, latent = expected["decoder_input_ids"], expected["latent_z"]
    logits, memory = model.decode(ids, latent)
    assert np.abs(logits[..., expected["logit_columns"]] - expected["decoder_logits_cols"]).max() <= 1e-4
    assert np.abs(jax.nn.logsumexp(logits, -1) - expected["decoder_logsumexp"]).max() <= 1e-4
    np.testing.assert_array_equal(logits.argmax(-1), expected["decoder_argmax"])
    nll = reconstruction_nll(logits[:, :-1], ids[:, 1:], ids[:, 1:] != 50000)
    np.testing.assert_allclose(nll, expected["reconstruction_nll"], rtol=1e-5)
    last = memory.hidden[-1][:, -int(memory.length) :]
    assert np.abs(last.mean(-1) - expected["mem_last_mean"]).max() <= 1e-4

    losses = published_loss(
        model, expected["encoder_input_ids"], ids, eps=expected["eps"], beta=0.1, fb_mode=1, length_weighted=True
    )
    np.testing.assert_allclose(losses, expected["loss_fb1_lw1_beta0.1"], rtol=1e-5)
    scores = model.discriminate(latent)
    assert np.abs(scores - expected["discriminator_logits"][:, 0]).max() <= 1e-4


def test_bfloat16_against_float32(model, expected):
    """Posterior, KL, logits and loss, to the bounds that rounding.py derives."""
    names = ("encoder_input_ids", "decoder_input_ids", "eps")
    assert_rounding_explains(model, *(expected[name] for name in names))


def test_greedy_generation_is_the_argmax(model, expected):
    """Cached decoding against the decoder without a cache."""
    ids = davae_jax.generate(model, expected["latent_z"], max_length=MAX_LENGTH, top_k=1)
    tokens = np.array([row + [50000] * (MAX_LENGTH - len(row)) for row in ids])
    logits, _ = model.decode(tokens, jnp.asarray(expected["latent_z"]))
    best = np.asarray(logits.argmax(-1))
    for row, row_best in zip(ids, best, strict=True):
        assert row[1:] == row_best[: len(row) - 1].tolist()


def test_texts_of_the_model_card(model, reference_dir):
    """The two sentences of the model card, with the real tokenizers and the published sampling settings."""
    texts = [
        "针对电力系统中的混沌振荡对整个互联电网的危害问题,提出了一种基于非线性光滑函数的滑模控制方法.",
        "超市面积不算大.挺方便附近的居民购买的. 生活用品也比较齐全.价格适用中.",
    ]
    vae = davae_jax.TextVAE(model, *load_tokenizers(reference_dir / "tokenizers", model.config))
    generated = vae.simulate_batch(texts, seed=1, max_length=MAX_LENGTH)
    assert len(generated) == 2 and all(generated)
