"""Helpers for tests of the converters: makes published folders, and compares arrays bit by bit."""

import copy
import json
import os
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import torch
from make_checkpoint import random_state
from tokenizer_fixtures import CLS_ID, SEP_ID

from davae_jax.checkpoints.published.published_names import INV_FREQ, POSITION_IDS  # noqa: F401
from davae_jax.checkpoints.weights import flat_params, load_weights, stored_shapes

ROOT = Path(__file__).parent.parent
GOLDEN = Path(__file__).parent / "golden"
PIECES = 300  # of the tokenizer that goes with TINY
TINY = {
    "encoder": {
        "vocab_size": 250,
        "hidden_size": 12,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "intermediate_size": 20,
        "max_position_embeddings": 16,
        "type_vocab_size": 2,
    },
    "decoder": {
        "vocab_size": PIECES + 4,
        "num_layers": 2,
        "hidden_size": 8,
        "num_attention_heads": 2,
        "max_memory_length": 4,
    },
    "latent_size": 4,
    "cls_token_id": CLS_ID,
    "sep_token_id": SEP_ID,
    "end_token_id": PIECES,
    "pad_token_id": PIECES + 1,
    "bos_token_id": PIECES + 2,
}


def tiny_with(**values):
    """Returns TINY with changed values, as in `encoder__hidden_size=16`; None removes a key."""
    config = copy.deepcopy(TINY)
    for key, value in values.items():
        *section, name = key.split("__")
        part = config[section[0]] if section else config
        part[name] = value
        if value is None:
            del part[name]
    return config


def config_of(name):
    """The config of a golden checkpoint."""
    return json.loads((GOLDEN / name / "config.json").read_text(encoding="utf-8"))


def state_of(name):
    """The tensors of a golden checkpoint."""
    return read_bin(GOLDEN / name)


def read_bin(folder):
    return torch.load(folder / "pytorch_model.bin", weights_only=True)


def publish(folder, state=None, config=TINY):
    """Writes config.json and pytorch_model.bin; by default the random tiny checkpoint."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    torch.save(random_state(TINY) if state is None else state, folder / "pytorch_model.bin")
    return folder


def publish_safetensors(folder, state=None, config=TINY):
    """Writes config.json and model.safetensors."""
    from safetensors.torch import save_file

    publish(folder, {}, config)
    (folder / "pytorch_model.bin").unlink()
    save_file(random_state(TINY) if state is None else state, folder / "model.safetensors")
    return folder


def stored(folder):
    """Returns the arrays of a converted folder by path, in their stored dtypes."""
    one = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    targets = {
        path: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=one)
        for path, leaf in stored_shapes(folder / "params").items()
    }
    return {path: np.asarray(array) for path, array in load_weights(folder / "params", targets).items()}


def same_bits(a, b):
    a, b = np.asarray(a), np.asarray(b)
    return a.dtype == b.dtype and a.shape == b.shape and a.tobytes() == b.tobytes()


def assert_same(actual, expected):
    """Compares names, shapes, dtypes and every bit."""
    assert actual.keys() == expected.keys()
    assert [name for name in expected if not same_bits(actual[name], expected[name])] == []


def assert_same_file(folder, state):
    """Checks that pytorch_model.bin holds exactly these tensors in this order."""
    actual = read_bin(folder)
    assert list(actual) == list(state)
    assert_same(actual, state)


def assert_same_model(a, b):
    assert_same(flat_params(a), flat_params(b))


def python(*args):
    """Runs Python in a process of its own, in the checkout."""
    return subprocess.run(
        [sys.executable, *map(str, args)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        env=os.environ | {"JAX_PLATFORMS": "cpu"},
    )
