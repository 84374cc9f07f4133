"""How long does a training step take to compile as layers are added, with one compiled for all and with each compiled?

    python -m benchmarks compile_time [--layers 4 8 12 32] [--width 64]

Compiles the step of `randeng-1b`, narrowed to `--width`, with as many layers in the encoder as in the decoder: once as
training compiles it, where one of more than 8 layers becomes the body of a loop, and once with all layers one after the
other. Prints the seconds of processor time for tracing and compiling, the temporary memory of the program, and the
ratio of the times to those of the first line. Nothing is kept in a compilation cache.
"""

import contextlib
import time
from collections.abc import Iterator
from dataclasses import replace

import jax
import numpy as np
from jax.experimental.compilation_cache import compilation_cache
from jax.sharding import AxisType, Mesh

from benchmarks.common import Row, make_parser, parse, positive, report, row
from davae_jax.data.config import DataConfig
from davae_jax.model import stack
from davae_jax.model.davae import abstract_training_model, split
from davae_jax.parallel.config import MeshConfig
from davae_jax.planning.shapes import batch_shapes
from davae_jax.training.config import TrainConfig
from davae_jax.training.presets import PRESETS
from davae_jax.training.state import abstract_state
from davae_jax.training.step import make_train_step


def main(argv: list[str] | None = None) -> None:
    parser = make_parser(__doc__, __file__)
    parser.add_argument("--layers", type=positive, nargs="+", default=[4, 8, 12, 32])
    parser.add_argument("--width", type=positive, default=64)
    args = parse(parser, argv, {"layers": [1], "width": 16})
    report(args, measure(args.layers, args.width))


def measure(counts: list[int], width: int) -> Iterator[Row]:
    """Yields a row for each number of layers, and above `SCAN_ABOVE` a second one with all layers compiled."""
    first = None
    for layers in counts:
        for scan in (True, False) if layers > stack.SCAN_ABOVE else (False,):
            trace, compile_, memory = compile_step(layers, width, scan)
            first = first or trace + compile_
            yield row(
                {"layers": layers, "compiled": "one in a loop" if scan else "all"},
                "s",
                [trace + compile_],
                **{"times the first": (trace + compile_) / first, "trace, s": trace, "compile, s": compile_},
                **{"temporary, MB": memory / 1e6},
            )


@contextlib.contextmanager
def no_compile_cache() -> Iterator[None]:
    """Lets JAX neither read nor keep compiled programs. JAX reads the setting once, unless its cache is reset."""
    usual = jax.config.jax_enable_compilation_cache
    _use_compile_cache(False)
    try:
        yield
    finally:
        _use_compile_cache(usual)


def _use_compile_cache(value: bool) -> None:
    jax.config.update("jax_enable_compilation_cache", value)
    compilation_cache.reset_cache()


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


def compile_step(layers: int, width: int, scan: bool) -> tuple[float, float, int]:
    """Returns the processor seconds of tracing and of compiling a step, and the bytes of its temporary memory."""
    config = config_of(layers, width)
    mesh = Mesh(
        np.array(jax.devices()[:1]).reshape(1, 1, 1), ("data", "fsdp", "tensor"), axis_types=(AxisType.Auto,) * 3
    )
    usual, stack.SCAN_ABOVE = stack.SCAN_ABOVE, stack.SCAN_ABOVE if scan else layers
    try:
        model = abstract_training_model(config.model, dtype=config.dtype)
        state, batch = abstract_state(model, config, mesh), batch_shapes(config, config.batch_size)
        with jax.set_mesh(mesh), no_compile_cache():
            times = [time.process_time()]
            lowered = make_train_step(split(model)[0], config, state).lower(state, batch)
            times.append(time.process_time())
            compiled = lowered.compile()
            times.append(time.process_time())
    finally:
        stack.SCAN_ABOVE = usual
    trace, compile_ = np.diff(times).tolist()
    return trace, compile_, compiled.memory_analysis().temp_size_in_bytes


if __name__ == "__main__":
    main()
