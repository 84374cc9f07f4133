"""Shows what each implementation of the decoder's attention costs: for TPUs that need not be there, and measured.

    python benchmarks/attention.py [--shape B N T K H] [--measured-shape B N T K H] [--dtype bfloat16]
      [--chips tpu-v5e …] [--parts attention layer] [--json FILE]

Compiles the gradient of one layer's attention, and of the whole decoder layer, for TPUs, with JAX's TPU package
(libtpu), and prints what XLA says of the programs: the bytes that they move and their temporary memory; and the time
that these bytes, or the products, take at the chip's full rates (a roofline). All of this is predicted.

Then it measures attention on the device that is there, as `--attention auto` does, beside the prediction for a chip
that it knows. The peer is xla, the reference. Without a chip, set JAX_PLATFORMS=cpu.
"""

import argparse
import functools
import importlib.util
import json
import math
import os
import platform
import re
from datetime import date
from importlib.metadata import version
from pathlib import Path

if os.environ.get("JAX_PLATFORMS") == "cpu":
    os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")  # libtpu would wait for the metadata of a cloud's machine

import jax
import jax.numpy as jnp
from flax import nnx
from jax.experimental import topologies
from jax.sharding import SingleDeviceSharding

from davae_jax.model.attention import causal_mask, relative_attention
from davae_jax.model.config import DecoderConfig
from davae_jax.model.decoder import DecoderLayer
from davae_jax.parallel.chips import CHIPS, Chip, find_chip
from davae_jax.planning.attention import attention_bytes, attention_flops, roofline_seconds
from davae_jax.training.choose_attention import PLATFORMS, REFERENCE, make_inputs, results, try_all
from davae_jax.training.flops import AttentionShape

HEADER = (
    f"{'chip':8} {'':9} {'':10} {'GB moved':>9} {'GB temp.':>9} {'TFLOP':>7} {'roofline':>9}  kernels, XLA's cycles"
)
TOPOLOGIES = {"tpu-v5e": "v5e:2x2", "tpu-v5p": "v5p:2x2x1", "tpu-v6e": "v6e:2x2"}


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shape", type=int, nargs=5, metavar=("B", "N", "T", "K", "H"), default=(8, 25, 511, 511, 64))
    parser.add_argument("--dtype", default="bfloat16", choices=("float32", "bfloat16"))
    parser.add_argument("--chips", nargs="*", choices=TOPOLOGIES, default=list(TOPOLOGIES))
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--measured-shape", type=int, nargs=5, metavar=("B", "N", "T", "K", "H"))
    parser.add_argument("--json", type=Path)
    args = parser.parse_args(argv)
    shape = AttentionShape(*args.shape)
    libtpu = version("libtpu") if importlib.util.find_spec("libtpu") else None
    values = {"date": date.today().isoformat(), "jax": jax.__version__, "libtpu": libtpu}
    values["machine"] = f"{platform.platform()}, {os.cpu_count()} cores"
    print(", ".join(f"{name} {value}" for name, value in values.items()), flush=True)
    predicted = []
    if args.chips and libtpu is None:
        print("not compiled for TPUs: JAX's TPU package (libtpu) is not installed")
    elif args.chips:
        print(f"predicted, compiled without a chip: gradients, {describe(shape, args.dtype)}")
        print(HEADER, flush=True)
        for chip in args.chips:
            predicted += predict(chip, args.parts, shape, args.dtype)
    measured_shape = AttentionShape(*args.measured_shape) if args.measured_shape else shape
    measured = measure(measured_shape, args.dtype)
    print(f"\nmeasured on {jax.devices()[0].device_kind}: attention forward and backward, ", end="")
    print(describe(measured_shape, args.dtype))
    print_measured(measured)
    if args.json:
        values |= {"shape": shape, "dtype": args.dtype, "predicted": predicted}
        values |= {"device": jax.devices()[0].device_kind, "measured_shape": measured_shape, "measured": measured}
        args.json.write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")


def describe(shape: AttentionShape, dtype: str) -> str:
    B, N, T, K, H = shape
    return f"{B} texts, {N} heads of {H}, {T} queries, {K} keys, {dtype}"


