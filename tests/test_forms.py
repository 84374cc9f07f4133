"""The same texts in every form that they come in give the same texts, to a run and to `davae prepare`."""

import gzip
import json
import os
import resource
import shutil
import threading

import numpy as np
import pytest
from input_files import TEXTS
from test_prepare import SETTINGS, manifest_of, records_of, tokenizer_folder  # noqa: F401

from davae_jax.cli.train import parse_train
from davae_jax.data.corpus import read_corpus
from davae_jax.data.inputs import bad_lines, line_readers
from davae_jax.data.inputs.bad_lines import BadLineLimit
from davae_jax.data.inputs.file_lines import FileLines
from davae_jax.data.inputs.readers import read_slice, split_into_slices
from davae_jax.data.prepared import shard_writer
from davae_jax.data.prepared.build_shards import build_shards, group_slices
from davae_jax.data.prepared.shard_writer import ShardTask, load_new_tokenizers, write_shards
from davae_jax.data.prepared.shards import Prepared
from davae_jax.data.tokenize import tokenize
from davae_jax.utils.errors import InputError, OptionError
from davae_jax.utils.files import write_json
from davae_jax.utils.open_files import MIN_OPEN, OTHER_FILES, OpenFiles, allow_open_files

TEXTS = [*TEXTS[:60], "二\u2028三\u0085四"]
ROWS = [{"id": i, "text": text, "title": text[:1], "body": text[1:]} for i, text in enumerate(TEXTS)]
STRINGS = ["string", "large_string", "string_view", "dictionary"]
FORMS = ["txt", "TXT", "jsonl", "ndjson", "JSON", "array", "txt.gz", "jsonl.zst", "array.gz", "gb18030", "utf-16"]
FORMS += ["no feed at the end", "carriage returns", "bom", "fields", "files", "folder", "links"]
FORMS += [f"{kind} {strings}" for kind in ("parquet", "arrow", "arrow-file") for strings in STRINGS] + ["dataset"]


def write_form(folder, form):
    """Writes TEXTS into a new folder. Returns the options of both programs: paths, fields, encoding."""
    folder.mkdir()
    lines, rows = "\n".join(TEXTS) + "\n", "".join(json.dumps(row) + "\n" for row in ROWS)
    one = lambda name, data: ((folder / name).write_bytes(data), ([folder / name], ["text"], "utf-8"))[1]  # noqa: E731
    match form.split(" ")[0]:
        case "txt" | "TXT":
            return one(f"a.{form}", lines.encode())
        case "jsonl" | "ndjson" | "JSON":
            return one(f"a.{form}", rows.encode())
        case "array":
            return one("a.json", json.dumps(ROWS, ensure_ascii=False, indent=1).encode())
        case "array.gz":
            return one("a.json.gz", gzip.compress(json.dumps(ROWS).encode()))
        case "txt.gz":
            return one("a.txt.GZ", gzip.compress(lines.encode()))
        case "jsonl.zst":
            return one("a.jsonl.zst", pytest.importorskip("zstandard").ZstdCompressor().compress(rows.encode()))
        case "gb18030" | "utf-16" as encoding:
            return *one("a.txt", lines.encode(encoding))[:2], encoding
        case "no":
            return one("a.txt", lines.encode()[:-1])
        case "carriage":
            return one("a.txt", lines.replace("\n", "\r\n").encode())
        case "bom":
            return one("a.jsonl", b"\xef\xbb\xbf" + rows.encode())
        case "fields":
            joined = [row | {"body": row["body"] or None} for row in ROWS]
            data = json.dumps([{**row, "text": 3} for row in joined], ensure_ascii=False).encode()
            return one("a.json", data)[0], ["title", "body"], "utf-8"
        case "files" | "folder":
            for i, part in enumerate(np.array_split(np.arange(len(TEXTS)), 4)):
                (folder / f"{i}.txt").write_text("".join(f"{TEXTS[k]}\n" for k in part), encoding="utf-8")
            (folder / "empty.txt").touch()
            return [folder] if form == "folder" else sorted(folder.glob("*.txt"), reverse=True), ["text"], "utf-8"
        case "links":
            (folder / "elsewhere").mkdir()
            (folder / "elsewhere" / "a.txt").write_text(lines, encoding="utf-8")
            (folder / "data").mkdir()
            (folder / "data" / "link").symlink_to(folder / "elsewhere")
            return [folder / "data"], ["text"], "utf-8"
        case _:
            return write_table(folder, *form.split(" ")), ["text"], "utf-8"


