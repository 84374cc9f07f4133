"""The files that are read: for each family, where its sound files are, how they are read, and by which programs."""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

RUN_OPTIONS = (
    "--steps 2 --batch-size 4 --data.buckets 1 --data.max-length 16 --log.every 1 --log.samples 0 --log.figures 0"
)
RUN_OPTIONS += " --model.latent-size 4 --model.encoder.hidden-size 16 --model.encoder.num-hidden-layers 1"
RUN_OPTIONS += " --model.encoder.intermediate-size 16 --model.decoder.hidden-size 16 --model.decoder.num-layers 1"
RUN_OPTIONS += " --model.max-out-length 12"
RUN_OPTIONS = RUN_OPTIONS.split()
TEXT = "今天天气很好"
TRAIN = ("train", *RUN_OPTIONS, "--data.train")


class Family(NamedTuple):
    """A kind of file that is read.

    Attributes:
      source: the sound folder that contains the file; a case gets a copy of it.
      files: patterns of the files that are damaged, relative to that folder.
      structure: what the files contain (`mutations.damage`).
      read: reads a folder, and returns what has been read.
      programs: command lines that read it; {in} is the folder, {file} the damaged file, {out} a folder or file to make.
      has_sums: whether the format has sums, so that no damage may go unnoticed.
      may_write: files and folders that reading may change.
      share: how many inputs it gets, relative to others.
    """

    source: str
    files: tuple[str, ...]
    structure: str
    read: Callable[[Path, Path], Any]
    programs: tuple[tuple[str, ...], ...] = ()
    has_sums: bool = False
    may_write: tuple[str, ...] = ()
    share: int = 6


def digest(values: Any) -> str:
    """Returns a hash of nested values and arrays, to compare what was read with what the sound files contain."""
    sha = hashlib.sha256()

    def add(value: Any) -> None:
        if isinstance(value, dict):
            for key in sorted(value, key=str):
                add(key)
                add(value[key])
        elif isinstance(value, list | tuple):
            sha.update(f"{len(value)} values".encode())
            for item in value:
                add(item)
        elif hasattr(value, "dtype"):
            array = np.ascontiguousarray(value)
            sha.update(f"{array.dtype} {array.shape}".encode() + array.tobytes())
        else:
            sha.update(repr(value).encode("utf-8", "surrogatepass"))

    add(values)
    return sha.hexdigest()


# Readers: each is what a program does with the file, without the rest of the program.


def read_model_config(folder: Path, file: Path) -> Any:
    from davae_jax.model.config import DAVAEConfig
    from davae_jax.tokenizers.load import load_tokenizers

    config = DAVAEConfig.from_json(folder / "config.json")
    load_tokenizers(folder, config)
    return config.to_dict()


def read_tokenizers(folder: Path, file: Path) -> Any:
    from davae_jax.model.config import DAVAEConfig
    from davae_jax.tokenizers.load import load_tokenizers

    encoder, decoder = load_tokenizers(folder, DAVAEConfig.from_json(folder / "config.json"))
    ids = decoder.encode(TEXT)
    return encoder.encode([TEXT, "x"]), ids, decoder.decode(ids)


def read_published(folder: Path, file: Path) -> Any:
    from davae_jax.checkpoints.published.published_state import read_published_weights
    from davae_jax.model.config import DAVAEConfig

    return dict(read_published_weights(folder, DAVAEConfig.from_json(folder / "config.json")))


def read_params(folder: Path, file: Path) -> Any:
    from davae_jax.checkpoints.weights import load_weights
    from davae_jax.model.config import DAVAEConfig

    return load_weights(folder / "params", _targets(DAVAEConfig.from_json(folder / "config.json")))


@functools.cache
def _targets(config: Any) -> Any:
    import jax

    from davae_jax.checkpoints.weights import flat_params
    from davae_jax.model.davae import abstract_model

    device = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    weights = flat_params(abstract_model(config)).items()
    return {path: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=device) for path, x in weights}


def read_checkpoint(folder: Path, file: Path) -> Any:
    import jax

    from davae_jax.training.run.checkpointer import Checkpoints

    state, extra = Checkpoints(folder, keep=2).restore(_abstract_state((folder / "config.json").read_bytes(), folder))
    return [np.asarray(leaf) for leaf in jax.tree.leaves(state)], extra


