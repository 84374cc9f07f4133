"""Both tokenizers: small ones that the tests train, and the published ones where their files are available.

Set DAVAE_REFERENCE_DIR to a folder with tokenizers/ (spiece.model, vocab.txt) and golden/text/text.json to also compare
with the ids and texts of the published program.
"""

from __future__ import annotations

import json
import os
import random
import socket
import time
import unicodedata
import warnings
from pathlib import Path

import numpy as np
import pytest
from tokenizer_fixtures import CLS_ID, LINE_SEPARATOR_ENTRY, SEP_ID, make_spiece, make_vocab, sentences

from davae_jax.tokenizers import encoder as encoder_module
from davae_jax.tokenizers import training as training_module
from davae_jax.tokenizers.cleanup import clean_up
from davae_jax.tokenizers.decoder import DecoderTokenizer, _read_varint
from davae_jax.tokenizers.encoder import EncoderTokenizer
from davae_jax.tokenizers.training import SPECIAL_TOKENS, sample_first, train_sentencepiece, train_wordpiece
from davae_jax.utils.errors import InputError

PIECES = 300
END, PAD, BOS = PIECES, PIECES + 1, PIECES + 2
LITERALS = {"<unk>": 0, "<pad>": PAD, "<bos>": BOS, "<|endoftext|>": END}


@pytest.fixture(scope="session")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("tokenizers")
    make_spiece(path, PIECES)
    make_vocab(path)
    return path


@pytest.fixture(scope="session")
def entries(tmp_path_factory):
    return make_vocab(tmp_path_factory.mktemp("entries"))


@pytest.fixture(scope="session")
def encoder(folder):
    return EncoderTokenizer(folder, cls_id=CLS_ID, sep_id=SEP_ID)


@pytest.fixture(scope="session")
def decoder(folder):
    return DecoderTokenizer(folder, end_id=END, pad_id=PAD, bos_id=BOS)


@pytest.fixture(scope="session")
def pieces(folder):
    """The SentencePiece model itself, for the expected ids of a text without literals."""
    from sentencepiece import SentencePieceProcessor

    return SentencePieceProcessor(model_file=str(folder / "spiece.model"))


def write_vocab(path: Path, entries: list[str]) -> None:
    (path / "vocab.txt").write_bytes("\n".join(entries).encode("utf-8"))


def load_small_encoder(path: Path) -> EncoderTokenizer:
    return EncoderTokenizer(path, cls_id=CLS_ID, sep_id=SEP_ID)


def assert_one_line_naming(error: pytest.ExceptionInfo[InputError], name: str) -> None:
    message = str(error.value)
    assert name in message
    assert "\n" not in message


# The encoder's tokenizer.


def test_encoder_ids_have_their_special_tokens_doubled(encoder, entries):
    ids = [entries.index(token) for token in ("hello", "model", "##s", "今", "天", "，", "7")]
    assert encoder.encode(["Hello MODELS今天，7"]) == [[2, 2, *ids, 3, 3]]


def test_encoder_accepts_several_texts_and_none(encoder, entries):
    assert encoder.encode(["", "天", " \n　"]) == [[2, 2, 3, 3], [2, 2, entries.index("天"), 3, 3], [2, 2, 3, 3]]
    assert encoder.encode([]) == []


def test_encoder_recognizes_literal_special_tokens(encoder):
    assert encoder.encode(["[MASK][SEP] [CLS][UNK]"]) == [[2, 2, 4, 3, 2, 1, 3, 3]]


def test_vocabulary_is_split_at_line_feeds_only(folder, encoder, entries):
    lines = (folder / "vocab.txt").read_text(encoding="utf-8")
    assert len(lines.splitlines()) == encoder.size + 1  # the wrong size, with U+2028 as a line end
    assert encoder.size == len(entries) == lines.count("\n")
    assert entries.index(LINE_SEPARATOR_ENTRY) < entries.index("天")


