"""Text in other encodings than UTF-8."""

import codecs
import gzip
import io
import json
import resource

import numpy as np
import pytest

from davae_jax.cli.main import main
from davae_jax.data.inputs import encodings, line_readers
from davae_jax.data.inputs.encodings import check_encoding, recode, recode_bytes
from davae_jax.data.inputs.readers import read_file, read_lines, read_texts, split_into_slices
from davae_jax.data.inputs.texts import decode_lines
from davae_jax.utils.errors import InputError, OptionError

TEXTS = ["今天很好。", "", "a b\\n", "中国", "月光"] * 50
ENCODINGS = ["gb18030", "gbk", "big5hkscs", "utf-16", "utf-16-le", "utf-16-be", "utf-32", "utf-7", "hz", "iso2022_jp_2"]


def lines_of(path, encoding, fields=("text",)):
    return [line for chunk in read_file(path, fields, encoding) for line in chunk.lines]


def test_names_of_encodings():
    names = {
        "GBK": "gbk",
        "UTF8": "utf-8",
        "utf_8_sig": "utf-8",
        "u16": "utf-16",
        "latin1": "iso8859-1",
        "cp037": "cp037",
    }
    assert {name: check_encoding(name) for name in names} == names


@pytest.mark.parametrize(
    "name",
    ["none", "", "a\0b", "é", "../x", "hex", "rot13", "zip", "bz2", "base64", "uu", "quopri"]
    + ["idna", "punycode", "undefined", "unicode_escape", "raw_unicode_escape"],
)
def test_what_is_no_encoding_of_text(name):
    with pytest.raises(OptionError) as e:
        check_encoding(name, "--data.encoding")
    assert e.value.option == "--data.encoding" and e.value.exit_code == 2


@pytest.mark.parametrize("encoding", [*ENCODINGS, "cp037"])
@pytest.mark.parametrize("read_bytes", [1, 3, 1 << 16])
def test_bytes_decoded_in_parts_are_those_decoded_at_once(encoding, read_bytes, monkeypatch):
    monkeypatch.setattr(encodings, "READ_BYTES", read_bytes)
    text = "\n".join(TEXTS if encoding != "cp037" else ["a b", "c"] * 50)  # of the Latin alphabet alone
    data = text.encode(encoding)
    with recode(io.BytesIO(data), check_encoding(encoding)) as stream:
        assert stream.read().decode() == data.decode(encoding) == text


@pytest.mark.parametrize("name", ["a.txt", "a.txt.gz", "a.txt.zst", "a.jsonl", "a.jsonl.gz", "a.json", "a.json.zst"])
@pytest.mark.parametrize("encoding", ["gb18030", "utf-16", "utf-16-be", "utf-7"])
def test_every_format_in_other_encodings(name, encoding, tmp_path):
    texts = TEXTS
    if ".jsonl" in name:
        text = "".join(json.dumps({"text": text}, ensure_ascii=False) + "\n" for text in texts)
    else:
        text = (
            json.dumps([{"text": text} for text in texts], ensure_ascii=False) if ".json" in name else "\n".join(texts)
        )
    data = text.encode(encoding)
    if name.endswith("zst"):
        data = pytest.importorskip("zstandard").ZstdCompressor().compress(data)
    (tmp_path / name).write_bytes(gzip.compress(data) if name.endswith("gz") else data)
    assert read_texts(tmp_path / name, "text", encoding) == texts
    assert len(split_into_slices(tmp_path / name, 10, encoding)) == 1


@pytest.mark.parametrize(
    ("encoding", "bad"),
    [
        ("gb18030", b"\xff"),
        ("gbk", b"\x81\n"[:1]),
        ("utf-16-le", b"\x00\xdc"),
        ("big5", b"\xf9\xff"),
        ("ascii", b"\xe9"),
    ],
)
def test_bytes_that_cannot_be_decoded_spoil_their_line_alone(encoding, bad, tmp_path):
    line = "\n".encode(encoding)
    data = line.join(["abc".encode(encoding), "d".encode(encoding) + bad, "ef".encode(encoding)])
    (tmp_path / "a.txt").write_bytes(data)
    problem = f"is not {encoding.upper()}"
    assert [tuple(line) for line in lines_of(tmp_path / "a.txt", encoding)] == [
        ("abc", None),
        (None, problem),
        ("ef", None),
    ]
    for read in (lambda: read_texts(tmp_path / "a.txt", encoding=encoding), lambda: decode_lines(data, "a", encoding)):
        with pytest.raises(InputError, match=f"line 2: {problem}"):
            read()


def test_bad_bytes_in_an_array_spoil_their_object_alone(tmp_path):
    (tmp_path / "a.json").write_bytes(b'[{"text": "a"}, {"text": "\xff"}, {"text": "' + "中".encode("gbk") + b'"}]')
    assert [line.text for line in lines_of(tmp_path / "a.json", "gbk")] == ["a", None, "中"]


