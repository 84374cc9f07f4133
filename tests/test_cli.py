"""The `davae` command: what it writes, what it says when something is wrong, and what it leaves behind."""

import io
import json
import os
import shutil
import signal
import stat
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
from tiny_checkpoint import MAX_IDS
from tokenizer_fixtures import sentences

from davae_jax import TextVAE
from davae_jax.checkpoints.published.to_torch import export
from davae_jax.cli.main import COMMANDS, SUMMARIES, main
from davae_jax.cli.renamed import replace_renamed
from davae_jax.cli.train import main as train_main
from davae_jax.cli.train import parse_train
from davae_jax.data.inputs.texts import decode_lines
from davae_jax.utils.errors import OptionError

TEXT_COMMANDS = ["generate", "reconstruct", "sample", "interpolate", "analogy"]
LATENT_COMMANDS = ["attribute", "neighbours", "combine"]  # what they write is in test_latent_tools.py
TEXTS = sentences(3)
A, B, C = TEXTS
MODULE = [sys.executable, "-m", "davae_jax.cli"]


@pytest.fixture
def davae(capsys):
    """Runs the command in this process. out and err: what it wrote; rows: its JSON Lines."""

    def call(*argv):
        code = main([str(arg) for arg in argv])
        out, err = capsys.readouterr()
        rows = [json.loads(line) for line in out.split("\n")[:-1] if line.startswith("{")]
        return SimpleNamespace(code=code, out=out, err=err, rows=rows)

    return call


@pytest.fixture
def model(tiny_checkpoint):
    """What every text command needs."""
    return ("--model", tiny_checkpoint)


@pytest.fixture
def standard_input(monkeypatch):
    def give(data: bytes):
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(data)))

    return give


def started(*argv, **kwargs) -> subprocess.Popen:
    env = os.environ | {"JAX_PLATFORMS": "cpu", "PYTHONIOENCODING": "ascii"}
    env.pop("PYTHONUNBUFFERED", None)
    kwargs = dict(stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE) | kwargs
    return subprocess.Popen([str(arg) for arg in argv], env=env, **kwargs)


# What the commands write.


def test_generate(davae, model, tiny_vae):
    result = davae("generate", *TEXTS, *model, "--seed", 3)
    assert (result.code, result.err) == (0, "")
    generated = tiny_vae.simulate_batch(TEXTS, seed=3)
    assert result.rows == [{"text": a, "generated": b} for a, b in zip(TEXTS, generated, strict=True)]
    assert generated != tiny_vae.simulate_batch(TEXTS, seed=0)
    # Chinese is written as it is.
    assert result.out.split("\n")[0] == f'{{"text": "{A}", "generated": "{generated[0]}"}}'


def test_generate_with_a_prompt(davae, model, tiny_vae):
    result = davae("generate", *TEXTS, *model, "--prompt", "今天", "--std-scale", 0.5)
    assert (result.code, result.err) == (0, "")
    generated = tiny_vae.generate(tiny_vae.encode(TEXTS, std_scale=0.5), ["今天"] * 3)
    assert result.rows == [{"text": a, "prompt": "今天", "generated": b} for a, b in zip(TEXTS, generated, strict=True)]


def test_reconstruct(davae, model, tiny_vae):
    result = davae("reconstruct", *model, *TEXTS)
    assert (result.code, result.err) == (0, "")
    reconstructions = tiny_vae.reconstruct(TEXTS)
    assert result.rows == [{"text": a, "reconstruction": b} for a, b in zip(TEXTS, reconstructions, strict=True)]
    drawn = [row["reconstruction"] for row in davae("reconstruct", *model, *TEXTS, "--top-p", 0.9).rows]
    assert drawn == tiny_vae.reconstruct(TEXTS, top_p=0.9) != reconstructions


def test_sample(davae, model, tiny_vae):
    settings = dict(top_k=20, top_p=0.8, temperature=1.2, repetition_penalty=1.5, max_length=9)
    options = [str(x) for name, value in settings.items() for x in (f"--{name.replace('_', '-')}", value)]
    result = davae("sample", *model, "--n", 4, "--seed", 7, *options)
    assert (result.code, result.err) == (0, "")
    assert result.rows == [{"sample": text} for text in tiny_vae.sample(4, seed=7, **settings)]
    assert davae("sample", *model, "--n", 4).rows == [{"sample": text} for text in tiny_vae.sample(4)]


