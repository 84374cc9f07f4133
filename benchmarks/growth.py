"""How do time and memory of a training step, and of what comes before it, grow with each size?

    python -m benchmarks growth [--axes batch length …] [--rounds 5]

From a small model (2 layers, width 128, 1,024 entries, 16 texts of 64 tokens), one size at a time grows: the batch, the
length (in segments of 128 tokens with the recurrent memory), the layers, the latent size, the vocabulary. A row has the
seconds of a step, the temporary memory of its program and the memory of its state; the limit is the time of the step's
products at the FLOP/s of this machine. Further axes:

  data, fsdp, tensor   megabytes that a device sends in a step, for a mesh of several devices on this axis: those of the
                       compiled program, and those that `davae plan` expects for rings. The devices are emulated, so no
                       time is measured. XLA's CPU compiler reduces gradients whole where others scatter them, which is
                       up to twice the bytes
  texts                `davae prepare` and the start of reading, for corpora of several sizes
  compile              processor time for compiling the step, against the layers
"""

import contextlib
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import jax
import numpy as np
from jax.sharding import AxisType, Mesh

from benchmarks import compile_time, prepare_memory
from benchmarks.common import ROOT, Row, make_parser, matmul_rate, parse, report, row
from benchmarks.models import random_model, resize
from davae_jax.data.batches import Batch
from davae_jax.data.config import DataConfig
from davae_jax.model.davae import abstract_training_model, split
from davae_jax.model.stack import stack_layers
from davae_jax.parallel.chips import CHIPS
from davae_jax.parallel.config import MeshConfig
from davae_jax.parallel.sharding import make_abstract_mesh
from davae_jax.planning.communication import traffic
from davae_jax.planning.shapes import batch_shapes
from davae_jax.training.config import TrainConfig
from davae_jax.training.flops import longest_rows, model_flops
from davae_jax.training.presets import DEMO
from davae_jax.training.state import abstract_state, init_state
from davae_jax.training.step import make_train_step

SEGMENT = 128  # tokens, and of the memory
SIZES = {
    "batch": [1, 4, 16, 64, 256],
    "length": [64, 128, 256, 512, 1024, 2048, 4096],
    "layers": [1, 2, 4, 8, 9, 16, 32],
    "latent": [8, 32, 128, 512, 2048],
    "vocabulary": [1_024, 4_096, 16_384, 65_536],
    "data": [2, 4, 8],
    "fsdp": [2, 4, 8],
    "tensor": [2, 4, 8],
    "texts": [10_000, 100_000, 1_000_000],
    "compile": [1, 2, 4, 8, 9, 16, 32],
}
MESH_AXES = ("data", "fsdp", "tensor")
SMALLEST = {"batch": [1], "length": [256], "fsdp": [2], "texts": [100]}


def main(argv: list[str] | None = None) -> None:
    parser = make_parser(__doc__, __file__, rounds=5)
    parser.add_argument("--axes", nargs="+", choices=SIZES, default=list(SIZES))
    args = parse(parser, argv, {"axes": list(SMALLEST)})
    sizes = SMALLEST if args.smallest else SIZES
    if meshes := set(args.axes) & set(MESH_AXES):
        with contextlib.suppress(RuntimeError):  # JAX has been used: the caller has chosen their number
            jax.config.update("jax_num_cpu_devices", max(max(sizes[axis]) for axis in meshes))
        sys.path.append(str(ROOT / "tests"))  # hlo.py
    report(args, measure({axis: sizes[axis] for axis in args.axes}, args.rounds, 512 if args.smallest else 2048))


def measure(axes: dict[str, list[int]], rounds: int, width: int) -> Iterator[Row]:
    """Yields the rows of each axis. `width` is that of the product that shows the limit."""
    for axis, sizes in axes.items():
        for size in sizes:
            labels = {"table": axis, axis: size}
            if axis in MESH_AXES:
                labels = {"table": "devices", "axis of the mesh": axis, "devices": size}
                yield {**labels, **collective_bytes(size, axis)}
            elif axis == "texts":
                with tempfile.TemporaryDirectory() as folder:
                    yield {**labels, **prepare_memory.measure_corpus(Path(folder), size)}
            elif axis == "compile":
                trace, compile_, memory = compile_time.compile_step(size, 64, scan=True)
                yield {**labels, "trace, s": trace, "compile, s": compile_, "temporary, MB": memory / 1e6}
            else:
                yield step_row(labels, config_of(axis, size), rounds, matmul_rate(width))


