"""Opens a run folder: a new one, or one that was made with the same config, texts and tokenizers.

train.json       the resolved config, and hashes of the texts, tokenizers and plugins
config.json      the model config; with vocab.txt and spiece.model, it lets every `davae` command read the folder
checkpoints/     one folder per saved step (`checkpointer.py`)
metrics.jsonl    one line every few steps; the same values are in TensorBoard's event files in `events/` (`log.py`)
held_out.jsonl   losses of the held-out texts, one line per checkpoint
samples.jsonl    texts that the model generated during training
profile/         a profiler trace, if --profile-steps is given
"""

from __future__ import annotations

import hashlib
import json
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from davae_jax.checkpoints.run_folder import (
    CONFIG_FILE,
    INIT_FOLDER,
    RUN_SETTINGS,
    SOURCE_DIGEST,
    TOKENIZER_HASHES,
    check_path,
    complete_checkpoints,
    saved_steps,
    tokenizer_changes,
)
from davae_jax.data.corpus import Corpus
from davae_jax.regularizers import plugin_digest
from davae_jax.tokenizers.load import TOKENIZER_FILES
from davae_jax.training.config import TrainConfig
from davae_jax.training.run.length import LENGTH_SETTINGS, describe_new_length, is_other_length, with_length_of
from davae_jax.training.run.saved_config import LOCATIONS, differences, to_dict, upgrade_settings
from davae_jax.utils.errors import InputError, OptionError, system_reason
from davae_jax.utils.files import (
    check_local,
    file_sha256,
    is_partial,
    is_same_folder,
    remove_folder,
    remove_partial,
    remove_removed,
    write_json,
)
from davae_jax.utils.json_files import SUM, has_wrong_sum, read_json_object, with_sum
from davae_jax.utils.locks import FolderLock

# Hashes in train.json, and the option that names the hashed file.
CONTENT_HASHES = {"digest_of_texts": "data.train", "digest_of_held_out": "data.valid"}


def open_run(path: Path, config: TrainConfig, corpus: Corpus, lock: FolderLock) -> None:
    """Makes a run folder, or checks that an existing one can be continued. Locks it.

    Texts, tokenizers and plugins are compared by their contents, not by their paths. Without a checkpoint, the
    settings may differ: the run then starts from the beginning. With one, the number of steps may, if no fewer than
    it has taken; which schedules this changes is printed.

    Raises:
      InputError: the folder was made with another config (exit code 2; the message names the options), contains
        other files or only incomplete checkpoints, is used by another program, or cannot be written.
    """
    stored, new_length = path / RUN_SETTINGS, None
    try:
        values = to_dict(config)
        values |= {"digest_of_texts": corpus.digest, "digest_of_held_out": corpus.held_out_digest}
        if config.plugin:
            values["digest_of_plugins"] = [plugin_digest(plugin) for plugin in config.plugin]
        check_local(path)
        check_path(path)
        if path.is_symlink() and not path.exists():
            raise InputError(f"{path}: is a link to nothing")
        path.mkdir(parents=True, exist_ok=True)
        lock.acquire(path)
        _check_not_lost(path)
        if stored.exists():
            old = read_json_object(stored)
            if not _is_of_a_run(old):
                raise InputError(
                    f"{stored}: is damaged, or belongs to another program; restore it, or choose another folder"
                )
            is_intact = not has_wrong_sum(old)
            old.pop(SUM, None)
            values |= {name: value for name, value in old.items() if name in (TOKENIZER_HASHES, SOURCE_DIGEST)}
            try:
                old = upgrade_settings(old)
                changed = changed_options(old, values) + changed_tokenizers(config, path)
                is_other = bool(changed or differences(old, values))
            except (KeyError, TypeError, AttributeError):
                raise InputError(f"{stored}: is damaged; restore it, or choose another folder") from None
            if is_other:
                if not complete_checkpoints(path):
                    _remove_preparations(path, config.tokenizers)
                    values.pop(TOKENIZER_HASHES, None)
                    values.pop(SOURCE_DIGEST, None)
                elif not is_intact and (changed or is_other_length(old, values)):
                    problem = "is damaged (its own sum differs); restore it, or choose another folder"
                    raise InputError(f"{stored}: {problem}")
                elif changed:
                    raise OptionError(
                        "--run-dir", f"{path} was made with another config: {', '.join(changed)}; choose another folder"
                    )
                elif is_other_length(old, values):
                    new_length = _describe_length(path, old, config)
        elif not all(is_partial(file) for file in path.iterdir()):
            raise OptionError(
                "--run-dir", f"{path} contains files but no run (there is no train.json); choose another folder"
            )
        if SOURCE_DIGEST in values:  # whose model is the one that the run began with, whatever is named now
            values["init"]["model"] = old["init"]["model"]
        write_json(stored, with_sum(values))
        if new_length:
            print(f"{path}: {new_length}")
        remove_partial(path)
        remove_removed(path)
    except OSError as e:
        raise InputError(f"{path}: cannot be used as a run folder ({system_reason(e) or e})") from e


