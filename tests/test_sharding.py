"""A mesh changes where arrays lie and nothing else: losses and weights are those of one device."""

import dataclasses

import jax
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P
from small_model import CONFIG

from davae_jax.checkpoints.weights import flatten
from davae_jax.data.batches import Batch
from davae_jax.data.config import DataConfig
from davae_jax.model.davae import abstract_model, abstract_training_model, split
from davae_jax.model.stack import unstack_layers
from davae_jax.parallel.config import MeshConfig
from davae_jax.parallel.sharding import make_mesh, partition_spec
from davae_jax.training.config import AdversarialConfig, OptimizerConfig, TrainConfig
from davae_jax.training.initial_state import initial_state
from davae_jax.training.state import abstract_state
from davae_jax.training.step import make_train_step
from davae_jax.utils.errors import InputError, OptionError

STEPS, B = 20, 8
# Weights large enough that the KL is not the small difference of larger numbers; one layer, as compiling is what costs.
MODEL = dataclasses.replace(
    CONFIG,
    encoder=dataclasses.replace(CONFIG.encoder, initializer_range=0.3),
    decoder=dataclasses.replace(CONFIG.decoder, num_layers=1, initializer_range=0.3, max_memory_length=8),
)
# Weights move by up to 2e-2. Of biases that the softmax ignores the gradient is rounding alone, which Adam with its
# usual eps would make as large as the others'.
ADAM = OptimizerConfig(learning_rate=1e-3, eps=1e-5)
TRAIN = TrainConfig(steps=STEPS, batch_size=B, adversarial=AdversarialConfig(weight=0.3), optimizer=ADAM)
MESHES = {"8x1x1": (8, 1, 1), "1x8x1": (1, 8, 1), "1x1x8": (1, 1, 8)}


def batch_of(step):
    rng = np.random.default_rng(step)
    lengths = rng.integers(4, 13, B)
    encoder_ids, decoder_ids = rng.integers(4, 50, (B, 12)), rng.integers(0, 60, (B, 12))
    place = np.arange(12)
    encoder_ids[place >= lengths[:, None]] = 0
    decoder_ids[place >= lengths[:, None]] = CONFIG.pad_token_id
    decoder_ids[:, 0] = CONFIG.bos_token_id
    decoder_ids[np.arange(B), lengths - 1] = CONFIG.end_token_id
    return Batch.of_texts(*(x.astype(np.int32) for x in (encoder_ids, decoder_ids, lengths)))


def trained(mesh_config, tmp_path, config=TRAIN):
    """(losses of every step, final state) on a mesh."""
    mesh = make_mesh(mesh_config, B, config.accumulate)
    model = abstract_model(MODEL)
    abstract = abstract_state(model, config, mesh)
    state = initial_state(abstract, MODEL, config, tmp_path)
    step = make_train_step(split(model)[0], config, abstract)
    losses = []
    with jax.set_mesh(mesh):
        for i in range(STEPS):
            state, logs = step(state, batch_of(i))
            losses.append([float(logs[name]) for name in ("loss", "rec", "kl_unmasked", "loss_d", "loss_g")])
    return np.array(losses), state


def trained_on_one(tmp_path, config=TRAIN):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(jax, "device_count", lambda: 1)
        patch.setattr(jax, "devices", lambda *_: jax.local_devices()[:1])
        return trained(MeshConfig(), tmp_path, config)


@pytest.fixture(scope="module")
def one_device(tmp_path_factory):
    return trained_on_one(tmp_path_factory.mktemp("one"))


def assert_trained_alike(found, expected, of=lambda weights: weights):
    np.testing.assert_allclose(found[0], expected[0], rtol=1e-5)
    found, expected = (of(flatten(jax.device_get(state.params))) for _, state in (found, expected))
    for path in expected:
        np.testing.assert_allclose(found[path], expected[path], atol=1e-4, err_msg=path)


def without_idle_biases(weights):
    """Without what shifts all scores of a query alike: the softmax ignores it, and its gradient is rounding alone,
    which Adafactor, having no eps to speak of, makes as large as the others'."""
    keys = {path: w[[0, 2]] if path.endswith("qkv_bias") else w for path, w in weights.items()}
    return {path: w for path, w in keys.items() if not path.endswith(("relative.bias", "key.bias"))}


@pytest.fixture(scope="module")
def all_axes(tmp_path_factory):
    return trained(MeshConfig(2, 2, 2), tmp_path_factory.mktemp("mesh"))


@pytest.mark.parametrize("shape", MESHES.values(), ids=MESHES)
def test_every_mesh_trains_as_one_device(shape, one_device, tmp_path):
    assert_trained_alike(trained(MeshConfig(*shape), tmp_path), one_device)


def test_a_mesh_of_all_axes_trains_as_one_device(all_axes, one_device):
    assert_trained_alike(all_axes, one_device)


