"""Settings of the compiler, which takes most of the tests' time: faster compilation, and no program compiled twice."""

import atexit
import os
import shutil
import tempfile
from importlib.metadata import version

# The programs of the tests are small and run a few times each, so that optimizing them takes longer than it saves.
QUICK = "--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true"
if version("jaxlib").startswith("0.10."):  # later versions do not know the first flag, and end a process that sets it
    QUICK += " --xla_cpu_use_fusion_emitters=false"  # they take half of the compilation's time
    QUICK += " --xla_cpu_parallel_codegen_split_count=1"  # a program in 32 parts has much in it 32 times


def share_programs() -> None:
    """Lets pytest's workers and the processes that tests start share what JAX compiles, in a cache on the disk.

    To be called before JAX is imported. The cache is new and is deleted at the end, unless the environment names one.
    """
    if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
        os.environ["JAX_COMPILATION_CACHE_DIR"] = folder = tempfile.mkdtemp(prefix="davae-jax-programs-")
        atexit.register(shutil.rmtree, folder, ignore_errors=True)
    os.environ["DAVAE_PROGRESS_SECONDS"] = "0"  # no line in the output that a test reads, however slow the machine is
    os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")
    os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES", "-1")


def own_environment() -> dict[str, str]:
    """Returns the environment of a process that shares no programs and sets the compiler's options itself."""
    return {name: value for name, value in os.environ.items() if name not in ("JAX_COMPILATION_CACHE_DIR", "XLA_FLAGS")}
