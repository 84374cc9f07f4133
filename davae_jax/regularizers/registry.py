"""Regularizers by name, those of plugins too; the command line's options and the terms of the loss are made from it."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import importlib.util
import sys
import warnings
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from davae_jax.regularizers.protocol import (
    Adversarial,
    LatentBatch,
    Learned,
    Logs,
    Params,
    Regularizer,
    Sizes,
    weight_at,
)
from davae_jax.utils.errors import InputError, OptionError, first_line

REGISTRY: dict[str, type[Regularizer]] = {}
# Names that mean something else in the logs.
TAKEN = {
    *("step", "loss", "rec", "kl", "kl_unmasked", "kl_per_dim", "loss_d", "loss_g", "beta", "lr", "grad_norm"),
    *("skipped", "tokens", "mean_std", "pooled", "held_out", "samples", "tokens_per_s", "mfu", "data_wait"),
    *("compile_s", "device_memory"),
}


class RegularizerError(InputError):
    """A regularizer gave back what cannot be used. Names it."""


def register(name: str) -> Callable[[type[Regularizer]], type[Regularizer]]:
    """Decorates a frozen dataclass. Its fields become the options --regularizers.NAME.FIELD."""

    def add(cls: type[Regularizer]) -> type[Regularizer]:
        def wrong(said: str) -> InputError:
            return InputError(f"regularizer {name!r}: {said}")

        if not name.isidentifier() or name in TAKEN:
            raise wrong("not a name that it can have: taken by another value of the logs, or no Python identifier")
        if not (isinstance(cls, type) and issubclass(cls, Regularizer)):
            raise wrong("not a subclass of Regularizer")
        if name in REGISTRY and REGISTRY[name].__module__ != cls.__module__:
            raise wrong(f"this name is registered already, by {REGISTRY[name].__module__}")
        if "__dataclass_params__" not in vars(cls) or not cls.__dataclass_params__.frozen:
            raise wrong("not a frozen dataclass: @dataclass(frozen=True) goes below @register")
        missing = dataclasses.MISSING
        if bare := [f.name for f in dataclasses.fields(cls) if f.default is f.default_factory is missing]:
            raise wrong(f"its option {bare[0]} has no default")
        cls.name = name
        REGISTRY[name] = cls
        return cls

    return add


def options_type() -> type:
    """A frozen dataclass with a field for each registered name, all off."""
    return _options_type(tuple(REGISTRY.items()))


@functools.lru_cache(maxsize=16)
def _options_type(registered: tuple[tuple[str, type[Regularizer]], ...]) -> type:
    fields = [(name, cls, dataclasses.field(default_factory=cls)) for name, cls in registered]
    said = "Terms of the loss on the latents (docs/regularizers.md)."
    return dataclasses.make_dataclass("Regularizers", fields, frozen=True, namespace={"__doc__": said})


def options(**regularizers: Regularizer) -> Any:
    """A value for `TrainConfig.regularizers`: options(mmd=MMD(weight=10)). Raises InputError on an unknown name."""
    for name in regularizers:
        check_known(name)
    return options_type()(**regularizers)


def check_known(name: str, option: str = "") -> None:
    """Raises InputError (exit code 2) with the known names."""
    if name not in REGISTRY:
        known = ", ".join(sorted(REGISTRY))
        if option:  # spelled as there
            name, known = name.replace("_", "-"), known.replace("_", "-")
        raise OptionError(
            option or "regularizers", f"names no regularizer {name!r}; known: {known}; others by --plugin FILE.py"
        )


def active(options: Any) -> dict[str, Regularizer]:
    """Those that are on, by name."""
    every = {field.name: getattr(options, field.name) for field in dataclasses.fields(options)}
    return {name: regularizer for name, regularizer in every.items() if regularizer.weight}


# ---- plugins


def load_plugin(path: Path) -> None:
    """Imports a file, so that what it registers is known.

    Raises:
      InputError: there is none (exit code 2), or its import fails.
    """
    if not path.is_file():
        raise OptionError("--plugin", f"{path}: no such file")
    # Of the file's own: the same one again takes the place of the first.
    name = f"davae_jax_plugin_{hashlib.sha256(str(path.resolve()).encode()).hexdigest()[:8]}_{path.stem}"
    spec = importlib.util.spec_from_file_location(name, path)
    if spec is None:
        raise OptionError("--plugin", f"{path}: not a Python file")
    sys.modules[name] = module = importlib.util.module_from_spec(spec)
    known = dict(REGISTRY)
    try:
        spec.loader.exec_module(module)
    except InputError as e:
        raise InputError(f"{path}: {e}", exit_code=e.exit_code) from e
    except Exception as e:
        raise InputError(f"{path}: cannot be imported ({type(e).__name__}: {first_line(e)})") from e
    if known == REGISTRY:
        warnings.warn(f"--plugin {path}: registers no regularizer; is there a @register?", stacklevel=2)


def digest_of(path: Path) -> str:
    """Of a plugin's text."""
    return hashlib.sha256(path.read_bytes()).hexdigest()[:16]


