"""The encoder's tokenizer: BERT WordPiece with doubled special tokens, as published."""

from __future__ import annotations

import logging
import tempfile
from collections.abc import Sequence
from pathlib import Path

from davae_jax.tokenizers.files import read_file, require_unicode
from davae_jax.utils.errors import InputError, first_line


class EncoderTokenizer:
    """BERT WordPiece, lower-casing: text to `[CLS] [CLS] … [SEP] [SEP]`.

    The published program lets the tokenizer add [CLS] and [SEP], cuts, and then adds both once more; the checkpoint
    has only ever seen the doubled form. The cut comes between the two, so a cut text ends in one [SEP].

    Attributes:
      size: number of entries of vocab.txt.
    """

    def __init__(self, folder: str | Path, *, cls_id: int = 101, sep_id: int = 102, max_ids: int = 510):
        """Reads `folder`/vocab.txt and nothing else.

        Args:
          folder: where vocab.txt lies.
          cls_id: id of [CLS], as the model's config has it.
          sep_id: id of [SEP], likewise.
          max_ids: ids kept of a text, its own [CLS] and [SEP] counted, the outer pair not. The encoder's number of
            positions less 2; 510 as published.

        Raises:
          InputError: vocab.txt is missing, unreadable or not a WordPiece vocabulary, or does not have the special
            tokens at the ids given.
        """
        path = Path(folder) / "vocab.txt"
        data = read_file(path)
        entries = _vocabulary(path, data)
        # [PAD] must be 0: the encoder's attention mask is `ids > 0`.
        for token, wanted in (("[PAD]", 0), ("[UNK]", None), ("[CLS]", cls_id), ("[SEP]", sep_id), ("[MASK]", None)):
            if token not in entries:
                raise InputError(f"{path}: the vocabulary lacks {token}")
            if wanted is not None and entries.index(token) != wanted:
                raise InputError(f"{path}: {token} has id {entries.index(token)}, where the model expects {wanted}")
        self.size = len(entries)
        self.unk_id = entries.index("[UNK]")
        self.cls_id, self.sep_id, self.max_ids = cls_id, sep_id, max_ids
        self._tokenizer = _load_wordpiece(path, data)
        # Repeated entries shrink the vocabulary, and transformers can fall back to one of five entries in silence.
        if len(self._tokenizer) != self.size:
            raise InputError(
                f"{path}: {self.size} entries, but the tokenizer made from them has {len(self._tokenizer)};"
                " the file must hold one token a line, none twice"
            )

    def encode(self, texts: Sequence[str]) -> list[list[int]]:
        """The published encoder ids of each text: at least four, at most `max_ids` + 2.

        Raises:
          InputError: a text holds half of a surrogate pair, which is no character.
        """
        if not texts:
            return []
        for text in texts:
            require_unicode(text)
        encoded = self._tokenizer(list(texts), return_attention_mask=False, return_token_type_ids=False)
        return [[self.cls_id, *ids[: self.max_ids], self.sep_id] for ids in encoded["input_ids"]]

    def problem(self, ids: Sequence[int]) -> str | None:
        """Why a text with these ids, from `encode`, will not come through the latent well; None where all is fine.

        Read off the ids, so the text is not tokenized again. A cut is seen by its single [SEP] at the end: a text that
        is cut right behind a literal "[SEP]" of its own passes as whole.
        """
        inner = ids[2:-1]  # without both [CLS] and the outer [SEP]
        was_cut = not inner or inner[-1] != self.sep_id
        body = inner if was_cut else inner[:-1]
        if not body:
            return "the text is empty or only white space"
        if all(i == self.unk_id for i in body):
            return "the encoder knows no character of the text"
        if was_cut:
            return f"the text is longer than {self.max_ids} ids and was cut"
        return None


def read_vocabulary(path: Path) -> list[str]:
    """The entries of a vocab.txt; an entry's place is its id. Raises InputError where there is no such file."""
    return _vocabulary(path, read_file(path))


def _vocabulary(path: Path, data: bytes) -> list[str]:
    """The entries of vocab.txt, split at line feeds alone: two published ones contain U+2028, also a line separator."""
    try:
        entries = data.decode("utf-8").split("\n")
    except UnicodeDecodeError as error:
        raise InputError(f"{path}: not UTF-8 text (byte {error.start})") from None
    if entries[-1] == "":  # what follows the last line feed is no entry
        entries.pop()
    if not entries:
        raise InputError(f"{path}: the vocabulary is empty")
    return [entry.removesuffix("\r") for entry in entries]


def _load_wordpiece(path: Path, data: bytes):
    bert_tokenizer = _import_bert_tokenizer()
    # In a folder of its own: a tokenizer.json or tokenizer_config.json beside it, say of the decoder's tokenizer, would
    # take part otherwise. A local folder also keeps transformers from asking the network.
    with tempfile.TemporaryDirectory(prefix="davae-vocab-") as folder:
        (Path(folder) / "vocab.txt").write_bytes(data)
        try:
            return bert_tokenizer.from_pretrained(folder, do_lower_case=True, local_files_only=True)
        except Exception as error:  # the tokenizers library raises bare Exception
            raise InputError(f"{path}: not a WordPiece vocabulary ({first_line(error)})") from error


def _import_bert_tokenizer():
    # Where PyTorch is not installed, transformers says on import that no models will be available: none are wanted.
    logger = logging.getLogger("transformers")
    logger.addFilter(_is_no_import_advice)
    try:
        from transformers import BertTokenizer
    finally:
        logger.removeFilter(_is_no_import_advice)
    return BertTokenizer


def _is_no_import_advice(record: logging.LogRecord) -> bool:
    return "Models won't be available" not in record.getMessage()
