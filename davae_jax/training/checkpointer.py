"""A run's checkpoints: one folder a step, written while training goes on, each whole or not there at all.

A checkpoint holds `params` (the weights, which every `davae` command reads), `state` (the rest of the train state) and,
in its metadata, a sum over the bits of every array, by which damage is noticed that the file format does not see.
"""

from __future__ import annotations

import contextlib
import copy
import itertools
import logging
import math
import sys
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from davae_jax.checkpoints.orbax_logging import quiet_orbax
from davae_jax.checkpoints.run_folder import CHECKPOINTS_FOLDER, PARAMS_FOLDER, complete_checkpoints
from davae_jax.checkpoints.weights import flatten, nest
from davae_jax.parallel.multihost import all_processes, barrier, is_process_zero
from davae_jax.training.state import TrainState
from davae_jax.utils.errors import InputError, first_line, system_reason

REST = "state"  # the part of a checkpoint that is not weights


class Checkpoints:
    """Reads and writes them; in several processes, to be called by all."""

    def __init__(self, run: Path, keep: int):
        """keep: how many of the newest; the one of the lowest held-out loss is kept as well."""
        self.run, self._keep = run, keep
        self.step = max(map(_step, complete_checkpoints(run)), default=0)  # of the newest complete one, 0 where none is
        self._checkpointer, self._saving = None, None

    def path(self, step: int) -> Path:
        return self.run / CHECKPOINTS_FOLDER / str(step)

    @property
    def last(self) -> str:
        """The newest complete one's place, for messages."""
        return str(self.path(self.step)) if self.step else "none yet"

    def save(self, state: TrainState, *, held_out_loss: float | None = None, extra_state: Any = None) -> None:
        """Begins to write the state; the arrays may be reused at once. Waits for the save before, if that still goes.

        remembered: JSON values that `restore` returns with the state.

        Raises:
          InputError: this save or the one before cannot be written.
        """
        self.wait()
        step = int(state.step)
        said = {"sums": jax.device_get(_sums(_leaves(state))), "remembered": copy.deepcopy(extra_state)}
        said["sums"] = {name: int(value) for name, value in said["sums"].items()}
        comparable = held_out_loss is not None and math.isfinite(held_out_loss)
        metrics = {"held_out_loss": held_out_loss} if comparable else None
        self._saving = step
        with self._reporting(), quiet_orbax():
            self._response = self._opened().save_checkpointables_async(
                step, _parts(state), force=True, overwrite=True, metrics=metrics, custom_metadata=said
            )

    def wait(self) -> None:
        """Returns when what `save` began is complete. Raises InputError if it cannot be."""
        if self._saving is None:
            return
        with self._reporting(), quiet_orbax():
            self._response.result()
        self.step, self._saving = self._saving, None

    def restore(self, like: TrainState) -> tuple[TrainState, Any]:
        """The newest checkpoint that is not damaged, laid out as `like` (abstract arrays with shardings), and what it
        was to remember. Damaged ones are named on stderr and set aside, as STEP.damaged.

        Raises:
          InputError: none can be read.
        """
        damaged: dict[int, str] = {}
        for step in sorted(map(_step, complete_checkpoints(self.run)), reverse=True):
            reason = None
            try:
                state, extra_state = self._load(step, like)
            except _Damaged as e:
                reason = str(e)
            if not all_processes(reason is None):
                damaged[step] = reason or "cannot be read by another process"
                continue
            for bad, reason in damaged.items():
                if is_process_zero():
                    print(f"{self.path(bad)}: {reason}; set aside, going on from {self.path(step)}", file=sys.stderr)
                    self.path(bad).rename(_free(self.path(bad).with_suffix(".damaged")))
            self.step = step
            if damaged:
                barrier("damaged checkpoints are set aside")
            return state, extra_state
        said = "; ".join(f"{self.path(step)}: {reason}" for step, reason in damaged.items())
        raise InputError(f"{said}; no other checkpoint is left")

    def __enter__(self) -> Checkpoints:
        return self

    def __exit__(self, kind, *_) -> None:
        """Completes what is being saved, unless it is to end at once, and ends what Orbax keeps running."""
        if kind is None:
            self.wait()
        elif issubclass(kind, Exception):
            with contextlib.suppress(InputError):  # the first error is the one to tell
                self.wait()
        if self._checkpointer is not None and self._saving is None:
            with quiet_orbax():
                self._checkpointer.close()

    def _load(self, step: int, like: TrainState) -> tuple[TrainState, Any]:
        from orbax.checkpoint import v1 as ocp

        path = self.path(step).absolute()
        try:
            with quiet_orbax():
                parts = ocp.load_checkpointables(path, _parts(like))
                said = ocp.checkpointables_metadata(path).custom_metadata or {}
        except Exception as e:  # Orbax and TensorStore have many types for a damaged file
            raise _Damaged(f"cannot be read ({first_line(e)})") from e
        loaded = {f"params.{name}": leaf for name, leaf in flatten(parts[PARAMS_FOLDER]).items()} | parts[REST]
        loaded = {name: loaded[name] for name in _leaves(like)}
        stored, found = said.get("sums", {}), jax.device_get(_sums(loaded))
        if bad := [name for name in found if int(found[name]) != stored.get(name)]:
            raise _Damaged(f"{len(bad)} arrays are not what was saved, {bad[0]} first")
        return jax.tree.unflatten(jax.tree.structure(like), list(loaded.values())), said["remembered"]

    def _opened(self):
        from orbax.checkpoint import v1 as ocp

        if self._checkpointer is None:
            policies = ocp.training.preservation_policies
            best = policies.BestN(
                get_metric_fn=lambda metrics: metrics["held_out_loss"],
                reverse=True,  # the last of the order is the best
                n=1,
                keep_checkpoints_without_metrics=False,
            )
            self._checkpointer = ocp.training.Checkpointer(
                self.run.absolute() / CHECKPOINTS_FOLDER,
                preservation_policy=policies.AnyPreservationPolicy([policies.LatestN(self._keep), best]),
                cleanup_tmp_directories=True,
            )
        return self._checkpointer

    def _reporting(self):
        return _Reporting(self)


