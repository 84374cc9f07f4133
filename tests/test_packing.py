"""Packing: a text's loss, gradient and noise are its own whatever stands beside it, and hardly anything is padding."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from small_model import CONFIG, new_model

from davae_jax import DAVAEConfig
from davae_jax.checkpoints.weights import flatten
from davae_jax.data.batches import Batch, TextBatches
from davae_jax.data.config import DataConfig
from davae_jax.data.inputs.readers import read_texts
from davae_jax.data.packing import PackedBatches, pack
from davae_jax.data.tokenize import TokenizedTexts, tokenize
from davae_jax.model.davae import abstract_model, merge, split
from davae_jax.model.latent import kl_per_dimension
from davae_jax.model.layers import Segments
from davae_jax.parallel.config import MeshConfig
from davae_jax.parallel.sharding import make_mesh
from davae_jax.tokenizers.load import load_tokenizers
from davae_jax.training.config import AdversarialConfig, FreeBitsConfig, NoiseConfig, TrainConfig
from davae_jax.training.initial_state import initial_state
from davae_jax.training.noise import token_noise
from davae_jax.training.objective import StepContext, encode, free_bits_kl, gradient, mean_over_texts, reconstruction
from davae_jax.training.state import abstract_state
from davae_jax.training.step import make_train_step
from davae_jax.utils.errors import OptionError

CLS, SEP = 2, 3
BOS, END, PAD = CONFIG.bos_token_id, CONFIG.end_token_id, CONFIG.pad_token_id
MODEL = dataclasses.replace(
    CONFIG,
    # As many positions as the longest text has: rows are longer.
    encoder=dataclasses.replace(
        CONFIG.encoder, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0, max_position_embeddings=16
    ),
    decoder=dataclasses.replace(
        CONFIG.decoder, embedding_dropout_prob=0.0, attention_dropout_prob=0.0, output_dropout_prob=0.0
    ),
    cls_token_id=CLS,
    sep_token_id=SEP,
)
CLEAN = TrainConfig(steps=10, batch_size=4, noise=NoiseConfig(embedding=0.0), adversarial=AdversarialConfig(weight=0.7))
KEYS = dict.fromkeys(("token", "embedding", "encoder"))


def texts_of(seed, n, longest=12, vocab=(50, 60)):
    """n random texts, of up to `longest` words, for each side of its own number."""
    rng = np.random.default_rng(seed)
    encoder_ids, decoder_ids = [], []
    for words in rng.integers(1, longest + 1, n):
        pieces = rng.integers(max(1, words // 2), words + 1)
        encoder_ids.append(np.array([CLS, CLS, *rng.integers(4, vocab[0], words), SEP, SEP], np.int32))
        decoder_ids.append(np.array([BOS, *rng.integers(0, vocab[1], pieces), END], np.int32))
    return TokenizedTexts(encoder_ids, decoder_ids, np.arange(1, n + 1), 0)


TEXTS = texts_of(0, 11)


@pytest.fixture(scope="module")
def packed():
    """(all texts in 4 rows of up to P, the text that stands at each place or −1)."""
    batches = PackedBatches(TEXTS, 4, pad_id=PAD, row_length=20)
    batch = batches.batch(0)
    place_of = np.full(batch.lengths.shape, -1)
    for row, texts in enumerate(batches._select_rows(0)):
        place_of[row, : len(texts)] = texts
    assert sorted(place_of[place_of >= 0]) == list(range(11)), "all texts are in the one batch"
    return batch, place_of


@pytest.fixture(scope="module")
def plain():
    batches = TextBatches(TEXTS, 11, pad_id=PAD, encoder_positions=16)
    order = np.argsort(batches.select_texts(0)[0])
    return jax.tree.map(lambda x: x[order], batches.batch(0))


@pytest.fixture(scope="module")
def model():
    return new_model(MODEL, scale=4.0)


def losses_of(model):
    """params, batch, [which row and place each text has], eps [n, L] → rec per token, KL [n]."""
    graphdef, _ = split(model)

    def losses(params, batch, where, eps):
        model = merge(graphdef, params)
        encoded = encode(model, batch, KEYS, CLEAN)
        places = where[0] * batch.lengths.shape[1] + where[1]
        noise = jnp.zeros(encoded.posterior.mean.shape).at[places].set(eps)
        rec, length = reconstruction(model, batch, encoded.posterior.at(noise), None, CLEAN)
        return (rec / length)[places], kl_per_dimension(encoded.posterior).sum(-1)[places]

    return losses


def places(place_of):
    """[2, n]: row and place of each text."""
    return np.stack(np.nonzero(place_of >= 0))[:, np.argsort(place_of[place_of >= 0])]


EPS = np.random.default_rng(1).normal(size=(11, CONFIG.latent_size)).astype(np.float32)


def assert_close(found, expected, tolerance=1e-5):
    np.testing.assert_allclose(found, expected, atol=tolerance * np.abs(expected).max(), rtol=0)


def assert_gradients_close(found, expected, tolerance=1e-5):
    """To 1e-5 of each weight's largest; some are 0 but for rounding (a bias of keys), so not below 1e-6 of all."""
    largest = {path: np.abs(g).max() for path, g in expected.items()}
    whole = max(largest.values())
    for path, g in expected.items():
        atol = tolerance * max(largest[path], 0.1 * whole)
        np.testing.assert_allclose(found[path], g, atol=atol, rtol=0, err_msg=path)


