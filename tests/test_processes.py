"""Several processes on this machine that train one model, connected over the loopback address."""

import json
import os
import signal
import socket
import subprocess
import sys
import time

import numpy as np
import pytest
from test_train import ROOT, TEXTS, TINY, environment, metrics_of, newest_of, rows_of, started, text_file, tiny  # noqa: F401

from davae_jax.data.batches import TextBatches
from davae_jax.data.prefetch import local_row_ranges, prefetch
from davae_jax.data.tokenize import tokenize
from davae_jax.parallel.config import DistributedConfig
from davae_jax.parallel.launchers import check_alone, local_devices, started_by_hand
from davae_jax.parallel.multihost import describe_waiting
from davae_jax.utils.errors import InputError

STEPS = ["--steps", 8, "--batch-size", 8, "--log.checkpoint", 4, "--adversarial.weight", 0.1]
ENDLESS = ["--steps", 100_000, "--batch-size", 8, "--log.checkpoint", 4]
RUINOUS = ["--optimizer.learning-rate", 1e30, "--optimizer.warmup", 0, "--optimizer.clip", 0]
FSDP = ["--mesh.fsdp", 2, "--mesh.data", 1]
PIPES = dict(stdout=subprocess.PIPE, stderr=subprocess.PIPE)


def free_port():
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def start(n, *argv, devices=1, cwd=(ROOT, ROOT, ROOT, ROOT), different=((), (), (), ())):
    """Starts n processes of `train.py`; `cwd` and the options `different` have an item for each process."""
    argv = [*TINY, *argv, "--distributed.coordinator", f"127.0.0.1:{free_port()}", "--distributed.num-processes", n]
    return [
        started(*argv, "--distributed.process-id", i, *different[i], devices=devices, cwd=cwd[i], **PIPES)
        for i in range(n)
    ]


def finish(running, seconds=300):
    """Waits for the processes. Returns their exit codes, standard outputs and standard errors."""
    try:
        outputs = [process.communicate(timeout=seconds) for process in running]
    finally:
        for process in running:
            process.kill()
    # Gloo, which connects processes on CPUs, prints that it does.
    outputs = [("".join(x for x in out.splitlines(True) if "[Gloo]" not in x), err) for out, err in outputs]
    return [process.returncode for process in running], *zip(*outputs, strict=True)


def wait_until(condition, running, seconds=300):
    end = time.monotonic() + seconds
    while not condition() and time.monotonic() < end and all(process.poll() is None for process in running):
        time.sleep(0.02)


def logged_steps(folder):
    path = folder / "metrics.jsonl"
    lines = path.read_text(encoding="utf-8").splitlines()[:-1] if path.exists() else []
    return json.loads(lines[-1])["step"] if lines else 0


def assert_one_error(output):
    assert output.startswith("train.py: error: ") and output.count("\n") == 1, output


@pytest.fixture(scope="module")
def one_process(text_file, tmp_path_factory):  # noqa: F811
    folder = tmp_path_factory.mktemp("one") / "run"
    code, _, err = tiny(text_file, folder, *STEPS)
    assert code == 0, err
    return folder


@pytest.mark.parametrize(
    ("n", "devices", "options"),
    [
        (2, 1, FSDP),
        # Two processes need the same rows of the batch: the tensor axis spans both.
        pytest.param(
            *(4, 2, ["--mesh.data", 1, "--mesh.fsdp", 2, "--mesh.tensor", 4, "--log.figures", 2, "--log.samples", 4]),
            marks=pytest.mark.slow,
        ),
    ],
)
def test_losses_equal_those_of_one_process(n, devices, options, one_process, text_file, tmp_path):  # noqa: F811
    folder = tmp_path / "run"
    running = start(n, "--data.train", text_file, "--run-dir", folder, *STEPS, *options, devices=devices)
    codes, (out, *others), errors = finish(running, 600)
    assert codes == [0] * n, errors
    assert f"{n * devices} devices in {n} processes: " in out
    assert all(str(folder / "checkpoints" / step) in out for step in "48")
    # Gloo prints its own lines there, in fragments
    assert not any(ours in text for text in others for ours in ("devices in", "loss", str(folder)))
    expected, metrics = metrics_of(one_process), metrics_of(folder)
    assert [row["step"] for row in metrics] == [2, 4, 6, 8]
    for name in ("loss", "rec", "kl_unmasked", "loss_d", "loss_g", "grad_norm"):
        a, b = ([row[name] for row in rows] for rows in (metrics, expected))
        np.testing.assert_allclose(a, b, rtol=1e-5, err_msg=name)
    if "--log.figures" in options:
        assert (folder / "figures.json").exists()
        assert [row["step"] for row in rows_of(folder / "samples.jsonl")] == [4]
    # One process resumes what several wrote.
    code, out, err = tiny(text_file, folder, *STEPS)
    assert code == 0 and "steps 8 to 8" in out, err


