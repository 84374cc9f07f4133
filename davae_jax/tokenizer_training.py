"""Tokenizers for a corpus that has none: WordPiece for the encoder, SentencePiece BPE for the decoder."""

from __future__ import annotations

import io
from collections.abc import Sequence
from pathlib import Path

from davae_jax.checkpoint import TOKENIZER_FILES
from davae_jax.errors import InputError, first_line

SPECIAL = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
CLS_ID, SEP_ID = 2, 3


def train_tokenizers(texts: Sequence[str], folder: Path, *, pieces: int, entries: int) -> None:
    """Writes vocab.txt and spiece.model, trained on the texts.

    Args:
      pieces: of spiece.model at most, `<unk>` and the two control pieces counted.
      entries: of vocab.txt at most, special tokens counted.

    Raises:
      InputError: the texts are too few or too uniform to train on.
    """
    vocab, spiece = (folder / name for name in TOKENIZER_FILES)
    _write_whole(vocab, "".join(f"{entry}\n" for entry in train_wordpiece(texts, entries)).encode("utf-8"))
    _write_whole(spiece, train_sentencepiece(texts, pieces))


def train_wordpiece(texts: Sequence[str], entries: int) -> list[str]:
    """The vocabulary; an entry's place is its id. Every Chinese character is a word of its own, as in BERT."""
    from tokenizers import BertWordPieceTokenizer

    tokenizer = BertWordPieceTokenizer(lowercase=True)
    tokenizer.train_from_iterator(
        texts, vocab_size=entries, min_frequency=1, special_tokens=SPECIAL, show_progress=False
    )
    vocabulary = tokenizer.get_vocab()
    return sorted(vocabulary, key=vocabulary.get)


def train_sentencepiece(texts: Sequence[str], pieces: int) -> bytes:
    """A BPE model of every character and the most useful merges; it gives texts back as they were."""
    from sentencepiece import SentencePieceTrainer

    model = io.BytesIO()
    try:
        SentencePieceTrainer.train(
            sentence_iterator=iter(texts),
            model_writer=model,
            model_type="bpe",
            vocab_size=pieces,
            character_coverage=0.9999,
            normalization_rule_name="identity",  # else full-width punctuation would come back half-width
            unk_id=0,
            bos_id=1,
            eos_id=2,
            pad_id=-1,
            num_threads=1,
            minloglevel=2,
        )
    except RuntimeError as e:
        raise InputError(f"a SentencePiece model of {pieces} pieces cannot be trained on this: {first_line(e)}") from e
    return model.getvalue()


def _write_whole(path: Path, data: bytes) -> None:
    beside = path.with_name(f".{path.name}.partial")
    beside.write_bytes(data)
    beside.replace(path)
