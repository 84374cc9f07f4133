"""Ways through the latent space: their closed forms, and what `TextVAE` and the commands make of them."""

import json
import re
import runpy
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tokenizer_fixtures import sentences

from davae_jax import InputError, TextVAE
from davae_jax.checkpoints.weights import flatten, unflatten
from davae_jax.cli.main import main
from davae_jax.data import demo_corpus
from davae_jax.model.davae import merge, split
from davae_jax.model.latent import attribute_vector, combine, interpolate, neighbours, slerp

KEY = jax.random.key(0)
EXAMPLE = Path(__file__).parent.parent / "examples" / "latent_tools.py"
# So many and so long that few programs are compiled.
TEXTS = [text for text in sentences(100) if 15 <= len(text) <= 20][:4]
A, B, C = TEXTS[:3]


def test_spherical_goes_along_the_circle():
    a, b = np.array([3.0, 0.0, 0.0]), np.array([0.0, 3.0, 0.0])
    angles = np.linspace(0, np.pi / 2, 5)
    expected = 3 * np.stack([np.cos(angles), np.sin(angles), np.zeros(5)], axis=1)
    np.testing.assert_allclose(slerp(a, b, 5), expected, atol=1e-5)
    assert np.linalg.norm(interpolate(a, b, 3)[1]) == pytest.approx(3 / np.sqrt(2))  # where the straight line passes


def test_spherical_keeps_the_length_and_turns_evenly():
    rng = np.random.default_rng(0)
    a, b = rng.standard_normal((2, 4, 32))
    b *= np.linalg.norm(a, axis=1, keepdims=True) / np.linalg.norm(b, axis=1, keepdims=True)
    path = np.asarray(slerp(a, b, 9))  # [9, 4, 32]
    assert path.shape == (9, 4, 32)
    np.testing.assert_allclose(path[[0, -1]], [a, b], atol=1e-5)
    lengths = np.linalg.norm(path, axis=-1)
    np.testing.assert_allclose(lengths, np.tile(lengths[0], (9, 1)), rtol=1e-5)
    chords = np.linalg.norm(np.diff(path, axis=0), axis=-1)
    np.testing.assert_allclose(chords, np.tile(chords[0], (8, 1)), rtol=1e-4)


@pytest.mark.parametrize("b", [[2.0, 4.0], [-1.0, -2.0], [0.0, 0.0], [1.0, 2.0]])
def test_spherical_without_an_arc_is_straight(b):
    a = np.array([1.0, 2.0])
    np.testing.assert_allclose(slerp(a, np.array(b), 5), interpolate(a, np.array(b), 5), atol=1e-5)


def test_combine():
    z = np.arange(12.0).reshape(3, 2, 2)
    np.testing.assert_allclose(combine(z, [-1, 1, 1]), -z[0] + z[1] + z[2])
    np.testing.assert_allclose(combine(z[:, 0], [0.5, 0.25, 0.25]), 0.5 * z[0, 0] + 0.25 * (z[1, 0] + z[2, 0]))


def test_attribute_vector():
    rng = np.random.default_rng(0)
    noise, direction = rng.standard_normal((7, 3)), np.array([1.0, -2.0, 0.5])
    np.testing.assert_allclose(attribute_vector(noise + direction, noise[::-1]), direction, atol=1e-5)
    np.testing.assert_allclose(attribute_vector([[1.0, 3.0], [3.0, 5.0]], [[1.0, 1.0]]), [1, 3])


def test_neighbours_are_uniform_on_the_sphere():
    z = np.array([5.0, -1.0, 2.0])
    away = np.asarray(neighbours(z, 4000, 0.7, KEY)) - z
    np.testing.assert_allclose(np.linalg.norm(away, axis=1), 0.7, rtol=1e-4)
    # Even in all directions: mean 0 and covariance r²/L · I, within five standard errors.
    assert np.abs(away.mean(0)).max() < 5 * 0.7 / np.sqrt(3 * 4000)
    np.testing.assert_allclose(np.cov(away.T), 0.7**2 / 3 * np.eye(3), atol=0.01)


# With a model.


