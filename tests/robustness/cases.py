"""Damaged inputs: thousands in one process (`run_readers`), or one in a whole program (`run_damaged_program`)."""

from __future__ import annotations

import mmap
import os
import random
import shutil
import signal
import struct
import sys
import time
import traceback
from collections.abc import Sequence
from pathlib import Path

from forks import _enter, _watch, resident, run_program
from inputs import FAMILIES, Family, damaged_files, digest, other_data
from ledger import Ledger, Verdict
from mutations import damage
from verdicts import PROGRAM_LIMITS, READER_LIMITS, Outcome, error_of, find_faults

READER = "reader"
HARNESS_FAILED = 70  # exit code of a process of readers


class Workshop:
    """A folder in which cases run: a copy of all sound folders, and the case's own."""

    def __init__(self, folder: Path, sound: Path, seed: int):
        self.folder, self.sound, self.seed = folder, sound, seed
        self.case, self.logs = folder / "case", folder / "logs"
        shutil.rmtree(folder, ignore_errors=True)
        self.logs.mkdir(parents=True)
        (self.logs / "in").touch()
        self.others = other_data(sound, FAMILIES.values())
        self._sound = sorted(path.name for path in sound.iterdir())
        self._copies: dict[str, dict[str, tuple]] = {}
        self.restore()

    def restore(self) -> None:
        """Makes the folders beside the case equal to the sound ones again."""
        for name in self._sound:
            copy = self.folder / name
            if copy.is_dir() and not copy.is_symlink() and snapshot(copy) == self._copies.get(name):
                continue
            copy.unlink() if copy.is_symlink() or copy.is_file() else shutil.rmtree(copy, ignore_errors=True)
            shutil.copytree(self.sound / name, copy)
            self._copies[name] = snapshot(copy)

    def fresh(self, source: str) -> Path:
        """Replaces the case's folder by a copy of a sound folder, modification times included."""
        self.restore()
        shutil.rmtree(self.case, ignore_errors=True)
        shutil.copytree(self.sound / source, self.case, symlinks=True)
        return self.case

    def empty(self) -> Path:
        """Replaces the case's folder by an empty one."""
        self.restore()
        shutil.rmtree(self.case, ignore_errors=True)
        self.case.mkdir()
        return self.case

    def rng(self, case: str) -> random.Random:
        return random.Random(f"{self.seed}/{case}")


def damage_a_file(
    workshop: Workshop, family: Family, rng: random.Random, files: Sequence[Path]
) -> tuple[Path, bytes, str]:
    """Returns a file of the family in the case's folder, its damaged bytes and what was done. Nothing is written."""
    file = rng.choice(files)
    # Files of the same folder, such as two shards, are spliced more often than those of another family.
    others = files if rng.random() < 0.5 and len(files) > 1 else workshop.others
    structure = family.structure
    if structure == "json" and file.suffix != ".json":
        structure = {".jsonl": "jsonl"}.get(file.suffix, "bytes")
    data, done = damage(rng, file.read_bytes(), rng.choice(others).read_bytes(), structure)
    relative = file.relative_to(workshop.sound / family.source)
    return workshop.case / relative, data, f"{relative}: {done}"


def snapshot(folder: Path) -> dict[str, tuple]:
    """Returns what tells whether a file in a folder was changed: name → size, time of the change, inode."""
    found = {}
    for parent, folders, files in os.walk(folder):
        for name in (*folders, *files):
            path = os.path.join(parent, name)
            status = os.lstat(path)
            changed = (status.st_size, status.st_mtime_ns, status.st_ino) if name in files else ()
            found[os.path.relpath(path, folder)] = changed
    return found


def changed_files(before: dict[str, tuple], folder: Path, may_write: Sequence[str]) -> list[str]:
    """Returns the files that were made, changed or removed although the case must not."""
    after = snapshot(folder)
    names = sorted(name for name in before.keys() | after.keys() if before.get(name) != after.get(name))
    return [name for name in names if not any(Path(name.split("/")[0]).match(pattern) for pattern in may_write)]


