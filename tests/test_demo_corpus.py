"""The demo's grammar: how many sentences, that they can be parsed back, what is held out."""

import pytest

from davae_jax.data.demo_corpus import ASPECTS, STYLES, TOPICS, all_factors, make_corpus, sentence


@pytest.fixture(scope="module")
def corpus():
    return make_corpus()


def test_no_two_choices_give_the_same_sentence(corpus):
    assert len({sentence(f) for f in all_factors()}) == len(all_factors()) == len(corpus.factors) >= 50_000
    for factors in all_factors()[::997]:
        assert corpus.factors[sentence(factors)] == factors


def test_held_out_combinations_are_never_shown(corpus):
    both = ([corpus.factors[text] for text in texts] for texts in (corpus.train, corpus.held_out))
    seen, held_out = ({(f.topic, f.aspect, f.style) for f in factors} for factors in both)
    assert len(corpus.train) >= 50_000 and len(corpus.held_out) >= 1000
    assert not seen & held_out
    assert len(seen | held_out) == len(TOPICS) * len(ASPECTS) * len(STYLES)
    # Every pair of the three is shown, so what is new is the combination alone.
    for pair in ((0, 1), (0, 2), (1, 2)):
        assert {tuple(c[i] for i in pair) for c in held_out} <= {tuple(c[i] for i in pair) for c in seen}


def test_it_is_the_same_every_time(corpus):
    again = make_corpus()
    assert (again.train[:50], again.held_out[:50]) == (corpus.train[:50], corpus.held_out[:50])
    assert make_corpus(seed=1).train[:50] != corpus.train[:50]


def test_what_the_grammar_does_not_accept(corpus):
    good = corpus.train[0]
    assert good in corpus.factors
    assert good[:-1] not in corpus.factors and good + "。" not in corpus.factors and "" not in corpus.factors
