"""The parity command: agreeing models agree, and one altered weight is named where it stands."""

import subprocess
import sys

import jax.numpy as jnp
import numpy as np
import pytest
from conftest import GOLDEN

pytest.importorskip("torch")

from convert import parity
from convert.from_torch import convert
from davae_jax.checkpoint import flatten, from_pretrained, unflatten
from davae_jax.model import merge, split


@pytest.fixture(scope="module")
def twin(tmp_path_factory):
    """What the twin of golden/small computes, with its gradients in a folder."""
    model = from_pretrained(GOLDEN / "small")
    batch = parity.make_batch(model.config, 2, 12, 0)
    gradients = tmp_path_factory.mktemp("gradients")
    return model, batch, parity.run_twin(GOLDEN / "small", model.config, batch, gradients), gradients


def test_golden_models_agree(twin):
    model, batch, values, gradients = twin
    report = parity.check_model(model, batch, values, "float32", gradients)
    assert report.ok and report.first_difference is None, parity.format_report(report)
    modules = [check.module for check in report.checks]
    for module in ("encoder layer 2", "posterior mean", "decoder layer 2", "logits", "segment 2, published mask"):
        assert module in modules
    assert sum(module.startswith("gradient of") for module in modules) >= 12
    assert parity.format_report(report).splitlines()[-1] == f"all {len(modules)} modules agree"


@pytest.mark.parametrize(
    ("path", "module"),
    [
        ("encoder.norm.bias", "encoder embeddings"),
        ("encoder.layers.1.mlp_in.weight", "encoder layer 1"),
        ("encoder.posterior.weight", "posterior mean"),
        ("decoder.latent_projection.weight", "decoder input"),
        ("decoder.layers.1.qkv_weight", "decoder layer 1"),
        ("decoder.norm.weight", "final norm"),
        ("discriminator.hidden.bias", "discriminator"),
    ],
)
def test_an_altered_weight_is_named(twin, path, module):
    model, batch, values, _ = twin
    graphdef, params = split(model)
    flat = flatten(params)
    report = parity.check_model(merge(graphdef, unflatten(flat | {path: flat[path] + 0.01})), batch, values)
    assert not report.ok
    assert report.first_difference.module == module
    assert f"first difference: {module}" in parity.format_report(report).splitlines()[-1]


def test_nan_is_a_difference(twin):
    model, batch, values, _ = twin
    graphdef, params = split(model)
    flat = flatten(params)
    broken = flat | {"decoder.layers.0.mlp_out.bias": jnp.full_like(flat["decoder.layers.0.mlp_out.bias"], np.nan)}
    report = parity.check_model(merge(graphdef, unflatten(broken)), batch, values)
    assert report.first_difference.module == "decoder layer 0"


def test_command(tmp_path):
    """On a converted checkpoint, whose twin gets its weights from it; and on a folder that is none."""
    convert(GOLDEN / "memory", tmp_path / "converted")
    command = [sys.executable, "-m", "davae_jax.cli", "parity", "--no-gradients", "--length", "12"]
    run = subprocess.run([*command, tmp_path / "converted"], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    assert run.stdout.splitlines()[-1].endswith("modules agree")
    run = subprocess.run([*command, tmp_path], capture_output=True, text=True)
    assert run.returncode == 1
    assert (
        run.stderr
        == f"davae parity: error: {tmp_path}/config.json: no such file; a model folder needs its config.json\n"
    )


@pytest.mark.slow
def test_published_size(full_checkpoint):
    """All modules, gradients included, of 1.2 B values; in a process of its own for the sake of memory."""
    command = [sys.executable, "-m", "davae_jax.cli", "parity", full_checkpoint]
    run = subprocess.run(command, capture_output=True, text=True)
    print(run.stdout)
    assert run.returncode == 0, run.stdout + run.stderr
    assert run.stdout.splitlines()[-1].endswith("modules agree")