def write_table(folder, kind, strings="string"):
    pa = pytest.importorskip("pyarrow")
    values = pa.string() if strings == "dictionary" else getattr(pa, strings)()
    column = pa.array(TEXTS, pa.string()).cast(values)
    table = pa.table(
        {"id": range(len(TEXTS)), "text": column.dictionary_encode() if strings == "dictionary" else column}
    )
    if kind == "parquet":
        pytest.importorskip("pyarrow.parquet").write_table(table, folder / "a.parquet", row_group_size=25)
        return [folder / "a.parquet"]
    new = pa.ipc.new_file if kind == "arrow-file" else pa.ipc.new_stream
    with new(folder / "a.arrow", table.schema) as writer:
        writer.write_table(table, max_chunksize=25)
    if kind != "dataset":
        return [folder / "a.arrow"]
    shutil.copy(folder / "a.arrow", folder / "cache-1.arrow")
    (folder / "state.json").write_text(json.dumps({"_data_files": [{"filename": "a.arrow"}]}), encoding="utf-8")
    (folder / "dataset_info.json").write_text("{}", encoding="utf-8")
    return [folder]


@pytest.mark.parametrize("form", FORMS)
def test_every_form_gives_the_same_texts_to_both_programs(form, tokenizer_folder, tmp_path):  # noqa: F811
    paths, fields, encoding = write_form(tmp_path / "in", form)
    separator = "\n" if form == "fields" else ""
    expected = [text[:1] + separator * (len(text) > 1) + text[1:] for text in TEXTS]
    corpus = read_corpus(paths, paths, fields, encoding, 0.0)
    assert corpus.held_out == expected and corpus.train == expected
    settings = SETTINGS._replace(fields=tuple(fields), encoding=encoding)
    build_shards(paths, tmp_path / "out", settings, tokenizer_folder, workers=1, max_bad=0.0)
    ids = tokenize(expected, *load_new_tokenizers(str(tokenizer_folder), 512), max_length=512, source="")
    pairs = zip(ids.encoder_ids, ids.decoder_ids, strict=True)
    assert records_of(tmp_path / "out") == [(e.tolist(), d.tolist()) for e, d in pairs]


@pytest.mark.parametrize("kind", ["parquet", "arrow"])
def test_a_column_of_lists_is_refused_by_both(kind, tokenizer_folder, tmp_path):  # noqa: F811
    pa = pytest.importorskip("pyarrow")
    path, table = tmp_path / f"a.{kind}", pa.table({"text": [[text] for text in TEXTS]})
    if kind == "parquet":
        pytest.importorskip("pyarrow.parquet").write_table(table, path)
    else:
        with pa.ipc.new_stream(path, table.schema) as writer:
            writer.write_table(table)
    for read in (
        lambda: read_corpus([path]),
        lambda: build_shards([path], tmp_path / "out", SETTINGS, tokenizer_folder, workers=1),
    ):
        with pytest.raises(InputError, match="'text' contains list<") as e:
            read()
        assert str(e.value).startswith(f"{path}: ")


def test_options_of_a_run():
    """Given once with several values or several times, as one value as in earlier versions."""
    argv = [
        "--data.train",
        "a",
        "b",
        "--data.field",
        "t",
        "--data.train=c",
        "--data.field",
        "u",
        "--data.encoding",
        "GBK",
    ]
    data = parse_train(argv)[1].data
    assert [str(path) for path in data.train] == ["a", "b", "c"] and data.field == ("t", "u") and data.encoding == "gbk"
    for wrong, option in (
        ("--data.train a --data.field t t", "--data.field"),
        ("--data.train a --data.max-bad 2", "--data.max-bad"),
        ("--data.train a --data.encoding zip", "--data.encoding"),
    ):
        with pytest.raises(OptionError) as e:
            parse_train(wrong.split())
        assert e.value.option == option


