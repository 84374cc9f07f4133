"""Writes, reads and compares the settings of a run as plain values, the content of train.json."""

from __future__ import annotations

import copy
import dataclasses
import hashlib
import json
from collections.abc import Collection, Mapping
from typing import Any

from davae_jax.regularizers.registry import active
from davae_jax.training.config import TrainConfig
from davae_jax.utils.settings import changed_settings


def to_dict(config: TrainConfig) -> dict[str, Any]:
    """Returns the settings as plain values. Only active regularizers are included."""
    values = dataclasses.asdict(config)
    regularizers = active(config.regularizers)
    values["regularizers"] = {name: dataclasses.asdict(regularizer) for name, regularizer in regularizers.items()}
    for name in SEVERAL_VALUES:
        if len(values["data"][name] or ()) == 1:
            values["data"][name] = values["data"][name][0]
    return json.loads(json.dumps(values, default=str))


# Settings of the texts that may have several values. A single one is stored as such, as by earlier versions.
SEVERAL_VALUES = ("train", "valid", "field")


# Settings that had another name in earlier versions: old name → current name.
RENAMED_SETTINGS = {"data.pieces": "data.decoder_vocab_size", "data.entries": "data.encoder_vocab_size"}


def upgrade_settings(values: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the settings of a train.json, which an earlier version may have written, under current names."""
    values = copy.deepcopy(dict(values))
    for old, new in RENAMED_SETTINGS.items():
        (section, old_name), (_, new_name) = old.split("."), new.split(".")
        if old_name in values.get(section, {}):
            values[section][new_name] = values[section].pop(old_name)
    return values


# Settings that are paths. Texts and tokenizers are compared by their contents; pretrained weights only
# by whether they are given.
LOCATIONS = ("data.train", "data.valid", "tokenizers", "init.model", "init.encoder", "init.decoder")


def digest_settings(config: TrainConfig) -> str:
    """Returns a digest of the settings that all processes must share; of `LOCATIONS` only whether they are set."""
    values = to_dict(config)
    del values["distributed"]
    for name in LOCATIONS:
        section, _, setting = name.rpartition(".")
        settings = values[section] if section else values
        settings[setting] = settings[setting] is not None
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()


# Settings that do not change the results, beyond rounding. Plugins are compared by their contents
# (`training.run.folder.open_run`).
NOT_COMPARED = ("run_dir", "log", "mesh", "distributed", "plugin", "data.max_bad", "attention")


def differences(old: Mapping[str, Any], new: Mapping[str, Any], ignored: Collection[str] = ()) -> list[str]:
    """Returns the settings in which two runs differ, as `utils.settings.changed_settings` describes them.

    A setting that is missing from one of them, because another version wrote it, counts as its default.

    Args:
      ignored: further settings that are not compared.
    """
    return changed_settings(old, new, defaults=to_dict(TrainConfig()), ignored=(*NOT_COMPARED, *ignored))
