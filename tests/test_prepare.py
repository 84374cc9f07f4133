"""`davae prepare`, and the batches of what it makes."""

import gzip
import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from test_train import TINY, metrics_of, train
from tokenizer_fixtures import make_spiece, make_vocab, sentences

from davae_jax.cli.main import main
from davae_jax.data import line_readers
from davae_jax.data.line_readers import MAX_LINE_BYTES
from davae_jax.data.prefetch import prefetch
from davae_jax.data.readers import find_files, read_slice, split_into_slices
from davae_jax.data.shard_batches import PreparedBatches, PreparedTexts, permuted
from davae_jax.data.shard_index import merge_shards
from davae_jax.data.shard_writer import ShardSettings, ShardTask, load_new_tokenizers, write_shards
from davae_jax.data.shards import Prepared, decode_record, encode_record, id_dtype
from davae_jax.data.tokenize import tokenize
from davae_jax.tokenizers.load import load_tokenizers
from davae_jax.training.config import DataConfig, TrainConfig
from davae_jax.training.presets import DEMO
from davae_jax.training.setup import batches_of, model_config, prepare_tokenizers, read_corpus, truncation_mismatch
from davae_jax.utils.errors import InputError

ROOT = Path(__file__).parent.parent
TEXTS = sentences(300)


@pytest.fixture(scope="session")
def tokenizer_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokenizers")
    make_spiece(folder)
    make_vocab(folder)
    return folder


@pytest.fixture
def prepare(capsys, tokenizer_folder, tmp_path):
    """Runs the command in this process, into tmp_path/out unless told otherwise."""

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


def text_file(path, texts=TEXTS):
    path.write_text("".join(f"{text}\n" for text in texts), encoding="utf-8")
    return path


def records_of(folder):
    prepared = Prepared(folder)
    return [tuple(ids.tolist() for ids in prepared[i]) for i in range(len(prepared))]


def manifest_of(folder):
    return json.loads((folder / "manifest.json").read_text(encoding="utf-8"))


# What the shards hold.


def write_kind(folder, kind):
    """The texts in a file, or a dataset's folder, of this kind."""
    folder.mkdir()
    pa = pytest.importorskip("pyarrow") if kind in ("parquet", "arrow", "arrow-file") else None
    rows = "".join(json.dumps({"id": i, "text": text}) + "\n" for i, text in enumerate(TEXTS)).encode()
    match kind:
        case "txt":
            return text_file(folder / "a.txt")
        case "txt.gz":
            (folder / "a.txt.gz").write_bytes(gzip.compress("\r\n".join(TEXTS).encode()))
            return folder / "a.txt.gz"
        case "jsonl" | "folder":
            (folder / "a.jsonl").write_bytes(rows)
            (folder / "README.md").write_text("no data", encoding="utf-8")
            return folder if kind == "folder" else folder / "a.jsonl"
        case "jsonl.gz":
            (folder / "a.jsonl.gz").write_bytes(gzip.compress(rows[:5000]) + gzip.compress(rows[5000:]))
        case "jsonl.zst":
            compress = pytest.importorskip("zstandard").ZstdCompressor().compress
            (folder / "a.jsonl.zst").write_bytes(compress(rows[:5000]) + compress(rows[5000:]))  # two frames
        case "parquet":
            table = pa.table({"text": TEXTS, "id": range(len(TEXTS))})
            pytest.importorskip("pyarrow.parquet").write_table(table, folder / "train-00000.parquet", row_group_size=70)
        case _:  # a folder as the `datasets` library saves it
            table = pa.table({"text": TEXTS})
            new = pa.ipc.new_stream if kind == "arrow" else pa.ipc.new_file
            with new(folder / "data-00000-of-00001.arrow", table.schema) as writer:
                writer.write_table(table, max_chunksize=70)
            (folder / "state.json").write_text("{}", encoding="utf-8")
            (folder / "dataset_info.json").write_text("{}", encoding="utf-8")
    return folder


KINDS = ["txt", "txt.gz", "jsonl", "jsonl.gz", "jsonl.zst", "parquet", "arrow", "arrow-file", "folder"]


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_input_gives_the_ids_that_training_on_text_gives(kind, prepare, tmp_path):
    result = prepare(write_kind(tmp_path / "in", kind))
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


