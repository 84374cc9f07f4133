"""Trains a DAVAE: `python train.py` for the demo, `python train.py --help` for everything else.

Read it top to bottom. What a run is told is in davae_jax/train_config.py, what it needs before its first step in
setup_run.py, the data in data.py, one step in train_step.py, what it leaves behind in run_folder.py and figures.py.
"""

from __future__ import annotations

import dataclasses
import functools
import shlex
import shutil
import signal
import sys
import time
import warnings
from pathlib import Path

from davae_jax.cli.base import INTERRUPTED, exit_with, run_cli


def main(argv: list[str] | None = None) -> int:
    argv = list(sys.argv[1:] if argv is None else argv)
    debug = "--debug" in argv  # on an error, the traceback as well

    told = []  # of signals outside of the loop

    def work() -> int | None:
        from davae_jax.parallel.multihost import naming_the_lost

        with naming_the_lost():
            try:
                return train([arg for arg in argv if arg != "--debug"])
            except Exception:
                if told:  # what it came in upon made another error of it
                    raise KeyboardInterrupt from None
                raise

    def heed(number, frame):
        told.append(number)
        raise KeyboardInterrupt

    before = {s: signal.signal(s, heed) for s in (signal.SIGINT, signal.SIGTERM)}
    try:
        code = run_cli(work, "train.py", debug=debug)
        if distributed := sys.modules.get("davae_jax.distributed"):  # else it ended before there were others
            distributed.end(code)
        return code
    finally:
        for s, handler in before.items():
            signal.signal(s, handler)


