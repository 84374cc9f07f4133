"""Reads the records of a folder made by `davae prepare`, which contains these files:

manifest.json              settings, counts, hashes of all files but prepare.json, the list of shards, and a sum of the
                           manifest itself; written last
prepare.json               the settings; written first
vocab.txt, spiece.model    the tokenizers, which a training run copies
NAME.arrayrecord           a shard: one record per text
NAME.npy                   uint32 [texts, 3], a row per record of the shard: the line of the text in the shard's part of
                           the input, its number of encoder ids, and its number of decoder ids
order.npy                  the indices of all records, counted over all shards, sorted by number of decoder ids
lengths.npy                [lengths, 3], a row per number of decoder ids that occurs: this number, the number of such
                           texts, and the largest number of encoder ids among them
held_out.jsonl             the held-out texts, which are in no shard
bad_lines.jsonl            the first lines that could not be read, each with its file, its line number and the problem

A record is one text as little-endian uint16, or uint32 for vocabularies or texts of more than 65,536 ids (`dtype` in
the manifest): the number of encoder ids, then the encoder ids, then the decoder ids with bos first and the
end token last.
"""

from __future__ import annotations

import bisect
import hashlib
import itertools
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from davae_jax.data.inputs.file_lines import describe_lines, files_of
from davae_jax.tokenizers.load import TOKENIZER_FILES
from davae_jax.utils.arrays import read_array
from davae_jax.utils.errors import InputError, first_line, system_reason
from davae_jax.utils.files import check_utf8_path, file_sha256
from davae_jax.utils.json_files import has_wrong_sum, read_json_object
from davae_jax.utils.json_lines import iterate_json_lines
from davae_jax.utils.open_files import OpenFiles, allow_open_files

MANIFEST, SETTINGS = "manifest.json", "prepare.json"
FORMAT = 1
MAX_JSON_BYTES = 1 << 26  # of a file with the names of all input files
# Names of settings in prepare.json and the manifest that differ from those in the code: name → stored name.
STORED_NAMES = {"fields": "field", "truncate": "cut", "decoder_vocab_size": "pieces", "encoder_vocab_size": "entries"}
# ArrayRecord stores records in groups of 16, which share a header of 40 bytes and an entry in the index; a read takes
# one group. General compression of the ids would save a tenth of the space and take five times as long.
WRITER_OPTIONS = "group_size:16,uncompressed"
READER_OPTIONS = "readahead_buffer_size:0,max_parallelism:0"
THREADS = 4  # number of threads that prefetch batches
MAX_IDS = 1 << 20  # of a text, if a manifest does not say how long its texts are
MAX_HELD_OUT_TEXTS = 10_000  # maximum number of texts of held_out.jsonl that a training run uses


def encode_record(encoder_ids: Sequence[int], decoder_ids: Sequence[int], dtype: np.dtype) -> bytes:
    """Returns the record of a text."""
    return np.array([len(encoder_ids), *encoder_ids, *decoder_ids], dtype).tobytes()


def decode_record(record: bytes, dtype: np.dtype) -> tuple[np.ndarray, np.ndarray]:
    """Returns the encoder ids and the decoder ids in a record."""
    values = np.frombuffer(record, dtype)
    n = int(values[0])
    return values[1 : 1 + n], values[1 + n :]


def id_dtype(largest_id: int) -> np.dtype:
    """Returns the smallest data type of records whose ids go up to `largest_id`."""
    return np.dtype("<u2" if largest_id < 1 << 16 else "<u4")


def to_stored_names(settings: dict[str, Any]) -> dict[str, Any]:
    """Returns settings under their names in prepare.json and in the manifest."""
    return _rename(settings, STORED_NAMES)


def from_stored_names(stored: dict[str, Any]) -> dict[str, Any]:
    """Returns the settings of a prepare.json or manifest under their names in the code."""
    return _rename(stored, {stored_name: name for name, stored_name in STORED_NAMES.items()})


def _rename(settings: dict[str, Any], names: dict[str, str]) -> dict[str, Any]:
    """Renames the keys of settings and of their tokenizers, but not those of their inputs, which are file names."""
    renamed = {names.get(key, key): value for key, value in settings.items()}
    if isinstance(tokenizers := renamed.get("tokenizers"), dict):
        renamed["tokenizers"] = {names.get(key, key): value for key, value in tokenizers.items()}
    return renamed