def test_marks_of_the_byte_order(tmp_path):
    """One at the beginning is no part of the text; one elsewhere is a character; a wrong one is refused."""
    path = tmp_path / "a.txt"
    for encoding in ("utf-16-le", "utf-16-be", "utf-8", "gb18030", "utf-32-be"):
        path.write_bytes("\ufeffa\n\ufeffb\n".encode(encoding))
        assert read_texts(path, "text", encoding) == decode_lines(path.read_bytes(), "a", encoding) == ["a", "\ufeffb"]
    path.write_bytes("\ufeffa\n".encode("utf-16-be"))
    for encoding in ("utf-8", "utf-16-le", "gb18030", "latin-1"):
        with pytest.raises(InputError, match=f"{path}: is UTF-16, not {encoding.upper()}; --encoding utf-16 "):
            read_texts(path, "text", encoding)
    assert read_texts(path, "text", "utf-16") == ["a"]
    path.write_bytes("\ufeffa\n".encode())
    with pytest.raises(InputError, match=f"{path}: is UTF-8, not GBK; --encoding utf-8 "):
        read_texts(path, "text", "gbk")


def test_utf_16_without_a_mark_needs_its_byte_order(tmp_path):
    path = tmp_path / "a.txt"
    path.write_bytes("一\n二\n".encode("utf-16-be"))
    with pytest.raises(InputError, match="--encoding utf-16-le or utf-16-be") as e:
        read_texts(path, "text", "utf-16")
    assert str(e.value).startswith(f"{path}: ")
    assert read_texts(path, "text", "utf-16-be") == read_lines(path, "utf-16-be") == ["一", "二"]


@pytest.mark.parametrize("encoding", ["utf-16-le", "utf-16-be", "utf-32-le", "utf-32-be"])
def test_wide_characters_without_a_mark_are_recognized(encoding, tmp_path):
    """Those of ASCII are valid UTF-8: each letter and its NULs would be characters of the text."""
    for name, text in [("a.txt", "a\nb"), ("b.txt", "Hello\n世界\n"), ("c.jsonl", '{"text": "世界"}\n')]:
        path = tmp_path / name
        path.write_bytes(text.encode(encoding))
        for wrong in ("utf-8", "latin-1"):
            with pytest.raises(InputError, match=f"^{path}: looks like {encoding.upper()} without .* {encoding} reads"):
                read_texts(path, "text", wrong)
        assert read_texts(path, "text", encoding) == (["世界"] if name == "c.jsonl" else text.split())
    (tmp_path / "a.txt").write_bytes(b"a\0bc\n")
    assert read_texts(tmp_path / "a.txt", "text") == ["a\0bc"]


@pytest.mark.parametrize("encoding", ["utf-16", "utf-7", "gb18030"])
def test_memory_is_bounded(encoding, tmp_path, monkeypatch):
    """One line of 64 MiB, of which a decoder of UTF-7 would keep all, is bad; the next is read, or the file refused."""
    monkeypatch.setattr(line_readers, "MIN_UNPACKED_BYTES", 1 << 29)  # it would be refused
    zstandard, before = pytest.importorskip("zstandard"), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    path, part = (
        tmp_path / "a.txt.zst",
        "A".encode("utf-16-le") * (1 << 19) if encoding == "utf-16" else b"A" * (1 << 20),
    )
    with path.open("wb") as file, zstandard.ZstdCompressor().stream_writer(file) as writer:
        writer.write({"utf-16": codecs.BOM_UTF16_LE, "utf-7": b"+", "gb18030": b""}[encoding])
        for _ in range(64):
            writer.write(part)
        writer.write("\n一\n".encode("utf-16-le" if encoding == "utf-16" else encoding))
    try:
        long, text = lines_of(path, encoding)
        assert (long.text, text.text) == (None, "一")
    except InputError as e:
        assert encoding == "utf-7" and str(e).startswith(f"{path}: ")
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 80 << 10  # KiB


def test_random_bytes_in_any_encoding(tmp_path):
    """They give lines, or one line that names the file; a good line after them is read where the encoding allows it."""
    rng, path = np.random.default_rng(0), tmp_path / "a.txt"
    for encoding in ENCODINGS * 8:
        path.write_bytes(rng.bytes(int(rng.integers(1, 200))) + "\nend\n".encode(encoding))
        try:
            lines = lines_of(path, encoding)
        except InputError as e:
            assert str(e).startswith(f"{path}: ") and "\n" not in str(e)
        else:
            for text, problem in lines:
                assert (text is None) == (problem is not None)
                assert text is None or text.encode("utf-8").decode("utf-8") == text


def test_recode_bytes_keeps_nothing_back():
    for encoding in ENCODINGS:
        assert recode_bytes("中国\n".encode(encoding), encoding).decode().removeprefix("\ufeff") == "中国\n"


def test_a_command_that_reads_texts_takes_the_option(tmp_path, capsys):
    """A wrong name is refused before anything is read."""
    for argv in (
        ["generate", "--model", "none", "--input", "none"],
        ["evaluate", "--model", "none", "--data", "none"],
        ["attribute", "--model", "none", "--having", "none", "--lacking", "none", "a"],
        ["prepare", "--input", "none", "--output", str(tmp_path / "out")],
    ):
        assert main([*argv, "--encoding", "hex"]) == 2
        assert "--encoding hex" in capsys.readouterr().err