def test_text_vae(tiny_vae):
    mean = tiny_vae.posterior(TEXTS).mean
    greedy = lambda latent: tiny_vae.generate(np.asarray(latent), top_k=1)  # noqa: E731
    assert tiny_vae.interpolate(A, B, 4, spherical=True) == greedy(slerp(mean[0], mean[1], 4))
    assert tiny_vae.interpolate(A, B, 4, spherical=True)[::3] == tiny_vae.interpolate(A, B, 4)[::3]
    assert tiny_vae.combine([A, B, C], [-1, 1, 1]) == tiny_vae.analogy(A, B, C)
    assert tiny_vae.combine([A, B, C], [0.75, 0, 0.25]) == tiny_vae.interpolate(A, C, 5)[1]
    direction = tiny_vae.attribute_vector(TEXTS[:2], TEXTS[2:])
    np.testing.assert_allclose(direction, mean[:2].mean(0) - mean[2:].mean(0), atol=1e-5)
    assert tiny_vae.shift(TEXTS, direction, -2.0) == greedy(mean - 2 * direction)
    assert tiny_vae.shift(TEXTS, direction, 0.0) == tiny_vae.reconstruct(TEXTS)
    assert tiny_vae.neighbours(A, 3, 0.0) == tiny_vae.reconstruct([A]) * 3
    around = tiny_vae.around(mean[:2], 4, 2.0)
    np.testing.assert_allclose(np.linalg.norm(around.reshape(2, 4, 4) - mean[:2, None], axis=-1), 2, rtol=1e-4)
    assert tiny_vae.neighbours(A, 4, 2.0) == greedy(around[:4])
    assert tiny_vae.neighbours(A, 4, 2.0, seed=1) != tiny_vae.neighbours(A, 4, 2.0)
    assert tiny_vae.neighbours(A, 0, 1.0) == []


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda v: v.combine([A], [1, 2]), "2 weights for 1 texts"),
        (lambda v: v.combine([], []), "0 weights for 0 texts"),
        (
            lambda v: v.attribute_vector([A], []),
            "an attribute needs at least one text that has it and one that lacks it",
        ),
        (lambda v: v.shift([A], np.zeros(3)), "direction must have shape [4], not [3]"),
        (lambda v: v.shift([A, B], np.zeros((2, 4))), "direction must have shape [4], not [2, 4]"),
        (lambda v: v.shift([A], 1.0), "direction must have shape [4], not []"),
        (
            lambda v: v.shift([A], np.zeros(4), np.ones((2, 1))),
            "strength must be a scalar, not an array of shape [2, 1]",
        ),
        (lambda v: v.generate(np.zeros(4)), "the latent must have shape [n, 4], not [4]"),
        (lambda v: v.neighbours(A, 3, 1e39), "radius must be a number of 0 or more, not 1e+39"),
        (lambda v: v.neighbours(A, 3, -1), "radius must be a number of 0 or more, not -1"),
        (lambda v: v.neighbours(A, -3, 1), "n must be 0 or more, not -3"),
        (lambda v: v.sample(10**10), "n must be at most 1000000, not 10000000000; for more texts, use several seeds"),
        (lambda v: v.encode([A], std_scale=1e39), "std_scale must be a number of 0 or more, not 1e+39"),
    ],
    ids=lambda x: x if isinstance(x, str) else "",
)
def test_invalid_arguments_raise(tiny_vae, call, message):
    with pytest.raises(InputError) as error:
        call(tiny_vae)
    assert (str(error.value), error.value.exit_code) == (message, 2)


@pytest.mark.parametrize(
    ("weight", "call"),
    [
        ("decoder.latent_projection.weight", lambda v: v.sample(2, max_length=8)),
        ("encoder.posterior.weight", lambda v: v.encode([A])),
    ],
)
def test_a_model_that_computes_nan_is_named(tiny_vae, weight, call):
    graphdef, params = split(tiny_vae.model)
    weights = flatten(params)
    model = merge(graphdef, unflatten(weights | {weight: jnp.full_like(weights[weight], 3e38)}))
    vae = TextVAE(model, tiny_vae.encoder_tokenizer, tiny_vae.decoder_tokenizer)
    vae.source = "some/folder"
    with pytest.raises(InputError, match=r"^some/folder: computes NaN or infinity"):
        call(vae)
    assert Path(tiny_vae.source).is_dir()


def test_a_list_in_a_texts_place_is_named(tiny_vae):
    with pytest.raises(TypeError, match="a text must be a string, not a list"):
        tiny_vae.neighbours([A], 3, 1.0)
    with pytest.raises(TypeError, match="pass a list of texts, not a single string"):
        tiny_vae.shift(A, np.zeros(4))


def test_texts_may_come_one_by_one(tiny_vae):
    np.testing.assert_array_equal(tiny_vae.encode(iter([A, B])), tiny_vae.encode([A, B]))


# On the command line.


@pytest.fixture
def davae(capsys, tiny_checkpoint):
    """Runs a command on the tiny checkpoint: (its JSON Lines, its exit code, what it said)."""

    def call(*argv):
        code = main([str(arg) for arg in (*argv, "--model", tiny_checkpoint)])
        out, err = capsys.readouterr()
        return [json.loads(line) for line in out.splitlines()], code, err

    return call


