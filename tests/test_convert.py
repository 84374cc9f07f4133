"""Conversion and export of published checkpoints, damaged files, loading without PyTorch and onto a mesh."""

import json
import os
import pickle
import resource
import shutil
import signal
import zipfile
import zlib
from importlib.metadata import version
from pathlib import Path

import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

torch = pytest.importorskip("torch")

from make_checkpoint import random_state, tensor, tensor_shapes
from published_layout import (
    GOLDEN,
    INV_FREQ,
    PIECES,
    POSITION_IDS,
    ROOT,
    TINY,
    assert_same,
    assert_same_file,
    assert_same_model,
    config_of,
    publish,
    publish_safetensors,
    python,
    same_bits,
    state_of,
    stored,
    tiny_with,
)
from tokenizer_fixtures import make_spiece, make_vocab

import davae_jax
from davae_jax.checkpoints.published import published_names as names
from davae_jax.checkpoints.published.from_torch import convert
from davae_jax.checkpoints.published.published_names import name_table
from davae_jax.checkpoints.published.to_torch import export
from davae_jax.checkpoints.weights import flat_params, stored_shapes
from davae_jax.cli.main import main
from davae_jax.model.config import DAVAEConfig
from davae_jax.parity.twin import load_twin
from davae_jax.utils.errors import InputError

WORD = "vae_model.encoder.embeddings.word_embeddings.weight"
NORM = "vae_model.decoder.transformer.final_layernorm.weight"
DISC = "vae_model.Disc.0.weight"


@pytest.fixture
def fails(tmp_path, capsys):
    """Runs `davae ARGS`, which must fail with one line on stderr and leave tmp_path as it was; returns the line."""

    def run(*args, code=1):
        before = sorted(tmp_path.rglob("*"))
        assert main([str(arg) for arg in args]) == code
        out, err = capsys.readouterr()
        assert out == ""
        assert err.count("\n") == 1, err
        assert sorted(tmp_path.rglob("*")) == before
        return err

    return run


@pytest.fixture(scope="session")
def tiny(tmp_path_factory):
    return publish(tmp_path_factory.mktemp("published") / "tiny")


@pytest.fixture(scope="session")
def texts(tmp_path_factory):
    """A published folder with tokenizers."""
    folder = publish(tmp_path_factory.mktemp("published") / "texts")
    make_vocab(folder)
    make_spiece(folder, PIECES)
    return folder


@pytest.fixture(scope="session")
def converted(tmp_path_factory, tiny, texts):
    """Returns the converted folder of "small", "memory", "tiny" or "texts"; each is converted once."""
    root, done = tmp_path_factory.mktemp("converted"), {}

    def get(name):
        if name not in done:
            done[name] = convert({"tiny": tiny, "texts": texts}.get(name, GOLDEN / name), root / name)
        return done[name]

    return get


# The table of names

ODD = tiny_with(encoder__num_hidden_layers=11, encoder__type_vocab_size=1, decoder__num_attention_heads=4)
CONFIGS = {"tiny": TINY, "odd": ODD} | {name: config_of(name) for name in ("small", "memory", "text", "full")}


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS.keys())
def test_the_table_is_the_published_file(config):
    table = name_table(DAVAEConfig.from_dict(config))
    published = tensor_shapes(config)
    published.pop(POSITION_IDS)
    assert [(row.name, row.file_shape) for row in table] == list(published.items())
    assert len({row.path for row in table}) == len(table)


def test_random_checkpoints_are_the_same_everywhere():
    """The known answers depend on these bytes. NumPy 2's division in float64 would change 40 values of this tensor."""
    values = tensor("vae_model.decoder.transformer.layers.0.attention.dense.weight", (800, 801), seed=0)
    assert zlib.crc32(values.numpy().tobytes()) == 3491260055


# Import


