"""A run's folder: whose it is, and what of a start that was killed is in it."""

import contextlib
import dataclasses
import json
import re
import shutil
from pathlib import Path
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import pytest

from davae_jax.checkpoints.check_folder import check_folder
from davae_jax.checkpoints.run_folder import config_folder, weights_path
from davae_jax.checkpoints.weights import stored_shapes
from davae_jax.cli.main import main
from davae_jax.model.config import DAVAEConfig
from davae_jax.regularizers.posteriors import Capacity
from davae_jax.training.config import BetaConfig, OptimizerConfig
from davae_jax.training.hooks import SaveCheckpoint
from davae_jax.training.initial_state import make_warm_start
from davae_jax.training.presets import DEMO
from davae_jax.training.run.folder import check_tokenizers, open_run
from davae_jax.training.run.length import describe_new_length
from davae_jax.training.run.saved_config import digest_settings
from davae_jax.training.schedules import beta_at, learning_rate
from davae_jax.training.setup import load_corpus
from davae_jax.utils.errors import InputError, OptionError
from davae_jax.utils.locks import FolderLock

TEXTS = [f"第{i}句。" for i in range(300)]


@pytest.fixture
def config(tmp_path):
    return of(write(tmp_path / "texts.txt"))


def write(path, texts=TEXTS):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join(texts) + "\n", encoding="utf-8")
    return path


def of(train, valid=None, **changes):
    return dataclasses.replace(DEMO, data=dataclasses.replace(DEMO.data, train=train, valid=valid), **changes)


def opened(folder, config):
    with FolderLock() as lock:
        open_run(folder, config, load_corpus(config), lock)


def begun(folder, config):
    """A run that has learnt something."""
    opened(folder, config)
    (folder / "checkpoints" / "3").mkdir(parents=True)
    (folder / "checkpoints" / "3" / "_CHECKPOINT_METADATA").touch()
    write(folder / "checkpoints" / "3" / "params" / "d")
    return folder


def refusal(folder, config):
    before = (folder / "train.json").read_bytes()
    with pytest.raises(InputError) as e:
        opened(folder, config)
    assert e.value.exit_code == 2 and (folder / "train.json").read_bytes() == before
    said = str(e.value)
    start, end = f"--run-dir {folder} was made with another config: ", "; choose another folder"
    assert said.startswith(start) and said.endswith(end)
    return said.removeprefix(start).removesuffix(end)


def test_texts_may_move(config, tmp_path):
    valid = write(tmp_path / "valid.txt", TEXTS[:5])
    folder = begun(tmp_path / "run", of(config.data.train[0], valid))
    opened(folder, of(write(tmp_path / "elsewhere" / "t.txt"), write(tmp_path / "elsewhere" / "v.txt", TEXTS[:5])))
    assert json.loads((folder / "train.json").read_text())["data"]["train"] == str(tmp_path / "elsewhere" / "t.txt")


def test_other_contents_name_the_option(config, tmp_path):
    valid = write(tmp_path / "valid.txt", TEXTS[:5])
    folder = begun(tmp_path / "run", of(config.data.train[0], valid))
    write(valid, TEXTS[:4])
    assert refusal(folder, of(config.data.train[0], valid)) == "data.valid (other contents)"
    write(valid, TEXTS[:5])
    write(config.data.train[0], TEXTS[1:])
    assert refusal(folder, of(config.data.train[0], valid)) == "data.train (other contents)"


def test_tokenizers_are_compared_with_those_of_the_run(config, tmp_path):
    given = dataclasses.replace(config, tokenizers=tmp_path / "tokenizers")
    for name in ("vocab.txt", "spiece.model"):
        write(given.tokenizers / name)
    folder = begun(tmp_path / "run", given)
    for name in ("vocab.txt", "spiece.model"):  # as `prepare_tokenizers` puts them there
        write(folder / name)
    opened(folder, given)
    given.tokenizers.rename(tmp_path / "moved")
    opened(folder, dataclasses.replace(config, tokenizers=tmp_path / "moved"))
    write(tmp_path / "moved" / "vocab.txt", TEXTS[1:])
    assert refusal(folder, dataclasses.replace(config, tokenizers=tmp_path / "moved")) == "tokenizers (other contents)"


@pytest.mark.parametrize("name", ["vocab.txt", "spiece.model"])
def test_tokenizers_of_a_run_are_those_that_it_began_with(name, config, tmp_path):
    """Whatever they came from: two lines exchanged give the same number of tokens and other ids."""
    run = begun(tmp_path / "run", config)
    for file in ("vocab.txt", "spiece.model"):
        (run / file).write_text("a\nb\nc\n", encoding="utf-8")
    for _ in range(2):  # the first start of a run, or of one that an earlier version began; and one that resumes
        check_tokenizers(run)
        opened(run, config)
    (run / name).write_text("b\na\nc\n", encoding="utf-8")
    with pytest.raises(InputError, match=f"{run / name}: "):
        check_tokenizers(run)
    assert any(line.startswith(f"{run / name}: is not the tokenizer") for line in check_folder(run).damaged)
    (run / name).write_text("a\nb\nc\n", encoding="utf-8")
    check_tokenizers(run)


