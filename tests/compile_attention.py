"""Compiles the gradient of the decoder's attention for a TPU that need not be there, with each implementation.

python tests/compile_attention.py TOPOLOGY [B N T K H]

Prints, as JSON, the kernels of each program, its arrays of the size of the scores, and the bytes that it moves and
needs. The sizes are by default those of the published decoder, with 8 texts of 512 tokens.
"""

import json
import math
import re
import sys

import jax
import jax.numpy as jnp
from jax.experimental import topologies
from jax.sharding import SingleDeviceSharding

from davae_jax.model.attention import causal_mask, relative_attention


def main(topology: str, B: int = 8, N: int = 25, T: int = 511, K: int = 511, H: int = 64) -> dict:
    sharding = SingleDeviceSharding(topologies.get_topology_desc(topology, "tpu").devices[0])
    shapes = [(B, N, T, H), (B, N, K, H), (B, N, K, H), (N, K, H), (N, H), (N, H), (B, N, T, H)]
    dtypes = [*[jnp.bfloat16] * 4, jnp.float32, jnp.float32, jnp.bfloat16]
    arrays = list(map(jax.ShapeDtypeStruct, shapes, dtypes))
    return {name: compile_gradient(name, arrays, sharding) for name in ("xla", "mosaic_tpu")}


def compile_gradient(implementation: str, arrays: list, sharding: SingleDeviceSharding) -> dict:
    (B, N, T, _), K = arrays[0].shape, arrays[1].shape[2]

    def gradients(*arrays):
        *arguments, d_out = arrays
        mask = causal_mask(T, K, offset=K - T)
        return jax.vjp(lambda *x: relative_attention(*x, mask, implementation), *arguments)[1](d_out)

    compiled = jax.jit(gradients, in_shardings=sharding, out_shardings=sharding).lower(*arrays).compile()
    text = compiled.as_text()
    shapes = {tuple(map(int, dims.split(","))) for dims in re.findall(r"\b\w+\[([\d,]+)\]", text)}
    return {
        "kernels": text.count('custom_call_target="tpu_custom_call"'),
        "arrays_of_scores": sorted(shape for shape in shapes if math.prod(shape) >= B * N * T * K),
        "bytes": compiled.cost_analysis()["bytes accessed"],
        "temporary_bytes": compiled.memory_analysis().temp_size_in_bytes,
    }


if __name__ == "__main__":
    print(json.dumps(main(sys.argv[1], *map(int, sys.argv[2:]))))
