"""Weights in int8 and bfloat16: their errors, products with them, models that have them, and how they are loaded."""

import contextlib
import io
import json
import os

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P
from small_model import new_model
from tokenizer_fixtures import sentences

from davae_jax import InputError, TextVAE, from_pretrained, generate
from davae_jax.checkpoints.published.to_torch import export
from davae_jax.checkpoints.run_folder import PARAMS_FOLDER
from davae_jax.checkpoints.sums import array_sums
from davae_jax.checkpoints.weights import flat_params, flatten, save_weights, unflatten
from davae_jax.cli.main import main
from davae_jax.model import quantized
from davae_jax.model.davae import merge, split
from davae_jax.model.layers import matmul_transposed
from davae_jax.model.quantized import QuantizedWeight, is_quantized, quantize
from davae_jax.parallel.config import MeshConfig
from davae_jax.parallel.sharding import make_mesh
from davae_jax.training.run.checkpointer import Checkpoints
from davae_jax.training.state import TrainState
from davae_jax.utils.errors import OptionError

U = 2.0**-24  # the unit roundoff of float32
FORMATS = ["bfloat16", "int8"]
ENCODER_IDS, DECODER_IDS = np.array([[5, 6, 7, 0], [8, 9, 10, 11]]), np.array([[62, 5, 9, 30], [62, 7, 1, 2]])


def in_format(model, weights):
    """Returns a model in memory as `from_pretrained` returns it from a folder."""
    flat = {
        path: quantize(np.asarray(w), weights) if is_quantized(path, w.shape) else w
        for path, w in flat_params(model).items()
    }
    return merge(split(model)[0], unflatten(jax.tree.map(jnp.asarray, flat)))


def dequantized(model):
    """Returns the model with its quantized weights as arrays."""
    graphdef, params = split(model)
    is_weight = lambda x: isinstance(x, QuantizedWeight)  # noqa: E731
    return merge(graphdef, jax.tree.map(lambda w: w.astype(jnp.float32), params, is_leaf=is_weight))


@pytest.fixture(scope="module")
def models():
    """For each format the quantized model and the float32 model of the same weights."""
    original = new_model(scale=12)
    stored = {weights: in_format(original, weights) for weights in FORMATS}
    return {weights: (model, dequantized(model)) for weights, model in stored.items()}


def normal(*shape, seed=0):
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


@pytest.mark.parametrize("dtype", [np.float16, np.float32])
def test_the_error_of_a_channel_is_half_its_scale(dtype):
    w = (normal(3, 70, 16) * np.geomspace(1e-3, 1e3, 70)[:, None]).astype(dtype)
    w[1, 5] = 0
    stored = quantize(w, "int8")
    assert (stored.values.dtype, stored.scale.dtype) == (np.int8, np.float32)
    np.testing.assert_array_equal(stored.scale, np.abs(w.astype(np.float32)).max(-1) / np.float32(127))
    assert (np.abs(stored.values).max(-1)[stored.scale > 0] == 127).all() and not stored.values[1, 5].any()
    error = np.abs(w.astype(np.float64) - stored.values * stored.scale[..., None].astype(np.float64))
    # w / scale, up to 127, has been rounded once before it was rounded to an integer.
    assert (error <= stored.scale[..., None] * (0.5 + 127 * U)).all()
    assert (error > 0.49 * stored.scale[..., None]).any()


def test_bfloat16_is_the_nearest():
    w = normal(70, 16)
    stored = quantize(w, "bfloat16")
    np.testing.assert_array_equal(stored.values.view(ml_dtypes.bfloat16), w.astype(ml_dtypes.bfloat16))
    np.testing.assert_array_equal(stored.astype(np.float32), w.astype(ml_dtypes.bfloat16).astype(np.float32))
    assert stored.scale is None and stored.nbytes == w.nbytes / 2


