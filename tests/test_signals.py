"""Signals: as KeyboardInterrupt, and as a request to stop."""

import ast
import signal
import time
from pathlib import Path

import pytest

from davae_jax.utils import signals
from davae_jax.utils.signals import (
    INTERRUPTED,
    SIGNALS,
    StopRequest,
    importing,
    interrupt_at_end,
    interrupt_on_signals,
)

ROOT = Path(__file__).parent.parent
PROGRAMS = [path for path in sorted((ROOT / "convert").glob("*.py")) if path.name != "__init__.py"]


@pytest.fixture(autouse=True)
def handlers_are_restored():
    """None of the signals is ignored, though the tests may run under `nohup`, which ignores SIGHUP, or as a job in a
    shell's background, which ignores SIGINT.
    """
    inherited = [signal.getsignal(number) for number in SIGNALS]
    signal.signal(signal.SIGINT, signal.default_int_handler)
    for number in SIGNALS[1:]:
        signal.signal(number, signal.SIG_DFL)
    before = [signal.getsignal(number) for number in SIGNALS]
    yield
    assert [signal.getsignal(number) for number in SIGNALS] == before
    for number, handler in zip(SIGNALS, inherited, strict=True):
        signal.signal(number, handler)


@pytest.mark.parametrize("number", SIGNALS)
def test_a_signal_is_an_interrupt(number):
    with pytest.raises(KeyboardInterrupt), interrupt_on_signals():
        signal.raise_signal(number)


def test_an_interrupt_while_modules_are_imported(capsys):
    with pytest.raises(SystemExit) as e, importing("train.py"):
        signal.raise_signal(signal.SIGINT)
    assert e.value.code == INTERRUPTED and capsys.readouterr().err == "train.py: interrupted\n"


@pytest.mark.parametrize("program", ["train.py", "davae_jax/cli/main.py", *(f"convert/{p.name}" for p in PROGRAMS)])
def test_programs_import_other_modules_where_an_interrupt_is_reported(program):
    """Before that, only a module that imports the standard library."""
    imports = [node for node in ast.parse((ROOT / program).read_text()).body if isinstance(node, ast.ImportFrom)]
    assert [node.module for node in imports if node.module != "__future__"] == ["davae_jax.utils.signals"]


def test_an_error_that_a_library_makes_of_an_interrupt():
    with pytest.raises(KeyboardInterrupt), interrupt_on_signals():
        try:
            signal.raise_signal(signal.SIGTERM)
        except KeyboardInterrupt:
            raise RuntimeError("aborted") from None
    with pytest.raises(RuntimeError, match="no signal"), interrupt_on_signals():
        raise RuntimeError("no signal")


def test_the_first_signal_asks_for_a_stop_and_a_later_one_interrupts(monkeypatch):
    monkeypatch.setattr(signals, "SAME_SIGNAL_SECONDS", 0.2)
    with StopRequest() as stop:
        assert not stop.requested
        signal.raise_signal(signal.SIGTERM)
        assert stop.requested
        signal.raise_signal(signal.SIGINT)  # the same one, sent to the process as well
        time.sleep(0.3)
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)


def test_a_signal_that_is_ignored_stays_so():
    """As under `nohup`, which lets a program go on when its terminal is closed."""
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with StopRequest() as stop, interrupt_on_signals():
            signal.raise_signal(signal.SIGHUP)
            assert not stop.requested
    finally:
        signal.signal(signal.SIGHUP, before)


def test_the_same_signal_again_does_not_interrupt_the_clean_up(monkeypatch):
    monkeypatch.setattr(signals, "SAME_SIGNAL_SECONDS", 0.2)
    removed = []
    with pytest.raises(KeyboardInterrupt), interrupt_on_signals():
        try:
            with interrupt_at_end():
                signal.raise_signal(signal.SIGINT)
        finally:
            signal.raise_signal(signal.SIGTERM)
            removed.append(True)
            time.sleep(0.3)
            with pytest.raises(KeyboardInterrupt):  # somebody insists
                signal.raise_signal(signal.SIGTERM)
    assert removed == [True]


@pytest.mark.parametrize("number", SIGNALS)
def test_an_interrupt_at_the_end_of_a_block(number):
    done = []
    with pytest.raises(KeyboardInterrupt), interrupt_on_signals(), interrupt_at_end():
        signal.raise_signal(number)
        done.append(True)
    assert done == [True]
    with interrupt_at_end():
        done.append(True)
    assert len(done) == 2
