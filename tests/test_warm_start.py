"""New checkpoints from a real Hugging Face BERT and from a Transformer-XL in the Fengshenbang layout."""

import json
import shutil

import numpy as np
import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

import jax
import jax.numpy as jnp
from flax import nnx
from published_layout import (
    INV_FREQ,
    assert_same,
    config_of,
    publish,
    publish_safetensors,
    python,
    read_bin,
    same_bits,
    state_of,
    stored,
    tiny_with,
)
from tokenizer_fixtures import make_vocab

import davae_jax
from davae_jax import DAVAE, DAVAEConfig
from davae_jax.checkpoints.published.published_names import name_table
from davae_jax.checkpoints.published.to_torch import export
from davae_jax.checkpoints.warm_start import (
    covering_modules,
    initialize_weights,
    warm_start,
)
from davae_jax.checkpoints.weights import flat_params, unflatten
from davae_jax.cli.base import run_command
from davae_jax.cli.main import main
from davae_jax.cli.warm_start import WarmStart
from davae_jax.model.davae import merge, split
from davae_jax.parity.twin import load_twin
from davae_jax.utils.errors import InputError

BERT = dict(
    vocab_size=120,
    hidden_size=24,
    num_hidden_layers=3,
    num_attention_heads=4,
    intermediate_size=40,
    max_position_embeddings=20,
    type_vocab_size=2,
    layer_norm_eps=1e-12,
)
ENCODER, DECODER = "vae_model.encoder.", "vae_model.decoder."
L = 4


def randomised(model):
    """Every weight drawn anew: fresh biases are 0 and fresh LayerNorms 1, which would hide a mistake."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            noise = torch.randn(weight.shape, generator=generator)
            weight.copy_(1 + 0.3 * noise if name.endswith("LayerNorm.weight") else 0.3 * noise)
    return model.eval()


@pytest.fixture(scope="session")
def masked_lm(tmp_path_factory):
    """(folder, its BERT): names behind `bert.`, a head, no pooler."""
    folder = tmp_path_factory.mktemp("bert") / "masked-lm"
    model = randomised(transformers.BertForMaskedLM(transformers.BertConfig(**BERT)))
    model.save_pretrained(folder)
    make_vocab(folder)
    return folder, model.bert


@pytest.fixture(scope="session")
def bare_bert(tmp_path_factory):
    """(folder, its BERT): bare names, with a pooler, as pytorch_model.bin."""
    model = randomised(transformers.BertModel(transformers.BertConfig(**BERT)))
    config = model.config.to_dict()
    return publish(tmp_path_factory.mktemp("bert") / "bare", model.state_dict(), config), model


def transformer_xl_state(*, inv_freq=True):
    """The decoder of golden `small` under the names of a Transformer-XL."""
    state = {n.removeprefix(DECODER): t for n, t in state_of("small").items() if n.startswith(DECODER)}
    del state["transformer.linear_emb.weight"]
    if not inv_freq:
        del state["transformer.position_embeddings.inv_freq"]
    return state


@pytest.fixture(scope="session")
def transformer_xl(tmp_path_factory):
    folder = tmp_path_factory.mktemp("transformer-xl") / "source"
    return publish(folder, transformer_xl_state(), config_of("small")["decoder"])


@pytest.fixture(scope="session")
def config_file(tmp_path_factory):
    path = tmp_path_factory.mktemp("config") / "config.json"
    path.write_text(json.dumps(tiny_with(mine=1)), encoding="utf-8")
    return path


@pytest.fixture(scope="session")
def started(tmp_path_factory, masked_lm, transformer_xl):
    """(folder, report) of a warm start from both."""
    folder = tmp_path_factory.mktemp("warm") / "both"
    return folder, warm_start(folder, encoder=masked_lm[0], decoder=transformer_xl, latent_size=L, seed=3)


@pytest.fixture(scope="session")
def model(started):
    return davae_jax.from_pretrained(started[0])


def source_arrays(state, config, prefix):
    """A source's tensors by their paths in the model. The prefix is what the published names have before its own."""
    rows = [row for row in name_table(config) if row.name.removeprefix(prefix) in state]
    return {row.path: row.to_model(state[row.name.removeprefix(prefix)].numpy()) for row in rows}


