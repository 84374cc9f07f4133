"""Every command of docs/pretraining.md, training.md and latents.md is one that the program takes."""

import json
import re
import shlex
from pathlib import Path
from unittest.mock import ANY

import pytest

from davae_jax.cli.main import COMMANDS
from davae_jax.cli.train import parse_train
from davae_jax.training.presets import DEMO
from davae_jax.training.run.saved_config import to_dict

DOCS = Path(__file__).parent.parent / "docs"
GUIDE = (DOCS / "pretraining.md").read_text(encoding="utf-8")
BLOCKS = [re.sub(r"\\\n\s*", "", block) for block in re.findall(r"```bash\n(.*?)```", GUIDE, flags=re.DOTALL)]
# To the end of the line or of the quotes that it stands in; options on a line of their own go on.
TRAIN = re.compile(r"(mpirun [^\n]*)?\bpython train\.py((?:[^'\"\n]|\n(?= +--))*)")
TRAINED = [found for block in BLOCKS for found in TRAIN.findall(block)]
RUN = [line for block in BLOCKS for line in block.splitlines() if line.startswith("davae ")]


def test_all_are_found():
    code = "\n".join(BLOCKS)
    assert len(TRAINED) == code.count("train.py") >= 7
    assert len(RUN) == len(re.findall(r"\bdavae [a-z]", code)) >= 5


@pytest.mark.parametrize(("launcher", "options"), TRAINED)
def test_a_training_command(launcher, options, monkeypatch):
    if launcher:  # which tells each process its number
        monkeypatch.setenv("PMI_SIZE", "4")
        monkeypatch.setenv("PMI_RANK", "0")
    preset, config = parse_train(shlex.split(options))
    assert str(config.data.train[0]).rpartition("/")[2] == "prepared"
    assert preset == "randeng-1b" or config.model.latent_size == 32
    assert config.logits_chunk < config.data.max_length - 1 or preset == "demo"  # never the logits of a whole text


@pytest.mark.parametrize("line", RUN)
def test_a_command(line):
    _, name, *argv = shlex.split(line)
    assert COMMANDS[name][1]().parse(argv, f"davae {name}")


PAGES = {name: (DOCS / name).read_text(encoding="utf-8") for name in ("training.md", "latents.md")}
COMMAND_LINES = [
    line
    for page in PAGES.values()
    for block in re.findall(r"```bash\n(.*?)```", page, flags=re.DOTALL)
    for line in block.splitlines()
]


@pytest.mark.parametrize("line", COMMAND_LINES)
def test_a_command_of_another_page(line, tmp_path, monkeypatch):
    (settings,) = re.findall(r"```toml\n(.*?)```", PAGES["training.md"], flags=re.DOTALL)
    (tmp_path / "mine.toml").write_text(settings, encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    _, name, *argv = shlex.split(line)
    if name != "train":
        assert COMMANDS[name][1]().parse(argv, f"davae {name}")
        return
    (tmp_path / "runs" / "mine").mkdir(parents=True)
    (tmp_path / "runs" / "mine" / "train.json").write_text(json.dumps(to_dict(DEMO)), encoding="utf-8")
    _, config = parse_train(argv, "davae train")
    assert (config.regularizers.mmd.weight, config.steps) == ((10.0, 20_000) if "mine.toml" in argv else (0.0, ANY))
