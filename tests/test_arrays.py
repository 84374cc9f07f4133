"""Arrays of integers whose files may be damaged."""

import io

import numpy as np
import pytest

from davae_jax.utils.arrays import read_array
from davae_jax.utils.errors import InputError


def header(shape, dtype="<u4", order=False):
    file = io.BytesIO()
    np.lib.format.write_array_header_1_0(file, {"descr": dtype, "fortran_order": order, "shape": shape})
    return file.getvalue()


@pytest.mark.parametrize("mapped", [True, False])
def test_an_array(tmp_path, mapped):
    array = np.arange(6, dtype=np.uint32).reshape(2, 3)
    np.save(tmp_path / "a.npy", array)
    np.testing.assert_array_equal(read_array(tmp_path / "a.npy", 2, mapped=mapped), array)


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"no array",
        header((2, 3)) + bytes(23),
        header((2, 3)) + bytes(25),
        header((1 << 40, 1 << 20)) + bytes(24),  # 4 EiB
        header((2, -3)) + bytes(24),
        header((-2, -3)) + bytes(24),
        header((6,)) + bytes(24),
        header((2, 3), "<f4") + bytes(24),
        header((2, 3), "|O") + bytes(48),
        header((2, 3), order=True) + bytes(24),
        header((2, 3))[:40],
        header((2, 3))[:6] + b"\x3f\0" + header((2, 3))[8:] + bytes(24),  # another version of the format
    ],
)
def test_what_is_no_array_is_named(data, tmp_path):
    path = tmp_path / "a.npy"
    path.write_bytes(data)
    with pytest.raises(InputError) as e:
        read_array(path, 2)
    assert str(e.value).startswith(f"{path}: ") and "\n" not in str(e.value)