@pytest.fixture
def drawn_in_groups(monkeypatch):
    """Replaces the initializers, which take long to compile, by a stand-in; the list holds the paths of each call."""
    groups = []

    def stand_in(config, paths, seed):
        groups.append(paths)
        return {row.path: np.zeros(row.model_shape, np.float32) for row in name_table(config) if row.path in paths}

    monkeypatch.setattr("davae_jax.checkpoints.warm_start.initialize_weights", stand_in)
    return groups


def assert_encodes_like(model, bert):
    """The encoder's hidden states, layer by layer, against transformers' own BERT."""
    ids = np.arange(1, 25).reshape(2, 12) * 4
    ids[1, 7:] = 0
    tensor = torch.from_numpy(ids)
    with torch.no_grad():
        theirs = bert(tensor, attention_mask=(tensor > 0).long(), output_hidden_states=True)
    ours = model.encoder(jnp.asarray(ids))
    assert len(ours.hidden) == len(theirs.hidden_states) == BERT["num_hidden_layers"] + 1
    for a, b in zip(ours.hidden, theirs.hidden_states, strict=True):
        np.testing.assert_allclose(np.asarray(a)[ids > 0], b.numpy()[ids > 0], atol=1e-5)
    if theirs.pooler_output is not None:
        np.testing.assert_allclose(ours.pooled, theirs.pooler_output.numpy(), atol=1e-5)


# Loaded weights


def test_the_encoder_computes_what_transformers_computes(model, masked_lm):
    assert_encodes_like(model, masked_lm[1])


def test_bare_names_and_the_pooler(bare_bert, transformer_xl, model, tmp_path, drawn_in_groups):
    report = warm_start(tmp_path / "new", encoder=bare_bert[0], decoder=transformer_xl, latent_size=L)
    loaded = report.loaded["encoder"]
    assert {path for path in loaded if "pooler" in path} == {"encoder.pooler.weight", "encoder.pooler.bias"}
    graphdef, _ = split(model)
    arrays = stored(tmp_path / "new")
    params = flat_params(model) | {path: jnp.asarray(arrays[path]) for path in loaded}
    assert_encodes_like(merge(graphdef, unflatten(params)), bare_bert[1])


def test_the_decoder_without_latent_is_the_transformer_xl(model, golden_arrays):
    """Known answers of the published program, which do not depend on the latent projection."""
    arrays = golden_arrays("small")
    logits, _ = model.decode(arrays["decoder_input_ids"], None)
    columns = np.asarray(logits)[..., arrays["logit_columns"]]
    np.testing.assert_allclose(columns, arrays["decoder_logits_cols_no_latent"], atol=1e-4)


def test_loaded_weights_are_bit_exact(started, transformer_xl, masked_lm):
    arrays = stored(started[0])
    config = DAVAEConfig.from_json(started[0] / "config.json")
    loaded = source_arrays(masked_lm[1].state_dict(), config, ENCODER)
    loaded |= source_arrays(transformer_xl_state(), config, DECODER)
    assert loaded.keys() == {path for paths in started[1].loaded.values() for path in paths}
    assert_same({path: arrays[path] for path in loaded}, loaded)
    assert "encoder.layers.1.query.weight" in loaded
    assert arrays["encoder.word.weight"].dtype == np.float32
    assert arrays["decoder.embedding.weight"].dtype == np.float16
    assert same_bits(arrays["decoder.inv_freq"], state_of("small")[INV_FREQ])
    assert {a.dtype for path, a in arrays.items() if path not in loaded} == {np.dtype(np.float32)}