def test_each_text_has_the_loss_and_gradient_it_has_unpacked(model, plain, packed):
    losses, (batch, place_of) = losses_of(model), packed
    weighted = lambda *args: sum(weight * loss for weight, loss in zip((1.0, 0.3), losses(*args)))  # noqa: E731
    both = jax.jit(lambda *args: (losses(*args), jax.jacrev(weighted)(*args)))
    params = split(model)[1]
    expected, expected_grads = both(params, plain, np.stack([np.arange(11), np.zeros(11, int)]), EPS)
    found, found_grads = both(params, batch, places(place_of), EPS)
    for a, b in zip(found, expected, strict=True):
        assert_close(a, b)
    found_grads, expected_grads = flatten(found_grads), flatten(expected_grads)
    for text in range(11):
        assert_gradients_close(
            *({path: g[text] for path, g in grads.items()} for grads in (found_grads, expected_grads))
        )
    # One text by itself, without any padding.
    one = Batch.of_texts(TEXTS.encoder_ids[4][None], TEXTS.decoder_ids[4][None], np.array([len(TEXTS.decoder_ids[4])]))
    alone = jax.jit(losses)(params, one, np.zeros((2, 1), int), EPS[4:5])
    for a, b in zip(found, alone, strict=True):
        assert_close(a[4:5], b)


def test_neighbours_in_a_row_do_not_matter(model, packed):
    """Rows in another order, texts in another order inside them, other texts as neighbours."""
    losses, (batch, place_of) = jax.jit(losses_of(model)), packed
    params = split(model)[1]
    expected = losses(params, batch, places(place_of), EPS)
    batches = PackedBatches(TEXTS, 4, pad_id=PAD, row_length=20)
    batches.texts_per_row, batches.shape = place_of.shape[1], (40, 24)  # rows with room for what is swapped
    turned = [[text for text in row[::-1] if text >= 0] for row in place_of[[2, 0, 3, 1]]]
    swapped = [list(row) for row in turned]
    swapped[0][-1], swapped[1][0] = swapped[1][0], swapped[0][-1]
    for rows in (turned, swapped):
        batches._select_rows = lambda step, rows=rows: rows
        where = np.full(place_of.shape, -1)
        for row, texts in enumerate(rows):
            where[row, : len(texts)] = texts
        for a, b in zip(losses(params, batches.batch(0), places(where), EPS), expected, strict=True):
            assert_close(a, b)


@pytest.mark.parametrize("mode", ["hard", "total"])
def test_a_packed_step_is_the_plain_one(model, plain, packed, monkeypatch, mode):
    """The whole objective and its gradient, the packed one in two parts (of unlike numbers of texts, as
    11 are odd), with layers and logits computed anew. No draws: they differ."""
    monkeypatch.setattr(jax.random, "normal", lambda key, shape=(), dtype=jnp.float32: jnp.zeros(shape, dtype))
    graphdef, params = split(model)
    batch, _ = packed
    run = jax.jit(gradient, static_argnums=(1, 4))
    # On the total, free bits of nothing are the whole KL, whatever the parts.
    config = dataclasses.replace(CLEAN, free_bits=FreeBitsConfig(mode=mode, target=0.0 if mode == "total" else 1e-3))
    in_parts = dataclasses.replace(config, accumulate=2, remat="full", logits_chunk=10)
    context = StepContext(jax.random.key(0), jnp.float32(0.3))
    expected, expected_logs = run(params, graphdef, plain, context, config)
    found, logs = run(params, graphdef, batch, context, in_parts)
    assert logs.keys() == expected_logs.keys()
    for name, number in expected_logs.items():
        np.testing.assert_allclose(logs[name], number, rtol=1e-5, err_msg=name)
    assert_gradients_close(flatten(found), flatten(expected))


def test_clamped_free_bits_take_the_mean_over_texts(packed):
    batch, _ = packed
    is_text = (batch.lengths > 0).reshape(-1)
    kl = np.where(is_text[:, None], np.random.default_rng(0).uniform(0, 2, (len(is_text), 3)), np.nan)
    mean = functools.partial(mean_over_texts, is_text=is_text)
    found = free_bits_kl(jnp.asarray(kl), FreeBitsConfig(mode="clamp", target=1.0), mean)
    assert found.shape == is_text.shape
    np.testing.assert_allclose(found, np.maximum(kl[is_text].mean(0), 1.0).sum(), rtol=1e-6)


