"""Tells what kind of folder a folder is and in what state it is, for `davae check`.

Nothing is written. A program may be using the folder: what it writes or removes meanwhile is no damage.
"""

from __future__ import annotations

import contextlib
import math
import os
import stat
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from davae_jax.checkpoints.check_weights import (
    checkpoint_problems,
    converted_problems,
    read_config,
    read_published,
    tokenizer_problems,
    value_problems,
)
from davae_jax.checkpoints.published.torch_file import WEIGHTS_FILES
from davae_jax.checkpoints.run_folder import (
    CHECKPOINTS_FOLDER,
    CONFIG_FILE,
    INIT_FOLDER,
    LOGS,
    PARAMS_FOLDER,
    RUN_SETTINGS,
    complete_checkpoints,
    config_folder,
    is_run_checkpoint,
    is_step,
    tokenizer_changes,
)
from davae_jax.checkpoints.study_folder import run_problems
from davae_jax.checkpoints.sums import SUMS_FILE, file_problems
from davae_jax.checkpoints.weights import MissingSums, stored_metadata, stored_shapes
from davae_jax.data.prepared.check_prepared import prepared_problems
from davae_jax.data.prepared.shards import MANIFEST, SETTINGS, read_manifest
from davae_jax.tokenizers.decoder import count_pieces
from davae_jax.tokenizers.encoder import read_vocabulary
from davae_jax.tokenizers.load import TOKENIZER_FILES
from davae_jax.utils.errors import InputError
from davae_jax.utils.files import is_partial, is_removed
from davae_jax.utils.json_files import has_wrong_sum, read_json_object
from davae_jax.utils.json_lines import has_step, iterate_json_lines
from davae_jax.utils.locks import is_locked


class Report(NamedTuple):
    """The result of checking one folder."""

    folder: Path
    kind: str
    state: dict[str, Any]  # in words: strings, numbers, lists
    damaged: list[str]  # one line for each problem, which begins with the file; [] if the folder is whole


def check_folder(folder: Path) -> Report:
    """Checks every file of an existing folder that the project can judge."""
    kind, check = _kind(folder)
    if check is _check_unknown:
        return Report(folder, kind, *check(folder))
    size, special = _walk(folder)
    # Pipes are not opened: a reader would wait for ever.
    state, damaged = ({}, special) if special else check(folder)
    state |= {"bytes": size, "in use by another program": "yes" if is_locked(config_folder(folder)) else "no"}
    return Report(folder, kind, state, damaged)


def _kind(folder: Path) -> tuple[str, Callable[[Path], tuple[dict[str, Any], list[str]]]]:
    """Returns what a folder is by its contents, and the function that checks it."""
    names = {path.name for path in folder.iterdir()}
    checkpoints = folder / CHECKPOINTS_FOLDER
    if is_run_checkpoint(folder) or (config_folder(folder) != folder and is_step(folder.resolve().name)):
        return "one checkpoint of a run", _check_checkpoint
    if names & {MANIFEST, SETTINGS}:
        return "prepared texts", _check_prepared
    if RUN_SETTINGS in names or (checkpoints.is_dir() and any(is_step(path.name) for path in checkpoints.iterdir())):
        return "a run", _check_run
    if PARAMS_FOLDER in names:
        return "a converted model", _check_converted
    if names & set(WEIGHTS_FILES):
        return "a published model", _check_published
    if names & set(TOKENIZER_FILES):
        return "tokenizers", _check_tokenizers
    if any(folder.glob(f"*/seed-*/{RUN_SETTINGS}")):
        return "the runs of a study", _check_study
    return "nothing that davae-jax made", _check_unknown


def _check_checkpoint(folder: Path) -> tuple[dict[str, Any], list[str]]:
    run = config_folder(folder)
    config, damaged = read_config(run)
    damaged += tokenizer_problems(run, config, needed=True)
    path = folder.resolve()
    is_in_run = run != folder and is_step(path.name)  # otherwise it has been copied, or renamed
    if is_in_run and path not in [complete.resolve() for complete in complete_checkpoints(run)]:
        return {"run": str(run)}, [*damaged, f"{folder}: is not a complete checkpoint"]
    state = {"run": str(run), "step": int(path.name)} if is_in_run else {}
    return state | {"parameters": _stored_parameters(path)}, damaged + checkpoint_problems(path, config)


def _check_run(folder: Path) -> tuple[dict[str, Any], list[str]]:
    damaged: list[str] = []
    state: dict[str, Any] = {}
    try:
        settings = read_json_object(folder / RUN_SETTINGS)
        state["steps of the run"] = settings.get("steps", "unknown")
        if has_wrong_sum(settings):
            damaged.append(f"{folder / RUN_SETTINGS}: is damaged (its own sum differs)")
        elif type(settings.get("steps")) is not int:
            damaged.append(f"{folder / RUN_SETTINGS}: is damaged")
        if all((folder / name).is_file() for name in TOKENIZER_FILES):
            damaged += tokenizer_changes(folder, settings)
    except FileNotFoundError:
        damaged.append(f"{folder / RUN_SETTINGS}: is missing, without which the run cannot be resumed")
    except InputError as e:
        damaged.append(str(e))
    complete: list[Path] = []
    try:
        complete = sorted(complete_checkpoints(folder), key=lambda path: int(path.name))
    except InputError as e:
        damaged.append(str(e))
    state |= {"step": int(complete[-1].name) if complete else 0, "complete checkpoints": []}
    config = None
    if complete or (folder / CONFIG_FILE).exists():
        config, problems = read_config(folder)
        damaged += problems + tokenizer_problems(folder, config, needed=bool(complete))
    if complete:
        state["parameters"] = _stored_parameters(complete[-1])
    for path in complete:
        problems = checkpoint_problems(path, config)
        if path.exists():  # otherwise the run has removed it meanwhile
            state["complete checkpoints"].append(int(path.name))
            damaged += problems
    if (folder / INIT_FOLDER).is_dir():
        damaged += converted_problems(folder / INIT_FOLDER)
    locked = is_locked(folder)
    state["leftovers"], incomplete = _leftovers(folder, {path.name for path in complete})
    damaged += [] if locked else incomplete
    for name in LOGS:
        damaged += _log_problems(folder / name, may_grow=locked)
    return state, damaged


