"""Runs the training from the first to the last step. Start reading here.

A run is set up (`setup.py`), takes its steps (`step.py`), each of which reduces the objective (`objective.py`), and
ends with an evaluation. Periodic actions, such as samples and checkpoints, are hooks (`hooks.py`).
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import NamedTuple

import jax

from davae_jax.data.batches import Batch
from davae_jax.data.prefetch import prefetch
from davae_jax.data.prepared.shards import THREADS
from davae_jax.parallel.agreement import any_process_requested_stop
from davae_jax.parallel.multihost import disconnect, is_process_zero
from davae_jax.regularizers import RegularizerError
from davae_jax.training.config import TrainConfig
from davae_jax.training.hooks import Hook, Profiler, default_hooks
from davae_jax.training.reporting import StepValues, announce, evaluate, log_metrics
from davae_jax.training.setup import Run, set_up
from davae_jax.training.state import TrainState
from davae_jax.training.step import Logs
from davae_jax.utils.errors import StepError
from davae_jax.utils.locks import FolderLock
from davae_jax.utils.progress import progress_bar
from davae_jax.utils.signals import StopRequest


class TrainResult(NamedTuple):
    run: Run
    state: TrainState
    step: int  # total number of steps taken
    interrupted: bool  # whether a signal ended the run before its last step or during the evaluation


def train(config: TrainConfig, hooks: Sequence[Hook] = ()) -> TrainResult:
    """Trains a model, resuming if the run folder already contains checkpoints.

    Args:
      hooks: called before the run's own (`hooks.default_hooks`).

    Raises:
      InputError: an option or an input cannot be used, or a loss or gradient is not finite.
    """
    started = time.perf_counter()
    with FolderLock() as lock:
        run, state = set_up(config, lock)
        announce(run, state)
        try:
            with StopRequest() as stop, run.checkpoints, run.log:
                result = take_steps(run, state, [*hooks, *default_hooks(config)], stop)
        except StepError:
            disconnect()  # all processes raise it; connected, the first to end would abort the others
            raise
        if not result.interrupted and config.log.figures and run.corpus.held_out:
            try:
                evaluate(run, result.state, started)
            except KeyboardInterrupt:  # the trained model is saved; started again, the run evaluates it
                return result._replace(interrupted=True)
        return result


def take_steps(run: Run, state: TrainState, hooks: Sequence[Hook], stop: StopRequest) -> TrainResult:
    """Takes the run's remaining steps, until the last one or until a stop is requested."""
    steps, step = run.config.steps, run.first_step
    batches = prefetch(run.batches, run.batch_sharding, step, threads=THREADS if run.corpus.prepared else 0)
    profiler, unlogged, last = Profiler(run), None, step == steps
    with progress_bar(total=steps, initial=step, unit="step", disable=None if is_process_zero() else True) as bar:
        while not last:
            step += 1
            wait_start = time.perf_counter()
            batch = next(batches)
            waited = time.perf_counter() - wait_start
            profiler.before_step(step)
            state, values = take_step(run, state, batch, step)
            if unlogged:  # values of the previous step, read while the devices compute this one
                log_metrics(run, unlogged, bar)
            unlogged = StepValues(step, values, batch.shape, waited)
            bar.update()
            last = any_process_requested_stop(stop.requested, step) or step == steps
            profiler.after_step(step, state, last)
            if due := [hook for hook in hooks if hook.is_due(step, last)]:
                log_metrics(run, unlogged, bar)
                unlogged = None
                for hook in due:
                    hook(run, state, step)
                run.log.restart_clock()
    return TrainResult(run, state, step, interrupted=step < steps)


def take_step(run: Run, state: TrainState, batch: Batch, step: int) -> tuple[TrainState, Logs]:
    """Starts the computation of a step. Returns the next state and the values to log, without waiting for them."""
    try:
        with jax.set_mesh(run.mesh):
            return run.take_step(state, batch)
    except RegularizerError as e:
        raise StepError(f"step {step}: {e}") from e