@pytest.mark.parametrize("end", ["", "\n"])
def test_a_line_feed_at_the_end_adds_no_token(tmp_path, entries, end):
    (tmp_path / "vocab.txt").write_bytes(("\n".join(entries) + end).encode("utf-8"))
    assert load_small_encoder(tmp_path).size == len(entries)


def test_vocabulary_with_carriage_returns(tmp_path, encoder, entries):
    (tmp_path / "vocab.txt").write_bytes("".join(f"{entry}\r\n" for entry in entries).encode("utf-8"))
    text = "Hello MODELS今天，7"
    assert load_small_encoder(tmp_path).encode([text]) == encoder.encode([text])


def test_encoder_truncates_before_adding_the_outer_pair(encoder, entries):
    day = entries.index("天")
    complete, truncated = encoder.encode(["天" * 508, "天" * 509])
    assert complete == [2, 2, *[day] * 508, 3, 3]
    assert truncated == [2, 2, *[day] * 509, 3]
    assert len(complete) == len(truncated) == 512
    assert [encoder.is_truncated(ids) for ids in (complete, truncated)] == [False, True]


def test_encoder_truncates_to_max_ids(folder, entries):
    small = EncoderTokenizer(folder, cls_id=CLS_ID, sep_id=SEP_ID, max_ids=6)
    day = entries.index("天")
    assert small.encode(["天天天天", "天天天天天"]) == [[2, 2, *[day] * 4, 3, 3], [2, 2, *[day] * 5, 3]]
    assert small.problem(small.encode(["天" * 5])[0]) == "the text is longer than 6 ids and was truncated"


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("天", None),
        ("😀天", None),
        ("天" * 508, None),
        ("天" * 509, "the text is longer than 510 ids and was truncated"),
        ("天" * 5000, "the text is longer than 510 ids and was truncated"),
        ("", "the text is empty or only white space"),
        (" \n\t　", "the text is empty or only white space"),
        ("\u200b\u0000", "the text is empty or only white space"),  # the tokenizer removes these characters
        ("😀", "the encoder knows no character of the text"),
        ("龘 靐", "the encoder knows no character of the text"),
        ("龘" * 600, "the encoder knows no character of the text"),
    ],
)
def test_problem(encoder, text, problem):
    assert encoder.problem(encoder.encode([text])[0]) == problem


@pytest.mark.parametrize("text", ["天" * 100_000, "a" * 100_000, "hello 今天😀" * 10_000, " " * 100_000])
def test_long_texts_are_fast_and_silent(encoder, decoder, capfd, recwarn, text):
    start = time.perf_counter()
    [ids] = encoder.encode([text])
    decoder.encode(text)
    assert time.perf_counter() - start < 10  # usually 0.1 s; quadratic time would take minutes
    assert len(ids) <= 512
    captured = capfd.readouterr()
    assert (captured.out, captured.err, len(recwarn)) == ("", "", 0)


def test_other_tokenizer_files_in_the_folder_are_not_read(folder, tmp_path, encoder):
    # A model's folder may hold the files of another tokenizer.
    (tmp_path / "vocab.txt").write_bytes((folder / "vocab.txt").read_bytes())
    (tmp_path / "tokenizer_config.json").write_text('{"do_lower_case": false, "model_max_length": 5}')
    (tmp_path / "tokenizer.json").write_text("{}")
    (tmp_path / "config.json").write_text('{"model_type": "t5"}')
    text = "Hello MODELS今天，7"
    assert load_small_encoder(tmp_path).encode([text]) == encoder.encode([text])


