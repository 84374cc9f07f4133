"""Trains tokenizers on a corpus: WordPiece for the encoder, SentencePiece BPE for the decoder."""

from __future__ import annotations

import io
import re
import warnings
from collections import Counter
from collections.abc import Iterator, Sequence
from itertools import chain
from typing import Any

from davae_jax.utils.errors import InputError, OptionError, first_line

# SentencePiece uses the first of these characters to separate texts from each other, the second for blanks.
BOUNDARY, SPACE = "\u2585", "\u2581"
WORDS_PER_TEXT = 1000  # of those that WordPiece is trained on
MAX_WORD = 100  # characters of a word; a longer one is unknown to BERT's WordPiece, whatever the vocabulary
_NOT_LEARNED = dict.fromkeys(map(ord, f" \r\n{SPACE}"))
# What tokenizers are trained on: so many texts and bytes, and of each text so many characters. Training takes about 50
# bytes of memory for each byte, and hundreds for each of the longest text.
SAMPLE_TEXTS, SAMPLE_BYTES, SAMPLE_CHARACTERS = 50_000, 1 << 26, 1 << 18
SPECIAL_TOKENS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]


def sample_first(texts: Sequence[str]) -> list[str]:
    """Returns the first texts, or their beginnings, to train tokenizers on."""
    sample, size = [], 0
    for text in texts[:SAMPLE_TEXTS]:
        sample.append(text[:SAMPLE_CHARACTERS])
        size += len(sample[-1].encode("utf-8"))
        if size >= SAMPLE_BYTES:
            break
    return sample


def train_wordpiece(texts: Sequence[str], vocab_size: int) -> bytes:
    """Returns the content of a vocab.txt with at most `vocab_size` tokens, the special ones included.

    As in BERT, every Chinese character is a separate word. The same texts give the same bytes.
    """
    from tokenizers import BertWordPieceTokenizer

    tokenizer = BertWordPieceTokenizer(lowercase=True)
    words = _count_words(texts, tokenizer)
    # The library breaks ties in the order of a hash table, which differs between processes. There are none left if it
    # need not choose between characters, and knows beforehand the ids of those that continue a word.
    characters = Counter()
    for word, count in words.items():
        characters.update(dict.fromkeys(word, count))
    rare = sorted(characters, key=lambda character: (-characters[character], character))[vocab_size:]
    if rare:
        remove, all_words, words = dict.fromkeys(map(ord, rare)), words, Counter()
        for word, count in all_words.items():
            words[word.translate(remove)] += count
    continuing = sorted(set(chain.from_iterable(word[1:] for word in words)))
    tokenizer.train_from_iterator(
        _repeat_words(words),
        vocab_size=vocab_size,
        limit_alphabet=vocab_size,  # the default keeps only the 1,000 most frequent characters
        min_frequency=1,
        special_tokens=[*SPECIAL_TOKENS, *(f"##{character}" for character in continuing)],
        show_progress=False,
    )
    vocabulary = tokenizer.get_vocab()
    return "".join(f"{token}\n" for token in sorted(vocabulary, key=vocabulary.get)).encode("utf-8")


def _count_words(texts: Sequence[str], tokenizer: Any) -> Counter[str]:
    """Returns the normalized words of the texts and how often each occurs.

    Words that WordPiece turns into [UNK] because of their length are left out: the time to train on a word grows with
    the square of its length.
    """
    normalized = _NormalizedCharacters(tokenizer.normalizer)
    runs = Counter(chain.from_iterable(text.translate(normalized).split() for text in texts))
    words = Counter()
    for run, count in runs.items():
        for word, _ in tokenizer.pre_tokenizer.pre_tokenize_str(run):
            if len(word) <= MAX_WORD:
                words[word] += count
    return words


