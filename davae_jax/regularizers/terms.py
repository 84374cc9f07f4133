"""Computes the regularizers' terms of the loss in a training step, and initializes their parameters."""

from __future__ import annotations

import zlib
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

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
from davae_jax.utils.errors import InputError, first_line
from davae_jax.utils.lazy import jax, jnp

if TYPE_CHECKING:
    from jaxtyping import Array, Float


class RegularizerError(InputError):
    """A regularizer fails or returns an invalid result. The message names it."""


def init_regularizer_params(regularizers: dict[str, Regularizer], seed: int, sizes: Sizes) -> dict[str, Params]:
    """Returns the initial parameters of the regularizers that have parameters, by name.

    Raises:
      RegularizerError: an `init` fails or does not return a nested dict of float arrays.
    """
    # The training step folds step numbers into the same key; they never reach this number.
    key = jax.random.fold_in(jax.random.key(seed), 2**32 - 1)
    return {
        name: _check_params(name, _call(name, regularizer.init, _fold_in_name(key, name), sizes))
        for name, regularizer in regularizers.items()
        if isinstance(regularizer, Learned)
    }


def regularizer_terms(
    regularizers: dict[str, Regularizer], batch: LatentBatch, params: dict[str, Params]
) -> tuple[Float[Array, ""], Float[Array, ""], Logs]:
    """Computes the regularizers' terms of the loss.

    Args:
      params: the parameters of regularizers that have some, by name.

    Returns:
      Σ weight · value, whose gradient reaches the latents and, except for adversarial ones, the parameters;
      Σ of the adversaries' losses, whose gradient reaches only the adversaries' parameters;
      scalars to log.

    Raises:
      RegularizerError: a regularizer fails or does not return a scalar.
    """
    total, adversaries, logs = jnp.float32(0), jnp.float32(0), {}
    stop_gradient = jax.lax.stop_gradient
    for name, regularizer in regularizers.items():
        its_batch = batch._replace(key=_fold_in_name(batch.key, name))
        its_params = params.get(name, {})
        is_adversarial = isinstance(regularizer, Adversarial)
        with jax.named_scope(name):
            value, values = _evaluate(
                name, regularizer, its_batch, stop_gradient(its_params) if is_adversarial else its_params
            )
            if is_adversarial:
                constant = its_batch._replace(
                    mean=stop_gradient(batch.mean), logvar=stop_gradient(batch.logvar), z=stop_gradient(batch.z)
                )
                loss = _call(name, regularizer.adversary, constant, its_params)
                loss = _check_scalar(name, loss, "the adversary's loss")
                adversaries += loss
                values = _add_value(name, values, "adversary", loss)
        weight = weight_at(regularizer, batch.step, batch.steps)
        total += weight * value
        if regularizer.ramp[1]:
            values = _add_value(name, values, "weight", weight)
        logs |= {name: value} | {f"{name}/{description}": x for description, x in values.items()}
    return total, adversaries, logs


def _fold_in_name(key: jax.Array, name: str) -> jax.Array:
    """Returns a key derived from the name, so that random numbers do not depend on the other active regularizers."""
    return jax.random.fold_in(key, zlib.crc32(name.encode()))


def _evaluate(name: str, regularizer: Regularizer, batch: LatentBatch, params: Params) -> tuple[Array, Logs]:
    """Calls a regularizer and checks its result."""
    result = _call(name, regularizer, batch, params)
    if not (isinstance(result, tuple) and len(result) == 2 and isinstance(result[1], dict)):
        reason = f"must return (value, dict of scalars to log), not {_describe(result)}"
        raise RegularizerError(f"regularizer {name}: {reason}")
    value, values = result
    return _check_scalar(name, value, "the value"), {
        description: _check_scalar(name, x, f"the logged value {description!r}") for description, x in values.items()
    }


def _call(name: str, function: Callable, *args: Any) -> Any:
    """Calls a function of a regularizer. Turns its errors into a RegularizerError that names the regularizer."""
    try:
        return function(*args)
    except KeyboardInterrupt:
        raise
    except InputError as e:
        raise RegularizerError(f"regularizer {name}: {e}") from e
    except BaseException as e:  # SystemExit and others that are no Exception
        raise RegularizerError(f"regularizer {name}: {type(e).__name__}: {first_line(e)}") from e


def _add_value(name: str, values: Logs, description: str, value: Array) -> Logs:
    """Adds a value that is logged automatically."""
    if description in values:
        raise RegularizerError(f"regularizer {name}: {description!r} is logged automatically; choose another name")
    return values | {description: value}


def _check_params(name: str, params: Any) -> Params:
    """Returns the parameters if they are a nested dict of float arrays."""

    def reject(given: str) -> None:
        raise RegularizerError(f"regularizer {name}: init must return a nested dict of float arrays, not {given}")

    if not isinstance(params, dict):
        reject(_describe(params))
    for path, leaf in jax.tree.leaves_with_path(params):
        dtype = getattr(leaf, "dtype", None)
        if dtype is None or not jnp.issubdtype(dtype, jnp.floating):
            reject(f"{_describe(leaf)} in {jax.tree_util.keystr(path)}")
    return params


def _check_scalar(name: str, x: Any, description: str) -> Float[Array, ""]:
    """Returns x as a float32 scalar if it is a real number."""
    shape, dtype = getattr(x, "shape", ()), getattr(x, "dtype", None)
    real = (jnp.floating, jnp.integer, jnp.bool_)
    numeric = isinstance(x, (bool, int, float)) if dtype is None else any(jnp.issubdtype(dtype, r) for r in real)
    if shape != () or not numeric:
        raise RegularizerError(f"regularizer {name}: {description} must be a real scalar, not {_describe(x)}")
    return jnp.asarray(x, jnp.float32)


def _describe(x: Any) -> str:
    if hasattr(x, "shape") and hasattr(x, "dtype"):
        return f"{x.dtype} of shape {tuple(x.shape)}"
    return f"a tuple of {len(x)}" if isinstance(x, tuple) else type(x).__name__
