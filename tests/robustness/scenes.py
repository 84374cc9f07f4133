"""Full disks, read-only folders, files that change under a program, two of everything on one folder."""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import threading
import time
import traceback
from collections.abc import Callable
from pathlib import Path

from cases import Workshop, changed_files, snapshot
from disks import NotPermitted, enlarge, enter_private_namespace, make_read_only, mount_small_disk
from forks import run_forked
from inputs import RUN_OPTIONS
from kills import LIMITS, fingerprint, prepare_folder, start, undisturbed
from ledger import Verdict
from programs import PROGRAMS, Program, fingerprint_bytes
from verdicts import MIB, Limits, Outcome, error_of, find_faults

Scene = Callable[[Workshop, str, random.Random], tuple[list[str], str, list[Outcome]]]
CHEAP = ["convert", "export", "warm-start", "prepare", "overwrite"]
ALL = [*CHEAP, "train"]


def full_disk(workshop: Workshop, name: str, rng: random.Random) -> tuple[list[str], str, list[Outcome]]:
    """The disk is too small; then there is room, and the same command succeeds."""
    program = PROGRAMS[name]
    expected, _, _ = undisturbed(workshop, name)
    needed = _size(workshop.sound / "model") if name == "overwrite" else 0
    prepare_folder(workshop, name)
    disk = workshop.case / "disk"
    disk.mkdir()
    old = workshop.case / "out"
    size = needed + int(rng.choice([0, 4096, 16384, 65536, 131072, 262144]) * rng.uniform(0.5, 1)) // 4096 * 4096 + 8192
    mount_small_disk(disk, size)
    if old.exists():
        shutil.copytree(old, disk / "out")
        shutil.rmtree(old)
    on_disk = _at(program, "disk/out")
    before = snapshot(disk)
    full = start(workshop, on_disk)
    faults, done = [], f"{size} bytes"
    if full.code != 0:
        faults += find_faults(full, ["disk", "standard output"], LIMITS)
        if name in ("convert", "export", "warm-start", "overwrite"):
            faults += [f"left {x}" for x in changed_files(before, disk, ["nothing"])[:3]]
    else:
        done += ", enough"
    enlarge(disk, 256 * MIB)
    again = start(workshop, on_disk) if full.code != 0 else full
    faults += _same(workshop, on_disk, again, expected, workshop.case / "disk" / "out")
    faults += [f"left {x}" for x in os.listdir(disk) if x != "out"]
    return faults, done, [full, again]


def read_only_output(workshop: Workshop, name: str, rng: random.Random) -> tuple[list[str], str, list[Outcome]]:
    """The result's folder, or the one above it, cannot be written."""
    prepare_folder(workshop, name)
    folder = workshop.case / "kept"
    folder.mkdir()
    (folder / "mine.txt").write_text("mine")
    is_target = rng.random() < 0.5 and name != "overwrite"
    (folder / "out").mkdir() if is_target else None
    before = snapshot(folder)
    make_read_only(folder)
    outcome = start(workshop, _at(PROGRAMS[name], "kept/out"))
    faults = find_faults(outcome, ["kept"], LIMITS) + ([] if outcome.code else ["accepted"])
    return faults + [f"changed {x}" for x in changed_files(before, folder, ["nothing"])], "", [outcome]


def read_only_inputs(workshop: Workshop, name: str, rng: random.Random) -> tuple[list[str], str, list[Outcome]]:
    """What is read cannot be written: nothing is different."""
    expected, _, _ = undisturbed(workshop, name)
    prepare_folder(workshop, name)
    for path in workshop.folder.iterdir():
        if path.is_dir() and path not in (workshop.case, workshop.logs):
            make_read_only(path)
    outcome = start(workshop, PROGRAMS[name])
    return _same(workshop, PROGRAMS[name], outcome, expected), "", [outcome]


def text_changed_meanwhile(workshop: Workshop, name: str, rng: random.Random) -> tuple[list[str], str, list[Outcome]]:
    """A file that is read changes at a random moment: the program succeeds, or refuses by name."""
    program = PROGRAMS[name]
    _, events, _ = undisturbed(workshop, name)
    prepare_folder(workshop, name)
    files = {"convert": "bin/pytorch_model.bin", "overwrite": "safetensors/model.safetensors"}
    file = workshop.folder / files.get(name, "texts/a.txt")
    n, change = rng.randrange(events), rng.choice([_append, _truncate, _replace, _remove])

    def on_event(count: int) -> None:
        if count == n:
            change(file)

    outcome = start(workshop, program, on_event=on_event)
    faults = find_faults(outcome, [file.name, str(file.parent.name), "out"], LIMITS)
    return faults, f"{change.__name__} {file.name} at change {n} of {events}", [outcome]