def test_interpolate(davae, model, tiny_vae, tmp_path):
    result = davae("interpolate", A, B, *model, "--steps", 4)
    assert (result.code, result.err) == (0, "")
    rows = [{"from": A, "to": B, "weight": i / 3, "text": text} for i, text in enumerate(tiny_vae.interpolate(A, B, 4))]
    assert result.rows == rows
    pairs = tmp_path / "pairs.tsv"
    pairs.write_text(f"{A}\t{B}\n{C}\t{A}\n", encoding="utf-8")
    result = davae("interpolate", *model, "--input", pairs, "--steps", 4)
    assert result.rows[:4] == rows
    assert [(row["from"], row["to"]) for row in result.rows[4:]] == [(C, A)] * 4
    assert [row["text"] for row in result.rows[4:]] == tiny_vae.interpolate(C, A, 4)
    # Seven steps unless told otherwise.
    assert [row["weight"] for row in davae("interpolate", A, B, *model).rows] == [i / 6 for i in range(7)]


def test_analogy(davae, model, tiny_vae, tmp_path):
    result = davae("analogy", A, B, C, *model)
    assert (result.code, result.err) == (0, "")
    row = {"a": A, "b": B, "c": C, "text": tiny_vae.analogy(A, B, C)}
    assert result.rows == [row]
    triples = tmp_path / "triples.tsv"
    triples.write_text(f"{A}\t{B}\t{C}\n{B}\t{B}\t{A}\n{C}\t{C}\t{B}", encoding="utf-8")
    result = davae("analogy", *model, "--input", triples)
    of_a, of_b, _ = tiny_vae.reconstruct(TEXTS)
    assert result.rows == [row, {"a": B, "b": B, "c": A, "text": of_a}, {"a": C, "b": C, "c": B, "text": of_b}]


def test_texts_may_come_from_anywhere(davae, model, tmp_path, standard_input):
    file, out = tmp_path / "texts.txt", tmp_path / "out.jsonl"
    data = "".join(f"{text}\n" for text in TEXTS).encode()
    file.write_bytes(data)
    standard_input(data)
    result = davae("reconstruct", *model)
    assert [row["text"] for row in result.rows] == TEXTS
    assert davae("reconstruct", *model, *TEXTS).out == result.out
    assert davae("reconstruct", *model, "--input", file).out == result.out
    assert davae("reconstruct", *model, "--input", file, "--batch-size", 1).out == result.out
    written = davae("reconstruct", *model, "--input", file, "--output", out)
    assert (written.code, written.out, written.err) == (0, "", "")
    assert out.read_text(encoding="utf-8") == result.out
    assert sorted(tmp_path.iterdir()) == [out, file]


@pytest.mark.parametrize(
    ("data", "lines"),
    [
        (b"", []),
        (b"\n", [""]),
        (b"a\n\nb", ["a", "", "b"]),
        (b"a\r\nb\r\n", ["a", "b"]),
        ("\ufeff今天\n\ufeffx\n".encode(), ["今天", "\ufeffx"]),  # a byte-order mark, at the beginning alone
        ("a\u2028b\u2029c\x85d\x0ce\rf\n".encode(), ["a\u2028b\u2029c\x85d\x0ce\rf"]),  # one line
    ],
)
def test_lines_end_at_line_feeds(data, lines):
    assert decode_lines(data, "name") == lines


def test_unusual_lines_are_preserved(davae, model, tmp_path):
    file = tmp_path / "texts.txt"
    file.write_bytes(f"\ufeff{A}\r\n{B}\u2028{C}\r\n{C}\tx".encode())
    result = davae("reconstruct", *model, "--input", file)
    assert (result.code, result.err) == (0, "")
    assert [row["text"] for row in result.rows] == [A, f"{B}\u2028{C}", f"{C}\tx"]
    file.write_bytes(b"")
    result = davae("reconstruct", *model, "--input", file)
    assert (result.code, result.out, result.err) == (0, "", "")


@pytest.mark.parametrize("argv", [["interpolate"], ["analogy"], ["combine", "--weights", 1, 1], ["neighbours"]])
def test_an_empty_file_gives_an_empty_result(argv, davae, model, tmp_path):
    (tmp_path / "texts.txt").touch()
    result = davae(*argv, *model, "--input", tmp_path / "texts.txt")
    assert (result.code, result.out, result.err) == (0, "", "")


