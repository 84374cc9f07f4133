"""Tests of generation without golden files: compiled programs, independence of rows, sampling, errors."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from small_model import counted_compilations, new_model

from davae_jax import InputError, from_pretrained, generate
from davae_jax.checkpoints.weights import flatten, unflatten
from davae_jax.inference import generation
from davae_jax.inference.generation import NotFiniteError
from davae_jax.inference.sampling import filter_logits, next_token_probs
from davae_jax.model.davae import merge, split
from davae_jax.parallel.config import MeshConfig
from davae_jax.parallel.sharding import make_mesh


@pytest.fixture(scope="module")
def model():
    return new_model(scale=12)


@pytest.fixture(scope="module")
def latent():
    return np.random.default_rng(0).standard_normal((11, 4)).astype(np.float32)


def test_a_hundred_calls_compile_few_programs(model):
    rng = np.random.default_rng(1)
    with counted_compilations() as compiled:
        for call in range(100):
            rows = int(rng.integers(1, 5))
            latent = rng.standard_normal((rows, 4)).astype(np.float32)
            prompts = [[62, *rng.integers(0, 50, rng.integers(0, 15))] for _ in range(rows)]
            generate(
                model,
                latent,
                prompts,
                max_length=int(rng.integers(17, 33)),
                top_p=float(rng.uniform(0.1, 0.9)),
                top_k=int(rng.integers(2, 9)),
                temperature=float(rng.uniform(0.5, 2)),
                key=jax.random.key(call),
            )
    # At most: batches of 1, 2, 4 × with or without prefill, and a few programs of one operation.
    assert 0 < len(compiled) <= 12
    with counted_compilations() as compiled:
        generate(model, latent, prompts, max_length=20, top_k=3, key=jax.random.key(5))
    assert not compiled


def test_rows_are_independent(model, latent):
    together = generate(model, latent, key=jax.random.key(7))
    assert len({tuple(row) for row in together}) > 5
    for i in (0, 3, 10):
        alone = generate(model, latent[i : i + 1], key=jax.random.key(7), first_row=i)
        assert alone == [together[i]]
    assert together != generate(model, latent, key=jax.random.key(8))


@pytest.mark.parametrize("shape", [(8, 1, 1), (2, 4, 1), (2, 2, 2)], ids=str)
def test_a_mesh_shards_the_rows(shape, tiny_checkpoint, monkeypatch):
    """Each device has the cache and the work of its part of the rows; the ids are the same as on one device."""
    programs = []

    def compiled(*args, **kwargs):
        programs.append(run.lower(*args, **kwargs).compile())
        return run(*args, **kwargs)

    run = generation.run_decoding_loop
    monkeypatch.setattr(generation, "run_decoding_loop", compiled)
    latent = np.random.default_rng(0).standard_normal((32, 4)).astype(np.float32)
    mesh = make_mesh(MeshConfig(*shape), 32)
    alone, together = (
        generate(from_pretrained(tiny_checkpoint, mesh=mesh), latent, key=jax.random.key(7), max_length=12)
        for mesh in (None, mesh)
    )
    assert together == alone and len({tuple(row) for row in alone}) > 8
    one, many = programs
    parts = shape[0] * shape[1]
    caches = lambda program: {int(rows) for rows in re.findall(r"f32\[(\d+),\d+,16,8\]", program.as_text())}  # noqa: E731
    assert (caches(one), caches(many)) == ({32}, {32 // parts})
    # Some of the work depends on the weights only and not on the number of rows.
    assert many.cost_analysis()["flops"] < 1.5 / parts * one.cost_analysis()["flops"]


def test_draws_follow_the_probabilities(model):
    """The first tokens of many rows with the same latent have the frequencies of the distribution."""
    rows = 4096
    latent = np.tile(np.array([[0.3, -1.0, 0.5, 2.0]], np.float32), (rows, 1))
    settings = dict(temperature=1.5, top_k=0, top_p=0.95, repetition_penalty=1.7)
    drawn = [ids[1] if len(ids) > 1 else 60 for ids in generate(model, latent, max_length=2, **settings)]
    frequency = np.bincount(drawn, minlength=64) / rows
    logits, _ = model.decode(np.array([[62]]), latent[:1])
    probs = np.asarray(next_token_probs(logits[:, 0], np.array([[62]]), **settings))[0]
    assert (frequency[probs == 0] == 0).all()
    # Five standard deviations of a binomial proportion.
    assert (np.abs(frequency - probs) <= 5 * np.sqrt(probs * (1 - probs) / rows) + 1e-9).all()


def test_greedy_is_the_argmax_of_the_uncached_model(model, latent):
    prompts = [[62, *range(1, 2 + i)] for i in range(11)]
    for row, (ids, prompt) in enumerate(zip(generate(model, latent, prompts, top_k=1), prompts, strict=True)):
        assert ids[: len(prompt)] == prompt
        logits, _ = model.decode(np.array([ids]), latent[row : row + 1])
        best = np.asarray(logits.argmax(-1))[0]
        assert ids[len(prompt) :] == best[len(prompt) - 1 : -1].tolist()
        assert len(ids) == 24 or best[-1] == 60  # at the limit, or the next token is the end


def test_no_latent(model):
    ids = generate(model, None, [[62, 5], [62, 9, 8]], max_length=10, top_k=1)
    logits, _ = model.decode(np.array([ids[0]]), None)
    assert ids[0][2:] == np.asarray(logits.argmax(-1))[0, 1 : len(ids[0]) - 1].tolist()


def test_a_prompt_of_max_length_is_returned(model, latent):
    assert generate(model, latent[:2], [[62, 1, 2], [62, 3, 4]], max_length=3) == [[62, 1, 2], [62, 3, 4]]
    assert generate(model, latent[:1], max_length=1) == [[62]]
    assert generate(model, latent[:0]) == []


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        (dict(top_p=1.01), "top_p must be in [0, 1], not 1.01"),
        (dict(top_p=-0.1), "top_p must be in [0, 1], not -0.1"),
        (dict(top_p=float("nan")), "top_p must be in [0, 1], not nan"),
        (dict(top_k=-1), "top_k must be an integer of 0 (off) or more, not -1"),
        (dict(temperature=0.0), "temperature must be above 0 and finite in float32, not 0.0"),
        (dict(temperature=-1.0), "temperature must be above 0 and finite in float32, not -1.0"),
        (dict(repetition_penalty=0.0), "repetition_penalty must be above 0 and finite in float32, not 0.0"),
        (dict(max_length=0), "max_length must be 1 to 65536, not 0"),
        (dict(max_length=3_000_000_000), "max_length must be 1 to 65536, not 3000000000"),
        (dict(prompts=[[62], [62] * 25]), "prompt 2 has 25 tokens, more than max_length 24"),
        (dict(prompts=[[62, 60], [62]]), "prompt 1 contains the end token 60"),
        (dict(prompts=[[62], []]), "prompt 2 is empty"),
        (dict(prompts=[[62], [64]]), "prompt 2 contains the id 64, outside the vocabulary of 64"),
        (dict(prompts=[[62]]), "the latent must have shape [1, 4], not [2, 4]"),
    ],
    ids=lambda x: x if isinstance(x, str) else "",
)
def test_invalid_arguments(model, latent, kwargs, message):
    with pytest.raises(InputError) as error:
        generate(model, latent[:2], **kwargs)
    assert message in str(error.value)
    assert error.value.exit_code == 2


def test_a_model_that_computes_nan_makes_no_texts(model, latent):
    """A flipped bit makes a weight of 1e38, and any text can come of it. Rows that only fill up the batch may."""
    graphdef, params = split(model)
    weights = flatten(params)
    name = "decoder.latent_projection.weight"
    broken = merge(graphdef, unflatten(weights | {name: jnp.full_like(weights[name], 3e38)}))
    for top_k in (1, 0):
        with pytest.raises(NotFiniteError, match="the model: computes NaN or infinity"):
            generate(broken, latent[:3], max_length=24, top_k=top_k, top_p=0)
    assert len(generate(model, latent[:3], max_length=24, top_k=1)) == 3


def test_filter_keeps_ties_as_published():
    logits = jnp.log(jnp.array([[0.3, 0.2, 0.2, 0.2, 0.1]]))
    kept = lambda **kw: np.isfinite(filter_logits(logits, **kw))[0].tolist()  # noqa: E731
    assert kept(top_k=2, top_p=0.0) == [True, True, True, True, False]  # all ties with the second
    # 0.3 before the first tie, 0.5 before the next
    assert kept(top_k=0, top_p=0.4) == [True, True, False, False, False]
    assert kept(top_k=0, top_p=0.25) == [True, False, False, False, False]
    assert kept(top_k=0, top_p=0.0001) == [True, False, False, False, False]  # the best always stays
    assert kept(top_k=0, top_p=1.0) == [True] * 5
    assert kept(top_k=9, top_p=0.0) == [True] * 5


@pytest.mark.parametrize("top_k", [0, 1, 7, 60, 1000])
@pytest.mark.parametrize("top_p", [0.0, 0.3001, 0.9, 0.99, 1.0])
def test_filter_equals_a_stable_sort(top_k, top_p):
    """The sort is in float64. The rows have ties, both signs and both zeros, tiny and huge values."""
    rng = np.random.default_rng(0)
    logits = np.concatenate(
        [
            rng.standard_normal((2, 307)) * [[1.0], [1e4]],
            rng.integers(-3, 3, (2, 307)),
            np.where(rng.random((1, 307)) < 0.5, 0.0, -0.0),
            np.where(rng.random((1, 307)) < 0.9, -np.inf, rng.integers(-80, -70, (1, 307))),
        ]
    ).astype(np.float32)
    for row, actual in zip(logits.astype(np.float64), np.asarray(filter_logits(logits, top_k, top_p)), strict=True):
        expected = row.copy()
        if top_k:
            expected[row < np.sort(row)[::-1][min(top_k, row.size) - 1]] = -np.inf
        if 0 < top_p < 1:
            order = np.argsort(-expected, kind="stable")
            probs = np.exp(expected[order] - expected.max())
            before = np.cumsum(probs / probs.sum()) - probs / probs.sum()
            assert np.abs(before - top_p)[probs > 0].min() > 1e-6  # float32 must decide as float64
            expected[order[before > top_p]] = -np.inf
        np.testing.assert_array_equal(actual, expected.astype(np.float32))


def test_probabilities_survive_any_number_of_repetitions():
    """2^400 overflows float32, but the probabilities must still sum to 1."""
    logits = jnp.zeros((1, 3))
    previous = jnp.array([[0] * 400 + [1] * 399 + [2] * 398])
    probs = next_token_probs(logits, previous, repetition_penalty=2.0)
    np.testing.assert_allclose(probs, [[1 / 7, 2 / 7, 4 / 7]], rtol=1e-4)
