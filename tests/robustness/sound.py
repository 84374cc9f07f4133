"""Makes the sound files: a tiny model in every layout, a run, prepared texts, texts in every format."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

from inputs import RUN_OPTIONS

STUDY = """train = "{train}"
evaluate = "--data ../texts/a.txt --n 4 --samples 2"
seeds = [0]

[settings]
"plain" = "--beta.max 0.1"
"capacity" = "--regularizers.capacity.weight 1"
"""
SETTINGS = """seed = 3
plugin = []
[data]
field = ["text"]
[beta]
max = 0.2
shape = "sigmoid"
[log]
profile-steps = [1, 2]
[regularizers.mmd]
weight = 1
"""


def make_sound_files(folder: Path) -> None:
    """Makes all sound folders. They name each other by relative paths, so a copy is used beside the others."""
    import numpy as np
    from input_files import TEXTS, write_input
    from safetensors.numpy import load_file, save_file
    from tiny_checkpoint import make_checkpoint

    folder.mkdir(parents=True)
    model = folder / "model"
    model.mkdir()
    make_checkpoint(model)
    os.chdir(model)  # for relative paths to the folders beside it
    for name in ("bin", "safetensors"):
        _davae("export", model, folder / name, "--format", name, "--dtype", "float32")
    # In two parts with an index.
    parts, state = folder / "parts", load_file(folder / "safetensors" / "model.safetensors")
    shutil.copytree(folder / "safetensors", parts, ignore=lambda *_: ["model.safetensors"])
    names = {f"model-0000{i + 1}-of-00002.safetensors": sorted(state)[i::2] for i in range(2)}
    for file, tensors in names.items():
        save_file({name: state[name] for name in tensors}, parts / file)
    weight_map = {name: file for file, tensors in names.items() for name in tensors}
    (parts / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    # Sources of a warm start.
    values, prefixes = json.loads((model / "config.json").read_text()), {"bert": "vae_model.encoder."}
    for name, prefix in prefixes.items():
        (folder / name).mkdir()
        tensors = {key.removeprefix(prefix): x for key, x in state.items() if key.startswith(prefix)}
        tensors.pop("linear.weight", None)
        save_file({key: np.ascontiguousarray(x) for key, x in tensors.items()}, folder / name / "model.safetensors")
        (folder / name / "config.json").write_text(json.dumps(values["encoder"]))
    # Texts.
    for i, name in enumerate(["txt", "txt.gz", "jsonl", "jsonl.zst", "parquet", "arrow"]):
        write_input(folder / f"format-{i}", name)
    texts = folder / "texts"
    texts.mkdir()
    for file in sorted(folder.glob("format-*/*")):
        if (file.suffix != ".json") and file.name != "README.md":
            suffix = "".join(file.suffixes)
            file.rename(texts / f"a{suffix}")
    array = [{"title": "t", "text": text} for text in TEXTS[:40]]
    (texts / "array.json").write_text(json.dumps(array, ensure_ascii=False), encoding="utf-8")
    (texts / "pairs.tsv").write_text("".join(f"{a}\t{b}\n" for a, b in zip(TEXTS[:3], TEXTS[3:6])), encoding="utf-8")
    for made in folder.glob("format-*"):
        shutil.rmtree(made)
    dataset = folder / "dataset"
    dataset.mkdir()
    shutil.copyfile(texts / "a.arrow", dataset / "data-00000-of-00001.arrow")
    shutil.copyfile(texts / "a.arrow", dataset / "cache-0123.arrow")
    state_values = {"_data_files": [{"filename": "data-00000-of-00001.arrow"}], "_fingerprint": "0"}
    (dataset / "state.json").write_text(json.dumps(state_values))
    # Prepared texts, whole and interrupted before the manifest; a run; a study that is complete.
    options = ["--input", texts / "a.txt", "--workers", 1]
    _davae("prepare", *options, "--output", folder / "prepared", "--tokenizers", model, "--held-out", 0.1)
    _make_unfinished(folder, texts)
    study = folder / "study"
    study.mkdir()
    train = " ".join(["--data.train", "../texts/a.txt", "--tokenizers", "../model", *RUN_OPTIONS])
    (study / "study.toml").write_text(STUDY.format(train=train), encoding="utf-8")
    (study / "one.toml").write_text(STUDY.format(train=train).rpartition('"capacity"')[0], encoding="utf-8")
    _complete(study)
    (folder / "settings").mkdir()
    (folder / "settings" / "settings.toml").write_text(SETTINGS, encoding="utf-8")
    (folder / "latents").mkdir()
    for suffix in ("npz", "parquet"):
        _davae("encode", "--input", texts / "a.txt", "--model", model, "--output", folder / "latents" / f"z.{suffix}")
    np.save(folder / "latents" / "z.npy", np.load(folder / "latents" / "z.npz")["mean"])


def _complete(folder: Path) -> None:
    """Makes the results of the study, so that the command has nothing to train."""
    from davae_jax.cli.compare import read_study

    study = read_study(folder / "study.toml")
    for name, train in study.settings.items():
        run = folder / "done" / name / "seed-0"
        run.mkdir(parents=True)
        options = {"train": train, "evaluate": study.evaluate}
        run.with_name("seed-0.json").write_text(json.dumps(options), encoding="utf-8")
        (run / "evaluation.json").write_text(json.dumps({"kl": 1.0, "rec_nll": 2.0, "iw_nll": 3.0}), encoding="utf-8")


def make_sound_run(folder: Path) -> None:
    """Trains the run, in a process in which JAX has not been initialized."""
    argv = ["--data.train", folder / "texts" / "a.txt", "--run-dir", folder / "run", "--tokenizers", folder / "model"]
    _train(*argv)


def _make_unfinished(folder: Path, texts: Path) -> None:
    """Prepares texts and stops before the manifest is written."""
    from davae_jax.data.prepared import build_shards as module
    from davae_jax.data.prepared.shard_writer import ShardSettings

    merge, module.merge_shards = module.merge_shards, lambda *_: (_ for _ in ()).throw(KeyboardInterrupt)
    settings = ShardSettings(
        fields=("text",), max_length=512, encoder_positions=512, truncate=False, held_out=0.1, shard_size=None
    )
    try:
        module.build_shards([Path("../texts/a.txt")], folder / "unfinished", settings, Path("../model"), 1)
    except KeyboardInterrupt:
        pass
    finally:
        module.merge_shards = merge


def _davae(*argv) -> None:
    from davae_jax.cli.main import main

    if code := main([str(word) for word in argv]):
        raise SystemExit(f"davae {argv[0]} ended with code {code}")


def _train(*argv) -> None:
    from davae_jax.cli.train import main

    if code := main([*map(str, argv), *RUN_OPTIONS]):
        raise SystemExit(f"train.py ended with code {code}")
