"""Trains a DAVAE: `python train.py` for the demo, `python train.py --help` for everything else.

Read it top to bottom. What a run is told is in davae_jax/train_config.py, what it needs before its first step in
setup_run.py, the data in data.py, one step in train_step.py, what it leaves behind in run_folder.py and figures.py.
"""

from __future__ import annotations

import math
import shlex
import shutil
import signal
import sys
import time
from pathlib import Path

from davae_jax.cli import INTERRUPTED, guarded, leave


def main(argv: list[str] | None = None) -> int:
    argv = list(sys.argv[1:] if argv is None else argv)
    debug = "--debug" in argv  # on an error, the traceback as well
    return guarded(lambda: train([arg for arg in argv if arg != "--debug"]), "train.py", debug=debug)


def train(argv: list[str]) -> int | None:
    began = time.perf_counter()
    from davae_jax.train_cli import parse_train

    if (parsed := parse_train(argv)) is None:
        return 0
    preset, config = parsed

    import jax
    from tqdm import tqdm

    from davae_jax import figures, setup_run
    from davae_jax.checkpoint import CONFIG_FILE
    from davae_jax.data import fitting, tokenize
    from davae_jax.errors import InputError
    from davae_jax.files import write_json
    from davae_jax.model import abstract_model, merge, split
    from davae_jax.run_folder import RunFolder
    from davae_jax.sharding import make_mesh
    from davae_jax.text import TextVAE, load_tokenizers
    from davae_jax.train_step import abstract_state, all_finite, make_train_step

    # ---- texts, tokenizers, model. What can be wrong with the texts is found out before anything is written.
    mesh = make_mesh(config.mesh, config.batch_size)
    corpus = setup_run.read_corpus(config)
    run_dir = config.run_dir or Path("runs") / preset
    run = RunFolder(run_dir, config, corpus.digest)
    again = shlex.join([called("python", sys.executable), sys.argv[0], *argv])
    setup_run.prepare_tokenizers(config, run_dir, corpus.train)
    model_config = setup_run.model_config(config, run_dir)
    if config.init.encoder or config.init.decoder:
        model_config = setup_run.warm_start(config, model_config, run_dir)
    tokenizers = load_tokenizers(run_dir, model_config)
    max_length = config.data.max_length
    cut = config.data.segment_length is not None
    texts = tokenize(corpus.train, *tokenizers, max_length=max_length, source=corpus.source, cut=cut)
    corpus = corpus._replace(held_out=fitting(corpus.held_out, *tokenizers, max_length))
    batches = setup_run.make_batches(config, texts, model_config)
    model_config.to_json(run_dir / CONFIG_FILE)

    # ---- state: new, or where the run stood
    model = abstract_model(model_config, dtype=config.dtype)
    graphdef, _ = split(model)
    abstract = abstract_state(model, config, mesh)
    state = run.restore(abstract) if run.step else setup_run.first_state(abstract, model_config, config, run_dir)
    take_step = make_train_step(graphdef, config, abstract)

    def current() -> TextVAE:
        vae = TextVAE(merge(graphdef, state.params), *tokenizers)
        vae.batch_size = 256
        return vae

    print(
        f"{sum(w.size for w in jax.tree.leaves(state.params)):,} weights, {len(texts.lines):,} texts"
        + (f" ({texts.too_long:,} longer ones left out)" if texts.too_long else "")
        + f", steps {run.step} to {config.steps} of {batches.size}, in {run_dir}"
    )

    # ---- the loop. A step's values are looked at while the next step is computed, and before anything is saved.
    def look(step: int, logs: dict, tokens: int) -> None:
        values = {name: float(value) for name, value in jax.device_get(logs).items()}
        for name in ("loss", "loss_d", "grad_norm"):
            if not math.isfinite(values[name]):
                raise not_finite(step, f"{name} is {values[name]}")
        if means := run.log(step, values, tokens, last=step == config.steps):
            bar.set_postfix_str(
                f"loss {means['loss']:.3f}, KL {means['kl_unmasked']:.1f}, β {means['beta']:.3g}, "
                f"{means['tokens_per_s']:.0f} tokens/s"
            )

    def not_finite(step: int, what: str) -> InputError:
        lines = corpus.lines[texts.lines[batches.rows(step - 1)[0]] - 1]
        return InputError(
            f"step {step}: {what}; its batch is lines {', '.join(map(str, sorted(lines)))} of {corpus.source}; "
            f"the last good checkpoint is {run.last_checkpoint()}"
        )

    bar = tqdm(total=config.steps, initial=run.step, unit="step", disable=None)
    with jax.set_mesh(mesh), Interrupt() as interrupt, run, bar:
        pending = None
        for step in range(run.step + 1, config.steps + 1):
            batch = batches[step - 1]
            state, logs = take_step(state, batch)
            if pending:
                look(*pending)
            pending = step, logs, batch.tokens
            bar.update()
            ends = interrupt.asked or step == config.steps
            samples = config.log.samples and step % config.log.samples == 0 and not ends and corpus.held_out
            saves = ends or step % config.log.checkpoint == 0
            if saves or samples:
                look(*pending)
                pending = None
            if saves:
                if not all_finite(state.params):
                    raise not_finite(step, "its update made weights that are not finite")
                run.save(state)
            if ends:
                break
            if samples:
                found = figures.examples(current(), corpus.held_out, corpus.analogy)
                run.log_samples(step, found)
                bar.write(f"step {step}: {' → '.join(found['reconstructions'][0])}")
    if run.step < config.steps:
        print(f"interrupted after step {run.step}; to go on: {again}", file=sys.stderr)
        return INTERRUPTED

    # ---- what came of it
    if config.log.figures and corpus.held_out:
        try:
            trained = current()
            print(f"\n{figures.format_examples(figures.examples(trained, corpus.held_out, corpus.analogy))}\n")
            found = figures.figures(trained, corpus.held_out[: config.log.figures], corpus.language)
        except KeyboardInterrupt:
            print(f"interrupted after training, before the figures; for these: {again}", file=sys.stderr)
            return INTERRUPTED
        print(f"{figures.format_figures(found)}\n")
        write_json(run_dir / "figures.json", found | {"seconds": round(time.perf_counter() - began, 1)})
    print(f"{run.last_checkpoint()}: complete, after {time.perf_counter() - began:.0f} s")
    davae = called("davae", str(Path(sys.executable).with_name("davae")))
    print(f"next: {shlex.join([davae, 'generate', '--model', str(run_dir), corpus.example])}")
    return 0


def called(name: str, path: str) -> str:
    """How this environment's program is called: by its place, where its name means nothing or something else."""
    return name if shutil.which(name) == path or not Path(path).exists() else path


class Interrupt:
    """Ctrl-C and the signal that ends a job: the first asks for a stop after the step, a second ends at once."""

    def __init__(self):
        self.asked = False

    def __enter__(self):
        self._before = {s: signal.signal(s, self._heed) for s in (signal.SIGINT, signal.SIGTERM)}
        return self

    def __exit__(self, *_):
        for s, handler in self._before.items():
            signal.signal(s, handler)

    def _heed(self, number, frame):
        if self.asked:
            raise KeyboardInterrupt
        self.asked = True


if __name__ == "__main__":
    leave(main())
