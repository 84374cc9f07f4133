"""Reads batches ahead of the steps that need them, and shards them over the devices of all processes."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence

import jax
from jax.sharding import NamedSharding

from davae_jax.data.batches import Batch, BatchSource

RowRange = tuple[int, int]  # start, stop


def prefetch(source: BatchSource, sharding: NamedSharding, first_step: int, threads: int = 0) -> Iterator[Batch]:
    """Yields the batches of `first_step` and of all later steps, sharded by `sharding`.

    Each process reads only the rows of its local devices.

    Args:
      sharding: how the rows of a batch are split over the devices.
      threads: number of grain's reading threads; 0 reads each batch when it is requested, which suits texts in memory.
    """
    ranges = local_row_ranges(sharding, source.batch_size)
    for local_rows in read_ahead(source, ranges, first_step, threads):
        yield make_global_batch(local_rows, source.batch_size, sharding)


def read_ahead(
    source: BatchSource, ranges: Sequence[RowRange], first_step: int, threads: int
) -> Iterator[dict[RowRange, Batch]]:
    """Yields these rows of the batches of `first_step` and of all later steps; see `prefetch`."""
    local_rows = _LocalRows(source, ranges)
    if not threads:
        return map(local_rows.__getitem__, itertools.count(first_step))
    import grain

    options = grain.ReadOptions(num_threads=threads, prefetch_buffer_size=2 * threads)
    upcoming = iter(grain.MapDataset.source(local_rows).to_iter_dataset(options))
    upcoming.set_state({"next_index": first_step})
    return upcoming


class _LocalRows:
    """The endless sequence that grain reads: for each step, the rows of its batch that this process needs."""

    def __init__(self, source: BatchSource, ranges: Sequence[RowRange]):
        self._source, self._ranges = source, ranges

    def __len__(self) -> int:
        return 1 << 62

    def __getitem__(self, step: int) -> dict[RowRange, Batch]:
        return {rows: self._source.batch(step, *rows) for rows in self._ranges}


def local_row_ranges(sharding: NamedSharding, batch_size: int) -> list[RowRange]:
    """Returns the rows of a batch that belong to this process's devices, as sorted (start, stop) pairs."""
    indices = sharding.addressable_devices_indices_map((batch_size,)).values()
    return sorted({index[0].indices(batch_size)[:2] for index in indices})


def make_global_batch(local_rows: dict[RowRange, Batch], batch_size: int, sharding: NamedSharding) -> Batch:
    """Returns a batch sharded over the devices of all processes, given the rows of this process's devices."""
    ranges = list(local_rows)

    def assemble(*arrays):
        by_range = dict(zip(ranges, arrays, strict=True))
        return jax.make_array_from_callback(
            (batch_size, *arrays[0].shape[1:]),
            sharding,
            lambda index: by_range[index[0].indices(batch_size)[:2]],
        )

    return jax.tree.map(assemble, *local_rows.values())
