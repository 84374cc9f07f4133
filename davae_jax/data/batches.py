"""The batch of every training step: what a batch is, where batches come from, and batches of texts in memory."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple, Protocol

import numpy as np

from davae_jax.data.tokenize import TokenizedTexts
from davae_jax.utils.shapes import round_up

Row = tuple[np.ndarray, np.ndarray]  # a text's encoder ids and decoder ids; the latter begin with bos and end with end


class Batch(NamedTuple):
    """Token ids of a training step, int32 arrays (NumPy or JAX) whose rows end in padding.

    A row holds up to P texts. Where every row holds one (P = 1), the segment arrays are None: the model is then
    compiled without segment masks. Otherwise the k-th text of a row is segment k, from 1 to P, of both sides; segment 0
    is padding.
    """

    encoder_ids: np.ndarray  # [B, S]
    decoder_ids: np.ndarray  # [B, T], what the decoder reads: of each text bos and everything but its end token (which
    # may stand at the first position of a row's padding, where nothing is predicted from it)
    decoder_targets: np.ndarray  # [B, T], what it is to predict at each position: of each text everything but bos
    lengths: np.ndarray  # [B, P], number of decoder ids of each text, bos and end included; 0 where there is no text
    encoder_segments: np.ndarray | None = None  # [B, S]
    encoder_starts: np.ndarray | None = None  # [B, P], position of each text's first encoder token
    decoder_segments: np.ndarray | None = None  # [B, T]

    @classmethod
    def of_texts(cls, encoder_ids: np.ndarray, decoder_ids: np.ndarray, lengths: np.ndarray) -> Batch:
        """Returns a batch with one text a row.

        Args:
          encoder_ids: [B, S], padded with 0.
          decoder_ids: [B, T + 1], bos first, the end token last, then padding.
          lengths: [B], number of decoder ids of each row, padding not counted.
        """
        return cls(encoder_ids, decoder_ids[:, :-1], decoder_ids[:, 1:], lengths[:, None])

    @property
    def shape(self) -> tuple[int, int]:
        """(S, T)."""
        return self.encoder_ids.shape[1], self.decoder_ids.shape[1]


class BatchSource(Protocol):
    """Batches without end. The batch of a step is a function of the seed and the step alone.

    The step is therefore all that a run has to remember of its position in the data.
    """

    count: int  # texts
    too_long: int  # texts that were left out because they are too long
    batch_size: int  # rows of a batch
    steps_per_epoch: int

    def batch(self, step: int, start: int = 0, stop: int | None = None) -> Batch:
        """Returns the rows from `start` to `stop` of a step's batch; by default all of them."""

    def describe(self, step: int) -> str:
        """Returns which lines of which files the texts of a step's batch are, for error messages."""

    def summary(self) -> str:
        """Returns a batch's size in words, for the line that a run begins with."""


class TextBatches:
    """Batches of texts in memory, one text a row (a `BatchSource`).

    An epoch is a seeded shuffle. Texts of similar length are batched together, in `buckets` shapes, so that little is
    padding and a few compiled programs serve all steps. What does not fill a batch of its bucket moves on to the bucket
    of the next longer texts; of the longest texts, some may wait for another epoch.
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
        """
        Args:
          pad_id: the decoder's padding id; the encoder's is 0.
          buckets: number of shapes (S, T).
          encoder_positions: the encoder's rows are never padded beyond this length.
        """
        self.texts, self.batch_size, self.pad_id, self.seed = texts, batch_size, pad_id, seed
        self.count, self.too_long = len(texts.lines), texts.too_long
        by_length = np.argsort([len(row) for row in texts.decoder_ids], kind="stable")
        # With fewer texts than rows, some texts stand in a batch more than once.
        self._buckets = np.array_split(np.resize(by_length, max(len(by_length), batch_size)), buckets)
        self._shapes = []
        longest = 0  # of the encoder's rows so far: what is left over of one bucket must fit the next
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
    """Returns the batch of these texts, one a row, padded to `shape` = (S, T + 1) encoder and decoder ids."""
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
