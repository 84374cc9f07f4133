"""Tokenizes texts for the encoder: BERT WordPiece with doubled special tokens, as in the published program."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

from davae_jax.tokenizers.files import read_file, require_unicode
from davae_jax.utils.errors import InputError

CHARACTERS_PER_CALL = 1 << 20  # of the tokenizer, which takes hundreds of bytes of memory for each
CHARACTERS_PER_ID = 32  # of a long text, are read first, which is nearly always enough for the ids that are kept
# Text that equals one of these becomes its id, as in the published program.
SPECIAL_TOKENS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]


class EncoderTokenizer:
    """Turns texts into the ids of lower-casing BERT WordPiece, as `[CLS] [CLS] … [SEP] [SEP]`.

    The published program lets the tokenizer add [CLS] and [SEP], truncates, and then adds both a second time; the
    checkpoint was trained on this doubled form. Truncation removes the inner [SEP], so a truncated text ends in one.

    Attributes:
      size: the number of tokens in vocab.txt.
      unk_id, cls_id, sep_id: the ids of [UNK], [CLS] and [SEP].
      max_ids: see `__init__`.
    """

    def __init__(self, folder: str | Path, *, cls_id: int = 101, sep_id: int = 102, max_ids: int = 510):
        """Reads `folder`/vocab.txt and no other file.

        Args:
          folder: the folder that contains vocab.txt.
          cls_id: the id of [CLS] in the model's config.
          sep_id: the id of [SEP] in the model's config.
          max_ids: the maximum number of ids per text, with the inner [CLS] and [SEP] but without the outer pair: the
            number of the encoder's positions minus two, 510 in the published model.

        Raises:
          InputError: vocab.txt is missing, unreadable or not a WordPiece vocabulary, or does not have the special
            tokens at the ids given.
        """
        path = Path(folder) / "vocab.txt"
        vocabulary = read_vocabulary(path)
        # [PAD] must be 0, because the encoder's attention mask is `ids > 0`.
        expected_ids = {"[PAD]": 0, "[CLS]": cls_id, "[SEP]": sep_id}
        for token in SPECIAL_TOKENS:
            expected = expected_ids.get(token)
            if token not in vocabulary:
                raise InputError(f"{path}: the vocabulary lacks {token}")
            if expected is not None and (token_id := vocabulary.index(token)) != expected:
                raise InputError(f"{path}: {token} has id {token_id}, but the model expects {expected}")
        self.size = len(vocabulary)
        self.unk_id = vocabulary.index("[UNK]")
        self.cls_id, self.sep_id, self.max_ids = cls_id, sep_id, max_ids
        ids = {token: i for i, token in enumerate(vocabulary)}
        if len(ids) != len(vocabulary):
            repeated = next(token for i, token in enumerate(vocabulary) if ids[token] != i)
            raise InputError(f"{path}: the vocabulary repeats {repeated!r}; each token must be on one line")
        self._tokenizer = _make_wordpiece(ids)

    def encode(self, texts: Sequence[str]) -> list[list[int]]:
        """Returns the ids of each text as in the published program: at least four, at most `max_ids` + 2.

        Raises:
          InputError: a text contains half of a surrogate pair, which is not a character.
        """
        if not texts:
            return []
        for text in texts:
            require_unicode(text)
        beginnings = [_beginning(text, CHARACTERS_PER_ID * self.max_ids) for text in texts]
        encoded = self._encode_once(beginnings)
        # A beginning with fewer ids than are kept does not tell what follows.
        short = [
            i
            for i, (text, beginning) in enumerate(zip(texts, beginnings, strict=True))
            if len(beginning) < len(text) and len(encoded[i]) <= self.max_ids
        ]
        for i, ids in zip(short, self._encode_once([texts[i] for i in short]), strict=True):
            encoded[i] = ids
        return [[self.cls_id, *ids[: self.max_ids], self.sep_id] for ids in encoded]

    def _encode_once(self, texts: Sequence[str]) -> list[list[int]]:
        """Returns the ids of each text with the inner [CLS] and [SEP], one more of them than are kept at most."""
        encoded = (encoding for part in _parts(texts) for encoding in self._tokenizer.encode_batch_fast(part))
        return [encoding.ids[: self.max_ids + 1] for encoding in encoded]

    def is_truncated(self, ids: Sequence[int]) -> bool:
        """Returns whether `encode` has truncated the text with these ids: the inner [SEP] is missing.

        A text that was truncated directly after a literal "[SEP]" counts as complete.
        """
        return ids[-2] != self.sep_id

    def problem(self, ids: Sequence[int]) -> str | None:
        """Returns why the latent cannot represent the text with these ids from `encode` well; None if it can."""
        body = ids[2:-1] if self.is_truncated(ids) else ids[2:-2]
        if not body:
            return "the text is empty or only white space"
        if all(i == self.unk_id for i in body):
            return "the encoder knows no character of the text"
        if self.is_truncated(ids):
            return f"the text is longer than {self.max_ids} ids and was truncated"
        return None


def _beginning(text: str, characters: int) -> str:
    """Returns at most so many characters of a text, up to a blank or a Chinese character, or the whole text.

    Words and literal special tokens end there, so that its ids are the first ones of the text.
    """
    if len(text) <= characters:
        return text
    ends = (
        end for end in range(characters, 0, -1) if text[end - 1] in " \t\n" or "\u4e00" <= text[end - 1] <= "\u9fff"
    )
    return text[: next(ends, len(text))]


def _parts(texts: Sequence[str]) -> Iterator[list[str]]:
    """Yields the texts in lists of about CHARACTERS_PER_CALL."""
    part, characters = [], 0
    for text in texts:
        part.append(text)
        characters += len(text)
        if characters >= CHARACTERS_PER_CALL:
            yield part
            part, characters = [], 0
    if part:
        yield part


def read_vocabulary(path: Path) -> list[str]:
    """Returns the tokens in a vocab.txt, by id. Raises InputError if the file cannot be read or is damaged."""
    data = read_file(path)
    # Only line feeds end a token: two published tokens contain U+2028, at which `splitlines` would split.
    try:
        vocabulary = data.decode("utf-8").split("\n")
    except UnicodeDecodeError as error:
        raise InputError(f"{path}: not UTF-8 text (byte {error.start})") from None
    if vocabulary[-1] == "":  # after the last line feed
        vocabulary.pop()
    if not vocabulary:
        raise InputError(f"{path}: the vocabulary is empty")
    vocabulary = [token.removesuffix("\r") for token in vocabulary]
    last = len(vocabulary) - 1
    for i, token in enumerate(vocabulary):
        # No text has such a token. An empty one at the end changes no id.
        if "\0" in token or token != token.strip(" \t") or (token == "" and i < last):
            hint = "is the file damaged? If not, put an unused token there"
            raise InputError(f"{path}: line {i + 1} is no token but {token!r}; {hint}")
    return vocabulary


def _make_wordpiece(ids: dict[str, int]):
    """Returns the tokenizer of bert-base-chinese: lower case, a token per Chinese character, [CLS] and [SEP] added."""
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors

    tokenizer = Tokenizer(models.WordPiece(ids, unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=True)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.post_processor = processors.BertProcessing(("[SEP]", ids["[SEP]"]), ("[CLS]", ids["[CLS]"]))
    tokenizer.add_special_tokens(SPECIAL_TOKENS)
    return tokenizer
