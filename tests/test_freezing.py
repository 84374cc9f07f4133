"""`--init.freeze`: what it leaves as it is, what the optimizer keeps, and that all others train as without it."""

import dataclasses

import jax
import numpy as np
import pytest
from small_model import CONFIG, new_model
from test_train_step import BATCH, CLEAN, KEY, MODEL

from davae_jax.checkpoints.weights import flatten
from davae_jax.cli.train import main, parse_train
from davae_jax.model.davae import abstract_training_model, split
from davae_jax.model.stack import stack_layers, unstack_layers
from davae_jax.parallel.config import MeshConfig
from davae_jax.parallel.sharding import make_mesh
from davae_jax.training.config import InitConfig, LaggingConfig, PosteriorConfig, TrainConfig
from davae_jax.training.objective import StepContext, gradient
from davae_jax.training.run.checkpointer import Checkpoints
from davae_jax.training.state import abstract_state, init_state
from davae_jax.training.step import make_train_step
from davae_jax.utils.errors import OptionError

# The first words of the paths that each part contains.
PATHS = {
    "encoder": ("encoder.",),
    "decoder": ("decoder.",),
    "embeddings": ("encoder.word.", "encoder.position.", "encoder.token_type.", "encoder.norm.", "decoder.embedding."),
    "posterior": ("encoder.posterior.",),
}
DEEP = dataclasses.replace(
    CONFIG,
    encoder=dataclasses.replace(CONFIG.encoder, num_hidden_layers=2),
    decoder=dataclasses.replace(CONFIG.decoder, num_layers=3),
)


def freezing(*parts, **changes):
    optimizer = dataclasses.replace(CLEAN.optimizer, learning_rate=1e-2, warmup=0.0, clip=0.0, spike=9.0)
    return dataclasses.replace(CLEAN, init=InitConfig(freeze=parts), optimizer=optimizer, **changes)


def moments(opt_state):
    """Returns the paths of the weights that AdamW has first moments of."""
    adam = [x for x in jax.tree.leaves(opt_state, is_leaf=lambda x: hasattr(x, "mu")) if hasattr(x, "mu")]
    return {path for state in adam for path, moment in flatten(state.mu).items() if moment is not None}


@pytest.fixture(scope="module")
def params():
    return split(new_model(DEEP, scale=4.0))[1]


@pytest.mark.parametrize("parts", [("encoder", "embeddings"), ("decoder", "posterior")], ids="+".join)
def test_frozen_weights_stay_and_have_no_moments(parts, params, monkeypatch, tmp_path):
    """With weight decay, and layers in stacks, as a deep model has them. All others change, after a resume as well."""
    monkeypatch.setattr("davae_jax.model.stack.SCAN_ABOVE", 1)
    accumulate = 2 if "encoder" in parts else 1
    config, begin = freezing(*parts, accumulate=accumulate, batch_size=2), flatten(params)
    model = abstract_training_model(DEEP)
    step = make_train_step(split(model)[0], config)
    state = init_state(stack_layers(jax.tree.map(np.array, params)), config)
    is_frozen = {path: path.startswith(sum((PATHS[part] for part in parts), ())) for path in begin}
    main = {path for path in begin if not path.startswith("discriminator.")}
    assert moments(unstack_layers(state.optimizer)) == {path for path in main if not is_frozen[path]}
    state, logs = step(state, BATCH)
    assert float(logs["grad_norm"]) > 0
    with Checkpoints(tmp_path, keep=1) as checkpoints:
        checkpoints.save(state)
    like = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), state)
    resumed, _ = checkpoints.restore(like)
    (state, _), (resumed, _) = step(state, BATCH), step(resumed, BATCH)
    for a, b in zip(jax.tree.leaves(state), jax.tree.leaves(resumed), strict=True):
        assert np.array_equal(a, b)
    for path, weight in flatten(unstack_layers(state.params)).items():
        same = np.array_equal(np.asarray(weight).view(np.uint32), np.asarray(begin[path]).view(np.uint32))
        assert same == (is_frozen[path] or path == "decoder.inv_freq"), path


def gradients(model, config):
    graphdef, params = split(model)
    context = StepContext(KEY, np.float32(0.3))
    grads, logs = jax.jit(gradient, static_argnums=(1, 4))(params, graphdef, BATCH, context, config)
    return flatten(grads), logs


def test_the_other_gradients_are_those_without_freezing():
    """Those of the encoder pass through a frozen decoder and a frozen posterior head."""
    parts, model = ("decoder", "posterior"), new_model(MODEL, scale=4.0)
    (whole, logs), (some, frozen_logs) = gradients(model, freezing()), gradients(model, freezing(*parts))
    some = {path: g for path, g in some.items() if g is not None}
    prefixes = sum((PATHS[part] for part in parts), ())
    assert some.keys() == {path for path in whole if not path.startswith(prefixes)}
    assert float(frozen_logs["loss"]) == pytest.approx(float(logs["loss"]), rel=1e-6)
    for path, grad in some.items():
        np.testing.assert_allclose(grad, whole[path], atol=1e-5 * max(1, np.abs(whole[path]).max()), err_msg=path)


@pytest.mark.parametrize("name", ["adamw", "adafactor", "muon"])
def test_every_optimizer_has_a_sharded_state_of_the_others_alone(name, monkeypatch):
    monkeypatch.setattr("davae_jax.model.stack.SCAN_ABOVE", 1)
    config = freezing("encoder", "embeddings")
    config = dataclasses.replace(config, optimizer=dataclasses.replace(config.optimizer, name=name))
    state = abstract_state(abstract_training_model(DEEP), config, make_mesh(MeshConfig(2, 2, 2), 8))
    paths = [jax.tree_util.keystr(path) for path, _ in jax.tree.leaves_with_path(state.optimizer)]
    assert all(leaf.sharding for leaf in jax.tree.leaves(state.optimizer))
    assert any("['decoder']['layers']" in path for path in paths)
    assert not [path for path in paths if "['encoder']" in path or "['embedding']" in path]


def test_options(capsys):
    """An unknown part, all of both halves, and what would change a frozen weight in another way."""
    _, config = parse_train(["--init.freeze", "posterior", "--init.freeze", "embeddings"])
    assert config.init.freeze == ("embeddings", "posterior")
    assert InitConfig(freeze=("posterior", "embeddings", "posterior")) == config.init
    assert main(["--init.freeze", "pooler"]) == 2
    err = capsys.readouterr().err
    assert err.count("\n") == 1 and "--init.freeze" in err and "pooler" in err
    assert all(part in err for part in PATHS)
    for given, option in (
        (dict(init=InitConfig(freeze=("encoder", "decoder"))), "--init.freeze"),
        (dict(init=InitConfig(freeze=("posterior",)), posterior=PosteriorConfig(0.5)), "--posterior.mean-scale"),
        (dict(init=InitConfig(freeze=("decoder",)), lagging=LaggingConfig(2)), "--lagging.encoder-steps"),
    ):
        with pytest.raises(OptionError) as e:
            TrainConfig(**given)
        assert e.value.option == option
