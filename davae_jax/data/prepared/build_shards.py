"""Tokenizes texts into shards, which a training run reads in any order (`shards.py` describes the files).

Large input files are split into slices, small ones are put together, and worker processes write the shards of each of
these tasks (`shard_writer.py`). A shard and its statistics are renamed to their final names when they are complete, so
the same call resumes interrupted work after the last complete shard. When all shards exist, `shard_index.py` writes the
manifest.
"""

from __future__ import annotations

import contextlib
import itertools
import re
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, NamedTuple

from davae_jax.data.inputs.bad_lines import BadLineLimit
from davae_jax.data.inputs.encodings import UTF_8
from davae_jax.data.inputs.file_lines import name_files
from davae_jax.data.inputs.line_readers import FileSlice
from davae_jax.data.inputs.readers import check_outside, find_files, read_slice, split_into_slices
from davae_jax.data.prepared.shard_index import merge_shards
from davae_jax.data.prepared.shard_writer import (
    PARTS,
    ShardSettings,
    ShardTask,
    is_held_out,
    load_new_tokenizers,
    write_shards,
)
from davae_jax.data.prepared.shards import (
    MANIFEST,
    MAX_JSON_BYTES,
    SETTINGS,
    Prepared,
    from_stored_names,
    to_stored_names,
)
from davae_jax.tokenizers.load import TOKENIZER_FILES
from davae_jax.tokenizers.training import (
    SAMPLE_BYTES,
    SAMPLE_CHARACTERS,
    SAMPLE_TEXTS,
    train_sentencepiece,
    train_wordpiece,
)
from davae_jax.utils.errors import InputError, OptionError, system_reason
from davae_jax.utils.files import (
    check_local,
    check_utf8_path,
    file_sha256,
    is_partial,
    is_same_folder,
    remove_partial,
    to_json,
    write_bytes,
    write_json,
)
from davae_jax.utils.json_files import read_json_object
from davae_jax.utils.locks import FolderLock
from davae_jax.utils.progress import progress_bar
from davae_jax.utils.settings import changed_settings
from davae_jax.utils.worker_pool import available_cores, run_tasks

SHARED = "shared"  # the setting in prepare.json that says that small files share shards; absent in earlier versions
OWN_SETTINGS = {"inputs", "max_length", "tokenizers"}  # by which a prepare.json is known as ours, in every version
MAX_FILES = 10_000  # maximum number of files that share a shard
# The default fraction of held-out texts, and their maximum size in bytes, which lowers the fraction for large inputs.
HELD_OUT_FRACTION, HELD_OUT_BYTES = 0.01, 1 << 24
MIB = 1 << 20


class VocabularySizes(NamedTuple):
    """The vocabulary sizes of tokenizers that are to be trained."""

    decoder_vocab_size: int
    encoder_vocab_size: int


