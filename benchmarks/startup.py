"""How long does a command take until its first result, with an empty cache of compiled programs and a filled one?

    python -m benchmarks startup [--rounds 3] [--full DIR]

A round starts each command twice with a new cache folder: cold, which compiles and fills the cache, and warm. It
measures the time until `python train.py` (the demo) has taken its first step, until `davae sample` on that model has
ended, and with --full until `davae sample` has generated the first token of a model of the published size, in DIR.
CPU seconds are those of the whole command: they tell what other programs on the machine have added to the time. Run it
on an idle machine; files are read from the page cache from the first round's warm start on.
"""

import os
import shlex
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

from benchmarks.common import ROOT, Row, make_parser, parse, report, row, summarize
from benchmarks.models import SMALLEST_TRAINING, write_texts

FIRST_STEP = ["--steps", "1", "--log.every", "1", "--log.samples", "0", "--log.figures", "0"]
TIMEOUT = 1800  # seconds for one command
# An environment that would keep compiled programs elsewhere.
CACHE_VARIABLES = ("JAX_COMPILATION_CACHE_DIR", "JAX_ENABLE_COMPILATION_CACHE")


def main(argv: list[str] | None = None) -> None:
    parser = make_parser(__doc__, __file__, rounds=3)
    parser.add_argument("--full", type=Path, help="a converted model of the published size, with its tokenizers")
    parser.add_argument("--options", default="", help="of train.py, for a smaller model")
    args = parse(parser, argv, {})
    options = shlex.split(args.options)
    with tempfile.TemporaryDirectory() as scratch:
        if args.smallest:
            options += [*SMALLEST_TRAINING, "--data.train", str(write_texts(Path(scratch), 100))]
        report(args, measure(args.rounds, args.full, options))


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


def measure(rounds: int, full: Path | None, options: list[str]) -> Iterator[Row]:
    """Yields a row for each command with each cache; the peer of a warm start is the cold one."""
    figures: dict[tuple[str, str], list[tuple[float, float]]] = {}
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
                    figures.setdefault((what, cache), []).append(seconds)
                    print(f"round {number + 1}: {what}, {cache}: {seconds[0]:.1f} s", file=sys.stderr, flush=True)
    for (what, cache), pairs in figures.items():
        seconds, cpu_seconds = zip(*pairs)
        peer = ("cold", [wall for wall, _ in figures[what, "cold"]]) if cache == "warm" else None
        yield row({"until": what, "cache": cache}, "s", seconds, peer=peer, **{"CPU seconds": summarize(cpu_seconds)})


if __name__ == "__main__":
    main()