def train(argv: list[str]) -> int | None:
    began = time.perf_counter()
    from davae_jax.cli.train import parse_train

    if (parsed := parse_train(argv)) is None:
        return 0
    preset, config = parsed

    import jax
    from jax.sharding import NamedSharding, PartitionSpec
    from tqdm import tqdm

    from davae_jax.checkpoints.run_folder import CONFIG_FILE
    from davae_jax.data.prefetch import local_row_ranges, make_global_batch, prefetch
    from davae_jax.data.shards import THREADS
    from davae_jax.data.tokenize import filter_by_length
    from davae_jax.evaluation import figures
    from davae_jax.inference.text_vae import TextVAE
    from davae_jax.model.davae import abstract_model, merge, split
    from davae_jax.parallel.chips import find_chip
    from davae_jax.parallel.multihost import (
        any_process_requested_stop,
        barrier,
        check_same_on_all_processes,
        connect,
        gather_params,
        is_process_zero,
        naming_the_lost,
        run_on_process_zero,
    )
    from davae_jax.parallel.sharding import RULES, make_mesh
    from davae_jax.regularizers import RegularizerError, active
    from davae_jax.tokenizers.load import load_tokenizers
    from davae_jax.training import setup as setup_run
    from davae_jax.training.checkpointer import Checkpoints
    from davae_jax.training.config import digest_of
    from davae_jax.training.flops import model_flops
    from davae_jax.training.run_folder import open_run
    from davae_jax.training.run_log import RunLog, Work
    from davae_jax.training.state import abstract_state, all_finite
    from davae_jax.training.step import make_held_out_loss, make_train_step, not_finite_in
    from davae_jax.utils.errors import InputError
    from davae_jax.utils.files import write_json

    # ---- devices of all processes; texts, tokenizers, model. What can be wrong with the texts is found out before
    # anything is written.
    run_dir, step = config.run_dir or Path("runs") / preset, 0
    connect(
        config.distributed, lambda: f" at step {step}; the last complete checkpoint is {Checkpoints(run_dir, 1).last}"
    )
    first = is_process_zero()
    mesh = make_mesh(config.mesh, config.batch_size, config.accumulate)
    corpus = setup_run.read_corpus(config)
    check_same_on_all_processes("the options", digest_of(config))
    check_same_on_all_processes("the texts", corpus.digest)
    check_same_on_all_processes("the texts to measure on", corpus.held_out_digest)
    again = shlex.join([called("python", sys.executable), sys.argv[0], *argv])

    def prepare() -> None:
        open_run(run_dir, config, corpus)
        setup_run.prepare_tokenizers(config, run_dir, corpus)

    run_on_process_zero("the run's folder", prepare)
    model_config = setup_run.model_config(config, run_dir)
    if config.init.encoder or config.init.decoder:
        run_on_process_zero("the pretrained halves", lambda: setup_run.warm_start(config, model_config, run_dir))
        model_config = setup_run.warm_started(model_config, run_dir)
    tokenizers = load_tokenizers(run_dir, model_config)
    batches = setup_run.batches_of(config, corpus, tokenizers, model_config)
    held_out = filter_by_length(corpus.held_out, *tokenizers, config.data.max_length, truncate=config.data.cut)
    corpus = corpus._replace(held_out=held_out)
    run_on_process_zero("the model's config", lambda: model_config.to_json(run_dir / CONFIG_FILE))

    # ---- state: new, or where the run stood
    model = abstract_model(model_config, dtype=config.dtype)
    graphdef, _ = split(model)
    abstract = abstract_state(model, config, mesh)
    checkpoints = Checkpoints(run_dir, config.log.keep)
    if checkpoints.step:
        state, pending_log = checkpoints.restore(abstract)
    else:
        state, pending_log = setup_run.first_state(abstract, model_config, config, run_dir), []
    begins, regularizers = checkpoints.step, active(config.regularizers)
    take_step = make_train_step(graphdef, config, abstract, batches.count)
    held_out_loss = make_held_out_loss(graphdef, config, abstract)
    over_batch = NamedSharding(mesh, PartitionSpec(RULES["batch"]))
    spans = local_row_ranges(over_batch, config.batch_size)
    held_out = []
    if measured := corpus.held_out[: config.log.held_out]:
        parts = setup_run.held_out_batches(config, measured, tokenizers, model_config)
        size = parts.batch_size
        coming = prefetch(parts, local_row_ranges(over_batch, size), 0, threads=0)
        held_out = [make_global_batch(next(coming), size, over_batch) for _ in range(parts.per_epoch)]

    def trained() -> TextVAE | None:
        """The model as it stands, for one process: the first."""
        params = gather_params(state.params)
        if not first:
            return None
        vae = TextVAE(merge(graphdef, params), *tokenizers)
        vae.batch_size = 256
        return vae

    weights = sum(w.size for w in jax.tree.leaves(state.params))
    say = print if first else lambda *_, **__: None
    say(
        f"{weights:,} weights, {batches.count:,} texts"
        + (f" ({batches.too_long:,} longer ones left out)" if batches.too_long else "")
        + f", steps {begins} to {config.steps} of {batches.size}, in {run_dir}"
    )
    if jax.device_count() > 1:
        over = ", ".join(f"{axis} {size}" for axis, size in mesh.shape.items())
        say(f"{jax.device_count()} devices of {jax.process_count()} processes: {over}")
        if first and (whole := setup_run.unsharded_weights(model_config, mesh.shape)):
            warnings.warn(whole, stacklevel=2)
    if first and (apart := setup_run.truncation_mismatch(config, corpus)):
        warnings.warn(apart, stacklevel=2)
    chip = find_chip(jax.devices()[0].device_kind)
    if chip:
        say(f"MFU is of {chip.flops / 1e12:.0f} TFLOP/s a device, the {chip.name}'s in bfloat16")
    # Batches come in a few shapes: counted once for each, not at every step.
    flops_of = functools.cache(functools.partial(model_flops, dataclasses.replace(config, model=model_config)))

    # ---- the loop. A step's values are looked at while the next step is computed, and before anything is saved.
    def look(step: int, logs: dict, lengths: tuple[int, int], waited: float) -> None:
        values = jax.device_get(logs)
        work = Work(int(values.pop("tokens")), flops_of(lengths), waited)
        kl_per_dim = values.pop("kl_per_dim")
        values = {name: float(value) for name, value in values.items()}
        if bad := not_finite_in(values, regularizers):
            raise not_finite(step, bad)
        if values.get("skipped") and first:
            bar.write(f"step {step}: skipped, its gradient's norm is {values['grad_norm']:.3g}")
        if means := log.step(step, values, work, last=step == config.steps):
            log.histogram(step, "kl_per_dim", kl_per_dim)
            bar.set_postfix_str(
                f"loss {means['loss']:.3f}, KL {means['kl_unmasked']:.1f}, β {means['beta']:.3g}, "
                f"{means['tokens_per_s']:.0f} tokens/s"
            )

    def not_finite(step: int, what: str) -> InputError:
        checkpoints.wait()  # what is being saved was found finite
        return InputError(
            f"step {step}: {what}; its batch is {batches.where(step - 1)}; "
            f"the last good checkpoint is {checkpoints.last}"
        )

    def measure(step: int) -> float | None:
        """Writes the losses of held-out texts; gives the one that checkpoints are compared by."""
        if not all_finite((state.params, state.regularizers)):
            raise not_finite(step, "its update made weights that are not finite")
        losses = mean_of([held_out_loss(state.params, batch) for batch in held_out])
        if losses:
            log.held_out(step, losses)
        return losses and losses["loss"]

    log = RunLog(
        run_dir,
        config.log.every,
        step=begins,
        pending=pending_log,
        peak_flops=chip and chip.flops * jax.device_count(),
        last_checkpoint=lambda: checkpoints.last,
    )
    bar = tqdm(total=config.steps, initial=begins, unit="step", disable=None if first else True)
    pending, stopped, tracing = None, False, False
    with Interrupt() as interrupt, checkpoints, log, bar, naming_the_lost():
        coming = prefetch(batches, spans, begins, threads=THREADS if corpus.prepared else 0)
        for step in range(begins + 1, config.steps + 1):
            asked = time.perf_counter()
            batch = make_global_batch(next(coming), config.batch_size, over_batch)
            waited = time.perf_counter() - asked
            if first and config.log.profile_steps and step - begins == config.log.profile_steps[0]:
                jax.profiler.start_trace(str(run_dir / "profile"))
                tracing = True
            with jax.set_mesh(mesh):
                try:
                    state, logs = take_step(state, batch)
                except RegularizerError as e:
                    raise InputError(f"step {step}: {e}") from e
            if pending:
                look(*pending)
            pending = step, logs, batch.read_lengths, waited
            bar.update()
            stopped = any_process_requested_stop(interrupt.asked, step)
            ends = stopped or step == config.steps
            if tracing and (ends or step - begins == config.log.profile_steps[1]):
                jax.block_until_ready(state)
                jax.profiler.stop_trace()
                tracing = False
            samples = config.log.samples and step % config.log.samples == 0 and not ends and corpus.held_out
            saves = ends or step % config.log.checkpoint == 0
            if saves or samples:
                look(*pending)
                pending = None
            # The checkpoint comes last: what a killed run wrote behind its checkpoint is written anew.
            if saves:
                with jax.set_mesh(mesh):
                    loss = measure(step)
            if samples and (vae := trained()):
                found = figures.examples(vae, corpus.held_out, corpus.analogy)
                log.samples(step, found)
                bar.write(f"step {step}: {' → '.join(found['reconstructions'][0])}")
            if saves:
                with jax.set_mesh(mesh):
                    checkpoints.save(state, held_out_loss=loss, extra_state=log.pending)
            if ends:
                break
            if pending is None:
                log.restart_clock()
    if stopped and step < config.steps:
        barrier("all processes have saved", config.distributed.timeout)  # process 0 ends what connects them
        say(f"interrupted after step {step}; to go on: {again}", file=sys.stderr)
        return INTERRUPTED

    # ---- what came of it
    def measure_all() -> None:
        print(f"\n{figures.format_examples(figures.examples(vae, corpus.held_out, corpus.analogy))}\n")
        found = figures.figures(vae, corpus.held_out[: config.log.figures], corpus.language)
        print(f"{figures.format_figures(found)}\n")
        write_json(run_dir / "figures.json", found | {"seconds": round(time.perf_counter() - began, 1)})

    try:
        if config.log.figures and corpus.held_out:
            vae = trained()
            run_on_process_zero("the figures", measure_all)
    except KeyboardInterrupt:
        say(f"interrupted after training, before the figures; for these: {again}", file=sys.stderr)
        return INTERRUPTED
    say(f"{checkpoints.last}: complete, after {time.perf_counter() - began:.0f} s")
    davae = called("davae", str(Path(sys.executable).with_name("davae")))
    say(f"next: {shlex.join([davae, 'generate', '--model', str(run_dir), corpus.example])}")
    return 0


def mean_of(losses: list[dict]) -> dict[str, float] | None:
    return {name: sum(float(one[name]) for one in losses) / len(losses) for name in losses[0]} if losses else None


def called(name: str, path: str) -> str:
    """How this environment's program is called: by its place, where its name means nothing or something else."""
    return name if shutil.which(name) == path or not Path(path).exists() else path


class Interrupt:
    """Ctrl-C and the signal that ends a job: the first asks for a stop after the step, a later one ends at once. What
    comes within a second of the first is the same: schedulers signal a job and its processes."""

    def __init__(self):
        self.asked, self._when = False, 0.0

    def __enter__(self):
        self._before = {s: signal.signal(s, self._heed) for s in (signal.SIGINT, signal.SIGTERM)}
        return self

    def __exit__(self, *_):
        for s, handler in self._before.items():
            signal.signal(s, handler)

    def _heed(self, number, frame):
        if self.asked and time.monotonic() > self._when + 1:
            raise KeyboardInterrupt
        if not self.asked:
            self.asked, self._when = True, time.monotonic()


if __name__ == "__main__":
    exit_with(main)
