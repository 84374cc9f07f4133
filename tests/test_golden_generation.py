"""Compares sampling and generation with the published program: probabilities, drawn ids, greedy continuations."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from davae_jax import generate
from davae_jax.inference import decoding
from davae_jax.inference.sampling import next_token_probs
from davae_jax.model.davae import merge, split

FILTERS = [
    dict(top_k=0, top_p=0.9, temperature=1.0, repetition_penalty=1.0),
    dict(top_k=10, top_p=0.0, temperature=1.0, repetition_penalty=1.0),
    dict(top_k=10, top_p=0.7, temperature=0.8, repetition_penalty=1.0),
    dict(top_k=0, top_p=0.5, temperature=1.3, repetition_penalty=1.3),
    dict(top_k=1, top_p=0.0, temperature=1.0, repetition_penalty=1.2),
    dict(top_k=0, top_p=0.0, temperature=0.7, repetition_penalty=2.0),
]


@pytest.mark.parametrize("name", ["small", "memory"])
@pytest.mark.parametrize("settings", FILTERS, ids=str)
def test_next_token_probs(golden_arrays, name, settings):
    io = golden_arrays(name)
    k, p, t, rp = (settings[n] for n in ("top_k", "top_p", "temperature", "repetition_penalty"))
    probs = next_token_probs(io["filter_logits"], io["filter_prev_tokens"], **settings)
    assert np.abs(probs - io[f"probs_k{k}_p{p}_T{t}_rp{rp}"]).max() <= 1e-6


@functools.partial(jax.jit, static_argnums=0)
def cached_logits(graphdef, params, latent, tokens):
    """Returns the logits [T, B, V] after each token, computed one token at a time with the cache."""
    decoder = merge(graphdef, params).decoder
    batch, length = tokens.shape
    relative_keys = decoding.all_relative_keys(decoder, length)

    def step(cache, position):
        ids = lax.dynamic_slice_in_dim(tokens, position, 1, axis=1)
        final, cache = decoding.cached_step(decoder, ids, decoder.latent_term(latent), cache, relative_keys, position)
        return cache, decoder.logits(final[:, 0])

    return lax.scan(step, decoding.empty_cache(decoder, batch, length), jnp.arange(length))[1]


@pytest.mark.parametrize("name", ["small", "memory"])
@pytest.mark.parametrize("run", ["sampled_nucleus", "sampled_topk_temp", "sampled_nucleus_penalty", "sampled_plain"])
def test_sampled_trajectories(load_model, golden_arrays, golden_json, name, run):
    """With the ids that the published program drew as input, each step has its probability, entropy and support."""
    model, latent = load_model(name), golden_arrays(name)["latent_z"]
    golden = golden_json(name, "generation.json")[run]
    tokens = np.array(golden["tokens"], np.int32)
    settings = dict(
        temperature=golden["settings"].get("t", 1.0),
        top_k=golden["settings"].get("top_k", 0),
        top_p=golden["settings"].get("top_p", 0.0),
        repetition_penalty=golden["settings"].get("rp", 1.0),
    )
    cached = cached_logits(*split(model), latent, tokens)
    uncached, _ = model.decode(tokens, latent)
    assert np.abs(cached - np.swapaxes(uncached, 0, 1)).max() <= 1e-4

    start = min(map(len, golden["prompts"]))
    assert len(golden["drawn"]) == tokens.shape[1] - start
    rows = np.arange(len(tokens))
    for step, drawn in enumerate(golden["drawn"]):
        # The shape is the same at every step, for a single compilation; later ids have weight 0.
        context = jnp.arange(tokens.shape[1]) < start + step
        probs = np.asarray(probs_of(cached[start + step - 1], tokens, context, settings), np.float64)
        assert np.abs(probs[rows, drawn] - golden["prob"][step]).max() <= 1e-6
        entropy = -(probs * np.log(np.where(probs > 0, probs, 1))).sum(-1)
        assert np.abs(entropy - golden["entropy"][step]).max() <= 1e-4
        assert np.abs((probs > 0).sum(-1) - golden["support"][step]).max() <= 1


@functools.partial(
    jax.jit, compiler_options={"xla_backend_optimization_level": 3, "xla_llvm_disable_expensive_passes": False}
)
def probs_of(logits, tokens, context, settings):
    from davae_jax.inference.sampling import count_ids, filter_logits, penalized_log_probs

    filtered = filter_logits(logits / settings["temperature"], settings["top_k"], settings["top_p"])
    counts = count_ids(tokens, jnp.broadcast_to(context, tokens.shape), logits.shape[-1])
    return jnp.exp(penalized_log_probs(filtered, counts, settings["repetition_penalty"]))


@pytest.mark.parametrize("name", ["small", "memory"])
@pytest.mark.parametrize("prompts", ["plain", "unequal"])
def test_greedy(load_model, golden_arrays, golden_json, name, prompts):
    golden = golden_json(name, "generation.json")
    expected = golden[f"greedy_{prompts}"]
    ids = generate(
        load_model(name),
        golden_arrays(name)["latent_z"],
        golden[f"prompts_{prompts}"],
        max_length=len(expected[0]),
        top_k=1,
    )
    assert ids == expected


def test_rows_that_end_at_different_times(load_model, golden_json):
    golden = golden_json("ending", "generation.json")
    ids = generate(load_model("ending"), np.array(golden["latent"]), golden["prompts"], max_length=32, top_k=1)
    assert ids == golden["greedy"]
