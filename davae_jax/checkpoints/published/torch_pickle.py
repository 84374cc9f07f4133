"""Interprets the pickles of PyTorch checkpoints: describes the tensors, imports nothing and calls nothing of a pickle.

A pickle is a program for a stack machine; `pickletools` of Python's standard library documents every opcode. torch.save
writes protocol 2, and of its opcodes `torch/_weights_only_unpickler.py` admits those that dicts of tensors need. This
machine knows a part of these. What it accepts, `torch.load(weights_only=True)` accepts too, with the same values.

A global (opcode GLOBAL) stays a name here. REDUCE knows the names in REBUILD, for which it makes a description of a
tensor or an empty dict. There is nothing else to call, so that no pickle can run anything.

An opcode makes at most one object, whose size is fixed or that of its own bytes, and nothing is ever hashed, compared
or printed but texts and integers: memory is at most about 100 bytes and time a few microseconds for each byte of a
pickle, of which callers pass at most MAX_PICKLE_BYTES.

Deliberately refused, though PyTorch reads it: a protocol other than 2, a name twice, sparse and quantized tensors,
float8, views that are marked as conjugate or negative, and files of Python 2.
"""

from __future__ import annotations

import pickle
import pickletools
import re
import struct
from collections.abc import Callable
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np

from davae_jax.utils.errors import InputError

MAX_PICKLE_BYTES = 1 << 22  # a tensor takes about 150
MAX_NAME_BYTES = 200  # of a global's module, and of its name

# torch/storage.py, _dtype_to_storage_type_map. The storages of quantized dtypes are missing.
STORAGE_DTYPES = {
    "FloatStorage": np.dtype(np.float32),
    "HalfStorage": np.dtype(np.float16),
    "BFloat16Storage": np.dtype(ml_dtypes.bfloat16),
    "DoubleStorage": np.dtype(np.float64),
    "LongStorage": np.dtype(np.int64),
    "IntStorage": np.dtype(np.int32),
    "ShortStorage": np.dtype(np.int16),
    "CharStorage": np.dtype(np.int8),
    "ByteStorage": np.dtype(np.uint8),
    "BoolStorage": np.dtype(np.bool_),
    "ComplexFloatStorage": np.dtype(np.complex64),
    "ComplexDoubleStorage": np.dtype(np.complex128),
}
UNTYPED_STORAGE = "torch.storage UntypedStorage"
# torch/storage.py, _new_dtypes: dtypes without a storage of their own. The other ones have no dtype in NumPy.
NEW_DTYPES = {"uint16": np.dtype(np.uint16), "uint32": np.dtype(np.uint32), "uint64": np.dtype(np.uint64)}


class Global(NamedTuple):
    """A global that a pickle names: "module name", as pickletools prints it."""

    name: str


class OrderedDict(dict):
    """A collections.OrderedDict without its attributes. Dicts have an order of their own."""

    __slots__ = ()


class Storage(NamedTuple):
    """Memory that tensors view.

    Attributes:
      key: its name in the file.
      dtype: None if it is untyped; then its elements are bytes.
      count: the number of its elements.
    """

    key: str
    dtype: np.dtype | None
    count: int

    @property
    def itemsize(self) -> int:
        """Returns the bytes of an element."""
        return self.dtype.itemsize if self.dtype else 1


class Tensor(NamedTuple):
    """A tensor, as torch._utils._rebuild_tensor_v2 gets it. The last four attributes can have any value.

    Attributes:
      dtype: the dtype, or its name in PyTorch if it is not supported.
    """

    storage: Storage
    dtype: np.dtype | str
    offset: Any
    shape: Any
    strides: Any
    metadata: Any


def _rebuild_tensor_v2(storage, offset, shape, strides, requires_grad, hooks, metadata=None) -> Tensor:
    if type(storage) is not Storage or storage.dtype is None or not _are_flags(requires_grad, hooks):
        raise ValueError("a tensor has no storage")
    return Tensor(storage, storage.dtype, offset, shape, strides, metadata)


def _rebuild_tensor_v3(storage, offset, shape, strides, requires_grad, hooks, dtype, metadata=None) -> Tensor:
    """Describes a tensor of one of the new dtypes, whose storage is untyped."""
    if type(storage) is not Storage or storage.dtype is not None or not _are_flags(requires_grad, hooks):
        raise ValueError("a tensor has no untyped storage")
    if type(dtype) is not Global or not dtype.name.startswith("torch ") or dtype.name.endswith("Storage"):
        raise ValueError("a tensor has no dtype")
    name = dtype.name.removeprefix("torch ")
    return Tensor(storage, NEW_DTYPES.get(name, f"torch.{name}"), offset, shape, strides, metadata)


def _rebuild_parameter(tensor, requires_grad, hooks) -> Tensor:
    if type(tensor) is not Tensor or not _are_flags(requires_grad, hooks):
        raise ValueError("a parameter has no tensor")
    return tensor


