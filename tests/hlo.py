"""Reads what XLA says of a compiled program: its collectives, how often each runs, and the buffers it reuses."""

from __future__ import annotations

import math
import re
from typing import NamedTuple

BYTES = {"f32": 4, "bf16": 2, "f16": 2, "s32": 4, "u32": 4, "pred": 1, "s8": 1, "u8": 1, "f64": 8, "s64": 8, "u64": 8}
COLLECTIVES = "all-gather|all-reduce|reduce-scatter|all-to-all|collective-permute"


class Collective(NamedTuple):
    kind: str
    shapes: tuple[tuple[str, tuple[int, ...]], ...]  # (dtype, shape) of what comes out
    devices: int  # in each of its groups
    times: int  # that it runs, loops counted
    where: str  # the operation of the source program it comes from

    @property
    def bytes(self) -> int:
        """Of what comes out, once."""
        return sum(BYTES[dtype] * math.prod(shape) for dtype, shape in self.shapes)

    @property
    def sent(self) -> float:
        """Bytes that a device sends in all, with rings."""
        k = self.devices
        rounds = {"all-reduce": 2 * (k - 1) / k, "reduce-scatter": k - 1, "collective-permute": 1}
        return self.times * self.bytes * rounds.get(self.kind, (k - 1) / k)


def collectives(text: str) -> list[Collective]:
    """Those of a compiled program's text.

    A TPU's program names one that runs beside other work in each part of that work, by the same channel: it is one.
    """
    computations = _computations(text)
    times = _times(computations)
    found, channels = [], set()
    for name, lines in computations.items():
        for line in lines:
            if m := re.search(rf"= (.*?) ({COLLECTIVES})(?:-start)?\(", line):
                channel = re.search(r"channel_id=(\d+)", line)
                if channel and (m[2], channel[1]) in channels:
                    continue
                channels.add(channel and (m[2], channel[1]))
                shapes = tuple(
                    (dtype, tuple(int(n) for n in dims.split(",") if n))
                    for dtype, dims in re.findall(r"(\w+)\[([\d,]*)\]", m[1])
                )
                where = re.search(r'op_name="([^"]*)"', line)
                found.append(Collective(m[2], shapes, _group(line), times.get(name, 1), where[1] if where else ""))
    return found


def aliases(text: str) -> int:
    """How many of a compiled program's results lie in buffers of its arguments."""
    header = text[: text.index("\n")]
    return len(re.findall(r"\{[\d, ]*\}: \(\d+, \{[\d, ]*\}, (?:may|must)-alias\)", header))


def _computations(text: str) -> dict[str, list[str]]:
    found, name = {}, None
    for line in text.splitlines():
        if line and not line[0].isspace() and line.rstrip().endswith("{"):
            name = line.split("(")[0].replace("ENTRY", "").strip().lstrip("%")
            found[name] = []
        elif name:
            found[name].append(line)
    return found


def _times(computations: dict[str, list[str]]) -> dict[str, int]:
    """How often each computation runs."""
    times = dict.fromkeys(computations, 0)

    def visit(name: str, n: int) -> None:
        times[name] += n
        for line in computations[name]:
            called = re.findall(r"(?:body|calls|to_apply)=%?([\w.\-]+)", line)
            trips = re.search(r"known_trip_count[^0-9]*(\d+)", line)
            for callee in called:
                if callee in computations:
                    visit(callee, n * (int(trips[1]) if trips and " while(" in line else 1))

    (entry,) = set(computations) - {
        callee
        for lines in computations.values()
        for line in lines
        for callees in re.findall(r"(?:body|condition|calls|to_apply|branch_computations)=\{?([^,}\s)]+)", line)
        for callee in [callees.lstrip("%")]
    }
    visit(entry, 1)
    return times


def _group(line: str) -> int:
    if m := re.search(r"replica_groups=mesh\[([^\]]*)\](?:, device_ids=\S+)? \{([^}]*)\}", line):
        sizes = dict(re.findall(r"'(\w+)'=(\d+)", m[1]))
        parts = re.findall(r"'(\w+)'(?::\(\d+\)(\d+))?", m[2])
        return math.prod(int(part or sizes[axis]) for axis, part in parts)
    if m := re.search(r"replica_groups=\[(\d+),(\d+)\]", line):
        return int(m[2])
    if m := re.search(r"replica_groups=\{\{([\d,]*)\}", line):
        return len(m[1].split(","))
    return 1
