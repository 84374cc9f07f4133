"""What version 0.1.0 left on disk is loaded and continued: runs, prepared texts, a converted checkpoint, a study."""

import dataclasses
import hashlib
import json
import tarfile
from pathlib import Path

import jax
import numpy as np
import pytest
from test_train import metrics_of, rows_of, train

from davae_jax import TextVAE
from davae_jax.checkpoints.weights import flatten
from davae_jax.cli.main import main as davae
from davae_jax.cli.train import parse_train
from davae_jax.data.batches import TextBatches
from davae_jax.data.inputs.readers import read_texts
from davae_jax.data.packing import PackedBatches
from davae_jax.data.prepared.shard_batches import PreparedTexts, ShardBatches
from davae_jax.data.prepared.shards import Prepared
from davae_jax.data.tokenize import tokenize
from davae_jax.model.config import DAVAEConfig
from davae_jax.model.davae import abstract_model, split
from davae_jax.tokenizers.decoder import DecoderTokenizer
from davae_jax.tokenizers.encoder import EncoderTokenizer
from davae_jax.training.initial_state import initial_state
from davae_jax.training.presets import DEMO
from davae_jax.training.run.checkpointer import Checkpoints
from davae_jax.training.run.vocabularies import prepare_tokenizers
from davae_jax.training.setup import load_corpus, make_batches
from davae_jax.training.state import abstract_state
from davae_jax.training.step import make_train_step

FIXTURES = Path(__file__).parent / "fixtures" / "v0.1.0"
EXPECTED = json.loads((FIXTURES / "expected.json").read_text(encoding="utf-8"))
RUNS = ["run", "packed_run", "lagging_run"]
# Restored values are compared bit for bit, computed ones to rounding: another JAX or CPU compiles to other bits.
SAME_JAX = EXPECTED["made_with"]["packages"]["jax"] == jax.__version__
RTOL = 1e-6 if SAME_JAX else 1e-4


@pytest.fixture
def unpacked(tmp_path, monkeypatch):
    """Unpacks an archive into an empty folder, which becomes the working directory."""

    def unpack(name):
        with tarfile.open(FIXTURES / f"{name}.tar.gz") as archive:
            archive.extractall(tmp_path, filter="data")
        monkeypatch.chdir(tmp_path)
        return tmp_path, EXPECTED[name]

    return unpack


def one_device_mesh():
    axes = ("data", "fsdp", "tensor")
    return jax.make_mesh((1, 1, 1), axes, axis_types=(jax.sharding.AxisType.Auto,) * 3, devices=jax.devices()[:1])


def sha256(array):
    return hashlib.sha256(np.ascontiguousarray(array).tobytes()).hexdigest()


def leaves_of(state):
    leaves = jax.tree_util.tree_leaves_with_path(state)
    return {jax.tree_util.keystr(path, simple=True, separator="."): leaf for path, leaf in leaves}


def assert_rows_close(found, expected):
    assert [row["step"] for row in found] == [row["step"] for row in expected]
    for a, b in zip(found, expected, strict=True):
        for name, value in b.items():
            np.testing.assert_allclose(a[name], value, rtol=RTOL, atol=1e-7, err_msg=f"step {b['step']}: {name}")


@pytest.mark.parametrize("name", RUNS)
def test_a_run_is_restored_bit_for_bit(name, unpacked):
    folder, expected = unpacked(name)
    _, config = parse_train(expected["argv"])
    model = abstract_model(DAVAEConfig.from_json(folder / "run" / "config.json"))
    mesh = one_device_mesh()
    checkpoints = Checkpoints(folder / "run", keep=2)
    assert checkpoints.step == expected["from"]
    state, _ = checkpoints.restore(abstract_state(model, config, mesh))
    # In the checkpoint, the parts of the state other than the params have one more level.
    stored = {path.removeprefix("state."): value for path, value in expected["arrays"].items()}
    found = {path: sha256(leaf) for path, leaf in leaves_of(state).items()}
    assert found == stored