def test_a_prepared_folder_is_not_mixed_with_texts(tokenizer_folder, tmp_path):  # noqa: F811
    (tmp_path / "a.txt").write_text("\n".join(TEXTS), encoding="utf-8")
    build_shards([tmp_path / "a.txt"], tmp_path / "out", SETTINGS, tokenizer_folder, workers=1)
    with pytest.raises(OptionError) as e:
        read_corpus([tmp_path / "a.txt", tmp_path / "out"])
    assert e.value.option == "--data.train" and str(tmp_path / "out") in str(e.value)
    assert read_corpus([tmp_path / "out"]).prepared is not None


def test_a_few_bad_lines_are_left_out_with_a_warning(tmp_path):
    """The texts that remain keep the numbers of their lines, counted in their own files."""
    (tmp_path / "a.jsonl").write_text("".join(f'{{"text": "a{i}"}}\n' for i in range(150)), encoding="utf-8")
    rows = [f'{{"text": "b{i}"}}' for i in range(100)]
    (tmp_path / "b.jsonl").write_text("\n".join([*rows[:9], "no", "", *rows[9:]]), encoding="utf-8")
    files = [tmp_path / "b.jsonl", tmp_path / "a.jsonl"]
    with pytest.warns(UserWarning, match=r"b\.jsonl: line 10: is not JSON; 1 of 252 lines"):
        corpus = read_corpus(files, files[1:])
    assert corpus.train[150:160] == [f"b{i}" for i in range(10)] and len(corpus.train) == 250
    assert corpus.files.describe(corpus.lines[[3, 150, 159]]) == f"lines 4 of {files[1]}; lines 1, 12 of {files[0]}"
    with pytest.raises(InputError, match=r"--data\.max-bad 0\.003") as e:
        read_corpus(files, files[1:], max_bad=0.003)
    assert str(e.value).startswith(f"{files[0]}: line 10: ")


# Small files share a shard.


def test_groups_of_slices(tmp_path):
    """Files in their order, each once, up to the size of a shard; a large file by itself."""
    paths = []
    for i, size in enumerate([0, 0, 4, 4, 4, 30, 10, 9, 1, 1]):
        paths.append(tmp_path / f"{i}.txt")
        paths[-1].write_bytes(b"x" * size)
    slices = [split_into_slices(path, 10) for path in paths]
    sizes = [[file_slice.size for file_slice in part] for part in group_slices(slices, 10)]
    assert sizes == [[0, 0, 4, 4], [4], [10], [10], [10], [10], [9, 1], [1]]
    assert [len(part) for part in group_slices(slices, -1)] == [1] * 12


def test_many_small_files_make_few_shards(tokenizer_folder, tmp_path):  # noqa: F811
    """Every text is there once, is traced to its line, and the shards depend on neither workers nor interruptions."""
    texts, data = {}, tmp_path / "data"
    for i in range(300):
        path = data / f"{i % 7}" / f"{i:03}.txt"
        path.parent.mkdir(parents=True, exist_ok=True)
        texts[path] = [TEXTS[i % 60], "", TEXTS[i % 50], "bad \udcff"][: i % 5]
        path.write_text("".join(f"{text}\n" for text in texts[path]), encoding="utf-8", errors="surrogateescape")
    settings = SETTINGS._replace(shard_size=4000)
    counts = build_shards([data], tmp_path / "one", settings, tokenizer_folder, workers=1, max_bad=0.5)
    manifest = manifest_of(tmp_path / "one")
    assert len(list((tmp_path / "one").glob("*.arrayrecord"))) == len(manifest["shards"]) < 12
    prepared, (_, decoder) = Prepared(tmp_path / "one"), load_new_tokenizers(str(tokenizer_folder), 512)
    ordered = [(path, n, text) for path in sorted(texts, key=str) for n, text in enumerate(texts[path], 1)]
    good = [(path, n, text) for path, n, text in ordered if text and "bad" not in text]
    assert len(prepared) == counts["texts"] == len(good)
    for i, (path, n, text) in enumerate(good):
        assert prepared.describe_lines([i]) == f"lines {n} of {path}"
        assert prepared[i][1].tolist()[1:-1] == decoder.encode(text)[:-1]
    listed = [json.loads(line) for line in (tmp_path / "one" / "bad_lines.jsonl").open(encoding="utf-8")]
    assert [(b["file"], b["line"]) for b in listed] == [(str(p), n) for p, n, text in ordered if "bad" in text]
    build_shards([data], tmp_path / "two", settings, tokenizer_folder, workers=2, max_bad=0.5)
    assert {f.name: f.read_bytes() for f in (tmp_path / "one").iterdir()} == {
        f.name: f.read_bytes() for f in (tmp_path / "two").iterdir()
    }