@functools.lru_cache(maxsize=1)
def _abstract_state(config: bytes, folder: Path) -> Any:
    """Returns the abstract state of the sound run, which is computed once in a process."""
    import jax

    from davae_jax.model.config import DAVAEConfig
    from davae_jax.model.davae import abstract_model
    from davae_jax.training.state import abstract_state

    axes = ("data", "fsdp", "tensor")
    mesh = jax.make_mesh((1, 1, 1), axes, axis_types=(jax.sharding.AxisType.Auto,) * 3, devices=jax.devices()[:1])
    return abstract_state(abstract_model(DAVAEConfig.from_json(folder / "config.json")), _run_config(), mesh)


def read_run(folder: Path, file: Path) -> Any:
    from davae_jax.data.corpus import read_corpus
    from davae_jax.training.run.folder import open_run
    from davae_jax.utils.locks import FolderLock

    config = _run_config()
    with FolderLock() as lock:
        open_run(folder, config, read_corpus(config.data.train), lock)


@functools.cache
def _run_config() -> Any:
    from davae_jax.cli.train import parse_train

    return parse_train([*RUN_OPTIONS, "--data.train", "../texts/a.txt", "--tokenizers", "../model"])[1]


def read_log(folder: Path, file: Path) -> Any:
    from davae_jax.training.run.log import JsonLinesFile

    JsonLinesFile(file, 10**9).close()
    return file.read_bytes()


def read_prepared(folder: Path, file: Path) -> Any:
    from davae_jax.data.packing import PackedBatches
    from davae_jax.data.prepared.shard_batches import PreparedTexts, ShardBatches
    from davae_jax.data.prepared.shards import Prepared

    prepared = Prepared(folder)
    options = dict(batch_size=8, pad_id=301, seed=0)
    batches = ShardBatches(prepared, max_length=30, buckets=2, encoder_positions=32, **options)
    packed = PackedBatches(PreparedTexts(prepared, 30, 32), row_length=30, **options)
    read = [list(batches.batch(step)) for step in range(batches.steps_per_epoch)]
    records = [prepared[i] for i in range(len(prepared))]
    return records, prepared.held_out(), prepared.describe_lines([0, 1]), read, list(packed.batch(0))


def read_unfinished(folder: Path, file: Path) -> Any:
    """Continues a preparation that was interrupted after its last shard."""
    from davae_jax.data.prepared.build_shards import build_shards
    from davae_jax.data.prepared.shard_writer import ShardSettings

    settings = ShardSettings(
        fields=("text",), max_length=512, encoder_positions=512, truncate=False, held_out=0.1, shard_size=None
    )
    return build_shards([Path("../texts/a.txt")], folder, settings, Path("../model"), 1)


def read_texts(folder: Path, file: Path) -> Any:
    from davae_jax.data.inputs.readers import find_files, read_slice, split_into_slices
    from davae_jax.data.inputs.readers import read_texts as read_all

    if file.name == "state.json":
        return [path.name for path in find_files([folder])]
    for file_slice in split_into_slices(file, 4000):
        for _ in read_slice(file_slice, ["text"]):
            pass
    return read_all(file)


def read_study(folder: Path, file: Path) -> Any:
    from davae_jax.cli.compare import read_study as read

    return read(file)


def read_settings(folder: Path, file: Path) -> Any:
    from davae_jax.cli.train import parse_train

    return repr(parse_train(["--config", str(file)])[1])


def read_latents(folder: Path, file: Path) -> Any:
    from davae_jax.inference.latent_files import read_latents as read

    return read(file, 4)


