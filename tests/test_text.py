"""Tests of `TextVAE`: the published program's results, and properties that hold for every model."""

import dataclasses
import warnings

import numpy as np
import pytest
from conftest import GOLDEN
from small_model import counted_compilations
from tiny_checkpoint import MAX_IDS, MAX_OUT_LENGTH, PIECES
from tokenizer_fixtures import WORDS, sentences

import davae_jax
from davae_jax import InputError, TextVAE
from davae_jax.tokenizers.load import load_tokenizers

# Comparison with the published program, with its tokenizers.


@pytest.fixture(scope="module")
def published(reference_dir) -> TextVAE:
    pytest.importorskip("torch")
    return TextVAE.from_pretrained(GOLDEN / "text", tokenizers=reference_dir / "tokenizers")


@pytest.fixture
def golden(golden_json) -> dict:
    return golden_json("text", "text.json")


def test_golden_ids(published, golden):
    with pytest.warns(UserWarning) as caught:
        assert published.encoder_ids(golden["texts"]) == golden["encoder_ids"]
    assert [str(w.message) for w in caught] == [
        "text 4: the text is empty or only white space",
        "text 10: the encoder knows no character of the text",
        "text 15: the text is longer than 510 ids and was truncated",
    ]
    assert published.decoder_ids(golden["texts"]) == golden["decoder_encode"]
    assert published.prompt_ids(golden["simulate_prompts"]) == golden["simulate_prompt_ids"]


def test_golden_decoding(published, golden):
    assert published.decode_ids(golden["decode_ids"]) == golden["decode_text"]
    assert published.decode_ids(golden["decode_ids"], clean=True) == golden["decode_text_filtered"]


def test_golden_latent(published, golden):
    assert published.config.std_scale == 1.5
    latent = published.encode(golden["simulate_texts"], eps=golden["simulate_eps"])
    assert np.abs(latent - golden["simulate_latent"]).max() <= 1e-4


def test_golden_generation(published, golden):
    latent = published.encode(golden["simulate_texts"], eps=golden["simulate_eps"])
    assert published.config.max_out_length == 40
    assert published.generate(latent, top_k=1) == golden["simulate_greedy"]
    prompted = published.generate(latent, golden["simulate_prompts"], top_k=1)
    assert prompted == golden["simulate_greedy_prompted"]


# On a tiny random model.

TEXTS = sentences(7)


@pytest.fixture
def vae(tiny_vae, monkeypatch) -> TextVAE:
    """Returns the shared model; attributes that a test sets are restored after it."""
    for name in ("batch_size", "label"):
        monkeypatch.setattr(tiny_vae, name, getattr(tiny_vae, name))
    return tiny_vae


def test_the_seed_determines_the_texts(vae):
    for draw in (lambda seed: vae.simulate_batch(TEXTS, seed=seed), lambda seed: vae.sample(7, seed=seed)):
        assert draw(3) == draw(3)
        assert all(a != b for a, b in zip(draw(3), draw(4), strict=True))
    assert vae.sample(7) == vae.sample(7, seed=0)
    for seed in (-1, 2**40, 10**30):  # JAX itself accepts at most 64 bits
        assert vae.sample(7, seed=seed) == vae.sample(7, seed=seed % 2**32)


def test_the_batch_size_changes_nothing(vae):
    latent, texts = vae.encode(TEXTS), vae.simulate_batch(TEXTS)
    assert len(set(texts)) == 7
    for vae.batch_size in (1, 4):
        assert np.abs(vae.encode(TEXTS) - latent).max() <= 1e-5
        assert vae.simulate_batch(TEXTS) == texts


def test_the_latent(vae):
    mean, logvar = vae.posterior(TEXTS)
    assert mean.shape == logvar.shape == (7, 4)
    np.testing.assert_array_equal(vae.encode(TEXTS, std_scale=0.0), mean)
    eps = np.random.default_rng(0).standard_normal((7, 4)).astype(np.float32)
    np.testing.assert_allclose(
        vae.encode(TEXTS, eps=eps, std_scale=0.5), mean + 0.5 * eps * np.exp(logvar / 2), rtol=1e-5, atol=1e-5
    )
    # The config's std_scale is 1.5.
    np.testing.assert_array_equal(vae.encode(TEXTS, eps=eps), vae.encode(TEXTS, eps=eps, std_scale=1.5))
    np.testing.assert_array_equal(vae.encode(TEXTS, seed=5), vae.encode(TEXTS, seed=5, std_scale=1.5))