@pytest.mark.parametrize("name", ["a\nb", "a\x1b[31mb", "a\u2028b", "a\x00b", "x" * 100_000])
def test_an_error_is_one_line_whatever_it_names(name, davae):
    result = davae("sample", "--model", name)
    assert (result.code, result.out) == (1, "")
    assert result.err.startswith("davae sample: error: ") and result.err.endswith("\n") and len(result.err) < 4200
    assert len(result.err.splitlines()) == 1 and "\x1b" not in result.err and "\0" not in result.err


def test_options_after_two_hyphens_are_texts(davae, model):
    texts = ["--seed", "-1", "--"]
    assert [row["text"] for row in davae("reconstruct", *model, "--", *texts).rows] == texts


def test_published_folders_are_read_too(davae, tiny_checkpoint, tmp_path):
    pytest.importorskip("torch")
    folder = export(tiny_checkpoint, tmp_path / "published", dtype="float32")
    (folder / "vocab.txt").unlink()
    result = davae("reconstruct", *TEXTS, "--model", folder, "--tokenizers", tiny_checkpoint)
    assert (result.code, result.err) == (0, "")
    assert result.out == davae("reconstruct", *TEXTS, "--model", tiny_checkpoint).out


def test_a_model_named_from_here(davae, tiny_checkpoint, monkeypatch):
    monkeypatch.chdir(tiny_checkpoint.parent)
    result = davae("reconstruct", *TEXTS, "--model", tiny_checkpoint.name)
    assert (result.code, result.err) == (0, "")


def test_bfloat16(davae, tiny_checkpoint, tiny_vae):
    result = davae("reconstruct", A, "--model", tiny_checkpoint, "--dtype", "bfloat16")
    vae = TextVAE.from_pretrained(tiny_checkpoint, dtype="bfloat16")
    assert vae.model.decoder.layers[0].dtype == "bfloat16"
    assert result.rows == [{"text": A, "reconstruction": vae.reconstruct([A])[0]}]


# What is worth a warning.


def test_warnings_name_file_and_line(davae, model, tmp_path, standard_input):
    data = f"{A}\n\nѪѪ\n{'天' * 100_000}\n".encode()
    file = tmp_path / "texts.txt"
    file.write_bytes(data)
    said = (
        "line 2: the text is empty or only white space",
        "line 3: the encoder knows no character of the text",
        f"line 4: the text is longer than {MAX_IDS} ids and was truncated",
    )
    result = davae("reconstruct", *model, "--input", file)
    assert result.code == 0
    assert result.err == "".join(f"davae reconstruct: warning: {file}: {problem}\n" for problem in said)
    assert [row["text"] for row in result.rows] == [A, "", "ѪѪ", "天" * 100_000]
    standard_input(data)
    result = davae("generate", *model)
    assert result.err == "".join(f"davae generate: warning: standard input: {problem}\n" for problem in said)
    assert len(result.rows) == 4


def test_warnings_of_texts_and_of_pairs(davae, model, tmp_path):
    result = davae("reconstruct", *model, A, "", B)
    assert result.code == 0 and len(result.rows) == 3
    assert result.err == "davae reconstruct: warning: text 2: the text is empty or only white space\n"
    pairs = tmp_path / "pairs.tsv"
    pairs.write_text(f"{A}\t{B}\n{A}\tѪ\n", encoding="utf-8")
    result = davae("interpolate", *model, "--steps", 2, "--input", pairs)
    assert result.code == 0 and len(result.rows) == 4
    assert result.err == (f"davae interpolate: warning: {pairs}: line 2: the encoder knows no character of the text\n")


# What is refused: one line, and a code.


@pytest.mark.parametrize("name", COMMANDS)
def test_help(davae, name):
    for flag in ("--help", "-h"):
        result = davae(name, flag)
        assert (result.code, result.err) == (0, "")
        assert result.out.startswith(f"usage: davae {name} [-h] ")
        said = " ".join(result.out.replace("│", " ").split())
        assert "(default: False)" in said  # --debug
        if name in TEXT_COMMANDS + LATENT_COMMANDS:
            for default in ("float32", "16", "0", "the checkpoint's", "the model's folder", "standard output"):
                assert f"(default: {default})" in said
            assert ("(default: greedy; " in said) == (name not in ("generate", "sample"))
            assert ("(default: standard input)" in said) == ("[TEXT ...]" in said) == (name != "sample")


