"""Texts as ids."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
from tqdm import tqdm

from davae_jax.tokenizers.decoder import DecoderTokenizer
from davae_jax.tokenizers.encoder import EncoderTokenizer
from davae_jax.utils.errors import InputError

TEXTS_PER_CALL = 1000  # texts tokenized at once


class TokenizedTexts(NamedTuple):
    """Tokenized texts. Row i is line `lines[i]` of `source`, counted from 1."""

    encoder_ids: list[np.ndarray]
    decoder_ids: list[np.ndarray]
    lines: np.ndarray
    too_long: int  # how many were left out for it
    source: str = ""  # for messages

    @property
    def sizes(self) -> np.ndarray:
        """[n, 2], of each text its numbers of encoder and decoder ids."""
        return np.array([(len(e), len(d)) for e, d in zip(self.encoder_ids, self.decoder_ids, strict=True)])

    def ids(self, text: int) -> tuple[np.ndarray, np.ndarray]:
        """(encoder ids, decoder ids)"""
        return self.encoder_ids[text], self.decoder_ids[text]

    def where(self, texts: Sequence[int]) -> str:
        """Their lines, for messages."""
        return f"lines {', '.join(map(str, sorted(self.lines[texts])))} of {self.source}"


def tokenize(
    texts: Sequence[str],
    encoder: EncoderTokenizer,
    decoder: DecoderTokenizer,
    *,
    max_length: int,
    source: str,
    truncate: bool = False,
) -> TokenizedTexts:
    """Ids of all texts but the blank ones and those too long: for the encoder's positions, or of more than `max_length`
    decoder ids, bos and end counted.

    truncate: texts that are too long for the encoder alone are kept, of its ids those that fit.

    Raises:
      InputError: nothing is left.
    """
    encoder_rows, decoder_rows, lines, too_long = [], [], [], 0
    with tqdm(total=len(texts), desc="tokenize", unit="text", disable=None, leave=False) as bar:
        for start in range(0, len(texts), TEXTS_PER_CALL):
            part = texts[start : start + TEXTS_PER_CALL]
            filled = [i for i, text in enumerate(part) if text.strip()]
            rows = encode_texts([part[i] for i in filled], encoder, decoder, max_length, truncate=truncate)
            for i, row in zip(filled, rows, strict=True):
                if row is None:
                    too_long += 1
                    continue
                encoder_rows.append(np.array(row[0], np.int32))
                decoder_rows.append(np.array(row[1], np.int32))
                lines.append(start + i + 1)
            bar.update(len(part))
    if not lines:
        longest = f"{max_length} tokens (or {encoder.max_ids} of the encoder's)"
        raise InputError(f"{source}: holds only blank texts and texts of more than {longest}")
    return TokenizedTexts(encoder_rows, decoder_rows, np.array(lines), too_long, source)


def encode_texts(
    texts: Sequence[str], encoder: EncoderTokenizer, decoder: DecoderTokenizer, max_length: int, truncate: bool = False
) -> Iterator[tuple[list[int], list[int]] | None]:
    """The encoder's and the decoder's ids of each text, as a batch has them; None of a text that is too long.

    truncate: as `tokenize`.
    """
    for text, ids in zip(texts, encoder.encode(texts), strict=True):
        was_cut = ids[-2] != encoder.sep_id and not truncate  # the inner one of two is lost when a text is cut
        row = None if was_cut else [decoder.bos_id, *decoder.encode(text)]
        yield None if row is None or len(row) > max_length else (ids, row)


def filter_by_length(
    texts: Sequence[str], encoder: EncoderTokenizer, decoder: DecoderTokenizer, max_length: int, truncate: bool = False
) -> list[str]:
    """Those of the texts that `tokenize` would keep."""
    try:
        kept = tokenize(texts, encoder, decoder, max_length=max_length, source="", truncate=truncate)
    except InputError:
        return []
    return [texts[i - 1] for i in kept.lines]
