"""Published checkpoints in and out again, damaged ones refused, and loading without PyTorch or onto a mesh."""

import copy
import json
import os
import pickle
import subprocess
import sys
import zipfile
from pathlib import Path

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

torch = pytest.importorskip("torch")

from conftest import GOLDEN
from make_checkpoint import random_state, tensor, tensor_shapes
from tokenizer_fixtures import CLS_ID, SEP_ID, make_spiece, make_vocab

import davae_jax
from convert import names
from convert.from_torch import convert
from convert.names import INV_FREQ, POSITION_IDS, rows
from convert.to_torch import export
from convert.twin import load_twin
from davae_jax.checkpoint import load_arrays, params_of, stored_arrays
from davae_jax.cli import main
from davae_jax.config import DAVAEConfig
from davae_jax.errors import InputError

ROOT = Path(__file__).parent.parent
PIECES = 300
TINY = {
    "encoder": dict(
        vocab_size=250,
        hidden_size=12,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=20,
        max_position_embeddings=16,
        type_vocab_size=2,
    ),
    "decoder": dict(vocab_size=304, num_layers=2, hidden_size=8, num_attention_heads=2, max_memory_length=4),
    "latent_size": 4,
    "cls_token_id": CLS_ID,
    "sep_token_id": SEP_ID,
    "end_token_id": PIECES,
    "pad_token_id": PIECES + 1,
    "bos_token_id": PIECES + 2,
}
WORD = "vae_model.encoder.embeddings.word_embeddings.weight"
NORM = "vae_model.decoder.transformer.final_layernorm.weight"
DISC = "vae_model.Disc.0.weight"


def config_of(name):
    return json.loads((GOLDEN / name / "config.json").read_text(encoding="utf-8"))


def state_of(name):
    return torch.load(GOLDEN / name / "pytorch_model.bin", weights_only=True)


