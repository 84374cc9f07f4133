"""Training texts: read from a file, turned into ids, and laid out in batches that any step can be asked for."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from davae_jax.data.tokenize import TokenizedTexts
from davae_jax.utils.shapes import round_up


class Batch(NamedTuple):
    """int32; rows end in padding."""

    encoder_ids: np.ndarray  # [B, S]
    decoder_ids: np.ndarray  # [B, T], bos first, the end token last
    lengths: np.ndarray  # [B], of decoder_ids, bos and end counted

    @property
    def read_lengths(self) -> tuple[int, int]:
        """(S, T): what encoder and decoder read of a row; the decoder does not read a text's last token."""
        return self.encoder_ids.shape[1], self.decoder_ids.shape[1] - 1


class Batches:
    """The batch of every step: a seeded shuffle of the texts an epoch, without end.

    Texts of like length stand together, in `buckets` shapes, so that little is padding and a few programs serve all
    steps. What does not fill a batch goes with the next longer texts; of the longest, some may wait for another epoch.
    A step's batch depends on the seed and the step alone, so the step is all a run has to remember of its place.
    """

    def __init__(
        self,
        texts: TokenizedTexts,
        batch_size: int,
        *,
        pad_id: int,
        buckets: int = 1,
        seed: int = 0,
        encoder_positions: int | None = None,  # no row of the encoder's is padded past them
    ):
        self.texts, self.batch_size, self.pad_id, self.seed = texts, batch_size, pad_id, seed
        order = np.argsort([len(row) for row in texts.decoder_ids], kind="stable")
        # Fewer texts than a batch: some stand in it more than once.
        self._groups = np.array_split(np.resize(order, max(len(order), batch_size)), buckets)
        self._shapes = []
        longest = 0  # of the encoder's rows up to here: leftovers of one bucket must fit the next
        for group in self._groups:
            longest = max([longest, *(len(texts.encoder_ids[i]) for i in group)])
            T = max([1, *(len(texts.decoder_ids[i]) for i in group)])
            S = round_up(longest, 8)
            self._shapes.append((min(S, encoder_positions or S), round_up(T, 8)))
        self.per_epoch = len(order) // batch_size or 1
        self._epoch, self._plan = None, []

    @property
    def size(self) -> str:
        """Of a batch, in words."""
        return f"{self.batch_size} texts"

    def rows(self, step: int) -> tuple[np.ndarray, tuple[int, int]]:
        """Which texts make the batch of a step, and its shape (S, T)."""
        epoch, place = divmod(step, self.per_epoch)
        if epoch != self._epoch:
            self._epoch, self._plan = epoch, self._shuffled(epoch)
        return self._plan[place]

    @property
    def count(self) -> int:
        """Texts there are."""
        return len(self.texts.lines)

    @property
    def too_long(self) -> int:
        """Texts that were left out because they are too long."""
        return self.texts.too_long

    def where(self, step: int) -> str:
        """The lines that make the batch of a step, for messages."""
        return self.texts.where(self.rows(step)[0])

    def __getitem__(self, step: int) -> Batch:
        return self.read(step, 0, self.batch_size)

    def read(self, step: int, start: int, stop: int) -> Batch:
        """Rows start to stop of a step's batch."""
        rows, shape = self.rows(step)
        rows = rows[start:stop]
        return pad_batch([(self.texts.encoder_ids[i], self.texts.decoder_ids[i]) for i in rows], shape, self.pad_id)

    def _shuffled(self, epoch: int) -> list[tuple[np.ndarray, tuple[int, int]]]:
        rng = np.random.default_rng((self.seed, epoch))
        B = self.batch_size
        plan, left = [], np.zeros(0, int)
        for group, shape in zip(self._groups, self._shapes, strict=True):
            rows = np.concatenate([left, rng.permutation(group)])
            full = len(rows) // B * B
            plan += [(part, shape) for part in rows[:full].reshape(-1, B)]
            left = rows[full:]
        return [plan[i] for i in rng.permutation(len(plan))]


def pad_batch(rows: Sequence[tuple[np.ndarray, np.ndarray]], shape: tuple[int, int], pad_id: int) -> Batch:
    """The batch of these rows of encoder and decoder ids, padded to S and T."""
    S, T = shape
    encoder_ids = np.zeros((len(rows), S), np.int32)
    decoder_ids = np.full((len(rows), T), pad_id, np.int32)
    lengths = np.zeros(len(rows), np.int32)
    for place, (encoder_row, decoder_row) in enumerate(rows):
        encoder_ids[place, : len(encoder_row)] = encoder_row
        decoder_ids[place, : len(decoder_row)] = decoder_row
        lengths[place] = len(decoder_row)
    return Batch(encoder_ids, decoder_ids, lengths)
