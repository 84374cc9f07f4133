"""Tokenizes texts for the encoder and the decoder, and drops those that are too long."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np

from davae_jax.data.inputs.file_lines import FileLines
from davae_jax.tokenizers.decoder import DecoderTokenizer
from davae_jax.tokenizers.encoder import EncoderTokenizer
from davae_jax.utils.errors import InputError
from davae_jax.utils.progress import progress_bar

TEXTS_PER_CALL = 1000  # number of texts per call of a tokenizer, after which the progress bar is updated


class TokenizedTexts(NamedTuple):
    """Texts as token ids.

    Attributes:
      encoder_ids: int32 ids of each text for the encoder, special tokens included.
      decoder_ids: int32 ids of each text for the decoder, bos first and the end token last.
      lines: the line of each text in `source`, counted from 1.
      too_long: the number of texts that were dropped because they are too long.
      source: the file, for messages.
      files: the files of the lines, if `source` stands for several.
    """

    encoder_ids: list[np.ndarray]
    decoder_ids: list[np.ndarray]
    lines: np.ndarray
    too_long: int
    source: str = ""
    files: FileLines | None = None

    @property
    def sizes(self) -> np.ndarray:
        """Returns [n, 2]: the number of encoder ids and of decoder ids of each text."""
        return np.array([(len(e), len(d)) for e, d in zip(self.encoder_ids, self.decoder_ids, strict=True)])

    def ids(self, text: int) -> tuple[np.ndarray, np.ndarray]:
        """Returns the encoder ids and the decoder ids of a text."""
        return self.encoder_ids[text], self.decoder_ids[text]

    def describe_lines(self, texts: Sequence[int]) -> str:
        """Returns the line numbers of these texts, for messages."""
        lines = sorted(self.lines[texts].tolist())
        return (self.files or FileLines([self.source], [1])).describe(lines)


def tokenize(
    texts: Sequence[str],
    encoder: EncoderTokenizer,
    decoder: DecoderTokenizer,
    *,
    max_length: int,
    source: str,
    truncate: bool = False,
) -> TokenizedTexts:
    """Tokenizes all texts except blank ones and those that are too long.

    Args:
      max_length: the maximum number of decoder ids of a text, bos and the end token included.
      source: the file that the texts come from, for messages.
      truncate: keep a text that is too long for the encoder's positions, and truncate its encoder ids. Otherwise
        it is dropped.

    Raises:
      InputError: no text remains.
    """
    encoder_rows, decoder_rows, lines, too_long = [], [], [], 0
    with progress_bar(total=len(texts), desc="tokenize", unit="text", leave=False) as bar:
        for start in range(0, len(texts), TEXTS_PER_CALL):
            chunk = texts[start : start + TEXTS_PER_CALL]
            non_blank = [i for i, text in enumerate(chunk) if text.strip()]
            rows = encode_texts([chunk[i] for i in non_blank], encoder, decoder, max_length, truncate=truncate)
            for i, row in zip(non_blank, rows, strict=True):
                if row is None:
                    too_long += 1
                    continue
                encoder_rows.append(np.array(row[0], np.int32))
                decoder_rows.append(np.array(row[1], np.int32))
                lines.append(start + i + 1)
            bar.update(len(chunk))
    if not lines:
        limits = f"{max_length} decoder tokens or {encoder.max_ids} encoder tokens"
        raise InputError(f"{source}: contains only blank texts and texts of more than {limits}")
    return TokenizedTexts(encoder_rows, decoder_rows, np.array(lines), too_long, source)


def encode_texts(
    texts: Sequence[str], encoder: EncoderTokenizer, decoder: DecoderTokenizer, max_length: int, truncate: bool = False
) -> Iterator[tuple[list[int], list[int]] | None]:
    """Yields the encoder ids and the decoder ids of each text; None for a text that is too long.

    `max_length` and `truncate` have the same meaning as in `tokenize`.
    """
    for text, encoder_ids in zip(texts, encoder.encode(texts), strict=True):
        if encoder.is_truncated(encoder_ids) and not truncate:
            yield None
            continue
        decoder_ids = [decoder.bos_id, *decoder.encode(text)]
        yield (encoder_ids, decoder_ids) if len(decoder_ids) <= max_length else None


def filter_by_length(
    texts: Sequence[str], encoder: EncoderTokenizer, decoder: DecoderTokenizer, max_length: int, truncate: bool = False
) -> list[str]:
    """Returns the texts that `tokenize` does not drop."""
    try:
        tokenized = tokenize(texts, encoder, decoder, max_length=max_length, source="", truncate=truncate)
    except InputError:
        return []
    return [texts[i - 1] for i in tokenized.lines]
