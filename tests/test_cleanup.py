"""The clean-up of decoded text: results of the published program, and each rule alone."""

from __future__ import annotations

import random
import re
import time

import pytest

from davae_jax.tokenizers.cleanup import clean_up, drop_noise, join_chinese, join_english

# Texts, and the published program's results.
PUBLISHED = [
    ("今天 天气 很好 。 明天 见 ！", "今天天气很好。明天见！"),
    ("价格 1 2 3 元 ， 不错", "价格123元，不错"),
    ("这是正文。引用日期2019-01-01", "这是正文。"),
    ("正文参考资料：[1] 百度", "正文"),
    ("开头[注释]结尾", "开头结尾"),
    ("前【中】后", "前后"),
    ("原文地址：http://x.y 后文", "http://x.y 后文"),
    ("A B 中 文 C", "A B 中文 C"),
    ("多 行\n参考资料 甲\n尾", "多行"),
    ("<unk>去掉<unk>", "去掉"),
    ("[a]b[c]d", "d"),
    ("<n>20.. 《一些《<unk> <pad> <bos> 00就是", "<n>20.. 《一些《 <pad> <bos> 00就是"),
    ("一只大门段时间 70 就像", "一只大门段时间70就像"),
    ("画面两 ̅信道", "画面两 ̅信道"),
    ("", ""),
]


@pytest.mark.parametrize(("text", "cleaned"), PUBLISHED)
def test_published_answers(text, cleaned):
    assert clean_up(text) == cleaned


@pytest.mark.parametrize(
    ("text", "joined"),
    [
        ("yes . no ? oh ! a , b", "yes. no? oh! a, b"),
        ("the dogs ' tails", "the dogs'tails"),
        ("do n't I 'm it 's we 've you 're", "don't I'm it's we've you're"),
        ("two  , blanks", "two , blanks"),  # only one blank is removed
        ("a 'll b", "a 'll b"),
        ("line\n.", "line\n."),
    ],
)
def test_english_blanks(text, joined):
    assert join_english(text) == joined


def test_english_rules_apply_in_the_published_order():
    # " ' " is replaced first, and then no blank is left before the s.
    assert join_english("a ' s") == "a's"
    assert join_english("a ' 's") == "a''s"


@pytest.mark.parametrize(
    ("text", "joined"),
    [
        ("中 \n\t\u3000\u2028文", "中文"),  # any white space, including line feeds
        ("一 二 三 四 五", "一二三四五"),  # a character between two gaps
        ("中 a 文", "中 a 文"),
        ("中 - 文", "中 - 文"),  # the hyphen is not in the set
        ("1 | 2 @ 3 + 4", "1|2@3+4"),
        ("\u4e00 \u9fa5", "\u4e00\u9fa5"),  # both ends of the range
        ("中 \u9fa6", "中 \u9fa6"),
        ("5 ¥ 6 ￥ 7", "5¥6 ￥ 7"),  # only the narrow yen sign
        ("… — 《 》 “ ” 、 ； ： ‘ ’ （ ） 「 」 【 】 · ～ ？", "…—《》“”、；：‘’（）「」【】·～？"),
        ("٣ ٤", "٣ ٤"),  # digits are 0-9
        (" 中 ", " 中 "),
    ],
)
def test_chinese_blanks(text, joined):
    assert join_chinese(text) == joined


def test_one_pass_equals_the_published_two_passes():
    # The published pattern consumes the neighbouring characters, so the published program applies it twice.
    tight = "[\u4e00-\u9fa50-9|，。？！@¥…—《》“”、；：‘’（）「」【】·～+]"
    consuming = re.compile(rf"({tight})\s+({tight})")
    rng = random.Random(0)
    for _ in range(5000):
        text = "".join(rng.choices("中文1，。a- \n\u3000", k=rng.randrange(15)))
        assert join_chinese(text) == consuming.sub(r"\1\2", consuming.sub(r"\1\2", text))


@pytest.mark.parametrize(
    ("text", "left"),
    [
        ("a参考资料b\nc", "a参考资料b\nc"),  # another line follows: nothing is removed
        ("a\nb参考资料c", "a\nb"),
        ("a引用日期b\n", "a\n"),  # a line feed at the end does not count
        ("a引用日期b\n\n", "a引用日期b\n\n"),
        (
            "参考资料a\n引用日期b",
            "",
        ),  # the first deletion leaves a line feed at the end, up to which the second reaches
        ("引用日期a\n参考资料b", "引用日期a\n"),
        ("a[b\nc]d", "a[b\nc]d"),  # brackets match within a line only
        ("a[b]\n[c]d", "a\nd"),
        ("a[b[c]d]e]f", "af"),
        ("]a[", "]a["),
        ("[]a", "a"),
        ("a【b】c】d【e", "ad【e"),
        ("【[a】b]c", "【c"),  # square brackets are removed first
        ("原文转载：a本文转自：b本文摘要：c原文地址：", "abc"),
        ("原文地址:a", "原文地址:a"),
        ("原文<unk>地址：a本文<unk>摘要：", "原文地址：a本文摘要："),  # <unk> is removed last
    ],
)
def test_noise(text, left):
    assert drop_noise(text).strip("\n") == left.strip("\n")
    assert clean_up(text) == left.strip()


def test_noise_is_what_the_published_patterns_match():
    patterns = [re.compile(pattern) for pattern in (r"引用日期.*$", r"参考资料.*$", r"\[.*\]", r"【.*】")]
    rng = random.Random(0)
    for _ in range(3000):
        text = expected = "".join(rng.choices(["引用日期", "参考资料", *"[]【】\na\r\u2028"], k=rng.randrange(12)))
        for pattern in patterns:
            expected = pattern.sub("", expected)
        assert drop_noise(text) == expected


@pytest.mark.parametrize("text", ["[", "【", "引用日期", "参考资料"])
def test_the_time_grows_with_the_length_alone(text):
    """The published patterns take a minute: every beginning is searched to the end of the line."""
    begin = time.perf_counter()
    clean_up(text * 100_000 + "\na")
    assert time.perf_counter() - begin < 5


def test_noise_keeps_the_last_line_feed():
    assert drop_noise("a引用日期b\n") == "a\n"
    assert drop_noise("a引用日期b\n\n") == "a引用日期b\n\n"


def test_the_steps_apply_in_order():
    # The line feed is removed first, and then the reference reaches the end of the text.
    assert clean_up("文参考资料\n尾") == "文"
    # White space is removed before the brackets, so the blanks around them stay.
    assert clean_up("中 [注] 文") == "中  文"
    assert clean_up(" 　中文\n") == "中文"
