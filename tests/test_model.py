"""Tests of the model without golden files: initialization, buffers, dropout, bfloat16, the recurrent memory, jit."""

import os
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from small_model import CONFIG, counted_compilations, new_model

from davae_jax import DAVAEConfig, DecoderConfig, EncoderConfig
from davae_jax.checkpoints.weights import flat_params, flatten
from davae_jax.model import attention, decoder, encoder
from davae_jax.model.davae import abstract_model, merge, split, trainable_mask, weight_axes, zero_buffers
from davae_jax.model.layers import Buffer, dropout, matmul_transposed


@pytest.fixture(scope="module")
def model():
    return new_model()


@pytest.fixture(scope="module")
def inputs():
    rng = np.random.default_rng(0)
    return rng.integers(1, 50, (2, 12)), rng.standard_normal((2, 4)).astype(np.float32)


def test_initialization():
    config = DAVAEConfig(
        encoder=EncoderConfig(
            vocab_size=300, hidden_size=64, num_hidden_layers=3, num_attention_heads=4, intermediate_size=256
        ),
        decoder=DecoderConfig(vocab_size=500, num_layers=4, hidden_size=64, num_attention_heads=4),
        latent_size=32,
    )
    residual = ("attention_out.weight", "mlp_out.weight")
    seen = set()
    for path, weight in flat_params(new_model(config)).items():
        weight = np.asarray(weight)
        if path == "decoder.inv_freq":
            np.testing.assert_allclose(weight, 10000.0 ** (-np.arange(0, 64, 2) / 64), rtol=1e-6)
        elif path.endswith("norm.weight"):
            assert (weight == 1).all(), path
        elif "bias" in path:
            assert (weight == 0).all(), path
        else:
            layers = 3 if path.startswith("encoder") else 4
            stddev = 0.02 / np.sqrt(2 * layers) if path.endswith(residual) else 0.02
            # Five standard errors: that of a standard deviation of n draws is 1/√(2n) of it.
            assert abs(weight.std() / stddev - 1) < 5 / np.sqrt(2 * weight.size), path
            assert abs(weight.mean()) < 5 * stddev / np.sqrt(weight.size), path
            assert weight.tobytes() not in seen  # no two weights share their draws
            seen.add(weight.tobytes())


def test_every_weight_names_its_axes(model):
    axes = flatten(weight_axes(model))
    for path, weight in flat_params(model).items():
        assert len(axes[path]) == weight.ndim, path


def test_published_size():
    """The published model has 1,249,094,657 trained values."""
    model = abstract_model(DAVAEConfig())
    sizes = jax.tree.map(lambda w, is_trained: is_trained and w.size, split(model)[1], trainable_mask(model))
    assert sum(jax.tree.leaves(sizes)) == 1_249_094_657


def test_only_params_are_trained():
    """An optimizer leaves buffers of any name and shape unchanged; weight decay alone would change a matrix."""
    model = new_model()
    model.encoder.table = Buffer(jnp.ones((3, 2)), axes=(None, None))
    graphdef, params = split(model)
    trainable = trainable_mask(merge(graphdef, params))
    buffers = [path for path, is_trained in flatten(trainable).items() if not is_trained]
    assert sorted(buffers) == ["decoder.inv_freq", "encoder.table"]
    assert jax.tree.structure(trainable) == jax.tree.structure(params)

    @jax.jit
    def step(params):
        grads = zero_buffers(trainable, jax.tree.map(jnp.ones_like, params))
        updates, _ = optimizer.update(grads, optimizer.init(params), params)
        return grads, optax.apply_updates(params, zero_buffers(trainable, updates))

    optimizer = optax.adamw(0.1, weight_decay=0.5)
    grads, after = map(flatten, step(params))
    for path, before in flatten(params).items():
        is_buffer = path in buffers
        assert (np.asarray(grads[path]) == (0 if is_buffer else 1)).all()
        assert (np.asarray(after[path]) == np.asarray(before)).all() == is_buffer, path


def test_dropout_function():
    x = jnp.full((400, 500), 3.0)
    y = np.asarray(dropout(x, 0.1, jax.random.key(0)))
    np.testing.assert_allclose(np.unique(y), [0, 3 / 0.9], rtol=1e-6)
    assert abs((y == 0).mean() - 0.1) < 0.004
    assert dropout(x, 0.1, None) is x


