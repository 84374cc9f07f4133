"""A new checkpoint whose encoder comes from a BERT and/or whose decoder comes from a Transformer-XL.

    python -m convert.warm_start DST --encoder BERT --decoder TRANSFORMER_XL

BERT is a Hugging Face checkpoint, its names bare or behind `bert.`; TRANSFORMER_XL is one in the layout of the
Fengshenbang Transformer-XL 1.1B. Both layouts are the published one (`names.py`) less a prefix. Taken weights keep
their dtype; what neither source holds is drawn by the model's own initializers, in float32.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from functools import partial
from itertools import accumulate
from pathlib import Path
from typing import NamedTuple

import jax
import numpy as np

from davae_jax.checkpoints import torch_file
from davae_jax.checkpoints.from_torch import write_params
from davae_jax.checkpoints.hub import resolve_source
from davae_jax.checkpoints.published_names import INV_FREQ, NameRow, name_table
from davae_jax.checkpoints.published_state import check_tensors
from davae_jax.checkpoints.run_folder import CONFIG_FILE
from davae_jax.checkpoints.staging import copy_files, staged_folder
from davae_jax.checkpoints.weights import FlatParams, flat_params
from davae_jax.model.config import DAVAEConfig, read_json
from davae_jax.model.davae import DAVAE, InitKeys
from davae_jax.tokenizers.load import TOKENIZER_FILES
from davae_jax.utils.errors import InputError

NOT_IN_SOURCE_CONFIGS = ("latent_initializer_scale",)  # of a part's config: a half has nothing to do with a latent
# What a new model samples with, unless --config says otherwise: the published checkpoint's settings.
PUBLISHED_SETTINGS = DAVAEConfig(top_k=0, top_p=0.9, repetition_penalty=2.0, std_scale=1.5)


class SourceLayout(NamedTuple):
    """How a source's names differ from the published ones."""

    model_kind: str
    published_prefix: str  # what the published file has before a source's names
    prefix: str  # what a source may have before its names
    absent: tuple[str, ...]  # the text VAE's own; all names here are without either prefix
    optional: tuple[str, ...]  # all together
    buffers: tuple[str, ...] = ()  # carry nothing


SOURCE_LAYOUTS = {
    "encoder": SourceLayout(
        "BERT",
        "vae_model.encoder.",
        "bert.",
        absent=("linear.weight",),
        optional=("pooler.dense.weight", "pooler.dense.bias"),
        buffers=("embeddings.position_ids", "embeddings.token_type_ids"),
    ),
    "decoder": SourceLayout(
        "Transformer-XL",
        "vae_model.decoder.",
        "",
        absent=("transformer.linear_emb.weight",),
        optional=("transformer.position_embeddings.inv_freq",),
    ),
}
LEGACY_NAMES = {"LayerNorm.gamma": "LayerNorm.weight", "LayerNorm.beta": "LayerNorm.bias"}  # of BERTs from 2018


class SourceWeights(NamedTuple):
    """What a source gave."""

    arrays: dict[str, np.ndarray]  # path in the model → array in the file's dtype, mapped from the file
    unused: list[str]  # names in the file: heads that the text VAE has no place for


class WarmStartReport(NamedTuple):
    """Where each weight of a new checkpoint comes from, as paths in the model."""

    loaded: dict[str, list[str]]  # of "encoder" and "decoder", those that were given
    unused: dict[str, list[str]]  # likewise; names in the source's file
    initialized: list[str]


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
    """Writes a checkpoint, in the layout of `from_torch.convert`; it appears at `dst` only when it is complete.

    Args:
      encoder, decoder: folder or Hugging Face repo id of a BERT and of a Transformer-XL, each with its config.json; the
        tokenizers' files are copied where a source has them.
      config: a full config.json, for all that the sources' own do not say; by default the published settings.
      latent_size: L; by default the config's.
      seed: of what neither source holds. The draws are those of a new model with this seed.

    Raises:
      InputError: neither source is given, `dst` exists, or a source does not fit its config.json: all missing,
        unexpected, misshapen and non-finite tensors of both in one message.
    """
    if encoder is None and decoder is None:
        raise InputError("neither --encoder nor --decoder is given; there is nothing to start from", exit_code=2)
    if latent_size is not None and latent_size < 1:
        raise InputError(f"--latent-size must be at least 1, not {latent_size}", exit_code=2)
    given = {"encoder": encoder, "decoder": decoder}
    folders = {part: resolve_source(source) for part, source in given.items() if source is not None}
    davae_config = _combined_config(folders, config, latent_size)
    dst = Path(dst)
    with staged_folder(dst, overwrite=overwrite, sources=[*folders.values()]) as staging:
        table = name_table(davae_config)
        loaded = _read_sources(folders, table)
        arrays: FlatParams = {path: array for part in loaded.values() for path, array in part.arrays.items()}
        table = [row for row in table if row.name != INV_FREQ or row.path in arrays]
        initialized = [row.path for row in table if row.path not in arrays]

        def arrays_of(group):
            found = {row.path: arrays[row.path] for row in group if row.path in arrays}
            return found | initialize_weights(davae_config, [row.path for row in group if row.path not in found], seed)

        buffers = ["inv_freq"] if any(row.name == INV_FREQ for row in table) else []
        write_params(staging, table, arrays_of, buffers=buffers, label=f"→ {dst.name}")
        davae_config.to_json(staging / CONFIG_FILE)
        for part, name in zip(SOURCE_LAYOUTS, TOKENIZER_FILES, strict=True):
            if part in folders:
                copy_files([name], folders[part], staging)
    return WarmStartReport(
        {part: list(from_source.arrays) for part, from_source in loaded.items()},
        {part: from_source.unused for part, from_source in loaded.items()},
        initialized,
    )


