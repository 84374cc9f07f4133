"""What the benchmarks share: options, timing in turns, the limits of this machine, and the table and file of results.

A result is a row: a dict of what was measured. `row` makes one that has a value, its spread, and, where there are any,
a peer measured in the same run and a limit of this machine. The keys:

  value, unit                            medians with the least and the most; rates have a unit that ends in "/s"
  peer, peer_value, peer_ratio           how many times as good as the peer: 2 is twice as fast
  limit, limit_value, limit_ratio        the fraction of the limit that is reached: 1 is all of it
  table                                  the title of the table that the row belongs to, if there are several

Other keys are free. `report` prints the rows and writes them to the file that --json names.
"""

from __future__ import annotations

import argparse
import functools
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).parent.parent
Row = dict[str, Any]
HIDDEN = ("table", "unit")  # keys that are no columns


# ---- options


def make_parser(doc: str, file: str, *, rounds: int | None = None) -> argparse.ArgumentParser:
    """Returns a parser with the options that all benchmarks have.

    Args:
      doc, file: `__doc__` and `__file__` of the benchmark.
      rounds: the default of --rounds, if the benchmark measures in rounds.
    """
    name = f"python -m benchmarks {Path(file).stem}"
    parser = argparse.ArgumentParser(name, description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=_new_file, metavar="FILE", help="write the machine and the rows to this file")
    parser.add_argument("--smallest", action="store_true", help="use the smallest sizes, to see that it works")
    if rounds:
        parser.add_argument("--rounds", type=positive, default=rounds, help=f"number of measurements ({rounds})")
    return parser


def parse(
    parser: argparse.ArgumentParser, argv: Sequence[str] | None, smallest: Mapping[str, Any]
) -> argparse.Namespace:
    """Returns the options. With --smallest, those that are not given have the values in `smallest`."""
    argv = sys.argv[1:] if argv is None else argv
    if "--smallest" in argv:
        parser.set_defaults(**{"rounds": 1} | dict(smallest))
    return parser.parse_args(argv)


def positive(text: str) -> int:
    """Returns an integer of at least 1."""
    if (value := int(text)) < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, not {value}")
    return value


def _new_file(text: str) -> Path:
    path = Path(text)
    if path.is_dir() or not os.access(path.parent, os.W_OK):
        raise argparse.ArgumentTypeError(f"{text}: cannot be written")
    return path


# ---- measuring


def summarize(values: Iterable[float]) -> dict[str, float]:
    """Returns the median, the least and the most of some values."""
    values = list(values)
    return {"median": statistics.median(values), "least": min(values), "most": max(values)}


def in_turns(functions: Mapping[Any, Callable[[], Any]], rounds: int) -> dict[Any, list[Any]]:
    """Returns what each function returns in each round. In a round, all are called one after the other."""
    results = {name: [] for name in functions}
    for _ in range(rounds):
        for name, function in functions.items():
            results[name].append(function())
    return results


def time_in_turns(functions: Mapping[Any, Callable[[], Any]], rounds: int) -> dict[Any, list[float]]:
    """Returns the seconds that each function takes in each round, after a first call, which may compile.

    What a function returns is waited for.
    """
    import jax

    def seconds(function: Callable[[], Any]) -> float:
        start = time.perf_counter()
        jax.block_until_ready(function())
        return time.perf_counter() - start

    timed = {name: functools.partial(seconds, function) for name, function in functions.items()}
    in_turns(timed, 1)
    return in_turns(timed, rounds)


class Finished(NamedTuple):
    """A process that has ended."""

    seconds: float
    peak_MB: float  # resident memory of it, or of the largest process that it started
    output: str  # what it printed


# A process reports at least the peak of the one that started it, so that a small one has to.
_START = """
import os, subprocess, sys
process = subprocess.Popen(sys.argv[1:])
_, status, usage = os.wait4(process.pid, 0)
print(usage.ru_maxrss * 1024)
sys.exit(os.waitstatus_to_exitcode(status))
"""


def run_python(*arguments: Any, **kwargs: Any) -> Finished:
    """Runs Python with these arguments. Raises SystemExit if it fails."""
    command = [sys.executable, *map(str, arguments)]
    start = time.perf_counter()
    done = subprocess.run(
        [sys.executable, "-SEc", _START, *command], cwd=ROOT, stdout=subprocess.PIPE, text=True, **kwargs
    )
    if done.returncode:
        raise SystemExit(f"failed with code {done.returncode}: {' '.join(command)}")
    output, _, peak = done.stdout.strip().rpartition("\n")
    return Finished(time.perf_counter() - start, int(peak) / 1e6, output)


# ---- the limits of this machine

_fastest: dict[str, float] = {}  # rates of this process, by function: other programs only slow a measurement down


