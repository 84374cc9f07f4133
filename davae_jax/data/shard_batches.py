"""The batch of every step of prepared texts, as arithmetic on the step: nothing in memory grows with the texts."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from davae_jax.data.batches import Batch, pad_batch
from davae_jax.data.shards import Prepared
from davae_jax.utils.errors import InputError, first_line
from davae_jax.utils.shapes import round_up


class PreparedBatches:
    """The batch of every step of prepared texts, with the interface of `data.Batches`: a seeded shuffle an epoch,
    without end, texts of like length together in `buckets` shapes.

    A step's batch depends on the seed and the step alone. An epoch is one row of places: the buckets one after the
    other, each shuffled by a permutation that is computed, not stored; batch k has the places from k·B on, and the
    batches come in an order shuffled in the same way. What does not fill a batch at the end waits for another epoch.

    Batches that are asked for one after the other have been read in background threads (grain's).
    """

    def __init__(
        self,
        prepared: Prepared,
        batch_size: int,
        *,
        pad_id: int,
        buckets: int = 1,
        seed: int = 0,
        max_length: int | None = None,  # texts of more decoder ids are left out
        encoder_positions: int | None = None,  # no row of the encoder's is padded past them
    ):
        """Raises InputError where no text is short enough, or one is too long for the encoder."""
        self.prepared, self.batch_size, self.pad_id, self.seed = prepared, batch_size, pad_id, seed
        lengths, counts, longest = prepared.lengths(max_length)
        _check_positions(prepared, int(longest[-1]), encoder_positions)
        self.count = int(counts.sum())
        self.too_long = len(prepared) - self.count + prepared.manifest["counts"]["too_long"]
        # Fewer texts than a batch: some stand in it more than once, and all are of one bucket.
        n = max(self.count, batch_size)
        buckets = 1 if self.count < max(batch_size, buckets) else buckets
        self._bounds = [n * i // buckets for i in range(buckets + 1)]
        self._shapes = []
        for end in self._bounds[1:]:
            of_longest = np.searchsorted(counts.cumsum(), min(end, self.count))  # row of the bucket's last text
            S, T = round_up(int(longest[of_longest]), 8), round_up(int(lengths[of_longest]), 8)
            self._shapes.append((min(S, encoder_positions or S), T))
        self.per_epoch = n // batch_size
        self._order = _Column(prepared.folder / "order.npy", len(prepared))

    @property
    def size(self) -> str:
        """Of a batch, in words."""
        return f"{self.batch_size} texts"

    def rows(self, step: int, start: int = 0, stop: int | None = None) -> tuple[np.ndarray, tuple[int, int]]:
        """Which records make the batch of a step, or its rows start to stop alone, and its shape (S, T)."""
        epoch, place = divmod(step, self.per_epoch)
        k = permuted(np.array([place]), self.per_epoch, (self.seed, epoch))[0]
        places = np.arange(k * self.batch_size, (k + 1) * self.batch_size)
        of_bucket = np.searchsorted(self._bounds, places, side="right") - 1
        for bucket in np.unique(of_bucket):
            low, high = self._bounds[bucket : bucket + 2]
            here = of_bucket == bucket
            places[here] = low + permuted(places[here] - low, high - low, (self.seed, epoch, bucket + 1))
        return self._order[places[start:stop] % self.count], self._shapes[of_bucket[-1]]

    def where(self, step: int) -> str:
        """The lines that make the batch of a step, for messages."""
        return self.prepared.where(self.rows(step)[0].tolist())

    def __getitem__(self, step: int) -> Batch:
        return self.read(step, 0, self.batch_size)

    def read(self, step: int, start: int, stop: int) -> Batch:
        """Rows start to stop of a step's batch."""
        rows, shape = self.rows(step, start, stop)
        return pad_batch([self.prepared[i] for i in rows.tolist()], shape, self.pad_id)


def _check_positions(prepared: Prepared, longest: int, encoder_positions: int | None) -> None:
    if encoder_positions is not None and longest > encoder_positions:
        raise InputError(
            f"{prepared.folder}: has texts of {longest} encoder ids, and the model's encoder "
            f"{encoder_positions} positions; prepare with --encoder-positions {encoder_positions}"
        )


class PreparedTexts:
    """Prepared texts of at most so many decoder ids, with the interface of `data.Texts`, for packing."""

    def __init__(self, prepared: Prepared, max_length: int, encoder_positions: int | None = None):
        """Raises InputError where none is short enough, or one is too long for the encoder."""
        paths = [prepared.folder / f"{shard['name']}.npy" for shard in prepared.shards]
        sizes = np.concatenate([np.load(path)[:, 1:] for path in paths]).astype(np.int64)
        self._records = np.flatnonzero(sizes[:, 1] <= max_length)
        if not len(self._records):
            raise InputError(f"{prepared.folder}: holds no text of at most {max_length} tokens")
        self.prepared, self.sizes = prepared, sizes[self._records]
        _check_positions(prepared, int(self.sizes[:, 0].max()), encoder_positions)
        self.too_long = len(prepared) - len(self._records) + prepared.manifest["counts"]["too_long"]

    def ids(self, text: int) -> tuple[np.ndarray, np.ndarray]:
        return self.prepared[int(self._records[text])]

    def where(self, texts: Sequence[int]) -> str:
        return self.prepared.where(self._records[texts].tolist())


class _Column:
    """A vector in a .npy file, of which a few entries are read at a time. Mapped, it would count as memory."""

    def __init__(self, path: Path, n: int):
        try:
            self._file = path.open("rb")
            np.lib.format.read_magic(self._file)
            shape, _, self._dtype = np.lib.format.read_array_header_1_0(self._file)
        except (OSError, ValueError) as e:
            raise InputError(f"{path}: cannot be read ({first_line(e)})") from None
        self._begin = self._file.tell()
        if shape != (n,) or path.stat().st_size != self._begin + n * self._dtype.itemsize:
            raise InputError(f"{path}: does not fit the manifest; copy or prepare it anew")

    def __getitem__(self, places: np.ndarray) -> np.ndarray:
        size, file = self._dtype.itemsize, self._file.fileno()
        data = b"".join(os.pread(file, size, self._begin + size * int(i)) for i in places)
        return np.frombuffer(data, self._dtype).astype(np.int64)


def permuted(places: np.ndarray, n: int, seed: tuple[int, ...]) -> np.ndarray:
    """Where a seeded permutation of 0 … n − 1 puts these places; nothing of its n entries is stored.

    A Feistel network (Luby and Rackoff 1988) permutes the numbers of the next even count of bits; what falls past
    n − 1 is sent through it again until it does not (Black and Rogaway 2002).
    """
    half = max(1, (int(n - 1).bit_length() + 1) // 2)
    mask, shift = np.uint64((1 << half) - 1), np.uint64(half)
    keys = np.random.SeedSequence(seed).generate_state(8, np.uint64)

    def once(x):
        left, right = x >> shift, x & mask
        for key in keys:
            left, right = right, left ^ (_mixed(right ^ key) & mask)
        return left << shift | right

    x = once(np.asarray(places, np.uint64))
    while (past := x >= n).any():
        x[past] = once(x[past])
    return x.astype(np.int64)


def _mixed(x: np.ndarray) -> np.ndarray:
    """Every bit of the result depends on every bit of x (the finalizer of MurmurHash3)."""
    x = (x ^ (x >> np.uint64(33))) * np.uint64(0xFF51AFD7ED558CCD)
    x = (x ^ (x >> np.uint64(33))) * np.uint64(0xC4CEB9FE1A85EC53)
    return x ^ (x >> np.uint64(33))
