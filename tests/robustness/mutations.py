"""Damages the bytes of files. Every function draws from a `random.Random`, so that a seed gives the same damage."""

from __future__ import annotations

import copy
import json
import random
from collections.abc import Callable
from typing import Any

HUGE = [-1, 0, 2**31 - 1, 2**31, 2**63, -(2**63), 10**30, 10**400, 1e308, 0.5, float("nan"), float("inf")]
STRINGS = [
    "",
    " ",
    "a\nb",
    "a\0b",
    "\ud800",
    "\u2028",
    "\x1b[31m",
    "../../x",
    "/dev/full",
    "nan",
    "9" * 5000,
    "x" * 70_000,
]
TEXT_BYTES = [
    b"\n",
    b"\r\n",
    b"\0",
    b"\xff",
    b"\xff\xfe",
    b"\xef\xbb\xbf",
    "\u2028".encode(),
    b"\x1b[2J",
    b'"',
    b"{",
    b"[" * 5000,
]


def damage(rng: random.Random, data: bytes, other: bytes, structure: str) -> tuple[bytes, str]:
    """Returns a damaged copy of a file's bytes, and what was done.

    Args:
      other: another sound file, for splices.
      structure: "json", "jsonl", "toml", "lines" or "bytes": what the file contains; files of text are damaged as bytes
        as well, but less often.
    """
    changes = {"json": _damage_json, "jsonl": _damage_json_line, "toml": _damage_literal, "lines": _damage_line}
    if structure in changes and data.strip() and rng.random() < 0.7:
        return changes[structure](rng, data)
    for _ in range(10):
        change = rng.choice(BYTE_CHANGES)
        if (damaged := change(rng, data, other)) != data:
            break
    return damaged, change.__name__


# Bytes.


def flip_a_bit(rng: random.Random, data: bytes, other: bytes) -> bytes:
    return _replace(rng, data, 1, lambda old: bytes([old[0] ^ 1 << rng.randrange(8)]))


def set_bytes(rng: random.Random, data: bytes, other: bytes) -> bytes:
    return _replace(rng, data, rng.choice([1, 2, 4, 8]), lambda old: rng.choice([b"\0", b"\xff", b"\x7f"]) * len(old))


def draw_bytes(rng: random.Random, data: bytes, other: bytes) -> bytes:
    return _replace(rng, data, rng.choice([1, 4, 16]), lambda old: rng.randbytes(len(old)))


def truncate(rng: random.Random, data: bytes, other: bytes) -> bytes:
    return data[: rng.choice([0, 1, 8, len(data) - 1, rng.randrange(len(data) + 1)])]


def cut_the_beginning(rng: random.Random, data: bytes, other: bytes) -> bytes:
    return data[rng.randrange(len(data) + 1) :]


def insert(rng: random.Random, data: bytes, other: bytes) -> bytes:
    at = rng.randrange(len(data) + 1)
    return data[:at] + rng.choice([rng.randbytes(rng.choice([1, 4, 100])), *TEXT_BYTES]) + data[at:]


