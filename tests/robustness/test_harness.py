"""Whether the harness sees faults that are planted."""

from __future__ import annotations

import os
import time
from pathlib import Path

import cases
import pytest
from cases import Workshop, run_readers
from forks import run_forked
from inputs import Family
from ledger import Ledger
from verdicts import PROGRAM_LIMITS, READER_LIMITS, Limits, Outcome, find_faults

from davae_jax.utils.errors import InputError

pytestmark = pytest.mark.robustness

# The verdicts.

ERROR = "davae x: error: a.txt: is damaged\n"


@pytest.mark.parametrize(
    ("outcome", "fault"),
    [
        (Outcome(0, ""), None),
        (Outcome(0, "davae x: warning: a.txt: line 3\n"), None),
        (Outcome(1, ERROR), None),
        (Outcome(1, f"davae x: warning: b\n{ERROR}"), None),
        (Outcome(2, "╭─ Parsing error ─╮\n│ a.txt │\n╰───╯\n"), None),
        (Outcome(1, "davae x: error: is damaged\n"), "nameless"),
        (Outcome(1, ""), "not one line"),
        (Outcome(1, ERROR + ERROR), "not one line"),
        (Outcome(1, "davae x: error: a.txt: KeyError: 3 (--debug shows where)\n"), "unexpected"),
        (Outcome(1, "davae x: error: a.txt: \x1b[31m\n"), "unprintable"),
        (Outcome(1, f"davae x: error: a.txt {'x' * 5000}\n"), "characters"),
        (Outcome(1, f"Traceback (most recent call last):\n{ERROR}"), "traceback"),
        (Outcome(0, "E0000 something\n"), "with a message"),
        (Outcome(-11, ""), "signal 11"),
        (Outcome(None, "", 200.0), "hang"),
        (Outcome(0, "", 200.0), "hang"),
        (Outcome(0, "", 1.0, 9 << 30), "memory"),
        (Outcome(0, "", violations=("outside: open '/x'",)), "outside"),
    ],
)
def test_verdicts(outcome, fault):
    faults = find_faults(outcome, ["a.txt"], PROGRAM_LIMITS)
    assert faults == [] if fault is None else any(fault in found for found in faults)


# Planted faults.


def raise_key_error(folder, file):
    raise KeyError("x")


def raise_nameless(folder, file):
    raise InputError("is damaged")


def raise_clearly(folder, file):
    raise InputError(f"{file}: is damaged")


def allocate(folder, file):
    return len(b"x" * (READER_LIMITS.memory + (100 << 20)))


def write_beside(folder, file):
    Path("left.txt").write_text("x")


def write_outside(folder, file):
    Path("/var/tmp/davae-robustness").touch()
    Path("/var/tmp/davae-robustness").unlink()


def start_a_program(folder, file):
    os.system("true")


def crash(folder, file):
    if file.read_bytes() != b"sound" * 9:  # the sound file is read first
        os.abort()


def hang(folder, file):
    if file.read_bytes() != b"sound" * 9:
        time.sleep(1000)


def read(folder, file):
    return file.read_bytes()


@pytest.mark.parametrize(
    ("reader", "fault"),
    [
        (raise_clearly, None),
        (raise_key_error, "unexpected"),
        (raise_nameless, "nameless"),
        (allocate, "memory"),
        (write_beside, "left.txt"),
        (write_outside, "outside"),
        (start_a_program, "code"),
        (crash, "ended by -6"),
        (hang, "hang"),
        (read, "silent damage"),
    ],
)
def test_planted_faults_are_seen(reader, fault, tmp_path, monkeypatch):
    (tmp_path / "sound" / "planted").mkdir(parents=True)
    (tmp_path / "sound" / "planted" / "a.txt").write_bytes(b"sound" * 9)

    def whole(folder, file):  # the sound file is read without a fault
        is_sound = reader not in (read, crash, hang) and file.read_bytes() == b"sound" * 9
        return None if is_sound else reader(folder, file)

    family = Family("planted", ("a.txt",), "bytes", whole, has_sums=reader is read)
    monkeypatch.setattr(cases, "FAMILIES", {"planted": family})
    monkeypatch.setattr(cases, "READER_LIMITS", READER_LIMITS._replace(seconds=0.5))
    ledger = Ledger(tmp_path / "ledger.jsonl")
    run_readers(Workshop(tmp_path / "work", tmp_path / "sound", 0), "planted", range(3), ledger, tmp_path / "failures")
    verdicts = list(ledger.read())
    assert [verdict.case for verdict in verdicts] == [f"reader/planted/{n}" for n in range(3)]
    if fault is None:
        assert all(verdict.verdict == "refused" and not verdict.faults for verdict in verdicts)
    else:
        assert all(any(fault in found for found in verdict.faults) for verdict in verdicts), verdicts


def test_a_program_is_killed_before_a_change(tmp_path):
    """Before the third change, the first two have been made; a program that takes too long is ended."""
    folder, logs = tmp_path / "a", tmp_path / "logs"
    folder.mkdir()
    logs.mkdir()

    def work():
        for n in range(4):
            Path(f"{n}").touch()

    outcome = run_forked(work, folder, logs=logs, on_event=lambda count: count == 2 and os.kill(os.getpid(), 9))
    assert outcome.code == -9 and sorted(os.listdir(folder)) == ["0", "1"]
    limits = Limits(seconds=0.3, memory=1 << 40)
    outcome = run_forked(lambda: time.sleep(60), folder, logs=logs, limits=limits)
    assert outcome.code is None and outcome.seconds < 30
