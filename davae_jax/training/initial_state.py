"""Makes the state before the first step, from newly initialized weights, a model, or an encoder and a decoder."""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import jax

from davae_jax.checkpoints.hub import resolve_source
from davae_jax.checkpoints.pretrained import from_pretrained
from davae_jax.checkpoints.run_folder import CONFIG_FILE, INIT_FOLDER, complete_checkpoints, config_folder
from davae_jax.checkpoints.sums import array_sums
from davae_jax.checkpoints.warm_start import format_report, warm_start
from davae_jax.checkpoints.weights import flatten
from davae_jax.model.config import DAVAEConfig
from davae_jax.model.davae import DAVAE, InitKeys, split
from davae_jax.model.stack import stack_layers
from davae_jax.parallel.agreement import run_on_process_zero
from davae_jax.training.config import TrainConfig
from davae_jax.training.presets import PRESETS
from davae_jax.training.run.folder import record_source
from davae_jax.training.run.vocabularies import with_loss_settings
from davae_jax.training.state import TrainState, init_state
from davae_jax.utils.errors import OptionError

# Settings of a pretrained model that a run may change, because no tensor's shape depends on them: of a whole model the
# dropout, of an encoder and a decoder also how the decoder uses what it had not, latent and memory.
DROPOUT_FIELDS = {
    "encoder": ["hidden_dropout_prob", "attention_probs_dropout_prob"],
    "decoder": ["embedding_dropout_prob", "attention_dropout_prob", "output_dropout_prob"],
}
RUNTIME_FIELDS = {
    "encoder": DROPOUT_FIELDS["encoder"],
    "decoder": [
        *DROPOUT_FIELDS["decoder"],
        *["latent_every_layer", "latent_initializer_scale", "max_memory_length"],
    ],
}


def is_warm_start(config: TrainConfig) -> bool:
    """Returns whether the run begins from a pretrained encoder or decoder, and not from a whole model."""
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
    return _with_fields_of(model, pretrained, RUNTIME_FIELDS)


def whole_model_config(config: TrainConfig, folder: Path) -> DAVAEConfig:
    """Returns the config of a run that begins from a whole model: that of the model, but for dropout and the loss.

    folder: of the model; once the run has checkpoints, its own, which makes the model superfluous.
    """
    pretrained = with_loss_settings(DAVAEConfig.from_json(config_folder(folder) / CONFIG_FILE), config)
    return _with_fields_of(config.model, pretrained, DROPOUT_FIELDS)


def whole_model_folder(config: TrainConfig, folder: Path) -> Path:
    """Returns the folder that `whole_model_config` reads for a run. Raises InputError if there is none."""
    return folder if complete_checkpoints(folder) else resolve_source(config.init.model)


def check_model_options(config: TrainConfig, given: Collection[str] = ()) -> None:
    """Raises OptionError if the model's settings of a new run contradict --init.model.

    Args:
      given: fields that were set explicitly, such as "decoder.num_layers". Of all others, those of which every preset
        has another value must have been.
    """
    if not config.init.model or (config.run_dir and complete_checkpoints(config.run_dir)):
        return
    pretrained = DAVAEConfig.from_json(config_folder(resolve_source(config.init.model)) / CONFIG_FILE)
    defaults = [_fields(settings.model) for _, settings in PRESETS.values()] + [_fields(DAVAEConfig())]
    for (name, value), source in zip(_fields(config.model).items(), _fields(pretrained).values(), strict=True):
        section, _, field = name.rpartition(".")
        is_given = name in given or all(value != default[name] for default in defaults)
        if is_given and value != source and field not in DROPOUT_FIELDS.get(section, ()):
            reason = f"is {value}, but {source} in {config.init.model}, which --init.model takes over whole"
            raise OptionError(f"--model.{name.replace('_', '-')}", reason)


def _fields(config: DAVAEConfig) -> dict[str, Any]:
    """Returns the fields of a model's config, those of a section as "decoder.num_layers", without unknown ones."""
    values = {name: value for name, value in vars(config).items() if name not in ("encoder", "decoder", "extra")}
    for section in ("encoder", "decoder"):
        values |= {f"{section}.{name}": x for name, x in vars(getattr(config, section)).items() if name != "extra"}
    return values


def _with_fields_of(run: DAVAEConfig, pretrained: DAVAEConfig, fields: Mapping[str, Sequence[str]]) -> DAVAEConfig:
    """Returns the pretrained model's config with these fields, by section, of the run's."""
    sections = {
        section: dataclasses.replace(
            getattr(pretrained, section), **{name: getattr(getattr(run, section), name) for name in names}
        )
        for section, names in fields.items()
    }
    return dataclasses.replace(pretrained, **sections)


def initial_state(abstract: TrainState, model: DAVAEConfig, config: TrainConfig, folder: Path) -> TrainState:
    """Returns the state before the first step, each array created with its sharding in `abstract`."""
    shardings = jax.tree.map(lambda x: x.sharding, abstract)
    if config.init.model or is_warm_start(config):
        params = split(from_pretrained(config.init.model or folder / INIT_FOLDER, mesh=shardings.step.mesh))[1]
        if config.init.model:
            sums = jax.device_get(array_sums(flatten(params)))
            run_on_process_zero(lambda: record_source(folder, sums))
        params = stack_layers(params)
        return jax.jit(partial(init_state, config=config), out_shardings=shardings, donate_argnums=0)(params)

    def make_state(key):
        return init_state(stack_layers(split(DAVAE(model, rngs=InitKeys(key)))[1]), config)

    # One compiled program for all weights is faster than thousands of small ones.
    return jax.jit(make_state, out_shardings=shardings)(jax.random.key(config.seed))