def lines_of(pieces, field="text"):
    return [line for piece in pieces for chunk in read_slice(piece, field) for line in chunk.lines]


@pytest.mark.parametrize("at_most", [1, 7, 100, 5000, 1 << 30])
def test_pieces_of_a_file_are_its_lines_each_once(at_most, tmp_path):
    path = tmp_path / "a.txt"
    path.write_bytes("\ufeff一\n\n二\u2028二\r\n".encode() + b"\xff\n" + "三\n".encode() * 20 + b"last")
    wanted = ["一", "", "二\u2028二", None, *["三"] * 20, "last"]
    pieces = split_into_slices(path, at_most)
    assert [line.text for line in lines_of(pieces)] == wanted
    assert sum(piece.size for piece in pieces) == pytest.approx(path.stat().st_size, abs=len(pieces))


@pytest.mark.parametrize("at_most", [1, 4000, 1 << 30])
def test_pieces_of_a_parquet_file(at_most, tmp_path):
    path = write_kind(tmp_path / "in", "parquet") / "train-00000.parquet"
    pieces = split_into_slices(path, at_most)
    assert [line.text for line in lines_of(pieces)] == TEXTS
    assert len(pieces) == {1: 5, 1 << 30: 1}.get(at_most, len(pieces))


def test_a_line_without_end_is_passed_over(tmp_path):
    path = tmp_path / "a.txt"
    path.write_bytes(b"one\n" + b"x" * (MAX_LINE_BYTES + 5) + b"\ntwo\n")
    assert [(line.text, line.problem) for line in lines_of(split_into_slices(path, 1 << 30))] == [
        ("one", None),
        (None, "is longer than 16 MiB"),
        ("two", None),
    ]


def test_a_file_that_cannot_be_entered_in_the_middle_makes_several_shards(tokenizer_folder, tmp_path, monkeypatch):
    """And a start behind the second of them makes the same third."""
    monkeypatch.setattr(line_readers, "CHUNK_LINES", 20)
    path = write_kind(tmp_path / "in", "txt.gz")

    def task(name):
        folder = tmp_path / name
        shutil.copytree(tokenizer_folder, folder)
        (folder / "parts").mkdir()
        return ShardTask(
            str(folder), 0, *split_into_slices(path, 2000), ShardSettings("text", 512, 512, False, 0.1, 2000)
        )

    whole, again = task("whole"), task("again")
    write_shards(whole)
    shards = sorted(path.name for path in Path(whole.folder).glob("*.arrayrecord"))
    assert len(shards) > 3 and shards[2] == "00000-0002.arrayrecord"
    write_shards(again)
    for made in [*Path(again.folder).glob("00000-0002.*"), *Path(again.folder, "parts").glob("00000-0002.*")]:
        made.unlink()
    write_shards(again)
    for task in (whole, again):
        merge_shards(Path(task.folder), {"inputs": {str(path): ""}, "encoder_positions": 512})
    assert manifest_of(Path(whole.folder)) == manifest_of(Path(again.folder))
    kept = Prepared(Path(whole.folder)).held_out()
    expected = tokenize(TEXTS, *load_new_tokenizers(whole.folder, 512), max_length=512, source="")
    pairs = zip(TEXTS, expected.decoder_ids, strict=True)
    trained = [row.tolist() for text, row in pairs if text not in set(kept)]
    assert [row for _, row in records_of(Path(again.folder))] == trained


