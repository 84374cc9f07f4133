"""`davae compare`: trains a list of settings on the same data, seeds and budget, and sets their measures side by side.

A study is a TOML file:

    train = "--data.train texts.txt --steps 2000"   # options of train.py that every run has; may begin with a preset
    evaluate = "--data held-out.txt --samples 50"   # options of `davae evaluate`
    seeds = [0, 1, 2]

    [settings]                                      # the first is what the others are held against
    "plain KL" = "--free-bits.mode off"
    "MMD" = "--beta.start 0 --beta.max 0 --regularizers.mmd.weight 10"

Every setting and seed is a run folder of its own, OUTPUT/SETTING/seed-N, trained by train.py and measured by `davae
evaluate`. What is complete is not done again, and a run that was cut off goes on where it stopped.
"""

from __future__ import annotations

import json
import os
import re
import shlex
import signal
import subprocess
import sys
import time
import tomllib
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import tyro
from tqdm import tqdm

from davae_jax.cli.base import Command
from davae_jax.cli.evaluate import Evaluate
from davae_jax.cli.train import parse_train
from davae_jax.evaluation.comparison import Results, format_table, statistics
from davae_jax.regularizers import REGISTRY
from davae_jax.reports.comparison_page import figure, page
from davae_jax.training.config import TrainConfig
from davae_jax.utils.errors import InputError
from davae_jax.utils.files import write_json, write_text
from davae_jax.utils.signals import INTERRUPTED, interrupt_on_signals

PROGRAM = Path(__file__).parent.parent / "train.py"
MEASURES = "evaluation.json"  # in a run's folder, when all is done
COMPILED = "compiled"  # in the output: what JAX has compiled
SECONDS_BETWEEN_PAGES = 10  # at least


class Study(NamedTuple):
    settings: dict[str, list[str]]  # options of train.py, those of all runs included
    evaluate: list[str]
    seeds: list[int]
    notes: list[str]  # on what settings differ in that a comparison should have alike


@dataclass(kw_only=True)
class Compare(Command):
    """Trains settings side by side and compares what comes of them: one table and one page with plots.

    STUDY is a TOML file: `train` and `evaluate` are the options that all runs have, `seeds` a list of numbers,
    `[settings]` a name and its own options each, of which the first is what the others are held against. Started again,
    it goes on where it stopped. docs/regularizers.md has examples.
    """

    study: tyro.conf.Positional[Path]
    """The TOML file."""

    output: Path
    """Folder for the runs, and comparison.md, .json, .html and .svg."""

    def run(self) -> int:
        study = read_study(self.study)
        with interrupt_on_signals():  # the run that is training then saves
            return self.compare(study)

    def compare(self, study: Study) -> int:
        """Trains and measures what is missing, and writes the comparison. Returns the exit code."""
        if not PROGRAM.is_file():
            raise InputError(f"{PROGRAM}: no such file; `davae compare` trains by it and works in a checkout only")
        found: Results = {name: {} for name in study.settings}
        failed, written = [], time.monotonic()
        # A seed after the other, so that all settings can be compared when the first seed is through.
        todo = [(seed, name) for seed in study.seeds for name in study.settings]
        with tqdm(todo, unit="run", disable=not sys.stderr.isatty()) as bar:
            for seed, name in bar:
                bar.set_postfix_str(f"{name}, seed {seed}")
                try:
                    found[name][seed] = run_one(study, name, seed, self.output / folder_of(name) / f"seed-{seed}")
                except InputError as e:
                    failed.append(str(e))
                    tqdm.write(f"davae compare: error: {e}", file=sys.stderr)
                    continue
                # What is read from an earlier start is not worth a page each.
                if time.monotonic() > written + SECONDS_BETWEEN_PAGES:
                    self.write(found, study)
                    written = time.monotonic()
        if not any(found.values()):
            return 1
        self.write(found, study)
        print(format_table(found, study.notes))
        print(f"\n{self.output / 'comparison.html'}")
        return 1 if failed else 0

    def write(self, found: Results, study: Study) -> None:
        title = self.study.stem
        compared = {"settings": study.settings, "seeds": study.seeds, "found": found, "compared": statistics(found)}
        write_json(self.output / "comparison.json", compared)
        write_text(self.output / "comparison.md", format_table(found, study.notes) + "\n")
        write_text(self.output / "comparison.html", page(title, found, study.settings, study.notes))
        write_text(self.output / "comparison.svg", figure(title, found))


