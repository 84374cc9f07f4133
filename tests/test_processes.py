"""Several processes on this machine that train one model, found on the loopback address."""

import socket
import subprocess
import sys

import numpy as np
import pytest
from test_train import ROOT, TEXTS, TINY, environment, metrics_of, started, text_file, tiny  # noqa: F401

from davae_jax.data import Batches, ahead, placed, spans_of, tokenize
from davae_jax.distributed import DistributedConfig
from davae_jax.errors import InputError

OPTIONS = ["--steps", 8, "--batch-size", 8, "--log.checkpoint", 4, "--adversarial.weight", 0.1]


def free_port():
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def processes(n, devices, text_file, folder, *argv):  # noqa: F811
    """Runs them to their end. Returns [(exit code, stdout, stderr)]."""
    where = ["--distributed.coordinator", f"127.0.0.1:{free_port()}", "--distributed.num-processes", n]
    pipes = dict(stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    command = ["--data.train", text_file, "--run-dir", folder, *TINY, *argv, *where, "--distributed.process-id"]
    running = [started(*command, i, devices=devices, **pipes) for i in range(n)]
    ended = [process.communicate(timeout=600) for process in running]
    return [(process.returncode, *said) for process, said in zip(running, ended, strict=True)]


@pytest.fixture(scope="module")
def alone(text_file, tmp_path_factory):  # noqa: F811
    folder = tmp_path_factory.mktemp("alone") / "run"
    code, _, err = tiny(text_file, folder, *OPTIONS)
    assert code == 0, err
    return folder


@pytest.mark.parametrize(
    ("n", "devices", "mesh"),
    [
        (2, 1, ["--mesh.fsdp", 2, "--mesh.data", 1]),
        # Rows of the batch that two processes need: the tensor axis lies over both.
        pytest.param(4, 2, ["--mesh.data", 1, "--mesh.fsdp", 2, "--mesh.tensor", 4], marks=pytest.mark.slow),
    ],
)
def test_the_losses_of_one_process(n, devices, mesh, alone, text_file, tmp_path):  # noqa: F811
    folder = tmp_path / "run"
    ended = processes(n, devices, text_file, folder, *OPTIONS, *mesh, "--log.figures", 2, "--log.samples", 4)
    assert [code for code, *_ in ended] == [0] * n, ended
    assert f"{n * devices} devices of {n} processes: " in ended[0][1]
    said = [line for _, out, _ in ended[1:] for line in out.splitlines() if not line.startswith("[Gloo]")]
    assert not said  # one speaks for all; what connects them on CPUs says so itself
    a, b = metrics_of(alone), metrics_of(folder)
    assert [row["step"] for row in b] == [2, 4, 6, 8]
    for name in ("loss", "rec", "kl_unmasked", "loss_d", "loss_g", "grad_norm"):
        np.testing.assert_allclose([row[name] for row in b], [row[name] for row in a], rtol=1e-5, err_msg=name)
    assert (folder / "figures.json").exists()
    # What several wrote, one goes on from.
    code, out, err = tiny(text_file, folder, *OPTIONS)
    assert code == 0 and "steps 8 to 8" in out, err


def test_a_process_that_does_not_come(text_file, tmp_path):  # noqa: F811
    """Of three, process 1 is missing; and process 0, for one that is there alone."""
    where = ["--distributed.coordinator", f"127.0.0.1:{free_port()}", "--distributed.num-processes", 3]
    argv = ["--data.train", text_file, "--run-dir", tmp_path / "run", *TINY, *where, "--distributed.timeout"]
    pipes = dict(stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    running = [started(*argv, 20, "--distributed.process-id", i, **pipes) for i in (0, 2)]
    ended = [process.communicate(timeout=120) for process in running]
    assert [process.returncode for process in running] == [1, 1] and not (tmp_path / "run").exists()
    assert f"{where[1]}: waited 20 s for process 1\n" in ended[0][1]
    alone = started(*argv, 1, "--distributed.process-id", 2, **pipes)
    _, err = alone.communicate(timeout=120)
    assert alone.returncode == 1 and f"train.py: error: {where[1]}: waited 1 s for process 0" in err


BARRIER = """
import sys, time
from davae_jax.distributed import DistributedConfig, barrier, connect
from davae_jax.errors import InputError
process = int(sys.argv[2])
connect(DistributedConfig(sys.argv[1], 2, process, 60))
barrier("both are here", 60)
if process == 1:
    time.sleep(4)
else:
    try:
        barrier("the other one is here too", 1)
    except InputError as e:
        print(e, flush=True)
"""


def test_a_barrier_names_who_is_missing():
    where = f"127.0.0.1:{free_port()}"
    command = [sys.executable, "-c", BARRIER, where]
    pipes = dict(stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment(), cwd=ROOT)
    running = [subprocess.Popen([*command, str(i)], **pipes) for i in range(2)]
    out, err = running[0].communicate(timeout=120)
    running[1].communicate(timeout=120)
    assert out == "waited 1 s until the other one is here too: no word from process 1\n", err


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (dict(coordinator="a:1"), "give all three or none"),
        (dict(coordinator="a:1", num_processes=2, process_id=2), "--distributed.process_id"),
        (dict(coordinator="a", num_processes=2, process_id=1), "must be HOST:PORT, not a"),
        (dict(timeout=0), "--distributed.timeout must be at least 1, not 0"),
    ],
)
def test_bad_options(given, said):
    with pytest.raises(InputError) as e:
        DistributedConfig(**given)
    assert said.replace("_", "-") in str(e.value) and e.value.exit_code == 2


def test_each_device_gets_its_own_rows():
    """Over 8 devices; and the batch as a whole is the one of a single device."""
    import jax
    from jax.sharding import AxisType, NamedSharding, PartitionSpec

    class Ids:
        bos_id, sep_id, max_ids = 1, 3, 100

        def encode(self, texts):
            return (
                [[2, *(10 + ord(c) % 50 for c in text), 3, 3][: len(text) + 3] for text in texts]
                if (isinstance(texts, list))
                else [10 + ord(c) % 50 for c in texts]
            )

    ids = Ids()
    texts = tokenize(TEXTS, ids, ids, max_length=20, source="")
    batches = Batches(texts, 16, pad_id=0, buckets=2)
    mesh = jax.make_mesh((2, 2, 2), ("data", "fsdp", "tensor"), axis_types=(AxisType.Auto,) * 3)
    sharding = NamedSharding(mesh, PartitionSpec(("data", "fsdp")))
    spans = spans_of(sharding, 16)
    assert spans == [(0, 4), (4, 8), (8, 12), (12, 16)]
    for step, parts in zip(range(3, 3 + batches.per_epoch), ahead(batches, spans, 3, threads=0), strict=False):
        for whole, laid_out in zip(batches[step], placed(parts, 16, sharding), strict=True):
            np.testing.assert_array_equal(whole, laid_out)
            for shard in laid_out.addressable_shards:
                assert len(shard.data) == 4
                np.testing.assert_array_equal(shard.data, whole[shard.index])
