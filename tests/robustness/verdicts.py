"""Judges what a program or a reader did with an input: accepted, refused by one clear line, or a fault."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Sequence
from typing import NamedTuple

MIB = 1 << 20


class Limits(NamedTuple):
    seconds: float
    memory: int  # bytes


# What one input may take. Inputs are tiny; a program's memory includes what it imports (about 500 MiB).
READER_LIMITS = Limits(seconds=10, memory=512 * MIB)
PROGRAM_LIMITS = Limits(seconds=120, memory=2560 * MIB)

LONGEST_LINE = 5000  # characters of an error
# Lines on standard error besides the error.
OTHER_LINES = re.compile(r"[\w .-]+: warning: .*|--[\w.-]+ is now --[\w.-]+|interrupted after step .*|.*renamed to .*|")


class Outcome(NamedTuple):
    """What happened.

    Attributes:
      code: the exit code; negative: the signal that ended the program; None: it was ended at its time limit.
      err: what was written on standard error.
      seconds: the time that passed.
      memory: of a program, the largest size of its resident memory in bytes; of a reader, the growth of it.
      violations: files written outside of the folder, programs started, connections opened.
    """

    code: int | None
    err: str
    seconds: float = 0.0
    memory: int = 0
    violations: tuple[str, ...] = ()
    out: str = ""


def find_faults(outcome: Outcome, names: Sequence[str], limits: Limits) -> list[str]:
    """Returns what is wrong with an outcome, nothing if it is as promised.

    Args:
      names: words of which the error has to contain one, such as the file's name or the option.
    """
    faults = list(outcome.violations)
    if outcome.seconds > limits.seconds or outcome.code is None:
        faults.append(f"hang: {outcome.seconds:.1f} s")
    if outcome.memory > limits.memory:
        faults.append(f"memory: {outcome.memory >> 20} MiB")
    if "Traceback (most recent call last)" in outcome.err:
        faults.append("traceback")
    if outcome.code is None:
        return faults
    if outcome.code < 0:
        return [*faults, f"ended by signal {-outcome.code}"]
    lines = [line for line in outcome.err.split("\n") if not OTHER_LINES.fullmatch(line)]
    if outcome.code == 0:
        return faults + ([f"accepted, with a message: {lines[0][:200]}"] if lines else [])
    if "(--debug shows where)" in outcome.err:
        faults.append("an unexpected exception")
    if _is_framed(outcome):
        error = outcome.err
    else:
        if len(lines) != 1 or ": error: " not in lines[0]:
            faults.append(f"not one line of error, but {len(lines)}")
        elif any(unicodedata.category(char) in ("Cc", "Cs", "Zl", "Zp") for char in lines[0]):
            faults.append("an error with unprintable characters")
        elif len(lines[0]) > LONGEST_LINE:
            faults.append(f"an error of {len(lines[0])} characters")
        error = outcome.err.partition(": error: ")[2]
    if not any(name in error for name in names):
        faults.append("nameless")
    return faults


def _is_framed(outcome: Outcome) -> bool:
    """Returns whether tyro has printed the error, in a frame: an option that is unknown or cannot be read."""
    return outcome.code == 2 and "\u256d" in outcome.err


def error_of(outcome: Outcome) -> str:
    """Returns the error in one line, for the ledger."""
    line = " ".join(outcome.err.split())
    return line if len(line) <= 600 else f"{line[:300]} … {line[-300:]}"
