"""Cleans up decoded text as the published program does: removes blanks from tokenization and noise of web pages."""

from __future__ import annotations

import re

# Punctuation and contractions after the blank that English tokenization inserts, in the published order.
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

# Characters between which Chinese text has no white space: CJK ideographs, ASCII digits and punctuation.
_TIGHT = "[\u4e00-\u9fa50-9|，。？！@¥…—《》“”、；：‘’（）「」【】·～+]"

# White space, including line feeds, between two such characters. The published pattern consumes the two characters, so
# the published program applies it twice; a look-behind and a look-ahead give the same result in one pass.
_BETWEEN_TIGHT = re.compile(rf"(?<={_TIGHT})\s+(?={_TIGHT})")

# Deleted in the published order, which matters: a deletion can create a match for a later pattern.
_NOISE = (
    # References at the end of a page. The dot does not match a line feed, so nothing is deleted if another line
    # follows; `$` also matches before a line feed at the end of the text.
    re.compile(r"引用日期.*$"),
    re.compile(r"参考资料.*$"),
    # Footnote marks: everything from the first opening bracket of a line to its last closing bracket.
    re.compile(r"\[.*\]"),
    re.compile(r"【.*】"),
)

# Labels of reprinted articles, and the unknown token.
_LABELS = ("原文地址：", "原文转载：", "本文转自：", "本文摘要：", "<unk>")


def join_english(text: str) -> str:
    """Removes the blank before English punctuation and contractions (transformers' clean_up_tokenization_spaces)."""
    for spaced, joined in _ENGLISH:
        text = text.replace(spaced, joined)
    return text


def join_chinese(text: str) -> str:
    """Removes white space between Chinese characters, digits and Chinese punctuation."""
    return _BETWEEN_TIGHT.sub("", text)


def drop_noise(text: str) -> str:
    """Removes references, notes in brackets, labels of reprinted articles and `<unk>`."""
    for pattern in _NOISE:
        text = pattern.sub("", text)
    for label in _LABELS:
        text = text.replace(label, "")
    return text


def clean_up(text: str) -> str:
    """Returns decoded text as the published program prints it."""
    return drop_noise(join_chinese(join_english(text))).strip()
