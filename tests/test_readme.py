"""Every command and example of the README, in its order, on small models under the names that it uses."""

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from hub import serve
from published_layout import config_of, publish, state_of
from test_train import TEXTS, TINY
from tokenizer_fixtures import make_spiece, make_vocab

from davae_jax.checkpoints.published.to_torch import export

ROOT = Path(__file__).parent.parent
BLOCKS = re.findall(r"```(bash|python)\n(.*?)```", (ROOT / "README.md").read_text(encoding="utf-8"), re.S)
# `.ci/run` runs these: they take minutes or gigabytes, or make an environment of their own.
IN_CI = ["bin/python train.py", "bin/python -m pytest", "make_checkpoint.py"]
DECODER = "vae_model.decoder."


@pytest.fixture(scope="module")
def place(tmp_path_factory, tiny_checkpoint):
    """A folder where the README's names stand for small things, and the environment its commands run in."""
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    folder = tmp_path_factory.mktemp("readme")
    (folder / "my-texts.txt").write_text("\n".join(TEXTS) + "\n", encoding="utf-8")
    export(tiny_checkpoint, folder / "PUBLISHED_FOLDER", dtype="float32")
    shutil.copytree(tiny_checkpoint, folder / "runs" / "demo")  # every command reads a run as it reads this
    (folder / "DIR").symlink_to("PUBLISHED_FOLDER")  # the README's checkpoint of the published size
    for name in ("train.py", "convert", "davae_jax", "benchmarks"):
        (folder / name).symlink_to(ROOT / name)

    bert = transformers.BertConfig(
        vocab_size=len(make_vocab(folder)),
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=32,
        max_position_embeddings=32,
    )
    transformers.BertModel(bert).save_pretrained(folder / "BERT_FOLDER")
    shutil.move(folder / "vocab.txt", folder / "BERT_FOLDER")
    state = {n.removeprefix(DECODER): t for n, t in state_of("small").items() if n.startswith(DECODER)}
    del state["transformer.linear_emb.weight"]
    config = config_of("small")["decoder"]
    state["word_embeddings.weight"] = torch.randn(304, config["hidden_size"]) * 0.02
    publish(folder / "TRANSFORMER_XL_FOLDER", state, config | {"vocab_size": 304})
    make_spiece(folder / "TRANSFORMER_XL_FOLDER", 300)

    repo = "IDEA-CCNL/Randeng-DAVAE-1.2B-General-Chinese"
    server, env = serve({repo: folder / "PUBLISHED_FOLDER"}, folder / "hub")
    (folder / "bin").mkdir()
    for name, what in (("python", ""), ("davae", "-m davae_jax.cli ")):
        program = folder / "bin" / name
        program.write_text(f'#!/bin/sh\nexec {shlex.quote(sys.executable)} {what}"$@"\n', encoding="utf-8")
        program.chmod(0o755)
    env |= {"PATH": f"{program.parent}:{env['PATH']}", "PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu"}
    yield folder, env
    server.shutdown()


def commands(block):
    return [line for line in re.sub(r"\\\n\s*", "", block).splitlines() if line.strip()]


def small(line):
    """The command with what makes it short: a training of two steps of a small model."""
    line = line.partition("  #")[0].rstrip()
    if "train.py" in line:
        options = [*map(str, TINY), "--steps", "2"]
        if "--init" in line:  # the halves bring their sizes
            options = ["--batch-size", "4", "--log.figures", "0", "--log.samples", "0", "--steps", "2"]
        line = re.sub(r" --steps \d+", "", line) + " " + shlex.join(options)
    if line.startswith("python -m benchmarks "):
        return line + " --smallest"
    return line + (
        " --max-length 12"
        if re.match(r"davae (generate|recon|inter|analogy|sample|attr|neigh|combine|traverse|decode)", line)
        else ""
    )


@pytest.mark.slow
def test_the_readme_runs(place):
    folder, env = place
    ran = 0
    for language, block in BLOCKS:
        if language == "python":
            continue
        for line in commands(block):
            if any(name in line for name in IN_CI):
                assert any(name in (ROOT / ".ci" / "run").read_text(encoding="utf-8") for name in IN_CI if name in line)
                continue
            done = subprocess.run(small(line), shell=True, cwd=folder, env=env, capture_output=True, text=True)
            assert done.returncode == 0, f"{line}\n{done.stdout}\n{done.stderr}"
            ran += 1
            if re.match(
                r"davae (generate|reconstruct|interpolate|analogy|sample|attribute|neighbours|combine|traverse|decode)",
                line,
            ):
                assert all(json.loads(row) for row in done.stdout.splitlines())
    assert ran >= 12
    # All examples in Python, one after the other as a reader would type them.
    program = "\n".join(block for language, block in BLOCKS if language == "python")
    done = subprocess.run([sys.executable, "-c", program], cwd=folder, env=env, capture_output=True, text=True)
    assert done.returncode == 0, f"{program}\n{done.stderr}"


def test_links_and_files_exist():
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    for link in re.findall(r"\]\((?!http)([^)#]+)", text):
        assert (ROOT / link).exists(), link
    for path in set(re.findall(r"(?:tests|benchmarks|docs)/[\w./-]+\.\w+", text)):
        assert (ROOT / path).exists(), path
    assert os.access(ROOT / ".ci" / "run", os.X_OK)