def test_loading_does_not_use_the_network(folder, monkeypatch):
    def refuse(*_, **__):
        raise AssertionError("the network was used")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    assert load_small_encoder(folder).encode(["MODEL"])[0][2] > SEP_ID
    assert DecoderTokenizer(folder, end_id=END, pad_id=PAD, bos_id=BOS).size == PIECES


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (None, "no such file"),
        (b"", "empty"),
        (b"[PAD]\n\xff\xfe", "UTF-8"),
        (b"[PAD]\n[UNK]\n[CLS]\n[SEP]\na", "lacks [MASK]"),
        (b"[PAD]\n[UNK]\n[CLS]\n[SEP]\n[MASK]\na\nb\na", "repeats 'a'"),
        (b"[PAD]\n[UNK]\n[CLS]\n[SEP]\n[MASK]\na\n\nb\n", "line 7 "),
        (b"[PAD]\n[UNK]\n[CLS]\n[SEP]\n[MASK]\na \nb\n", "line 6 "),
        (b"[PAD]\n[UNK]\n[CLS]\n[SEP]\n[MASK]\na\nb\n\0\0\0", "line 8 "),
        (b"[UNK]\n[PAD]\n[CLS]\n[SEP]\n[MASK]", "[PAD] has id 1"),
        (b"[PAD]\n[UNK]\n[SEP]\n[CLS]\n[MASK]", "[CLS] has id 3"),
    ],
)
def test_bad_vocabularies(tmp_path, content, reason):
    if content is not None:
        (tmp_path / "vocab.txt").write_bytes(content)
    with pytest.raises(InputError) as error:
        load_small_encoder(tmp_path)
    assert_one_line_naming(error, str(tmp_path / "vocab.txt"))
    assert reason in str(error.value)


def test_ids_of_another_model_are_refused(folder):
    with pytest.raises(InputError, match=r"vocab\.txt: \[CLS\] has id 2, but the model expects 101"):
        EncoderTokenizer(folder)


def test_the_ids_are_those_of_transformers(folder, encoder):
    """Of its BertTokenizer, before the second [CLS] and [SEP]; for every character of the first two Unicode planes."""
    transformers = pytest.importorskip("transformers")
    bert = transformers.BertTokenizer.from_pretrained(folder, do_lower_case=True, local_files_only=True)
    characters = "".join(chr(i) for i in range(0x20000) if not 0xD800 <= i < 0xE000)
    rng = np.random.default_rng(0)
    alphabet = [
        *"MODELS今天很好 \n\t\u2028\u00a0,.!?()-éÀÅßﬁＡ１",
        "[SEP]",
        "[MASK]",
        "[sep]",
        "[UNK",
        "##",
        "👍🏽",
        "\ufffd",
    ]
    texts = ["", *characters, *(characters[i : i + 300] for i in range(0, len(characters), 300))]
    texts += ["".join(rng.choice(alphabet, rng.integers(1, 30))) for _ in range(300)]
    assert [ids[1:-1] for ids in encoder.encode(texts)] == [ids[: encoder.max_ids] for ids in bert(texts)["input_ids"]]


@pytest.mark.parametrize("size", [60, 200, 2000])
def test_training_gives_the_same_vocabulary_again(size):
    """Words with many equally frequent pairs, and more characters than the smallest vocabulary has room for."""
    rng = random.Random(0)
    words = ["".join(rng.choice("abcdefgh") for _ in range(rng.randint(2, 6))) for _ in range(900)]
    texts = [f"{' '.join(words[i : i + 5])}{chr(0x4E00 + i % 80)}" for i in range(0, 900, 5)]
    vocabularies = [train_wordpiece(texts, size) for _ in range(4)]
    assert vocabularies[0] and set(vocabularies) == {vocabularies[0]}
    tokens = vocabularies[0].decode().split("\n")[:-1]
    assert len(tokens) == len(set(tokens)) and tokens[:5] == SPECIAL_TOKENS
    if size >= 200:
        assert len(tokens) <= size and {*"abcdefgh", *(f"##{c}" for c in "abcdefgh")} < set(tokens)