def publish(folder, state=None, config=TINY):
    """A published folder; a tiny random one unless told otherwise."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    torch.save(random_state(TINY) if state is None else state, folder / "pytorch_model.bin")
    return folder


def stored(folder):
    """The arrays of a converted folder as they lie there, by path."""
    one = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    targets = {
        path: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=one)
        for path, leaf in stored_arrays(folder / "params").items()
    }
    return {path: np.asarray(array) for path, array in load_arrays(folder / "params", targets).items()}


def same_bits(a, b):
    a, b = np.asarray(a), np.asarray(b)
    return a.dtype == b.dtype and a.shape == b.shape and a.tobytes() == b.tobytes()


def assert_same_state(actual, expected):
    """Names and their order, shapes, dtypes and every bit."""
    assert list(actual) == list(expected)
    for name, tensor_ in expected.items():
        assert same_bits(actual[name], tensor_), name


def assert_same_model(a, b):
    a, b = params_of(a), params_of(b)
    assert a.keys() == b.keys()
    for path in a:
        assert same_bits(a[path], b[path]), path


@pytest.fixture
def fails(capsys):
    """Runs `davae ARGS`, which must fail with one line on stderr and leave `beside` as it was; returns the line."""

    def run(*args, beside, code=1):
        before = sorted(beside.rglob("*")) if beside.is_dir() else None
        assert main([str(arg) for arg in args]) == code
        out, err = capsys.readouterr()
        assert out == ""
        assert err.count("\n") == 1, err
        assert beside.is_dir() == (before is not None)
        assert before is None or sorted(beside.rglob("*")) == before
        return err

    return run


@pytest.fixture(scope="session")
def tiny(tmp_path_factory):
    return publish(tmp_path_factory.mktemp("tiny") / "published")


@pytest.fixture(scope="session")
def texts(tmp_path_factory):
    """A published folder with tokenizers."""
    folder = publish(tmp_path_factory.mktemp("texts") / "published")
    make_vocab(folder)
    make_spiece(folder, PIECES)
    return folder


@pytest.fixture(scope="session")
def converted(tmp_path_factory, tiny, texts):
    """Converted folder of "small", "memory", "tiny" or "texts"; each is made once."""
    root, done = tmp_path_factory.mktemp("converted"), {}

    def get(name):
        if name not in done:
            done[name] = convert({"tiny": tiny, "texts": texts}.get(name, GOLDEN / name), root / name)
        return done[name]

    return get


# The table of names


def odd_config():
    config = copy.deepcopy(TINY)
    config["encoder"] |= dict(num_hidden_layers=11, type_vocab_size=1)
    config["decoder"] |= dict(num_layers=1, num_attention_heads=4)
    return config


@pytest.mark.parametrize(
    "config",
    [TINY, odd_config(), *map(config_of, ["small", "memory", "text", "full"])],
    ids=["tiny", "odd", "small", "memory", "text", "full"],
)
def test_the_table_is_the_published_file(config):
    table = rows(DAVAEConfig.from_dict(config))
    published = tensor_shapes(config)
    published.pop(POSITION_IDS)
    assert [(row.name, row.name_shape) for row in table] == list(published.items())
    assert len({row.path for row in table}) == len(table)


def test_random_checkpoints_are_the_same_everywhere():
    values = tensor("vae_model.decoder.transformer.layers.0.mlp.dense_h_to_4h.weight", (96, 24), seed=0)
    # Known bytes: division in float64 gives others.
    assert int(values.view(torch.int16).sum(dtype=torch.int64)) == -1


# Import


@pytest.mark.parametrize("name", ["small", "memory"])
def test_values_are_the_files_bit_for_bit(name, converted):
    """`small` holds both buffers, `memory` neither."""
    state, config = state_of(name), DAVAEConfig.from_dict(config_of(name))
    arrays = stored(converted(name))
    table = [row for row in rows(config) if row.name in state]
    assert arrays.keys() == {row.path for row in table}
    for row in table:
        assert same_bits(arrays[row.path], state[row.name].reshape(row.path_shape)), row.path
    assert ("decoder.inv_freq" in arrays) == (INV_FREQ in state) == (name == "small")


def test_stored_as_float16_and_uncompressed(converted):
    metadata = stored_arrays(converted("small") / "params")
    assert {leaf.dtype for leaf in metadata.values()} == {np.dtype(np.float16)}
    values = sum(int(np.prod(leaf.shape)) for leaf in metadata.values())
    on_disk = sum(file.stat().st_size for file in (converted("small") / "params").rglob("*") if file.is_file())
    assert 2 * values <= on_disk <= 1.2 * 2 * values  # compression makes random float16 about 15% smaller


def test_config_and_tokenizers_come_along(texts, converted):
    for name in ("config.json", "vocab.txt", "spiece.model"):
        assert (converted("texts") / name).read_bytes() == (texts / name).read_bytes()
    assert not (converted("tiny") / "vocab.txt").exists()


def test_sibling_models_hold_the_same_under_one_more_prefix(tmp_path, converted):
    state = {f"vae_model.{name}": tensor_ for name, tensor_ in random_state(TINY).items()}
    state |= {"ppvae.weight": torch.zeros(3), "vae_model.other.weight": torch.zeros(3)}
    with pytest.warns(UserWarning, match="2 tensors outside"):
        folder = convert(publish(tmp_path / "ppvae", state), tmp_path / "converted")
    ours, wanted = stored(folder), stored(converted("tiny"))
    assert ours.keys() == wanted.keys()
    assert all(same_bits(ours[path], wanted[path]) for path in wanted)
    assert_same_state(
        torch.load(export(folder, tmp_path / "back") / "pytorch_model.bin", weights_only=True), random_state(TINY)
    )


def test_safetensors_source(tmp_path, converted):
    from safetensors.torch import save_file

    folder = publish(tmp_path / "published")
    (folder / "pytorch_model.bin").unlink()
    save_file(random_state(TINY), folder / "model.safetensors")
    ours, wanted = stored(convert(folder, tmp_path / "converted")), stored(converted("tiny"))
    assert ours.keys() == wanted.keys()
    assert all(same_bits(ours[path], wanted[path]) for path in wanted)


@pytest.mark.parametrize("file", ["pytorch_model.bin", "model.safetensors"])
def test_bfloat16_source(file, tmp_path):
    from safetensors.torch import save_file

    state = {n: t if n == POSITION_IDS else t.bfloat16() for n, t in random_state(TINY).items()}
    folder = publish(tmp_path / "published", state)
    if file == "model.safetensors":
        (folder / "pytorch_model.bin").unlink()
        save_file(state, folder / file)
    arrays = stored(convert(folder, tmp_path / "converted"))
    assert {array.dtype for array in arrays.values()} == {np.dtype(ml_dtypes.bfloat16)}
    for row in rows(DAVAEConfig.from_dict(TINY)):
        assert arrays[row.path].tobytes() == state[row.name].view(torch.int16).numpy().tobytes()


def test_relative_paths(tmp_path, monkeypatch, tiny, converted):
    monkeypatch.chdir(tmp_path)
    assert main(["convert", os.path.relpath(tiny), "here"]) == 0
    assert_same_model(davae_jax.from_pretrained("here"), davae_jax.from_pretrained(converted("tiny")))
    assert main(["export", "here", "there/and/back"]) == 0
    state = torch.load("there/and/back/pytorch_model.bin", weights_only=True)
    assert_same_state(state, random_state(TINY))


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
    line = fails("convert", source, tmp_path / "out", beside=tmp_path)
    assert str(source / "pytorch_model.bin") in line
    for said in (
        f"1 missing: {NORM};",
        "1 unexpected: vae_model.encoder.encoder.layer.2.output.dense.bias;",
        f"1 misshapen: {WORD} ([7, 12], not [250, 12]);",
        "1 not floating point: vae_model.Disc.0.bias (int32);",
        f"2 NaN or infinite: {INV_FREQ}, {DISC}\n",
    ):
        assert said in line
    with pytest.raises(InputError, match="1 misshapen"):  # the same when loaded without converting
        davae_jax.from_pretrained(source)


class Hostile:
    """Makes a folder when unpickled."""

    def __init__(self, marker):
        self.marker = marker

    def __reduce__(self):
        return os.mkdir, (str(self.marker),)


def damage_truncated(path, marker):
    os.truncate(path, path.stat().st_size // 2)


def damage_last_bytes(path, marker):
    os.truncate(path, path.stat().st_size - 10)


def damage_text(path, marker):
    path.write_text("not a checkpoint\n" * 100)


def damage_pointer(path, marker):
    path.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 2498000000\n")


def damage_empty(path, marker):
    path.write_bytes(b"")


def damage_old_format(path, marker):
    torch.save(random_state(TINY), path, _use_new_zipfile_serialization=False)


def damage_other_zip(path, marker):
    with zipfile.ZipFile(path, "w") as file:
        file.writestr("hello.txt", "hello")


def damage_code(path, marker):
    torch.save({"weight": Hostile(marker)}, path)


def damage_bare_code(path, marker):
    path.write_bytes(pickle.dumps(Hostile(marker)))


def damage_list(path, marker):
    torch.save([torch.zeros(3)], path)


def damage_nested(path, marker):
    torch.save({"state_dict": random_state(TINY), "epoch": 3}, path)


@pytest.mark.parametrize(
    "damage, said",
    [
        (damage_truncated, "cut off or damaged"),
        (damage_last_bytes, "cut off or damaged"),
        (damage_text, "not in torch.save's zip format"),
        (damage_pointer, "Git LFS"),
        (damage_empty, "it is empty"),
        (damage_old_format, "before PyTorch 1.6"),
        (damage_other_zip, "cut off or damaged"),
        (damage_code, "could run code"),
        (damage_bare_code, "not in torch.save's zip format"),
        (damage_list, "holds a list, not a dict of tensors"),
        (damage_nested, "holds what is not a tensor: state_dict, epoch"),
    ],
)
def test_damaged_files(damage, said, tmp_path, fails):
    source = publish(tmp_path / "published")
    damage(source / "pytorch_model.bin", tmp_path / "marker")
    line = fails("convert", source, tmp_path / "new" / "out", beside=tmp_path)
    assert str(source / "pytorch_model.bin") in line
    assert said in line
    assert not (tmp_path / "marker").exists()


@pytest.mark.parametrize("cut", [0, 5, 100, -1])
def test_damaged_safetensors(cut, tmp_path, fails):
    from safetensors.torch import save_file

    source = publish(tmp_path / "published")
    file = source / "model.safetensors"
    save_file(random_state(TINY), file)
    os.truncate(file, cut if cut >= 0 else file.stat().st_size + cut)
    assert str(file) in fails("convert", source, tmp_path / "out", beside=tmp_path)


def without(*keys):
    config = copy.deepcopy(TINY)
    for key in keys:
        section, _, name = key.rpartition(".")
        del (config[section] if section else config)[name]
    return config


def with_value(key, value):
    config = copy.deepcopy(TINY)
    section, _, name = key.rpartition(".")
    (config[section] if section else config)[name] = value
    return config


@pytest.mark.parametrize(
    "config, said",
    [
        (with_value("encoder.num_attention_heads", 5), "num_attention_heads 5 does not divide encoder.hidden_size 12"),
        (with_value("decoder.num_attention_heads", 3), "num_attention_heads 3 does not divide decoder.hidden_size 8"),
        (without("decoder.num_layers", "decoder.vocab_size"), "decoder.vocab_size, decoder.num_layers"),
        (without("latent_size"), "missing field latent_size"),
        (without("encoder"), "section 'encoder' is missing"),
        (with_value("latent_size", 0), "latent_size is 0"),
        (with_value("latent_size", "4"), "latent_size is '4', not a int"),
        (with_value("latent_size", True), "latent_size is True"),
        (with_value("latent_size", 4.5), "latent_size is 4.5"),
        (with_value("latent_size", float("inf")), "latent_size is inf"),
        (with_value("latent_size", float("nan")), "latent_size is nan"),
        (with_value("encoder.hidden_dropout_prob", "high"), "encoder.hidden_dropout_prob is 'high'"),
        (with_value("length_weighted_loss", 1), "length_weighted_loss is 1"),
        (with_value("decoder", [1, 2]), "decoder"),
        ([1, 2], "no JSON object"),
    ],
)
def test_configs_that_cannot_be(config, said, tmp_path, fails):
    source = publish(tmp_path / "published", {}, config)
    line = fails("convert", source, tmp_path / "out", beside=tmp_path)
    assert str(source / "config.json") in line
    assert said in line


def test_no_config_and_no_weights(tmp_path, fails):
    source = publish(tmp_path / "published")
    (source / "config.json").rename(tmp_path / "config.json")
    assert f"{source / 'config.json'}: no such file" in fails("convert", source, tmp_path / "out", beside=tmp_path)
    (tmp_path / "config.json").rename(source / "config.json")
    (source / "pytorch_model.bin").unlink()
    assert f"{source}: holds no " in fails("convert", source, tmp_path / "out", beside=tmp_path)
    (source / "config.json").write_text("{")
    assert f"{source / 'config.json'}: cannot be read" in fails("convert", source, tmp_path / "out", beside=tmp_path)
    assert "no such folder" in fails("convert", tmp_path / "nowhere", tmp_path / "out", beside=tmp_path)
    assert "is a file" in fails("convert", source / "config.json", tmp_path / "out", beside=tmp_path)


@pytest.mark.parametrize("part, file", [("encoder", "vocab.txt"), ("decoder", "spiece.model")])
def test_a_vocabulary_larger_than_the_model(part, file, tmp_path, fails):
    config = with_value(f"{part}.vocab_size", 100)
    source = publish(tmp_path / "published", random_state(config), config)
    make_vocab(source)
    make_spiece(source, PIECES)
    line = fails("convert", source, tmp_path / "out", beside=tmp_path)
    assert str(source / file) in line
    assert f"{part}.vocab_size is 100" in line


# The destination


def test_what_exists_is_not_replaced_unless_told(tmp_path, tiny, converted, fails, capsys):
    out = tmp_path / "out"
    out.mkdir()
    (out / "keep").write_text("mine")
    assert f"{out}: exists already" in fails("convert", tiny, out, beside=tmp_path)
    broken = publish(tmp_path / "broken", {"a": torch.zeros(1)})
    fails("convert", broken, out, "--overwrite", beside=tmp_path)  # what stood there stays
    assert main(["convert", str(tiny), str(out), "--overwrite"]) == 0
    assert sorted(p.name for p in out.iterdir()) == ["config.json", "params"]
    assert sorted(p.name for p in tmp_path.iterdir()) == ["broken", "out"]
    capsys.readouterr()
    assert f"{out}: exists already" in fails("export", converted("tiny"), out, beside=tmp_path)
    assert main(["export", str(converted("tiny")), str(out), "--overwrite"]) == 0
    assert sorted(p.name for p in out.iterdir()) == ["config.json", "pytorch_model.bin"]


def test_a_source_is_never_replaced(tmp_path, fails):
    source = publish(tmp_path / "models" / "published")
    for dst in (source, tmp_path / "models"):
        line = fails("convert", source, dst, "--overwrite", beside=tmp_path, code=2)
        assert f"{dst}: holds the source" in line


def test_a_destination_that_cannot_be_written(tmp_path, tiny, fails):
    (tmp_path / "file").write_text("")
    line = fails("convert", tiny, tmp_path / "file" / "out", beside=tmp_path)
    assert f"{tmp_path / 'file' / 'out'}: cannot be written" in line
    if os.geteuid():  # nothing is closed to root
        (tmp_path / "closed").mkdir(mode=0o500)
        line = fails("convert", tiny, tmp_path / "closed" / "out", beside=tmp_path)
        assert f"{tmp_path / 'closed' / 'out'}: cannot be written" in line


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt, OSError])
@pytest.mark.parametrize("exists", [False, True])
def test_nothing_is_left_of_an_interrupted_conversion(error, exists, tmp_path, tiny, monkeypatch):
    def to_model(row, array):
        if row.path == "decoder.layers.1.mlp_in.weight":
            assert any(tmp_path.rglob("params*"))  # some has been written
            raise error("midway")
        return array.reshape(row.path_shape)

    monkeypatch.setattr(names.Row, "to_model", to_model)
    out = tmp_path / "new" / "out"
    if exists:
        out.mkdir(parents=True)
        (out / "keep").write_text("mine")
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(InputError if error is OSError else error, match="midway"):
        convert(tiny, out, overwrite=exists)
    assert sorted(tmp_path.rglob("*")) == before


def test_an_interrupt_between_the_two_renames(tmp_path, tiny, monkeypatch):
    out, rename = tmp_path / "out", Path.rename
    out.mkdir()
    (out / "keep").write_text("mine")

    def interrupted(path, target):
        if ".partial-" in path.name:
            raise KeyboardInterrupt
        return rename(path, target)

    monkeypatch.setattr(Path, "rename", interrupted)
    with pytest.raises(KeyboardInterrupt):
        convert(tiny, out, overwrite=True)
    assert [str(p.relative_to(tmp_path)) for p in sorted(tmp_path.rglob("*"))] == ["out", "out/keep"]


def command(*args, **environment):
    return subprocess.run(
        [sys.executable, *map(str, args)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        env=os.environ | {"JAX_PLATFORMS": "cpu"} | environment,
    )


def test_the_real_command_lines(tmp_path):
    source = publish(tmp_path / "published")
    damage_truncated(source / "pytorch_model.bin", None)
    run = command("-m", "convert.from_torch", source, tmp_path / "out")
    assert (run.returncode, run.stdout) == (1, "")
    assert run.stderr.count("\n") == 1
    assert str(source / "pytorch_model.bin") in run.stderr
    run = command("-m", "davae_jax.cli", "convert", source)
    assert (run.returncode, run.stdout) == (2, "")
    assert run.stderr.count("\n") == 1
    assert "DST" in run.stderr
    assert sorted(p.name for p in tmp_path.iterdir()) == ["published"]


# Export


@pytest.mark.parametrize("buffers", [{INV_FREQ, POSITION_IDS}, {INV_FREQ}, {POSITION_IDS}, set()], ids=len)
def test_there_and_back(buffers, tmp_path):
    wanted = {n: t for n, t in random_state(TINY).items() if n not in {INV_FREQ, POSITION_IDS} - buffers}
    folder = convert(publish(tmp_path / "published", wanted), tmp_path / "converted")
    back = export(folder, tmp_path / "back")
    assert_same_state(torch.load(back / "pytorch_model.bin", weights_only=True), wanted)
    assert (back / "config.json").read_bytes() == (folder / "config.json").read_bytes()
    assert_same_model(davae_jax.from_pretrained(back), davae_jax.from_pretrained(folder))


@pytest.mark.parametrize("name", ["small", "memory"])
def test_golden_there_and_back(name, converted, tmp_path, golden_arrays):
    back = export(converted(name), tmp_path / "back")
    assert_same_state(torch.load(back / "pytorch_model.bin", weights_only=True), state_of(name))
    arrays = {key: torch.from_numpy(np.asarray(array)) for key, array in golden_arrays(name).items()}
    ours, published = load_twin(back), load_twin(GOLDEN / name)
    with torch.no_grad():
        for twin in (ours, published):
            twin.seen = twin.encode(arrays["encoder_input_ids"])
            twin.logits = twin.decode(arrays["decoder_input_ids"], arrays["latent_z"]).logits
    assert torch.equal(ours.seen.mean, published.seen.mean)
    assert torch.equal(ours.logits, published.logits)
    columns = ours.logits[..., arrays["logit_columns"]]
    torch.testing.assert_close(columns, arrays["decoder_logits_cols"], rtol=0, atol=1e-4)


def test_export_in_float32_and_as_safetensors(converted, tmp_path):
    from safetensors.torch import load_file

    wanted = {n: t if n == POSITION_IDS else t.float() for n, t in random_state(TINY).items()}
    back = export(converted("tiny"), tmp_path / "back", dtype="float32", format="both")
    assert_same_state(torch.load(back / "pytorch_model.bin", weights_only=True), wanted)
    loaded = load_file(back / "model.safetensors")
    assert_same_state({name: loaded[name] for name in wanted}, wanted)
    assert loaded.keys() == wanted.keys()
    back = export(converted("tiny"), tmp_path / "again", format="safetensors")
    assert sorted(p.name for p in back.iterdir()) == ["config.json", "model.safetensors"]
    loaded = load_file(back / "model.safetensors")
    assert_same_state({name: loaded[name] for name in wanted}, random_state(TINY))


def test_a_value_too_large_for_float16_is_named(tmp_path, fails):
    state = {n: t if n == POSITION_IDS else t.float() for n, t in random_state(TINY).items()}
    state[NORM][3] = 70000.0
    folder = convert(publish(tmp_path / "published", state), tmp_path / "converted")
    line = fails("export", folder, tmp_path / "back", beside=tmp_path)
    assert NORM in line
    assert "float16" in line
    assert main(["export", str(folder), str(tmp_path / "back"), "--dtype", "float32"]) == 0
    assert_same_state(torch.load(tmp_path / "back" / "pytorch_model.bin", weights_only=True), state)


def test_only_converted_checkpoints_can_be_exported(tmp_path, tiny, converted, fails):
    assert f"{tiny}: holds no params/" in fails("export", tiny, tmp_path / "back", beside=tmp_path)
    other = convert(tiny, tmp_path / "other")
    DAVAEConfig.from_dict(with_value("decoder.num_layers", 1)).to_json(other / "config.json")
    assert "does not fit config.json" in fails("export", other, tmp_path / "back", beside=tmp_path)


def test_frequencies_come_back_as_they_were(tmp_path, converted):
    """Rounded in the file, they stay rounded; unrounded, an export in float16 does not round them."""
    rounded = random_state(TINY)[INV_FREQ]
    assert not torch.equal(rounded.float(), 1 / 10000 ** (torch.arange(0.0, 8, 2) / 8))
    for dtype in (jnp.float32, jnp.bfloat16):
        inv_freq = davae_jax.from_pretrained(converted("tiny"), dtype=dtype).decoder.inv_freq[...]
        assert same_bits(inv_freq, rounded.float())

    unrounded = 1 / 10000 ** (torch.arange(0.0, 8, 2) / 8)
    state = random_state(TINY) | {INV_FREQ: unrounded}
    folder = convert(publish(tmp_path / "published", state), tmp_path / "converted")
    back = torch.load(export(folder, tmp_path / "back") / "pytorch_model.bin", weights_only=True)
    assert_same_state(back, state)
    for source in (folder, tmp_path / "back"):
        inv_freq = davae_jax.from_pretrained(source, dtype=jnp.bfloat16).decoder.inv_freq[...]
        assert same_bits(inv_freq, unrounded)


# Loading


@pytest.mark.parametrize("name", ["small", "memory"])
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_published_and_converted_load_alike(name, dtype, converted):
    ours = davae_jax.from_pretrained(converted(name), dtype=dtype)
    assert_same_model(ours, davae_jax.from_pretrained(GOLDEN / name, dtype=dtype))
    assert {str(a.dtype) for p, a in params_of(ours).items() if p != "decoder.inv_freq"} == {jnp.dtype(dtype).name}


@pytest.mark.parametrize("lost", ["_CHECKPOINT_METADATA", "state/_METADATA", "state/manifest.ocdbt", "state/d"])
def test_damaged_converted_checkpoints(lost, tmp_path, tiny):
    folder = convert(tiny, tmp_path / "converted")
    path = folder / "params" / lost
    if path.is_dir():
        for file in path.iterdir():
            file.unlink()
    else:
        path.unlink()
    with pytest.raises(InputError, match=str(folder)):
        davae_jax.from_pretrained(folder)


WITHOUT_TORCH = """
import sys
sys.modules["torch"] = None  # `import torch` raises ImportError, and nobody finds it installed
import davae_jax
from davae_jax.errors import InputError
converted, safetensors, published = sys.argv[1:]
latents = []
for folder in (converted, safetensors):
    vae = davae_jax.TextVAE.from_pretrained(folder)
    latents.append(vae.encode(["今天天气很好"], std_scale=0.0))
    assert len(vae.generate(latents[-1], max_length=4)) == 1
    assert davae_jax.generate(vae.model, latents[-1], max_length=4, top_k=1, key=davae_jax_key(0))[0][0] == 302