def test_several_shards_of_several_files(tokenizer_folder, tmp_path, monkeypatch):  # noqa: F811
    """Files that turn out to be longer than a shard. The work is stopped at every write, and continued."""
    monkeypatch.setattr(line_readers, "CHUNK_LINES", 7)
    data, lines = tmp_path / "data", []
    data.mkdir()
    for i in range(6):
        path, texts = data / f"{i}.txt.gz", TEXTS[i : i + 9] * i
        path.write_bytes(gzip.compress("\n".join(texts).encode()))
        lines += [(path, n, text) for n, text in enumerate(texts, 1)]
    settings, writes = SETTINGS._replace(shard_size=900), [0]

    def stop_at_a_write(path, values):
        writes[0] -= 1
        if writes[0] == 0:
            raise KeyboardInterrupt
        write_json(path, values)

    build_shards([data], tmp_path / "whole", settings, tokenizer_folder, workers=1)
    monkeypatch.setattr(shard_writer, "write_json", stop_at_a_write)
    for stop in range(1, 20):
        writes[0] = 1 + stop % 2
        try:
            build_shards([data], tmp_path / "out", settings, tokenizer_folder, workers=1)
            break
        except KeyboardInterrupt:
            assert not (tmp_path / "out" / "manifest.json").exists()
    manifest = manifest_of(tmp_path / "out")
    assert manifest == manifest_of(tmp_path / "whole") and len(manifest["shards"]) > 4
    assert any(shard.get("files", [["", 1]])[0][1] > 1 for shard in manifest["shards"])
    prepared, (_, decoder) = Prepared(tmp_path / "out"), load_new_tokenizers(str(tokenizer_folder), 512)
    assert len(prepared) == len(lines)
    for i, (path, n, text) in enumerate(lines):
        assert prepared.describe_lines([i]) == f"lines {n} of {path}"
        assert prepared[i][1].tolist()[1:-1] == decoder.encode(text)[:-1]


def test_work_is_continued_at_the_line_whatever_the_chunks_were(tokenizer_folder, tmp_path, monkeypatch):  # noqa: F811
    """Another version may gather other numbers of lines."""
    path = tmp_path / "a.txt.gz"
    path.write_bytes(gzip.compress("\n".join(TEXTS).encode()))
    settings, written = SETTINGS._replace(shard_size=700), []

    def stop_after_two(path, values):
        write_json(path, values)
        written.append(path)
        if len(written) == 2:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(line_readers, "CHUNK_LINES", 7)
        patch.setattr(shard_writer, "write_json", stop_after_two)
        build_shards([path], tmp_path / "out", settings, tokenizer_folder, workers=1)
    monkeypatch.setattr(line_readers, "CHUNK_LINES", 5)
    build_shards([path], tmp_path / "out", settings, tokenizer_folder, workers=1)
    build_shards([path], tmp_path / "whole", SETTINGS, tokenizer_folder, workers=1)
    assert len(manifest_of(tmp_path / "out")["shards"]) > 2
    assert records_of(tmp_path / "out") == records_of(tmp_path / "whole")
    everything = range(len(TEXTS))
    prepared, whole = Prepared(tmp_path / "out"), Prepared(tmp_path / "whole")
    assert prepared.describe_lines(everything) == whole.describe_lines(everything)


