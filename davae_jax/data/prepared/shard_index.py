"""Completes a prepared folder after the last shard: counts, bad lines, held-out texts, order, manifest."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from davae_jax.data.inputs.bad_lines import BadLine, BadLineLimit
from davae_jax.data.inputs.file_lines import FileLines, files_of, name_files
from davae_jax.data.prepared.check_prepared import prepared_problems, shard_problems
from davae_jax.data.prepared.shard_writer import (
    MAX_BAD_LINES,
    PARTS,
    held_out_line,
    load_new_tokenizers,
    read_statistics,
    shard_files,
    stored_id_dtype,
    text_hash,
)
from davae_jax.data.prepared.shards import FORMAT, MANIFEST
from davae_jax.tokenizers.load import TOKENIZER_FILES
from davae_jax.utils.arrays import read_array
from davae_jax.utils.errors import InputError
from davae_jax.utils.files import atomic_write, file_sha256, write_json, write_text
from davae_jax.utils.json_files import with_sum
from davae_jax.utils.json_lines import iterate_json_lines

COUNTED = ("lines", "texts", "held_out", "blank", "too_long", "bad", "encoder_tokens", "decoder_tokens")


class _Statistics(NamedTuple):
    """The statistics of all shards together: totals, the manifest's list of shards, the first bad lines."""

    counts: dict[str, int]
    shards: list[dict[str, Any]]
    bad_lines: list[dict[str, Any]]


def merge_shards(folder: Path, settings: dict[str, Any], limit: BadLineLimit) -> None:
    """Writes bad_lines.jsonl, held_out.jsonl, order.npy and lengths.npy, and finally the manifest.

    Args:
      settings: the content of prepare.json, which the manifest repeats.
      limit: of unreadable lines.

    Raises:
      InputError: the shards contain no text, too many lines are unreadable, or a file is not what was written.
    """
    names = [path.stem for path in (folder / PARTS).glob("*.json") if re.fullmatch(r"\d+-\d+", path.stem)]
    names.sort(key=_numbers)
    counts, shards, bad_lines = _read_statistics(folder, names)
    lines = [json.dumps(bad_line, ensure_ascii=False) + "\n" for bad_line in bad_lines]
    write_text(folder / "bad_lines.jsonl", "".join(lines))
    for name in set(names) - {shard["name"] for shard in shards}:  # without texts
        for suffix in ("arrayrecord", "npy"):
            (folder / f"{name}.{suffix}").unlink(missing_ok=True)
    if limit.is_exceeded(counts["lines"], counts["bad"]):
        raise limit.error(BadLine(**bad_lines[0]), counts["lines"], counts["bad"], str(folder / "bad_lines.jsonl"))
    if not shards:
        reason = describe_dropped(counts) or "contains no text"
        raise InputError(f"{name_files(list(settings['inputs']))}: {reason}; no text remains")
    counts["held_out_distinct"] = _write_held_out(folder, names)
    _write_order(folder, shards)
    written = ["order.npy", "lengths.npy", "held_out.jsonl", "bad_lines.jsonl", *(f"{s['name']}.npy" for s in shards)]
    manifest = {
        "format": FORMAT,
        "settings": settings,
        "tokenizers": {name: file_sha256(folder / name) for name in TOKENIZER_FILES},
        "dtype": stored_id_dtype(*load_new_tokenizers(str(folder), settings["encoder_positions"])).str,
        "counts": counts,
        "shards": shards,
        "files": {name: file_sha256(folder / name) for name in written},
    }
    _read_back(folder, manifest)
    write_json(folder / MANIFEST, with_sum(manifest))


def _read_back(folder: Path, manifest: dict[str, Any]) -> None:
    """Reads the folder before its manifest is written.

    Raises InputError if a file is not what was written. A damaged shard is written again by the next call.
    """
    problems = prepared_problems(folder, manifest)
    if problems:
        for shard in manifest["shards"]:
            if shard_problems(folder, shard):
                (folder / PARTS / f"{shard['name']}.json").unlink(missing_ok=True)
        raise InputError(f"{problems[0]}; the same command writes it again")


def _numbers(name: str) -> list[int]:
    """Returns the numbers of the task and of the shard in a shard's name."""
    return [int(number) for number in name.split("-")]


def _read_statistics(folder: Path, names: list[str]) -> _Statistics:
    counts, shards, bad_lines = dict.fromkeys(COUNTED, 0), [], []
    file, task_number = None, 0  # the last file of the last shard
    lines_before, lines_in_task = 0, 0  # lines of the file before the task, and of the task in the shards so far
    for name in names:
        stats = _checked_statistics(folder, name)
        if not stats["lines"]:
            continue
        files, first_lines = files_of(stats)
        if stats["number"] != task_number:
            # Only a task of one slice can continue a file.
            lines_before = lines_before + lines_in_task if files[:1] == [file] else 0
            task_number, lines_in_task = stats["number"], 0
        file = files[-1]
        lines_in_task += stats["lines"]
        for key in counts:
            counts[key] += stats[key]
        located = FileLines(files, [line - lines_before for line in first_lines])
        for number, problem in stats["bad_lines"][: MAX_BAD_LINES - len(bad_lines)]:
            bad_lines.append(BadLine(*located.locate(number), problem)._asdict())
        if stats["texts"]:
            shard = {key: stats[key] for key in ("texts", "bytes", "sha256")} | {"name": name}
            shards.append(shard | _describe_files(located))
    return _Statistics(counts, shards, bad_lines)


