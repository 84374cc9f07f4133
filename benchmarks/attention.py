"""What does each implementation of the decoder's attention cost, on TPUs that need not be there and as measured?

    python -m benchmarks attention [--shape B N T K H] [--measured-shape B N T K H] [--dtype bfloat16]
      [--chips tpu-v5e …] [--parts attention layer]

Compiles the gradient of one layer's attention, and of the whole decoder layer, for TPUs, with JAX's TPU package
(libtpu), and prints what XLA says of the programs: the bytes that they move and their temporary memory; and the time
that these bytes, or the products, take at the chip's full rates (a roofline). All of this is predicted.

Then it measures attention on the device that is there, as `--attention auto` does, beside the prediction for a chip
that it knows. The peer is xla, the reference. Without a chip, set JAX_PLATFORMS=cpu.
"""

import functools
import importlib.util
import itertools
import math
import os
import re
from collections.abc import Iterator
from importlib.metadata import version

if os.environ.get("JAX_PLATFORMS") == "cpu":
    os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")  # libtpu would wait for the metadata of a cloud's machine

import jax
import jax.numpy as jnp
from flax import nnx
from jax.experimental import topologies
from jax.sharding import SingleDeviceSharding

from benchmarks.common import Row, make_parser, parse, report, row
from davae_jax.model.attention import causal_mask, relative_attention
from davae_jax.model.config import DecoderConfig
from davae_jax.model.decoder import DecoderLayer
from davae_jax.parallel.chips import CHIPS, Chip, find_chip
from davae_jax.planning.attention import attention_bytes, attention_flops, roofline_seconds
from davae_jax.training.choose_attention import PLATFORMS, REFERENCE, make_inputs, results, try_all
from davae_jax.training.flops import AttentionShape

TOPOLOGIES = {"tpu-v5e": "v5e:2x2", "tpu-v5p": "v5p:2x2x1", "tpu-v6e": "v6e:2x2"}


def main(argv: list[str] | None = None) -> None:
    parser = make_parser(__doc__, __file__)
    sizes = dict(type=int, nargs=5, metavar=("B", "N", "T", "K", "H"))
    parser.add_argument("--shape", default=(8, 25, 511, 511, 64), **sizes)
    parser.add_argument("--dtype", default="bfloat16", choices=("float32", "bfloat16"))
    parser.add_argument("--chips", nargs="*", choices=TOPOLOGIES, default=list(TOPOLOGIES))
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--measured-shape", **sizes)
    args = parse(parser, argv, {"shape": (1, 1, 8, 8, 8), "chips": []})
    shape = AttentionShape(*args.shape)
    libtpu = version("libtpu") if importlib.util.find_spec("libtpu") else None
    if args.chips and libtpu is None:
        print("not compiled for TPUs: JAX's TPU package (libtpu) is not installed")
        args.chips = []
    predicted = (predict(chip, part, shape, args.dtype) for chip in args.chips for part in args.parts)
    measured = measure(AttentionShape(*(args.measured_shape or shape)), args.dtype)
    report(args, itertools.chain(itertools.chain.from_iterable(predicted), measured), libtpu=libtpu, shape=shape)


def describe(shape: AttentionShape, dtype: str) -> str:
    B, N, T, K, H = shape
    return f"gradients of {B} texts, {N} heads of {H}, {T} queries, {K} keys, {dtype}"


# ---- compiled for chips that need not be there


def predict(chip: str, part: str, shape: AttentionShape, dtype: str) -> Iterator[Row]:
    """Yields a row for a part (attention, the decoder layer) with each implementation."""
    device = topologies.get_topology_desc(TOPOLOGIES[chip], "tpu").devices[0]
    for name in CHIPS[chip].attention:
        costs = compile_for(device, shape, *PARTS[part](name, shape, dtype))
        if part == "attention":
            flops = attention_flops(name, shape, backward=True)
            costs["TFLOP"] = flops / 1e12
            costs["roofline, ms"] = 1e3 * roofline_seconds(CHIPS[chip], flops, 1e9 * costs["GB moved"])
        labels = {"table": f"Predicted, compiled without a chip: {describe(shape, dtype)}", "chip": chip}
        yield {**labels, "part": part, "implementation": name, **costs}