def test_a_signal_to_one_process_stops_all(text_file, tmp_path):  # noqa: F811
    """All save the same step and exit with 130."""
    folder = tmp_path / "run"
    running = start(2, "--data.train", text_file, "--run-dir", folder, *ENDLESS, *FSDP)
    wait_until(lambda: logged_steps(folder) >= 4, running)
    running[1].send_signal(signal.SIGTERM)
    codes, (out, _), (error, other) = finish(running)
    assert codes == [130, 130], (error, other)
    step = newest_of(folder)
    assert step >= 10 and step % 10 == 0
    assert str(folder / "checkpoints" / str(step)) in out and str(step) in error and not other


@pytest.mark.slow
def test_a_stopped_and_killed_run_is_the_same_run(text_file, tmp_path):  # noqa: F811
    """Process 0 is interrupted; resumed, both are killed; resumed, the losses are those of one go."""
    whole, folder = tmp_path / "whole", tmp_path / "resumed"
    options = ["--data.train", text_file, "--steps", 60, "--batch-size", 8, "--log.checkpoint", 8, *FSDP, "--run-dir"]
    assert finish(start(2, *options, whole))[0] == [0, 0]
    running = start(2, *options, folder)
    wait_until(lambda: logged_steps(folder) >= 4, running)
    running[0].send_signal(signal.SIGINT)
    assert finish(running)[0] == [130, 130]
    stopped = newest_of(folder)
    assert 10 <= stopped < 60 and stopped % 10 == 0
    running = start(2, *options, folder)
    wait_until(lambda: logged_steps(folder) >= stopped + 10, running)
    for process in running:
        process.kill()
    assert finish(running)[0] == [-9, -9]
    assert stopped < newest_of(folder) < 60
    assert finish(start(2, *options, folder))[0] == [0, 0]
    names = set(metrics_of(whole)[0]) - {"tokens_per_s", "data_wait", "compile_s"}
    a, b = ([{name: row[name] for name in names} for row in metrics_of(f)] for f in (whole, folder))
    assert a == b


@pytest.mark.slow
@pytest.mark.extended
def test_a_slow_process_changes_nothing(text_file, tmp_path):  # noqa: F811
    """Process 1 stands still for some seconds; the other waits, and the losses are those of a run without a break."""
    options = ["--data.train", text_file, "--steps", 40, "--batch-size", 8, *FSDP, "--run-dir"]
    whole, slow = tmp_path / "whole", tmp_path / "slow"
    assert finish(start(2, *options, whole))[0] == [0, 0]
    running = start(2, *options, slow)
    wait_until(lambda: logged_steps(slow) >= 4, running)
    running[1].send_signal(signal.SIGSTOP)
    time.sleep(8)
    steps = logged_steps(slow)
    running[1].send_signal(signal.SIGCONT)
    assert finish(running)[0] == [0, 0] and steps < 40
    names = set(metrics_of(whole)[0]) - {"tokens_per_s", "data_wait", "compile_s"}
    a, b = ([{name: row[name] for name in names} for row in metrics_of(f)] for f in (whole, slow))
    assert a == b


