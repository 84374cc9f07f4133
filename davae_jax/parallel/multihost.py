"""Coordinates the processes of a run: they connect, agree on values and errors, and end together.

JAX's coordination service, which runs in process 0, ends every process when one has sent no heartbeat for the timeout;
its log message names that process. A collective operation that has lost a process raises an error, or waits until JAX
ends it.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import socket
import warnings
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

import jax
import numpy as np
from jax.experimental import multihost_utils

from davae_jax.parallel.config import DistributedConfig
from davae_jax.parallel.launchers import OPTIONS, check_alone, expected_processes, local_devices, started_by_hand
from davae_jax.utils.errors import InputError, first_line

Params = dict[str, Any]
Result = TypeVar("Result")

HEARTBEAT_TIMEOUT = 100  # seconds, JAX's default
STOP_INTERVAL = 10  # steps between two exchanges of stop requests
INTERRUPTED = 130  # exit code
OUTCOME_BYTES = 2048  # size of an encoded exit code and error message


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
            raise InputError(f"--distributed.coordinator {coordinator}: {first_line(e)}") from e
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
        raise InputError(f"--distributed.coordinator {coordinator}: {e.strerror}") from e


def disconnect() -> None:
    """Leaves JAX's coordination service when all processes do so; call it on all of them before they end.

    It runs in process 0, whose end would abort a process that is still connected.
    """
    jax.distributed.shutdown()


def is_process_zero() -> bool:
    """Returns whether this is process 0, the only one that writes logs and prints."""
    return jax.process_index() == 0


def run_on_all_processes(work: Callable[[], Result]) -> Result:
    """Runs `work` on every process and returns its result there. If it fails on any process, it raises on all.

    A process on which `work` succeeds raises InputError with the exit code and the message of the first process that
    failed, or KeyboardInterrupt if that process was interrupted. All are disconnected by then and can end in any order.
    """
    if jax.process_count() == 1:
        return work()
    result, error = None, None
    try:
        result = work()
    except BaseException as e:
        error = e
    outcomes = multihost_utils.process_allgather(_encode_outcome(error))
    failed = np.flatnonzero(outcomes[:, 0])
    if not failed.size:
        return result
    disconnect()
    if error is not None:
        raise error
    code, message = int(outcomes[failed[0], 0]), bytes(outcomes[failed[0], 1:]).rstrip(b"\0").decode(errors="ignore")
    if code == INTERRUPTED:
        raise KeyboardInterrupt
    raise InputError(message if failed[0] == 0 else f"process {failed[0]}: {message}", exit_code=code)


def _encode_outcome(error: BaseException | None) -> np.ndarray:
    """Returns a uint8 array: the exit code (0 without an error), then the message in UTF-8, filled up with zeros."""
    if error is None:
        code, message = 0, ""
    elif isinstance(error, KeyboardInterrupt):
        code, message = INTERRUPTED, ""
    elif isinstance(error, InputError):
        code, message = error.exit_code, str(error)
    else:
        code, message = 1, f"{type(error).__name__}: {first_line(error)}"
    return np.frombuffer(
        (bytes([code]) + message.encode(errors="backslashreplace"))[:OUTCOME_BYTES].ljust(OUTCOME_BYTES, b"\0"),
        np.uint8,
    )


def run_on_process_zero(work: Callable[[], None]) -> None:
    """Runs `work` on process 0 while the other processes wait. If it fails, all raise (see `run_on_all_processes`)."""
    run_on_all_processes(work if is_process_zero() else lambda: None)


def check_same_on_all_processes(name: str, value: str) -> None:
    """Raises InputError on every process if `value` differs between processes; `name` is for the message."""
    digest = np.frombuffer(hashlib.sha256(value.encode()).digest(), np.uint8)
    digests = multihost_utils.process_allgather(digest).reshape(jax.process_count(), -1)
    if different := np.flatnonzero((digests != digests[0]).any(axis=1)).tolist():
        disconnect()
        processes = ", ".join(map(str, different))
        raise InputError(f"{name} differ between processes 0 and {processes}")


def any_process_requested_stop(requested: bool, step: int) -> bool:
    """Returns whether any process was asked to stop. Several processes exchange this at every tenth step."""
    if jax.process_count() == 1:
        return requested
    return step % STOP_INTERVAL == 0 and not all_processes(not requested)


def all_processes(condition: bool) -> bool:
    """Returns whether the condition holds on every process."""
    return bool(multihost_utils.process_allgather(np.array(condition)).all())


def gather_params(params: Params) -> Params:
    """Returns weights that this process can use alone: of several processes, whole on one device of this one."""
    if jax.process_count() == 1:
        return params
    return jax.device_put(multihost_utils.process_allgather(params, tiled=True), jax.local_devices()[0])


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
        reason = f"process {jax.process_index()}: {type(e).__name__}: {first_line(e)}"
        raise InputError(f"{reason}; if another process ended before, see its output") from e
