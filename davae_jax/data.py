"""Training texts: read from a file, turned into ids, and laid out in batches that any step can be asked for."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from tqdm import tqdm

from davae_jax.errors import InputError
from davae_jax.tokenizers import DecoderTokenizer, EncoderTokenizer

CHUNK = 1000  # texts tokenized at once


class Batch(NamedTuple):
    """int32; rows end in padding."""

    encoder_ids: np.ndarray  # [B, S]
    decoder_ids: np.ndarray  # [B, T], bos first, the end token last
    lengths: np.ndarray  # [B], of decoder_ids, bos and end counted

    @property
    def tokens(self) -> int:
        """Those that are trained."""
        return int((self.lengths - 1).sum())


class Texts(NamedTuple):
    """Tokenized texts. Row i is line `lines[i]` of the file, counted from 1."""

    encoder_ids: list[np.ndarray]
    decoder_ids: list[np.ndarray]
    lines: np.ndarray
    too_long: int  # how many were left out for it


def read_texts(path: Path, field: str = "text") -> list[str]:
    """One text a line; of JSON Lines (`.jsonl`, `.json`), the field of each line. Blank lines are empty texts.

    Raises:
      InputError: no such file, an empty one, or a line that is not UTF-8 or not JSON with that field, by its number.
    """
    try:
        data = path.read_bytes()
    except OSError as e:
        raise InputError(f"{path}: cannot be read ({e.strerror})") from None
    lines = read_lines(data, str(path))
    if not any(line.strip() for line in lines):
        raise InputError(f"{path}: holds no text")
    if path.suffix not in (".jsonl", ".json"):
        return lines
    texts = []
    for number, line in enumerate(lines, 1):
        try:
            text = json.loads(line)[field] if line.strip() else ""
        except ValueError:
            raise InputError(f"{path}: line {number} is not JSON") from None
        except (KeyError, TypeError, IndexError):
            raise InputError(f"{path}: line {number} has no field {field!r}") from None
        if not isinstance(text, str):
            raise InputError(f"{path}: line {number}: the field {field!r} is not a text")
        try:
            text.encode("utf-8")
        except UnicodeEncodeError:
            raise InputError(f"{path}: line {number}: the field {field!r} holds half of a surrogate pair") from None
        texts.append(text)
    if not any(text.strip() for text in texts):
        raise InputError(f"{path}: holds no text")
    return texts


def read_lines(data: bytes, name: str) -> list[str]:
    """The lines of UTF-8 bytes, split at line feeds alone. Raises InputError naming a line that is not UTF-8."""
    lines = data.removeprefix(b"\xef\xbb\xbf").split(b"\n")
    if lines[-1] == b"":
        lines.pop()
    texts = []
    for number, line in enumerate(lines, 1):
        try:
            texts.append(line.removesuffix(b"\r").decode("utf-8"))
        except UnicodeDecodeError:
            raise InputError(f"{name}: line {number} is not UTF-8") from None
    return texts


def tokenize(
    texts: Sequence[str],
    encoder: EncoderTokenizer,
    decoder: DecoderTokenizer,
    *,
    max_length: int,
    source: str,
    cut: bool = False,
) -> Texts:
    """Ids of all texts but the blank ones and those too long: for the encoder's positions, or of more than `max_length`
    decoder ids, bos and end counted.

    cut: texts that are too long for the encoder alone are kept, of its ids those that fit.

    Raises:
      InputError: nothing is left.
    """
    encoder_rows, decoder_rows, lines, too_long = [], [], [], 0
    with tqdm(total=len(texts), desc="tokenize", unit="text", disable=None, leave=False) as bar:
        for start in range(0, len(texts), CHUNK):
            part = texts[start : start + CHUNK]
            for i, (text, ids) in enumerate(zip(part, encoder.encode(part), strict=True), start + 1):
                if not text.strip():
                    continue
                row = [decoder.bos_id, *decoder.encode(text)]
                was_cut = ids[-2] != encoder.sep_id  # the inner one of two is lost when a text is cut
                if len(row) > max_length or (was_cut and not cut):
                    too_long += 1
                    continue
                encoder_rows.append(np.array(ids, np.int32))
                decoder_rows.append(np.array(row, np.int32))
                lines.append(i)
            bar.update(len(part))
    if not lines:
        longest = f"{max_length} tokens (or {encoder.max_ids} of the encoder's)"
        raise InputError(f"{source}: holds only blank texts and texts of more than {longest}")
    return Texts(encoder_rows, decoder_rows, np.array(lines), too_long)


def fitting(texts: Sequence[str], encoder: EncoderTokenizer, decoder: DecoderTokenizer, max_length: int) -> list[str]:
    """Those of the texts that `tokenize` would keep."""
    try:
        kept = tokenize(texts, encoder, decoder, max_length=max_length, source="")
    except InputError:
        return []
    return [texts[i - 1] for i in kept.lines]


class Batches:
    """The batch of every step: a seeded shuffle of the texts an epoch, without end.

    Texts of like length stand together, in `buckets` shapes, so that little is padding and a few programs serve all
    steps. What does not fill a batch goes with the next longer texts; of the longest, some may wait for another epoch.
    A step's batch depends on the seed and the step alone, so the step is all a run has to remember of its place.
    """

    def __init__(
        self,
        texts: Texts,
        batch_size: int,
        *,
        pad_id: int,
        buckets: int = 1,
        seed: int = 0,
        encoder_positions: int | None = None,  # no row of the encoder's is padded past them
    ):
        self.texts, self.batch_size, self.pad_id, self.seed = texts, batch_size, pad_id, seed
        order = np.argsort([len(row) for row in texts.decoder_ids], kind="stable")
        # Fewer texts than a batch: some stand in it more than once.
        self._groups = np.array_split(np.resize(order, max(len(order), batch_size)), buckets)
        self._shapes = []
        longest = 0  # of the encoder's rows up to here: leftovers of one bucket must fit the next
        for group in self._groups:
            longest = max([longest, *(len(texts.encoder_ids[i]) for i in group)])
            T = max([1, *(len(texts.decoder_ids[i]) for i in group)])
            S = round_up(longest, 8)
            self._shapes.append((min(S, encoder_positions or S), round_up(T, 8)))
        self.per_epoch = len(order) // batch_size or 1
        self._epoch, self._plan = None, []

    @property
    def size(self) -> str:
        """Of a batch, in words."""
        return f"{self.batch_size} texts"

    def rows(self, step: int) -> tuple[np.ndarray, tuple[int, int]]:
        """Which texts make the batch of a step, and its shape (S, T)."""
        epoch, place = divmod(step, self.per_epoch)
        if epoch != self._epoch:
            self._epoch, self._plan = epoch, self._shuffled(epoch)
        return self._plan[place]

    def __getitem__(self, step: int) -> Batch:
        rows, (S, T) = self.rows(step)
        encoder_ids = np.zeros((len(rows), S), np.int32)
        decoder_ids = np.full((len(rows), T), self.pad_id, np.int32)
        lengths = np.zeros(len(rows), np.int32)
        for place, row in enumerate(rows):
            ids = self.texts.encoder_ids[row]
            encoder_ids[place, : len(ids)] = ids
            ids = self.texts.decoder_ids[row]
            decoder_ids[place, : len(ids)] = ids
            lengths[place] = len(ids)
        return Batch(encoder_ids, decoder_ids, lengths)

    def _shuffled(self, epoch: int) -> list[tuple[np.ndarray, tuple[int, int]]]:
        rng = np.random.default_rng((self.seed, epoch))
        B = self.batch_size
        plan, left = [], np.zeros(0, int)
        for group, shape in zip(self._groups, self._shapes, strict=True):
            rows = np.concatenate([left, rng.permutation(group)])
            full = len(rows) // B * B
            plan += [(part, shape) for part in rows[:full].reshape(-1, B)]
            left = rows[full:]
        return [plan[i] for i in rng.permutation(len(plan))]


def round_up(n: int, multiple: int) -> int:
    return -(-n // multiple) * multiple