def test_dropout_places(model, inputs, monkeypatch):
    """Dropout is applied where the published program applies it, each time with a different key."""
    calls, keys = [], []

    def record(x, rate, key):
        calls.append((x.shape, rate))
        keys.append(tuple(np.asarray(jax.random.key_data(key)).tolist()))
        return x

    monkeypatch.setattr(attention, "dropout", record)
    monkeypatch.setattr(encoder, "dropout", record)
    monkeypatch.setattr(decoder, "dropout", record)
    ids, latent = inputs
    model.encoder(ids, key=jax.random.key(0))
    hidden, probs = ((2, 12, 16), 0.1), ((2, 2, 12, 12), 0.1)
    assert calls == [hidden, probs, hidden, hidden]
    assert len(set(keys)) == 4

    calls.clear(), keys.clear()
    model.decoder(ids, latent, key=jax.random.key(0))
    assert calls == [((12, 16), 0.1), hidden, hidden, hidden, hidden, hidden]
    assert len(set(keys)) == 6


def test_dropout_needs_a_key_and_follows_it(model, inputs):
    ids, latent = inputs
    without, _ = model.decode(ids, latent)
    a, b, repeated = (model.decode(ids, latent, key=jax.random.key(k))[0] for k in (1, 2, 1))
    assert (a == repeated).all() and (a != b).any() and (a != without).any()
    posterior = model.encode(ids)
    assert (model.encode(ids, key=jax.random.key(1)).mean != posterior.mean).any()


def test_bfloat16(model, inputs):
    """Weights and products are bfloat16, the rest stays float32, and the numbers agree to bfloat16's 8 bits."""
    ids, latent = inputs
    graphdef, params = split(new_model(dtype=jnp.bfloat16))
    assert {str(w.dtype) for p, w in flatten(params).items() if p != "decoder.inv_freq"} == {"bfloat16"}
    assert params["decoder"]["inv_freq"].dtype == jnp.float32
    same = merge(graphdef, jax.tree.map(lambda w, t: w.astype(t.dtype), split(model)[1], params))
    posterior, expected = same.encode(ids), model.encode(ids)
    assert posterior.mean.dtype == posterior.logvar.dtype == jnp.float32
    assert np.abs(posterior.mean - expected.mean).max() < 0.02 * np.abs(expected.mean).max()
    logits, memory = same.decode(ids, latent)
    full, _ = model.decode(ids, latent)
    assert logits.dtype == jnp.float32 and memory.hidden[0].dtype == jnp.bfloat16
    assert np.abs(logits - full).max() < 0.03 * np.abs(full).max()


@pytest.mark.parametrize("sizes", [[12], [5, 7], [1] * 12, [3, 1, 8]])
def test_segments_with_memory_equal_the_whole_text(model, inputs, sizes):
    """With the full mask and a memory for all tokens, reading in segments does not change the logits."""
    ids, latent = inputs
    whole, _ = model.decode(ids, latent)
    memory, parts = None, []
    for start, size in zip(np.cumsum([0, *sizes[:-1]]), sizes, strict=True):
        logits, memory = model.decode(ids[:, start : start + size], latent, memory=memory)
        parts.append(logits)
        assert int(memory.length) == start + size
    np.testing.assert_allclose(np.concatenate(parts, axis=1), whole, atol=1e-6)


def test_memory_keeps_the_last_rows_and_compiles_few_programs(inputs):
    config = DAVAEConfig(
        encoder=CONFIG.encoder,
        decoder=DecoderConfig(vocab_size=64, num_layers=1, hidden_size=16, num_attention_heads=2, max_memory_length=40),
        latent_size=4,
    )
    model = new_model(config)
    _, latent = inputs
    ids = np.random.default_rng(1).integers(0, 64, (2, 100))
    memory = None
    with counted_compilations() as compiled:
        for i in range(100):
            _, memory = model.decode(ids[:, i : i + 1], latent, memory=memory)
            assert int(memory.length) == min(i + 1, 40)
    assert memory.capacity == 40 and len(compiled) < 10
    _, at_once = model.decode(ids, latent)
    assert int(at_once.length) == 40
    # The first array is embedding and latent, which do not depend on the memory: the rows of the last 40 tokens.
    np.testing.assert_allclose(memory.hidden[0], at_once.hidden[0], atol=1e-6)