def append(rng: random.Random, data: bytes, other: bytes) -> bytes:
    return data + rng.choice([b"\0", rng.randbytes(50), data[: len(data) // 2], *TEXT_BYTES])


def leave_out(rng: random.Random, data: bytes, other: bytes) -> bytes:
    at = rng.randrange(len(data) + 1)
    return data[:at] + data[at + rng.choice([1, 2, 8, 200]) :]


def repeat(rng: random.Random, data: bytes, other: bytes) -> bytes:
    at = rng.randrange(len(data) + 1)
    return data[: at + rng.choice([1, 16, 500])] + data[at:]


def splice(rng: random.Random, data: bytes, other: bytes) -> bytes:
    return data[: rng.randrange(len(data) + 1)] + other[rng.randrange(len(other) + 1) :]


def exchange(rng: random.Random, data: bytes, other: bytes) -> bytes:
    return other


BYTE_CHANGES = [flip_a_bit, flip_a_bit, set_bytes, draw_bytes, truncate, cut_the_beginning, insert, append]
BYTE_CHANGES += [leave_out, repeat, splice, exchange]


def _replace(rng: random.Random, data: bytes, size: int, new: Callable[[bytes], bytes]) -> bytes:
    if not data:
        return data
    at = rng.randrange(len(data))
    return data[:at] + new(data[at : at + size]) + data[at + size :]


# JSON.


def _damage_json(rng: random.Random, data: bytes) -> tuple[bytes, str]:
    values, done = damage_value(rng, json.loads(data))
    text = json.dumps(values, ensure_ascii=rng.random() < 0.5, indent=rng.choice([None, 2]))
    if rng.random() < 0.1 and text.startswith("{") and values:  # a key twice
        key = json.dumps(rng.choice(list(values)))
        text, done = f"{{{key}: {json.dumps(rng.choice(HUGE))}, {text[1:]}", f"{done}, {key} twice"
    return text.encode("utf-8", "surrogatepass"), done


def damage_value(rng: random.Random, values: Any) -> tuple[Any, str]:
    """Returns a copy of a JSON value in which one node has been exchanged, removed, renamed or added."""
    values = copy.deepcopy(values)
    nodes = [((), None)] + list(_nodes(values))
    path, parent = rng.choice(nodes)
    where = ".".join(map(str, path)) or "the whole"
    if parent is None:
        return rng.choice([[values], [], {}, None, 3, "text", hostile_value(rng)]), f"{where} exchanged"
    key = path[-1]
    match rng.randrange(6):
        case 0:
            del parent[key]
            return values, f"{where} removed"
        case 1 if isinstance(parent, dict):
            name = rng.choice([*STRINGS, key + "_", key.upper()])
            parent[name] = parent.pop(key)
            return values, f"{where} renamed {name[:20]!r}"
        case 2:
            parent[key] = [parent[key]] if rng.random() < 0.5 else {"a": parent[key]}
            return values, f"{where} wrapped"
        case 3:
            other_path, other = rng.choice(nodes[1:])
            other_key = other_path[-1]
            parent[key] = copy.deepcopy(other[other_key])
            return values, f"{where} = {'.'.join(map(str, other_path))}"
        case _:
            parent[key] = new = hostile_value(rng)
            return values, f"{where} = {str(new)[:40]!r}"


def hostile_value(rng: random.Random) -> Any:
    """Returns a number, a text, a constant or a container that a reader may not expect."""
    if rng.random() < 0.05:
        deep: Any = 0
        for _ in range(900):  # as deep as `json.dumps` can write
            deep = [deep]
        return deep
    return rng.choice([*HUGE, *STRINGS, None, True, False, [], {}, [1, 2, 3], {"a": 1}, rng.randrange(1 << 40)])


def _nodes(values: Any, path: tuple = ()):
    """Yields the path of each node below a value, with the container that holds it."""
    items = values.items() if isinstance(values, dict) else enumerate(values) if isinstance(values, list) else ()
    for key, value in items:
        yield (*path, key), values
        yield from _nodes(value, (*path, key))


def _damage_json_line(rng: random.Random, data: bytes) -> tuple[bytes, str]:
    lines = data.splitlines(keepends=True)
    n = rng.randrange(len(lines))
    try:
        lines[n], done = _damage_json(rng, lines[n])
    except ValueError:  # this line is not JSON
        return _damage_line(rng, data)
    lines[n] = lines[n].replace(b"\n", b" ") + (b"\n" if rng.random() < 0.9 else b"")
    return b"".join(lines), f"line {n + 1}: {done}"


# Lines and literals.


def _damage_line(rng: random.Random, data: bytes) -> tuple[bytes, str]:
    lines = data.splitlines(keepends=True)
    n, m = rng.randrange(len(lines)), rng.randrange(len(lines))
    match rng.randrange(6):
        case 0:
            del lines[n]
            done = "removed"
        case 1:
            lines.insert(m, lines[n])
            done = "repeated"
        case 2:
            lines[n], lines[m] = lines[m], lines[n]
            done = "exchanged"
        case 3:
            lines[n] = b"\n"
            done = "blank"
        case 4:
            lines[n] = rng.choice(TEXT_BYTES) + lines[n]
            done = "prefixed"
        case _:
            lines[n] = rng.choice(STRINGS).encode("utf-8", "surrogatepass") + b"\n"
            done = "replaced"
    return b"".join(lines), f"line {n + 1} {done}"


def _damage_literal(rng: random.Random, data: bytes) -> tuple[bytes, str]:
    """Exchanges a word of a text for a hostile literal."""
    words = data.decode("utf-8").split(" ")
    n = rng.randrange(len(words))
    new = rng.choice([json.dumps(hostile_value(rng))[:6000], rng.choice(STRINGS), "[" * 3000, "--help", "--seed", "'"])
    old, words[n] = words[n], new
    return " ".join(words).encode("utf-8", "surrogatepass"), f"{old[:20]!r} = {new[:20]!r}"
