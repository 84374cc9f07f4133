"""Settings from files: TOML and the train.json of a run, beside a preset and options; what cannot be used is named."""

import dataclasses
import json
import sys
from pathlib import Path

import pytest
from test_train import SMALLEST, TINY

from davae_jax.cli.main import main
from davae_jax.cli.plan import PlanCommand
from davae_jax.cli.train import parse_train, resume_command
from davae_jax.data.config import DataConfig
from davae_jax.regularizers import REGISTRY
from davae_jax.training.config import TrainConfig
from davae_jax.training.presets import DEMO, RANDENG_1B
from davae_jax.training.run.saved_config import to_dict
from davae_jax.utils.json_files import with_sum

PLUGIN = """
from dataclasses import dataclass
from davae_jax.regularizers import Regularizer, register
@register("of_file")
@dataclass(frozen=True)
class OfFile(Regularizer):
    target: float = 1.0
"""


def parsed(*argv):
    return parse_train(list(map(str, argv)), "davae train")[1]


def write(path, text):
    path.write_text(text, encoding="utf-8")
    return path


def run_file(path, config=DEMO, **values):
    """Writes the train.json of a run."""
    content = to_dict(config) | {"digest_of_texts": "0", "digests_of_tokenizers": {}} | values
    return write(path, json.dumps(with_sum(content)))


def test_the_order_is_preset_file_options(tmp_path):
    file = write(
        tmp_path / "a.toml", 'steps = 7\nseed = 3\n[beta]\nmax = 1\n[data]\ntrain = "t.txt"\nfield = ["a", "b"]\n'
    )
    config = parsed("randeng-1b", "--config", file, "--seed", 4)
    data = dataclasses.replace(RANDENG_1B.data, train=(Path("t.txt"),), field=("a", "b"))
    beta = dataclasses.replace(RANDENG_1B.beta, max=1.0)
    assert config == dataclasses.replace(RANDENG_1B, steps=7, seed=4, beta=beta, data=data)
    assert type(config) is TrainConfig and type(config.beta.max) is float
    later = write(tmp_path / "b.toml", "seed = 5\n[beta]\nstart = 0.5\n")
    config = parsed(f"--config={file}", "--config", later)
    assert (config.steps, config.seed, config.beta.max, config.beta.start) == (7, 5, 1.0, 0.5)


def test_every_setting_can_stand_in_a_file(tmp_path):
    """The options of the tiny runs, under their names as options."""
    lines = [f"{option} = {value}" for option, value in SMALLEST.items()]
    file = write(tmp_path / "tiny.toml", "\n".join(lines) + "\nlog.profile-steps = [1, 2]\n")
    assert parsed("--config", file) == parsed(*TINY, "--profile-steps", 1, 2)


def test_conditions_hold_for_file_and_options_together(tmp_path):
    file = write(tmp_path / "a.toml", '[data]\nvalid = "v.txt"\n')
    assert parsed("--config", file, "--data.train", "t.txt").data == dataclasses.replace(
        DataConfig(), train=(Path("t.txt"),), valid=(Path("v.txt"),)
    )
    file = write(tmp_path / "b.toml", "accumulate = 3\n")
    assert parsed("--config", file, "--batch-size", 6).accumulate == 3


def test_the_file_of_a_run_is_all_of_it(tmp_path):
    """It replaces the preset, but for what belongs to the processes; settings that it lacks are the defaults."""
    argv = [*TINY, "--data.train", "a", "b", "--regularizers.mmd.weight", 2, "--mesh.fsdp", 2, "--run-dir", tmp_path]
    config = parsed(
        *argv, "--distributed.coordinator=h:1", "--distributed.num-processes=2", "--distributed.process-id=1"
    )
    repeated = parsed("randeng-1b", "--config", run_file(tmp_path / "train.json", config))
    assert repeated == parsed(*argv)
    old = {name: x for name, x in to_dict(config).items() if name not in ("lagging", "regularizers")}
    file = write(tmp_path / "old.json", json.dumps(old | {"data": {"train": "t", "pieces": 60}}))
    assert parsed("--config", file).data == DataConfig(train=(Path("t"),), decoder_vocab_size=60)


def test_plugins_of_a_file(tmp_path):
    plugin = write(tmp_path / "plugin.py", PLUGIN)
    file = write(tmp_path / "a.toml", f'plugin = "{plugin}"\n[regularizers.of-file]\nweight = 2\n')
    try:
        config = parsed("--config", file, "--regularizers.of-file.target", 3)
        assert dataclasses.asdict(config.regularizers.of_file)["weight"] == 2.0
        assert (config.regularizers.of_file.target, config.plugin) == (3.0, (plugin,))
        assert to_dict(parsed("--config", run_file(tmp_path / "train.json", config))) == to_dict(config)
    finally:
        REGISTRY.pop("of_file", None)


