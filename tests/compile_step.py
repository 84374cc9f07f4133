"""Compiles a train step ahead of time for a mesh, in a process of its own, and prints what the program does as JSON.

python tests/compile_step.py '{"mesh": [1, 8, 1], "layers": 1, "batch_size": 8, "length": 64}' [TPU_TOPOLOGY]

layers: of each half; null, all of the full size.
"""

import json
import math
import sys
from dataclasses import replace

import jax
import numpy as np
from hlo import aliases, collectives
from jax.sharding import AxisType, Mesh

from davae_jax.data.config import DataConfig
from davae_jax.model.davae import abstract_training_model, split
from davae_jax.parallel.config import MeshConfig
from davae_jax.planning.shapes import batch_shapes, bytes_per_device
from davae_jax.training.presets import PRESETS
from davae_jax.training.state import abstract_state
from davae_jax.training.step import make_train_step


def main(mesh: list[int], layers: int | None, batch_size: int, length: int, topology: str | None = None) -> dict:
    devices = math.prod(mesh)
    config = replace(
        PRESETS["randeng-1b"][1],
        **dict(batch_size=batch_size, mesh=MeshConfig(*mesh), data=DataConfig(max_length=length)),
    )
    model = config.model
    if layers:
        encoder, decoder = replace(model.encoder, num_hidden_layers=layers), replace(model.decoder, num_layers=layers)
        config = replace(config, model=replace(model, encoder=encoder, decoder=decoder))
    if topology:
        from jax.experimental import topologies

        where = topologies.get_topology_desc(topology, "tpu").devices
        options = {}
    else:
        jax.config.update("jax_num_cpu_devices", devices)
        where = jax.devices()
        # The partitioning is what is looked at, not the machine code.
        options = {"xla_backend_optimization_level": 0, "xla_llvm_disable_expensive_passes": True}
    mesh = Mesh(np.array(where).reshape(mesh), ("data", "fsdp", "tensor"), axis_types=(AxisType.Auto,) * 3)

    model = abstract_training_model(config.model, dtype=config.dtype)
    state = abstract_state(model, config, mesh)
    batch = batch_shapes(config, batch_size)
    with jax.set_mesh(mesh):
        lowered = make_train_step(split(model)[0], config, state).lower(state, batch)
        compiled = lowered.compile(compiler_options=options)
    text = compiled.as_text()
    sizes = compiled.memory_analysis()
    return {
        "leaves": len(jax.tree.leaves(state)),
        "aliases": aliases(text),
        "state_bytes": bytes_per_device(state),
        "alias_bytes": sizes.alias_size_in_bytes,
        "argument_bytes": sizes.argument_size_in_bytes,
        "collectives": [c._asdict() for c in collectives(text)],
    }


if __name__ == "__main__":
    print(json.dumps(main(**json.loads(sys.argv[1]), topology=(sys.argv[2:] or [None])[0])))
