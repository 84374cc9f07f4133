"""Reads the training texts and the held-out texts of a run."""

from __future__ import annotations

import hashlib
import warnings
from array import array
from collections.abc import Container, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from davae_jax.data import demo_corpus
from davae_jax.data.inputs.bad_lines import BadLine, BadLineLimit
from davae_jax.data.inputs.encodings import UTF_8
from davae_jax.data.inputs.file_lines import FileLines, name_files
from davae_jax.data.inputs.readers import find_files, read_file
from davae_jax.data.prepared.shards import Prepared, is_prepared
from davae_jax.utils.errors import InputError, OptionError

HELD_OUT_FRACTION = 0.01  # of the distinct training texts, if no file of held-out texts is given


class Corpus(NamedTuple):
    train: list[str]  # empty if `prepared` is given
    held_out: list[str]
    grammar: Container[str] | None  # the sentences of the demo's grammar; None for other texts
    analogy: list[str]  # three texts a, b, c for the analogy among the examples
    source: str  # the names of the files, for messages
    lines: np.ndarray  # the line of each training text, counted over all files, from 1
    files: FileLines | None = None  # the files of these lines
    prepared: Prepared | None = None

    @property
    def digest(self) -> str:
        """Returns a hash of the training texts in their order."""
        return self.prepared.digest if self.prepared else _digest(self.train)

    @property
    def held_out_digest(self) -> str:
        """Returns a hash of the held-out texts in their order."""
        return _digest(self.held_out)

    @property
    def example(self) -> str:
        """Returns a text for use in example commands."""
        return (self.held_out or self.train or [""])[0]


def read_corpus(
    train: Sequence[Path] | None,
    valid: Sequence[Path] | None = None,
    fields: Sequence[str] = ("text",),
    encoding: str = UTF_8,
    max_bad: float = 0.01,
) -> Corpus:
    """Reads the texts of a run.

    Args:
      train: files and folders of texts, a folder made by `davae prepare`, or None for the demo's corpus.
      valid: files and folders of held-out texts; None: some training texts are held out.
      fields: of JSON, or columns of a table, that contain the text; several are joined by line feeds.
      encoding: of text and JSON.
      max_bad: the largest fraction of lines that may be unreadable.

    Raises:
      InputError: a file or folder cannot be used.
    """
    if train is None:
        return _demo_corpus()
    held_out = None if valid is None else _load_texts(valid, fields, encoding, max_bad).texts
    if any(map(is_prepared, train)):
        if len(train) > 1:
            folder = next(filter(is_prepared, train))
            raise OptionError(
                "--data.train", f"{folder}: was made by davae prepare and cannot be mixed with other texts"
            )
        prepared = Prepared(train[0])
        held_out = _drop_blank(prepared.held_out()) if held_out is None else held_out
        return Corpus([], held_out, None, _first_three(held_out), str(train[0]), np.zeros(0, int), prepared=prepared)
    source = name_files(train)
    texts, lines, files = _load_texts(train, fields, encoding, max_bad)
    if held_out is None:
        held_out = _choose_held_out(texts)
        distinct = set(held_out)
        kept = [i for i, text in enumerate(texts) if text not in distinct]
        texts, lines = [texts[i] for i in kept], lines[kept]
    return Corpus(texts, held_out, None, _first_three(held_out), source, lines, files)


class _Texts(NamedTuple):
    """The texts of several files, without blank ones; the number of the line of each; the files of these lines."""

    texts: list[str]
    lines: np.ndarray
    files: FileLines


def _load_texts(paths: Sequence[Path], fields: Sequence[str], encoding: str, max_bad: float) -> _Texts:
    """Reads texts as `davae prepare` does, into memory.

    Raises:
      InputError: a file cannot be read, there is no text, or too many lines cannot be read.
    """
    paths = find_files(paths, any_suffix=True)
    limit = BadLineLimit(max_bad, sum(path.stat().st_size for path in paths if path.is_file()), "--data.max-bad")
    texts, numbers, files = [], array("q"), FileLines([], [])
    lines, first_bad, bad, bytes_before = 0, None, 0, 0
    for path in paths:
        files.files.append(str(path))
        files.first_lines.append(lines + 1)
        size = path.stat().st_size if path.is_file() else 0
        for chunk in read_file(path, fields, encoding):
            for text, problem in chunk.lines:
                lines += 1
                if problem:
                    bad += 1
                    first_bad = first_bad or BadLine(*files.locate(lines), problem)
                elif text.strip():
                    texts.append(text)
                    numbers.append(lines)
            if first_bad and limit.will_be_exceeded(lines, bad, bytes_before + size * chunk.fraction_read):
                raise limit.error(first_bad, lines, bad, "the rest has not been read")
        bytes_before += size
    if first_bad and limit.is_exceeded(lines, bad):
        raise limit.error(first_bad, lines, bad)
    if not texts:
        raise InputError(f"{name_files(paths)}: contains no text")
    if first_bad:
        others = f"; {bad:,} of {lines:,} lines cannot be read and are left out"
        warnings.warn("{}: line {}: {}".format(*first_bad) + others, stacklevel=2)
    return _Texts(texts, np.array(numbers), files)


def _demo_corpus() -> Corpus:
    train, held_out, grammar = demo_corpus.make_corpus()
    positive = [text for text in held_out if grammar[text].good]
    analogy = [positive[0], demo_corpus.opposite(positive[0], grammar), positive[1]]
    return Corpus(train, held_out, grammar, analogy, "the demo's corpus", np.arange(1, len(train) + 1))


def _choose_held_out(texts: list[str]) -> list[str]:
    """Returns the texts to hold out. They do not depend on the run's seed, so that runs can be compared."""
    distinct = list(dict.fromkeys(texts))
    order = np.random.default_rng(0).permutation(len(distinct))
    return [distinct[i] for i in np.sort(order[: round(HELD_OUT_FRACTION * len(distinct))])]


def _first_three(texts: list[str]) -> list[str]:
    return (texts * 3)[:3]


def _drop_blank(texts: list[str]) -> list[str]:
    return [text for text in texts if text.strip()]


def _digest(texts: list[str]) -> str:
    return hashlib.sha256("\n".join(texts).encode()).hexdigest()[:16]