@pytest.mark.parametrize("name", ["small", "memory"])
def test_converted_values_are_bit_exact(name, converted):
    """`small` holds both buffers, `memory` neither."""
    state, config = state_of(name), DAVAEConfig.from_dict(config_of(name))
    table = [row for row in name_table(config) if row.name in state]
    arrays = stored(converted(name))
    assert_same(arrays, {row.path: state[row.name].reshape(row.model_shape) for row in table})
    assert ("decoder.inv_freq" in arrays) == (INV_FREQ in state) == (name == "small")


def test_stored_as_float16_and_uncompressed(converted):
    metadata = stored_shapes(converted("small") / "params")
    assert {leaf.dtype for leaf in metadata.values()} == {np.dtype(np.float16)}
    size = 2 * sum(int(np.prod(leaf.shape)) for leaf in metadata.values())
    on_disk = sum(file.stat().st_size for file in (converted("small") / "params").rglob("*") if file.is_file())
    assert size <= on_disk <= 1.2 * size  # compression would take 15% off random float16


def test_config_and_tokenizers_come_along(texts, converted):
    for name in ("config.json", "vocab.txt", "spiece.model"):
        assert (converted("texts") / name).read_bytes() == (texts / name).read_bytes()
    assert not (converted("tiny") / "vocab.txt").exists()


def test_sibling_models_with_one_more_prefix(tmp_path, converted):
    state = {f"vae_model.{name}": values for name, values in random_state(TINY).items()}
    state |= {"ppvae.weight": torch.zeros(3), "vae_model.other.weight": torch.zeros(3)}
    with pytest.warns(UserWarning, match="2 tensors outside"):
        folder = convert(publish(tmp_path / "ppvae", state), tmp_path / "converted")
    assert_same(stored(folder), stored(converted("tiny")))
    assert_same_file(export(folder, tmp_path / "back"), random_state(TINY))


def test_safetensors_source(tmp_path, converted):
    folder = convert(publish_safetensors(tmp_path / "published"), tmp_path / "converted")
    assert_same(stored(folder), stored(converted("tiny")))


@pytest.mark.parametrize("write", [publish, publish_safetensors])
def test_bfloat16_source(write, tmp_path):
    state = {n: t if n == POSITION_IDS else t.bfloat16() for n, t in random_state(TINY).items()}
    arrays = stored(convert(write(tmp_path / "published", state), tmp_path / "converted"))
    assert {array.dtype for array in arrays.values()} == {np.dtype(ml_dtypes.bfloat16)}
    for row in name_table(DAVAEConfig.from_dict(TINY)):
        assert arrays[row.path].tobytes() == state[row.name].view(torch.int16).numpy().tobytes()


def test_relative_paths(tmp_path, monkeypatch, tiny, converted):
    monkeypatch.chdir(tmp_path)
    assert main(["convert", os.path.relpath(tiny), "here"]) == 0
    assert_same_model(davae_jax.from_pretrained("here"), davae_jax.from_pretrained(converted("tiny")))
    assert main(["export", "here", "there/and/back"]) == 0
    assert_same_file(Path("there/and/back"), random_state(TINY))


# What does not fit


def test_all_problems_are_named_at_once(tmp_path, fails):
    state = random_state(TINY)
    del state[NORM]
    state[WORD] = state[WORD][:7]
    state[DISC][1, 2] = float("nan")
    state[INV_FREQ][-1] = float("inf")
    state["vae_model.Disc.0.bias"] = torch.zeros(16, dtype=torch.int32)
    state["vae_model.encoder.encoder.layer.2.output.dense.bias"] = torch.zeros(12)
    source = publish(tmp_path / "published", state)
    line = fails("convert", source, tmp_path / "out")
    assert str(source / "pytorch_model.bin") in line
    for message in (
        f"1 missing: {NORM};",
        "1 unexpected: vae_model.encoder.encoder.layer.2.output.dense.bias;",
        f"1 misshapen: {WORD} ([7, 12], expected [250, 12]);",
        "1 not floating point: vae_model.Disc.0.bias (int32);",
        f"2 with NaN or infinity: {INV_FREQ}, {DISC}\n",
    ):
        assert message in line
    with pytest.raises(InputError, match="1 misshapen"):  # the same when loaded without converting
        davae_jax.from_pretrained(source)


