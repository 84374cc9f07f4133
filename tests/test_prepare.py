"""`davae prepare`, and the batches of what it makes."""

import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import jax
import numpy as np
import pytest
from input_files import FORMATS, TEXTS, write_input, write_texts
from test_train import TINY, metrics_of, train
from tokenizer_fixtures import make_spiece, make_vocab, sentences

from benchmarks import prepare_memory
from davae_jax.cli.main import main
from davae_jax.data.config import DataConfig
from davae_jax.data.inputs import line_readers
from davae_jax.data.inputs.bad_lines import BadLineLimit
from davae_jax.data.inputs.readers import find_files, split_into_slices
from davae_jax.data.prefetch import read_ahead
from davae_jax.data.prepared import build_shards as build_shards_module
from davae_jax.data.prepared.build_shards import build_shards
from davae_jax.data.prepared.shard_batches import PreparedTexts, ShardBatches, permute
from davae_jax.data.prepared.shard_index import merge_shards
from davae_jax.data.prepared.shard_writer import ShardSettings, ShardTask, load_new_tokenizers, write_shards
from davae_jax.data.prepared.shards import Prepared, decode_record, encode_record, id_dtype
from davae_jax.data.tokenize import tokenize
from davae_jax.tokenizers.load import TOKENIZER_FILES, load_tokenizers
from davae_jax.training.config import TrainConfig
from davae_jax.training.presets import DEMO
from davae_jax.training.run.vocabularies import model_config, prepare_tokenizers
from davae_jax.training.setup import load_corpus, make_batches, truncation_mismatch
from davae_jax.utils.errors import InputError
from davae_jax.utils.files import write_json

ROOT = Path(__file__).parent.parent
SETTINGS = ShardSettings(("text",), 512, 512, False, 0.0, None)


@pytest.fixture(scope="session")
def tokenizer_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokenizers")
    make_spiece(folder)
    make_vocab(folder)
    return folder


@pytest.fixture
def prepare(capsys, tokenizer_folder, tmp_path):
    """Runs the command in this process, by default into tmp_path/out."""

    def call(*paths, output=tmp_path / "out", tokenizers=tokenizer_folder, **options):
        options = {"workers": 1, "held_out": 0} | options
        argv = ["prepare", "--input", *paths, "--output", output]
        argv += ["--tokenizers", tokenizers] if tokenizers else []
        for name, value in options.items():
            argv += [f"--{name.replace('_', '-')}", *([] if value is True else [value])]
        code = main([str(word) for word in argv])
        out, err = capsys.readouterr()
        return SimpleNamespace(code=code, out=out, err=err.split("\r")[-1], folder=output)

    return call


def records_of(folder):
    prepared = Prepared(folder)
    return [tuple(ids.tolist() for ids in prepared[i]) for i in range(len(prepared))]


def manifest_of(folder):
    return json.loads((folder / "manifest.json").read_text(encoding="utf-8"))


# The contents of shards.


@pytest.mark.parametrize("format_name", FORMATS)
def test_every_format_gives_the_ids_that_training_on_text_gives(format_name, prepare, tmp_path):
    result = prepare(write_input(tmp_path / "in", format_name))
    assert (result.code, result.err.strip()) == (0, "")
    expected = tokenize(TEXTS, *load_new_tokenizers(str(result.folder), 512), max_length=512, source="")
    assert records_of(result.folder) == [
        (e.tolist(), d.tolist()) for e, d in zip(expected.encoder_ids, expected.decoder_ids, strict=True)
    ]
    counts = manifest_of(result.folder)["counts"]
    assert counts["lines"] == counts["texts"] == 300
    assert counts["encoder_tokens"] == sum(map(len, expected.encoder_ids))
    assert counts["decoder_tokens"] == sum(len(row) - 1 for row in expected.decoder_ids)
    assert not (result.folder / "parts").exists()


@pytest.mark.parametrize("largest", [60_000, 70_000])
def test_records_of_two_and_of_four_bytes(largest):
    dtype = id_dtype(largest)
    record = encode_record([1, 2, largest], [largest, 5], dtype)
    assert len(record) == 6 * (2 if largest == 60_000 else 4)
    assert [ids.tolist() for ids in decode_record(record, dtype)] == [[1, 2, largest], [largest, 5]]


def test_a_record_of_more_ids_than_16_bits_count(prepare, tmp_path):
    """Its first value is the number of its encoder ids."""
    n = 70_000
    folder = prepare(write_texts(tmp_path / "a.txt", ["。" * n]), max_length=n + 9, encoder_positions=n + 9).folder
    assert len(Prepared(folder)[0][0]) == n + 4 and manifest_of(folder)["dtype"] == "<u4"


def test_a_file_that_cannot_be_split_makes_several_shards(tokenizer_folder, tmp_path, monkeypatch):
    """Work that continues after the second shard writes the same third shard."""
    monkeypatch.setattr(line_readers, "CHUNK_LINES", 20)
    path = write_input(tmp_path / "in", "txt.gz")

    def task(name):
        folder = tmp_path / name
        shutil.copytree(tokenizer_folder, folder)
        (folder / "parts").mkdir()
        return ShardTask(
            str(folder), 0, split_into_slices(path, 2000), ShardSettings(("text",), 512, 512, False, 0.1, 2000)
        )

    uninterrupted, continued = task("uninterrupted"), task("continued")
    write_shards(uninterrupted)
    shards = sorted(path.name for path in Path(uninterrupted.folder).glob("*.arrayrecord"))
    assert len(shards) > 3 and shards[2] == "00000-0002.arrayrecord"
    write_shards(continued)
    for file in [*Path(continued.folder).glob("00000-0002.*"), *Path(continued.folder, "parts").glob("00000-0002.*")]:
        file.unlink()
    write_shards(continued)
    settings = {"inputs": {str(path): ""}, "encoder_positions": 512}
    for task in (uninterrupted, continued):
        write_json(Path(task.folder, "prepare.json"), settings)
        merge_shards(Path(task.folder), settings, BadLineLimit(0.01, 0))
    assert manifest_of(Path(uninterrupted.folder)) == manifest_of(Path(continued.folder))
    held_out = Prepared(Path(uninterrupted.folder)).held_out()
    expected = tokenize(TEXTS, *load_new_tokenizers(uninterrupted.folder, 512), max_length=512, source="")
    pairs = zip(TEXTS, expected.decoder_ids, strict=True)
    trained = [row.tolist() for text, row in pairs if text not in set(held_out)]
    assert [row for _, row in records_of(Path(continued.folder))] == trained


