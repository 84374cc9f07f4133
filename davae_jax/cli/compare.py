"""`davae compare`: trains several settings on the same data, seeds and budget, and compares their metrics.

A study is a TOML file:

    train = "--data.train texts.txt --steps 2000"   # training options of all runs; may begin with a preset
    evaluate = "--data held-out.txt --samples 50"   # options of `davae evaluate`
    seeds = [0, 1, 2]

    [settings]                                      # each is compared with the first one
    "plain KL" = "--free-bits.mode off"
    "MMD" = "--beta.start 0 --beta.max 0 --regularizers.mmd.weight 10"

Each setting and seed has a run folder, OUTPUT/SETTING/seed-N. The run is trained and then evaluated by `davae
evaluate`. Completed runs are skipped, and an interrupted run is resumed.
"""

from __future__ import annotations

import os
import re
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import tyro
from tqdm import tqdm

from davae_jax.checkpoints.run_folder import check_path
from davae_jax.checkpoints.study_folder import EVALUATION_FILE, options_file, read_evaluation, read_options
from davae_jax.cli.base import Command, options_of_many_values, remove_options
from davae_jax.cli.evaluate import Evaluate
from davae_jax.cli.renamed import RENAMED_OPTIONS
from davae_jax.cli.train import parse_train
from davae_jax.evaluation.comparison import Results, format_table, summary_statistics
from davae_jax.regularizers import REGISTRY
from davae_jax.reports.comparison_page import figure, page
from davae_jax.training.config import TrainConfig
from davae_jax.utils.errors import InputError, on_one_line
from davae_jax.utils.files import check_local, remove_partial, write_json, write_text
from davae_jax.utils.huge_pages import SETTINGS
from davae_jax.utils.json_files import read_json_object
from davae_jax.utils.locks import FolderLock
from davae_jax.utils.progress import progress_bar
from davae_jax.utils.signals import INTERRUPTED, interrupt_on_signals
from davae_jax.utils.toml_files import read_toml

TRAIN_COMMAND = ["-m", "davae_jax.cli", "train"]  # arguments of Python, in a checkout as in an installed package
EVALUATE_COMMAND = ["-m", "davae_jax.cli", "evaluate"]
COMPARISON_KEYS = {"settings", "seeds"}  # of comparison.json, which is written before the other files
MAX_NAME_BYTES = 255  # of a file or folder
PAGE_INTERVAL = 10  # minimum number of seconds between two updates of the output files


class Study(NamedTuple):
    """Holds a study that has been read and checked."""

    settings: dict[str, list[str]]  # training options, including the common ones
    evaluate: list[str]
    seeds: list[int]
    notes: list[str]  # warnings about settings whose budget or data differ


@dataclass(kw_only=True)
class Compare(Command):
    """Trains several settings and compares their metrics in a table and a page with plots.

    STUDY is a TOML file: `train` and `evaluate` are the options of all runs, `seeds` is a list of integers, and
    `[settings]` maps the name of each setting to further training options. Each setting is compared with the first one.
    If the command was interrupted, run it again to resume. docs/regularizers.md has examples.
    """

    study: tyro.conf.Positional[Path]
    """TOML file of the study."""

    output: Path
    """Output folder for the runs and for comparison.md, .json, .html and .svg."""

    def run(self) -> int:
        """Reads the study and runs it. Returns the exit code."""
        study = read_study(self.study)
        check_local(self.output)
        check_path(self.output)
        try:
            self.output.mkdir(parents=True, exist_ok=True)
        except OSError as e:
            raise InputError(f"{self.output}: cannot be used as the output folder ({e.strerror})") from None
        with FolderLock() as lock, interrupt_on_signals():  # an interrupted training run saves a checkpoint
            lock.acquire(self.output)
            self.check_output_files()
            for folder in (self.output, *(self.output / setting_folder(name) for name in study.settings)):
                remove_partial(folder)
            return self.compare(study)

    def check_output_files(self) -> None:
        """Raises InputError if a file that will be replaced is not one of an earlier comparison."""
        there = [self.output / f"comparison.{kind}" for kind in ("json", "md", "html", "svg")]
        there = [path for path in there if os.path.lexists(path)]
        try:
            is_own = read_json_object(self.output / "comparison.json").keys() >= COMPARISON_KEYS
        except FileNotFoundError:
            is_own = False
        except InputError:  # damaged: it is written anew
            is_own = True
        if there and not is_own:
            raise InputError(f"{there[0]}: belongs to another program and would be replaced; choose another --output")

    def compare(self, study: Study) -> int:
        """Trains and evaluates the runs that are incomplete, and writes the comparison. Returns the exit code."""
        results: Results = {name: {} for name in study.settings}
        failed, written = False, time.monotonic()
        # Runs all settings with the first seed, then with the next, so that they can be compared early.
        runs = [(seed, name) for seed in study.seeds for name in study.settings]
        with progress_bar(runs, unit="run") as bar:
            for seed, name in bar:
                bar.set_postfix_str(f"{name}, seed {seed}")
                try:
                    results[name][seed] = complete_run(
                        study, name, seed, self.output / setting_folder(name) / f"seed-{seed}"
                    )
                except (InputError, OSError) as e:  # of one run; the others can be compared all the same
                    failed = True
                    reason = f"{e.filename or self.output}: {e.strerror or e}" if isinstance(e, OSError) else str(e)
                    tqdm.write(f"davae compare: error: {on_one_line(reason)}", file=sys.stderr)
                    continue
                # Runs that are already complete take no time, so the output is not updated after each of them.
                if time.monotonic() > written + PAGE_INTERVAL:
                    self.write(results, study)
                    written = time.monotonic()
        if not any(results.values()):
            return 1
        self.write(results, study)
        print(format_table(results, study.notes))
        print(f"\n{self.output / 'comparison.html'}")
        return 1 if failed else 0

    def write(self, results: Results, study: Study) -> None:
        """Writes the output files of the comparison."""
        from davae_jax.evaluation.evaluate import as_json  # imports JAX

        title = self.study.stem
        values = {
            "settings": study.settings,
            "seeds": study.seeds,
            "metrics": results,
            "compared": summary_statistics(results),
        }
        write_json(self.output / "comparison.json", as_json(values))
        write_text(self.output / "comparison.md", format_table(results, study.notes) + "\n")
        write_text(self.output / "comparison.html", page(title, results, study.settings, study.notes))
        write_text(self.output / "comparison.svg", figure(title, results))