def test_legacy_names(bare_bert, transformer_xl, tmp_path, drawn_in_groups):
    """`LayerNorm.gamma` and `.beta`, buffers, heads behind a prefix, float16."""
    state = {"bert.embeddings.position_ids": torch.arange(20)[None], "bert.embeddings.token_type_ids": torch.zeros(1)}
    for name, values in bare_bert[1].state_dict().items():
        name = name.replace("LayerNorm.weight", "LayerNorm.gamma").replace("LayerNorm.bias", "LayerNorm.beta")
        state[f"bert.{name}"] = values.half()
    state |= {"cls.predictions.bias": torch.zeros(120), "cls.predictions.transform.LayerNorm.gamma": torch.ones(24)}
    folder = publish(tmp_path / "old", state, BERT)
    report = warm_start(tmp_path / "new", encoder=folder, decoder=transformer_xl, latent_size=L)
    assert report.unused["encoder"] == ["cls.predictions.bias", "cls.predictions.transform.LayerNorm.gamma"]
    assert report.unused["decoder"] == []
    config = DAVAEConfig.from_json(tmp_path / "new" / "config.json")
    arrays = stored(tmp_path / "new")
    expected = source_arrays({name: x.half() for name, x in bare_bert[1].state_dict().items()}, config, ENCODER)
    assert_same({path: arrays[path] for path in report.loaded["encoder"]}, expected)


def test_frequencies_may_be_absent(masked_lm, tmp_path):
    state = transformer_xl_state(inv_freq=False)
    folder = publish_safetensors(tmp_path / "source", state, config_of("small")["decoder"])
    warm_start(tmp_path / "new", encoder=masked_lm[0], decoder=folder, latent_size=L)
    assert "decoder.inv_freq" not in stored(tmp_path / "new")
    model = davae_jax.from_pretrained(tmp_path / "new")
    np.testing.assert_allclose(model.decoder.inv_freq[...], 1 / 10000 ** (np.arange(0, 24, 2) / 24), rtol=1e-6)
    assert INV_FREQ not in read_bin(export(tmp_path / "new", tmp_path / "back"))


# Initialized weights


def test_other_weights_are_those_of_a_new_model(started):
    folder, report = started
    config, arrays = DAVAEConfig.from_json(folder / "config.json"), stored(folder)
    assert set(report.initialized) == {
        "encoder.pooler.weight",
        "encoder.pooler.bias",
        "encoder.posterior.weight",
        "decoder.latent_projection.weight",
        "discriminator.hidden.weight",
        "discriminator.hidden.bias",
        "discriminator.output.weight",
        "discriminator.output.bias",
    }
    assert set(report.initialized) | {path for paths in report.loaded.values() for path in paths} == arrays.keys()

    @jax.jit
    def new_model():
        params = flat_params(DAVAE(config, rngs=nnx.Rngs(3)))
        return {path: params[path] for path in report.initialized}

    for path, array in new_model().items():
        np.testing.assert_allclose(arrays[path], array, rtol=1e-5, atol=1e-8)
    paths = [path for path in report.initialized if path.startswith("encoder.")]
    other = initialize_weights(config, paths, seed=4)
    assert not np.allclose(other["encoder.posterior.weight"], arrays["encoder.posterior.weight"])


def test_a_part_without_a_source_is_drawn_piece_by_piece(
    masked_lm, transformer_xl, config_file, tmp_path, drawn_in_groups
):
    for part, source, initialized in (
        ("encoder", masked_lm[0], ["encoder.pooler", "encoder.posterior", "decoder", "discriminator"]),
        ("decoder", transformer_xl, ["encoder", "decoder.latent_projection", "discriminator"]),
    ):
        report = warm_start(tmp_path / part, config=config_file, **{part: source})
        assert covering_modules(report.initialized, report.loaded[part] + report.initialized) == initialized
        assert [path for group in drawn_in_groups for path in group] == report.initialized
        assert not [group for group in drawn_in_groups if len({path.split(".")[0] for path in group}) > 1]
        assert ["decoder.embedding.weight"] in drawn_in_groups or part == "decoder"  # 320 MB, by itself
        drawn_in_groups.clear()


