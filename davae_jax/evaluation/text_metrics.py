"""Computes metrics of texts without a model: distinct n-grams, self-BLEU, edit distances along a path."""

from __future__ import annotations

import itertools
import math
import re
from collections import Counter
from collections.abc import Sequence

import numpy as np

# Each Chinese or Japanese character and each full-width sign is a word; white space separates all other words.
_CJK = "\u3000-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\uff00-\uffef\U00020000-\U0003ffff"
_WORD_OR_SPACE = re.compile(rf"\s+|[{_CJK}]|[^\s{_CJK}]+")
BLEU_ORDER = 4


def words(text: str) -> list[str]:
    """Splits a text into words. Each Chinese character or full-width sign is a word; white space separates the others.

    For text without Chinese this is `text.split()`, as perplexities on Penn Treebank count words.
    """
    return [token for token in words_and_spaces(text) if not token.isspace()]


def words_and_spaces(text: str) -> list[str]:
    """Splits a text into its words and the white space between them. Joining the result gives the text."""
    return _WORD_OR_SPACE.findall(text)


def ngrams(text: Sequence[str], n: int) -> Counter[tuple[str, ...]]:
    """Counts the n-grams of a text."""
    return Counter(zip(*(text[i:] for i in range(n))))


def distinct(texts: Sequence[Sequence[str]], n: int) -> float:
    """Returns the number of distinct n-grams of all texts divided by the number of their n-grams (Li et al. 2016).

    NaN if there are no n-grams.
    """
    counts = sum((ngrams(text, n) for text in texts), Counter())
    return len(counts) / counts.total() if counts else math.nan


def self_bleu(texts: Sequence[Sequence[str]]) -> float:
    """Returns the mean BLEU-4 of each text with all others as its references, 0 to 100 (Zhu et al. 2018).

    It equals sacrebleu without smoothing and with the effective order: a text of fewer than four words is scored by the
    n-grams that it has. 100 if every text has a duplicate (two empty texts are duplicates); NaN for a single text.
    """
    if len(texts) < 2:
        return math.nan
    lengths = np.array([len(text) for text in texts])
    orders = np.clip(lengths, 1, BLEU_ORDER)
    log_precisions = np.zeros(len(texts))
    for n in range(1, BLEU_ORDER + 1):
        counts = [ngrams(text, n) for text in texts]
        largest, second, owner = _largest_counts(counts)
        for i in np.flatnonzero(lengths >= n):
            count = counts[i]
            hits = sum(min(c, second.get(g, 0) if owner[g] == i else largest[g]) for g, c in count.items())
            log_precisions[i] += math.log(hits / count.total()) / orders[i] if hits else -math.inf
    penalties = [_log_brevity(length, np.delete(lengths, i)) for i, length in enumerate(lengths)]
    return float(100 * np.exp(log_precisions + penalties).mean())


def _largest_counts(counts: Sequence[Counter]) -> tuple[dict, dict, dict]:
    """Returns for each n-gram its largest count in a text, the second largest count, and the text with the largest.

    From these, a text's clipped counts against all other texts follow without visiting the other texts.
    """
    largest, second, owner = {}, {}, {}
    for i, count in enumerate(counts):
        for gram, c in count.items():
            if c > largest.get(gram, 0):
                second[gram] = largest.get(gram, 0)
                largest[gram], owner[gram] = c, i
            elif c > second.get(gram, 0):
                second[gram] = c
    return largest, second, owner


def _log_brevity(length: int, others: np.ndarray) -> float:
    """Returns the log of BLEU's brevity penalty. The reference is the closest in length, the shorter one of two."""
    closest = min(others, key=lambda other: (abs(other - length), other))
    if not length:  # an empty text matches only another empty text
        return -math.inf if closest else 0.0
    return min(0.0, 1 - closest / length)


def edit_distance(a: Sequence[str], b: Sequence[str]) -> int:
    """Returns the number of insertions, deletions and substitutions that turn a into b (Levenshtein 1966)."""
    number = {word: i for i, word in enumerate({*a, *b})}
    codes, columns = np.array([number[word] for word in b], int), np.arange(len(b) + 1)
    row = columns
    for i, word in enumerate(a, 1):
        best = np.minimum(row[1:] + 1, row[:-1] + (codes != number[word]))
        # row[j] = min(best[j], row[j − 1] + 1): with j subtracted it is a running minimum.
        row = np.minimum.accumulate(np.concatenate([[i], best]) - columns) + columns
    return int(row[-1])


def path_length(texts: Sequence[Sequence[str]]) -> tuple[float, float]:
    """Returns the length and the largest step of the path from the first text to the last.

    Steps are edit distances between neighbours; both results are divided by the distance of the ends. The length is 1
    if every step leads nearer to the last text, and more if the path makes detours. The largest step is 1 / (number of
    steps) if all steps are equal, and 1 if the text changes all at once. Both are NaN if the ends are equal.
    """
    steps = [edit_distance(a, b) for a, b in itertools.pairwise(texts)]
    ends = edit_distance(texts[0], texts[-1])
    return (sum(steps) / ends, max(steps) / ends) if ends else (math.nan, math.nan)
