"""Damage is named: by `davae check`, when weights are loaded, and when what was written is read back."""

import json
import os
import shutil
import tarfile
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from input_files import write_texts
from test_checkpointer import like, state_at
from test_compare import DAMAGED_FILES
from tokenizer_fixtures import sentences

import davae_jax
from davae_jax.checkpoints import check_folder, check_weights, sums, weights
from davae_jax.checkpoints.hub import DOWNLOADED_FILES
from davae_jax.checkpoints.published import from_torch, to_torch, torch_file
from davae_jax.checkpoints.published.from_torch import convert
from davae_jax.checkpoints.published.to_torch import export
from davae_jax.checkpoints.run_folder import complete_checkpoints
from davae_jax.cli.main import main
from davae_jax.data.prepared import shard_index
from davae_jax.training.run.checkpointer import Checkpoints
from davae_jax.utils import files
from davae_jax.utils.errors import InputError
from davae_jax.utils.json_files import json_sum
from davae_jax.utils.locks import FolderLock, is_locked

FIXTURES = Path(__file__).parent / "fixtures" / "v0.1.0"


def flip(path, at=0.5):
    """Changes one bit of a file, or appends a byte to an empty one."""
    data = bytearray(path.read_bytes()) or bytearray(b"\n")
    data[int(at * (len(data) - 1))] ^= 1
    path.write_bytes(data)


def truncate(path):
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


@pytest.fixture
def check(tmp_path, capsys):
    """Runs `davae check`. Returns the exit code, the kind of the first folder, its state and its damage."""

    def call(*folders):
        before = {path: path.lstat().st_mtime_ns for folder in folders for path in [folder, *folder.rglob("*")]}
        report = tmp_path / "report.json"
        code = main(["check", *map(str, folders), "--json", str(report)])
        out, err = capsys.readouterr()
        values = json.loads(report.read_text(encoding="utf-8"))
        assert err == "" and [v["folder"] for v in values] == [str(folder) for folder in folders]
        assert [line for v in values for line in v["damaged"]] == [
            line.removeprefix("  damaged: ") for line in out.splitlines() if line.startswith("  damaged: ")
        ]
        assert before == {path: path.lstat().st_mtime_ns for folder in folders for path in [folder, *folder.rglob("*")]}
        return code, values[0]["kind"], values[0]["state"], values[0]["damaged"]

    return call


@pytest.fixture
def fixture(tmp_path):
    """Unpacks what version 0.1.0 left on the disk, and returns the folder of that name."""

    def unpack(name):
        with tarfile.open(FIXTURES / f"{name}.tar.gz") as archive:
            archive.extractall(tmp_path / "old", filter="data")
        return tmp_path / "old" / name

    return unpack


@pytest.fixture
def model(tiny_checkpoint, tmp_path):
    return Path(shutil.copytree(tiny_checkpoint, tmp_path / "a model"))


@pytest.fixture(scope="session")
def shards(tmp_path_factory):
    folder = tmp_path_factory.mktemp("shards")
    write_texts(folder / "in.txt", sentences(60))
    assert main(prepare_argv(folder, folder / "prepared")) == 0
    return folder / "prepared"


def prepare_argv(folder, output):
    argv = ["prepare", "--input", folder / "in.txt", "--output", output, "--workers", 1, "--held-out", 0.1]
    return [*map(str, argv), "--decoder-vocab-size", "200", "--encoder-vocab-size", "200"]


# Sums of converted parameters.


def test_sums_of_values_are_those_of_their_bits():
    rng = np.random.default_rng(0)
    arrays = {"f": rng.standard_normal((5, 7)).astype(np.float32), "h": rng.standard_normal(9).astype(np.float16)}
    arrays |= {"b": np.array(jnp.arange(4, dtype=jnp.bfloat16)), "i": np.int32(-3), "t": np.array([True, False, True])}
    by_hand = {
        name: sum(int.from_bytes(value.tobytes(), "little") for value in np.ravel(array)) % 2**32
        for name, array in arrays.items()
    }
    arrays["t"] = arrays["t"].view(np.uint8)
    assert {name: sums.array_sum(array) for name, array in arrays.items()} == by_hand
    assert {name: int(n) for name, n in sums.array_sums(arrays).items()} == by_hand