# The study.


def read_study(path: Path) -> Study:
    """Reads and checks a study.

    Raises:
      InputError: the file cannot be read, or an entry or option is invalid (exit code 2). The message names the file
        and the entry.
    """
    try:
        values = _read_toml(path)
        common = _split_words(values.get("train", ""), "train")
        settings = _check_settings(values.get("settings", {}))
        options = {name: _override(common, _split_words(words, f"settings.{name}")) for name, words in settings.items()}
        configs = {name: _train_config(name, words) for name, words in options.items()}
        evaluate = _split_words(values.get("evaluate", ""), "evaluate")
        _check_evaluate(evaluate)
        return Study(options, evaluate, _check_seeds(values.get("seeds", [0, 1, 2])), _differences(configs))
    except _StudyError as e:
        raise InputError(f"{path}: {e}", exit_code=2) from None


class _StudyError(Exception):
    """Raised if an entry of a study is invalid; the message does not name the file."""


def _read_toml(path: Path) -> dict[str, Any]:
    values = read_toml(path)
    known = {
        "train": (str, "string"),
        "evaluate": (str, "string"),
        "seeds": (list, "list"),
        "settings": (dict, "table"),
    }
    if unknown := values.keys() - known:
        raise _StudyError(f"{min(unknown)!r} is not a known entry; available: {', '.join(known)}")
    for name, (kind, type_name) in known.items():
        if not isinstance(values.get(name, kind()), kind):
            raise _StudyError(f"{name} must be a {type_name}")
    return values


def _check_seeds(seeds: list[Any]) -> list[int]:
    valid = all(type(seed) is int and 0 <= seed < 2**32 for seed in seeds)
    if not seeds or not valid or len(set(seeds)) < len(seeds):
        raise _StudyError("seeds must be a list of at least one distinct integer in [0, 2³²)")
    return seeds


def _check_settings(settings: dict[str, Any]) -> dict[str, str]:
    """Checks that there are settings, that their options are strings, and that their folders are distinct."""
    if not settings:
        raise _StudyError("[settings] must contain at least one setting")
    names: dict[str, str] = {}  # folder → setting
    for name, options in settings.items():
        if not isinstance(options, str):
            raise _StudyError(f"settings.{name} must be a string of options")
        folder = setting_folder(name)
        if folder.startswith("comparison."):
            raise _StudyError(f"setting {name!r} would use the folder {folder}, which is reserved")
        if len(os.fsencode(folder)) > MAX_NAME_BYTES:
            raise _StudyError(f"setting {name!r} would use a folder whose name has more than {MAX_NAME_BYTES} bytes")
        if (other := names.setdefault(folder, name)) != name:
            raise _StudyError(f"settings {other!r} and {name!r} would use the same folder")
    return settings


def _train_config(name: str, options: list[str]) -> TrainConfig:
    """Parses the training options of a setting."""
    if {"--seed", "--run-dir"} & _option_names(options):
        raise _StudyError(f"settings.{name}: --seed and --run-dir are set by davae compare")
    registered = dict(REGISTRY)
    try:
        parsed = parse_train(options, "davae train")
    except InputError as e:
        raise _StudyError(f"settings.{name}: {e}") from None
    finally:  # unregisters the plugins of this setting: another setting may register the same name
        REGISTRY.clear()
        REGISTRY.update(registered)
    if parsed is None:
        raise _StudyError(f"settings.{name}: must not contain --help")
    return parsed[1]


