"""Puts the finished shards together: counts, order, held-out texts, manifest."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np

from davae_jax.data.shard_writer import (
    BAD_LINES,
    PARTS,
    ShardTask,
    _json_line,
    cached_tokenizers,
    file_sha256,
    text_hash,
)
from davae_jax.data.shards import FORMAT, MANIFEST, id_dtype
from davae_jax.tokenizers.load import TOKENIZER_FILES
from davae_jax.utils.errors import InputError
from davae_jax.utils.files import atomic_write, write_json, write_text


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
