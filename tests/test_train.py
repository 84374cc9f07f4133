"""`python train.py`: what a run leaves behind, that it resumes bit for bit, what it says when something is wrong."""

import contextlib
import dataclasses
import importlib.util
import io
import json
import os
import re
import resource
import shlex
import shutil
import signal
import subprocess
import sys
import time
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from types import SimpleNamespace

import compiler
import jax
import numpy as np
import pytest

import davae_jax
from davae_jax import TextVAE
from davae_jax.checkpoints.weights import flat_params
from davae_jax.cli.main import main as davae
from davae_jax.cli.text import Generate
from davae_jax.cli.train import generate_command, parse_train
from davae_jax.parallel import multihost
from davae_jax.training import loop
from davae_jax.training.hooks import Every, Profiler
from davae_jax.training.presets import DEMO
from davae_jax.utils.errors import InputError
from davae_jax.utils.locks import FolderLock

ROOT = Path(__file__).parent.parent
TEXTS = [f"{a}{b}很{c}。" for a in ("饭店", "超市", "公园", "书店") for b in "菜价人书" for c in "好坏多少贵新"]
# As small as the program takes it: what is tested is the program, not what the model learns.
SMALLEST = {
    "batch-size": 4,
    "data.decoder-vocab-size": 60,
    "data.encoder-vocab-size": 80,
    "data.buckets": 1,
    "model.latent-size": 4,
    "model.encoder.hidden-size": 16,
    "model.encoder.num-hidden-layers": 1,
    "model.encoder.intermediate-size": 16,
    "model.decoder.hidden-size": 16,
    "model.decoder.num-layers": 1,
    "model.max-out-length": 12,
    "data.max-length": 12,
    "log.every": 2,
    "log.samples": 0,
    "log.figures": 0,
}
TINY = [word for option, value in SMALLEST.items() for word in (f"--{option}", value)]
# Options of most runs here, which therefore share their compiled programs.
SAME = ["--steps", 8, "--adversarial.weight", 0.1]


@pytest.fixture(scope="session")
def text_file(tmp_path_factory):
    path = tmp_path_factory.mktemp("texts") / "train.txt"
    path.write_text("\n".join(TEXTS) + "\n", encoding="utf-8")
    return path


def environment(devices=1):
    """Returns the environment of a process that trains."""
    settings = {"JAX_PLATFORMS": "cpu", "JAX_NUM_CPU_DEVICES": str(devices)}
    return {"XLA_FLAGS": compiler.QUICK} | os.environ | settings


def started(*argv, devices=1, python=(), **kwargs):
    """Starts train.py in a process of its own; `python` are options of the interpreter."""
    argv = [sys.executable, *python, ROOT / "train.py", *argv]
    kwargs = dict(cwd=ROOT) | kwargs
    return subprocess.Popen(list(map(str, argv)), env=environment(devices), text=True, **kwargs)


@contextlib.contextmanager
def some_devices(n=1):
    """A process that has n devices, and is not connected to others."""
    devices = jax.local_devices()[:n]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(multihost, "connect", lambda *_: None)  # only possible before JAX has devices
        patch.setattr(jax, "device_count", lambda: n)
        patch.setattr(jax, "devices", lambda *_: devices)
        yield


def called(main, *argv, devices=1):
    """Runs a program in this process, which saves the imports. Returns (exit code, stdout, stderr)."""
    out, err = io.StringIO(), io.StringIO()
    with some_devices(devices), redirect_stdout(out), redirect_stderr(err):
        code = main(list(map(str, argv)))
    return code, out.getvalue(), err.getvalue()


def train(*argv, devices=1):
    """Runs train.py in this process. Returns (exit code, stdout, stderr)."""
    spec = importlib.util.spec_from_file_location("train_program", ROOT / "train.py")
    program = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(program)
    return called(program.main, *argv, devices=devices)


def tiny(text_file, run_dir, *argv, devices=1):
    return train("--data.train", text_file, "--run-dir", run_dir, *TINY, *argv, devices=devices)


def rows_of(path):
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def metrics_of(run_dir):
    return rows_of(run_dir / "metrics.jsonl")


