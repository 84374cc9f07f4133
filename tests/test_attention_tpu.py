"""The fused attention for TPUs: against the reference on a CPU, on meshes, and compiled for a TPU that is not there."""

import dataclasses
import functools
import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import compiler
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from small_model import CONFIG, new_model

from davae_jax.data.batches import Batch
from davae_jax.model import attention_tpu
from davae_jax.model.attention import causal_mask, relative_attention
from davae_jax.model.davae import split
from davae_jax.parallel.config import MeshConfig
from davae_jax.parallel.sharding import make_mesh
from davae_jax.planning.attention import attention_bytes
from davae_jax.training.config import TrainConfig
from davae_jax.training.flops import AttentionShape
from davae_jax.training.state import init_state
from davae_jax.training.step import make_train_step

fused = functools.partial(attention_tpu.relative_attention, interpret=True)
ROOT = Path(__file__).parent.parent
NAMES = ("output", "dq", "dk", "dv", "dr", "du", "dw")


def inputs(B, N, T, K, H, dtype=jnp.float32):
    """Returns q, k, v, r, u, w and the gradient of the output."""
    shapes = [(B, N, T, H), (B, N, K, H), (B, N, K, H), (N, K, H), (N, H), (N, H), (B, N, T, H)]
    keys = jax.random.split(jax.random.key(0), len(shapes))
    return [jax.random.normal(key, shape, dtype) for key, shape in zip(keys, shapes, strict=True)]


@functools.partial(jax.jit, static_argnums=0)
def _output_and_gradients(attend, arrays, mask):
    *arguments, d_out = arrays
    output, pull = jax.vjp(lambda *x: attend(*x, mask), *arguments)
    return output, *pull(d_out)


def output_and_gradients(attend, arrays, mask):
    return [np.asarray(x, np.float32) for x in _output_and_gradients(attend, arrays, mask)]


