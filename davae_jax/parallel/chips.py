"""The vendors' specifications of accelerators: memory, peak FLOP/s, and bandwidth between chips."""

from __future__ import annotations

from typing import NamedTuple


class Chip(NamedTuple):
    name: str
    memory: float  # bytes
    flops: float  # peak FLOP/s of dense bfloat16 matrix products
    link: float  # bytes/s that one chip can send within its group
    group: int  # number of chips connected by the fast link, in a node or a pod
    network: float  # bytes/s that one chip can send to other groups
    bandwidth: float  # bytes/s of its memory
    kinds: tuple[str, ...]  # JAX's `Device.device_kind`
    attention: tuple[str, ...] = ("xla",)  # the implementations of attention that run on it (`model.config.Attention`)

    @property
    def platform(self) -> str:
        """Returns JAX's `Device.platform`."""
        return "tpu" if self.name.startswith("TPU") else "gpu"


GB, GiB, TERA = 1e9, 2**30, 1e12
TPU_ATTENTION = ("xla", "mosaic_tpu")
# Sources: NVIDIA's data sheets of A100, H100 and H200 (SXM, without sparsity; half of NVLink's rate, which is given
# there for both directions together); the user guides of DGX A100, H100 and H200 (one network card per GPU, 200 or
# 400 Gb/s); Google's Cloud TPU documentation, "System architecture" of v4, v5e, v5p and v6e (interconnect in one
# direction; the rate of the data centre network divided by the pod's chips; v4's is not published, v5p's is used).
CHIPS = {
    "h200": Chip("H200", 141 * GB, 989 * TERA, 450 * GB, 8, 50 * GB, 4.8 * TERA, ("NVIDIA H200",)),
    "h100": Chip("H100", 80 * GB, 989 * TERA, 450 * GB, 8, 50 * GB, 3.35 * TERA, ("NVIDIA H100 80GB HBM3",)),
    "a100-80gb": Chip(
        *("A100 80 GB", 80 * GB, 312 * TERA, 300 * GB, 8, 25 * GB, 1.935 * TERA),
        ("NVIDIA A100-SXM4-80GB", "NVIDIA A100 80GB PCIe"),
    ),
    "a100-40gb": Chip(
        *("A100 40 GB", 40 * GB, 312 * TERA, 300 * GB, 8, 25 * GB, 1.555 * TERA),
        ("NVIDIA A100-SXM4-40GB", "NVIDIA A100-PCIE-40GB"),
    ),
    # The compiler refuses the kernels' rotation of each row by another amount for v4.
    "tpu-v4": Chip("TPU v4", 32 * GiB, 275 * TERA, 300 * GB, 4096, 6.25 * GB, 1228 * GB, ("TPU v4",)),
    "tpu-v5e": Chip(
        "TPU v5e", 16 * GiB, 197 * TERA, 200 * GB, 256, 3.125 * GB, 819 * GB, ("TPU v5 lite", "TPU v5e"), TPU_ATTENTION
    ),
    "tpu-v5p": Chip(
        "TPU v5p", 95 * GiB, 459 * TERA, 600 * GB, 8960, 6.25 * GB, 2765 * GB, ("TPU v5", "TPU v5p"), TPU_ATTENTION
    ),
    "tpu-v6e": Chip(
        "TPU v6e", 32 * GiB, 918 * TERA, 400 * GB, 256, 12.5 * GB, 1638 * GB, ("TPU v6 lite", "TPU v6e"), TPU_ATTENTION
    ),
}


def find_chip(kind: str) -> Chip | None:
    """Returns the chip with JAX's `device_kind` `kind`, or None if it is not in the table."""
    return next((chip for chip in CHIPS.values() if kind in chip.kinds), None)