def test_bad_lines_are_counted_and_listed(prepare, tmp_path):
    """Texts with 60 bytes or more are blank, too long, or bad for one reason each; lines count from a file's first."""
    lines = [json.dumps({"text": text}) for text in TEXTS[:3]]
    bad = ["not json", '{"body": 1}', '{"text": 3}', '{"text": "\\ud83d"}', '["text"]']
    (tmp_path / "a.jsonl").write_text("\n".join([lines[0], *bad, "", lines[1], '{"text": " "}']), encoding="utf-8")
    (tmp_path / "b.jsonl").write_bytes(f"{lines[2]}\n".encode() + b"\xff\n" + json.dumps({"text": "很" * 600}).encode())
    result = prepare(tmp_path / "b.jsonl", tmp_path / "a.jsonl")
    assert result.code == 0 and "2 blank, 1 too long, 6 bad lines (bad_lines.jsonl)" in result.out
    listed = [json.loads(line) for line in (result.folder / "bad_lines.jsonl").open(encoding="utf-8")]
    assert [(Path(b["file"]).name, b["line"], b["problem"]) for b in listed] == [
        ("a.jsonl", 2, "is not JSON"),
        ("a.jsonl", 3, "has no field 'text'"),
        ("a.jsonl", 4, "the field 'text' is not a text"),
        ("a.jsonl", 5, "the field 'text' holds half of a surrogate pair"),
        ("a.jsonl", 6, "has no field 'text'"),
        ("b.jsonl", 2, "is not UTF-8"),
    ]
    prepared = Prepared(result.folder)
    assert len(prepared) == 3
    a, b = tmp_path / "a.jsonl", tmp_path / "b.jsonl"
    assert prepared.where([2, 0, 1]) == f"lines 1, 8 of {a}; lines 1 of {b}"


def test_what_is_held_out_is_not_trained_on(prepare, tmp_path):
    """All copies of a text are kept apart, whatever file they stand in."""
    files = [text_file(tmp_path / "a.txt"), text_file(tmp_path / "b.txt", [*TEXTS[::-1], "今天很好。"])]
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
    result = prepare(text_file(tmp_path / "a.txt"), tokenizers=None, decoder_vocab_size=200, encoder_vocab_size=150)
    assert result.code == 0
    encoder, decoder = load_new_tokenizers(str(result.folder), 512)
    assert 100 < encoder.size <= 150 and 100 < decoder.size <= 200
    assert decoder.decode(Prepared(result.folder)[7][1][1:-1]) == TEXTS[7]
    few = prepare(tmp_path / "a.txt", tokenizers=None, decoder_vocab_size=20, output=tmp_path / "few")
    assert few.code == 2 and few.err.startswith("davae prepare: error: --decoder-vocab-size 20: the texts have ")
    assert prepare(tmp_path / "a.txt", output=tmp_path / "few").code == 0  # nothing stood there yet


# Killed, started again, refused.


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}


def test_killed_and_started_again_gives_the_same_bytes(prepare, tokenizer_folder, tmp_path):
    files = [text_file(tmp_path / f"{i:02}.txt", sentences(1000, seed=i)) for i in range(8)]
    command = [sys.executable, "-m", "davae_jax.cli", "prepare", "--input", *files, "--tokenizers", tokenizer_folder]
    command += ["--output", tmp_path / "killed", "--workers", 2, "--held-out", 0]
    killed = subprocess.Popen(list(map(str, command)), env=os.environ | {"JAX_PLATFORMS": "cpu"}, cwd=ROOT)
    while len(list((tmp_path / "killed").glob("parts/*.json"))) < 3:
        assert killed.poll() is None
        time.sleep(0.02)
    killed.send_signal(signal.SIGKILL)
    killed.wait()
    assert not (tmp_path / "killed" / "manifest.json").exists()
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "killed").glob("*.arrayrecord")}
    assert len(before) >= 3
    assert prepare(*files, output=tmp_path / "killed").code == 0
    assert prepare(*files, output=tmp_path / "whole").code == 0
    kept = sum(path.stat().st_mtime_ns == when for path, when in before.items())
    assert kept >= 3  # a shard whose notes were not yet written is made anew
    assert contents(tmp_path / "killed") == contents(tmp_path / "whole")


def test_other_settings_are_refused(prepare, tmp_path):
    path = text_file(tmp_path / "a.txt")
    assert prepare(path).code == 0
    before = contents(tmp_path / "out")
    again = prepare(path)
    assert again.code == 0 and contents(tmp_path / "out") == before
    other = prepare(path, max_length=64)
    assert other.code == 2
    assert other.err.strip() == (
        f"davae prepare: error: {tmp_path / 'out'}: was prepared with other settings: max_length (512, now 64); "
        "give another --output"
    )
    os.utime(path, (1, 1))
    changed = prepare(path)
    assert changed.code == 2 and f"inputs.{path} (" in changed.err and changed.err.count("\n") == 1
    assert contents(tmp_path / "out") == before