@pytest.mark.parametrize(
    ("number", "lost"),
    [
        pytest.param(signal.SIGKILL, 1, id="kill"),
        pytest.param(signal.SIGKILL, 0, id="kill0", marks=pytest.mark.slow),
        pytest.param(signal.SIGSTOP, 1, id="stop", marks=pytest.mark.slow),
    ],
)
def test_a_lost_process_ends_the_others(number, lost, text_file, tmp_path):  # noqa: F811
    """With an error of the broken collective, or, where that waits, by JAX after the timeout; never with both."""
    folder = tmp_path / "run"
    timeout = ["--distributed.timeout", 30]
    running = start(2, "--data.train", text_file, "--run-dir", folder, *ENDLESS, *FSDP, *timeout)
    wait_until(lambda: newest_of(folder) >= 8, running)
    running[lost].send_signal(number)
    other = 1 - lost
    running[other].wait(120)
    running[lost].kill()
    codes, (out, _), errors = finish(running)
    assert codes[lost] == -9 and codes[other] in (1, -signal.SIGABRT), errors
    if codes[other] == 1:
        assert_one_error(errors[other])
        assert errors[other].startswith(f"train.py: error: process {other}: ")
    else:  # JAX's message
        assert "train.py: error" not in errors[other]
        assert lost == 0 or ("unhealthy" in errors[0] and "\n1\n" in errors[0])
    saved = [line for line in out.splitlines() if str(folder / "checkpoints") in line]
    assert int(saved[-1].rpartition("/")[2]) in (newest_of(folder), newest_of(folder) - 4)  # killed before it printed


def test_different_options_are_refused(text_file, tmp_path):  # noqa: F811
    """By both processes, and nothing is written."""
    argv = ["--data.train", text_file, "--run-dir", tmp_path / "run", "--mesh.fsdp", 2]
    codes, _, errors = finish(start(2, *argv, different=[["--beta.max", beta] for beta in (0.1, 0.2)]))
    assert codes == [1, 1] and errors[0] == errors[1]
    assert_one_error(errors[0])
    assert "the options differ between processes 0 and 1" in errors[0]
    assert not (tmp_path / "run").exists()


def test_a_refusal_of_process_0_ends_all(text_file, tmp_path):  # noqa: F811
    """A run folder with a foreign file, which process 0 checks; then a text file that no process can read."""
    folder = tmp_path / "run"
    folder.mkdir()
    (folder / "foreign.txt").touch()
    codes, _, errors = finish(start(2, "--data.train", text_file, "--run-dir", folder, "--mesh.fsdp", 2))
    assert codes == [2, 2] and errors[0] == errors[1]
    assert_one_error(errors[0])
    assert str(folder) in errors[0] and "--run-dir" in errors[0]
    missing = tmp_path / "missing.txt"
    codes, _, errors = finish(start(2, "--data.train", missing, "--run-dir", tmp_path / "new", "--mesh.fsdp", 2))
    assert codes[0] == codes[1] > 0 and errors[0] == errors[1]
    assert_one_error(errors[0])
    assert str(missing) in errors[0]


def test_a_process_that_fails_alone_ends_the_others(text_file, tmp_path):  # noqa: F811
    """Process 1 cannot read the tokenizers that process 0 has written, because its folder is another one."""
    folders = [tmp_path / "a", tmp_path / "b"]
    for folder in folders:
        folder.mkdir()
    argv = ["--data.train", text_file, "--run-dir", "run", "--mesh.fsdp", 2, "--distributed.timeout", 60]
    codes, _, errors = finish(start(2, *argv, cwd=folders))
    assert codes == [1, 1], errors
    for error in errors:
        assert_one_error(error)
        assert "run/vocab.txt" in error
    assert errors[0] == errors[1].replace("error: ", "error: process 1: ")


@pytest.mark.slow
def test_a_loss_that_is_not_finite_ends_all(text_file, tmp_path):  # noqa: F811
    options = ["--data.train", text_file, "--run-dir", tmp_path / "run", *RUINOUS, *ENDLESS, *FSDP]
    codes, _, errors = finish(start(2, *options))
    assert codes == [1, 1] and errors[0] == errors[1], errors
    assert_one_error(errors[0])
    assert "the last good checkpoint is " in errors[0]


def run_programs(program, variables):
    """Runs the program in a process for each dict of environment variables. Returns [(stdout, stderr)]."""
    environments = [environment() | {name: str(value) for name, value in changes.items()} for changes in variables]
    running = [
        subprocess.Popen([sys.executable, "-c", program], env=env, text=True, cwd=ROOT, **PIPES) for env in environments
    ]
    _, outs, errors = finish(running)
    return list(zip(outs, errors, strict=True))