# ---- compiled for chips that need not be there


def predict(chip: str, parts: list[str], shape: AttentionShape, dtype: str) -> list[dict]:
    """Returns a row for each part (attention, the decoder layer) with each implementation, and prints it."""
    device = topologies.get_topology_desc(TOPOLOGIES[chip], "tpu").devices[0]
    rows = []
    for part in parts:
        for name in CHIPS[chip].attention:
            row = compile_for(device, shape, *PARTS[part](name, shape, dtype))
            if part == "attention":
                row["flops"] = attention_flops(name, shape, backward=True)
                row["roofline_seconds"] = roofline_seconds(CHIPS[chip], row["flops"], row["bytes"])
            rows.append({"chip": chip, "part": part, "implementation": name} | row)
            print_predicted(rows[-1])
    return rows


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
    """Returns what XLA says of a program: its kernels, arrays of the scores' size, bytes and temporary memory.

    XLA estimates the cycles of its own operations, but not those of the kernels.
    """
    sharding = SingleDeviceSharding(device)
    compiled = jax.jit(function, in_shardings=sharding, out_shardings=sharding).lower(*arguments).compile()
    text = compiled.as_text()
    B, N, T, K, _ = shape
    sizes = {tuple(map(int, dims.split(","))) for dims in re.findall(r"\b\w+\[([\d,]+)\]", text)}
    of_scores = [dims for dims in sizes if math.prod(dims) >= B * N * T * K]
    return {
        "kernels": text.count('custom_call_target="tpu_custom_call"'),
        "arrays_of_scores": sorted(of_scores),
        "bytes": compiled.cost_analysis()["bytes accessed"],
        "temporary_bytes": compiled.memory_analysis().temp_size_in_bytes,
        "xla_cycles": sum(map(int, re.findall(r'estimated_cycles":"(\d+)"', text))),
    }


def print_predicted(row: dict) -> None:
    roofline = f"{row['flops'] / 1e12:7.3f} {1e3 * row['roofline_seconds']:6.2f} ms" if "flops" in row else " " * 17
    print(
        f"{row['chip']:8} {row['part']:9} {row['implementation']:10} {row['bytes'] / 1e9:9.2f} "
        f"{row['temporary_bytes'] / 1e9:9.2f} {roofline}  {row['kernels']}, {row['xla_cycles'] / 1e6:.1f} M",
        flush=True,
    )


# ---- measured on the device that is there


def measure(shape: AttentionShape, dtype: str) -> list[dict]:
    """Returns a row for each implementation that is for this device."""
    device = jax.devices()[0]
    chip: Chip | None = find_chip(device.device_kind)
    names = [REFERENCE, *(name for name, needed in PLATFORMS.items() if needed == device.platform)]
    attends = {name: functools.partial(relative_attention, implementation=name) for name in names}
    rows = [trial._asdict() for trial in try_all(attends, make_inputs(shape, dtype, packed=False))]
    for row in rows:
        row["roofline_seconds"] = None
        if chip:
            flops = attention_flops(row["name"], shape, backward=True)
            moved = attention_bytes(row["name"], shape, jnp.dtype(dtype).itemsize, chip.platform, backward=True)
            row["roofline_seconds"] = roofline_seconds(chip, flops, moved)
        row["ratio"] = rows[0]["seconds"] / row["seconds"] if row["seconds"] and rows[0]["seconds"] else None
    return rows


def print_measured(rows: list[dict]) -> None:
    for row in rows:
        if row["problem"]:
            print(f"{row['name']:12} {row['problem']}")
            continue
        roofline = f", predicted {1e3 * row['roofline_seconds']:.3f} ms" if row["roofline_seconds"] else ""
        print(
            f"{row['name']:12} {1e3 * row['seconds']:9.3f} ms{roofline}, {row['ratio']:.2f} × {REFERENCE}'s speed, "
            f"largest error {row['error']:.2f} of what rounding explains"
        )


if __name__ == "__main__":
    main()
