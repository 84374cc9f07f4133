"""`davae prepare`: texts → tokenised shards that a run reads in any order (prepared.py says how they lie).

The input is divided into pieces, which worker processes go through; a piece makes one shard, or several where its file
cannot be entered in the middle. A shard and what is known of it appear under their names when they are whole, so a
second start goes on behind the last of them. When all are there, their notes in `parts/` become the manifest.
"""

from __future__ import annotations

import functools
import hashlib
import itertools
import json
import multiprocessing
import os
import threading
from array import array
from collections.abc import Callable, Iterator
from concurrent.futures import FIRST_COMPLETED, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from multiprocessing.connection import wait as wait_for_end
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from tqdm import tqdm

from davae_jax.data.readers import Chunk, FileSlice, read_slice
from davae_jax.data.shards import FORMAT, MANIFEST, WRITER_OPTIONS, encode_record, id_dtype
from davae_jax.data.tokenize import encode_texts
from davae_jax.tokenizers.decoder import DecoderTokenizer, count_pieces
from davae_jax.tokenizers.encoder import EncoderTokenizer, read_vocabulary
from davae_jax.tokenizers.load import TOKENIZER_FILES
from davae_jax.tokenizers.training import train_sentencepiece, train_wordpiece
from davae_jax.utils.errors import InputError, first_line
from davae_jax.utils.files import atomic_write, is_partial, remove_partial, write_bytes, write_json, write_text
from davae_jax.utils.settings import changed_settings

SETTINGS, PARTS = "prepare.json", "parts"
BAD_LINES = 1000  # that are listed, the first ones
TOKENIZER_TEXTS, TOKENIZER_BYTES = 50_000, 1 << 26  # at most, to train tokenizers on; taken from all over the input
HELD_OUT_FRACTION, HELD_OUT_BYTES = 0.01, 1 << 24
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


# ---- before: the folder, the tokenizers


def open_folder(folder: Path, settings: dict[str, Any]) -> None:
    """Makes the folder, or checks that what stands there is of the same settings. Raises InputError if it is not."""
    stored = folder / SETTINGS
    try:
        (folder / PARTS).mkdir(parents=True, exist_ok=True)
        if stored.exists():
            before = {"cut": False} | json.loads(stored.read_text(encoding="utf-8"))  # there was no --cut once
            changed = changed_settings(before, settings)
            if changed and not (folder / MANIFEST).exists() and not any((folder / PARTS).glob("*.json")):
                for name in TOKENIZER_FILES:  # nothing was prepared yet: begin anew
                    (folder / name).unlink(missing_ok=True)
            elif changed:
                more = f" and {len(changed) - 3} more" if len(changed) > 3 else ""
                raise InputError(
                    f"{folder}: was prepared otherwise: {', '.join(changed[:3])}{more}; give another --output",
                    exit_code=2,
                )
        elif any(path.name != PARTS and not is_partial(path) for path in folder.iterdir()):
            said = f"{folder}: holds files, but nothing prepared (no {SETTINGS}); give another --output"
            raise InputError(said, exit_code=2)
        write_json(stored, settings)
        for place in (folder, folder / PARTS):
            remove_partial(place)
    except (OSError, ValueError) as e:
        if isinstance(e, InputError):
            raise
        raise InputError(f"{folder}: cannot be written ({getattr(e, 'strerror', None) or e})") from e


def file_sha256(path: Path) -> str:
    digest = hashlib.sha256()
    try:
        with path.open("rb") as file:
            while data := file.read(MIB):
                digest.update(data)
    except OSError as e:
        raise InputError(f"{path}: cannot be read ({e.strerror})") from None
    return digest.hexdigest()


def prepare_tokenizers(folder: Path, given: Path | None, settings: dict[str, Any], pieces: list[FileSlice]) -> None:
    """vocab.txt and spiece.model into the folder: those given, or new ones."""
    missing = [name for name in TOKENIZER_FILES if not (folder / name).exists()]
    if missing and given is not None:
        for name in missing:
            write_bytes(folder / name, (given / name).read_bytes())
    elif missing:
        texts = sample_texts(pieces, settings["field"], settings["held_out"])
        if not texts:
            raise InputError(f"{pieces[0].file}: holds no text to train tokenizers on (--field {settings['field']})")
        sizes = settings["tokenizers"]
        try:
            trained = train_wordpiece(texts, sizes["entries"]), train_sentencepiece(texts, sizes["pieces"])
        except InputError as e:
            raise InputError(str(e).replace("--data.", "--"), exit_code=e.exit_code) from e
        for name, data in zip(TOKENIZER_FILES, trained, strict=True):
            write_bytes(folder / name, data)
    cached_tokenizers(str(folder), settings["encoder_positions"])  # raises if they are damaged


