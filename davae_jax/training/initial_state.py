"""Makes the state before the first step, from newly initialized weights, a model, or an encoder and a decoder."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path

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
from davae_jax.training.run.folder import record_source
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


def whole_model_config(model: DAVAEConfig, config: TrainConfig, folder: Path) -> DAVAEConfig:
    """Returns the config of a run that begins from a whole model: that of the model, but for dropout and the loss.

    A run with checkpoints needs the source no longer: the config is then in its own folder.

    Args:
      model: the run's settings (`run.vocabularies.model_config`).
    """
    source = folder if complete_checkpoints(folder) else _source_folder(config.init.model)
    pretrained = dataclasses.replace(
        DAVAEConfig.from_json(source / CONFIG_FILE),
        fb_mode=model.fb_mode,
        dim_target_kl=model.dim_target_kl,
        length_weighted_loss=model.length_weighted_loss,
    )
    longest = max(pretrained.max_out_length, config.data.max_length)
    return dataclasses.replace(_with_fields_of(model, pretrained, DROPOUT_FIELDS), max_out_length=longest)


def check_model_options(config: TrainConfig, default: DAVAEConfig) -> None:
    """Raises OptionError if a --model option of a new run contradicts --init.model.

    default: the model's config without options, to which only an option can have added a difference.
    """
    if not config.init.model or (config.run_dir and complete_checkpoints(config.run_dir)):
        return
    pretrained = DAVAEConfig.from_json(_source_folder(config.init.model) / CONFIG_FILE)
    given, default, pretrained = (dataclasses.asdict(each) for each in (config.model, default, pretrained))
    for section, values in given.items():
        fields = values if isinstance(values, dict) else {None: values}
        for field in fields:
            old, new, source = (
                each[section] if field is None else each[section][field] for each in (default, given, pretrained)
            )
            if new not in (old, source) and field not in DROPOUT_FIELDS.get(section, ()):
                name = section if field is None else f"{section}.{field}"
                raise OptionError(
                    f"--model.{name.replace('_', '-')}",
                    f"is {new}, but {source} in {config.init.model}, which --init.model takes over whole",
                )


def _source_folder(source: str) -> Path:
    """Returns the folder of config.json and the tokenizers of a model."""
    return config_folder(resolve_source(source))


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
