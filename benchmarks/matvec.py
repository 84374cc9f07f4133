"""Measures, on this CPU, why weights are [out, in] and why the weight is on the left of products with few rows.

    python benchmarks/matvec.py

Decoding token by token reads every weight once for each token, so the memory bandwidth of a matrix-vector product
determines the speed of generation. The program prints GB/s for three ways to write y = W x at the decoder's shapes, and
the ratio of the model's (`davae_jax.model.layers.matmul_transposed`) to x @ W with W stored as [in, out].
"""

import time

import jax
import jax.numpy as jnp
import numpy as np

from davae_jax.model.layers import matmul_transposed

SHAPES = [(1600, 4800), (1600, 6400), (6400, 1600)]  # qkv, MLP in, MLP out of the published decoder
WEIGHTS = 8  # matrices of each shape, so that none stays in the processor's cache


def seconds(function, x, weights) -> float:
    """Returns the time of the fastest of seven runs over all weights."""
    compiled = jax.jit(lambda x, weights: [function(x * i, w) for i, w in enumerate(weights)])
    jax.block_until_ready(compiled(x, weights))
    times = []
    for _ in range(7):
        start = time.perf_counter()
        jax.block_until_ready(compiled(x, weights))
        times.append(time.perf_counter() - start)
    return min(times)


def main() -> None:
    rng = np.random.default_rng(0)
    print(f"{'rows':>4} {'in':>5} {'out':>5}  {'x @ [in, out]':>14} {'x · [out, in]ᵀ':>14} {'as used':>8}   ratio")
    for rows in (1, 2, 4, 8):
        for d_in, d_out in SHAPES:
            out_in = [jnp.asarray(rng.standard_normal((d_out, d_in), np.float32)) for _ in range(WEIGHTS)]
            in_out = [jnp.asarray(np.asarray(w).T.copy()) for w in out_in]
            x = jnp.ones((rows, d_in))
            gigabytes = sum(w.nbytes for w in out_in) / 1e9
            plain = gigabytes / seconds(lambda x, w: x @ w, x, in_out)
            transposed = gigabytes / seconds(lambda x, w: jnp.einsum("ri,oi->ro", x, w), x, out_in)
            used = gigabytes / seconds(matmul_transposed, x, out_in)
            print(f"{rows:4} {d_in:5} {d_out:5}  {plain:14.1f} {transposed:14.1f} {used:8.1f}   {used / plain:.2f} ×")


if __name__ == "__main__":
    main()
