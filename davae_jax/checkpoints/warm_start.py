"""Makes a checkpoint whose encoder comes from a BERT and/or whose decoder comes from a Transformer-XL.

    python -m convert.warm_start DST --encoder BERT --decoder TRANSFORMER_XL

BERT is a Hugging Face checkpoint, with bare names or with the prefix `bert.`; TRANSFORMER_XL has the layout of the
Fengshenbang Transformer-XL 1.1B. Both layouts are the published one (`published_names.py`) without a prefix. Loaded
weights keep their dtype; the rest is initialized randomly as in a new model, in float32.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from functools import partial
from itertools import accumulate
from pathlib import Path
from typing import NamedTuple

import jax
import numpy as np

from davae_jax.checkpoints.check_weights import converted_problems
from davae_jax.checkpoints.hub import resolve_source
from davae_jax.checkpoints.published import torch_file
from davae_jax.checkpoints.published.from_torch import write_params
from davae_jax.checkpoints.published.published_names import INV_FREQ, NameRow, name_table
from davae_jax.checkpoints.published.published_state import check_tensors
from davae_jax.checkpoints.run_folder import CONFIG_FILE
from davae_jax.checkpoints.staging import copy_files, staged_folder
from davae_jax.checkpoints.weights import FlatParams, flat_params
from davae_jax.model.config import DAVAEConfig, read_json
from davae_jax.model.davae import DAVAE, InitKeys
from davae_jax.tokenizers.load import TOKENIZER_FILES
from davae_jax.utils.errors import ConfigError, InputError, OptionError

# Fields of a section that are absent from the sources' configs: neither BERT nor Transformer-XL has a latent.
NOT_IN_SOURCE_CONFIGS = ("latent_initializer_scale",)
# The default config: the published sizes and sampling settings.
PUBLISHED_SETTINGS = DAVAEConfig(top_k=0, top_p=0.9, repetition_penalty=2.0, std_scale=1.5)
# BERT checkpoints from 2018 have older names.
LEGACY_NAMES = {"LayerNorm.gamma": "LayerNorm.weight", "LayerNorm.beta": "LayerNorm.bias"}


class SourceLayout(NamedTuple):
    """How the names in a source's file differ from the published ones. The fields contain names without any prefix."""

    model_kind: str
    published_prefix: str  # prefix of the source's names in the published file
    source_prefix: str  # prefix that the names may have in the source's file
    absent: tuple[str, ...]  # weights that only the text VAE has
    optional: tuple[str, ...]  # weights that a source may lack, either all of them or none
    buffers: tuple[str, ...] = ()  # tensors that are not read


SOURCE_LAYOUTS = {
    "encoder": SourceLayout(
        "BERT",
        published_prefix="vae_model.encoder.",
        source_prefix="bert.",
        absent=("linear.weight",),
        optional=("pooler.dense.weight", "pooler.dense.bias"),
        buffers=("embeddings.position_ids", "embeddings.token_type_ids"),
    ),
    "decoder": SourceLayout(
        "Transformer-XL",
        published_prefix="vae_model.decoder.",
        source_prefix="",
        absent=("transformer.linear_emb.weight",),
        optional=("transformer.position_embeddings.inv_freq",),
    ),
}


class SourceWeights(NamedTuple):
    """The weights that were read from one source."""

    arrays: dict[str, np.ndarray]  # path in the model → array in the file's dtype, memory-mapped
    unused: list[str]  # names of the file's other tensors: heads that do not exist in the text VAE


class WarmStartReport(NamedTuple):
    """The origin of each weight of a new checkpoint, as paths in the model."""

    loaded: dict[str, list[str]]  # by source, "encoder" and "decoder"
    unused: dict[str, list[str]]  # by source; names in its file
    initialized: list[str]  # newly initialized


