"""Forms batches of prepared texts, with memory use that does not depend on the number of texts.

Packing needs the lengths of all texts; `PreparedTexts` keeps them in memory.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from davae_jax.data.batches import Batch, pad_batch
from davae_jax.data.prepared.shards import Prepared
from davae_jax.utils.arrays import read_array, read_array_header
from davae_jax.utils.errors import InputError
from davae_jax.utils.shapes import round_up


class ShardBatches:
    """Batches of prepared texts, one text per row (a `BatchSource`), in memory that does not grow with the corpus.

    As in `TextBatches`, an epoch is a seeded shuffle, and texts of similar length are batched together in `buckets`
    shapes. An epoch lists all texts bucket by bucket, shortest first. Each bucket is shuffled by a permutation that is
    evaluated on demand and never stored. Batch k consists of positions k·B to (k + 1)·B; the batch order is shuffled
    likewise. An incomplete last batch is not used in that epoch.
    """

    def __init__(
        self,
        prepared: Prepared,
        batch_size: int,
        *,
        pad_id: int,
        buckets: int = 1,
        seed: int = 0,
        max_length: int | None = None,
        encoder_positions: int | None = None,
    ):
        """Divides the texts into buckets.

        Args:
          pad_id: the decoder's padding id; the encoder's is 0.
          buckets: number of shapes (S, T).
          max_length: texts with more decoder ids are dropped.
          encoder_positions: the encoder's rows are never padded beyond this length.

        Raises:
          InputError: no text is short enough, or one is too long for the encoder.
        """
        self.prepared, self.batch_size, self.pad_id, self.seed = prepared, batch_size, pad_id, seed
        lengths, counts, longest = prepared.lengths(max_length)
        _check_positions(prepared, int(longest[-1]), encoder_positions)
        self.count = int(counts.sum())
        self.too_long = len(prepared) - self.count + prepared.manifest["counts"]["too_long"]
        # With fewer texts than rows, a batch contains some texts more than once, and there is one bucket.
        n = max(self.count, batch_size)
        buckets = 1 if self.count < max(batch_size, buckets) else buckets
        self._bounds = [n * i // buckets for i in range(buckets + 1)]
        self._shapes = []
        for end in self._bounds[1:]:
            last_index = np.searchsorted(counts.cumsum(), min(end, self.count))  # row of the bucket's last text
            S, T = round_up(int(longest[last_index]), 8), round_up(int(lengths[last_index]), 8)
            self._shapes.append((min(S, encoder_positions or S), T))
        self.steps_per_epoch = n // batch_size
        # Texts from position ends[k - 1] to ends[k] have lengths[k] decoder ids.
        self._lengths, self._ends = lengths, counts.cumsum()
        self._order = _Column(prepared.folder / "order.npy", len(prepared))

    def batch(self, step: int, start: int = 0, stop: int | None = None) -> Batch:
        positions, shape = self._select_positions(step, start, stop)
        lengths = self._lengths[np.searchsorted(self._ends, positions, side="right")]
        records = zip(self._order[positions].tolist(), lengths.tolist(), strict=True)
        texts = [self.prepared.read(i, n, self._order.path) for i, n in records]
        if any(len(ids) > length for text in texts for ids, length in zip(text, shape, strict=True)):
            raise InputError(f"{self._order.path}: does not match the shards; copy or prepare it again")
        return pad_batch(texts, shape, self.pad_id)

    def select_texts(self, step: int) -> tuple[np.ndarray, tuple[int, int]]:
        """Returns the records of the rows of a step's batch, and the lengths (S, T + 1) that they are padded to."""
        positions, shape = self._select_positions(step)
        return self._order[positions], shape

    def _select_positions(
        self, step: int, start: int = 0, stop: int | None = None
    ) -> tuple[np.ndarray, tuple[int, int]]:
        """Returns the positions in order.npy of the rows from `start` to `stop` of a step's batch, and the lengths."""
        epoch, index = divmod(step, self.steps_per_epoch)
        k = permute(np.array([index]), self.steps_per_epoch, (self.seed, epoch))[0]
        positions = np.arange(k * self.batch_size, (k + 1) * self.batch_size)
        bucket_ids = np.searchsorted(self._bounds, positions, side="right") - 1
        for bucket in np.unique(bucket_ids):
            low, high = self._bounds[bucket : bucket + 2]
            in_bucket = bucket_ids == bucket
            positions[in_bucket] = low + permute(positions[in_bucket] - low, high - low, (self.seed, epoch, bucket + 1))
        return positions[start:stop] % self.count, self._shapes[bucket_ids[-1]]

    def describe(self, step: int) -> str:
        return self.prepared.describe_lines(self.select_texts(step)[0].tolist())

    def summary(self) -> str:
        return f"{self.batch_size} texts"


