"""Hostile command lines: sound ones, of which words are exchanged, left out, repeated or invented."""

from __future__ import annotations

import contextlib
import functools
import io
import random
import re
from pathlib import Path

from cases import Workshop, changed_files, snapshot
from forks import run_program
from inputs import RUN_OPTIONS, TEXT
from ledger import Verdict
from verdicts import PROGRAM_LIMITS, error_of, find_faults

TRAIN = ["--data.train", "../texts/a.txt", "--tokenizers", "../model", "--run-dir", "out", *RUN_OPTIONS]
# Of every command a sound line, run in an empty folder beside the sound ones.
LINES = {
    "generate": [TEXT, "--model", "../model"],
    "reconstruct": [TEXT, "--model", "../model", "--output", "out"],
    "sample": ["--model", "../model", "--n", "2"],
    "interpolate": [TEXT, "x", "--model", "../model", "--steps", "2"],
    "analogy": [TEXT, "x", "y", "--model", "../model"],
    "attribute": [TEXT, "--model", "../model", "--positive", "../texts/a.txt", "--negative", "../texts/a.jsonl"],
    "neighbours": [TEXT, "--model", "../model", "--n", "2"],
    "combine": [TEXT, "x", "--model", "../model", "--weights", "1", "1"],
    "encode": [TEXT, "--model", "../model", "--output", "out.npz"],
    "traverse": [TEXT, "--model", "../model", "--dim", "0"],
    "evaluate": ["--model", "../model", "--data", "../texts/a.txt", "--n", "4", "--samples", "2", "--json", "out"],
    "compare": ["../study/study.toml", "--output", "../study/done"],
    "plan": ["demo", "--chips", "1"],
    "prepare": ["--input", "../texts/a.txt", "--output", "out", "--tokenizers", "../model", "--workers", "1"],
    "convert": ["../safetensors", "out"],
    "export": ["../model", "out", "--format", "safetensors"],
    "parity": ["../bin"],
    "warm-start": ["out", "--encoder", "../bert", "--config", "../model/config.json"],
    "train": TRAIN,
}
SAME = {"convert.from_torch": "convert", "convert.to_torch": "export", "convert.parity": "parity"}
SAME |= {"convert.warm_start": "warm-start"}
LINES |= {program: LINES[command] for program, command in SAME.items()}
NUMBERS = ["-1", "0", "1", "-0.5", "0.5", "1e400", "nan", "inf", "-inf", "2147483648", "99999999999999999999"]
NUMBERS += ["0x10", "1_000", "１", "True"]
PATHS = [".", "..", "../texts", "../texts/a.txt", "../model", "missing/x", "/dev/null", "/dev/full", "/proc/x", "~"]
PATHS += ["a[b]", "x" * 300, "a\nb", "../run", "../run/checkpoints/2", "../prepared", "../study/study.toml"]
TEXTS = ["", " ", "--", "-", "\udcff", "\u2028", "\x1b[31m", "'", "x" * 100_000, "今天", "\ud7ff\uffff"]
HOSTILE = [*NUMBERS, *PATHS, *TEXTS]
# Larger values are more work, which is not a fault; whoever asks for 2³¹ steps waits.
AMOUNTS = re.compile(
    r"--(steps|n|samples|log\..*|warmup.*|data\.max-length|max-length|batch-size|shard-size|workers|.*size|.*layers.*|.*positions.*|.*heads)"
)
LARGE = {"2147483648", "99999999999999999999", "inf"}
# What would be written outside of the folder, on the user's order, or reaches another program or machine.
NEVER = {
    "--debug",
    "--plugin",
    "--distributed.coordinator",
    "--distributed.processes",
    "--distributed.process",
    "--profile-steps",
}


@functools.cache
def options_of(command: str) -> tuple[str, ...]:
    """Returns the options in the help text of a command."""
    out = io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.suppress(SystemExit):
        if command == "train":
            from davae_jax.cli.train import main

            main(["--help"])
        else:
            from davae_jax.cli.main import main

            main([SAME.get(command, command), "--help"])
    found = dict.fromkeys(re.findall(r"(?<![\w-])--[a-z][\w.-]*[a-z0-9]", out.getvalue()))
    return tuple(option for option in found if option not in NEVER)


def hostile_line(rng: random.Random, command: str) -> list[str]:
    """Returns a command line with one to three changes."""
    argv = list(LINES[command])
    for _ in range(rng.choice([1, 1, 2, 3])):
        at = rng.randrange(len(argv)) if argv else 0
        option = rng.choice(options_of(command))
        match rng.randrange(8):
            case 0 if argv:
                del argv[at]
            case 1 if argv:
                argv.insert(rng.randrange(len(argv) + 1), argv[at])
            case 2 if argv:
                argv[at] = rng.choice(HOSTILE)
            case 3:
                argv += [rng.choice(["--unknown", "--seeed", "-x", f"{option}x", f"--{'x' * 2000}", "--="])]
            case 4:
                argv += [option]
            case 5:
                argv += [f"{option}={rng.choice(HOSTILE)}"]
            case _:
                argv += [option, rng.choice(HOSTILE)]
    return _without_amounts(argv)


def _without_amounts(argv: list[str]) -> list[str]:
    """Leaves out large values of options that ask for work."""
    kept: list[str] = []
    for word in argv:
        name, equals, value = word.partition("=")
        is_amount = equals and AMOUNTS.fullmatch(name) and value in LARGE
        if is_amount or (word in LARGE and kept and AMOUNTS.fullmatch(kept[-1])):
            word = f"{name}=-7" if equals else "-7"
        kept.append(word.replace("\0", ""))
    return kept


def run_line(workshop: Workshop, command: str, number: int) -> Verdict:
    """Runs a hostile command line in an empty folder."""
    case = f"line/{command}/{number}"
    argv = hostile_line(workshop.rng(case), command)
    folder = workshop.empty()
    before = snapshot(folder.parent)
    outcome = run_program([command, *argv], folder, logs=workshop.logs, fence=workshop.folder)
    names = [option for option in options_of(command) if len(option) > 3]
    names += ["SRC", "DST", "TEXT", "text", "STUDY", "--"]
    for word in filter(None, [*argv, *(word.partition("=")[2] for word in argv)]):
        escaped = word.encode("unicode_escape").decode()
        names += [
            repr(word),
            f" {word}",
            f"{word}: ",
            *([word, Path(word).name] if len(word) > 1 else []),
            *([escaped, escaped[:200]] if len(escaped) > 1 else []),
        ]
    faults = find_faults(outcome, [name for name in names if name], PROGRAM_LIMITS)
    named = {part for word in argv for part in word.rpartition("=")[2].split("/")}
    changed = [
        name for name in changed_files(before, folder.parent, ["logs", "case"]) if name.split("/")[0] not in named
    ]
    faults += [f"changed {name}" for name in changed[:3]]
    if outcome.code != 0 and SAME.get(command, command) in ("convert", "export", "warm-start", "evaluate", "plan"):
        faults += [f"left {name}" for name in sorted(snapshot(folder))[:3]]
    verdict = "fault" if faults else "accepted" if outcome.code == 0 else "refused"
    done = ascii(" ".join([command, *argv]))[:400]
    return Verdict(case, verdict, faults, done, error_of(outcome), round(outcome.seconds, 3), outcome.memory)