@pytest.mark.parametrize("rows", [1, 2, 8, 17])
@pytest.mark.parametrize("weights", FORMATS)
def test_products_are_those_of_the_stored_weight(weights, rows, monkeypatch):
    """More output channels than a block has, and not a multiple."""
    monkeypatch.setattr(quantized, "SMALL_BLOCK", 640 * 24)
    monkeypatch.setattr(quantized, "BLOCK_OF_EACH_CORE", 640 * 24 // (os.cpu_count() or 1))
    stored = quantize(normal(3, 500, 24), weights)
    x = normal(rows, 1, 24, seed=1)
    if weights == "int8":
        exact_weight = stored.values * stored.scale[..., None].astype(np.float64)
    else:
        exact_weight = stored.values.view(ml_dtypes.bfloat16).astype(np.float64)
    expected = np.tensordot(x.astype(np.float64), exact_weight, (-1, -1))
    # A sum of 24 products, in any order, then the scale and the output: 24 + 2 roundings of at most Σ |x| |w|.
    bound = 26 * U * np.tensordot(np.abs(x), np.abs(exact_weight), (-1, -1))
    weight = jax.tree.map(jnp.asarray, stored)
    on_cpu = jax.jit(matmul_transposed)(x, weight)
    elsewhere = np.asarray(quantized._dot(x, weight.values)) * (1 if stored.scale is None else stored.scale)
    for found in (on_cpu, elsewhere):
        assert found.shape == (rows, 1, 3, 500) and found.dtype == np.float32
        assert (np.abs(found - expected) <= bound).all()


def test_products_in_bfloat16_add_in_float32():
    stored = jax.tree.map(jnp.asarray, quantize(normal(40, 300), "int8"))
    x = jnp.asarray(normal(2, 300, seed=1), jnp.bfloat16)
    found = matmul_transposed(x, stored)
    exact = np.asarray(x, np.float64) @ (np.asarray(stored.values, np.float64) * np.asarray(stored.scale)[:, None]).T
    assert found.dtype == jnp.bfloat16
    # The result is rounded to 8 significant bits; the sums' roundings are too small to matter but for ties.
    np.testing.assert_allclose(np.asarray(found, np.float64), exact, rtol=2.0**-8, atol=1e-3)
    assert matmul_transposed(x, stored, out_dtype=jnp.float32).dtype == jnp.float32


@pytest.mark.parametrize("platform", ["cpu", "cuda", "tpu"])
def test_only_a_cpu_computes_block_by_block(platform):
    weight = jax.tree.map(jnp.asarray, quantize(normal(70, 16), "int8"))
    lowered = jax.jit(matmul_transposed).trace(normal(1, 16), weight).lower(lowering_platforms=(platform,))
    assert ("stablehlo.while" in lowered.as_text()) == (platform == "cpu")


@pytest.mark.parametrize("weights", FORMATS)
def test_rows_of_an_embedding(weights, models):
    stored, plain = (model.decoder.embedding for model in models[weights])
    ids = np.array([[3, 0], [63, 3]])
    np.testing.assert_array_equal(stored(ids), plain(ids))
    np.testing.assert_array_equal(stored(ids[0]), plain(ids)[0])


def test_what_is_quantized(models):
    flat = flat_params(models["int8"][0])
    kept = {path for path, w in flat.items() if not isinstance(w, QuantizedWeight) and w.ndim > 1}
    assert kept == {
        *["encoder.posterior.weight", "discriminator.hidden.weight", "discriminator.output.weight"],
        *["decoder.r_w_bias", "decoder.r_r_bias", "decoder.layers.0.qkv_bias", "decoder.layers.1.qkv_bias"],
    }
    assert flat["decoder.layers.0.qkv_weight"].scale.shape == (3, 16)
    assert flat["decoder.embedding.weight"].scale.shape == (64,)
    for path, plain in flat_params(models["int8"][1]).items():
        w, half = flat[path], flat_params(models["bfloat16"][0])[path]
        if path in kept or plain.ndim == 1:
            assert w.nbytes == half.nbytes == plain.nbytes and w.dtype == np.float32
        else:
            assert (w.nbytes, half.nbytes) == (plain.size + 4 * plain.size // plain.shape[-1], 2 * plain.size)


@pytest.mark.parametrize("weights", FORMATS)
def test_a_model_computes_with_what_is_stored(weights, models):
    stored, plain = models[weights]
    latent = normal(2, 4)
    for found, expected in [
        (stored.encode(ENCODER_IDS), plain.encode(ENCODER_IDS)),
        (stored.decode(DECODER_IDS, latent)[0], plain.decode(DECODER_IDS, latent)[0]),
    ]:
        found, expected = np.asarray(found), np.asarray(expected)
        np.testing.assert_allclose(found, expected, rtol=0, atol=1e-5 * np.abs(expected).max())
    _, memory = stored.decode(DECODER_IDS, latent)
    assert stored.decode(DECODER_IDS, latent, memory=memory)[0].shape == (2, 4, 64)
    assert stored.empty_memory(2).hidden[0].shape[2] == 16


@pytest.mark.parametrize("weights", FORMATS)
def test_greedy_texts_are_those_of_the_dequantized_model(weights, models):
    latent = normal(3, 4, seed=2)
    prompts = [[62], [62, 4, 5], [62, 9]]
    texts = [generate(model, latent, prompts, max_length=24, top_k=1) for model in models[weights]]
    assert texts[0] == texts[1] and len({tuple(ids) for ids in texts[0]}) == 3


def assert_same_weights(found, expected):
    found, expected = flat_params(found), flat_params(expected)
    assert found.keys() == expected.keys()
    for path, w in expected.items():
        assert type(found[path]) is type(w), path
        jax.tree.map(np.testing.assert_array_equal, found[path], w)


@pytest.mark.parametrize("weights", FORMATS)
@pytest.mark.parametrize("published", [False, True])
def test_loading(weights, published, tiny_checkpoint, tiny_vae, tmp_path, monkeypatch):
    """Weight by weight: no array of the model's is in memory in float32 but those that stay so."""
    monkeypatch.setattr("davae_jax.checkpoints.weights.WEIGHT_BYTES", 1)
    folder = tiny_checkpoint
    if published:
        folder = export(folder, tmp_path / "published", dtype="float32", format="safetensors")
    model = from_pretrained(folder, weights=weights)
    assert_same_weights(model, in_format(tiny_vae.model, weights))
    assert model.decoder.layers[0].dtype == np.float32


def test_loading_a_run_checks_its_sums(tiny_checkpoint, tiny_vae, tmp_path, monkeypatch):
    (tmp_path / "config.json").write_bytes((tiny_checkpoint / "config.json").read_bytes())
    state = TrainState(jnp.int32(1), split(tiny_vae.model)[1], (jnp.ones(3),), (jnp.zeros(()),), {}, {})
    with Checkpoints(tmp_path, keep=2) as checkpoints:
        checkpoints.save(state)
        checkpoints.wait()
        assert_same_weights(from_pretrained(tmp_path, weights="int8"), in_format(tiny_vae.model, "int8"))
        sums = array_sums(flatten({"params": state.params})) | {"step": jnp.uint32(2)}
        wrong = sums | {"params.decoder.embedding.weight": jnp.uint32(1)}
        monkeypatch.setattr("davae_jax.training.run.checkpointer.array_sums", lambda arrays: wrong)
        checkpoints.save(state._replace(step=jnp.int32(2)))
    with pytest.raises(InputError, match=r"2: checksum mismatch in decoder\.embedding\.weight"):
        from_pretrained(tmp_path, weights="int8")


def test_a_mesh_shards_values_and_scales(tiny_checkpoint):
    latent = normal(8, 4)
    mesh = make_mesh(MeshConfig(2, 2, 2), 8)
    alone, together = (from_pretrained(tiny_checkpoint, weights="int8", mesh=where) for where in (None, mesh))
    assert_same_weights(together, alone)
    weights = flat_params(together)
    specs = lambda path: (weights[path].values.sharding.spec, weights[path].scale.sharding.spec)  # noqa: E731
    assert specs("decoder.embedding.weight") == (P("tensor", "fsdp"), P("tensor"))
    assert specs("decoder.layers.0.qkv_weight") == (P(None, "tensor", "fsdp"), P(None, "tensor"))
    assert specs("decoder.layers.0.mlp_out.weight") == (P("fsdp", "tensor"), P(None))  # as its bias
    texts = [generate(model, latent, max_length=12, top_k=1) for model in (alone, together)]
    assert texts[0] == texts[1] and len({tuple(ids) for ids in texts[0]}) > 3


def test_other_formats_are_refused(tiny_checkpoint):
    for load in (from_pretrained, TextVAE.from_pretrained):
        with pytest.raises(OptionError) as e:
            load(tiny_checkpoint, weights="int4")
        assert (e.value.option, e.value.exit_code) == ("weights", 2)


def test_quantized_weights_are_not_saved(models, tmp_path):
    with pytest.raises(InputError, match=r"params: quantized weights cannot be saved, such as decoder\.embedding"):
        save_weights(tmp_path / "params", [flat_params(models["int8"][0])], {})
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("value", [np.nan, np.inf])
@pytest.mark.parametrize("weights", FORMATS)
def test_values_that_are_not_finite_are_named(weights, value, tiny_checkpoint, tiny_vae, tmp_path):
    (tmp_path / "config.json").write_bytes((tiny_checkpoint / "config.json").read_bytes())
    flat = flat_params(tiny_vae.model)
    flat["decoder.embedding.weight"] = flat["decoder.embedding.weight"].at[3, 1].set(value)
    save_weights(tmp_path / PARAMS_FOLDER, [flat], {"buffers": []})
    with pytest.raises(InputError, match=r"decoder\.embedding\.weight contains NaN, infinity, or "):
        from_pretrained(tmp_path, weights=weights)


def test_the_command(tiny_checkpoint):
    text = sentences(1)[0]
    with contextlib.redirect_stdout(io.StringIO()) as out:
        assert main(["reconstruct", text, "--model", str(tiny_checkpoint), "--weights", "int8"]) == 0
    expected = TextVAE.from_pretrained(tiny_checkpoint, weights="int8").reconstruct([text])[0]
    assert json.loads(out.getvalue()) == {"text": text, "reconstruction": expected}
