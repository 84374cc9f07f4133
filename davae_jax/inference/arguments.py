"""Checks arguments of `TextVAE` and the options of the same names."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from davae_jax.model.config import SAMPLING_SETTINGS
from davae_jax.utils.errors import OptionError

if TYPE_CHECKING:
    from jaxtyping import Float

MAX_TEXTS = 1_000_000  # that are made of noise; XLA ends the process if there is no memory for their latents
MAX_STEPS = 10_000  # of an interpolation or a traversal
LARGEST = float(np.finfo(np.float32).max)


def check_steps(steps: int, *, name: str = "steps") -> None:
    """Raises InputError (exit code 2) if the number of interpolation steps is out of its range."""
    if not 2 <= steps <= MAX_STEPS:
        raise OptionError(name, f"must be 2 (both ends) to {MAX_STEPS}, not {steps}")


def check_count(n: int, *, least: int = 0, name: str = "n") -> None:
    """Raises InputError (exit code 2) if the number of texts is out of its range."""
    if n < least:
        raise OptionError(name, f"must be {f'at least {least}' if least else '0 or more'}, not {n}")
    if n > MAX_TEXTS:
        raise OptionError(name, f"must be at most {MAX_TEXTS}, not {n}; for more texts, use several seeds")


def greedy_by_default(sampling: dict) -> dict:
    """Returns the settings with top_k 1, or unchanged if they include one that a top_k of 1 would make ineffective."""
    is_sampled = sampling.keys() & set(SAMPLING_SETTINGS)
    return sampling if is_sampled else {"top_k": 1, **sampling}


def check_std_scale(std_scale: float) -> float:
    """Returns `std_scale`. Raises InputError (exit code 2) if it is negative or not finite in float32."""
    if not 0 <= std_scale <= LARGEST:
        raise OptionError("std_scale", f"must be a number of 0 or more, not {std_scale}")
    return std_scale


def check_radius(radius: float, *, name: str = "radius") -> float:
    """Returns `radius`. Raises InputError (exit code 2) if it is negative or not finite in float32."""
    if not 0 <= radius <= LARGEST:
        raise OptionError(name, f"must be a number of 0 or more, not {radius}")
    return radius


def check_traversal(step: float, each_side: int, *, names: tuple[str, str] = ("step", "each_side")) -> None:
    """Raises InputError (exit code 2) if a traversal's step or its number of steps to each side is out of its range."""
    if not 0 < step <= LARGEST:
        raise OptionError(names[0], f"must be a number above 0, not {step}")
    if not 1 <= each_side <= MAX_STEPS // 2:
        raise OptionError(names[1], f"must be 1 to {MAX_STEPS // 2}, not {each_side}")


def unit_direction(
    direction: int | Float[np.ndarray, "L"], latent_size: int, *, name: str = "direction"
) -> Float[np.ndarray, "L"]:
    """Returns the vector of length 1 in a direction.

    Args:
      direction: a latent dimension, counted from 0, or a vector of any length but 0.

    Raises:
      OptionError: there is no such dimension; or the vector has another shape, is 0, or is not finite.
    """
    if np.ndim(direction) == 0 and isinstance(direction, int | np.integer):
        if not 0 <= direction < latent_size:
            raise OptionError(name, f"must be a dimension of 0 to {latent_size - 1}, not {direction}")
        return np.eye(1, latent_size, int(direction), dtype=np.float32)[0]
    vector = np.asarray(direction, np.float64)
    if vector.shape != (latent_size,):
        raise OptionError(name, f"must have shape {[latent_size]}, not {list(vector.shape)}")
    if not np.isfinite(vector).all() or not vector.any():
        raise OptionError(name, "must be a vector of finite numbers that are not all 0")
    vector = vector / np.abs(vector).max()  # so that no square overflows
    return (vector / np.linalg.norm(vector)).astype(np.float32)


def check_texts(texts: Sequence[str]) -> list[str]:
    """Returns the texts as a list. Raises TypeError for a single string or an item that is not a string."""
    if isinstance(texts, str):
        raise TypeError("pass a list of texts, not a single string")
    texts = list(texts)
    for text in texts:
        if not isinstance(text, str):
            raise TypeError(f"a text must be a string, not a {type(text).__name__}")
    return texts
