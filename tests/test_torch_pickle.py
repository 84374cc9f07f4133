"""Files of torch.save, read without PyTorch and held against it; none of them runs anything."""

import io
import json
import pickle
import struct
import sys
import time
import tracemalloc
import warnings
import zipfile

import numpy as np
import pytest

torch = pytest.importorskip("torch")

from torch_files import (
    PICKLE_OF_ZIP,
    big_endian,
    every_kind_of_tensor,
    mutate,
    packed,
    same,
    saved,
    with_pickle,
    zip_parts,
)

from davae_jax.checkpoints.published import torch_archive
from davae_jax.checkpoints.published.torch_archive import read_torch
from davae_jax.checkpoints.published.torch_file import find_weights_file, read_tensors
from davae_jax.checkpoints.published.torch_pickle import PickleMachine
from davae_jax.utils.errors import InputError

KINDS = every_kind_of_tensor()
OLD_FORMAT = {"_use_new_zipfile_serialization": False}


@pytest.fixture
def path(tmp_path):
    return tmp_path / "pytorch_model.bin"


def refusal(path, file: bytes) -> str:
    """Returns the reason why a file is refused: one line of bounded length that names the file."""
    path.write_bytes(file)
    with pytest.raises(InputError) as e:
        read_tensors(path)
    prefix, message = f"{path}: ", str(e.value)
    assert message.startswith(prefix) and message.isprintable() and len(message) < len(prefix) + 500
    return message.removeprefix(prefix)


def assert_same_state(found, expected):
    assert list(found) == list(expected)
    assert [name for name in expected if not same(found[name], expected[name])] == []


# What torch.save writes


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("options", [{}, OLD_FORMAT], ids=["zip", "old format"])
def test_every_kind_is_read_as_pytorch_reads_it(kind, options, path):
    path.write_bytes(saved(KINDS[kind], **options))
    assert_same_state(read_torch(path), torch.load(path, weights_only=True))


def test_strides_are_views_and_ties_share_memory(path):
    """Of the file: nothing is copied."""
    path.write_bytes(saved(KINDS["strides"] | KINDS["ties"]))
    arrays = read_torch(path)
    for name, tensor in KINDS["strides"].items():
        strides = [stride * tensor.element_size() if n > 1 else 0 for n, stride in zip(tensor.shape, tensor.stride())]
        assert list(arrays[name].strides) == strides, name
    assert np.shares_memory(arrays["a"], arrays["b"]) and np.shares_memory(arrays["a"], arrays["last"])
    assert not any(array.flags.owndata or array.flags.writeable for array in arrays.values())


def test_new_dtypes(path):
    """Their storages are untyped, which the old format does not know. Those without a dtype in NumPy are named."""
    state = {name: torch.tensor([1, 2, 200]).to(getattr(torch, name)) for name in ("uint16", "uint32", "uint64")}
    path.write_bytes(saved(state))
    assert_same_state(read_torch(path), torch.load(path, weights_only=True))
    assert "untyped" in refusal(path, saved(state, **OLD_FORMAT))
    for name in ("float8_e4m3fn", "float8_e5m2"):
        reason = refusal(path, saved({"a.b": torch.ones(2).to(getattr(torch, name))}))
        assert reason.startswith("a.b ") and f"torch.{name}" in reason