def test_plan_takes_the_same_files(tmp_path):
    file = write(tmp_path / "a.toml", "batch_size = 48\n")
    command = PlanCommand.parse(["randeng-1b", "--config", str(file), "--chips", "4"], "davae plan")
    assert command.config == dataclasses.replace(RANDENG_1B, batch_size=48) and command.chips == 4


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        ("stepz = 3", "stepz is not a setting; those: steps, batch_size, seed, "),
        ("[beta]\nmaximum = 3", "beta.maximum is not a setting; those of [beta]: start, max, ratio_zero, "),
        ("[model.encoder]\nvocab_size = 9", "model.encoder.vocab_size is not a setting; those of [model.encoder]: "),
        ("[regularizers.mmdd]\nweight = 1", "regularizers.mmdd is not a setting; those of [regularizers]: wgan, "),
        ("beta = 3", "beta must be a section, not 3"),
        ("steps = 3.0", "steps must be an integer, not 3.0"),
        ("steps = true", "steps must be an integer, not True"),
        ("[beta]\nmax = '1'", "beta.max must be a number, not '1'"),
        ("[data]\npack = 1", "data.pack must be true or false, not 1"),
        ("[data]\ntrain = [1]", "data.train must be a path, not [1]"),
        ("run_dir = ''", "run_dir must be a name that a file can have, not ''"),
        ("[log]\nprofile_steps = [1]", "log.profile_steps must be a list of 2, not [1]"),
        ("dtype = 'float16'", "dtype must be one of float32, bfloat16, not 'float16'"),
        ("batch-size = 3\nbatch_size = 3", "batch_size is given twice"),
        ("steps = 0", "steps must be at least 1, not 0"),
        ("[beta]\nmax = nan", "beta.max must be 0 or more and finite, not nan"),
        ("[log]\nprofile_steps = [2, 1]", "log.profile_steps must be a first and a last step, such as 10 12, not 2 1"),
        (
            "[model.decoder]\nhidden_size = 15",
            "--model.decoder.num-attention-heads 8 does not divide hidden_size 15 (with",
        ),
        ("accumulate = 48", "--batch-size must be a multiple of --accumulate 48, not 64 (with the settings of "),
        ("plugin = 'nowhere.py'", "plugin nowhere.py: no such file"),
        ("steps =", "is not TOML (Invalid value (at end of document))"),
        ("a" + ".a" * 40_000 + " = 1", "is larger than 64 KiB"),
    ],
)
def test_a_file_that_cannot_be_used(content, reason, tmp_path, capsys):
    file = write(tmp_path / "a.toml", content)
    assert main(["train", "--config", str(file), "--run-dir", str(tmp_path / "run")]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    place = "" if reason.startswith("--") else f"{file}: "
    assert line.startswith(f"davae train: error: {place}{reason}"), line
    assert not (tmp_path / "run").exists()


def test_a_damaged_file_of_a_run(tmp_path, capsys):
    file = run_file(tmp_path / "train.json")
    text = file.read_text(encoding="utf-8")
    missing = tmp_path / "none.toml"
    cases = [
        (text[:-9], "cannot be read as JSON ("),
        (text.replace('"steps": 1400', '"steps": 1401'), "is damaged or was edited (its own sum differs); without"),
        ('{"steps": 3}', "is damaged, or not the train.json of a run"),
        ('{"steps": 3, "model": {}, "data": {}, "x": 1}', "x is not a setting"),
        ('{"steps": 3, "model": {"latent_size": []}, "data": {}}', "model.latent_size must be an integer, not []"),
        (None, "cannot be read (No such file or directory)"),
    ]
    for content, reason in cases:
        path = missing if content is None else write(file, content)
        assert main(["train", "--config", str(path)]) == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert line.startswith(f"davae train: error: {path}: {reason}"), line
    assert main(["train", "--config"]) == 2
    assert capsys.readouterr().err == "davae train: error: --config must be a file\n"


def test_the_command_that_resumes_is_the_one_that_was_called(monkeypatch):
    for program, prog, said in [
        ("/checkout/train.py", "train.py", " /checkout/train.py --steps 3"),
        ("/nowhere/davae", "davae train", "davae train --steps 3"),
        ("/lib/davae_jax/cli/__main__.py", "davae train", " -m davae_jax.cli train --steps 3"),
    ]:
        monkeypatch.setattr(sys, "argv", [program])
        assert resume_command(["--steps", "3"], prog).endswith(said)
