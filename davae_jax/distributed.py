"""Several processes that train one model: how they find each other, wait for each other, and who speaks for them."""

from __future__ import annotations

import contextlib
import hashlib
import re
import socket
import time
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np

from davae_jax.errors import InputError, check_options

Params = dict[str, Any]


PATIENCE = 24 * 3600  # seconds for work that one process does for all


@dataclass(frozen=True)
class DistributedConfig:
    """Processes that train together. On Slurm, GKE, Cloud TPU and under MPI they find each other without being told."""

    coordinator: str | None = None
    """HOST:PORT of process 0, the same for all."""

    num_processes: int | None = None
    """How many there are."""

    process_id: int | None = None
    """Which of them this is, from 0."""

    timeout: int = 300
    """Seconds to wait for the others before giving up."""

    def __post_init__(self):
        given = [value is not None for value in (self.coordinator, self.num_processes, self.process_id)]
        names = "--distributed.coordinator, --distributed.num-processes, --distributed.process-id"
        if any(given) and not all(given):
            raise InputError(f"{names}: give all three or none", exit_code=2)
        check_options(self, "distributed.", "timeout", lambda n: n >= 1, "be at least 1")
        if all(given):
            check_options(self, "distributed.", "num_processes", lambda n: n >= 1, "be at least 1")
            fits = f"be from 0 to {self.num_processes - 1}"
            check_options(self, "distributed.", "process_id", lambda i: 0 <= i < self.num_processes, fits)
            if not re.fullmatch(r".+:\d+", self.coordinator):
                raise InputError(f"--distributed.coordinator must be HOST:PORT, not {self.coordinator}", exit_code=2)


def connect(config: DistributedConfig) -> None:
    """Joins this process with the others. To be called before anything asks for devices.

    Raises:
      InputError: the others did not come within the timeout; the missing ones are named.
    """
    where = (config.coordinator, config.num_processes, config.process_id)
    if config.coordinator is not None:
        _roll_call(*where, config.timeout)
    try:
        jax.distributed.initialize(*where, initialization_timeout=config.timeout)
    except ValueError:
        if config.coordinator is not None:
            raise
        # No cluster around this process: it is alone.


def _roll_call(coordinator: str, n: int, process: int, timeout: float) -> None:
    """Waits until all processes are there. JAX's own wait ends with the process, and names nobody."""
    host, _, port = coordinator.rpartition(":")
    ends = time.monotonic() + timeout
    if process == 0:
        try:
            server = socket.create_server(("", int(port)))
        except OSError as e:
            raise InputError(f"--distributed.coordinator {coordinator}: {e.strerror}") from e
        with server:
            missing = _received(server, n, ends)
            if missing:
                raise InputError(f"{coordinator}: waited {timeout} s for {_processes(missing)}")
        return
    while (left := ends - time.monotonic()) > 0:
        try:
            with socket.create_connection((host, int(port)), timeout=left) as connection:
                connection.sendall(process.to_bytes(4, "big"))
                if connection.recv(1):
                    return
            ends = min(ends, time.monotonic())  # process 0 gave up
        except OSError:
            time.sleep(0.2)
    raise InputError(f"{coordinator}: waited {timeout} s for process 0, or it waited in vain for others")


def _received(server: socket.socket, n: int, ends: float) -> set[int]:
    """Process 0's part: answers the others once all are there. Returns those that did not come."""
    came: dict[int, socket.socket] = {}
    missing = set(range(1, n))
    with contextlib.ExitStack() as stack:
        while missing and (left := ends - time.monotonic()) > 0:
            server.settimeout(left)
            with contextlib.suppress(OSError):
                connection = stack.enter_context(server.accept()[0])
                connection.settimeout(5)
                process = int.from_bytes(connection.recv(4), "big")
                came[process] = connection
                missing.discard(process)
        for connection in came.values() if not missing else ():
            with contextlib.suppress(OSError):
                connection.sendall(b"!")
    return missing


def barrier(reached: str, timeout: int = 300) -> None:
    """Waits until every process is here. Raises InputError, which names those that are not, after `timeout` seconds.

    reached: what stands behind them, for the message; each barrier of a run has its own.
    """
    if jax.process_count() == 1:
        return
    from jax._src import distributed  # multihost_utils.sync_global_devices has no timeout

    client, place = distributed.global_state.client, reached.replace(" ", "_")
    client.key_value_set(f"{place}/{jax.process_index()}", "", allow_overwrite=True)
    try:
        client.wait_at_barrier(place, timeout * 1000)
    except RuntimeError as e:
        came = {int(key.rpartition("/")[2]) for key, _ in client.key_value_dir_get(f"{place}/")}
        missing = set(range(jax.process_count())) - came
        raise InputError(f"waited {timeout} s until {reached}: no word from {_processes(missing)}") from e


def agreed(asked: bool, step: int) -> bool:
    """Whether any process was asked to stop. Several look at it together, every ten steps."""
    if jax.process_count() == 1:
        return asked
    return step % 10 == 0 and bool(_of_all(asked).any())


def on_all(good: bool) -> bool:
    """Whether it is so on every process; to be called by all."""
    return good if jax.process_count() == 1 else bool(_of_all(good).all())


def same_on_all(what: str, digest: str) -> None:
    """Raises InputError, on every process, where one has another digest than process 0."""
    if jax.process_count() == 1:
        return
    found = _of_all(np.frombuffer(hashlib.sha256(digest.encode()).digest()[:4], np.uint32))
    if others := {int(i) for i in np.flatnonzero((found != found[0]).any(1))}:
        raise InputError(f"{what}: {_processes(others)} and process 0 have different ones")


def _of_all(value) -> np.ndarray:
    """[processes, …]"""
    from jax.experimental import multihost_utils

    return np.asarray(multihost_utils.process_allgather(np.array(value)))


def gathered(params: Params) -> Params:
    """Weights that this process can use alone."""
    if jax.process_count() == 1:
        return params
    from jax.experimental import multihost_utils

    return jax.device_put(multihost_utils.process_allgather(params, tiled=True), jax.local_devices()[0])


def is_first_process() -> bool:
    """Process 0 writes logs and prints for all."""
    return jax.process_index() == 0


def _processes(ids: set[int]) -> str:
    named = ", ".join(map(str, sorted(ids)))
    return f"process{'es' if len(ids) > 1 else ''} {named}" if ids else "the other processes"
