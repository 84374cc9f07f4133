"""Shows how long a training step takes to compile as layers are added, and what memory it saves to compile them singly.

    python benchmarks/compile_time.py [--layers 4 8 12 32] [--width 64] [--json FILE]

Compiles the step of `randeng-1b`, narrowed to `--width`, with as many layers in the encoder as in the decoder: once as
training compiles it, where one of more than 8 layers becomes the body of a loop, and once with all layers one after the
other. Prints the seconds of processor time for tracing and for compiling, the temporary memory of the program, and the
ratio of the times to those of the first line. Nothing is kept in a compilation cache.
"""

import argparse
import json
import platform
import time
from dataclasses import replace
from datetime import date
from pathlib import Path

import jax
import numpy as np
from jax.sharding import AxisType, Mesh

from davae_jax.model import stack
from davae_jax.model.davae import abstract_training_model, split
from davae_jax.parallel.config import MeshConfig
from davae_jax.planning.shapes import batch_shapes
from davae_jax.training.config import DataConfig, TrainConfig
from davae_jax.training.presets import PRESETS
from davae_jax.training.state import abstract_state
from davae_jax.training.step import make_train_step


def config_of(layers: int, width: int) -> TrainConfig:
    """Returns the config of `randeng-1b` with this many layers in each half, of this width."""
    config = PRESETS["randeng-1b"][1]
    encoder = replace(
        config.model.encoder,
        **dict(num_hidden_layers=layers, hidden_size=width, intermediate_size=4 * width),
        **dict(num_attention_heads=4, vocab_size=1000),
    )
    decoder = replace(
        config.model.decoder, num_layers=layers, hidden_size=width, num_attention_heads=4, vocab_size=1000
    )
    model = replace(config.model, encoder=encoder, decoder=decoder)
    return replace(config, model=model, batch_size=8, data=DataConfig(max_length=64), mesh=MeshConfig(1, 1, 1))


def measure(layers: int, width: int, scan: bool) -> dict[str, float]:
    """Returns the processor seconds of tracing and compiling a step, and the bytes of its temporary memory."""
    config = config_of(layers, width)
    mesh = Mesh(
        np.array(jax.devices()[:1]).reshape(1, 1, 1), ("data", "fsdp", "tensor"), axis_types=(AxisType.Auto,) * 3
    )
    usual, stack.SCAN_ABOVE = stack.SCAN_ABOVE, stack.SCAN_ABOVE if scan else layers
    try:
        model = abstract_training_model(config.model, dtype=config.dtype)
        state, batch = abstract_state(model, config, mesh), batch_shapes(config, config.batch_size)
        with jax.set_mesh(mesh):
            times = [time.process_time()]
            lowered = make_train_step(split(model)[0], config, state).lower(state, batch)
            times.append(time.process_time())
            compiled = lowered.compile()
            times.append(time.process_time())
    finally:
        stack.SCAN_ABOVE = usual
    trace, compile_ = np.diff(times)
    memory = compiled.memory_analysis().temp_size_in_bytes
    return {"layers": layers, "scan": scan, "trace": trace, "compile": compile_, "temporary": memory}


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--layers", type=int, nargs="+", default=(4, 8, 12, 32))
    parser.add_argument("--width", type=int, default=64)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args(argv)
    jax.config.update("jax_enable_compilation_cache", False)
    rows, first = [], None
    print(f"{'layers':>6} {'':11} {'trace s':>8} {'compile s':>10} {'ratio':>6} {'temporary MB':>13}")
    for layers in args.layers:
        for scan in (True, False) if layers > stack.SCAN_ABOVE else (False,):
            row = measure(layers, args.width, scan)
            seconds = row["trace"] + row["compile"]
            first = first or seconds
            rows.append(row | {"ratio": seconds / first})
            print(
                f"{layers:6} {'one in loop' if scan else 'all':11} {row['trace']:8.1f} {row['compile']:10.1f} "
                f"{seconds / first:6.2f} {row['temporary'] / 1e6:13.1f}",
                flush=True,
            )
    if args.json:
        about = {"date": date.today().isoformat(), "jax": jax.__version__, "machine": platform.platform()}
        args.json.write_text(json.dumps(about | {"rows": rows}, indent=1), encoding="utf-8")


if __name__ == "__main__":
    main()