# Inside one process.


def run_readers(workshop: Workshop, name: str, numbers: Sequence[int], ledger: Ledger, failures: Path | None) -> None:
    """Runs cases of a family in a forked process; after a crash or a hang in another one, from the next case on."""
    progress = mmap.mmap(-1, 16)  # the position of the case that runs, and when it began
    position = 0
    while position < len(numbers):
        progress[:] = struct.pack("<qd", position, time.monotonic())
        pid = os.fork()
        if pid == 0:
            try:
                _run_readers_here(workshop, name, numbers, position, progress, ledger, failures)
                os._exit(0)
            except BaseException:
                (workshop.logs / "harness").write_text(traceback.format_exc())
                os._exit(HARNESS_FAILED)
        code, memory = _watch_readers(pid, progress)
        if code == HARNESS_FAILED:
            raise RuntimeError((workshop.logs / "harness").read_text())
        position, _ = struct.unpack("<qd", progress[:])
        if position < len(numbers):
            case = f"{READER}/{name}/{numbers[position]}"
            reason = (
                "hang" if code is None else f"memory: {memory >> 20} MiB" if code == "memory" else f"ended by {code}"
            )
            err = (workshop.logs / "err").read_text(errors="backslashreplace")[-500:]
            ledger.write(Verdict(case, "fault", [reason], error=err, memory=memory))
            position += 1


def _watch_readers(pid: int, progress: mmap.mmap) -> tuple[int | str | None, int]:
    """Waits for a process of readers. Returns its exit code, or why it was killed, and its memory."""
    base = resident(pid)
    while True:
        ended, status = os.waitpid(pid, os.WNOHANG)
        if ended:
            return os.waitstatus_to_exitcode(status), 0
        _, began = struct.unpack("<qd", progress[:])
        memory = resident(pid) - base
        # Compiling takes some seconds at the first case.
        if time.monotonic() - began > 3 * READER_LIMITS.seconds or memory > 3 * READER_LIMITS.memory:
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
            return "memory" if memory > 3 * READER_LIMITS.memory else None, memory
        time.sleep(0.05)


def _run_readers_here(workshop, name, numbers, position, progress, ledger, failures) -> None:
    from davae_jax.cli.base import _report_unraisable

    sys.unraisablehook = _report_unraisable  # as in programs
    family = FAMILIES[name]
    _enter(workshop.fresh(family.source), workshop.logs)
    _watch(workshop.logs, workshop.folder, None)
    files = damaged_files(family, workshop.sound / family.source)
    expected = {file: _sound_digest(workshop, family, file) for file in files}
    for i in range(position, len(numbers)):
        case = f"{READER}/{name}/{numbers[i]}"
        progress[:] = struct.pack("<qd", i, time.monotonic())
        file, data, done = damage_a_file(workshop, family, workshop.rng(case), files)
        verdict = run_reader(workshop, family, case, file, data, done, expected)
        ledger.write(verdict)
        if verdict.faults and failures:
            keep_failure(failures, case, file, data)
    progress[:] = struct.pack("<qd", len(numbers), time.monotonic())


def _sound_digest(workshop: Workshop, family: Family, file: Path) -> str:
    relative = file.relative_to(workshop.sound / family.source)
    value = digest(family.read(Path("."), workshop.case / relative))
    os.chdir(workshop.fresh(family.source))
    return value


