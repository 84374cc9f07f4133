"""What the machine lacks is named in one line: JAX's devices, space on a disk, shared memory, UTF-8 names of files."""

import contextlib
import io
import json
import logging
import os
import subprocess
import sys
from pathlib import Path

import pytest
from test_train import ROOT, TEXTS, TINY, environment

from davae_jax.checkpoints.orbax_logging import quiet_orbax
from davae_jax.checkpoints.run_folder import check_path
from davae_jax.cli.main import main as davae
from davae_jax.parallel.backend import backend_problem
from davae_jax.utils.errors import InputError
from davae_jax.utils.files import atomic_write, naming_file, temporary_folder, write_json, write_output
from davae_jax.utils.json_files import read_json_object

GBK = os.fsdecode("中文".encode("gbk"))
ESCAPED = r"\udcd6\udcd0\udcce\udcc4"
SIZES = ["--decoder-vocab-size", "60", "--encoder-vocab-size", "80"]
SMALL_DISK = 'mount -t tmpfs -o size="$1" tmpfs "$2" && shift 2 && exec "$@"'


def run_program(*argv, variables=None, wrapper=()):
    """Runs a Python program in a process of its own. Returns (exit code, stderr)."""
    command = [*wrapper, sys.executable, *map(str, argv)]
    env = environment() | (variables or {})
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True)
    return done.returncode, done.stderr


def with_small_disk(folder, size):
    """Returns a command line before a program, for which the folder is a new file system of this size."""
    return ["unshare", "--mount", "bash", "-c", SMALL_DISK, "bash", size, str(folder)]


def require_mount(folder):
    try:
        possible = subprocess.run([*with_small_disk(folder, "4k"), "true"], capture_output=True).returncode == 0
    except FileNotFoundError:
        possible = False
    if not possible:
        pytest.skip("no file system can be mounted here: this needs root and unshare")


def assert_one_error(error, *parts):
    assert error.count("\n") == 1 and ": error: " in error and all(part in error for part in parts), error


@pytest.fixture
def text_file(tmp_path):
    path = tmp_path / "texts.txt"
    path.write_text("\n".join(TEXTS) + "\n", encoding="utf-8")
    return path


@pytest.mark.parametrize(
    ("argv", "setting"),
    [
        (["train.py", "--run-dir", "{0}/new", "--data.train"], "JAX_PLATFORMS=nonsense"),
        (["-m", "convert.from_torch", "tests/golden/small"], "JAX_NUM_CPU_DEVICES=abc"),
    ],
)
def test_jax_cannot_start(argv, setting, text_file, tmp_path):
    """An unknown platform, and a setting that JAX refuses when it is imported."""
    argv = [word.format(tmp_path) for word in argv] + [text_file if "train.py" in argv else tmp_path / "new"]
    code, error = run_program(*argv, variables=dict([setting.split("=")]))
    assert code == 1 and not (tmp_path / "new").exists()
    assert_one_error(error, setting)


def test_a_platform_without_hardware(monkeypatch):
    """JAX's own error, an AssertionError, has no message."""
    import jax

    def fail():
        raise AssertionError

    monkeypatch.setattr(jax, "devices", fail)
    reason = backend_problem(ValueError("later"), {"JAX_PLATFORMS": "cuda", "PATH": "p", "JAX_LOG_COMPILES": "0"})
    assert "JAX_PLATFORMS=cuda" in reason and "JAX_LOG" not in reason and reason.rpartition(": ")[2]


def test_errors_of_a_working_jax_are_left_alone():
    assert backend_problem(ValueError("x")) is None


def test_names_that_are_not_utf8_in_files(tmp_path):
    """JSON gives back the name; output files show it escaped."""
    write_json(tmp_path / "a.json", {GBK: [GBK, "中\n"]})
    assert read_json_object(tmp_path / "a.json") == {GBK: [GBK, "中\n"]}
    assert json.loads((tmp_path / "a.json").read_bytes().decode("utf-8")) == {GBK: [GBK, "中\n"]}
    write_output(tmp_path / GBK, f"{GBK} 中")
    assert (tmp_path / GBK).read_text(encoding="utf-8") == f"{ESCAPED} 中"


def test_texts_in_files_whose_names_are_not_utf8(text_file, tmp_path):
    """The same shards as from a file with another name; then a training run."""
    (tmp_path / GBK).mkdir()
    named = tmp_path / GBK / f"{GBK}.txt"
    named.write_bytes(text_file.read_bytes())
    for source, output in ((text_file, "a"), (named.parent, "b")):
        argv = ["--input", str(source), "--output", str(tmp_path / output), *SIZES, "--workers", "1"]
        with contextlib.redirect_stdout(io.StringIO()):
            assert davae(["prepare", *argv]) == 0
    a, b = (read_json_object(tmp_path / name / "manifest.json")["shards"] for name in "ab")
    assert [shard["sha256"] for shard in a] == [shard["sha256"] for shard in b]
    assert [shard["file"] for shard in b] == [str(named)]


