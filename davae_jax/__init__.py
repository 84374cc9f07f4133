"""davae-jax: the text VAE Randeng-DAVAE-1.2B in JAX and Flax NNX.

Public names are imported when they are first used (PEP 562), so that `import davae_jax` and the programs' --help do not
wait for JAX.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from davae_jax.checkpoints.pretrained import from_pretrained
    from davae_jax.evaluation import metrics
    from davae_jax.inference import sampling
    from davae_jax.inference.generation import generate
    from davae_jax.inference.text_vae import TextVAE
    from davae_jax.model import losses
    from davae_jax.model.config import DAVAEConfig, DecoderConfig, EncoderConfig
    from davae_jax.model.davae import DAVAE
    from davae_jax.model.decoder import Memory
    from davae_jax.model.latent import Posterior
    from davae_jax.training.config import TrainConfig
    from davae_jax.training.train import train
    from davae_jax.utils.compile_cache import use_compile_cache
    from davae_jax.utils.errors import InputError

__all__ = [
    "DAVAE",
    "DAVAEConfig",
    "DecoderConfig",
    "EncoderConfig",
    "InputError",
    "Memory",
    "Posterior",
    "TextVAE",
    "TrainConfig",
    "from_pretrained",
    "generate",
    "losses",
    "metrics",
    "sampling",
    "train",
    "use_compile_cache",
]

# Where each public name is defined, and which modules are public themselves.
_DEFINED_IN = {
    "DAVAE": "model.davae",
    "DAVAEConfig": "model.config",
    "DecoderConfig": "model.config",
    "EncoderConfig": "model.config",
    "InputError": "utils.errors",
    "Memory": "model.decoder",
    "Posterior": "model.latent",
    "TextVAE": "inference.text_vae",
    "TrainConfig": "training.config",
    "from_pretrained": "checkpoints.pretrained",
    "generate": "inference.generation",
    "train": "training.train",
    "use_compile_cache": "utils.compile_cache",
}
_MODULES = {"losses": "model.losses", "metrics": "evaluation.metrics", "sampling": "inference.sampling"}


def __getattr__(name: str) -> Any:
    """Imports a public name when it is first used."""
    if name in _MODULES:
        value = importlib.import_module(f"davae_jax.{_MODULES[name]}")
    elif name in _DEFINED_IN:
        value = getattr(importlib.import_module(f"davae_jax.{_DEFINED_IN[name]}"), name)
    else:
        raise AttributeError(f"module 'davae_jax' has no attribute {name!r}")
    globals()[name] = value  # __getattr__ is not called for it again
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