def test_too_many_bad_lines(prepare, tmp_path):
    """The first of them is named; with a larger bound, the same command completes."""
    path = tmp_path / "a.jsonl"
    lines = [json.dumps({"text": text}) for text in TEXTS[:98]]
    path.write_text("\n".join([*lines[:5], "no", *lines[5:], "[]"]) + "\n", encoding="utf-8")
    result = prepare(path)
    assert result.code == 1 and not (result.folder / "manifest.json").exists()
    assert f"error: {path}: line 6: is not JSON; 2 of 100 lines cannot be read" in result.err
    assert "--max-bad 0.01" in result.err
    assert prepare(path, max_bad=0.02).code == 0 and manifest_of(result.folder)["counts"]["texts"] == 98


def test_an_array_of_documents_with_two_fields(prepare, tmp_path):
    """As WuDao comes. The setting is stored, and another choice of fields is another preparation."""
    rows = [{"uniqueKey": str(i), "title": TEXTS[i], "content": TEXTS[i + 1]} for i in range(100)]
    (tmp_path / "a.json").write_text(json.dumps(rows, ensure_ascii=False, indent=0), encoding="utf-8")
    fields = ["--field", "title", "--field", "content"]
    result = prepare(tmp_path / "a.json", *fields)
    assert result.code == 0 and manifest_of(result.folder)["counts"]["texts"] == 100
    assert manifest_of(result.folder)["settings"]["field"] == ["title", "content"]
    encoder, decoder = load_new_tokenizers(str(result.folder), 512)
    found = sorted(list(row) for _, row in records_of(result.folder))
    texts = [f"{row['title']}\n{row['content']}" for row in rows]
    expected = tokenize(texts, encoder, decoder, max_length=512, source="")
    assert found == sorted(map(list, expected.decoder_ids))
    assert prepare(tmp_path / "a.json", *fields).code == 0
    other = prepare(tmp_path / "a.json", "--field", "title")
    assert other.code == 2 and "was prepared with other settings: fields" in other.err


def test_an_option_given_twice_takes_both(prepare, tmp_path):
    for name, texts in (("a.txt", TEXTS[:20]), ("b.txt", TEXTS[20:50])):
        write_texts(tmp_path / name, texts)
    result = prepare(tmp_path / "a.txt", "--input", tmp_path / "b.txt")
    assert result.code == 0 and manifest_of(result.folder)["counts"]["texts"] == 50


def test_links_in_a_folder_are_followed_once(tmp_path):
    data, more = tmp_path / "data", tmp_path / "more"
    for folder in (data, more):
        folder.mkdir()
        write_texts(folder / f"{folder.name}.txt")
    (data / "link").symlink_to(more)
    (data / "loop").symlink_to(data)
    (more / "file.txt").symlink_to(data / "data.txt")
    found = [str(path.relative_to(data)) for path in find_files([data])]
    assert found == ["data.txt", "link/file.txt", "link/more.txt"]


@pytest.mark.parametrize(
    "spoil",
    [
        lambda folder: (folder / "b.txt").symlink_to("nowhere"),
        lambda folder: write_texts(folder / "_b.txt"),
        lambda folder: (folder / "_temporary").mkdir(),
        lambda folder: os.mkfifo(folder / "b.txt"),
    ],
    ids=["dangling link", "temporary file", "temporary folder", "pipe"],
)
def test_a_folder_with_what_cannot_be_read_is_refused(spoil, tmp_path):
    write_texts(tmp_path / "a.txt")
    spoil(tmp_path)
    with pytest.raises(InputError, match=r"(/b\.txt|/_b\.txt|/_temporary): ") as e:
        find_files([tmp_path])
    assert e.value.exit_code == 2


def test_files_of_a_folder_that_are_left_out_are_named(tmp_path):
    for name in ("a.txt", "b.txt.bz2", "c.csv", "_SUCCESS", "README.md", ".hidden.csv"):
        write_texts(tmp_path / name)
    with pytest.warns(UserWarning, match=r"/b\.txt\.bz2, .*/c\.csv: left out"):
        assert find_files([tmp_path]) == [tmp_path / "a.txt"]


def test_a_file_is_read_once_however_its_path_is_written(tmp_path, monkeypatch):
    (tmp_path / "data").mkdir()
    path = write_texts(tmp_path / "data" / "a.txt")
    monkeypatch.chdir(tmp_path)
    spellings = [Path("data"), Path("data/a.txt"), Path("data/../data/a.txt"), path]
    assert find_files(spellings) == [path]
    assert find_files(spellings[:3]) == [Path("data/../data/a.txt")]


def test_a_pipe_is_read_once(prepare, tokenizer_folder, tmp_path):
    """Training tokenizers would use up what the shards are to contain, and wait for more."""
    os.mkfifo(tmp_path / "a.txt")
    result = prepare(tmp_path / "a.txt", tokenizers=None)
    assert (result.code, list(tmp_path.glob("out"))) == (2, []) and "--tokenizers" in result.err
    writer = threading.Thread(target=(tmp_path / "a.txt").write_text, args=["".join(f"{text}\n" for text in TEXTS)])
    writer.start()
    assert prepare(tmp_path / "a.txt").code == 0
    writer.join()
    assert manifest_of(tmp_path / "out")["counts"]["texts"] == len(TEXTS)


@pytest.mark.parametrize("change", ["longer", "other", "gone"])
def test_a_file_that_changes_while_it_is_read(change, prepare, tmp_path, monkeypatch):
    paths = [write_texts(tmp_path / name) for name in ("a.txt", "b.txt")]

    def write_and_change(task, *args):
        write_shards(task, *args)
        match change:
            case "longer":
                with paths[1].open("a", encoding="utf-8") as file:
                    file.write("一\n")
            case "other":
                os.utime(paths[1], (0, 0))
            case _:
                paths[1].unlink()

    monkeypatch.setattr("davae_jax.data.prepared.build_shards.write_shards", write_and_change)
    result = prepare(*paths)
    assert result.code == 1 and str(paths[1]) in result.err
    assert not (tmp_path / "out" / "manifest.json").exists()