def test_interpolate_spherical(davae, tiny_vae):
    rows, code, err = davae("interpolate", A, B, "--steps", 4, "--spherical")
    assert (code, err) == (0, "")
    assert [row["text"] for row in rows] == tiny_vae.interpolate(A, B, 4, spherical=True)


def test_attribute(davae, tiny_vae, tmp_path):
    having, lacking = tmp_path / "having.txt", tmp_path / "lacking.txt"
    having.write_text(f"{A}\n\n{B}\n", encoding="utf-8")
    lacking.write_text(f"{C}\n", encoding="utf-8")
    files = ("--having", having, "--lacking", lacking)
    rows, code, err = davae("attribute", *TEXTS[2:], *files, "--strength", -1, 2)
    assert (code, err) == (0, "")
    direction = tiny_vae.attribute_vector([A, B], [C])
    less, more = (tiny_vae.shift(TEXTS[2:], direction, s) for s in (-1, 2))
    assert rows == [
        {"text": text, "strength": s, "generated": generated}
        for text, pair in zip(TEXTS[2:], zip(less, more, strict=True), strict=True)
        for s, generated in zip((-1.0, 2.0), pair, strict=True)
    ]
    lacking.write_text("\n", encoding="utf-8")
    assert davae("attribute", A, *files)[1:] == (1, f"davae attribute: error: {lacking}: contains no text\n")
    said = "davae attribute: error: --strength must be finite numbers, not nan\n"
    assert davae("attribute", A, *files, "--strength", "nan")[1:] == (2, said)
    said = "davae attribute: error: --strength must be finite in float32, not 1e+300\n"
    assert davae("attribute", A, *files, "--strength", "1e300")[1:] == (2, said)


def test_neighbours(davae, tiny_vae):
    rows, code, err = davae("neighbours", A, B, "--radius", 2, "--n", 3, "--seed", 4)
    assert (code, err) == (0, "")
    expected = [tiny_vae.neighbours(text, 3, 2.0, seed=4) for text in (A, B)]
    assert [row["generated"] for row in rows] == [*expected[0], *expected[1]]
    assert [row["text"] for row in rows] == [A] * 3 + [B] * 3
    said = "davae neighbours: error: --radius must be a number of 0 or more, not -1.0\n"
    assert davae("neighbours", A, "--radius", -1)[1:] == (2, said)
    assert davae("neighbours", A, "--n", 0)[1:] == (2, "davae neighbours: error: --n must be at least 1, not 0\n")


def test_combine_on_the_command_line(davae, tiny_vae, tmp_path):
    rows, code, err = davae("combine", A, B, C, "--weights", -1, 1, 1)
    assert (code, err) == (0, "")
    row = {"texts": [A, B, C], "weights": [-1.0, 1.0, 1.0], "text": tiny_vae.analogy(A, B, C)}
    assert rows == [row]
    file = tmp_path / "triples.tsv"
    file.write_text(f"{A}\t{B}\t{C}\n{B}\t{B}\t{A}\n", encoding="utf-8")
    rows, _, _ = davae("combine", "--input", file, "--weights", -1, 1, 1)
    assert rows == [row, row | {"texts": [B, B, A], "text": tiny_vae.reconstruct([A])[0]}]
    assert davae("combine", A, "--weights", 1, 1)[1:] == (
        2,
        "davae combine: error: needs 2 texts, one per weight, not 1\n",
    )


def test_the_example_runs(tiny_checkpoint, monkeypatch, capsys):
    """On a model that knows nothing: every part says what it should, on as many lines."""
    texts = demo_corpus.make_corpus()
    monkeypatch.setattr(demo_corpus, "make_corpus", lambda: texts._replace(held_out=texts.held_out[:310]))
    monkeypatch.setattr(sys, "argv", ["latent_tools.py", str(tiny_checkpoint)])
    with pytest.warns(UserWarning, match="truncated"):
        runpy.run_path(str(EXAMPLE))
    out = capsys.readouterr().out
    parts = re.findall(r"^(\S.*)\n((?:  [✓✗].*\n)+)", out, re.MULTILINE)
    assert [(title, len(lines.splitlines())) for title, lines in parts] == [
        ("linear interpolation", 7),
        ("spherical interpolation", 7),
        ("a negative review", 1),
        *[(f"shifted by {strength} times the sentiment vector", 1) for strength in ("0.5", "1", "1.5")],
        *[(f"neighbours at distance {radius}", 3) for radius in ("0.5", "2", "4")],
        ("midpoint", 1),
        ("analogy", 1),
    ]
    assert "prior samples about 2.00" in out  # of four dimensions
    complaints = sum(not texts.factors[text].good for text in texts.held_out[300:310])
    assert f"of {complaints} shifted reviews, 0 are grammatical and 0 positive" in out
