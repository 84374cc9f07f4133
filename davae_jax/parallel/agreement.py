"""What the processes of a run do together: they agree on values, on errors and on when to stop."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from typing import Any, TypeVar

import jax
import numpy as np
from jax.experimental import multihost_utils

from davae_jax.parallel.multihost import disconnect, is_process_zero
from davae_jax.utils.errors import InputError, first_line
from davae_jax.utils.signals import INTERRUPTED

Params = dict[str, Any]
Result = TypeVar("Result")

STOP_INTERVAL = 10  # steps between two exchanges of stop requests
OUTCOME_BYTES = 2048  # size of an encoded exit code and error message


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


def value_of_process_zero(work: Callable[[], int]) -> int:
    """Runs `work` on process 0 and returns its result on all. If it fails, all raise (see `run_on_all_processes`)."""
    value = run_on_all_processes(work if is_process_zero() else lambda: 0)
    return value if jax.process_count() == 1 else int(multihost_utils.broadcast_one_to_all(np.int32(value)))


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
