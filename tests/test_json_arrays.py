"""JSON arrays of objects, such as the published model's corpus comes in."""

import gzip
import io
import json

import numpy as np
import pytest

from davae_jax.data.inputs import json_arrays
from davae_jax.data.inputs.json_arrays import begins_array_of_objects, iterate_array
from davae_jax.data.inputs.readers import read_slice, read_texts, split_into_slices
from davae_jax.utils.errors import InputError

DOCUMENTS = [{"id": i, "title": f"第{i}", "content": f'一{{[\u2028"]}},{i}\n二'} for i in range(300)]
TEXTS = [f"{d['title']}\n{d['content']}" for d in DOCUMENTS]


def values(data, max_bytes=1 << 20):
    return list(iterate_array(io.BytesIO(data), max_bytes))


@pytest.mark.parametrize("read_bytes", [1, 7, 1 << 20])
@pytest.mark.parametrize("indent", [None, 2])
@pytest.mark.parametrize("ascii_only", [True, False])
def test_values_are_those_of_json(read_bytes, indent, ascii_only, monkeypatch):
    monkeypatch.setattr(json_arrays, "READ_BYTES", read_bytes)
    data = json.dumps(DOCUMENTS[:20], indent=indent, ensure_ascii=ascii_only).encode()
    assert values(data) == values(b"\xef\xbb\xbf\n" + data + b" \r\n\t") == DOCUMENTS[:20]
    assert values(b"[]") == values(b" [ ] ") == []


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "is not a JSON array"),
        (b'{"a": 1}', "is not a JSON array"),
        (b"[", "object 1 of the array is not JSON"),
        (b'[{"a": 1}', "ends after object 1"),
        (b'[{"a": 1},', "object 2 of the array is not JSON"),
        (b'[{"a": 1},]', "object 2 of the array is not JSON"),
        (b'[{"a": 1} {"a": 1}]', "ends after object 1"),
        (b'[{"a": 1}, {"a": 1', "object 2 of the array is not JSON"),
        (b'[{"a": 1}]\n[{"a": 1}]', "more follows after the array of 1 objects"),
        (b"[" * 100_000, "object 1 of the array is not JSON"),
        (b'[{"a": "' + b"x" * 5000 + b'"}]', "is too large"),
    ],
)
def test_what_is_no_array(data, message, monkeypatch):
    monkeypatch.setattr(json_arrays, "READ_BYTES", 100)
    with pytest.raises(ValueError, match=message):
        values(data, max_bytes=1000)


def test_arrays_are_told_from_json_lines():
    assert all(map(begins_array_of_objects, [b"[{", b" \n[\n  {", b"\xef\xbb\xbf[{", b"[]"]))
    assert not any(map(begins_array_of_objects, [b'["a"]', b"[[1]]", b"{", b"", b"x[{"]))


@pytest.mark.parametrize("name", ["a.json", "a.JSON", "a.json.gz", "a.jsonl"])
def test_a_file(name, tmp_path):
    path = tmp_path / name
    data = json.dumps(DOCUMENTS, ensure_ascii=False, indent=1).encode()
    path.write_bytes(gzip.compress(data) if name.endswith("gz") else data)
    (part,) = split_into_slices(path, 1000)
    chunks = list(read_slice(part, ["title", "content"]))
    assert [line.text for chunk in chunks for line in chunk.lines] == TEXTS
    assert sum(chunk.text_bytes for chunk in chunks) == sum(len(text.encode()) for text in TEXTS)
    assert read_texts(path, "content") == [d["content"] for d in DOCUMENTS]


def test_a_blank_field_is_left_out_of_the_text(tmp_path):
    rows = [{"t": " ", "c": "一"}, {"t": "", "c": ""}, {"t": "二", "c": "三"}]
    (tmp_path / "a.json").write_text(json.dumps(rows), encoding="utf-8")
    (part,) = split_into_slices(tmp_path / "a.json", 1000)
    (chunk,) = read_slice(part, ["t", "c"])
    assert [line.text for line in chunk.lines] == ["一", "", "二\n三"]


def test_numbers_at_the_end_of_what_was_read(monkeypatch):
    data = json.dumps([{"a": 1}, 123456, -1.5e3, True, None, 7]).encode()
    for read_bytes in range(1, 20):
        monkeypatch.setattr(json_arrays, "READ_BYTES", read_bytes)
        assert values(data) == [{"a": 1}, 123456, -1500.0, True, None, 7]


def test_bytes_that_are_not_utf_8_spoil_their_object_alone(tmp_path):
    (tmp_path / "a.json").write_bytes(b'[{"text": "a"}, {"text": "\xff"}, {"text": "b"}]')
    (chunk,) = read_slice(*split_into_slices(tmp_path / "a.json", 1000), ["text"])
    assert [line.text for line in chunk.lines] == ["a", None, "b"]


def test_lines_that_are_arrays_are_lines(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text('[{"text": "a"}]\n{"text": "b"}\n', encoding="utf-8")
    chunks = [chunk for part in split_into_slices(path, 1000) for chunk in read_slice(part, ["text"])]
    assert [line.text for chunk in chunks for line in chunk.lines] == [None, "b"]


def test_of_several_fields_some_may_be_missing(tmp_path):
    rows = [{"t": None, "c": "一"}, {"c": "二"}, {"t": "三"}, {"t": None}, {"t": 3, "c": "四"}]
    (tmp_path / "a.json").write_text(json.dumps(rows), encoding="utf-8")
    (chunk,) = read_slice(*split_into_slices(tmp_path / "a.json", 1000), ["t", "c"])
    assert [line.text for line in chunk.lines] == ["一", "二", "三", None, None]


def test_bad_objects_are_bad_lines_and_a_bad_file_is_named(tmp_path):
    path = tmp_path / "a.json"
    path.write_text('[{"text": "一"}, {"body": 1}, {"text": 3}, 4, {"text": "二"}]', encoding="utf-8")
    (chunk,) = read_slice(*split_into_slices(path, 1000), ["text"])
    problems = [None, "has no field 'text'", "the field 'text' is not a string", "has no field 'text'", None]
    assert [line.problem for line in chunk.lines] == problems
    path.write_text('[{"text": "一"}, {"te', encoding="utf-8")
    with pytest.raises(InputError, match="object 2 of the array is not JSON") as e:
        list(read_slice(*split_into_slices(path, 1000), ["text"]))
    assert str(e.value).startswith(f"{path}: ")


def test_random_arrays(monkeypatch):
    """Read in pieces of random sizes, they are what the json module reads at once."""
    rng = np.random.default_rng(0)
    alphabet = list('ab"\\[]{},:\u2028中😀\n ')
    for _ in range(200):
        monkeypatch.setattr(json_arrays, "READ_BYTES", int(rng.integers(1, 30)))
        rows = [{"".join(rng.choice(alphabet, 3)): "".join(rng.choice(alphabet, rng.integers(9)))} for _ in range(5)]
        data = json.dumps(rows, ensure_ascii=bool(rng.integers(2)), indent=[None, 1][rng.integers(2)]).encode()
        assert values(data) == rows