def test_a_dataset_is_what_its_state_lists(tmp_path):
    """`Dataset.map` leaves files beside it that contain the rows again."""
    folder = write_input(tmp_path / "dataset", "arrow")
    (data,) = folder.glob("*.arrow")
    shutil.copy(data, folder / "cache-0123.arrow")
    assert len(find_files([folder])) == 2  # an empty state
    (folder / "state.json").write_text(json.dumps({"_data_files": [{"filename": data.name}]}), encoding="utf-8")
    assert find_files([folder]) == [data]
    state = {"_data_files": [{"filename": data.name}], "_indices_data_files": [{"filename": "indices.arrow"}]}
    (folder / "state.json").write_text(json.dumps(state), encoding="utf-8")
    with pytest.raises(InputError, match=r"/state\.json: "):
        find_files([folder])


@pytest.mark.parametrize(
    "state",
    ["{", "[" * 5000, '{"_data_files": 3}', '{"_data_files": []}', '{"_data_files": [{"filename": "missing.arrow"}]}']
    + ['{"_data_files": [{}]}', '{"_data_files": [{"filename": "%s"}]}' % ("x" * 300)],
)
def test_a_damaged_state_of_a_dataset_is_named(state, tmp_path):
    """Without it the rows of other files would be read as well, or those of a missing file left out."""
    folder = write_input(tmp_path / "dataset", "arrow")
    (folder / "state.json").write_text(state, encoding="utf-8")
    with pytest.raises(InputError, match=r"/state\.json: ") as e:
        find_files([folder])
    assert e.value.exit_code == 2


def test_an_output_inside_the_input(prepare, tmp_path):
    (tmp_path / "data").mkdir()
    write_texts(tmp_path / "data" / "a.txt")
    result = prepare(tmp_path / "data", output=tmp_path / "data" / "out")
    assert result.code == 2 and "--output" in result.err and not (tmp_path / "data" / "out").exists()


def test_bad_lines_are_counted_and_listed(prepare, tmp_path):
    """Every line is blank, too long, or bad for one reason; line numbers count from the beginning of a file."""
    lines = [json.dumps({"text": text}) for text in TEXTS[:3]]
    bad = ["not json", '{"body": 1}', '{"text": 3}', '{"text": "\\ud83d"}', '["text"]']
    (tmp_path / "a.jsonl").write_text("\n".join([lines[0], *bad, "", lines[1], '{"text": " "}']), encoding="utf-8")
    (tmp_path / "b.jsonl").write_bytes(f"{lines[2]}\n".encode() + b"\xff\n" + json.dumps({"text": "很" * 600}).encode())
    result = prepare(tmp_path / "b.jsonl", tmp_path / "a.jsonl", max_bad=0.6)
    assert result.code == 0 and "2 blank, 1 too long, 6 bad lines (bad_lines.jsonl)" in result.out
    listed = [json.loads(line) for line in (result.folder / "bad_lines.jsonl").open(encoding="utf-8")]
    assert [(Path(b["file"]).name, b["line"], b["problem"]) for b in listed] == [
        ("a.jsonl", 2, "is not JSON"),
        ("a.jsonl", 3, "has no field 'text'"),
        ("a.jsonl", 4, "the field 'text' is not a string"),
        ("a.jsonl", 5, "the field 'text' contains half of a surrogate pair"),
        ("a.jsonl", 6, "has no field 'text'"),
        ("b.jsonl", 2, "is not UTF-8"),
    ]
    prepared = Prepared(result.folder)
    assert len(prepared) == 3
    a, b = tmp_path / "a.jsonl", tmp_path / "b.jsonl"
    assert prepared.describe_lines([2, 0, 1]) == f"lines 1, 8 of {a}; lines 1 of {b}"


def test_held_out_texts_are_not_in_the_shards(prepare, tmp_path):
    """All copies of a text are held out, in whichever file they are."""
    files = [write_texts(tmp_path / "a.txt"), write_texts(tmp_path / "b.txt", [*TEXTS[::-1], "今天很好。"])]
    result = prepare(*files, held_out=0.2)
    held_out = Prepared(result.folder).held_out()
    distinct = set(TEXTS) | {"今天很好。"}
    assert len(set(held_out)) == len(held_out) and 30 < len(held_out) < 90  # of about 300
    assert set(held_out) <= distinct
    _, decoder = load_new_tokenizers(str(result.folder), 512)
    trained = {tuple(row) for _, row in records_of(result.folder)}
    assert trained == {(decoder.bos_id, *decoder.encode(text)) for text in distinct - set(held_out)}
    counts = manifest_of(result.folder)["counts"]
    assert counts["texts"] + counts["held_out"] == 601 and counts["held_out_distinct"] == len(held_out)


def test_tokenizers_are_trained_where_none_are_given(prepare, tmp_path):
    result = prepare(write_texts(tmp_path / "a.txt"), tokenizers=None, decoder_vocab_size=200, encoder_vocab_size=150)
    assert result.code == 0
    encoder, decoder = load_new_tokenizers(str(result.folder), 512)
    assert 100 < encoder.size <= 150 and 100 < decoder.size <= 200
    assert decoder.decode(Prepared(result.folder)[7][1][1:-1]) == TEXTS[7]
    few = prepare(tmp_path / "a.txt", tokenizers=None, decoder_vocab_size=20, output=tmp_path / "few")
    assert few.code == 2 and few.err.startswith("davae prepare: error: --decoder-vocab-size 20: the texts have ")
    assert prepare(tmp_path / "a.txt", output=tmp_path / "few").code == 0  # that folder has no shard yet


def test_the_tokenizers_of_an_earlier_start_are_used_and_kept(prepare, tokenizer_folder, tmp_path, monkeypatch):
    """Where their folder is that of the result, they must not be removed with what the earlier start has left."""
    texts, out = write_texts(tmp_path / "a.txt"), tmp_path / "out"
    with monkeypatch.context() as patch:
        patch.setattr(build_shards_module, "run_tasks", lambda *_, **__: (_ for _ in ()).throw(KeyboardInterrupt))
        assert prepare(texts, max_length=256).code == 130
    (tmp_path / "link").symlink_to("out")
    assert prepare(texts, tokenizers=tmp_path / "link").code == 0
    assert all((out / name).read_bytes() == (tokenizer_folder / name).read_bytes() for name in TOKENIZER_FILES)


