"""Reads the training texts and the held-out texts of a run."""

from __future__ import annotations

import hashlib
from collections.abc import Container
from pathlib import Path
from typing import NamedTuple

import numpy as np

from davae_jax.data import demo_corpus
from davae_jax.data.readers import read_texts
from davae_jax.data.shards import Prepared

HELD_OUT_FRACTION = 0.01  # of the distinct training texts, if no file of held-out texts is given


class Corpus(NamedTuple):
    train: list[str]  # empty if `prepared` is given
    held_out: list[str]
    grammar: Container[str] | None  # the sentences of the demo's grammar; None for other texts
    analogy: list[str]  # three texts a, b, c for the analogy among the examples
    source: str  # the file's name, for messages
    lines: np.ndarray  # the line of each training text in that file, from 1
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


def read_corpus(train: Path | None, valid: Path | None = None, field: str = "text") -> Corpus:
    """Reads the texts of a run.

    Args:
      train: a file of texts, a folder made by `davae prepare`, or None for the demo's corpus.
      valid: a file of held-out texts; None: some training texts are held out.
      field: name of the text in a line of JSON Lines.

    Raises:
      InputError: a file or folder cannot be used.
    """
    if train is None:
        return _demo_corpus()
    held_out = None if valid is None else _drop_blank(read_texts(valid, field))
    if train.is_dir():
        prepared = Prepared(train)
        held_out = _drop_blank(prepared.held_out()) if held_out is None else held_out
        return Corpus([], held_out, None, _first_three(held_out), str(train), np.zeros(0, int), prepared)
    texts = read_texts(train, field)
    lines = np.flatnonzero([bool(text.strip()) for text in texts]) + 1
    if held_out is None:
        held_out = _choose_held_out([texts[i - 1] for i in lines])
        held_out_texts = set(held_out)
        lines = np.array([i for i in lines if texts[i - 1] not in held_out_texts])
    return Corpus([texts[i - 1] for i in lines], held_out, None, _first_three(held_out), str(train), lines)


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
