"""A small n-gram language model, interpolated Kneser–Ney, to hold samples against texts and texts against samples."""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence

import numpy as np

BEGIN, END, UNKNOWN = "", "\n", " "  # no word of a text: `words` gives none of them
ORDER, SEED = 3, 0


class NGram:
    """p(word | the two before it), trained on texts of words (Kneser & Ney 1995; the form of Chen & Goodman 1999).

    One discount an order, n₁ / (n₁ + 2n₂) of those n-grams seen once and twice. Below the highest order an n-gram
    counts as often as there are different words before it. The last order is uniform over the vocabulary, so every word
    of it has some probability. All words outside are one more, `UNKNOWN`, in training as in what is measured.

    Args:
      vocabulary: it should be the same for models that are compared.
    """

    def __init__(self, texts: Iterable[Sequence[str]], vocabulary: Iterable[str], order: int = ORDER):
        self.order = order
        self._vocabulary = set(vocabulary)
        self.size = len(self._vocabulary | {END, UNKNOWN})
        counts = [Counter() for _ in range(order + 1)]  # by length; counts[0] stays empty
        for text in texts:
            row = self._row(text)
            counts[order].update(tuple(row[i : i + order]) for i in range(len(row) - order + 1))
        for n in range(order - 1, 0, -1):
            counts[n].update(gram[1:] for gram in counts[n + 1])
        self._counts = counts
        self._discounts = [0.0, *map(_discount, counts[1:])]
        self._totals = [defaultdict(int) for _ in counts]  # of each context, the counts behind it
        self._kinds = [defaultdict(int) for _ in counts]  # and the number of different words behind it
        for n in range(1, order + 1):
            for gram, count in counts[n].items():
                self._totals[n][gram[:-1]] += count
                self._kinds[n][gram[:-1]] += 1

    def _row(self, text: Sequence[str]) -> list[str]:
        named = [word if word in self._vocabulary else UNKNOWN for word in text]
        return [BEGIN] * (self.order - 1) + [*named, END]

    def probability(self, word: str, context: tuple[str, ...]) -> float:
        """Of a word of the vocabulary, the end or `UNKNOWN`.

        context: the words before it, at most `order` − 1; `BEGIN` where the text has not that many.
        """
        n = len(context) + 1
        below = self.probability(word, context[1:]) if n > 1 else 1 / self.size
        if not (total := self._totals[n].get(context, 0)):
            return below
        discount = self._discounts[n]
        kept = max(self._counts[n].get((*context, word), 0) - discount, 0) / total
        return kept + discount * self._kinds[n][context] / total * below

    def log_likelihood(self, text: Sequence[str]) -> float:
        """Of a text and its end, in nats."""
        row = self._row(text)
        places = range(self.order - 1, len(row))
        return sum(math.log(self.probability(row[i], tuple(row[i - self.order + 1 : i]))) for i in places)

    def perplexity(self, texts: Sequence[Sequence[str]]) -> float:
        """Per word, each text's end counted as one."""
        return math.exp(-sum(map(self.log_likelihood, texts)) / sum(len(text) + 1 for text in texts))


def _discount(counts: Counter) -> float:
    """Ney et al. 1994. Where no n-gram is seen once or none twice the formula says nothing, and a half is taken."""
    once, twice = (sum(count == c for count in counts.values()) for c in (1, 2))
    return once / (once + 2 * twice) if once and twice else 0.5


def forward_and_reverse(real: Sequence[Sequence[str]], samples: Sequence[Sequence[str]]) -> dict[str, float]:
    """Perplexities per word between texts and samples (Zhao et al. 2018), each model trained on as many texts.

    forward_ppl: of samples under a model of one half of the texts: are samples like texts?
    reverse_ppl: of the other half under a model of samples: do samples cover what texts say?
    real_ppl: of the other half under a model of the first: what a perfect sampler would get in both.
    NaN where there are fewer than two texts, or no sample.

    The halves are drawn, always alike, as a file may be sorted. The vocabulary is that of all texts, whatever the
    samples hold, so that `real_ppl` is the same for all models over the same texts and as many samples.
    """
    half = min(len(real) // 2, len(samples))
    names = ("forward_ppl", "reverse_ppl", "real_ppl")
    if not half:
        return dict.fromkeys(names, math.nan)
    order = np.random.default_rng(SEED).permutation(len(real))
    first, second = ([real[i] for i in part] for part in (order[:half], order[half : 2 * half]))
    samples = samples[:half]
    vocabulary = {word for text in real for word in text}
    of_real, of_samples = (NGram(texts, vocabulary) for texts in (first, samples))
    values = of_real.perplexity(samples), of_samples.perplexity(second), of_real.perplexity(second)
    return dict(zip(names, values, strict=True))
