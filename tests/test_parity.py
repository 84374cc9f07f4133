"""`convert.parity`: correct checkpoints agree, and a module with a wrong weight is named."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest

torch = pytest.importorskip("torch")

from davae_jax.checkpoints.pretrained import from_pretrained
from davae_jax.checkpoints.published.from_torch import convert
from davae_jax.checkpoints.weights import flatten, unflatten
from davae_jax.cli.base import run_command
from davae_jax.cli.parity import Parity
from davae_jax.model.config import DAVAEConfig
from davae_jax.model.davae import merge, split
from davae_jax.parity import compare as parity
from davae_jax.parity import module_values
from davae_jax.utils.errors import InputError

GOLDEN = Path(__file__).parent / "golden"
SMALL = GOLDEN / "small"


def command(*argv):
    """`python -m convert.parity`, in this process."""
    return run_command(lambda: Parity, [str(word) for word in argv], "convert.parity")


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """The model of golden/small, and what the twin computes with it."""
    gradients = tmp_path_factory.mktemp("gradients")
    config = DAVAEConfig.from_json(SMALL / "config.json")
    batch = module_values.make_inputs(config, batch_size=2, length=48, seed=0)
    return from_pretrained(SMALL), batch, module_values.twin_values(SMALL, config, batch, gradients), gradients


@pytest.fixture(scope="module")
def converted(tmp_path_factory):
    return convert(SMALL, tmp_path_factory.mktemp("converted") / "small")


def altered(model, path, change):
    graphdef, params = split(model)
    flat = flatten(params)
    flat[path] = change(flat[path])
    return merge(graphdef, unflatten(flat))


# Correct checkpoints


def test_small_agrees_gradients_included(small):
    model, batch, twin, gradients = small
    report = parity.check_model(model, batch, twin, gradients=gradients)
    assert report.ok and report.first_difference is None
    names = [check.module for check in report.checks]
    assert len(set(names)) == len(names) == 50
    assert names[:4] == ["encoder embeddings", *(f"encoder layer {i}" for i in range(3))]
    expected = {"decoder layer 2", "memory, published mask", "gradient of decoder layer 2", parity.ZERO_GRADIENTS}
    assert expected < set(names)
    assert sum(check.isolated is not None for check in report.checks) == 16
    assert parity.format_report(report).endswith("\nall 50 modules agree")
    # The differences are neither all 0 nor near the tolerances, and none is NaN.
    assert 0 < max(check.end_to_end / check.allowed for check in report.checks) < 0.5
    assert all(np.isfinite(check.end_to_end) for check in report.checks)


@pytest.fixture
def one_loss(monkeypatch):
    """Fewer programs to compile, for tests that are about something else."""
    monkeypatch.setattr(module_values, "LOSSES", {"loss": (1, True)})


def test_memory_agrees(one_loss):
    """Old rows fall out of this memory, and the file lacks the frequencies."""
    assert parity.compare(GOLDEN / "memory", gradients=False).ok


def test_converted_checkpoint_by_command(converted, capsys):
    assert command(converted, "--no-gradients") == 0
    output = capsys.readouterr().out.splitlines()
    assert output[-1] == f"all {len(output) - 2} modules agree"
    assert all(line.endswith(" ok") for line in output[1:-1])


def test_bfloat16_agrees_within_its_own_tolerances(converted, one_loss, monkeypatch):
    monkeypatch.setattr(module_values, "NUM_SEGMENTS", 2)
    report = parity.compare(converted, dtype="bfloat16", gradients=False)
    assert report.ok
    logits = next(check for check in report.checks if check.module == "logits")
    assert logits.end_to_end > 1e-2  # it really computed in bfloat16


# Differences


@pytest.mark.parametrize(
    "path, module",
    {
        "encoder.word.weight": "encoder embeddings",
        "encoder.norm.bias": "encoder embeddings",
        "encoder.layers.2.key.weight": "encoder layer 2",
        "encoder.layers.0.mlp_out.bias": "encoder layer 0",
        "encoder.pooler.weight": "pooled",
        "encoder.posterior.weight": "posterior mean",
        "decoder.embedding.weight": "decoder input",
        "decoder.latent_projection.weight": "decoder input",
        "decoder.r_r_bias": "decoder layer 0",
        "decoder.inv_freq": "decoder layer 0",
        "decoder.layers.1.qkv_bias": "decoder layer 1",
        "decoder.layers.1.relative.weight": "decoder layer 1",
        "decoder.layers.2.mlp_in.weight": "decoder layer 2",
        "decoder.norm.weight": "final norm",
        "discriminator.output.weight": "discriminator",
    }.items(),
)
def test_altered_weight_is_named(small, path, module):
    model, batch, twin, _ = small
    rng = np.random.default_rng(0)
    wrong = altered(model, path, lambda x: x + 0.1 * np.float32(rng.standard_normal(x.shape)))
    report = parity.check_model(wrong, batch, twin)
    assert not report.ok
    assert report.first_difference.module == module
    line = parity.format_report(report).splitlines()[-1]
    assert line.startswith(f"first difference: {module} (")


def test_nan_is_a_difference(small):
    model, batch, twin, _ = small
    wrong = altered(model, "decoder.layers.1.mlp_out.bias", lambda x: x.at[0].set(np.nan))
    assert parity.check_model(wrong, batch, twin).first_difference.module == "decoder layer 1"


def test_wrong_gradient_is_named(small, tmp_path):
    model, batch, twin, gradients = small
    shutil.copytree(gradients, tmp_path, dirs_exist_ok=True)
    wrong = tmp_path / "vae_model.decoder.transformer.layers.1.mlp.dense_4h_to_h.bias.npy"
    np.save(wrong, np.load(wrong) * 1.01)
    report = parity.check_model(model, batch, twin, gradients=tmp_path)
    assert [check.module for check in report.checks if not check.ok] == ["gradient of decoder layer 1"]
    line = parity.format_report(report).splitlines()[-1]
    assert line.startswith("first difference: gradient of decoder layer 1 (decoder.layers.1.mlp_out.bias: ")


def test_checkpoint_against_another_by_command(tmp_path, capsys):
    """A file with one wrong tensor, compared with the correct file."""
    state = torch.load(SMALL / "pytorch_model.bin", weights_only=True)
    state["vae_model.decoder.transformer.layers.1.attention.dense.weight"][0] += 0.1
    torch.save(state, tmp_path / "pytorch_model.bin")
    shutil.copyfile(SMALL / "config.json", tmp_path / "config.json")
    assert command(tmp_path, "--against", SMALL, "--no-gradients") == 1
    output = capsys.readouterr().out.splitlines()
    assert output[-1].startswith("first difference: decoder layer 1 (in isolation ")
    ends = {line[:15]: line.split()[-1] for line in output}
    assert (ends["encoder layer 2"], ends["decoder layer 0"], ends["decoder layer 1"]) == ("ok", "ok", "DIFFERS")


def test_first_difference_is_where_it_happens():
    """Accumulated rounding of an earlier module does not hide a module that is wrong in isolation."""
    drift = parity.Check("decoder layer 5", 2.0, 1.0, 0.1, 1.0)
    fault = parity.Check("decoder layer 9", 3.0, 1.0, 2.0, 1.0)
    loss = parity.Check("loss", 2.0, 1.0)
    fine = parity.Check("logits", 0.5, 1.0, 0.1, 1.0)
    assert parity.Report([drift, fault, loss]).first_difference is fault
    report = parity.Report([fine, drift, loss])
    assert report.first_difference is drift
    assert parity.format_report(report).endswith(
        "first difference: decoder layer 5 (end to end 2.0e+00, allowed 1.0e+00; no module differs in isolation)"
    )
    assert parity.Report([fine, loss]).first_difference is loss
    assert parity.Report([fine]).first_difference is None


def test_free_bits_of_dimensions_that_rounding_moves_over_the_target(small):
    """A KL of 1.0001 here and 0.9999 there: the KL agrees, and so does the loss."""
    model, _, twin, _ = small
    target = model.config.dim_target_kl
    kl = twin[module_values.KL_PER_DIM].copy()
    kl[0, 0], kl[1, 1] = target - 1e-6, target + 1e-6
    other = kl.copy()
    other[0, 0], other[1, 1] = target + 1e-6, target - 1e-6
    for name, (fb_mode, _) in module_values.LOSSES.items():
        moved = parity._apply_free_bits_mask(twin | {module_values.KL_PER_DIM: kl}, other, target)[name] - twin[name]
        np.testing.assert_allclose(moved, 0, atol=1e-4)  # one dimension in, one out
        other[0, 0] = target - 1e-6
        moved = parity._apply_free_bits_mask(twin | {module_values.KL_PER_DIM: kl}, other, target)[name] - twin[name]
        np.testing.assert_allclose(moved, [0, -target / 2, -target / 2] if fb_mode == 1 else 0, atol=1e-4)
        other[0, 0] = target + 1e-6


def test_largest_difference():
    zeros = np.zeros(3)
    assert parity._largest_difference(zeros, zeros, zeros) == 0
    assert parity._largest_difference(zeros + 1, zeros, zeros) == np.inf
    assert parity._largest_difference(zeros, zeros[:2]) == np.inf
    assert parity._largest_difference(zeros[:0], zeros[:0]) == 0
    assert np.isnan(parity._largest_difference(np.array([0, np.nan]), zeros[:2]))
    assert parity._largest_difference(np.array([1.0, 4.0]), np.array([2.0, 2.0]), 4.0) == 0.5


# Inputs


def test_inputs(small):
    batch = small[1]
    config = small[0].config
    lengths = (batch.encoder_ids > 0).sum(1)
    assert lengths[0] == 48 > lengths[1] >= 24
    pads = batch.decoder_ids == config.end_token_id
    assert pads.any() and not pads[0].any()
    assert (np.diff(pads, axis=1) >= 0).all()  # padding comes last
    assert not (batch.segment_ids == config.end_token_id).any()
    other = module_values.make_inputs(config, 2, 48, seed=1)
    assert (other.decoder_ids != batch.decoder_ids).any()
    assert all((a == b).all() for a, b in zip(module_values.make_inputs(config, 2, 48, 0), batch, strict=True))


@pytest.mark.parametrize(
    "options, message, code",
    [
        (["--length", "2"], "--length must be 3 to 64", 2),
        (["--length", "65"], "--length must be 3 to 64", 2),
        (["--batch-size", "0"], "--batch-size must be at least 1", 2),
        (["--dtype", "float16"], "--dtype", 2),
        (["--against", GOLDEN / "memory"], "shapes differ", 1),
        (["--against", "no/such/folder"], "no/such/folder: no such folder", 1),
    ],
)
def test_invalid_options_are_named(options, message, code, capsys):
    assert command(SMALL, *options) == code
    error = capsys.readouterr().err.strip()
    assert message in error and "Traceback" not in error


def test_a_folder_without_weights(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(json.loads((SMALL / "config.json").read_text())))
    with pytest.raises(InputError, match=str(tmp_path)):
        parity.compare(tmp_path)
