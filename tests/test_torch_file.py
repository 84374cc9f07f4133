"""Reading published files: what is damaged is not taken for weights."""

import json
import os
import struct

import ml_dtypes
import numpy as np
import pytest

from davae_jax.checkpoints.published.torch_file import find_weights_file, read_tensors
from davae_jax.utils.errors import InputError

STATE = {
    "a": np.arange(6, dtype=np.float32).reshape(2, 3),
    "b": np.array([1.5, -2], ml_dtypes.bfloat16),
    "c": np.zeros((0, 4), np.float16),
    "d": np.array(7, np.int64),
}
ENTRIES = {
    "a": {"dtype": "F32", "shape": [2, 3], "data_offsets": [0, 24]},
    "b": {"dtype": "F32", "shape": [2], "data_offsets": [24, 32]},
}


def write_safetensors(path, header, size=32):
    data = (header if isinstance(header, str) else json.dumps(header)).encode()
    path.write_bytes(struct.pack("<Q", len(data)) + data + bytes(range(size)))
    return path


def assert_same(found, expected):
    assert list(found) == list(expected)
    for name, array in expected.items():
        assert found[name].dtype == array.dtype and found[name].shape == array.shape
        assert np.array_equal(found[name], array), name


def test_safetensors(tmp_path):
    """Written by the safetensors package, with every dtype and an empty tensor."""
    from safetensors.numpy import save_file

    path = tmp_path / "model.safetensors"
    save_file(STATE, path, metadata={"format": "pt"})
    assert_same(dict(sorted(read_tensors(path).items())), STATE)
    save_file({}, path)
    assert read_tensors(path) == {}


def changed(name="a", **changes):
    return ENTRIES | {name: ENTRIES[name] | changes}


@pytest.mark.parametrize(
    ("header", "size"),
    [
        (changed("b", data_offsets=[16, 24]), 24),  # overlap
        (changed("b", data_offsets=[28, 36]), 36),  # gap
        (changed("b", data_offsets=[32, 24]), 32),
        (changed("a", data_offsets=[-24, 0]), 32),
        (changed("a", shape=[-2, -3]), 32),
        (changed("a", shape=[2, 4]), 32),
        (changed("a", shape=[2.0, 3]), 32),
        (changed("a", dtype="F16"), 32),
        (changed("a", data_offsets=[0, 24, 24]), 32),
        (changed("a", data_offsets=None), 32),
        (ENTRIES, 33),  # trailing bytes
        (ENTRIES, 31),
        ({}, 4),
        ([], 0),
        ("{", 0),
        ("[" * 10_000, 0),
        ('{"a": %s, "a": %s}' % ((json.dumps(ENTRIES["a"]),) * 2), 24),  # a name twice
    ],
)
def test_damaged_safetensors(header, size, tmp_path):
    """Each of them is refused by the safetensors package too, except a name that occurs twice."""
    from safetensors import SafetensorError
    from safetensors.numpy import load_file

    path = write_safetensors(tmp_path / "model.safetensors", header, size)
    with pytest.raises(InputError) as e:
        read_tensors(path)
    assert str(e.value).startswith(f"{path}: ") and "\n" not in str(e.value)
    if "twice" not in str(e.value):
        with pytest.raises((SafetensorError, ValueError)):
            load_file(path)


def test_a_header_without_bound_is_not_read(tmp_path):
    """It is longer than the bound, in a sparse file that is large enough for it."""
    path = tmp_path / "model.safetensors"
    path.write_bytes(((1 << 24) + 1).to_bytes(8, "little"))
    os.truncate(path, 1 << 25)
    with pytest.raises(InputError, match="header is too long") as e:
        read_tensors(path)
    assert str(e.value).startswith(f"{path}: ")


@pytest.mark.parametrize("dtype", ["I8", "F8_E4M3"])
def test_an_unsupported_dtype_is_named(dtype, tmp_path):
    path = write_safetensors(tmp_path / "model.safetensors", changed("b", dtype=dtype, shape=[8]))
    with pytest.raises(InputError, match=f"'b' has the dtype '{dtype}'; supported: F16"):
        read_tensors(path)


def test_every_flipped_bit_of_the_weights_is_noticed(tmp_path):
    """PyTorch itself does not check the sums of its zip files."""
    torch = pytest.importorskip("torch")
    path = tmp_path / "pytorch_model.bin"
    torch.save({"a": torch.arange(300.0), "b": torch.ones(3, 3)}, path)
    intact = path.read_bytes()
    assert np.array_equal(read_tensors(path)["a"], np.arange(300.0))
    begin = intact.index(np.arange(300.0, dtype=np.float32)[1:9].tobytes())
    for position in range(begin, begin + 1190, 70):
        data = bytearray(intact)
        data[position] ^= 1 << (position % 8)
        path.write_bytes(data)
        with pytest.raises(InputError, match="CRC-32") as e:
            read_tensors(path)
        assert str(e.value).startswith(f"{path}: ")


def test_no_damage_of_a_zip_file_gives_another_error(tmp_path):
    torch = pytest.importorskip("torch")
    path, rng = tmp_path / "pytorch_model.bin", np.random.default_rng(0)
    torch.save({"a": torch.arange(30.0)}, path)
    intact, expected = path.read_bytes(), np.arange(30.0, dtype=np.float32)
    for _ in range(300):
        data = bytearray(intact)
        for position in rng.integers(0, len(data), rng.integers(1, 4)):
            data[position] = rng.integers(256)
        path.write_bytes(data[: rng.integers(len(data))] if rng.integers(5) == 0 else data)
        try:
            state = read_tensors(path)
        except InputError as e:
            assert str(path) in str(e) and "\n" not in str(e)
        else:  # bytes that mean nothing, or a name
            assert all(np.array_equal(array, expected) for array in state.values())


def test_a_name_that_breaks_the_line(tmp_path):
    torch = pytest.importorskip("torch")
    path = tmp_path / "pytorch_model.bin"
    torch.save({"a\nb": torch.ones(1)}, path)
    with pytest.raises(InputError) as e:
        read_tensors(path)
    assert "'a\\nb'" in str(e.value) and "\n" not in str(e.value)


@pytest.fixture
def parts(tmp_path):
    """A checkpoint in two files, as transformers saves large ones."""
    from safetensors.numpy import save_file

    names = {"a": "model-00001-of-00002.safetensors", "b": "model-00001-of-00002.safetensors"}
    names |= dict.fromkeys("cd", "model-00002-of-00002.safetensors")
    for file in set(names.values()):
        save_file({name: STATE[name] for name in STATE if names[name] == file}, tmp_path / file)
    index = {"metadata": {"total_size": 36}, "weight_map": names}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index), encoding="utf-8")
    return tmp_path


def test_a_checkpoint_in_parts(parts):
    assert_same(dict(sorted(read_tensors(find_weights_file(parts)).items())), STATE)


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("model-00002-of", "model-00003-of", "names 'model-00003-of-00002.safetensors', which is not in its folder"),
        ("model-00002-of", "../model-00002-of", "which is not in its folder"),
        ('"c"', '"e"', "against model.safetensors.index.json"),
        ("weight_map", "weights", "lacks a weight_map"),
        ("model-00002-of-00002.safetensors", "model.safetensors.index.json", "which is an index"),
    ],
)
def test_a_wrong_index(parts, old, new, message):
    index = parts / "model.safetensors.index.json"
    index.write_text(index.read_text(encoding="utf-8").replace(old, new), encoding="utf-8")
    with pytest.raises(InputError, match=message):
        read_tensors(find_weights_file(parts))