assert (latents[0] == latents[1]).all()
try:
    davae_jax.from_pretrained(published)
except InputError as e:
    assert "PyTorch" in str(e) and "\\n" not in str(e), e
else:
    raise AssertionError("read without PyTorch")
print("fine")
"""


def test_no_pytorch_is_needed(texts, converted, tmp_path):
    export(converted("texts"), tmp_path / "safetensors", format="safetensors")
    script = "import jax; davae_jax_key = jax.random.key\n" + WITHOUT_TORCH
    run = command("-c", script, converted("texts"), tmp_path / "safetensors", texts)
    assert run.stdout == "fine\n", run.stderr


ON_A_MESH = """
import sys
import jax
import numpy as np
jax.config.update("jax_num_cpu_devices", 8)
import davae_jax
from davae_jax.checkpoint import params_of
for folder in sys.argv[1:]:
    mesh = jax.make_mesh((2, 2, 2), ("data", "fsdp", "tensor"), axis_types=(jax.sharding.AxisType.Auto,) * 3)
    one, many = davae_jax.from_pretrained(folder), davae_jax.from_pretrained(folder, mesh=mesh)
    ids = np.arange(1, 13).reshape(2, 6)
    z = one.encode(ids).mean
    np.testing.assert_allclose(many.encode(ids).mean, z, atol=1e-5)
    np.testing.assert_allclose(many.decode(ids, z)[0], one.decode(ids, z)[0], atol=1e-5)
    np.testing.assert_allclose(many.discriminate(z), one.discriminate(z), atol=1e-5)
    arrays = params_of(many)
    for path, array in params_of(one).items():
        assert np.array_equal(array, arrays[path]), path
        assert len(array.sharding.device_set) == 1 and len(arrays[path].sharding.device_set) == 8
    here = sum(a.addressable_shards[0].data.size for a in arrays.values()) / sum(a.size for a in arrays.values())
    split = [path for path, a in arrays.items() if a.addressable_shards[0].data.size * 4 == a.size]
    assert here < 0.3 and "decoder.layers.0.qkv_weight" in split and "decoder.embedding.weight" in split, (here, split)