def test_davae_without_a_command(davae):
    for argv in (["--help"], ["-h"]):
        result = davae(*argv)
        assert (result.code, result.err) == (0, "")
        assert all(f"\n  {name} " in result.out for name in SUMMARIES)
    assert davae("--version").out == "0.1.0\n"
    known = f"available: {', '.join(SUMMARIES)} (davae --help)\n"
    assert davae().err == f"davae: error: no command given; {known}"
    result = davae("generat", "--model", "x")
    assert (result.code, result.out) == (2, "")
    assert result.err == f"davae: error: unknown command 'generat'; {known}"


@pytest.mark.parametrize(
    ("argv", "named"),
    [
        ("sample --tempratur 3", "--tempratur"),
        ("sample x", "x"),
        ("generate x --n 3", "--n"),
        ("sample --n x", "--n"),
        ("sample --n 1.5", "--n"),
        ("combine --weights 1 x", "--weights"),
        ("sample --top-p much", "--top-p"),
        ("sample --n", "--n"),
        ("sample --dtype int8", "--dtype"),
        ("sample --weights int4", "--weights"),
        ("sample --nope\x1b[31m\n\x07", "--nope\\x1b[31m\\n\\x07"),
        ("sample --n \x1b[31m", "\\x1b[31m"),
    ],
)
def test_arguments_that_cannot_be_parsed(davae, argv, named):
    """tyro's own message, which names the option."""
    name, *rest = argv.split(" ")
    result = davae(name, *rest, "--model", "/nowhere")
    assert (result.code, result.out) == (2, "")
    assert named in result.err and "Traceback" not in result.err and "\x1b" not in result.err


@pytest.mark.parametrize(
    ("argv", "named"),
    [
        ("sample --n 0", "--n"),
        ("sample --n 1000001", "--n"),
        ("neighbours x --n 99999999999", "--n"),
        ("sample --batch-size 0", "--batch-size"),
        ("sample --max-length 0", "--max-length"),
        ("sample --max-length 3000000000", "--max-length"),
        ("sample --temperature 0", "--temperature"),
        ("sample --temperature nan", "--temperature"),
        ("reconstruct x --top-k -1", "--top-k"),
        ("interpolate x y --top-p 1.5", "--top-p"),
        ("analogy x y z --repetition-penalty 0", "--repetition-penalty"),
        ("generate x --std-scale -1", "--std-scale"),
        ("generate x --std-scale inf", "--std-scale"),
        ("generate x --input y", "--input"),
        ("interpolate x y --steps 1", "--steps"),
        ("interpolate x y --steps 10000000000", "--steps"),
        ("interpolate x", "needs"),
        ("interpolate x y z", "needs"),
        ("analogy x y", "needs"),
        ("generate x \udcff", "text 2"),
        ("generate x --prompt \udcff", "--prompt"),
    ],
    ids=lambda x: "",
)
def test_bad_arguments(davae, argv, named):
    # They are found before the model is looked for.
    name, *rest = argv.split(" ")
    result = davae(name, *rest, "--model", "/nowhere")
    assert (result.code, result.out) == (2, "")
    assert result.err.startswith(f"davae {name}: error: {named} ") and result.err.count("\n") == 1


def test_old_names_of_options_still_work(capsys):
    _, config = parse_train(["randeng-1b", "--data.pieces", "700", "--data.entries=900"])
    assert (config.data.decoder_vocab_size, config.data.encoder_vocab_size) == (700, 900)
    lines = ["--data.pieces is now --data.decoder-vocab-size", "--data.entries is now --data.encoder-vocab-size"]
    assert capsys.readouterr().err.splitlines() == lines
    # Only where they were options: a text may look like one.
    assert replace_renamed(["--cut", "--", "--cut"], "davae prepare") == ["--truncate", "--", "--cut"]
    assert replace_renamed(["--cut"], "davae generate") == ["--cut"]