def test_the_other_byte_order(path):
    state = {**KINDS["dtypes"], "none": torch.zeros(0, 2)}
    sizes = [t.element_size() // (2 if t.is_complex() else 1) for t in state.values()]
    path.write_bytes(big_endian(saved(state), {str(i): size for i, size in enumerate(sizes)}))
    assert_same_state(read_torch(path), torch.load(path, weights_only=True))
    assert_same_state(read_torch(path), state)
    untyped = {"a": torch.ones(2, dtype=torch.uint16)}
    assert "untyped" in refusal(path, big_endian(saved(untyped), {"0": 2}))


@pytest.mark.parametrize(
    "state, named",
    [
        ({"a.b": torch.eye(2).to_sparse()}, "torch._utils._rebuild_sparse_tensor"),
        ({"a.b": torch.ones(2, requires_grad=True, device="meta")}, "torch._utils._rebuild_meta_tensor_no_storage"),
        ({"a.b": torch.ones(2, dtype=torch.complex64).conj()}, "a.b"),
        ({"a.b": torch.ones(2), 3: torch.ones(1)}, "3"),
        ({"a.b": {"c": torch.ones(2)}, "d\ne": 1, "f": torch.ones(1)}, "a.b, 'd\\ne'"),
        ({"a\nb": torch.ones(1)}, "'a\\nb'"),
        ({"state_dict": {"a": torch.ones(1)}}, "state_dict"),
        (torch.ones(2), "Tensor"),
        ([torch.ones(2)], "list"),
        ({str(i): i for i in range(10_000)}, "…"),
    ],
)
def test_more_than_dense_tensors_by_name(state, named, path):
    assert named in refusal(path, saved(state))


# Hostile pickles


def text(value: str) -> bytes:
    data = value.encode()
    return pickle.BINUNICODE + struct.pack("<I", len(data)) + data


def storage(count=4, key="0", kind="FloatStorage") -> bytes:
    return b"(" + text("storage") + f"ctorch\n{kind}\n".encode() + text(key) + text("cpu") + number(count) + b"tQ"


def number(value) -> bytes:
    return pickle.dumps(value, protocol=2)[2:-1]


def tensor(offset=0, shape=(4,), strides=(1,), count=4, extra=b"\x89ccollections\nOrderedDict\n)R", **kwargs) -> bytes:
    """Returns a program that leaves a tensor on the stack."""
    sizes = number(offset) + number_tuple(shape) + number_tuple(strides)
    return b"ctorch._utils\n_rebuild_tensor_v2\n(" + storage(count, **kwargs) + sizes + extra + b"tR"


def number_tuple(values) -> bytes:
    return b"(" + b"".join(map(number, values)) + b"t" if isinstance(values, tuple) else number(values)


def state(value: bytes, name: str = "a") -> bytes:
    return b"\x80\2}" + text(name) + value + b"s."


def test_the_programs_below_are_read_when_they_are_sound(path):
    path.write_bytes(with_pickle(state(tensor())))
    assert_same_state(read_torch(path), {"a": torch.arange(4.0)})
    assert_same_state(read_torch(path), torch.load(path, weights_only=True))


EMPTY_STATE = b"\x80\2}q\0.\x80\2]q\0."  # of the old format: no tensors, no storages
MARKER = "marker-of-a-hostile-pickle"
MKDIR = text(MARKER) + b"\x85R"
HOSTILE = {
    "GLOBAL": b"\x80\2cos\nmkdir\n" + MKDIR + b".",
    "GLOBAL posix": b"\x80\2cposix\nmkdir\n" + MKDIR + b".",
    "eval": b"\x80\2cbuiltins\neval\n" + text(f"__import__('os').mkdir({MARKER!r})") + b"\x85R.",
    "Python 2's eval": b"\x80\2c__builtin__\neval\n" + text("1") + b"\x85R.",
    "a dot in the module": b"\x80\2ctorch.serialization\nos.mkdir\n" + MKDIR + b".",
    "a dot in the name": b"\x80\2ctorch\n_utils._rebuild_tensor_v2\n" + MKDIR + b".",
    "an attribute of what is known": b"\x80\2ccollections\nOrderedDict.__init__.__globals__\n.",
    "torch.load": b"\x80\2ctorch\nload\n" + MKDIR + b".",
    "torch.hub": b"\x80\2ctorch.hub\nload\n" + MKDIR + b".",
    "torch.utils": b"\x80\2ctorch.utils.collect_env\nrun\n" + MKDIR + b".",
    "STACK_GLOBAL": b"\x80\4" + text("os") + text("mkdir") + b"\x93" + MKDIR + b".",
    "STACK_GLOBAL, protocol 2": b"\x80\2" + text("os") + text("mkdir") + b"\x93" + MKDIR + b".",
    "INST": b"\x80\2(" + text(MARKER) + b"ios\nmkdir\n.",
    "OBJ": b"\x80\2(cos\nmkdir\n" + text(MARKER) + b"o.",
    "NEWOBJ": b"\x80\2ccollections\nOrderedDict\n)\x81.",
    "NEWOBJ_EX": b"\x80\2ccollections\nOrderedDict\n)}\x92.",
    "EXT1": b"\x80\2\x82\1" + MKDIR + b".",
    "EXT4": b"\x80\2\x84\1\0\0\0" + MKDIR + b".",
    "PERSID": b"\x80\2Pstorage\n.",
    "BINPERSID of a text": b"\x80\2" + text("storage") + b"Q.",
    "BINPERSID of a module": b"\x80\2(" + text("module") + b"cos\nmkdir\n" + text("x") * 2 + b"tQ.",
    "BINPERSID of a module, known": b"\x80\2(" + text("module") + b"ctorch\nFloatStorage\n" + text("x") * 3 + b"tQ.",
    "REDUCE of a storage type": b"\x80\2ctorch\nFloatStorage\n" + MKDIR + b".",
    "REDUCE of a text": b"\x80\2" + text("os.mkdir") + MKDIR + b".",
    "REDUCE of a tensor": b"\x80\2" + tensor() + MKDIR + b".",
    "OrderedDict of arguments": b"\x80\2ccollections\nOrderedDict\n(]tR.",
    "BUILD of a dict": b"\x80\2}}b.",
    "BUILD of a tensor": state(tensor() + b"}" + text("__setstate__") + b"cos\nmkdir\nsb"),
    "BUILD of a global": b"\x80\2ccollections\nOrderedDict\n}" + text("__reduce__") + text("x") + b"sb.",
    "SETITEM of a list": b"\x80\2]" + text("a") + b"Ns.",
    "SETITEM of a global": b"\x80\2ccollections\nOrderedDict\n" + text("a") + b"Ns.",
    "APPEND to a dict": b"\x80\2}" + text("a") + b"a.",
    "a FRAME": b"\x80\2\x95" + b"\xff" * 8 + b".",
    "a buffer out of band": b"\x80\2\x97.",
    "BYTEARRAY8": b"\x80\2\x96" + b"\xff" * 7 + b"\x7f.",
    "LONG4": b"\x80\2\x8b\xff\xff\xff\x7f.",
    "LONG": b"\x80\2L" + b"9" * 10_000 + b"L\n.",
    "INT": b"\x80\2I" + b"9" * 10_000 + b"\n.",
    "a long text": b"\x80\2X\xff\xff\xff\xff.",
    "BINUNICODE8": b"\x80\2\x8d" + b"\xff" * 7 + b"\x7f.",
    "STRING": b"\x80\2S'" + b"\\x41" * 1000 + b"'\n.",
    "no end": b"\x80\2}",
    "nothing": b"",
    "two values": b"\x80\2}}.",
    "an open mark": b"\x80\2(}.",
    "no value": b"\x80\2.",
    "more after the end": state(tensor()) + b"cos\nmkdir\n" + MKDIR + b".",
    "POP": b"\x80\2}N0.",
    "an endless module": b"\x80\2c" + b"a" * 100_000 + b"\nb\n.",
    "a line in a name": b"\x80\2c\x1b[2K\rdavae: done\nb\n.",
    "not UTF-8": b"\x80\2c\xff\nb\n.",
    "itself": b"\x80\2]q\0h\0a.",
    "itself by name": b"\x80\2}q\0" + text("a") + b"h\0s.",
    "a name twice": b"\x80\2}(" + text("a") + tensor() + text("a") + tensor() + b"u.",
    "a list as a name": b"\x80\2}]Ns.",
    "a tuple as a name": b"\x80\2})Ns.",
    "2^90 elements as a name": b"\x80\2}q\0(" + text("a") + b"\x86q\1" + b"h\1\x86q\1" * 90 + b"Nu.",
    "10^30 elements": b"\x80\2]q\0" + (b"](" + b"h\0" * 10 + b"eq\0") * 30 + b".",
    "5000 lists in each other": b"\x80\2" + b"]" * 5000 + b"a" * 4999 + b".",
    "20,000 tuples in each other": b"\x80\2)" + b"\x85" * 20_000 + b".",
    "a storage in two ways": b"\x80\2}("
    + text("a")
    + tensor()
    + text("b")
    + tensor(count=2, kind="DoubleStorage")
    + b"u.",
    "a storage outside": state(tensor(key="../0")),
    "the pickle as a storage": state(tensor(key="../data.pkl")),
    "a key with a line": state(tensor(key="0\n\x1b[2K")),
    "an unknown storage": state(tensor(kind="QInt8Storage")),
    "CUDA's storage": state(tensor().replace(b"ctorch\n", b"ctorch.cuda\n")),
    "a tensor of a dict": b"\x80\2ctorch._utils\n_rebuild_tensor_v2\n(}K\0)))ccollections\nOrderedDict\n)RtR.",
    "a parameter of a dict": b"\x80\2ctorch._utils\n_rebuild_parameter\n(}\x89ccollections\nOrderedDict\n)RtR.",
    "hooks": state(tensor(extra=b"\x89ccollections\nOrderedDict\n)R" + text("a") + b"Ns")),
    "no flag": state(tensor(extra=b"K\1ccollections\nOrderedDict\n)R")),
    "marks of a tensor": state(tensor(extra=b"\x89ccollections\nOrderedDict\n)R}" + text("neg") + b"\x88s")),
    "too few arguments": state(tensor(extra=b"")),
    "too many arguments": state(tensor(extra=b"\x89ccollections\nOrderedDict\n)R}NNN")),
}
SIZES = {
    "negative": dict(shape=(-4,)),
    "negative twice": dict(shape=(-2, -2), strides=(1, 1)),
    "too large": dict(shape=(5,)),
    "too far": dict(offset=1),
    "before the beginning": dict(offset=-1),
    "a negative stride": dict(offset=3, strides=(-1,)),
    "a wide stride": dict(shape=(2,), strides=(4,)),
    "a stride beyond 64 bits": dict(shape=(2,), strides=(1 << 70,)),
    "a shape beyond 64 bits": dict(shape=(1 << 70,), strides=(0,)),
    "2^186 elements": dict(shape=(1 << 61,) * 3, strides=(0,) * 3),
    "2^50 elements": dict(shape=(1 << 50,), strides=(0,)),
    "none of 2^120": dict(shape=(0, 1 << 60, 1 << 60), strides=(0, 0, 0)),
    "100 dimensions": dict(shape=(1,) * 100, strides=(1,) * 100),
    "fewer strides": dict(shape=(2, 2)),
    "a float": dict(shape=(4.0,)),
    "a bool": dict(shape=(True,)),
    "a number": dict(shape=4),
    "a negative count": dict(count=-1),
    "another count": dict(count=3),
    "a huge count": dict(count=2**62),
}


@pytest.mark.parametrize("program", HOSTILE.values(), ids=HOSTILE)
def test_hostile_pickles(program, path, monkeypatch, audited):
    """Each is refused in one line, soon, in both formats, and without a call."""
    monkeypatch.chdir(path.parent)
    empty = saved({}, **OLD_FORMAT)
    assert empty.count(EMPTY_STATE) == 1
    begin = time.monotonic()
    with audited() as events:
        refusal(path, with_pickle(program))
        refusal(path, empty.replace(EMPTY_STATE, program + b"\x80\2]."))
    assert time.monotonic() - begin < 5
    assert events == [] and not (path.parent / MARKER).exists()


@pytest.mark.parametrize("sizes", SIZES.values(), ids=SIZES)
def test_sizes_that_cannot_be(sizes, path):
    refusal(path, with_pickle(state(tensor(**sizes))))


@pytest.fixture(scope="module")
def audited():
    """Returns a context that records what the interpreter is asked to import, run or create."""
    import contextlib

    recorded, active = [], [False]
    forbidden = ("import", "exec", "compile", "marshal", "pickle", "os.mkdir", "os.system", "os.exec", "subprocess")

    def hook(event, args):
        if active[0] and event.startswith(forbidden):
            recorded.append(event)

    sys.addaudithook(hook)

    @contextlib.contextmanager
    def audit():
        recorded.clear()
        active[0] = True
        try:
            yield recorded
        finally:
            active[0] = False

    return audit


def test_memory_is_bounded_by_the_size_of_the_pickle():
    """To about 100 bytes for each byte."""
    size, ordered = 30_000, b"ccollections\nOrderedDict\nq\0"
    programs = [b"}" * size, b"(" * size, b"]q\0" + b"h\0" * (size // 2), b")" + b"\x85" * size]
    programs += [ordered + b"h\0)R" * (size // 4), b"]q\0" + b"(h\0h\0e" * (size // 6)]
    programs += [b"N" + b"".join(b"r" + struct.pack("<I", i) for i in range(size // 5))]
    for program in programs:
        machine = PickleMachine(b"\x80\2" + program)
        tracemalloc.start()
        with pytest.raises(InputError):
            machine.run()
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert peak < 150 * size, program[:10]


def test_a_large_pickle_or_directory_is_not_read(path, monkeypatch):
    monkeypatch.setattr(torch_archive, "MAX_PICKLE_BYTES", 1000)
    assert "data.pkl" in refusal(path, saved(KINDS["many"]))
    refusal(path, saved(KINDS["many"], **OLD_FORMAT))
    monkeypatch.undo()
    monkeypatch.setattr(torch_archive, "MAX_DIRECTORY_BYTES", 1 << 17)
    refusal(path, packed({str(i): b"" for i in range(4000)}))


# Damaged archives


def zipped(change, compression=zipfile.ZIP_STORED) -> bytes:
    """Returns the zip file of one tensor after a change of its parts."""
    parts = zip_parts(saved(KINDS["one"]))
    change(parts)
    file = io.BytesIO()
    with warnings.catch_warnings(action="ignore"), zipfile.ZipFile(file, "w", compression) as archive:
        for name, data in parts.items():
            archive.writestr(name.rstrip("*"), data)  # a name twice
    return file.getvalue()


@pytest.mark.parametrize(
    "changes, named",
    [
        ({"archive/version": b"11\n"}, "11"),
        ({"archive/version": b"0\n"}, "0"),
        ({"archive/version": b"x"}, "x"),
        ({"archive/version": b"9" * 100}, "version"),
        ({"archive/version": None}, "version"),
        ({"archive/byteorder": b"middle"}, "middle"),
        ({"archive/data/0": None}, "data/0"),
        ({"archive/data/0": bytes(92)}, "data/0"),
        ({"archive/data/0": bytes(100)}, "data/0"),
        ({PICKLE_OF_ZIP: None}, "data.pkl"),
        ({"other/data.pkl": b"."}, "data.pkl"),
        ({"archive/constants.pkl": b"."}, "TorchScript"),
        ({"archive/data/0*": bytes(96)}, "same name"),
        ({"archive/DATA/0": bytes(96)}, "same name"),
    ],
)
def test_parts_that_torch_save_does_not_write(changes, named, path):
    def change(parts):
        parts |= changes
        for name in [name for name, data in parts.items() if data is None]:
            del parts[name]

    assert named in refusal(path, zipped(change))


def test_compressed_and_overlapping_parts(path):
    assert "compressed" in refusal(path, zipped(lambda parts: None, zipfile.ZIP_DEFLATED))
    file = bytearray(zipped(lambda parts: parts.update({"archive/data/1": bytes(96)})))
    with zipfile.ZipFile(io.BytesIO(file)) as archive:
        first, second = (archive.getinfo(f"archive/data/{i}").header_offset for i in range(2))
    at = file.rindex(struct.pack("<I", second) + b"archive/data/1")
    file[at : at + 4] = struct.pack("<I", first)
    refusal(path, bytes(file))


@pytest.mark.parametrize("offset, value", [(8, 1), (34, 1), (38, 0x10)], ids=["encrypted", "elsewhere", "a folder"])
def test_marks_of_a_part(offset, value, path):
    """In the directory. PyTorch gives uninitialised memory for the data of a folder."""
    file = bytearray(saved(KINDS["one"]))
    name = file.rindex(b"archive/data/0")  # 46 bytes after the entry's beginning
    file[name - 46 + offset] |= value
    assert "archive/data/0" in refusal(path, bytes(file))


def test_parts_of_both_formats_by_their_index(tmp_path):
    state = KINDS["dtypes"] | {"last": torch.ones(2)}
    files = {name: f"pytorch_model-0000{1 + (name == 'last')}-of-00002.bin" for name in state}
    for file, options in zip(sorted(set(files.values())), ({}, OLD_FORMAT)):
        part = {name: tensor for name, tensor in state.items() if files[name] == file}
        (tmp_path / file).write_bytes(saved(part, **options))
    index = tmp_path / "pytorch_model.bin.index.json"
    index.write_text(json.dumps({"metadata": {}, "weight_map": files}), encoding="utf-8")
    assert find_weights_file(tmp_path) == index
    assert_same_state(read_tensors(index), state)


def test_damage_in_the_old_format(path):
    file = saved({"a": torch.arange(4.0), "b": torch.ones(2)}, **OLD_FORMAT)
    for damaged in (file[:-1], file + b"x", file[:-20], file[:300], file[:20]):
        refusal(path, damaged)
    count = struct.pack("<q", 4)
    assert file.count(count) == 1
    for other in (3, 5, -4, 2**62):
        refusal(path, file.replace(count, struct.pack("<q", other)))


# The mutation corpus


def test_mutated_files_are_refused_or_read_as_pytorch_reads_them(tmp_path, audited):
    """Nothing else is raised, nothing runs. PyTorch refuses some directories of zip files that `zipfile` reads."""
    kinds = ["one", "dtypes", "strides", "ties", "parameters", "an ordered dict", "a module"]
    files = [saved(KINDS[kind], **options) for kind in kinds for options in ({}, OLD_FORMAT)]
    accepted = 0
    for seed in range(1500):
        file = files[seed % len(files)]
        path = tmp_path / f"{seed}.bin"
        path.write_bytes(mutated := mutate(file, np.random.default_rng(seed)))
        try:
            with audited() as events:
                found = read_tensors(path)
        except InputError as e:
            assert str(e).startswith(f"{path}: ") and str(e).isprintable(), seed
        else:
            accepted += mutated != file
            try:
                expected = torch.load(path, weights_only=True)
            except RuntimeError as e:
                assert mutated.startswith(b"PK") and "PytorchStreamReader" in str(e), seed
            else:
                assert list(found) == list(expected), seed
                assert all(same(found[name], expected[name]) for name in found), seed
        assert events == [], seed
        path.unlink()
    assert accepted > 80