# Interrupted work, and folders that are refused.


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}


BUILD = """
import sys
from pathlib import Path
from davae_jax.data.prepared.build_shards import build_shards
from davae_jax.data.prepared.shard_writer import ShardSettings
if __name__ == "__main__":
    data, output, tokenizers = map(Path, sys.argv[1:])
    build_shards([data], output, ShardSettings(("text",), 512, 512, False, 0.0, 60_000), tokenizers, workers=2)
"""


def test_killed_and_started_again_gives_the_same_bytes(tokenizer_folder, tmp_path):
    """Of eight shards, each has the texts of several files."""
    data, settings = tmp_path / "data", SETTINGS._replace(shard_size=60_000)
    data.mkdir()
    for i in range(24):
        write_texts(data / f"{i:02}.txt", sentences(500, seed=i))
    (tmp_path / "build.py").write_text(BUILD, encoding="utf-8")
    command = [sys.executable, tmp_path / "build.py", data, tmp_path / "killed", tokenizer_folder]
    environment = os.environ | {"JAX_PLATFORMS": "cpu", "PYTHONPATH": str(ROOT)}
    killed = subprocess.Popen(list(map(str, command)), env=environment, cwd=ROOT)
    while len(list((tmp_path / "killed").glob("parts/*.json"))) < 3:
        assert killed.poll() is None
        time.sleep(0.02)
    killed.send_signal(signal.SIGKILL)
    killed.wait()
    assert not (tmp_path / "killed" / "manifest.json").exists()
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "killed").glob("*.arrayrecord")}
    assert len(before) >= 3
    for name in ("killed", "whole"):
        build_shards([data], tmp_path / name, settings, tokenizer_folder, workers=1)
    assert all(len(shard["files"]) > 1 for shard in manifest_of(tmp_path / "whole")["shards"])
    unchanged = sum(path.stat().st_mtime_ns == when for path, when in before.items())
    assert unchanged >= 3  # a shard without statistics is written again
    assert contents(tmp_path / "killed") == contents(tmp_path / "whole")