def test_words_count_as_often_as_they_occur():
    """The vocabulary is the library's for the texts themselves, of which only the words are passed on."""
    from tokenizers import BertWordPieceTokenizer

    texts = [f"今天 abc-abd ABC{'好' * i}" for i in range(9)] + ["xyz"] * 5
    library = BertWordPieceTokenizer(lowercase=True)
    continuing = [f"##{c}" for c in "bcdyz"]
    tokens = {"special_tokens": [*SPECIAL_TOKENS, *continuing], "min_frequency": 1, "show_progress": False}
    library.train_from_iterator(texts, vocab_size=24, **tokens)
    vocabulary = library.get_vocab()
    assert train_wordpiece(texts, 24).decode().split() == sorted(vocabulary, key=vocabulary.get)


def test_a_folder_instead_of_a_file(tmp_path):
    (tmp_path / "vocab.txt").mkdir()
    (tmp_path / "spiece.model").mkdir()
    with pytest.raises(InputError, match="cannot be read") as error:
        load_small_encoder(tmp_path)
    assert_one_line_naming(error, "vocab.txt")
    with pytest.raises(InputError, match="cannot be read") as error:
        DecoderTokenizer(tmp_path)
    assert_one_line_naming(error, "spiece.model")


def test_half_a_surrogate_pair_is_refused(encoder, decoder):
    for encode in (lambda text: encoder.encode(["天", text]), decoder.encode, decoder.encode_prompt):
        with pytest.raises(InputError, match=r"U\+D83D at position 1"):
            encode("天\ud83d")


# The decoder's tokenizer.


def test_decoder_size_and_unknown(decoder):
    assert (decoder.size, decoder.unk_id) == (PIECES, 0)


def test_ordinary_text_comes_back(decoder):
    for text in sentences(300, seed=7):
        ids = decoder.encode(text)
        assert ids[-1] == END
        assert all(2 < i < PIECES for i in ids[:-1])
        assert decoder.decode(ids[:-1]) == unicodedata.normalize("NFKC", text)  # SentencePiece's own normalisation
        assert decoder.decode(ids) == unicodedata.normalize("NFKC", text) + " <|endoftext|>"


def test_literals_split_the_text_and_absorb_white_space(decoder, pieces):
    today, weather = pieces.encode("今天"), pieces.encode("天气")
    assert decoder.encode("今天 <bos>\n　天气") == [*today, BOS, *weather, END]
    # U+0085 is white space in Python; SentencePiece would keep it.
    assert len(pieces.encode("今天\x85")) > len(today)
    assert decoder.encode("今天\x85<bos>\x85天气") == [*today, BOS, *weather, END]
    assert decoder.encode("<unk><pad> <bos>天气<unk>") == [0, PAD, BOS, *weather, 0, END]
    assert decoder.encode("今天<unk>天气") == [*today, 0, *weather, END]
    # A stretch after a literal is encoded separately, so it begins with SentencePiece's blank.
    assert pieces.id_to_piece(weather[0]).startswith("▁")


def test_other_tags_are_not_literals(decoder, pieces):
    assert decoder.encode("天</s>气") == [*pieces.encode("天</s>气"), END]
    assert 2 not in decoder.encode("天</s>气")
    assert decoder.encode("<BOS><s>") == [*pieces.encode("<BOS><s>"), END]


def test_one_end_id(decoder, pieces):
    today = pieces.encode("今天")
    assert decoder.encode("") == [END]
    assert decoder.encode("  ") == [END]
    assert decoder.encode("<|endoftext|>") == [END]
    assert decoder.encode("今天<|endoftext|>") == [*today, END]
    assert decoder.encode("今天<|endoftext|> ") == [*today, END]
    assert decoder.encode("今天<|endoftext|><|endoftext|>") == [*today, END, END]
    assert decoder.encode("<|endoftext|>今天") == [END, *today, END]


def test_prompt(decoder, pieces):
    today = pieces.encode("今天")
    assert decoder.encode_prompt("") == [BOS]
    assert decoder.encode_prompt("今天") == [BOS, *today]
    assert decoder.encode_prompt("今天<|endoftext|>") == [BOS, *today]
    assert decoder.encode_prompt("<bos>今天") == [BOS, BOS, *today]


