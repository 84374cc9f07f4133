"""Makes files of torch.save: many kinds of tensors, hostile pickles, and mutations of both formats, seeded."""

import io
import pickle
import struct
import zipfile
from collections import OrderedDict

import numpy as np
import torch

PICKLE_OF_ZIP = "archive/data.pkl"  # torch.save names the root so when it writes to memory
# Opcodes that torch.save writes, and those that call or import something.
OPCODES = (
    b"}])(.0N\x88\x89RQbuesatc\x85\x86\x87qrhjKMJGX\x8aqhqh"
    + b"io\x81\x92\x93\x82\x83\x84\x8e\x95\x97\x98PV12UTBCI\x8b\x8c\x8d\x8f\x90\x91\x94"
)


def saved(state, **options) -> bytes:
    """Returns the file of a state."""
    file = io.BytesIO()
    torch.save(state, file, **options)
    return file.getvalue()


def every_kind_of_tensor() -> dict[str, dict[str, torch.Tensor]]:
    """Returns states by what they contain: dtypes, strides, ties, names and containers."""
    matrix, draw = torch.arange(24.0).reshape(4, 6), torch.Generator().manual_seed(0)
    floats = [torch.float32, torch.float16, torch.bfloat16, torch.float64, torch.complex64, torch.complex128]
    dtypes = [*floats, torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8, torch.bool]
    module = torch.nn.Sequential(torch.nn.Linear(3, 2), torch.nn.BatchNorm1d(2))
    marked = torch.nn.Parameter(torch.ones(2))
    marked.note = "kept by PyTorch alone"
    return {
        "dtypes": {str(t): torch.randn(2, 3, generator=draw).mul(3).to(t) for t in dtypes},
        "empty and without dimensions": {
            **{f"empty {t}": torch.zeros(0, 3, dtype=t) for t in dtypes},
            **{f"scalar {t}": torch.ones((), dtype=t) for t in dtypes},
        },
        "strides": {
            "transposed": matrix.t(),
            "sliced": matrix[1:, ::2],
            "expanded": matrix[0].expand(3, 6),
            "windows": matrix.as_strided((5, 3), (2, 1), 4),
            "permuted": torch.arange(24).reshape(2, 3, 4).permute(2, 0, 1),
            "one row": matrix[2:3],
        },
        "ties": {"a": matrix, "b": matrix, "c": matrix.view(6, 4), "first": matrix[0], "last": matrix[-1, -1]},
        "parameters": {"p": torch.nn.Parameter(matrix), "frozen": torch.nn.Parameter(matrix, False), "marked": marked},
        "a module": module.state_dict(),
        "names": {"": matrix, "天 气": matrix + 1, "a.b/c": matrix + 2, "n" * 300: matrix + 3},
        "one": {"a": matrix},
        "none": {},
        "an ordered dict": OrderedDict(b=matrix, a=matrix[1]),
        "many": {f"layer.{i}.weight": torch.full((2,), float(i)) for i in range(1100)},  # more than one SETITEMS
    }


def same(array: np.ndarray, tensor: torch.Tensor) -> bool:
    """Returns whether an array is a tensor, bit by bit."""
    tensor = tensor.detach().contiguous()
    bits = tensor.reshape(-1).view(torch.uint8).numpy().tobytes() if tensor.numel() else b""
    name = str(tensor.dtype).removeprefix("torch.")
    return (array.dtype.name, array.shape, array.tobytes()) == (name, tuple(tensor.shape), bits)


def zip_parts(file: bytes) -> dict[str, bytes]:
    """Returns the parts of a zip file by name."""
    with zipfile.ZipFile(io.BytesIO(file)) as archive:
        return {name: archive.read(name) for name in archive.namelist()}


def packed(parts: dict[str, bytes]) -> bytes:
    """Returns the zip file of parts, with the right sums."""
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        for name, data in parts.items():
            archive.writestr(name, data)
    return file.getvalue()


def with_pickle(program: bytes, *, count: int = 4) -> bytes:
    """Returns a zip file of torch.save with another pickle, and one storage of some numbers."""
    parts = {PICKLE_OF_ZIP: program, "archive/byteorder": b"little", "archive/version": b"3\n"}
    return packed(parts | {"archive/data/0": np.arange(count, dtype=np.float32).tobytes()})


def big_endian(file: bytes, itemsizes: dict[str, int]) -> bytes:
    """Returns the file as a machine with the other byte order would write it, given the bytes of each key's numbers."""
    parts = zip_parts(file) | {"archive/byteorder": b"big"}
    for key, size in itemsizes.items():
        data = np.frombuffer(parts[f"archive/data/{key}"], f"u{size}")
        parts[f"archive/data/{key}"] = data.byteswap().tobytes()
    return packed(parts)


def mutate(file: bytes, rng: np.random.Generator) -> bytes:
    """Returns a file of torch.save, of either format, with one to three faults.

    Half of the faults of a zip file are in its data.pkl, whose sum is then right again; the others are anywhere in
    the file, most of them near the directory at its end.
    """
    is_zip = file.startswith(b"PK")
    if is_zip and rng.integers(2):
        parts = zip_parts(file)
        parts[PICKLE_OF_ZIP] = _mutate_pickle(parts[PICKLE_OF_ZIP], rng)
        return packed(parts)
    if not is_zip and rng.integers(4):  # the pickles come first
        end = min(len(file), 1000)
        return _mutate_pickle(file[:end], rng) + file[end:]
    data = bytearray(file)
    for _ in range(rng.integers(1, 4)):
        begin = max(0, len(data) - 900) if is_zip and rng.integers(2) else 0
        data[rng.integers(begin, len(data))] = rng.choice([0, 1, 0x7F, 0x80, 0xFF, rng.integers(256)])
    return bytes(data[: rng.integers(len(data))] if rng.integers(8) == 0 else data)


def _mutate_pickle(program: bytes, rng: np.random.Generator) -> bytes:
    data = bytearray(program)
    for _ in range(rng.integers(1, 4)):
        i, size = rng.integers(max(1, len(data))), rng.integers(1, 12)
        match rng.integers(7):
            case 0:
                data[i : i + 1] = bytes([data[i] ^ 1 << rng.integers(8)])
            case 1:
                data[i : i + 1] = bytes([rng.choice(list(OPCODES))])
            case 2:
                data[i:i] = bytes([rng.choice(list(OPCODES))])
            case 3:
                del data[i : i + size]
            case 4:
                data[i:i] = data[i : i + size]
            case 5:  # two spans change places
                j = rng.integers(len(data))
                data[i : i + size], data[j : j + size] = data[j : j + size], data[i : i + size]
            case 6:  # a number
                numbers = [i for i, byte in enumerate(data) if byte in (pickle.BININT1[0], pickle.BINGET[0])]
                if numbers:
                    j = rng.choice(numbers)
                    number = rng.choice([0, 1, 2, 255, 65535, 2**31 - 1, -1, -(2**31)])
                    data[j : j + 2] = pickle.BININT + struct.pack("<i", number)
        data = data or bytearray(b".")
    return bytes(data)