def _checked_statistics(folder: Path, name: str) -> dict[str, Any]:
    """Returns the statistics of a shard. Raises InputError if they or the files that they describe are damaged."""
    path = folder / PARTS / f"{name}.json"
    damaged = [path]
    if stats := read_statistics(path):
        files = zip(shard_files(folder, name), stats["read_again"], strict=True)
        damaged = [file for file, digest in files if not file.is_file() or file_sha256(file) != digest]
    if not damaged:
        return stats
    path.unlink(missing_ok=True)
    raise InputError(f"{damaged[0]}: is damaged; the same command writes it again")


def _describe_files(files: FileLines) -> dict[str, Any]:
    """Returns the entries of a shard in the manifest that `files_of` reads."""
    if len(files.files) == 1 and files.first_lines[0] <= 1:
        return {"file": files.files[0], "line": 1 - files.first_lines[0]}
    return {"files": [list(pair) for pair in zip(*files, strict=True)]}


def _write_held_out(folder: Path, names: list[str]) -> int:
    """Writes the held-out texts, each once, in the order of their hashes. Returns their number."""
    texts = {}
    for name in names:
        path = folder / PARTS / f"{name}.jsonl"
        for line in iterate_json_lines(path):
            if not isinstance(text := (line.values or {}).get("text"), str):
                raise InputError(f"{path}: line {line.number} is damaged; prepare into a new folder")
            # Reversed, because the first bytes decide what is held out and are therefore small.
            texts[text_hash(text)[::-1]] = text
    with atomic_write(folder / "held_out.jsonl") as file, file.open("w", encoding="utf-8") as out:
        out.writelines(held_out_line(texts[key]) for key in sorted(texts))
    return len(texts)


def _write_order(folder: Path, shards: list[dict[str, Any]]) -> None:
    """Writes order.npy and lengths.npy. The lengths of only one shard are in memory at a time."""
    counts, longest = _count_lengths(folder, shards)
    total = int(counts.sum())
    dtype = np.dtype("<u4" if total < 1 << 32 else "<u8")
    next_position = counts.cumsum() - counts  # in order.npy, by number of decoder ids: a counting sort on disk
    with atomic_write(folder / "order.npy") as file, file.open("wb") as out:
        header = {"descr": dtype.str, "fortran_order": False, "shape": (total,)}
        np.lib.format.write_array_header_1_0(out, header)
        data_start, first_record = out.tell(), 0
        for shard in shards:
            decoder_lengths = read_array(folder / f"{shard['name']}.npy", 2)[:, 2]
            order = np.argsort(decoder_lengths, kind="stable")
            lengths, starts = np.unique(decoder_lengths[order], return_index=True)
            for length, records in zip(lengths, np.split(order, starts[1:]), strict=True):
                out.seek(data_start + int(next_position[length]) * dtype.itemsize)
                out.write((records + first_record).astype(dtype).tobytes())
                next_position[length] += len(records)
            first_record += len(decoder_lengths)
    lengths = np.flatnonzero(counts)
    with atomic_write(folder / "lengths.npy") as file, file.open("wb") as out:
        np.save(out, np.stack([lengths, counts[lengths], longest[lengths]], axis=1))


def _count_lengths(folder: Path, shards: list[dict[str, Any]]) -> tuple[np.ndarray, np.ndarray]:
    """Returns, by number of decoder ids, the number of texts and their largest number of encoder ids."""
    counts, longest = np.zeros(1, np.int64), np.zeros(1, np.int64)
    for shard in shards:
        _, encoder_lengths, decoder_lengths = read_array(folder / f"{shard['name']}.npy", 2).T
        missing = max(0, int(decoder_lengths.max()) + 1 - len(counts))
        counts, longest = np.pad(counts, (0, missing)), np.pad(longest, (0, missing))
        counts += np.bincount(decoder_lengths, minlength=len(counts))
        np.maximum.at(longest, decoder_lengths, encoder_lengths)
    return counts, longest


def describe_dropped(counts: dict[str, int]) -> str:
    """Returns the number of texts that are not in the shards by reason; an empty string if there are none."""
    words = {"blank": "blank", "too_long": "too long", "bad": "bad lines (bad_lines.jsonl)", "held_out": "held out"}
    return ", ".join(f"{counts[key]:,} {word}" for key, word in words.items() if counts[key])
