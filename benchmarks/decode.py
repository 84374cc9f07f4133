"""How many tokens per second does generation make, and how near is that to reading the weights once per token?

    python -m benchmarks decode [DIR] [--batches 1 2 8 64] [--lengths 32 100 512] [--layers N] [--width N] [--vocab N]

DIR is a folder with a model, in any form; without it the model has random weights and the given sizes, by default the
published ones. The limit is the time that a step needs to read the decoder's weights and the keys and values so far, at
the rate of this machine's memory, or to multiply, at its FLOP/s, whichever is longer. Each is measured in the same run.

The peer is what the published program does: the same decoder in PyTorch, which reads one token at a time and computes
keys and values of the whole recurrent memory anew. It takes the most likely token; davae-jax samples with the model's
settings, which is more work. The first call, which compiles, is not counted. Tokens are those of all texts together.
"""

import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np

import davae_jax
from benchmarks.common import Row, in_turns, make_parser, matmul_rate, memory_rate, parse, positive, report, row
from benchmarks.models import add_sizes, decoder_weights, random_model, random_twin, resize
from davae_jax.model.davae import DAVAE
from davae_jax.training.presets import RANDENG_1B

SMALLEST = {"batches": [1, 2], "lengths": [8], "layers": 1, "width": 64, "vocab": 64}
SMALL_ENCODER = {"layers": 1, "width": 64, "vocab": 64}  # decoding does not use it


class Sizes(NamedTuple):
    """Of what shows the limits of this machine."""

    megabytes: int = 1024
    matrix: int = 2048


def main(argv: list[str] | None = None) -> None:
    parser = make_parser(__doc__, __file__, rounds=3)
    parser.add_argument("model", type=Path, nargs="?", metavar="DIR")
    parser.add_argument("--batches", type=positive, nargs="+", default=[1, 2, 8, 64], help="numbers of texts")
    parser.add_argument("--lengths", type=positive, nargs="+", default=[32, 100, 512], help="tokens of each text")
    add_sizes(parser, RANDENG_1B.model)
    budget = "longest expected time of one measurement of the peer (120); 0 leaves it out"
    parser.add_argument("--peer-seconds", type=float, default=120, help=budget)
    args = parse(parser, argv, SMALLEST)
    if min(args.lengths) < 2:
        parser.error("--lengths: must be at least 2, because <bos> counts")
    if args.model:
        model = davae_jax.from_pretrained(args.model)
    else:
        sizes = {"layers": args.layers, "width": args.width, "vocab": args.vocab}
        model = random_model(resize(RANDENG_1B.model, encoder=SMALL_ENCODER, decoder=sizes))
    twin = random_twin(model.config) if args.peer_seconds else None
    shown_by = Sizes(64, 512) if args.smallest else Sizes()
    cells = [(batch, length) for batch in sorted(args.batches) for length in sorted(args.lengths)]
    report(args, measure(model, twin, cells, args.rounds, shown_by, args.peer_seconds))


def measure(
    model: DAVAE, twin, cells: list[tuple[int, int]], rounds: int, sizes: Sizes, peer_seconds: float
) -> Iterator[Row]:
    """Yields a row for each number of texts and of tokens.

    Args:
      twin: the peer, or None.
      peer_seconds: where the peer is expected to take longer, it is left out.
    """
    per_work = 0.0  # of the peer: seconds for each text and square of a length, as measured last
    for batch, length in cells:
        latent = np.random.default_rng(0).standard_normal((batch, model.config.latent_size), np.float32)
        functions = {"davae-jax": partial(generation_rate, model, latent, length)}
        if twin is not None and per_work * batch * length**2 <= peer_seconds:
            functions["published"] = partial(published_rate, twin, latent, length)
            published_rate(twin, latent, 2)  # PyTorch makes its threads and its plans
        in_turns({"davae-jax": functions["davae-jax"]}, 1)  # compiles
        rates = in_turns(functions, rounds)
        peer = None
        if "published" in rates:
            peer = "PyTorch without a cache", rates["published"]
            per_work = 1 / (min(rates["published"]) * length)
        limit = fastest(model, batch, length, sizes)
        yield row({"texts": batch, "tokens": length}, "tokens/s", rates["davae-jax"], peer=peer, limit=limit)


def generation_rate(model: DAVAE, latent: np.ndarray, length: int) -> float:
    """Returns the tokens per second of generation, <bos> not counted."""
    return rate(lambda: max(map(len, davae_jax.generate(model, latent, max_length=length))) - 1, len(latent))


def published_rate(twin, latent: np.ndarray, length: int) -> float:
    """Returns the tokens per second of the published program's loop: one token at a time, after the memory."""
    import torch

    def run() -> int:
        ids, memory = torch.full((len(latent), 1), twin.config["bos_token_id"]), None
        with torch.inference_mode():
            for _ in range(length - 1):
                logits, memory, *_ = twin.decode(ids, torch.from_numpy(latent), memory)
                ids = logits[:, -1:].argmax(-1)
        return length - 1

    return rate(run, len(latent))


def rate(run: Callable[[], int], texts: int) -> float:
    """Returns the tokens per second of a function that returns its number of steps."""
    start = time.perf_counter()
    steps = run()
    return texts * steps / (time.perf_counter() - start)


def fastest(model: DAVAE, batch: int, length: int, sizes: Sizes) -> tuple[str, float]:
    """Returns which limit holds, and the tokens per second of a program that reaches it.

    A step reads all weights of the decoder once, except those that are applied to positions alone, and the keys and
    values of the tokens so far: in the mean, of half of them.
    """
    weights = decoder_weights(model)
    config, itemsize = model.config.decoder, weights[0].dtype.itemsize
    keys_values = 2 * config.num_layers * config.hidden_size * itemsize * batch * length / 2
    reading = (sum(w.nbytes for w in weights) + keys_values) / memory_rate(sizes.megabytes)
    multiplying = 2 * batch * sum(w.size for w in weights) / matmul_rate(sizes.matrix)
    name = "memory stream" if reading > multiplying else "FLOP/s"
    return name, batch / max(reading, multiplying)


if __name__ == "__main__":
    main()
