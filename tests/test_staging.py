"""Folders that appear complete or not at all, and locks: nothing that another program or the user made is lost."""

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
from pathlib import Path
from zlib import crc32

import pytest

from davae_jax.checkpoints.staging import staged_folder
from davae_jax.checkpoints.sums import write_sums
from davae_jax.utils import locks
from davae_jax.utils.errors import InputError
from davae_jax.utils.locks import FolderLock

ROOT = Path(__file__).parent.parent


def write(dst, text="new", **options):
    with staged_folder(dst, **{"overwrite": False} | options) as staging:
        (staging / "config.json").write_text(text, encoding="utf-8")


def contents(folder):
    return {path.name: path.read_text(encoding="utf-8") for path in folder.iterdir() if path.is_file()}


def test_a_folder_that_appears_meanwhile_is_left(tmp_path):
    dst = tmp_path / "dst"
    with pytest.raises(InputError, match="another program") as e, staged_folder(dst, overwrite=False) as staging:
        (staging / "config.json").touch()
        dst.mkdir()
        (dst / "mine.txt").write_text("mine", encoding="utf-8")
    assert str(e.value).startswith(f"{dst}: ") and contents(dst) == {"mine.txt": "mine"}
    assert [path.name for path in tmp_path.iterdir()] == ["dst"]


def test_a_folder_that_is_exchanged_meanwhile_is_left(tmp_path):
    dst = tmp_path / "dst"
    write(dst, "old")
    with pytest.raises(InputError, match="another program"), staged_folder(dst, overwrite=True) as staging:
        (staging / "config.json").touch()
        dst.rename(tmp_path / "moved")
        dst.mkdir()
        (dst / "mine.txt").write_text("mine", encoding="utf-8")
    assert contents(dst) == {"mine.txt": "mine"} and contents(tmp_path / "moved") == {"config.json": "old"}


@pytest.mark.parametrize("name", ["checkpoints", "train.json", "thesis.tex", "init", "runs", ".git"])
def test_what_is_not_of_a_model_is_never_removed(name, tmp_path):
    dst = tmp_path / "dst"
    write(dst, "old")
    (dst / name).mkdir()
    (dst / name / "mine.txt").write_text("mine", encoding="utf-8")
    with pytest.raises(InputError) as e:
        write(dst, overwrite=True)
    assert str(e.value).startswith(f"{dst / name}: ")
    assert contents(dst) == {"config.json": "old"} and contents(dst / name) == {"mine.txt": "mine"}


@pytest.mark.parametrize("name", ["params/mine/notes.txt", "params/a.yaml", "vocab.txt/notes.txt"])
def test_folders_of_the_user_with_a_name_of_a_model_are_never_removed(name, tmp_path):
    dst = tmp_path / "dst"
    write(dst, "old")
    (dst / name).parent.mkdir(parents=True)
    (dst / name).write_text("mine", encoding="utf-8")
    with pytest.raises(InputError, match="would be removed") as e:
        write(dst, overwrite=True)
    assert str(e.value).startswith(str(dst / name.removesuffix("/notes.txt")))
    assert (dst / name).read_text(encoding="utf-8") == "mine" and contents(dst)["config.json"] == "old"


def test_a_file_of_the_user_beside_the_parameters_is_never_removed(tmp_path):
    dst = tmp_path / "dst"
    with staged_folder(dst, overwrite=False) as staging:
        (staging / "config.json").touch()
        (staging / "params").mkdir()
        (staging / "params" / "_METADATA").touch()
        write_sums(staging / "params", {})
    (dst / "params" / "mine.txt").write_text("mine", encoding="utf-8")
    with pytest.raises(InputError) as e:
        write(dst, overwrite=True)
    assert str(e.value).startswith(f"{dst / 'params' / 'mine.txt'}: would be removed")
    (dst / "params" / "mine.txt").unlink()
    (dst / "params" / "sums.json").write_text("damaged")  # damaged parameters can be replaced
    write(dst, overwrite=True)
    assert contents(dst) == {"config.json": "new"}


def test_a_folder_that_cannot_be_removed_is_refused_before_the_work(tmp_path, monkeypatch):
    """One of another user in a folder that all may write to: it would be left under a hidden name."""
    write(tmp_path / "dst", "old")
    monkeypatch.setattr(os, "access", lambda path, mode: Path(path) != tmp_path / "dst")
    with pytest.raises(InputError, match="cannot be removed"), staged_folder(tmp_path / "dst", overwrite=True):
        raise AssertionError("work has begun")
    assert contents(tmp_path / "dst") == {"config.json": "old"}


@pytest.mark.parametrize("dst", ["loop", "loop/x"])
def test_links_in_a_loop(dst, tmp_path):
    (tmp_path / "loop").symlink_to("pool")
    (tmp_path / "pool").symlink_to("loop")
    with pytest.raises(InputError) as e:
        write(tmp_path / dst)
    assert str(e.value) == f"{tmp_path / dst}: Too many levels of symbolic links"


def test_an_interrupt_while_the_old_folder_is_removed(tmp_path, monkeypatch):
    dst = tmp_path / "dst"
    write(dst, "old")
    rmtree = shutil.rmtree

    def interrupted(*args, **options):
        signal.raise_signal(signal.SIGINT)
        rmtree(*args, **options)

    monkeypatch.setattr(shutil, "rmtree", interrupted)
    with pytest.raises(KeyboardInterrupt):
        write(dst, overwrite=True)
    assert contents(dst) == {"config.json": "new"} and list(tmp_path.iterdir()) == [dst]


def test_what_was_added_meanwhile_is_not_removed(tmp_path):
    dst = tmp_path / "dst"
    write(dst, "old")
    with pytest.raises(InputError, match=r"mine\.txt"), staged_folder(dst, overwrite=True) as staging:
        (staging / "config.json").touch()
        (dst / "mine.txt").write_text("mine", encoding="utf-8")
    assert contents(dst) == {"config.json": "old", "mine.txt": "mine"}


