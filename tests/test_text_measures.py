"""Words, distinct n-grams, self-BLEU, edit distances and the n-gram model, against sacrebleu and explicit counts."""

import itertools
import math
import random

import numpy as np
import pytest
from sacrebleu.metrics import BLEU

from davae_jax.evaluation import ngram
from davae_jax.evaluation.ngram import BEGIN, END, UNKNOWN, NGram
from davae_jax.evaluation.text_metrics import distinct, edit_distance, path_length, self_bleu, words, words_and_spaces


def test_words():
    ptb = "the company said <unk> n't rise N % on mr. smith 's u.s. plan"
    assert words(ptb) == ptb.split()
    assert words("今天，天气 very good！") == ["今", "天", "，", "天", "气", "very", "good", "！"]
    assert words("用GPT-2写的\u3000　诗") == ["用", "GPT-2", "写", "的", "诗"]
    assert words(" \n") == words("") == []


@pytest.mark.parametrize("text", ["a  b今天 \u3000x", "", " ", "\n今\r\n天", "𠀀b"])
def test_words_and_spaces_join_to_the_text(text):
    assert "".join(words_and_spaces(text)) == text


def test_distinct():
    texts = [list("aba"), list("ab")]
    assert distinct(texts, 1) == 2 / 5
    assert distinct(texts, 2) == 2 / 3  # a b twice, b a
    assert distinct(texts, 3) == 1
    assert math.isnan(distinct(texts, 4))


def random_texts(n, seed=0, shortest=4):
    rng = random.Random(seed)
    return [rng.choices("abc", k=rng.randrange(shortest, 12)) for _ in range(n)]


@pytest.mark.parametrize("effective_order", [False, True])
def test_self_bleu_equals_sacrebleu(effective_order):
    """For texts of fewer than four words, equals sacrebleu with the effective order."""
    texts = random_texts(12) if not effective_order else random_texts(30, seed=1, shortest=1)
    assert (min(map(len, texts)) < 4) == effective_order
    scorer = BLEU(tokenize="none", smooth_method="none", effective_order=effective_order)
    expected = []
    for i, text in enumerate(texts):
        others = [[" ".join(other)] for j, other in enumerate(texts) if j != i]
        expected.append(scorer.corpus_score([" ".join(text)], others).score)
    assert 20 < np.mean(expected) < 95 and len(set(expected)) > 6
    assert self_bleu(texts) == pytest.approx(np.mean(expected), abs=1e-6)


def test_self_bleu_extremes():
    assert self_bleu([list("abcde")] * 2 + [list("fghi")] * 2) == pytest.approx(100)
    assert self_bleu([list("abcde"), list("fghi")]) == 0
    assert math.isnan(self_bleu([list("abcd")]))
    assert self_bleu([[], ["a"]]) == 0


@pytest.mark.parametrize(
    "texts", [[["a"]] * 5, [["好"]] * 100, [["a", "b", "c"]] * 50, [[]] * 3, [["a"], [], ["a"], []]], ids=str
)
def test_self_bleu_of_short_duplicates(texts):
    assert self_bleu(texts) == pytest.approx(100)
    assert self_bleu([*texts, ["x", "y"]]) == pytest.approx(100 * len(texts) / (len(texts) + 1))


@pytest.mark.parametrize(
    ("a", "b", "distance"),
    [("kitten", "sitting", 3), ("", "abc", 3), ("abc", "", 3), ("abc", "abc", 0), ("abcd", "badc", 3), ("a", "b", 1)],
)
def test_edit_distance(a, b, distance):
    assert edit_distance(a, b) == edit_distance(b, a) == distance


def test_edit_distance_is_a_metric():
    texts = random_texts(8)
    for a, b, c in itertools.product(texts, repeat=3):
        assert edit_distance(a, c) <= edit_distance(a, b) + edit_distance(b, c)


def test_path_length():
    assert path_length(["aaaa", "aaab", "aabb", "abbb", "bbbb"]) == (1, 1 / 4)  # even steps
    assert path_length(["aaaa", "aaaa", "bbbb", "bbbb"]) == (1, 1)  # one large step
    assert path_length(["aaaa", "cccc", "bbbb"]) == (2, 1)  # a detour
    assert all(map(math.isnan, path_length(["aa", "ab", "aa"])))


# The n-gram model.


@pytest.mark.parametrize("order", [1, 2, 3, 4])
def test_probabilities_sum_to_one(order):
    texts = random_texts(20)
    model = NGram(texts, "abcde", order=order)  # d and e do not occur in training
    for context in [(BEGIN,) * 3, ("a", "b", "c"), (BEGIN, "a", "a"), ("d", "a", "b"), ("d", "e", "d")]:
        context = context[len(context) - order + 1 :]
        # Words outside the vocabulary count as one word.
        assert sum(model.probability(word, context) for word in [*"abcde", END, "?"]) == pytest.approx(1)
        assert model.probability("d", context) == model.probability("e", context) > 0