def test_the_latents_map_can_begin_small(masked_lm, transformer_xl, config_file, tmp_path):
    """The scale comes from the config: the sources' own do not have it."""
    values = json.loads(config_file.read_text(encoding="utf-8"))
    initialized = {}
    for scale in (1.0, 0.01):
        values["decoder"]["latent_initializer_scale"] = scale
        (tmp_path / "config.json").write_text(json.dumps(values), encoding="utf-8")
        folder = tmp_path / str(scale)
        warm_start(folder, encoder=masked_lm[0], decoder=transformer_xl, config=tmp_path / "config.json", seed=3)
        initialized[scale] = stored(folder)["decoder.latent_projection.weight"]
    np.testing.assert_allclose(initialized[0.01], 0.01 * initialized[1.0], rtol=1e-5)
    assert 0.01 < initialized[1.0].std() < 0.03  # initializer_range is 0.02


# The new checkpoint


def test_the_config_combines_those_of_the_sources(
    started, masked_lm, transformer_xl, config_file, tmp_path, drawn_in_groups
):
    config = DAVAEConfig.from_json(started[0] / "config.json")
    assert (config.encoder.hidden_size, config.decoder.hidden_size, config.latent_size) == (24, 24, L)
    assert (config.top_k, config.top_p, config.repetition_penalty, config.std_scale) == (0, 0.9, 2.0, 1.5)
    assert config.encoder.extra["model_type"] == "bert"
    assert config.decoder.extra["relative_encoding"] is True
    assert (started[0] / "vocab.txt").read_bytes() == (masked_lm[0] / "vocab.txt").read_bytes()
    assert not (started[0] / "spiece.model").exists()

    shutil.copytree(transformer_xl, tmp_path / "source")
    (tmp_path / "source" / "spiece.model").write_bytes(b"pieces")
    warm_start(tmp_path / "new", encoder=masked_lm[0], decoder=tmp_path / "source", config=config_file)
    config = DAVAEConfig.from_json(tmp_path / "new" / "config.json")
    assert (config.latent_size, config.repetition_penalty, config.extra) == (4, 1.0, {"mine": 1})
    assert config.encoder.num_hidden_layers == BERT["num_hidden_layers"]
    assert (tmp_path / "new" / "spiece.model").read_bytes() == b"pieces"


def test_it_exports_to_the_published_layout(started, model, tmp_path):
    back = export(started[0], tmp_path / "back", dtype="float32")
    ids = np.arange(1, 13).reshape(2, 6)
    twin = load_twin(back)
    with torch.no_grad():
        mean = twin.encode(torch.from_numpy(ids)).mean
        logits = twin.decode(torch.from_numpy(ids), mean).logits
    np.testing.assert_allclose(model.encode(ids).mean, mean, atol=1e-5)
    np.testing.assert_allclose(model.decode(ids, mean.numpy())[0], logits, atol=1e-4)


def test_modules():
    every = ["a.b.c", "a.b.d", "a.e", "f.0.g", "f.1.g", "h"]
    assert covering_modules(["a.b.c", "a.b.d"], every) == ["a.b"]
    assert covering_modules(["a.b.c", "a.b.d", "a.e", "f.1.g"], every) == ["a", "f.1"]
    assert covering_modules(["a.b.d", "h"], every) == ["a.b.d", "h"]
    assert covering_modules([], every) == []


# What does not fit


