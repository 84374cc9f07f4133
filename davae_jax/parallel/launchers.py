"""Reads the environment variables that launchers of several processes (MPI, Slurm, Kubernetes) set in each of them.

JAX reads most of them itself (`jax.distributed.initialize`); this module handles the others.
"""

from __future__ import annotations

import contextlib
import os
import re
from collections.abc import Mapping

from davae_jax.utils.errors import InputError

# The number of processes and the rank of this one: of all processes, and of those of its node.
MPI_VARIABLES = (("OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_RANK"), ("PMI_SIZE", "PMI_RANK"))
LOCAL_MPI_VARIABLES = (
    ("OMPI_COMM_WORLD_LOCAL_SIZE", "OMPI_COMM_WORLD_LOCAL_RANK"),
    ("MPI_LOCALNRANKS", "MPI_LOCALRANKID"),
)
SLURM_VARIABLES = ("SLURM_STEP_NUM_TASKS", "SLURM_PROCID")
OPTIONS = "--distributed.coordinator HOST:PORT --distributed.num-processes N --distributed.process-id I"


def mpi_size_and_rank(environ: Mapping[str, str]) -> tuple[int, int] | None:
    """Returns the number of processes and the rank of this one, or None if no MPI launcher has set them."""
    for size, rank in MPI_VARIABLES:
        if size in environ and rank in environ:
            return _number(environ, size), _number(environ, rank)
    return None


def _number(environ: Mapping[str, str], name: str) -> int | None:
    """Returns the value of a variable; None if it is missing or empty. Raises InputError if it is not a number."""
    if not (value := environ.get(name)):
        return None
    try:
        return int(value)
    except ValueError:
        raise InputError(f"the environment variable {name} is {value!r}, not a number", exit_code=2) from None


def check_alone(environ: Mapping[str, str]) -> None:
    """Raises InputError (exit code 2) if the environment indicates other processes; call it if JAX found none."""
    for size, rank in (*MPI_VARIABLES, SLURM_VARIABLES):
        if (_number(environ, size) or 1) > 1:
            mpi = (size, rank) in MPI_VARIABLES and rank in environ
            options = "--distributed.coordinator HOST:PORT" if mpi else OPTIONS
            raise InputError(f"{size} is {environ[size]}, but JAX found no other processes; set {options}", exit_code=2)
    if (_number(environ, "PMIX_RANK") or 0) > 0:
        raise InputError(
            f"PMIX_RANK is {environ['PMIX_RANK']}, but JAX found no other processes; set {OPTIONS}", exit_code=2
        )
    if "KUBERNETES_SERVICE_HOST" in environ and "JOB_COMPLETION_INDEX" in environ:
        raise InputError(
            f"JOB_COMPLETION_INDEX is {environ['JOB_COMPLETION_INDEX']}, but JAX cannot query Kubernetes for the "
            f"other pods: pip install '.[k8s]', or set {OPTIONS}",
            exit_code=2,
        )


def started_by_hand(environ: Mapping[str, str]) -> str | None:
    """Returns why this process of a Slurm job trains alone, or None if it is one of the tasks of a step.

    In an interactive step (`salloc` with a shell on the node, `srun --pty bash`) a program that is started from the
    shell inherits the shell's variables. JAX takes SLURM_NTASKS for the number of processes and would wait for them.

    It is alone in two cases: the step has one task, whatever the size of the job; or the step has a pseudo-terminal, of
    which Slurm runs only the first task's shell, and that shell has started this process as a job of its own, not in
    the process group of the task, as a script does. MPI may have started several processes from such a shell.
    """
    if "JAX_COORDINATOR_ADDRESS" in environ or any((_number(environ, size) or 1) > 1 for size, _ in MPI_VARIABLES):
        return None
    tasks = _number(environ, "SLURM_STEP_NUM_TASKS")
    if tasks == 1 and (_number(environ, "SLURM_NTASKS") or 1) > 1:
        return f"SLURM_NTASKS is {environ['SLURM_NTASKS']}, but SLURM_STEP_NUM_TASKS is 1"
    task = _number(environ, "SLURM_TASK_PID")
    if (tasks or 1) > 1 and "SLURM_PTY_PORT" in environ and task is not None:
        with contextlib.suppress(OSError):  # the task is on another machine, or has ended
            if task != os.getpid() and os.getpgid(task) != os.getpgrp():
                return f"SLURM_STEP_NUM_TASKS is {tasks}, but the step is interactive (SLURM_PTY_PORT)"
    return None


def expected_processes(environ: Mapping[str, str]) -> tuple[str, int] | None:
    """Returns the launcher's variable with the number of processes that JAX will wait for, and the number, if any."""
    for name, marker in (("SLURM_NTASKS", "SLURM_STEP_NODELIST"), ("OMPI_COMM_WORLD_SIZE", "OMPI_MCA_orte_hnp_uri")):
        if marker in environ and (n := _number(environ, name) or 1) > 1:
            return name, n
    return None


def local_devices(environ: Mapping[str, str]) -> list[int] | None:
    """Returns the indices of the GPUs of its node that this process uses.

    Returns:
      [] for all of them, if it is the only process of its node; under MPI the index of its local rank; None to let
      JAX decide, whose choice under Slurm is the same.
    """
    if "JAX_LOCAL_DEVICE_IDS" in environ:
        return None
    for size, rank in LOCAL_MPI_VARIABLES:
        if size in environ and rank in environ:
            return [] if environ[size] == "1" else [_number(environ, rank)]
    tasks = environ.get("SLURM_STEP_TASKS_PER_NODE") or environ.get("SLURM_TASKS_PER_NODE") or ""
    return [] if re.fullmatch(r"1(\(x\d+\))?", tasks) else None
