"""Texts that `davae prepare` has made ready: how they lie on disk, and the batch of every step of them.

manifest.json              settings, counts, tokenizers, the list of shards; written last
vocab.txt, spiece.model    the tokenizers, which become a run's
NAME.arrayrecord           the records of a shard
NAME.npy                   uint32 [texts, 3]: each text's line in its piece of the input, and its numbers of encoder and
                           decoder ids
order.npy                  the records' numbers through all shards, the texts with the fewest decoder ids first
lengths.npy                [lengths, 3]: a number of decoder ids, the texts that have it, the most encoder ids of these
held_out.jsonl             texts that are in no shard, to measure on
bad_lines.jsonl            the first lines that could not be read, and why

A record is one text in little-endian uint16, or uint32 where a vocabulary needs it (`dtype` in the manifest): the
number of its encoder ids, these, and its decoder ids, bos first and the end token last.

What a step shows is arithmetic on its number: nothing is kept in memory that grows with the number of texts.
"""

from __future__ import annotations

import bisect
import hashlib
import itertools
import json
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from davae_jax.utils.errors import InputError, first_line

MANIFEST = "manifest.json"
FORMAT = 1
# Records together in a chunk, of which a read takes one: 40 bytes of a chunk's header are shared, the index is small.
# Packing ids by a general compressor saves a tenth and costs five times the time.
WRITER_OPTIONS = "group_size:16,uncompressed"
READER_OPTIONS = "readahead_buffer_size:0,max_parallelism:0"
THREADS = 4  # that read ahead
MAX_HELD_OUT_TEXTS = 10_000  # texts that are measured on


def encode_record(encoder_ids: Sequence[int], decoder_ids: Sequence[int], dtype: np.dtype) -> bytes:
    return np.array([len(encoder_ids), *encoder_ids, *decoder_ids], dtype).tobytes()


def decode_record(record: bytes, dtype: np.dtype) -> tuple[np.ndarray, np.ndarray]:
    """(encoder ids, decoder ids) of a record."""
    numbers = np.frombuffer(record, dtype)
    n = int(numbers[0])
    return numbers[1 : 1 + n], numbers[1 + n :]


def id_dtype(largest_id: int) -> np.dtype:
    return np.dtype("<u2" if largest_id < 1 << 16 else "<u4")


class Prepared:
    """A prepared folder, opened. `prepared[i]` gives the ids of record i."""

    def __init__(self, folder: Path):
        """Raises InputError where the folder is not complete: no manifest, or a shard missing or of another size."""
        self.folder = folder
        path = folder / MANIFEST
        try:
            manifest = json.loads(path.read_text(encoding="utf-8"))
        except FileNotFoundError:
            raise InputError(f"{folder}: holds no {MANIFEST}; `davae prepare` makes it when all is done") from None
        except (OSError, ValueError) as e:
            raise InputError(f"{path}: cannot be read ({first_line(e)})") from None
        if not isinstance(manifest, dict) or manifest.get("format") != FORMAT:
            raise InputError(f"{path}: is no manifest of this version; prepare the texts anew")
        self.manifest: dict[str, Any] = manifest
        self.shards: list[dict] = manifest["shards"]
        self.dtype = np.dtype(manifest["dtype"])
        for shard in self.shards:
            self._check(folder / f"{shard['name']}.arrayrecord", shard["bytes"])
        self._first = [0, *itertools.accumulate(shard["texts"] for shard in self.shards)]
        self._readers: list[Any] = [None] * len(self.shards)
        self._locks = [threading.Lock() for _ in self.shards]
        _allow_open_files(len(self.shards) + 256)

    def _check(self, path: Path, size: int) -> None:
        try:
            found = path.stat().st_size
        except OSError as e:
            raise InputError(f"{path}: a shard of the manifest cannot be read ({e.strerror})") from None
        if found != size:
            raise InputError(f"{path}: has {found} bytes, and {size} in the manifest; copy or prepare it anew")

    def __len__(self) -> int:
        return self._first[-1]

    @property
    def digest(self) -> str:
        """Of the ids and their order."""
        parts = [self.manifest["dtype"], *(shard["sha256"] for shard in self.shards)]
        parts += self.manifest["tokenizers"].values()
        return hashlib.sha256("\n".join(parts).encode()).hexdigest()[:16]

    def __getitem__(self, i: int) -> tuple[np.ndarray, np.ndarray]:
        """(encoder ids, decoder ids). Raises InputError where the shard is damaged."""
        n = bisect.bisect_right(self._first, i) - 1
        path = self.folder / f"{self.shards[n]['name']}.arrayrecord"
        try:
            # `read([i])` would walk through the index of the whole shard at every call; this takes microseconds.
            with self._locks[n]:
                if self._readers[n] is None:
                    self._readers[n] = _open(path)
                reader = self._readers[n]
                reader.seek(i - self._first[n])
                record = reader.read()
            return decode_record(record, self.dtype)
        except (RuntimeError, ValueError, IndexError, OSError) as e:
            raise InputError(f"{path}: record {i - self._first[n]} cannot be read ({first_line(e)})") from e

    def where(self, records: Sequence[int]) -> str:
        """The lines of the input that became these records, for messages."""
        lines: dict[str, list[int]] = {}
        for i in sorted(records):
            n = bisect.bisect_right(self._first, i) - 1
            shard = self.shards[n]
            line = np.load(self.folder / f"{shard['name']}.npy", mmap_mode="r")[i - self._first[n], 0]
            lines.setdefault(shard["file"], []).append(shard["line"] + int(line))
        return "; ".join(f"lines {', '.join(map(str, found))} of {file}" for file, found in lines.items())

    def lengths(self, max_length: int | None = None) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """The numbers of decoder ids that texts have, how many have each, and the most encoder ids up to there.

        Raises InputError where no text is of `max_length` decoder ids at most.
        """
        path = self.folder / "lengths.npy"
        try:
            lengths, counts, longest = np.load(path).T
        except (OSError, ValueError) as e:
            raise InputError(f"{path}: cannot be read ({first_line(e)})") from None
        n = len(lengths) if max_length is None else np.searchsorted(lengths, max_length, side="right")
        if not n:
            raise InputError(f"{self.folder}: holds no text of at most {max_length} tokens")
        return lengths[:n], counts[:n], np.maximum.accumulate(longest[:n])

    def held_out(self) -> list[str]:
        """The first texts that are kept apart."""
        path = self.folder / "held_out.jsonl"
        try:
            with path.open(encoding="utf-8") as file:
                return [json.loads(line)["text"] for line in itertools.islice(file, MAX_HELD_OUT_TEXTS)]
        except (OSError, ValueError, KeyError) as e:
            raise InputError(f"{path}: cannot be read ({first_line(e)})") from None


def _open(path: Path) -> Any:
    from array_record.python.array_record_module import ArrayRecordReader

    return ArrayRecordReader(str(path), READER_OPTIONS, file_reader_buffer_size=1 << 15)


def _allow_open_files(n: int) -> None:
    """Every shard is one open file, and a system's usual limit is 1024."""
    try:
        import resource
    except ImportError:  # not on Windows
        return
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != resource.RLIM_INFINITY and soft < n:
        most = n if hard == resource.RLIM_INFINITY else min(n, hard)
        resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, most), hard))
