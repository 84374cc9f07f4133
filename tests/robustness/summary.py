"""Writes the figures of a ledger as tables in Markdown."""

from __future__ import annotations

import datetime
import os
import platform
from collections.abc import Iterable, Sequence
from importlib.metadata import version
from pathlib import Path

from ledger import Verdict

KINDS = {
    "reader": "Damaged files, read inside one process",
    "file": "Damaged files, whole programs",
    "line": "Command lines, whole programs",
    "kill": "Kills",
    "scene": "Disks, changes, neighbours",
}


def summarize(verdicts: Iterable[Verdict], seed: int) -> str:
    """Returns a table for each kind of case, and the machine."""
    verdicts = sorted(verdicts)
    lines = [describe_machine(), f"Seed {seed}.", ""]
    for kind, title in KINDS.items():
        own = [verdict for verdict in verdicts if verdict.case.split("/")[0] == kind]
        if own:
            lines += [f"**{title}**", "", *_table(kind, own), ""]
    return "\n".join(lines)


def _table(kind: str, verdicts: Sequence[Verdict]) -> list[str]:
    names = dict.fromkeys(verdict.case.split("/")[1] for verdict in verdicts)
    first = {"kill": ["program", "rounds", "kills"], "scene": ["scene", "tried"]}.get(kind, ["family", "inputs"])
    lines = [f"| {' | '.join([*first, 'accepted', 'refused', 'faults', 'longest s', 'largest MiB'])} |"]
    lines.append("|---" + "|--:" * (len(first) + 4) + "|")
    for name in [*names, "all"]:
        own = [v for v in verdicts if name in ("all", v.case.split("/")[1])]
        tried = [v for v in own if v.verdict != "not run"]
        kills = [f"{sum(v.attempts for v in tried):,}"] if kind == "kill" else []
        counts = [sum(v.verdict == verdict for v in tried) for verdict in ("accepted", "refused", "fault")]
        longest, largest = (max((getattr(v, key) for v in tried), default=0) for key in ("seconds", "memory"))
        cells = [name, f"{len(tried):,}", *kills, *(f"{n:,}" for n in counts), f"{longest:.2f}", f"{largest >> 20:,}"]
        lines.append(f"| {' | '.join(cells)} |")
    return lines


def describe_machine() -> str:
    """Returns the machine, the versions and the date."""
    cpu = next((x.split(":")[1].strip() for x in _lines("/proc/cpuinfo") if x.startswith("model name")), "?")
    memory = next((int(x.split()[1]) for x in _lines("/proc/meminfo") if x.startswith("MemTotal")), 0)
    return (
        f"{cpu}, {os.cpu_count()} cores, {memory / 2**20:.0f} GiB; {platform.system()} {platform.release()}; "
        f"Python {platform.python_version()}, jax {version('jax')}; {datetime.date.today()}."
    )


def _lines(path: str) -> list[str]:
    return Path(path).read_text().splitlines() if Path(path).exists() else []
