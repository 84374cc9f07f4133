"""Runs that go on from a whole model: they begin with its numbers, and with nothing else of it."""

import dataclasses
import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_train import text_file  # noqa: F401
from test_train import train as program

import davae_jax
from davae_jax import DAVAEConfig, DecoderConfig, EncoderConfig
from davae_jax.checkpoints.published.to_torch import export
from davae_jax.checkpoints.weights import flat_params, flatten
from davae_jax.cli.train import parse_train
from davae_jax.data.config import DataConfig
from davae_jax.model.davae import abstract_training_model, split
from davae_jax.model.losses import published_loss
from davae_jax.model.stack import unstack_layers
from davae_jax.parallel.config import MeshConfig
from davae_jax.training.config import (
    FreeBitsConfig,
    InitConfig,
    LogConfig,
    NoiseConfig,
    OptimizerConfig,
    TrainConfig,
)
from davae_jax.training.initial_state import check_model_options
from davae_jax.training.loop import train
from davae_jax.training.objective import StepContext, objective
from davae_jax.training.setup import set_up
from davae_jax.utils.errors import InputError, OptionError
from davae_jax.utils.locks import FolderLock

STILL = DAVAEConfig(  # no dropout; the sizes are the default ones, which a whole model replaces
    encoder=EncoderConfig(hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0),
    decoder=DecoderConfig(embedding_dropout_prob=0.0, attention_dropout_prob=0.0, output_dropout_prob=0.0),
)


@pytest.fixture(scope="module")
def published(tiny_checkpoint, tmp_path_factory):
    """The tiny model in the published layout."""
    folder = tmp_path_factory.mktemp("published") / "model"
    export(tiny_checkpoint, folder)
    return folder


def config_of(source, texts, folder, **changes):
    config = TrainConfig(
        run_dir=folder,
        steps=12,
        batch_size=8,
        model=STILL,
        data=DataConfig(train=(texts,), max_length=12, buckets=1),
        noise=NoiseConfig(embedding=0.0),
        free_bits=FreeBitsConfig(mode="off"),
        optimizer=OptimizerConfig(learning_rate=1e-2, warmup=0.0),
        log=LogConfig(every=1, samples=0, figures=0, checkpoint=6, held_out=8),
        length_weighted=False,
        init=InitConfig(model=str(source)),
    )
    return dataclasses.replace(config, **changes)


def rows_of(path):
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


@pytest.mark.parametrize("mesh", [(8, 1, 1), (2, 2, 2)])
def test_a_run_begins_with_the_numbers_of_the_model(
    mesh,
    published,
    tiny_checkpoint,
    text_file,  # noqa: F811
    tmp_path,
    monkeypatch,
):
    """Its weights, tokenizers and sizes; and, where it is computed alike, the published loss of its first batch.

    On a mesh of all axes with layers in stacks as well.
    """
    original = davae_jax.from_pretrained(published)
    config = config_of(published, text_file, tmp_path / "run", mesh=MeshConfig(*mesh))
    if mesh == (2, 2, 2):
        monkeypatch.setattr("davae_jax.model.stack.SCAN_ABOVE", 0)
    with FolderLock() as lock:
        run, state = set_up(config, lock)
    weights, begun = flat_params(original), flatten(unstack_layers(state.params))
    assert begun.keys() == weights.keys()
    for name, weight in begun.items():
        np.testing.assert_array_equal(weight, weights[name], err_msg=name)
    for name in ("vocab.txt", "spiece.model"):
        assert (run.folder / name).read_bytes() == (tiny_checkpoint / name).read_bytes()
    expected = original.config
    assert (run.config.model.latent_size, run.config.model.std_scale) == (expected.latent_size, expected.std_scale)
    assert run.config.model.decoder.num_layers == expected.decoder.num_layers
    assert run.config.model.encoder.hidden_dropout_prob == 0.0
    assert int(state.step) == 0 and not any(np.any(m) for m in jax.tree.leaves(state.optimizer))

    batch = run.batches.batch(0)
    end = batch._replace(lengths=batch.lengths - 1)  # masks the end token, which the published loss does not train
    context = StepContext(jax.random.key(0), jnp.float32(0.3))
    graphdef = split(abstract_training_model(run.config.model))[0]
    terms = jax.jit(objective, static_argnums=(1, 4))(state.params, graphdef, end, context, run.config)
    eps = jax.random.normal(jax.random.split(context.key, 6)[3], (8, expected.latent_size))
    ids = np.concatenate([batch.decoder_ids, batch.decoder_targets[:, -1:]], 1)
    ids[np.arange(ids.shape[1]) >= batch.lengths - 1] = expected.end_token_id
    loss = published_loss(original, batch.encoder_ids, ids, eps=eps, beta=0.3, fb_mode=0, length_weighted=False)[2]
    assert float(terms.reconstruction + terms.kl) == pytest.approx(float(loss) / 8, rel=1e-5)