def test_the_drawn_noise_is_standard_normal(vae):
    vae.batch_size = 8
    mean, logvar = vae.posterior(TEXTS[:1])
    noise = (vae.encode(TEXTS[:1] * 2000, std_scale=1.0) - mean) / np.exp(logvar / 2)
    # Five standard errors, of a mean and of a variance and covariance.
    assert np.abs(noise.mean(0)).max() < 5 / np.sqrt(2000)
    assert np.abs(np.cov(noise.T) - np.eye(4)).max() < 5 * np.sqrt(2 / 2000)


def test_simulation_is_encoding_and_generation(vae):
    prompts = ["今天", "", "北京上海", "学习中文的方法", "x", "我们", "朋友"]
    settings = dict(max_length=11, top_k=20, top_p=0.8, temperature=1.2, repetition_penalty=1.5)
    assert vae.simulate_batch(TEXTS, seed=3) == vae.generate(vae.encode(TEXTS, seed=3), seed=3)
    simulated = vae.simulate_batch(TEXTS, prompts, seed=3, **settings)
    assert simulated == vae.generate(vae.encode(TEXTS, seed=3), prompts, seed=3, **settings)
    assert simulated != vae.simulate_batch(TEXTS, prompts, seed=3)


def test_the_generated_text_is_what_follows_the_prompt(vae):
    latent = vae.encode(TEXTS)
    prompts = ["今天", "", "北京上海", "学习中文的方法", "x", "我们", "朋友"]
    ids = vae.prompt_ids(prompts)
    assert ids[0] == [PIECES + 2, *vae.decoder_ids(["今天"])[0][:-1]]
    assert ids[1] == [PIECES + 2]
    rows = davae_jax.generate(vae.model, latent, ids, top_k=1)
    assert [row[: len(prompt)] for row, prompt in zip(rows, ids, strict=True)] == ids
    continuations = [row[len(prompt) :] for row, prompt in zip(rows, ids, strict=True)]
    assert vae.generate(latent, prompts, top_k=1) == vae.decode_ids(continuations, clean=True)
    assert vae.generate(latent, [""] * 7) == vae.generate(latent)


def test_decoded_text_is_cleaned_up(vae):
    ids = vae.decoder_ids(["今天 天气 很好 。", "水果[1]苹果"])
    assert [row[-1] for row in ids] == [PIECES, PIECES]
    assert vae.decode_ids([row[:-1] for row in ids]) == ["今天 天气 很好 。", "水果<unk> 1<unk>苹果"]
    assert vae.decode_ids([row[:-1] for row in ids], clean=True) == ["今天天气很好。", "水果 1苹果"]


def test_reconstruction_is_greedy_from_the_mean(vae):
    mean = vae.posterior(TEXTS).mean
    greedy = vae.generate(mean, top_k=1)
    assert len(set(greedy)) > 3
    assert vae.reconstruct(TEXTS) == vae.reconstruct(TEXTS, seed=9) == greedy
    assert vae.reconstruct(TEXTS, max_length=5) == vae.generate(mean, top_k=1, max_length=5)
    # A setting that only matters for drawing turns the greedy default off.
    for settings in (dict(top_p=0.9), dict(temperature=1.0), dict(repetition_penalty=1.0), dict(top_k=0)):
        assert vae.reconstruct(TEXTS, seed=2, **settings) == vae.generate(mean, seed=2) != greedy


def test_samples_do_not_depend_on_their_number(vae):
    vae.batch_size = 8
    samples = vae.sample(20, seed=1)
    assert len(set(samples)) > 10
    for n in (1, 3, 17):
        assert vae.sample(n, seed=1) == samples[:n]
    assert vae.sample(0) == []