def _rebuild_parameter_with_state(tensor, requires_grad, hooks, state) -> Tensor:
    """Describes a parameter whose Python object had attributes; they are left out."""
    if type(state) is not dict:
        raise ValueError("the attributes of a parameter are no dict")
    return _rebuild_parameter(tensor, requires_grad, hooks)


def _are_flags(requires_grad, hooks) -> bool:
    """Returns whether these two have their types. Neither is used: gradients and hooks are no weights."""
    return type(requires_grad) is bool and type(hooks) is OrderedDict and not hooks


# What REDUCE knows: the name of a global → the description of what PyTorch would make of the arguments.
REBUILD: dict[str, Callable[..., Any]] = {
    "collections OrderedDict": OrderedDict,
    "torch._utils _rebuild_tensor_v2": _rebuild_tensor_v2,
    "torch._utils _rebuild_tensor_v3": _rebuild_tensor_v3,
    "torch._utils _rebuild_parameter": _rebuild_parameter,
    "torch._utils _rebuild_parameter_with_state": _rebuild_parameter_with_state,
}
# Further globals that have a meaning; the dtypes without one in NumPy are named when the tensor's name is known.
KNOWN_GLOBALS = re.compile(
    rf"{UNTYPED_STORAGE}|torch ({'|'.join([*STORAGE_DTYPES, *NEW_DTYPES])}|float[48]_\w+|u?int[1-7]|bits\w+)"
)


class PickleMachine:
    """Runs one pickle.

    Attributes:
      position: the byte after the last that was read.
      storages: those that the pickle names, by key.
    """

    def __init__(self, data: bytes, position: int = 0, *, storage_fields: int = 5):
        """Args:
        data: contains the pickle.
        position: where it begins.
        storage_fields: 5 in torch.save's zip format, 6 in the one before.
        """
        self.data, self.position = data, position
        self.storage_fields = storage_fields
        self.storages: dict[str, Storage] = {}
        self._stack: list[Any] = []
        self._outer: list[list[Any]] = []  # the stacks below the marks
        self._memo: dict[int, Any] = {}

    def run(self) -> Any:
        """Returns the pickle's value: Python's own containers and scalars, Global, Storage and Tensor.

        Raises:
          InputError: the pickle is damaged or contains more than tensors; the message does not name the file.
        """
        try:
            while (code := self._take(1)) != pickle.STOP:
                if code not in OPERATIONS:
                    raise InputError(f"rejected: the pickle contains {_opcode(code)}, more than tensors need")
                OPERATIONS[code](self)
            (value,) = self._stack
        except InputError:
            raise
        except (ValueError, IndexError, KeyError, TypeError, struct.error) as e:
            raise InputError("rejected: the pickle is damaged or contains more than tensors") from e
        if self._outer:
            raise InputError("rejected: the pickle is damaged: it ends behind a mark")
        return value

    def check_end(self) -> None:
        """Raises InputError if bytes follow after the pickle."""
        if self.position != len(self.data):
            raise InputError("rejected: bytes follow after the pickle")

    def _take(self, size: int) -> bytes:
        begin, self.position = self.position, self.position + size
        if self.position > len(self.data):
            raise ValueError("the pickle ends early")
        return self.data[begin : self.position]

    def _number(self, form: str) -> Any:
        return struct.unpack(form, self._take(struct.calcsize(form)))[0]

    def _line(self) -> str:
        line = self.data[self.position : self.position + MAX_NAME_BYTES].partition(b"\n")[0]
        self.position += len(line)
        if self._take(1) != b"\n":
            raise ValueError("a name is too long")
        return line.decode("utf-8")

    def _push(self, value: Any) -> None:
        self._stack.append(value)

    def _pop_to_mark(self) -> list[Any]:
        values, self._stack = self._stack, self._outer.pop()
        return values

    def _mark(self) -> None:
        self._outer.append(self._stack)
        self._stack = []

    def _tuple(self, size: int) -> None:
        if len(self._stack) < size:
            raise ValueError("the stack is too short")
        self._stack[-size:] = [tuple(self._stack[-size:])]

    def _put(self, index: int) -> None:
        self._memo[index] = self._stack[-1]

    def _append(self, values: list[Any]) -> None:
        if type(self._stack[-1]) is not list:
            raise ValueError("APPEND without a list")
        self._stack[-1].extend(values)

    def _set_items(self, values: list[Any]) -> None:
        target = self._stack[-1]
        if type(target) not in (dict, OrderedDict) or len(values) % 2:
            raise ValueError("SETITEM without a dict")
        for key, value in zip(values[::2], values[1::2]):
            if type(key) not in (str, int):  # others take long to hash: a few bytes make a tuple of 2^100 elements
                raise InputError(f"rejected: the pickle contains a dict with a key of the type {type(key).__name__}")
            if key in target:
                raise InputError(f"rejected: the pickle contains a dict with the key {shown(key)} twice")
            target[key] = value

    def _build(self) -> None:
        """Drops the attributes of an OrderedDict: `_metadata`, which torch.nn.Module.state_dict adds."""
        if type(self._stack.pop()) is not dict or type(self._stack[-1]) is not OrderedDict:
            raise ValueError("BUILD without an OrderedDict")

    def _global(self) -> None:
        module, name = self._line(), self._line()
        if f"{module} {name}" not in REBUILD and not KNOWN_GLOBALS.fullmatch(f"{module} {name}"):
            full = shown(f"{module}.{name}")
            if module.split(".")[0] == "torch":
                raise InputError(f"rejected: the pickle references {full}; only dense tensors are read")
            raise InputError(f"rejected: the pickle references {full}, which could execute code")
        self._push(Global(f"{module} {name}"))

    def _reduce(self) -> None:
        arguments, function = self._stack.pop(), self._stack.pop()
        if type(function) is not Global or type(arguments) is not tuple:
            raise ValueError("REDUCE without a global")
        if function.name == "collections OrderedDict" and arguments:
            raise ValueError("an OrderedDict with arguments")
        self._push(REBUILD[function.name](*arguments))

    def _persistent(self) -> None:
        """Pushes a storage; its identifier is ("storage", type, key, location, count), then None in the old format."""
        identifier = self._stack.pop()
        if type(identifier) is not tuple or len(identifier) != self.storage_fields:
            raise ValueError("not the identifier of a storage")
        kind, storage_type, key, location, count, *view = identifier
        if (
            not type(kind) is type(key) is type(location) is str
            or kind != "storage"
            or type(storage_type) is not Global
        ):
            raise ValueError("not the identifier of a storage")
        if type(count) is not int or not 0 <= count < 1 << 62 or any(part is not None for part in view):
            raise ValueError("not the size of a storage")
        untyped = storage_type.name == UNTYPED_STORAGE
        dtype = None if untyped else STORAGE_DTYPES[storage_type.name.removeprefix("torch ")]
        storage = Storage(key, dtype, count)
        known = self.storages.setdefault(key, storage)
        if known != storage and (known.count or count):
            raise InputError(f"rejected: the pickle describes the storage {shown(key)} in two ways")
        self._push(storage)

    def _protocol(self) -> None:
        if (protocol := self._number("<B")) != 2:
            raise InputError(f"rejected: its pickle has protocol {protocol}; torch.save it with pickle_protocol=2")


