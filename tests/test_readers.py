"""Finding input files, splitting them into slices, and reading the slices."""

import bz2
import gzip
import io
import json
import lzma
import re
import resource
import sys
import tarfile
import warnings
from pathlib import Path

import numpy as np
import pytest
from input_files import TEXTS, write_input

from davae_jax.data.inputs import line_readers, table_readers
from davae_jax.data.inputs.line_readers import MAX_LINE_BYTES
from davae_jax.data.inputs.readers import find_files, read_slice, read_texts, split_into_slices
from davae_jax.data.inputs.texts import decode_lines
from davae_jax.utils.errors import InputError

TAR = io.BytesIO()
with tarfile.open(fileobj=TAR, mode="w") as archive:
    archive.addfile(tarfile.TarInfo("a.txt"))


def read_lines(slices, *fields):
    return [line for part in slices for chunk in read_slice(part, fields or ["text"]) for line in chunk.lines]


@pytest.mark.parametrize("max_bytes", [1, 7, 100, 5000, 1 << 30])
def test_slices_of_a_file_contain_every_line_once(max_bytes, tmp_path):
    path = tmp_path / "a.txt"
    path.write_bytes("\ufeff一\n\n二\u2028二\r\n".encode() + b"\xff\n" + "三\n".encode() * 20 + b"last")
    expected = ["一", "", "二\u2028二", None, *["三"] * 20, "last"]
    slices = split_into_slices(path, max_bytes)
    assert [line.text for line in read_lines(slices)] == expected
    assert sum(part.size for part in slices) == pytest.approx(path.stat().st_size, abs=len(slices))


@pytest.mark.parametrize("max_bytes", [1, 4000, 1 << 30])
def test_slices_of_a_parquet_file(max_bytes, tmp_path):
    path = write_input(tmp_path / "in", "parquet") / "train-00000.parquet"
    slices = split_into_slices(path, max_bytes)
    assert [line.text for line in read_lines(slices)] == TEXTS
    assert len(slices) == {1: 5, 1 << 30: 1}.get(max_bytes, len(slices))


def test_a_line_that_is_too_long_is_skipped(tmp_path):
    path = tmp_path / "a.txt"
    path.write_bytes(b"one\n" + b"x" * (MAX_LINE_BYTES + 5) + b"\ntwo\n")
    assert [(line.text, line.problem) for line in read_lines(split_into_slices(path, 1 << 30))] == [
        ("one", None),
        (None, "is longer than 16 MiB"),
        ("two", None),
    ]


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ("一\n".encode("utf-16"), "is UTF-16, not UTF-8"),
        ("\ufeff一\n".encode("utf-16-be"), "is UTF-16, not UTF-8"),
        ("一\n".encode("utf-32"), "is UTF-32, not UTF-8"),
        ("\ufeff一\n".encode("gb18030"), "is GB18030, not UTF-8"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 3\n", "git lfs pull"),
        (gzip.compress(b"text\n", mtime=0), "compressed with gzip, but its name does not end in .gz"),
        (b"PAR1" + bytes(20), "Parquet, but its name"),
        (bz2.compress(b"text\n"), "compressed with bzip2; unpack it"),
        (lzma.compress(b"text\n"), "compressed with xz; unpack it"),
        (TAR.getvalue(), "is a tar archive; unpack it"),
    ],
)
@pytest.mark.parametrize("name", ["a.txt", "a.jsonl", "a.txt.gz"])
def test_other_kinds_of_files_are_recognized(data, message, name, tmp_path):
    path = tmp_path / name
    path.write_bytes(gzip.compress(data) if name.endswith(".gz") else data)
    for read in (lambda: read_texts(path), lambda: read_lines(split_into_slices(path, 100))):
        with pytest.raises(InputError, match=re.escape(message)) as e:
            read()
        assert str(e.value).startswith(f"{path}: ")


