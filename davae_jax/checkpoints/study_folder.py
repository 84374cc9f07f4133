"""Reads the files that `davae compare` keeps for each run SETTING/seed-N of a study.

seed-N.json              the options of the run: {"train": […], "evaluate": […]}
seed-N/evaluation.json   the metrics, as `davae evaluate --json` writes them, of a run that is complete
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from davae_jax.utils.errors import InputError
from davae_jax.utils.json_files import read_json_object

EVALUATION_FILE = "evaluation.json"
OPTIONS = ("train", "evaluate")
RATE_AND_DISTORTION = ("kl", "rec_nll")  # the first metrics of an evaluation; null if not finite


def options_file(run: Path) -> Path:
    """Returns the file of a run's options."""
    return run.parent / f"{run.name}.json"


def read_options(path: Path) -> dict[str, Any]:
    """Returns the options of a run. Raises FileNotFoundError, and InputError if the file is damaged."""
    values = read_json_object(path)
    if not all(_are_strings(values.get(name)) for name in OPTIONS):
        raise InputError(f"{path}: is damaged: {' and '.join(OPTIONS)} are not lists of options")
    return values


def read_evaluation(path: Path) -> dict[str, Any]:
    """Returns the metrics of a run. Raises FileNotFoundError, and InputError if the file is damaged."""
    values = read_json_object(path)
    numbers = [values[name] for name in RATE_AND_DISTORTION if values.get(name) is not None]
    is_intact = all(type(x) in (int, float) for x in numbers) and _are_strings(values.get("warnings", []))
    if not values or not is_intact:
        raise InputError(f"{path}: is damaged: it does not contain the metrics of an evaluation")
    return values


def run_problems(run: Path) -> list[str]:
    """Returns the problems of what a study keeps for one of its runs, which may be incomplete."""
    problems = []
    for path, read in ((options_file(run), read_options), (run / EVALUATION_FILE, read_evaluation)):
        try:
            read(path)
        except FileNotFoundError:  # a run that is not evaluated yet, or was not started by a study
            pass
        except InputError as e:
            problems.append(str(e))
    return problems


def _are_strings(values: Any) -> bool:
    return isinstance(values, list) and all(isinstance(value, str) for value in values)