@pytest.mark.parametrize(
    ("option", "value"), [("--model.encoder.hidden-size", 7), ("--model.top-p", 2), ("--model.decoder.num-layers", 0)]
)
def test_fields_of_the_model_are_named_as_options(option, value):
    with pytest.raises(OptionError) as e:
        parse_train([option, str(value)])
    assert e.value.exit_code == 2 and e.value.option.startswith("--model.")


@pytest.mark.parametrize("name", TEXT_COMMANDS)
def test_a_model_is_needed(davae, name):
    result = davae(name)
    assert (result.code, result.out) == (2, "") and "--model" in result.err
    result = davae(name, "--modle", "x")
    assert (result.code, result.out) == (2, "") and "--model" in result.err and "--modle" in result.err


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--prompt", "今天<|endoftext|>"], "--prompt contains the end token <|endoftext|>"),
        (["--prompt", "春眠" * 12], "--prompt has 13 tokens, more than max_length 12"),
        (["--prompt", "今天", "--max-length", "1"], "--prompt has 2 tokens, more than max_length 1"),
    ],
    ids=lambda x: x if isinstance(x, str) else "",
)
def test_bad_prompts(davae, model, options, message):
    result = davae("generate", A, *model, *options)
    assert (result.code, result.out, result.err) == (2, "", f"davae generate: error: {message}\n")


def failure(result, name="reconstruct") -> str:
    """The one line that a failed run said."""
    assert (result.code, result.out) == (1, "")
    line, end = result.err.split("\n")
    assert end == "" and line.startswith(f"davae {name}: error: ")
    return line.removeprefix(f"davae {name}: error: ")


def test_bad_inputs(davae, model, tmp_path, monkeypatch):
    file = tmp_path / "texts.txt"
    file.write_bytes(b"abc\nd\xff\n")
    assert failure(davae("reconstruct", *model, "--input", file)) == f"{file}: line 2: is not UTF-8"
    file.unlink()
    assert failure(davae("reconstruct", *model, "--input", file)) == f"{file}: No such file or directory"
    assert failure(davae("reconstruct", *model, "--input", tmp_path)) == f"{tmp_path}: Is a directory"
    file.write_text("a\tb\n\na\tb\tc\n", encoding="utf-8")
    problem = f"{file}: line 2: needs 2 texts separated by tabs, not 1"
    assert failure(davae("interpolate", *model, "--input", file), "interpolate") == problem
    problem = f"{file}: line 1: needs 3 texts separated by tabs, not 2"
    assert failure(davae("analogy", *model, "--input", file), "analogy") == problem
    monkeypatch.setattr(sys, "stdin", None)  # as Python does where it is closed
    result = davae("reconstruct", *model)
    assert result.code == 2
    assert result.err == "davae reconstruct: error: --input or texts must be given\n"


def test_bad_models(davae, tiny_checkpoint, tmp_path):
    missing = tmp_path / "missing"
    assert failure(davae("reconstruct", A, "--model", missing)) == f"{missing}: no such folder"
    file = tiny_checkpoint / "vocab.txt"
    problem = f"{file}: is a file; pass the folder that contains config.json"
    assert failure(davae("reconstruct", A, "--model", file)) == problem
    problem = f"{tmp_path / 'config.json'}: no such file; a model folder needs its config.json"
    assert failure(davae("reconstruct", A, "--model", tmp_path)) == problem
    folder = tmp_path / "copy"
    shutil.copytree(tiny_checkpoint, folder)
    shutil.rmtree(folder / "params")
    problem = f"{folder}: contains no model.safetensors and no pytorch_model.bin"
    assert failure(davae("reconstruct", A, "--model", folder)) == problem
    (folder / "spiece.model").unlink()
    problem = f"{folder / 'spiece.model'}: no such file; a tokenizer folder contains spiece.model and vocab.txt"
    assert failure(davae("reconstruct", A, "--model", folder)) == problem
    config = folder / "config.json"
    config.write_text("{", encoding="utf-8")
    assert failure(davae("reconstruct", A, "--model", folder)).startswith(f"{config}: cannot be read as JSON (")


