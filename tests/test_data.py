"""Reading texts, and the batches of every step."""

import os
import threading

import jax
import numpy as np
import pytest
from input_files import FORMATS, TEXTS, write_input, write_texts

from davae_jax.data.batches import TextBatches
from davae_jax.data.inputs.readers import METADATA_FILES, read_texts
from davae_jax.data.tokenize import TokenizedTexts
from davae_jax.utils.errors import InputError

PAD = 9


def texts_of(lengths):
    """Row i is filled with i + 10, its decoder row as long as given, its encoder row two longer."""
    return TokenizedTexts(
        [np.full(n + 2, i + 10) for i, n in enumerate(lengths)],
        [np.full(n, i + 10) for i, n in enumerate(lengths)],
        np.arange(1, len(lengths) + 1),
        0,
    )


def whole_rows(batch):
    """Encoder ids, decoder ids from bos to the end token, and lengths of a batch with one text a row."""
    assert batch.encoder_segments is batch.encoder_starts is batch.decoder_segments is None
    ids = np.concatenate([batch.decoder_ids[:, :1], batch.decoder_targets], axis=1)
    return batch.encoder_ids, ids, batch.lengths[:, 0]


def assert_same_batch(a, b):
    jax.tree.map(np.testing.assert_array_equal, a, b)


LENGTHS = [3, 30, 7, 12, 25, 5, 9, 14, 21, 4, 8, 16, 11]


@pytest.fixture
def batches():
    return TextBatches(texts_of(LENGTHS), 3, pad_id=PAD, buckets=2, seed=5)


def test_an_epoch_shows_every_text_once(batches):
    assert batches.steps_per_epoch == 4
    for epoch in range(3):
        rows = np.concatenate([batches.select_texts(epoch * 4 + i)[0] for i in range(4)])
        assert len(set(rows)) == 12  # of 13, one waits
    shown = {int(row) for step in range(40) for row in batches.select_texts(step)[0]}
    assert shown == set(range(13))


def test_a_batch_depends_only_on_seed_and_step(batches):
    again = TextBatches(texts_of(LENGTHS), 3, pad_id=PAD, buckets=2, seed=5)
    order = [17, 3, 0, 3, 9]
    for step in order:
        assert_same_batch(again.batch(step), batches.batch(step))
    other = TextBatches(texts_of(LENGTHS), 3, pad_id=PAD, buckets=2, seed=6)
    assert any((other.select_texts(step)[0] != batches.select_texts(step)[0]).any() for step in range(4))
    assert any(
        (batches.select_texts(step)[0] != batches.select_texts(step + 4)[0]).any() for step in range(4)
    )  # epochs differ


def test_rows_are_whole_and_padded(batches):
    shapes = set()
    for step in range(8):
        rows, (S, T) = batches.select_texts(step)
        encoder_ids, decoder_ids, lengths = whole_rows(batches.batch(step))
        assert encoder_ids.shape == (3, S) and decoder_ids.shape == (3, T)
        shapes.add((S, T))
        for row, e, d, n in zip(rows, encoder_ids, decoder_ids, lengths, strict=True):
            assert n == LENGTHS[row]
            assert (d[:n] == row + 10).all() and (d[n:] == PAD).all()
            assert (e[: n + 2] == row + 10).all() and (e[n + 2 :] == 0).all()
    assert len(shapes) == 2  # as many as buckets


def test_no_row_is_padded_past_the_encoders_positions():
    """130 positions are no multiple of 8; JAX reads NaN past the end of a table."""
    batches = TextBatches(texts_of([4, 128]), 2, pad_id=PAD, encoder_positions=130)
    assert batches.batch(0).encoder_ids.shape[1] <= 130


def test_fewer_texts_than_a_batch():
    batches = TextBatches(texts_of([4, 5]), 5, pad_id=PAD)
    assert sorted(set(batches.select_texts(0)[0])) == [0, 1] and len(batches.batch(7).lengths) == 5


def test_lines_and_json_lines(tmp_path):
    plain = tmp_path / "a.txt"
    plain.write_bytes("\ufeff一\n\n二\u2028二\r\n三".encode())
    assert read_texts(plain) == ["一", "", "二\u2028二", "三"]
    lines = tmp_path / "a.jsonl"
    lines.write_text('{"text": "一", "n": 1}\n\n{"body": 1, "text": "二"}\n', encoding="utf-8")
    assert read_texts(lines) == ["一", "", "二"]


@pytest.mark.parametrize("name", [name for name in FORMATS if name != "folder"])
def test_every_format_of_the_table(name, tmp_path):
    """What `davae prepare` reads from a file is what a run reads from it."""
    folder = tmp_path / "texts"
    given = write_input(folder, name)
    (path,) = [p for p in ([given] if given.is_file() else folder.iterdir()) if p.name not in METADATA_FILES]
    assert read_texts(path) == TEXTS


@pytest.mark.parametrize("name", ["a.ndjson", "a.NDJSON", "a.JSON", "a.JsonL"])
def test_a_suffix_in_any_case(name, tmp_path):
    (tmp_path / name).write_text('{"text": "一"}\n', encoding="utf-8")
    assert read_texts(tmp_path / name) == ["一"]


def test_a_pipe(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    writer = threading.Thread(target=(tmp_path / "pipe").write_bytes, args=["一\n二\n".encode() * 50_000])
    writer.start()
    assert read_texts(tmp_path / "pipe") == ["一", "二"] * 50_000
    writer.join()


def test_a_file_without_a_known_suffix_is_text(tmp_path):
    for name in ("texts", "texts.md"):
        assert read_texts(write_texts(tmp_path / name, ["一", "二"])) == ["一", "二"]


def test_a_table_without_the_column(tmp_path):
    write_input(tmp_path / "texts", "parquet")
    with pytest.raises(InputError, match="its columns are text, id; choose one with --field"):
        read_texts(tmp_path / "texts" / "train-00000.parquet", "body")


@pytest.mark.parametrize(
    ("name", "data", "message"),
    [
        ("a.txt", b"", "contains no text"),
        ("a.txt", b"\n \n", "contains no text"),
        ("a.txt", b"ok\n\xff\xfe\n", "line 2: is not UTF-8"),
        ("a.jsonl", b'{"text": "a"}\nnot json\n', "line 2: is not JSON"),
        ("a.jsonl", b'{"text": "a"}\n{"t": "a"}\n', "line 2: has no field 'text'"),
        ("a.jsonl", b'{"text": 3}\n', "line 1: the field 'text' is not a string"),
        ("a.jsonl", b'["text"]\n', "line 1: has no field 'text'"),
        ("a.jsonl", b'{"text": ""}\n{"text": " "}\n', "contains no text"),
        (
            "a.jsonl",
            b'{"text": "a"}\n{"text": "\\ud83d"}\n',
            "line 2: the field 'text' contains half of a surrogate pair",
        ),
    ],
)
def test_unreadable_texts(name, data, message, tmp_path):
    path = tmp_path / name
    path.write_bytes(data)
    with pytest.raises(InputError) as error:
        read_texts(path)
    assert str(error.value) == f"{path}: {message}"
    with pytest.raises(InputError, match=r"missing\.txt: cannot be read"):
        read_texts(tmp_path / "missing.txt")
