"""Provides JAX, imported when it is first used.

For modules that declare options, which a program's --help imports, and compute with JAX as well:

    from davae_jax.utils.lazy import jax, jnp
"""

from __future__ import annotations

import importlib
from types import ModuleType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import jax
    import jax.numpy as jnp
else:

    class _LazyModule(ModuleType):
        """A proxy of a module, which imports it when an attribute is first used."""

        def __getattr__(self, name: str) -> Any:
            value = getattr(importlib.import_module(self.__name__), name)
            setattr(self, name, value)
            return value

    jax = _LazyModule("jax")
    jnp = _LazyModule("jax.numpy")

__all__ = ["jax", "jnp"]