CONNECT = """
import os, sys, time
import jax
from jax.experimental.multihost_utils import sync_global_devices
from davae_jax.parallel.config import DistributedConfig
from davae_jax.parallel.agreement import run_on_all_processes, value_of_process_zero
from davae_jax.parallel.multihost import connect
from davae_jax.utils.errors import InputError
"""


def test_an_error_of_any_process_is_that_of_all():
    """And process 0 may end before the others have. A value of process 0 is that of all, too."""
    program = f"""{CONNECT}
connect(DistributedConfig("127.0.0.1:{free_port()}", 2, int(os.environ["ID"]), 60))
print(value_of_process_zero(lambda: 3 + jax.process_index()), end=" ")
def work():
    if jax.process_index() == 1:
        raise InputError("wrong " * 1000, exit_code=7)
try:
    run_on_all_processes(work)
except InputError as e:
    time.sleep(jax.process_index())
    print(e.exit_code, str(e)[:20], flush=True)
    os._exit(e.exit_code)
"""
    results = run_programs(program, [{"ID": i} for i in range(2)])
    assert [out for out, _ in results] == ["3 7 process 1: wrong wro\n", "3 7 wrong wrong wrong wr\n"], results


def test_processes_that_do_not_come(text_file, tmp_path):  # noqa: F811
    argv = ["--data.train", text_file, "--run-dir", tmp_path / "run", "--distributed.timeout", 2, *TINY]
    where = ["--distributed.coordinator", f"127.0.0.1:{free_port()}", "--distributed.num-processes", 2]
    codes, _, _ = finish([started(*argv, *where, "--distributed.process-id", 0, **PIPES)])
    assert codes[0] != 0 and not (tmp_path / "run").exists()


def test_a_port_that_is_taken():
    with socket.socket() as s:
        s.bind(("", 0))
        s.listen()
        address = f"127.0.0.1:{s.getsockname()[1]}"
        ((out, _),) = run_programs(
            f"""{CONNECT}
try:
    connect(DistributedConfig({address!r}, 2, 0, 5))
except InputError as e:
    print(e)
""",
            [{}],
        )
    assert out.startswith(f"--distributed.coordinator {address}: ") and out.count("\n") == 1


def test_slurm_and_open_mpi_are_detected():
    """By their variables, as 2 tasks of one node have them."""
    program = f"""{CONNECT}
connect(DistributedConfig(timeout=60))
sync_global_devices("connected")
print(jax.process_index(), jax.process_count(), flush=True)
"""
    job = free_port() % 4096  # JAX derives the port from it, 61440 and more
    slurm = {"SLURM_JOB_ID": job, "SLURM_STEP_NODELIST": "localhost", "SLURM_NTASKS": 2}
    mpi = {"OMPI_MCA_orte_hnp_uri": f"{job * 4096}.0;tcp://127.0.0.1:1", "OMPI_COMM_WORLD_SIZE": 2}
    for variables, ranks in (
        (slurm, ("SLURM_PROCID", "SLURM_LOCALID")),
        (mpi, ("OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_LOCAL_RANK")),
    ):
        results = run_programs(program, [variables | dict.fromkeys(ranks, i) for i in range(2)])
        assert [out for out, _ in results] == ["0 2\n", "1 2\n"], results


@pytest.mark.parametrize(("size", "rank"), [("OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_RANK"), ("PMI_SIZE", "PMI_RANK")])
def test_mpi_completes_a_coordinator(size, rank):
    """MPICH, Intel MPI and newer Open MPI give each process its rank, but no address."""
    program = f"""{CONNECT}
connect(DistributedConfig("127.0.0.1:{free_port()}", timeout=60))
sync_global_devices("connected")
print(jax.process_index(), jax.process_count(), flush=True)
"""
    results = run_programs(program, [{size: 2, rank: i} for i in range(2)])
    assert [out for out, _ in results] == ["0 2\n", "1 2\n"], results


def test_the_only_task_of_a_node_uses_all_devices():
    """JAX alone would choose the device of the task's local rank."""
    program = f"""{CONNECT}
connect(DistributedConfig(timeout=60))
print(jax.config.values["jax_cuda_visible_devices"], flush=True)
"""
    devices = {}
    for tasks in ("1", "1(x4)", "2"):
        slurm = {"SLURM_JOB_ID": free_port() % 4096, "SLURM_STEP_NODELIST": "localhost", "SLURM_NTASKS": 1}
        slurm |= {"SLURM_PROCID": 0, "SLURM_LOCALID": 0, "SLURM_STEP_TASKS_PER_NODE": tasks}
        ((devices[tasks], _),) = run_programs(program, [slurm])
    assert devices == {"1": "all\n", "1(x4)": "all\n", "2": "0\n"}


