"""Reads settings of a run from a file: TOML that the user writes, or the train.json of another run.

    steps = 2000
    [data]
    train = "my-texts.txt"
    [beta]
    max = 0.2

The names are those of the fields of `TrainConfig`; `learning-rate`, as the option is called, is `learning_rate` too.
"""

from __future__ import annotations

import copy
import dataclasses
import os
import reprlib
import types
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple, TypeVar, Union, get_args, get_origin, get_type_hints

import tyro

from davae_jax.checkpoints.run_folder import SOURCE_DIGEST, TOKENIZER_HASHES
from davae_jax.training.run.saved_config import upgrade_settings
from davae_jax.utils.errors import InputError
from davae_jax.utils.json_files import SUM, has_wrong_sum, read_json_object
from davae_jax.utils.toml_files import read_toml

C = TypeVar("C")
# What train.json contains beside the settings (`folder.open_run`).
NOT_SETTINGS = ("digest_of_texts", "digest_of_held_out", "digest_of_plugins", SOURCE_DIGEST, TOKENIZER_HASHES, SUM)
# Settings of the processes that a run had, and not of the run.
OF_PROCESSES = ("distributed",)


class SettingsFile(NamedTuple):
    """Holds the settings of a file as plain values. Names and types have not been checked."""

    path: Path
    values: dict[str, Any]
    is_of_run: bool  # a train.json, which contains all settings that are not TrainConfig's defaults


def read_settings(path: Path) -> SettingsFile:
    """Reads a file of settings: the train.json of a run if it is called .json, and otherwise TOML.

    Of a train.json, the options of the run's processes (--distributed) are left out.

    Raises:
      InputError: the file cannot be read, is damaged, or is not the train.json of a run (exit code 2).
    """
    if path.suffix.lower() != ".json":
        return SettingsFile(path, read_toml(path), is_of_run=False)
    try:
        values = read_json_object(path)
    except FileNotFoundError as e:
        raise InputError(f"{path}: cannot be read ({e.strerror})", exit_code=2) from None
    except InputError as e:
        raise InputError(str(e), exit_code=2) from None
    if type(values.get("steps")) is not int or not all(
        isinstance(values.get(name), dict) for name in ("data", "model")
    ):
        reason = "is damaged, or not the train.json of a run; other settings are written as TOML"
        raise InputError(f"{path}: {reason}", exit_code=2)
    if has_wrong_sum(values):
        reason = f"is damaged or was edited (its own sum differs); without the key {SUM!r}, it is not compared"
        raise InputError(f"{path}: {reason}", exit_code=2)
    kept = {name: x for name, x in upgrade_settings(values).items() if name not in (*NOT_SETTINGS, *OF_PROCESSES)}
    return SettingsFile(path, kept, is_of_run=True)


def plugins_of(file: SettingsFile) -> tuple[Path, ...]:
    """Returns the plugins that a file names. Raises InputError (exit code 2) if they are not paths."""
    return _checked(file, "plugin", file.values.get("plugin", []), tuple[Path, ...])


def with_settings(config: C, file: SettingsFile) -> C:
    """Returns a config with the settings of a file in place of its own.

    Only names and types are checked. Whether values are allowed, alone and together, is checked when the options of the
    command line have been added, which may complete the file.

    Raises:
      InputError: the file contains an unknown name or a value of another type (exit code 2); the message names both.
    """
    return _replace(config, file.values, file, "")


def setting_keys(values: Mapping[str, Any], section: str = "") -> Iterator[str]:
    """Yields the dotted name of each setting in a file's values."""
    for name, value in values.items():
        key = f"{section}{name.replace('-', '_')}"
        if isinstance(value, dict):
            yield from setting_keys(value, f"{key}.")
        else:
            yield key


def _replace(config: C, values: Mapping[str, Any], file: SettingsFile, section: str) -> C:
    """Returns a config, or a section of one, with other values."""
    hints = get_type_hints(type(config), include_extras=True)
    known = [field.name for field in dataclasses.fields(config) if file.is_of_run or not _is_hidden(hints[field.name])]
    replaced = {}
    for given, value in values.items():
        name = given.replace("-", "_")
        key = f"{section}{name}"
        if name not in known:
            where = f" of [{section.rstrip('.')}]" if section else ""
            raise InputError(f"{file.path}: {key} is not a setting; those{where}: {', '.join(known)}", exit_code=2)
        if name in replaced:
            raise InputError(f"{file.path}: {key} is given twice", exit_code=2)
        if dataclasses.is_dataclass(old := getattr(config, name)):
            if not isinstance(value, dict):
                raise InputError(f"{file.path}: {key} must be a section, not {reprlib.repr(value)}", exit_code=2)
            replaced[name] = _replace(old, value, file, f"{key}.")
        else:
            replaced[name] = _checked(file, key, value, hints[name])
    new = copy.copy(config)  # without the checks of __post_init__
    vars(new).update(replaced)
    return new


def _is_hidden(hint: Any) -> bool:
    """Returns whether a field has no option, because the tokenizers or another option determine it."""
    return get_origin(hint) is Annotated and tyro.conf.Suppress in hint.__metadata__


def _checked(file: SettingsFile, key: str, value: Any, kind: Any) -> Any:
    try:
        return _convert(value, kind)
    except ValueError as e:
        raise InputError(f"{file.path}: {key} {e}, not {reprlib.repr(value)}", exit_code=2) from None


def _convert(value: Any, kind: Any) -> Any:
    """Returns a plain value as a field's type. Raises ValueError, with what it must be, if it is another one."""
    origin, args = get_origin(kind), get_args(kind)
    if origin is Annotated:
        return _convert(value, args[0])
    if origin in (Union, types.UnionType):
        return _convert_union(value, [arg for arg in args if arg is not type(None)], type(None) in args)
    if origin is Literal:
        if any(type(value) is type(arg) and value == arg for arg in args):
            return value
        raise ValueError(f"must be one of {', '.join(map(str, args))}")
    if origin is tuple:
        items = value if isinstance(value, list) else [value]  # a single path or name will do
        kinds = [args[0]] * len(items) if args[-1] is Ellipsis else args
        if len(kinds) != len(items):
            raise ValueError(f"must be a list of {len(kinds)}")
        return tuple(_convert(item, item_kind) for item, item_kind in zip(items, kinds, strict=True))
    return _convert_plain(value, origin or kind)


def _convert_union(value: Any, kinds: list[Any], optional: bool) -> Any:
    if optional and value is None:
        return None
    for kind in kinds[:-1]:
        try:
            return _convert(value, kind)
        except ValueError:
            pass
    return _convert(value, kinds[-1])


def _convert_plain(value: Any, kind: Any) -> Any:
    if kind is bool and isinstance(value, bool):
        return value
    if kind is int and type(value) is int:
        return value
    if kind is float and (type(value) is float or (type(value) is int and abs(value) < 10**300)):
        return float(value)
    if kind in (str, Path) and isinstance(value, str):
        if not value or "\0" in value or not _is_encodable(value):
            raise ValueError("must be a name that a file can have" if kind is Path else "must be a text")
        return kind(value)
    if kind is dict and isinstance(value, dict):
        return value
    names = {
        bool: "true or false",
        int: "an integer",
        float: "a number",
        str: "a string",
        Path: "a path",
        dict: "a section",
    }
    raise ValueError(f"must be {names[kind]}" if kind in names else "cannot be set in a file; use the option")


def _is_encodable(name: str) -> bool:
    try:
        os.fsencode(name)
    except UnicodeEncodeError:
        return False
    return True