def memory_rate(megabytes: int = 1024) -> float:
    """Returns the bytes per second that a sum over an array reads with all cores.

    It is measured anew at each call, so that the limit of a row is measured beside the row: the fastest of five runs,
    or of an earlier call.
    """
    import jax
    import numpy as np

    n = 8 * (os.cpu_count() or 1)
    parts = [jax.numpy.ones((megabytes << 18) // n, np.float32) for _ in range(n)]
    total = jax.jit(lambda parts: [part.sum() for part in parts])
    rate = sum(part.nbytes for part in parts) / min(time_in_turns({0: lambda: total(parts)}, 5)[0])
    return _keep_fastest("memory", rate)


def matmul_rate(n: int = 2048) -> float:
    """Returns the FLOP/s of a product of two float32 matrices [n, n], measured as `memory_rate`.

    It is that of JAX or that of PyTorch, whichever is faster, if PyTorch is imported.
    """
    import jax

    a = jax.random.normal(jax.random.key(0), (n, n))
    product = jax.jit(lambda a: a @ a)
    functions = {"jax": lambda: product(a)}
    if torch := sys.modules.get("torch"):
        b = torch.ones(n, n)
        functions["torch"] = lambda: b @ b
    return _keep_fastest("products", 2 * n**3 / min(map(min, time_in_turns(functions, 5).values())))


def _keep_fastest(name: str, rate: float) -> float:
    """Returns the fastest of this rate and the earlier ones of that name."""
    _fastest[name] = max(rate, _fastest.get(name, 0.0))
    return _fastest[name]


# ---- results


def row(
    labels: Mapping[str, Any],
    unit: str,
    values: Iterable[float],
    *,
    peer: tuple[str, Iterable[float]] | None = None,
    limit: tuple[str, float] | None = None,
    **more: Any,
) -> Row:
    """Returns a row with the keys that the module's docstring lists.

    Args:
      peer, limit: the name, and values in the same unit.
    """
    value = summarize(values)
    result = {**labels, "value": value, "unit": unit}
    if peer:
        other = summarize(peer[1])
        result |= {
            "peer": peer[0],
            "peer_value": other,
            "peer_ratio": ratio(unit, value["median"], other["median"]),
        }
    if limit:
        result |= {"limit": limit[0], "limit_value": limit[1], "limit_ratio": ratio(unit, value["median"], limit[1])}
    return result | more


def ratio(unit: str, value: float, other: float) -> float:
    """Returns how many times as good a value is as another: of two rates the larger is better, else the smaller."""
    return value / other if unit.endswith("/s") else other / value


def report(args: argparse.Namespace, rows: Iterable[Row], **more: Any) -> list[Row]:
    """Measures the rows, prints them and writes them to --json, each as soon as it is measured. Returns them.

    Args:
      rows: a generator that measures them, so that the load of the machine is read before.
      more: further facts about the machine.
    """
    machine, measured = describe_machine() | more, []
    for new in rows:
        measured.append(new)
        print(", ".join(f"{key} {_cell(new, key)}" for key in _columns([new])), file=sys.stderr, flush=True)
        _write(args.json, machine, measured)
    _complete(machine)  # not before, because it takes the device, which further processes may need
    _write(args.json, machine, measured)
    print("; ".join(f"{name} {value}" for name, value in machine.items()))
    print_tables(measured)
    return measured


def _write(file: Path | None, machine: dict[str, Any], rows: list[Row]) -> None:
    if file:
        contents = {"machine": machine, "rows": rows}
        file.write_text(json.dumps(contents, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


def describe_machine() -> dict[str, Any]:
    """Returns the date, the machine and its load, and the versions of Python and JAX."""
    model = platform.processor()
    if (info := Path("/proc/cpuinfo")).exists():
        lines = info.read_text(encoding="utf-8", errors="replace").splitlines()
        model = next((line.partition(": ")[2] for line in lines if line.startswith("model name")), model)
    return {
        "date": time.strftime("%Y-%m-%d"),
        "processor": model,
        "cores": os.cpu_count(),
        "load average before": round(os.getloadavg()[0], 2),
        "python": platform.python_version(),
        **{name: version(name) for name in ("jax", "jaxlib")},
    }


def _complete(machine: dict[str, Any]) -> None:
    """Adds what is known only after something was measured: the device, and the version of PyTorch if it was used."""
    if "jax" in sys.modules:
        import jax

        machine["device"] = jax.devices()[0].device_kind
    if "torch" in sys.modules:
        machine["torch"] = version("torch")


def print_tables(rows: Sequence[Row]) -> None:
    """Prints rows as Markdown, one table for each title under their key "table"."""
    for title in dict.fromkeys(row.get("table") for row in rows):
        of_title = [row for row in rows if row.get("table") == title]
        columns = _columns(of_title)
        print(f"\n{title}:\n" if title else "")
        print(f"| {' | '.join(column.replace('_', ' ') for column in columns)} |\n|{'---|' * len(columns)}")
        for each in of_title:
            print(f"| {' | '.join(_cell(each, column) for column in columns)} |")


def _columns(rows: Sequence[Row]) -> list[str]:
    return list(dict.fromkeys(key for row in rows for key in row if key not in HIDDEN))


def _cell(row: Row, key: str) -> str:
    value = row.get(key)
    if value is None:
        return ""
    if key in ("value", "peer_value", "limit_value"):
        return f"{_format(value)} {row['unit']}"
    if key in ("peer_ratio", "limit_ratio"):
        return f"{value:.2f} ×" if key == "peer_ratio" else f"{value:.0%}"
    return _format(value)


def _format(value: Any) -> str:
    """Returns a value for people: three digits, and the spread in brackets."""
    if isinstance(value, dict):
        middle, *ends = (_format(value[name]) for name in ("median", "least", "most"))
        return middle if ends == [middle, middle] else f"{middle} ({ends[0]} to {ends[1]})"
    if isinstance(value, float):
        return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"
    return f"{value:,}" if type(value) is int else str(value)