@pytest.mark.parametrize("change", [lambda data: b"", lambda data: data[:-9] + bytes([data[-9] ^ 1]) + data[-8:]])
def test_damage_in_an_unfinished_preparation_is_written_again(tokenizer_folder, tmp_path, monkeypatch, change):
    """Whatever file of the shards is damaged, the same command makes the same folder, in at most two calls."""
    text, settings = write_texts(tmp_path / "a.txt"), SETTINGS._replace(held_out=0.1, shard_size=4000)
    build_shards([text], tmp_path / "whole", settings, tokenizer_folder, workers=1)

    def interrupt(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr("davae_jax.data.prepared.build_shards.merge_shards", interrupt)
        build_shards([text], tmp_path / "unfinished", settings, tokenizer_folder, workers=1)
    written = [path for path in (tmp_path / "unfinished").rglob("0000[01]-*") if path.stat().st_size]
    assert len(written) > 6
    for path in written:
        folder = tmp_path / "damaged"
        shutil.copytree(tmp_path / "unfinished", folder)
        path = folder / path.relative_to(tmp_path / "unfinished")
        path.write_bytes(change(path.read_bytes()))
        try:
            build_shards([text], folder, settings, tokenizer_folder, workers=1)
        except InputError as e:
            assert str(path) in str(e)
            build_shards([text], folder, settings, tokenizer_folder, workers=1)
        assert contents(folder) == contents(tmp_path / "whole")
        shutil.rmtree(folder)


@pytest.mark.parametrize("name", ["*.arrayrecord", "*.npy", "order.npy", "held_out.jsonl", "vocab.txt"])
def test_a_complete_folder_that_has_lost_a_file_is_not_complete(name, prepare, tmp_path):
    (text := tmp_path / "a.txt").write_text("\n".join(TEXTS), encoding="utf-8")
    folder = prepare(text, held_out=0.1).folder
    assert prepare(text, held_out=0.1).code == 0
    lost = sorted(folder.glob(name))[0]
    lost.unlink()
    again = prepare(text, held_out=0.1)
    assert again.code == 1 and again.err.count("\n") == 1 and str(lost) in again.err


def test_other_settings_are_refused(prepare, tmp_path):
    path = write_texts(tmp_path / "a.txt")
    assert prepare(path).code == 0
    before = contents(tmp_path / "out")
    again = prepare(path)
    assert again.code == 0 and contents(tmp_path / "out") == before
    other = prepare(path, max_length=64)
    assert other.code == 2
    assert other.err.strip() == (
        f"davae prepare: error: --output {tmp_path / 'out'} was prepared with other settings: "
        "max_length (512, now 64); choose another folder"
    )
    os.utime(path, (1, 1))
    changed = prepare(path)
    assert changed.code == 2 and f"inputs.{path} (" in changed.err and changed.err.count("\n") == 1
    assert contents(tmp_path / "out") == before


@pytest.mark.parametrize(
    ("make", "code", "message"),
    [
        (lambda p: p / "none.txt", 2, "none.txt: no such file or folder"),
        (lambda p: (p / "a.pdf").touch() or p / "a.pdf", 2, "a.pdf: unknown suffix; supported: .txt, .jsonl"),
        (lambda p: (p / "d").mkdir() or p / "d", 2, "d: contains no file of a supported format"),
        (lambda p: (p / "a.txt").write_text("\n \n") and p / "a.txt", 1, "2 blank; no text remains"),
        (lambda p: (p / "a.txt").touch() or p / "a.txt", 1, "contains no text; no text remains"),
        (lambda p: (p / "a.txt.gz").write_bytes(b"text") and p / "a.txt.gz", 1, "a.txt.gz: cannot be read (Not a gzip"),
        (lambda p: (p / "a.parquet").write_bytes(b"PAR1") and p / "a.parquet", 1, "a.parquet: cannot be read ("),
        (lambda p: (p / "a.arrow").write_bytes(b"ARROW1") and p / "a.arrow", 1, "a.arrow: cannot be read ("),
    ],
)
def test_unusable_inputs(make, code, message, prepare, tmp_path):
    result = prepare(make(tmp_path))
    assert result.code == code and message in result.err and result.err.strip().count("\n") == 0
    assert not (tmp_path / "out" / "manifest.json").exists()


@pytest.mark.parametrize("format_name", ["jsonl.gz", "jsonl.zst"])
def test_a_truncated_compressed_file(format_name, prepare, tmp_path):
    folder = write_input(tmp_path / "in", format_name)
    path = folder / f"a.{format_name}"
    path.write_bytes(path.read_bytes()[:-20])
    result = prepare(folder)
    assert result.code == 1 and f"{path}: cannot be read (" in result.err
    assert not (tmp_path / "out" / "manifest.json").exists()


def test_invalid_options_and_columns(prepare, tmp_path):
    table = write_input(tmp_path / "in", "parquet") / "train-00000.parquet"
    assert "has no column 'body'; its columns are text, id; choose one with --field" in prepare(table, field="body").err
    assert "the column 'id' contains int64, not strings" in prepare(table, field="id", output=tmp_path / "b").err
    write_texts(tmp_path / "in" / "a.txt")
    mixed = prepare(tmp_path / "in", output=tmp_path / "c")
    assert mixed.code == 2
    assert "contains files of several formats (parquet, text); list the files themselves" in mixed.err
    assert "--workers must be at least 1, not 0" in prepare(table, workers=0).err
    assert "--held-out must be at least 0 and below 1, not 1.0" in prepare(table, held_out=1.0).err
    foreign = write_texts(tmp_path / "foreign.txt").parent
    refused = prepare(table, output=foreign)
    assert refused.code == 2 and "contains files, but no prepare.json" in refused.err
    assert not (foreign / "parts").exists()


def test_files_of_the_user_under_the_names_of_its_own_are_left(prepare, tmp_path):
    """A folder called "parts" may be that of the texts themselves, and prepare.json of another program."""
    novels = tmp_path / "novels"
    (novels / "parts").mkdir(parents=True)
    texts = write_texts(novels / "parts" / "a.txt")
    refused = prepare(texts.parent, output=novels)
    assert refused.code == 2 and f"{novels} contains files, but no prepare.json" in refused.err
    other = tmp_path / "other"
    other.mkdir()
    for name, text in {"prepare.json": '{"mine": 1}', "vocab.txt": "mine", "held_out.jsonl": "mine"}.items():
        (other / name).write_text(text, encoding="utf-8")
    before = {path: path.read_bytes() for path in [texts, *other.iterdir()]}
    refused = prepare(texts, output=other)
    assert refused.code == 2 and str(other / "prepare.json") in refused.err
    assert {path: path.read_bytes() for path in [texts, *other.iterdir()]} == before


def test_a_file_of_a_year_that_python_does_not_know(prepare, tmp_path, monkeypatch):
    """Some file systems keep such times, and others do not, so the time stands for the file's."""
    texts = write_texts(tmp_path / "a.txt")
    time = build_shards_module._describe_time
    monkeypatch.setattr(build_shards_module, "_describe_time", lambda seconds: time(99999999999999.0))
    for _ in range(2):
        result = prepare(texts)
        assert (result.code, result.err.strip()) == (0, "")
    stored = json.loads((result.folder / "prepare.json").read_text(encoding="utf-8"))["inputs"][str(texts)]
    assert stored == f"{texts.stat().st_size} bytes of 99999999999999.0 s"
    assert time(0.0) == "1970-01-01T00:00:00+00:00"


def test_files_among_the_statistics_are_left(prepare, tmp_path):
    """The folder "parts" of an earlier start was empty, and is taken; that of a complete folder is the user's."""
    texts = write_texts(tmp_path / "a.txt")
    (tmp_path / "out" / "parts").mkdir(parents=True)
    assert prepare(texts).code == 0 and not (tmp_path / "out" / "parts").exists()
    (tmp_path / "out" / "parts").mkdir()
    mine = [write_texts(tmp_path / "out" / "parts" / name) for name in ("mine.txt", "2026-11.jsonl")]
    assert prepare(texts).code == 0 and all(file.exists() for file in mine)


def test_a_full_disk_leaves_no_partial_shard(prepare, tmp_path):
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    path = write_texts(tmp_path / "a.txt", ["".join(sentences(10, seed=i)) for i in range(1500)])
    resource.setrlimit(resource.RLIMIT_FSIZE, (400_000, hard))  # bytes of a file
    try:
        result = prepare(path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    shard = tmp_path / "out" / "00000-0000.arrayrecord"
    assert (result.code, result.err.strip()) == (
        1,
        f"davae prepare: error: {shard}: cannot be written (File too large)",
    )
    assert not list((tmp_path / "out").glob("*record*")) and not list((tmp_path / "out").glob(".*"))
    assert prepare(path).code == 0  # there is room again


# The batches.


@pytest.fixture(scope="session")
def prepared(tokenizer_folder, tmp_path_factory):
    """Two shards: of two small files and of a larger one."""
    folder = tmp_path_factory.mktemp("prepared")
    files = [write_texts(folder / f"{i}.txt", sentences(n, seed=i)) for i, n in enumerate((100, 3, 144))]
    settings = SETTINGS._replace(shard_size=files[2].stat().st_size)
    build_shards(files, folder / "out", settings, tokenizer_folder, workers=1)
    return Prepared(folder / "out")


def batches_with(prepared, batch_size=8, **kwargs):
    return ShardBatches(prepared, batch_size, **{"pad_id": 301, "buckets": 3, "seed": 5} | kwargs)


def assert_equal(a, b):
    jax.tree.map(np.testing.assert_array_equal, a, b)


@pytest.mark.parametrize("n", [1, 2, 3, 16, 17, 1000, 4097])
def test_a_permutation_that_is_not_stored(n):
    places = np.arange(n)
    found = permute(places, n, (3, 1))
    assert sorted(found) == places.tolist()
    assert (permute(places[::-1], n, (3, 1))[::-1] == found).all()  # each place by itself
    if n >= 16:
        assert (found != permute(places, n, (3, 2))).any() and (found != places).any()


def test_the_permutations_are_shuffles():
    """Over seeds, every place goes everywhere as often: χ² with 19² degrees of freedom lies within 6 deviations."""
    n, seeds = 20, 400
    counts = np.zeros((n, n))
    for seed in range(seeds):
        counts[np.arange(n), permute(np.arange(n), n, (seed,))] += 1
    chi2 = ((counts - seeds / n) ** 2 / (seeds / n)).sum()
    freedom = (n - 1) ** 2
    assert abs(chi2 - freedom) < 6 * (2 * freedom) ** 0.5


def test_an_epoch_shows_every_text_once(prepared):
    batches = batches_with(prepared)
    assert (batches.count, batches.steps_per_epoch) == (247, 30)
    for epoch in range(2):
        rows = np.concatenate([batches.select_texts(epoch * 30 + i)[0] for i in range(30)])
        assert len(set(rows)) == 240  # of 247, seven wait
    shown = {int(row) for step in range(300) for row in batches.select_texts(step)[0]}
    assert shown == set(range(247))


def test_batches_hold_the_records_padded(prepared):
    batches, shapes = batches_with(prepared), set()
    for step in range(30):
        rows, (S, T) = batches.select_texts(step)
        batch = batches.batch(step)
        assert batch.encoder_ids.shape == (8, S) and batch.decoder_ids.shape == (8, T - 1)
        shapes.add((S, T))
        ids = np.concatenate([batch.decoder_ids[:, :1], batch.decoder_targets], axis=1)
        for row, e, d, n in zip(rows, batch.encoder_ids, ids, batch.lengths[:, 0], strict=True):
            encoder_row, decoder_row = prepared[int(row)]
            assert n == len(decoder_row) and (d[:n] == decoder_row).all() and (d[n:] == 301).all()
            assert (e[: len(encoder_row)] == encoder_row).all() and (e[len(encoder_row) :] == 0).all()
    assert 1 < len(shapes) <= 3


def test_a_batch_depends_only_on_seed_and_step(prepared):
    batches, again = batches_with(prepared), batches_with(prepared)
    uninterrupted = [batches.batch(step) for step in range(40)]
    for step in [37, 3, 4, 5, 0, 3]:  # as after a resume, forwards and back
        assert_equal(again.batch(step), uninterrupted[step])
    other = batches_with(prepared, seed=6)
    assert any((other.select_texts(step)[0] != batches.select_texts(step)[0]).any() for step in range(4))
    assert any(
        (batches.select_texts(step)[0] != batches.select_texts(step + 30)[0]).any() for step in range(4)
    )  # epochs differ


@pytest.mark.parametrize("processes", [1, 2, 4])
def test_processes_together_read_the_one_process_batch(processes, prepared):
    """From step 17 on, in background threads."""
    whole, own = batches_with(prepared), 8 // processes
    ranges = [(i * own, (i + 1) * own) for i in range(processes)]
    upcoming = [read_ahead(batches_with(prepared), [rows], 17, threads=4) for rows in ranges]
    for step in range(17, 35):
        parts = [part for process in upcoming for part in next(process).values()]
        assert_equal(jax.tree.map(lambda *x: np.concatenate(x), *parts), whole.batch(step))
        assert all(len(batch.lengths) == own for batch in parts)


def test_shorter_texts_only(prepared):
    lengths = [len(prepared[i][1]) for i in range(len(prepared))]
    limit = sorted(lengths)[100]
    batches = batches_with(prepared, max_length=limit)
    assert batches.count == sum(n <= limit for n in lengths) and batches.too_long == 247 - batches.count
    shown = {int(row) for step in range(300) for row in batches.select_texts(step)[0]}
    assert shown == {i for i, n in enumerate(lengths) if n <= limit}
    with pytest.raises(InputError, match="contains no text of at most 3 tokens"):
        batches_with(prepared, max_length=3)
    with pytest.raises(InputError, match="but the encoder has 12 positions; prepare with --encoder-positions 12"):
        batches_with(prepared, encoder_positions=12)
    with pytest.raises(InputError, match="but the encoder has 12 positions; prepare with --encoder-positions 12"):
        PreparedTexts(prepared, 100, encoder_positions=12)


def test_fewer_texts_than_a_batch(prepared):
    batches = batches_with(prepared, batch_size=256)
    assert set(batches.select_texts(0)[0]) == set(range(247)) and len(batches.batch(7).lengths) == 256


def test_missing_and_damaged_files_are_named(prepared, tmp_path):
    folder = tmp_path / "copy"
    shutil.copytree(prepared.folder, folder)
    shard = folder / "00001-0000.arrayrecord"
    data = shard.read_bytes()
    shard.unlink()
    with pytest.raises(InputError) as error:
        Prepared(folder)
    assert str(error.value) == f"{shard}: a shard of the manifest cannot be read (No such file or directory)"
    shard.write_bytes(data[:-1])
    with pytest.raises(InputError, match=rf"has {len(data) - 1} bytes, but the manifest gives {len(data)}"):
        Prepared(folder)
    shard.write_bytes(bytes(len(data)))
    with pytest.raises(InputError, match=r"00001-0000.arrayrecord: record 1 cannot be read \("):
        Prepared(folder)[104]
    (folder / "manifest.json").unlink()
    with pytest.raises(InputError, match=r"contains no manifest.json; `davae prepare` writes it after the last shard"):
        Prepared(folder)


def without_hashes(folder):
    """Removes what the manifests of the first versions do not have: hashes of the other files, and its own sum."""
    manifest = json.loads((folder / "manifest.json").read_text(encoding="utf-8"))
    (folder / "manifest.json").write_text(
        json.dumps({key: value for key, value in manifest.items() if key not in ("files", "sum")}), encoding="utf-8"
    )


@pytest.mark.parametrize("name", ["order.npy", "lengths.npy", "held_out.jsonl"])
def test_files_of_another_preparation_are_named(name, prepared, tmp_path):
    """A file of the same form: the first two values, or lines, exchanged."""
    folder = Path(shutil.copytree(prepared.folder, tmp_path / "copy"))
    if name.endswith(".npy"):
        array = np.load(folder / name)
        array[[0, 1]] = array[[1, 0]]
        np.save(folder / name, array)
    else:
        (folder / name).write_bytes((folder / name).read_bytes() + b'{"text": "\xe4\xb8\x80"}\n')
    with pytest.raises(InputError, match=rf"/{name}: "):
        Prepared(folder)


@pytest.mark.parametrize("packed", [False, True])
def test_a_shard_of_another_preparation_is_named(packed, prepared, tmp_path):
    """With as many bytes: the format fills up blocks. Training would silently read other texts."""
    folder = Path(shutil.copytree(prepared.folder, tmp_path / "copy"))
    shards = sorted(folder.glob("*.arrayrecord"), key=lambda path: path.name)
    one, other = (next(s for s in shards if s.name.startswith(n)) for n in ("00000-", "00001-"))
    assert one.stat().st_size == other.stat().st_size
    data = one.read_bytes()
    one.write_bytes(other.read_bytes())
    other.write_bytes(data)
    opened = Prepared(folder)
    with pytest.raises(InputError, match=r"/0000[01]-0000\.(arrayrecord|npy): "):
        if packed:
            texts = PreparedTexts(opened, 1000)
            [texts.ids(i) for i in range(len(texts.sizes))]
        else:
            [batches_with(opened).batch(step) for step in range(20)]


@pytest.mark.parametrize("entry", [247, 2**32 - 1])
def test_an_order_of_records_that_are_not_there_is_named(entry, prepared, tmp_path):
    folder = tmp_path / "copy"
    shutil.copytree(prepared.folder, folder)
    order = np.load(folder / "order.npy")
    order[:] = entry
    np.save(folder / "order.npy", order)
    without_hashes(folder)
    with pytest.raises(InputError, match=r"/order\.npy: "):
        batches_with(Prepared(folder)).batch(0)


def test_an_order_that_does_not_fit_the_lengths_is_named(prepared, tmp_path):
    """The longest texts in the place of the shortest ones."""
    folder = tmp_path / "copy"
    shutil.copytree(prepared.folder, folder)
    np.save(folder / "order.npy", np.load(folder / "order.npy")[::-1].copy())
    without_hashes(folder)
    with pytest.raises(InputError, match=r"/order\.npy: "):
        for step in range(20):
            batches_with(Prepared(folder), buckets=4).batch(step)


@pytest.mark.parametrize("size", [0, 100, 1 << 20])
def test_sizes_that_cannot_be_are_named(size, prepared, tmp_path):
    folder = tmp_path / "copy"
    shutil.copytree(prepared.folder, folder)
    table = np.load(folder / "00001-0000.npy")
    table[0, 1] = size
    np.save(folder / "00001-0000.npy", table)
    with pytest.raises(InputError, match=r"/(00001-0000|lengths)\.npy: "):
        PreparedTexts(Prepared(folder), 100)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        *[(key, None) for key in ("settings", "tokenizers", "dtype", "counts", "shards")],
        *[("dtype", ">f8"), ("shards", [{}]), ("shards", [3]), ("shards", []), ("counts", []), ("tokenizers", {})],
        *[
            ("settings", {"max_length": None}),
            ("settings", {"encoder_positions": [512]}),
            ("settings", {"max_length": 0}),
            ("counts", {"too_long": 1 << 70}),
        ],
    ],
)
@pytest.mark.parametrize("remove", [True, False])
def test_a_damaged_manifest_is_named(key, value, remove, prepared, tmp_path):
    folder = tmp_path / "copy"
    shutil.copytree(prepared.folder, folder)
    manifest = json.loads((folder / "manifest.json").read_text(encoding="utf-8"))
    manifest[key] = value
    if remove:
        del manifest[key]
    (folder / "manifest.json").write_text(json.dumps(manifest), encoding="utf-8")
    with pytest.raises(InputError) as e:
        Prepared(folder)
    assert str(e.value) == f"{folder / 'manifest.json'}: is damaged; copy or prepare the folder again"