def warm_start(
    dst: str | Path,
    *,
    encoder: str | Path | None = None,
    decoder: str | Path | None = None,
    config: str | Path | None = None,
    latent_size: int | None = None,
    seed: int = 0,
    overwrite: bool = False,
) -> WarmStartReport:
    """Writes a checkpoint in the layout of `from_torch.convert`, which appears at `dst` only when it is complete.

    Args:
      encoder, decoder: folders or Hugging Face repo ids of a BERT and of a Transformer-XL, each with its config.json.
        The tokenizer file of each is copied if it exists.
      config: a complete config.json, for the settings that the sources' configs lack; default: the published ones.
      latent_size: L; default: the config's.
      seed: random seed of the weights that neither source has; they equal those of a new model with this seed.

    Raises:
      InputError: neither source is given, `dst` exists, or a source does not fit its config.json; one message lists all
        missing, unexpected, misshapen and non-finite tensors of both.
    """
    if encoder is None and decoder is None:
        raise OptionError("--encoder", "or --decoder is required")
    if latent_size is not None and latent_size < 1:
        raise OptionError("--latent-size", f"must be at least 1, not {latent_size}")
    given = {"encoder": encoder, "decoder": decoder}
    folders = {component: resolve_source(source) for component, source in given.items() if source is not None}
    davae_config = _combined_config(folders, config, latent_size)
    dst = Path(dst)
    sources = [*folders.values()]
    with staged_folder(dst, overwrite=overwrite, sources=sources, read_back=converted_problems) as staging:
        table = name_table(davae_config)
        source_weights = _read_sources(folders, table)
        arrays: FlatParams = {
            path: array for source in source_weights.values() for path, array in source.arrays.items()
        }
        table = [row for row in table if row.name != INV_FREQ or row.path in arrays]
        initialized = [row.path for row in table if row.path not in arrays]

        def load_group(rows: list[NameRow]) -> FlatParams:
            loaded = {row.path: arrays[row.path] for row in rows if row.path in arrays}
            return loaded | initialize_weights(davae_config, [row.path for row in rows if row.path not in loaded], seed)

        buffers = ["inv_freq"] if any(row.name == INV_FREQ for row in table) else []
        write_params(staging, table, load_group, buffers=buffers, label=f"→ {dst.name}")
        davae_config.to_json(staging / CONFIG_FILE)
        for component, name in zip(SOURCE_LAYOUTS, TOKENIZER_FILES, strict=True):
            if component in folders:
                copy_files([name], folders[component], staging)
    return WarmStartReport(
        {component: list(source.arrays) for component, source in source_weights.items()},
        {component: source.unused for component, source in source_weights.items()},
        initialized,
    )


def initialize_weights(config: DAVAEConfig, paths: Collection[str], seed: int) -> dict[str, jax.Array]:
    """Returns the weights at `paths` of a new model, in float32."""
    return _initialize_weights(config, tuple(paths), jax.random.key(seed)) if paths else {}


@partial(jax.jit, static_argnums=(0, 1))
def _initialize_weights(config: DAVAEConfig, paths: tuple[str, ...], key: jax.Array) -> dict[str, jax.Array]:
    params = flat_params(DAVAE(config, rngs=InitKeys(key)))
    return {path: params[path] for path in paths}  # the compiler removes the sampling of all other weights


def covering_modules(chosen: Collection[str], all_paths: Collection[str]) -> list[str]:
    """Returns the shortest list of modules that contain all chosen paths and no other path."""
    names: dict[str, None] = {}
    others = [path for path in all_paths if path not in chosen]
    for path in chosen:
        modules = accumulate(path.split("."), "{}.{}".format)  # a, a.b, a.b.c
        names[next(m for m in modules if m == path or not any(p.startswith(m + ".") for p in others))] = None
    return list(names)


