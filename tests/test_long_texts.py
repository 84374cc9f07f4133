"""Texts read in segments with the recurrent memory: the losses are the model's own, and the memory is of use."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from small_model import CONFIG, new_model

from davae_jax.data.batches import Batch
from davae_jax.data.config import DataConfig
from davae_jax.data.tokenize import tokenize
from davae_jax.model.davae import merge, split
from davae_jax.model.losses import reconstruction_nll
from davae_jax.training.config import BetaConfig, NoiseConfig, TrainConfig
from davae_jax.training.objective import reconstruction
from davae_jax.training.state import init_state
from davae_jax.training.step import make_train_step
from davae_jax.utils.errors import InputError, OptionError

BOS, END, PAD = CONFIG.bos_token_id, CONFIG.end_token_id, CONFIG.pad_token_id
SEGMENT, LENGTHS = 8, np.array([22, 6, 15], np.int32)
CLEAN = TrainConfig(steps=10, noise=NoiseConfig(embedding=0.0))


def with_data(**settings):
    return dataclasses.replace(CLEAN, data=DataConfig(**settings))


def batch_of(lengths, T):
    rng = np.random.default_rng(0)
    encoder_ids, decoder_ids = rng.integers(4, 50, (len(lengths), 12)), rng.integers(0, 60, (len(lengths), T))
    decoder_ids[:, 0] = BOS
    decoder_ids[np.arange(len(lengths)), lengths - 1] = END
    decoder_ids[np.arange(T) >= lengths[:, None]] = PAD
    return Batch.of_texts(encoder_ids.astype(np.int32), decoder_ids.astype(np.int32), lengths)


BATCH = batch_of(LENGTHS, 24)
DECODER_IDS = np.concatenate([BATCH.decoder_ids[:, :1], BATCH.decoder_targets], axis=1)
LATENT = np.random.default_rng(1).normal(size=(3, CONFIG.latent_size)).astype(np.float32)


@pytest.fixture(scope="module")
def models():
    """By the rows that the memory holds: one that holds a whole text, and one that forgets."""
    return {
        rows: new_model(
            dataclasses.replace(CONFIG, decoder=dataclasses.replace(CONFIG.decoder, max_memory_length=rows)), scale=4.0
        )
        for rows in (64, 5)
    }


def losses(model, config, batch=BATCH):
    graphdef, params = split(model)
    run = jax.jit(lambda params: reconstruction(merge(graphdef, params), batch, LATENT, None, config)[0])
    return np.asarray(run(params))


def test_with_the_full_mask_and_room_for_all_it_is_the_text_in_one_piece(models):
    expected = losses(models[64], CLEAN)
    np.testing.assert_allclose(losses(models[64], with_data(segment_length=SEGMENT)), expected, rtol=1e-5)
    np.testing.assert_allclose(losses(models[64], with_data(segment_length=24)), expected, rtol=0)  # one segment


@pytest.mark.parametrize("mask", ["full", "published"])
def test_segments_are_read_as_the_model_reads_them(models, mask):
    """Part after part by `decode` with the memory that it returns; what fits a segment is as in one piece."""
    model, window = models[5], "published" if mask == "published" else None
    found = losses(model, with_data(segment_length=SEGMENT, segment_mask=mask))
    memory, logits = None, []
    for begin in range(0, 24, SEGMENT):
        part, memory = model.decode(DECODER_IDS[:, begin : begin + SEGMENT], LATENT, memory=memory, window=window)
        logits.append(part)
    targets = DECODER_IDS[:, 1:]
    counted = np.arange(1, 24) < LENGTHS[:, None]
    expected = reconstruction_nll(jnp.concatenate(logits, axis=1)[:, :-1], jnp.asarray(targets), jnp.asarray(counted))
    np.testing.assert_allclose(found, expected, rtol=1e-5)
    in_one_piece = losses(model, CLEAN)
    np.testing.assert_allclose(found[1], in_one_piece[1], rtol=1e-5)
    assert np.abs(found - in_one_piece)[[0, 2]].min() > 1e-3  # the others lose sight of something


def far_batch(rng, rows=64):
    """s at the text's beginning, and again eleven tokens later, behind a sign, in the second segment."""
    s = rng.integers(0, 4, rows)
    filler = rng.integers(10, 30, (rows, 9))
    column = lambda x: np.full((rows, 1), x)  # noqa: E731
    decoder_ids = np.concatenate([column(BOS), s[:, None], filler, column(40), s[:, None], column(END)], axis=1)
    encoder_ids = np.tile(np.array([2, 5, 3]), (rows, 1))  # the latent knows nothing of s
    return Batch.of_texts(encoder_ids.astype(np.int32), decoder_ids.astype(np.int32), np.full(rows, 14, np.int32))


def answer_loss(rows, steps=250):
    """−log p of the second s after training, with a memory of so many rows."""
    decoder = dataclasses.replace(
        CONFIG.decoder,
        hidden_size=32,
        max_memory_length=rows,
        embedding_dropout_prob=0.0,
        attention_dropout_prob=0.0,
        output_dropout_prob=0.0,
        initializer_range=0.2,
    )
    model = new_model(dataclasses.replace(CONFIG, decoder=decoder))
    config = dataclasses.replace(
        CLEAN,
        steps=steps,
        data=DataConfig(segment_length=SEGMENT),
        beta=BetaConfig(start=0.1, max=0.1),
        optimizer=dataclasses.replace(CLEAN.optimizer, learning_rate=5e-3, weight_decay=0.0),
    )
    graphdef, params = split(model)
    step, state, rng = make_train_step(graphdef, config), init_state(params, config), np.random.default_rng(0)
    for _ in range(steps):
        state, _ = step(state, far_batch(rng))
    batch = far_batch(rng)
    # Of both lengths the sum of −log p; the difference is that of the answer alone.
    total = lambda n: reconstruction(  # noqa: E731
        merge(graphdef, state.params), batch._replace(lengths=np.full((64, 1), n)), jnp.zeros((64, 4)), None, config
    )[0]
    return float((total(13) - total(12)).mean())


@pytest.mark.slow
def test_longer_dependencies_than_a_segment_need_memory():
    """Four equally likely signs: ln 4 = 1.39 nats for who has to guess."""
    assert answer_loss(rows=16) < 0.2
    assert answer_loss(rows=0) > 1.3


def test_a_long_text_is_kept_though_the_encoder_cannot_read_all_of_it(tiny_vae):
    encoder, decoder = tiny_vae.encoder_tokenizer, tiny_vae.decoder_tokenizer
    text = "a" * 3 + " a" * encoder.max_ids
    with pytest.raises(InputError):
        tokenize([text], encoder, decoder, max_length=10_000, source="x")
    texts = tokenize([text], encoder, decoder, max_length=10_000, source="x", truncate=True)
    assert len(texts.encoder_ids[0]) == encoder.max_ids + 2 and len(texts.decoder_ids[0]) > encoder.max_ids


def test_packed_rows_have_no_segments():
    with pytest.raises(OptionError) as error:
        DataConfig(pack=True, segment_length=8)
    assert error.value.option == "--data.segment-length"
