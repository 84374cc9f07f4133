"""Prints and writes the output of a run: the summary at its start, metrics of the steps, the final evaluation."""

from __future__ import annotations

import time
import warnings
from typing import NamedTuple

import jax
from tqdm import tqdm

from davae_jax.evaluation.evaluate import evaluate_run
from davae_jax.evaluation.examples import examples, format_examples
from davae_jax.evaluation.table import format_table
from davae_jax.inference.text_vae import TextVAE
from davae_jax.parallel.agreement import run_on_process_zero
from davae_jax.parallel.multihost import is_process_zero
from davae_jax.regularizers import active
from davae_jax.training.hooks import non_finite_error
from davae_jax.training.run.log import Work
from davae_jax.training.setup import Run, truncation_mismatch, unsharded_weights
from davae_jax.training.state import TrainState
from davae_jax.training.step import Logs, describe_non_finite
from davae_jax.utils.files import write_json


class StepValues(NamedTuple):
    """The results of a step. The devices may still be computing the values; reading them waits."""

    step: int
    values: Logs
    shape: tuple[int, int]  # (S, T) of its batch
    seconds_waited: float  # waiting for the batch


def log_metrics(run: Run, step_values: StepValues, bar: tqdm) -> None:
    """Waits for a step's values and logs them. Raises InputError if one is not finite."""
    step, values = step_values.step, jax.device_get(step_values.values)
    work = Work(int(values.pop("tokens")), run.flops(step_values.shape), step_values.seconds_waited)
    kl_per_dim = values.pop("kl_per_dim")
    values = {name: float(value) for name, value in values.items()}
    if problem := describe_non_finite(values, active(run.config.regularizers)):
        raise non_finite_error(run, step, problem)
    if values.get("skipped") and is_process_zero():
        bar.write(f"step {step}: skipped, the gradient norm is {values['grad_norm']:.3g}")
    if means := run.log.step(step, values, work, last=step == run.config.steps):
        run.log.histogram(step, "kl_per_dim", kl_per_dim)
        bar.set_postfix_str(
            f"loss {means['loss']:.3f}, KL {means['kl_unmasked']:.1f}, β {means['beta']:.3g}, "
            f"{means['tokens_per_s']:.0f} tokens/s"
        )


def announce(run: Run, state: TrainState) -> None:
    """Prints a summary of model and data on process 0, and warnings about likely mistakes."""
    if not is_process_zero():
        return
    weights = sum(w.size for w in jax.tree.leaves(state.params))
    dropped = f" ({run.batches.too_long:,} longer ones dropped)" if run.batches.too_long else ""
    print(
        f"{weights:,} weights, {run.batches.count:,} texts{dropped}, steps {run.first_step} to {run.config.steps} "
        f"of {run.batches.summary()}, in {run.folder}"
    )
    if jax.device_count() > 1:
        mesh = ", ".join(f"{axis} {size}" for axis, size in run.mesh.shape.items())
        print(f"{jax.device_count()} devices in {jax.process_count()} processes: {mesh}")
        if warning := unsharded_weights(run.config.model, run.mesh.shape):
            warnings.warn(warning, stacklevel=2)
    if warning := truncation_mismatch(run.config, run.corpus):
        warnings.warn(warning, stacklevel=2)
    if run.chip:
        peak = f"{run.chip.flops / 1e12:.0f} TFLOP/s per device"
        print(f"MFU is relative to {peak}, the bfloat16 peak of {run.chip.name}")


def evaluate(run: Run, state: TrainState, started: float) -> None:
    """Evaluates the trained model on held-out texts, prints examples and metrics, and writes figures.json.

    Args:
      started: `time.perf_counter()` when the run began, for its duration.
    """
    vae = run.text_vae(state)
    run_on_process_zero(lambda: _evaluate(run, vae, started))


def _evaluate(run: Run, vae: TextVAE, started: float) -> None:
    corpus = run.corpus
    print(f"\n{format_examples(examples(vae, corpus.held_out, corpus.analogy))}\n")
    metrics = evaluate_run(vae, corpus.held_out[: run.config.log.figures], corpus.grammar)
    print(f"{format_table(metrics)}\n")
    write_json(run.folder / "figures.json", metrics | {"seconds": round(time.perf_counter() - started, 1)})
