"""The settings of training texts and of the batches that are formed from them."""

# The help texts below fields are single lines, because the command line's help keeps their line breaks.
# ruff: noqa: E501
from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from davae_jax.data.inputs.encodings import UTF_8, check_encoding
from davae_jax.utils.errors import UNIT_INTERVAL, VOCAB_SIZES, OptionError, check_options


@dataclass(frozen=True)
class DataConfig:
    """Training texts, and how batches are formed from them."""

    train: tuple[Path, ...] | None = None
    """Training texts: files or folders of text, JSON Lines, JSON arrays, Parquet or Arrow, as `davae prepare` reads them (docs/data.md), or a folder that it made. None: a small synthetic corpus that the project generates."""

    valid: tuple[Path, ...] | None = None
    """Files or folders of held-out texts. None: some training texts are held out."""

    field: tuple[str, ...] = ("text",)
    """JSON field or table column that contains the text. Several, such as a title and a body, are joined by line feeds."""

    encoding: str = UTF_8
    """Encoding of text and JSON, such as gb18030 or utf-16: any text encoding of Python."""

    max_bad: float = 0.01
    """Largest fraction of lines that may be unreadable. They are left out with a warning; with more, the run does not start."""

    max_length: int = 128
    """Maximum text length in decoder tokens, special tokens included; longer texts are dropped."""

    buckets: int | None = None
    """Number of length buckets. The batches of a bucket have one shape, for which a program is compiled. None: 4, or 1 for the synthetic corpus, whose texts are all about equally long."""

    pack: bool = False
    """Pack several texts into each row, each with its own latent, so that there is almost no padding. Rows have the maximum text length."""

    segment_length: int | None = None
    """Train on longer texts in segments of this many tokens, with the decoder's recurrent memory between segments and one latent per text. The encoder then reads only the beginning of texts longer than its positions. None: whole texts."""

    segment_mask: Literal["full", "published"] = "full"
    """Attention mask over the memory. full: all of it. published: at most one segment length back."""

    decoder_vocab_size: int | None = None
    """Decoder vocabulary size, if tokenizers are trained. None: 8000, or 600 for the synthetic corpus."""

    encoder_vocab_size: int = 8000
    """Encoder vocabulary size, if tokenizers are trained."""

    @property
    def truncate(self) -> bool:
        """Whether texts longer than the encoder's positions are kept and the encoder reads only their beginning."""
        return self.segment_length is not None

    def __post_init__(self):
        for name in ("train", "valid", "field"):  # a single path or name will do
            if isinstance(value := getattr(self, name), str | Path):
                object.__setattr__(self, name, (value,))
        object.__setattr__(self, "encoding", check_encoding(self.encoding, "--data.encoding"))
        check_options(self, "data.", "train valid", lambda paths: paths is None or len(paths) > 0, "name a file")
        check_options(self, "data.", "field", lambda names: 0 < len(set(names)) == len(names), "be given, each once")
        check_options(self, "data.", "max_bad", *UNIT_INTERVAL)
        check_options(self, "data.", "max_length", lambda n: n >= 3, "be at least 3")
        check_options(self, "data.", "buckets segment_length", lambda n: n is None or n >= 1, "be at least 1")
        check_options(self, "data.", "decoder_vocab_size encoder_vocab_size", *VOCAB_SIZES)
        if self.pack and self.buckets is not None:
            raise OptionError("--data.buckets", "is used only without --data.pack")
        if self.pack and self.segment_length is not None:
            raise OptionError("--data.segment-length", "is used only without --data.pack")
        if self.valid is not None and self.train is None:
            raise OptionError("--data.valid", "is used only with --data.train")