def test_every_file_of_converted_parameters(model, check):
    """Each file in turn is refused by name, by whoever reads the weights, and named by `davae check`."""
    params = model / "params"
    targets = {
        name: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype) for name, leaf in weights.stored_shapes(params).items()
    }
    damages = [flip, truncate, Path.unlink, lambda path: path.write_bytes(b"other")]
    for path in sorted(path for path in params.rglob("*") if path.is_file()):
        intact = path.read_bytes()
        for damage in damages if intact else [flip, Path.unlink]:
            damage(path)
            with pytest.raises(InputError, match=path.name):
                weights.load_weights(params, targets)
            assert any(str(path) in line for line in check_weights.converted_problems(model)), (path, damage)
            path.write_bytes(intact)
    loaded = weights.flat_params(davae_jax.from_pretrained(model))
    code, kind, state, damaged = check(model)
    assert (code, kind, state["sums"], damaged) == (0, "a converted model", "right", [])
    assert state["parameters"] == sum(leaf.size for leaf in loaded.values())
    assert state["bytes"] == sum(path.stat().st_size for path in model.rglob("*") if path.is_file())


@pytest.mark.parametrize("name", ["sums.json", "_sharding", "_METADATA"])
def test_whoever_reads_weights_names_the_file(name, model, check, tmp_path):
    path = next((model / "params").rglob(name))
    path.unlink()
    for read in (davae_jax.from_pretrained, lambda folder: export(folder, tmp_path / "out", format="safetensors")):
        with pytest.raises(InputError, match=name):
            read(model)
    code, _, state, damaged = check(model)
    assert (code, state["sums"]) == (1, "missing" if name == "sums.json" else "wrong")
    assert damaged[0].startswith(f"{path}: ")


def test_parameters_of_another_model_in_this_one(model, tmp_path):
    """The files of two models with the same shapes, exchanged one for one."""
    params = {
        path: np.asarray(leaf) + 1 for path, leaf in weights.flat_params(davae_jax.from_pretrained(model)).items()
    }
    weights.save_weights(tmp_path / "other" / "params", [params], {"buffers": []})
    (mine,) = (path for path in (model / "params" / "state").glob("d/*"))
    (other,) = (path for path in (tmp_path / "other" / "params" / "state").glob("d/*"))
    shutil.copyfile(other, mine)
    with pytest.raises(InputError, match=mine.name):
        davae_jax.from_pretrained(model)


def test_sums_cannot_lead_out_of_the_folder(model):
    path = model / "params" / "sums.json"
    values = json.loads(path.read_text(encoding="utf-8"))
    values["files"]["../../secret"] = [1, 1]
    values["sum"] = json_sum({name: values[name] for name in ("arrays", "files")})
    path.write_text(json.dumps(values), encoding="utf-8")
    with pytest.raises(InputError, match=r"sums\.json: is damaged"):
        davae_jax.from_pretrained(model)


def test_a_download_includes_the_sums():
    assert "params/**" in DOWNLOADED_FILES and sums.SUMS_FILE == "sums.json"


def test_models_of_earlier_versions_have_no_sums(fixture, check):
    folder = fixture("converted")
    davae_jax.from_pretrained(folder)
    code, kind, state, damaged = check(folder)
    assert (code, kind, damaged) == (0, "a converted model", []) and state["sums"].startswith("none")


# Sums of a run's checkpoints.


def test_weights_of_a_run_are_checked_whatever_the_dtype(fixture, monkeypatch):
    run = fixture("run")
    loaded = {dtype: davae_jax.from_pretrained(run, dtype=dtype) for dtype in (jnp.float32, jnp.bfloat16)}
    exact, rounded = (weights.flat_params(model) for model in loaded.values())
    for name, array in exact.items():
        np.testing.assert_array_equal(np.asarray(array.astype(rounded[name].dtype)), np.asarray(rounded[name]))
    stored = weights.stored_metadata(run / "checkpoints" / "3")
    name = "decoder.embedding.weight"
    altered = {weights.SUMS: stored[weights.SUMS] | {f"params.{name}": 1}}
    monkeypatch.setattr(weights, "stored_metadata", lambda path: altered)
    for dtype in loaded:
        with pytest.raises(InputError, match=rf"checkpoints/3: .*{name}"):
            davae_jax.from_pretrained(run, dtype=dtype)