def test_unknown_characters(decoder):
    assert decoder.encode("龘")[-2:] == [0, END]
    assert decoder.decode(decoder.encode("今天龘")) == "今天<unk> <|endoftext|>"


def test_decode_joins_runs_and_added_tokens_with_one_blank(decoder, pieces):
    today = pieces.encode("今天")
    assert decoder.decode([]) == ""
    assert decoder.decode([BOS, *today, END]) == "<bos> 今天 <|endoftext|>"
    assert decoder.decode([*today, BOS, PAD, *today]) == "今天 <bos> <pad> 今天"
    assert decoder.decode([1, 2]) == ""
    assert decoder.decode([BOS, 1, PAD]) == "<bos>  <pad>"  # an empty run is joined with blanks too


def test_decode_puts_a_blank_before_a_group_followed_by_unknown(decoder, pieces):
    today, weather = pieces.encode("今天"), pieces.encode("天气")
    assert decoder.decode([0]) == "<unk>"
    assert decoder.decode([0, 0]) == "<unk><unk>"
    assert decoder.decode([*today, 0]) == "今天<unk>"
    assert decoder.decode([0, *today]) == "<unk>今天"
    assert decoder.decode([0, *today, 0]) == "<unk> 今天<unk>"
    assert decoder.decode([*today, 0, 0, *weather, 0, *today]) == "今天<unk><unk> 天气<unk>今天"
    assert decoder.decode([*today, 0, BOS, 0, *weather]) == "今天<unk> <bos> <unk>天气"
    assert decoder.decode([0, 1, 0]) == "<unk> <unk>"


def test_ids_past_the_added_tokens(decoder, pieces):
    today = pieces.encode("今天")
    assert decoder.decode([PIECES + 3]) == "<extra_id_-4>"
    assert decoder.decode([PIECES + 4, PIECES + 47]) == "<extra_id_-5><extra_id_-48>"
    # They belong to a run, so the pieces after them keep their own blank.
    assert decoder.decode([*today, PIECES + 3, *today]) == "今天<extra_id_-4> 今天"
    assert decoder.decode([*today, PIECES + 3, 0]) == "今天<extra_id_-4><unk>"
    with pytest.raises(IndexError):
        decoder.decode([-1])


def test_decode_takes_arrays(decoder, pieces):
    ids = np.array([BOS, *pieces.encode("今天"), 0, END], np.int32)
    assert decoder.decode(ids) == decoder.decode(ids.tolist()) == "<bos> 今天<unk> <|endoftext|>"


def reference_decode(pieces, ids: list[int]) -> str:
    """A second implementation of decoding, one id at a time."""
    added = {number: literal for literal, number in LITERALS.items() if number}
    parts, run, group, after_unknown, open_run = [], "", [], False, False

    def close_run():
        nonlocal run, group, after_unknown, open_run
        if open_run:
            parts.append((run + pieces.decode(group)).strip())
        run, group, after_unknown, open_run = "", [], False, False

    for i in ids:
        if i in added:
            close_run()
            parts.append(added[i])
            continue
        open_run = True
        if i == 0:
            run += ("" if after_unknown else " ") + pieces.decode(group) + "<unk>"
            group, after_unknown = [], True
        else:
            group.append(i)
            after_unknown = False
    close_run()
    return " ".join(parts)


def test_decode_against_a_second_implementation(decoder, pieces):
    rng = random.Random(3)
    for _ in range(3000):
        special = rng.choice([0.1, 0.3, 0.7])
        ids = [
            rng.choice([0, 0, 1, 2, END, PAD, BOS]) if rng.random() < special else rng.randrange(PIECES)
            for _ in range(rng.randrange(12))
        ]
        assert decoder.decode(ids) == reference_decode(pieces, ids)


