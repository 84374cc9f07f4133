"""Several processes on this machine that train one model, found on the loopback address."""

import json
import re
import socket
import subprocess
import sys
import time

import numpy as np
import pytest
from test_train import ROOT, TEXTS, TINY, environment, metrics_of, newest_of, started, text_file, tiny  # noqa: F401

from davae_jax.data.batches import TextBatches
from davae_jax.data.prefetch import local_row_ranges, prefetch
from davae_jax.data.tokenize import tokenize
from davae_jax.parallel.config import DistributedConfig
from davae_jax.parallel.multihost import check_alone, local_devices
from davae_jax.utils.errors import InputError

OPTIONS = ["--steps", 8, "--batch-size", 8, "--log.checkpoint", 4, "--adversarial.weight", 0.1]


def free_port():
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def processes(n, devices, text_file, folder, *argv):  # noqa: F811
    """Runs them to their end. Returns [(exit code, stdout, stderr)]."""
    return ended(begun(n, devices, text_file, folder, *argv))


def begun(n, devices, text_file, folder, *argv):  # noqa: F811
    where = ["--distributed.coordinator", f"127.0.0.1:{free_port()}", "--distributed.num-processes", n]
    pipes = dict(stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    command = ["--data.train", text_file, "--run-dir", folder, *TINY, *argv, *where, "--distributed.process-id"]
    return [started(*command, i, devices=devices, **pipes) for i in range(n)]


def ended(running, seconds=600):
    said = [process.communicate(timeout=seconds) for process in running]
    return [(process.returncode, *out) for process, out in zip(running, said, strict=True)]


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
    found = processes(n, devices, text_file, folder, *OPTIONS, *mesh, "--log.figures", 2, "--log.samples", 4)
    assert [code for code, *_ in found] == [0] * n, found
    assert f"{n * devices} devices of {n} processes: " in found[0][1]
    said = [line for _, out, _ in found[1:] for line in out.splitlines() if "peer ranks" not in line]
    assert not said  # one speaks for all; what connects them on CPUs says so itself
    a, b = metrics_of(alone), metrics_of(folder)
    assert [row["step"] for row in b] == [2, 4, 6, 8]
    for name in ("loss", "rec", "kl_unmasked", "loss_d", "loss_g", "grad_norm"):
        np.testing.assert_allclose([row[name] for row in b], [row[name] for row in a], rtol=1e-5, err_msg=name)
    assert (folder / "figures.json").exists()
    # What several wrote, one goes on from.
    code, out, err = tiny(text_file, folder, *OPTIONS)
    assert code == 0 and "steps 8 to 8" in out, err


@pytest.mark.slow
def test_stopped_killed_and_gone_on_with(text_file, tmp_path):  # noqa: F811
    """Of two processes one is told to stop, and later one is killed: both times they go on as if nothing had been."""
    options = ["--steps", 60, "--batch-size", 8, "--log.checkpoint", 8, "--mesh.fsdp", 2, "--mesh.data", 1]
    whole, folder = tmp_path / "whole", tmp_path / "cut"
    assert [code for code, *_ in processes(2, 1, text_file, whole, *options)] == [0, 0]

    def until(step):
        running = begun(2, 1, text_file, folder, *options)
        while all(process.poll() is None for process in running) and steps_of(folder) < step:
            time.sleep(0.02)
        return running

    running = until(4)
    running[1].terminate()
    found = ended(running)
    assert [code for code, *_ in found] == [130, 130], found
    assert "interrupted after step " in found[0][2] and "interrupted" not in found[1][2]
    stopped = newest_of(folder)
    assert 10 <= stopped < 60 and stopped % 10 == 0

    running = until(stopped + 10)
    running[1].kill()
    running[0].kill()  # alone it would wait for its heartbeats to be missed
    assert [code for code, *_ in ended(running)] == [-9, -9]
    assert stopped < newest_of(folder) < 60

    found = processes(2, 1, text_file, folder, *options)
    assert [code for code, *_ in found] == [0, 0], found
    names = set(metrics_of(whole)[0]) - {"tokens_per_s", "data_wait", "compile_s"}
    a, b = ([{name: row[name] for name in names} for row in metrics_of(f)] for f in (whole, folder))
    assert a == b


def steps_of(folder):
    """Steps that are logged so far."""
    path = folder / "metrics.jsonl"
    lines = path.read_text(encoding="utf-8").splitlines()[:-1] if path.exists() else []
    return json.loads(lines[-1])["step"] if lines else 0


def test_processes_with_other_options(text_file, tmp_path):  # noqa: F811
    """Both say so, and nothing is written."""
    where = ["--distributed.coordinator", f"127.0.0.1:{free_port()}", "--distributed.num-processes", 2]
    command = ["--data.train", text_file, "--run-dir", tmp_path / "run", *TINY, *where]
    pipes = dict(stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    running = [
        started(*command, "--mesh.fsdp", 2, "--beta.max", beta, "--distributed.process-id", i, **pipes)
        for i, beta in enumerate((0.1, 0.2))
    ]
    found = ended(running)
    said = "train.py: error: the options: process 1 and process 0 have different ones"
    assert [code for code, *_ in found] == [1, 1] and all(said in err for *_, err in found), found
    assert not (tmp_path / "run").exists()


def lines_of(found):
    return [(code, err.splitlines()) for code, _, err in found]


def test_a_refusal_of_process_0_is_that_of_all(text_file, tmp_path):  # noqa: F811
    """A foreign file in the run's folder, which process 0 alone looks at; then pieces that no tokenizer can have."""
    folder = tmp_path / "run"
    folder.mkdir()
    (folder / "foreign.txt").touch()
    found = ended(begun(2, 1, text_file, folder, "--mesh.fsdp", 2), seconds=120)
    said = f"train.py: error: --run-dir {folder} holds files but no run (there is no train.json); give another folder"
    assert lines_of(found) == [(2, [said])] * 2
    found = ended(
        begun(2, 1, text_file, tmp_path / "new", "--mesh.fsdp", 2, "--data.decoder-vocab-size", 12), seconds=120
    )
    assert [code for code, *_ in found] == [2, 2] and found[0][2] == found[1][2]
    assert "train.py: error: --data.decoder-vocab-size 12: " in found[0][2] and found[0][2].count("\n") == 1


def test_a_killed_process_is_named(text_file, tmp_path):  # noqa: F811
    folder = tmp_path / "run"
    options = ["--steps", 100_000, "--batch-size", 8, "--log.checkpoint", 2, "--mesh.fsdp", 2, "--mesh.data", 1]
    running = begun(2, 1, text_file, folder, *options)
    while all(process.poll() is None for process in running) and newest_of(folder) < 4:
        time.sleep(0.02)
    running[1].kill()
    (code, (line,)), (killed, nothing) = lines_of(ended(running, seconds=60))
    assert code == 1 and killed == -9 and not nothing
    said = re.fullmatch(
        r"train.py: error: lost process 1 at step (\d+); the last complete checkpoint is (.*); "
        "start all processes again to go on",
        line,
    )
    assert int(said[1]) >= 4 and said[2] == str(folder / "checkpoints" / str(newest_of(folder)))


def test_a_process_that_fails_alone_ends_the_others(text_file, tmp_path):  # noqa: F811
    """Process 1 cannot read the tokenizers that process 0 has put there."""
    where = ["--distributed.coordinator", f"127.0.0.1:{free_port()}", "--distributed.num-processes", 2]
    command = ["--data.train", text_file, "--run-dir", "run", *TINY, *where, "--mesh.fsdp", 2]
    folders = [tmp_path / "a", tmp_path / "b"]
    for folder in folders:
        folder.mkdir()
    pipes = dict(stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    running = [
        started(*command, "--distributed.process-id", i, cwd=folder, **pipes) for i, folder in enumerate(folders)
    ]
    (first, one), (second, other) = lines_of(ended(running, seconds=120))
    assert first == second == 1 and len(one) == len(other) == 1, (one, other)
    # The first step may have begun before the word is there; it takes both processes.
    said = r"train\.py: error: process 1 has ended with code 1 at step [01]; the last complete checkpoint is none yet; "
    assert re.match(said, one[0]), one[0]
    assert other[0].startswith("train.py: error: run/vocab.txt: ")


def test_a_process_that_does_not_come(text_file, tmp_path):  # noqa: F811
    """Of three, process 1 is missing; and process 0, for one that is there alone."""
    where = ["--distributed.coordinator", f"127.0.0.1:{free_port()}", "--distributed.num-processes", 3]
    argv = ["--data.train", text_file, "--run-dir", tmp_path / "run", *TINY, *where, "--distributed.timeout"]
    pipes = dict(stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    running = [started(*argv, 20, "--distributed.process-id", i, **pipes) for i in (0, 2)]
    said = [process.communicate(timeout=120) for process in running]
    assert [process.returncode for process in running] == [1, 1] and not (tmp_path / "run").exists()
    assert f"{where[1]}: waited 20 s for process 1\n" in said[0][1]
    alone = started(*argv, 1, "--distributed.process-id", 2, **pipes)
    _, err = alone.communicate(timeout=120)
    assert alone.returncode == 1 and f"train.py: error: {where[1]}: waited 1 s for process 0" in err


BARRIER = """
import sys, time
from davae_jax.parallel.multihost import barrier, connect
from davae_jax.parallel.config import DistributedConfig
from davae_jax.utils.errors import InputError
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


def test_schedulers_say_who_is_there():
    """Under Slurm and Open MPI nothing has to be given: their variables, as 2 tasks of one node have them."""
    program = """
import jax
from davae_jax.parallel.multihost import barrier, connect
from davae_jax.parallel.config import DistributedConfig
connect(DistributedConfig(timeout=60))
barrier("both are here", 60)
print(jax.process_index(), jax.process_count(), flush=True)
"""
    job = free_port() % 4096  # JAX takes the port by it, 61440 and more
    slurm = {"SLURM_JOB_ID": job, "SLURM_STEP_NODELIST": "localhost", "SLURM_NTASKS": 2}
    mpi = {"OMPI_MCA_orte_hnp_uri": f"{job * 4096}.0;tcp://127.0.0.1:1", "OMPI_COMM_WORLD_SIZE": 2}
    for job_wide, ranks in (
        (slurm, ("SLURM_PROCID", "SLURM_LOCALID")),
        (mpi, ("OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_LOCAL_RANK")),
    ):
        pipes = dict(stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=ROOT)
        said = [{name: str(value) for name, value in (job_wide | dict.fromkeys(ranks, i)).items()} for i in range(2)]
        running = [subprocess.Popen([sys.executable, "-c", program], env=environment() | s, **pipes) for s in said]
        assert [process.communicate(timeout=120)[0] for process in running] == ["0 2\n", "1 2\n"]


def said_by(program, variables):
    """(stdout, stderr) of processes that run the program, each with its own variables beside the tests'."""
    pipes = dict(stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=ROOT)
    mine = [environment() | {name: str(value) for name, value in one.items()} for one in variables]
    running = [subprocess.Popen([sys.executable, "-c", program], env=env, **pipes) for env in mine]
    return [process.communicate(timeout=120) for process in running]


@pytest.mark.parametrize(("size", "rank"), [("OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_RANK"), ("PMI_SIZE", "PMI_RANK")])
def test_mpi_says_the_rest(size, rank):
    """MPICH, Intel MPI and newer Open MPI tell each process its number, and nothing of how to meet."""
    program = f"""
import jax
from davae_jax.parallel.multihost import barrier, connect
from davae_jax.parallel.config import DistributedConfig
connect(DistributedConfig("127.0.0.1:{free_port()}", timeout=60))
barrier("both are here", 60)
print(jax.process_index(), jax.process_count(), flush=True)
"""
    said = said_by(program, [{size: 2, rank: i} for i in range(2)])
    assert [out for out, _ in said] == ["0 2\n", "1 2\n"], said


@pytest.mark.parametrize(
    ("variables", "said"),
    [
        ({"OMPI_COMM_WORLD_SIZE": "2", "OMPI_COMM_WORLD_RANK": "1"}, "OMPI_COMM_WORLD_SIZE is 2, "),
        ({"PMI_SIZE": "4", "PMI_RANK": "0"}, "PMI_SIZE is 4, "),
        ({"PMIX_RANK": "3"}, "PMIX_RANK is 3, "),
        ({"SLURM_STEP_NUM_TASKS": "8", "SLURM_PROCID": "0"}, "SLURM_STEP_NUM_TASKS is 8, "),
        ({"KUBERNETES_SERVICE_HOST": "10.0.0.1", "JOB_COMPLETION_INDEX": "0"}, "JOB_COMPLETION_INDEX is 0, "),
    ],
)
def test_none_trains_alone_where_there_are_others(variables, said):
    with pytest.raises(InputError) as e:
        check_alone(variables)
    assert str(e.value).startswith(said) and "give --distributed.coordinator HOST:PORT" in str(e.value)
    assert e.value.exit_code == 2 and "\n" not in str(e.value)


def test_one_that_is_alone_trains_alone():
    check_alone({})
    check_alone({"OMPI_COMM_WORLD_SIZE": "1", "OMPI_COMM_WORLD_RANK": "0", "PMIX_RANK": "0"})
    check_alone({"SLURM_NTASKS": "8", "SLURM_PROCID": "0"})  # a batch script, outside of any step
    check_alone({"KUBERNETES_SERVICE_HOST": "10.0.0.1"})  # a pod of no indexed job


def test_the_program_refuses_to_train_alone(text_file, tmp_path):  # noqa: F811
    """As a pod of an indexed job without Kubernetes' package, or with a service that does not answer."""
    pod = {"KUBERNETES_SERVICE_HOST": "127.0.0.1", "KUBERNETES_SERVICE_PORT": "1", "JOB_COMPLETION_INDEX": "1"}
    words = ["train.py", "--data.train", text_file, "--run-dir", tmp_path / "run", *TINY]
    program = f"import sys, train; sys.exit(train.main({list(map(str, words[1:]))}))"
    ((out, err),) = said_by(program, [pod])
    (line,) = err.splitlines()
    assert not out and not (tmp_path / "run").exists()
    assert line.startswith("train.py: error: ") and ("JOB_COMPLETION_INDEX is 1, " in line or "Kubernetes: " in line)


def test_a_task_alone_on_its_node_has_all_devices():
    """JAX would take the one of the task's number."""
    program = """
from jax._src.xla_bridge import CUDA_VISIBLE_DEVICES
from davae_jax.parallel.multihost import connect
from davae_jax.parallel.config import DistributedConfig
connect(DistributedConfig(timeout=60))
print(CUDA_VISIBLE_DEVICES.value, flush=True)
"""
    said = {}
    for tasks in ("1", "1(x4)", "2"):
        slurm = {"SLURM_JOB_ID": free_port() % 4096, "SLURM_STEP_NODELIST": "localhost", "SLURM_NTASKS": 1}
        slurm |= {"SLURM_PROCID": 0, "SLURM_LOCALID": 0, "SLURM_STEP_TASKS_PER_NODE": tasks}
        ((said[tasks], _),) = said_by(program, [slurm])
    assert said == {"1": "all\n", "1(x4)": "all\n", "2": "0\n"}


@pytest.mark.parametrize(
    ("variables", "devices"),
    [
        ({}, None),
        ({"SLURM_STEP_TASKS_PER_NODE": "2,1(x3)"}, None),
        ({"SLURM_TASKS_PER_NODE": "1(x3)"}, []),
        ({"OMPI_COMM_WORLD_LOCAL_SIZE": "1", "OMPI_COMM_WORLD_LOCAL_RANK": "0"}, []),
        ({"OMPI_COMM_WORLD_LOCAL_SIZE": "8", "OMPI_COMM_WORLD_LOCAL_RANK": "5"}, [5]),
        ({"MPI_LOCALNRANKS": "4", "MPI_LOCALRANKID": "3"}, [3]),
        ({"MPI_LOCALNRANKS": "4", "MPI_LOCALRANKID": "3", "JAX_LOCAL_DEVICE_IDS": "0"}, None),
    ],
)
def test_which_devices_of_its_node_a_process_takes(variables, devices):
    assert local_devices(variables) == devices


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (dict(coordinator="a:1"), "give all three or none"),
        (dict(num_processes=2, process_id=1), "give all three or none"),
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
    batches = TextBatches(texts, 16, pad_id=0, buckets=2)
    mesh = jax.make_mesh((2, 2, 2), ("data", "fsdp", "tensor"), axis_types=(AxisType.Auto,) * 3)
    sharding = NamedSharding(mesh, PartitionSpec(("data", "fsdp")))
    spans = local_row_ranges(sharding, 16)
    assert spans == [(0, 4), (4, 8), (8, 12), (12, 16)]
    for step, batch in zip(range(3, 3 + batches.steps_per_epoch), prefetch(batches, sharding, 3), strict=False):
        pairs = zip(jax.tree.leaves(batches.batch(step)), jax.tree.leaves(batch), strict=True)
        for whole, laid_out in pairs:
            np.testing.assert_array_equal(whole, laid_out)
            for shard in laid_out.addressable_shards:
                assert len(shard.data) == 4
                np.testing.assert_array_equal(shard.data, whole[shard.index])
