"""Explains why JAX cannot start on this machine, by the environment variables that configure it."""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Mapping

from davae_jax.utils.errors import InputError, first_line

# The variables that decide which devices JAX looks for.
DEVICE_VARIABLES = (
    *("JAX_PLATFORMS", "JAX_PLATFORM_NAME", "JAX_NUM_CPU_DEVICES", "JAX_CUDA_VISIBLE_DEVICES"),
    *("JAX_ROCM_VISIBLE_DEVICES", "CUDA_VISIBLE_DEVICES", "ROCR_VISIBLE_DEVICES", "HIP_VISIBLE_DEVICES", "XLA_FLAGS"),
)


def backend_problem(error: Exception, environ: Mapping[str, str] = os.environ) -> str | None:
    """Returns why JAX cannot be imported or has no devices, after an error of a program.

    JAX looks for devices when it first needs one, which may be anywhere in a program, and raises many types of errors:
    if a platform's hardware is missing, an AssertionError without a message.

    Returns:
      A line that names the environment variables; None if JAX works, or the program has not used it.
    """
    if "jax" in sys.modules:
        import jax

        if isinstance(error, InputError) and jax.distributed.is_initialized():
            return None  # looking for devices would wait for the other processes
        try:
            jax.devices()
        except Exception as e:
            error = e
        else:
            # JAX keeps the backends that it has started before the one that fails, and finds them now.
            if not str(error).startswith("Unable to initialize backend"):
                if isinstance(error, InputError):
                    return None
                names = [name for name in environ if name.startswith("JAX_") and not environ[name].isprintable()]
                names += _settings_in(str(error), environ)  # such as JAX_NUMPY_RANK_PROMOTION=raise
                return f"{names[0]}={environ[names[0]]}: {first_line(error)}" if names else None
    elif not any(name.startswith("jax.") for name in sys.modules):  # they remain after an import that failed
        return None
    reason = first_line(error) if str(error).strip() else "its plugin is not installed, or there is no such device"
    names = [name for name in environ if name in DEVICE_VARIABLES]
    names += _settings_in(reason, environ)
    settings = ", ".join(f"{name}={environ[name]}" for name in dict.fromkeys(names)) or "JAX_PLATFORMS is not set"
    return f"JAX cannot start ({settings}): {reason}"


def _settings_in(reason: str, environ: Mapping[str, str]) -> list[str]:
    """Returns the variables of JAX's settings that an error names, as jax_enable_x64 or jax.default_device."""
    names = [name for name in environ if name.startswith("JAX_")]
    return [name for name in names if re.search(rf"\bjax[_.]{re.escape(name[4:].lower())}\b", reason.lower())]