def reference_encode(pieces, text: str) -> list[int]:
    """A second implementation of encoding, one literal at a time."""
    ids, after_literal = [], False
    while text:
        positions = {text.find(literal): literal for literal in LITERALS if literal in text}
        at = min(positions, default=len(text))
        head = text[:at].lstrip() if after_literal else text[:at]
        ids += pieces.encode(head.rstrip() if positions else head)
        if not positions:
            break
        ids.append(LITERALS[positions[at]])
        text, after_literal = text[at + len(positions[at]) :], True
    return ids if ids[-1:] == [END] else [*ids, END]


def test_encode_against_a_second_implementation(decoder, pieces):
    rng = random.Random(4)
    parts = [*LITERALS, " ", "\n", "　", "\x85", "今天", "天气", "hello", "<", "bos>", "</s>", "龘", "，"]
    for _ in range(3000):
        text = "".join(rng.choices(parts, k=rng.randrange(10)))
        assert decoder.encode(text) == reference_encode(pieces, text)


def test_added_tokens_in_another_order_or_as_control_pieces(folder, pieces):
    today = pieces.encode("今天")
    other = DecoderTokenizer(folder, bos_id=PIECES, end_id=2, pad_id=PIECES + 2)
    assert other.encode("<bos>今天<pad>") == [PIECES, *today, PIECES + 2, 2]
    assert other.decode([PIECES, *today, 2]) == "<bos> 今天 <|endoftext|>"


@pytest.mark.parametrize(
    ("ids", "reason"),
    [
        ({}, "300 pieces, so <|endoftext|> must have one of the ids 300..302, not 50000"),
        ({"end_id": END, "pad_id": PAD, "bos_id": PIECES + 3}, "<bos> must have"),
        ({"end_id": 5, "pad_id": PAD, "bos_id": BOS}, "not 5"),  # the id of an ordinary piece
        ({"end_id": 0, "pad_id": PAD, "bos_id": BOS}, "not 0"),
        ({"end_id": -1, "pad_id": PAD, "bos_id": BOS}, "not -1"),
        ({"end_id": END, "pad_id": END, "bos_id": BOS}, "must differ"),
    ],
)
def test_added_ids_must_fit_the_model(folder, ids, reason):
    with pytest.raises(InputError) as error:
        DecoderTokenizer(folder, **ids)
    assert_one_line_naming(error, str(folder / "spiece.model"))
    assert reason in str(error.value)


