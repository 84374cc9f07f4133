"""The two tokenizers, as published: WordPiece for the encoder, SentencePiece BPE for the decoder.

They differ because the two halves were warm-started from different models. Both reproduce the published program's
ids exactly, its habits included: the encoder's special tokens stand twice, the decoder's literals win over pieces.
"""

from __future__ import annotations

import logging
import re
import tempfile
from collections.abc import Iterable, Sequence
from itertools import groupby
from pathlib import Path

from davae_jax.errors import InputError, first_line

END, PAD, BOS, UNK = "<|endoftext|>", "<pad>", "<bos>", "<unk>"


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
        data = _read(path)
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
            _require_unicode(text)
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


class DecoderTokenizer:
    """SentencePiece BPE with three added tokens, `<|endoftext|>`, `<pad>` and `<bos>`, behind its own pieces.

    Attributes:
      size: number of pieces of spiece.model, the added tokens not counted.
      unk_id: id of `<unk>`, one of the pieces.
    """

    def __init__(self, folder: str | Path, *, bos_id: int = 50002, end_id: int = 50000, pad_id: int = 50001):
        """Reads `folder`/spiece.model and nothing else.

        Args:
          folder: where spiece.model lies.
          bos_id, end_id, pad_id: as the model's config has them; each one of the three ids right behind the pieces, or
            a control piece of the model's own.

        Raises:
          InputError: spiece.model is missing, unreadable or damaged, or the ids given do not fit its size.
        """
        path = Path(folder) / "spiece.model"
        self._pieces = _load_sentencepiece(path)
        self.size = len(self._pieces)
        self.unk_id = self._pieces.unk_id()
        self.bos_id, self.end_id, self.pad_id = bos_id, end_id, pad_id
        self._added = {end_id: END, pad_id: PAD, bos_id: BOS}
        self._check_added_ids(path)
        self._literal_ids = {literal: i for i, literal in self._added.items()} | {UNK: self.unk_id}
        self._literals = re.compile("(" + "|".join(map(re.escape, self._literal_ids)) + ")")

    def _check_added_ids(self, path: Path) -> None:
        if len(self._added) != 3:
            raise InputError(f"{path}: the ids of {END}, {PAD} and {BOS} must differ; got {sorted(self._added)} only")
        for i, literal in self._added.items():
            behind = self.size <= i < self.size + 3
            if not behind and not (0 <= i < self.size and self._pieces.is_control(i)):
                raise InputError(
                    f"{path}: {self.size} pieces, so {literal} must have one of the ids {self.size}..{self.size + 2},"
                    f" not {i}; is this the model's own spiece.model?"
                )

    def encode(self, text: str) -> list[int]:
        """The published decoder ids of a text: its pieces, then one end id unless they end with it already.

        The text is split at the literals `<unk>`, `<pad>`, `<bos>` and `<|endoftext|>` first; white space next to
        them is dropped, and what stands between is encoded by itself.

        Raises:
          InputError: the text holds half of a surrogate pair, which is no character.
        """
        ids = self._encode_pieces(text)
        return ids if ids and ids[-1] == self.end_id else [*ids, self.end_id]

    def encode_prompt(self, text: str) -> list[int]:
        """`<bos>` and the pieces of the text. As published, one end id that closes the text is left out.

        Raises:
          InputError: the text holds half of a surrogate pair, which is no character.
        """
        return [self.bos_id, *self.encode(text)[:-1]]

    def _encode_pieces(self, text: str) -> list[int]:
        _require_unicode(text)
        ids = []
        parts = self._literals.split(text)  # text, literal, text, …, literal, text
        for n, part in enumerate(parts):
            if n % 2:
                ids.append(self._literal_ids[part])
                continue
            if n > 0:
                part = part.lstrip()
            if n < len(parts) - 1:
                part = part.rstrip()
            ids.extend(self._pieces.encode(part))
        return ids

    def decode(self, ids: Iterable[int]) -> str:
        """The published text of the ids, before `cleanup.clean_up`. Ids past the added tokens print `<extra_id_-4>`, …

        Raises:
          IndexError: an id is negative.
        """
        parts = []
        for is_added, run in groupby(map(int, ids), key=self._added.__contains__):
            if is_added:
                parts.extend(self._added[i] for i in run)
            else:
                parts.append(self._decode_run(list(run)))
        return " ".join(parts)

    def _decode_run(self, run: list[int]) -> str:
        """A run without added tokens. A group of pieces that an unknown id ends gets a blank in front, as published."""
        groups = [(unknown, list(group)) for unknown, group in groupby(run, key=lambda i: i == self.unk_id)]
        text = ""
        for n, (unknown, group) in enumerate(groups):
            if unknown:
                text += UNK * len(group)
            else:
                blank = " " if n + 1 < len(groups) else ""
                text += blank + self._pieces.decode([self._piece(i) for i in group])
        return text.strip()

    def _piece(self, i: int) -> str:
        # Rows of the embedding past the added tokens were never trained. The published tokenizer counts their names
        # down from its own size; SentencePiece passes a name it does not know through as it is.
        return self._pieces.id_to_piece(i) if i < self.size else f"<extra_id_{self.size - 1 - i}>"


def read_vocabulary(path: Path) -> list[str]:
    """The entries of a vocab.txt; an entry's place is its id. Raises InputError where there is no such file."""
    return _vocabulary(path, _read(path))


def count_pieces(path: Path) -> int:
    """Pieces of a spiece.model. Raises InputError where it is missing or damaged."""
    return len(_load_sentencepiece(path))


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except FileNotFoundError:
        raise InputError(f"{path}: no such file; a tokenizer folder holds spiece.model and vocab.txt") from None
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror})") from None


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


def _load_sentencepiece(path: Path):
    from sentencepiece import SentencePieceProcessor

    data = _read(path)
    if not data:  # SentencePiece takes empty bytes for "no model yet" and loads nothing
        raise InputError(f"{path}: the file is empty")
    try:
        return SentencePieceProcessor(model_proto=data)
    except (RuntimeError, OSError, ValueError):
        raise InputError(f"{path}: not a SentencePiece model, or damaged") from None


def _require_unicode(text: str) -> None:
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        at, code = error.start, ord(text[error.start])
        raise InputError(f"text: the lone surrogate U+{code:04X} at position {at} is no character") from None