def test_position_ids_that_the_model_does_not_use(tmp_path, fails):
    """The published program would read position embeddings by them; here they are always 0, 1, 2, …"""
    state = random_state(TINY)
    state[POSITION_IDS] = state[POSITION_IDS].flip(1)
    assert POSITION_IDS in fails("convert", publish(tmp_path / "published", state), tmp_path / "out")


def test_values_too_large_for_the_dtype_of_the_model(tmp_path, fails):
    """Of float64 no model can hold them; 70000 is infinite in float16 alone."""
    state = {n: t if n == POSITION_IDS else t.double() for n, t in random_state(TINY).items()}
    state[NORM][3] = 70000.0
    source = publish(tmp_path / "published", state)
    assert float(flat_params(davae_jax.from_pretrained(source))["decoder.norm.weight"][3]) == 70000
    with pytest.raises(InputError, match=r"float16: decoder\.norm\.weight"):
        davae_jax.from_pretrained(source, dtype=jnp.float16)
    state[NORM][3] = 1e39
    assert NORM in fails("convert", publish(tmp_path / "larger", state), tmp_path / "out")


class Hostile:
    """Makes a folder when unpickled."""

    def __init__(self, marker):
        self.marker = marker

    def __reduce__(self):
        return os.mkdir, (str(self.marker),)


def truncate(path, size):
    os.truncate(path, size if size >= 0 else path.stat().st_size + size)


def write_zip(path):
    with zipfile.ZipFile(path, "w") as file:
        file.writestr("hello.txt", "hello")


OLD_FORMAT = dict(_use_new_zipfile_serialization=False)


