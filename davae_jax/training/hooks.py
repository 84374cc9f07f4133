"""What happens now and then in a run: samples, checkpoints, a profile. A user's own hooks are called in the same way.

A hook is a callable with an `every`; the simplest is `Every(100, function)`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import jax
from tqdm import tqdm

from davae_jax.evaluation.examples import examples
from davae_jax.parallel.multihost import is_process_zero
from davae_jax.training.config import TrainConfig
from davae_jax.training.setup import Run
from davae_jax.training.state import TrainState
from davae_jax.training.step import all_finite
from davae_jax.utils.errors import InputError


@dataclasses.dataclass
class Hook:
    """Called behind every `every`-th step, counted from 1, with the state after that step.

    Before a hook is called, the values of all steps so far have been logged and found finite. On several processes
    every process calls every hook.
    """

    every: int  # 0: never
    at_end: bool = False  # also behind the last step, and where the run is interrupted

    def is_due(self, step: int, last: bool) -> bool:
        return (self.at_end and last) or (self.every > 0 and step % self.every == 0)

    def __call__(self, run: Run, state: TrainState, step: int) -> None:
        raise NotImplementedError


@dataclasses.dataclass
class Every(Hook):
    """Calls `function(run, state, step)`."""

    function: Callable[[Run, TrainState, int], None] = lambda run, state, step: None

    def __call__(self, run: Run, state: TrainState, step: int) -> None:
        self.function(run, state, step)


class WriteSamples(Hook):
    """Writes what the model makes of some held-out texts to samples.jsonl, and one of them to the terminal."""

    def is_due(self, step: int, last: bool) -> bool:
        return super().is_due(step, last) and not last  # at the end of a run, more is measured

    def __call__(self, run: Run, state: TrainState, step: int) -> None:
        if run.corpus.held_out and (vae := run.text_vae(state)):
            samples = examples(vae, run.corpus.held_out, run.corpus.analogy)
            run.log.samples(step, samples)
            tqdm.write(f"step {step}: {' → '.join(samples['reconstructions'][0])}")


class SaveCheckpoint(Hook):
    """Measures the loss of the held-out texts and begins to save the state.

    The last hook to be called: what other hooks wrote behind the checkpoint of a run that is then killed would be
    written twice.
    """

    def __call__(self, run: Run, state: TrainState, step: int) -> None:
        with jax.set_mesh(run.mesh):
            if not all_finite((state.params, state.regularizers)):
                raise non_finite_error(run, step, "its update made weights that are not finite")
            losses = [run.held_out_loss(state.params, batch) for batch in run.held_out]
            means = (
                {name: sum(float(one[name]) for one in losses) / len(losses) for name in losses[0]} if losses else {}
            )
            if means:
                run.log.held_out(step, means)
            run.checkpoints.save(state, held_out_loss=means.get("loss"), extra_state=run.log.pending)


def mean_held_out_losses(run: Run, state: TrainState) -> dict[str, float]:
    """Returns the mean of each held-out loss over the run's held-out batches; nothing where there are none."""
    losses = [run.held_out_loss(state.params, batch) for batch in run.held_out]
    names = losses[0] if losses else ()
    return {name: sum(float(batch[name]) for batch in losses) / len(losses) for name in names}


class Profiler:
    """Traces the steps that --profile-steps names, counted from this start, for TensorBoard or Perfetto."""

    def __init__(self, run: Run):
        self.first, self.last = run.config.log.profile_steps or (0, 0)
        self._offset, self._folder, self._tracing = run.first_step, run.folder / "profile", False

    def before_step(self, step: int) -> None:
        if step - self._offset == self.first and is_process_zero():
            jax.profiler.start_trace(str(self._folder))
            self._tracing = True

    def after_step(self, step: int, state: TrainState, last: bool) -> None:
        if self._tracing and (last or step - self._offset == self.last):
            jax.block_until_ready(state)
            jax.profiler.stop_trace()
            self._tracing = False


def default_hooks(config: TrainConfig) -> list[Hook]:
    """Returns the hooks that every run has, in the order in which they are called."""
    return [WriteSamples(config.log.samples), SaveCheckpoint(config.log.checkpoint, at_end=True)]


def non_finite_error(run: Run, step: int, description: str) -> InputError:
    """Returns the error that ends a run at a step: what is not finite, which texts it saw, and the last checkpoint."""
    run.checkpoints.wait()  # what is being saved was found finite
    return InputError(
        f"step {step}: {description}; its batch is {run.batches.describe(step - 1)}; "
        f"the last good checkpoint is {run.checkpoints.last}"
    )