def test_memory_is_bounded_whatever_a_file_unpacks_to(tmp_path, monkeypatch):
    """A few kilobytes stand for a line of 256 MiB."""
    monkeypatch.setattr(line_readers, "MIN_UNPACKED_BYTES", 1 << 29)  # it would be refused
    zstandard = pytest.importorskip("zstandard")
    path, before = tmp_path / "a.txt.zst", resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with path.open("wb") as file, zstandard.ZstdCompressor().stream_writer(file) as writer:
        for _ in range(256):
            writer.write(bytes(1 << 20))
        writer.write("\n一\n".encode())
    assert path.stat().st_size < 100_000
    (long, text) = read_lines(split_into_slices(path, 1 << 30))
    assert (long.problem, text.text) == ("is longer than 16 MiB", "一")
    grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before  # in KiB
    assert grown < 120 << 10


class CountingFile(io.BytesIO):
    lines_read = 0

    def readline(self, size=-1):
        data = super().readline(size)
        self.lines_read += len(data)
        return data


@pytest.mark.parametrize(("length", "end"), [(30_000, b""), (30_000, b"\nlast\n"), (50, b"\n" * 300)])
def test_a_long_line_is_not_read_by_every_slice(length, end, tmp_path, monkeypatch):
    monkeypatch.setattr(line_readers, "MAX_LINE_BYTES", 100)
    path = tmp_path / "a.txt"
    path.write_bytes(b"first\n" + b"x" * length + end)
    slices = split_into_slices(path, 200)
    file = CountingFile(path.read_bytes())
    found = [line for part in slices for line in line_readers._lines_in(part, file)]
    assert len(slices) > 1 and file.lines_read < 2 * path.stat().st_size
    expected = [line if len(line) < 100 else None for line in path.read_bytes().split(b"\n")]
    assert found == (expected[:-1] if end else expected)


def test_a_line_that_never_ends_is_named(monkeypatch):
    monkeypatch.setattr(line_readers, "MAX_LINE_BYTES", 1 << 16)
    monkeypatch.setattr(line_readers, "MAX_SKIPPED_BYTES", 1 << 20)
    with pytest.raises(InputError, match=r"/dev/zero: cannot be read \(a line is longer than"):
        read_texts(Path("/dev/zero"))


@pytest.mark.parametrize("name", ["a.txt.gz", "a.jsonl.zst"])
def test_an_empty_file_is_not_a_compressed_one(name, tmp_path):
    """It is what an interrupted copy leaves; without an error, its texts would be missing unnoticed."""
    (tmp_path / name).write_bytes(b"")
    with pytest.raises(InputError, match=re.escape(f"{tmp_path / name}: cannot be read (the file is empty")):
        split_into_slices(tmp_path / name, 1 << 30)


@pytest.mark.parametrize("name", ["a.txt.gz", "a.jsonl.zst"])
def test_a_file_that_unpacks_to_too_much_is_refused(name, tmp_path, monkeypatch):
    monkeypatch.setattr(line_readers, "MIN_UNPACKED_BYTES", 5 << 20)
    compress = gzip.compress if name.endswith(".gz") else pytest.importorskip("zstandard").ZstdCompressor().compress
    path = tmp_path / name
    path.write_bytes(compress(b"\n" * (4 << 20)))
    assert len(read_lines(split_into_slices(path, 1))) == 4 << 20
    path.write_bytes(compress(b" " * (40 << 20) + b"\n"))
    with pytest.raises(InputError, match=re.escape(f"{path}: cannot be read (it unpacks to more than 1,000 times")):
        read_lines(split_into_slices(path, 1))


def test_a_mark_of_the_byte_order_before_json_is_no_part_of_it(tmp_path):
    """As where a file was appended to another."""
    part = b'\xef\xbb\xbf{"text": "a"}\n{"text": "b"}\n'
    (tmp_path / "a.jsonl").write_bytes(part + part)
    assert read_texts(tmp_path / "a.jsonl") == ["a", "b", "a", "b"]