def test_a_bigram_model_by_hand():
    """The texts "a b", "a b", "a c": Kneser–Ney with the discount n₁ / (n₁ + 2n₂) of each order."""
    model = NGram([["a", "b"], ["a", "b"], ["a", "c"]], "abc", order=2)
    # Bigrams: ·a 3, ab 2, b. 2, ac 1, c. 1; so n₁ = 2, n₂ = 2. Before a word: a 1, b 1, c 1, end 2; n₁ = 3, n₂ = 1.
    bigram, unigram = 2 / 6, 3 / 5
    uniform = 1 / 5  # a, b, c, the end, and the unknown word
    p_b = (1 - unigram) / 5 + unigram * 4 / 5 * uniform
    assert model.probability("b", ("a",)) == pytest.approx((2 - bigram) / 3 + bigram * 2 / 3 * p_b)
    p_end = (2 - unigram) / 5 + unigram * 4 / 5 * uniform
    assert model.probability(END, ("b",)) == pytest.approx((2 - bigram) / 2 + bigram * 1 / 2 * p_end)
    assert model.probability("b", ("c",)) == pytest.approx(bigram * p_b)
    assert model.probability("b", ("?",)) == pytest.approx(p_b)
    # The text "a" has two factors: a after the beginning, and the end after a.
    p_a = (1 - unigram) / 5 + unigram * 4 / 5 * uniform
    first = (3 - bigram) / 3 + bigram / 3 * p_a
    then = bigram * 2 / 3 * p_end
    assert model.log_likelihood(["a"]) == pytest.approx(math.log(first * then))
    assert model.perplexity([["a"], ["a"]]) == pytest.approx(1 / math.sqrt(first * then))


def test_unknown_words_are_mapped_to_one_word():
    """In training and evaluation, x and y count as the same additional word."""
    model = NGram([["a", "x"], ["a", "y"], ["a", "a"]], "a", order=2)
    assert model.size == 3  # a, the end, and the unknown word
    assert model.log_likelihood(["a", "z"]) == pytest.approx(model.log_likelihood(["a", "x"]))
    assert model.probability(UNKNOWN, ("a",)) > model.probability("a", ("a",))
    assert sum(model.probability(word, ("a",)) for word in ("a", END, UNKNOWN)) == pytest.approx(1)
    closed = NGram([["a", "u"], ["a", "u"], ["a", "a"]], ["a"], order=2)
    assert closed.log_likelihood(["a", "u"]) == model.log_likelihood(["a", "x"])


def test_perplexity_of_a_fair_coin():
    """2 per toss, plus the cost of the end, which a trigram model cannot predict."""
    rng = random.Random(0)
    texts = [rng.choices("01", k=30) for _ in range(400)]
    assert NGram(texts[:200], "01").perplexity(texts[200:]) == pytest.approx(2.2, abs=0.15)


def test_forward_and_reverse():
    rng = random.Random(0)
    sample = lambda letters, n: [rng.choices(letters, k=10) for _ in range(n)]  # noqa: E731
    real = sample("abcdefgh", 400)
    same = ngram.forward_and_reverse(real, sample("abcdefgh", 400))
    assert same["forward_ppl"] == pytest.approx(same["real_ppl"], rel=0.05)
    assert same["reverse_ppl"] == pytest.approx(same["real_ppl"], rel=0.05)
    # A sampler without diversity: only the reverse perplexity is high.
    narrow = ngram.forward_and_reverse(real, sample("abcd", 400))
    assert narrow["forward_ppl"] == pytest.approx(narrow["real_ppl"], rel=0.15)
    assert narrow["reverse_ppl"] > 3 * narrow["real_ppl"]
    # A sampler with invalid texts: both perplexities are high.
    wild = ngram.forward_and_reverse(real, sample("abcdefghijklmnop", 400))
    assert wild["forward_ppl"] > 2 * wild["real_ppl"]
    assert wild["reverse_ppl"] > 1.2 * wild["real_ppl"]
    assert all(map(math.isnan, ngram.forward_and_reverse(real[:1], real).values()))
    # The reference perplexity depends neither on the samples nor on the order of the texts.
    assert same["real_ppl"] == narrow["real_ppl"] == wild["real_ppl"]
    ordered = ngram.forward_and_reverse(sorted(real), sample("abcdefgh", 400))
    assert ordered["real_ppl"] == pytest.approx(same["real_ppl"], rel=0.05)
