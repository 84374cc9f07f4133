"""Where standard error is no terminal, a program prints a line of progress now and then."""

import sys
import time
from pathlib import Path

import pytest

import davae_jax
from davae_jax.cli.base import run_cli
from davae_jax.utils import progress
from davae_jax.utils.progress import end_progress_lines, progress_bar

PACKAGE = Path(davae_jax.__file__).parent


def wait_for_lines(capsys, number: int) -> list[str]:
    """Returns the lines on standard error when there are so many, or after a while."""
    text, end = "", time.monotonic() + 20
    while text.count("\n") < number and time.monotonic() < end:
        time.sleep(0.01)
        text += capsys.readouterr().err
    return text.splitlines()


def test_lines_of_the_innermost_bar(capsys, monkeypatch):
    monkeypatch.setenv(progress.VARIABLE, "0.02")
    shown = []

    def work():
        shown.extend(wait_for_lines(capsys, 1)[:1])
        with progress_bar(total=3, desc="outer", unit="run"):
            with progress_bar(total=50, desc="inner", unit="text", disable=None) as bar:
                bar.update(20)
                capsys.readouterr()
                shown.append(wait_for_lines(capsys, 2)[1])
            capsys.readouterr()
            shown.append(wait_for_lines(capsys, 2)[1])
        end_progress_lines()

    assert run_cli(work, "davae x") == 0
    first, second, third = shown
    assert first.startswith("davae x: 0 s: working")
    assert ": inner: 20 of 50 text, " in second and ": outer: 0 of 3 run, " in third
    capsys.readouterr()
    time.sleep(0.1)
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("value", ["", "-1", "nan", "1e30", "often"])
def test_an_interval_that_is_none(value, capsys, monkeypatch):
    monkeypatch.setenv(progress.VARIABLE, value)
    assert run_cli(lambda: 0, "davae x") == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"davae x: error: DAVAE_PROGRESS_SECONDS={value}: must be a number of seconds")


def test_bars_without_lines_are_those_of_tqdm(capsys):
    with progress_bar(total=2, desc="shown", disable=False) as bar:
        bar.update()
    assert "shown" in capsys.readouterr().err
    with progress_bar(total=2) as bar:  # no terminal
        bar.update()
    assert capsys.readouterr().err == "" and sys.stderr is not None


def test_every_bar_is_shown_as_lines_too():
    files = [path for path in PACKAGE.rglob("*.py") if "tqdm(" in path.read_text(encoding="utf-8")]
    assert [path.name for path in files] == ["progress.py"]