def cut_old_format(path):
    torch.save(random_state(TINY), path, **OLD_FORMAT)
    truncate(path, path.stat().st_size // 2)


# Case → (function of the file and of the folder that hostile code would create, part of the error message)
DAMAGES = {
    "half": (lambda f, m: truncate(f, f.stat().st_size // 2), "truncated or damaged"),
    "end": (lambda f, m: truncate(f, -10), "truncated or damaged"),
    "empty": (lambda f, m: truncate(f, 0), "it is empty"),
    "text": (lambda f, m: f.write_text("not a checkpoint\n" * 100), "not in torch.save's zip format"),
    "pointer": (lambda f, m: f.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\n"), "Git LFS"),
    "half, old format": (lambda f, m: cut_old_format(f), "truncated or damaged"),
    "other zip": (lambda f, m: write_zip(f), "data.pkl"),
    "code": (lambda f, m: torch.save({"weight": Hostile(m)}, f), "could execute code"),
    "code, old format": (lambda f, m: torch.save({"weight": Hostile(m)}, f, **OLD_FORMAT), "could execute code"),
    "code, protocol 4": (lambda f, m: torch.save({"w": Hostile(m)}, f, pickle_protocol=4), "protocol 4"),
    "bare code": (lambda f, m: f.write_bytes(pickle.dumps(Hostile(m))), "not in torch.save's zip format"),
    "list": (lambda f, m: torch.save([torch.zeros(3)], f), "contains a list, not a dict of tensors"),
    "nested": (
        lambda f, m: torch.save({"state": {}, "epoch": 3}, f),
        "contains values that are not tensors: state,",
    ),
}


@pytest.mark.parametrize("damage, message", DAMAGES.values(), ids=DAMAGES.keys())
def test_damaged_files(damage, message, tmp_path, fails):
    source = publish(tmp_path / "published")
    damage(source / "pytorch_model.bin", tmp_path / "marker")
    line = fails("convert", source, tmp_path / "new" / "out")
    assert str(source / "pytorch_model.bin") in line
    assert message in line
    assert not (tmp_path / "marker").exists()


@pytest.mark.parametrize("size", [0, 5, 100, -1])
def test_damaged_safetensors(size, tmp_path, fails):
    source = publish_safetensors(tmp_path / "published")
    truncate(source / "model.safetensors", size)
    line = fails("convert", source, tmp_path / "out")
    assert f"{source / 'model.safetensors'}: cannot be read" in line


@pytest.mark.parametrize(
    "config, message",
    [
        (
            tiny_with(encoder__num_attention_heads=5),
            "encoder.num_attention_heads 5 does not divide hidden_size",
        ),
        (
            tiny_with(decoder__num_attention_heads=3),
            "decoder.num_attention_heads 3 does not divide hidden_size",
        ),
        (
            tiny_with(decoder__num_layers=None, decoder__vocab_size=None),
            "decoder.vocab_size is missing, and so are num_layers",
        ),
        (tiny_with(latent_size=None), "latent_size is missing"),
        (tiny_with(encoder=None), "encoder is missing"),
        (tiny_with(decoder=[1, 2]), "decoder"),
        (tiny_with(latent_size=0), "latent_size is 0"),
        (tiny_with(decoder__num_layers=2_147_483_647), "decoder.num_layers is 2147483647; it must be at most 1000"),
        (tiny_with(encoder__vocab_size=10**30), "encoder.vocab_size is 1000000000000000000000000000000"),
        (tiny_with(decoder__max_memory_length=1 << 40), "decoder.max_memory_length is 1099511627776"),
        (tiny_with(bos_token_id=1 << 31), "bos_token_id is 2147483648; an id must be in"),
        (tiny_with(latent_size="4"), "latent_size is '4', not of type int"),
        (tiny_with(latent_size=True), "latent_size is True"),
        (tiny_with(latent_size=4.5), "latent_size is 4.5"),
        (tiny_with(latent_size=float("inf")), "latent_size is inf"),
        (tiny_with(latent_size=float("nan")), "latent_size is nan"),
        (tiny_with(encoder__hidden_dropout_prob="high"), "encoder.hidden_dropout_prob is 'high'"),
        (tiny_with(length_weighted_loss=1), "length_weighted_loss is 1"),
        ([1, 2], "does not contain a JSON object"),
    ],
)
def test_invalid_configs(config, message, tmp_path, fails):
    source = publish(tmp_path / "published", {}, config)
    line = fails("convert", source, tmp_path / "out")
    assert str(source / "config.json") in line
    assert message in line


def test_missing_files(tmp_path, fails):
    source = publish(tmp_path / "published")
    (source / "config.json").rename(tmp_path / "config.json")
    assert f"{source / 'config.json'}: no such file" in fails("convert", source, tmp_path / "out")
    (tmp_path / "config.json").rename(source / "config.json")
    (source / "pytorch_model.bin").unlink()
    assert f"{source}: contains no " in fails("convert", source, tmp_path / "out")
    (source / "config.json").write_text("{")
    assert f"{source / 'config.json'}: cannot be read" in fails("convert", source, tmp_path / "out")
    assert f"{tmp_path / 'nowhere'}: no such folder" in fails("convert", tmp_path / "nowhere", tmp_path / "out")
    assert "is a file" in fails("convert", source / "config.json", tmp_path / "out")


@pytest.mark.parametrize("part, file", [("encoder", "vocab.txt"), ("decoder", "spiece.model")])
def test_a_vocabulary_larger_than_the_model(part, file, tmp_path, fails):
    config = tiny_with(**{f"{part}__vocab_size": 100})
    source = publish(tmp_path / "published", random_state(config), config)
    make_vocab(source)
    make_spiece(source, PIECES)
    line = fails("convert", source, tmp_path / "out")
    assert str(source / file) in line
    assert f"{part}.vocab_size is 100" in line


@pytest.mark.parametrize("name", ["small", "memory", "text", "full"])
def test_unknown_keys_survive(name, tmp_path):
    values = config_of(name) | {"mine": {"nested": [1, None]}, "top_k": None}
    values["encoder"]["mine"] = "e"
    values["decoder"]["mine"] = [1.5]
    config = DAVAEConfig.from_dict(values)
    config.to_json(tmp_path / "config.json")
    back = json.loads((tmp_path / "config.json").read_text(encoding="utf-8"))
    for part in ("encoder", "decoder"):
        wanted, actual = values.pop(part), back.pop(part)
        assert {key: actual[key] for key in wanted} == wanted
    assert {key: back[key] for key in values} == values
    assert DAVAEConfig.from_json(tmp_path / "config.json") == config


def test_numbers_as_json_writers_write_them():
    config = DAVAEConfig.from_dict(tiny_with(latent_size=4.0, top_p=1))
    assert (config.latent_size, config.top_p) == (4, 1.0)
    assert isinstance(config.latent_size, int)


# The destination


def test_existing_folders_are_replaced_only_with_overwrite(tmp_path, tiny, converted, fails, capsys):
    out = tmp_path / "out"
    out.mkdir()
    (out / "keep").write_text("mine")
    assert f"{out}: exists already" in fails("convert", tiny, out)
    assert f"{out}: contains files, but no checkpoint" in fails("convert", tiny, out, "--overwrite")
    (out / "config.json").write_text("{}")
    broken = publish(tmp_path / "broken", {"a": torch.zeros(1)})
    assert f"{out / 'keep'}: " in fails("convert", tiny, out, "--overwrite")
    (out / "keep").unlink()
    fails("convert", broken, out, "--overwrite")  # the existing folder is kept
    assert main(["convert", str(tiny), str(out), "--overwrite"]) == 0
    assert sorted(p.name for p in out.iterdir()) == ["config.json", "params"]
    capsys.readouterr()
    assert f"{out}: exists already" in fails("export", converted("tiny"), out)
    assert main(["export", str(converted("tiny")), str(out), "--overwrite"]) == 0
    assert sorted(p.name for p in out.iterdir()) == ["config.json", "pytorch_model.bin"]
    assert sorted(p.name for p in tmp_path.iterdir()) == ["broken", "out"]


def test_a_source_is_never_replaced(tmp_path, fails):
    source = publish(tmp_path / "models" / "published")
    for dst in (source, tmp_path / "models"):
        assert f"{dst}: contains the source" in fails("convert", source, dst, "--overwrite", code=2)


def test_a_destination_that_cannot_be_written(tmp_path, tiny, fails):
    (tmp_path / "file").write_text("")
    out = tmp_path / "file" / "out"
    assert f"{out}: cannot be written" in fails("convert", tiny, out)
    if os.geteuid():  # root can write everywhere
        (tmp_path / "closed").mkdir(mode=0o500)
        out = tmp_path / "closed" / "out"
        assert f"{out}: cannot be written" in fails("convert", tiny, out)


@pytest.mark.parametrize("write", ["convert", "bin", "safetensors"])
def test_a_full_disk(write, tmp_path, converted):
    folder = converted("small")
    _, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (300_000, hard))  # bytes of a file
    try:
        with pytest.raises(InputError) as raised:
            if write == "convert":
                convert(GOLDEN / "small", tmp_path / "out")
            else:
                export(folder, tmp_path / "out", format=write)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (hard, hard))
    assert str(raised.value).startswith(f"{tmp_path / 'out'}: cannot be written (")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt, OSError])