# ---- their part in a training step


def init_own(regularizers: dict[str, Regularizer], seed: int, sizes: Sizes) -> dict[str, Params]:
    """The parameters of those that have some."""
    # Steps are folded into this key as well, but never so many.
    key = jax.random.fold_in(jax.random.key(seed), 2**32 - 1)
    return {
        name: _arrays(name, _guarded(name, regularizer.init, _key_of(key, name), sizes))
        for name, regularizer in regularizers.items()
        if isinstance(regularizer, Learned)
    }


def penalty(
    regularizers: dict[str, Regularizer], batch: LatentBatch, own: dict[str, Params]
) -> tuple[Float[Array, ""], Float[Array, ""], Logs]:
    """(Σ weight · value, Σ of the adversaries' losses, values to log) of those given.

    The first sum reaches latents and, but for adversaries, the own parameters; the second own parameters alone.

    Raises:
      RegularizerError: one of them fails, or gives back what is not a scalar.
    """
    total, adversaries, logs = jnp.float32(0), jnp.float32(0), {}
    stopped = jax.lax.stop_gradient
    for name, regularizer in regularizers.items():
        mine, params = batch._replace(key=_key_of(batch.key, name)), own.get(name, {})
        against = isinstance(regularizer, Adversarial)
        with jax.named_scope(name):
            value, found = _called(name, regularizer, mine, stopped(params) if against else params)
            if against:
                still = mine._replace(mean=stopped(mine.mean), logvar=stopped(mine.logvar), z=stopped(mine.z))
                loss = _scalar(name, _guarded(name, regularizer.adversary, still, params), "the adversary's loss")
                adversaries += loss
                found = _with(name, found, "adversary", loss)
        weight = weight_at(regularizer, batch.step, batch.steps)
        total += weight * value
        if regularizer.ramp[1]:
            found = _with(name, found, "weight", weight)
        logs |= {name: value} | {f"{name}/{what}": x for what, x in found.items()}
    return total, adversaries, logs


def _with(name: str, logs: Logs, what: str, value: Array) -> Logs:
    if what in logs:
        raise RegularizerError(f"regularizer {name}: {what!r} is logged of it anyway; name its own value otherwise")
    return logs | {what: value}


def _key_of(key: jax.Array, name: str) -> jax.Array:
    """Of the name alone, so that the draws of one do not depend on which others are on."""
    return jax.random.fold_in(key, zlib.crc32(name.encode()))


def _called(name: str, regularizer: Regularizer, batch: LatentBatch, params: Params) -> tuple[Array, Logs]:
    given = _guarded(name, regularizer, batch, params)
    if not (isinstance(given, tuple) and len(given) == 2 and isinstance(given[1], dict)):
        raise RegularizerError(f"regularizer {name}: must return (value, dict of what to log), not {_said(given)}")
    return _scalar(name, given[0], "its value"), {
        what: _scalar(name, x, f"{what!r}, which it logs,") for what, x in given[1].items()
    }


def _arrays(name: str, params: Any) -> Params:
    def refuse(said: str) -> None:
        raise RegularizerError(f"regularizer {name}: init must return a nested dict of float arrays, not {said}")

    if not isinstance(params, dict):
        refuse(_said(params))
    for path, leaf in jax.tree.leaves_with_path(params):
        dtype = getattr(leaf, "dtype", None)
        if dtype is None or not jnp.issubdtype(dtype, jnp.floating):
            refuse(f"{_said(leaf)} in {jax.tree_util.keystr(path)}")
    return params


def _guarded(name: str, call: Callable, *args):
    try:
        return call(*args)
    except InputError:
        raise
    except Exception as e:
        raise RegularizerError(f"regularizer {name}: {type(e).__name__}: {first_line(e)}") from e


def _scalar(name: str, x: Any, what: str) -> Float[Array, ""]:
    shape, dtype = getattr(x, "shape", ()), getattr(x, "dtype", None)
    real = (jnp.floating, jnp.integer, jnp.bool_)
    numeric = isinstance(x, (bool, int, float)) if dtype is None else any(jnp.issubdtype(dtype, r) for r in real)
    if shape != () or not numeric:
        raise RegularizerError(f"regularizer {name}: {what} must be a real scalar, not {_said(x)}")
    return jnp.asarray(x, jnp.float32)


def _said(x: Any) -> str:
    if hasattr(x, "shape") and hasattr(x, "dtype"):
        return f"{x.dtype} of shape {tuple(x.shape)}"
    return f"a tuple of {len(x)}" if isinstance(x, tuple) else type(x).__name__
