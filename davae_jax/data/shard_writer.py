"""Writes the shards of one slice of the input."""

from __future__ import annotations

import functools
import hashlib
import itertools
import json
from array import array
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from davae_jax.data.line_readers import Chunk, FileSlice
from davae_jax.data.readers import read_slice
from davae_jax.data.shards import WRITER_OPTIONS, encode_record, id_dtype
from davae_jax.data.tokenize import encode_texts
from davae_jax.tokenizers.decoder import DecoderTokenizer, count_pieces
from davae_jax.tokenizers.encoder import EncoderTokenizer, read_vocabulary
from davae_jax.tokenizers.load import TOKENIZER_FILES
from davae_jax.utils.errors import InputError, first_line
from davae_jax.utils.files import atomic_write, write_json, write_text

SETTINGS, PARTS = "prepare.json", "parts"


BAD_LINES = 1000  # that are listed, the first ones


MIB = 1 << 20


class ShardTask(NamedTuple):
    """A piece, and all that a worker has to know to make its shards."""

    folder: str
    number: int
    piece: FileSlice
    field: str
    max_length: int
    encoder_positions: int
    cut: bool
    held_out: float
    shard_size: int


def file_sha256(path: Path) -> str:
    digest = hashlib.sha256()
    try:
        with path.open("rb") as file:
            while data := file.read(MIB):
                digest.update(data)
    except OSError as e:
        raise InputError(f"{path}: cannot be read ({e.strerror})") from None
    return digest.hexdigest()


@functools.cache
def cached_tokenizers(folder: str, positions: int) -> tuple[EncoderTokenizer, DecoderTokenizer]:
    """With the ids that a run gives the special tokens (`setup_run.model_config`)."""
    vocab, spiece = (Path(folder) / name for name in TOKENIZER_FILES)
    entries, n = read_vocabulary(vocab), count_pieces(spiece)
    cls_id, sep_id = (entries.index(token) if token in entries else 0 for token in ("[CLS]", "[SEP]"))
    encoder = EncoderTokenizer(folder, cls_id=cls_id, sep_id=sep_id, max_ids=positions - 2)
    return encoder, DecoderTokenizer(folder, end_id=n, pad_id=n + 1, bos_id=n + 2)


def is_held_out(text: str, part: float) -> bool:
    """By the text itself, so that all its copies go together and no order or list matters."""
    return int.from_bytes(text_hash(text)) < part * 2**64


def text_hash(text: str) -> bytes:
    return hashlib.blake2b(text.encode("utf-8"), digest_size=8).digest()


def write_shards(task: ShardTask, report: Callable[[float], Any] = lambda n: None) -> None:
    """Makes the shards of a piece that are not there yet. `report` is told how many bytes of the file that was."""
    past = 0.0

    def counted(chunks: Iterator[Chunk]) -> Iterator[Chunk]:
        nonlocal past
        for chunk in chunks:
            yield chunk
            report(task.piece.size * (chunk.done - past))
            past = chunk.done

    chunks = counted(read_slice(task.piece, task.field))
    line = 1  # of the piece, with which the next shard begins
    for part in itertools.count():
        name = f"{task.number:05}-{part:04}"
        notes = Path(task.folder) / PARTS / f"{name}.json"
        if notes.exists():
            stats = json.loads(notes.read_text(encoding="utf-8"))
            if not stats["last"]:
                for _ in itertools.islice(chunks, stats["chunks"]):
                    pass
        else:
            stats, chunks = _write_shard(name, chunks, line, task)
            write_json(notes, stats)
        if stats["last"]:
            break
        line += stats["lines"]
    report(task.piece.size * (1.0 - past))


def _write_shard(name: str, chunks: Iterator[Chunk], line: int, task: ShardTask) -> tuple[dict, Iterator[Chunk]]:
    """Makes one shard of the next chunks. Returns what is known of it, and the chunks that are left."""
    from array_record.python.array_record_module import ArrayRecordWriter

    folder = Path(task.folder)
    path = folder / f"{name}.arrayrecord"
    encoder, decoder = cached_tokenizers(task.folder, task.encoder_positions)
    dtype = id_dtype(max(encoder.size, decoder.size + 2))
    stats = dict.fromkeys(("lines", "chunks", "texts", "held_out", "blank", "too_long", "bad"), 0)
    stats |= dict(encoder_tokens=0, decoder_tokens=0, file=task.piece.file, number=task.number, bad_lines=[])
    table, kept_apart, text_bytes, chunk = array("I"), {}, 0, None
    with atomic_write(path) as file:
        try:
            writer = ArrayRecordWriter(str(file), WRITER_OPTIONS)
            try:
                for chunk in chunks:
                    texts = []
                    for number, (text, problem) in enumerate(chunk.lines, line + stats["lines"]):
                        if problem:
                            stats["bad"] += 1
                            if len(stats["bad_lines"]) < BAD_LINES:
                                stats["bad_lines"].append([number, problem])
                        elif not text.strip():
                            stats["blank"] += 1
                        else:
                            texts.append((number, text))
                    rows = encode_texts([text for _, text in texts], encoder, decoder, task.max_length, task.cut)
                    for (number, text), row in zip(texts, rows, strict=True):
                        if row is None:
                            stats["too_long"] += 1
                        elif is_held_out(text, task.held_out):
                            stats["held_out"] += 1
                            kept_apart[text] = None
                        else:
                            writer.write(encode_record(*row, dtype))
                            table.extend((number, len(row[0]), len(row[1])))
                    stats["lines"] += len(chunk.lines)
                    stats["chunks"] += 1
                    text_bytes += chunk.text_bytes
                    if text_bytes >= task.shard_size or not writer.ok():
                        break
            finally:
                writer.close()  # raises what went wrong with a write
        except (RuntimeError, OSError) as e:
            raise InputError(f"{path}: cannot be written ({_why(e)})") from e
        following = next(chunks, None)
        columns = np.array(table, np.uint32).reshape(-1, 3)
        stats["last"] = following is None
        stats["texts"] = len(columns)
        stats["encoder_tokens"] = int(columns[:, 1].sum())
        stats["decoder_tokens"] = int(columns[:, 2].sum()) - len(columns)  # those that are trained: all but bos
        stats["bytes"], stats["sha256"] = file.stat().st_size, file_sha256(file)
        with atomic_write(folder / f"{name}.npy") as other, other.open("wb") as out:
            np.save(out, columns)
        write_text(folder / PARTS / f"{name}.jsonl", "".join(map(_json_line, kept_apart)))
    return stats, chunks if following is None else itertools.chain([following], chunks)


def _why(error: Exception) -> str:
    """ "write() failed: No space left on device; writing …" of the library's message."""
    return first_line(error).split(";")[0].removeprefix("write() failed: ").removeprefix("open() failed: ")


def _json_line(text: str) -> str:
    return json.dumps({"text": text}, ensure_ascii=False) + "\n"