def test_work_that_an_earlier_version_began_is_continued_its_way(tokenizer_folder, tmp_path, monkeypatch):  # noqa: F811
    """One shard per file, with the statistics of that time."""
    paths = [tmp_path / f"{i}.txt" for i in range(3)]
    for path in paths:
        path.write_text("\n".join(TEXTS), encoding="utf-8")

    def stop(task, *_):
        write_shards(task)
        if task.number == 1:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr("davae_jax.data.prepared.build_shards.SHARED", "absent")  # the setting, and so the grouping
        patch.setattr("davae_jax.data.prepared.build_shards.group_slices", lambda slices, _: group_slices(slices, -1))
        patch.setattr("davae_jax.data.prepared.build_shards.write_shards", stop)
        build_shards(paths, tmp_path / "out", SETTINGS, tokenizer_folder, workers=1)
    stored = json.loads((tmp_path / "out" / "prepare.json").read_text(encoding="utf-8"))
    del stored["absent"]
    (tmp_path / "out" / "prepare.json").write_text(json.dumps(stored), encoding="utf-8")
    for path in (tmp_path / "out" / "parts").glob("*.json"):
        stats = json.loads(path.read_text(encoding="utf-8"))
        ((stats["file"], _),) = stats.pop("files")
        path.write_text(json.dumps(stats), encoding="utf-8")
    build_shards(paths, tmp_path / "out", SETTINGS, tokenizer_folder, workers=1)
    assert "shared" not in manifest_of(tmp_path / "out")["settings"]
    prepared = Prepared(tmp_path / "out")
    assert [shard["name"] for shard in prepared.shards] == ["00000-0000", "00001-0000", "00002-0000"]
    assert (
        prepared.describe_lines([0, 61, 182]) == f"lines 1 of {paths[0]}; lines 1 of {paths[1]}; lines 61 of {paths[2]}"
    )


def test_numbers_of_lines_over_several_files():
    files = FileLines(["a", "b", "c"], [-9, 1, 4])
    assert [files.locate(n) for n in (-9, 0, 1, 3, 4, 99)] == [
        ("a", 1),
        ("a", 10),
        ("b", 1),
        ("b", 3),
        ("c", 1),
        ("c", 96),
    ]


# Open files.


class Reader:
    def __init__(self, number, log):
        self.number, self.is_open, self.log = number, True, log
        log.append(number)

    def close(self):
        assert self.is_open
        self.is_open = False


def test_the_least_recently_used_files_are_closed():
    opened = []
    files = OpenFiles(lambda n: Reader(n, opened), 2)
    for number in [0, 1, 0, 2, 0, 1, 2]:
        with files.use(number) as reader:
            assert reader.number == number and reader.is_open
    assert opened == [0, 1, 2, 1, 2]