def _check_positions(prepared: Prepared, longest: int, encoder_positions: int | None) -> None:
    if encoder_positions is not None and longest > encoder_positions:
        raise InputError(
            f"{prepared.folder}: contains texts of {longest} encoder ids, but the encoder has "
            f"{encoder_positions} positions; prepare with --encoder-positions {encoder_positions}"
        )


class PreparedTexts:
    """Prepared texts of at most `max_length` decoder ids, with the interface of `TokenizedTexts`, for packing."""

    def __init__(self, prepared: Prepared, max_length: int, encoder_positions: int | None = None):
        """Reads the lengths of all texts.

        Raises:
          InputError: no text is short enough, or one is too long for the encoder.
        """
        sizes = np.concatenate([_sizes(prepared, shard) for shard in prepared.shards])
        lengths, counts, longest = prepared.lengths()
        actual = *np.unique(sizes[:, 1], return_counts=True), sizes[:, 0].max()
        if not all(map(np.array_equal, actual, (lengths, counts, longest[-1]))):
            raise InputError(
                f"{prepared.folder / 'lengths.npy'}: does not match the sizes in {prepared.shards[0]['name']}.npy"
                " and the other shards; copy or prepare it again"
            )
        self._records = np.flatnonzero(sizes[:, 1] <= max_length)
        if not len(self._records):
            raise InputError(f"{prepared.folder}: contains no text of at most {max_length} tokens")
        self.prepared, self.sizes = prepared, sizes[self._records]
        _check_positions(prepared, int(self.sizes[:, 0].max()), encoder_positions)
        self.too_long = len(prepared) - len(self._records) + prepared.manifest["counts"]["too_long"]

    def ids(self, text: int) -> tuple[np.ndarray, np.ndarray]:
        record = int(self._records[text])
        return self.prepared.read(record, int(self.sizes[text, 1]), self.prepared.shard(record).with_suffix(".npy"))

    def describe_lines(self, texts: Sequence[int]) -> str:
        return self.prepared.describe_lines(self._records[texts].tolist())


def _sizes(prepared: Prepared, shard: dict[str, Any]) -> np.ndarray:
    """Returns the numbers of encoder ids and decoder ids of a shard's records. Raises InputError if they cannot be."""
    path = prepared.folder / f"{shard['name']}.npy"
    sizes = read_array(path, 2)[:, 1:].astype(np.int64)
    ids = sizes.sum() + len(sizes)  # each record begins with a number
    if sizes.shape != (shard["texts"], 2) or (sizes < 1).any() or ids * prepared.dtype.itemsize > shard["bytes"]:
        raise InputError(f"{path}: does not match the manifest; copy or prepare it again")
    return sizes


class _Column:
    """A vector in a .npy file, read a few entries at a time. A memory-mapped file would count as used memory."""

    def __init__(self, path: Path, n: int):
        """Opens a file of n entries from 0 to n − 1."""
        shape, self._dtype, self._begin = read_array_header(path, 1)
        self._n = n
        self.path, self._file = path, path.open("rb")
        if shape != (n,):
            raise InputError(f"{path}: does not match the manifest; copy or prepare it again")

    def __getitem__(self, positions: np.ndarray) -> np.ndarray:
        size, file = self._dtype.itemsize, self._file.fileno()
        data = b"".join(os.pread(file, size, self._begin + size * int(i)) for i in positions)
        entries = np.frombuffer(data, self._dtype).astype(np.int64)
        if len(entries) < len(positions) or (entries < 0).any() or (entries >= self._n).any():
            raise InputError(f"{self.path}: is damaged; copy or prepare it again")
        return entries


def permute(positions: np.ndarray, n: int, seed: tuple[int, ...]) -> np.ndarray:
    """Applies a seeded permutation of 0 … n − 1 to `positions` without storing it.

    A Feistel network (Luby and Rackoff 1988) permutes all numbers with a certain even number of bits. It is applied
    again to results above n − 1, until none is left (cycle walking, Black and Rogaway 2002).
    """
    half_bits = max(1, (int(n - 1).bit_length() + 1) // 2)
    mask, shift = np.uint64((1 << half_bits) - 1), np.uint64(half_bits)
    keys = np.random.SeedSequence(seed).generate_state(8, np.uint64)

    def permute_once(x):
        left, right = x >> shift, x & mask
        for key in keys:
            left, right = right, left ^ (_mix(right ^ key) & mask)
        return left << shift | right

    x = permute_once(np.asarray(positions, np.uint64))
    while (too_large := x >= n).any():
        x[too_large] = permute_once(x[too_large])
    return x.astype(np.int64)


def _mix(x: np.ndarray) -> np.ndarray:
    """Returns a hash of x, every bit of which depends on every bit of x (the finalizer of MurmurHash3)."""
    x = (x ^ (x >> np.uint64(33))) * np.uint64(0xFF51AFD7ED558CCD)
    x = (x ^ (x >> np.uint64(33))) * np.uint64(0xC4CEB9FE1A85EC53)
    return x ^ (x >> np.uint64(33))
