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
from davae_jax.checkpoints.from_torch import check, write_params
from davae_jax.checkpoints.hub import resolve_source
from davae_jax.checkpoints.published_names import INV_FREQ, NameRow, name_table
from davae_jax.checkpoints.run_folder import CONFIG_FILE
from davae_jax.checkpoints.staging import copy_files, staged_folder
from davae_jax.checkpoints.weights import FlatParams, flat_params
from davae_jax.model.config import DAVAEConfig, read_json
from davae_jax.model.davae import DAVAE, InitKeys
from davae_jax.tokenizers.load import TOKENIZER_FILES
from davae_jax.utils.errors import ConfigError, InputError, OptionError

NO_SOURCE_SAYS = ("latent_initializer_scale",)  # of a part's config: a half has nothing to do with a latent
# What a new model samples with, unless --config says otherwise: the published checkpoint's settings.
PUBLISHED = DAVAEConfig(top_k=0, top_p=0.9, repetition_penalty=2.0, std_scale=1.5)


class Layout(NamedTuple):
    """How a source's names differ from the published ones."""

    kind: str
    stands_at: str  # what the published file has before a source's names
    prefix: str  # what a source may have before its names
    not_in_source: tuple[str, ...]  # the text VAE's own; all names here are without either prefix
    may_lack: tuple[str, ...]  # all together
    buffers: tuple[str, ...] = ()  # carry nothing


LAYOUTS = {
    "encoder": Layout(
        "BERT",
        "vae_model.encoder.",
        "bert.",
        not_in_source=("linear.weight",),
        may_lack=("pooler.dense.weight", "pooler.dense.bias"),
        buffers=("embeddings.position_ids", "embeddings.token_type_ids"),
    ),
    "decoder": Layout(
        "Transformer-XL",
        "vae_model.decoder.",
        "",
        not_in_source=("transformer.linear_emb.weight",),
        may_lack=("transformer.position_embeddings.inv_freq",),
    ),
}
LEGACY_NAMES = {"LayerNorm.gamma": "LayerNorm.weight", "LayerNorm.beta": "LayerNorm.bias"}  # of BERTs from 2018


class Taken(NamedTuple):
    """What a source gave."""

    arrays: dict[str, np.ndarray]  # path in the model → array in the file's dtype, mapped from the file
    left_out: list[str]  # names in the file: heads that the text VAE has no place for


class Report(NamedTuple):
    """Where each weight of a new checkpoint comes from, as paths in the model."""

    taken: dict[str, list[str]]  # of "encoder" and "decoder", those that were given
    left_out: dict[str, list[str]]  # likewise; names in the source's file
    drawn: list[str]


def warm_start(
    dst: str | Path,
    *,
    encoder: str | Path | None = None,
    decoder: str | Path | None = None,
    config: str | Path | None = None,
    latent_size: int | None = None,
    seed: int = 0,
    overwrite: bool = False,
) -> Report:
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
        raise OptionError("--encoder", "or --decoder must be given; there is nothing to start from")
    if latent_size is not None and latent_size < 1:
        raise OptionError("--latent-size", f"must be at least 1, not {latent_size}")
    given = {"encoder": encoder, "decoder": decoder}
    folders = {part: resolve_source(source) for part, source in given.items() if source is not None}
    davae_config = _config_of(folders, config, latent_size)
    dst = Path(dst)
    with staged_folder(dst, overwrite=overwrite, sources=[*folders.values()]) as staging:
        table = name_table(davae_config)
        taken = _read_all(folders, table)
        arrays: FlatParams = {path: array for part in taken.values() for path, array in part.arrays.items()}
        table = [row for row in table if row.name != INV_FREQ or row.path in arrays]
        drawn = [row.path for row in table if row.path not in arrays]

        def arrays_of(group):
            found = {row.path: arrays[row.path] for row in group if row.path in arrays}
            return found | draw(davae_config, [row.path for row in group if row.path not in found], seed)

        buffers = ["inv_freq"] if any(row.name == INV_FREQ for row in table) else []
        write_params(staging, table, arrays_of, buffers=buffers, label=f"→ {dst.name}")
        davae_config.to_json(staging / CONFIG_FILE)
        for part, name in zip(LAYOUTS, TOKENIZER_FILES, strict=True):
            if part in folders:
                copy_files([name], folders[part], staging)
    return Report(
        {part: list(from_source.arrays) for part, from_source in taken.items()},
        {part: from_source.left_out for part, from_source in taken.items()},
        drawn,
    )


def read_encoder(folder: Path, config: DAVAEConfig) -> dict[str, np.ndarray]:
    """A BERT's weights by their paths in the model ("encoder.word.weight"); the pooler's may be absent.

    Raises:
      InputError: the file is damaged or does not fit `config.encoder`; all that is wrong in one message.
    """
    return _read("encoder", folder, name_table(config)).arrays


