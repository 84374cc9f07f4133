"""How devices are laid out, and how processes meet."""

from __future__ import annotations

import math
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass

from davae_jax.utils.errors import OptionError, check_options


@dataclass(frozen=True)
class MeshConfig:
    """How the devices are laid out; a -1 takes all that the others leave."""

    data: int = -1
    """Copies of the model, each with a part of the batch."""

    fsdp: int = 1
    """Devices over which weights and optimizer states are split, and the batch again."""

    tensor: int = 1
    """Devices over which each layer's own width is split."""

    def __post_init__(self):
        check_options(self, "mesh.", "data fsdp tensor", lambda n: n >= 1 or n == -1, "be at least 1, or -1")
        if [self.data, self.fsdp, self.tensor].count(-1) > 1:
            raise OptionError("--mesh.data", "--mesh.fsdp and --mesh.tensor: only one of them can be -1")

    def shape(self, devices: int) -> dict[str, int]:
        """The size of each axis on so many devices. Raises InputError (exit code 2) if they do not fit."""
        sizes = {"data": self.data, "fsdp": self.fsdp, "tensor": self.tensor}
        given = math.prod(size for size in sizes.values() if size > 0)
        filled = {name: devices // given if size == -1 else size for name, size in sizes.items()}
        if math.prod(filled.values()) != devices:
            reason = f"{self.data} --mesh.fsdp {self.fsdp} --mesh.tensor {self.tensor}: does not fit {devices} devices"
            raise OptionError("--mesh.data", reason)
        return filled


# How many processes there are and which this is, as launchers of MPI programs tell them.
RANKS = (("OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_RANK"), ("PMI_SIZE", "PMI_RANK"))


@dataclass(frozen=True)
class DistributedConfig:
    """Processes that train together. On Slurm, Cloud TPU, under Open MPI 4 and, with the extra k8s, in an indexed job
    of Kubernetes they find each other without being told; under another MPI give the coordinator alone."""

    coordinator: str | None = None
    """HOST:PORT of process 0, the same for all."""

    num_processes: int | None = None
    """How many there are. None: as MPI says."""

    process_id: int | None = None
    """Which of them this is, from 0. None: as MPI says."""

    timeout: int = 300
    """Seconds to wait for the others before giving up."""

    def __post_init__(self):
        check_options(self, "distributed.", "timeout", lambda n: n >= 1, "be at least 1")
        coordinator, n, process = where = self.where(os.environ)
        if where == (None, None, None):
            return
        if None in where:
            alone = ", or the coordinator alone under an MPI that says the rest" if coordinator else ""
            raise OptionError(
                "--distributed.coordinator",
                f"--distributed.num-processes and --distributed.process-id: give all three or none{alone}",
            )
        check_options(self, "distributed.", "num_processes", lambda _: n >= 1, "be at least 1")
        if not 0 <= process < n:
            raise OptionError("--distributed.process-id", f"must be from 0 to {n - 1}, not {process}")
        if not re.fullmatch(r".+:\d+", coordinator):
            raise OptionError("--distributed.coordinator", f"must be HOST:PORT, not {coordinator}")

    def where(self, environ: Mapping[str, str]) -> tuple[str | None, int | None, int | None]:
        """(coordinator, number of processes, this one), what is not given taken from an MPI launcher's variables."""
        given = self.coordinator, self.num_processes, self.process_id
        if self.coordinator is None or (self.num_processes, self.process_id) != (None, None):
            return given
        said = [(environ[size], environ[rank]) for size, rank in RANKS if size in environ and rank in environ]
        return (self.coordinator, *map(int, said[0])) if said else given
