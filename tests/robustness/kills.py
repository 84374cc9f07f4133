"""Kill rounds: a program is killed before its n-th change of a file, or at a random moment, and started again.

The same command must then succeed and make what an undisturbed run makes; nothing is left beside it, and nothing else
has been changed.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
from pathlib import Path
from typing import Any

from cases import Workshop, changed_files, snapshot
from forks import run_forked, run_program
from ledger import Verdict
from programs import PROGRAMS, Program
from verdicts import Limits, Outcome, error_of, find_faults

LIMITS = Limits(seconds=240, memory=3 << 30)


def start(workshop: Workshop, program: Program, **options: Any) -> Outcome:
    """Runs the program in the case's folder."""
    options = {"logs": workshop.logs, "limits": LIMITS, "fence": workshop.folder} | options
    return run_program(program.argv, workshop.case, **options)


def fingerprint(workshop: Workshop, program: Program, folder: Path) -> dict[str, Any]:
    """Returns the fingerprint of a result, computed in a process of its own, because it may initialize JAX."""

    def work() -> None:
        print(json.dumps(program.fingerprint(folder)))

    outcome = run_forked(work, workshop.case, logs=workshop.logs, limits=LIMITS)
    try:
        return json.loads(outcome.out.splitlines()[-1])
    except (ValueError, IndexError):
        return {"unreadable": outcome.err[-400:]}


def undisturbed(workshop: Workshop, name: str) -> tuple[dict[str, Any], int, float]:
    """Returns the fingerprint, the number of changes of files and the time of a run that nobody disturbs.

    They are computed once in a ledger's folder.
    """
    program, file = PROGRAMS[name], workshop.folder.parent.parent / f"undisturbed-{name}.json"
    if not file.exists():
        prepare_folder(workshop, name)
        (workshop.logs / "events").unlink(missing_ok=True)
        outcome = start(workshop, program)
        if outcome.code:
            raise RuntimeError(f"{name} fails undisturbed: {outcome.err}")
        events = (workshop.logs / "events").read_bytes()
        number = int(events[:9]) + 1
        if program.expensive:  # what it compiles is cached now
            prepare_folder(workshop, name)
            outcome = start(workshop, program)
        made = fingerprint(workshop, program, workshop.case / "out")
        if "unreadable" in made:
            raise RuntimeError(f"{name}: {made}")
        part = file.with_suffix(f".{os.getpid()}")
        part.write_text(json.dumps([made, number, outcome.seconds]))
        part.replace(file)
    made, number, seconds = json.loads(file.read_text())
    return made, number, seconds


def prepare_folder(workshop: Workshop, name: str) -> None:
    """Makes the case's folder; for `overwrite` with an older checkpoint in the place of the result."""
    folder = workshop.empty()
    (folder / "foreign").mkdir()
    (folder / "foreign" / "mine.txt").write_text("mine")
    if name == "overwrite":
        shutil.copytree(workshop.sound / "model", folder / "out")


def run_kill_round(workshop: Workshop, name: str, number: int) -> Verdict:
    """Kills a program one to three times, starts it again, and compares what it has made."""
    case, program = f"kill/{name}/{number}", PROGRAMS[name]
    rng = workshop.rng(case)
    expected, events, duration = undisturbed(workshop, name)
    prepare_folder(workshop, name)
    before, kills, done, outcomes = snapshot(workshop.folder), 0, [], []
    for _ in range(rng.choice([1, 1, 2, 3])):
        options, what = _moment(rng, events, duration)
        outcome = start(workshop, program, **options)
        outcomes.append(outcome)
        done.append(what)
        if outcome.code != -signal.SIGKILL:
            break  # it had ended before
        kills += 1
    if outcomes[-1].code != 0:
        outcomes.append(start(workshop, program))
    # A kill after the last rename leaves a complete folder, which is compared as well.
    is_complete = outcomes[-1].code == 0 or (kills > 0 and "exists already" in outcomes[-1].err)
    faults = [] if is_complete else [f"does not succeed after the kill: {error_of(outcomes[-1])[:300]}"]
    for outcome in outcomes:
        if outcome.code is not None and outcome.code >= 0:
            faults += find_faults(outcome, [""], LIMITS)
    if not faults:
        made = fingerprint(workshop, program, workshop.case / "out")
        different = sorted(key for key in made.keys() | expected.keys() if made.get(key) != expected.get(key))
        faults += [
            f"differs: {key}: {str(made.get(key))[:100]}, not {str(expected.get(key))[:100]}" for key in different[:3]
        ]
    left = changed_files(before, workshop.folder, ["logs", "case"])
    left += [name for name in os.listdir(workshop.case) if name not in ("out", "foreign")]
    faults += [f"left or changed {name}" for name in left[:3]]
    faults += [] if (workshop.case / "foreign" / "mine.txt").read_text() == "mine" else ["a foreign file was changed"]
    longest = max((outcome.seconds for outcome in outcomes if outcome.code == 0), default=0.0)
    memory = max(outcome.memory for outcome in outcomes)
    verdict = "fault" if faults else "accepted"
    return Verdict(case, verdict, faults, "; ".join(done), error_of(outcomes[-1]), round(longest, 2), memory, kills)


def _moment(rng, events: int, duration: float) -> tuple[dict[str, Any], str]:
    """Returns when a program is to be killed: before a change of a file, or after some time."""
    if rng.random() < 0.7:
        n = rng.randrange(events)
        return {
            "on_event": lambda count: count == n and os.kill(os.getpid(), signal.SIGKILL)
        }, f"change {n} of {events}"
    after = rng.uniform(0, duration)
    return {"kill_after": after}, f"{after:.3f} of {duration:.3f} s"
