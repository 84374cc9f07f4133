"""Defines batches and their sources, and forms batches of texts in memory."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple, Protocol

import numpy as np

from davae_jax.data.tokenize import TokenizedTexts
from davae_jax.utils.shapes import round_up

Row = tuple[np.ndarray, np.ndarray]  # a text's encoder ids and decoder ids; the latter begin with bos and end with end


class Batch(NamedTuple):
    """Token ids of a training step, int32 arrays (NumPy or JAX) whose rows end in padding.

    A row contains up to P texts. If every row contains one (P = 1), the segment arrays are None, and the model is
    compiled without segment masks. Otherwise the k-th text of a row is segment k, from 1 to P, of the encoder row and
    of the decoder row; segment 0 is padding.
    """

    encoder_ids: np.ndarray  # [B, S]
    decoder_ids: np.ndarray  # [B, T], input of the decoder: each text without its end token. (The end token may
    # be the first token of a row's padding, but nothing is predicted from it.)
    decoder_targets: np.ndarray  # [B, T], the target at each position: each text without bos
    lengths: np.ndarray  # [B, P], number of decoder ids of each text, bos and end included; 0 if there is no text
    encoder_segments: np.ndarray | None = None  # [B, S]
    encoder_starts: np.ndarray | None = None  # [B, P], position of each text's first encoder token
    decoder_segments: np.ndarray | None = None  # [B, T]

    @classmethod
    def of_texts(cls, encoder_ids: np.ndarray, decoder_ids: np.ndarray, lengths: np.ndarray) -> Batch:
        """Returns a batch with one text per row.

        Args:
          encoder_ids: [B, S], padded with 0.
          decoder_ids: [B, T + 1], bos first, the end token last, then padding.
          lengths: [B], number of decoder ids of each row, padding not counted.
        """
        return cls(encoder_ids, decoder_ids[:, :-1], decoder_ids[:, 1:], lengths[:, None])

    @property
    def shape(self) -> tuple[int, int]:
        """Returns (S, T)."""
        return self.encoder_ids.shape[1], self.decoder_ids.shape[1]


class BatchSource(Protocol):
    """An endless sequence of batches. The batch of a step is a function of the seed and the step alone.

    The step number is therefore the only record that a run needs of its position in the data.
    """

    count: int  # number of texts
    too_long: int  # number of texts dropped because they are too long
    batch_size: int  # number of rows in a batch
    steps_per_epoch: int

    def batch(self, step: int, start: int = 0, stop: int | None = None) -> Batch:
        """Returns the rows from `start` to `stop` of a step's batch; by default all of them."""

    def describe(self, step: int) -> str:
        """Returns the files and lines of the texts in a step's batch, for error messages."""

    def summary(self) -> str:
        """Returns a description of a batch's size, for the first line of a run's output."""


class TextBatches:
    """Batches of texts in memory, one text per row (a `BatchSource`).

    An epoch is a seeded shuffle. Texts of similar length are batched together, in `buckets` shapes, so that there is
    little padding and a few compiled programs serve all steps. Texts that do not fill a batch of their bucket move to
    the bucket of the next longer texts; an incomplete last batch of the longest texts is not used in that epoch.
    """

    def __init__(
        self,
        texts: TokenizedTexts,
        batch_size: int,
        *,
        pad_id: int,
        buckets: int = 1,
        seed: int = 0,
        encoder_positions: int | None = None,
    ):
        """Sorts the texts into buckets.

        Args:
          pad_id: the decoder's padding id; the encoder's is 0.
          buckets: number of shapes (S, T).
          encoder_positions: the encoder's rows are never padded beyond this length.
        """
        self.texts, self.batch_size, self.pad_id, self.seed = texts, batch_size, pad_id, seed
        self.count, self.too_long = len(texts.lines), texts.too_long
        by_length = np.argsort([len(row) for row in texts.decoder_ids], kind="stable")
        # With fewer texts than rows, a batch contains some texts more than once.
        self._buckets = np.array_split(np.resize(by_length, max(len(by_length), batch_size)), buckets)
        self._shapes = []
        longest = 0  # encoder length so far: texts left over from one bucket must fit into the next
        for bucket in self._buckets:
            longest = max([longest, *(len(texts.encoder_ids[i]) for i in bucket)])
            T = max([1, *(len(texts.decoder_ids[i]) for i in bucket)])
            S = round_up(longest, 8)
            self._shapes.append((min(S, encoder_positions or S), round_up(T, 8)))
        self.steps_per_epoch = self.count // batch_size or 1
        self._epoch: int | None = None
        self._order: list[tuple[np.ndarray, tuple[int, int]]] = []

    def batch(self, step: int, start: int = 0, stop: int | None = None) -> Batch:
        texts, shape = self.select_texts(step)
        rows = [(self.texts.encoder_ids[i], self.texts.decoder_ids[i]) for i in texts[start:stop]]
        return pad_batch(rows, shape, self.pad_id)

    def select_texts(self, step: int) -> tuple[np.ndarray, tuple[int, int]]:
        """Returns the indices of the texts in a step's batch, and the lengths (S, T + 1) that they are padded to."""
        epoch, index = divmod(step, self.steps_per_epoch)
        if epoch != self._epoch:
            self._epoch, self._order = epoch, self._shuffle(epoch)
        return self._order[index]

    def describe(self, step: int) -> str:
        return self.texts.describe_lines(self.select_texts(step)[0])

    def summary(self) -> str:
        return f"{self.batch_size} texts"

    def _shuffle(self, epoch: int) -> list[tuple[np.ndarray, tuple[int, int]]]:
        rng = np.random.default_rng((self.seed, epoch))
        batches, left_over = [], np.zeros(0, int)
        for bucket, shape in zip(self._buckets, self._shapes, strict=True):
            texts = np.concatenate([left_over, rng.permutation(bucket)])
            full = len(texts) // self.batch_size * self.batch_size
            batches += [(rows, shape) for rows in texts[:full].reshape(-1, self.batch_size)]
            left_over = texts[full:]
        return [batches[i] for i in rng.permutation(len(batches))]


def pad_batch(rows: Sequence[Row], shape: tuple[int, int], pad_id: int) -> Batch:
    """Returns the batch of these texts, one per row, padded to `shape` = (S, T + 1) encoder and decoder ids."""
    return Batch.of_texts(*pad_rows(rows, shape, pad_id))


def pad_rows(rows: Sequence[Row], shape: tuple[int, int], pad_id: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Returns encoder ids [B, S] padded with 0, decoder ids [B, T + 1] padded with `pad_id`, and lengths [B]."""
    S, T = shape
    encoder_ids = np.zeros((len(rows), S), np.int32)
    decoder_ids = np.full((len(rows), T), pad_id, np.int32)
    lengths = np.zeros(len(rows), np.int32)
    for i, (encoder_row, decoder_row) in enumerate(rows):
        encoder_ids[i, : len(encoder_row)] = encoder_row
        decoder_ids[i, : len(decoder_row)] = decoder_row
        lengths[i] = len(decoder_row)
    return encoder_ids, decoder_ids, lengths