def read_study(path: Path) -> Study:
    """Raises InputError (exit code 2), naming file and entry, where the file cannot be read or an option cannot be."""

    def bad(what: str) -> InputError:
        return InputError(f"{path}: {what}", exit_code=2)

    try:
        values = tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as e:
        raise bad(f"cannot be read ({e.strerror})") from None
    except ValueError as e:  # not TOML, or not UTF-8
        raise bad(f"is not TOML ({e})") from None
    known = {"train": str, "evaluate": str, "seeds": list, "settings": dict}
    if unknown := values.keys() - known:
        raise bad(f"{min(unknown)!r} is not known; known: {', '.join(known)}")
    for name, kind in known.items():
        if not isinstance(values.get(name, kind()), kind):
            raise bad(f"{name} must be a {({str: 'text', list: 'list', dict: 'table'})[kind]}")
    seeds, settings = values.get("seeds", [0, 1, 2]), values.get("settings", {})
    whole = all(type(s) is int and 0 <= s < 2**32 for s in seeds)
    if not seeds or not whole or len(set(seeds)) < len(seeds):
        raise bad("seeds must be different whole numbers, at least one, from 0 and below 2³²")
    if not settings:
        raise bad("[settings] has none")
    folders: dict[str, str] = {}
    for name, options in settings.items():
        if not isinstance(options, str):
            raise bad(f"settings.{name} must be a text of options")
        if (folder := folder_of(name)) == COMPILED or folder.startswith("comparison."):
            raise bad(f"setting {name!r} would have the folder {folder}, which is taken")
        if (other := folders.setdefault(folder_of(name), name)) != name:
            raise bad(f"settings {other!r} and {name!r} would have the same folder")
    common = _words(values.get("train", ""), path)
    words = {name: common + _words(options, path) for name, options in settings.items()}
    evaluate = _words(values.get("evaluate", ""), path)
    configs = {}
    for name, options in words.items():
        if {"--seed", "--run-dir"} & _names(options):
            raise bad(f"settings.{name}: --seed and --run-dir are given by the comparison")
        registered = dict(REGISTRY)
        try:
            parsed = parse_train(options)
        except InputError as e:
            raise bad(f"settings.{name}: {e}") from None
        finally:  # a setting's plugins are its own
            REGISTRY.clear()
            REGISTRY.update(registered)
        if parsed is None:
            raise bad(f"settings.{name}: asks for the help text")
        configs[name] = parsed[1]
    if {"--model", "--json"} & _names(evaluate):
        raise bad("evaluate: --model and --json are given by the comparison")
    try:
        if Evaluate.parse(["--model", "run", *evaluate], "davae evaluate") is None:
            raise bad("evaluate: asks for the help text")
    except InputError as e:
        raise bad(f"evaluate: {e}") from None
    return Study(words, evaluate, seeds, _unlike(configs))


def _names(options: list[str]) -> set[str]:
    return {option.partition("=")[0].replace("_", "-") for option in options if option.startswith("--")}


def _unlike(configs: dict[str, TrainConfig]) -> list[str]:
    """What should be alike in a comparison, and is not."""
    asked = [{"--steps": c.steps, "--batch-size": c.batch_size, "--data.train": c.data.train} for c in configs.values()]
    return [
        f"settings differ in {option}: their budget or data are not the same"
        for option, first in asked[0].items()
        if any(other[option] != first for other in asked)
    ]


def _words(options: str, path: Path) -> list[str]:
    try:
        return shlex.split(options)
    except ValueError as e:
        raise InputError(f"{path}: {options!r}: {e}", exit_code=2) from None


def folder_of(name: str) -> str:
    """A setting's name as a folder's."""
    return re.sub(r"[^\w.=-]+", "-", name).strip("-.") or "setting"


def run_one(study: Study, name: str, seed: int, folder: Path) -> dict[str, Any]:
    """The measures of one run, trained and measured where that is not done yet.

    Raises:
      InputError: it failed, with the last line that it wrote; or its folder was made with other options.
    """
    options = study.settings[name]
    told = {"train": options, "evaluate": study.evaluate}
    stored, measured = folder.parent / f"{folder.name}.json", folder / MEASURES
    before = _read(stored) if folder.exists() else None
    if before and before.get("train") != options:
        raise InputError(f"{folder}: was made with other options; give another --output, or remove this folder")
    if before == told and (found := _read(measured)):
        return found
    folder.parent.mkdir(parents=True, exist_ok=True)
    write_json(stored, told)
    measured.unlink(missing_ok=True)  # of other options of `davae evaluate`, or damaged
    log = folder.parent / f"{folder.name}.log"
    train = [PROGRAM, *options, "--seed", seed, "--run-dir", folder]
    if "--log.figures" not in _names(options):
        train += ["--log.figures", 0]  # `davae evaluate` measures more
    _called(train, log)
    _called(["-m", "davae_jax.cli", "evaluate", "--model", folder, *study.evaluate, "--json", measured], log)
    if (found := _read(measured)) is None:
        raise InputError(f"{measured}: cannot be read")
    return found


def _read(path: Path) -> dict[str, Any] | None:
    """What a file of ours holds; None where there is none, or it is damaged and has to be made again."""
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return values if isinstance(values, dict) and values else None


def _called(argv: list[Any], log: Path) -> None:
    """Runs Python on these words; what it writes goes to a log."""
    # Seeds of a setting run the same programs: what one has compiled, the others take.
    env = {"JAX_COMPILATION_CACHE_DIR": str(log.parent.parent / COMPILED)} | os.environ
    words = [sys.executable, *map(str, argv)]
    with log.open("a", encoding="utf-8") as file:
        # In a session of its own, so that every interruption reaches it once, and by us.
        process = subprocess.Popen(words, stdout=file, stderr=subprocess.STDOUT, env=env, start_new_session=True)
        try:
            code = process.wait()
        except KeyboardInterrupt:
            process.send_signal(signal.SIGINT)  # it saves
            try:
                process.wait()
            except KeyboardInterrupt:
                process.kill()
            raise
    if code == INTERRUPTED:
        raise KeyboardInterrupt
    if code:
        last = log.read_text(encoding="utf-8", errors="replace").strip().splitlines()[-1:]
        raise InputError(f"{log}: ended with code {code}: {' '.join(last)}")
