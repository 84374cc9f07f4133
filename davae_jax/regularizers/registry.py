"""Registers regularizers by name: those of the project, of plugin files, and of installed packages."""

from __future__ import annotations

import dataclasses
import hashlib
import importlib.metadata
import importlib.util
import os
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

from davae_jax.regularizers.protocol import Regularizer
from davae_jax.utils.errors import InputError, OptionError, first_line

REGISTRY: dict[str, type[Regularizer]] = {}
ENTRY_POINTS = "davae_jax.regularizers"  # the entry point group of installed packages' regularizers
# Names of other values in the logs, which regularizers cannot have.
RESERVED_NAMES = {
    *("step", "loss", "rec", "kl", "kl_unmasked", "kl_per_dim", "loss_d", "loss_g", "beta", "lr", "grad_norm"),
    *("skipped", "tokens", "mean_std", "pooled", "held_out", "samples", "tokens_per_s", "mfu", "data_wait"),
    *("compile_s", "device_memory"),
}


def register(name: str) -> Callable[[type[Regularizer]], type[Regularizer]]:
    """Registers a frozen dataclass under a name. Its fields become the options --regularizers.NAME.FIELD.

        @register("variance")
        @dataclass(frozen=True)
        class Variance(Regularizer): ...

    Raises:
      InputError: the name cannot be used, or the class is not a regularizer.
    """

    def add(cls: type[Regularizer]) -> type[Regularizer]:
        if problem := _registration_problem(name, cls):
            raise InputError(f"regularizer {name!r}: {problem}")
        cls.name = name
        REGISTRY[name] = cls
        return cls

    return add


def _registration_problem(name: str, cls: Any) -> str | None:
    """Returns why a class cannot be registered under a name, or None if it can be."""
    if not name.isidentifier():
        return "this name is not a Python identifier"
    if name in RESERVED_NAMES:
        return "another value in the logs has this name"
    if not (isinstance(cls, type) and issubclass(cls, Regularizer)):
        return "not a subclass of Regularizer"
    if name in REGISTRY and REGISTRY[name].__module__ != cls.__module__:
        return f"this name is registered already, by {REGISTRY[name].__module__}"
    if "__dataclass_params__" not in vars(cls) or not cls.__dataclass_params__.frozen:
        return "not a frozen dataclass: @dataclass(frozen=True) goes below @register"
    missing = dataclasses.MISSING
    for field in dataclasses.fields(cls):
        if field.default is field.default_factory is missing:
            return f"its option {field.name} has no default"
    return None


def check_registered(name: str, option: str) -> None:
    """Raises OptionError, which lists the available names, if no regularizer of this name is registered."""
    if name not in REGISTRY:
        available = ", ".join(sorted(REGISTRY)).replace("_", "-")
        unknown = name.replace("_", "-")
        raise OptionError(
            option,
            f"names an unknown regularizer {unknown!r}; available: {available}; add others with --plugin FILE.py",
        )


def active(config: Any) -> dict[str, Regularizer]:
    """Returns the active regularizers, whose weight is not 0, by name; `config` is `TrainConfig.regularizers`."""
    regularizers = {field.name: getattr(config, field.name) for field in dataclasses.fields(config)}
    return {name: regularizer for name, regularizer in regularizers.items() if regularizer.weight}


# ---- plugins


def load_plugin(path: Path) -> None:
    """Imports a Python file, which registers regularizers.

    Raises:
      OptionError: there is no such file.
      InputError: its import fails.
    """
    if not path.is_file():
        raise OptionError("--plugin", f"{path}: no such file")
    # The module's name depends on the path alone, so importing a file again replaces its regularizers.
    name = f"davae_jax_plugin_{hashlib.sha256(os.fsencode(path.resolve())).hexdigest()[:8]}_{path.stem}"
    spec = importlib.util.spec_from_file_location(name, path)
    if spec is None:
        raise OptionError("--plugin", f"{path}: not a Python file")
    sys.modules[name] = module = importlib.util.module_from_spec(spec)
    before = dict(REGISTRY)
    try:
        spec.loader.exec_module(module)
    except InputError as e:
        raise InputError(f"{path}: {e}", exit_code=e.exit_code) from e
    except KeyboardInterrupt:
        raise
    except BaseException as e:  # SystemExit and others that are no Exception
        raise InputError(f"{path}: cannot be imported ({type(e).__name__}: {first_line(e)})") from e
    if before == REGISTRY:
        warnings.warn(f"--plugin {path}: registers no regularizer; is @register missing?", stacklevel=2)


def load_installed() -> None:
    """Registers the regularizers of installed packages, which are declared as entry points.

    A package that cannot be imported is skipped with a warning.
    """
    for entry_point in importlib.metadata.entry_points(group=ENTRY_POINTS):
        try:
            cls = entry_point.load()
            REGISTRY.setdefault(cls.name, cls)
        except KeyboardInterrupt:
            raise
        except BaseException as e:  # SystemExit and others that are no Exception
            reason = f"{type(e).__name__}: {first_line(e)}"
            warnings.warn(f"regularizer {entry_point.name} of {entry_point.value}: {reason}", stacklevel=2)


def plugin_digest(path: Path) -> str:
    """Returns a digest of a plugin file's contents."""
    return hashlib.sha256(path.read_bytes()).hexdigest()[:16]
