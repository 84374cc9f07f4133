"""The full-size train step, for machines that are not here: what each device holds, what it reuses, what it gathers.

The step is lowered at its full size on an abstract mesh, for GPUs and TPUs. It is compiled with every width but one
layer of the encoder and one of the decoder, because the partitioning of a layer does not depend on how many there are.
"""

import importlib.util
import json
import math
import re
import subprocess
import sys
from collections import Counter
from dataclasses import replace
from pathlib import Path

import compiler
import jax
import pytest

from davae_jax.model.davae import abstract_training_model, split
from davae_jax.parallel.config import MeshConfig
from davae_jax.parallel.sharding import make_abstract_mesh
from davae_jax.planning.memory import memory
from davae_jax.planning.shapes import batch_shapes, bytes_per_device
from davae_jax.training.presets import PRESETS
from davae_jax.training.state import abstract_state
from davae_jax.training.step import make_train_step

RANDENG = replace(PRESETS["randeng-1b"][1], batch_size=64)
MESH = {"data": 2, "fsdp": 4, "tensor": 1}
WEIGHTS = 1_249_095_457


@pytest.fixture(scope="module")
def traced():
    mesh = make_abstract_mesh(MeshConfig(*MESH.values()), RANDENG.batch_size, 8)
    model = abstract_training_model(RANDENG.model, dtype=RANDENG.dtype)
    state = abstract_state(model, RANDENG, mesh)
    with jax.sharding.use_abstract_mesh(mesh):
        step = make_train_step(split(model)[0], RANDENG, state)
        return step.trace(state, batch_shapes(RANDENG, RANDENG.batch_size)), state, mesh


@pytest.mark.parametrize("platform", ["cuda", "tpu"])
def test_the_full_size_lowers(traced, platform):
    """Every array of the state is donated, and each device gets no more of it than its part."""
    trace, state, mesh = traced
    with jax.sharding.use_abstract_mesh(mesh):
        text = trace.lower(lowering_platforms=(platform,)).as_text()
    assert "mhlo.num_partitions = 8" in text
    (signature,) = re.findall(r"func.func public @main\((.*)\) -> ", text)
    arguments = re.split(r", (?=%arg\d+: )", signature)
    leaves = jax.tree.leaves(state)
    of_state, of_batch = arguments[: len(leaves)], arguments[len(leaves) :]
    assert len(of_batch) == 4 and not any("tf.aliasing_output" in a or "jax.buffer_donor" in a for a in of_batch)
    places = [re.search(r"tf.aliasing_output = (\d+)", a)[1] for a in of_state]
    assert places == [str(i) for i in range(len(leaves))]

    weights = sum(map(_bytes_per_device, of_state[1 : 1 + len(jax.tree.leaves(state.params))]))
    all_of_it = sum(map(_bytes_per_device, of_state))
    assert weights == pytest.approx(WEIGHTS, rel=1e-2)  # 4 bytes over 4 devices of fsdp, and little that is whole
    assert all_of_it == pytest.approx(3 * WEIGHTS, rel=1e-2)
    planned = memory(RANDENG, mesh)
    kinds = planned["parameters"] + planned["optimizer state"] + planned["discriminator and its optimizer"]
    assert all_of_it == kinds - bytes_per_device(state.params["discriminator"])  # whose gradient is in that kind


def _bytes_per_device(argument: str) -> int:
    """Of one argument of the lowered program, from its type and its sharding as they are written there."""
    *dims, dtype = re.search(r"tensor<([^>]*)>", argument)[1].split("x")
    axes = re.search(r"sdy.sharding<@mesh, \[(.*?)\]>", argument)
    parts = math.prod(MESH[axis] for axis in re.findall(r'"(\w+)"', axes[1])) if axes else 1
    assert dtype in ("f32", "i32")
    return 4 * math.prod(map(int, dims)) // parts


def compiled(mesh: tuple[int, int, int], batch_size: int, *topology: str, layers: int | None = 1) -> dict:
    here = Path(__file__).parent
    told = json.dumps({"mesh": mesh, "layers": layers, "batch_size": batch_size, "length": 64})
    # No TPU is asked for, here or over the network; a topology needs none. Programs of this size are not worth storing.
    env = compiler.own_environment() | {"JAX_PLATFORMS": "cpu", "TPU_SKIP_MDS_QUERY": "1"}
    words = [sys.executable, here / "compile_step.py", told, *topology]
    done = subprocess.run(words, capture_output=True, text=True, cwd=here.parent, env=env)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


def check(program: dict, tensor: int = 1, uses: int = 2, layers: int = 1) -> None:
    """The next state lies in the old one's memory, and only what a layer computes with is ever gathered.

    tensor: the mesh axis' size; what it splits stays split.
    uses: of each of a layer's matrices, that a gathering serves one of.
    """
    assert program["aliases"] == program["leaves"]
    assert program["alias_bytes"] >= program["state_bytes"]
    gathers = Counter()
    for c in program["collectives"]:
        if c["kind"] != "all-gather":
            continue
        for _, shape in c["shapes"]:
            if math.prod(shape) >= 100_000:
                # The optimizer's operations stand outside of the gradient, whose names all have a jvp.
                assert "jvp" in c["where"], c
                # A looked-up embedding is exchanged, not gathered: neither it nor its gradient is ever whole.
                assert "_take" not in c["where"], c
                gathers[math.prod(shape)] += c["times"]
    # Of each of the matrices that have this size, however its axes are cut (a TPU's program has the parts as an axis of
    # their own). Nothing is gathered for the optimizer.
    decoder = {3 * 1600 * 1600: layers, 1600 * 1600: 2 * layers, 6400 * 1600: 2 * layers, 50048 * 1600: 1}
    for size, matrices in decoder.items():
        assert 1 <= gathers[size // tensor] <= uses * matrices, (size, gathers[size // tensor])


# CI compiles for 8 devices, with and without the data and tensor axes. Larger meshes differ in the sizes of the groups
# alone; one of 256 devices CI compiles for TPUs.
SLOW, EXTENDED = [pytest.mark.slow], [pytest.mark.slow, pytest.mark.extended]


@pytest.mark.parametrize(
    ("mesh", "batch_size"),
    [
        ((1, 8, 1), 16),
        pytest.param((2, 2, 2), 16, marks=SLOW),
        pytest.param((8, 8, 1), 128, marks=EXTENDED),
        pytest.param((4, 8, 2), 64, marks=EXTENDED),
        pytest.param((4, 64, 1), 512, marks=EXTENDED),
    ],
    ids=lambda x: "x".join(map(str, x)) if isinstance(x, tuple) else str(x),
)
def test_gathers_of_the_compiled_step(mesh, batch_size):
    # Forward, again in the backward pass (remat), and backward: without a tensor axis the last two share one gathering.
    check(compiled(mesh, batch_size), tensor=mesh[2], uses=2 if mesh[2] == 1 else 3)


@pytest.mark.slow
def test_gathers_of_the_whole_depth():
    """A stack of layers: what one layer gathers, as often as there are layers."""
    check(compiled((1, 8, 1), 16, layers=None), layers=RANDENG.model.decoder.num_layers)


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="JAX's TPU package (libtpu) is not installed")
def test_the_step_compiles_for_a_pod_of_tpus():
    """The published size. There the last two do not share one."""
    program = compiled((4, 64, 1), 512, "v5e:16x16", layers=None)
    check(program, uses=3, layers=RANDENG.model.decoder.num_layers)