@pytest.fixture(scope="session")
def run(text_file, tmp_path_factory):
    """(folder, output) of a run of 8 steps in one go, with figures and samples."""
    folder = tmp_path_factory.mktemp("run") / "whole"
    options = [*SAME, "--log.checkpoint", 3, "--log.samples", 4, "--log.figures", 1]
    pipes = dict(stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    process = started("--data.train", text_file, "--run-dir", folder, *TINY, *options, **pipes)
    out, err = process.communicate(timeout=300)
    assert process.returncode == 0, err
    return folder, out


def test_a_run_leaves_what_it_should(run):
    folder, out = run
    rows = metrics_of(folder)
    assert [row["step"] for row in rows] == [2, 4, 6, 8]
    means = {"loss", "rec", "kl", "kl_unmasked", "beta", "loss_d", "loss_g", "grad_norm", "lr"}
    means |= {"tokens_per_s", "data_wait", "compile_s"}
    assert all(row.keys() == {"step", "mfu", "device_memory"} | means for row in rows)
    held_out = [json.loads(line) for line in (folder / "held_out.jsonl").open(encoding="utf-8")]
    assert [row["step"] for row in held_out] == [3, 6, 8]
    assert all(np.isfinite(row[name]) for row in held_out for name in ("loss", "rec", "kl"))
    assert all(np.isfinite(row[name]) for row in rows for name in means)
    best = min(held_out, key=lambda row: row["loss"])["step"]
    # The newest two, and the best.
    assert {int(p.name) for p in (folder / "checkpoints").iterdir()} == {6, 8, best}
    assert [json.loads(line)["step"] for line in (folder / "samples.jsonl").open(encoding="utf-8")] == [4]
    assert list((folder / "events").glob("events*"))
    stored = json.loads((folder / "train.json").read_text(encoding="utf-8"))
    assert stored["adversarial"]["weight"] == 0.1 and stored["model"]["latent_size"] == 4
    events = b"".join(p.read_bytes() for p in (folder / "events").iterdir())
    assert all(name in events for name in (b"kl_per_dim", b"held_out/loss", b"tokens_per_s", b"samples"))
    found = json.loads((folder / "figures.json").read_text(encoding="utf-8"))
    names = {"n", "bleu", "exact_match", "bleu_sampled", "bleu_other_latent", "prior_valid", "prior_distinct"}
    assert found.keys() >= names | {"mutual_information", "active_units", "seconds"} and found["n"] == 1
    (following,) = [line for line in out.splitlines() if line.startswith("next: ")]
    assert f"davae generate --model {folder} " in following


def test_every_command_reads_the_run(run, capsys, tmp_path):
    folder, _ = run
    vae = TextVAE.from_pretrained(folder)
    assert vae.reconstruct(TEXTS[:2]) == TextVAE.from_pretrained(str(folder)).reconstruct(TEXTS[:2])
    newest = TextVAE.from_pretrained(folder / "checkpoints" / "8")
    assert vae.reconstruct(TEXTS[:2]) == newest.reconstruct(TEXTS[:2])
    (tmp_path / "link").symlink_to(folder / "checkpoints" / "8")
    assert vae.reconstruct(TEXTS[:2]) == TextVAE.from_pretrained(tmp_path / "link").reconstruct(TEXTS[:2])
    exported = str(tmp_path / "exported")
    options = ["--format", "safetensors", "--dtype", "float32"]
    assert davae(["export", str(folder / "checkpoints" / "8"), exported, *options]) == 0
    assert vae.reconstruct(TEXTS[:2]) == TextVAE.from_pretrained(exported).reconstruct(TEXTS[:2])
    capsys.readouterr()
    assert davae(["generate", "--model", str(folder), TEXTS[0]]) == 0
    assert json.loads(capsys.readouterr().out)["text"] == TEXTS[0]


def test_a_model_in_a_folder_called_checkpoints(tiny_checkpoint, tmp_path):
    """A folder is judged by its contents."""
    folder = tmp_path / "checkpoints"
    shutil.copytree(tiny_checkpoint, folder)
    vaes = [TextVAE.from_pretrained(source) for source in (tiny_checkpoint, folder)]
    texts = [vae.sample(2, seed=1, max_length=5) for vae in vaes]
    assert texts[0] == texts[1]


def test_it_exports_to_the_published_layout(run, tmp_path, capsys):
    pytest.importorskip("torch")
    folder, _ = run
    assert davae(["export", str(folder), str(tmp_path / "published"), "--dtype", "float32"]) == 0
    a, b = (flat_params(davae_jax.from_pretrained(source)) for source in (folder, tmp_path / "published"))
    assert all(np.array_equal(a[path], b[path]) for path in a)
    assert davae(["parity", str(folder), "--length", "12", "--no-gradients"]) == 0


def test_a_resumed_run_is_the_same_run(run, text_file, tmp_path):
    """Ended after 3 steps and begun again: every weight, both optimizers, every logged number, bit for bit."""
    whole, _ = run
    options = [*SAME, "--log.checkpoint", 3, "--log.samples", 4]
    folder = tmp_path / "resumed"
    quiet = dict(stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    process = started("--data.train", text_file, "--run-dir", folder, *TINY, *options, **quiet)
    while process.poll() is None and not (folder / "checkpoints" / "3").exists():
        time.sleep(0.02)
    process.kill()  # no time to save anything
    process.wait()
    assert not (folder / "checkpoints" / "8").exists()
    code, out, err = tiny(text_file, folder, *options)
    assert code == 0, err
    assert "steps 3 to 8" in out or "steps 6 to 8" in out
    names = set(metrics_of(whole)[0]) - {"tokens_per_s", "data_wait", "compile_s"}
    a, b = ([{name: row[name] for name in names} for row in metrics_of(f)] for f in (whole, folder))
    assert [row["step"] for row in b] == [2, 4, 6, 8] and a == b
    assert (whole / "held_out.jsonl").read_bytes() == (folder / "held_out.jsonl").read_bytes()
    a, b = (state_of(f / "checkpoints" / "8") for f in (whole, folder))
    assert len(a) > 100
    assert all(np.array_equal(x, y) for x, y in zip(a, b, strict=True))


def logged_by(run_dir):
    """What a run logs, but for times."""
    rates = {"tokens_per_s", "data_wait", "compile_s"}
    return [{k: v for k, v in row.items() if k not in rates} for row in metrics_of(run_dir)]


def assert_same_run(a, b):
    """Two runs of 8 steps are the same, bit for bit."""
    assert len(logged_by(a)) == 4 and logged_by(a) == logged_by(b)
    states = (state_of(folder / "checkpoints" / "8") for folder in (a, b))
    assert all(np.array_equal(x, y) for x, y in zip(*states, strict=True))


def test_the_file_of_a_run_repeats_it(run, tmp_path):
    whole, _ = run
    folder = tmp_path / "repeated"
    once = ["--log.checkpoint", 8, "--log.samples", 0, "--log.figures", 0]
    code, out, err = called(davae, "train", "--config", whole / "train.json", "--run-dir", folder, *once)
    assert code == 0 and "steps 0 to 8" in out, err
    assert_same_run(folder, whole)
    code, _, err = called(davae, "train", "--config", whole / "train.json", "--run-dir", folder, "--beta.max", 0.2)
    said = f"--run-dir {folder} was made with another config: beta.max (0.03, now 0.2); choose another folder"
    assert (code, err) == (2, f"davae train: error: {said}\n")


def test_training_from_python(run, text_file, tmp_path):
    """An interrupt saves a checkpoint and is raised; the same call goes on, to the run and the model of train.py."""
    whole, _ = run
    folder = tmp_path / "python"
    argv = ["--data.train", text_file, "--run-dir", folder, *TINY, *SAME, "--log.checkpoint", 8]
    config = parse_train(list(map(str, argv)))[1]
    handler = signal.getsignal(signal.SIGINT)
    with some_devices():
        with pytest.raises(KeyboardInterrupt, match=f"^after step 5, which is saved in {folder}$"):
            davae_jax.train(config, hooks=[Every(4, lambda *_: signal.raise_signal(signal.SIGINT))])
        assert (folder / "checkpoints" / "5").is_dir() and signal.getsignal(signal.SIGINT) == handler
        vae = davae_jax.train(config)
    assert_same_run(folder, whole)
    stored = TextVAE.from_pretrained(folder)
    assert vae.batch_size == stored.batch_size and vae.source == str(folder)
    np.testing.assert_array_equal(vae.encode(TEXTS[:4]), stored.encode(TEXTS[:4]))
    assert vae.reconstruct(TEXTS[:2]) == stored.reconstruct(TEXTS[:2])
    with pytest.raises(InputError, match=r"^config\.run_dir must name the folder of the run$"):
        davae_jax.train(dataclasses.replace(config, run_dir=None))


def test_a_run_resumes_with_stacked_layers(run, text_file, tmp_path, monkeypatch):
    """From a checkpoint of step 6 of a run with a list of layers, on a mesh: the numbers but for rounding, the files
    and what commands read from them are the same."""
    whole, _ = run
    folder = tmp_path / "stacked"
    shutil.copytree(whole, folder)
    shutil.rmtree(folder / "checkpoints" / "8")
    monkeypatch.setattr("davae_jax.model.stack.SCAN_ABOVE", 0)
    options = [*SAME, "--log.checkpoint", 3, "--log.samples", 4, "--log.figures", 1]
    code, out, err = tiny(text_file, folder, *options, "--mesh.fsdp", 2, devices=2)
    assert code == 0 and "steps 6 to 8" in out, err
    a, b = (metrics_of(f)[-1] for f in (whole, folder))
    for name in ("loss", "rec", "kl", "loss_d", "grad_norm"):
        assert b[name] == pytest.approx(a[name], rel=1e-4), name
    a, b = (state_of(f / "checkpoints" / "8") for f in (whole, folder))
    assert [x.shape for x in a] == [x.shape for x in b]
    for x, y in zip(a, b, strict=True):
        np.testing.assert_allclose(x, y, atol=1e-4)
    texts = [TextVAE.from_pretrained(f).reconstruct(TEXTS[:2]) for f in (whole, folder)]
    assert texts[0] == texts[1]


def test_a_longer_run_is_the_same_run(text_file, tmp_path):
    """A finished run that goes on, and then decays, is one that had its length from the beginning, bit for bit."""
    schedule = ["--optimizer.schedule", "wsd", "--optimizer.warmup-steps", 1, "--beta.start", 0.1, "--beta.max", 0.1]
    lengths = [["--steps", 2], ["--steps", 4, "--optimizer.decay-steps", 2]]
    for folder, given in (("longer", lengths), ("whole", lengths[1:])):
        for length in given:
            code, out, err = tiny(text_file, tmp_path / folder, *schedule, *length)
            assert code == 0, err
        assert ("goes on after step 2 to step 4, not 2; up to step 2 no schedule changes" in out) == (
            folder == "longer"
        )
    weights = [flat_params(davae_jax.from_pretrained(tmp_path / folder)) for folder in ("longer", "whole")]
    for path, weight in weights[0].items():
        assert np.array_equal(weight, weights[1][path]), path
    code, _, err = tiny(text_file, tmp_path / "longer", *schedule, "--steps", 3)
    assert code == 2 and err.count("\n") == 1 and "--steps must be at least 4" in err


@pytest.mark.slow
def test_a_run_on_a_mesh_repeated_is_the_same_run(text_file, tmp_path):
    """Twice in one go, and from the checkpoint of step 6: every weight, moment and logged number, bit for bit."""
    options = [*SAME, "--log.checkpoint", 3, "--mesh.data", 2, "--mesh.fsdp", 2]
    first, second, resumed = (tmp_path / name for name in ("first", "second", "resumed"))
    for folder in (first, second):
        code, _, err = tiny(text_file, folder, *options, devices=4)
        assert code == 0, err
    shutil.copytree(first, resumed)
    shutil.rmtree(resumed / "checkpoints" / "8")
    code, out, err = tiny(text_file, resumed, *options, devices=4)
    assert code == 0 and "steps 6 to 8" in out, err
    rates = {"tokens_per_s", "data_wait", "compile_s"}
    logged = lambda folder: [{k: v for k, v in row.items() if k not in rates} for row in metrics_of(folder)]  # noqa: E731
    for folder in (second, resumed):
        assert logged(folder) == logged(first)
        assert (folder / "held_out.jsonl").read_bytes() == (first / "held_out.jsonl").read_bytes()
        states = (state_of(path / "checkpoints" / "8") for path in (folder, first))
        assert all(np.array_equal(a, b) for a, b in zip(*states, strict=True))


def state_of(path):
    from orbax.checkpoint import v1 as ocp

    return jax.tree.leaves(ocp.load_checkpointables(path))


def data_file(checkpoint):
    """The largest file of a checkpoint: its arrays."""
    return max((p for p in checkpoint.rglob("*") if p.is_file()), key=lambda p: p.stat().st_size)


def flip_a_bit(path):
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 8
    path.write_bytes(data)


@pytest.mark.parametrize("damage", [flip_a_bit, Path.unlink], ids=["a bit", "a missing file"])
def test_a_damaged_checkpoint_is_set_aside(run, text_file, tmp_path, damage):
    whole, _ = run
    folder = tmp_path / "damaged"
    shutil.copytree(whole, folder)
    newest = folder / "checkpoints" / "8"
    damage(data_file(newest))
    options = [*SAME, "--log.checkpoint", 3, "--log.samples", 4]
    code, out, err = tiny(text_file, folder, *options)
    assert code == 0, err
    (line,) = [line for line in err.splitlines() if "resuming from" in line]
    assert line.startswith(f"{newest}: ") and line.endswith(f"resuming from {folder / 'checkpoints' / '6'}")
    assert "steps 6 to 8" in out and (folder / "checkpoints" / "8.damaged").is_dir()
    a, b = (state_of(f / "checkpoints" / "8") for f in (whole, folder))
    assert all(np.array_equal(x, y) for x, y in zip(a, b, strict=True))


def test_no_checkpoint_is_left(run, text_file, tmp_path):
    whole, _ = run
    folder = tmp_path / "damaged"
    shutil.copytree(whole, folder)
    checkpoints = sorted((folder / "checkpoints").iterdir())
    for checkpoint in checkpoints:
        data_file(checkpoint).unlink()
    code, _, err = tiny(text_file, folder, *SAME)
    (line,) = err.splitlines()
    assert code == 1 and line.startswith("train.py: error: ") and line.endswith("; no intact checkpoint remains")
    assert (
        all(f"{path}: " in line for path in checkpoints) and sorted((folder / "checkpoints").iterdir()) == checkpoints
    )


@pytest.mark.slow
def test_killed_at_any_moment(run, text_file, tmp_path):
    """Killed again and again, while it saves every step; in the end nothing shows."""
    whole, _ = run
    folder = tmp_path / "killed"
    options = [*SAME, "--log.checkpoint", 1, "--log.samples", 4]
    rng, kills = np.random.default_rng(0), 0
    while True:
        quiet = dict(stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
        process = started("--data.train", text_file, "--run-dir", folder, *TINY, *options, **quiet)
        before = newest_of(folder)
        while process.poll() is None and newest_of(folder) == before:
            time.sleep(0.01)
        time.sleep(rng.uniform(0, 0.3))
        process.kill()
        _, err = process.communicate()
        if process.returncode == 0:
            break
        assert process.returncode == -signal.SIGKILL, err
        kills += 1
    assert kills >= 3
    names = set(metrics_of(whole)[0]) - {"tokens_per_s", "data_wait", "compile_s"}
    a, b = ([{name: row[name] for name in names} for row in metrics_of(f)] for f in (whole, folder))
    assert a == b
    # The whole run saved at fewer steps; texts were shown at the same one.
    losses = rows_of(folder / "held_out.jsonl")
    assert [row["step"] for row in losses] == list(range(1, 9))
    assert [losses[step - 1] for step in (3, 6, 8)] == rows_of(whole / "held_out.jsonl")
    assert rows_of(folder / "samples.jsonl") == rows_of(whole / "samples.jsonl")
    a, b = (state_of(f / "checkpoints" / "8") for f in (whole, folder))
    assert all(np.array_equal(x, y) for x, y in zip(a, b, strict=True))


def newest_of(folder):
    return max((int(p.name) for p in (folder / "checkpoints").glob("*") if p.name.isdigit()), default=0)


def test_a_trace_is_written(text_file, tmp_path):
    folder = tmp_path / "run"
    code, _, err = tiny(text_file, folder, *SAME, "--profile-steps", 2, 3)
    assert code == 0, err
    assert list((folder / "profile").rglob("*.xplane.pb"))


def test_a_run_moves_to_another_mesh(run, text_file, tmp_path):
    """The checkpoint of step 6, written on one device, goes on over eight."""
    whole, _ = run
    folder = tmp_path / "moved"
    shutil.copytree(whole, folder)
    shutil.rmtree(folder / "checkpoints" / "8")
    options = [*SAME, "--log.checkpoint", 3]
    mesh = ["--mesh.data", 2, "--mesh.fsdp", 2, "--mesh.tensor", 2]
    code, out, err = tiny(text_file, folder, *options, *mesh, devices=8)
    assert code == 0, err
    assert "steps 6 to 8" in out
    a, b = (metrics_of(f)[-1] for f in (whole, folder))
    assert a["step"] == b["step"] == 8
    for name in ("loss", "rec", "kl_unmasked", "loss_d", "loss_g", "grad_norm"):
        assert b[name] == pytest.approx(a[name], rel=1e-5), name


def test_a_mesh_that_does_not_fit(text_file, tmp_path):
    code, _, err = tiny(text_file, tmp_path / "run", "--steps", 8, "--mesh.tensor", 2, devices=3)
    said = "--mesh.data -1 --mesh.fsdp 1 --mesh.tensor 2: does not fit 3 devices"
    assert code == 2 and err == f"train.py: error: {said}\n"
    code, _, err = tiny(text_file, tmp_path / "run", "--steps", 8, devices=3)
    assert code == 2 and err == "train.py: error: --batch-size must be a multiple of data × fsdp = 3, not 4\n"
    assert not (tmp_path / "run").exists()


def test_hooks_of_the_caller(text_file, tmp_path):
    """Called after every second step with that step's state; one at the end as well; by its position or its name."""
    argv = ["--data.train", text_file, "--run-dir", tmp_path / "run", *TINY, *SAME]
    _, config = parse_train(list(map(str, argv)))
    even, third = [], []

    def note(run, state, step):
        assert run.folder == tmp_path / "run" and int(state.step) == step
        even.append(step)

    with some_devices():
        loop.train(config, [Every(2, note), Every(3, function=lambda *args: third.append(args[2]), at_end=True)])
    assert (even, third) == ([2, 4, 6, 8], [3, 6, 8])
    with pytest.raises(TypeError):  # a hook without an action is a mistake
        Every(100)


def test_a_folder_that_another_run_uses(run, text_file):
    folder, _ = run
    before = sorted((p, p.stat().st_mtime_ns) for p in folder.rglob("*"))
    with FolderLock() as lock:
        lock.acquire(folder)
        code, out, err = tiny(text_file, folder, *SAME)
    assert (code, out) == (1, "") and err == f"train.py: error: {folder}: another program is writing to this folder\n"
    assert sorted((p, p.stat().st_mtime_ns) for p in folder.rglob("*")) == before


def test_a_run_without_a_folder(text_file):
    config = dataclasses.replace(DEMO, data=dataclasses.replace(DEMO.data, train=text_file))
    with pytest.raises(InputError, match="--run-dir"):
        loop.train(config)


@pytest.mark.parametrize("name", ["vocab.txt", "spiece.model"])
def test_a_run_without_its_tokenizer(name, run, text_file, tmp_path):
    """Another one may not be trained in its place: the weights belong to its ids."""
    folder = tmp_path / "run"
    shutil.copytree(run[0], folder)
    (folder / name).unlink()
    code, _, err = tiny(text_file, folder, *SAME)
    assert code == 1 and err.startswith(f"train.py: error: {folder / name}: is missing") and err.count("\n") == 1
    assert not (folder / name).exists()


def test_a_finished_run_says_so_again(run, text_file):
    folder, _ = run
    options = [*SAME, "--log.checkpoint", 3]
    code, out, _ = tiny(text_file, folder, *options)
    assert code == 0 and "steps 8 to 8" in out and [row["step"] for row in metrics_of(folder)] == [2, 4, 6, 8]


def test_a_packed_run(text_file, tmp_path):
    """Several texts in a row, in parts, with layers computed anew."""
    options = ["--data.pack", "--data.buckets", None, "--accumulate", 2, "--remat", "full", "--steps", 4]
    code, out, err = tiny(
        text_file, tmp_path / "packed", "--model.max-out-length", 40, "--data.max-length", 40, *options
    )
    assert code == 0, err
    assert re.search(
        r"steps 0 to 4 of 4 rows \(\d+\.\d% of the encoder's and \d+\.\d% of the decoder's are padding\)", out
    )
    assert [row["step"] for row in metrics_of(tmp_path / "packed")] == [2, 4]


@pytest.fixture(scope="module")
def interrupted(text_file, tmp_path_factory):
    """(folder, exit code, stderr, imported modules) of a run that is interrupted."""
    folder = tmp_path_factory.mktemp("interrupted") / "run"
    argv = ["--data.train", text_file, "--run-dir", folder, *TINY, "--steps", 100_000, "--log.checkpoint", 100_000]
    python = ["-X", "importtime"]  # prints a line on stderr for each module
    # The tests may run as a shell's background job, which ignores interrupts and hands that on; SIGTERM it does not.
    with (folder.parent / "stderr").open("w+", encoding="utf-8") as stderr:
        process = started(*argv, python=python, stdout=subprocess.DEVNULL, stderr=stderr)
        while process.poll() is None and not (folder / "metrics.jsonl").exists():
            time.sleep(0.02)
        while process.poll() is None and not metrics_of(folder):
            time.sleep(0.02)
        process.send_signal(signal.SIGTERM)
        process.wait(timeout=120)
        stderr.seek(0)
        err = stderr.read()
    imported = [line for line in err.splitlines() if line.startswith("import time:")]
    modules = {line.rpartition("|")[2].strip() for line in imported}
    err = "\n".join(line for line in err.splitlines() if line not in imported)
    return folder, process.returncode, err, modules


def test_interrupt_saves_and_says_how_to_go_on(interrupted):
    folder, code, err, _ = interrupted
    assert code == 130, err
    (step,) = [int(p.name) for p in (folder / "checkpoints").iterdir()]
    assert f"interrupted after step {step}; to resume: " in err and "train.py --data.train" in err
    assert f"--run-dir {folder}" in err


def test_training_imports_nothing_it_does_not_need(interrupted):
    *_, modules = interrupted
    assert "jax" in modules
    assert not modules & {"torch", "transformers", "sklearn", "pyarrow"}


@pytest.mark.parametrize("fails", ["start_trace", "stop_trace"])
def test_a_profile_that_cannot_be_written_is_named(fails, tmp_path, monkeypatch):
    def fail(*_):
        raise RuntimeError("RESOURCE_EXHAUSTED: No space left on device")

    for name in ("start_trace", "stop_trace"):
        monkeypatch.setattr(jax.profiler, name, fail if name == fails else lambda *_: None)
    log = SimpleNamespace(profile_steps=(1, 1))
    profiler = Profiler(SimpleNamespace(config=SimpleNamespace(log=log), first_step=0, folder=tmp_path))
    with pytest.raises(InputError) as e:
        profiler.before_step(1)
        profiler.after_step(1, None, last=False)
    assert str(e.value).startswith(f"{tmp_path / 'profile'}: the profile cannot be written (RESOURCE_EXHAUSTED")


def test_signal_before_the_first_step(text_file, tmp_path):
    """One line, nothing half-written, and the same command goes on."""
    folder = tmp_path / "run"
    options = ["--data.train", text_file, "--run-dir", folder, *TINY, *SAME]
    process = started(*options, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    while process.poll() is None and not (folder / "train.json").exists():
        time.sleep(0.01)
    process.send_signal(signal.SIGTERM)
    _, err = process.communicate(timeout=120)
    assert (process.returncode, err) == (130, "train.py: interrupted\n")
    assert not list(folder.rglob("*.partial")) and not (folder / "checkpoints").exists()
    code, out, err = train(*options)
    assert code == 0 and "steps 0 to 8" in out, err


IN_A_CALLBACK = """
import gc, signal, sys, time
sys.path.insert(0, ".")
from davae_jax.cli.base import exit_with
from davae_jax.cli.train import main
from davae_jax.training import setup
def collecting(phase, info):
    gc.callbacks.clear()
    signal.raise_signal(signal.SIGTERM)
def read_corpus(*files):
    gc.callbacks[:] = [collecting]
    gc.collect()
    for _ in range(400):  # Python may miss a signal that comes right before a long sleep
        time.sleep(0.1)
setup.read_corpus = read_corpus
exit_with(main)
"""


def test_signal_within_a_callback(text_file, tmp_path):
    """Of the garbage collector, say, which swallows what is raised in it: the program ends a moment later."""
    argv = ["-c", IN_A_CALLBACK, "--data.train", text_file, "--run-dir", tmp_path / "run", *TINY]
    run = dict(cwd=ROOT, env=environment(1), capture_output=True, text=True, timeout=50)
    done = subprocess.run([sys.executable, *map(str, argv)], **run)
    assert (done.returncode, done.stderr) == (130, "train.py: interrupted\n")


def test_signal_during_the_evaluation(text_file, tmp_path, monkeypatch):
    monkeypatch.setenv("PYTHONUNBUFFERED", "1")
    folder = tmp_path / "run"
    options = ["--data.train", text_file, "--data.valid", text_file, "--run-dir", folder, *TINY, *SAME]
    process = started(*options, "--log.figures", 96, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    while (line := process.stdout.readline()) and "→" not in line:
        pass
    process.send_signal(signal.SIGTERM)
    _, err = process.communicate(timeout=120)
    assert process.returncode == 130 and err.count("\n") == 1 and not (folder / "figures.json").exists()
    assert err.startswith("interrupted after step ") and "--run-dir" in err


BAD = "1 of {} lines cannot be read, more than --data.max-bad 0.01"
TOO_LONG = "contains only blank texts and texts of more than 12 decoder tokens or 128 encoder tokens"


@pytest.mark.parametrize(
    ("name", "data", "said"),
    [
        ("missing.txt", None, "cannot be read (No such file or directory)"),
        ("empty.txt", b"", "contains no text"),
        ("blank.txt", b"\n  \n\n", "contains no text"),
        (
            "latin.txt",
            b"ok\nok\n\xe9t\xe9\n",
            f"line 3: is not UTF-8; {BAD.format(3)}; --data.encoding names another encoding",
        ),
        ("long.txt", ("很" * 300 + "\n").encode() * 3, TOO_LONG),
        ("longer.txt", ("很好" * 2000 + "\n").encode() * 3, TOO_LONG),  # more than SentencePiece takes, unless told
        ("bad.jsonl", b'{"text": "a"}\n{"tex": "b"}\n', f"line 2: has no field 'text'; {BAD.format(2)}"),
    ],
)
def test_bad_texts(name, data, said, tmp_path):
    path = tmp_path / name
    if data is not None:
        path.write_bytes(data)
    code, out, err = tiny(path, tmp_path / "run", "--steps", 2)
    lines = [line for line in err.splitlines() if line.strip()]
    assert code in (1, 2) and out == ""
    assert lines == [f"train.py: error: {path}: {said}"]
    assert not (tmp_path / "run" / "checkpoints").exists()


def test_another_config_in_the_same_folder(run, text_file):
    folder, _ = run
    before = sorted((p, p.stat().st_mtime_ns) for p in folder.rglob("*"))
    options = [*SAME, "--beta.max", 0.5, "--log.every", 1]
    code, _, err = tiny(text_file, folder, *options)
    assert code == 2
    changed = "beta.max (0.03, now 0.5)"
    reason = f"{folder} was made with another config: {changed}; choose another folder"
    assert err == f"train.py: error: --run-dir {reason}\n"
    assert sorted((p, p.stat().st_mtime_ns) for p in folder.rglob("*")) == before


def test_other_texts_under_the_same_name(run, text_file):
    """The data's order is remembered as a step's number, which means nothing on other texts."""
    folder, _ = run
    before = text_file.read_bytes()
    try:
        text_file.write_bytes(before + "又一句。\n".encode())
        code, _, err = tiny(text_file, folder, *SAME)
    finally:
        text_file.write_bytes(before)
    assert code == 2 and err.count("\n") == 1
    assert err.startswith(
        f"train.py: error: --run-dir {folder} was made with another config: data.train (other contents)"
    )


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        (["--steps", "0"], "--steps must be at least 1, not 0"),
        (["--stpes", "3"], "--stpes"),
        (["randeng-1b", "--beta.cycles", "0"], "--beta.cycles must be at least 1, not 0"),
        (["--optimizer.schedule", "linear"], "--optimizer.schedule"),
        (["dmo"], "no preset 'dmo'; available: demo, randeng-1b"),
        (["--free-bits.target", "-1"], "--free-bits.target"),
        (["--seed", "-1"], "--seed must be an integer from 0 to 2³² − 1, not -1"),
        (["--data.valid", "x.txt"], "--data.valid is used only with --data.train"),
        (["--optimizer.eps", "0"], "--optimizer.eps must be above 0 and finite, not 0.0"),
        (["--attention", "mosaic_tpu"], "--attention mosaic_tpu needs TPUs, and the devices are of the platform cpu"),
        (["--steps", "2147483648"], "--steps must be less than 2³¹"),
        (["--beta.cycles", "2147483648"], "--beta.cycles must be less than 2³¹"),
        (["--lagging.encoder-steps", "10000000000"], "--lagging.encoder-steps must be less than 2³¹"),
    ],
)
def test_bad_options(argv, said):
    code, out, err = train(*argv)
    assert code == 2 and out == "" and said in err and "Traceback" not in err


@pytest.mark.parametrize(("folder", "text"), [("-inf", "你好"), ("runs/a b", "-x"), ("--", "--model")])
def test_the_next_command_is_understood(folder, text):
    """A name or a text that begins with a dash is no option."""
    words = shlex.split(generate_command(Path(folder), text))
    command = Generate.parse(words[2:], "davae generate")
    assert words[1] == "generate" and command.model == folder and command.texts == (text,)


def test_a_loss_that_is_not_finite_stops_the_run(text_file, tmp_path):
    """A learning rate that no model survives."""
    folder = tmp_path / "run"
    options = ["--steps", 40, "--optimizer.learning-rate", 1e30, "--optimizer.warmup", 0, "--optimizer.clip", 0]
    code, _, err = tiny(text_file, folder, *options, "--log.checkpoint", 1)
    (line,) = [line for line in err.splitlines() if "error" in line]
    assert code == 1 and "its batch is lines " in line and str(text_file) in line
    assert "the last good checkpoint is " in line and line.startswith("train.py: error: step ")


@contextlib.contextmanager
def full_disk(limit):
    """Files of this process cannot grow past `limit` bytes. Compiled programs are read, but not written."""
    option = "jax_persistent_cache_min_compile_time_secs"
    seconds, (soft, hard) = jax.config.values[option], resource.getrlimit(resource.RLIMIT_FSIZE)
    jax.config.update(option, 1000.0)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        jax.config.update(option, seconds)


def test_a_full_disk(text_file, tmp_path):
    """No file may grow past 30 kB: the logs fit, a checkpoint does not."""
    with full_disk(30_000):
        code, _, err = tiny(text_file, tmp_path / "run", *SAME)
    (line,) = [line for line in err.splitlines() if "error" in line]
    assert code == 1
    assert line.startswith(f"train.py: error: {tmp_path / 'run' / 'checkpoints'}: step 8 cannot be saved (")
    assert line.endswith("the last complete checkpoint is none yet")
    assert [row["step"] for row in metrics_of(tmp_path / "run")] == [2, 4, 6, 8]


def test_a_disk_that_fills_while_logging(text_file, tmp_path):
    """No file may grow past 8 kB: tokenizers fit, TensorBoard's events do not for long."""
    folder = tmp_path / "run"
    with full_disk(8_000):
        code, _, err = tiny(text_file, folder, *SAME, "--log.every", 1)
    (line,) = [line for line in err.splitlines() if "rror" in line]
    assert code == 1
    assert line.startswith(f"train.py: error: {folder}") and "cannot be written (File too large)" in line
    assert line.endswith("the last complete checkpoint is none yet")