def test_a_mesh_repeats_a_training_bit_for_bit(all_axes, tmp_path):
    (losses, state), (expected_losses, expected) = trained(MeshConfig(2, 2, 2), tmp_path), all_axes
    assert np.array_equal(losses, expected_losses)
    for a, b in zip(jax.tree.leaves(state), jax.tree.leaves(expected), strict=True):
        assert np.array_equal(a, b)


@pytest.mark.slow
@pytest.mark.parametrize(
    "changed",
    [
        dict(data=DataConfig(segment_length=5)),
        dict(optimizer=dataclasses.replace(ADAM, name="muon"), accumulate=2),
        dict(optimizer=OptimizerConfig(name="adafactor"), remat="dots", logits_chunk=4),
    ],
    ids=["segments", "muon, accumulated", "adafactor, remat, chunks"],
)
def test_other_ways_of_training_on_a_mesh(changed, tmp_path):
    config = dataclasses.replace(TRAIN, **changed)
    shape = MeshConfig(2, 2, 2)
    compared = without_idle_biases if config.optimizer.name == "adafactor" else lambda weights: weights
    assert_trained_alike(trained(shape, tmp_path, config), trained_on_one(tmp_path, config), compared)


def test_partition_specs(tmp_path):
    """Weights, both optimizers' states and the batch lie in parts; no device holds a whole matrix."""
    mesh = make_mesh(MeshConfig(2, 2, 2), B)
    state = abstract_state(abstract_model(MODEL), TRAIN, mesh)
    places = {path: leaf.sharding.spec for path, leaf in flatten(state.params).items()}
    assert places["decoder.embedding.weight"] == P("tensor", "fsdp")
    assert places["decoder.layers.0.qkv_weight"] == P(None, "tensor", "fsdp")
    assert places["decoder.layers.0.mlp_out.weight"] == P("fsdp", "tensor")
    assert places["encoder.layers.0.query.weight"] == P("tensor", "fsdp")
    (adam,) = (s for s in jax.tree.leaves(state.optimizer, is_leaf=_is_adam) if _is_adam(s))
    for moment in (adam.mu, adam.nu):
        assert all(leaf.sharding.spec == places[path] for path, leaf in flatten(moment).items())


def test_stacked_layers_are_sharded_as_each_of_them(monkeypatch):
    mesh = make_mesh(MeshConfig(2, 2, 2), B)
    listed = abstract_state(abstract_model(MODEL), TRAIN, mesh)
    monkeypatch.setattr("davae_jax.model.stack.SCAN_ABOVE", 0)
    stacked = abstract_state(abstract_training_model(MODEL), TRAIN, mesh)
    assert stacked.params["decoder"]["layers"]["stacked"]["qkv_weight"].sharding.spec == P(None, None, "tensor", "fsdp")
    found = unstack_layers(stacked)
    for (path, a), b in zip(jax.tree.leaves_with_path(listed), jax.tree.leaves(found), strict=True):
        assert a.shape == b.shape and a.sharding.is_equivalent_to(b.sharding, a.ndim), path


def _is_adam(node):
    return hasattr(node, "mu")


def test_an_axis_is_split_only_where_it_divides():
    mesh = {"data": 2, "fsdp": 3, "tensor": 4}
    assert partition_spec(("heads", "embed"), (1600, 1600), mesh) == P("tensor", None)  # 1600 is no multiple of 3
    assert partition_spec(("heads", "embed"), (1600, 1599), mesh) == P("tensor", "fsdp")
    assert partition_spec(("batch", None, "head", None), (12, 7, 25, 64), mesh) == P(("data", "fsdp"), None, None, None)
    assert partition_spec(("batch", "head"), (12, 8), mesh) == P(("data", "fsdp"), "tensor")
    assert partition_spec(("heads", "mlp"), (8, 8), mesh) == P("tensor", None)  # one mesh axis, one array axis


@pytest.mark.parametrize(
    ("config", "devices", "named"),
    [
        (dict(data=3), 8, "--mesh.data 3 --mesh.fsdp 1 --mesh.tensor 1: "),
        (dict(fsdp=16), 8, "--mesh.data -1 --mesh.fsdp 16 --mesh.tensor 1: "),
        (dict(data=-1, fsdp=-1), 8, "--mesh.data and --mesh.fsdp "),
        (dict(tensor=0), 8, "--mesh.tensor "),
    ],
)
def test_invalid_meshes_raise(config, devices, named):
    with pytest.raises(InputError) as error:
        MeshConfig(**config).shape(devices)
    assert str(error.value).startswith(named) and error.value.exit_code == 2


def test_minus_one_takes_what_is_left():
    assert MeshConfig(-1, 2, 2).shape(8) == {"data": 2, "fsdp": 2, "tensor": 2}
    assert MeshConfig(1, -1, 1).shape(8) == {"data": 1, "fsdp": 8, "tensor": 1}
    for batch_size, accumulate, multiple in ((12, 1, 8), (16, 4, 32)):
        with pytest.raises(OptionError, match=rf" {multiple}, not {batch_size}$") as error:
            make_mesh(MeshConfig(), batch_size, accumulate)
        assert error.value.option == "--batch-size"
