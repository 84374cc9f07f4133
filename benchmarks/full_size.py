"""Measures conversion, loading and generation at the published size on this machine.

    python tests/make_checkpoint.py --config tests/golden/full/config.json --out DIR
    python benchmarks/full_size.py DIR

DIR is a published folder. The program prints the time and peak memory of the conversion, the time to load, and the
time per token at batch sizes 1 and 2 after compilation, over 100 tokens, with the published sampling settings. It
compares the time per token with that of reading the decoder's weights once at this machine's memory bandwidth, which is
the lower bound of every program that reads float32 weights once per token.
"""

import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import jax
import numpy as np

import davae_jax
from davae_jax.checkpoints.weights import flat_params

ROOT = Path(__file__).parent.parent
CONVERT = """
import resource, sys, time
start = time.perf_counter()
from davae_jax.checkpoints.published.from_torch import convert
convert(sys.argv[1], sys.argv[2])
print(time.perf_counter() - start, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024)
"""


def main() -> None:
    if len(sys.argv) != 2:
        sys.exit(__doc__)
    published = Path(sys.argv[1]).absolute()
    size = (published / "pytorch_model.bin").stat().st_size
    with tempfile.TemporaryDirectory(dir=published.parent) as scratch:
        converted = Path(scratch) / "converted"
        command = [sys.executable, "-c", CONVERT, published, converted]
        out = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=True).stdout.split()
        print(f"conversion   {float(out[0]):6.1f} s, peak memory {int(out[1]) / size:.2f} × the {size:,} bytes on disk")
        start = time.perf_counter()
        model = davae_jax.from_pretrained(converted)
        jax.block_until_ready(list(flat_params(model).values()))
        print(f"loading      {time.perf_counter() - start:6.1f} s, float16 on disk to float32")

    lower_bound = decoder_bytes(model) / read_rate()
    for batch in (1, 2):
        latent = np.random.default_rng(0).standard_normal((batch, model.config.latent_size), np.float32)
        start = time.perf_counter()
        davae_jax.generate(model, latent, max_length=100)
        first = time.perf_counter() - start
        rates = []
        for _ in range(3):
            start = time.perf_counter()
            ids = davae_jax.generate(model, latent, max_length=100)
            rates.append((time.perf_counter() - start) / (max(map(len, ids)) - 1))
        rate = sorted(rates)[1]
        print(
            f"generation   {rate:6.3f} s a token at batch {batch} (three runs: {min(rates):.3f} to {max(rates):.3f}), "
            f"{rate / lower_bound:.2f} × reading the weights once; first call {first:.0f} s with compilation"
        )


def decoder_bytes(model) -> int:
    """Returns the bytes of the weights that a step reads: the decoder's without `relative`, which is applied once."""
    weights = flat_params(model).items()
    return sum(w.nbytes for path, w in weights if path.startswith("decoder.") and ".relative." not in path)


def read_rate() -> float:
    """Returns the memory bandwidth, in bytes per second, of a sum over 1 GB with all cores."""
    x = np.ones(1 << 28, np.float32)
    total = jax.jit(lambda parts: [part.sum() for part in parts])
    parts = [jax.numpy.asarray(part) for part in np.split(x, 8 * (os.cpu_count() or 1))]
    jax.block_until_ready(total(parts))
    times = []
    for _ in range(5):
        start = time.perf_counter()
        jax.block_until_ready(total(parts))
        times.append(time.perf_counter() - start)
    return x.nbytes / min(times)


if __name__ == "__main__":
    main()