def texts_changed_between(workshop: Workshop, name: str, rng: random.Random) -> tuple[list[str], str, list[Outcome]]:
    """A stopped run is continued after its texts, vocabulary or prepared folder have changed: refused by name."""
    what = rng.choice(["texts", "prepared", "vocabulary", "prepared vocabulary"])
    prepare_folder(workshop, "train")
    data = "../prepared" if "prepared" in what else "../texts/a.txt"
    argv = ("train", "--data.train", data, "--run-dir", "out", *RUN_OPTIONS)
    argv += () if "prepared" in what else ("--tokenizers", "../model")
    program = Program(argv, fingerprint_bytes)
    first = start(workshop, program)
    if first.code:
        raise RuntimeError(first.err)
    longer = program._replace(
        argv=tuple("4" if word == "2" and argv[i - 1] == "--steps" else word for i, word in enumerate(argv))
    )
    before = snapshot(workshop.case / "out")
    match what:
        case "texts":
            rng.choice([_append, _truncate, _replace])(workshop.folder / "texts" / "a.txt")
        case "prepared":
            file = rng.choice(sorted((workshop.folder / "prepared").glob("*.arrayrecord")))
            rng.choice([_append, _truncate, _remove])(file)
        case "vocabulary":
            _append(workshop.folder / "model" / "vocab.txt")
        case _:
            _append(workshop.folder / "prepared" / "vocab.txt")
    outcome = start(workshop, longer)
    faults = find_faults(outcome, ["--run-dir", "--data.train", "prepared", "vocab.txt", "a.txt"], LIMITS)
    faults += [] if outcome.code else ["accepted"]
    faults += [f"changed {x}" for x in changed_files(before, workshop.case / "out", ["train.json"])]
    return faults, what, [first, outcome]