def run_reader(workshop, family, case, file, data, done, expected) -> Verdict:
    """Writes the damaged file, reads it, judges, and restores what was changed."""
    from davae_jax.cli.base import run_cli

    status = file.stat()
    sound = file.read_bytes()
    file.write_bytes(data)
    before = snapshot(workshop.case)
    for stream in ("out", "err", "violations"):
        os.truncate(workshop.logs / stream, 0)
    read: list[str] = []

    def work() -> None:
        read.append(digest(family.read(Path("."), Path(file.relative_to(workshop.case)))))

    base, start = _reset_peak(), time.monotonic()
    code = run_cli(work, "reader")
    sys.stdout.flush()
    sys.stderr.flush()
    seconds, memory = time.monotonic() - start, max(0, _peak() - base)
    err = (workshop.logs / "err").read_bytes().decode("utf-8", "backslashreplace")
    violations = tuple(dict.fromkeys((workshop.logs / "violations").read_text().splitlines()))
    outcome = Outcome(code, err, seconds, memory, violations)
    faults = find_faults(outcome, _names(workshop, family, file), READER_LIMITS)
    if (
        code == 0
        and family.has_sums
        and read[0] != expected[workshop.sound / family.source / file.relative_to(workshop.case)]
    ):
        faults.append("silent damage: read with other values")
    changed = changed_files(before, workshop.case, family.may_write)
    faults += [f"changed {name}" for name in changed[:3]]
    if snapshot(workshop.case) != before:
        os.chdir(workshop.fresh(family.source))
    else:
        file.write_bytes(sound)
        os.utime(file, ns=(status.st_atime_ns, status.st_mtime_ns))
    verdict = "fault" if faults else "accepted" if code == 0 else "refused"
    return Verdict(case, verdict, faults, done, error_of(outcome), round(seconds, 4), memory)


def _names(workshop: Workshop, family: Family, file: Path) -> list[str]:
    """Returns the names of which an error has to contain one: the file's, or those of files beside it."""
    relative = file.relative_to(workshop.case)
    names = [file.name, *(str(parent) for parent in relative.parents if str(parent) != ".")]
    siblings = (path.name for path in (workshop.sound / family.source).rglob("*") if path.is_file())
    return [*names, *siblings, str(workshop.case), "./", "--run-dir", "--output"]


def _reset_peak() -> int:
    """Resets the kernel's record of the largest resident memory. Returns the present one in bytes."""
    with open("/proc/self/clear_refs", "w") as file:
        file.write("5")
    return resident("self")


def _peak() -> int:
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) * 1024 for line in file if line.startswith("VmHWM"))


def keep_failure(failures: Path, case: str, file: Path, data: bytes) -> None:
    """Keeps an input that shows a fault."""
    folder = failures / case.replace("/", "_").replace(" ", "_")
    folder.mkdir(parents=True, exist_ok=True)
    (folder / file.name).write_bytes(data[: 1 << 20])


# Whole programs on damaged files.


def run_damaged_program(workshop: Workshop, name: str, number: int, failures: Path | None) -> Verdict:
    """Damages a file and runs one of the family's programs on it."""
    family, case = FAMILIES[name], f"file/{name}/{number}"
    rng = workshop.rng(case)
    files = damaged_files(family, workshop.sound / family.source)
    folder = workshop.fresh(family.source)
    file, data, done = damage_a_file(workshop, family, rng, files)
    file.write_bytes(data)
    relative = str(file.relative_to(folder))
    words = {"{in}": ".", "{file}": relative, "{out}": "out"}
    program = rng.choice(family.programs)
    argv = [words.get(word, word) for word in program]
    before = snapshot(folder)
    outcome = run_program(argv, folder, logs=workshop.logs, fence=workshop.folder)
    options = [word for word in argv if word.startswith("--")]
    faults = find_faults(outcome, [*_names(workshop, family, file), *options], PROGRAM_LIMITS)
    is_folder_of_work = program[0] in ("train", "prepare", "compare")  # goes on where it stopped
    may_write = [*family.may_write, *(["out"] if outcome.code == 0 or is_folder_of_work else [])]
    faults += [f"left {name}" for name in changed_files(before, folder, may_write)[:3]]
    if faults and failures:
        keep_failure(failures, case, file, data)
    verdict = "fault" if faults else "accepted" if outcome.code == 0 else "refused"
    done = f"{' '.join(argv[:2])}: {done}"
    return Verdict(case, verdict, faults, done, error_of(outcome), round(outcome.seconds, 3), outcome.memory)
