"""Writes the shards of one task: of a slice of a large file, or of several small files.

A task becomes one shard, or several if a file that cannot be split turns out to be long. For every shard, `parts/`
contains NAME.json, its statistics, and NAME.jsonl, its held-out texts. The statistics are written last: a shard that
has them is complete and is not written again.
"""

from __future__ import annotations

import functools
import hashlib
import itertools
import json
from array import array
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from davae_jax.data.inputs.bad_lines import BadLine, BadLineLimit
from davae_jax.data.inputs.encodings import UTF_8
from davae_jax.data.inputs.file_lines import files_of
from davae_jax.data.inputs.line_readers import Chunk, FileSlice
from davae_jax.data.inputs.readers import read_slice
from davae_jax.data.prepared.shards import MAX_JSON_BYTES, WRITER_OPTIONS, encode_record, id_dtype
from davae_jax.data.tokenize import encode_texts
from davae_jax.tokenizers.decoder import DecoderTokenizer, count_pieces
from davae_jax.tokenizers.encoder import EncoderTokenizer, read_vocabulary
from davae_jax.tokenizers.load import TOKENIZER_FILES
from davae_jax.utils.errors import InputError, first_line
from davae_jax.utils.files import atomic_write, file_sha256, write_json, write_text
from davae_jax.utils.json_files import has_right_sum, read_json_object, with_sum
from davae_jax.utils.worker_pool import ReportProgress

PARTS = "parts"  # the folder of the shards' statistics, removed when all shards are written
MAX_BAD_LINES = 1000  # maximum number of bad lines that are listed, per shard and for the whole input


class ShardSettings(NamedTuple):
    """The settings that determine the contents of the shards.

    Attributes:
      fields: the fields of JSON, or the columns of a table, that contain the text; several are joined by line feeds.
      max_length: the maximum number of decoder ids of a text, bos and the end token included; longer texts are dropped.
      encoder_positions: the number of positions of the model's encoder; texts of more encoder ids are dropped.
      truncate: keep texts that are too long for the encoder only, and truncate their encoder ids.
      held_out: the fraction of distinct texts to hold out, 0 ≤ held_out < 1.
      shard_size: bytes of text after which a shard ends.
      encoding: the encoding of text and JSON.
    """

    fields: tuple[str, ...]
    max_length: int
    encoder_positions: int
    truncate: bool
    held_out: float | None
    shard_size: int | None
    encoding: str = UTF_8


class ShardTask(NamedTuple):
    """A part of the input, with everything that a worker process needs to write its shards.

    Attributes:
      slices: one slice of a file, or several whole files. Their lines are counted from the first line of the first.
      limit: of bad lines, judged while the shards are written; None: not judged.
    """

    folder: str
    number: int
    slices: Sequence[FileSlice]
    settings: ShardSettings
    limit: BadLineLimit | None = None


class TaskChunk(NamedTuple):
    """Consecutive lines of a file of a task."""

    file: str
    first_line: int  # of the file, among the lines of the task
    chunk: Chunk


@functools.cache
def load_new_tokenizers(folder: str, encoder_positions: int) -> tuple[EncoderTokenizer, DecoderTokenizer]:
    """Returns the tokenizers of a prepared folder, with the ids of special tokens that a training run gives them."""
    vocab, spiece = (Path(folder) / name for name in TOKENIZER_FILES)
    vocabulary, n = read_vocabulary(vocab), count_pieces(spiece)
    cls_id, sep_id = (vocabulary.index(token) if token in vocabulary else 0 for token in ("[CLS]", "[SEP]"))
    encoder = EncoderTokenizer(folder, cls_id=cls_id, sep_id=sep_id, max_ids=encoder_positions - 2)
    return encoder, DecoderTokenizer(folder, end_id=n, pad_id=n + 1, bos_id=n + 2)


def stored_id_dtype(encoder: EncoderTokenizer, decoder: DecoderTokenizer) -> np.dtype:
    """Returns the data type of the ids in the shards."""
    # A record begins with its number of encoder ids.
    return id_dtype(max(encoder.size, decoder.size + 2, encoder.max_ids + 2))


def text_hash(text: str) -> bytes:
    """Returns a hash of 8 bytes that depends on the text alone."""
    return hashlib.blake2b(text.encode("utf-8"), digest_size=8).digest()


def is_held_out(text: str, fraction: float) -> bool:
    """Returns whether a text belongs to the held-out fraction.

    Only the hash of the text decides, so duplicates are held out together, independently of the order of reading.
    """
    return int.from_bytes(text_hash(text)) < fraction * 2**64