def test_pretrained_halves_may_move_but_not_go(config, tmp_path):
    init = dataclasses.replace(config.init, encoder="bert")
    folder = begun(tmp_path / "run", dataclasses.replace(config, init=init))
    opened(folder, dataclasses.replace(config, init=dataclasses.replace(init, encoder="elsewhere/bert")))
    assert refusal(folder, config) == "init.encoder (elsewhere/bert, now None)"


def test_a_run_may_become_longer(config, tmp_path, capsys):
    """Which schedules this changes is said in one line, with the first step that is affected."""
    folder = begun(tmp_path / "run", dataclasses.replace(config, steps=4))
    opened(folder, dataclasses.replace(config, steps=8))
    rate = lambda steps: learning_rate(config.optimizer, steps)(2)  # noqa: E731
    assert capsys.readouterr().out == (
        f"{folder}: goes on after step 3 to step 8, not 4; this changes: learning rate ({rate(8):.3g} at step 3, not "
        f"{rate(4):.3g}), β ({beta_at(2, 8, config.beta):.3g} at step 3, not {beta_at(2, 4, config.beta):.3g})\n"
    )
    assert json.loads((folder / "train.json").read_text())["steps"] == 8
    opened(folder, dataclasses.replace(config, steps=3))
    assert "not 8" in capsys.readouterr().out
    with pytest.raises(OptionError) as e:
        opened(folder, dataclasses.replace(config, steps=2))
    assert str(e.value) == f"--steps must be at least 3, the steps that {folder} has taken, not 2"
    assert refusal(folder, dataclasses.replace(config, steps=9, seed=5)) == "seed (0, now 5)"
    opened(folder, dataclasses.replace(config, steps=3))
    assert capsys.readouterr().out == ""


def test_a_stable_run_may_decay_later(config, tmp_path, capsys):
    optimizer = OptimizerConfig(schedule="wsd", warmup_steps=1)
    stable = dataclasses.replace(config, steps=3, optimizer=optimizer, beta=BetaConfig(start=0.1, max=0.1))
    folder = begun(tmp_path / "run", stable)
    decays = dataclasses.replace(stable, steps=5, optimizer=dataclasses.replace(optimizer, decay_steps=2))
    opened(folder, decays)
    said = capsys.readouterr().out
    assert said == f"{folder}: goes on after step 3 to step 5, not 3; up to step 3 no schedule changes\n"
    regularizers = dataclasses.replace(DEMO.regularizers, capacity=Capacity(weight=1.0))
    before = dataclasses.replace(stable, regularizers=regularizers)
    assert describe_new_length(before, dataclasses.replace(before, steps=9), 3).endswith(": regularizer capacity")


@pytest.mark.parametrize(
    "content",
    [b"{", b"\xff{}", b"[]", b"null", b'{"data": 3}', b"[" * 100_000, b""]
    + [b'{"data": ' + b"[" * 500 + b"]" * 500 + b"}"],
)
def test_damaged_settings_are_named(content, tmp_path, config):
    folder = tmp_path / "run"
    folder.mkdir()
    (folder / "train.json").write_bytes(content)
    with pytest.raises(InputError) as e:
        opened(folder, config)
    assert str(folder / "train.json") in str(e.value) and "\n" not in str(e.value)
    assert (folder / "train.json").read_bytes() == content


def test_damaged_settings_are_not_taken_for_other_options(tmp_path, config):
    """They carry a sum of their own. Settings that are the same in spite of it are written anew."""
    folder = begun(tmp_path / "run", config)
    settings = folder / "train.json"
    intact = settings.read_bytes()
    values = json.loads(intact)
    for damaged in (values | {"seed": 77}, values | {"digest_of_texts": 5}, {"steps": 3, "sum": values["sum"]}):
        settings.write_text(json.dumps(damaged))
        assert f"{settings}: is damaged (its own sum differs)" in check_folder(folder).damaged
        with pytest.raises(InputError, match=r"train\.json: is damaged"):
            opened(folder, config)
    settings.write_text(json.dumps(values | {"sum": 5}))
    opened(folder, config)
    assert settings.read_bytes() == intact


@pytest.mark.parametrize("values", [{}, {"version": "1.1", "data": []}, {"steps": 3, "data": {}, "model": "bert"}])
def test_a_train_json_of_another_program_is_left(values, tmp_path, config):
    """It may contain texts; what is beside it would be removed as the preparations of a run."""
    folder = tmp_path / "squad"
    for name, text in {"train.json": json.dumps(values), "vocab.txt": "mine", "init/a": "mine"}.items():
        write(folder / name, [text])
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    with pytest.raises(InputError, match=str(folder / "train.json")):
        opened(folder, config)
    assert {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()} == before