MODEL = ("reconstruct", TEXT, "--model", "{in}")
SETTINGS = ("--config", "{file}", "--tokenizers", "../model", "--run-dir", "{out}")
DECODE = ("decode", "--latents", "{file}", "--model", "../model", "--max-length", "4")
FAMILIES = {
    "config.json": Family("model", ("config.json",), "json", read_model_config, (MODEL, ("export", "{in}", "{out}"))),
    "vocab.txt": Family("model", ("vocab.txt",), "lines", read_tokenizers, (MODEL,)),
    "spiece.model": Family("model", ("spiece.model",), "bytes", read_tokenizers, (MODEL,)),
    "converted params": Family(
        "model",
        ("params/**/*",),
        "bytes",
        read_params,
        (MODEL, ("export", "{in}", "{out}", "--format", "safetensors")),
        has_sums=True,
        share=1,
    ),
    "model.safetensors": Family(
        "safetensors", ("model.safetensors",), "bytes", read_published, (("convert", "{in}", "{out}"), MODEL), share=3
    ),
    "pytorch_model.bin": Family(
        "bin",
        ("pytorch_model.bin",),
        "bytes",
        read_published,
        (("convert", "{in}", "{out}"), MODEL),
        has_sums=True,
        share=6,
    ),
    "index.json": Family("parts", ("*.index.json",), "json", read_published, (("convert", "{in}", "{out}"),), share=2),
    "warm-start sources": Family(
        "bert",
        ("config.json", "model.safetensors"),
        "json",
        lambda folder, file: None,
        (("warm-start", "{out}", "--encoder", "{in}", "--config", "../model/config.json"),),
        share=0,
    ),
    "run checkpoint": Family(
        "run",
        ("checkpoints/2/**/*",),
        "bytes",
        read_checkpoint,
        ((*TRAIN, "../texts/a.txt", "--run-dir", "{in}"), MODEL),
        has_sums=True,
        may_write=("checkpoints", "*.json", "vocab.txt", "spiece.model", "events", "*.jsonl"),
        share=1,
    ),
    "train.json": Family(
        "run",
        ("train.json",),
        "json",
        read_run,
        ((*TRAIN, "../texts/a.txt", "--run-dir", "{in}"),),
        may_write=("*.json", "vocab.txt", "spiece.model", "*.jsonl", "events", "checkpoints"),
        share=4,
    ),
    "logs of a run": Family(
        "run",
        ("*.jsonl",),
        "jsonl",
        read_log,
        ((*TRAIN, "../texts/a.txt", "--run-dir", "{in}"),),
        may_write=("*.jsonl", "*.json", "events", "checkpoints"),
    ),
    "manifest.json": Family(
        "prepared", ("manifest.json",), "json", read_prepared, ((*TRAIN, "{in}", "--run-dir", "{out}"),), share=3
    ),
    "arrays": Family(
        "prepared", ("*.npy",), "bytes", read_prepared, ((*TRAIN, "{in}", "--run-dir", "{out}"),), share=3
    ),
    "shards": Family(
        "prepared",
        ("*.arrayrecord",),
        "bytes",
        read_prepared,
        ((*TRAIN, "{in}", "--run-dir", "{out}"),),
        has_sums=True,
        share=3,
    ),
    "held_out.jsonl": Family(
        "prepared", ("held_out.jsonl",), "jsonl", read_prepared, ((*TRAIN, "{in}", "--run-dir", "{out}"),), share=2
    ),
    "unfinished preparation": Family(
        "unfinished",
        ("prepare.json", "parts/*.json", "parts/*.jsonl", "*.npy"),
        "json",
        read_unfinished,
        may_write=("*",),
        share=3,
    ),
    "study": Family(
        "study",
        ("study.toml",),
        "toml",
        read_study,
        (("compare", "{file}", "--output", "done"),),
        may_write=("done",),
        share=1,
    ),
    "settings": Family(
        "settings", ("settings.toml",), "toml", read_settings, ((*TRAIN, "../texts/a.txt", *SETTINGS),), share=1
    ),
    "latents": Family("latents", ("z.*",), "bytes", read_latents, (DECODE,), share=1),
}
PREPARE = ("prepare", "--input", "{file}", "--output", "{out}", "--workers", "1", "--tokenizers", "../model")
for _name, _structure, _sums in [
    ("a.txt", "lines", False),
    ("a.jsonl", "jsonl", False),
    ("array.json", "json", False),
    ("a.txt.gz", "bytes", True),
    ("a.jsonl.zst", "bytes", False),
    ("a.parquet", "bytes", False),
    ("a.arrow", "bytes", False),
]:
    _evaluate = ("evaluate", "--model", "../model", "--data", "{file}", "--n", "4", "--samples", "2")
    FAMILIES[_name] = Family("texts", (_name,), _structure, read_texts, (PREPARE, _evaluate), _sums)
FAMILIES["state.json"] = Family("dataset", ("state.json",), "json", read_texts)
FAMILIES["pairs.tsv"] = Family(
    "texts",
    ("pairs.tsv",),
    "lines",
    lambda folder, file: None,
    (("interpolate", "--model", "../model", "--input", "{file}", "--steps", "2"),),
    share=0,
)


def damaged_files(family: Family, folder: Path) -> list[Path]:
    """Returns the files of a family in a sound folder, by path."""
    found = {path for pattern in family.files for path in folder.glob(pattern) if path.is_file()}
    return sorted(path for path in found if path.stat().st_size)


def other_data(sound: Path, families: Iterable[Family]) -> list[Path]:
    """Returns files of all families, for splices."""
    return [path for family in families for path in damaged_files(family, sound / family.source)]