def test_a_shard_outside_of_the_folder_is_not_read(prepared, tmp_path):
    folder = tmp_path / "copy"
    shutil.copytree(prepared.folder, folder)
    text = (folder / "manifest.json").read_text(encoding="utf-8")
    (folder / "manifest.json").write_text(text.replace("00000-0000", "../00000-0000"), encoding="utf-8")
    with pytest.raises(InputError, match=r"manifest.json: is damaged"):
        Prepared(folder)


@pytest.mark.parametrize("name", ["vocab.txt", "spiece.model"])
def test_other_tokenizers_than_the_texts_were_prepared_with(name, prepared, tmp_path):
    folder = tmp_path / "copy"
    shutil.copytree(prepared.folder, folder)
    (folder / name).write_bytes((folder / name).read_bytes() + b"\n")
    with pytest.raises(InputError, match=f"{name}: is not the file with which the texts were prepared"):
        Prepared(folder)


@pytest.mark.parametrize("name", ["manifest.json", "held_out.jsonl", "order.npy", "lengths.npy", "00001-0000.npy"])
def test_no_damage_gives_another_error(name, prepared, tmp_path):
    """200 files with some bytes changed, removed or added: each is read, or refused with one line that names a file."""
    folder, rng = tmp_path / "copy", np.random.default_rng(0)
    shutil.copytree(prepared.folder, folder)
    if name != "manifest.json":
        without_hashes(folder)  # they would name every damage
    (folder / "held_out.jsonl").write_text('{"text": "一"}\n' * 20, encoding="utf-8")
    intact, refused = (folder / name).read_bytes(), 0
    for _ in range(200):
        data = bytearray(intact)
        for position in rng.integers(0, min(len(data), 400), rng.integers(1, 4)):
            position %= len(data)
            match rng.integers(3):
                case 0:
                    data[position] = rng.integers(256)
                case 1:
                    del data[position : position + rng.integers(1, 9)]
                case _:
                    data[position:position] = rng.bytes(3) if rng.integers(2) else b"9999999999"
        (folder / name).write_bytes(data)
        try:
            opened = Prepared(folder)
            opened.held_out()
            opened.lengths()
            opened.describe_lines([0, 104])
            ShardBatches(opened, 8, pad_id=2, max_length=40).batch(0)
        except InputError as e:
            refused += 1
            assert str(e).startswith(str(folder)) and "\n" not in str(e)
    assert refused > 100