def test_a_run_at_an_address_is_refused(config, tmp_path, monkeypatch):
    """Its checkpoints would be lost with the machine."""
    monkeypatch.chdir(tmp_path)
    before = sorted(tmp_path.iterdir())
    with pytest.raises(InputError, match=r"^s3:/bucket/run: is an address"):
        opened(Path("s3://bucket/run"), config)
    assert sorted(tmp_path.iterdir()) == before


def test_before_the_first_checkpoint_all_may_change(config, tmp_path):
    """What the first start has prepared is of its own options, and is made anew."""
    folder = tmp_path / "run"
    opened(folder, dataclasses.replace(config, init=dataclasses.replace(config.init, encoder="bert")))
    write(folder / "vocab.txt")
    (folder / "init").mkdir()
    opened(folder, dataclasses.replace(config, init=dataclasses.replace(config.init, encoder="another")))
    assert sorted(path.name for path in folder.iterdir()) == ["train.json"]


def test_the_tokenizers_of_an_earlier_start_are_used_and_kept(config, tmp_path):
    """Where --tokenizers is the run folder itself, they must not be removed with what the earlier start has left."""
    folder = tmp_path / "run"
    opened(folder, config)
    for name in ("vocab.txt", "spiece.model", "config.json"):
        write(folder / name)
    (tmp_path / "link").symlink_to("run")
    opened(folder, dataclasses.replace(config, seed=5, tokenizers=tmp_path / "link"))
    assert sorted(path.name for path in folder.iterdir()) == ["spiece.model", "train.json", "vocab.txt"]


def test_what_a_killed_warm_start_has_left_beside_is_removed(config, tmp_path):
    (tmp_path / "init").mkdir()
    write(tmp_path / "init.json")
    make_warm_start(config, config.model, tmp_path)
    assert not (tmp_path / "init.json").exists()


def damaged_checkpoints(run):
    """Returns the ways in which a run's checkpoints are not there, and the file that each of them concerns."""
    checkpoints = run / "checkpoints"
    return {
        "params are not copied": (lambda: shutil.rmtree(checkpoints / "3" / "params"), checkpoints / "3"),
        "a link to nothing": (
            lambda: checkpoints.rename(run.parent / "c") and checkpoints.symlink_to("d"),
            checkpoints,
        ),
        "a file": (lambda: shutil.rmtree(checkpoints) or checkpoints.touch(), checkpoints),
    }


@pytest.mark.parametrize("damage", damaged_checkpoints(Path()))
def test_a_run_does_not_begin_anew_because_its_checkpoints_cannot_be_read(damage, config, tmp_path):
    folder = begun(tmp_path / "run", config)
    write(folder / "vocab.txt")
    write(folder / "metrics.jsonl")
    make, named = damaged_checkpoints(folder)[damage]
    make()
    before = {path: path.read_bytes() for path in folder.iterdir() if path.suffix}
    for other in (config, dataclasses.replace(config, steps=7)):
        with pytest.raises(InputError) as e:
            opened(folder, other)
        assert str(e.value).startswith(f"{named}: ")
    assert {path: path.read_bytes() for path in folder.iterdir() if path.suffix} == before


def test_an_incomplete_checkpoint_beside_a_complete_one_is_named(config, tmp_path):
    folder = begun(tmp_path / "run", config)
    (folder / "checkpoints" / "5").mkdir()
    with pytest.warns(UserWarning, match=re.escape(str(folder / "checkpoints" / "5"))):
        opened(folder, config)


def test_checkpoints_may_be_behind_a_link(config, tmp_path):
    folder = begun(tmp_path / "run", config)
    write(folder / "config.json")
    (folder / "checkpoints").rename(tmp_path / "large")
    (folder / "checkpoints").symlink_to("../large")
    opened(folder, config)
    assert config_folder(folder / "checkpoints" / "3") == folder
    assert weights_path(folder / "checkpoints" / "3") == tmp_path / "large" / "3"
    assert config_folder(folder / "checkpoints" / ".." / "checkpoints") == folder / "checkpoints" / ".." / "checkpoints"


def test_folders_of_an_older_version_go_on(config, tmp_path):
    """It wrote a digest of the training texts alone."""
    folder = begun(tmp_path / "run", config)
    values = json.loads((folder / "train.json").read_text())
    del values["digest_of_held_out"], values["sum"]
    # And it called vocabulary sizes otherwise.
    values["data"]["pieces"] = values["data"].pop("decoder_vocab_size")
    values["data"]["entries"] = values["data"].pop("encoder_vocab_size")
    (folder / "train.json").write_text(json.dumps(values))
    opened(folder, config)
    stored = json.loads((folder / "train.json").read_text())
    assert "digest_of_held_out" in stored and "pieces" not in stored["data"]
    values["data"]["entries"] = 4321
    (folder / "train.json").write_text(json.dumps(values))
    assert refusal(folder, config) == "data.encoder_vocab_size (4321, now 8000)"