def test_a_link_is_followed(tmp_path):
    write(tmp_path / "real", "old")
    (tmp_path / "link").symlink_to("real")
    write(tmp_path / "link", overwrite=True)
    assert (tmp_path / "link").is_symlink() and contents(tmp_path / "real") == {"config.json": "new"}


def test_a_name_of_255_bytes(tmp_path):
    write(tmp_path / ("n" * 255))
    assert contents(tmp_path / ("n" * 255)) == {"config.json": "new"}


def leftovers(folder, name, kind):
    host = crc32(socket.gethostname().encode())
    path = folder / f".{crc32(name.encode()):08x}.{host:08x}.{kind}-0123abcd"
    path.mkdir()
    (path / "config.json").write_text("left", encoding="utf-8")
    return path


def test_what_killed_programs_left_is_removed(tmp_path):
    left, foreign = leftovers(tmp_path, "dst", "partial"), leftovers(tmp_path, "other", "partial")
    with FolderLock() as lock:
        lock.acquire(left)  # a program that still runs
        write(tmp_path / "dst")
        assert left.exists()
    write(tmp_path / "dst", overwrite=True)
    assert not left.exists() and foreign.exists()


@pytest.mark.parametrize("dst", [".", "", "../here", "./"])
def test_the_working_folder_itself(dst, tmp_path, monkeypatch):
    here, beside = tmp_path / "here", tmp_path / "beside"
    for folder in (here, beside):
        folder.mkdir()
        (folder / "config.json").write_text("old", encoding="utf-8")
    monkeypatch.chdir(here)
    write(Path(dst), overwrite=True)
    monkeypatch.chdir(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["beside", "here"]
    assert contents(here) == {"config.json": "new"} and contents(beside) == {"config.json": "old"}


def test_a_file_is_not_replaced(tmp_path):
    (tmp_path / "dst").write_text("mine", encoding="utf-8")
    with pytest.raises(InputError, match="is a file"):
        write(tmp_path / "dst", overwrite=True)
    assert contents(tmp_path) == {"dst": "mine"}


@pytest.mark.parametrize("name", ["a[b]", "a*", "a?", "a\\b", "gs:", "ags:"])
def test_a_path_that_orbax_cannot_read_is_refused(name, tmp_path):
    with pytest.raises(InputError, match="choose another folder"):
        write(tmp_path / name / "dst")
    assert list(tmp_path.iterdir()) == []


def test_a_place_where_a_disk_is_mounted_is_refused_before_the_work(tmp_path, monkeypatch):
    """It can be neither renamed nor replaced, which would be noticed when the work is done."""
    dst = tmp_path / "dst"
    dst.mkdir()
    monkeypatch.setattr(os.path, "ismount", lambda path: Path(path) == dst)
    with pytest.raises(InputError) as e, staged_folder(dst, overwrite=True):
        raise AssertionError("begun")
    assert str(e.value).startswith(f"{dst}: is a mount point")
    write(dst / "in it")


def test_without_locks_nothing_of_another_program_is_removed(tmp_path, monkeypatch):
    monkeypatch.setattr(locks, "fcntl", None)
    left = leftovers(tmp_path, "dst", "partial")
    write(tmp_path / "dst")
    assert left.exists()


def test_after_a_kill_between_the_two_renames_the_same_command_succeeds(tmp_path):
    leftovers(tmp_path, "dst", "old")
    write(tmp_path / "dst", overwrite=True)
    assert contents(tmp_path / "dst") == {"config.json": "new"}
    assert [path.name for path in tmp_path.iterdir()] == ["dst"]


def test_a_kill_between_the_two_renames_loses_nothing(tmp_path):
    """The old folder has been set aside, and the new one is not yet in its place."""
    leftovers(tmp_path, "dst", "old")
    with pytest.raises(RuntimeError), staged_folder(tmp_path / "dst", overwrite=True):
        raise RuntimeError
    assert contents(tmp_path / "dst") == {"config.json": "left"}
    assert [path.name for path in tmp_path.iterdir()] == ["dst"]


HOLD = """
import sys, time
from pathlib import Path
from davae_jax.utils.locks import FolderLock
lock = FolderLock()
lock.acquire(Path(sys.argv[1]))
print("locked", flush=True)
time.sleep(600)
"""


def test_a_lock_ends_with_its_process(tmp_path):
    process = subprocess.Popen([sys.executable, "-c", HOLD, tmp_path], cwd=ROOT, stdout=subprocess.PIPE)
    try:
        process.stdout.readline()
        with pytest.raises(InputError, match="another program is writing") as e:
            FolderLock().acquire(tmp_path)
        assert str(e.value).startswith(f"{tmp_path}: ")
    finally:
        process.kill()
        process.wait()
    with FolderLock() as lock:
        lock.acquire(tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_two_preparations_of_one_folder(tmp_path):
    from davae_jax.cli.main import main

    (tmp_path / "texts.txt").write_text("".join(f"第{i}句。\n" for i in range(100)), encoding="utf-8")
    out = tmp_path / "out"
    out.mkdir()
    argv = ["prepare", "--input", tmp_path / "texts.txt", "--output", out, "--workers", 1, "--shard-size", 1]
    argv = [*map(str, argv), "--decoder-vocab-size", "60", "--encoder-vocab-size", "60"]
    with FolderLock() as lock:
        lock.acquire(out)
        assert main(argv) == 1
    assert list(out.iterdir()) == []
    assert main(argv) == 0
    assert json.loads((out / "manifest.json").read_text(encoding="utf-8"))["counts"]["texts"] > 90