def held_out_line(text: str) -> str:
    """Returns the JSON line of a text in held_out.jsonl."""
    return json.dumps({"text": text}, ensure_ascii=False) + "\n"


def write_shards(task: ShardTask, report_progress: ReportProgress = lambda *numbers: [*numbers]) -> None:
    """Writes the shards of a task that are not complete yet.

    Args:
      report_progress: called with the numbers of bytes of the input, of lines and of bad lines that have been read
        since the last call. Returns the totals of all tasks, by which the limit of bad lines is judged.

    Raises:
      InputError: an input cannot be read, a shard cannot be written, or there are too many bad lines.
    """
    complete = _complete_parts(task)
    lines, bad_lines = (sum(stats[key] for stats in complete) for key in ("lines", "bad"))
    if complete and complete[-1]["last"]:
        totals = report_progress(sum(file_slice.size for file_slice in task.slices), lines, bad_lines)
        _judge(task, totals, max(complete, key=lambda stats: stats["bad"]))
        return
    chunks = _skip_lines(_read_chunks(task, report_progress), lines)
    for part in itertools.count(len(complete)):
        stats, chunks = _write_shard(_part_name(task, part), chunks, lines + 1, task)
        write_json(_stats_file(task, part), with_sum(stats))
        if stats["last"]:
            break
        lines += stats["lines"]


def _complete_parts(task: ShardTask) -> list[dict[str, Any]]:
    """Returns the statistics of the task's first shards that are complete. The others are written again."""
    files = (_stats_file(task, part) for part in itertools.count())
    return list(itertools.takewhile(bool, map(read_statistics, files)))


def read_statistics(path: Path) -> dict[str, Any] | None:
    """Returns the statistics of a shard; None if they are missing or damaged, or an earlier version wrote no sum."""
    try:
        stats = read_json_object(path, MAX_JSON_BYTES)
    except (InputError, FileNotFoundError):
        return None
    return stats if has_right_sum(stats) else None


def shard_files(folder: Path, name: str) -> tuple[Path, Path]:
    """Returns the files of a shard that are read again when all shards are written: line numbers, held-out texts."""
    return folder / f"{name}.npy", folder / PARTS / f"{name}.jsonl"


def _part_name(task: ShardTask, part: int) -> str:
    return f"{task.number:05}-{part:04}"


def _stats_file(task: ShardTask, part: int) -> Path:
    return Path(task.folder) / PARTS / f"{_part_name(task, part)}.json"


def _read_chunks(task: ShardTask, report_progress: ReportProgress) -> Iterator[TaskChunk]:
    """Yields all lines of a task. After each chunk, progress is reported and the limit of bad lines judged."""
    first_line = 1
    for file_slice in task.slices:
        fraction_read, lines = 0.0, 0
        for chunk in read_slice(file_slice, task.settings.fields):
            yield TaskChunk(file_slice.file, first_line, chunk)
            bad = [[lines + n, problem] for n, (_, problem) in enumerate(chunk.lines, 1) if problem]
            newly_read = file_slice.size * (chunk.fraction_read - fraction_read)
            totals = report_progress(newly_read, len(chunk.lines), len(bad))
            _judge(task, totals, {"files": [[file_slice.file, 1]], "bad_lines": bad})
            fraction_read, lines = chunk.fraction_read, lines + len(chunk.lines)
        report_progress(file_slice.size * (1.0 - fraction_read), 0, 0)
        first_line += lines


def _skip_lines(chunks: Iterator[TaskChunk], n: int) -> Iterator[TaskChunk]:
    """Leaves out the first n lines, perhaps a part of a chunk: another version may have gathered other chunks."""
    for part in chunks:
        lines = part.chunk.lines[n:]
        n = max(0, n - len(part.chunk.lines))
        if lines:
            yield part._replace(chunk=part.chunk._replace(lines=lines))


def _judge(task: ShardTask, totals: list[float], stats: dict[str, Any]) -> None:
    """Raises InputError if the lines read so far, by all processes, show that too many are bad.

    stats: statistics with an example, if they contain a bad line.
    """
    bytes_read, lines, bad = totals
    if task.limit is None or not stats["bad_lines"] or not task.limit.will_be_exceeded(lines, bad, bytes_read):
        return
    number, problem = stats["bad_lines"][0]
    file, line = files_of(stats).locate(number)
    start = task.slices[0].start
    problem += f" (the line number counts from byte {start:,} of the file)" if start else ""
    raise task.limit.error(BadLine(file, line, problem), int(lines), int(bad), "the rest has not been read")


