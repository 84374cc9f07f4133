"""Saves and restores a run's checkpoints: a folder for each saved step, written while training continues.

A checkpoint contains `params` (the weights, which every `davae` command reads) and `state` (the rest of `TrainState`).
Its metadata contain a checksum of every array, to detect damage that the file format does not detect. Old checkpoints
are renamed before they are removed, so that one that is listed has all its files whenever the program is killed.
"""

from __future__ import annotations

import contextlib
import copy
import errno
import functools
import itertools
import math
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
from jax.experimental import multihost_utils

from davae_jax.checkpoints.orbax_logging import quiet_orbax
from davae_jax.checkpoints.run_folder import CHECKPOINTS_FOLDER, PARAMS_FOLDER, STATE_ITEM, complete_checkpoints
from davae_jax.checkpoints.sums import array_sums
from davae_jax.checkpoints.weights import (
    EXTRA_STATE,
    SUMS,
    flatten,
    is_extra_state_intact,
    nest,
    sums_problem,
    with_extra_state,
)
from davae_jax.model.stack import stack_layers, unstack_layers
from davae_jax.parallel.agreement import all_processes, run_on_all_processes
from davae_jax.parallel.multihost import disconnect, is_process_zero, suspect_other_processes, wait_for_abort
from davae_jax.training.state import TrainState
from davae_jax.utils.errors import InputError, first_line, on_one_line, system_reason
from davae_jax.utils.files import remove_folder, remove_removed