def two_at_once(workshop: Workshop, name: str, rng: random.Random) -> tuple[list[str], str, list[Outcome]]:
    """The same command twice at the same time: one result, whole; whoever refuses says so in one line."""
    program = PROGRAMS[name]
    expected, _, duration = undisturbed(workshop, name)
    prepare_folder(workshop, name)
    delay = rng.choice([0.0, rng.uniform(0, duration)])
    logs = [workshop.logs / "first", workshop.logs / "second"]
    outcomes: list[Outcome | None] = [None, None]

    def run(i: int) -> None:
        time.sleep(delay * i)
        outcomes[i] = start(workshop, program, logs=logs[i])

    for folder in logs:
        folder.mkdir(exist_ok=True)
    threads = [threading.Thread(target=run, args=(i,)) for i in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    faults = []
    for outcome in outcomes:
        faults += find_faults(outcome, ["out"], LIMITS)
    winners = [outcome for outcome in outcomes if outcome.code == 0]
    faults += [] if winners else ["both are refused"]
    if winners:
        faults += _same(workshop, program, winners[0], expected)
    faults += [f"left {x}" for x in os.listdir(workshop.case) if x not in ("out", "foreign")]
    return faults, f"{len(winners)} succeeded, {delay:.2f} s apart", outcomes


def stopped_and_continued(workshop: Workshop, name: str, rng: random.Random) -> tuple[list[str], str, list[Outcome]]:
    """A program is stopped (SIGSTOP) and goes on a second later: nothing is different."""
    program = PROGRAMS[name]
    expected, events, _ = undisturbed(workshop, name)
    prepare_folder(workshop, name)
    n = rng.randrange(events)

    def on_event(count: int) -> None:
        if count == n and os.fork() == 0:  # a child continues it
            time.sleep(1)
            os.kill(os.getppid(), signal.SIGCONT)
            os._exit(0)
        elif count == n:
            os.kill(os.getpid(), signal.SIGSTOP)

    outcome = start(workshop, program, on_event=on_event)
    return _same(workshop, program, outcome, expected), f"at change {n} of {events}", [outcome]


SCENES: dict[str, tuple[Scene, list[str]]] = {
    "full disk": (full_disk, ALL),
    "read-only output": (read_only_output, ALL),
    "read-only inputs": (read_only_inputs, ALL),
    "changed meanwhile": (text_changed_meanwhile, ["convert", "overwrite", "prepare", "train"]),
    "changed between": (texts_changed_between, ["train"]),
    "two at once": (two_at_once, ALL),
    "stopped and continued": (stopped_and_continued, ALL),
}
# Tests of several processes that train one model: one is killed, stopped, slow, or signalled.
PROCESSES = [
    *[f"test_a_lost_process_ends_the_others[{what}]" for what in ("kill", "kill0", "stop")],
    "test_a_slow_process_changes_nothing",
    "test_a_stopped_and_killed_run_is_the_same_run",
    "test_a_signal_to_one_process_stops_all",
]
SCENE_LIMITS = Limits(seconds=900, memory=4 << 30)


def run_scene(workshop: Workshop, name: str, number: int) -> Verdict:
    """Plays a scene with one of its programs, in a forked process with mounts of its own."""
    case = f"scene/{name}/{number}"
    scene, programs = SCENES[name]
    program = programs[number % len(programs)]
    logs = workshop.logs / "scene"
    logs.mkdir(exist_ok=True)
    undisturbed(workshop, program)  # outside of the namespace

    def work() -> None:
        try:
            enter_private_namespace()
            faults, done, outcomes = scene(workshop, program, workshop.rng(case))
        except NotPermitted as e:
            print(json.dumps({"not run": str(e)}))
            return
        except Exception:
            print(json.dumps({"broken": traceback.format_exc()}))
            return
        last = outcomes[-1]
        error = " / ".join(error_of(outcome) for outcome in outcomes if outcome.err)
        values = dict(faults=faults, done=done, error=error[:1000], refused=last.code != 0)
        values |= dict(seconds=max(o.seconds for o in outcomes), memory=max(o.memory for o in outcomes))
        print(json.dumps(values))

    outcome = run_forked(work, workshop.empty(), logs=logs, limits=SCENE_LIMITS, fence=workshop.folder.parent)
    try:
        values = json.loads(outcome.out.splitlines()[-1])
    except (ValueError, IndexError):
        values = {"broken": f"{outcome.code} {outcome.err[-1000:]}"}
    if "not run" in values:
        return Verdict(case, "not run", [], program, values["not run"])
    if "broken" in values:
        raise RuntimeError(f"{case}: {values['broken']}")
    verdict = "fault" if values["faults"] else "refused" if values.pop("refused") else "accepted"
    done = f"{program}: {values['done']}"
    return Verdict(
        case, verdict, values["faults"], done, values["error"], round(values["seconds"], 2), values["memory"]
    )


def run_test_of_processes(number: int) -> Verdict:
    """Runs one of PROCESSES, in processes that are not forked."""
    tests = Path(__file__).parent.parent
    begin = time.monotonic()
    argv = [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "-n",
        "0",
        "-m",
        "",
        f"{tests}/test_processes.py::{PROCESSES[number]}",
    ]
    done = subprocess.run(argv, cwd=tests.parent, capture_output=True, text=True)
    faults = [] if done.returncode == 0 else [f"pytest ended with {done.returncode}"]
    error = "" if not faults else done.stdout[-600:]
    seconds = round(time.monotonic() - begin, 1)
    verdict = "fault" if faults else "accepted"
    return Verdict(f"scene/several processes/{number}", verdict, faults, PROCESSES[number], error, seconds)


def _same(workshop, program: Program, outcome: Outcome, expected: dict, folder: Path | None = None) -> list[str]:
    """Returns in what a result differs from that of an undisturbed run."""
    if outcome.code != 0:
        return [f"does not succeed: {error_of(outcome)[:300]}"]
    faults = find_faults(outcome, [""], LIMITS)
    made = fingerprint(workshop, program, folder or workshop.case / "out")
    different = sorted(key for key in made.keys() | expected.keys() if made.get(key) != expected.get(key))
    return faults + [f"differs: {key}: {str(made.get(key))[:100]}" for key in different[:3]]


def _at(program: Program, out: str) -> Program:
    return program._replace(argv=tuple(out if word == "out" else word for word in program.argv))


def _size(folder: Path) -> int:
    return sum(-(-path.stat().st_size // 4096) * 4096 + 4096 for path in folder.rglob("*"))


def _append(path: Path) -> None:
    with path.open("ab") as file:
        file.write("新的一行\n".encode())


def _truncate(path: Path) -> None:
    os.truncate(path, path.stat().st_size // 2)


def _replace(path: Path) -> None:
    new = path.with_name("new")
    new.write_bytes(b"other\n" * 50)
    new.replace(path)


def _remove(path: Path) -> None:
    path.unlink()
