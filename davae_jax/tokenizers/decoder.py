"""Tokenizes texts for the decoder, and decodes its ids: SentencePiece BPE, as in the published program.

The decoder's tokenizer differs from the encoder's because the two were initialized from different pretrained models.
It returns exactly the published program's ids, even if a text contains the literal form of a special token.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from itertools import groupby
from pathlib import Path

from davae_jax.tokenizers.files import read_file, require_unicode
from davae_jax.utils.errors import InputError

END, PAD, BOS, UNK = "<|endoftext|>", "<pad>", "<bos>", "<unk>"
# Fields of a spiece.model that follow the pieces. Without them SentencePiece would take its defaults, which split texts
# in another way.
SETTINGS = {2: "the algorithm", 3: "the normalization"}


class DecoderTokenizer:
    """SentencePiece BPE with three added tokens, `<|endoftext|>`, `<pad>` and `<bos>`, whose ids follow the pieces.

    Attributes:
      size: the number of pieces in spiece.model, without the added tokens.
      unk_id: the id of `<unk>`, which is one of the pieces.
      bos_id, end_id, pad_id: the ids of the added tokens.
    """

    def __init__(self, folder: str | Path, *, bos_id: int = 50002, end_id: int = 50000, pad_id: int = 50001):
        """Reads `folder`/spiece.model and no other file.

        Args:
          folder: the folder that contains spiece.model.
          bos_id, end_id, pad_id: the ids in the model's config. Each is one of the three ids that follow the pieces, or
            the id of a control piece in spiece.model.

        Raises:
          InputError: spiece.model is missing, unreadable or damaged, or the ids do not fit its size.
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
            raise InputError(f"{path}: the ids of {END}, {PAD} and {BOS} must differ; got only {sorted(self._added)}")
        for i, literal in self._added.items():
            follows_pieces = self.size <= i < self.size + 3
            if not follows_pieces and not (0 <= i < self.size and self._pieces.is_control(i)):
                raise InputError(
                    f"{path}: {self.size} pieces, so {literal} must have one of the ids {self.size}..{self.size + 2},"
                    f" not {i}; does this spiece.model belong to the model?"
                )

    def encode(self, text: str) -> list[int]:
        """Returns the ids of a text as in the published program: its pieces, and an end id unless they end with one.

        The text is first split at the literals `<unk>`, `<pad>`, `<bos>` and `<|endoftext|>`. White space next to a
        literal is removed, and each stretch between literals is encoded separately.

        Raises:
          InputError: the text contains half of a surrogate pair, which is not a character.
        """
        ids = self._encode_pieces(text)
        return ids if ids and ids[-1] == self.end_id else [*ids, self.end_id]

    def encode_prompt(self, text: str) -> list[int]:
        """Returns the id of `<bos>` and the pieces of a text, without the end id, for the decoder to continue.

        As in the published program, one literal `<|endoftext|>` at the end of the text is also removed.

        Raises:
          InputError: the text contains half of a surrogate pair, which is not a character.
        """
        return [self.bos_id, *self.encode(text)[:-1]]

    def _encode_pieces(self, text: str) -> list[int]:
        require_unicode(text)
        ids = []
        parts = self._literals.split(text)  # text, literal, text, …, literal, text
        for n, part in enumerate(parts):
            if n % 2:  # a literal
                ids.append(self._literal_ids[part])
                continue
            if n > 0:
                part = part.lstrip()
            if n < len(parts) - 1:
                part = part.rstrip()
            ids.extend(self._pieces.encode(part))
        return ids

    def decode(self, ids: Iterable[int]) -> str:
        """Returns the text of the ids as in the published program, before `cleanup.clean_up`.

        Ids after the added tokens become `<extra_id_-4>`, `<extra_id_-5>`, …

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
        """Returns the text of a run of ids without added tokens.

        As in the published program, a group of pieces that is followed by an unknown id gets a blank before it.
        """
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
        # The embedding has untrained rows after the added tokens. The published tokenizer names them by counting down
        # from its size, and SentencePiece copies an unknown piece into the text unchanged.
        return self._pieces.id_to_piece(i) if i < self.size else f"<extra_id_{self.size - 1 - i}>"


def count_pieces(path: Path) -> int:
    """Returns the number of pieces in a spiece.model. Raises InputError if it is missing or damaged."""
    return len(_load_sentencepiece(path))


def _load_sentencepiece(path: Path):
    from sentencepiece import SentencePieceProcessor

    data = read_file(path)
    if not data:  # SentencePiece would load nothing, without an error
        raise InputError(f"{path}: the file is empty")
    try:
        pieces = SentencePieceProcessor(model_proto=data)
    except (RuntimeError, OSError, ValueError):
        raise InputError(f"{path}: not a SentencePiece model, or damaged") from None
    fields = _field_numbers(data)
    if missing := [name for number, name in SETTINGS.items() if number not in fields]:
        raise InputError(f"{path}: is cut off: it lacks {' and '.join(missing)}, which follow the pieces")
    return pieces


def _field_numbers(message: bytes) -> set[int]:
    """Returns the numbers of the fields in an intact protocol buffer (protobuf.dev, "Encoding")."""
    numbers, position = set(), 0
    while position < len(message):
        tag, position = _read_varint(message, position)
        numbers.add(tag >> 3)
        wire_type, size = tag & 7, 0
        if wire_type in (0, 2):  # an integer; bytes after their number
            size, position = _read_varint(message, position)
        position += {1: 8, 2: size, 5: 4}.get(wire_type, 0)
    return numbers


def _read_varint(message: bytes, position: int) -> tuple[int, int]:
    """Returns an integer of a protocol buffer, and the position after it."""
    value = shift = 0
    while True:
        byte = message[position]
        value, shift, position = value | (byte & 0x7F) << shift, shift + 7, position + 1
        if byte < 0x80:
            return value, position
