"""Makes small tokenizer files for tests: a SentencePiece BPE model and a WordPiece vocabulary.

Both know every character in `sentences`. Everything is deterministic.
"""

from __future__ import annotations

import io
import random
from pathlib import Path

_LEXICON = (
    "今天 明天 昨天 天气 很 好 不错 这家 店 的 服务 超市 价格 便宜 我们 喜欢 学习 中文 电力 系统 "
    "控制 方法 春眠 不觉晓 处处 闻 啼鸟 夜来 风雨 花落 知 多少 北京 上海 朋友 老师 学生 苹果 水果 吃 喝茶 "
    "看书 写字 走路 跑步 大家 一起 去 公园 山上 河边 晚上 早上 快乐 安静 漂亮 hello world model text jax"
)
WORDS = _LEXICON.split()

# The first tokens of vocab.txt: [PAD] must have id 0.
SPECIAL = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")
# A token that `str.splitlines` would split, such as two in the published vocabulary. It stands near the beginning, so
# that splitting it would change nearly all ids.
LINE_SEPARATOR_ENTRY = "x\u2028x"
CLS_ID, SEP_ID = 2, 3


def sentences(count: int, seed: int = 0) -> list[str]:
    """Returns short Chinese sentences, each with a digit and punctuation, some with an English word."""
    rng = random.Random(seed)
    return [_sentence(rng) for _ in range(count)]


def _sentence(rng: random.Random) -> str:
    words = "".join(rng.choices(WORDS[:-5], k=rng.randrange(3, 8)))
    english = f" {rng.choice(WORDS[-5:])}" if rng.random() < 0.3 else ""
    return f"{words}{rng.randrange(10)}{english}{rng.choice('，。！')}"


def make_spiece(folder: str | Path, size: int = 300) -> Path:
    """Trains `folder`/spiece.model: BPE with `size` pieces, of which `<unk>` is 0, `<s>` 1 and `</s>` 2 as published.

    The added tokens then have the ids `size` (end), `size` + 1 (pad) and `size` + 2 (bos). `size` may be 150 to 1000.
    """
    from sentencepiece import SentencePieceTrainer

    model = io.BytesIO()
    SentencePieceTrainer.train(
        sentence_iterator=iter(sentences(800)),
        model_writer=model,
        model_type="bpe",
        vocab_size=size,
        character_coverage=1.0,
        unk_id=0,
        bos_id=1,
        eos_id=2,
        pad_id=-1,
        minloglevel=2,
    )
    path = Path(folder) / "spiece.model"
    path.write_bytes(model.getvalue())
    return path


def make_vocab(folder: str | Path) -> list[str]:
    """Writes `folder`/vocab.txt. Returns its tokens, by id."""
    characters = sorted({c for word in WORDS for c in word} | set("0123456789，。！"))
    letters = [f"##{c}" for c in characters if c.isascii() and c.isalnum()]
    entries = [*SPECIAL, LINE_SEPARATOR_ENTRY, *characters, *letters, "hello", "model", "##s", "##ing"]
    entries = list(dict.fromkeys(entries))
    (Path(folder) / "vocab.txt").write_bytes("".join(f"{entry}\n" for entry in entries).encode("utf-8"))
    return entries