def read_decoder(folder: Path, config: DAVAEConfig) -> dict[str, np.ndarray]:
    """A Transformer-XL's weights by their paths in the model; `decoder.inv_freq` may be absent.

    Raises:
      InputError: the file is damaged or does not fit `config.decoder`; all that is wrong in one message.
    """
    return _read("decoder", folder, name_table(config)).arrays


def draw(config: DAVAEConfig, paths: Collection[str], seed: int) -> dict[str, jax.Array]:
    """The weights at `paths` of a new model, in float32."""
    return _draw(config, tuple(paths), jax.random.key(seed)) if paths else {}


@partial(jax.jit, static_argnums=(0, 1))
def _draw(config: DAVAEConfig, paths: tuple[str, ...], key: jax.Array) -> dict[str, jax.Array]:
    params = flat_params(DAVAE(config, rngs=InitKeys(key)))
    return {path: params[path] for path in paths}  # the compiler drops the draws of all others


def modules(chosen: Collection[str], every: Collection[str]) -> list[str]:
    """The fewest module names that stand for the chosen paths and for none of the others."""
    names: dict[str, None] = {}
    others = [path for path in every if path not in chosen]
    for path in chosen:
        levels = accumulate(path.split("."), "{}.{}".format)
        names[next(m for m in levels if m == path or not any(p.startswith(m + ".") for p in others))] = None
    return list(names)


def format_report(report: Report, sources: Mapping[str, str | None]) -> str:
    """What was taken from each source, what of it was left out, and what is freshly drawn; a few lines."""
    every = [path for paths in (*report.taken.values(), report.drawn) for path in paths]
    lines = []
    for part, paths in report.taken.items():
        lines.append(f"{part}: {len(paths)} weights from {sources[part]}: {', '.join(modules(paths, every))}")
        if left_out := report.left_out[part]:
            heads = dict.fromkeys(name.split(".")[0] for name in left_out)
            lines.append(f"{part}: {len(left_out)} tensors of the source left out: {', '.join(heads)}")
    return "\n".join([*lines, f"freshly drawn: {len(report.drawn)} weights: {', '.join(modules(report.drawn, every))}"])


def _read_all(folders: dict[str, Path], published: list[NameRow]) -> dict[str, Taken]:
    taken, problems = {}, []
    for part, folder in folders.items():
        try:
            taken[part] = _read(part, folder, published)
        except InputError as e:
            problems.append(e)
    if problems:
        raise InputError("; ".join(map(str, problems)))
    return taken


def _read(part: str, folder: Path, published: list[NameRow]) -> Taken:
    layout, path = LAYOUTS[part], torch_file.find(folder)
    state = torch_file.read(path)
    table = _rows_of(layout, published)
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
        raise InputError(f"{path}: holds no {layout.kind}: no tensor is called {table[0].name}")
    if not any(name in own_names for name in layout.may_lack):
        table = [row for row in table if row.name not in layout.may_lack]
    # From here on by the file's own names, which are what a message should give.
    table = [row._replace(name=own_names.get(row.name, prefix + row.name)) for row in table]
    left_out = [name for name in state if name not in own_names.values()]
    check(state, table, path, ignored=[*left_out, *(own_names.get(name, name) for name in layout.buffers)])
    return Taken({row.path: row.to_model(state[row.name]) for row in table}, left_out)


def _rows_of(layout: Layout, published: list[NameRow]) -> list[NameRow]:
    """The part of the published table that a source holds, under the source's names."""
    table = [
        row._replace(name=row.name.removeprefix(layout.stands_at))
        for row in published
        if row.name.startswith(layout.stands_at)
    ]
    return [row for row in table if row.name not in layout.not_in_source]


def _config_of(folders: dict[str, Path], config: str | Path | None, latent_size: int | None) -> DAVAEConfig:
    """The sources' own configs as the sections of a DAVAE's."""
    values = (PUBLISHED if config is None else DAVAEConfig.from_json(config)).to_dict()
    if latent_size is not None:
        values["latent_size"] = latent_size
    for part, folder in folders.items():
        path = folder / CONFIG_FILE
        ours = {name: value for name, value in values[part].items() if name in NO_SOURCE_SAYS}
        values[part] = ours | read_json(path)
        try:
            DAVAEConfig.from_dict(values)
        except ConfigError as e:  # the source's own config.json has no section
            section = "" if e.section == part else e.section
            raise ConfigError(section, e.field, e.reason, file=path) from None
    if "latent_size" in values["decoder"]:  # published configs repeat it there
        values["decoder"] = values["decoder"] | {"latent_size": values["latent_size"]}
    return DAVAEConfig.from_dict(values)
