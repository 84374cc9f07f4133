"""Files of latents: .npz and Parquet, which `davae encode` writes, and .npy of other programs.

A file of `davae encode` has a row for each text: `mean` and `logvar` of its posterior, float32 [n, L], and the text
itself: in Parquet in the column `text`; in .npz in the member `texts.jsonl`, a JSON string a line, because an array of
NumPy would take the room of the longest text for each.
"""

from __future__ import annotations

import contextlib
import json
import zipfile
from collections.abc import Callable, Collection, Iterator, Sequence
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np
from jaxtyping import Float

from davae_jax.model.latent import Posterior
from davae_jax.utils.errors import InputError, OptionError, first_line
from davae_jax.utils.files import atomic_output

TEXTS = "texts.jsonl"  # in an .npz
TEXT_COLUMN = "text"  # in Parquet
KEYS = ("z", "mean")  # the latents of a file, if no other name is given
Add = Callable[[Sequence[str], Posterior], None]  # adds texts and their posteriors to a file


# Writing.


@contextlib.contextmanager
def latent_writer(path: Path, latent_size: int) -> Iterator[Add]:
    """Yields a function that adds texts and their posteriors to a new file, .npz or .parquet.

    Texts are written at once; the arrays of an .npz are in memory until the end, those of Parquet are not. The file
    appears, or replaces another, when the block ends without an exception.
    """
    write = _write_parquet if path.suffix.lower() == ".parquet" else _write_npz
    with atomic_output(path) as temporary, temporary.open("wb") as file, write(file, latent_size) as add:
        yield add


def check_latent_output(path: Path, option: str = "--output") -> None:
    """Raises InputError if latents cannot be written to a file of this name."""
    suffix = path.suffix.lower()
    if suffix not in (".npz", ".parquet"):
        raise OptionError(option, f"must be a file that ends in .npz or .parquet, not {path}")
    if path.exists() and not path.is_file():
        raise InputError(f"{path}: is no regular file")
    if suffix == ".parquet":
        _parquet(path)


@contextlib.contextmanager
def _write_npz(file: BinaryIO, latent_size: int) -> Iterator[Add]:
    parts: dict[str, list[np.ndarray]] = {"mean": [], "logvar": []}
    with zipfile.ZipFile(file, "w") as archive:
        with archive.open(_member(TEXTS, zipfile.ZIP_DEFLATED), "w", force_zip64=True) as lines:

            def add(texts: Sequence[str], posterior: Posterior) -> None:
                lines.write("".join(f"{json.dumps(text, ensure_ascii=False)}\n" for text in texts).encode("utf-8"))
                parts["mean"].append(np.asarray(posterior.mean, "<f4"))
                parts["logvar"].append(np.asarray(posterior.logvar, "<f4"))

            yield add
        for name, arrays in parts.items():
            shape = (sum(map(len, arrays)), latent_size)
            header = {"descr": "<f4", "fortran_order": False, "shape": shape}
            with archive.open(_member(f"{name}.npy", zipfile.ZIP_STORED), "w", force_zip64=True) as member:
                np.lib.format.write_array_header_1_0(member, header)
                for array in arrays:
                    member.write(array.tobytes())


def _member(name: str, compression: int) -> zipfile.ZipInfo:
    info = zipfile.ZipInfo(name)  # without the time, so that equal latents give equal files
    info.compress_type = compression
    return info


@contextlib.contextmanager
def _write_parquet(file: BinaryIO, latent_size: int) -> Iterator[Add]:
    import pyarrow as pa
    from pyarrow.parquet import ParquetWriter

    latents = pa.list_(pa.float32(), latent_size)
    schema = pa.schema([(TEXT_COLUMN, pa.string()), ("mean", latents), ("logvar", latents)])
    with ParquetWriter(file, schema, write_page_checksum=True) as writer:

        def add(texts: Sequence[str], posterior: Posterior) -> None:
            values = [pa.array(np.asarray(x, np.float32).reshape(-1)) for x in posterior]
            columns = [pa.FixedSizeListArray.from_arrays(x, latent_size) for x in values]
            writer.write_table(pa.Table.from_arrays([pa.array(texts, pa.string()), *columns], schema=schema))

        yield add


# Reading.


class Latents(NamedTuple):
    """Holds the latents of a file, and the texts that it has for them."""

    values: Float[np.ndarray, "n L"]
    texts: list[str] | None