@pytest.mark.parametrize(
    ("make", "code", "said"),
    [
        (lambda p: p / "none.txt", 2, "none.txt: no such file or folder"),
        (lambda p: (p / "a.pdf").touch() or p / "a.pdf", 2, "a.pdf: unknown suffix; known: .txt, .jsonl"),
        (lambda p: (p / "d").mkdir() or p / "d", 2, "d: holds no file of a known format"),
        (lambda p: (p / "a.txt").write_text("\n \n") and p / "a.txt", 1, "2 blank; nothing is left"),
        (lambda p: (p / "a.txt").touch() or p / "a.txt", 1, "holds no text; nothing is left"),
        (lambda p: (p / "a.txt.gz").write_bytes(b"text") and p / "a.txt.gz", 1, "a.txt.gz: cannot be read (Not a gzip"),
        (lambda p: (p / "a.parquet").write_bytes(b"PAR1") and p / "a.parquet", 1, "a.parquet: cannot be read ("),
        (lambda p: (p / "a.arrow").write_bytes(b"ARROW1") and p / "a.arrow", 1, "a.arrow: cannot be read ("),
    ],
)
def test_inputs_that_cannot_be_used(make, code, said, prepare, tmp_path):
    result = prepare(make(tmp_path))
    assert result.code == code and said in result.err and result.err.strip().count("\n") == 0
    assert not (tmp_path / "out" / "manifest.json").exists()


@pytest.mark.parametrize("kind", ["jsonl.gz", "jsonl.zst"])
def test_a_compressed_file_that_was_cut(kind, prepare, tmp_path):
    folder = write_kind(tmp_path / "in", kind)
    path = folder / f"a.{kind}"
    path.write_bytes(path.read_bytes()[:-20])
    result = prepare(folder)
    assert result.code == 1 and f"{path}: cannot be read (" in result.err
    assert not (tmp_path / "out" / "manifest.json").exists()


def test_options_and_columns_that_cannot_be(prepare, tmp_path):
    table = write_kind(tmp_path / "in", "parquet") / "train-00000.parquet"
    assert "has no column 'body'; its columns are text, id; choose one with --field" in prepare(table, field="body").err
    assert "the column 'id' holds int64, not text" in prepare(table, field="id", output=tmp_path / "b").err
    text_file(tmp_path / "in" / "a.txt")
    mixed = prepare(tmp_path / "in", output=tmp_path / "c")
    assert mixed.code == 2 and "holds files of several formats (parquet, text); give the files themselves" in mixed.err
    assert "--workers must be at least 1, not 0" in prepare(table, workers=0).err
    assert "--held-out must be at least 0 and below 1, not 1.0" in prepare(table, held_out=1.0).err
    foreign = text_file(tmp_path / "foreign.txt").parent
    refused = prepare(table, output=foreign)
    assert refused.code == 2 and "holds files, but no prepared texts" in refused.err


def test_a_full_disk_leaves_no_half_shard(prepare, tmp_path):
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    path = text_file(tmp_path / "a.txt", ["".join(sentences(10, seed=i)) for i in range(1500)])
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
    assert prepare(path).code == 0  # room was made


# The batches.


@pytest.fixture(scope="session")
def prepared(tokenizer_folder, tmp_path_factory):
    folder = tmp_path_factory.mktemp("prepared")
    files = [text_file(folder / f"{i}.txt", sentences(n, seed=i)) for i, n in enumerate((100, 3, 144))]
    argv = ["prepare", "--input", *files, "--output", folder / "out", "--tokenizers", tokenizer_folder]
    assert main([*map(str, argv), "--workers", "1", "--held-out", "0"]) == 0
    return Prepared(folder / "out")


def batches_with(prepared, batch_size=8, **kwargs):
    return PreparedBatches(prepared, batch_size, **{"pad_id": 301, "buckets": 3, "seed": 5} | kwargs)


def assert_equal(a, b):
    assert all(x.shape == y.shape and (x == y).all() for x, y in zip(a, b, strict=True))


@pytest.mark.parametrize("n", [1, 2, 3, 16, 17, 1000, 4097])
def test_a_permutation_that_is_not_stored(n):
    places = np.arange(n)
    found = permuted(places, n, (3, 1))
    assert sorted(found) == places.tolist()
    assert (permuted(places[::-1], n, (3, 1))[::-1] == found).all()  # each place by itself
    if n >= 16:
        assert (found != permuted(places, n, (3, 2))).any() and (found != places).any()