print("fine")
"""


def test_a_mesh_of_eight(converted):
    run = command("-c", ON_A_MESH, converted("small"), GOLDEN / "memory")
    assert run.stdout == "fine\n", run.stderr


# The config


@pytest.mark.parametrize("name", ["small", "memory", "text", "full"])
def test_unknown_keys_survive(name, tmp_path):
    values = config_of(name) | {"mine": {"nested": [1, None]}, "top_k": None}
    values["encoder"]["mine"] = "e"
    values["decoder"]["mine"] = [1.5]
    config = DAVAEConfig.from_dict(values)
    config.to_json(tmp_path / "config.json")
    back = json.loads((tmp_path / "config.json").read_text(encoding="utf-8"))
    for section, wanted in ((back, values), (back["encoder"], values["encoder"]), (back["decoder"], values["decoder"])):
        assert {k: section[k] for k in wanted if not isinstance(wanted[k], dict) or k == "mine"} == {
            k: value for k, value in wanted.items() if k not in ("encoder", "decoder")
        }
    assert DAVAEConfig.from_json(tmp_path / "config.json") == config


def test_numbers_as_json_writers_write_them():
    config = DAVAEConfig.from_dict(with_value("latent_size", 4.0) | {"top_p": 1, "mine": 2.0})
    assert (config.latent_size, config.top_p) == (4, 1.0)
    assert isinstance(config.latent_size, int)


# The package


def test_the_wheel_holds_the_two_packages_and_converts(tmp_path, tiny, converted):
    pytest.importorskip("pip")
    setuptools = pytest.importorskip("setuptools")
    if int(setuptools.__version__.split(".")[0]) < 77:
        pytest.skip("the build needs setuptools 77")
    import shutil

    source = tmp_path / "source"
    shutil.copytree(
        ROOT, source, ignore=shutil.ignore_patterns(".git", "*.egg-info", "build", "dist", "golden", "__pycache__")
    )
    build = ["pip", "wheel", "--no-deps", "--no-build-isolation", "--no-index", "-q", "-w"]
    run = command("-m", *build, tmp_path / "wheel", source)
    assert run.returncode == 0, run.stderr
    (wheel,) = (tmp_path / "wheel").iterdir()
    with zipfile.ZipFile(wheel) as file:
        entries = file.namelist()
        file.extractall(tmp_path / "installed")
    folders = {entry.split("/")[0] for entry in entries}
    assert {f for f in folders if not f.endswith(".dist-info")} == {"davae_jax", "davae_jax_convert"}
    for folder, package in (("davae_jax", "davae_jax"), ("convert", "davae_jax_convert")):
        modules = {f"{package}/{file.name}" for file in (ROOT / folder).glob("*.py")}
        assert modules == {entry for entry in entries if entry.startswith(f"{package}/")}
    (entry_points,) = (entry for entry in entries if entry.endswith("entry_points.txt"))
    assert "davae = davae_jax.cli:main" in (tmp_path / "installed" / entry_points).read_text()

    # Away from the checkout, as after `pip install`.
    script = "import sys, davae_jax.cli as c; print(c.__file__); sys.exit(c.main(sys.argv[1:]))"
    run = subprocess.run(
        [sys.executable, "-c", script, "convert", str(tiny), "out"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        env=os.environ | {"PYTHONPATH": str(tmp_path / "installed"), "JAX_PLATFORMS": "cpu"},
    )
    assert run.returncode == 0, run.stderr
    assert run.stdout.startswith(str(tmp_path / "installed"))
    assert all(same_bits(a, stored(converted("tiny"))[path]) for path, a in stored(tmp_path / "out").items())
