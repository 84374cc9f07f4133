"""Checkpoints on disk, and `from_pretrained`.

A converted checkpoint is a folder with the published config.json, the tokenizers' files where the source had them, and
`params/`, an Orbax checkpoint in the source's dtype. What is loaded goes straight to its place on the mesh, cast on the
way.
"""

from __future__ import annotations

import importlib.util
import logging
import re
import sys
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh

from davae_jax.config import DAVAEConfig
from davae_jax.decoder import inverse_frequencies
from davae_jax.errors import InputError, first_line
from davae_jax.model import DAVAE, Params, abstract_model, merge, split, weight_axes
from davae_jax.sharding import weight_sharding

CONFIG_FILE = "config.json"
PARAMS_FOLDER = "params"
CHECKPOINTS_FOLDER = "checkpoints"  # of a run: one folder a step, whose part named "params" holds the weights
TORCH_FILES = ("model.safetensors", "pytorch_model.bin")  # in order of preference: safetensors needs no PyTorch
TOKENIZER_FILES = ("vocab.txt", "spiece.model")
HUB_PATTERNS = [CONFIG_FILE, *TORCH_FILES, *TOKENIZER_FILES, f"{PARAMS_FOLDER}/**"]

FlatParams = dict[str, Any]  # "decoder.layers.3.qkv_weight" → array


def from_pretrained(source: str | Path, *, dtype=jnp.float32, mesh: Mesh | None = None) -> DAVAE:
    """Loads a model.

    Args:
      source: a converted checkpoint; a run folder, of which the newest complete checkpoint is read; one checkpoint of a
        run, `RUN/checkpoints/STEP`; a published folder
        (config.json and pytorch_model.bin, which needs PyTorch, or model.safetensors, which does not); or a Hugging
        Face repo id, downloaded to the hub's cache.
      dtype: what weights are kept and computed in; softmax, LayerNorm and losses are float32 all the same.
      mesh: devices to lay the weights over (axes `data`, `fsdp`, `tensor`); None for the first device alone.

    Raises:
      InputError: nothing there, or what is there does not fit its config.json; the message names the file.
    """
    folder = resolve_source(source)
    config = DAVAEConfig.from_json(home_of(folder) / CONFIG_FILE)
    model = abstract_model(config, dtype=dtype, param_dtype=dtype)
    graphdef, abstract = split(model)
    axes = flatten(weight_axes(model))
    targets = {
        path: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=weight_sharding(axes[path], leaf.shape, mesh))
        for path, leaf in flatten(abstract).items()
    }
    if stored := weights_of(folder):
        arrays = load_arrays(stored, targets)
    else:
        from_torch = converter("from_torch")
        arrays = _place(from_torch.read_arrays(folder, config), targets)
    if (missing := targets.keys() - arrays.keys()) == {"decoder.inv_freq"}:
        # A source without the stored frequencies: the published program computes them, and so does a fresh decoder.
        arrays |= _place([("decoder.inv_freq", inverse_frequencies(config.decoder.hidden_size))], targets)
    elif missing:
        raise InputError(f"{folder}: lacks {', '.join(sorted(missing))}")
    return merge(graphdef, unflatten(arrays))


def weights_of(folder: Path) -> Path | None:
    """Where a folder's weights lie: a converted checkpoint's, or those of a run's newest complete checkpoint."""
    if home_of(folder) != folder:
        return folder
    if (folder / PARAMS_FOLDER).is_dir():
        return folder / PARAMS_FOLDER
    return max(checkpoints_of(folder), key=lambda path: int(path.name), default=None)


def home_of(folder: Path) -> Path:
    """Where config.json and the tokenizers lie: the folder itself, or the run whose checkpoint it is."""
    return folder.absolute().parent.parent if folder.absolute().parent.name == CHECKPOINTS_FOLDER else folder


def checkpoints_of(run: Path) -> list[Path]:
    """The complete checkpoints of a run, each named by its step."""
    from orbax.checkpoint import v1 as ocp

    with quiet():
        paths = (run / CHECKPOINTS_FOLDER).glob("*")
        return [path for path in paths if path.name.isdigit() and ocp.is_orbax_checkpoint(path.absolute())]


def resolve_source(source: str | Path) -> Path:
    """The folder of a model: `source` itself, or where the hub's client put the repo of that id."""
    folder = Path(source)
    if folder.is_dir():
        return folder
    if folder.exists():
        raise InputError(f"{source}: is a file; give the folder that holds {CONFIG_FILE}")
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", str(source)):
        raise InputError(f"{source}: no such folder")
    import huggingface_hub

    try:
        return Path(huggingface_hub.snapshot_download(str(source), allow_patterns=HUB_PATTERNS))
    except Exception as e:  # the client raises a dozen unrelated types: network, authentication, missing repo
        raise InputError(
            f"{source}: no such folder, and not to be had from the Hugging Face hub: {first_line(e)}"
        ) from e


def converter(module: str):
    """A module of the converter package: `convert/` beside this package in a checkout, else `davae_jax_convert`."""
    package = "davae_jax_convert"
    in_checkout = Path(__file__).parent.parent / "convert"
    if package not in sys.modules and (in_checkout / "names.py").is_file():
        spec = importlib.util.spec_from_file_location(
            package, in_checkout / "__init__.py", submodule_search_locations=[str(in_checkout)]
        )
        sys.modules[package] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(sys.modules[package])
    return importlib.import_module(f"{package}.{module}")


