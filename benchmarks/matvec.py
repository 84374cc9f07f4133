"""Why are weights [out, in], and on the left of products with few rows?

    python -m benchmarks matvec

Decoding token by token reads every weight once for each token, so the memory bandwidth of a matrix-vector product
determines the speed of generation. Each row is the bandwidth, on this machine, of y = W x as the model computes it
(`davae_jax.model.layers.matmul_transposed`) for the decoder's shapes. The peer is x @ W with W stored as [in, out].
"""

from collections.abc import Iterator
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.common import Row, make_parser, memory_rate, parse, report, row, summarize, time_in_turns
from davae_jax.model.layers import matmul_transposed

SHAPES = [(1600, 4800), (1600, 6400), (6400, 1600)]  # qkv, MLP in, MLP out of the published decoder
WEIGHTS = 8  # matrices of each shape, so that none stays in the processor's cache


def main(argv: list[str] | None = None) -> None:
    args = parse(make_parser(__doc__, __file__, rounds=7), argv, {})
    if args.smallest:
        report(args, measure([1], [(16, 32)], args.rounds, 64))
    else:
        report(args, measure([1, 2, 4, 8], SHAPES, args.rounds, 1024))


def measure(counts: list[int], shapes: list[tuple[int, int]], rounds: int, megabytes: int) -> Iterator[Row]:
    """Yields a row for each number of vectors and each shape. `megabytes` are those that show the memory stream."""
    rng = np.random.default_rng(0)
    for count in counts:
        for d_in, d_out in shapes:
            out_in = [jnp.asarray(rng.standard_normal((d_out, d_in), np.float32)) for _ in range(WEIGHTS)]
            in_out = [jnp.asarray(np.asarray(w).T.copy()) for w in out_in]
            x = jnp.ones((count, d_in))
            ways = {
                "used": (matmul_transposed, out_in),
                "einsum": (lambda x, w: jnp.einsum("ri,oi->ro", x, w), out_in),
                "in_out": (lambda x, w: x @ w, in_out),
            }
            compiled = {name: (jax.jit(partial(products, function)), ws) for name, (function, ws) in ways.items()}
            times = time_in_turns({name: partial(run, x, ws) for name, (run, ws) in compiled.items()}, rounds)
            gigabytes = sum(w.nbytes for w in out_in) / 1e9
            rates = {name: [gigabytes / t for t in seconds] for name, seconds in times.items()}
            yield row(
                {"rows": count, "in": d_in, "out": d_out},
                "GB/s",
                rates["used"],
                peer=("x @ W", rates["in_out"]),
                limit=("memory stream", memory_rate(megabytes) / 1e9),
                **{"einsum, GB/s": summarize(rates["einsum"])},
            )


def products(function, x, weights) -> list:
    return [function(x * i, w) for i, w in enumerate(weights)]


if __name__ == "__main__":
    main()