class Checkpoints:
    """Saves and restores the checkpoints of a run. With several processes, every process calls every method.

    As a context manager it completes the save in progress on exit.

    Attributes:
      run: the run folder.
      step: the step of the newest complete checkpoint, 0 if there is none.
    """

    def __init__(self, run: Path, keep: int, *, on_complete: Callable[[Path], None] | None = None):
        """Opens the checkpoints of a run; the folder need not exist yet.

        Args:
          run: the run folder.
          keep: the number of newest checkpoints to keep, besides the one with the lowest held-out loss.
          on_complete: called with the path of each checkpoint as soon as it is complete, on one of Orbax's threads.
        """
        self.run = run
        self.step = max(map(_step, complete_checkpoints(run)), default=0)
        self._keep, self._on_complete = keep, on_complete
        self._checkpointer = None  # Orbax's, made for the first save
        self._saving: int | None = None  # the step whose save is in progress

    def path(self, step: int) -> Path:
        """Returns the folder of a step's checkpoint."""
        return self.run / CHECKPOINTS_FOLDER / str(step)

    @property
    def last(self) -> str:
        """Returns the path of the newest complete checkpoint, or "none yet", for messages."""
        return str(self.path(self.step)) if self.step else "none yet"

    def save(self, state: TrainState, *, held_out_loss: float | None = None, extra_state: Any = None) -> None:
        """Begins to save the state, after the previous save is complete. The arrays may be reused when this returns.

        Args:
          held_out_loss: the criterion for the best checkpoint; None, NaN and infinity are never the best.
          extra_state: JSON values that `restore` returns with the state.

        Raises:
          InputError: this save or the previous one failed.
        """
        self.wait()
        step, state = int(state.step), unstack_layers(state)
        checksums = {name: int(value) for name, value in jax.device_get(array_sums(_leaves(state))).items()}
        metadata = with_extra_state({SUMS: checksums}, copy.deepcopy(extra_state))
        comparable = held_out_loss is not None and math.isfinite(held_out_loss)
        metrics = {"held_out_loss": held_out_loss} if comparable else None
        self._saving = step
        with self._save_errors(), quiet_orbax():
            # Only an incomplete folder can be overwritten: `restore` has renamed newer checkpoints, which are damaged.
            self._response = self._open().save_checkpointables_async(
                step, _checkpointables(state), force=True, overwrite=True, metrics=metrics, custom_metadata=metadata
            )
            self._response.on_complete(lambda _: self._complete(step))

    def wait(self) -> None:
        """Waits until the save in progress, if any, is complete. Raises InputError if it failed."""
        if self._saving is None:
            return
        with self._save_errors(), quiet_orbax():
            self._response.result()
        self.step, self._saving = self._saving, None

    def _complete(self, step: int) -> None:
        """Reports a complete checkpoint and removes those that it makes superfluous. Called on one of Orbax's threads.

        Orbax itself would remove their files one by one under the checkpoint's name.
        """
        if self._on_complete is not None:
            self._on_complete(self.path(step))
        if not is_process_zero():
            return
        remaining = set(os.listdir(self.run / CHECKPOINTS_FOLDER))  # Orbax lists those that were removed as well
        checkpoints = [c for c in self._checkpointer.checkpoints if str(c.step) in remaining]
        losses = {c.step: c.metrics["held_out_loss"] for c in checkpoints if c.metrics}
        kept = sorted(c.step for c in checkpoints)[-self._keep :] + [
            min(losses, key=lambda s: (losses[s], -s), default=step)
        ]
        for old in {c.step for c in checkpoints}.difference(kept):
            with contextlib.suppress(OSError):  # it is tried again after the next save
                remove_folder(self.path(old))

    def restore(self, like: TrainState) -> tuple[TrainState, Any]:
        """Returns the newest intact checkpoint's state, with the shardings of `like`, and its extra state.

        Damaged checkpoints are reported on stderr and renamed to STEP.damaged.

        Args:
          like: a state of `jax.ShapeDtypeStruct` with shardings. Its layers may be stacked, as no checkpoint's are.

        Raises:
          InputError: every checkpoint is damaged, or the files of one may not be read, which is no damage.
        """
        damaged: dict[int, str] = {}
        for step in sorted(map(_step, complete_checkpoints(self.run)), reverse=True):
            reason = None
            try:
                state, extra_state = self._load(step, unstack_layers(like))
            except _Damaged as e:
                reason = str(e)
            if not all_processes(reason is None):
                run_on_all_processes(functools.partial(_check_permitted, self.path(step)))
                damaged[step] = reason or "cannot be read by another process"
                continue
            for bad_step, reason in damaged.items():
                bad = self.path(bad_step)
                if is_process_zero():
                    renamed = _unused_path(bad.with_suffix(".damaged"))
                    message = f"{bad}: {reason}: renamed to {renamed.name}; resuming from {self.path(step)}"
                    print(on_one_line(message), file=sys.stderr)
                    bad.rename(renamed)
            self.step = step
            if damaged:
                multihost_utils.sync_global_devices("damaged checkpoints are renamed")
            return _as_in(like, state), extra_state
        reasons = "; ".join(f"{self.path(step)}: {reason}" for step, reason in damaged.items())
        disconnect()  # all processes raise the error; connected, the first to end would abort the others
        raise InputError(f"{reasons}; no intact checkpoint remains")

    def __enter__(self) -> Checkpoints:
        if is_process_zero():
            remove_removed(self.run / CHECKPOINTS_FOLDER)
        return self

    def __exit__(self, kind, *_) -> None:
        """Completes the save in progress and stops Orbax's threads; does neither if the run is killed."""
        if kind is None:
            self.wait()
        elif issubclass(kind, InputError) or (issubclass(kind, Exception) and jax.process_count() == 1):
            # After other errors a process may be lost, and the save would wait for it.
            with contextlib.suppress(InputError):  # the first error is the one to report
                self.wait()
        if self._checkpointer is not None and self._saving is None:
            with quiet_orbax():
                self._checkpointer.close()

    def _load(self, step: int, like: TrainState) -> tuple[TrainState, Any]:
        """Returns a checkpoint's state and extra state. Raises _Damaged if it cannot be read or a checksum differs."""
        from orbax.checkpoint import v1 as ocp

        path = self.path(step).absolute()
        try:
            with quiet_orbax():
                items = ocp.load_checkpointables(path, _checkpointables(like))
                metadata = ocp.checkpointables_metadata(path).custom_metadata or {}
        except Exception as e:  # Orbax and TensorStore raise many types for damaged files
            raise _Damaged(f"cannot be read ({first_line(e)})") from e
        loaded = {f"params.{name}": leaf for name, leaf in flatten(items[PARAMS_FOLDER]).items()} | items[STATE_ITEM]
        loaded = {name: loaded[name] for name in _leaves(like)}
        saved, checksums = metadata.get(SUMS), jax.device_get(array_sums(loaded))
        problem = sums_problem(path, saved)
        if not isinstance(saved, dict):
            raise _Damaged(problem)
        if differing := [name for name in checksums if int(checksums[name]) != saved.get(name)]:
            raise _Damaged(f"checksum mismatch in {len(differing)} arrays, the first is {differing[0]}")
        if problem:
            raise _Damaged(problem)
        if not is_extra_state_intact(metadata):
            raise _Damaged("checksum mismatch in the extra state")
        return jax.tree.unflatten(jax.tree.structure(like), list(loaded.values())), metadata.get(EXTRA_STATE)

    def _open(self):
        """Returns Orbax's checkpointer, which is made on the first call."""
        from orbax.checkpoint import v1 as ocp

        if self._checkpointer is None:
            self._checkpointer = ocp.training.Checkpointer(
                self.run.absolute() / CHECKPOINTS_FOLDER,
                preservation_policy=ocp.training.preservation_policies.PreserveAll(),  # `_complete` removes old ones
                cleanup_tmp_directories=True,
            )
        return self._checkpointer

    @contextlib.contextmanager
    def _save_errors(self) -> Iterator[None]:
        """Turns errors of Orbax, which waits for all processes, into an InputError that names the last checkpoint."""
        try:
            yield
        except Exception as e:
            reason = system_reason(e)
            problem = (
                f"{self.run / CHECKPOINTS_FOLDER}: step {self._saving} cannot be saved ({reason or first_line(e)}); "
                f"the last complete checkpoint is {self.last}"
            )
            if not reason:
                wait_for_abort()
                problem = suspect_other_processes(problem)
            raise InputError(problem) from e