def build_shards(
    inputs: Sequence[Path],
    output: Path,
    settings: ShardSettings,
    tokenizers: Path | VocabularySizes,
    workers: int | None = None,
    max_bad: float = 0.01,
) -> dict[str, int]:
    """Tokenizes texts into shards, or completes the work of an interrupted call with the same arguments.

    Args:
      inputs: files, or folders of files of one format.
      output: the folder for the result.
      settings: they determine the contents of the shards. `held_out` None: 1 % of the texts, or less for large inputs.
        `shard_size` None: 1/256 of the input, but at least 1 MiB and at most 1024 MiB.
      tokenizers: a folder with vocab.txt and spiece.model, or the sizes of tokenizers that are trained on a sample of
        the texts.
      workers: the number of worker processes, which does not change the result; None: one per core.
      max_bad: the largest fraction of lines that may be unreadable.

    Returns:
      The counts in the manifest: texts, tokens, and dropped texts by reason.

    Raises:
      InputError: an input cannot be read, the output cannot be written or has lost files, the tokenizers cannot be
        used, too many lines are unreadable, or no text remains.
      OptionError: the output was made with other settings or is inside an input folder, or the texts have more
        characters than `decoder_vocab_size`.
    """
    check_local(output)
    check_outside(output, inputs, "--output")
    files = find_files(inputs)
    if isinstance(tokenizers, VocabularySizes) and (pipes := [file for file in files if not file.is_file()]):
        raise OptionError("--tokenizers", f"is required: {pipes[0]} is a pipe or a device, and can be read only once")
    input_bytes = sum(file.stat().st_size for file in files)
    settings = _with_defaults(settings, input_bytes)
    stored = _settings_to_store(files, settings, tokenizers)
    if len(to_json(stored)) > MAX_JSON_BYTES // 3:  # the manifest contains the names again, for the shards
        raise InputError(f"{name_files(files)}: too many files; put several of them into one")
    with FolderLock() as lock:
        own = isinstance(tokenizers, Path) and is_same_folder(tokenizers, output)
        stored = _open_folder(output, stored, lock, keep_tokenizers=own)
        limit = BadLineLimit(max_bad, input_bytes)
        _build(output, stored, files, settings, tokenizers, workers or available_cores(), limit)
    manifest = Prepared(output).manifest  # a folder that was complete may have lost files since, as in a copy
    if missing := [name for name in manifest.get("files", ()) if not (output / name).is_file()]:
        raise InputError(f"{output / missing[0]}: is missing; copy the folder again, or remove it and prepare it again")
    return manifest["counts"]


def _settings_to_store(
    files: Sequence[Path], settings: ShardSettings, tokenizers: Path | VocabularySizes
) -> dict[str, Any]:
    """Returns the content of prepare.json.

    Settings that earlier versions did not have are left out if they have no effect, so that their folders stay as they
    are.
    """
    values = {
        "inputs": _describe_inputs(files),
        **settings._asdict(),
        "fields": settings.fields[0] if len(settings.fields) == 1 else list(settings.fields),
        "tokenizers": _describe_tokenizers(tokenizers),
    }
    if settings.encoding == UTF_8:
        del values["encoding"]
    return to_stored_names(values | {SHARED: True})


def _build(
    output: Path,
    stored: dict[str, Any],
    files: Sequence[Path],
    settings: ShardSettings,
    tokenizers: Path | VocabularySizes,
    workers: int,
    limit: BadLineLimit,
) -> None:
    """Makes what an open folder still lacks of tokenizers, shards and manifest."""
    try:
        if not (output / MANIFEST).exists():
            slices = [split_into_slices(file, settings.shard_size, settings.encoding) for file in files]
            _provide_tokenizers(output, tokenizers, list(itertools.chain(*slices)), settings)
            parts = group_slices(slices, settings.shard_size if SHARED in stored else -1)
            tasks = [ShardTask(str(output), n, part, settings, limit) for n, part in enumerate(parts)]
            _run_with_progress(tasks, workers)
            _check_unchanged(output, files, stored["inputs"])
            merge_shards(output, stored, limit)
    except OSError as e:  # of a file that is written; readers raise InputError
        raise InputError(f"{e.filename or output}: cannot be written ({system_reason(e)})") from e
    _remove_parts(output / PARTS)


def group_slices(slices: Sequence[Sequence[FileSlice]], max_bytes: int) -> list[list[FileSlice]]:
    """Returns the parts of the input that become shards of their own.

    Small files share a part of at most `max_bytes` and `MAX_FILES`; a file of several slices has a part for each.

    Args:
      slices: the slices of each file.
      max_bytes: negative if no files share a part.
    """
    parts: list[list[FileSlice]] = []
    room = -1  # bytes that may be added to the last part
    for of_file in slices:
        total = sum(file_slice.size for file_slice in of_file)
        if len(of_file) == 1 and total <= room and len(parts[-1]) < MAX_FILES:
            parts[-1] += of_file
            room -= total
        else:
            parts += [[file_slice] for file_slice in of_file]
            room = max_bytes - total if len(of_file) == 1 else -1
    return parts