def test_interpolation_ends_at_both_texts(vae):
    texts, reconstructions = vae.interpolate(TEXTS[0], TEXTS[2], 5), vae.reconstruct(TEXTS)
    assert [texts[0], texts[-1]] == [reconstructions[0], reconstructions[2]]
    assert texts[0] != texts[-1]
    mean = vae.posterior(TEXTS).mean
    assert texts[1] == vae.generate(0.75 * mean[:1] + 0.25 * mean[2:3], top_k=1)[0]


def test_analogy(vae):
    a, b, c = TEXTS[0], TEXTS[2], TEXTS[4]
    reconstructions = vae.reconstruct(TEXTS)
    assert vae.analogy(a, a, c) == reconstructions[4]
    assert vae.analogy(a, b, a) == reconstructions[2]
    mean = vae.posterior(TEXTS).mean
    assert vae.analogy(a, b, c) == vae.generate(mean[2:3] - mean[:1] + mean[4:5], top_k=1)[0]


# Warnings.

PROBLEMATIC = [TEXTS[0], "", "今天ѪѪ", "ѪѪѪ", " \t\u3000\n", "天" * 100_000, "天" * (MAX_IDS - 2)]
WARNINGS = [
    "text 2: the text is empty or only white space",
    "text 4: the encoder knows no character of the text",
    "text 5: the text is empty or only white space",
    f"text 6: the text is longer than {MAX_IDS} ids and was truncated",
]


@pytest.mark.parametrize("method", ["encoder_ids", "posterior", "encode", "simulate_batch", "reconstruct"])
def test_warnings_name_the_text(vae, method):
    vae.batch_size = 4  # texts are numbered across batches
    with pytest.warns(UserWarning) as caught:
        result = getattr(vae, method)(PROBLEMATIC)
    assert [str(w.message) for w in caught] == WARNINGS
    assert len(result[0] if method == "posterior" else result) == len(PROBLEMATIC)


def test_warnings_of_single_texts(vae):
    with pytest.warns(UserWarning) as caught:
        vae.interpolate("", TEXTS[0], 8)
        vae.analogy(TEXTS[0], TEXTS[1], "Ѫ")
    assert [str(w.message) for w in caught] == [
        "text 1: the text is empty or only white space",
        "text 3: the encoder knows no character of the text",
    ]


def test_ordinary_texts_cause_no_warning(vae):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        vae.simulate_batch(TEXTS)
        vae.reconstruct(TEXTS)


def test_no_texts(vae):
    assert vae.encoder_ids([]) == vae.decoder_ids([]) == vae.decode_ids([]) == vae.prompt_ids([]) == []
    assert vae.encode([]).shape == vae.posterior([]).mean.shape == (0, 4)
    assert vae.generate(np.zeros((0, 4))) == vae.generate(np.zeros((0, 4)), []) == []
    assert vae.simulate_batch([]) == vae.simulate_batch([], []) == vae.reconstruct([]) == []