@pytest.mark.parametrize(
    ("data", "warning"),
    [
        (b"one\rtwo\r", "its lines end in carriage returns alone"),
        (b"\r".join([b"x" * 60_000] * 3), "its lines end in carriage returns alone"),
        (b'\xef\xbb\xbf{"text": "one"}\n', "its first line is a JSON object"),
        (b"one\rtwo\nthree", None),
        (b"x\r" * 60_000 + b"\nthree", None),
        (b"one\r\n", None),
        (b"one\r", None),
        (b"{one}\n", None),
        (b"", None),
    ],
)
def test_plain_text_that_is_probably_something_else(data, warning, tmp_path):
    (tmp_path / "a.txt").write_bytes(data)
    for name, read in (
        (f"{tmp_path / 'a.txt'}", lambda: split_into_slices(tmp_path / "a.txt", 1 << 20)),
        ("standard input", lambda: decode_lines(data, "standard input")),
    ):
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            read()
        found = [str(w.message) for w in caught]
        assert len(found) == (warning is not None)
        assert all(text.startswith(f"{name}: is read as plain text, but {warning}") for text in found)


@pytest.mark.parametrize("strings", ["dictionary", "string_view"])
@pytest.mark.parametrize("kind", ["parquet", "arrow"])
def test_memory_is_bounded_where_every_row_has_the_same_cell(kind, strings, tmp_path, monkeypatch):
    """A dictionary with one text of 1 MiB stands for 500 MiB."""
    pa = pytest.importorskip("pyarrow")
    monkeypatch.setattr(table_readers, "DECODED_BYTES", 8 << 20)
    text, rows = "x" * (1 << 20), 500
    column = pa.DictionaryArray.from_arrays(pa.array([0] * rows, pa.int32()), pa.array([text]))
    if strings == "string_view":
        views = np.tile(np.array([1 << 20, int.from_bytes(b"xxxx", "little"), 0, 0], np.int32), rows)
        buffers = [None, pa.py_buffer(views.tobytes()), pa.py_buffer(text.encode())]
        column = pa.Array.from_buffers(pa.string_view(), rows, buffers)
    path = tmp_path / f"a.{kind}"
    if kind == "parquet":
        if strings == "string_view":
            pytest.skip("Parquet has no views")
        pytest.importorskip("pyarrow.parquet").write_table(pa.table({"text": column}), path)
    else:
        with pa.ipc.new_stream(path, pa.schema([("text", column.type)])) as writer:
            writer.write_table(pa.table({"text": column}))
    default, pool = pa.default_memory_pool(), pa.proxy_memory_pool(pa.system_memory_pool())
    pa.set_memory_pool(pool)
    try:
        (part,) = split_into_slices(path, 1 << 30)
        assert all(line.text == text for chunk in read_slice(part, ["text"]) for line in chunk.lines)
        assert sum(len(chunk.lines) for chunk in read_slice(part, ["text"])) == rows
    finally:
        pa.set_memory_pool(default)
    assert pool.max_memory() < 64 << 20


@pytest.mark.parametrize("kind", ["parquet", "arrow", "stream"])
def test_texts_that_unpack_to_more_than_texts_can_are_refused(kind, tmp_path, monkeypatch):
    """A page of Parquet and a batch of Arrow are unpacked as a whole, however few bytes they are."""
    pa = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    monkeypatch.setattr(table_readers, "DECODED_BYTES", 1 << 20)
    table = pa.table({"n": range(40), "text": ["x" * (1 << 16)] * 40})
    path = tmp_path / ("a.parquet" if kind == "parquet" else "a.arrow")

    def write(compression: str | None) -> None:
        if kind == "parquet":
            parquet.write_table(table, path, compression=compression or "none", use_dictionary=False)
            return
        new = pa.ipc.new_file if kind == "arrow" else pa.ipc.new_stream
        with new(path, table.schema, options=pa.ipc.IpcWriteOptions(compression=compression)) as writer:
            writer.write_table(table)

    write("zstd")
    with pytest.raises(InputError) as error:
        read_texts(path)
    packed, unpacked = re.fullmatch(rf"{path}: ([\d,]+) bytes of it unpack to ([\d,]+); .*", str(error.value)).groups()
    assert int(packed.replace(",", "")) < path.stat().st_size < 1 << 15
    assert 40 << 16 <= int(unpacked.replace(",", "")) < (40 << 16) + 1000
    write(None)
    assert read_texts(path) == ["x" * (1 << 16)] * 40
    monkeypatch.setattr(table_readers, "DECODED_BYTES", 4 << 20)
    write("zstd")
    assert read_texts(path) == ["x" * (1 << 16)] * 40