@pytest.mark.parametrize(
    ("variables", "reason"),
    [
        ({"OMPI_COMM_WORLD_SIZE": "2", "OMPI_COMM_WORLD_RANK": "1"}, "OMPI_COMM_WORLD_SIZE is 2, "),
        ({"PMI_SIZE": "4", "PMI_RANK": "0"}, "PMI_SIZE is 4, "),
        ({"PMIX_RANK": "3"}, "PMIX_RANK is 3, "),
        ({"SLURM_STEP_NUM_TASKS": "8", "SLURM_PROCID": "0"}, "SLURM_STEP_NUM_TASKS is 8, "),
        ({"KUBERNETES_SERVICE_HOST": "10.0.0.1", "JOB_COMPLETION_INDEX": "0"}, "JOB_COMPLETION_INDEX is 0, "),
    ],
)
def test_other_processes_that_jax_does_not_find_are_an_error(variables, reason):
    with pytest.raises(InputError) as e:
        check_alone(variables)
    assert str(e.value).startswith(reason) and "set --distributed.coordinator HOST:PORT" in str(e.value)
    assert e.value.exit_code == 2 and "\n" not in str(e.value)


@pytest.mark.parametrize("name", ["OMPI_COMM_WORLD_SIZE", "PMI_SIZE", "PMIX_RANK", "SLURM_STEP_NUM_TASKS"])
def test_a_variable_that_is_not_a_number(name):
    with pytest.raises(InputError, match=name) as e:
        check_alone({name: "abc"})
    assert e.value.exit_code == 2


def test_a_single_process_trains_alone():
    check_alone({})
    check_alone({"OMPI_COMM_WORLD_SIZE": "1", "OMPI_COMM_WORLD_RANK": "0", "PMIX_RANK": "0"})
    check_alone({"SLURM_NTASKS": "8", "SLURM_PROCID": "0"})  # a batch script outside of a step
    check_alone({"KUBERNETES_SERVICE_HOST": "10.0.0.1"})  # a pod outside of an indexed job


SLURM = {"SLURM_JOB_ID": "7", "SLURM_STEP_NODELIST": "n1", "SLURM_PROCID": "0", "SLURM_LOCALID": "0"}


@pytest.mark.parametrize(
    ("variables", "alone"),
    [
        ({"SLURM_NTASKS": "8", "SLURM_STEP_NUM_TASKS": "1"}, True),  # the shell of `salloc`
        ({"SLURM_NTASKS": "8", "SLURM_STEP_NUM_TASKS": "8"}, False),
        ({"SLURM_NTASKS": "1", "SLURM_STEP_NUM_TASKS": "1"}, False),
        # mpirun, started from such a shell
        ({"SLURM_NTASKS": "8", "SLURM_STEP_NUM_TASKS": "1", "OMPI_COMM_WORLD_SIZE": "8"}, False),
        ({"SLURM_NTASKS": "8", "SLURM_STEP_NUM_TASKS": "1", "JAX_COORDINATOR_ADDRESS": "n1:5"}, False),
        ({"SLURM_NTASKS": "8"}, False),
        ({"SLURM_NTASKS": "8", "SLURM_STEP_NUM_TASKS": "8", "SLURM_TASK_PID": "1"}, False),
        # `srun --pty bash`: the shell, here process 1, has started this process in a group of its own
        ({"SLURM_NTASKS": "8", "SLURM_STEP_NUM_TASKS": "8", "SLURM_PTY_PORT": "9", "SLURM_TASK_PID": "1"}, True),
        ({"SLURM_NTASKS": "8", "SLURM_STEP_NUM_TASKS": "8", "SLURM_PTY_PORT": "9", "SLURM_TASK_PID": "0"}, False),
    ],
)
def test_an_interactive_slurm_step(variables, alone, monkeypatch):
    if variables.get("SLURM_TASK_PID") == "0":  # a script in the process group of its task
        variables = variables | {"SLURM_TASK_PID": str(os.getpgrp())}
    for name, value in (SLURM | variables).items():
        monkeypatch.setenv(name, value)
    assert (started_by_hand(os.environ) is not None) == alone
    waiting, number = describe_waiting(DistributedConfig(timeout=77)), variables["SLURM_NTASKS"]
    if alone or number == "1":
        assert waiting is None
    else:
        assert "SLURM_NTASKS" in waiting and number in waiting and "77 s" in waiting
    # The options take precedence.
    waiting = describe_waiting(DistributedConfig("node:5", 3, 1))
    assert "node:5" in waiting and "process 1" in waiting and " 3 " in waiting