def _write_shard(
    name: str, chunks: Iterator[TaskChunk], first_line_number: int, task: ShardTask
) -> tuple[dict[str, Any], Iterator[TaskChunk]]:
    """Writes one shard of the next chunks. Returns its statistics and the remaining chunks."""
    from array_record.python.array_record_module import ArrayRecordWriter

    folder = Path(task.folder)
    path = folder / f"{name}.arrayrecord"
    texts = _ShardTexts(task, first_line_number)
    with atomic_write(path) as file:
        try:
            writer = ArrayRecordWriter(str(file), WRITER_OPTIONS)
            try:
                for chunk in chunks:
                    for record in texts.records(*chunk):
                        writer.write(record)
                    if texts.text_bytes >= task.settings.shard_size or not writer.ok():
                        break
            finally:
                writer.close()  # raises the error of a failed write
        except (RuntimeError, OSError) as e:
            raise InputError(f"{path}: cannot be written ({_write_error(e)})") from e
        next_chunk = next(chunks, None)
        stats, table = texts.stats, texts.table()
        stats["last"] = next_chunk is None
        stats["texts"] = len(table)
        stats["encoder_tokens"] = int(table[:, 1].sum())
        stats["decoder_tokens"] = int(table[:, 2].sum()) - len(table)  # the targets: all but bos
        stats["bytes"], stats["sha256"] = file.stat().st_size, file_sha256(file)
        table_path, held_out_path = files = shard_files(folder, name)
        with atomic_write(table_path) as table_file, table_file.open("wb") as out:
            np.save(out, table)
        write_text(held_out_path, "".join(map(held_out_line, texts.held_out)))
        stats["read_again"] = [file_sha256(written) for written in files]
    return stats, chunks if next_chunk is None else itertools.chain([next_chunk], chunks)


class _ShardTexts:
    """Turns the chunks of one shard into records, and collects the shard's statistics.

    Attributes:
      stats: the statistics, with the keys of the file in `parts/`.
      held_out: the distinct held-out texts, in the order in which they were read.
      text_bytes: bytes of the texts read so far.
    """

    def __init__(self, task: ShardTask, first_line_number: int):
        self._settings, self._first_line_number = task.settings, first_line_number
        self._encoder, self._decoder = load_new_tokenizers(task.folder, task.settings.encoder_positions)
        self._dtype = stored_id_dtype(self._encoder, self._decoder)
        self._table = array("I")
        self.stats: dict[str, Any] = dict.fromkeys(
            ("lines", "texts", "held_out", "blank", "too_long", "bad", "encoder_tokens", "decoder_tokens"), 0
        )
        self.stats |= dict(files=[], number=task.number, bad_lines=[])
        self.held_out: dict[str, None] = {}
        self.text_bytes = 0

    def records(self, file: str, first_line: int, chunk: Chunk) -> Iterator[bytes]:
        """Yields the records of a `TaskChunk`'s texts that belong into the shard, and updates the statistics."""
        settings, files = self._settings, self.stats["files"]
        if [file, first_line] not in files[-1:]:
            files.append([file, first_line])
        numbers, texts = self._usable_texts(chunk)
        rows = encode_texts(texts, self._encoder, self._decoder, settings.max_length, settings.truncate)
        for number, text, row in zip(numbers, texts, rows, strict=True):
            if row is None:
                self.stats["too_long"] += 1
            elif is_held_out(text, settings.held_out):
                self.stats["held_out"] += 1
                self.held_out[text] = None
            else:
                yield encode_record(*row, self._dtype)
                self._table.extend((number, len(row[0]), len(row[1])))
        self.stats["lines"] += len(chunk.lines)
        self.text_bytes += chunk.text_bytes

    def _usable_texts(self, chunk: Chunk) -> tuple[list[int], list[str]]:
        """Returns the texts that are neither bad nor blank, preceded by their line numbers in the task."""
        numbers, texts, stats = [], [], self.stats
        for number, (text, problem) in enumerate(chunk.lines, self._first_line_number + stats["lines"]):
            if problem:
                stats["bad"] += 1
                if len(stats["bad_lines"]) < MAX_BAD_LINES:
                    stats["bad_lines"].append([number, problem])
            elif not text.strip():
                stats["blank"] += 1
            else:
                numbers.append(number)
                texts.append(text)
        return numbers, texts

    def table(self) -> np.ndarray:
        """Returns uint32 [texts, 3]: line in the task, number of encoder ids, number of decoder ids."""
        return np.array(self._table, np.uint32).reshape(-1, 3)


def _write_error(error: Exception) -> str:
    """Returns the reason in ArrayRecord's message, "write() failed: No space left on device; writing …"."""
    return first_line(error).split(";")[0].removeprefix("write() failed: ").removeprefix("open() failed: ")