def _check_evaluate(options: list[str]) -> None:
    if {"--model", "--json"} & _option_names(options):
        raise _StudyError("evaluate: --model and --json are set by davae compare")
    try:
        parsed = Evaluate.parse(["--model", "run", *options], "davae evaluate")
    except InputError as e:
        raise _StudyError(f"evaluate: {e}") from None
    if parsed is None:
        raise _StudyError("evaluate: must not contain --help")


def _override(common: list[str], further: list[str]) -> list[str]:
    """Returns the common options with further ones, which take their place if they have the same names.

    Of most options the last occurrence counts; the values of those with several, such as --data.train, would be joined.
    """
    return remove_options(common, options_of_many_values(TrainConfig) & _option_names(further)) + further


def _option_names(words: list[str]) -> set[str]:
    return {word.partition("=")[0].replace("_", "-") for word in words if word.startswith("--")}


def _differences(configs: dict[str, TrainConfig]) -> list[str]:
    """Returns a warning for each option that should be the same in all settings, but is not."""
    rows = [{"--steps": c.steps, "--batch-size": c.batch_size, "--data.train": c.data.train} for c in configs.values()]
    return [
        f"settings differ in {option}: their budget or data are not the same"
        for option, first in rows[0].items()
        if any(row[option] != first for row in rows)
    ]


def _split_words(options: str, entry: str) -> list[str]:
    try:
        return shlex.split(options)
    except ValueError as e:
        raise _StudyError(f"{entry}: {options!r}: {e}") from None


def setting_folder(name: str) -> str:
    """Returns the folder name of a setting."""
    return re.sub(r"[^\w.=-]+", "-", name).strip("-.") or "setting"


# The runs.


def complete_run(study: Study, name: str, seed: int, folder: Path) -> dict[str, Any]:
    """Trains and evaluates one run unless this has been done, and returns its metrics.

    Raises:
      InputError: training or evaluation failed (the message has the last line of the log), or the folder belongs to a
        run with other options.
    """
    options = {"train": study.settings[name], "evaluate": study.evaluate}
    evaluation_file = folder / EVALUATION_FILE
    stored = _unless_damaged(read_options, options_file(folder)) if folder.exists() else None
    if stored and _current_names(stored["train"]) != _current_names(options["train"]):
        raise InputError(f"{folder}: was trained with other options; choose another --output or delete this folder")
    is_current = stored is not None and stored["evaluate"] == options["evaluate"]
    if is_current and (metrics := _unless_damaged(read_evaluation, evaluation_file)):
        return metrics
    folder.parent.mkdir(parents=True, exist_ok=True)
    write_json(options_file(folder), options)
    evaluation_file.unlink(missing_ok=True)  # evaluated with other options, or damaged
    log = folder.parent / f"{folder.name}.log"
    train = [*TRAIN_COMMAND, *options["train"], "--seed", seed, f"--run-dir={folder}"]
    if "--log.figures" not in _option_names(options["train"]):
        train += ["--log.figures", 0]  # `davae evaluate` computes more metrics
    _run_python(train, log)
    evaluate = [*EVALUATE_COMMAND, f"--model={folder}", *options["evaluate"], f"--json={evaluation_file}"]
    _run_python(evaluate, log)  # the paths may begin with a dash
    try:
        return read_evaluation(evaluation_file)
    except OSError:
        raise InputError(f"{evaluation_file}: cannot be read") from None


def _current_names(options: Sequence[str]) -> list[str]:
    """Returns training options under their current names, so that runs of earlier versions are recognized."""
    renamed = RENAMED_OPTIONS["train.py"]
    parts = [word.partition("=") for word in options]
    return [renamed.get(name.replace("_", "-"), name) + equals + value for name, equals, value in parts]


def _unless_damaged(read: Callable[[Path], dict[str, Any]], path: Path) -> dict[str, Any] | None:
    """Reads a file that this command wrote. Returns None if it does not exist or is damaged: it is written anew."""
    try:
        return read(path)
    except (OSError, InputError):
        return None


def _run_python(argv: Sequence[Any], log: Path) -> None:
    """Runs Python with these arguments and appends its output to a log."""
    env = SETTINGS | os.environ
    words = [sys.executable, *map(str, argv)]
    with log.open("a", encoding="utf-8") as file:
        # Starts a new session, so that an interrupt from the terminal reaches only this process, which forwards it.
        process = subprocess.Popen(words, stdout=file, stderr=subprocess.STDOUT, env=env, start_new_session=True)
        try:
            code = process.wait()
        except KeyboardInterrupt:
            process.send_signal(signal.SIGINT)  # the run saves a checkpoint
            try:
                process.wait()
            except KeyboardInterrupt:
                process.kill()
            raise
    if code == INTERRUPTED:
        raise KeyboardInterrupt
    if code:
        with log.open("rb") as file:
            file.seek(-min(log.stat().st_size, 1 << 16), os.SEEK_END)
            last = file.read().decode("utf-8", "replace").strip().splitlines()[-1:]
        raise InputError(f"{log}: ended with code {code}: {' '.join(last)}")