def _with_defaults(settings: ShardSettings, input_bytes: int) -> ShardSettings:
    """Returns the settings with the defaults of those that are None, which depend on the size of the input."""
    held_out, shard_size = settings.held_out, settings.shard_size
    if held_out is None:
        held_out = min(HELD_OUT_FRACTION, HELD_OUT_BYTES / max(1, input_bytes))
    if shard_size is None:
        shard_size = min(max(input_bytes // 256, MIB), 1024 * MIB)
    return settings._replace(held_out=held_out, shard_size=shard_size)


def _describe_tokenizers(tokenizers: Path | VocabularySizes) -> dict[str, Any]:
    """Returns the hashes of the tokenizers' files, or the sizes of those to be trained."""
    if isinstance(tokenizers, VocabularySizes):
        return tokenizers._asdict()
    return {name: file_sha256(tokenizers / name) for name in TOKENIZER_FILES}


def _describe_inputs(files: Sequence[Path]) -> dict[str, str]:
    """Returns the size and the modification time of every file, so that a changed file counts as a changed setting."""
    stats = {str(file): file.stat() for file in files}
    return {name: f"{stat.st_size} bytes of {_describe_time(stat.st_mtime)}" for name, stat in stats.items()}


def _describe_time(seconds: float) -> str:
    """Returns a time as a date, or as its seconds if its year is none of Python's: a wrong clock or copy left it."""
    try:
        return datetime.fromtimestamp(seconds, UTC).isoformat()
    except (ValueError, OverflowError, OSError):
        return f"{seconds} s"


def _check_unchanged(output: Path, files: Sequence[Path], inputs: dict[str, str]) -> None:
    """Raises InputError if a file is not the one that was there before it was read: some texts are then missing."""
    files = [file for file in files if not file.exists() or file.is_file()]  # the time of a pipe is that of its use
    for file in files:
        if not file.exists() or _describe_inputs([file])[str(file)] != inputs[str(file)]:
            raise InputError(
                f"{file}: has changed while it was read; prepare the texts into another folder than {output}"
            )


def _run_with_progress(tasks: list[ShardTask], workers: int) -> None:
    total = sum(file_slice.size for task in tasks for file_slice in task.slices)
    with progress_bar(total=total, desc="prepare", unit="B", unit_scale=True, unit_divisor=1024, leave=False) as bar:
        run_tasks(write_shards, tasks, workers, bar, counts=2)


# ---- prepare.json


def _open_folder(
    folder: Path, stored: dict[str, Any], lock: FolderLock, *, keep_tokenizers: bool = False
) -> dict[str, Any]:
    """Makes the output folder, or checks that an existing one was made with the same settings. Locks it.

    Args:
      stored: the content of prepare.json.
      keep_tokenizers: the tokenizers that an earlier call has left there are those to be used.

    Returns:
      The same; without `SHARED` if an earlier version, whose shards contain one file each, began the work.

    Raises:
      OptionError: the folder was made with other settings, or contains other files. They are left as they are.
      InputError: the folder cannot be written, or another program is writing to it.
    """
    path = folder / SETTINGS
    check_utf8_path(folder)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock.acquire(folder)
        if path.exists():
            old = read_json_object(path, MAX_JSON_BYTES)
            if not old.keys() >= OWN_SETTINGS:
                raise OptionError(
                    "--output", f"{path} is damaged, or of another program; restore it, or choose another folder"
                )
            if SHARED not in old and _has_shards(folder):
                del stored[SHARED]
            _check_settings(folder, old, stored, keep_tokenizers)
        elif not all(is_partial(file) or _is_empty_parts(file) for file in folder.iterdir()):
            raise OptionError("--output", f"{folder} contains files, but no {SETTINGS}; choose another folder")
        write_json(path, stored)
        (folder / PARTS).mkdir(exist_ok=True)
        for parent in (folder, folder / PARTS):
            remove_partial(parent)
        return stored
    except (OSError, ValueError) as e:
        if isinstance(e, InputError):
            raise
        raise InputError(f"{folder}: cannot be written ({getattr(e, 'strerror', None) or e})") from e


def _is_empty_parts(path: Path) -> bool:
    """Returns whether a path is the folder with which earlier versions began. One with files is the user's."""
    return path.name == PARTS and path.is_dir() and not any(path.iterdir())


def _remove_parts(folder: Path) -> None:
    """Removes the folder of the shards' statistics. Files that the user has put into it stay."""
    with contextlib.suppress(OSError):
        for path in folder.iterdir():
            if re.fullmatch(r"\d{5,}-\d{4,}\.jsonl?", path.name):
                path.unlink()
        folder.rmdir()


def _check_settings(folder: Path, old: dict[str, Any], new: dict[str, Any], keep_tokenizers: bool) -> None:
    """Raises OptionError if settings have changed and shards exist. If none exist, may remove the tokenizers."""
    # Folders of earlier versions, or of the default, do not have these settings.
    changed = changed_settings(
        from_stored_names(old),
        from_stored_names(new),
        defaults={"truncate": False, "encoding": UTF_8},
        ignored=[SHARED],
    )
    if not changed:
        return
    if _has_shards(folder):
        more = f" and {len(changed) - 3} more" if len(changed) > 3 else ""
        reason = f"was prepared with other settings: {', '.join(changed[:3])}{more}; choose another folder"
        raise OptionError("--output", f"{folder} {reason}")
    for name in () if keep_tokenizers else TOKENIZER_FILES:
        (folder / name).unlink(missing_ok=True)


def _has_shards(folder: Path) -> bool:
    return (folder / MANIFEST).exists() or any((folder / PARTS).glob("*.json"))


# ---- tokenizers


def _provide_tokenizers(
    folder: Path, tokenizers: Path | VocabularySizes, slices: list[FileSlice], settings: ShardSettings
) -> None:
    """Puts vocab.txt and spiece.model into the folder, copied or trained, unless they are already there."""
    missing = [name for name in TOKENIZER_FILES if not (folder / name).exists()]
    if missing and isinstance(tokenizers, VocabularySizes):
        texts = sample_texts(slices, settings.fields, settings.held_out)
        source = name_files(list(dict.fromkeys(file_slice.file for file_slice in slices)))
        if not texts:
            raise InputError(f"{source}: no text to train tokenizers on (--field {' '.join(settings.fields)})")
        vocab = train_wordpiece(texts, tokenizers.encoder_vocab_size)
        spiece = train_sentencepiece(texts, tokenizers.decoder_vocab_size, option="--decoder-vocab-size", source=source)
        for name, data in zip(TOKENIZER_FILES, (vocab, spiece), strict=True):
            write_bytes(folder / name, data)
    else:
        for name in missing:
            write_bytes(folder / name, (tokenizers / name).read_bytes())
    load_new_tokenizers(str(folder), settings.encoder_positions)  # raises InputError if they are damaged


def sample_texts(slices: list[FileSlice], fields: Sequence[str], held_out: float) -> list[str]:
    """Returns texts from the beginning of every slice, or their beginnings, without the held-out ones, to train
    tokenizers on.

    Their number and total size are bounded, to limit memory and time.
    """
    texts_per_slice, bytes_per_slice = -(-SAMPLE_TEXTS // len(slices)), -(-SAMPLE_BYTES // len(slices))
    sample = []
    for file_slice in slices:
        texts_left, bytes_left = texts_per_slice, bytes_per_slice
        for chunk in read_slice(file_slice, fields):
            texts = [line.text for line in chunk.lines if line.text and line.text.strip()][:texts_left]
            sample += [text[:SAMPLE_CHARACTERS] for text in texts if not is_held_out(text, held_out)]
            texts_left, bytes_left = texts_left - len(texts), bytes_left - chunk.text_bytes
            if texts_left <= 0 or bytes_left <= 0:
                break
    return sample