@pytest.mark.slow
def test_a_program_in_an_interactive_step_trains_alone(text_file, tmp_path):  # noqa: F811
    argv = list(map(str, ["--data.train", text_file, "--run-dir", tmp_path / "run", "--steps", 1, *TINY]))
    shell = SLURM | {"SLURM_NTASKS": "8", "SLURM_STEP_NUM_TASKS": "1"}
    ((out, error),) = run_programs(f"import sys, train; sys.exit(train.main({argv}))", [shell])
    assert str(tmp_path / "run" / "checkpoints" / "1") in out
    assert "SLURM_STEP_NUM_TASKS" in error and "--distributed.coordinator" in error and error.count("\n") == 1


def test_the_program_refuses_to_train_alone(text_file, tmp_path):  # noqa: F811
    """In a pod of an indexed job, without Kubernetes' package or with a service that does not answer."""
    pod = {"KUBERNETES_SERVICE_HOST": "127.0.0.1", "KUBERNETES_SERVICE_PORT": "1", "JOB_COMPLETION_INDEX": "1"}
    argv = list(map(str, ["--data.train", text_file, "--run-dir", tmp_path / "run", *TINY]))
    ((out, error),) = run_programs(f"import sys, train; sys.exit(train.main({argv}))", [pod])
    assert_one_error(error)
    assert not out and not (tmp_path / "run").exists()
    assert "JOB_COMPLETION_INDEX" in error or "Kubernetes" in error


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
def test_the_devices_of_its_node_that_a_process_uses(variables, devices):
    assert local_devices(variables) == devices


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        (dict(coordinator="a:1"), "must be set together with"),
        (dict(num_processes=2, process_id=1), "must be set together with"),
        (dict(coordinator="a:1", num_processes=2, process_id=2), "--distributed.process_id"),
        (dict(coordinator="a", num_processes=2, process_id=1), "must be HOST:PORT, not a"),
        (dict(coordinator="a:0", num_processes=2, process_id=0), "must have a port of 1 to 65535, not a:0"),
        (dict(coordinator="a:99999", num_processes=2, process_id=0), "must have a port of 1 to 65535, not a:99999"),
        (dict(timeout=0), "--distributed.timeout must be at least 1, not 0"),
    ],
)
def test_bad_options(options, reason):
    with pytest.raises(InputError) as e:
        DistributedConfig(**options)
    assert reason.replace("_", "-") in str(e.value) and e.value.exit_code == 2


def test_each_device_gets_its_own_rows():
    """On 8 devices; the whole batch is that of a single device."""
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

        def is_truncated(self, ids):
            return False

    ids = Ids()
    texts = tokenize(TEXTS, ids, ids, max_length=20, source="")
    batches = TextBatches(texts, 16, pad_id=0, buckets=2)
    mesh = jax.make_mesh((2, 2, 2), ("data", "fsdp", "tensor"), axis_types=(AxisType.Auto,) * 3)
    sharding = NamedSharding(mesh, PartitionSpec(("data", "fsdp")))
    spans = local_row_ranges(sharding, 16)
    assert spans == [(0, 4), (4, 8), (8, 12), (12, 16)]
    for step, batch in zip(range(3, 3 + batches.steps_per_epoch), prefetch(batches, sharding, 3), strict=False):
        for whole, placed in zip(jax.tree.leaves(batches.batch(step)), jax.tree.leaves(batch), strict=True):
            np.testing.assert_array_equal(whole, placed)
            for shard in placed.addressable_shards:
                assert len(shard.data) == 4
                np.testing.assert_array_equal(shard.data, whole[shard.index])