def packed_mask(B, T):
    """Rows of two texts and padding, whose queries see no key."""
    ends = np.array([[T // 3, T - 2], [T // 2, T - 70]])[:B]
    segments = 1 + sum(np.arange(T) >= ends[:, i : i + 1] for i in range(2))
    segments = np.where(segments == 3, 0, segments)
    same = (segments[:, :, None] == segments[:, None, :]) & (segments[:, :, None] > 0)
    return jnp.asarray(same[:, None]) & causal_mask(T, T, offset=0)


@pytest.mark.parametrize("kind", ["causal", "memory", "packed"])
def test_it_is_the_reference(kind):
    """T is odd; with a memory, whose first keys hold nothing, there are more keys than queries.

    Both add the same float32 products in other orders: K of them for the output, and for a gradient T · B more, so that
    the relative error, of the largest number of an array, grows as their square root.
    """
    B, N, T, K, H = 2, 1, 131, (260 if kind == "memory" else 131), 8
    mask = packed_mask(B, T) if kind == "packed" else causal_mask(T, K, offset=K - T, first_key=3 if K > T else 0)
    arrays = inputs(B, N, T, K, H)
    bound = 4 * np.finfo(np.float32).eps * np.sqrt(K + B * T)
    for name, a, b in zip(
        NAMES, *(output_and_gradients(x, arrays, mask) for x in (fused, relative_attention)), strict=True
    ):
        assert np.abs(a - b).max() < bound * np.abs(b).max(), name


def test_in_bfloat16_it_is_as_close_to_float32_as_the_reference():
    """Neither rounds more often: the inputs, q plus bias, the probabilities, the scores' gradients and the results."""
    arrays = inputs(2, 1, 131, 131, 8, jnp.bfloat16)
    mask = causal_mask(131, 131, offset=0)
    exact = output_and_gradients(relative_attention, [x.astype(jnp.float32) for x in arrays], mask)
    errors = {}
    for attend in (fused, relative_attention):
        rounded = output_and_gradients(attend, arrays, mask)
        errors[attend] = [np.sqrt(np.mean((a - b) ** 2)) for a, b in zip(rounded, exact, strict=True)]
    for name, a, b in zip(NAMES, errors[fused], errors[relative_attention], strict=True):
        assert 0 < a < 1.5 * b, name


def test_its_gradients_are_those_of_finite_differences():
    """Of the sum of output · weights along a random direction of each argument. A difference has an error of the third
    derivative times step², below 1e-3 here, and of float32's rounding of the sum over 2 · step, 1e-4."""
    arrays, mask, step = inputs(1, 2, 5, 7, 4), causal_mask(5, 7, offset=2, first_key=1), 1 / 64
    *arguments, weights = arrays

    @jax.jit
    def value(*arguments):
        return (fused(*arguments, mask) * weights).sum()

    gradients = jax.jit(jax.grad(value, argnums=range(6)))(*arguments)
    for i, (name, gradient) in enumerate(zip(NAMES[1:], gradients, strict=True)):
        direction = jax.random.normal(jax.random.key(i), gradient.shape)
        ahead, behind = (
            value(*arguments[:i], arguments[i] + sign * step * direction, *arguments[i + 1 :]) for sign in (1, -1)
        )
        slope = float((gradient * direction).sum())
        assert float(ahead - behind) / (2 * step) == pytest.approx(slope, abs=3e-3 * float(jnp.abs(gradient).sum())), (
            name
        )


def test_a_training_step_is_that_of_the_reference(monkeypatch):
    """With dropout of the position features and of the rest, remat, and micro-batches; two steps."""
    shapes = []

    def recorded(q, *arguments):
        shapes.append(q.shape)
        return fused(q, *arguments)

    monkeypatch.setattr(attention_tpu, "relative_attention", recorded)
    decoder = dataclasses.replace(CONFIG.decoder, num_layers=1, embedding_dropout_prob=0.3)
    model = new_model(dataclasses.replace(CONFIG, decoder=decoder), scale=4.0)
    graphdef, params = split(model)
    rng = np.random.default_rng(0)
    ids = rng.integers(4, 50, (4, 12), dtype=np.int32)
    batch = Batch.of_texts(ids, ids, np.array([12, 7, 3, 10], np.int32))
    logs = {}
    for attention in ("xla", "mosaic_tpu"):
        config = TrainConfig(steps=10, batch_size=4, accumulate=2, remat="full", attention=attention)
        step, state = make_train_step(graphdef, config), init_state(jax.tree.map(jnp.copy, params), config)
        for _ in range(2):
            state, values = step(state, batch)
            logs.setdefault(attention, []).append([float(values[name]) for name in ("loss", "rec", "grad_norm")])
    assert set(shapes) == {(2, 2, 11, 8)}
    np.testing.assert_allclose(logs["mosaic_tpu"], logs["xla"], rtol=2e-5)


@pytest.mark.parametrize(("shape", "N"), [((2, 2, 2), 2), ((1, 4, 2), 25)], ids=str)
def test_every_mesh_computes_as_one_device(shape, N):
    """A tensor axis of 2 divides two heads, and leaves 25 whole; the gradients of r and of the biases are sums over the
    texts."""
    B, T, H = 8, 40, 8
    arrays, mask = inputs(B, N, T, T, H), causal_mask(T, T, offset=0)
    expected = output_and_gradients(relative_attention, arrays, mask)
    with jax.set_mesh(make_mesh(MeshConfig(*shape), B)):
        found = output_and_gradients(fused, arrays, mask)
    bound = 4 * np.finfo(np.float32).eps * np.sqrt((B + 1) * T)
    for name, a, b in zip(NAMES, found, expected, strict=True):
        assert np.abs(a - b).max() < bound * np.abs(b).max(), name


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="JAX's TPU package (libtpu) is not installed")
@pytest.mark.parametrize(
    ("chip", "part", "times"),
    [
        ("tpu-v5e", "attention", 6),
        pytest.param("tpu-v6e", "attention", 6, marks=pytest.mark.extended),
        pytest.param("tpu-v5e", "layer", 2.5, marks=pytest.mark.extended),
    ],
)
def test_no_array_of_the_size_of_the_scores_is_in_the_program(chip, part, times, tmp_path):
    """Attention, and the decoder layer, of the published width for a TPU: two kernels, and less memory and traffic.

    What `davae plan` says of attention's traffic is what separates the two, within a third.
    """
    command = [sys.executable, "-m", "benchmarks", "attention", "--chips", chip, "--parts", part]
    command += ["--measured-shape", *map(str, (1, 1, 8, 8, 8)), "--json", tmp_path / "costs.json"]
    env = compiler.own_environment() | {"JAX_PLATFORMS": "cpu"}
    done = subprocess.run(command, capture_output=True, text=True, env=env, cwd=ROOT)
    assert done.returncode == 0, done.stderr[-3000:]
    costs = json.loads((tmp_path / "costs.json").read_text())
    shape = AttentionShape(*costs["machine"]["shape"])
    reference, fused, measured = costs["rows"]
    assert (reference["implementation"], fused["implementation"]) == ("xla", "mosaic_tpu")
    assert fused["kernels"] == 2 and not fused["arrays of the scores' size"]
    assert reference["kernels"] == 0 and reference["arrays of the scores' size"]
    assert fused["GB temporary"] < reference["GB temporary"] / 4
    assert fused["GB moved"] < reference["GB moved"] / times
    planned = [attention_bytes(name, shape, 2, "tpu", backward=True) / 1e9 for name in ("xla", "mosaic_tpu")]
    assert reference["GB moved"] - fused["GB moved"] == pytest.approx(planned[0] - planned[1], rel=1 / 3)
    assert measured["implementation"] == "xla" and measured["value"]["median"] > 0