LATENT = np.zeros((2, 4), np.float32)
TOO_LONG = "春眠" * MAX_OUT_LENGTH  # MAX_OUT_LENGTH tokens after <bos>


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda v: v.prompt_ids(["今天", "<|endoftext|>"]), "prompt 2 contains the end token <|endoftext|>"),
        (lambda v: v.generate(LATENT, ["x<|endoftext|>y", ""]), "prompt 1 contains the end token <|endoftext|>"),
        (lambda v: v.simulate_batch(TEXTS[:1], ["<|endoftext|>"]), "prompt 1 contains the end token <|endoftext|>"),
        (lambda v: v.generate(LATENT, ["", TOO_LONG]), "prompt 2 has 13 tokens, more than max_length 12"),
        (lambda v: v.simulate_batch(TEXTS[:1], [TOO_LONG]), "prompt 1 has 13 tokens, more than max_length 12"),
        (lambda v: v.generate(LATENT, ["今天"], max_length=1), "prompt 1 has 2 tokens, more than max_length 1"),
        (lambda v: v.generate(LATENT, ["今天"]), "1 prompts for 2 latents"),
        (lambda v: v.generate(LATENT, []), "0 prompts for 2 latents"),
        (lambda v: v.simulate_batch(TEXTS, ["今天"]), "1 prompts for 7 texts"),
        (lambda v: v.generate(np.zeros((2, 5))), "the latent must have shape [2, 4], not [2, 5]"),
        (lambda v: v.encode(TEXTS, eps=np.zeros((6, 4))), "eps must have shape [7, 4], not [6, 4]"),
        (lambda v: v.encode(TEXTS, std_scale=-1), "std_scale must be a number of 0 or more, not -1"),
        (lambda v: v.encode(TEXTS, std_scale=float("nan")), "std_scale must be a number of 0 or more, not nan"),
        (lambda v: v.encode(TEXTS, std_scale=float("inf")), "std_scale must be a number of 0 or more, not inf"),
        (lambda v: v.simulate_batch(TEXTS, top_p=2.0), "top_p must be in [0, 1], not 2.0"),
        (lambda v: v.reconstruct(TEXTS, temperature=0.0), "temperature must be above 0 and finite in float32, not 0.0"),
        (lambda v: v.reconstruct(TEXTS, max_length=0), "max_length must be 1 to 65536, not 0"),
        (lambda v: v.sample(-1), "n must be 0 or more, not -1"),
        (lambda v: v.interpolate("a", "b", 1), "steps must be 2 (both ends) to 10000, not 1"),
    ],
    ids=lambda x: x if isinstance(x, str) else "",
)
def test_invalid_arguments(vae, call, message):
    with pytest.raises(InputError) as error:
        call(vae)
    assert str(error.value) == message
    assert error.value.exit_code == 2


def test_a_string_is_not_a_list_of_texts(vae):
    for method in (vae.encoder_ids, vae.decoder_ids, vae.prompt_ids, vae.simulate_batch, vae.reconstruct):
        with pytest.raises(TypeError, match="pass a list of texts, not a single string"):
            method("今天")


def test_tokenizers_must_fit_the_model(vae, tiny_checkpoint):
    entries = vae.encoder_tokenizer.size
    smaller = dataclasses.replace(vae.config, encoder=dataclasses.replace(vae.config.encoder, vocab_size=entries - 1))
    with pytest.raises(InputError) as error:
        load_tokenizers(tiny_checkpoint, smaller)
    vocab = tiny_checkpoint / "vocab.txt"
    assert str(error.value) == f"{vocab}: {entries} entries, but config's encoder.vocab_size is {entries - 1}"
    smaller = dataclasses.replace(vae.config, decoder=dataclasses.replace(vae.config.decoder, vocab_size=PIECES + 2))
    with pytest.raises(InputError) as error:
        load_tokenizers(tiny_checkpoint, smaller)
    spiece = tiny_checkpoint / "spiece.model"
    assert str(error.value) == f"{spiece}: ids up to {PIECES + 2}, but config's decoder.vocab_size is {PIECES + 2}"


def test_a_missing_tokenizer_is_found_before_the_weights_are_read(tiny_checkpoint, tmp_path):
    (tmp_path / "config.json").write_bytes((tiny_checkpoint / "config.json").read_bytes())
    with pytest.raises(InputError) as error:
        TextVAE.from_pretrained(tmp_path)
    vocab = tmp_path / "vocab.txt"
    assert str(error.value) == f"{vocab}: no such file; a tokenizer folder contains spiece.model and vocab.txt"


def test_a_hundred_calls_compile_few_programs(vae):
    rng = np.random.default_rng(0)

    def call(seed):
        texts = ["".join(rng.choice(WORDS[:-5], rng.integers(1, 12))) for _ in range(rng.integers(3, 9))]
        vae.simulate_batch(texts, seed=seed, max_length=int(rng.integers(4, 17)), top_p=float(rng.uniform(0.5, 0.9)))

    with counted_compilations() as compiled:
        for seed in range(100):
            call(seed)
    # At most: batches of 4 and 8, each with an encoder for texts of up to 16 and up to 32 ids, a draw of the latent and
    # a generator; the noise; and a few one-operation programs. Tests before this one may have compiled some.
    assert len(compiled) <= 20
    with counted_compilations() as compiled:
        for seed in range(100, 110):
            call(seed)
    assert not compiled
