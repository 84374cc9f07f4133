"""A mesh changes where arrays lie and nothing else: losses and weights are those of one device."""

import dataclasses

import jax
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P
from small_model import CONFIG

from davae_jax.checkpoint import flatten
from davae_jax.data import Batch
from davae_jax.errors import InputError
from davae_jax.model import abstract_model, split
from davae_jax.setup_run import first_state
from davae_jax.sharding import MeshConfig, make_mesh, partition_spec
from davae_jax.train_config import AdversarialConfig, TrainConfig
from davae_jax.train_step import abstract_state, make_train_step

STEPS, B = 20, 8
TRAIN = TrainConfig(steps=STEPS, batch_size=B, adversarial=AdversarialConfig(weight=0.3))
MESHES = {"8x1x1": (8, 1, 1), "1x8x1": (1, 8, 1), "1x1x8": (1, 1, 8), "2x2x2": (2, 2, 2)}


def batch_of(step):
    rng = np.random.default_rng(step)
    lengths = rng.integers(4, 13, B)
    encoder_ids, decoder_ids = rng.integers(4, 50, (B, 12)), rng.integers(0, 60, (B, 12))
    place = np.arange(12)
    encoder_ids[place >= lengths[:, None]] = 0
    decoder_ids[place >= lengths[:, None]] = CONFIG.pad_token_id
    decoder_ids[:, 0] = CONFIG.bos_token_id
    decoder_ids[np.arange(B), lengths - 1] = CONFIG.end_token_id
    return Batch(*(x.astype(np.int32) for x in (encoder_ids, decoder_ids, lengths)))


def trained(mesh_config, tmp_path):
    """(losses of every step, final state) on a mesh."""
    mesh = make_mesh(mesh_config, B)
    model = abstract_model(CONFIG)
    abstract = abstract_state(model, TRAIN, mesh)
    state = first_state(abstract, CONFIG, TRAIN, tmp_path)
    step = make_train_step(split(model)[0], TRAIN, abstract)
    losses = []
    with jax.set_mesh(mesh):
        for i in range(STEPS):
            state, logs = step(state, batch_of(i))
            losses.append([float(logs[name]) for name in ("loss", "rec", "kl_unmasked", "loss_d", "loss_g")])
    return np.array(losses), state


@pytest.fixture(scope="module")
def one_device(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(jax, "device_count", lambda: 1)
        patch.setattr(jax, "devices", lambda *_: jax.local_devices()[:1])
        return trained(MeshConfig(), tmp_path_factory.mktemp("one"))


@pytest.mark.parametrize("shape", MESHES.values(), ids=MESHES)
def test_every_mesh_trains_as_one_device(shape, one_device, tmp_path):
    losses, state = trained(MeshConfig(*shape), tmp_path)
    np.testing.assert_allclose(losses, one_device[0], rtol=1e-5)
    found, expected = (flatten(jax.device_get(s.params)) for s in (state, one_device[1]))
    for path in expected:
        np.testing.assert_allclose(found[path], expected[path], atol=1e-4, err_msg=path)
