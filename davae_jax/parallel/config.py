"""The options of the device mesh and of runs with several processes."""

from __future__ import annotations

import math
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass

from davae_jax.parallel.launchers import mpi_size_and_rank
from davae_jax.utils.errors import OptionError, check_options


@dataclass(frozen=True)
class MeshConfig:
    """Sizes of the axes of the device mesh; one of them may be -1, which takes all remaining devices."""

    data: int = -1
    """Data parallelism: number of copies of the model, each of which processes a shard of the batch."""

    fsdp: int = 1
    """Fully sharded data parallelism: number of devices over which weights, optimizer states and batch are sharded."""

    tensor: int = 1
    """Tensor parallelism: number of devices over which the width of each layer is sharded."""

    def __post_init__(self):
        check_options(self, "mesh.", "data fsdp tensor", lambda n: n >= 1 or n == -1, "be at least 1, or -1")
        inferred = [f"--mesh.{name}" for name in ("data", "fsdp", "tensor") if getattr(self, name) == -1]
        if len(inferred) > 1:
            raise OptionError(inferred[0], f"and {inferred[1]} cannot both be -1")

    def shape(self, devices: int) -> dict[str, int]:
        """Returns the size of each axis for this number of devices.

        Raises:
          InputError: the sizes do not fit the devices (exit code 2).
        """
        sizes = {"data": self.data, "fsdp": self.fsdp, "tensor": self.tensor}
        fixed = math.prod(size for size in sizes.values() if size > 0)
        shape = {name: devices // fixed if size == -1 else size for name, size in sizes.items()}
        if math.prod(shape.values()) != devices:
            reason = f"{self.data} --mesh.fsdp {self.fsdp} --mesh.tensor {self.tensor}: does not fit {devices} devices"
            raise OptionError("--mesh.data", reason)
        return shape


MAX_PORT = 65535


@dataclass(frozen=True)
class DistributedConfig:
    """Training with several processes.

    They are detected on Slurm, on Cloud TPU, under Open MPI 4 and, with the extra k8s, in an indexed job of Kubernetes.
    Under other MPI implementations, only the coordinator is needed.
    """

    coordinator: str | None = None
    """HOST:PORT of process 0, the same on all processes."""

    num_processes: int | None = None
    """Number of processes. None: from MPI."""

    process_id: int | None = None
    """Index of this process, from 0. None: from MPI."""

    timeout: int = 300
    """Seconds to wait for the other processes at the start and at the end. During training, a process that sends no
    heartbeat for min(timeout, 100) seconds is considered lost, and the run ends."""

    def __post_init__(self):
        check_options(self, "distributed.", "timeout", lambda n: n >= 1, "be at least 1")
        coordinator, num_processes, process_id = resolved = self.resolve(os.environ)
        if resolved == (None, None, None):
            return
        if None in resolved:
            alternative = ", or alone under MPI" if coordinator else ""
            raise OptionError(
                "--distributed.coordinator",
                f"must be set together with --distributed.num-processes and --distributed.process-id{alternative}",
            )
        check_options(self, "distributed.", "num_processes", lambda _: num_processes >= 1, "be at least 1")
        if not 0 <= process_id < num_processes:
            raise OptionError("--distributed.process-id", f"must be 0 to {num_processes - 1}, not {process_id}")
        if not re.fullmatch(r".+:[0-9]{1,9}", coordinator):
            raise OptionError("--distributed.coordinator", f"must be HOST:PORT, not {coordinator}")
        if not 1 <= int(coordinator.rpartition(":")[2]) <= MAX_PORT:
            raise OptionError("--distributed.coordinator", f"must have a port of 1 to {MAX_PORT}, not {coordinator}")

    def resolve(self, environ: Mapping[str, str]) -> tuple[str | None, int | None, int | None]:
        """Returns (coordinator, number of processes, index of this one); MPI's variables complete a coordinator."""
        size_and_rank = self.num_processes, self.process_id
        if self.coordinator is not None and size_and_rank == (None, None):
            size_and_rank = mpi_size_and_rank(environ) or size_and_rank
        return self.coordinator, *size_and_rank
