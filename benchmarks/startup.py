"""Measures how long a command takes until its first result, with an empty cache of compiled programs and a filled one.

    python benchmarks/startup.py [--rounds 3] [--full DIR] [--json FILE]

A round starts each command twice with a new cache folder: cold, which compiles and fills the cache, and warm. It
measures the time until `python train.py` (the demo) has taken its first step, until `davae sample` on that model has
ended, and with --full until `davae sample` has generated the first token of a model of the published size, in DIR.
CPU seconds are those of the whole command: they tell what other programs on the machine have added to the time. Run it
on an idle machine; files are read from the page cache from the first round's warm start on.
"""

import argparse
import json
import os
import platform
import shlex
import statistics
import subprocess
import sys
import tempfile
import time
from importlib.metadata import version
from pathlib import Path

ROOT = Path(__file__).parent.parent
FIRST_STEP = ["--steps", "1", "--log.every", "1", "--log.samples", "0", "--log.figures", "0"]
TIMEOUT = 1800  # seconds for one command
# An environment that would keep compiled programs elsewhere.
CACHE_VARIABLES = ("JAX_COMPILATION_CACHE_DIR", "JAX_ENABLE_COMPILATION_CACHE")


def start(command: list[str], caches: Path, result: Path | None = None) -> tuple[float, float]:
    """Runs a command of Python, with its cache in `caches`.

    Returns:
      The seconds until the file `result` has a line, or until the command has ended if that is None; and the CPU
      seconds until the command has ended.
    """
    env = {name: value for name, value in os.environ.items() if name not in CACHE_VARIABLES}
    env["XDG_CACHE_HOME"] = str(caches)
    begin, first = time.perf_counter(), None
    process = subprocess.Popen([sys.executable, *command], cwd=ROOT, env=env, stdout=subprocess.DEVNULL)
    usage = None
    while usage is None:
        ended, status, usage_now = os.wait4(process.pid, os.WNOHANG)
        seconds = time.perf_counter() - begin
        if first is None and result is not None and result.exists() and result.stat().st_size:
            first = seconds
        if ended:
            usage, process.returncode = usage_now, os.waitstatus_to_exitcode(status)
        elif seconds > TIMEOUT:
            process.kill()
        else:
            time.sleep(0.005)
    if process.returncode:
        raise SystemExit(f"{shlex.join(command)}: ended with code {process.returncode}")
    return seconds if first is None else first, usage.ru_utime + usage.ru_stime


def measure(rounds: int, full: Path | None, options: list[str]) -> dict[str, list[tuple[float, float]]]:
    """Returns the seconds and CPU seconds of each round for each command and cache, "… cold" and "… warm"."""
    figures: dict[str, list[tuple[float, float]]] = {}
    sample = ["-m", "davae_jax.cli", "sample", "--n", "1", "--model"]
    for number in range(rounds):
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name)
            for cache in ("cold", "warm"):
                run = folder / cache
                train = ["train.py", *options, *FIRST_STEP, "--run-dir", str(run)]
                commands = {
                    "train.py, first step": (train, run / "metrics.jsonl"),
                    "davae sample": ([*sample, str(folder / "cold")], None),
                }
                if full:
                    commands["full size, first token"] = ([*sample, str(full), "--max-length", "2"], None)
                for what, (command, result) in commands.items():
                    seconds = start(command, folder / what, result)
                    figures.setdefault(f"{what}, {cache}", []).append(seconds)
                    print(f"round {number + 1}: {what}, {cache}: {seconds[0]:.1f} s", file=sys.stderr, flush=True)
    return figures


def describe_machine() -> dict[str, object]:
    """Returns the machine, and the versions of what starts."""
    model = platform.processor()
    if (info := Path("/proc/cpuinfo")).exists():
        lines = info.read_text(encoding="utf-8", errors="replace").splitlines()
        model = next((line.partition(": ")[2] for line in lines if line.startswith("model name")), model)
    return {
        "date": time.strftime("%Y-%m-%d"),
        "processor": model,
        "cores": os.cpu_count(),
        "load average before": os.getloadavg()[0],
        "python": platform.python_version(),
        **{name: version(name) for name in ("jax", "jaxlib", "flax", "orbax-checkpoint")},
    }


def summarize(values: list[float]) -> dict[str, float]:
    """Returns the median and the spread of some values."""
    return {"median": statistics.median(values), "least": min(values), "most": max(values)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--full", type=Path, help="a converted model of the published size, with its tokenizers")
    parser.add_argument("--options", default="", help="of train.py, for a smaller model")
    parser.add_argument("--json", type=Path, help="file for the same values")
    args = parser.parse_args()
    machine = describe_machine()
    figures = measure(args.rounds, args.full, shlex.split(args.options))
    rows = {
        what: {"seconds": summarize(a), "cpu_seconds": summarize(b)}
        for what, (a, b) in ((what, zip(*pairs)) for what, pairs in figures.items())
    }
    print(", ".join(f"{name} {value}" for name, value in machine.items()))
    print(f"| until | seconds, median of {args.rounds} (least to most) | CPU seconds of the command |\n|---|---|---|")
    for what, row in rows.items():
        wall, cpu = row["seconds"], row["cpu_seconds"]
        print(f"| {what} | {wall['median']:.1f} ({wall['least']:.1f} to {wall['most']:.1f}) | {cpu['median']:.1f} |")
    if args.json:
        args.json.write_text(json.dumps({"machine": machine, "rows": rows}, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
