"""Compares samples with texts by an n-gram language model with interpolated Kneser–Ney smoothing."""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence

import numpy as np

BEGIN, END, UNKNOWN = "", "\n", " "  # cannot be words of a text (`text_metrics.words`)
ORDER, SEED = 3, 0


class NGram:
    """Models p(word | the preceding order − 1 words) (Kneser & Ney 1995, in the form of Chen & Goodman 1999).

    Each order has one discount, n₁ / (n₁ + 2n₂), from the numbers of n-grams seen once and twice. Below the highest
    order, the count of an n-gram is the number of different words before it. The lowest order is interpolated with the
    uniform distribution over the vocabulary, so every word has a positive probability. All words outside the
    vocabulary are mapped to one word, `UNKNOWN`, in training and evaluation.

    Args:
      texts: the training texts, as words.
      vocabulary: must be the same for models that are compared.
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
        self._totals = [defaultdict(int) for _ in counts]  # by context: the sum of counts of the words after it
        self._distinct = [defaultdict(int) for _ in counts]  # by context: the number of different words after it
        for n in range(1, order + 1):
            for gram, count in counts[n].items():
                self._totals[n][gram[:-1]] += count
                self._distinct[n][gram[:-1]] += 1

    def _row(self, text: Sequence[str]) -> list[str]:
        known = [word if word in self._vocabulary else UNKNOWN for word in text]
        return [BEGIN] * (self.order - 1) + [*known, END]

    def probability(self, word: str, context: tuple[str, ...]) -> float:
        """Returns p(word | context).

        Args:
          word: a word of the vocabulary, `END` or `UNKNOWN`.
          context: up to `order` − 1 preceding words, with `BEGIN` before the start of the text.
        """
        n = len(context) + 1
        lower_order = self.probability(word, context[1:]) if n > 1 else 1 / self.size
        if not (total := self._totals[n].get(context, 0)):
            return lower_order
        discount = self._discounts[n]
        discounted = max(self._counts[n].get((*context, word), 0) - discount, 0) / total
        return discounted + discount * self._distinct[n][context] / total * lower_order

    def log_likelihood(self, text: Sequence[str]) -> float:
        """Returns the log-likelihood of a text and its end, in nats."""
        row = self._row(text)
        positions = range(self.order - 1, len(row))
        return sum(math.log(self.probability(row[i], tuple(row[i - self.order + 1 : i]))) for i in positions)

    def perplexity(self, texts: Sequence[Sequence[str]]) -> float:
        """Returns the perplexity per word; the end of each text counts as a word."""
        return math.exp(-sum(map(self.log_likelihood, texts)) / sum(len(text) + 1 for text in texts))


def _discount(counts: Counter) -> float:
    """Returns n₁ / (n₁ + 2n₂) (Ney et al. 1994), or ½ if no n-gram occurs once, or none occurs twice."""
    once, twice = (sum(count == c for count in counts.values()) for c in (1, 2))
    return once / (once + 2 * twice) if once and twice else 0.5


def forward_and_reverse(real: Sequence[Sequence[str]], samples: Sequence[Sequence[str]]) -> dict[str, float]:
    """Computes perplexities per word between texts and samples (Zhao et al. 2018).

    All models are trained on equally many texts. The texts are split at random, because a file may be sorted, with a
    fixed seed. The vocabulary comes from all texts and does not depend on the samples, so `real_ppl` is the same for
    all models on the same texts with the same number of samples.

    Returns:
      forward_ppl: perplexity of the samples under a model of one half of the texts; low if samples are like texts.
      reverse_ppl: perplexity of the other half under a model of the samples; low if the samples cover the texts.
      real_ppl: perplexity of the other half under the model of the first; a perfect sampler reaches it in both.
      All are NaN if there are fewer than two texts, or no samples.
    """
    half = min(len(real) // 2, len(samples))
    names = ("forward_ppl", "reverse_ppl", "real_ppl")
    if not half:
        return dict.fromkeys(names, math.nan)
    order = np.random.default_rng(SEED).permutation(len(real))
    first, second = ([real[i] for i in rows] for rows in (order[:half], order[half : 2 * half]))
    samples = samples[:half]
    vocabulary = {word for text in real for word in text}
    text_model, sample_model = (NGram(texts, vocabulary) for texts in (first, samples))
    values = text_model.perplexity(samples), sample_model.perplexity(second), text_model.perplexity(second)
    return dict(zip(names, values, strict=True))
