"""Periodic actions of a run: samples, checkpoints, a profile. Hooks that the user passes are called in the same way.

To add an action of your own, pass it to `train`:

    def print_norm(run, state, step):
        print(step, optax.global_norm(state.params))

    train(config, hooks=[Every(100, print_norm)])

or derive a class from `Hook`.
"""

from __future__ import annotations

import abc
import contextlib
import dataclasses
from collections.abc import Callable, Iterator

import jax
from tqdm import tqdm

from davae_jax.evaluation.examples import examples
from davae_jax.parallel.agreement import all_processes
from davae_jax.parallel.multihost import is_process_zero
from davae_jax.training.config import TrainConfig
from davae_jax.training.setup import Run
from davae_jax.training.state import TrainState
from davae_jax.training.step import all_finite
from davae_jax.utils.errors import InputError, StepError, first_line, system_reason


@dataclasses.dataclass
class Hook(abc.ABC):
    """An action that is called after every `every` steps, with the state after that step.

    Before a hook is called, the values of all steps so far have been logged and checked to be finite. With several
    processes, every process calls every hook.
    """

    every: int  # in steps; 0: never
    at_end: bool = dataclasses.field(default=False, kw_only=True)  # also at the end, and if the run is interrupted

    def is_due(self, step: int, last: bool) -> bool:
        return (self.at_end and last) or (self.every > 0 and step % self.every == 0)

    @abc.abstractmethod
    def __call__(self, run: Run, state: TrainState, step: int) -> None:
        """Acts. Raises InputError to end the run with one line."""


@dataclasses.dataclass
class Every(Hook):
    """Calls `function(run, state, step)`."""

    function: Callable[[Run, TrainState, int], None]

    def __call__(self, run: Run, state: TrainState, step: int) -> None:
        self.function(run, state, step)


class WriteSamples(Hook):
    """Writes reconstructions and samples to samples.jsonl, and one reconstruction to the terminal."""

    def is_due(self, step: int, last: bool) -> bool:
        return super().is_due(step, last) and not last  # the run ends with an evaluation, which includes examples

    def __call__(self, run: Run, state: TrainState, step: int) -> None:
        if run.corpus.held_out and (vae := run.text_vae(state)):
            samples = examples(vae, run.corpus.held_out, run.corpus.analogy)
            run.log.samples(step, samples)
            tqdm.write(f"step {step}: {' → '.join(samples['reconstructions'][0])}")


class SaveCheckpoint(Hook):
    """Computes the loss of the held-out texts and begins to save the state. Ends a run whose folder is gone.

    Must be the last hook: if the run is killed after the checkpoint, output that other hooks wrote after it would be
    written again on resume.
    """

    def __call__(self, run: Run, state: TrainState, step: int) -> None:
        with jax.set_mesh(run.mesh):
            if not all_finite((state.params, state.regularizers)):
                raise non_finite_error(run, step, "the update resulted in weights that are not finite")
            if means := mean_held_out_losses(run, state):
                run.log.held_out(step, means)
            is_in_place = all_processes(run.lock.holds(run.folder))
            if not is_in_place and not all_processes(not run.folder.exists()):
                raise StepError(f"{run.folder}: is another folder now; that of the run was moved or removed")
            run.checkpoints.save(state, held_out_loss=means.get("loss"), extra_state=run.log.pending)
            if not is_in_place:
                run.checkpoints.wait()
                raise StepError(
                    f"{run.folder}: was moved or removed during the run, which cannot go on; "
                    f"step {step} is saved in {run.checkpoints.last}, without the other files of the run"
                )


def mean_held_out_losses(run: Run, state: TrainState) -> dict[str, float]:
    """Returns the mean of each held-out loss over the run's held-out batches; {} if there are none."""
    losses = [run.held_out_loss(state.params, batch) for batch in run.held_out]
    names = losses[0] if losses else ()
    return {name: sum(float(batch_losses[name]) for batch_losses in losses) / len(losses) for name in names}


class Profiler:
    """Traces the steps of --profile-steps, counted from the start of this process, for TensorBoard or Perfetto."""

    def __init__(self, run: Run):
        self.first, self.last = run.config.log.profile_steps or (0, 0)
        self._offset, self._folder, self._tracing = run.first_step, run.folder / "profile", False

    def before_step(self, step: int) -> None:
        if step - self._offset == self.first and is_process_zero():
            with self._write_errors():
                jax.profiler.start_trace(str(self._folder))
            self._tracing = True

    def after_step(self, step: int, state: TrainState, last: bool) -> None:
        if self._tracing and (last or step - self._offset == self.last):
            jax.block_until_ready(state)
            self._tracing = False
            with self._write_errors():
                jax.profiler.stop_trace()

    @contextlib.contextmanager
    def _write_errors(self) -> Iterator[None]:
        """Turns an error of the profiler into one that names the folder, such as that of a full disk."""
        try:
            yield
        except Exception as e:
            raise InputError(
                f"{self._folder}: the profile cannot be written ({system_reason(e) or first_line(e)})"
            ) from e


def default_hooks(config: TrainConfig) -> list[Hook]:
    """Returns the hooks of every run, in the order in which they are called."""
    return [WriteSamples(config.log.samples), SaveCheckpoint(config.log.checkpoint, at_end=True)]


def non_finite_error(run: Run, step: int, description: str) -> StepError:
    """Returns the error that ends a run. It names the step, the value, the step's texts and the last checkpoint.

    Args:
      description: names the value that is not finite.
    """
    run.checkpoints.wait()  # a state is only saved if it is finite
    return StepError(
        f"step {step}: {description}; its batch is {run.batches.describe(step - 1)}; "
        f"the last good checkpoint is {run.checkpoints.last}"
    )