def test_bad_weights(davae, tiny_checkpoint, tmp_path):
    torch = pytest.importorskip("torch")
    folder = export(tiny_checkpoint, tmp_path / "published", dtype="float32")
    file, copy = folder / "pytorch_model.bin", tmp_path / "converted"
    state = torch.load(file, weights_only=True)
    name = next(n for n in state if n.endswith("word_embeddings.weight"))
    state[name][3, 1] = float("nan")
    torch.save(state, file)
    for argv in (["reconstruct", A, "--model", folder], ["convert", folder, copy]):
        assert failure(davae(*argv), argv[0]) == f"{file}: 1 with NaN or infinity: {name}"
    file.write_bytes(file.read_bytes()[:-5000])
    for argv in (["reconstruct", A, "--model", folder], ["convert", folder, copy]):
        assert failure(davae(*argv), argv[0]) == f"{file}: cannot be read: it is truncated or damaged"
    assert not copy.exists()


def test_unforeseen_errors(davae, monkeypatch):
    def fail(*args, **kwargs):
        raise RuntimeError("first line\nsecond line")

    monkeypatch.setattr(TextVAE, "from_pretrained", fail)
    said = "RuntimeError: first line (--debug shows where)"
    assert failure(davae("sample", "--model", "x"), "sample") == said
    result = davae("sample", "--model", "x", "--debug")
    assert result.code == 1
    assert result.err.startswith("Traceback (most recent call last):\n")
    assert "in fail\n" in result.err
    assert result.err.endswith(f"\ndavae sample: error: {said}\n")


def test_debug_of_bad_arguments(davae):
    result = davae("sample", "--model", "x", "--n", "0", "--debug")
    assert result.code == 2
    assert result.err.startswith("Traceback (most recent call last):\n")
    assert result.err.endswith("\ndavae sample: error: --n must be at least 1, not 0\n")


# What is left behind.


@pytest.fixture
def old(tmp_path) -> Path:
    """An output file of an earlier run, alone in its folder."""
    folder = tmp_path / "out"
    folder.mkdir()
    (folder / "out.jsonl").write_text("old\n", encoding="utf-8")
    return folder / "out.jsonl"


def untouched(old: Path) -> bool:
    return old.read_text(encoding="utf-8") == "old\n" and list(old.parent.iterdir()) == [old]


def raising(error):
    def fail(*args, **kwargs):
        raise error

    return fail


def test_a_finished_output_takes_the_old_ones_place(davae, model, old, tiny_vae):
    link = old.with_name("link.jsonl")
    link.symlink_to(old.name)
    assert davae("sample", *model, "--n", 1, "--output", link).code == 0
    assert link.is_symlink()
    assert old.read_text(encoding="utf-8") == f'{{"sample": "{tiny_vae.sample(1)[0]}"}}\n'
    assert sorted(old.parent.iterdir()) == [link, old]


@pytest.mark.parametrize("target", [(TextVAE, "generate"), (Path, "write_text"), (Path, "replace")], ids=str)
def test_a_failed_run_leaves_the_old_output(davae, model, old, monkeypatch, target):
    monkeypatch.setattr(*target, raising(RuntimeError("no")))
    said = failure(davae("sample", *model, "--n", 1, "--output", old), "sample")
    assert said == "RuntimeError: no (--debug shows where)"
    assert untouched(old)
    monkeypatch.setattr(*target, raising(KeyboardInterrupt()))
    result = davae("sample", *model, "--n", 1, "--output", old)
    assert (result.code, result.out, result.err) == (130, "", "davae sample: interrupted\n")
    assert untouched(old)


def test_a_full_disk(davae, model, old, monkeypatch):
    def write(path, text, **kwargs):
        path.touch()
        raise OSError(28, "No space left on device", str(path))

    monkeypatch.setattr(Path, "write_text", write)
    said = failure(davae("sample", *model, "--n", 1, "--output", old), "sample")
    assert said == f"{old}: cannot be written (No space left on device)"
    assert untouched(old)


