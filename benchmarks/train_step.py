"""How fast is a training step on a CPU, and how fast is the same step in PyTorch?

    python -m benchmarks train_step [--sizes demo …] [--rounds 5] [--steps 20] [--json FILE]

Each side is a process of its own that trains on the same batches of 64 texts of 48 tokens: davae-jax with the program
of `train.py`, and PyTorch with that of `benchmarks/torch_training.py`. Both run with the settings of the C library that
train.py starts itself with (davae_jax/utils/huge_pages.py) and without them. In a round, all four take some steps, one
after the other. The rows compare the two sides with equal settings, and as a user starts them: train.py, which has the
settings, and PyTorch, which has not. The limit is the FLOP/s of a large matrix product. Run it on an idle machine.
"""

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from importlib.metadata import version

import numpy as np

from benchmarks.common import ROOT, Row, in_turns, make_parser, matmul_rate, parse, positive, report, row
from davae_jax.checkpoints.published.published_names import name_table
from davae_jax.checkpoints.weights import flatten
from davae_jax.data.batches import Batch
from davae_jax.model.davae import Params, abstract_training_model, split
from davae_jax.training.config import TrainConfig
from davae_jax.training.flops import model_flops
from davae_jax.training.presets import DEMO
from davae_jax.utils.huge_pages import SETTINGS

B, LENGTH = 64, 48
SIZES = {  # name → arguments of `config_of`
    "demo": dict(vocab=1024),
    "demo, 8,000 pieces": dict(vocab=8064),
    "30 M weights, dropout": dict(vocab=8064, width=384, layers=6, dropout=0.1),
    "smallest": dict(vocab=64, width=16, layers=1),
}
PAUSE = 0.5  # seconds before a side's turn: PyTorch's threads spin for a while when they have nothing to do


def main(argv: list[str] | None = None) -> None:
    parser = make_parser(__doc__, __file__, rounds=5)
    usual = [size for size in SIZES if size != "smallest"]
    parser.add_argument("--sizes", nargs="+", choices=SIZES, default=usual)
    parser.add_argument("--steps", type=positive, default=20, help="number of steps of a turn (20)")
    args = parse(parser, argv, {"sizes": ["smallest"], "steps": 2})
    report(args, measure(args.sizes, args.rounds, args.steps), torch=version("torch"))


def measure(sizes: list[str], rounds: int, steps: int) -> Iterator[Row]:
    """Yields two rows for each size: with equal settings on both sides, and each side as it is started."""
    for size in sizes:
        rates = time_sides(size, rounds, steps)
        flops = model_flops(config_of(**SIZES[size]), (LENGTH, LENGTH)) / (B * LENGTH)
        limit = ("matrix product", matmul_rate() / flops)
        ours = rates["davae-jax", True]
        for settings, kept in (("equal", True), ("as started", False)):
            peer = ("PyTorch", rates["torch", kept])
            yield row({"size": size, "settings": settings}, "tokens/s", ours, peer=peer, limit=limit)
        yield row(
            {"size": size, "settings": "memory kept"}, "tokens/s", ours, peer=("not kept", rates["davae-jax", False])
        )


def config_of(vocab: int, width: int = 128, layers: int = 2, dropout: float = 0.0) -> TrainConfig:
    """Returns the demo's settings for a model of another size."""
    encoder = replace(
        DEMO.model.encoder,
        **dict(vocab_size=vocab, hidden_size=width, num_hidden_layers=layers, intermediate_size=2 * width),
        **dict(hidden_dropout_prob=dropout, attention_probs_dropout_prob=dropout, initializer_range=0.02),
    )
    decoder = replace(
        DEMO.model.decoder,
        **dict(vocab_size=vocab, hidden_size=width, num_layers=layers, initializer_range=0.02),
        **dict(embedding_dropout_prob=dropout, output_dropout_prob=dropout),
    )
    return replace(DEMO, model=replace(DEMO.model, encoder=encoder, decoder=decoder, bos_token_id=1, end_token_id=2))