def test_files_in_use_are_not_closed():
    files, errors = OpenFiles(lambda n: Reader(n, []), 3), []

    def work(seed):
        for number in np.random.default_rng(seed).integers(0, 12, 3000).tolist():
            with files.use(number) as reader:
                if reader.number != number or not reader.is_open:
                    errors.append(number)

    threads = [threading.Thread(target=work, args=[seed]) for seed in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not errors and len(files._files) <= 3 + len(threads)


def test_more_shards_than_files_may_be_open(tokenizer_folder, tmp_path, monkeypatch):  # noqa: F811
    """A run reads them all, with at most as many open as the limit leaves."""
    path = tmp_path / "a.txt"
    path.write_text("\n".join(TEXTS * 2), encoding="utf-8")
    build_shards([path], tmp_path / "out", SETTINGS._replace(shard_size=100), tokenizer_folder, workers=1)
    expected = records_of(tmp_path / "out")
    monkeypatch.setattr(resource, "setrlimit", lambda *_: None)
    monkeypatch.setattr(resource, "getrlimit", lambda _: (OTHER_FILES + 20, OTHER_FILES + 20))
    assert allow_open_files(1000) == 20 and allow_open_files(5) == 5
    prepared, before = Prepared(tmp_path / "out"), len(os.listdir("/proc/self/fd"))
    assert len(prepared.shards) > 25
    found = [tuple(ids.tolist() for ids in prepared[i]) for i in range(len(prepared))]
    assert found == expected and len(os.listdir("/proc/self/fd")) <= before + 20
    monkeypatch.setattr(resource, "getrlimit", lambda _: (100, 100))
    assert allow_open_files(1000) == MIN_OPEN


# Too many bad lines, before the end.


def test_the_limit_of_bad_lines():
    limit = BadLineLimit(0.01, 1 << 30)
    assert limit.is_exceeded(1000, 11) and not limit.is_exceeded(1000, 10)
    assert not limit.will_be_exceeded(9_999, 9_999, 1 << 20) and limit.will_be_exceeded(10_000, 5001, 1 << 20)
    assert not limit.will_be_exceeded(10_000, 5000, 1 << 20)
    # An eighth has been read: 80,000 lines are expected, of which 800 may be bad.
    assert limit.will_be_exceeded(10_000, 1601, 1 << 27) and not limit.will_be_exceeded(10_000, 1600, 1 << 27)
    assert not limit.will_be_exceeded(10_000, 1601, 1 << 25)  # too little to estimate by
    assert BadLineLimit(0.0, 9).will_be_exceeded(1, 1, 0) and not BadLineLimit(0.0, 9).will_be_exceeded(99_999, 0, 0)
    assert not BadLineLimit(1.0, 1 << 30).will_be_exceeded(99_999, 99_999, 1 << 29)
    assert not BadLineLimit(0.6, 1 << 30).will_be_exceeded(99_999, 99_999, 1 << 27)


def test_no_corpus_that_would_pass_is_refused_by_the_estimate():
    """Of lines of equal length, however the bad ones are distributed, unless they are half of 10,000."""
    rng = np.random.default_rng(0)
    for _ in range(300):
        blocks = rng.random(1000) < rng.uniform(0, 0.02)  # each 1,000 lines
        bad, limit = np.cumsum(blocks * rng.integers(1, 500, 1000)), BadLineLimit(0.01, 1 << 30)
        read = np.arange(1, 1001)
        early = [limit.will_be_exceeded(1000 * n, b, n * (1 << 30) / 1000) for n, b in zip(read.tolist(), bad.tolist())]
        assert limit.is_exceeded(1_000_000, bad[-1]) or not any(early)


@pytest.mark.parametrize("workers", [1, 2])
def test_overwhelmingly_bad_input_fails_before_its_end(workers, tokenizer_folder, tmp_path):  # noqa: F811
    (tmp_path / "a.jsonl").write_text('{"body": "x"}\n' * 400_000, encoding="utf-8")
    settings = SETTINGS._replace(shard_size=1 << 20)
    with pytest.raises(InputError, match="has no field 'text'") as e:
        build_shards([tmp_path / "a.jsonl"], tmp_path / "out", settings, tokenizer_folder, workers)
    assert "--max-bad 0.01" in str(e.value) and not (tmp_path / "out" / "manifest.json").exists()
    assert len(list((tmp_path / "out" / "parts").glob("*.json"))) <= 1 and not list((tmp_path / "out").glob(".*"))
    with pytest.raises(InputError, match=r"--data\.max-bad 0\.01"):
        read_corpus([tmp_path / "a.jsonl"])


def test_the_bad_lines_of_finished_shards_count(tokenizer_folder, tmp_path, monkeypatch):  # noqa: F811
    """The work is resumed with a lower limit: no line is read."""
    monkeypatch.setattr(bad_lines, "MIN_LINES", 40)
    path, read = tmp_path / "a.jsonl", []
    path.write_text('{"body": "x"}\n' * 100 + '{"text": "一"}\n' * 100, encoding="utf-8")
    slices = split_into_slices(path, 700)
    folder = tmp_path / "out"
    shutil.copytree(tokenizer_folder, folder)
    (folder / "parts").mkdir()
    tasks = [ShardTask(str(folder), n, [part], SETTINGS._replace(shard_size=700)) for n, part in enumerate(slices)]
    totals = np.zeros(3)

    def report(*numbers):
        totals[:] += numbers
        return totals.tolist()

    write_shards(tasks[0], report)
    before = totals.tolist()
    assert before == [slices[0].size, 43, 43]
    totals[:] = 0
    monkeypatch.setattr(shard_writer, "read_slice", lambda *args: read.append(args) or read_slice(*args))
    with pytest.raises(InputError, match=f"{path}: line 1: has no field"):
        write_shards(tasks[0]._replace(limit=BadLineLimit(0.01, 0)), report)
    assert not read and totals.tolist() == before