def test_a_start_that_was_killed_at_its_first_write(config, tmp_path, capsys):
    """Its file is not foreign, and goes away. What only looks like it stays, and is."""
    for folder, name, again in (
        (tmp_path / "run", ".train.json.999.partial", lambda: opened(tmp_path / "run", config)),
        (tmp_path / "prepared", ".prepare.json.999.partial", lambda: prepared(config, tmp_path / "prepared")),
    ):
        write(folder / name)
        again()
        assert not (folder / name).exists() and any(folder.iterdir())
    foreign = tmp_path / "foreign"
    write(foreign / "notes.partial")
    with pytest.raises(InputError, match="contains files but no run") as e:
        opened(foreign, config)
    assert e.value.exit_code == 2 and [path.name for path in foreign.iterdir()] == ["notes.partial"]


def prepared(config, output):
    argv = ["--input", *config.data.train, "--output", output, "--workers", 1]
    argv += ["--decoder-vocab-size", 60, "--encoder-vocab-size", 80]
    assert main(["prepare", *map(str, argv)]) == 0


def test_processes_may_find_the_same_things_at_other_places(config, tmp_path):
    assert digest_settings(config) == digest_settings(of(tmp_path / "elsewhere.txt"))
    assert digest_settings(config) != digest_settings(dataclasses.replace(config, tokenizers=tmp_path))
    assert digest_settings(config) != digest_settings(dataclasses.replace(config, seed=1))


def test_a_config_appears_whole_or_not_at_all(tmp_path, monkeypatch):
    path = tmp_path / "config.json"
    DAVAEConfig().to_json(path)
    before = path.read_bytes()

    def fails(*_):
        raise OSError("no space")

    monkeypatch.setattr("pathlib.Path.replace", fails)
    with pytest.raises(OSError, match="no space"):
        DAVAEConfig(latent_size=8).to_json(path)
    assert path.read_bytes() == before and list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("option", ["train", "valid"])
def test_a_run_is_not_inside_the_folder_of_its_texts(option, config, tmp_path):
    """At the next start its logs would be texts."""
    folder = write(tmp_path / "texts" / "a.txt").parent
    names = {"train": config.data.train} | {option: (folder,)}
    (tmp_path / "link").symlink_to("texts")
    for run_dir in (folder / "run", tmp_path / "link" / "deep" / "run"):
        with pytest.raises(OptionError) as e:
            load_corpus(of(**names, run_dir=run_dir))
        assert e.value.option == "--run-dir"
    for run_dir in (tmp_path / "texts-run", folder / ".runs" / "run"):
        corpus = load_corpus(of(**names, run_dir=run_dir))
        write(run_dir / "samples.jsonl")
        assert load_corpus(of(**names, run_dir=run_dir)).digest == corpus.digest


class Saves:
    """Stands for a run's checkpoints, and notes what is saved."""

    def __init__(self, folder):
        self.folder, self.saved, self.last = folder, [], f"{folder / 'checkpoints' / '4'}"

    def save(self, state, **kwargs):
        self.saved.append(state)

    def wait(self):
        pass


@pytest.mark.parametrize("there", ["the folder", "nothing", "another folder"])
def test_a_folder_that_is_moved_while_its_run_trains(there, tmp_path):
    """What the run has learnt is saved and the run ends; but nothing is written to another folder."""
    folder = tmp_path / "run"
    folder.mkdir()
    state = SimpleNamespace(params={"w": jnp.zeros(1)}, regularizers={})
    with FolderLock() as lock:
        lock.acquire(folder)
        if there != "the folder":
            folder.rename(tmp_path / "moved")
        if there == "another folder":
            folder.mkdir()
        log = SimpleNamespace(pending=[])
        checkpoints = Saves(folder)
        run = SimpleNamespace(
            folder=folder, lock=lock, mesh=jax.make_mesh((1,), ("data",)), held_out=[], checkpoints=checkpoints, log=log
        )
        save = SaveCheckpoint(1)
        with contextlib.nullcontext() if there == "the folder" else pytest.raises(InputError, match=str(folder)):
            save(run, state, 4)
    assert checkpoints.saved == ([] if there == "another folder" else [state])


def test_a_checkpoint_that_is_removed_while_it_is_read(tmp_path):
    with pytest.raises(InputError, match="repeat the command"):
        stored_shapes(tmp_path / "checkpoints" / "3")