def read_encoder(folder: Path, config: DAVAEConfig) -> dict[str, np.ndarray]:
    """A BERT's weights by their paths in the model ("encoder.word.weight"); the pooler's may be absent.

    Raises:
      InputError: the file is damaged or does not fit `config.encoder`; all that is wrong in one message.
    """
    return _read_source("encoder", folder, name_table(config)).arrays


def read_decoder(folder: Path, config: DAVAEConfig) -> dict[str, np.ndarray]:
    """A Transformer-XL's weights by their paths in the model; `decoder.inv_freq` may be absent.

    Raises:
      InputError: the file is damaged or does not fit `config.decoder`; all that is wrong in one message.
    """
    return _read_source("decoder", folder, name_table(config)).arrays


def initialize_weights(config: DAVAEConfig, paths: Collection[str], seed: int) -> dict[str, jax.Array]:
    """The weights at `paths` of a new model, in float32."""
    return _initialize_weights(config, tuple(paths), jax.random.key(seed)) if paths else {}


@partial(jax.jit, static_argnums=(0, 1))
def _initialize_weights(config: DAVAEConfig, paths: tuple[str, ...], key: jax.Array) -> dict[str, jax.Array]:
    params = flat_params(DAVAE(config, rngs=InitKeys(key)))
    return {path: params[path] for path in paths}  # the compiler drops the draws of all others


def covering_modules(chosen: Collection[str], every: Collection[str]) -> list[str]:
    """The fewest module names that stand for the chosen paths and for none of the others."""
    names: dict[str, None] = {}
    others = [path for path in every if path not in chosen]
    for path in chosen:
        levels = accumulate(path.split("."), "{}.{}".format)
        names[next(m for m in levels if m == path or not any(p.startswith(m + ".") for p in others))] = None
    return list(names)


def format_report(report: WarmStartReport, sources: Mapping[str, str | None]) -> str:
    """What was taken from each source, what of it was left out, and what is freshly drawn; a few lines."""
    every = [path for paths in (*report.loaded.values(), report.initialized) for path in paths]
    lines = []
    for part, paths in report.loaded.items():
        lines.append(f"{part}: {len(paths)} weights from {sources[part]}: {', '.join(covering_modules(paths, every))}")
        if unused := report.unused[part]:
            heads = dict.fromkeys(name.split(".")[0] for name in unused)
            lines.append(f"{part}: {len(unused)} tensors of the source left out: {', '.join(heads)}")
    names = covering_modules(report.initialized, every)
    return "\n".join([*lines, f"freshly drawn: {len(report.initialized)} weights: {', '.join(names)}"])


def _read_sources(folders: dict[str, Path], published: list[NameRow]) -> dict[str, SourceWeights]:
    loaded, problems = {}, []
    for part, folder in folders.items():
        try:
            loaded[part] = _read_source(part, folder, published)
        except InputError as e:
            problems.append(e)
    if problems:
        raise InputError("; ".join(map(str, problems)))
    return loaded


def _read_source(part: str, folder: Path, published: list[NameRow]) -> SourceWeights:
    layout, path = SOURCE_LAYOUTS[part], torch_file.find_weights_file(folder)
    state = torch_file.read_tensors(path)
    table = _source_rows(layout, published)
    prefix = layout.prefix if any(name.startswith(layout.prefix) for name in state) else ""
    roots = {row.name.split(".")[0] for row in table}
    own_names = {}  # without prefix, as the table has them → in the file
    for name in state:
        own_name = name.removeprefix(prefix)
        if name.startswith(prefix) and own_name.split(".")[0] in roots:
            for legacy, today in LEGACY_NAMES.items():
                own_name = own_name.replace(legacy, today)
            own_names[own_name] = name
    if not own_names:
        raise InputError(f"{path}: holds no {layout.model_kind}: no tensor is called {table[0].name}")
    if not any(name in own_names for name in layout.optional):
        table = [row for row in table if row.name not in layout.optional]
    # From here on by the file's own names, which are what a message should give.
    table = [row._replace(name=own_names.get(row.name, prefix + row.name)) for row in table]
    unused = [name for name in state if name not in own_names.values()]
    check_tensors(state, table, path, ignored=[*unused, *(own_names.get(name, name) for name in layout.buffers)])
    return SourceWeights({row.path: row.to_model(state[row.name]) for row in table}, unused)


def _source_rows(layout: SourceLayout, published: list[NameRow]) -> list[NameRow]:
    """The part of the published table that a source holds, under the source's names."""
    table = [
        row._replace(name=row.name.removeprefix(layout.published_prefix))
        for row in published
        if row.name.startswith(layout.published_prefix)
    ]
    return [row for row in table if row.name not in layout.absent]


def _combined_config(folders: dict[str, Path], config: str | Path | None, latent_size: int | None) -> DAVAEConfig:
    """The sources' own configs as the sections of a DAVAE's."""
    values = (PUBLISHED_SETTINGS if config is None else DAVAEConfig.from_json(config)).to_dict()
    if latent_size is not None:
        values["latent_size"] = latent_size
    for part, folder in folders.items():
        path = folder / CONFIG_FILE
        ours = {name: value for name, value in values[part].items() if name in NOT_IN_SOURCE_CONFIGS}
        values[part] = ours | read_json(path)
        try:
            DAVAEConfig.from_dict(values)
        except InputError as e:
            raise InputError(f"{path}: {str(e).removeprefix('config: ').replace(f'{part}.', '')}") from None
    if "latent_size" in values["decoder"]:  # published configs repeat it there
        values["decoder"] = values["decoder"] | {"latent_size": values["latent_size"]}
    return DAVAEConfig.from_dict(values)