def test_fine_tuning(published, text_file, tmp_path):  # noqa: F811
    """The held-out loss falls, and a resume needs the source no longer."""
    source = shutil.copytree(published, tmp_path / "source")
    whole = config_of(source, text_file, tmp_path / "whole")
    train(whole)
    held_out = [row["loss"] for row in rows_of(whole.run_dir / "held_out.jsonl")]
    assert held_out[1] < held_out[0] - 1
    digest = json.loads((whole.run_dir / "train.json").read_text())["digest_of_init_model"]
    assert len(digest) == 64
    _, again = parse_train(["--config", str(whole.run_dir / "train.json")])
    assert again.init == whole.init

    shutil.rmtree(whole.run_dir / "checkpoints" / "12")
    shutil.rmtree(source)
    train(whole)
    assert [row["loss"] for row in rows_of(whole.run_dir / "held_out.jsonl")] == held_out
    assert json.loads((whole.run_dir / "train.json").read_text())["digest_of_init_model"] == digest


def test_what_contradicts_the_model_is_refused(published, text_file, tmp_path):  # noqa: F811
    config = config_of(published, text_file, tmp_path / "run", model=dataclasses.replace(STILL, latent_size=7))
    with pytest.raises(OptionError) as error, FolderLock() as lock:
        set_up(config, lock)
    reason = f"is 7, but 4 in {published}, which --init.model takes over whole"
    assert str(error.value) == f"--model.latent-size {reason}"
    wide = dataclasses.replace(STILL, decoder=dataclasses.replace(STILL.decoder, num_layers=5))
    with pytest.raises(OptionError) as error:
        check_model_options(dataclasses.replace(config, model=wide))
    assert error.value.option == "--model.decoder.num-layers"
    check_model_options(dataclasses.replace(config, model=dataclasses.replace(STILL, latent_size=4)))
    # A size of the preset is refused where it is given, and replaced where it is not.
    options = ["--init.model", published, "--data.train", text_file, "--run-dir", tmp_path / "run"]
    code, _, err = program(*options, "--model.decoder.num-layers=2")
    assert code == 2 and err.count("\n") == 1
    assert f"--model.decoder.num-layers is 2, but 1 in {published}" in err
    (tmp_path / "sizes.toml").write_text("[model.decoder]\nnum-layers = 2\n")
    assert program(*options, "--config", tmp_path / "sizes.toml")[1:] == ("", err)
    assert not (tmp_path / "run").exists()
    with pytest.raises(OptionError) as error:
        InitConfig(model="a", decoder="b")
    assert error.value.option == "--init.decoder"
    with pytest.raises(OptionError) as error:
        config_of(published, text_file, tmp_path / "run", data=DataConfig(decoder_vocab_size=50))
    assert error.value.option == "--data.decoder-vocab-size"
    other = tmp_path / "tokenizers"
    other.mkdir()
    for name in ("vocab.txt", "spiece.model"):
        shutil.copy(published / name, other)
    with (other / "vocab.txt").open("a", encoding="utf-8") as f:
        f.write("more\n")
    with pytest.raises(OptionError) as error, FolderLock() as lock:
        set_up(config_of(published, text_file, tmp_path / "run", tokenizers=other), lock)
    assert error.value.option == "--tokenizers"
    with pytest.raises(InputError, match="nowhere"), FolderLock() as lock:
        set_up(config_of(tmp_path / "nowhere", text_file, tmp_path / "run"), lock)