@pytest.mark.parametrize("damage", ["missing", "empty", "text", "half", "another file"])
def test_bad_sentencepiece_models(folder, tmp_path, capfd, damage):
    whole = (folder / "spiece.model").read_bytes()
    content = {
        "empty": b"",
        "text": b"version https://git-lfs.github.com/spec/v1\n",
        "half": whole[: len(whole) // 2],
        "another file": (folder / "vocab.txt").read_bytes(),
    }
    if damage in content:
        (tmp_path / "spiece.model").write_bytes(content[damage])
    with pytest.raises(InputError) as error:
        DecoderTokenizer(tmp_path, end_id=END, pad_id=PAD, bos_id=BOS)
    assert_one_line_naming(error, str(tmp_path / "spiece.model"))
    assert capfd.readouterr().err == ""


@pytest.mark.parametrize(("field", "named"), [(2, "the algorithm and the normalization"), (3, "the normalization")])
def test_a_sentencepiece_model_that_ends_after_its_pieces(folder, tmp_path, field, named):
    """SentencePiece would read it, with the same number of pieces, and split texts in another way."""
    data, position, begins = (folder / "spiece.model").read_bytes(), 0, {}
    while position < len(data):
        begin = position
        tag, position = _read_varint(data, position)
        size, position = _read_varint(data, position)
        begins.setdefault(tag >> 3, begin)
        position += size
    (tmp_path / "spiece.model").write_bytes(data[: begins[field]])
    with pytest.raises(InputError, match=f"spiece.model: is cut off: it lacks {named}, which"):
        DecoderTokenizer(tmp_path, end_id=END, pad_id=PAD, bos_id=BOS)


# The published tokenizers.


@pytest.fixture(scope="session")
def reference():
    root = os.environ.get("DAVAE_REFERENCE_DIR")
    if not root:
        pytest.skip("DAVAE_REFERENCE_DIR is not set: the published tokenizer files are not part of this project")
    return Path(root)


@pytest.fixture(scope="session")
def known(reference):
    return json.loads((reference / "golden/text/text.json").read_text(encoding="utf-8"))


@pytest.fixture(scope="session")
def published_encoder(reference):
    return EncoderTokenizer(reference / "tokenizers")


@pytest.fixture(scope="session")
def published_decoder(reference):
    return DecoderTokenizer(reference / "tokenizers")


def test_published_sizes(published_encoder, published_decoder):
    assert published_encoder.size == 21128
    assert (published_decoder.size, published_decoder.unk_id) == (50000, 0)


def test_published_encoder_ids(published_encoder, known):
    assert len(known["texts"]) == 15
    assert published_encoder.encode(known["texts"]) == known["encoder_ids"]


def test_published_problems(published_encoder, known):
    problems = [published_encoder.problem(ids) for ids in known["encoder_ids"]]
    by_first_character = {text[:1]: p for text, p in zip(known["texts"], problems, strict=True) if p}
    assert by_first_character == {
        "": "the text is empty or only white space",
        "①": "the encoder knows no character of the text",
        "长": "the text is longer than 510 ids and was truncated",
    }


def test_published_decoder_ids(published_decoder, known):
    assert [published_decoder.encode(text) for text in known["texts"]] == known["decoder_encode"]


def test_published_prompts(published_decoder, known):
    prompts = [published_decoder.encode_prompt(text) for text in known["simulate_prompts"]]
    assert prompts == known["simulate_prompt_ids"]
    assert len(prompts) == 6


def test_published_decoding(published_decoder, known):
    texts = [published_decoder.decode(ids) for ids in known["decode_ids"]]
    assert texts == known["decode_text"]
    assert [clean_up(text) for text in texts] == known["decode_text_filtered"]


def test_published_extra_ids(published_decoder):
    assert published_decoder.decode([50003, 50047]) == "<extra_id_-4><extra_id_-48>"
    assert published_decoder.decode([1, 3, 50003, 43369, 14, 43358, 43369, 50001, 40802]) == (
        "<n><extra_id_-4>. 我 . <pad> 召开了"
    )


def test_published_clean_up(known):
    assert [clean_up(text) for text in known["filter_in"]] == known["filter_out"]
    assert len(known["filter_in"]) == 11


@pytest.mark.parametrize(
    "texts",
    [["▅a", "b▅"], [" ", "  "], ["▁▁", " ▁"], ["\n", "\r"], []],
    ids=["boundary", "blanks", "marks of blanks", "line ends", "none"],
)
def test_texts_that_no_tokenizer_can_be_trained_on_are_named(texts):
    with pytest.raises(InputError) as e:
        train_sentencepiece(texts, 100, option="--size", source="a.txt")
    assert str(e.value).startswith("a.txt: ") and "INTERNAL" not in str(e.value) and "--tokenizers" in str(e.value)


def test_texts_that_training_leaves_out_are_counted(tmp_path):
    """Their other characters are unknown to the tokenizer, as if the texts were not there."""
    with pytest.warns(UserWarning, match=r"^a\.txt: 2 of 4 texts contain U\+2585"):
        model = train_sentencepiece(["ab", "▅cd", "ba", "▅"], 100, option="--size", source="a.txt")
    assert model == train_sentencepiece(["ab", "ba"], 100, option="--size")


@pytest.mark.parametrize("seed", range(3))
def test_every_failure_of_training_is_one_line(seed):
    """Of short texts from characters that tokenizers treat in their own ways, and few."""
    rng, pool = (
        np.random.default_rng(seed),
        [*" \t\n\r\0▁▅\u3000a\x01\ufeff\u200b\ue000\u2028\uffff\ufffd\x85\xa0😀", "<s>", "<unk>"],
    )
    for _ in range(100):
        characters = rng.choice(pool, rng.integers(1, 4))
        texts = ["".join(rng.choice(characters, rng.integers(1, 6))) for _ in range(rng.integers(1, 5))]
        train_wordpiece(texts, 30)
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                train_sentencepiece(texts, int(rng.integers(10, 60)), option="--size", source="a.txt")
        except InputError as e:
            assert str(e).startswith(("a.txt: ", "--size ")) and "\n" not in str(e) and "INTERNAL" not in str(e)


def test_words_that_the_encoder_does_not_know_are_not_trained_on(tmp_path):
    """Those of more than 100 characters; training on one takes time that grows with the square of its length."""
    short, long = "abcab" * 20, "abcab" * 20 + "x"
    data = train_wordpiece([f"{short} {long} 一,{long}二"], 60)
    assert data == train_wordpiece([f"{short} 一 , 二"], 60)
    (tmp_path / "vocab.txt").write_bytes(data)
    vocabulary = data.decode().split("\n")
    encoder = EncoderTokenizer(tmp_path, cls_id=vocabulary.index("[CLS]"), sep_id=vocabulary.index("[SEP]"))
    (of_short, of_long) = encoder.encode([short, long])
    assert encoder.unk_id not in of_short and of_long[2:-2] == [encoder.unk_id]


def test_few_characters_are_tokenized_at_once(encoder, monkeypatch):
    """The library's memory grows with all texts of a call."""
    texts, sizes = [*sentences(20), "", "中" * 300], []
    expected = encoder.encode(texts)

    class Library:
        def __init__(self, tokenizer):
            self._tokenizer = tokenizer

        def encode_batch_fast(self, part):
            sizes.append(sum(map(len, part[:-1])))
            return self._tokenizer.encode_batch_fast(part)

    monkeypatch.setattr(encoder_module, "CHARACTERS_PER_CALL", 100)
    monkeypatch.setattr(encoder, "_tokenizer", Library(encoder._tokenizer))
    assert encoder.encode(texts) == expected
    assert len(sizes) >= 3 and max(sizes) < 100


@pytest.mark.parametrize("characters", [1, 2, 5])
def test_the_beginning_of_a_long_text_gives_its_first_ids(characters, folder, monkeypatch):
    monkeypatch.setattr(encoder_module, "CHARACTERS_PER_ID", 10**6)
    encoder = EncoderTokenizer(folder, cls_id=CLS_ID, sep_id=SEP_ID, max_ids=7)
    rng = random.Random(0)
    parts = [
        *"今天天啊ab\u0301。 \t\n\x1c\u00a0\u3000\u0301\ufeff",
        "[SEP]",
        "[",
        "MASK]",
        "hello",
        "x" * 101,
        "\U00020000",
    ]
    texts = ["".join(rng.choices(parts, k=rng.randrange(60))) for _ in range(3000)] + ["x" * 300, " " * 300, "今" * 300]
    expected = encoder.encode(texts)
    monkeypatch.setattr(encoder_module, "CHARACTERS_PER_ID", characters)
    assert encoder.encode(texts) == expected


def test_tokenizers_are_trained_on_a_bounded_sample(monkeypatch):
    for name, value in (("SAMPLE_TEXTS", 5), ("SAMPLE_BYTES", 40), ("SAMPLE_CHARACTERS", 4)):
        monkeypatch.setattr(training_module, name, value)
    assert sample_first(["abcdef", "一二三四五", "x"]) == ["abcd", "一二三四", "x"]
    assert sample_first(["a"] * 9) == ["a"] * 5
    assert sample_first(["一二三四五"] * 9) == ["一二三四"] * 4