def test_several_fields_of_every_form_are_joined_alike(tmp_path):
    """Blanks are Unicode's, not only those of ASCII."""
    pa = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    cells = [None, "", "\u3000", "\x1c \x85", "\x00", "一"]
    rows = [{"a": a, "b": b} for a in cells for b in cells]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    (tmp_path / "a.json").write_text(json.dumps(rows), encoding="utf-8")
    parquet.write_table(pa.Table.from_pylist(rows), tmp_path / "a.parquet")
    expected = ["\n".join(x for x in row.values() if x and x.strip()) for row in rows]
    for name in ("a.jsonl", "a.json", "a.parquet"):
        lines = read_lines(split_into_slices(tmp_path / name, 1 << 30), "a", "b")
        texts = [line.text if line.text.strip() else "" for line in lines[1:]]
        assert texts == expected[1:]
        assert lines[0].problem and not any(line.problem for line in lines[1:])


def test_a_cell_that_is_too_long_is_a_bad_line(tmp_path, monkeypatch):
    pa = pytest.importorskip("pyarrow")
    monkeypatch.setattr(line_readers, "MAX_LINE_BYTES", 10)
    texts = ["x" * 9, "x" * 10, "x" * 11, "一二三四"]
    pytest.importorskip("pyarrow.parquet").write_table(pa.table({"text": texts}), tmp_path / "a.parquet")
    lines = read_lines(split_into_slices(tmp_path / "a.parquet", 1 << 30))
    assert [line.text for line in lines] == [*texts[:2], None, None] and all(line.problem for line in lines[2:])


def test_find_files(tmp_path):
    (tmp_path / ".cache").mkdir()
    for name in ("b.jsonl", "a.jsonl.gz", ".cache/c.jsonl", "dataset_info.json"):
        (tmp_path / name).touch()
    assert find_files([tmp_path, tmp_path / "b.jsonl"]) == [tmp_path / "a.jsonl.gz", tmp_path / "b.jsonl"]


def test_a_missing_package_is_named(tmp_path, monkeypatch):
    for name, package in (("a.parquet", "pyarrow"), ("a.arrow", "pyarrow"), ("a.jsonl.zst", "zstandard")):
        path = tmp_path / name
        path.write_bytes(b"data")
        with monkeypatch.context() as patch, pytest.raises(InputError) as error:
            patch.setitem(sys.modules, "pyarrow", None)
            patch.setitem(sys.modules, "pyarrow.parquet", None)
            patch.setitem(sys.modules, "zstandard", None)
            read_lines(split_into_slices(path, 1 << 30))
        assert str(error.value) == f"{path}: reading it needs the package {package}: pip install 'davae-jax[data]'"


def test_damaged_offsets_of_an_arrow_file_are_named(tmp_path):
    """Arrow itself would read outside of the memory."""
    pa = pytest.importorskip("pyarrow")
    column = pa.StringArray.from_buffers(2, pa.py_buffer(np.array([0, 1 << 30, 2], np.int32)), pa.py_buffer(b"ab"))
    path = tmp_path / "a.arrow"
    with pa.OSFile(str(path), "wb") as file, pa.ipc.new_stream(file, pa.schema([("text", pa.string())])) as writer:
        writer.write_batch(pa.record_batch([column], names=["text"]))
    with pytest.raises(InputError, match=r"/a\.arrow: "):
        read_texts(path)
