"""A training program starts itself anew once, with the settings of the memory allocator."""

import os
import platform
import subprocess
import sys
from pathlib import Path

import pytest

from davae_jax.cli import main as program
from davae_jax.utils import huge_pages

PROGRAM = """
import os, sys
from davae_jax.utils.huge_pages import SETTINGS, restart_with_huge_pages
print("start", os.getpid(), flush=True)
restart_with_huge_pages()
print(sys.argv[1:], {name: os.environ.get(name) for name in SETTINGS})
"""


def output_of(tmp_path, **changes):
    """Returns the lines that the program prints."""
    (tmp_path / "program.py").write_text(PROGRAM, encoding="utf-8")
    env = {name: value for name, value in os.environ.items() if name not in huge_pages.SETTINGS} | changes
    command = [sys.executable, "-X", "utf8", tmp_path / "program.py", "a b", "中"]
    run = dict(cwd=Path(__file__).parent.parent, capture_output=True, text=True, check=True)
    return subprocess.run(command, env=env | {"PYTHONPATH": "."}, **run).stdout.splitlines()


@pytest.fixture
def has_huge_pages():
    path = huge_pages.TRANSPARENT_HUGE_PAGES
    if platform.libc_ver()[0] != "glibc" or not path.exists() or "[never]" in path.read_text(encoding="ascii"):
        pytest.skip("no glibc, or no transparent huge pages")


def test_it_starts_anew_once(tmp_path, has_huge_pages):
    first, second, rest = output_of(tmp_path)
    assert first == second  # the same process, so that signals reach it
    assert rest == f"{['a b', '中']} {huge_pages.SETTINGS}"


def test_it_starts_anew_once_even_if_the_environment_is_lost(has_huge_pages, monkeypatch):
    """As on a system that does not trust the environment."""
    monkeypatch.setattr(huge_pages.sys, "_xoptions", {huge_pages.RESTARTED: True})
    monkeypatch.setattr(os, "execve", lambda *_: pytest.fail("started anew"))
    for name in huge_pages.SETTINGS:
        monkeypatch.delenv(name, raising=False)
    huge_pages.restart_with_huge_pages()


@pytest.mark.parametrize("name", huge_pages.SETTINGS)
def test_settings_of_the_user_are_kept(tmp_path, name):
    _, rest = output_of(tmp_path, **{name: ""})
    assert rest.endswith(str(dict.fromkeys(huge_pages.SETTINGS) | {name: ""}))


@pytest.mark.parametrize("state", ["always madvise [never]", None])
def test_a_kernel_without_huge_pages(tmp_path, monkeypatch, state):
    path = tmp_path / "enabled"
    if state is not None:
        path.write_text(state, encoding="ascii")
    monkeypatch.setattr(huge_pages, "TRANSPARENT_HUGE_PAGES", path)
    for name in huge_pages.SETTINGS:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(os, "execve", lambda *_: pytest.fail("started anew"))
    huge_pages.restart_with_huge_pages()


@pytest.mark.parametrize(("argv", "restarts"), [(["train", "--steps", "3"], 1), (["sample"], 0), ([], 0)])
def test_davae_train_starts_anew_as_train_py_does(argv, restarts, monkeypatch):
    calls = []
    monkeypatch.setattr(sys, "argv", ["davae", *argv])
    monkeypatch.setattr(program, "restart_with_huge_pages", lambda: calls.append("restart"))
    monkeypatch.setattr(program, "exit_with", lambda main: calls.append(main))
    program.script()
    assert calls == ["restart"] * restarts + [program.main]
