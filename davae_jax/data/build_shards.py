"""`davae prepare`: texts → tokenised shards that a run reads in any order (prepared.py says how they lie).

The input is divided into pieces, which worker processes go through; a piece makes one shard, or several where its file
cannot be entered in the middle. A shard and what is known of it appear under their names when they are whole, so a
second start goes on behind the last of them. When all are there, their notes in `parts/` become the manifest.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from davae_jax.data.line_readers import FileSlice
from davae_jax.data.readers import read_slice
from davae_jax.data.shard_writer import (
    PARTS,
    SETTINGS,
    cached_tokenizers,
    is_held_out,
)
from davae_jax.data.shards import MANIFEST
from davae_jax.tokenizers.load import TOKENIZER_FILES
from davae_jax.tokenizers.training import train_sentencepiece, train_wordpiece
from davae_jax.utils.errors import InputError
from davae_jax.utils.files import is_partial, remove_partial, write_bytes, write_json
from davae_jax.utils.settings import changed_settings

TOKENIZER_TEXTS, TOKENIZER_BYTES = 50_000, 1 << 26  # at most, to train tokenizers on; taken from all over the input
HELD_OUT_FRACTION, HELD_OUT_BYTES = 0.01, 1 << 24


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


# ---- the work, in processes


# ---- after: what the shards' notes say, put together
