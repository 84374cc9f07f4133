"""Several processes that train one model: how they find each other, wait for each other, and who speaks for them."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np

from davae_jax.errors import InputError, check_options, first_line

Params = dict[str, Any]


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
      InputError: the others did not come within the timeout; those missing are named where that is known.
    """
    try:
        jax.distributed.initialize(
            config.coordinator,
            config.num_processes,
            config.process_id,
            initialization_timeout=config.timeout,
            heartbeat_timeout_seconds=max(10, min(100, config.timeout)),
        )
    except ValueError:
        if config.coordinator is not None:
            raise
        return  # no cluster around this process: it is alone
    except RuntimeError as e:
        at = f"{config.coordinator}: " if config.coordinator else ""
        raise InputError(f"{at}waited {config.timeout} s for {_missing(e)} to connect ({first_line(e)})") from e


def barrier(reached: str, timeout: int = 300) -> None:
    """Waits until every process is here. Raises InputError, which names those that are not, after `timeout` seconds.

    reached: what stands behind them, for the message; each barrier of a run has its own.
    """
    if jax.process_count() == 1:
        return
    from jax._src import distributed  # multihost_utils.sync_global_devices has no timeout

    try:
        distributed.global_state.client.wait_at_barrier(reached.replace(" ", "_"), timeout * 1000)
    except RuntimeError as e:
        raise InputError(f"waited {timeout} s until {reached}: no word from {_missing(e)}") from e


def agreed(asked: bool, step: int) -> bool:
    """Whether any process was asked to stop. Several look at it together, every ten steps."""
    if jax.process_count() == 1:
        return asked
    from jax.experimental import multihost_utils

    return step % 10 == 0 and bool(multihost_utils.process_allgather(np.array(asked)).any())


def gathered(params: Params) -> Params:
    """Weights that this process can use alone."""
    if jax.process_count() == 1:
        return params
    from jax.experimental import multihost_utils

    return jax.device_put(multihost_utils.process_allgather(params, tiled=True), jax.local_devices()[0])


def is_first_process() -> bool:
    """Process 0 writes logs and prints for all."""
    return jax.process_index() == 0


def _missing(error: Exception) -> str:
    """The processes that the coordination service's error names."""
    _, _, named = str(error).partition("timed out task names")
    ids = sorted({int(i) for i in re.findall(r"/task:(\d+)", named)})
    return f"process {', '.join(map(str, ids))}" if ids else "the other processes"
