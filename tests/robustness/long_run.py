"""Measures whether memory, compiled programs, open files and threads stay flat in long runs.

    python tests/robustness/long_run.py --output FILE.json [--steps 10000] [--generations 1000] [--run-dir DIR]

trains the demo for `--steps` steps, with samples and checkpoints every 250 steps, and then generates with the trained
model `--generations` times: all methods of `TextVAE`, with other numbers of texts, prompts, lengths and settings every
time. The measurements are in FILE.json after each interval; started again, the command continues where it was stopped.
At the end it prints a table with the slope of each quantity over the second half, and exits with 1 if one is not flat.
Linux only.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np

from davae_jax.utils.huge_pages import SETTINGS

MEASURES = {  # how much each may grow over the second half of a process's measurements
    "megabytes": 16.0,  # memory in use; besides, 2 % of it
    "programs": 0.0,
    "files": 0.0,
    "threads": 2.0,  # pools of a fixed size, which start a thread when they need one
}
INTERVALS = 40  # measurements of each phase
WORDS = "周末跟家人去了趟餐厅服务非常热情下回还来书店打分价格比较实惠给四颗星"  # of the demo's sentences


def memory_in_use() -> int:
    """Returns the bytes of this process's memory that is its own and that it has not freed.

    Without the pages of files, which the system drops as it likes, and those that the C library keeps for later.
    """
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    (kilobytes,) = re.findall(r"RssAnon:\s+(\d+) kB", Path("/proc/self/status").read_text())
    return 1024 * int(kilobytes)


class Meter:
    """Measures this process, and counts the programs that XLA has compiled since the meter was made."""

    def __init__(self):
        import jax

        self.programs = 0
        jax.monitoring.register_event_duration_secs_listener(self._listen)

    def _listen(self, event: str, duration: float, **_) -> None:
        self.programs += event == "/jax/core/compile/backend_compile_duration"

    def measure(self, done: int) -> dict[str, float]:
        return {
            "done": done,
            "process": os.getpid(),
            "megabytes": memory_in_use() / 1e6,
            "programs": self.programs,
            "files": len(os.listdir("/proc/self/fd")),
            "threads": len(os.listdir("/proc/self/task")),
        }


def train(argv: list[str], steps: int, run_dir: Path, record: Callable[[dict], None]) -> None:
    """Trains, or resumes, a run and records a measurement in intervals. `argv` are further options of train.py."""
    meter = Meter()
    from davae_jax.cli.train import parse_train
    from davae_jax.training.hooks import Every
    from davae_jax.training.loop import train

    options = ["--steps", str(steps), "--run-dir", str(run_dir), "--log.figures", "0", *argv]
    _, config = parse_train(options)

    def measure(run, state, step: int) -> None:
        run.checkpoints.wait()  # a save in progress has files open
        record(meter.measure(step))

    train(config, [Every(max(steps // INTERVALS, 1), measure, at_end=True)])


def generate(vae, first: int, count: int, record: Callable[[dict], None]) -> None:
    """Makes the calls `first` to `count` and records a measurement in intervals."""
    meter = Meter()
    for call in range(first, count):
        mixed_call(vae, np.random.default_rng(call))
        if (call + 1) % max(count // INTERVALS, 1) == 0 or call + 1 == count:
            record(meter.measure(call + 1))


def mixed_call(vae, rng: np.random.Generator) -> None:
    """Generates by a random method, with a random number of texts and random settings."""

    def texts(n: int) -> list[str]:
        return ["".join(rng.choice(list(WORDS), rng.integers(1, 9))) for _ in range(n)]

    n = int(rng.integers(1, 9))
    sampling = dict(max_length=int(rng.integers(17, 33)), seed=int(rng.integers(1000)))
    if rng.random() < 0.5:
        sampling |= dict(temperature=rng.uniform(0.5, 2), top_p=rng.uniform(0.1, 0.9), top_k=int(rng.integers(2, 50)))
    a, b, c = texts(3)
    calls = [
        lambda: vae.simulate_batch(texts(n), texts(n) if rng.random() < 0.5 else None, **sampling),
        lambda: vae.reconstruct(texts(n), **sampling),
        lambda: vae.sample(n, **sampling),
        lambda: vae.interpolate(a, b, n + 1, spherical=bool(rng.random() < 0.5), **sampling),
        lambda: vae.neighbours(a, n, 1.0, **sampling),
        lambda: vae.combine(texts(n), rng.normal(size=n).tolist(), **sampling),
        lambda: vae.shift(texts(n), vae.attribute_vector(texts(n), texts(2)), **sampling),
        lambda: vae.analogy(a, b, c, **sampling),
    ]
    calls[rng.integers(len(calls))]()


def growth(rows: list[dict]) -> dict[str, dict[str, float | bool]]:
    """Returns, for each quantity, its slope per 1000 steps or calls, its growth and whether it is flat.

    Only the second half of the measurements counts, of the process with the most of them. The growth is the slope of
    the least-squares line times the length of that half; for programs, files and threads it is the difference of the
    largest values in its first and its last third.

    Raises:
      ValueError: there are fewer than six measurements in that half.
    """
    processes = [row["process"] for row in rows]
    rows = [row for row in rows if row["process"] == max(processes, key=processes.count)]
    rows = rows[len(rows) // 2 :]
    if len(rows) < 6:
        raise ValueError(f"{len(rows)} measurements are too few")
    done = np.array([row["done"] for row in rows], float)
    result = {}
    for name, allowed in MEASURES.items():
        values = np.array([row[name] for row in rows], float)
        slope = float(np.polyfit(done - done[0], values, 1)[0])
        third = len(values) // 3
        grown = slope * (done[-1] - done[0]) if name == "megabytes" else values[-third:].max() - values[:third].max()
        if name == "megabytes":
            allowed = max(allowed, 0.02 * values.mean())
        result[name] = {
            "first": values[0],
            "last": values[-1],
            "per_1000": 1000 * slope,
            "growth": float(grown),
            "allowed": float(allowed),
            "flat": bool(grown <= allowed),
        }
    return result


class Results:
    """The measurements of both phases, in a JSON file that is replaced after each of them."""

    def __init__(self, path: Path):
        self.path = path
        self.phases = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}

    def record(self, phase: str, row: dict) -> None:
        # What was measured after the checkpoint that a run resumed from is measured again.
        rows = [old for old in self.phases.get(phase, []) if old["done"] < row["done"]]
        self.phases[phase] = [*rows, row]
        new = self.path.with_suffix(".new")
        new.write_text(json.dumps(self.phases, indent=1), encoding="utf-8")
        new.replace(self.path)

    def done(self, phase: str) -> int:
        return max((row["done"] for row in self.phases.get(phase, [])), default=0)


def run_phase(args: argparse.Namespace, argv: list[str]) -> None:
    """Runs one phase in this process."""
    results = Results(args.output)
    if args.phase == "training":
        every = ["--log.samples", "250", "--log.checkpoint", "250"]
        train([*every, *argv], args.steps, args.run_dir, lambda row: results.record("training", row))
        return
    from davae_jax import TextVAE

    vae = TextVAE.from_pretrained(args.run_dir)
    first = results.done("generation")
    generate(vae, first, args.generations, lambda row: results.record("generation", row))


def report(results: Results) -> bool:
    """Prints the growth of every quantity. Returns whether all are flat."""
    flat = True
    for phase, rows in results.phases.items():
        unit = "steps" if phase == "training" else "calls"
        print(f"{phase}: {rows[-1]['done']} {unit}; the second half of {len(rows)} measurements")
        if len(rows) < 12:
            print("  too few measurements")
            flat = False
            continue
        for name, values in growth(rows).items():
            flat &= values["flat"]
            print(
                f"  {name:10} {values['first']:9.1f} → {values['last']:9.1f}, {values['per_1000']:+9.3f} per 1000 "
                f"{unit}, grown by {values['growth']:.1f} of {values['allowed']:.1f} allowed: "
                f"{'flat' if values['flat'] else 'NOT FLAT'}"
            )
    return flat


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True, metavar="FILE.json")
    parser.add_argument("--steps", type=int, default=10_000)
    parser.add_argument("--generations", type=int, default=1000)
    parser.add_argument("--run-dir", type=Path, help="default: the output's name without its ending")
    parser.add_argument("--phase", choices=["training", "generation"], help=argparse.SUPPRESS)
    args, argv = parser.parse_known_args()
    args.run_dir = args.run_dir or args.output.with_suffix("")
    if args.phase:
        run_phase(args, argv)
        return 0
    for phase, count in (("training", args.steps), ("generation", args.generations)):
        # A process of its own, so that the phases are measured apart.
        if Results(args.output).done(phase) < count:
            command = [sys.executable, __file__, "--phase", phase, "--output", args.output]
            command += ["--steps", args.steps, "--generations", args.generations, "--run-dir", args.run_dir, *argv]
            # train.py gives itself these settings of the C library.
            settings = SETTINGS if phase == "training" else {}
            subprocess.run(list(map(str, command)), check=True, env=os.environ | settings)
    return 0 if report(Results(args.output)) else 1


if __name__ == "__main__":
    sys.exit(main())
