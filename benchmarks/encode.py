"""How many texts per second does the encoder read, beside PyTorch and the processor's FLOP/s?

    python -m benchmarks encode [--batches 1 8 32] [--lengths 32 128 512] [--layers 12] [--width 768]

The encoder has the given sizes, by default the published ones, and random weights; the texts are random ids without
padding. The peer is the same encoder in PyTorch. The limit is the rate at which this machine multiplies matrices, as
measured in the same run.
"""

from collections.abc import Iterator
from functools import partial

import numpy as np

from benchmarks.common import Row, make_parser, matmul_rate, parse, positive, report, row, time_in_turns
from benchmarks.models import random_model, random_twin, resize
from davae_jax.model.config import DAVAEConfig
from davae_jax.training.presets import RANDENG_1B

SMALLEST = {"batches": [1, 2], "lengths": [8], "layers": 1, "width": 64}
SMALL_DECODER = {"layers": 1, "width": 64, "vocab": 64}  # encoding does not use it


def main(argv: list[str] | None = None) -> None:
    parser = make_parser(__doc__, __file__, rounds=5)
    encoder = RANDENG_1B.model.encoder
    parser.add_argument("--batches", type=positive, nargs="+", default=[1, 8, 32], help="numbers of texts")
    parser.add_argument("--lengths", type=positive, nargs="+", default=[32, 128, 512], help="tokens of each text")
    parser.add_argument("--layers", type=positive, default=encoder.num_hidden_layers)
    parser.add_argument("--width", type=positive, default=encoder.hidden_size)
    args = parse(parser, argv, SMALLEST)
    sizes = {"layers": args.layers, "width": args.width}
    config = resize(RANDENG_1B.model, encoder=sizes, decoder=SMALL_DECODER)
    cells = [(batch, length) for batch in args.batches for length in args.lengths]
    report(args, measure(config, cells, args.rounds, 512 if args.smallest else 2048))


def measure(config: DAVAEConfig, cells: list[tuple[int, int]], rounds: int, width: int) -> Iterator[Row]:
    """Yields a row for each number of texts and of tokens. `width` is that of the product that shows the limit."""
    model, twin, rng = random_model(config), random_twin(config), np.random.default_rng(0)
    for batch, length in cells:
        ids = rng.integers(1, config.encoder.vocab_size, (batch, length))
        functions = {"davae-jax": partial(model.encode, ids.astype(np.int32)), "PyTorch": partial(encode, twin, ids)}
        times = time_in_turns(functions, rounds)
        rates = {name: [batch / t for t in seconds] for name, seconds in times.items()}
        limit = "FLOP/s", matmul_rate(width) / flops_per_text(config, length)
        peer = "PyTorch", rates["PyTorch"]
        yield row({"texts": batch, "tokens": length}, "texts/s", rates["davae-jax"], peer=peer, limit=limit)


def encode(twin, ids: np.ndarray):
    """Returns the posterior means as PyTorch computes them."""
    import torch

    with torch.inference_mode():
        return twin.encode(torch.from_numpy(ids)).mean


def flops_per_text(config: DAVAEConfig, length: int) -> int:
    """Returns the FLOPs of the matrix products for a text; a multiply-add counts as 2."""
    encoder, L = config.encoder, config.latent_size
    D, F = encoder.hidden_size, encoder.intermediate_size
    layer = length * (4 * D * D + 2 * D * F) + 2 * length**2 * D
    return 2 * (encoder.num_hidden_layers * layer + D * D + 2 * D * L)


if __name__ == "__main__":
    main()