def test_every_file_of_a_run(fixture, check, tmp_path):
    """Whatever is read: the arrays, their metadata, the settings, the tokenizers and the logs."""
    run = fixture("run")
    newest = run / "checkpoints" / "3"
    (tmp_path / "a link").symlink_to(newest)
    for folder, kind in ((run, "a run"), (newest, "one checkpoint of a run"), (tmp_path / "a link", None)):
        code, found, state, damaged = check(folder)
        assert (code, damaged, state["step"]) == (0, [], 3) and found == (kind or "one checkpoint of a run")
    read = [next(newest.glob("params/d/*")), newest / "state" / "_METADATA", newest / "_CHECKPOINT_METADATA"]
    read += [run / name for name in ("config.json", "train.json", "spiece.model", "metrics.jsonl", "samples.jsonl")]
    for path in read:
        intact = path.read_bytes()
        path.write_bytes(b"{" + intact[1 : len(intact) // 2])
        named = newest if newest in path.parents else path
        assert any(str(named) in line for line in check_folder.check_folder(run).damaged), path
        if named in (newest, run / "config.json"):
            assert check(newest)[0] == 1
        path.write_bytes(intact)
    assert check(run)[0] == 0


def test_every_bit_of_a_checkpoint_counts_or_is_not_read(fixture):
    """Flipped bits are named, unless every array can be read and is the same: Orbax leaves data that nobody reads."""
    path = fixture("run") / "checkpoints" / "3"

    def arrays():
        return {name: array for item in ("params", "state") for name, array in weights.iterate_arrays(path, item)}

    intact_arrays, found = arrays(), 0
    for file in sorted(file for file in path.rglob("d/*") if file.stat().st_size > 100):
        intact = file.read_bytes()
        for at in (0.2, 0.5, 0.8):
            flip(file, at)
            if problems := check_weights.checkpoint_problems(path, None):
                found += 1
                assert all(str(path) in problem for problem in problems)
            else:
                jax.tree.map(np.testing.assert_array_equal, arrays(), intact_arrays)
            file.write_bytes(intact)
    assert found >= 6


def test_the_extra_state_has_a_sum(tmp_path, capsys):
    with Checkpoints(tmp_path, keep=2) as checkpoints:
        checkpoints.save(state_at(1), extra_state=[{"loss": 1.25}])
        checkpoints.save(state_at(2), extra_state=[{"loss": 1.25}])
    path = tmp_path / "checkpoints" / "2" / "_CHECKPOINT_METADATA"
    path.write_text(path.read_text(encoding="utf-8").replace("1.25", "1.75"), encoding="utf-8")
    state, _ = Checkpoints(tmp_path, keep=2).restore(like(state_at(0)))
    assert int(state.step) == 1 and f"{tmp_path / 'checkpoints' / '2'}: " in capsys.readouterr().err
    assert check_weights.checkpoint_problems(tmp_path / "checkpoints" / "1", None) == []
    damaged = tmp_path / "checkpoints" / "2.damaged"
    assert any(str(damaged) in problem for problem in check_weights.checkpoint_problems(damaged, None))


def test_metadata_that_have_lost_an_entry(tmp_path, capsys):
    """A resume names them, and not the arrays, which differ from no sum."""
    for removed in ("remembered", "sums"):
        run = tmp_path / removed
        with Checkpoints(run, keep=2) as checkpoints:
            checkpoints.save(state_at(1), extra_state=[])
            checkpoints.save(state_at(2), extra_state=[])
        path = run / "checkpoints" / "2" / "_CHECKPOINT_METADATA"
        values = json.loads(path.read_text(encoding="utf-8"))
        del values["custom_metadata"][removed]
        path.write_text(json.dumps(values), encoding="utf-8")
        assert "metadata are damaged" in check_weights.checkpoint_problems(path.parent, None)[0]
        state, extra_state = Checkpoints(run, keep=2).restore(like(state_at(0)))
        err = capsys.readouterr().err
        assert (int(state.step), extra_state) == (1, []) and f"{path.parent}: " in err
        assert ("metadata are damaged" if removed == "sums" else "extra state") in err


@pytest.mark.parametrize("name", ["best", "7", "params", "run/checkpoints/best"])
def test_a_checkpoint_that_was_copied_with_its_config(name, fixture, check, tmp_path):
    """What it is shows in its contents; it is read wherever it lies, and damage is found as in the run."""
    run = fixture("run")
    newest = max(complete_checkpoints(run), key=lambda path: int(path.name))
    expected = weights.flat_params(davae_jax.from_pretrained(run))
    copy = shutil.copytree(newest, run.parent / name)
    for file in ("config.json", "vocab.txt", "spiece.model"):
        shutil.copyfile(run / file, copy / file)
    if name == "7":  # the name of a step, and not the step of the checkpoint
        with pytest.raises(InputError, match="not of the step in its name"):
            davae_jax.from_pretrained(copy)
        return
    found = weights.flat_params(davae_jax.from_pretrained(copy))
    assert found.keys() == expected.keys() and all((found[key] == expected[key]).all() for key in found)
    assert check(copy)[:2] == (0, "one checkpoint of a run") and check(copy)[3] == []
    export(copy, tmp_path / "out", format="safetensors")
    flip(max((copy / "params").rglob("d/*"), key=lambda path: path.stat().st_size))
    assert check(copy)[0] == 1


def test_a_run_in_use(fixture, check):
    run = fixture("run")
    (run / "checkpoints" / "5").mkdir()
    (run / "checkpoints" / "7.orbax-checkpoint-tmp").mkdir()
    with (run / "metrics.jsonl").open("a", encoding="utf-8") as file:
        file.write('{"step": 9, "lo')
    code, _, state, damaged = check(run)
    assert code == 1 and state["in use by another program"] == "no"
    assert [line.partition(": ")[0] for line in damaged] == [f"{run}/checkpoints/5", f"{run}/metrics.jsonl"]
    with FolderLock() as lock:
        lock.acquire(run)
        assert is_locked(run)
        code, _, state, damaged = check(run)
        assert (code, damaged, state["in use by another program"]) == (0, [], "yes")
        assert is_locked(run)
    assert state["leftovers"] == ["checkpoints/7.orbax-checkpoint-tmp"] and state["complete checkpoints"] == [3]
    assert not is_locked(run)


def test_a_checkpoint_that_is_removed_during_the_check(fixture, check, monkeypatch):
    run = fixture("run")
    shutil.copytree(run / "checkpoints" / "3", run / "checkpoints" / "2")

    def removing(path, config):
        if path.name == "2":
            shutil.rmtree(path)
        return check_weights.checkpoint_problems(path, config)

    monkeypatch.setattr(check_folder, "checkpoint_problems", removing)
    report = check_folder.check_folder(run)
    assert report.damaged == [] and report.state["complete checkpoints"] == [3]


# Removing folders.


def test_a_kill_while_an_old_checkpoint_is_removed(tmp_path, monkeypatch):
    """No file of it is removed as long as it is listed, and what remains is removed at the next start."""
    removed = []
    with Checkpoints(tmp_path, keep=1) as checkpoints:
        checkpoints.save(state_at(1))
        checkpoints.wait()
        names = sorted(path.relative_to(checkpoints.path(1)) for path in checkpoints.path(1).rglob("*"))
        monkeypatch.setattr(files.shutil, "rmtree", lambda path, **_: removed.append(path))
        checkpoints.save(state_at(2))
    assert [path.name for path in complete_checkpoints(tmp_path)] == ["2"]
    (hidden,) = removed
    assert sorted(path.relative_to(hidden) for path in hidden.rglob("*")) == names
    monkeypatch.undo()
    with Checkpoints(tmp_path, keep=1):  # even if nothing is left to be saved
        assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["2"]


def test_a_folder_that_cannot_be_removed_is_hidden_or_whole(tmp_path):
    folder = tmp_path / "a [b]"
    folder.mkdir()
    (folder / "file").touch()
    (tmp_path / "mine.removed").touch()
    files.remove_folder(folder)
    (tmp_path / ".0123abcd.removed-0123abcd").mkdir()
    files.remove_removed(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["mine.removed"]


@pytest.mark.parametrize("damaged", ["moved", "no sums"])
def test_a_checkpoint_that_is_not_that_of_its_step(damaged, fixture, check, tmp_path):
    """Whoever reads it refuses it: a model, an export, the check, and a run that is continued."""
    run = fixture("run")
    newest = run / "checkpoints" / "3"
    if damaged == "moved":
        newest = newest.rename(newest.with_name("7"))
    else:
        path = newest / "_CHECKPOINT_METADATA"
        metadata = json.loads(path.read_text(encoding="utf-8"))
        del metadata["custom_metadata"][weights.SUMS]
        path.write_text(json.dumps(metadata), encoding="utf-8")
    for read in (davae_jax.from_pretrained, lambda folder: export(folder, tmp_path / "out", format="safetensors")):
        with pytest.raises(InputError, match=f"{newest}: "):
            read(run)
    code, _, _, lines = check(run)
    assert code == 1 and [line.partition(": ")[0] for line in lines] == [str(newest)]
    # A name that is no step, such as that of a checkpoint that somebody has put aside, says nothing.
    if damaged == "moved":
        davae_jax.from_pretrained(newest.rename(newest.with_name("best")))


# Prepared texts.


def test_every_file_of_prepared_texts(shards, check, tmp_path):
    folder = Path(shutil.copytree(shards, tmp_path / "prepared"))
    code, kind, state, damaged = check(folder)
    assert (code, kind, damaged) == (0, "prepared texts", [])
    assert state["texts"] + state["held out"] == 60 and state["decoder tokens"] > 0
    names = {path.name for path in folder.iterdir()}
    assert {"00000-0000.arrayrecord", "00000-0000.npy", "order.npy", "held_out.jsonl", "vocab.txt"} < names
    for name in sorted(names):
        intact = (folder / name).read_bytes()
        for damage in (flip, Path.unlink):
            damage(folder / name)
            code, _, _, damaged = check(folder)
            assert code == 1 and any(str(folder / name) in line for line in damaged), (name, damage)
            (folder / name).write_bytes(intact)


def test_prepared_texts_of_earlier_versions(fixture, check):
    folder = fixture("prepared")
    code, _, state, damaged = check(folder)
    assert (code, damaged, state["shards"]) == (0, [], 1) and "only" in state["sums"]
    for name in ("00000-0000.arrayrecord", "vocab.txt"):
        flip(folder / name)
    (folder / "order.npy").write_bytes((folder / "order.npy").read_bytes()[:-4])
    code, _, _, damaged = check(folder)
    names = {Path(line.partition(": ")[0]).name for line in damaged}
    assert code == 1 and names == {"00000-0000.arrayrecord", "vocab.txt", "order.npy"}


def test_unfinished_preparation(shards, check, tmp_path):
    folder = Path(shutil.copytree(shards, tmp_path / "prepared"))
    (folder / "manifest.json").unlink()
    code, kind, _, damaged = check(folder)
    assert (code, kind) == (1, "prepared texts") and damaged[0].startswith(f"{folder / 'manifest.json'}: ")


# Published folders, tokenizers, other folders.


def test_a_published_folder(model, check, tmp_path):
    folder = export(model, tmp_path / "published", format="safetensors")
    code, kind, state, damaged = check(folder)
    assert (code, kind, damaged) == (0, "a published model", []) and state["parameters"] > 1000
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    config["latent_size"] = config["decoder"]["latent_size"] = 5
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    assert check(folder)[0] == 1
    truncate(folder / "model.safetensors")
    code, _, _, damaged = check(folder)
    assert code == 1 and damaged[0].startswith(f"{folder / 'model.safetensors'}: ")


def test_other_folders(model, fixture, check, tmp_path):
    empty, tokenizers = tmp_path / "empty name", tmp_path / "tokenizers"
    for folder in (empty, tokenizers):
        folder.mkdir()
    assert check(empty)[:2] == (1, "nothing that davae-jax made")
    shutil.copyfile(model / "vocab.txt", tokenizers / "vocab.txt")
    code, kind, state, _ = check(tokenizers)
    assert (code, kind, state["spiece.model"]) == (0, "tokenizers", "missing") and state["vocab.txt"] > 10
    fixture("study")
    code, kind, state, _ = check(tmp_path / "old" / "out")
    assert (code, kind, state["runs"]) == (0, "the runs of a study", 2)
    (tmp_path / "checkpoints").symlink_to(model)  # what a folder is shows in its contents, not in its name
    assert check(tmp_path / "checkpoints")[:2] == (0, "a converted model")
    assert check(model, empty)[:2] == (1, "a converted model")


@pytest.mark.parametrize("name", ["vocab.txt", "spiece.model"])
def test_a_model_that_has_lost_one_of_its_tokenizers(name, model, fixture, check):
    """Without any it is used with those of another folder; a run always has both."""
    (model / name).unlink()
    assert check(model)[::3] == (1, [f"{model / name}: is missing"])
    for other in {"vocab.txt", "spiece.model"} - {name}:
        (model / other).unlink()
    assert check(model)[::3] == (0, [])
    run = fixture("run")
    (run / name).unlink()
    for folder in (run, run / "checkpoints" / "3"):
        code, _, _, damaged = check(folder)
        assert code == 1 and damaged == [f"{run / name}: is missing"]


@pytest.mark.parametrize(("name", "content"), DAMAGED_FILES)
def test_what_a_study_keeps_of_its_runs(name, content, fixture, check, tmp_path):
    fixture("study")
    out = tmp_path / "old" / "out"
    path = next(out.glob(f"*/{name}"))
    path.write_text(content)
    code, _, _, damaged = check(out)
    assert code == 1 and len(damaged) == 1 and damaged[0].startswith(f"{path}: ")


def test_a_name_with_a_line_feed_stays_in_its_line(tmp_path, capsys):
    (tmp_path / "a\nb").mkdir()
    assert main(["check", str(tmp_path / "a\nb")]) == 1
    assert all(line.startswith((str(tmp_path), "  ")) for line in capsys.readouterr().out.splitlines())


def test_links_pipes_and_folders_in_place_of_files(model, check, tmp_path):
    """They are named, and a pipe, which nobody writes to, is not opened."""
    for make in (
        os.mkfifo,
        lambda path: path.symlink_to("nowhere"),
        lambda path: path.symlink_to(path.name),
        Path.mkdir,
    ):
        (model / "vocab.txt").unlink()
        make(model / "vocab.txt")
        code, _, _, damaged = check(model)
        assert code == 1 and damaged[0].startswith(f"{model / 'vocab.txt'}: ")
        if (model / "vocab.txt").is_dir():
            (model / "vocab.txt").rmdir()
            (model / "vocab.txt").touch()


@pytest.mark.parametrize("name", ["nowhere", "file", "x" * 300])
def test_a_path_that_is_no_folder(name, model, tmp_path, capsys):
    (tmp_path / "file").touch()
    assert main(["check", str(model), str(tmp_path / name)]) == 2
    out, err = capsys.readouterr()
    assert out == "" and str(tmp_path / name) in err and err.count("\n") == 1


# What was written is read back.


def test_convert_and_export_read_back(model, tmp_path, monkeypatch, capsys):
    """Damage between writing and reading back: one line, exit 1, and nothing at the destination."""
    published = export(model, tmp_path / "published", format="safetensors")
    copy_files = from_torch.copy_files

    def damaging(names, source, staging):
        flip(next((staging / "params").rglob("d/*")))
        copy_files(names, source, staging)

    with monkeypatch.context() as context:
        context.setattr(from_torch, "copy_files", damaging)
        assert main(["convert", str(published), str(tmp_path / "new")]) == 1
        err = capsys.readouterr().err.splitlines()[-1]
        assert f"{tmp_path / 'new' / 'params'}/" in err and ".partial-" not in err
    write = torch_file.write_safetensors

    def altering(path, state):
        name = next(name for name in state if "embed" in name)
        write(path, state | {name: state[name] + 1})

    with monkeypatch.context() as context:
        context.setattr(to_torch.torch_file, "write_safetensors", altering)
        assert main(["export", str(model), str(tmp_path / "new"), "--format", "safetensors"]) == 1
        out, err = capsys.readouterr()
        assert "wrote" not in out and f"{tmp_path / 'new' / 'model.safetensors'}" in err and err.count("\n") == 1
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a model", "published"]
    convert(published, tmp_path / "new")


def test_a_value_that_was_not_stored_as_it_was(model, tmp_path, monkeypatch):
    """The sums of the files are those of the disk; the sums of the values are those of the source."""
    published = export(model, tmp_path / "published", format="safetensors")
    monkeypatch.setattr(weights, "array_sum", lambda array: sums.array_sum(array) ^ (array.shape[-1] == 4))
    with pytest.raises(InputError, match=r"decoder\.latent_projection\.weight"):
        convert(published, tmp_path / "new")
    assert not (tmp_path / "new").exists()


def test_prepare_reads_back(shards, tmp_path, monkeypatch, capsys):
    output = tmp_path / "out"
    write_order = shard_index._write_order

    def damaging(folder, shards):
        write_order(folder, shards)
        flip(folder / "00000-0000.arrayrecord")

    monkeypatch.setattr(shard_index, "_write_order", damaging)
    assert main(prepare_argv(shards.parent, output)) == 1
    assert str(output / "00000-0000.arrayrecord") in capsys.readouterr().err
    assert not (output / "manifest.json").exists()
    monkeypatch.undo()
    assert main(prepare_argv(shards.parent, output)) == 0
    for path in shards.iterdir():
        if path.name not in ("manifest.json", "prepare.json"):
            assert (output / path.name).read_bytes() == path.read_bytes(), path.name