def test_an_interrupted_conversion_leaves_no_files(error, tmp_path, tiny, monkeypatch):
    def to_model(row, array):
        if row.path == "decoder.layers.1.mlp_in.weight":
            assert any(tmp_path.rglob("params*"))  # something has been written
            raise error("midway")
        return array.reshape(row.model_shape)

    monkeypatch.setattr(names.NameRow, "to_model", to_model)
    there = tmp_path / "there"
    there.mkdir()
    (there / "config.json").write_text("mine")
    before = sorted(tmp_path.rglob("*"))
    for out, overwrite in ((tmp_path / "new" / "out", False), (there, True)):
        with pytest.raises(InputError if error is OSError else error, match="midway"):
            convert(tiny, out, overwrite=overwrite)
        assert sorted(tmp_path.rglob("*")) == before


def test_an_interrupt_while_orbax_writes(tmp_path, tiny, monkeypatch):
    """Orbax's threads would go on, and write to the folder that is being removed."""
    from orbax.checkpoint import v1 as ocp

    save, complete = ocp.partial.save, []

    def interrupted(*args, **options):
        os.kill(os.getpid(), signal.SIGINT)
        save(*args, **options)
        complete.append(True)

    monkeypatch.setattr(ocp.partial, "save", interrupted)
    with pytest.raises(KeyboardInterrupt):
        convert(tiny, tmp_path / "out")
    assert complete == [True] and list(tmp_path.iterdir()) == []


