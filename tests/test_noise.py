"""Noise on the encoder's input: what each kind does, and that it does it as often as it is told to."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from davae_jax.training.config import NoiseConfig
from davae_jax.training.noise import embedding_noise, token_noise
from davae_jax.utils.errors import InputError

CLS, SEP, V = 2, 3, 1000
ROWS, WORDS = 200, 30


@pytest.fixture(scope="module")
def ids():
    """[CLS] [CLS] words [SEP] [SEP] padding; row i has WORDS − i % 5 words, all different."""
    ids = np.zeros((ROWS, WORDS + 8), np.int32)
    for i in range(ROWS):
        words = np.arange(10, 10 + WORDS - i % 5)
        row = [CLS, CLS, *words, SEP, SEP]
        ids[i, : len(row)] = row
    return jnp.asarray(ids)


def noised(ids, **settings):
    special = (ids == CLS) | (ids == SEP)
    return np.asarray(token_noise(ids, special, NoiseConfig(**settings), V, jax.random.key(1)))


def words_of(row):
    return row[row > SEP].tolist()


def test_no_noise_changes_nothing(ids):
    np.testing.assert_array_equal(noised(ids), ids)


@pytest.mark.parametrize("settings", [dict(drop=0.3), dict(shuffle=4.0), dict(drop=0.3, substitute=0.2, shuffle=9.0)])
def test_special_tokens_stay_and_padding_is_behind(ids, settings):
    for row in noised(ids, **settings):
        length = int((row > 0).sum())
        assert (row[:length] > 0).all()
        assert row[:2].tolist() == [CLS, CLS] and row[length - 2 : length].tolist() == [SEP, SEP]
        assert not np.isin(row[2 : length - 2], [CLS, SEP]).any() or settings.get("substitute")


def test_drop_leaves_out_and_keeps_the_order(ids):
    found = noised(ids, drop=0.3)
    kept = 0
    for row, clean in zip(found, np.asarray(ids), strict=True):
        assert words_of(row) == [w for w in words_of(clean) if w in words_of(row)]
        kept += len(words_of(row))
    total = sum(len(words_of(row)) for row in np.asarray(ids))
    assert abs(kept / total - 0.7) < 5 * np.sqrt(0.3 * 0.7 / total)


def test_substitute_replaces_in_place(ids):
    found, clean = noised(ids, substitute=0.2), np.asarray(ids)
    is_word = clean > SEP
    assert (found[~is_word] == clean[~is_word]).all()
    changed, total = (found != clean)[is_word].sum(), is_word.sum()
    assert abs(changed / total - 0.2 * (1 - 1 / V)) < 5 * np.sqrt(0.2 * 0.8 / total)
    new = found[(found != clean) & is_word]
    assert new.min() >= 1 and new.max() < V and abs(new.mean() - V / 2) < 5 * V / np.sqrt(12 * len(new))


def test_shuffle_moves_words_a_little(ids):
    """Places get less than k + 1 added, so a word moves by k at most, and some do."""
    for k in (1, 3):
        farthest = 0
        for row, clean in zip(noised(ids, shuffle=float(k)), np.asarray(ids), strict=True):
            before, after = words_of(clean), words_of(row)
            assert sorted(after) == before
            distance = np.abs(np.array([after.index(w) for w in before]) - np.arange(len(before)))
            farthest = max(farthest, distance.max())
        assert farthest == k


def test_embedding_noise():
    noise = np.asarray(embedding_noise(jax.random.key(0), (50, 20, 16), NoiseConfig(embedding=0.3)))
    assert abs(noise.std() - 0.3) < 0.01 and abs(noise.mean()) < 0.01
    assert embedding_noise(jax.random.key(0), (1, 1, 1), NoiseConfig(embedding=0.0)) is None


@pytest.mark.parametrize("settings", [dict(drop=1.0), dict(substitute=-0.1), dict(shuffle=-1.0), dict(embedding=-1.0)])
def test_invalid_settings_raise(settings):
    with pytest.raises(InputError, match=f"--noise.{next(iter(settings))}"):
        NoiseConfig(**settings)