def load_arrays(path: Path, targets: Mapping[str, jax.ShapeDtypeStruct]) -> FlatParams:
    """Reads an Orbax checkpoint of weights into the targets' dtypes and shardings. `decoder.inv_freq` may be absent.

    Raises:
      InputError: no complete checkpoint, arrays that do not fit the targets, or values that are not finite.
    """
    from orbax.checkpoint import v1 as ocp

    stored = stored_arrays(path)
    wanted = {p: t for p, t in targets.items() if p in stored or p != "decoder.inv_freq"}
    problems = [f"{p} is missing" for p in wanted if p not in stored]
    problems += [f"{p} is unknown" for p in stored if p not in targets]
    problems += [
        f"{p} is {list(stored[p].shape)}, not {list(t.shape)}"
        for p, t in wanted.items()
        if p in stored and tuple(stored[p].shape) != t.shape
    ]
    if problems:
        raise InputError(f"{path}: does not fit {CONFIG_FILE}: {'; '.join(problems)}")
    with quiet():
        try:
            arrays = flatten(ocp.load(path.absolute(), nest(wanted), checkpointable_name=_part(path)))
        except Exception as e:  # Orbax and TensorStore raise many types for damaged files
            raise InputError(f"{path}: cannot be read ({first_line(e)})") from e
    if bad := [p for p, finite in _are_finite(arrays).items() if not finite]:
        raise InputError(f"{path}: {len(bad)} NaN or infinite: {', '.join(bad)}")
    return arrays


@jax.jit
def _are_finite(arrays: FlatParams) -> FlatParams:
    return jax.tree.map(lambda array: jnp.isfinite(array).all(), arrays)


def stored_arrays(path: Path) -> dict[str, Any]:
    """Shape and dtype of each array of an Orbax checkpoint of weights, by path."""
    return flatten(_metadata(path).metadata)


def stored_extras(path: Path) -> dict[str, Any]:
    """What `save_arrays` was given as `extras`."""
    return _metadata(path).custom_metadata or {}


def save_arrays(path: Path, groups: Iterable[FlatParams], extras: dict[str, Any]) -> None:
    """Writes an Orbax checkpoint group by group, uncompressed, so that no more than a group is held in buffers.

    The caller gives a `path` that does not exist, in a folder of its own: nothing is finished until this returns.
    """
    from orbax.checkpoint import v1 as ocp

    context = ocp.Context()
    context.array.saving.use_compression = False
    with context, quiet():
        for group in groups:
            ocp.partial.save(path.absolute(), nest(group), custom_metadata=extras)
        ocp.partial.finalize(path.absolute())


def flatten(params: Params) -> FlatParams:
    """{"decoder": {"layers": {0: {"qkv_weight": x}}}} → {"decoder.layers.0.qkv_weight": x}"""
    flat = {}
    for name, value in params.items():
        if isinstance(value, Mapping):
            flat.update({f"{name}.{rest}": leaf for rest, leaf in flatten(value).items()})
        else:
            flat[str(name)] = value
    return flat


def unflatten(flat: FlatParams) -> Params:
    """The inverse of `flatten`: the layout `model.split` gives, where layers are numbered by int."""
    return nest(flat, lambda part: int(part) if part.isdigit() else part)


def nest(flat: FlatParams, key=str) -> Params:
    params: Params = {}
    for path, leaf in flat.items():
        *parents, name = (key(part) for part in path.split("."))
        node = params
        for parent in parents:
            node = node.setdefault(parent, {})
        node[name] = leaf
    return params


def _place(
    arrays: Iterable[tuple[str, np.ndarray]] | Iterator, targets: Mapping[str, jax.ShapeDtypeStruct]
) -> FlatParams:
    """Casts each array and puts it on its devices, one at a time."""
    return {p: jax.device_put(np.asarray(a).astype(targets[p].dtype), targets[p].sharding) for p, a in arrays}


def _part(path: Path) -> str:
    """Which part of an Orbax checkpoint the weights are; a run's hold the optimizers' states beside them."""
    return PARAMS_FOLDER if path.parent.name == CHECKPOINTS_FOLDER else "AUTO"


def _metadata(path: Path):
    from orbax.checkpoint import v1 as ocp

    with quiet():
        try:
            metadata = ocp.metadata(path.absolute(), _part(path))
        except Exception as e:  # not a checkpoint, or one that was cut off
            raise InputError(f"{path}: not a complete checkpoint ({first_line(e)})") from e
    if metadata.metadata is None:
        raise InputError(f"{path}: not a complete checkpoint")
    return metadata


class quiet:
    """Orbax logs a few lines a save at WARNING that tell a user nothing to act on."""

    def __enter__(self):
        self.level = logging.getLogger("absl").level
        logging.getLogger("absl").setLevel(logging.CRITICAL)

    def __exit__(self, *_):
        logging.getLogger("absl").setLevel(self.level)


def params_of(model: nnx.Module) -> FlatParams:
    """The model's weights by path."""
    return flatten(split(model)[1])
