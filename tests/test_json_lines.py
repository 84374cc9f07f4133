"""The project's own JSON Lines: only a line feed ends a line, and a damaged line of a log never ends a run."""

import json

import pytest

from davae_jax.training.run.log import JsonLinesFile
from davae_jax.utils import json_lines
from davae_jax.utils.json_lines import read_log_lines

ODD = "a\u2028b\u2029c\x85d\x0be\x1cf\rg"  # characters at which str.splitlines splits


def line(step, text=ODD):
    return (json.dumps({"step": step, "text": text}, ensure_ascii=False) + "\n").encode()


DAMAGE = {
    "torn inside a character": line(3, "饭")[:-4],
    "torn": line(3)[:-1],
    "NUL": b"\0" * 40 + b"\n",
    "blank": b"\n",
    "no object": b"[1]\n",
    "no step": b'{"stop": 3}\n',
    "deep": b"[" * 100_000 + b"\n",
    "latin-1": b'{"step": 3, "text": "\xe9"}\n',
}


def test_a_text_is_one_line(tmp_path):
    path = tmp_path / "samples.jsonl"
    path.write_bytes(line(1) + line(2) + line(3))
    assert [(row.values["step"], row.values["text"]) for row in read_log_lines(path)] == [(n, ODD) for n in (1, 2, 3)]
    assert read_log_lines(tmp_path / "missing.jsonl") == []


@pytest.mark.parametrize("damage", DAMAGE.values(), ids=DAMAGE)
def test_a_damaged_line_is_dropped_with_one_warning(damage, tmp_path):
    path = tmp_path / "samples.jsonl"
    path.write_bytes(line(1) + line(2) + damage)
    with pytest.warns(UserWarning) as warned:
        log = JsonLinesFile(path, 2)
    assert [str(warning.message) for warning in warned] == [f"{path}: line 3 is damaged and ignored"]
    log.write({"step": 3, "text": ODD})
    log.close()
    assert path.read_bytes() == line(1) + line(2) + line(3)


def test_all_damaged_lines_are_counted_in_one_warning(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(b"\n" + line(1) + b"\0\n" + line(2) + b"{")
    with pytest.warns(UserWarning) as warned:
        assert [row.number for row in read_log_lines(path)] == [2, 4]
    assert [str(w.message) for w in warned] == [f"{path}: line 1 and 2 others are damaged and ignored"]


@pytest.mark.parametrize("step", ["-1", "1" + "0" * 400, "true", "1.0", "null"])
def test_a_step_that_cannot_be(step, tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(line(1) + b'{"step": ' + step.encode() + b"}\n")
    with pytest.warns(UserWarning, match="line 2 is damaged"):
        assert [row.number for row in read_log_lines(path)] == [1]


def test_a_log_that_grows(tmp_path, recwarn):
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(line(1) + line(2) + b'{"st')
    assert [row.number for row in read_log_lines(path, may_grow=True)] == [1, 2]
    assert not recwarn.list


def test_opening_a_log_removes_what_comes_after_its_step(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(line(1) + line(2) + line(3))
    JsonLinesFile(path, 1).close()
    assert path.read_bytes() == line(1)


def test_a_line_of_any_length_is_read_in_parts(tmp_path, monkeypatch):
    monkeypatch.setattr(json_lines, "MAX_LINE_BYTES", 16)
    lines = [
        b'{"step": 1}',
        b'{"step": 2, "x": ' + b"1" * 100 + b"}",
        b'{"step": 3567}',
        b'{"step": 35678}',
        b'{"step": 4}',
    ]
    (tmp_path / "a").write_bytes(b"\n".join(lines) + b"\n")
    read = [*json_lines.iterate_json_lines(tmp_path / "a")]
    assert [line.number for line in read] == [1, 2, 3, 4, 5]
    assert [line.values and line.values["step"] for line in read] == [1, None, 3567, 35678, 4]
    assert all(len(line.data) <= 16 for line in read)