class _Damaged(Exception):
    """Signals that a complete checkpoint cannot be restored."""


def _check_permitted(checkpoint: Path) -> None:
    """Raises InputError if files of a checkpoint cannot be opened for a reason other than damage."""
    reasons = (errno.EACCES, errno.EPERM, errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.ESTALE)
    try:
        for folder, _, names in os.walk(checkpoint, onerror=_raise):
            for name in names:
                open(os.path.join(folder, name), "rb").close()
    except OSError as e:
        if e.errno in reasons:
            raise InputError(f"{e.filename}: cannot be read ({e.strerror})") from None


def _raise(error: OSError) -> None:
    raise error


def _unused_path(path: Path) -> Path:
    """Returns the path if it does not exist, otherwise with the smallest number appended that makes it new."""
    names = (path if n == 1 else path.with_name(f"{path.name}-{n}") for n in itertools.count(1))
    return next(name for name in names if not name.exists())


def _step(path: Path) -> int:
    return int(path.name)


def _checkpointables(state: TrainState) -> dict[str, Any]:
    """Returns the two items of a checkpoint: the weights as nested dicts, the rest of the state by path."""
    rest = {name: leaf for name, leaf in _leaves(state).items() if not name.startswith("params.")}
    return {PARAMS_FOLDER: nest(flatten(state.params)), STATE_ITEM: rest}


def _as_in(like: TrainState, state: TrainState) -> TrainState:
    """Returns a state with its layers stacked as those of `like`, and with the shardings of `like`."""
    if jax.tree.structure(state) == jax.tree.structure(like):
        return state
    return jax.jit(stack_layers, out_shardings=jax.tree.map(lambda x: x.sharding, like))(state)


def _leaves(state: TrainState) -> dict[str, Any]:
    """Returns every leaf of the state by its path. The paths under `params.` are those of `weights.flatten`."""
    leaves = jax.tree_util.tree_leaves_with_path(state)
    return {jax.tree_util.keystr(path, simple=True, separator="."): leaf for path, leaf in leaves}