def read_latents(path: Path, latent_size: int, key: str | None = None) -> Latents:
    """Reads the latents of a file: .npz, .npy or .parquet. A vector is one latent.

    Args:
      key: the name of the array or column; None: z if the file has it, otherwise mean.

    Raises:
      InputError: the file cannot be read, is empty, has no latents of this name, or they have another width or are not
        finite; the message names the file.
    """
    readers = {".npz": _read_numpy, ".npy": _read_numpy, ".parquet": _read_parquet}
    if (read := readers.get(path.suffix.lower())) is None:
        raise InputError(f"{path}: unknown suffix; latents are read from {', '.join(readers)}", exit_code=2)
    if path.exists() and not path.is_file():
        raise InputError(f"{path}: is {'a folder' if path.is_dir() else 'a pipe or a device'}, not a file")
    try:
        values, texts = read(path, key)
        values = _check_values(path, values, latent_size)
    except InputError:
        raise
    except Exception as e:  # NumPy, zipfile and pyarrow raise a dozen types for damaged files
        reason = e.strerror if isinstance(e, OSError) and e.strerror else first_line(e)
        raise InputError(f"{path}: cannot be read ({reason})") from e
    if texts is not None and len(texts) != len(values):
        raise InputError(f"{path}: is damaged: it has {len(texts)} texts for {len(values)} latents")
    return Latents(values, texts)


def _check_values(path: Path, values: np.ndarray, latent_size: int) -> Float[np.ndarray, "n L"]:
    """Returns latents as float32. Raises InputError if they are none of the model's."""
    if values.dtype.kind not in "fiu":
        raise InputError(f"{path}: contains {values.dtype}, not numbers")
    if not values.size:
        raise InputError(f"{path}: contains no latents")
    values = values[None] if values.ndim == 1 else values
    if values.ndim != 2:
        raise InputError(f"{path}: must contain rows of latents, not an array of shape {list(values.shape)}")
    if values.shape[1] != latent_size:
        raise InputError(f"{path}: contains latents of width {values.shape[1]}; those of the model have {latent_size}")
    with np.errstate(over="ignore"):
        values = values.astype(np.float32)
    if not (finite := np.isfinite(values).all(axis=1)).all():
        raise InputError(f"{path}: row {int(np.argmin(finite)) + 1} contains NaN or infinity")
    return values


def _choose_key(path: Path, key: str | None, available: Collection[str]) -> str:
    if key is None and (known := [name for name in KEYS if name in available]):
        return known[0]
    if key is None or key not in available:
        missing = f"no {key!r}" if key else f"neither {' nor '.join(map(repr, KEYS))}"
        raise InputError(f"{path}: has {missing}; available with --key: {', '.join(available) or 'nothing'}")
    return key


def _read_numpy(path: Path, key: str | None) -> tuple[np.ndarray, list[str] | None]:
    loaded = np.load(path, mmap_mode="r", allow_pickle=False)
    if isinstance(loaded, np.ndarray):
        if key is not None:
            raise InputError(f"{path}: is one array, which --key cannot name", exit_code=2)
        return loaded, None
    with loaded as archive:
        values = archive[_choose_key(path, key, [name for name in archive.files if name != TEXTS])]
        if not isinstance(values, np.ndarray):
            raise InputError(f"{path}: {key} is no array")
        lines = archive[TEXTS].decode("utf-8").split("\n")[:-1] if TEXTS in archive.files else None
    texts = lines and [json.loads(line) for line in lines]
    if texts and not all(isinstance(text, str) for text in texts):
        raise InputError(f"{path}: is damaged: a line of {TEXTS} is no string")
    return values, texts


def _read_parquet(path: Path, key: str | None) -> tuple[np.ndarray, list[str] | None]:
    parquet = _parquet(path)
    import pyarrow as pa

    file = parquet.ParquetFile(path, page_checksum_verification=True)
    schema = file.schema_arrow
    lists = [name for name in schema.names if isinstance(schema.field(name).type, pa.ListType | pa.FixedSizeListType)]
    key = _choose_key(path, key, lists)
    values = _rows_of_lists(path, file.read(columns=[key]).column(key))
    if TEXT_COLUMN not in schema.names or schema.field(TEXT_COLUMN).type != pa.string():
        return values, None
    texts = file.read(columns=[TEXT_COLUMN]).column(TEXT_COLUMN)
    return values, None if texts.null_count else texts.to_pylist()


def _rows_of_lists(path: Path, column: Any) -> np.ndarray:
    """Returns a column of lists of numbers as an array [n, L]. Raises InputError if they differ in their lengths."""
    from pyarrow.compute import list_value_length

    if not len(column):
        return np.zeros((0, 0), np.float32)
    if column.null_count:
        raise InputError(f"{path}: row {column.is_null().to_pylist().index(True) + 1} has no latent")
    rows, width, start = [], len(column[0]), 1
    for chunk in column.chunks:
        lengths = np.asarray(list_value_length(chunk))
        if (lengths != width).any():
            row = int(np.argmax(lengths != width))
            raise InputError(f"{path}: row {start + row} has {lengths[row]} numbers, and row 1 has {width}")
        rows.append(np.asarray(chunk.flatten()).reshape(len(chunk), width))
        start += len(chunk)
    return np.concatenate(rows)


def _parquet(path: Path) -> Any:
    """Returns pyarrow's module for Parquet. Raises InputError if it is not installed."""
    try:
        from pyarrow import parquet
    except ImportError:
        raise InputError(f"{path}: needs the package pyarrow: pip install 'davae-jax[data]'") from None
    return parquet