def format_report(report: WarmStartReport, sources: Mapping[str, str | None]) -> str:
    """Formats the report as a few lines: loaded weights, unused tensors, newly initialized weights."""
    all_paths = [path for paths in (*report.loaded.values(), report.initialized) for path in paths]
    lines = []
    for component, paths in report.loaded.items():
        modules = ", ".join(covering_modules(paths, all_paths))
        lines.append(f"{component}: {len(paths)} weights from {sources[component]}: {modules}")
        if unused := report.unused[component]:
            heads = dict.fromkeys(name.split(".")[0] for name in unused)
            lines.append(f"{component}: {len(unused)} tensors of the source ignored: {', '.join(heads)}")
    names = covering_modules(report.initialized, all_paths)
    return "\n".join([*lines, f"newly initialized: {len(report.initialized)} weights: {', '.join(names)}"])


def _read_sources(folders: dict[str, Path], published: list[NameRow]) -> dict[str, SourceWeights]:
    """Reads all sources before it raises one InputError for the problems of all of them."""
    weights, problems = {}, []
    for component, folder in folders.items():
        try:
            weights[component] = _read_source(component, folder, published)
        except InputError as e:
            problems.append(e)
    if problems:
        raise InputError("; ".join(map(str, problems)))
    return weights


def _read_source(component: str, folder: Path, published: list[NameRow]) -> SourceWeights:
    layout, path = SOURCE_LAYOUTS[component], torch_file.find_weights_file(folder)
    state = torch_file.read_tensors(path)
    table = _source_rows(layout, published)
    prefix = layout.source_prefix if any(name.startswith(layout.source_prefix) for name in state) else ""
    roots = {row.name.split(".")[0] for row in table}
    file_names = {}  # name in the table → name in the file
    for file_name in state:
        name = file_name.removeprefix(prefix)
        if file_name.startswith(prefix) and name.split(".")[0] in roots:
            for legacy, current in LEGACY_NAMES.items():
                name = name.replace(legacy, current)
            file_names[name] = file_name
    if not file_names:
        raise InputError(f"{path}: contains no {layout.model_kind}: tensor {table[0].name} is missing")
    if not any(name in file_names for name in layout.optional):
        table = [row for row in table if row.name not in layout.optional]
    # From here on, names are those of the file, so that messages show them.
    table = [row._replace(name=file_names.get(row.name, prefix + row.name)) for row in table]
    unused = [name for name in state if name not in file_names.values()]
    check_tensors(state, table, path, ignored=[*unused, *(file_names.get(name, name) for name in layout.buffers)])
    return SourceWeights({row.path: row.to_model(state[row.name]) for row in table}, unused)


def _source_rows(layout: SourceLayout, published: list[NameRow]) -> list[NameRow]:
    """Returns the rows of the published table that a source may have, with the source's names."""
    table = [
        row._replace(name=row.name.removeprefix(layout.published_prefix))
        for row in published
        if row.name.startswith(layout.published_prefix)
    ]
    return [row for row in table if row.name not in layout.absent]


def _combined_config(folders: dict[str, Path], config: str | Path | None, latent_size: int | None) -> DAVAEConfig:
    """Returns a DAVAE's config whose sections are the sources' configs."""
    values = (PUBLISHED_SETTINGS if config is None else DAVAEConfig.from_json(config)).to_dict()
    if latent_size is not None:
        values["latent_size"] = latent_size
    for component, folder in folders.items():
        path = folder / CONFIG_FILE
        latent_settings = {name: value for name, value in values[component].items() if name in NOT_IN_SOURCE_CONFIGS}
        values[component] = latent_settings | read_json(path)
        try:
            DAVAEConfig.from_dict(values)
        except ConfigError as e:  # the source's config.json has no sections
            section = "" if e.section == component else e.section
            raise ConfigError(section, e.field, e.reason, file=path) from None
    if "latent_size" in values["decoder"]:  # published configs repeat it there
        values["decoder"] = values["decoder"] | {"latent_size": values["latent_size"]}
    return DAVAEConfig.from_dict(values)