def check_tokenizers(path: Path) -> None:
    """Compares the tokenizers in a run folder with those that the run began with; train.json has their hashes.

    Those of a new run, or of one that an earlier version began, are added to it.

    Raises:
      InputError: a tokenizer is another one, whose ids the model has not been trained on.
    """
    stored = path / RUN_SETTINGS
    values = read_json_object(stored)
    if TOKENIZER_HASHES not in values:
        hashes = {name: file_sha256(path / name) for name in TOKENIZER_FILES}
        write_json(stored, with_sum(values | {TOKENIZER_HASHES: hashes}))
    elif problems := tokenizer_changes(path, values):
        raise InputError(f"{'; '.join(problems)}; restore it, or choose another folder")


def _describe_length(path: Path, old: dict[str, Any], config: TrainConfig) -> str:
    """Returns a line about a run that goes on for another number of steps. Raises OptionError if it has taken more.

    old: the content of train.json.
    """
    done = max(int(step.name) for step in complete_checkpoints(path))
    if config.steps < done:
        raise OptionError("--steps", f"must be at least {done}, the steps that {path} has taken, not {config.steps}")
    return describe_new_length(with_length_of(config, old), config, done)


def record_source(path: Path, sums: Mapping[str, int]) -> None:
    """Adds a digest of the weights that a run begins with to its train.json.

    sums: of each array, by its path in the model (`checkpoints.sums.array_sums`).
    """
    digest = hashlib.sha256(json.dumps({name: int(value) for name, value in sorted(sums.items())}).encode()).hexdigest()
    values = read_json_object(path / RUN_SETTINGS)
    values.pop(SUM, None)
    write_json(path / RUN_SETTINGS, with_sum(values | {SOURCE_DIGEST: digest}))


def _is_of_a_run(values: dict[str, Any]) -> bool:
    """Returns whether a train.json is one of a run, by its content: texts may be in a file of this name as well."""
    sections = [values.get(name) for name in ("data", "model")]
    return type(values.get("steps")) is int and all(isinstance(section, dict) for section in sections)


def _check_not_lost(path: Path) -> None:
    """Raises InputError if a run has checkpoints of which none is complete, as after an incomplete copy.

    It would begin anew, and would replace them. A run itself saves under a step's name what is complete.
    """
    steps = sorted(saved_steps(path), key=lambda step: int(step.name))
    complete = complete_checkpoints(path)
    if steps and not complete:
        raise InputError(
            f"{steps[-1]}: is not a complete checkpoint, and there is none; "
            "copy the folder again, or remove it to begin anew"
        )
    newest = max((int(step.name) for step in complete), default=0)
    for step in [step for step in steps if int(step.name) > newest]:
        warnings.warn(f"{step}: is not a complete checkpoint and is left out", stacklevel=2)


def _remove_preparations(path: Path, tokenizers: Path | None) -> None:
    """Removes tokenizers, config and initial checkpoint of an earlier start; no checkpoint may depend on them.

    tokenizers: the folder of those to be used; the user may mean the ones of the earlier start.
    """
    is_source = tokenizers is not None and is_same_folder(tokenizers, path)
    for name in (CONFIG_FILE, *(() if is_source else TOKENIZER_FILES)):
        (path / name).unlink(missing_ok=True)
    if (path / INIT_FOLDER).exists():
        remove_folder(path / INIT_FOLDER)


def changed_options(old: dict[str, Any], new: dict[str, Any]) -> list[str]:
    """Returns the options in which two train.json differ, with both values, except for `LENGTH_SETTINGS`.

    Files are compared by contents, not by path. A hash that the older file lacks is not compared.
    """
    changed = differences(old, new, ignored=(*LOCATIONS, *CONTENT_HASHES, *LENGTH_SETTINGS))
    for name in ("model", "encoder", "decoder"):
        before, now = (values.get("init", {}).get(name) for values in (old, new))
        if (before is None) != (now is None):
            changed.append(f"init.{name} ({before}, now {now})")
    for name, option in CONTENT_HASHES.items():
        if name in old and old[name] != new[name]:
            changed.append(f"{option} (other contents)")
    return changed


def changed_tokenizers(config: TrainConfig, path: Path) -> list[str]:
    """Returns the option --tokenizers if its files differ from those in the run folder."""
    if config.tokenizers is None:
        return []
    pairs = [(config.tokenizers / name, path / name) for name in TOKENIZER_FILES]
    same = all(a.read_bytes() == b.read_bytes() for a, b in pairs if a.is_file() and b.is_file())
    return [] if same else ["tokenizers (other contents)"]