def test_an_interrupt_between_the_two_renames(tmp_path, tiny, monkeypatch):
    rename = Path.rename

    def interrupted(path, target):
        if ".partial-" in path.name:
            raise KeyboardInterrupt
        return rename(path, target)

    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "config.json").write_text("mine")
    before = sorted(tmp_path.rglob("*"))
    monkeypatch.setattr(Path, "rename", interrupted)
    with pytest.raises(KeyboardInterrupt):
        convert(tiny, tmp_path / "out", overwrite=True)
    assert sorted(tmp_path.rglob("*")) == before


def test_the_real_command_lines(tmp_path):
    source = publish(tmp_path / "published")
    truncate(source / "pytorch_model.bin", 1000)
    run = python("-m", "convert.from_torch", source, tmp_path / "out")
    assert (run.returncode, run.stdout) == (1, "")
    assert run.stderr.count("\n") == 1
    assert str(source / "pytorch_model.bin") in run.stderr
    run = python("-m", "davae_jax.cli", "convert", source)
    assert (run.returncode, run.stdout) == (2, "")
    assert "DST" in run.stderr and "Traceback" not in run.stderr
    assert [p.name for p in tmp_path.iterdir()] == ["published"]


# Export


@pytest.mark.parametrize("buffers", [{INV_FREQ, POSITION_IDS}, {INV_FREQ}, {POSITION_IDS}, set()])
def test_convert_and_export(buffers, tmp_path):
    state = {n: t for n, t in random_state(TINY).items() if n not in {INV_FREQ, POSITION_IDS} - buffers}
    folder = convert(publish(tmp_path / "published", state), tmp_path / "converted")
    back = export(folder, tmp_path / "back")
    assert_same_file(back, state)
    assert (back / "config.json").read_bytes() == (folder / "config.json").read_bytes()


@pytest.mark.parametrize("name", ["small", "memory"])
def test_convert_and_export_golden_checkpoints(name, converted, tmp_path, golden_arrays):
    back = export(converted(name), tmp_path / "back")
    assert_same_file(back, state_of(name))
    arrays = {key: torch.from_numpy(np.asarray(array)) for key, array in golden_arrays(name).items()}
    results = []
    for twin in (load_twin(back), load_twin(GOLDEN / name)):
        with torch.no_grad():
            mean = twin.encode(arrays["encoder_input_ids"]).mean
            results.append((mean, twin.decode(arrays["decoder_input_ids"], arrays["latent_z"]).logits))
    (mean, logits), (published_mean, published_logits) = results
    assert torch.equal(mean, published_mean)
    assert torch.equal(logits, published_logits)
    columns = logits[..., arrays["logit_columns"]]
    torch.testing.assert_close(columns, arrays["decoder_logits_cols"], rtol=0, atol=1e-4)


def test_export_in_float32_and_as_safetensors(converted, tmp_path):
    from safetensors.torch import load_file

    state = {n: t if n == POSITION_IDS else t.float() for n, t in random_state(TINY).items()}
    back = export(converted("tiny"), tmp_path / "float32", dtype="float32", format="both")
    assert_same_file(back, state)
    assert_same(load_file(back / "model.safetensors"), state)
    back = export(converted("tiny"), tmp_path / "float16", format="safetensors")
    assert sorted(p.name for p in back.iterdir()) == ["config.json", "model.safetensors"]
    assert_same(load_file(back / "model.safetensors"), random_state(TINY))


