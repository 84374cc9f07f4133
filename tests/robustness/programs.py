"""The programs that write: how each is started, and what it must have made in the end."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from inputs import RUN_OPTIONS, digest

KEPT = 2  # checkpoints, by default
RATES = {"tokens_per_s", "data_wait", "compile_s", "mfu", "seconds"}
KILLED_RUN = (
    " ".join(RUN_OPTIONS).replace("--steps 2", "--steps 4").replace("--log.samples 0", "--log.samples 2").split()
)


class Program(NamedTuple):
    """A program that writes.

    Attributes:
      argv: the command line, run in an empty folder beside the sound ones; it makes `out`.
      fingerprint: returns what must be equal to an undisturbed run's: names of files → hashes or values.
      expensive: whether a start takes seconds.
    """

    argv: tuple[str, ...]
    fingerprint: Callable[[Path], dict[str, Any]]
    expensive: bool = False


def fingerprint_bytes(folder: Path) -> dict[str, Any]:
    """Returns the hash of every file, of an Orbax checkpoint those of its arrays."""
    found: dict[str, Any] = {}
    for path in sorted(folder.rglob("*")):
        name = str(path.relative_to(folder))
        if "/params/" in f"/{name}":
            continue  # names and order of the files that Orbax writes differ each time
        found[name] = digest(np.frombuffer(path.read_bytes(), np.uint8)) if path.is_file() else "folder"
    if (folder / "params").is_dir():
        found["params"] = digest(_arrays(folder))
    return found


def _arrays(folder: Path) -> Any:
    from inputs import read_params

    return {name: np.asarray(array) for name, array in read_params(folder, folder).items()}


def fingerprint_run(folder: Path) -> dict[str, Any]:
    """Returns a run's weights, optimizer states, losses and samples, and which files there are."""
    from inputs import read_checkpoint

    found: dict[str, Any] = {}
    for name in ("metrics", "held_out", "samples"):
        rows = [json.loads(line) for line in (folder / f"{name}.jsonl").read_text(encoding="utf-8").splitlines()]
        found[name] = digest([{key: x for key, x in row.items() if key not in RATES} for row in rows])
    found["state"] = digest(read_checkpoint(folder, folder)[0])
    found["files"] = sorted(path.name for path in folder.iterdir())
    # After a kill between a save and the deletion of an older checkpoint, that one stays until the next save.
    saved = sorted((path.name for path in (folder / "checkpoints").iterdir()), reverse=True)
    found["checkpoints"] = saved[:KEPT] if all(name.isdigit() for name in saved) else saved
    return found


def fingerprint_study(folder: Path) -> dict[str, Any]:
    """Returns the metrics of every run of a study, and which files there are."""
    found: dict[str, Any] = {
        str(p.relative_to(folder)): _metrics(p) for p in sorted(folder.glob("*/seed-*/evaluation.json"))
    }
    return found | {"files": sorted(path.name for path in folder.glob("*"))}


def _metrics(path: Path) -> str:
    values = json.loads(path.read_text(encoding="utf-8"))
    return digest({key: x for key, x in values.items() if not re.search("second|time|per_s", key)})


PROGRAMS = {
    "convert": Program(("convert", "../bin", "out"), fingerprint_bytes),
    "export": Program(("export", "../model", "out", "--format", "both"), fingerprint_bytes),
    "warm-start": Program(
        ("warm-start", "out", "--encoder", "../bert", "--config", "../model/config.json"), fingerprint_bytes
    ),
    "prepare": Program(
        (
            "prepare",
            "--input",
            "../texts/a.txt",
            "../texts/a.txt.gz",
            "--output",
            "out",
            "--workers",
            "1",
            "--held-out",
            "0.1",
        )
        + ("--decoder-vocab-size", "200", "--encoder-vocab-size", "200"),
        fingerprint_bytes,
    ),
    "overwrite": Program(("convert", "../safetensors", "out", "--overwrite"), fingerprint_bytes),
    "train": Program(
        ("train", "--data.train", "../texts/a.txt", "--tokenizers", "../model", "--run-dir", "out", *KILLED_RUN)
        + ("--log.checkpoint", "1"),
        fingerprint_run,
        expensive=True,
    ),
    "compare": Program(("compare", "../study/one.toml", "--output", "out"), fingerprint_study, expensive=True),
}
