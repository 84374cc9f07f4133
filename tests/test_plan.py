"""`davae plan`: the state's memory and the FLOPs by hand, traffic and activations against what XLA and JAX report."""

import dataclasses
import json
import math
import re
import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hlo import collectives
from tokenizer_fixtures import make_spiece, make_vocab

from davae_jax.cli.main import main
from davae_jax.data.config import DataConfig
from davae_jax.model.config import DAVAEConfig, DecoderConfig, EncoderConfig
from davae_jax.model.davae import abstract_model, split
from davae_jax.parallel.chips import CHIPS
from davae_jax.parallel.config import MeshConfig
from davae_jax.parallel.sharding import make_abstract_mesh, make_mesh
from davae_jax.planning.communication import traffic
from davae_jax.planning.memory import activations, memory, min_chips
from davae_jax.planning.plan import make_plan, with_planned_vocabularies
from davae_jax.planning.shapes import batch_shapes, bytes_per_device
from davae_jax.training.config import InitConfig, TrainConfig
from davae_jax.training.flops import forward_products, model_flops
from davae_jax.training.objective import StepContext, gradient
from davae_jax.training.presets import PRESETS
from davae_jax.training.setup import unsharded_weights
from davae_jax.training.state import abstract_state
from davae_jax.training.step import make_train_step
from davae_jax.utils.shapes import round_up

B, T = 64, 31
MODEL = DAVAEConfig(
    encoder=EncoderConfig(
        vocab_size=512, hidden_size=64, num_hidden_layers=1, num_attention_heads=4, intermediate_size=256
    ),
    decoder=DecoderConfig(vocab_size=1024, num_layers=1, hidden_size=128, num_attention_heads=4),
    latent_size=32,
    **dict(end_token_id=1000, pad_token_id=1001, bos_token_id=1002),
)
CONFIG = TrainConfig(model=MODEL, batch_size=B, data=DataConfig(max_length=T + 1))
RANDENG = PRESETS["randeng-1b"][1]
H200 = CHIPS["h200"]
ONE = {"data": 1, "fsdp": 1, "tensor": 1}


def with_(config=CONFIG, **changes):
    return dataclasses.replace(config, **changes)


def mesh_of(*shape, batch=B):
    return make_abstract_mesh(MeshConfig(*shape), batch, math.prod(shape))


# ---- memory


@pytest.mark.parametrize(
    ("shape", "optimizer"),
    [
        ((8, 1, 1), "adamw"),
        ((1, 8, 1), "adamw"),
        ((1, 1, 8), "adamw"),
        ((2, 2, 2), "adamw"),
        ((2, 2, 2), "adafactor"),
        ((2, 2, 2), "muon"),
    ],
)
def test_state_bytes_are_those_on_a_device(shape, optimizer):
    """Arrays are put on 8 devices with the step's shardings, and the bytes on the first device are counted."""
    config = with_(optimizer=dataclasses.replace(CONFIG.optimizer, name=optimizer))
    state = abstract_state(abstract_model(MODEL), config, make_mesh(MeshConfig(*shape), B))
    first = jax.devices()[0]

    def bytes_on_first_device(tree):
        arrays = (jax.device_put(np.zeros(x.shape, x.dtype), x.sharding) for x in jax.tree.leaves(tree))
        return sum(s.data.nbytes for array in arrays for s in array.addressable_shards if s.device == first)

    discriminator = bytes_on_first_device(state.params["discriminator"])
    weights = bytes_on_first_device(state.params) - discriminator
    found = memory(config, mesh_of(*shape))
    assert found["parameters"] == found["gradients"] == weights
    assert found["optimizer state"] == bytes_on_first_device(state.optimizer)
    other = bytes_on_first_device((state.discriminator_optimizer, state.step))
    assert found["discriminator and its optimizer"] == 2 * discriminator + other


