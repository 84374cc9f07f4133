"""Reads the files of torch.save as NumPy arrays without PyTorch: the zip format, and the one of versions before 1.6.

The formats are those of `torch/serialization.py` (`_save`, `_load`, `_legacy_save`, `_legacy_load`) and
`caffe2/serialize/inline_container.h`. The zip file contains ROOT/data.pkl, whose tensors view the storages
ROOT/data/KEY, and ROOT/byteorder and ROOT/version; nothing is compressed. The older file is a sequence of pickles, the
fourth of which is the state and the fifth the list of its storages; each storage follows as a 64-bit number of elements
and its data.

The data are memory-mapped: a page is read when it is touched. The zip file's sums are checked, which PyTorch does not.
Bytes after the end are refused, and a part that the directory calls a folder, for which PyTorch gives memory with any
content. PyTorch alone refuses some fields of the directory, which say nothing about the contents.
"""

from __future__ import annotations

import io
import math
import struct
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from davae_jax.checkpoints.published.torch_pickle import MAX_PICKLE_BYTES, PickleMachine, Storage, Tensor, shown
from davae_jax.utils.errors import InputError, first_line

ZIP_MAGIC = b"PK\x03\x04"
LEGACY_MAGIC = b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19."  # torch.serialization.MAGIC_NUMBER, pickled
LEGACY_VERSION = 1001  # torch.serialization.PROTOCOL_VERSION
MAX_VERSION = 10  # kMaxSupportedFileFormatVersion in caffe2/serialize/versions.h
KNOWN_FLAGS = 0x808  # of a zip file's part: its sizes follow after it; its name is UTF-8
FOLDER = 0x10  # an attribute of a part; PyTorch gives memory with any content for one
MAX_DIRECTORY_BYTES = 1 << 23  # of a zip file; an entry takes about 100
# Views can overlap or repeat elements, so that their sizes add up to more than the file's.
MAX_EXPANSION, MIN_EXPANDED_BYTES = 8, 1 << 26
MAX_DIMENSIONS = 64  # of NumPy
Bytes = Mapping[str, np.ndarray]  # the data of each storage by its key


def read_torch(path: Path) -> dict[str, np.ndarray]:
    """Returns the tensors of a file that torch.save wrote, by name: views of the file, as its strides say.

    Raises:
      InputError: the file is damaged, contains more than dense tensors by name, or a pickle that could run code.
    """
    try:
        with open(path, "rb") as file:
            start = file.read(32)
        if start.startswith(ZIP_MAGIC):
            state, storages = _read_zip(path)
        elif start.startswith(LEGACY_MAGIC):
            state, storages = _read_legacy(path)
        else:
            raise InputError(f"cannot be read: {_why_unreadable(start)}")
        return _arrays(state, storages, path.stat().st_size)
    except InputError as e:
        raise InputError(f"{path}: {e}") from None
    except OSError as e:
        raise InputError(f"{path}: cannot be read ({e.strerror})") from None


def _why_unreadable(start: bytes) -> str:
    """Returns the reason why a file is neither format, judging by its first bytes."""
    if not start:
        return "it is empty"
    if start.startswith(b"version https://git-lfs"):
        return "it is a Git LFS pointer; fetch the file itself with `git lfs pull`"
    return "it is not in torch.save's zip format; load it with PyTorch and torch.save its state dict"


class _BoundedFile(io.BufferedReader):
    """A file of which a single read returns a bounded number of bytes: `zipfile` reads a directory at once."""

    def read(self, size: int | None = -1, /) -> bytes:
        limit = MAX_DIRECTORY_BYTES + 1
        data = super().read(limit if size is None or size < 0 else min(size, limit))
        if len(data) == limit:
            raise zipfile.BadZipFile("its directory is too large")
        return data


