"""Tokenizers for a corpus that has none: WordPiece for the encoder, SentencePiece BPE for the decoder."""

from __future__ import annotations

import io
import re
from collections.abc import Sequence

from davae_jax.utils.errors import InputError, first_line

SPECIAL = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]


def train_wordpiece(texts: Sequence[str], vocab_size: int) -> bytes:
    """A vocab.txt of so many entries at most, special tokens counted. Every Chinese character is a word, as in BERT."""
    from tokenizers import BertWordPieceTokenizer

    tokenizer = BertWordPieceTokenizer(lowercase=True)
    tokenizer.train_from_iterator(
        texts,
        vocab_size=vocab_size,
        limit_alphabet=vocab_size,  # else the most frequent 1,000 characters alone
        min_frequency=1,
        special_tokens=SPECIAL,
        show_progress=False,
    )
    vocabulary = tokenizer.get_vocab()
    return "".join(f"{entry}\n" for entry in sorted(vocabulary, key=vocabulary.get)).encode("utf-8")


def train_sentencepiece(texts: Sequence[str], vocab_size: int) -> bytes:
    """A spiece.model of so many pieces at most: every character and the most useful merges. It gives texts back as is.

    Raises:
      InputError: the texts have more characters than that (exit code 2).
    """
    from sentencepiece import SentencePieceTrainer

    model = io.BytesIO()
    try:
        SentencePieceTrainer.train(
            sentence_iterator=iter(texts),
            model_writer=model,
            model_type="bpe",
            vocab_size=vocab_size,
            character_coverage=0.9999,
            max_sentence_length=1 << 30,  # in bytes; longer texts would be left out in silence
            normalization_rule_name="identity",  # else full-width punctuation would come back half-width
            unk_id=0,
            bos_id=1,
            eos_id=2,
            pad_id=-1,
            num_threads=1,
            minloglevel=2,
        )
    except RuntimeError as e:
        if fewest := re.search(r"smaller than required_chars\. \d+ vs (\d+)", str(e)):
            said = f"--data.pieces {vocab_size}: the texts have {fewest[1]} different characters; give more pieces"
            raise InputError(said, exit_code=2) from e
        # Short or uniform texts have fewer merges to offer; the message says how many pieces they are good for.
        if most := re.search(r"set it to a value <= (\d+)", str(e)):
            return train_sentencepiece(texts, int(most[1]))
        raise InputError(
            f"a SentencePiece model of {vocab_size} pieces cannot be trained on this: {first_line(e)}"
        ) from e
    return model.getvalue()
