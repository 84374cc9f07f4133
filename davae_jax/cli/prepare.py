"""`davae prepare`."""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated, Any

import tyro

from davae_jax.cli.base import Command
from davae_jax.data.build_shards import HELD_OUT_BYTES, HELD_OUT_FRACTION, open_folder, prepare_tokenizers
from davae_jax.data.readers import find_files, split_into_slices
from davae_jax.data.shard_index import format_summary, merge_shards
from davae_jax.data.shard_writer import MIB, PARTS, ShardTask, file_sha256
from davae_jax.data.shards import MANIFEST
from davae_jax.data.worker_pool import available_cores, run_tasks
from davae_jax.tokenizers.load import TOKENIZER_FILES
from davae_jax.utils.errors import InputError, check_options, system_reason


def _option(metavar: str, default: str):
    return tyro.conf.arg(metavar=metavar, help_behavior_hint=f"(default: {default})")


@dataclass(kw_only=True)
class Prepare(Command):
    """Turns texts into tokenised shards for `train.py --data.train DIR`.

    Started again after an interruption, with the same options, it goes on where it stopped. Blank texts and those that
    are too long are left out and counted; lines that cannot be read are counted, and the first of them listed in
    bad_lines.jsonl.
    """

    input: Annotated[tuple[Path, ...], tyro.conf.arg(metavar="PATH ...")]
    """Files: plain text, one a line (.txt), JSON Lines (.jsonl, .json, .ndjson), both also .gz or .zst, .parquet,
    .arrow; or folders of one of these kinds, such as a Hugging Face dataset's."""

    output: Annotated[Path, tyro.conf.arg(metavar="DIR")]
    """Folder for the result."""

    tokenizers: Annotated[Path | None, _option("DIR", "trained on a sample of the texts")] = None
    """Folder with spiece.model and vocab.txt."""

    field: str = "text"
    """Where in a line of JSON the text is; of a table, the column."""

    max_length: int = 512
    """Longer texts are left out; in tokens of the decoder, the beginning and the end counted."""

    encoder_positions: int = 512
    """Positions of the model's encoder. Texts of more ids are left out."""

    cut: bool = False
    """Keep those texts: the encoder gets their beginning, the decoder all of them, up to --max-length. For runs with
    --data.segment-length."""

    held_out: Annotated[float | None, _option("PART", "0.01; of large inputs less, about 16 MB")] = None
    """Part of the different texts that is kept apart to measure on, with all copies of each."""

    pieces: int = 8000
    """Size of the decoder's vocabulary, where tokenizers are trained."""

    entries: int = 8000
    """Size of the encoder's vocabulary, where tokenizers are trained."""

    shard_size: Annotated[int | None, _option("MIB", "a 256th of the input, from 1 to 1024")] = None
    """MiB of input that make a shard."""

    workers: Annotated[int | None, _option("INT", "as many as there are cores")] = None
    """Processes that work at once; changes no result."""

    def run(self) -> None:
        check_options(self, "", "max_length", lambda n: n >= 3, "be at least 3")
        check_options(self, "", "encoder_positions", lambda n: n >= 5, "be at least 5")
        check_options(self, "", "pieces entries", lambda n: n >= 10, "be at least 10")
        check_options(self, "", "shard_size workers", lambda n: n is None or n >= 1, "be at least 1")
        check_options(self, "", "held_out", lambda x: x is None or 0 <= x < 1, "be at least 0 and below 1")
        files = find_files(self.input)
        settings = self.settings(files)
        open_folder(self.output, settings)
        try:
            self.prepare(files, settings)
        except OSError as e:  # a read that fails is an InputError already
            raise InputError(f"{e.filename or self.output}: cannot be written ({system_reason(e)})") from e
        shutil.rmtree(self.output / PARTS, ignore_errors=True)
        counts = json.loads((self.output / MANIFEST).read_text(encoding="utf-8"))["counts"]
        print(format_summary(self.output, counts))

    def prepare(self, files: list[Path], settings: dict[str, Any]) -> None:
        """Makes what is not there yet."""
        folder = self.output
        if not (folder / MANIFEST).exists():
            pieces = [piece for file in files for piece in split_into_slices(file, settings["shard_size"])]
            prepare_tokenizers(folder, self.tokenizers, settings, pieces)
            tasks = [
                ShardTask(str(folder), n, piece, **{name: settings[name] for name in ShardTask._fields[3:]})
                for n, piece in enumerate(pieces)
            ]
            run_tasks(tasks, self.workers or available_cores())
            merge_shards(folder, tasks, settings)

    def settings(self, files: list[Path]) -> dict[str, Any]:
        """What decides the result, as prepare.json and the manifest have it."""
        found = {str(file): file.stat() for file in files}
        size = sum(stat.st_size for stat in found.values())
        shard_size = self.shard_size * MIB if self.shard_size else min(max(size // 256, MIB), 1024 * MIB)
        if self.tokenizers is None:
            tokenizers = {"pieces": self.pieces, "entries": self.entries}
        else:
            tokenizers = {name: file_sha256(self.tokenizers / name) for name in TOKENIZER_FILES}
        when = {name: datetime.fromtimestamp(stat.st_mtime, UTC).isoformat() for name, stat in found.items()}
        return {
            "inputs": {name: f"{stat.st_size} bytes of {when[name]}" for name, stat in found.items()},
            "field": self.field,
            "max_length": self.max_length,
            "encoder_positions": self.encoder_positions,
            "cut": self.cut,
            "held_out": min(HELD_OUT_FRACTION, HELD_OUT_BYTES / max(1, size))
            if self.held_out is None
            else self.held_out,
            "shard_size": shard_size,
            "tokenizers": tokenizers,
        }
