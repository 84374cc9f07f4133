"""Training texts: read from a file, turned into ids, and laid out in batches that any step can be asked for."""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import NamedSharding
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
    def read_lengths(self) -> tuple[int, int]:
        """(S, T): what encoder and decoder read of a row; the decoder does not read a text's last token."""
        return self.encoder_ids.shape[1], self.decoder_ids.shape[1] - 1


class Texts(NamedTuple):
    """Tokenized texts. Row i is line `lines[i]` of `source`, counted from 1."""

    encoder_ids: list[np.ndarray]
    decoder_ids: list[np.ndarray]
    lines: np.ndarray
    too_long: int  # how many were left out for it
    source: str = ""  # for messages

    @property
    def sizes(self) -> np.ndarray:
        """[n, 2], of each text its numbers of encoder and decoder ids."""
        return np.array([(len(e), len(d)) for e, d in zip(self.encoder_ids, self.decoder_ids, strict=True)])

    def ids(self, text: int) -> tuple[np.ndarray, np.ndarray]:
        """(encoder ids, decoder ids)"""
        return self.encoder_ids[text], self.decoder_ids[text]

    def where(self, texts: Sequence[int]) -> str:
        """Their lines, for messages."""
        return f"lines {', '.join(map(str, sorted(self.lines[texts])))} of {self.source}"


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
            texts.append(json_text(line, field))
        except ValueError as e:
            raise InputError(f"{path}: line {number}{e}") from None
    if not any(text.strip() for text in texts):
        raise InputError(f"{path}: holds no text")
    return texts


def json_text(line: str, field: str) -> str:
    """The field of a line of JSON; of a blank line, an empty text.

    Raises:
      ValueError: what is wrong, to be said behind the line's number.
    """
    try:
        text = json.loads(line)[field] if line.strip() else ""
    except (ValueError, RecursionError):
        raise ValueError(" is not JSON") from None
    except (KeyError, TypeError, IndexError):
        raise ValueError(f" has no field {field!r}") from None
    if not isinstance(text, str):
        raise ValueError(f": the field {field!r} is not a text")
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        raise ValueError(f": the field {field!r} holds half of a surrogate pair") from None
    return text


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
            filled = [i for i, text in enumerate(part) if text.strip()]
            rows = rows_of([part[i] for i in filled], encoder, decoder, max_length, cut=cut)
            for i, row in zip(filled, rows, strict=True):
                if row is None:
                    too_long += 1
                    continue
                encoder_rows.append(np.array(row[0], np.int32))
                decoder_rows.append(np.array(row[1], np.int32))
                lines.append(start + i + 1)
            bar.update(len(part))
    if not lines:
        longest = f"{max_length} tokens (or {encoder.max_ids} of the encoder's)"
        raise InputError(f"{source}: holds only blank texts and texts of more than {longest}")
    return Texts(encoder_rows, decoder_rows, np.array(lines), too_long, source)


def rows_of(
    texts: Sequence[str], encoder: EncoderTokenizer, decoder: DecoderTokenizer, max_length: int, cut: bool = False
) -> Iterator[tuple[list[int], list[int]] | None]:
    """The encoder's and the decoder's ids of each text, as a batch has them; None of a text that is too long.

    cut: as `tokenize`.
    """
    for text, ids in zip(texts, encoder.encode(texts), strict=True):
        was_cut = ids[-2] != encoder.sep_id and not cut  # the inner one of two is lost when a text is cut
        row = None if was_cut else [decoder.bos_id, *decoder.encode(text)]
        yield None if row is None or len(row) > max_length else (ids, row)


def fitting(
    texts: Sequence[str], encoder: EncoderTokenizer, decoder: DecoderTokenizer, max_length: int, cut: bool = False
) -> list[str]:
    """Those of the texts that `tokenize` would keep."""
    try:
        kept = tokenize(texts, encoder, decoder, max_length=max_length, source="", cut=cut)
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

    @property
    def count(self) -> int:
        """Texts there are."""
        return len(self.texts.lines)

    @property
    def too_long(self) -> int:
        """Texts that were left out because they are too long."""
        return self.texts.too_long

    def where(self, step: int) -> str:
        """The lines that make the batch of a step, for messages."""
        return self.texts.where(self.rows(step)[0])

    def __getitem__(self, step: int) -> Batch:
        return self.read(step, 0, self.batch_size)

    def read(self, step: int, start: int, stop: int) -> Batch:
        """Rows start to stop of a step's batch."""
        rows, shape = self.rows(step)
        rows = rows[start:stop]
        return padded([(self.texts.encoder_ids[i], self.texts.decoder_ids[i]) for i in rows], shape, self.pad_id)

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


def ahead(batches: Any, spans: Sequence[tuple[int, int]], step: int, threads: int) -> Iterator[dict]:
    """These rows of the batches of a step and all that follow, each {(start, stop): rows}.

    threads: of grain's, that read before it is wanted; 0 for texts that are in memory.
    """
    steps = _Steps(batches, spans)
    if not threads:
        return map(steps.__getitem__, itertools.count(step))
    import grain

    options = grain.ReadOptions(num_threads=threads, prefetch_buffer_size=2 * threads)
    coming = iter(grain.MapDataset.source(steps).to_iter_dataset(options))
    coming.set_state({"next_index": step})
    return coming


class _Steps:
    """What grain reads from: step → the parts of its batch, without end."""

    def __init__(self, batches: Any, spans: Sequence[tuple[int, int]]):
        self._batches, self._spans = batches, spans

    def __len__(self) -> int:
        return 1 << 62

    def __getitem__(self, step: int) -> dict[tuple[int, int], Batch]:
        return {span: self._batches.read(step, *span) for span in self._spans}


def spans_of(sharding: NamedSharding, size: int) -> list[tuple[int, int]]:
    """Which rows of a batch this process's devices hold, as (start, stop)."""
    where = sharding.addressable_devices_indices_map((size,)).values()
    return sorted({index[0].indices(size)[:2] for index in where})


def placed(parts: dict[tuple[int, int], Batch], size: int, sharding: NamedSharding) -> Batch:
    """A batch of `size` rows, laid over the devices of all processes, from the rows that this process's own hold."""

    def whole(*leaves):
        by_span = dict(zip(parts, leaves, strict=True))
        part = lambda where: by_span[where[0].indices(size)[:2]]  # noqa: E731
        return jax.make_array_from_callback((size, *leaves[0].shape[1:]), sharding, part)

    return jax.tree.map(whole, *parts.values())


def padded(rows: Sequence[tuple[np.ndarray, np.ndarray]], shape: tuple[int, int], pad_id: int) -> Batch:
    """The batch of these rows of encoder and decoder ids, padded to S and T."""
    S, T = shape
    encoder_ids = np.zeros((len(rows), S), np.int32)
    decoder_ids = np.full((len(rows), T), pad_id, np.int32)
    lengths = np.zeros(len(rows), np.int32)
    for place, (encoder_row, decoder_row) in enumerate(rows):
        encoder_ids[place, : len(encoder_row)] = encoder_row
        decoder_ids[place, : len(decoder_row)] = decoder_row
        lengths[place] = len(decoder_row)
    return Batch(encoder_ids, decoder_ids, lengths)


def round_up(n: int, multiple: int) -> int:
    return -(-n // multiple) * multiple