class _NormalizedCharacters(dict[int, str]):
    """The table for `str.translate` by which BERT's normalizer, which treats each character by itself, replaces them.

    It costs less than the normalizer, which keeps where each character comes from.
    """

    def __init__(self, normalizer: Any):
        super().__init__()
        self._normalizer = normalizer

    def __missing__(self, code: int) -> str:
        self[code] = self._normalizer.normalize_str(chr(code))
        return self[code]


def _repeat_words(words: Counter[str]) -> Iterator[str]:
    """Yields texts that contain every word as often as it occurs, but a word of one character once.

    WordPiece counts pairs of characters. A word of one has none, and nearly all words of a Chinese text are such words.
    """
    for word, count in words.items():
        count = 1 if len(word) == 1 else count
        for start in range(0, count, WORDS_PER_TEXT):
            yield " ".join([word] * min(count - start, WORDS_PER_TEXT))


def train_sentencepiece(texts: Sequence[str], vocab_size: int, *, option: str, source: str = "the texts") -> bytes:
    """Returns the content of a spiece.model with at most `vocab_size` pieces: all characters and frequent merges.

    The model does not normalize, so that decoding gives back the same text.

    Args:
      option: the option that sets `vocab_size`, for the error message.
      source: the files of the texts, for messages.

    Raises:
      OptionError: the texts have more characters than `vocab_size`.
      InputError: the texts have nothing that SentencePiece can learn, or training fails for another reason.
    """
    _check_learnable(texts, source)
    return _train_sentencepiece(texts, vocab_size, option, source)


def _check_learnable(texts: Sequence[str], source: str) -> None:
    """Raises InputError if SentencePiece would find nothing in the texts, and warns of texts that it leaves out."""
    reserved = (
        f"U+{ord(BOUNDARY):04X} ({BOUNDARY}), which SentencePiece reserves, and it learns nothing from such a text"
    )
    remedy = "remove the character, or give --tokenizers"
    without = [text for text in texts if BOUNDARY not in text]
    if texts and not without:
        raise InputError(f"{source}: every text contains {reserved}; {remedy}")
    if not any(text.translate(_NOT_LEARNED) for text in without):
        only = f"blanks and U+{ord(SPACE):04X} ({SPACE}), which stands for a blank"
        raise InputError(f"{source}: no tokenizer can be trained on texts of {only}; give --tokenizers")
    if len(without) < len(texts):
        number = f"{len(texts) - len(without):,} of {len(texts):,} texts contain"
        warnings.warn(f"{source}: {number} {reserved}; {remedy}", stacklevel=3)


def _train_sentencepiece(texts: Sequence[str], vocab_size: int, option: str, source: str) -> bytes:
    from sentencepiece import SentencePieceTrainer

    model = io.BytesIO()
    try:
        SentencePieceTrainer.train(
            sentence_iterator=iter(texts),
            model_writer=model,
            model_type="bpe",
            vocab_size=vocab_size,
            character_coverage=0.9999,
            max_sentence_length=1 << 30,  # in bytes; the default would silently drop long texts
            normalization_rule_name="identity",  # the default makes full-width punctuation half-width
            unk_id=0,
            bos_id=1,
            eos_id=2,
            pad_id=-1,
            num_threads=1,
            minloglevel=2,
        )
    except RuntimeError as e:
        # SentencePiece has no types for its errors; its messages give the numbers.
        if required := re.search(r"smaller than required_chars\. \d+ vs (\d+)", str(e)):
            reason = f"{vocab_size}: the texts have {required[1]} different characters; choose a larger vocabulary"
            raise OptionError(option, reason) from e
        # Few or uniform texts do not have enough merges to fill the vocabulary.
        if possible := re.search(r"set it to a value <= (\d+)", str(e)):
            return _train_sentencepiece(texts, int(possible[1]), option, source)
        reason = f"no SentencePiece model can be trained with {option} {vocab_size}: {first_line(e)}"
        raise InputError(f"{source}: {reason}; give --tokenizers") from e
    return model.getvalue()