def test_outputs_that_cannot_be_written(davae, tmp_path, monkeypatch):
    # Found before the model is looked for.
    argv = ["sample", "--model", "/nowhere", "--output"]
    assert failure(davae(*argv, tmp_path), "sample") == f"{tmp_path}: is a folder; --output needs a file"
    folder = tmp_path / "missing"
    said = failure(davae(*argv, folder / "x"), "sample")
    assert said == f"{folder / 'x'}: cannot be written ({folder} does not exist)"
    monkeypatch.setattr(os, "access", lambda path, mode: path != tmp_path)
    said = failure(davae(*argv, tmp_path / "x"), "sample")
    assert said == f"{tmp_path / 'x'}: cannot be written (Permission denied)"
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", ["a.jsonl", "a.JSON", "a.parquet", "a.txt.gz", "a.jsonl.zst"])
def test_input_that_is_not_plain_text_is_refused(name, davae, tmp_path):
    """Its lines of JSON or of packed bytes would be taken for texts."""
    (tmp_path / name).write_text('{"text": "a"}\n', encoding="utf-8")
    result = davae("reconstruct", "--model", "/nowhere", "--input", tmp_path / name)
    assert (result.code, result.out) == (2, "") and result.err.startswith(
        f"davae reconstruct: error: --input {tmp_path / name}"
    )


def test_a_pipe_is_written_to(davae, model, tmp_path, tiny_vae):
    """As /dev/stdout and /dev/null are: renaming a file into their place would destroy them."""
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    reader = os.open(pipe, os.O_RDONLY | os.O_NONBLOCK)
    try:
        assert davae("sample", *model, "--n", 1, "--output", pipe).code == 0
        assert os.read(reader, 10_000).decode() == f'{{"sample": "{tiny_vae.sample(1)[0]}"}}\n'
    finally:
        os.close(reader)
    assert stat.S_ISFIFO(pipe.stat().st_mode)
    assert list(tmp_path.iterdir()) == [pipe]


# In a process of its own.


def test_the_installed_command(model, tiny_vae):
    script = Path(sys.executable).with_name("davae")
    if not script.exists():
        pytest.skip("the package is not installed")
    process = started(script, "reconstruct", *model, stdin=subprocess.PIPE)
    out, err = process.communicate("".join(f"{text}\n" for text in TEXTS).encode())
    assert process.returncode == 0
    assert err == b""  # no library's log either
    rows = [json.loads(line) for line in out.decode("utf-8").split("\n")[:-1]]  # UTF-8 whatever the locale
    assert rows == [{"text": a, "reconstruction": b} for a, b in zip(TEXTS, tiny_vae.reconstruct(TEXTS), strict=True)]


@pytest.mark.parametrize("argv", [["--help"], ["sample", "--help"]], ids=str)
def test_a_closed_pipe_ends_quietly(argv):
    """`davae … | head`"""
    reader, writer = os.pipe()
    os.close(reader)
    process = started(*MODULE, *argv, stdout=writer)
    os.close(writer)
    _, err = process.communicate()
    assert (process.returncode, err) == (0, b"")


@pytest.mark.skipif(not Path("/dev/full").is_char_device(), reason="needs /dev/full")
def test_a_full_disk_behind_standard_output():
    with open("/dev/full", "wb") as full:
        process = started(*MODULE, "--version", stdout=full)
        _, err = process.communicate()
    assert (process.returncode, err) == (1, b"davae: error: standard output: No space left on device\n")


def test_interrupt(old):
    pipe = old.parent.with_name("texts")
    os.mkfifo(pipe)
    # The tests may run as a shell's background job, which ignores interrupts and hands that on.
    program = "import signal, sys; signal.signal(signal.SIGINT, signal.default_int_handler)"
    program += "; from davae_jax.cli.main import main; sys.exit(main())"
    process = started(sys.executable, "-c", program, "reconstruct", "--model", "x", "--input", pipe, "--output", old)
    with open(pipe, "wb"):  # opens once the command reads from it
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=60)
    assert (process.returncode, out, err) == (130, b"", b"davae reconstruct: interrupted\n")
    assert untouched(old)


@pytest.mark.parametrize(
    ("argv", "option"),
    [
        (["train", "--init.encoder", ""], "--init.encoder"),
        (["train", "--data.train="], "--data.train"),
        (["prepare", "--output", "out", "--input", "", "texts.txt"], "--input"),
        (["reconstruct", "--model", "", "a text"], "--model"),
    ],
)
def test_an_empty_value_is_not_the_working_folder(argv, option, tmp_path, monkeypatch, capsys):
    """A variable of the shell that is not set."""
    monkeypatch.chdir(tmp_path)
    program, *words = argv
    assert (train_main(words) if program == "train" else main(argv)) == 2
    err = capsys.readouterr().err
    assert f"error: {option} " in err and err.count("\n") == 1 and not list(tmp_path.iterdir())