def test_the_permutations_are_shuffles():
    """Over seeds, every place goes everywhere as often: χ² with 19² degrees of freedom lies within 6 deviations."""
    n, seeds = 20, 400
    counts = np.zeros((n, n))
    for seed in range(seeds):
        counts[np.arange(n), permuted(np.arange(n), n, (seed,))] += 1
    chi2 = ((counts - seeds / n) ** 2 / (seeds / n)).sum()
    freedom = (n - 1) ** 2
    assert abs(chi2 - freedom) < 6 * (2 * freedom) ** 0.5


def test_an_epoch_shows_every_text_once(prepared):
    batches = batches_with(prepared)
    assert (batches.count, batches.per_epoch) == (247, 30)
    for epoch in range(2):
        rows = np.concatenate([batches.rows(epoch * 30 + i)[0] for i in range(30)])
        assert len(set(rows)) == 240  # of 247, seven wait
    shown = {int(row) for step in range(300) for row in batches.rows(step)[0]}
    assert shown == set(range(247))


def test_batches_hold_the_records_padded(prepared):
    batches, shapes = batches_with(prepared), set()
    for step in range(30):
        rows, (S, T) = batches.rows(step)
        batch = batches[step]
        assert batch.encoder_ids.shape == (8, S) and batch.decoder_ids.shape == (8, T)
        shapes.add((S, T))
        for row, e, d, n in zip(rows, *batch, strict=True):
            encoder_row, decoder_row = prepared[int(row)]
            assert n == len(decoder_row) and (d[:n] == decoder_row).all() and (d[n:] == 301).all()
            assert (e[: len(encoder_row)] == encoder_row).all() and (e[len(encoder_row) :] == 0).all()
    assert 1 < len(shapes) <= 3


def test_a_batch_depends_on_seed_and_step_alone(prepared):
    batches, again = batches_with(prepared), batches_with(prepared)
    uninterrupted = [batches[step] for step in range(40)]
    for step in [37, 3, 4, 5, 0, 3]:  # as after a resume, forwards and back
        assert_equal(again[step], uninterrupted[step])
    other = batches_with(prepared, seed=6)
    assert any((other.rows(step)[0] != batches.rows(step)[0]).any() for step in range(4))
    assert any((batches.rows(step)[0] != batches.rows(step + 30)[0]).any() for step in range(4))  # epochs differ


@pytest.mark.parametrize("processes", [1, 2, 4])
def test_processes_together_read_the_one_process_batch(processes, prepared):
    """From step 17 on, in background threads."""
    whole, own = batches_with(prepared), 8 // processes
    coming = [prefetch(batches_with(prepared), [(i * own, (i + 1) * own)], 17, threads=4) for i in range(processes)]
    for step in range(17, 35):
        parts = [part for process in coming for part in next(process).values()]
        assert_equal([np.concatenate(x) for x in zip(*parts, strict=True)], whole[step])
        assert all(len(batch.lengths) == own for batch in parts)


def test_shorter_texts_only(prepared):
    lengths = [len(prepared[i][1]) for i in range(len(prepared))]
    limit = sorted(lengths)[100]
    batches = batches_with(prepared, max_length=limit)
    assert batches.count == sum(n <= limit for n in lengths) and batches.too_long == 247 - batches.count
    shown = {int(row) for step in range(300) for row in batches.rows(step)[0]}
    assert shown == {i for i, n in enumerate(lengths) if n <= limit}
    with pytest.raises(InputError, match="holds no text of at most 3 tokens"):
        batches_with(prepared, max_length=3)
    with pytest.raises(InputError, match="and the model's encoder 12 positions; prepare with --encoder-positions 12"):
        batches_with(prepared, encoder_positions=12)
    with pytest.raises(InputError, match="and the model's encoder 12 positions; prepare with --encoder-positions 12"):
        PreparedTexts(prepared, 100, encoder_positions=12)


def test_fewer_texts_than_a_batch(prepared):
    batches = batches_with(prepared, batch_size=256)
    assert set(batches.rows(0)[0]) == set(range(247)) and len(batches[7].lengths) == 256