def test_memory_carried_by_a_scan(model, inputs):
    """A memory of fixed shape can be the carry of a scan, and gives the numbers of one that grows."""
    ids, latent = inputs
    graphdef, params = split(model)

    @jax.jit
    def read(params, segments, memory):
        def step(memory, segment):
            logits, memory = merge(graphdef, params).decode(segment, latent, memory=memory, window="published")
            return memory, logits

        return jax.lax.scan(step, memory, segments)

    memory, logits = read(params, np.stack(np.split(ids, 4, axis=1)), model.empty_memory(2))
    assert int(memory.length) == 12 and memory.capacity == 512
    grown = None
    for i, expected in enumerate(logits):
        actual, grown = model.decode(ids[:, 3 * i : 3 * i + 3], latent, memory=grown, window="published")
        np.testing.assert_allclose(actual, expected, atol=1e-6)
    assert int(grown.length) == 12 and grown.capacity == 16
    np.testing.assert_allclose(memory.hidden[1][:, -12:], grown.hidden[1][:, -12:], atol=1e-6)


def test_ids_outside_the_vocabulary_raise(model):
    """JAX would read NaN for them."""
    with pytest.raises(ValueError, match="ids from 1 to 5000; the vocabulary size is 50"):
        model.encode([[1, 2, 5000]])
    with pytest.raises(ValueError, match="ids from -1 to 3; the vocabulary size is 64"):
        model.decode(np.array([[3, -1]]), None)
    with pytest.raises(ValueError, match="length 513, more than the encoder's 512 positions"):
        model.encode(np.ones((1, 513), int))


def test_memory_stops_the_gradient(model, inputs):
    ids, latent = inputs

    def second_segment(latent_of_first):
        _, memory = model.decode(ids[:, :6], latent_of_first)
        return model.decode(ids[:, 6:], latent, memory=memory)[0].sum()

    assert (jax.grad(second_segment)(jnp.asarray(latent)) == 0).all()
    assert second_segment(latent) != second_segment(latent + 1)


def test_model_inside_the_callers_jit(model, inputs):
    """Params pass through jit as plain arrays, and the memory's length may be traced."""
    ids, latent = inputs
    graphdef, params = split(model)
    assert all(isinstance(leaf, jax.Array) for leaf in jax.tree.leaves(params))

    @jax.jit
    def both(params, ids, latent):
        model = merge(graphdef, params)
        _, memory = model.decode(ids[:, :6], latent)
        logits, memory = model.decode(ids[:, 6:], latent, memory=memory)
        return model.encode(ids).mean, logits, memory.length, model.discriminate(latent)

    mean, logits, length, score = both(params, ids, latent)
    np.testing.assert_allclose(mean, model.encode(ids).mean, atol=1e-6)
    np.testing.assert_allclose(logits, model.decode(ids, latent)[0][:, 6:], atol=1e-6)
    np.testing.assert_allclose(score, model.discriminate(latent), atol=1e-6)
    assert int(length) == 12 and score.shape == (2,)


def test_gradient_of_the_few_rows_product():
    """The form with the weight on the left, for few rows, has the gradients of the plain product."""
    rng = np.random.default_rng(0)
    x, w = (jnp.asarray(rng.standard_normal(s), jnp.float32) for s in ((3, 5), (7, 5)))
    few = jax.grad(lambda x, w: (jnp.sin(matmul_transposed(x, w))).sum(), (0, 1))(x, w)
    plain = jax.grad(lambda x, w: (jnp.sin(x @ w.T)).sum(), (0, 1))(x, w)
    for a, b in zip(few, plain, strict=True):
        np.testing.assert_allclose(a, b, atol=1e-6)


def test_nnx_graph_mode_changes_nothing():
    script = (
        "import numpy as np\nfrom small_model import new_model\nfrom davae_jax import generate\nmodel = new_model()\n"
        "print(generate(model, np.ones((1, 4)), max_length=8, top_k=1))\n"
        "print(np.asarray(model.encode([[1, 2]]).mean).tolist())"
    )
    outputs = set()
    for mode in ("true", "false"):
        env = os.environ | {"NNX_GRAPH_MODE": mode, "NNX_GRAPH_UPDATES": mode}
        run = subprocess.run(
            [sys.executable, "-c", script], env=env, cwd=os.path.dirname(__file__), capture_output=True, text=True
        )
        assert run.returncode == 0, run.stderr
        outputs.add(run.stdout)
    assert len(outputs) == 1