def attention_gradient(name: str, shape: AttentionShape, dtype: str):
    """Returns (function, abstract arguments) of attention's output and gradients."""
    *arguments, _, d_out = jax.eval_shape(functools.partial(make_inputs, shape, dtype, packed=False))
    attend = functools.partial(relative_attention, implementation=name)

    def gradient(*arrays):
        mask = causal_mask(shape.T, shape.K, offset=shape.K - shape.T)
        return results(attend, *arrays[:-1], mask, arrays[-1])

    return gradient, (*arguments, d_out)


def layer_gradient(name: str, shape: AttentionShape, dtype: str):
    """Returns (function, abstract arguments) of a decoder layer's gradients, with a memory of K − T tokens."""
    B, N, T, K, H = shape
    config = DecoderConfig(hidden_size=N * H, num_attention_heads=N, num_layers=1)
    kw = dict(dtype=jnp.dtype(dtype), param_dtype=jnp.float32)
    graphdef, weights = nnx.split(nnx.eval_shape(lambda: DecoderLayer(config, rngs=nnx.Rngs(0), **kw)))
    array = functools.partial(jax.ShapeDtypeStruct, dtype=jnp.dtype(dtype))
    x, features, memory = array((B, T, N * H)), array((K, N * H)), array((B, K - T, N * H))
    bias = jax.ShapeDtypeStruct((N, H), jnp.float32)

    def gradient(weights, x, features, u, w, memory, d_out):
        mask = causal_mask(T, K, offset=K - T)

        def run(weights, x, u, w):
            layer = nnx.merge(graphdef, weights)
            past = layer.memory_keys_values(memory) if K > T else None
            return layer(x, layer.relative_keys(features), u, w, mask, past=past, attention=name)[0]

        return jax.vjp(run, weights, x, u, w)[1](d_out)

    return gradient, (weights, x, features, bias, bias, memory, x)


PARTS = {"attention": attention_gradient, "layer": layer_gradient}


def compile_for(device, shape: AttentionShape, function, arguments) -> dict:
    """Returns what XLA says of a program: its kernels, arrays of the scores' size, traffic and temporary memory.

    XLA estimates the cycles of its own operations, but not those of the kernels.
    """
    sharding = SingleDeviceSharding(device)
    compiled = jax.jit(function, in_shardings=sharding, out_shardings=sharding).lower(*arguments).compile()
    text = compiled.as_text()
    B, N, T, K, _ = shape
    sizes = {tuple(map(int, dims.split(","))) for dims in re.findall(r"\b\w+\[([\d,]+)\]", text)}
    return {
        "GB moved": compiled.cost_analysis()["bytes accessed"] / 1e9,
        "GB temporary": compiled.memory_analysis().temp_size_in_bytes / 1e9,
        "kernels": text.count('custom_call_target="tpu_custom_call"'),
        "arrays of the scores' size": sum(math.prod(dims) >= B * N * T * K for dims in sizes),
        "XLA's million cycles": sum(map(int, re.findall(r'estimated_cycles":"(\d+)"', text))) / 1e6,
    }


# ---- measured on the devices of this machine


def measure(shape: AttentionShape, dtype: str) -> Iterator[Row]:
    """Yields a row for each implementation that is for this device."""
    device = jax.devices()[0]
    chip: Chip | None = find_chip(device.device_kind)
    names = [REFERENCE, *(name for name, needed in PLATFORMS.items() if needed == device.platform)]
    attends = {name: functools.partial(relative_attention, implementation=name) for name in names}
    trials = try_all(attends, make_inputs(shape, dtype, packed=False))
    title = f"Measured on {device.device_kind}: {describe(shape, dtype)}"
    for trial in trials:
        labels = {"table": title, "implementation": trial.name}
        if trial.problem:
            yield {**labels, "problem": trial.problem}
            continue
        limit, reference = None, trials[0].seconds
        if chip:
            flops = attention_flops(trial.name, shape, backward=True)
            moved = attention_bytes(trial.name, shape, jnp.dtype(dtype).itemsize, chip.platform, backward=True)
            limit = "roofline", 1e3 * roofline_seconds(chip, flops, moved)
        peer = (REFERENCE, [1e3 * reference]) if reference else None
        error = {"largest error, of what rounding explains": trial.error}
        yield row(labels, "ms", [1e3 * trial.seconds], peer=peer, limit=limit, **error)


if __name__ == "__main__":
    main()