def test_what_is_missing_or_damaged_is_named(prepared, tmp_path):
    folder = tmp_path / "copy"
    shutil.copytree(prepared.folder, folder)
    shard = folder / "00001-0000.arrayrecord"
    data = shard.read_bytes()
    shard.unlink()
    with pytest.raises(InputError) as error:
        Prepared(folder)
    assert str(error.value) == f"{shard}: a shard of the manifest cannot be read (No such file or directory)"
    shard.write_bytes(data[:-1])
    with pytest.raises(InputError, match=rf"has {len(data) - 1} bytes, but {len(data)} in the manifest"):
        Prepared(folder)
    shard.write_bytes(bytes(len(data)))
    with pytest.raises(InputError, match=r"00001-0000.arrayrecord: record 1 cannot be read \("):
        Prepared(folder)[101]
    (folder / "manifest.json").unlink()
    with pytest.raises(InputError, match=r"holds no manifest.json; `davae prepare` writes it when all shards are done"):
        Prepared(folder)


# A run on them.


def config_of(folder, **kwargs):
    return TrainConfig(model=DEMO.model, data=DataConfig(train=folder), batch_size=8, **kwargs)


def test_a_run_takes_the_prepared_tokenizers(prepared, tokenizer_folder, tmp_path):
    config = config_of(prepared.folder, seed=5)
    corpus = read_corpus(config)
    prepare_tokenizers(config, tmp_path, corpus)
    model = model_config(config, tmp_path)
    tokenizers = load_tokenizers(tmp_path, model)
    batches = batches_of(config, corpus, tokenizers, model)
    text = sentences(100)[int(batches.rows(0)[0][0])] if batches.rows(0)[0][0] < 100 else None
    lengths = [len(prepared[int(i)][1]) for i in batches.rows(0)[0]]
    assert batches[0].lengths.tolist() == lengths
    if text is not None:
        assert batches[0].decoder_ids[0, 1 : lengths[0]].tolist() == tokenizers[1].encode(text)
    assert corpus.digest == prepared.digest
    other = tmp_path / "other"
    shutil.copytree(tokenizer_folder, other)
    make_spiece(other, 200)
    (tmp_path / "run").mkdir()
    with pytest.raises(InputError, match=r"spiece.model: is not what .* was prepared with; prepare with --tokenizers"):
        prepare_tokenizers(config_of(prepared.folder, tokenizers=other), tmp_path / "run", corpus)


def test_documents_that_the_encoder_cannot_read_whole(prepare, tokenizer_folder, tmp_path):
    """Left out, or with --truncate kept: the encoder gets the beginning, the decoder all."""
    documents = [" ".join(TEXTS[i : i + 12]) for i in range(0, 240, 12)] + TEXTS[:5]
    path = text_file(tmp_path / "a.txt", documents)
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
    # Runs are told where they read such texts in another way.
    of = lambda folder, **data: truncation_mismatch(  # noqa: E731
        TrainConfig(data=DataConfig(train=folder, **data)), read_corpus(TrainConfig(data=DataConfig(train=folder)))
    )
    assert of(found.folder, segment_length=8) is None and of(left_out.folder) is None
    assert "was prepared with --truncate" in of(found.folder)
    assert "was prepared without --truncate" in of(left_out.folder, segment_length=8)


def test_what_was_prepared_before_there_was_cut_is_gone_on_with(prepare, tmp_path):
    path = text_file(tmp_path / "a.txt")
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
    path = text_file(tmp_path / "a.txt", documents)
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
    path = text_file(tmp_path / "a.txt", [text[:9] for text in sentences(200)])
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
    script = ROOT / "benchmarks" / "prepare_memory.py"
    command = [sys.executable, script, tmp_path, "--texts", "2000", "--scales", "1", "10", "--json"]
    found = json.loads(subprocess.run(list(map(str, command)), check=True, stdout=subprocess.PIPE, text=True).stdout)
    one, ten = found
    assert ten["texts"] > 9 * one["texts"]
    for what in ("prepare_mb", "read_mb"):
        assert ten[what] < 1.1 * one[what]


def test_find_files(tmp_path):
    (tmp_path / ".cache").mkdir()
    for name in ("b.jsonl", "a.jsonl.gz", ".cache/c.jsonl", "dataset_info.json"):
        (tmp_path / name).touch()
    assert find_files([tmp_path, tmp_path / "b.jsonl"]) == [tmp_path / "a.jsonl.gz", tmp_path / "b.jsonl"]