# The opcodes by their bytes.
OPERATIONS: dict[bytes, Callable[[PickleMachine], None]] = {
    pickle.PROTO: PickleMachine._protocol,
    pickle.NONE: lambda m: m._push(None),
    pickle.NEWTRUE: lambda m: m._push(True),
    pickle.NEWFALSE: lambda m: m._push(False),
    pickle.BININT: lambda m: m._push(m._number("<i")),
    pickle.BININT1: lambda m: m._push(m._number("<B")),
    pickle.BININT2: lambda m: m._push(m._number("<H")),
    pickle.LONG1: lambda m: m._push(int.from_bytes(m._take(m._number("<B")), "little", signed=True)),
    pickle.BINFLOAT: lambda m: m._push(m._number(">d")),
    pickle.BINUNICODE: lambda m: m._push(m._take(m._number("<I")).decode("utf-8")),
    pickle.EMPTY_TUPLE: lambda m: m._push(()),
    pickle.EMPTY_LIST: lambda m: m._push([]),
    pickle.EMPTY_DICT: lambda m: m._push({}),
    pickle.MARK: PickleMachine._mark,
    pickle.TUPLE: lambda m: m._push(tuple(m._pop_to_mark())),
    pickle.TUPLE1: lambda m: m._tuple(1),
    pickle.TUPLE2: lambda m: m._tuple(2),
    pickle.TUPLE3: lambda m: m._tuple(3),
    pickle.APPEND: lambda m: m._append([m._stack.pop()]),
    pickle.APPENDS: lambda m: m._append(m._pop_to_mark()),
    pickle.SETITEM: lambda m: m._set_items([m._stack.pop(), m._stack.pop()][::-1]),
    pickle.SETITEMS: lambda m: m._set_items(m._pop_to_mark()),
    pickle.BINPUT: lambda m: m._put(m._number("<B")),
    pickle.LONG_BINPUT: lambda m: m._put(m._number("<I")),
    pickle.BINGET: lambda m: m._push(m._memo[m._number("<B")]),
    pickle.LONG_BINGET: lambda m: m._push(m._memo[m._number("<I")]),
    pickle.GLOBAL: PickleMachine._global,
    pickle.REDUCE: PickleMachine._reduce,
    pickle.BUILD: PickleMachine._build,
    pickle.BINPERSID: PickleMachine._persistent,
}


def _opcode(code: bytes) -> str:
    """Returns an opcode's name for a message."""
    opcode = pickletools.code2op.get(code.decode("latin-1"))
    return f"the opcode {opcode.name}" if opcode else f"the byte {code[0]}, which is no opcode"


def shown(name: Any) -> str:
    """Returns a name for a message of one line."""
    text = name if type(name) is str and name.isprintable() else repr(name)
    return text if len(text) <= MAX_NAME_BYTES else f"{text[:MAX_NAME_BYTES]}…"
