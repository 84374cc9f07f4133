"""Batches read ahead, and laid over devices."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from typing import Any

import jax
from jax.sharding import NamedSharding

from davae_jax.data.batches import Batch


def prefetch(batches: Any, spans: Sequence[tuple[int, int]], step: int, threads: int) -> Iterator[dict]:
    """These rows of the batches of a step and all that follow, each {(start, stop): rows}.

    threads: of grain's, that read before it is wanted; 0 for texts that are in memory.
    """
    steps = _Steps(batches, spans)
    if not threads:
        return map(steps.__getitem__, itertools.count(step))
    import grain

    options = grain.ReadOptions(num_threads=threads, prefetch_buffer_size=2 * threads)
    coming = iter(grain.MapDataset.source(steps).to_iter_dataset(options))
    coming.set_state({"next_index": step})
    return coming


class _Steps:
    """What grain reads from: step → the parts of its batch, without end."""

    def __init__(self, batches: Any, spans: Sequence[tuple[int, int]]):
        self._batches, self._spans = batches, spans

    def __len__(self) -> int:
        return 1 << 62

    def __getitem__(self, step: int) -> dict[tuple[int, int], Batch]:
        return {span: self._batches.read(step, *span) for span in self._spans}


def local_row_ranges(sharding: NamedSharding, size: int) -> list[tuple[int, int]]:
    """Which rows of a batch this process's devices hold, as (start, stop)."""
    where = sharding.addressable_devices_indices_map((size,)).values()
    return sorted({index[0].indices(size)[:2] for index in where})


def make_global_batch(parts: dict[tuple[int, int], Batch], size: int, sharding: NamedSharding) -> Batch:
    """A batch of `size` rows, laid over the devices of all processes, from the rows that this process's own hold."""

    def whole(*leaves):
        by_span = dict(zip(parts, leaves, strict=True))
        part = lambda where: by_span[where[0].indices(size)[:2]]  # noqa: E731
        return jax.make_array_from_callback((size, *leaves[0].shape[1:]), sharding, part)

    return jax.tree.map(whole, *parts.values())
