"""The published size, 1.2 B values: conversion, parity with the known answers, generation. Minutes and gigabytes.

`DAVAE_FULL_CHECKPOINT` may name a folder that make_checkpoint.py made from golden/full/config.json; otherwise the tests
make one.
"""

import json
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import GOLDEN
from jax.sharding import SingleDeviceSharding

import davae_jax
from davae_jax.checkpoints.published_names import name_table
from davae_jax.checkpoints.torch_file import read_tensors
from davae_jax.checkpoints.weights import load_weights, stored_shapes
from davae_jax.model.davae import merge, split
from davae_jax.model.losses import published_loss, reconstruction_nll

pytestmark = pytest.mark.slow

# Imports included; the peak counts mapped pages as well. Not getrusage's: on Linux a started program inherits the peak
# of the process that started it, here pytest's after whatever ran before.
CONVERT = """
import sys
from pathlib import Path
from davae_jax.checkpoints.from_torch import convert
convert(sys.argv[1], sys.argv[2])
peak = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM:"))
print(int(peak.split()[1]) * 1024)
"""


@pytest.fixture(scope="module")
def converted(full_checkpoint, tmp_path_factory):
    """(folder, peak resident bytes) of a conversion in a process of its own."""
    folder = tmp_path_factory.mktemp("full") / "converted"
    run = subprocess.run(
        [sys.executable, "-c", CONVERT, full_checkpoint, folder], capture_output=True, text=True, cwd=GOLDEN.parents[1]
    )
    assert run.returncode == 0, run.stderr
    return folder, int(run.stdout)


@pytest.fixture(scope="module")
def model(converted):
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


def test_conversion_is_bit_exact(full_checkpoint, converted):
    folder, _ = converted
    state = read_tensors(full_checkpoint / "pytorch_model.bin")
    table = {row.path: row for row in name_table(davae_jax.DAVAEConfig.from_json(folder / "config.json"))}
    for path in ("decoder.layers.31.qkv_weight", "encoder.layers.11.mlp_in.weight", "decoder.inv_freq"):
        row, dtype = table[path], stored_shapes(folder / "params")[path].dtype
        assert dtype == np.float16
    here = SingleDeviceSharding(jax.local_devices()[0])
    targets = {path: jax.ShapeDtypeStruct(row.model_shape, np.float16, sharding=here) for path, row in table.items()}
    for path, array in load_weights(folder / "params", targets).items():
        row = table[path]
        assert np.array_equal(row.to_file(np.asarray(array)), state[row.name]), path


def test_known_answers(model, expected):
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


def test_greedy_generation_is_the_argmax(model, expected):
    """The cached loop at full size against the uncached decoder."""
    ids = davae_jax.generate(model, expected["latent_z"], max_length=24, top_k=1)
    tokens = np.array([row + [50000] * (24 - len(row)) for row in ids])
    logits, _ = model.decode(tokens, jnp.asarray(expected["latent_z"]))
    best = np.asarray(logits.argmax(-1))
    for row, row_best in zip(ids, best, strict=True):
        assert row[1:] == row_best[: len(row) - 1].tolist()


def test_texts_of_the_model_card(converted, reference_dir, tmp_path):
    """The command a user types, on the two sentences of the model card."""
    texts = tmp_path / "texts.txt"
    texts.write_text(
        "针对电力系统中的混沌振荡对整个互联电网的危害问题,提出了一种基于非线性光滑函数的滑模控制方法.\n"
        "超市面积不算大.挺方便附近的居民购买的. 生活用品也比较齐全.价格适用中.\n",
        encoding="utf-8",
    )
    command = [sys.executable, "-m", "davae_jax.cli", "generate", "--model", converted[0], "--input", texts]
    command += ["--tokenizers", reference_dir / "tokenizers", "--max-length", "32", "--seed", "1"]
    run = subprocess.run(list(map(str, command)), capture_output=True, text=True, cwd=GOLDEN.parents[1])
    assert run.returncode == 0, run.stderr
    results = [json.loads(line) for line in run.stdout.splitlines()]
    assert [r["text"] for r in results] == texts.read_text(encoding="utf-8").splitlines()
    assert all(r["generated"] for r in results)