@pytest.mark.parametrize("name", RUNS)
def test_a_run_is_continued(name, unpacked):
    folder, expected = unpacked(name)
    code, out, err = train(*expected["argv"])
    assert code == 0, err
    assert f"steps {expected['from']} to {expected['to']}" in out
    assert_rows_close(metrics_of(folder / "run"), expected["metrics"])
    assert_rows_close(rows_of(folder / "run" / "held_out.jsonl"), expected["held_out"])
    if SAME_JAX and expected["samples"]:
        assert rows_of(folder / "run" / "samples.jsonl") == expected["samples"]


def hashes_of(batch):
    """Of a batch's arrays as version 0.1.0 had them: int32, of one text a row the decoder's ids in one array."""
    arrays = {name: np.asarray(x, np.int32) for name, x in batch._asdict().items() if x is not None}
    if batch.decoder_segments is None:
        arrays["decoder_ids"] = np.concatenate([batch.decoder_ids[:, :1], arrays.pop("decoder_targets")], axis=1)
        arrays["lengths"] = arrays["lengths"][:, 0]
    return {name: sha256(x) for name, x in arrays.items()}


@pytest.mark.parametrize("kind", ["prepared", "packed", "plain"])
def test_the_order_of_the_data(kind, unpacked):
    folder, expected = unpacked("prepared")
    prepared, ids, order = Prepared(folder / "prepared"), expected["tokenizer_ids"], expected["orders"][kind]
    assert prepared.digest == expected["digest"] and len(prepared) == expected["records"]
    common = dict(batch_size=expected["batch_size"], pad_id=ids["pad_id"], seed=expected["seed"])
    lengths = dict(buckets=expected["buckets"], encoder_positions=expected["encoder_positions"])
    match kind:
        case "prepared":
            source = ShardBatches(prepared, max_length=expected["max_length"], **lengths, **common)
        case "packed":
            texts = PreparedTexts(prepared, expected["row_length"], expected["encoder_positions"])
            source = PackedBatches(texts, row_length=expected["row_length"], **common)
        case "plain":
            encoder = EncoderTokenizer(prepared.folder, **{n: ids[n] for n in ("cls_id", "sep_id", "max_ids")})
            decoder = DecoderTokenizer(prepared.folder, **{n: ids[n] for n in ("bos_id", "end_id", "pad_id")})
            texts = read_texts(folder / "texts.txt")
            texts = tokenize(texts, encoder, decoder, max_length=expected["max_length"], source="texts.txt")
            source = TextBatches(texts, **lengths, **common)
    assert (source.steps_per_epoch, source.count) == (order["per_epoch"], order["count"])
    assert [hashes_of(source.batch(step)) for step in range(len(order["steps"]))] == order["steps"]
    assert [source.describe(step) for step in range(len(order["where"]))] == order["where"]


def test_prepared_texts_are_complete(unpacked, capsys):
    """Prepared again with the same options, nothing is made anew, under the old names of the options too."""
    folder, expected = unpacked("prepared")
    before = {path: path.read_bytes() for path in sorted((folder / "prepared").rglob("*")) if path.is_file()}
    assert davae(["prepare", *expected["argv"]]) == 0
    assert {path: path.read_bytes() for path in sorted((folder / "prepared").rglob("*")) if path.is_file()} == before
    assert "--pieces is now --decoder-vocab-size" in capsys.readouterr().err