def test_a_value_too_large_for_float16_is_named(tmp_path, fails):
    state = {n: t if n == POSITION_IDS else t.float() for n, t in random_state(TINY).items()}
    state[NORM][3] = 70000.0
    folder = convert(publish(tmp_path / "published", state), tmp_path / "converted")
    line = fails("export", folder, tmp_path / "back")
    assert NORM in line
    assert "float16" in line
    assert main(["export", str(folder), str(tmp_path / "back"), "--dtype", "float32"]) == 0
    assert_same_file(tmp_path / "back", state)


def test_only_converted_checkpoints_can_be_exported(tmp_path, tiny, converted, fails):
    assert f"{tiny}: contains no params/" in fails("export", tiny, tmp_path / "back")
    other = tmp_path / "other"
    shutil.copytree(converted("tiny"), other)
    DAVAEConfig.from_dict(tiny_with(decoder__num_layers=1)).to_json(other / "config.json")
    line = fails("export", other, tmp_path / "back")
    assert str(other) in line
    assert "decoder.layers.1.qkv_weight is unexpected" in line


def test_frequencies_are_exported_unchanged(tmp_path, converted):
    """Rounded frequencies stay rounded; others are rounded neither by bfloat16 nor by a float16 export."""
    exact = 1 / 10000 ** (torch.arange(0.0, 8, 2) / 8)
    rounded = random_state(TINY)[INV_FREQ]
    assert not torch.equal(rounded.float(), exact)
    state = random_state(TINY) | {INV_FREQ: exact}
    folder = convert(publish(tmp_path / "published", state), tmp_path / "converted")
    assert_same_file(export(folder, tmp_path / "back"), state)
    for source, wanted in ((converted("tiny"), rounded.float()), (folder, exact), (tmp_path / "back", exact)):
        model = davae_jax.from_pretrained(source, dtype=jnp.bfloat16)
        assert same_bits(model.decoder.inv_freq[...], wanted)


# Loading


@pytest.mark.parametrize("name, dtype", [("small", jnp.float32), ("small", jnp.bfloat16), ("memory", jnp.float32)])
def test_published_and_converted_load_the_same_model(name, dtype, converted):
    model = davae_jax.from_pretrained(converted(name), dtype=dtype)
    assert_same_model(model, davae_jax.from_pretrained(GOLDEN / name, dtype=dtype))
    dtypes = {array.dtype for path, array in flat_params(model).items() if path != "decoder.inv_freq"}
    assert dtypes == {jnp.dtype(dtype)}


@pytest.mark.parametrize("lost", ["_CHECKPOINT_METADATA", "state/_METADATA", "state/manifest.ocdbt", "state/d"])
def test_damaged_converted_checkpoints(lost, tmp_path, converted):
    folder = tmp_path / "converted"
    shutil.copytree(converted("tiny"), folder)
    path = folder / "params" / lost
    shutil.rmtree(path) if path.is_dir() else path.unlink()
    with pytest.raises(InputError, match=str(folder)):
        davae_jax.from_pretrained(folder)


WITHOUT_TORCH = """
import sys
sys.modules["torch"] = None  # `import torch` raises ImportError, and nobody finds it installed
import numpy as np
import davae_jax
from davae_jax.checkpoints.published.from_torch import convert
from davae_jax.checkpoints.published.to_torch import export
from davae_jax.utils.errors import InputError
converted, *others = sys.argv[1:]
vae = davae_jax.TextVAE.from_pretrained(converted)
(text,) = vae.simulate_batch(["今天天气很好"], max_length=4)
assert isinstance(text, str)
ids = np.asarray(vae.encoder_ids(["今天天气很好"]))
for folder in others:
    model = davae_jax.from_pretrained(folder)
    assert np.array_equal(vae.model.encode(ids).mean, model.encode(ids).mean)
convert(others[-1], others[-1] + "-converted")
try:
    export(converted, converted + "-exported")
except InputError as e:
    assert "pytorch_model.bin" in str(e) and "PyTorch" in str(e), e
else:
    raise AssertionError("written without PyTorch")
print("fine")
"""


