"""Compares the schedules of a run that goes on for another number of steps with those that it had before."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from davae_jax.regularizers import active, weight_at
from davae_jax.training.config import TrainConfig
from davae_jax.training.schedules import beta_at, learning_rate
from davae_jax.training.step import is_encoder_only_step

# Settings that may change when a run goes on. All others would make it another run.
LENGTH_SETTINGS = ("steps", "optimizer.decay_steps")
COMPARED_STEPS = 1000  # at most, spread over those that both lengths have


def is_other_length(old: Mapping[str, Any], new: Mapping[str, Any]) -> bool:
    """Returns whether two train.json differ in the `LENGTH_SETTINGS`."""
    return _length(old) != _length(new)


def with_length_of(config: TrainConfig, settings: Mapping[str, Any]) -> TrainConfig:
    """Returns the config with the `LENGTH_SETTINGS` of a train.json."""
    steps, decay_steps = _length(settings)
    optimizer = dataclasses.replace(config.optimizer, decay_steps=decay_steps)
    return dataclasses.replace(config, steps=steps, optimizer=optimizer)


def describe_new_length(old: TrainConfig, new: TrainConfig, done: int) -> str:
    """Returns one line about a run that goes on after `done` steps with other `LENGTH_SETTINGS`.

    It names each schedule that differs from the last step taken on, with its values at the first such step.
    """
    last = max(done, min(old.steps, new.steps))
    steps = np.unique(np.linspace(max(done, 1), last, COMPARED_STEPS, dtype=int))  # counted from 1, as in the logs
    old_schedules, changes = _schedules(old), []
    for name, schedule in _schedules(new).items():
        before, after = (np.broadcast_to(values(steps - 1), steps.shape) for values in (old_schedules[name], schedule))
        if differing := np.flatnonzero(~np.isclose(before, after, rtol=1e-4, atol=0)).tolist():
            i = differing[0]
            changes.append(f"{name} ({after[i]:.3g} at step {steps[i]:,}, not {before[i]:.3g})")
    # Its capacity, not its weight, follows the length.
    changes += [f"regularizer {name}" for name, x in active(new.regularizers).items() if hasattr(x, "until")]
    line = f"goes on after step {done:,} to step {new.steps:,}, not {old.steps:,}"
    return (
        f"{line}; this changes: {', '.join(changes)}" if changes else f"{line}; up to step {last:,} no schedule changes"
    )


def _length(settings: Mapping[str, Any]) -> tuple[int, int]:
    """Returns the values of the `LENGTH_SETTINGS`. Earlier versions have written no decay."""
    return settings["steps"], settings["optimizer"].get("decay_steps", 0)


def _schedules(config: TrainConfig) -> dict[str, Callable[[np.ndarray], Any]]:
    """Returns the values that depend on the number of steps, as functions of steps counted from 0."""
    n = config.steps
    schedules = {
        "learning rate": learning_rate(config.optimizer, n),
        "β": lambda steps: beta_at(steps, n, config.beta),
    }
    if config.lagging.encoder_steps:
        schedules["steps of the encoder alone"] = lambda steps: is_encoder_only_step(steps, n, config.lagging)
    for name, regularizer in active(config.regularizers).items():
        schedules[f"weight of {name}"] = lambda steps, regularizer=regularizer: weight_at(regularizer, steps, n)
    return schedules