def _leftovers(folder: Path, complete: set[str]) -> tuple[list[str], list[str]]:
    """Returns what is in a run beside its files: names of leftovers, and the problems of incomplete checkpoints."""
    names = [path.name for path in folder.iterdir() if is_partial(path) or is_removed(path)]
    incomplete = []
    checkpoints = folder / CHECKPOINTS_FOLDER
    for path in sorted(checkpoints.iterdir()) if checkpoints.is_dir() else []:
        if not is_step(path.name):
            names.append(f"{CHECKPOINTS_FOLDER}/{path.name}")
        elif path.name not in complete:
            incomplete.append(f"{path}: is not a complete checkpoint")
    return names, [problem for problem in incomplete if Path(problem.rpartition(": ")[0]).exists()]


def _log_problems(path: Path, *, may_grow: bool) -> list[str]:
    """Returns a line for each damaged line of a run's log. may_grow: the last line may be incomplete."""
    if not path.exists():
        return []
    damaged = []
    try:
        for line in iterate_json_lines(path):
            if not has_step(line) and not (may_grow and not line.data.endswith(b"\n")):
                damaged.append(line.number)
    except OSError as e:
        return [f"{path}: cannot be read ({e.strerror})"]
    more = f" and {len(damaged) - 1} others are" if damaged[1:] else " is"
    return [f"{path}: line {damaged[0]}{more} damaged"] if damaged else []


def _check_converted(folder: Path) -> tuple[dict[str, Any], list[str]]:
    params = folder / PARAMS_FOLDER
    wrong_files = file_problems(params)
    damaged = (wrong_files or value_problems(folder)) + tokenizer_problems(folder, read_config(folder)[0])
    sums = _state_of_sums(params, bool(wrong_files))
    return {"parameters": _stored_parameters(params), "sums": sums}, damaged


def _state_of_sums(params: Path, wrong_files: bool) -> str:
    if (params / SUMS_FILE).exists():
        return "wrong" if wrong_files else "right"
    try:
        stored_metadata(params)
    except MissingSums:
        return "missing"
    except InputError:  # it is among the problems
        pass
    return "none; an earlier version wrote the model"


def _check_published(folder: Path) -> tuple[dict[str, Any], list[str]]:
    config, damaged = read_config(folder)
    counts = []
    for _, tensors, problem in read_published(folder, config):
        damaged += [problem] if problem else []
        counts.append(sum(array.size for array in tensors.values()))
    damaged += tokenizer_problems(folder, config)
    return {} if damaged else {"parameters": counts[0]}, damaged


def _check_prepared(folder: Path) -> tuple[dict[str, Any], list[str]]:
    if not (folder / MANIFEST).exists():
        reason = "`davae prepare` has not finished; the same command goes on"
        return {}, [f"{folder / MANIFEST}: is missing: {reason}"]
    try:
        manifest = read_manifest(folder)
        damaged = prepared_problems(folder, manifest)
    except InputError as e:
        return {}, [str(e)]
    counts = {name.replace("_", " "): n for name, n in manifest["counts"].items()}
    sums = "all files" if "files" in manifest else "the shards and tokenizers only; an earlier version prepared them"
    return counts | {"shards": len(manifest["shards"]), "sums": sums}, damaged


def _check_tokenizers(folder: Path) -> tuple[dict[str, Any], list[str]]:
    state: dict[str, Any] = {}
    damaged = tokenizer_problems(folder, None)
    counts = (lambda path: len(read_vocabulary(path)), count_pieces)
    for name, count in zip(TOKENIZER_FILES, counts, strict=True):
        if not (folder / name).exists():
            state[name] = "missing"
        else:
            with contextlib.suppress(InputError, OSError):  # it is among the problems
                state[name] = count(folder / name)
    return state, damaged


def _check_study(folder: Path) -> tuple[dict[str, Any], list[str]]:
    runs = sorted(path.parent for path in folder.glob(f"*/seed-*/{RUN_SETTINGS}"))
    return {"runs": len(runs)}, [problem for run in runs for problem in [*_check_run(run)[1], *run_problems(run)]]


def _check_unknown(folder: Path) -> tuple[dict[str, Any], list[str]]:
    return {}, [f"{folder}: contains no model, run, prepared texts or tokenizers"]


def _stored_parameters(path: Path) -> int | str:
    """Returns the number of weights of a checkpoint."""
    try:
        return sum(math.prod(leaf.shape) for leaf in stored_shapes(path).values())
    except InputError:
        return "unknown"


def _walk(folder: Path) -> tuple[int, list[str]]:
    """Returns the number of bytes of the files in a folder, and a line for each entry that is no file or folder.

    Such entries are links to nothing, pipes and devices. Links to files count as the file, links to folders are not
    followed.
    """
    size, special = 0, []
    for parent, _, names in os.walk(folder):
        for path in (os.path.join(parent, name) for name in names):
            try:
                status = os.stat(path)
            except OSError as e:
                if os.path.lexists(path):  # otherwise it was removed meanwhile
                    special.append(f"{path}: cannot be read ({e.strerror})")
                continue
            if stat.S_ISREG(status.st_mode):
                size += status.st_size
            else:
                special.append(f"{path}: is not a file")
    return size, special