class Prepared:
    """The records of a prepared folder: `prepared[i]` is the encoder ids and the decoder ids of record i.

    Attributes:
      folder: the prepared folder.
      manifest: the content of manifest.json.
      shards: the manifest's list of shards.
      dtype: the data type of the ids.
    """

    def __init__(self, folder: Path):
        """Opens a folder.

        Raises:
          InputError: there is no manifest of this version, a shard is missing or does not have the size in the
            manifest, or another file is not what was written.
        """
        self.folder = folder
        self.manifest: dict[str, Any] = read_manifest(folder)
        self.shards: list[dict] = self.manifest["shards"]
        self.dtype = np.dtype(self.manifest["dtype"])
        # The files that decide which text is read when; those of the shards are too large, and have sums of their own.
        written = self.manifest.get("files", {})  # absent in the first versions
        read = ("order.npy", "lengths.npy", "held_out.jsonl")
        self._compared = {name: written[name] for name in read if name in written}
        hashes = self.manifest["tokenizers"] | self._compared
        for name, digest in hashes.items():
            if file_sha256(folder / name) != digest:
                raise InputError(f"{folder / name}: is not the file with which the texts were prepared; copy it again")
        for shard in self.shards:
            _check_size(folder / f"{shard['name']}.arrayrecord", shard["bytes"])
        self._first_records = [0, *itertools.accumulate(shard["texts"] for shard in self.shards)]
        self._readers = OpenFiles(self._open, allow_open_files(len(self.shards)))

    def __len__(self) -> int:
        return self._first_records[-1]

    @property
    def digest(self) -> str:
        """Returns a hash of the ids and their order."""
        hashed = [self.manifest["dtype"], *(shard["sha256"] for shard in self.shards)]
        hashed += self.manifest["tokenizers"].values()
        return hashlib.sha256("\n".join(hashed).encode()).hexdigest()[:16]

    @property
    def truncated(self) -> bool:
        """Returns whether texts that were too long for the encoder were truncated; otherwise they were dropped."""
        return from_stored_names(self.manifest["settings"]).get("truncate", False)  # absent in the first versions

    def __getitem__(self, i: int) -> tuple[np.ndarray, np.ndarray]:
        """Returns the encoder ids and the decoder ids of record i. Raises InputError if the shard is damaged."""
        path, (n, i) = self.shard(i), self._locate(i)
        try:
            # The time of `read([i])` grows with the size of the shard; `seek` and `read` take microseconds.
            with self._readers.use(n) as reader:
                reader.seek(i)
                record = reader.read()
            return decode_record(record, self.dtype)
        except (RuntimeError, ValueError, IndexError, OSError) as e:
            raise InputError(f"{path}: record {i} cannot be read ({first_line(e)})") from e

    def read(self, i: int, length: int, source: Path) -> tuple[np.ndarray, np.ndarray]:
        """Returns record i as `prepared[i]`.

        Raises InputError if it does not have `length` decoder ids, which the file `source` gives, as in a shard of
        another prepared folder. Small shards often have the same size: their format fills up blocks of 64 KiB.
        """
        ids = self[i]
        if len(ids[1]) != length:
            # What has been compared with its hash is right.
            wrong, right = (self.shard(i), source) if source.name in self._compared else (source, self.shard(i))
            raise InputError(f"{wrong}: does not match {right.name}; copy or prepare it again")
        return ids

    def shard(self, i: int) -> Path:
        """Returns the shard that contains record i."""
        return self.folder / f"{self.shards[self._locate(i)[0]]['name']}.arrayrecord"

    def describe_lines(self, records: Sequence[int]) -> str:
        """Returns the input lines that these records come from, for messages."""
        lines: dict[str, list[int]] = {}
        for i in sorted(records):
            n, i = self._locate(i)
            shard = self.shards[n]
            number = read_array(self.folder / f"{shard['name']}.npy", 2, mapped=True)[i, 0]
            file, line = files_of(shard).locate(int(number))
            lines.setdefault(file, []).append(line)
        return describe_lines(lines)

    def _open(self, n: int) -> Any:
        return open_shard(self.folder / f"{self.shards[n]['name']}.arrayrecord")

    def _locate(self, i: int) -> tuple[int, int]:
        """Returns the index of the shard that contains record i, and the record's index in that shard."""
        n = bisect.bisect_right(self._first_records, i) - 1
        return n, i - self._first_records[n]

    def lengths(self, max_length: int | None = None) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Returns three vectors with an entry for each number of decoder ids that occurs, in ascending order.

        They are the number of decoder ids, the number of texts that have it, and the largest number of encoder ids of
        texts with at most this number of decoder ids.

        Args:
          max_length: the maximum number of decoder ids; None: no limit.

        Raises:
          InputError: no text has at most `max_length` decoder ids.
        """
        path = self.folder / "lengths.npy"
        table = read_array(path, 2).astype(np.int64)
        settings = from_stored_names(self.manifest["settings"])
        bounds = (settings.get("max_length", MAX_IDS), len(self), settings.get("encoder_positions", MAX_IDS))
        is_intact = table.shape[1] == 3 and (table > 0).all() and (table <= bounds).all()
        if not is_intact or (np.diff(table[:, 0]) <= 0).any() or table[:, 1].sum() != len(self):
            raise InputError(f"{path}: is damaged; copy or prepare it again")
        lengths, counts, longest = table.T
        n = len(lengths) if max_length is None else np.searchsorted(lengths, max_length, side="right")
        if not n:
            raise InputError(f"{self.folder}: contains no text of at most {max_length} tokens")
        return lengths[:n], counts[:n], np.maximum.accumulate(longest[:n])

    def held_out(self) -> list[str]:
        """Returns the held-out texts, at most MAX_HELD_OUT_TEXTS of them."""
        path = self.folder / "held_out.jsonl"
        texts = []
        try:
            for line in itertools.islice(iterate_json_lines(path), MAX_HELD_OUT_TEXTS):
                text = (line.values or {}).get("text")
                if not isinstance(text, str):
                    raise InputError(f"{path}: line {line.number} is damaged; copy or prepare the folder again")
                texts.append(text)
        except OSError as e:
            raise InputError(f"{path}: cannot be read ({system_reason(e)})") from None
        return texts


def is_prepared(folder: Path) -> bool:
    """Returns whether `davae prepare` made a folder, perhaps not to the end."""
    has_manifest = (folder / MANIFEST).is_file() and any(folder.glob("*.arrayrecord"))
    return has_manifest or (folder / SETTINGS).is_file()


def read_manifest(folder: Path) -> dict[str, Any]:
    """Returns the manifest of a prepared folder.

    Raises InputError if there is none of this version, or it is damaged.
    """
    path = folder / MANIFEST
    check_utf8_path(folder)
    try:
        manifest = read_json_object(path, MAX_JSON_BYTES)
    except FileNotFoundError:
        raise InputError(f"{folder}: contains no {MANIFEST}; `davae prepare` writes it after the last shard") from None
    if manifest.get("format") != FORMAT:
        raise InputError(f"{path}: is not a manifest of this version; prepare the texts again")
    try:
        shards, counts, tokenizers = manifest["shards"], manifest["counts"], manifest["tokenizers"]
        intact = manifest["dtype"] in ("<u2", "<u4") and isinstance(manifest["settings"], dict) and len(shards) > 0
        intact &= all(type(count) is int and 0 <= count < 1 << 62 for count in counts.values()) and "too_long" in counts
        intact &= set(tokenizers) == set(TOKENIZER_FILES) and all(isinstance(x, str) for x in tokenizers.values())
        lengths = from_stored_names(manifest["settings"])
        for key in ("max_length", "encoder_positions"):  # absent in the first versions
            intact &= type(lengths.get(key, 1)) is int and lengths.get(key, 1) > 0
        for shard in shards:
            intact &= re.fullmatch(r"\d+-\d+", shard["name"]) is not None
            intact &= all(type(shard[key]) is int and 0 <= shard[key] < 1 << 62 for key in ("texts", "bytes"))
            files, first_lines = files_of(shard)
            intact &= all(type(line) is int and abs(line) < 1 << 62 for line in first_lines)
            intact &= first_lines == sorted(first_lines)
            intact &= len(files) > 0 and all(isinstance(text, str) for text in (shard["sha256"], *files))
        intact &= not has_wrong_sum(manifest)
        intact &= all("/" not in name and isinstance(x, str) for name, x in manifest.get("files", {}).items())
    except (KeyError, TypeError, AttributeError, ValueError, IndexError):
        intact = False
    if not intact:
        raise InputError(f"{path}: is damaged; copy or prepare the folder again")
    return manifest


def _check_size(path: Path, expected: int) -> None:
    try:
        size = path.stat().st_size
    except OSError as e:
        raise InputError(f"{path}: a shard of the manifest cannot be read ({e.strerror})") from None
    if size != expected:
        raise InputError(f"{path}: has {size} bytes, but the manifest gives {expected}; copy or prepare it again")


def open_shard(path: Path) -> Any:
    """Returns ArrayRecord's reader of a shard, which raises errors of several types."""
    from array_record.python.array_record_module import ArrayRecordReader

    return ArrayRecordReader(str(path), READER_OPTIONS, file_reader_buffer_size=1 << 15)
