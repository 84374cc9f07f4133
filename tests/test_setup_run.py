"""What a run needs before its first step, on texts of one's own."""

import dataclasses

import numpy as np
import pytest

from davae_jax.data.tokenize import filter_by_length, tokenize
from davae_jax.tokenizers.load import load_tokenizers
from davae_jax.training.presets import DEMO
from davae_jax.training.run.vocabularies import model_config, prepare_tokenizers
from davae_jax.training.setup import load_corpus
from davae_jax.utils.errors import InputError

CHARACTERS = [chr(0x4E00 + i) for i in range(1500)]  # more than the demo's corpus has, or a tokenizer's defaults take


@pytest.fixture
def config(tmp_path):
    """The default preset on a file of 300 texts of five characters, the last 100 of which repeat earlier ones."""
    texts = ["".join(CHARACTERS[i : i + 5]) for i in range(0, 1500, 5)]
    path = tmp_path / "texts.txt"
    path.write_text("\n".join(texts + texts[:100]) + "\n", encoding="utf-8")
    return dataclasses.replace(DEMO, data=dataclasses.replace(DEMO.data, train=path))


def test_the_default_tokenizers_know_every_character(config, tmp_path):
    corpus = load_corpus(config)
    prepare_tokenizers(config, tmp_path, corpus._replace(train=corpus.train + CHARACTERS))
    encoder, decoder = load_tokenizers(tmp_path, model_config(config, tmp_path))
    text = "".join(CHARACTERS[700:750])
    assert encoder.unk_id not in encoder.encode([text])[0]
    assert decoder.unk_id not in decoder.encode(text)
    assert decoder.decode(decoder.encode(text)[:-1]) == text


def test_too_few_pieces_name_the_option(config, tmp_path):
    few = dataclasses.replace(config, data=dataclasses.replace(config.data, decoder_vocab_size=600))
    with pytest.raises(InputError, match=r"^--data.decoder-vocab-size 600: ") as e:
        prepare_tokenizers(few, tmp_path, load_corpus(config))
    assert e.value.exit_code == 2


def test_held_out_texts_are_never_trained_on(config):
    """All copies of a text are kept apart, and every other line is trained on, under its own number."""
    corpus = load_corpus(config)
    lines = config.data.train[0].read_text(encoding="utf-8").splitlines()
    assert len(corpus.held_out) == 3  # 1 % of 300
    assert not set(corpus.held_out) & set(corpus.train)
    assert corpus.train == [lines[i - 1] for i in corpus.lines]
    assert len(corpus.train) + sum(lines.count(text) for text in corpus.held_out) == 400
    assert np.all(np.diff(corpus.lines) > 0)


def test_texts_that_the_encoder_would_cut_are_left_out(config, tmp_path):
    """130 positions, doubled special tokens: 126 characters fit. A decoder's pieces may hold more than one each."""
    prepare_tokenizers(config, tmp_path, load_corpus(config)._replace(train=CHARACTERS))
    tokenizers = load_tokenizers(tmp_path, model_config(config, tmp_path))
    fits, cut = "".join(CHARACTERS[:126]), "".join(CHARACTERS[:127])
    assert filter_by_length([fits, cut, " "], *tokenizers, 1000) == [fits]
    texts = tokenize([cut, fits], *tokenizers, max_length=1000, source="x")
    assert texts.lines.tolist() == [2] and texts.too_long == 1 and len(texts.encoder_ids[0]) == 130