def _read_zip(path: Path) -> tuple[Any, Bytes]:
    parts = _zip_parts(path)
    roots = [name.removesuffix("/data.pkl") for name in parts if name.endswith("/data.pkl") and name.count("/") == 1]
    if len(roots) != 1:
        raise InputError("cannot be read: it contains no data.pkl, which torch.save writes")
    (root,) = roots
    if f"{root}/constants.pkl" in parts:
        raise InputError("cannot be read: it is a TorchScript program; torch.save its state dict")
    data = np.memmap(path, np.uint8, mode="r")

    def part(name: str, limit: int) -> bytes | None:
        if (span := parts.get(f"{root}/{name}")) and span[1] - span[0] > limit:
            raise InputError(f"cannot be read: its part {name} is larger than {limit} bytes")
        return data[slice(*span)].tobytes() if span else None

    version, byteorder = part("version", 16) or b"", part("byteorder", 16) or b"little"
    if not version.removesuffix(b"\n").isdigit() or not 1 <= int(version) <= MAX_VERSION:
        raise InputError(f"cannot be read: the version of its format is {version!r}, not 1 to {MAX_VERSION}")
    if byteorder not in (b"little", b"big"):
        raise InputError(f"cannot be read: its byte order is {byteorder!r}")
    machine = PickleMachine(part("data.pkl", MAX_PICKLE_BYTES))
    state = machine.run()
    machine.check_end()
    storages = {}
    for key, storage in machine.storages.items():
        begin, end = parts.get(f"{root}/data/{key}", (0, -1))
        if (end - begin) // storage.itemsize != storage.count:
            raise InputError(f"cannot be read: its part {shown(f'data/{key}')} is missing or has another size")
        storages[key] = data[begin:end] if byteorder == b"little" else _swapped(data[begin:end], storage)
    return state, storages


def _zip_parts(path: Path) -> dict[str, tuple[int, int]]:
    """Returns the (begin, end) of each part of a zip file after checking its CRC-32."""
    try:
        with _BoundedFile(io.FileIO(path)) as raw:
            if not zipfile.is_zipfile(raw):
                raise InputError("cannot be read: it is truncated or damaged")
            with zipfile.ZipFile(raw) as file:
                entries = file.infolist()
                _check_entries(entries, path.stat().st_size)
                damaged = file.testzip()
            if damaged:
                raise InputError(f"cannot be read: its part {shown(damaged)} is damaged (its CRC-32 differs)")
            parts = {}
            for entry in entries:
                raw.seek(entry.header_offset + 26)  # of the local header, which has 30 bytes, a name and extra fields
                name_size, extra_size = struct.unpack("<HH", raw.read(4))
                begin = entry.header_offset + 30 + name_size + extra_size
                parts[entry.filename] = begin, begin + entry.file_size
            return parts
    except (InputError, OSError):
        raise
    except Exception as e:  # zipfile raises BadZipFile, RuntimeError, NotImplementedError and more
        raise InputError(f"cannot be read: it is truncated or damaged ({first_line(e)})") from None


def _check_entries(entries: list[zipfile.ZipInfo], file_size: int) -> None:
    """Checks what PyTorch always writes: plain uncompressed parts with different names, which do not overlap."""
    for entry in entries:
        if entry.compress_type != zipfile.ZIP_STORED or entry.compress_size != entry.file_size:
            name = shown(entry.filename)
            raise InputError(f"cannot be read: its part {name} is compressed, as PyTorch never writes it")
        if entry.flag_bits & ~KNOWN_FLAGS or entry.volume or entry.external_attr & FOLDER:
            raise InputError(f"cannot be read: its part {shown(entry.filename)} is encrypted, elsewhere or a folder")
    if sum(entry.file_size for entry in entries) > file_size:
        raise InputError("cannot be read: its parts overlap")
    if len({entry.filename.lower() for entry in entries}) < len(entries):  # PyTorch does not distinguish the case
        raise InputError("cannot be read: two of its parts have the same name")


def _swapped(data: np.ndarray, storage: Storage) -> np.ndarray:
    """Returns the data of a storage of a machine with the other byte order."""
    if storage.dtype is None:
        raise InputError("cannot be read: an untyped storage in the byte order of another machine")
    size = storage.itemsize // (2 if storage.dtype.kind == "c" else 1)
    return data[: storage.count * storage.itemsize].view(f"u{size}").byteswap().view(np.uint8)


