"""`davae prepare`: tokenizes texts into shards for training."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from davae_jax.cli.base import Command, option_hint
from davae_jax.data.inputs.encodings import UTF_8, check_encoding
from davae_jax.data.prepared.build_shards import MIB, VocabularySizes, build_shards
from davae_jax.data.prepared.shard_index import describe_dropped
from davae_jax.data.prepared.shard_writer import ShardSettings
from davae_jax.utils.errors import VOCAB_SIZES, check_options


@dataclass(kw_only=True)
class Prepare(Command):
    """Tokenizes texts into shards for `train.py --data.train DIR`.

    After an interruption, the same command continues where it stopped. Blank texts and texts that are too long are
    dropped and counted. Lines that cannot be read are counted as well, and bad_lines.jsonl lists the first of them.
    """

    input: Annotated[tuple[Path, ...], tyro.conf.arg(metavar="PATH ...")]
    """Files of plain text with one text per line (.txt), JSON Lines (.jsonl, .json, .ndjson), Parquet (.parquet) or
    Arrow (.arrow). Plain text and JSON Lines may be compressed (.gz, .zst). A folder, such as a Hugging Face dataset,
    is replaced by the files in it, which must have the same format. Small files share a shard."""

    output: Annotated[Path, tyro.conf.arg(metavar="DIR")]
    """Folder for the result."""

    tokenizers: Annotated[Path | None, option_hint("DIR", "trained on a sample of the texts")] = None
    """Folder with spiece.model and vocab.txt."""

    field: Annotated[tuple[str, ...], tyro.conf.arg(metavar="NAME ...")] = ("text",)
    """JSON field or table column that contains the text. Several, such as a title and a body, are joined by line
    feeds."""

    encoding: str = UTF_8
    """Encoding of text and JSON, such as gb18030 or utf-16: any text encoding of Python."""

    max_length: int = 512
    """Maximum number of decoder tokens per text, including bos and the end token; longer texts are dropped."""

    encoder_positions: int = 512
    """Number of positions of the model's encoder; texts with more encoder tokens are dropped."""

    truncate: bool = False
    """Keep texts that are too long for the encoder, which then reads only their beginning. The decoder reads them up
    to --max-length. Use this for training with --data.segment-length."""

    held_out: Annotated[float | None, option_hint("FRACTION", "0.01, but at most about 16 MB")] = None
    """Fraction of distinct texts to hold out; duplicates go with their text."""

    decoder_vocab_size: int = 8000
    """Vocabulary size of the decoder, if tokenizers are trained."""

    encoder_vocab_size: int = 8000
    """Vocabulary size of the encoder, if tokenizers are trained."""

    max_bad: float = 0.01
    """Largest fraction of lines that may be unreadable. With more the command fails, before the end if it is clear."""

    shard_size: Annotated[int | None, option_hint("MIB", "1/256 of the input, from 1 to 1024")] = None
    """Size of a shard, in MiB of text."""

    workers: Annotated[int | None, option_hint("INT", "one per core")] = None
    """Number of worker processes; does not change the result."""

    def run(self) -> None:
        check_options(self, "", "input", len, "name a file or folder")
        check_options(self, "", "max_length", lambda n: n >= 3, "be at least 3")
        check_options(self, "", "encoder_positions", lambda n: n >= 5, "be at least 5")
        check_options(self, "", "decoder_vocab_size encoder_vocab_size", *VOCAB_SIZES)
        check_options(self, "", "shard_size workers", lambda n: n is None or n >= 1, "be at least 1")
        check_options(self, "", "held_out", lambda x: x is None or 0 <= x < 1, "be at least 0 and below 1")
        check_options(self, "", "field", lambda names: 0 < len(set(names)) == len(names), "be given, each once")
        check_options(self, "", "max_bad", lambda x: 0 <= x <= 1, "be at least 0 and at most 1")
        settings = ShardSettings(
            fields=self.field,
            max_length=self.max_length,
            encoder_positions=self.encoder_positions,
            truncate=self.truncate,
            held_out=self.held_out,
            shard_size=self.shard_size and self.shard_size * MIB,
            encoding=check_encoding(self.encoding),
        )
        tokenizers = self.tokenizers or VocabularySizes(self.decoder_vocab_size, self.encoder_vocab_size)
        counts = build_shards(self.input, self.output, settings, tokenizers, self.workers, self.max_bad)
        dropped = describe_dropped(counts)
        print(
            f"{self.output}: {counts['texts']:,} texts, {counts['decoder_tokens']:,} decoder tokens, "
            f"{counts['encoder_tokens']:,} encoder tokens" + (f"; dropped: {dropped}" if dropped else "")
        )
