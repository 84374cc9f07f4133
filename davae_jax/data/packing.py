"""Several texts in each row of a batch, so that hardly a token slot is padding.

A row of the encoder and a row of the decoder hold the same texts, one behind the other, each with a latent of its own:
the k-th text of a row is segment k of both. Which texts share a row is settled once, for the whole corpus. An epoch
exchanges texts of equal lengths and shuffles the rows, so every epoch has the same number of steps, and a step's batch
depends on the seed and the step alone.
"""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from davae_jax.data.tokenize import TokenizedTexts
from davae_jax.utils.shapes import round_up

if TYPE_CHECKING:
    from davae_jax.data.shard_batches import PreparedTexts

WINDOW = 512  # texts that a row's next one is chosen from


class PackedBatch(NamedTuple):
    """int32. P is the largest number of texts in a row; of a row with fewer, the last places are empty.

    Segments are 1 … P in order, 0 is padding, at a row's end. What the decoder reads and what it is to say stand in
    two arrays: in one, every text's end token would be read for nothing.
    """

    encoder_ids: np.ndarray  # [B, S]
    encoder_segments: np.ndarray  # [B, S]
    encoder_starts: np.ndarray  # [B, P], where each text begins; 0 of an empty place
    decoder_ids: np.ndarray  # [B, T], of each text bos and all but the end token
    decoder_targets: np.ndarray  # [B, T], of each text all but bos
    decoder_segments: np.ndarray  # [B, T]
    lengths: np.ndarray  # [B, P], of each text's decoder ids, bos and end counted; 0 of an empty place

    @property
    def read_lengths(self) -> tuple[int, int]:
        """(S, T): what encoder and decoder read of a row."""
        return self.encoder_ids.shape[1], self.decoder_ids.shape[1]


class PackedBatches:
    """The packed batch of every step, without end: each text once an epoch, but those of rows that fill no batch.

    All batches have one shape. A row is as long as `row_length` for the decoder; for the encoder in the proportion of
    the corpus, so that both sides fill alike.
    """

    def __init__(
        self, texts: TokenizedTexts | PreparedTexts, batch_size: int, *, pad_id: int, row_length: int, seed: int = 0
    ):
        """batch_size: rows. row_length: decoder slots of a row, of which a text takes one less than it has ids.

        Keeps about 100 bytes a text in memory.

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
        self.most = max(map(len, self._rows))  # texts in a row, P
        self.per_epoch = len(self._rows) // batch_size or 1
        self.padding = 1 - totals / (len(self._rows) * np.array(self.shape))  # parts of the encoder's, decoder's slots
        # Texts of one kind have the same lengths on both sides. `_places`: those of all rows, kind by kind.
        self._kinds = np.unique(sizes, axis=0, return_inverse=True)[1].reshape(-1)
        self._places = np.argsort(self._kinds[np.concatenate(self._rows)], kind="stable")
        self._shuffled = functools.lru_cache(2)(self._shuffled)  # of an epoch; readers may be ahead of a step

    @property
    def size(self) -> str:
        """Of a batch, in words."""
        encoder, decoder = self.padding
        return f"{self.batch_size} rows ({encoder:.1%} of the encoder's and {decoder:.1%} of the decoder's are padding)"

    def rows(self, step: int) -> tuple[np.ndarray, tuple[int, int]]:
        """Which texts make the batch of a step, and its shape (S, T)."""
        return np.concatenate(self._packed(step)), self.shape

    def where(self, step: int) -> str:
        """The lines that make the batch of a step, for messages."""
        return self.texts.where(self.rows(step)[0])

    def __getitem__(self, step: int) -> PackedBatch:
        return self.read(step, 0, self.batch_size)

    def read(self, step: int, start: int, stop: int) -> PackedBatch:
        """Rows start to stop of a step's batch."""
        (S, T), B, P = self.shape, stop - start, self.most
        encoder_ids, encoder_segments, decoder_segments = (np.zeros((B, n), np.int32) for n in (S, S, T))
        decoder_ids, decoder_targets = (np.full((B, T), self.pad_id, np.int32) for _ in range(2))
        encoder_starts, lengths = (np.zeros((B, P), np.int32) for _ in range(2))
        for row, texts in enumerate(self._packed(step)[start:stop]):
            s = t = 0
            for place, text in enumerate(texts):
                encoder, decoder = self.texts.ids(int(text))
                encoder_starts[row, place], lengths[row, place] = s, len(decoder)
                of_encoder, of_decoder = slice(s, s := s + len(encoder)), slice(t, t := t + len(decoder) - 1)
                encoder_ids[row, of_encoder], encoder_segments[row, of_encoder] = encoder, place + 1
                decoder_ids[row, of_decoder], decoder_targets[row, of_decoder] = decoder[:-1], decoder[1:]
                decoder_segments[row, of_decoder] = place + 1
        return PackedBatch(
            encoder_ids, encoder_segments, encoder_starts, decoder_ids, decoder_targets, decoder_segments, lengths
        )

    def _packed(self, step: int) -> list[np.ndarray]:
        """The texts of each row of a step's batch."""
        epoch, place = divmod(step, self.per_epoch)
        return self._shuffled(epoch)[place * self.batch_size : (place + 1) * self.batch_size]

    def _shuffled(self, epoch: int) -> list[np.ndarray]:
        rng = np.random.default_rng((self.seed, epoch))
        texts = rng.permutation(len(self._kinds))
        exchanged = np.empty_like(texts)
        exchanged[self._places] = texts[np.argsort(self._kinds[texts], kind="stable")]
        rows = np.split(exchanged, np.cumsum([len(row) for row in self._rows])[:-1])
        order = rng.permutation(len(rows))
        # Fewer rows than a batch: some stand in it more than once.
        return [rows[i] for i in np.resize(order, max(len(order), self.batch_size))]


def pack(sizes: np.ndarray, row: tuple[int, int], rng: np.random.Generator) -> list[list[int]]:
    """Puts things of two sizes, [n, 2], into rows that are limited in both. Returns each row's things.

    Best fit in a window over a shuffled order: a row takes, of those that still fit, the one that leaves least of what
    it leaves most of, until none fits. Large ones so go first, and both sides fill alike.

    Raises:
      ValueError: one is larger than a row.
    """
    if (sizes > row).any():
        raise ValueError(f"one of {sizes.max(0)} does not fit a row of {row}")
    order = rng.permutation(len(sizes))
    # In units of which a row has equally many on both sides, so that what is left of them can be compared.
    whole = row[0] * row[1]
    first, second = sizes[order, 0] * row[1], sizes[order, 1] * row[0]
    window, coming = np.arange(min(WINDOW, len(order))), WINDOW
    a, b = first[window], second[window]
    rows = []
    while len(window):
        left_a = left_b = whole
        inside = []
        while len(window):
            after_a, after_b = left_a - a, left_b - b
            most_left = np.where(np.minimum(after_a, after_b) >= 0, np.maximum(after_a, after_b), whole + 1)
            best = most_left.argmin()
            if most_left[best] > whole:
                break
            inside.append(int(order[window[best]]))
            left_a, left_b = after_a[best], after_b[best]
            if coming < len(order):
                window[best], a[best], b[best] = coming, first[coming], second[coming]
                coming += 1
            else:
                window, a, b = (np.delete(x, best) for x in (window, a, b))
        rows.append(inside)
    return rows
