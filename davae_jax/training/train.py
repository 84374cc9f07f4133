"""`davae_jax.train`: trains a model from Python."""

from __future__ import annotations

from collections.abc import Sequence

import jax

from davae_jax.inference.text_vae import TextVAE
from davae_jax.parallel import multihost
from davae_jax.training import loop
from davae_jax.training.config import TrainConfig
from davae_jax.training.hooks import Hook
from davae_jax.utils.errors import OptionError


def train(config: TrainConfig, hooks: Sequence[Hook] = ()) -> TextVAE | None:
    """Trains a model, as `davae train` does, and returns it with its tokenizers.

    If the run folder, `config.run_dir`, contains checkpoints of the same settings, the run resumes; if it is complete,
    the model is returned.

    While the steps are taken, the first SIGINT (Ctrl-C, or a notebook's interrupt), SIGTERM or SIGHUP ends the run
    after the current step: a checkpoint is saved, and KeyboardInterrupt raised. A second signal, a second later or
    more, raises it at once. Before and after the steps, signals act as in the rest of the program, and so they do at
    any time if this is not Python's main thread, which alone can handle them. Nothing else of the process is changed:
    it does not exit, and JAX's compilation cache remains as it is (`use_compile_cache`).

    With several processes, every process calls this function with the same settings, after
    `jax.distributed.initialize()` or with `config.distributed`.

    Args:
      config: the settings; `davae_jax.training.presets` has those of the demo and of the published model.
      hooks: actions every few steps (`davae_jax.training.hooks`), called before the run's own.

    Returns:
      The trained model with all its weights on the first device, and None on other processes than the first.

    Raises:
      InputError: a setting or an input cannot be used, or a loss or gradient is not finite.
      KeyboardInterrupt: the run was interrupted. The same call resumes it.
    """
    if config.run_dir is None:
        raise OptionError("config.run_dir", "must name the folder of the run")
    if config.distributed.coordinator is not None and not jax.distributed.is_initialized():
        multihost.connect(config.distributed)
    result = loop.train(config, hooks)
    if result.interrupted:
        raise KeyboardInterrupt(f"after step {result.step}, which is saved in {config.run_dir}")
    trained = result.run.text_vae(result.state)
    if trained is None:
        return None
    vae = TextVAE(trained.model, trained.encoder_tokenizer, trained.decoder_tokenizer)  # with its own batch size
    vae.source = str(config.run_dir)
    return vae