def test_no_pytorch_is_needed(texts, converted, tmp_path):
    """Except to export pytorch_model.bin."""
    published, folder = tmp_path / "published", tmp_path / "own"
    shutil.copytree(texts, published)
    shutil.copytree(converted("texts"), folder)
    export(folder, tmp_path / "safetensors", format="safetensors")
    run = python("-c", WITHOUT_TORCH, folder, tmp_path / "safetensors", published)
    assert run.stdout == "fine\n", run.stderr
    assert_same(stored(tmp_path / "published-converted"), stored(folder))


ON_A_MESH = """
import sys
import jax
import numpy as np
jax.config.update("jax_num_cpu_devices", 8)
import davae_jax
from davae_jax.checkpoints.weights import flat_params
converted, published = sys.argv[1:]
mesh = jax.make_mesh((2, 2, 2), ("data", "fsdp", "tensor"), axis_types=(jax.sharding.AxisType.Auto,) * 3)
one = davae_jax.from_pretrained(converted)
many, direct = (davae_jax.from_pretrained(folder, mesh=mesh) for folder in (converted, published))
ids = np.arange(1, 13).reshape(2, 6)
z = np.asarray(one.encode(ids).mean)
np.testing.assert_allclose(many.encode(ids).mean, z, atol=1e-5)
np.testing.assert_allclose(many.decode(ids, z)[0], one.decode(ids, z)[0], atol=1e-5)
np.testing.assert_allclose(many.discriminate(z), one.discriminate(z), atol=1e-5)
for model in (many, direct):
    arrays = flat_params(model)
    for path, array in flat_params(one).items():
        assert len(array.sharding.device_set) == 1 and len(arrays[path].sharding.device_set) == 8, path
        assert np.array_equal(array, arrays[path]), path
    pieces = {path: a.addressable_shards[0].data.size / a.size for path, a in arrays.items()}
    assert pieces["decoder.layers.0.qkv_weight"] == pieces["decoder.embedding.weight"] == 1 / 4, pieces
    assert sum(pieces[path] * a.size for path, a in arrays.items()) < 0.3 * sum(a.size for a in arrays.values())
print("fine")
"""


def test_a_mesh_of_eight(tiny, converted):
    run = python("-c", ON_A_MESH, converted("tiny"), tiny)
    assert run.stdout == "fine\n", run.stderr


# The package


AS_INSTALLED = """
import sys
sys.path.insert(0, installed := sys.argv.pop(1))
from davae_jax.cli import main as cli
code = cli.main()
assert cli.__file__.startswith(installed)
sys.exit(code)
"""


def test_the_wheel_holds_the_package_and_converts(tmp_path, tiny, converted):
    if int(version("setuptools").split(".")[0]) < 77:
        pytest.skip("the build needs setuptools 77")
    source, installed = tmp_path / "source", tmp_path / "installed"
    for name in ("davae_jax", "convert", "tests"):
        shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("golden", "__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copyfile(ROOT / name, source / name)
    build = ["pip", "wheel", "--no-deps", "--no-build-isolation", "--no-index", "--quiet"]
    run = python("-m", *build, "--wheel-dir", tmp_path / "wheel", source)
    assert run.returncode == 0, run.stderr
    (wheel,) = (tmp_path / "wheel").iterdir()
    with zipfile.ZipFile(wheel) as file:
        entries = file.namelist()
        file.extractall(installed)
    roots = {entry.split("/")[0] for entry in entries}
    assert {root for root in roots if not root.endswith(".dist-info")} == {"davae_jax"}
    files = {file.relative_to(ROOT).as_posix() for file in (ROOT / "davae_jax").rglob("*.*")}
    files = {file for file in files if not file.endswith(".pyc")}
    assert files == {entry for entry in entries if entry.startswith("davae_jax/")}

    # Away from the checkout, as after `pip install`: what the `davae` script runs.
    (entry_points,) = installed.glob("*.dist-info/entry_points.txt")
    assert "davae = davae_jax.cli.main:script" in entry_points.read_text()
    run = python("-P", "-c", AS_INSTALLED, installed, "convert", tiny, tmp_path / "out")
    assert run.returncode == 0, run.stderr
    assert_same(stored(tmp_path / "out"), stored(converted("tiny")))