def test_a_converted_checkpoint(unpacked):
    folder, expected = unpacked("converted")
    vae = TextVAE.from_pretrained(folder / "converted")
    assert {path: sha256(w) for path, w in flatten(split(vae.model)[1]).items()} == expected["arrays"]
    texts, prompts, sampled = expected["texts"], expected["prompts"], expected["sampled"]
    z = vae.encode(texts, seed=0)
    np.testing.assert_allclose(z, expected["encode_seed_0"], atol=2e-5)
    posterior = vae.posterior(texts)
    np.testing.assert_allclose(posterior.mean, expected["posterior_mean"], atol=2e-5)
    np.testing.assert_allclose(posterior.logvar, expected["posterior_logvar"], atol=2e-5)
    generated = {
        "generate_greedy": vae.generate(z, seed=3, top_k=1),
        "generate_seed_3": vae.generate(z, seed=3),
        "generate_prompts_seed_3": vae.generate(z, prompts, seed=3, **sampled),
        "simulate_batch_seed_5": vae.simulate_batch(texts, seed=5),
        "sample_5_seed_7": vae.sample(5, seed=7),
        "sample_5_penalty_seed_7": vae.sample(5, seed=7, top_k=8, top_p=0.0, repetition_penalty=1.5),
        "interpolate_4_spherical_seed_9": vae.interpolate(texts[3], texts[4], 4, spherical=True, seed=9, **sampled),
        "analogy": vae.analogy(*texts[3:6]),
    }
    assert generated == {name: expected[name] for name in generated}


def test_it_is_exported_to_the_same_bytes(unpacked, capsys):
    folder, expected = unpacked("converted")
    argv = ["export", "converted", "published", "--dtype", "float16", "--format", "safetensors"]
    assert davae(argv) == 0
    data = (folder / "published" / "model.safetensors").read_bytes()
    size = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + size])
    header.pop("__metadata__", None)
    total = hashlib.sha256()
    for name, tensor in sorted(header.items()):
        start, stop = (8 + size + n for n in tensor["data_offsets"])
        total.update(name.encode() + data[start:stop])
    assert total.hexdigest() == expected["published_float16"]


def test_a_study_is_complete(unpacked, capsys):
    """Nothing is trained or measured again, and the comparison is the same."""
    folder, expected = unpacked("study")
    before = {path: path.read_bytes() for path in (folder / "out").rglob("*") if path.is_file()}
    assert davae(["compare", *expected["argv"]]) == 0
    comparison = json.loads((folder / "out" / "comparison.json").read_text(encoding="utf-8"))
    assert comparison["metrics"] == expected["comparison"]["found"]
    changed = {path.name for path, data in before.items() if path.read_bytes() != data}
    assert changed <= {"comparison.json", "comparison.md", "comparison.html", "comparison.svg"}


def test_the_demo_starts_as_before(tmp_path):
    """Its tokenizers and initial weights bit for bit, and the first 20 steps."""
    expected = EXPECTED["demo"]
    config = dataclasses.replace(DEMO, run_dir=tmp_path)
    corpus = load_corpus(config)
    prepare_tokenizers(config, tmp_path, corpus)
    for name, digest in expected["tokenizers"].items():
        assert hashlib.sha256((tmp_path / name).read_bytes()).hexdigest() == digest, name
    model = DAVAEConfig.from_dict(expected["config"])
    mesh = one_device_mesh()
    abstract = abstract_state(abstract_model(model), config, mesh)
    state = initial_state(abstract, model, config, tmp_path)
    assert {path: sha256(w) for path, w in flatten(state.params).items()} == expected["initial_params"]

    encoder = EncoderTokenizer(tmp_path, cls_id=model.cls_token_id, sep_id=model.sep_token_id, max_ids=128)
    decoder = DecoderTokenizer(
        tmp_path, bos_id=model.bos_token_id, end_id=model.end_token_id, pad_id=model.pad_token_id
    )
    batches = make_batches(config, corpus, (encoder, decoder), model)
    step = make_train_step(split(abstract_model(model))[0], config, abstract, batches.count)
    names = expected["first_20"][0].keys() - {"step"}
    sharding = jax.NamedSharding(mesh, jax.P(("data", "fsdp")))
    rows = []
    with jax.set_mesh(mesh):
        for i in range(20):
            state, values = step(state, jax.device_put(batches.batch(i), sharding))
            rows.append({"step": i + 1} | {name: float(values[name]) for name in names})
    assert_rows_close(rows, expected["first_20"])