def _read_legacy(path: Path) -> tuple[Any, Bytes]:
    with open(path, "rb") as file:
        head = file.read(MAX_PICKLE_BYTES)
    position = len(LEGACY_MAGIC)
    values = []
    for _ in range(4):  # version, system, state, keys
        machine = PickleMachine(head, position, storage_fields=6)
        values.append(machine.run())
        position = machine.position
        if len(values) == 3:
            described = machine.storages
    version, _, state, keys = values
    if version is True or version != LEGACY_VERSION:
        raise InputError("cannot be read: it is not in a format of torch.save")
    if type(keys) is not list or not all(type(key) is str for key in keys) or len(keys) != len(described):
        raise InputError("cannot be read: its list of storages is damaged")
    if any(storage.dtype is None for storage in described.values()):
        raise InputError("cannot be read: it contains an untyped storage, which PyTorch does not read in this format")
    data = np.memmap(path, np.uint8, mode="r")
    storages = {}
    for key in keys:
        begin = position + 8
        if key not in described or key in storages or begin > data.size:
            raise InputError(f"cannot be read: it is truncated or damaged at the storage {shown(key)}")
        (count,) = struct.unpack("<q", data[position:begin].tobytes())
        position = begin + described[key].count * described[key].itemsize
        if count != described[key].count or position > data.size:
            raise InputError(f"cannot be read: it is truncated or damaged at the storage {shown(key)}")
        storages[key] = data[begin:position]
    if position != data.size:
        raise InputError("cannot be read: bytes follow after its storages")
    return state, storages


def _arrays(state: Any, storages: Bytes, file_size: int) -> dict[str, np.ndarray]:
    if not isinstance(state, dict):
        raise InputError(f"contains a {type(state).__name__}, not a dict of tensors")
    if not_tensors := [name for name, value in state.items() if type(value) is not Tensor]:
        raise InputError(f"contains values that are not tensors: {_listed(not_tensors)}")
    if not_strings := [name for name in state if type(name) is not str]:
        raise InputError(f"contains tensors whose names are not strings: {_listed(not_strings)}")
    arrays, limit = {}, max(MIN_EXPANDED_BYTES, MAX_EXPANSION * file_size)
    for name, tensor in state.items():
        try:
            arrays[name] = _array(tensor, storages[tensor.storage.key])
        except ValueError as e:
            raise InputError(f"{shown(name)} cannot be read: {first_line(e)}") from None
        if (limit := limit - arrays[name].nbytes) < 0:
            raise InputError("cannot be read: its tensors repeat the file's elements too often")
    return arrays


def _listed(names: list[Any]) -> str:
    """Returns the first five names, and "…" if there are more."""
    return ", ".join([*map(shown, names[:5]), *(["…"] if len(names) > 5 else [])])


def _array(tensor: Tensor, data: np.ndarray) -> np.ndarray:
    """Returns a tensor as a view of its storage's data. Raises ValueError if it is not one."""
    shape, strides, offset = tensor.shape, tensor.strides, tensor.offset
    if isinstance(tensor.dtype, str):
        raise ValueError(f"the dtype {tensor.dtype} is not supported")
    if tensor.metadata is not None and tensor.metadata != {}:
        raise ValueError("it is marked as conjugate or negative; torch.save it after resolve_conj() and resolve_neg()")
    if not all(type(sizes) is tuple and len(sizes) <= MAX_DIMENSIONS for sizes in (shape, strides)):
        raise ValueError("it has no valid shape")
    if len(shape) != len(strides) or not all(type(n) is int and 0 <= n < 1 << 62 for n in (offset, *shape, *strides)):
        raise ValueError("it has no valid shape")
    if math.prod(shape) == 0:
        return np.empty(shape, tensor.dtype)
    count = tensor.storage.count * tensor.storage.itemsize // tensor.dtype.itemsize
    if offset + sum((n - 1) * stride for n, stride in zip(shape, strides)) >= count:
        raise ValueError("it is larger than its storage")
    itemsize = tensor.dtype.itemsize
    steps = [stride * itemsize if n > 1 else 0 for n, stride in zip(shape, strides)]
    return np.ndarray(shape, tensor.dtype, data, offset * itemsize, steps)