def test_problems_of_both_sources_are_named_at_once(bare_bert, tmp_path):
    encoder = {f"bert.{name}": values for name, values in bare_bert[1].state_dict().items()}
    del encoder["bert.encoder.layer.0.output.dense.bias"], encoder["bert.pooler.dense.bias"]
    encoder["bert.encoder.layer.3.output.dense.bias"] = torch.zeros(24)
    encoder["bert.embeddings.LayerNorm.gamma"] = encoder.pop("bert.embeddings.LayerNorm.weight")[:5]
    decoder = transformer_xl_state()
    decoder["transformer.linear_emb.weight"] = torch.zeros(24, 16)
    decoder["transformer.r_w_bias"][0, 0] = float("nan")
    a = publish(tmp_path / "a", encoder, BERT)
    b = publish(tmp_path / "b", decoder, config_of("small")["decoder"])
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(InputError) as raised:
        warm_start(tmp_path / "new" / "new", encoder=a, decoder=b)
    assert str(raised.value) == (
        f"{a / 'pytorch_model.bin'}: 2 missing: bert.encoder.layer.0.output.dense.bias, bert.pooler.dense.bias; "
        "1 unexpected: bert.encoder.layer.3.output.dense.bias; "
        "1 misshapen: bert.embeddings.LayerNorm.gamma ([5], expected [24]); "
        f"{b / 'pytorch_model.bin'}: 1 unexpected: transformer.linear_emb.weight; "
        "1 with NaN or infinity: transformer.r_w_bias"
    )
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize(
    "part, config, message",
    [
        ("encoder", BERT | {"hidden_act": "relu"}, "hidden_act is 'relu'"),
        ("encoder", BERT | {"num_attention_heads": 5}, "num_attention_heads 5 does not divide hidden_size 24"),
        ("encoder", {"hidden_size": 24}, "vocab_size is missing, and so are num_hidden_layers"),
        ("decoder", BERT, "num_layers is missing, and so are max_memory_length"),
        ("decoder", [1], "does not contain a JSON object"),
    ],
)
def test_invalid_configs_of_sources(part, config, message, tmp_path):
    source = publish(tmp_path / "source", {}, config)
    with pytest.raises(InputError) as raised:
        warm_start(tmp_path / "new", **{part: source})
    assert str(source / "config.json") in str(raised.value)
    assert message in str(raised.value)


def test_the_wrong_kind_of_source(bare_bert, transformer_xl, tmp_path):
    source = tmp_path / "source"
    shutil.copytree(bare_bert[0], source)
    shutil.copyfile(transformer_xl / "pytorch_model.bin", source / "pytorch_model.bin")
    with pytest.raises(InputError, match="contains no BERT: tensor "):
        warm_start(tmp_path / "new", encoder=source)


# The command


def test_the_command_reports_the_origin_of_weights(masked_lm, transformer_xl, tmp_path, capsys):
    new = tmp_path / "new"
    new.mkdir()
    arguments = [new, "--encoder", masked_lm[0], "--decoder", transformer_xl, "--latent-size", L, "--overwrite"]
    assert run_command(lambda: WarmStart, [*map(str, arguments)], "davae warm-start") == 0
    assert capsys.readouterr().out.splitlines() == [
        f"encoder: 53 weights from {masked_lm[0]}: "
        "encoder.word, encoder.position, encoder.token_type, encoder.norm, encoder.layers",
        "encoder: 5 tensors of the source ignored: cls",
        f"decoder: 48 weights from {transformer_xl}: "
        "decoder.embedding, decoder.r_w_bias, decoder.r_r_bias, decoder.inv_freq, decoder.layers, decoder.norm",
        "newly initialized: 8 weights: encoder.pooler, encoder.posterior, decoder.latent_projection, discriminator",
        f"wrote {new}",
    ]
    assert sorted(p.name for p in new.iterdir()) == ["config.json", "params", "vocab.txt"]


def test_bad_arguments(masked_lm, tmp_path, config_file, capsys):
    new = tmp_path / "new"
    for arguments, code, message in (
        ([new], 2, "--encoder"),
        ([new, "--encoder", masked_lm[0], "--latent-size", 0], 2, "--latent-size"),
        ([], 2, "DST"),
        ([new, "--encoder", tmp_path / "nowhere"], 1, "nowhere: no such folder"),
        ([tmp_path, "--encoder", masked_lm[0]], 1, f"{tmp_path}: exists already"),
        ([new, "--encoder", masked_lm[0], "--config", tmp_path / "nowhere.json"], 1, "nowhere.json: no such file"),
        ([masked_lm[0], "--encoder", masked_lm[0], "--config", config_file, "--overwrite"], 2, "contains the source"),
    ):
        assert main(["warm-start", *map(str, arguments)]) == code, arguments
        out, err = capsys.readouterr()
        assert out == ""
        assert message in err and "Traceback" not in err
    assert not list(tmp_path.iterdir())


def test_the_module_is_the_same_command(tmp_path):
    process = python("-m", "convert.warm_start", tmp_path / "new")
    assert (process.returncode, process.stdout) == (2, "")
    assert process.stderr.count("\n") == 1
    assert "--encoder" in process.stderr
