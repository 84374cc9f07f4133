"""The two tokenizers, as published: WordPiece for the encoder, SentencePiece BPE for the decoder.

They differ because the two halves were warm-started from different models. Both reproduce the published program's
ids exactly, its habits included: the encoder's special tokens stand twice, the decoder's literals win over pieces.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from itertools import groupby
from pathlib import Path

from davae_jax.tokenizers.files import read_file, require_unicode
from davae_jax.utils.errors import InputError

END, PAD, BOS, UNK = "<|endoftext|>", "<pad>", "<bos>", "<unk>"


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
        require_unicode(text)
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


def count_pieces(path: Path) -> int:
    """Pieces of a spiece.model. Raises InputError where it is missing or damaged."""
    return len(_load_sentencepiece(path))


def _load_sentencepiece(path: Path):
    from sentencepiece import SentencePieceProcessor

    data = read_file(path)
    if not data:  # SentencePiece takes empty bytes for "no model yet" and loads nothing
        raise InputError(f"{path}: the file is empty")
    try:
        return SentencePieceProcessor(model_proto=data)
    except (RuntimeError, OSError, ValueError):
        raise InputError(f"{path}: not a SentencePiece model, or damaged") from None