class _Reporting:
    """Turns what Orbax raises into one line that says what is left."""

    def __init__(self, checkpoints: Checkpoints):
        self._of = checkpoints

    def __enter__(self):
        pass

    def __exit__(self, kind, error, _):
        if error is None or not isinstance(error, Exception):
            return
        # The run ends here; what Orbax's other threads and tasks meet is not to be reported after it.
        for name in ("absl", "asyncio"):
            logging.getLogger(name).disabled = True
        reason = system_reason(error) or first_line(error)
        raise InputError(
            f"{self._of.run / CHECKPOINTS_FOLDER}: step {self._of._saving} cannot be saved ({reason}); "
            f"the last complete checkpoint is {self._of.last}"
        ) from error


def _free(path: Path) -> Path:
    """The path, or with the first number behind it that is not taken."""
    names = (path if n == 1 else path.with_name(f"{path.name}-{n}") for n in itertools.count(1))
    return next(name for name in names if not name.exists())


class _Damaged(Exception):
    pass


@jax.jit
def _sums(arrays: dict[str, jax.Array]) -> dict[str, jax.Array]:
    """Of each array the sum of its values' bits, modulo 2³²: the same however the array lies over devices."""

    def bits(x):
        unsigned = {1: jnp.uint8, 2: jnp.uint16, 4: jnp.uint32}[x.dtype.itemsize]
        return jax.lax.bitcast_convert_type(x, unsigned).astype(jnp.uint32).sum(dtype=jnp.uint32)

    return jax.tree.map(bits, arrays)


def _step(path: Path) -> int:
    return int(path.name)


def _parts(state: TrainState) -> dict[str, Any]:
    """The weights under the names every checkpoint has, and the rest by path."""
    rest = {name: leaf for name, leaf in _leaves(state).items() if not name.startswith("params.")}
    return {PARAMS_FOLDER: nest(flatten(state.params)), REST: rest}


def _leaves(state: TrainState) -> dict[str, Any]:
    """Every leaf by its path; those of the params as `flatten` names them."""
    leaves = jax.tree_util.tree_leaves_with_path(state)
    return {jax.tree_util.keystr(path, simple=True, separator="."): leaf for path, leaf in leaves}
