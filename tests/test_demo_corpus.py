"""The demo's grammar: the number of sentences, their factors, and the held-out combinations."""

import pytest

from davae_jax.data.demo_corpus import ASPECTS, STYLES, TOPICS, all_factors, make_corpus, sentence


@pytest.fixture(scope="module")
def corpus():
    return make_corpus()


def test_different_factors_give_different_sentences(corpus):
    assert len({sentence(f) for f in all_factors()}) == len(all_factors()) == len(corpus.factors) >= 50_000
    for factors in all_factors()[::997]:
        assert corpus.factors[sentence(factors)] == factors


def test_held_out_combinations_are_not_in_the_training_texts(corpus):
    both = ([corpus.factors[text] for text in texts] for texts in (corpus.train, corpus.held_out))
    trained, held_out = ({(f.topic, f.aspect, f.style) for f in factors} for factors in both)
    assert len(corpus.train) >= 50_000 and len(corpus.held_out) >= 1000
    assert not trained & held_out
    assert len(trained | held_out) == len(TOPICS) * len(ASPECTS) * len(STYLES)
    # Training shows every pair of these factors; only the combination of all three is new.
    for pair in ((0, 1), (0, 2), (1, 2)):
        assert {tuple(c[i] for i in pair) for c in held_out} <= {tuple(c[i] for i in pair) for c in trained}


def test_the_corpus_depends_only_on_the_seed(corpus):
    second = make_corpus()
    assert (second.train[:50], second.held_out[:50]) == (corpus.train[:50], corpus.held_out[:50])
    assert make_corpus(seed=1).train[:50] != corpus.train[:50]


def test_texts_outside_the_grammar(corpus):
    good = corpus.train[0]
    assert good in corpus.factors
    assert good[:-1] not in corpus.factors and good + "。" not in corpus.factors and "" not in corpus.factors
