"""How texts differ from one another: words, distinct n-grams, self-BLEU, and the way between two texts."""

from __future__ import annotations

import itertools
import math
import re
from collections import Counter
from collections.abc import Sequence

import numpy as np

# Chinese and Japanese characters with their full-width signs stand alone; all else is parted by white space.
_CJK = "\u3000-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\uff00-\uffef\U00020000-\U0003ffff"
_WORD_OR_SPACE = re.compile(rf"\s+|[{_CJK}]|[^\s{_CJK}]+")
BLEU_ORDER = 4


def words(text: str) -> list[str]:
    """What counts as a word: each Chinese character or full-width sign, and else what white space parts.

    Of text without Chinese these are `text.split()`, as perplexities of Penn Treebank count them.
    """
    return [part for part in words_and_spaces(text) if not part.isspace()]


def words_and_spaces(text: str) -> list[str]:
    """The words and the white space between them: together they are the text."""
    return _WORD_OR_SPACE.findall(text)


def ngrams(text: Sequence[str], n: int) -> Counter[tuple[str, ...]]:
    return Counter(zip(*(text[i:] for i in range(n))))


def distinct(texts: Sequence[Sequence[str]], n: int) -> float:
    """Different n-grams of all texts as a part of all their n-grams (Li et al. 2016). NaN where there is none."""
    counts = sum((ngrams(text, n) for text in texts), Counter())
    return len(counts) / counts.total() if counts else math.nan


def self_bleu(texts: Sequence[Sequence[str]]) -> float:
    """Mean BLEU-4 of each text against all others as its references, 0 to 100 (Zhu et al. 2018). NaN for one text.

    Not smoothed, as sacrebleu computes it with smoothing off and the effective order: of a text of fewer than four
    words, up to the n-grams that it has. 100 where every text has a twin, of an empty one too.
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
    """Of each n-gram the largest count in one text, the next largest in another, and whose the largest is.

    With these a text's clipped hits against all others take no pass over the others.
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
    """Logarithm of BLEU's brevity penalty by the reference that is closest in length, of two the shorter."""
    closest = min(others, key=lambda other: (abs(other - length), other))
    if not length:  # of an empty text an empty one is the twin, and nothing else like it
        return -math.inf if closest else 0.0
    return min(0.0, 1 - closest / length)


def edit_distance(a: Sequence[str], b: Sequence[str]) -> int:
    """Insertions, deletions and substitutions that turn a into b (Levenshtein 1966)."""
    number = {word: i for i, word in enumerate({*a, *b})}
    codes, place = np.array([number[word] for word in b], int), np.arange(len(b) + 1)
    row = place
    for i, word in enumerate(a, 1):
        best = np.minimum(row[1:] + 1, row[:-1] + (codes != number[word]))
        # An insertion costs 1 more than the place before it: a running minimum of what is left without the places.
        row = np.minimum.accumulate(np.concatenate([[i], best]) - place) + place
    return int(row[-1])


def path_length(texts: Sequence[Sequence[str]]) -> tuple[float, float]:
    """(length, largest step) of the way from the first text to the last, in edit distances of neighbours.

    Both as multiples of the distance of the ends. The length is 1 at least: 1 where every step leads nearer, more where
    texts come up that neither end knows. The largest step is 1 over the number of steps where they are even, and 1
    where the text jumps at once. NaN where both ends are the same.
    """
    steps = [edit_distance(a, b) for a, b in itertools.pairwise(texts)]
    ends = edit_distance(texts[0], texts[-1])
    return (sum(steps) / ends, max(steps) / ends) if ends else (math.nan, math.nan)