def test_folders_that_libraries_cannot_open(text_file, tmp_path, capsys):
    for argv in (
        ["prepare", "--input", str(text_file), "--output", str(tmp_path / GBK), *SIZES],
        ["convert", "tests/golden/small", str(tmp_path / GBK)],
    ):
        assert davae(argv) == 1 and not (tmp_path / GBK).exists()
        assert_one_error(capsys.readouterr().err, ESCAPED)
    with pytest.raises(InputError, match="not UTF-8"):
        check_path(tmp_path / GBK / "params")


def test_errors_of_writes_name_the_file(tmp_path):
    for error, number in ((OSError(28, "No space"), 28), (OSError("5 requested and 1 written"), 5)):
        with pytest.raises(OSError) as e, naming_file(tmp_path / "x"):
            raise error
        assert e.value.filename == str(tmp_path / "x") and e.value.errno == number
    with pytest.raises(FileNotFoundError) as e, atomic_write(tmp_path / "y"):
        (tmp_path / "other").read_bytes()
    assert e.value.filename == str(tmp_path / "other")


def test_temporary_files_that_cannot_be_written(tmp_path, monkeypatch):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    with pytest.raises(InputError, match=f"TMPDIR {tmp_path}: "), temporary_folder("x") as folder:
        raise OSError(28, "No space left on device")
    assert not folder.exists()
    with pytest.raises(FileNotFoundError), temporary_folder("x"):
        Path("/nonexistent").read_bytes()


def test_orbax_is_silent_in_the_background():
    """Other libraries' records of the same loggers are not."""
    for name in ("absl", "asyncio", None):
        with quiet_orbax():
            pass
        records = []
        handler = logging.Handler()
        handler.emit = records.append
        logger = logging.getLogger(name)
        logger.addHandler(handler)
        try:
            logger.error("Task exception was never retrieved: coro=<f() at /lib/orbax/checkpoint/x.py>")
            logger.handle(
                logging.LogRecord(name or "root", logging.ERROR, "/lib/orbax/checkpoint/y.py", 1, "failed", (), None)
            )
            logger.error("other")
        finally:
            logger.removeHandler(handler)
        assert [record.getMessage() for record in records] == ["other"]


@pytest.mark.parametrize("options", ["size=4k", "ro"])
def test_workers_without_shared_memory(options, text_file, tmp_path):
    folder = tmp_path / "disk"
    folder.mkdir()
    require_mount(folder)
    texts = text_file.read_bytes()
    files = [tmp_path / name for name in ("a.txt", "b.txt")]  # too large to share a shard, which one worker writes
    for file in files:
        file.write_bytes(texts * (600_000 // len(texts) + 1))
    fill = 'mount -t tmpfs -o "$1" tmpfs /dev/shm && shift; head -c 9000 /dev/zero 2>&- >/dev/shm/x; exec "$@"'
    argv = ["-m", "davae_jax.cli", "prepare", "--input", *files, *SIZES, "--output"]
    wrapper = ["unshare", "--mount", "bash", "-c", fill, "bash", options]
    code, error = run_program(*argv, tmp_path / "out", "--workers", 2, wrapper=wrapper)
    assert code == 1
    error = "".join(line for line in error.splitlines(True) if not line.startswith("bash: "))
    assert_one_error(error, "/dev/shm", "TMPDIR", "--workers")


@pytest.mark.slow
@pytest.mark.parametrize(("size", "named"), [("24k", "samples.jsonl"), ("80k", "checkpoints")])
def test_a_full_disk_during_training(size, named, text_file, tmp_path):
    """One line that names the file; on a larger disk, the run resumes from the last checkpoint."""
    disk, kept = tmp_path / "disk", tmp_path / "kept"
    disk.mkdir()
    require_mount(disk)
    steps = ["--steps", 24, "--log.checkpoint", 4, "--log.keep", 9]
    argv = ["train.py", "--data.train", text_file, *TINY, *steps, "--log.samples", 4]
    keep = f'"$@"; code=$?; cp -r {disk}/run {kept}; exit $code'
    wrapper = [*with_small_disk(disk, size), "bash", "-c", keep, "bash"]
    code, error = run_program(*argv, "--run-dir", disk / "run", wrapper=wrapper)
    assert code == 1
    assert_one_error(error, named)
    code, error = run_program(*argv, "--run-dir", kept)
    assert code == 0 and Path(kept / "checkpoints" / "24").is_dir(), error
