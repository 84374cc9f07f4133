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
import subprocess
import sys
import tomllib
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import tyro
from tqdm import tqdm

from davae_jax.cli import INTERRUPTED, Command
from davae_jax.comparison import Results, figure, format_table, page
from davae_jax.errors import InputError
from davae_jax.files import write_json, write_text
from davae_jax.train_cli import parse_train

PROGRAM = Path(__file__).parent.parent / "train.py"
MEASURES = "evaluation.json"  # in a run's folder, when all is done


class Study(NamedTuple):
    settings: dict[str, list[str]]  # options of train.py, those of all runs included
    evaluate: list[str]
    seeds: list[int]


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
        if not PROGRAM.is_file():
            raise InputError(f"{PROGRAM}: no such file; `davae compare` trains by it and works in a checkout only")
        found: Results = {name: {} for name in study.settings}
        failed = []
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
                if any(found.values()):
                    self.write(found, study)
        if not any(found.values()):
            return 1
        print(format_table(found))
        print(f"\n{self.output / 'comparison.html'}")
        return 1 if failed else 0

    def write(self, found: Results, study: Study) -> None:
        title = self.study.stem
        write_json(self.output / "comparison.json", {"settings": study.settings, "seeds": study.seeds, "found": found})
        write_text(self.output / "comparison.md", format_table(found) + "\n")
        write_text(self.output / "comparison.html", page(title, found, study.settings))
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
    if not seeds or len(set(seeds)) < len(seeds) or not all(isinstance(s, int) and s >= 0 for s in seeds):
        raise bad("seeds must be different whole numbers, at least one")
    if not settings:
        raise bad("[settings] has none")
    folders: dict[str, str] = {}
    for name, options in settings.items():
        if not isinstance(options, str):
            raise bad(f"settings.{name} must be a text of options")
        if (other := folders.setdefault(folder_of(name), name)) != name:
            raise bad(f"settings {other!r} and {name!r} would have the same folder")
    common = _words(values.get("train", ""), path)
    study = Study(
        {name: common + _words(options, path) for name, options in settings.items()},
        _words(values.get("evaluate", ""), path),
        seeds,
    )
    for name, options in study.settings.items():
        if {"--seed", "--run-dir"} & set(options):
            raise bad(f"settings.{name}: --seed and --run-dir are given by the comparison")
        try:
            parse_train(options)
        except InputError as e:
            raise bad(f"settings.{name}: {e}") from None
    return study


def _words(options: str, path: Path) -> list[str]:
    try:
        return shlex.split(options)
    except ValueError as e:
        raise InputError(f"{path}: {options!r}: {e}", exit_code=2) from None


def folder_of(name: str) -> str:
    """A setting's name as a folder's."""
    return re.sub(r"[^\w.=-]+", "-", name).strip("-") or "setting"


def run_one(study: Study, name: str, seed: int, folder: Path) -> dict[str, Any]:
    """The measures of one run, trained and measured where that is not done yet.

    Raises:
      InputError: it failed, with the last line that it wrote; or its folder was made with other options.
    """
    told = {"train": study.settings[name], "evaluate": study.evaluate}
    stored, measured = folder.parent / f"{folder.name}.json", folder / MEASURES
    if stored.exists() and json.loads(stored.read_text(encoding="utf-8")) != told:
        raise InputError(f"{folder}: was made with other options; give another --output, or remove it")
    if measured.exists():
        return json.loads(measured.read_text(encoding="utf-8"))
    folder.parent.mkdir(parents=True, exist_ok=True)
    write_json(stored, told)
    log = folder.parent / f"{folder.name}.log"
    train = [PROGRAM, *study.settings[name], "--seed", seed, "--run-dir", folder]
    if not _has(study.settings[name], "--log.figures"):
        train += ["--log.figures", 0]  # `davae evaluate` measures more
    _called(train, log)
    _called(["-m", "davae_jax.cli", "evaluate", "--model", folder, *study.evaluate, "--json", measured], log)
    return json.loads(measured.read_text(encoding="utf-8"))


def _has(options: list[str], name: str) -> bool:
    return any(option == name or option.startswith(f"{name}=") for option in options)


def _called(argv: list[Any], log: Path) -> None:
    """Runs Python on these words; what it writes goes to a log."""
    # Seeds of a setting run the same programs: what one has compiled, the others take.
    env = {"JAX_COMPILATION_CACHE_DIR": str(log.parent.parent / "compiled")} | os.environ
    with log.open("a", encoding="utf-8") as file:
        process = subprocess.Popen([sys.executable, *map(str, argv)], stdout=file, stderr=subprocess.STDOUT, env=env)
        try:
            code = process.wait()
        except KeyboardInterrupt:  # the same Ctrl-C has reached the run: it saves
            process.wait()
            raise
    if code == INTERRUPTED:
        raise KeyboardInterrupt
    if code:
        last = log.read_text(encoding="utf-8", errors="replace").strip().splitlines()[-1:]
        raise InputError(f"{log}: ended with code {code}: {' '.join(last)}")