@pytest.mark.parametrize("settings", [dict(shuffle=20.0), dict(drop=0.4), dict(drop=0.3, shuffle=3.0)])
def test_noise_stays_within_a_text(settings):
    texts = texts_of(3, 400, vocab=(4000, 60))
    batches = PackedBatches(texts, 100, pad_id=PAD, row_length=40)
    batch = batches.batch(0)
    ids, segments = jnp.asarray(batch.encoder_ids), Segments(batch.encoder_segments, batch.encoder_starts)
    special = (ids == CLS) | (ids == SEP)
    noise = jax.jit(token_noise, static_argnums=(2, 3))
    noised = noise(ids, special, NoiseConfig(**settings), 4000, jax.random.key(0), segments)
    changed = kept = 0
    for before, after, of_token in zip(batch.encoder_ids, np.asarray(noised), batch.encoder_segments, strict=True):
        assert not after[of_token == 0].any()
        for text in range(1, of_token.max() + 1):
            a, b = before[of_token == text], after[of_token == text]
            length = int((b > 0).sum())
            assert (b[:length] > 0).all()  # what is dropped leaves padding behind the text, in its own segment
            assert b[:2].tolist() == [CLS, CLS] and b[length - 2 : length].tolist() == [SEP, SEP]
            words, found = a[2:-2].tolist(), b[2 : length - 2].tolist()
            assert not set(found) - set(words)
            if "drop" not in settings:
                assert sorted(found) == sorted(words)
            changed += found != words
            kept += len(found) / len(words)
    assert changed > 100
    assert "drop" in settings or kept > 0


def test_noise_without_neighbours_is_the_plain_noise():
    """A row that holds one text gets the very same tokens either way."""
    ids = jnp.asarray(np.pad(TEXTS.encoder_ids[0], (0, 4))[None])
    segments = Segments((ids > 0).astype(jnp.int32), jnp.zeros((1, 3), jnp.int32))
    config = NoiseConfig(drop=0.3, substitute=0.2, shuffle=3.0)
    special, keys = (ids == CLS) | (ids == SEP), jax.random.split(jax.random.key(0), 50)
    draw = lambda *segments: jax.jit(  # noqa: E731
        jax.vmap(lambda key: token_noise(ids, special, config, 50, key, *segments))
    )(keys)
    np.testing.assert_array_equal(draw(), draw(segments))


# ---- which texts share a row


def test_rows_hold_whole_texts_and_little_else():
    """1000 texts of 1 to 40 words, whose sides differ by up to a factor of two."""
    texts = texts_of(5, 1000, longest=40)
    batches = PackedBatches(texts, 8, pad_id=PAD, row_length=128, seed=3)
    assert (batches.padding <= 0.05).all()
    (S, T), real = batches.shape, np.zeros(2)
    for step in range(batches.steps_per_epoch):
        batch = batches.batch(step)
        assert batch.encoder_ids.shape == (8, S) and batch.decoder_ids.shape == (8, T)
        rows = iter(batches.select_texts(step)[0])
        for row in range(8):
            s = t = 0
            for place in range(batches.texts_per_row):
                if not batch.lengths[row, place]:
                    continue
                text = next(rows)
                e, d = texts.encoder_ids[text], texts.decoder_ids[text]
                assert batch.lengths[row, place] == len(d) and batch.encoder_starts[row, place] == s
                in_encoder, in_decoder = slice(s, s := s + len(e)), slice(t, t := t + len(d) - 1)
                assert (batch.encoder_ids[row, in_encoder] == e).all()
                assert (batch.encoder_segments[row, in_encoder] == place + 1).all()
                assert (batch.decoder_ids[row, in_decoder] == d[:-1]).all()
                assert (batch.decoder_targets[row, in_decoder] == d[1:]).all()
                assert (batch.decoder_segments[row, in_decoder] == place + 1).all()
            assert not batch.encoder_ids[row, s:].any() and not batch.encoder_segments[row, s:].any()
            assert (batch.decoder_ids[row, t:] == PAD).all() and not batch.decoder_segments[row, t:].any()
            real += s, t
        assert np.maximum(batch.lengths - 1, 0).sum() == (batch.decoder_segments > 0).sum()
    np.testing.assert_allclose(1 - real / (batches.steps_per_epoch * 8 * np.array([S, T])), batches.padding, atol=0.01)


