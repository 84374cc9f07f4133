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

# Headings of references at the end of a page, and brackets of footnote marks.
_REFERENCES = ("引用日期", "参考资料")
_BRACKETS = ("[]", "【】")

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
    # In the published order, which matters: a deletion can create a match for a later one.
    for heading in _REFERENCES:
        text = _drop_references(text, heading)
    for opening, closing in _BRACKETS:
        text = "\n".join(_drop_brackets(line, opening, closing) for line in text.split("\n"))
    for label in _LABELS:
        text = text.replace(label, "")
    return text


def _drop_references(text: str, heading: str) -> str:
    """Returns the text up to a heading in its last line: the published pattern `HEADING.*$`, in linear time.

    A line feed at the end of the text stays.
    """
    body = text.removesuffix("\n")
    begin = body.find(heading, body.rfind("\n") + 1)
    return text if begin < 0 else body[:begin] + text[len(body) :]


def _drop_brackets(line: str, opening: str, closing: str) -> str:
    """Returns a line without what is between its first opening bracket and its last closing one: `\\[.*\\]`."""
    begin, end = line.find(opening), line.rfind(closing)
    return line if begin < 0 or end < begin else line[:begin] + line[end + 1 :]


def clean_up(text: str) -> str:
    """Returns decoded text as the published program prints it."""
    return drop_noise(join_chinese(join_english(text))).strip()
