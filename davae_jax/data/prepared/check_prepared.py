"""Lists what is wrong with a prepared folder: before its manifest is written, and for `davae check`."""

from __future__ import annotations

import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

from davae_jax.data.prepared.shards import MANIFEST, MAX_JSON_BYTES, SETTINGS, from_stored_names, open_shard
from davae_jax.utils.arrays import read_array_header
from davae_jax.utils.errors import InputError, first_line
from davae_jax.utils.files import file_sha256
from davae_jax.utils.json_files import read_json_object
from davae_jax.utils.json_lines import iterate_json_lines


def prepared_problems(folder: Path, manifest: dict[str, Any]) -> list[str]:
    """Returns a line for each problem: every file is read and compared with the manifest.

    The manifest of earlier versions has hashes of the shards and tokenizers only; other files are then compared by
    their sizes and counts.
    """
    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as threads:
        of_shards = threads.map(partial(shard_problems, folder), manifest["shards"])
        problems = [problem for problems in of_shards for problem in problems]
        hashes = manifest["tokenizers"] | manifest.get("files", {})
        problems += [p for p in threads.map(partial(_hash_problem, folder), *zip(*hashes.items())) if p]
    if "files" not in manifest:
        problems += _count_problems(folder, manifest)
    return [*problems, *_settings_problems(folder, manifest)]


def shard_problems(folder: Path, shard: dict[str, Any]) -> list[str]:
    """Returns the problems of one shard, an entry of the manifest's list: its hash, its records and their table."""
    path, table = (folder / f"{shard['name']}.{suffix}" for suffix in ("arrayrecord", "npy"))
    problems = [p for p in [_hash_problem(folder, path.name, shard["sha256"])] if p]
    try:
        if not problems and (n := open_shard(path).num_records()) != shard["texts"]:
            problems.append(f"{path}: has {n} records, but the manifest gives {shard['texts']}")
    except (RuntimeError, ValueError, OSError) as e:
        problems.append(f"{path}: cannot be read ({first_line(e)})")
    try:
        if (shape := read_array_header(table, 2)[0]) != (shard["texts"], 3):
            problems.append(f"{table}: has {shape[0]} rows, but the manifest gives {shard['texts']}")
    except InputError as e:
        problems.append(str(e))
    return problems


def _hash_problem(folder: Path, name: str, expected: str) -> str | None:
    path = folder / name
    try:
        if not path.is_file():
            return f"{path}: is missing"
        return (
            None if file_sha256(path) == expected else f"{path}: is damaged (its SHA-256 differs from the manifest's)"
        )
    except InputError as e:
        return str(e)


def _count_problems(folder: Path, manifest: dict[str, Any]) -> Iterator[str]:
    """Yields the problems of the files that a manifest of an earlier version has no hashes of."""
    total = sum(shard["texts"] for shard in manifest["shards"])
    for name, dimensions in (("order.npy", 1), ("lengths.npy", 2)):
        try:
            shape, _, _ = read_array_header(folder / name, dimensions)
            if name == "order.npy" and shape != (total,):
                yield f"{folder / name}: has {shape[0]} entries, but the manifest gives {total}"
        except InputError as e:
            yield str(e)
    path = folder / "held_out.jsonl"
    try:
        for n, line in enumerate(iterate_json_lines(path), 1):
            if not isinstance((line.values or {}).get("text"), str):
                yield f"{path}: line {n} is damaged"
    except OSError as e:
        yield f"{path}: cannot be read ({e.strerror})"


def _settings_problems(folder: Path, manifest: dict[str, Any]) -> Iterator[str]:
    """Yields a line if prepare.json is damaged or has other settings than the manifest."""
    path = folder / SETTINGS
    try:
        stored, expected = (
            from_stored_names(values) for values in (read_json_object(path, MAX_JSON_BYTES), manifest["settings"])
        )
        stored = {"truncate": False} | stored  # as in folders of the first versions
        if differing := [name for name in expected if stored.get(name) != expected[name]]:
            yield f"{path}: differs from {MANIFEST} in {', '.join(sorted(differing))}"
    except FileNotFoundError:
        yield f"{path}: is missing"
    except InputError as e:
        yield str(e)
