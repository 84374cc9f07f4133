"""Generates the corpus of the demo: short Chinese reviews and notices from a small grammar with known factors.

Seven factors determine a sentence, and different factors give different sentences, so the factors of a text can be
looked up. Some combinations of topic, aspect and style are held out completely: they occur in no training sentence, so
a model that reproduces such sentences has learnt to combine the factors.
"""

from __future__ import annotations

import itertools
import random
from typing import NamedTuple

TOPICS = ["餐厅", "酒店", "超市", "书店", "影院", "健身房", "咖啡馆", "理发店", "面包店", "游泳馆"]
# Each aspect with its word for good and its word for bad.
ASPECTS = {
    "服务": ("热情", "冷淡"),
    "价格": ("实惠", "离谱"),
    "环境": ("安静", "嘈杂"),
    "位置": ("方便", "偏僻"),
    "卫生": ("干净", "糟糕"),
    "设施": ("齐全", "陈旧"),
}
DEGREES = ["比较", "相当", "非常", "极其"]
STRONG = DEGREES[2:]
TIMES = ["昨天", "周末", "上个月", "春节期间", "去年夏天"]
PEOPLE = ["家人", "同事", "老朋友"]
# Each style with its sentence frame and four endings: mildly good, very good, mildly bad, very bad.
STYLES = {
    "chat": (
        "{time}跟{person}去了趟{topic}，{aspect}{degree}{word}，{end}",
        ("有空再来～", "下回还来！", "不太想去了～", "再也不来了！"),
    ),
    "rating": (
        "{topic}{aspect}打分：{degree}{word}。{person}{time}同行，{end}",
        ("给四颗星。", "满分好评。", "只给两星。", "一星差评。"),
    ),
    "notice": (
        "通知：据{person}反映，本{topic}{time}{aspect}{degree}{word}，{end}",
        ("望继续保持。", "特此表扬。", "请尽快改善。", "责令停业整改。"),
    ),
    "letter": (
        "亲爱的{person}：{time}路过{topic}，发现{aspect}{degree}{word}，{end}",
        ("改天约你同去。", "真想带你看看！", "你先别急着去。", "劝你千万别去！"),
    ),
    "answer": (
        "有{person}问这家{topic}怎么样？我{time}试过，{aspect}{degree}{word}，{end}",
        ("可以考虑。", "闭眼选吧。", "慎重些好。", "赶紧绕开。"),
    ),
    "news": (
        "本报讯，记者{time}走访{topic}，一位{person}称其{aspect}{degree}{word}，{end}",
        ("口碑稳定。", "值得推广。", "有待提高。", "已遭投诉。"),
    ),
    "diary": (
        "{time}，晴。陪{person}逛{topic}：{aspect}{degree}{word}，{end}",
        ("心里舒坦。", "开心极了。", "有些失望。", "败兴而归。"),
    ),
    "survey": (
        "问卷：{topic}（{time}，{person}填写）{aspect}{degree}{word}，{end}",
        ("基本认可。", "高度认可。", "略感遗憾。", "强烈不满。"),
    ),
    "tip": (
        "小贴士：{time}和{person}逛{topic}的体会是{aspect}{degree}{word}，{end}",
        ("顺路可去。", "务必一试。", "别抱期望。", "趁早换家。"),
    ),
    "rumour": (
        "听{person}讲，{topic}从{time}起{aspect}就{degree}{word}，{end}",
        ("我也这么看。", "名不虚传啊。", "难怪人少。", "快关门了吧。"),
    ),
}
HELD_OUT = 0.05  # of the combinations of topic, aspect and style


class Factors(NamedTuple):
    """The factors of a sentence. `good` is its sentiment, and `degree` the intensity of the sentiment."""

    topic: str
    aspect: str
    good: bool
    degree: str
    time: str
    person: str
    style: str


def sentence(factors: Factors) -> str:
    """Returns the sentence that the factors determine."""
    frame, ends = STYLES[factors.style]
    bad, strong = not factors.good, factors.degree in STRONG
    return frame.format(word=ASPECTS[factors.aspect][bad], end=ends[2 * bad + strong], **factors._asdict())


def all_factors() -> list[Factors]:
    """Returns all 72,000 combinations of factors, in a fixed order."""
    choices = itertools.product(TOPICS, ASPECTS, (True, False), DEGREES, TIMES, PEOPLE, STYLES)
    return [Factors(*choice) for choice in choices]


class Corpus(NamedTuple):
    """The sentences of the grammar.

    Attributes:
      train: the training sentences, shuffled.
      held_out: the sentences with held-out combinations of topic, aspect and style, shuffled.
      factors: the factors of every sentence; a text that is not among the keys is not in the language.
    """

    train: list[str]
    held_out: list[str]
    factors: dict[str, Factors]


def make_corpus(seed: int = 0) -> Corpus:
    """Returns all sentences, shuffled, divided into training sentences and held-out ones; the seed decides both."""
    rng = random.Random(seed)
    combinations = list(itertools.product(TOPICS, ASPECTS, STYLES))
    held_out = set(rng.sample(combinations, round(HELD_OUT * len(combinations))))
    factors = {sentence(f): f for f in all_factors()}
    texts = list(factors)
    rng.shuffle(texts)

    def is_held_out(text):
        f = factors[text]
        return (f.topic, f.aspect, f.style) in held_out

    return Corpus([t for t in texts if not is_held_out(t)], [t for t in texts if is_held_out(t)], factors)


def opposite(text: str, factors: dict[str, Factors]) -> str:
    """Returns the sentence with the other sentiment and otherwise the same factors."""
    f = factors[text]
    return sentence(f._replace(good=not f.good))