# A run on them.


def config_of(folder, **kwargs):
    return TrainConfig(model=DEMO.model, data=DataConfig(train=folder), batch_size=8, **kwargs)


def test_a_run_takes_the_prepared_tokenizers(prepared, tokenizer_folder, tmp_path):
    config = config_of(prepared.folder, seed=5)
    corpus = load_corpus(config)
    prepare_tokenizers(config, tmp_path, corpus)
    model = model_config(config, tmp_path)
    tokenizers = load_tokenizers(tmp_path, model)
    batches = make_batches(config, corpus, tokenizers, model)
    text = sentences(100)[int(batches.select_texts(0)[0][0])] if batches.select_texts(0)[0][0] < 100 else None
    lengths = [len(prepared[int(i)][1]) for i in batches.select_texts(0)[0]]
    assert batches.batch(0).lengths[:, 0].tolist() == lengths
    if text is not None:
        assert batches.batch(0).decoder_ids[0, 1 : lengths[0]].tolist() == tokenizers[1].encode(text)
    assert corpus.digest == prepared.digest
    other = tmp_path / "other"
    shutil.copytree(tokenizer_folder, other)
    make_spiece(other, 200)
    (tmp_path / "run").mkdir()
    with pytest.raises(InputError, match=r"spiece.model.* was prepared with; "):
        prepare_tokenizers(config_of(prepared.folder, tokenizers=other), tmp_path / "run", corpus)


