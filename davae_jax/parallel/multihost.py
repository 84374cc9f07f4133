"""Connects the processes of a run, and disconnects them at its end.

JAX's coordination service, which runs in process 0, ends every process when one has sent no heartbeat for the timeout;
its log message names that process. A collective operation that has lost a process raises an error, or waits until JAX
ends it; a barrier of Orbax raises an error in the moment in which JAX ends the process.
"""

from __future__ import annotations

import contextlib
import os
import socket
import time
import warnings
from collections.abc import Iterator

import jax

from davae_jax.parallel.config import DistributedConfig
from davae_jax.parallel.launchers import OPTIONS, check_alone, expected_processes, local_devices, started_by_hand
from davae_jax.utils.errors import InputError, OptionError, first_line

HEARTBEAT_TIMEOUT = 100  # seconds, JAX's default
ABORT_SECONDS = 5  # between the moment when JAX's service notices a loss and the end of this process, on a busy machine


def connect(config: DistributedConfig) -> None:
    """Joins this process with the other processes of the run, if there are any. Call it before JAX looks for devices.

    JAX itself ends the process when the other processes do not join within the timeout.

    Raises:
      InputError: the coordinator cannot be started or found; or the environment indicates other processes but not how
        to reach them (exit code 2).
    """
    coordinator, num_processes, process_id = config.resolve(os.environ)
    if coordinator is None and (reason := started_by_hand(os.environ)):
        warnings.warn(
            f"{reason}: trains alone; to train with all tasks, start the program with srun, or set {OPTIONS}",
            stacklevel=2,
        )
        return
    in_kubernetes = "KUBERNETES_SERVICE_HOST" in os.environ
    if coordinator is not None and process_id == 0:
        _check_port_is_free(coordinator)
    jax.config.update("jax_enable_preemption_service", False)  # it would replace the handler of SIGTERM
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "(?s).*Kubernetes environment detected")  # check_alone reports it
            jax.distributed.initialize(
                coordinator,
                num_processes,
                process_id,
                local_devices(os.environ),
                # If the address is given, Kubernetes need not be queried, which may not be permitted.
                cluster_detection_method="deactivate" if coordinator and in_kubernetes else None,
                initialization_timeout=config.timeout,
                heartbeat_timeout_seconds=min(config.timeout, HEARTBEAT_TIMEOUT),
                shutdown_timeout_seconds=config.timeout,
            )
    except Exception as e:  # a ValueError if JAX detects no cluster; the client of Kubernetes raises many types
        if coordinator is not None:
            raise OptionError("--distributed.coordinator", f"{coordinator}: {first_line(e)}", exit_code=1) from e
        if not isinstance(e, ValueError):
            if not in_kubernetes:
                raise
            if "JOB_COMPLETION_INDEX" in os.environ:
                raise InputError(f"Kubernetes: {first_line(e)}; or set {OPTIONS}") from e
        check_alone(os.environ)


def describe_waiting(config: DistributedConfig) -> str | None:
    """Returns a line that says which processes `connect` waits for and how long; None if it waits for none."""
    coordinator, num_processes, process_id = config.resolve(os.environ)
    limit = f"at most {config.timeout} s (--distributed.timeout)"
    if coordinator is not None and num_processes > 1:
        return f"process {process_id} waits for {num_processes} processes at {coordinator}, {limit}"
    if coordinator is None and not started_by_hand(os.environ) and (expected := expected_processes(os.environ)):
        return f"waiting for {expected[1]} processes ({expected[0]}), {limit}"
    return None


def _check_port_is_free(coordinator: str) -> None:
    """Raises InputError if this process cannot listen on the coordinator's port: JAX would crash."""
    try:
        socket.create_server(("", int(coordinator.rpartition(":")[2]))).close()
    except OSError as e:
        raise OptionError("--distributed.coordinator", f"{coordinator}: {e.strerror}", exit_code=1) from e


def disconnect() -> None:
    """Leaves JAX's coordination service when all processes do so; call it on all of them before they end.

    It runs in process 0, whose end would abort a process that is still connected.
    """
    jax.distributed.shutdown()


def compiles_together() -> bool:
    """Returns whether the processes of this run share the work of compiling a program, as they do for GPUs."""
    return jax.distributed.is_initialized() and jax.process_count() > 1 and jax.default_backend() == "gpu"


def is_process_zero() -> bool:
    """Returns whether this is process 0, the only one that writes logs and prints."""
    return jax.process_index() == 0


@contextlib.contextmanager
def explain_lost_process() -> Iterator[None]:
    """Turns an unexpected error in a run of several processes into an InputError that points to the other processes.

    A collective that another process has left fails with an error that names a network address at best.
    """
    try:
        yield
    except (InputError, OSError):
        raise
    except Exception as e:
        if not jax.distributed.is_initialized() or jax.process_count() == 1:
            raise
        if isinstance(e, jax.errors.JaxRuntimeError):
            wait_for_abort()
        raise InputError(suspect_other_processes(f"{type(e).__name__}: {first_line(e)}")) from e


def wait_for_abort() -> None:
    """Gives JAX the time to end this process after an error that the loss of another one may have caused.

    JAX does so where its coordination service has noticed the loss. Its message names the lost process, and one of ours
    would only follow it. Process 0 waits longest, since its end would abort the others before their messages.
    """
    if jax.process_count() > 1:
        time.sleep(ABORT_SECONDS * (2 if is_process_zero() else 1))


def suspect_other_processes(reason: str) -> str:
    """Returns the message of an error that the loss of another process may have caused, if there are others."""
    if jax.process_count() == 1:
        return reason
    return f"process {jax.process_index()}: {reason}; if another process ended before, see its output"
