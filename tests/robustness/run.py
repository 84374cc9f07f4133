"""Tries to break the programs, and keeps a ledger: `python tests/robustness/run.py --output DIR`.

The same command goes on where it was stopped. docs/reliability.md says what is tried, and what is promised.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import os
import shutil
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parent), str(HERE.parent.parent)]
os.environ |= {"JAX_PLATFORMS": "cpu", "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}

import compiler

compiler.share_programs()
os.environ.setdefault("XLA_FLAGS", compiler.QUICK)

from cases import READER, Workshop, run_damaged_program, run_readers
from commands import LINES, run_line
from forks import import_everything
from inputs import FAMILIES
from kills import run_kill_round
from ledger import Ledger, Verdict
from programs import PROGRAMS
from scenes import PROCESSES, SCENES, run_scene, run_test_of_processes
from sound import make_sound_files, make_sound_run
from summary import summarize

CHUNK = 200  # cases that one process reads


def main() -> int:
    """Runs what the options ask for. Returns 1 if there are faults."""
    options = _parse()
    options.output.mkdir(parents=True, exist_ok=True)
    if options.markdown:
        print(summarize(Ledger(options.output / "ledger.jsonl").read(), options.seed))
        return 0
    import_everything()
    _make_sound_once(options.output / "sound")
    ledger = Ledger(options.output / "ledger.jsonl")
    if options.repeat:
        return _repeat(options, ledger)
    tried = {verdict.case for verdict in ledger.read()}
    tasks = plan(options, tried)
    deadline = time.monotonic() + 60 * options.minutes if options.minutes else None
    pids = [_start_job(options, job, tasks[job :: options.jobs], deadline) for job in range(options.jobs)]
    codes = [os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in pids]
    verdicts = list(ledger.read())
    text = summarize(verdicts, options.seed)
    (options.output / "summary.md").write_text(text, encoding="utf-8")
    print(text)
    return 1 if any(codes) or any(verdict.faults for verdict in verdicts) else 0


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, required=True, help="folder of the ledger, the summary and the failures")
    parser.add_argument("--inputs", type=int, default=100_000, help="damaged files, read inside one process")
    parser.add_argument("--programs", type=int, default=2000, help="whole programs: damaged files and command lines")
    parser.add_argument("--kills", type=int, default=100, help="kills of programs that write")
    parser.add_argument("--scenes", type=int, default=60, help="full disks, changed files, two at once and so on")
    parser.add_argument("--no-processes", dest="processes", action="store_false", help="no tests of several processes")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--minutes", type=float, help="stop after this time; the same command goes on")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1, help="processes")
    parser.add_argument("--only", default="", help="cases whose name contains this, such as reader/study")
    parser.add_argument("--markdown", action="store_true", help="print the tables of the ledger, and try nothing")
    parser.add_argument("--repeat", metavar="CASE", help="one case, such as reader/config.json/17; prints its error")
    options = parser.parse_args()
    options.output = options.output.resolve()
    return options


def _make_sound_once(folder: Path) -> None:
    """Makes the sound files in a forked process, so that JAX is not initialized in this one."""
    if folder.exists():
        return
    part = folder.with_name("sound.partial")
    shutil.rmtree(part, ignore_errors=True)
    for make in (make_sound_files, make_sound_run):
        _in_fork(lambda make=make: make(part))
    part.rename(folder)


def _in_fork(work: Callable[[], None]) -> None:
    """Calls a function in a forked process, which may initialize JAX."""
    if (pid := os.fork()) == 0:
        code = 1
        try:
            with contextlib.redirect_stdout(sys.stderr):
                work()
            code = 0
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stderr.flush()
            os._exit(code)
    if os.waitpid(pid, 0)[1]:
        raise SystemExit("the sound files cannot be made")


Task = tuple[str, Callable[[Workshop, Ledger, Path], None]]


def plan(options: argparse.Namespace, tried: set[str]) -> list[Task]:
    """Returns the cases that have no verdict yet, in chunks, the kinds mixed so that all end at about the same time."""
    kinds = [_reader_tasks, _file_tasks, _line_tasks, _kill_tasks, _scene_tasks]
    tasks = []
    for kind in kinds:
        own = list(kind(options, tried))
        tasks += [((i + 0.5) / len(own), task) for i, task in enumerate(own)]
    return [task for _, task in sorted(tasks, key=lambda placed: placed[0])]


def _shares(total: int, shares: dict[str, int]) -> dict[str, int]:
    """Returns how many of the cases each family gets."""
    whole = sum(shares.values())
    return {name: -(-total * share // whole) for name, share in shares.items() if share}


def _wanted(options: argparse.Namespace, tried: set[str], prefix: str, count: int) -> list[int]:
    return [n for n in range(count) if f"{prefix}/{n}" not in tried and options.only in f"{prefix}/{n}"]


def _reader_tasks(options: argparse.Namespace, tried: set[str]) -> Iterator[Task]:
    counts = _shares(options.inputs, {name: family.share for name, family in FAMILIES.items()})
    chunks = []
    for name, count in counts.items():
        numbers = _wanted(options, tried, f"{READER}/{name}", count)
        chunks.append([(name, numbers[i : i + CHUNK]) for i in range(0, len(numbers), CHUNK)])
    for group in itertools.zip_longest(*chunks):
        for name, numbers in filter(None, group):
            yield (
                f"{READER}/{name}",
                lambda shop, ledger, kept, a=name, b=numbers: run_readers(shop, a, b, ledger, kept),
            )


def _file_tasks(options: argparse.Namespace, tried: set[str]) -> Iterator[Task]:
    counts = _shares(options.programs // 2, {name: 1 for name, family in FAMILIES.items() if family.programs})
    for n in range(max(counts.values(), default=0)):
        for name, count in counts.items():
            if n < count and n in _wanted(options, tried, f"file/{name}", count):
                yield (
                    f"file/{name}",
                    lambda shop, ledger, kept, a=name, b=n: ledger.write(run_damaged_program(shop, a, b, kept)),
                )


def _line_tasks(options: argparse.Namespace, tried: set[str]) -> Iterator[Task]:
    counts = _shares(options.programs // 2, dict.fromkeys(LINES, 1) | {"train": 3})
    for n in range(max(counts.values(), default=0)):
        for name, count in counts.items():
            if n < count and n in _wanted(options, tried, f"line/{name}", count):
                yield f"line/{name}", lambda shop, ledger, kept, a=name, b=n: ledger.write(run_line(shop, a, b))


def _kill_tasks(options: argparse.Namespace, tried: set[str]) -> Iterator[Task]:
    counts = _shares(options.kills, {name: 1 if program.expensive else 4 for name, program in PROGRAMS.items()})
    for n in range(max(counts.values(), default=0)):
        for name, count in counts.items():
            if n < count and n in _wanted(options, tried, f"kill/{name}", count):
                yield f"kill/{name}", lambda shop, ledger, kept, a=name, b=n: ledger.write(run_kill_round(shop, a, b))


def _scene_tasks(options: argparse.Namespace, tried: set[str]) -> Iterator[Task]:
    counts = _shares(options.scenes, {name: len(programs) for name, (_, programs) in SCENES.items()})
    for n in range(max(counts.values(), default=0)):
        for name, count in counts.items():
            if n < count and n in _wanted(options, tried, f"scene/{name}", count):
                yield f"scene/{name}", lambda shop, ledger, kept, a=name, b=n: ledger.write(run_scene(shop, a, b))
    if options.processes:
        for n in _wanted(options, tried, "scene/several processes", len(PROCESSES)):
            yield "scene/several processes", lambda shop, ledger, kept, b=n: ledger.write(run_test_of_processes(b))


def _start_job(options: argparse.Namespace, job: int, tasks: list[Task], deadline: float | None) -> int:
    """Forks a process that does these tasks one after the other. Returns its process id."""
    if pid := os.fork():
        return pid
    code = 1
    try:
        shop = Workshop(options.output / "work" / str(job), options.output / "sound", options.seed)
        ledger = Ledger(options.output / "ledger.jsonl")
        code = 0
        for name, work in tasks:
            if deadline and time.monotonic() > deadline:
                break
            try:
                work(shop, ledger, options.output / "failures")
            except Exception:  # of the harness itself: the case has no verdict and is tried again at the next start
                print(f"{name}: {traceback.format_exc()}", file=sys.stderr)
                code = 1
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def _repeat(options: argparse.Namespace, ledger: Ledger) -> int:
    kind, name, number = options.repeat.split("/")
    shop = Workshop(options.output / "work" / "repeat", options.output / "sound", options.seed)
    if kind == READER:
        run_readers(shop, name, [int(number)], ledger, None)
    elif kind == "file":
        ledger.write(run_damaged_program(shop, name, int(number), None))
    elif kind == "line":
        ledger.write(run_line(shop, name, int(number)))
    elif kind == "kill":
        ledger.write(run_kill_round(shop, name, int(number)))
    elif kind == "scene":
        is_test = name == "several processes"
        ledger.write(run_test_of_processes(int(number)) if is_test else run_scene(shop, name, int(number)))
    verdict: Verdict = next(v for v in ledger.read() if v.case == options.repeat)
    print("\n".join(f"{key}: {value}" for key, value in verdict._asdict().items()))
    print(f"standard error: {shop.logs / 'err'}; folder: {shop.case}")
    return 1 if verdict.faults else 0


if __name__ == "__main__":
    sys.exit(main())