def make_batches(config: TrainConfig, count: int = 8) -> list[Batch]:
    """Returns batches of random ids, without padding."""
    rng = np.random.default_rng(0)
    encoder, decoder = (
        rng.integers(5, section.vocab_size, (count, B, length), dtype=np.int32)
        for section, length in ((config.model.encoder, LENGTH), (config.model.decoder, LENGTH + 1))
    )
    lengths = np.full(B, LENGTH + 1, np.int32)
    return [Batch.of_texts(e, d, lengths) for e, d in zip(encoder, decoder, strict=True)]


def initial_params(config: TrainConfig) -> Params:
    """Returns the weights of a new model."""
    from benchmarks.models import random_model

    return split(random_model(config.model))[1]


def published_weights(config: TrainConfig, params: Params) -> dict[str, np.ndarray]:
    """Returns weights by their published names."""
    arrays = flatten(params)
    return {row.name: row.to_file(np.asarray(arrays[row.path])) for row in name_table(config.model)}


# ---- the process of a side, which takes as many steps as it reads from standard input


def our_steps(config: TrainConfig) -> Callable[[int], float]:
    """Returns a function that takes a number of steps with davae-jax and returns the last loss."""
    import jax

    from davae_jax.model.stack import stack_layers
    from davae_jax.training.state import init_state
    from davae_jax.training.step import make_train_step

    batches = make_batches(config)
    take_step = make_train_step(split(abstract_training_model(config.model))[0], config)
    state = init_state(stack_layers(initial_params(config)), config)

    def run(steps: int) -> float:
        nonlocal state
        for i in range(steps):
            state, logs = take_step(state, batches[i % len(batches)])
        return float(jax.block_until_ready((state, logs["loss"]))[1])

    return run


def torch_steps(config: TrainConfig) -> Callable[[int], float]:
    """Returns a function that takes a number of steps with PyTorch and returns the last loss."""
    from benchmarks.torch_training import TorchTraining

    batches, training = make_batches(config), TorchTraining(config, published_weights(config, initial_params(config)))

    def run(steps: int) -> float:
        for i in range(steps):
            logs = training.step(batches[i % len(batches)])
        return float(logs["loss"])

    return run


def work(side: str, size: str) -> None:
    """Reads numbers of steps from standard input, takes them, and prints the seconds of each turn."""
    run = {"davae-jax": our_steps, "torch": torch_steps}[side](config_of(**SIZES[size]))
    for line in sys.stdin:
        start = time.perf_counter()
        loss = run(int(line))
        print(json.dumps({"seconds": time.perf_counter() - start, "loss": loss}), flush=True)


# ---- all sides, in turns


def time_sides(size: str, rounds: int, steps: int) -> dict[tuple[str, bool], list[float]]:
    """Returns the tokens per second of each side, with memory kept and without, in each round."""
    sides = [(side, kept) for kept in (True, False) for side in ("davae-jax", "torch")]
    processes = {each: start(*each, size) for each in sides}
    try:
        turns = {each: partial(take_turn, process, steps) for each, process in processes.items()}
        in_turns(turns, 1)  # compiles, and reaches a steady state
        return in_turns(turns, rounds)
    finally:
        for process in processes.values():
            process.kill()
            process.communicate()


def start(side: str, kept: bool, size: str) -> subprocess.Popen:
    """Starts the process of a side."""
    env = {name: value for name, value in os.environ.items() if name not in SETTINGS} | (SETTINGS if kept else {})
    code = f"from benchmarks.train_step import work; work({side!r}, {size!r})"
    return subprocess.Popen(
        [sys.executable, "-c", code], env=env, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )


def take_turn(process: subprocess.Popen, steps: int) -> float:
    """Lets a process take some steps. Returns its tokens per second."""
    time.sleep(PAUSE)
    process.stdin.write(f"{steps}\n")
    process.stdin.flush()
    if not (line := process.stdout.readline()):
        raise SystemExit(f"a process ended with code {process.wait()}")
    return steps * B * LENGTH / json.loads(line)["seconds"]


if __name__ == "__main__":
    main()
