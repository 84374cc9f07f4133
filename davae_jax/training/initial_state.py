"""Makes the state before the first step, from newly initialized weights or a pretrained encoder and decoder."""

from __future__ import annotations

import dataclasses
from functools import partial
from pathlib import Path

import jax

from davae_jax.checkpoints.pretrained import from_pretrained
from davae_jax.checkpoints.run_folder import CONFIG_FILE, INIT_FOLDER
from davae_jax.checkpoints.warm_start import format_report, warm_start
from davae_jax.model.config import DAVAEConfig
from davae_jax.model.davae import DAVAE, InitKeys, split
from davae_jax.model.stack import stack_layers
from davae_jax.training.config import TrainConfig
from davae_jax.training.state import TrainState, init_state

# Settings of a pretrained model that a run may change, because no tensor's shape depends on them.
RUNTIME_FIELDS = {
    "encoder": ["hidden_dropout_prob", "attention_probs_dropout_prob"],
    "decoder": [
        *["embedding_dropout_prob", "attention_dropout_prob", "output_dropout_prob"],
        *["latent_every_layer", "latent_initializer_scale", "max_memory_length"],
    ],
}


def is_warm_start(config: TrainConfig) -> bool:
    """Returns whether the run begins from a pretrained encoder or decoder."""
    return bool(config.init.encoder or config.init.decoder)


def make_warm_start(config: TrainConfig, model: DAVAEConfig, folder: Path) -> None:
    """Writes the initial checkpoint of a warm start into the run folder, and prints the source of each weight.

    If the checkpoint exists, it only removes the file that a killed start may have left.
    """
    settings = folder / "init.json"
    if not (folder / INIT_FOLDER).exists():
        model.to_json(settings)
        sources = {"encoder": config.init.encoder, "decoder": config.init.decoder}
        report = warm_start(folder / INIT_FOLDER, config=settings, seed=config.seed, **sources)
        print(format_report(report, sources))
    settings.unlink(missing_ok=True)  # that of a start that was killed too


def warm_start_config(model: DAVAEConfig, folder: Path) -> DAVAEConfig:
    """Returns the config of a warm start: sizes from the pretrained model, `RUNTIME_FIELDS` from the run."""
    pretrained = DAVAEConfig.from_json(folder / INIT_FOLDER / CONFIG_FILE)
    sections = {
        section: dataclasses.replace(
            getattr(pretrained, section), **{name: getattr(getattr(model, section), name) for name in names}
        )
        for section, names in RUNTIME_FIELDS.items()
    }
    return dataclasses.replace(pretrained, **sections)


def initial_state(abstract: TrainState, model: DAVAEConfig, config: TrainConfig, folder: Path) -> TrainState:
    """Returns the state before the first step, each array created with its sharding in `abstract`."""
    shardings = jax.tree.map(lambda x: x.sharding, abstract)
    if is_warm_start(config):
        params = stack_layers(split(from_pretrained(folder / INIT_FOLDER, mesh=shardings.step.mesh))[1])
        return jax.jit(partial(init_state, config=config), out_shardings=shardings, donate_argnums=0)(params)

    def make_state(key):
        return init_state(stack_layers(split(DAVAE(model, rngs=InitKeys(key)))[1]), config)

    # One compiled program for all weights is faster than thousands of small ones.
    return jax.jit(make_state, out_shardings=shardings)(jax.random.key(config.seed))
