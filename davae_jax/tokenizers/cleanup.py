"""The published clean-up of decoded text: blanks that tokenization left behind, and the noise of scraped pages."""

from __future__ import annotations

import re

# Blanks that English tokenization puts before punctuation and contractions, in the published order.
_ENGLISH = (
    (" .", "."),
    (" ?", "?"),
    (" !", "!"),
    (" ,", ","),
    (" ' ", "'"),
    (" n't", "n't"),
    (" 'm", "'m"),
    (" 's", "'s"),
    (" 've", "'ve"),
    (" 're", "'re"),
)

# Characters between which Chinese text has no white space: CJK ideographs, ASCII digits, punctuation.
_TIGHT = "[\u4e00-\u9fa50-9|，。？！@¥…—《》“”、；：‘’（）「」【】·～+]"

# White space, line feeds too, with such a character on both sides. The published program matches the neighbours too
# and so needs two passes; as the neighbours are never white space, looking at them without taking them does the same.
_BETWEEN_TIGHT = re.compile(rf"(?<={_TIGHT})\s+(?={_TIGHT})")

# Deleted one after the other, as published: an earlier deletion can make room for a later one.
_NOISE = (
    # References at the end of a page, up to the end of the text. The dot stops at a line feed, so with a further line
    # behind it nothing is deleted; `$` also stands before one last line feed.
    re.compile(r"引用日期.*$"),
    re.compile(r"参考资料.*$"),
    # Footnote marks: from the first opening bracket of a line to its last closing one.
    re.compile(r"\[.*\]"),
    re.compile(r"【.*】"),
)

# Labels of reprinted articles, and the unknown token.
_LABELS = ("原文地址：", "原文转载：", "本文转自：", "本文摘要：", "<unk>")


def join_english(text: str) -> str:
    """Takes away the blank before English punctuation and contractions (transformers' clean_up_tokenization_spaces)."""
    for spaced, joined in _ENGLISH:
        text = text.replace(spaced, joined)
    return text


def join_chinese(text: str) -> str:
    """Takes away white space between Chinese characters, digits and Chinese punctuation."""
    return _BETWEEN_TIGHT.sub("", text)


def drop_noise(text: str) -> str:
    """Takes away references, bracketed notes, reprint labels and `<unk>`."""
    for pattern in _NOISE:
        text = pattern.sub("", text)
    for label in _LABELS:
        text = text.replace(label, "")
    return text


def clean_up(text: str) -> str:
    """Decoded text as the published program shows it."""
    return drop_noise(join_chinese(join_english(text))).strip()