def sample_texts(pieces: list[FileSlice], field: str, held_out: float) -> list[str]:
    """Texts from the beginning of every piece, so many in all that memory and time are bounded."""
    n, size = -(-TOKENIZER_TEXTS // len(pieces)), -(-TOKENIZER_BYTES // len(pieces))
    found = []
    for piece in pieces:
        left, bytes_left = n, size
        for chunk in read_slice(piece, field):
            texts = [line.text for line in chunk.lines if line.text and line.text.strip()][:left]
            found += [text for text in texts if not is_held_out(text, held_out)]
            left, bytes_left = left - len(texts), bytes_left - chunk.text_bytes
            if left <= 0 or bytes_left <= 0:
                break
    return found


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


# ---- the work, in processes


def available_cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def run_tasks(tasks: list[ShardTask], workers: int) -> None:
    total = sum(task.piece.size for task in tasks)
    bar = tqdm(total=total, desc="prepare", unit="B", unit_scale=True, unit_divisor=1024, disable=None, leave=False)
    with bar:
        if min(workers, len(tasks)) == 1:
            for task in tasks:
                write_shards(task, bar.update)
            return
        # Not forked: the threads of what is imported here would not survive that.
        context = multiprocessing.get_context("spawn")
        done, stop = context.Value("d", 0.0), context.Event()
        pool = ProcessPoolExecutor(min(workers, len(tasks)), context, initializer=_begin, initargs=(done, stop))
        try:
            left = {pool.submit(_make_shards, task) for task in tasks}
            while left:
                finished, left = wait(left, timeout=0.5, return_when=FIRST_COMPLETED)
                bar.update(done.value - bar.n)
                for future in finished:
                    future.result()
        except BrokenProcessPool:
            raise InputError("a worker process was ended from outside (out of memory?); start again to go on") from None
        finally:
            stop.set()
            pool.shutdown(cancel_futures=True)


class _Stopped(Exception):
    pass


def _begin(done, stop) -> None:
    """In a worker: end with the program, leave Ctrl-C to it, and use one core."""
    import signal

    global _done, _stop
    _done, _stop = done, stop
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    os.environ["TOKENIZERS_PARALLELISM"] = "false"

    def end_with_parent():
        wait_for_end([multiprocessing.parent_process().sentinel])
        os._exit(1)

    threading.Thread(target=end_with_parent, daemon=True).start()


def _make_shards(task: ShardTask) -> None:
    def report(n: float) -> None:
        if _stop.is_set():
            raise _Stopped
        with _done.get_lock():
            _done.value += n

    write_shards(task, report)


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


# ---- after: what the shards' notes say, put together


def merge_shards(folder: Path, tasks: list[ShardTask], settings: dict[str, Any]) -> None:
    """Writes bad_lines.jsonl, held_out.jsonl, order.npy and lengths.npy, and the manifest last."""
    names = sorted(path.stem for path in (folder / PARTS).glob("*.json"))
    counts = dict.fromkeys(("lines", "texts", "held_out", "blank", "too_long", "bad"), 0)
    counts |= dict(encoder_tokens=0, decoder_tokens=0)
    shards, bad_lines, piece, file, before = [], [], 0, None, 0
    lines_of_piece = 0
    for name in names:
        stats = json.loads((folder / PARTS / f"{name}.json").read_text(encoding="utf-8"))
        if stats["number"] != piece:
            piece, before, lines_of_piece = stats["number"], before + lines_of_piece, 0
        if stats["file"] != file:
            file, before = stats["file"], 0
        lines_of_piece += stats["lines"]
        for count in counts:
            counts[count] += stats[count]
        bad_lines += [
            {"file": file, "line": before + number, "problem": problem} for number, problem in stats["bad_lines"]
        ][: BAD_LINES - len(bad_lines)]
        if stats["texts"]:
            shards.append({key: stats[key] for key in ("texts", "bytes", "sha256", "file")})
            shards[-1] |= {"name": name, "line": before}
        else:
            for suffix in ("arrayrecord", "npy"):
                (folder / f"{name}.{suffix}").unlink(missing_ok=True)
    write_text(folder / "bad_lines.jsonl", "".join(json.dumps(b, ensure_ascii=False) + "\n" for b in bad_lines))
    if not shards:
        raise InputError(
            f"{', '.join(settings['inputs'])}: {excluded_texts(counts) or 'holds no text'}; nothing is left"
        )
    counts["held_out_distinct"] = _write_held_out(folder, names)
    _write_order(folder, shards)
    encoder, decoder = cached_tokenizers(tasks[0].folder, tasks[0].encoder_positions)
    manifest = {
        "format": FORMAT,
        "settings": settings,
        "tokenizers": {name: file_sha256(folder / name) for name in TOKENIZER_FILES},
        "dtype": id_dtype(max(encoder.size, decoder.size + 2)).str,
        "counts": counts,
        "shards": shards,
    }
    write_json(folder / MANIFEST, manifest)


def _write_held_out(folder: Path, names: list[str]) -> int:
    """The texts kept apart, each once, in an order that has nothing to do with the input's."""
    texts = {}
    for name in names:
        with (folder / PARTS / f"{name}.jsonl").open(encoding="utf-8") as file:
            for line in file:
                text = json.loads(line)["text"]
                texts[text_hash(text)[::-1]] = text
    with atomic_write(folder / "held_out.jsonl") as file, file.open("w", encoding="utf-8") as out:
        out.writelines(_json_line(texts[digest]) for digest in sorted(texts))
    return len(texts)


def _write_order(folder: Path, shards: list[dict]) -> None:
    """order.npy, sorted by counting, and lengths.npy. A shard's lengths at a time are in memory."""
    counts, longest = np.zeros(1, np.int64), np.zeros(1, np.int64)
    for shard in shards:
        _, encoder, decoder = np.load(folder / f"{shard['name']}.npy").T
        more = int(decoder.max()) + 1 - len(counts)
        counts, longest = (np.pad(x, (0, max(0, more))) for x in (counts, longest))
        counts += np.bincount(decoder, minlength=len(counts))
        np.maximum.at(longest, decoder, encoder)
    n = int(counts.sum())
    dtype = np.dtype("<u4" if n < 1 << 32 else "<u8")
    places = counts.cumsum() - counts
    with atomic_write(folder / "order.npy") as file, file.open("wb") as out:
        header = {"descr": dtype.str, "fortran_order": False, "shape": (n,)}
        np.lib.format.write_array_header_1_0(out, header)
        begin, first = out.tell(), 0
        for shard in shards:
            decoder = np.load(folder / f"{shard['name']}.npy")[:, 2]
            order = np.argsort(decoder, kind="stable")
            found, starts = np.unique(decoder[order], return_index=True)
            for length, records in zip(found, np.split(order, starts[1:]), strict=True):
                out.seek(begin + int(places[length]) * dtype.itemsize)
                out.write((records + first).astype(dtype).tobytes())
                places[length] += len(records)
            first += len(decoder)
    found = np.flatnonzero(counts)
    with atomic_write(folder / "lengths.npy") as file, file.open("wb") as out:
        np.save(out, np.stack([found, counts[found], longest[found]], axis=1))


def excluded_texts(counts: dict[str, int]) -> str:
    words = {"blank": "blank", "too_long": "too long", "bad": "bad lines (bad_lines.jsonl)", "held_out": "held out"}
    return ", ".join(f"{counts[name]:,} {word}" for name, word in words.items() if counts[name])


def format_summary(folder: Path, counts: dict[str, int]) -> str:
    left_out = excluded_texts(counts)
    return (
        f"{folder}: {counts['texts']:,} texts, {counts['decoder_tokens']:,} tokens of the decoder, "
        f"{counts['encoder_tokens']:,} of the encoder" + (f"; not among them: {left_out}" if left_out else "")
    )
