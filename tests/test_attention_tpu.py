"""The fused attention for TPUs: against the reference on a CPU, on meshes, and compiled for a TPU that is not there."""

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

from davae_jax.model import attention_tpu
from davae_jax.model.attention import causal_mask, relative_attention
from davae_jax.parallel.config import MeshConfig
from davae_jax.parallel.sharding import make_mesh

fused = functools.partial(attention_tpu.relative_attention, interpret=True)
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


@pytest.mark.parametrize("shape", [(2, 2, 2), (1, 8, 1)], ids=str)
def test_every_mesh_computes_as_one_device(shape):
    """Two heads are divided by a tensor axis of 2; the gradients of r and of the biases are sums over the texts."""
    B, N, T, H = 8, 2, 40, 8
    arrays, mask = inputs(B, N, T, T, H), causal_mask(T, T, offset=0)
    expected = output_and_gradients(relative_attention, arrays, mask)
    with jax.set_mesh(make_mesh(MeshConfig(*shape), B)):
        found = output_and_gradients(fused, arrays, mask)
    bound = 4 * np.finfo(np.float32).eps * np.sqrt((B + 1) * T)
    for name, a, b in zip(NAMES, found, expected, strict=True):
        assert np.abs(a - b).max() < bound * np.abs(b).max(), name


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="JAX's TPU package (libtpu) is not installed")
@pytest.mark.parametrize("topology", ["v5e:2x2", pytest.param("v6e:2x2", marks=pytest.mark.extended)])
def test_no_array_of_the_size_of_the_scores_is_in_the_program(topology):
    """Compiled for a TPU at the decoder's published width: two kernels, and a sixth of the reference's memory."""
    here = Path(__file__).parent
    env = compiler.own_environment() | {"JAX_PLATFORMS": "cpu", "TPU_SKIP_MDS_QUERY": "1"}
    done = subprocess.run(
        [sys.executable, here / "compile_attention.py", topology],
        capture_output=True,
        text=True,
        cwd=here.parent,
        env=env,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    programs = json.loads(done.stdout.splitlines()[-1])
    fused, reference = programs["mosaic_tpu"], programs["xla"]
    assert fused["kernels"] == 2 and not fused["arrays_of_scores"]
    assert reference["kernels"] == 0 and reference["arrays_of_scores"]
    assert fused["temporary_bytes"] < reference["temporary_bytes"] / 4
    assert fused["bytes"] < reference["bytes"] / 6