def test_the_state_of_the_published_size():
    """By hand: 4 bytes a weight, 8 more for AdamW's two moments and 4 for its count."""
    config, mesh = with_(RANDENG, batch_size=8), mesh_of(1, 1, 1, batch=8)
    found = memory(config, mesh)
    D, F, V = 768, 3072, 21128
    encoder = (V + 512 + 2) * D + 2 * D + 12 * (4 * D * (D + 1) + D * F + F + F * D + D + 4 * D) + D * (D + 1) + 512 * D
    D, V = 1600, 50048
    layer = 3 * D * (D + 1) + 2 * D * (D + 1) + 4 * D * D + 4 * D + 4 * D * D + D + 4 * D
    decoder = V * D + D * 256 + 2 * D + D // 2 + 32 * layer + 2 * D
    assert found["parameters"] == 4 * (encoder + decoder)
    encoder_layer = 4 * 768 * 769 + 2 * 768 * F + F + 768 + 4 * 768
    stacked = 12 * (12 * encoder_layer + 32 * layer)  # a copy of weights and moments; a save needs it, not a step
    step = ("gradients", "saved activations", "recomputed layer (peak)", "logits", "gathered weights")
    assert found["copy for a save"] == pytest.approx(max(0, stacked - sum(found[name] for name in step)), abs=16)
    assert found["copy for a save"] > 0
    assert found["optimizer state"] == pytest.approx(8 * (encoder + decoder), abs=16)
    assert found["discriminator and its optimizer"] == pytest.approx(16 * (1024 * 257 + 1025), abs=16)
    assert memory(with_(config, accumulate=2), mesh)["gradients"] == 2 * found["gradients"]
    # Eight devices with all of it in parts, but the few vectors and tables that do not divide.
    eighth = memory(config, mesh_of(1, 8, 1, batch=8))
    assert eighth["parameters"] == pytest.approx(found["parameters"] / 8, rel=1e-2)


def test_activations_kept_for_the_backward_pass():
    """remat full: of a layer its input alone. Whatever is kept grows with the texts of a device and with nothing else.

    dots: in the decoder the input, q, k, v, the attention's output and the feed-forward's inside; in the encoder the
    feed-forward's output besides, which the norm after it needs.
    """
    D, E, F = 128, 64, 256
    S = T + 1
    _, encoder, decoder = activations(with_(remat="full", dtype="bfloat16"), 8, 1)
    assert (encoder, decoder) == (8 * S * E * 2, 8 * T * D * 2)
    _, encoder, decoder = activations(with_(remat="dots"), 8, 1)
    assert encoder == 8 * S * (6 * E + F) * 4
    assert decoder == 8 * T * (5 * D + 4 * D) * 4
    # tensor 2 halves what lies inside the attention and the feed-forward, and no state between them.
    _, halved_encoder, halved_decoder = activations(with_(remat="dots"), 8, 2)
    assert encoder - halved_encoder >= 8 * S * F * 4 // 2
    assert decoder - halved_decoder >= 8 * T * 4 * D * 4 // 2
    none, full = (sum(activations(with_(remat=r), 16, 1)) for r in ("none", "full"))
    assert none == 2 * sum(activations(with_(), 8, 1)) and none > 3 * full
    kept = memory(with_(accumulate=4), mesh_of(2, 1, 1))
    assert kept["saved activations"] == pytest.approx(memory(CONFIG, mesh_of(8, 1, 1))["saved activations"], abs=4)


def test_frozen_parts_have_no_gradients_and_moments():
    """Activations as well: of a frozen encoder none are saved, and of other frozen weights those of their gradients."""
    mesh = mesh_of(1, 1, 1)
    frozen = with_(init=InitConfig(freeze=("encoder", "embeddings")))
    whole, found = memory(CONFIG, mesh), memory(frozen, mesh)
    params = split(abstract_model(MODEL))[1]
    trained = bytes_of(params["decoder"]) - bytes_of(params["decoder"]["embedding"])
    assert found["parameters"] == whole["parameters"] and found["gradients"] == trained
    assert found["optimizer state"] == pytest.approx(2 * trained, abs=8)
    assert found["discriminator and its optimizer"] == whole["discriminator and its optimizer"]
    assert activations(frozen, 8, 1)[1] == 0 < activations(CONFIG, 8, 1)[1]
    sharded = memory(frozen, mesh_of(2, 2, 2))
    assert sharded["gathered weights"] == (1024 // 2) * 128 * 4
    data = lambda config: traffic(config, mesh_of(8, 1, 1), H200)["data"].bytes  # noqa: E731
    discriminator = bytes_of(params["discriminator"])
    assert data(frozen) == round(2 * (trained + discriminator) * 7 / 8) < data(CONFIG)


def bytes_of(params):
    return sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(params))


