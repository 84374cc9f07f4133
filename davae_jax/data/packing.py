"""Packs several texts into each row of a batch, so that there is almost no padding.

A row of the encoder and the same row of the decoder contain the same texts in the same order, each with a separate
latent: the k-th text of a row is segment k in both. Texts are assigned to rows once for the whole corpus (`pack`). An
epoch exchanges texts of equal lengths and shuffles the rows, so every epoch has the same number of steps, and a step's
batch depends on the seed and the step alone.
"""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING

import numpy as np

from davae_jax.data.batches import Batch
from davae_jax.utils.shapes import round_up

if TYPE_CHECKING:
    from davae_jax.data.prepared.shard_batches import PreparedTexts
    from davae_jax.data.tokenize import TokenizedTexts

WINDOW = 512  # number of texts among which the next text of a row is chosen


class PackedBatches:
    """Batches of packed rows (a `BatchSource`). Every text is used once per epoch, except those of leftover rows.

    All batches have one shape. The decoder's rows have `row_length` positions. The length of the encoder's rows follows
    from the corpus's ratio of encoder to decoder tokens, so that both are filled equally.
    """

    def __init__(
        self, texts: TokenizedTexts | PreparedTexts, batch_size: int, *, pad_id: int, row_length: int, seed: int = 0
    ):
        """Packs the texts. Uses about 100 bytes of memory per text.

        Args:
          batch_size: number of rows in a batch.
          row_length: number of decoder positions in a row; a text with n decoder ids takes n − 1 of them.

        Raises:
          ValueError: a text is longer than a row.
        """
        self.texts, self.batch_size, self.pad_id, self.seed = texts, batch_size, pad_id, seed
        self.count, self.too_long = len(texts.sizes), texts.too_long
        sizes = texts.sizes - (0, 1)
        totals = sizes.sum(0)
        S = max(round(row_length * totals[0] / totals[1] / 8) * 8, round_up(int(sizes[:, 0].max()), 8))
        self.shape = S, row_length
        self._rows = pack(sizes, self.shape, np.random.default_rng(seed))
        self.texts_per_row = max(map(len, self._rows))  # P
        self.steps_per_epoch = len(self._rows) // batch_size or 1
        # Fraction of the encoder's and of the decoder's positions that is padding.
        self.padding = 1 - totals / (len(self._rows) * np.array(self.shape))
        # Texts of one kind have equal encoder and decoder lengths. `_slots` lists the slots of all rows by kind.
        self._kinds = np.unique(sizes, axis=0, return_inverse=True)[1].reshape(-1)
        self._slots = np.argsort(self._kinds[np.concatenate(self._rows)], kind="stable")
        # Two epochs, because prefetching may be one epoch ahead of training.
        self._shuffle = functools.lru_cache(2)(self._shuffle)

    def batch(self, step: int, start: int = 0, stop: int | None = None) -> Batch:
        rows = self._select_rows(step)[start:stop]
        (S, T), B, P = self.shape, len(rows), self.texts_per_row
        encoder_ids, encoder_segments, decoder_segments = (np.zeros((B, n), np.int32) for n in (S, S, T))
        decoder_ids, decoder_targets = (np.full((B, T), self.pad_id, np.int32) for _ in range(2))
        encoder_starts, lengths = (np.zeros((B, P), np.int32) for _ in range(2))
        for row, texts in enumerate(rows):
            s = t = 0
            for index, text in enumerate(texts):
                encoder, decoder = self.texts.ids(int(text))
                encoder_starts[row, index], lengths[row, index] = s, len(decoder)
                in_encoder, in_decoder = slice(s, s := s + len(encoder)), slice(t, t := t + len(decoder) - 1)
                encoder_ids[row, in_encoder], encoder_segments[row, in_encoder] = encoder, index + 1
                decoder_ids[row, in_decoder], decoder_targets[row, in_decoder] = decoder[:-1], decoder[1:]
                decoder_segments[row, in_decoder] = index + 1
        return Batch(
            encoder_ids, decoder_ids, decoder_targets, lengths, encoder_segments, encoder_starts, decoder_segments
        )

    def select_texts(self, step: int) -> tuple[np.ndarray, tuple[int, int]]:
        """Returns the indices of the texts in a step's batch, row by row, and the rows' lengths (S, T)."""
        return np.concatenate(self._select_rows(step)), self.shape

    def describe(self, step: int) -> str:
        return self.texts.describe_lines(self.select_texts(step)[0])

    def summary(self) -> str:
        encoder, decoder = self.padding
        return f"{self.batch_size} rows ({encoder:.1%} of the encoder's and {decoder:.1%} of the decoder's are padding)"

    def _select_rows(self, step: int) -> list[np.ndarray]:
        """Returns the texts of each row of a step's batch."""
        epoch, index = divmod(step, self.steps_per_epoch)
        return self._shuffle(epoch)[index * self.batch_size : (index + 1) * self.batch_size]

    def _shuffle(self, epoch: int) -> list[np.ndarray]:
        rng = np.random.default_rng((self.seed, epoch))
        texts = rng.permutation(len(self._kinds))
        exchanged = np.empty_like(texts)
        exchanged[self._slots] = texts[np.argsort(self._kinds[texts], kind="stable")]
        rows = np.split(exchanged, np.cumsum([len(row) for row in self._rows])[:-1])
        order = rng.permutation(len(rows))
        # With fewer rows than a batch has, a batch contains some rows more than once.
        return [rows[i] for i in np.resize(order, max(len(order), self.batch_size))]


def pack(sizes: np.ndarray, row: tuple[int, int], rng: np.random.Generator) -> list[list[int]]:
    """Packs items with two sizes each, [n, 2], into rows with a limit for each size. Returns the items of each row.

    Best fit within a window over a shuffled order: among the items that still fit, a row takes the one that
    minimizes the larger of the two remaining sizes, until none fits. Large items are therefore placed first, and both
    sizes are filled equally.

    Raises:
      ValueError: an item does not fit into a row.
    """
    if (sizes > row).any():
        raise ValueError(f"one of {sizes.max(0)} does not fit a row of {row}")
    order = rng.permutation(len(sizes))
    # Both sizes are scaled so that a row has the same capacity in both, and the remaining sizes can be compared.
    capacity = row[0] * row[1]
    first, second = sizes[order, 0] * row[1], sizes[order, 1] * row[0]
    window, upcoming = np.arange(min(WINDOW, len(order))), WINDOW
    a, b = first[window], second[window]
    rows = []
    while len(window):
        left_a = left_b = capacity
        members = []
        while len(window):
            after_a, after_b = left_a - a, left_b - b
            most_left = np.where(np.minimum(after_a, after_b) >= 0, np.maximum(after_a, after_b), capacity + 1)
            best = most_left.argmin()
            if most_left[best] > capacity:
                break
            members.append(int(order[window[best]]))
            left_a, left_b = after_a[best], after_b[best]
            if upcoming < len(order):
                window[best], a[best], b[best] = upcoming, first[upcoming], second[upcoming]
                upcoming += 1
            else:
                window, a, b = (np.delete(x, best) for x in (window, a, b))
        rows.append(members)
    return rows