def config_of(axis: str = "", size: int = 0) -> TrainConfig:
    """Returns the base config, with this size on one axis."""
    layers = {"layers": size} if axis == "layers" else {}
    vocab = size if axis == "vocabulary" else 1024
    half = {"vocab": vocab, **layers}
    model = resize(DEMO.model, encoder=half, decoder=half, latent_size=size if axis == "latent" else None)
    model = replace(model, decoder=replace(model.decoder, max_memory_length=SEGMENT))
    data = DataConfig(max_length=64)
    if axis == "length":
        data = DataConfig(max_length=size, segment_length=SEGMENT)
    batch_size = size if axis == "batch" else 16
    return replace(DEMO, model=model, data=data, batch_size=batch_size, mesh=MeshConfig(1, 1, 1))


def step_row(labels: Row, config: TrainConfig, rounds: int, flop_per_s: float) -> Row:
    """Returns the seconds of a training step on full rows, and its memory."""
    graphdef = split(abstract_training_model(config.model))[0]
    params = stack_layers(split(random_model(config.model))[1])
    state, (S, T) = init_state(params, config), longest_rows(config)
    rng, model = np.random.default_rng(0), config.model
    encoder_ids = rng.integers(1, model.encoder.vocab_size, (config.batch_size, S), np.int32)
    decoder_ids = rng.integers(0, model.end_token_id, (config.batch_size, T + 1), np.int32)
    batch = Batch.of_texts(encoder_ids, decoder_ids, np.full(config.batch_size, T + 1, np.int32))
    state_bytes = sum(x.nbytes for x in jax.tree.leaves(state))
    step = make_train_step(graphdef, config).lower(state, batch).compile()
    seconds = []
    for _ in range(1 + rounds):
        start = time.perf_counter()
        state, _ = jax.block_until_ready(step(state, batch))
        seconds.append(time.perf_counter() - start)
    flops = model_flops(config, (S, T))
    memory = {"temporary, MB": step.memory_analysis().temp_size_in_bytes / 1e6, "state, MB": state_bytes / 1e6}
    limit = "FLOP/s", flops / flop_per_s
    return row(labels, "s", seconds[1:], limit=limit, GFLOP=flops / 1e9, **memory)


def collective_bytes(devices: int, axis: str) -> Row:
    """Returns the megabytes that a device sends in a step with a mesh of one axis: as compiled, and as planned."""
    from hlo import collectives

    shape = {"data": 1, "fsdp": 1, "tensor": 1} | {axis: devices}
    config = replace(config_of(), mesh=MeshConfig(**shape))
    mesh = Mesh(
        np.array(jax.devices("cpu")[:devices]).reshape(*shape.values()), tuple(shape), axis_types=(AxisType.Auto,) * 3
    )
    model = abstract_training_model(config.model)
    state = abstract_state(model, config, mesh)
    with jax.set_mesh(mesh):
        lowered = make_train_step(split(model)[0], config, state).lower(state, batch_shapes(config, config.batch_size))
        fast = {"xla_backend_optimization_level": 0, "xla_llvm_disable_expensive_passes": True}
        text = lowered.compile(compiler_options=fast).as_text()
    compiled = sum(collective.sent for collective in collectives(text))
    abstract = make_abstract_mesh(config.mesh, config.batch_size, devices)
    planned = sum(axis.bytes for axis in traffic(config, abstract, CHIPS["h200"]).values())
    return {"compiled, MB": compiled / 1e6, "planned, MB": planned / 1e6, "compiled / planned": compiled / planned}


if __name__ == "__main__":
    main()