def test_logits_and_gathered_weights():
    found = memory(with_(logits_chunk=8), mesh_of(2, 2, 2))
    assert found["logits"] == 2 * (B // 4) * 8 * (1024 // 2) * 4
    assert found["gathered weights"] == (1024 // 2) * 128 * (4 + 4)
    assert memory(CONFIG, mesh_of(1, 1, 1))["gathered weights"] == 0


# ---- work


@pytest.mark.parametrize(
    ("remat", "freeze"),
    [("none", ()), ("dots", ()), ("full", ()), ("full", ("encoder",)), ("none", ("decoder", "posterior"))],
)
def test_flops_are_those_that_xla_counts(remat, freeze):
    """XLA counts the elementwise operations as well: a few percent at these widths. It counts a loop's body once, so
    the logits are made whole here."""
    model = dataclasses.replace(
        MODEL,
        encoder=dataclasses.replace(
            MODEL.encoder, hidden_size=512, num_attention_heads=8, intermediate_size=2048, num_hidden_layers=2
        ),
        decoder=dataclasses.replace(
            MODEL.decoder, hidden_size=768, num_attention_heads=8, num_layers=2, vocab_size=8192
        ),
    )
    config = with_(model=model, remat=remat, data=DataConfig(max_length=128), init=InitConfig(freeze=freeze))
    graphdef, params = split(abstract_model(model))
    step = jax.jit(lambda p, batch, key: gradient(p, graphdef, batch, StepContext(key, jnp.float32(1)), config)[0])
    key = jax.eval_shape(lambda: jax.random.key(0))
    counted = step.lower(params, batch_shapes(config, B), key).cost_analysis()["flops"]
    products = forward_products(config, ONE)
    expected = sum((1 + p.backward + p.recomputed) * p.flops for p in products)
    assert 0.99 <= counted / expected < 1.05  # of a frozen decoder, the positions' keys have no gradient


def test_model_flops_of_a_batch():
    """At the longest lengths the plan's; in segments with memory, attention's products by hand."""
    config = with_(data=DataConfig(max_length=128))
    assert model_flops(config, (128, 127)) == sum(make_plan(config, H200, 8, 0.4).flops.values())
    attention = lambda S, TK: 6 * B * (2 * S * S * 64 + 3 * TK * 128)  # noqa: E731
    segments = with_(config, data=DataConfig(max_length=128, segment_length=32))
    K = 32 + MODEL.decoder.max_memory_length
    positions = lambda rows: 4 * rows * 128 * 128  # noqa: E731
    plain = model_flops(config, (64, 128)) - attention(64, 128 * 128) - positions(128)
    assert model_flops(segments, (64, 127)) == plain + attention(64, 128 * K) + positions(4 * K)
    assert model_flops(segments, (64, 32)) == model_flops(config, (64, 32))  # one segment has no memory


def test_the_logits_chunks_are_made_twice():
    recomputed = {c: sum(p.recomputed * p.flops for p in forward_products(with_(logits_chunk=c), ONE)) for c in (8, T)}
    assert recomputed[T] == 0 and recomputed[8] == 2 * B * T * 128 * 1024


def test_work_of_the_published_size():
    """6·weights·tokens for encoder and decoder, each with its own tokens, and attention separately."""
    config = with_(RANDENG, batch_size=64)
    flops = make_plan(config, H200, 8, 0.4).flops
    inside = 32 * 12 * 1600**2
    assert flops["decoder"] == pytest.approx(6 * inside * 64 * 511, rel=2e-3)
    assert flops["encoder"] == pytest.approx(6 * 12 * 12 * 768**2 * 64 * 512, rel=2e-3)
    assert flops["logits"] == 6 * 50048 * 1600 * 64 * 511
    assert flops["attention"] == 6 * 64 * (12 * 2 * 512**2 * 768 + 32 * 3 * 511**2 * 1600)


def test_flops_per_device():
    """Data and fsdp axes divide all work; the tensor axis all but attention where it does not divide the heads."""
    one, data, tensor = (make_plan(with_(mesh=MeshConfig(*m)), H200, math.prod(m), 1.0) for m in _SHARES)
    assert one.flops_per_device == sum(one.flops.values()) + one.recomputed
    assert data.flops_per_device == pytest.approx(
        one.flops_per_device / 8, rel=0.02
    )  # the positions' keys are repeated
    assert tensor.flops_per_device == pytest.approx(one.flops_per_device / 4, rel=0.02)
    odd = with_(RANDENG, batch_size=64, mesh=MeshConfig(1, 1, 8))
    plan = make_plan(odd, H200, 8, 1.0)
    assert plan.flops_per_device > sum(plan.flops.values()) / 8 + plan.flops["attention"] / 3


_SHARES = (1, 1, 1), (8, 1, 1), (1, 1, 4)


# ---- traffic


def compiled(shape, config=CONFIG):
    mesh = make_mesh(MeshConfig(*shape), B)
    model = abstract_model(config.model)
    state = abstract_state(model, config, mesh)
    with jax.set_mesh(mesh):
        step = make_train_step(split(model)[0], config, state)
        fast = {"xla_backend_optimization_level": 0, "xla_llvm_disable_expensive_passes": True}
        return step.lower(state, batch_shapes(config, B)).compile(compiler_options=fast).as_text(), state


def test_the_data_axis_sends_gradients_alone():
    """Every gradient once, to the float: XLA's program against the weights. Of the tables of positions and types it
    sends the rows used; of the positions' keys their own gradient, and makes the map's from it; of the words the
    lookup's and the logits' gradients apart; and the few numbers that are logged."""
    text, state = compiled((8, 1, 1))
    found = [shape for c in collectives(text) for _, shape in c.shapes if shape]
    floats = sum(map(math.prod, found))
    weights = bytes_per_device(state.params) // 4
    D, E = 128, 64
    unused_rows, frequencies = (512 - (T + 1)) * E + E, D // 2
    keys = D * (D + 1) - T * D
    assert {c.kind for c in collectives(text)} == {"all-reduce"}
    logged = MODEL.latent_size  # the KL of each dimension
    assert floats == weights - unused_rows - frequencies - keys + 1024 * D + logged
    sent = traffic(CONFIG, mesh_of(8, 1, 1), H200)
    assert sent["data"].bytes == 2 * 4 * weights * 7 // 8
    assert sent["fsdp"].bytes == sent["tensor"].bytes == 0


@pytest.mark.parametrize("shape", [(1, 8, 1), (2, 1, 4), (1, 1, 8), (2, 2, 2)])
def test_traffic_is_close_to_that_of_xla(shape):
    """XLA's CPU compiler reduces gradients whole and then takes a part, where others scatter them: twice the bytes."""
    text, _ = compiled(shape)
    by_xla = sum(c.sent for c in collectives(text))
    planned = sum(axis.bytes for axis in traffic(CONFIG, mesh_of(*shape), H200).values())
    assert 0.5 < by_xla / planned < 2, by_xla / planned


def test_traffic_by_hand():
    """Weights in bfloat16 twice, their gradients in float32 once, both embeddings exchanged twice; and for each of
    the three more chunks of logits the word table and its gradient again."""
    weights, table = 1_249_095_457, 50048 * 1600
    embeddings = 2 * 8 * (512 * 768 + 511 * 1600) * 4
    sent = {chunk: traffic(with_(RANDENG, logits_chunk=chunk), mesh_of(1, 8, 1), H200)["fsdp"] for chunk in (128, 511)}
    once = (weights * (2 + 2 + 4) + embeddings) * 7 / 8
    assert sent[511].bytes == pytest.approx(once, rel=5e-3)
    assert sent[128].bytes - sent[511].bytes == 3 * table * (2 + 4) * 7 // 8
    data = traffic(with_(RANDENG, accumulate=2, logits_chunk=511), mesh_of(8, 1, 1), H200)["data"]
    assert data.bytes == 2 * 2 * weights * 4 * 7 // 8


def test_axes_larger_than_a_node_use_the_network():
    rates = {name: axis.rate for name, axis in traffic(CONFIG, mesh_of(2, 4, 2), H200).items()}
    assert rates == {"data": H200.network, "fsdp": H200.link, "tensor": H200.link}


# ---- the plan and its command


def test_min_chips():
    """20 GB of state in float32 for 1.25 B weights: more than one v5e holds, a sixteenth of 64 chips' memory."""
    assert min_chips(with_(RANDENG, batch_size=8), H200)[0] == 1
    chips, mesh = min_chips(with_(RANDENG, batch_size=256), CHIPS["tpu-v5e"])
    assert 2 <= chips <= 64 and mesh["fsdp"] == chips
    smaller = make_abstract_mesh(MeshConfig(1, chips // 2, 1), 256, chips // 2)
    assert sum(memory(with_(RANDENG, batch_size=256), smaller).values()) > 0.9 * CHIPS["tpu-v5e"].memory
    tiny = CHIPS["h200"]._replace(memory=1e6)
    assert min_chips(CONFIG, tiny) is None


def test_time_follows_from_work_and_traffic():
    fast, slow = (make_plan(with_(mesh=MeshConfig(8, 1, 1)), H200, 8, e) for e in (0.5, 0.25))
    assert slow.compute_seconds == 2 * fast.compute_seconds == pytest.approx(fast.flops_per_device / 989e12 * 4)
    assert slow.communication_seconds == 2 * fast.communication_seconds
    assert fast.communication_seconds == pytest.approx(fast.traffic["data"].bytes / 450e9 * 2)
    computing = fast.compute_seconds + fast.memory_seconds
    assert fast.seconds == (max(computing, fast.communication_seconds), computing + fast.communication_seconds)


# ---- the implementations of attention


def test_auto_is_planned_with_the_kernels_where_they_run():
    """Of what attention alone keeps and recomputes nothing of the scores' size is left."""
    v4, v5e = (make_plan(with_(RANDENG, batch_size=8), CHIPS[name], 1, 0.4) for name in ("tpu-v4", "tpu-v5e"))
    assert (v4.attention, v5e.attention) == ("xla", "mosaic_tpu")
    scores = 8 * 25 * 511 * 511 * 4
    saved = v4.memory["recomputed layer (peak)"] - v5e.memory["recomputed layer (peak)"]
    assert 1.5 * scores < saved < 4 * scores
    assert v4.attention_bytes == 32 * (18 + 14 + 18) * scores
    # Heads are padded to 128 lanes, 511 tokens to 512.
    assert v5e.attention_bytes == 32 * (17 + 20 + 17) * 8 * 25 * 512 * 128 * 2
    layer = 2 * 8 * 25 * 511 * 511 * 64
    assert v5e.recomputed - v4.recomputed == pytest.approx(32 * layer * (3.5 + 9.5 + 3.5 - 3 - 6 - 3), abs=64)
    wait = v4.attention_bytes / 1228e9 - 32 * layer * 12 / (275e12 * 0.4)
    assert v4.memory_seconds == pytest.approx(wait) and v5e.memory_seconds < v4.memory_seconds / 4
    assert v5e.seconds[1] == v5e.compute_seconds + v5e.memory_seconds + v5e.communication_seconds


def test_attention_of_segments_counts_each():
    """Four segments of 128, in two micro-batches, with 512 keys of memory; on a GPU, without remat."""
    data = dataclasses.replace(RANDENG.data, segment_length=128)
    config = with_(RANDENG, batch_size=8, accumulate=2, data=data, remat="none")
    plan = make_plan(config, H200, 2, 0.4)
    assert plan.attention_bytes == 32 * 4 * 2 * (8 + 13) * 2 * 25 * 128 * (128 + 512) * 4


def test_the_command(capsys, tmp_path):
    file = tmp_path / "plan.json"
    argv = ["plan", "randeng-1b", "--mesh.data", "1", "--mesh.fsdp", "-1", "--chips", "8", "--json", str(file)]
    assert main(argv) == 0
    out, err = capsys.readouterr()
    assert err == ""
    assert "vocabulary sizes: encoder 21,184, decoder 50,048 (published tokenizers; without --tokenizers, a run" in out
    assert "8 × H200, mesh data 1 × fsdp 8 × tensor 1" in out and "1,249,138,465 weights" in out and ": fits" in out
    values = json.loads(file.read_text())
    assert values["memory"]["parameters"] == pytest.approx(1_248_831_264 * 4 / 8, rel=1e-2)
    assert values["fits"] and values["mesh"] == {"data": 1, "fsdp": 8, "tensor": 1}


def plan_of(capsys, *argv):
    """(weights by component, stdout, stderr)"""
    assert main(["plan", *map(str, argv)]) == 0
    out, err = capsys.readouterr()
    weights_line = re.search(r"weights: (.*)", out)[1]
    weights = {name: int(n.replace(",", "")) for name, n in re.findall(r"(decoder|encoder) ([\d,]+\d)", weights_line)}
    return weights, out, err


def test_the_demo_is_planned_with_the_vocabularies_it_trains():
    """The demo's decoder has 600 pieces and three special tokens, other corpora 8000; the encoder has 8000."""

    def planned(**changes):
        config = with_(PRESETS["demo"][1], data=dataclasses.replace(PRESETS["demo"][1].data, **changes))
        config, source = with_planned_vocabularies(config, "demo")
        assert source.startswith("trained on the texts")
        return config.model.encoder.vocab_size, config.model.decoder.vocab_size

    assert planned() == planned(decoder_vocab_size=600) == (8000, 640)
    assert planned(encoder_vocab_size=1000, train=Path("texts.txt")) == (1024, 8064)


def test_the_published_size_is_planned_with_the_published_vocabularies(capsys, tmp_path):
    """Vocabularies are rounded up to multiples of 64, as in a run: 21,128 becomes 21,184."""

    def planned(**changes):
        config, source = with_planned_vocabularies(with_(RANDENG, **changes), "randeng-1b")
        return config.model.encoder.vocab_size, config.model.decoder.vocab_size, source

    published = "published tokenizers; without --tokenizers, a run trains its own"
    assert planned() == (21184, 50048, published)
    *trained, source = planned(data=dataclasses.replace(RANDENG.data, decoder_vocab_size=8000))
    assert trained == [8000, 8064] and source.startswith("trained on the texts")
    encoder_size = round_up(len(make_vocab(tmp_path)), 64)
    make_spiece(tmp_path, 300)
    assert planned(tokenizers=tmp_path) == (encoder_size, 320, f"tokenizers in {tmp_path}")
    # A pretrained encoder and decoder each bring a tokenizer, as in a run.
    bert, xl = tmp_path / "bert", tmp_path / "xl"
    for folder, name in ((bert, "vocab.txt"), (xl, "spiece.model")):
        folder.mkdir()
        (folder / name).write_bytes((tmp_path / name).read_bytes())
    both = planned(init=InitConfig(encoder=str(bert), decoder=str(xl)))
    assert both == (encoder_size, 320, f"tokenizers in {bert} and {xl}")
    *one, source = planned(init=InitConfig(encoder=str(bert)))
    assert one == [encoder_size, 8064] and source.startswith(f"one tokenizer from {bert}, the other trained on")
    assert main(["plan", "randeng-1b", "--tokenizers", str(tmp_path / "none")]) == 1
    assert f"{tmp_path / 'none' / 'vocab.txt'}: no such file" in capsys.readouterr().err


def test_a_whole_model_is_planned_with_its_sizes(tiny_checkpoint, tmp_path, capsys):
    config, source = with_planned_vocabularies(
        with_(RANDENG, init=InitConfig(model=str(tiny_checkpoint))), "randeng-1b"
    )
    model, published = DAVAEConfig.from_json(tiny_checkpoint / "config.json"), RANDENG.model
    assert config.model.latent_size == model.latent_size and source == f"of {tiny_checkpoint}"
    assert config.model.decoder.vocab_size == model.decoder.vocab_size
    assert config.model.encoder.hidden_dropout_prob == published.encoder.hidden_dropout_prob
    # One that would have to be downloaded is not, and the preset's sizes count.
    config, source = with_planned_vocabularies(with_(RANDENG, init=InitConfig(model="owner/name")), "randeng-1b")
    assert config.model.latent_size == published.latent_size
    assert source == "assumed, as are all other sizes: owner/name is not downloaded for a plan"
    # What training refuses is refused here, also sizes that the preset has; a run that has begun does not need it.
    sizes = tmp_path / "sizes.toml"
    sizes.write_text("[model]\nlatent-size = 128\n")
    for options in (["--model.latent-size", "128"], ["--config", str(sizes)]):
        assert main(["plan", "randeng-1b", "--init.model", str(tiny_checkpoint), *options]) == 2
        out, err = capsys.readouterr()
        assert (out, err.count("\n")) == ("", 1)
        assert f"--model.latent-size is 128, but {model.latent_size} in {tiny_checkpoint}" in err
    missing = str(tmp_path / "missing")
    assert main(["plan", "randeng-1b", "--init.model", missing]) == 1
    assert capsys.readouterr() == ("", f"davae plan: error: {missing}: no such folder\n")
    run = tmp_path / "run"
    (run / "checkpoints" / "3" / "params" / "d").mkdir(parents=True)
    for file in ("_CHECKPOINT_METADATA", "params/d/data"):
        (run / "checkpoints" / "3" / file).touch()
    shutil.copy(tiny_checkpoint / "config.json", run)
    begun = with_(RANDENG, run_dir=run, init=InitConfig(model=missing))
    assert with_planned_vocabularies(begun, "randeng-1b")[1] == f"of {run}"


def test_warning_for_an_axis_that_shards_nothing(capsys):
    model = with_planned_vocabularies(RANDENG, "randeng-1b")[0].model
    replicated = "those weights are replicated on every device"
    of_fsdp = f"--mesh.fsdp 128 does not divide the decoder's width 1600: {replicated}"
    assert unsharded_weights(model, {"data": 1, "fsdp": 128, "tensor": 1}) == of_fsdp
    warning = unsharded_weights(model, {"data": 1, "fsdp": 1, "tensor": 7})
    assert "--mesh.tensor 7 divides none of the decoder's widths 1600, 6400 and 50048" in warning
    assert unsharded_weights(model, {"data": 1, "fsdp": 8, "tensor": 1}) is None
    small = ["--model.encoder.num-hidden-layers", 1, "--model.decoder.num-layers", 1]
    _, _, err = plan_of(capsys, "randeng-1b", "--chips", 128, "--mesh.fsdp", 128, "--batch-size", 128, *small)
    assert err == f"davae plan: warning: {of_fsdp}\n"


def test_min_chips_of_any_number():
    """A batch of 24 divides by 3; odd batch sizes work too."""
    model = dataclasses.replace(MODEL, decoder=dataclasses.replace(MODEL.decoder, hidden_size=160))
    config = with_(model=model, batch_size=24)
    by_chips = {
        n: sum(memory(config, mesh_of(n // math.gcd(n, 160), math.gcd(n, 160), 1, batch=24)).values())
        for n in (1, 2, 3, 4, 6, 8, 12, 24)
    }
    assert len(set(by_chips.values())) == len(by_chips)
    for required in by_chips.values():
        chip = H200._replace(memory=1.001 * required / 0.9)
        sufficient = [n for n, other in by_chips.items() if other <= 0.9 * chip.memory]
        assert min_chips(config, chip)[0] == min(sufficient)
    assert min_chips(config, H200._replace(memory=min(by_chips.values()))) is None
    odd = with_(config, batch_size=25)
    chips, mesh = min_chips(odd, H200._replace(memory=by_chips[6]))
    assert chips in (5, 25) and mesh["fsdp"] == 5
    split = with_(batch_size=5, mesh=MeshConfig(1, 1, 3))
    assert min_chips(split, H200)[0] == 3


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--chip", "h300"], "--chip"),
        (["--chips", "0"], "--chips must be at least 1, not 0"),
        (["--efficiency", "2"], "--efficiency must be above 0 and at most 1, not 2.0"),
        (["--mesh.fsdp", "3"], "--mesh.data -1 --mesh.fsdp 3 --mesh.tensor 1: does not fit 8 devices"),
        (["--batch-size", "12"], "--batch-size must be a multiple of data × fsdp = 8, not 12"),
        (["--batch-szie", "12"], "--batch-szie"),
        (["--attention", "mosaic_tpu"], "--attention mosaic_tpu does not run on H200, which runs xla"),
    ],
)
def test_invalid_options(argv, message, capsys):
    assert main(["plan", "randeng-1b", *argv]) == 2
    out, err = capsys.readouterr()
    assert out == "" and message in err and "Traceback" not in err


def test_an_unknown_preset(capsys):
    assert main(["plan", "randeng"]) == 2
    assert "no preset 'randeng'; available: demo, randeng-1b" in capsys.readouterr().err


def test_the_guide_shows_what_plan_prints(capsys):
    guide = (Path(__file__).parent.parent / "docs" / "pretraining.md").read_text(encoding="utf-8")
    shown = re.findall(r"```bash\ndavae (plan [^\n]*)\n```\n\n```\n(.*?)```", guide, flags=re.DOTALL)
    assert len(shown) == 2 and "--chips 8" in shown[0][0] and "tpu-v5e --chips 256" in shown[1][0]
    for command, output in shown:
        assert main(command.split()) == 0
        assert capsys.readouterr().out == output