def test_documents_that_are_too_long_for_the_encoder(prepare, tokenizer_folder, tmp_path):
    """They are dropped; with --truncate the encoder gets their beginning and the decoder all of them."""
    documents = [" ".join(TEXTS[i : i + 12]) for i in range(0, 240, 12)] + TEXTS[:5]
    path = write_texts(tmp_path / "a.txt", documents)
    small = dict(encoder_positions=30, max_length=2000)
    left_out = prepare(path, **small, output=tmp_path / "left out")
    assert manifest_of(left_out.folder)["counts"]["too_long"] == 20
    found = prepare(path, **small, truncate=True)
    assert manifest_of(found.folder)["counts"] | {"encoder_tokens": 0, "decoder_tokens": 0} == (
        manifest_of(left_out.folder)["counts"] | dict(too_long=0, texts=25, encoder_tokens=0, decoder_tokens=0)
    )
    encoder, decoder = load_new_tokenizers(str(found.folder), 30)
    whole = tokenize(documents, encoder, decoder, max_length=2000, source="", truncate=True)
    expected = [(whole.encoder_ids[i].tolist(), whole.decoder_ids[i].tolist()) for i in range(25)]
    assert sorted(records_of(found.folder)) == sorted(expected)
    assert {len(ids) for ids, _ in expected[:20]} == {30} and min(len(ids) for _, ids in expected[:20]) > 60
    # A training run that reads such texts in another way gets a warning.
    of = lambda folder, **data: truncation_mismatch(  # noqa: E731
        TrainConfig(data=DataConfig(train=folder, **data)), load_corpus(TrainConfig(data=DataConfig(train=folder)))
    )
    assert of(found.folder, segment_length=8) is None and of(left_out.folder) is None
    assert "was prepared with --truncate" in of(found.folder)
    assert "was prepared without --truncate" in of(left_out.folder, segment_length=8)


def test_a_folder_without_the_setting_cut_is_continued(prepare, tmp_path):
    path = write_texts(tmp_path / "a.txt")
    folder = prepare(path).folder
    before = json.loads((folder / "prepare.json").read_text(encoding="utf-8"))
    assert before.pop("cut") is False
    (folder / "prepare.json").write_text(json.dumps(before), encoding="utf-8")
    assert prepare(path).code == 0
    again = prepare(path, truncate=True)
    assert again.code == 2 and "was prepared with other settings: truncate (False, now True)" in again.err


@pytest.mark.slow
def test_a_run_on_prepared_documents(tokenizer_folder, tmp_path):
    """In segments, with the memory."""
    documents = [" ".join(sentences(200)[i : i + 4]) for i in range(0, 200, 4)]
    path = write_texts(tmp_path / "a.txt", documents)
    argv = ["prepare", "--input", path, "--output", tmp_path / "out", "--tokenizers", tokenizer_folder, "--truncate"]
    assert main([*map(str, argv), "--held-out", "0.1", "--max-length", "400", "--encoder-positions", "20"]) == 0
    longest = Prepared(tmp_path / "out").lengths()[0][-1]
    sizes = ["--data.max-length", longest, "--data.segment-length", 16, "--model.decoder.max-memory-length", 16]
    encoder = ["--model.encoder.max-position-embeddings", 20, "--steps", 4, "--log.every", 1]
    options = ["--data.train", tmp_path / "out", *TINY, *sizes, *encoder, "--run-dir", tmp_path / "run"]
    code, _, err = train(*options)
    assert code == 0, err
    assert [m["step"] for m in metrics_of(tmp_path / "run")] == [1, 2, 3, 4]


@pytest.mark.slow
def test_a_run_on_prepared_texts_resumes_bit_for_bit(tokenizer_folder, tmp_path):
    path = write_texts(tmp_path / "a.txt", [text[:9] for text in sentences(200)])
    argv = ["prepare", "--input", path, "--output", tmp_path / "out", "--tokenizers", tokenizer_folder]
    assert main([*map(str, argv), "--held-out", "0.1"]) == 0
    options = ["--data.train", tmp_path / "out", *TINY, "--log.every", 1]
    assert train(*options, "--run-dir", tmp_path / "whole", "--steps", 6)[0] == 0
    stop = ["--run-dir", tmp_path / "parted", "--steps", 6, "--log.checkpoint", 3]
    assert train(*options, *stop)[0] == 0
    shutil.rmtree(tmp_path / "parted" / "checkpoints" / "6")
    code, _, err = train(*options, *stop)
    assert code == 0, err
    values = [[(m["step"], m["loss"], m["kl"]) for m in metrics_of(tmp_path / name)] for name in ("whole", "parted")]
    assert values[0] == values[1]


@pytest.mark.slow
def test_memory_does_not_grow_with_the_texts(tmp_path):
    one, ten = prepare_memory.measure(tmp_path, 2000, [1, 10])
    assert ten["texts"] > 9 * one["texts"]
    for what in ("prepare, peak MB", "read, peak MB"):
        assert ten[what] < 1.1 * one[what]