def test_an_epoch_shows_every_text_once():
    texts = texts_of(5, 1000, longest=40)
    batches = PackedBatches(texts, 8, pad_id=PAD, row_length=128)
    epochs = []
    for epoch in range(3):
        shown = np.concatenate(
            [batches.select_texts(epoch * batches.steps_per_epoch + i)[0] for i in range(batches.steps_per_epoch)]
        )
        assert len(set(shown)) == len(shown) > 1000 - 8 * batches.texts_per_row  # all but rows that fill no batch
        epochs.append(shown)
    assert (epochs[0][:50] != epochs[1][:50]).any()
    in_rows = [{frozenset(row) for row in batches._shuffle(epoch)} for epoch in (0, 1)]
    assert len(in_rows[0] - in_rows[1]) > 0.3 * len(in_rows[0])  # other neighbours, not the rows in another order alone


def test_a_batch_depends_only_on_seed_and_step():
    make = lambda seed: PackedBatches(texts_of(5, 300), 4, pad_id=PAD, row_length=40, seed=seed)  # noqa: E731
    batches, again, other = make(5), make(5), make(6)
    for step in [41, 3, 0, 3, 19]:
        assert all((a == b).all() for a, b in zip(again.batch(step), batches.batch(step), strict=True))
    assert any(set(other.select_texts(step)[0]) != set(batches.select_texts(step)[0]) for step in range(4))


def test_fewer_rows_than_a_batch():
    batches = PackedBatches(texts_of(0, 3), 5, pad_id=PAD, row_length=24)
    assert set(batches.select_texts(0)[0]) == {0, 1, 2} and (batches.batch(7).lengths.sum(1) > 0).all()


def test_texts_too_long_for_a_row_raise():
    with pytest.raises(ValueError, match=r"\[9 3\] does not fit a row of \(8, 8\)"):
        pack(np.array([[2, 3], [9, 1]]), (8, 8), np.random.default_rng(0))
    with pytest.raises(OptionError) as error:
        DataConfig(pack=True, buckets=2)
    assert error.value.option == "--data.buckets"


def test_dialogues_hardly_need_padding(reference_dir):
    """30 000 short utterances, tokenized as published."""
    if not (path := reference_dir / "data" / "dialogue" / "all.txt").is_file():
        pytest.skip(f"{path} is not there")
    tokenizers = load_tokenizers(reference_dir / "tokenizers", DAVAEConfig())
    texts = tokenize(read_texts(path), *tokenizers, max_length=128, source="dialogue")
    batches = PackedBatches(texts, 8, pad_id=PAD, row_length=128)
    assert (batches.padding <= 0.05).all(), batches.padding


# ---- on a mesh


def trained(mesh_config, tmp_path, steps=4, rows=8):
    config = TrainConfig(steps=steps, batch_size=rows, noise=NoiseConfig(embedding=0.1, drop=0.1, shuffle=1.0))
    # The widths of a whole model's: dropout on.
    model_config = dataclasses.replace(
        MODEL,
        encoder=dataclasses.replace(CONFIG.encoder, initializer_range=0.3, max_position_embeddings=16),
        decoder=dataclasses.replace(CONFIG.decoder, initializer_range=0.3, num_layers=1),
    )
    batches = PackedBatches(texts_of(2, 100), rows, pad_id=PAD, row_length=24)
    mesh = make_mesh(mesh_config, rows)
    model = abstract_model(model_config)
    abstract = abstract_state(model, config, mesh)
    state = initial_state(abstract, model_config, config, tmp_path)
    step = make_train_step(split(model)[0], config, abstract)
    losses = []
    with jax.set_mesh(mesh):
        step = step.lower(state, batches.batch(0)).compile()
        for i in range(steps):
            batch = jax.device_put(batches.batch(i), step.input_shardings[0][1])
            state, logs = step(state, batch)
            losses.append([float(logs[name]) for name in ("loss", "rec", "kl_unmasked", "loss_d", "loss_g")])
    return np.array(losses), state, step.as_text()


@pytest.fixture(scope="module")
def one_device(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(jax, "device_count", lambda: 1)
        patch.setattr(jax, "devices", lambda *_: jax.local_devices()[:1])
        return trained(MeshConfig(), tmp_path_factory.mktemp("one"))


@pytest.mark.parametrize("shape", [(8, 1, 1), (2, 4, 1)], ids=["8x1x1", "2x4x1"])
def test_every_mesh_trains_as_one_device(shape, one_device, tmp_path):
    losses, state, program = trained(MeshConfig(*shape), tmp_path)
    np.testing.assert_allclose(losses, one_device[0], rtol=1e-5)
    found, expected = (flatten(jax.device_get(s.params)) for s in (state, one_device[1]))
    for path in expected:
        np.testing.assert_allclose(found[path], expected[path], atol=1e-4, err_msg=path)
    if shape == (8, 1, 1):
        assert "all-gather" not in program  # a row's latents are where the row is; weights are whole everywhere
