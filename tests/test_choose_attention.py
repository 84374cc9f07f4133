"""`--attention auto`: which implementation a run uses, with ones that are right, wrong or do not run."""

import dataclasses
import json
import types
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from small_model import CONFIG

from davae_jax.data.config import DataConfig
from davae_jax.model import attention_tpu
from davae_jax.model.attention import relative_attention
from davae_jax.training import choose_attention as module
from davae_jax.training.choose_attention import (
    Trial,
    cache_key,
    check_attention,
    choose_attention,
    fastest,
    format_trials,
    make_inputs,
    try_all,
)
from davae_jax.training.config import TrainConfig
from davae_jax.training.flops import AttentionShape, attention_shape
from davae_jax.utils.errors import OptionError

SHAPE = AttentionShape(B=2, N=2, T=131, K=131, H=8)
MESH = {"data": 1, "fsdp": 1, "tensor": 1}
RUN = TrainConfig(model=CONFIG, batch_size=2, data=DataConfig(max_length=16))


def sees_the_future(*arguments):
    return relative_attention(*arguments[:-1], jnp.ones_like(arguments[-1]))


def without_a_gradient(q, k, v, r, u, w, mask):
    return relative_attention(q, k, v, r, u, jax.lax.stop_gradient(w), mask)


def one_query_is_wrong(*arguments):
    return relative_attention(*arguments).at[1, 1, 129].multiply(2)


def no_number(*arguments):
    return relative_attention(*arguments).at[0, 0, 5, 0].set(jnp.nan)


def rounds_more(*arguments):
    halves = [x.astype(jnp.bfloat16) for x in arguments[:-1]]
    return relative_attention(*halves, arguments[-1]).astype(arguments[0].dtype)


def refused(*arguments):
    raise NotImplementedError("Unaligned sizes\nare not supported")


WRONG = [sees_the_future, without_a_gradient, one_query_is_wrong, no_number]


def trials(attends, shape=SHAPE, dtype="float32", packed=False):
    """Returns the trials of functions; each takes a second less than the one before."""
    seconds = iter(range(9, 0, -1))
    named = {"xla": relative_attention} | {attend.__name__: attend for attend in attends}
    found = try_all(named, make_inputs(shape, dtype, packed), lambda run: (run(), next(seconds))[1])
    return {trial.name: trial for trial in found}


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_what_is_wrong_or_does_not_run_is_never_chosen(dtype):
    def right(*arguments):
        return relative_attention(*arguments)

    found = trials([right, *WRONG, refused, *([rounds_more] if dtype == "float32" else [])], dtype=dtype)
    assert found["refused"].problem == "does not run: Unaligned sizes"
    assert found["without_a_gradient"].problem.startswith("is wrong: dw differs by ")
    assert found["one_query_is_wrong"].problem.startswith("is wrong: ")
    assert {name for name, trial in found.items() if trial.problem is None} == {"xla", "right"}
    assert fastest(found.values()) == "right"
    lines = format_trials(found.values(), "a chip").splitlines()
    assert lines[1].startswith("  xla           9000.000 ms") and lines[2].endswith("explains, chosen")
    assert lines[-1].count("chosen") == 0


def test_the_kernel_agrees():
    """In interpret mode, in bfloat16 and with packed rows, within what is tolerated on a chip."""

    def kernel(*arguments):
        return attention_tpu.relative_attention(*arguments, interpret=True)

    found = trials([kernel], SHAPE._replace(N=1), "bfloat16", packed=True)
    assert found["kernel"].problem is None and fastest(found.values()) == "kernel"


def test_the_fastest_is_chosen():
    slow, fast, wrong = Trial("xla", None, 0.5, 3.0), Trial("a", None, 0.9, 2.0), Trial("b", "is wrong", 7.0, None)
    assert fastest([slow, fast, wrong]) == "a" and fastest([slow, wrong]) == "xla"
    assert fastest([wrong, Trial("xla", "does not run: out of memory")]) == "xla"


@pytest.fixture
def devices(monkeypatch, tmp_path):
    """The CPU counts as the platform of the kernel, which is another name of the reference; a new cache folder."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(module, "PLATFORMS", {"mosaic_tpu": "cpu"})
    monkeypatch.setattr(attention_tpu, "relative_attention", relative_attention)
    tried = []

    def seconds(run):
        tried.append(run())
        return 1 / len(tried)  # the one that is tried last is the fastest

    monkeypatch.setattr(module, "median_seconds", seconds)
    return types.SimpleNamespace(tried=tried, cache=tmp_path / "cache" / "davae-jax")


def test_auto_tries_once_and_remembers(devices, capsys):
    assert choose_attention(RUN, MESH) == "mosaic_tpu" and len(devices.tried) == 2
    assert "mosaic_tpu     500.000 ms" in (out := capsys.readouterr().out) and "tried now):" in out
    (file,) = devices.cache.iterdir()
    key = json.loads(file.read_text())["key"]
    assert key["shape"] == {"B": 2, "N": 2, "T": 15, "K": 15, "H": 8} and key["jax"] == jax.__version__
    assert choose_attention(RUN, MESH) == "mosaic_tpu" and len(devices.tried) == 2
    assert f"as tried before: {file}" in capsys.readouterr().out
    # What the outcome depends on is tried anew.
    choose_attention(dataclasses.replace(RUN, dtype="bfloat16"), MESH)
    assert len(devices.tried) == 4 and len(list(devices.cache.iterdir())) == 2
    packed = dataclasses.replace(RUN, data=DataConfig(max_length=16, pack=True))
    keys = [
        cache_key(RUN, MESH, ["xla"]),
        cache_key(packed, MESH, ["xla"]),
        cache_key(RUN, MESH | {"data": 2}, ["xla"]),
    ]
    assert keys[0] != keys[1] and keys[0] != keys[2] and keys[1] | {"packed": False} == keys[0]


@pytest.mark.parametrize("damage", [b"", b'{"key": 1}', b"\xff", b"[]"], ids=str)
def test_a_damaged_cache_is_replaced(damage, devices):
    choose_attention(RUN, MESH)
    (file,) = devices.cache.iterdir()
    whole = json.loads(file.read_text())
    file.write_bytes(damage)
    with pytest.warns(UserWarning) as warned:
        assert choose_attention(RUN, MESH) == "mosaic_tpu"
    assert len(warned) == 1 and str(warned[0].message).startswith(str(file)) and len(devices.tried) == 4
    assert json.loads(file.read_text())["key"] == whole["key"]
    with warnings.catch_warnings(action="error"):
        choose_attention(RUN, MESH)


def test_a_changed_number_is_noticed(devices):
    """A cache in which the wrong implementation was made the fastest."""
    choose_attention(RUN, MESH)
    (file,) = devices.cache.iterdir()
    values = json.loads(file.read_text())
    values["trials"][0]["seconds"] = 1e-9
    file.write_text(json.dumps(values))
    with pytest.warns(UserWarning, match="is damaged, and replaced"):
        assert choose_attention(RUN, MESH) == "mosaic_tpu"


def test_a_cache_that_cannot_be_written_is_done_without(devices):
    devices.cache.parent.write_text("a file")
    with pytest.warns(UserWarning) as warned:
        assert choose_attention(RUN, MESH) == "mosaic_tpu"
    assert len(warned) == 1 and str(devices.cache) in str(warned[0].message)


def test_the_choice_of_process_0_is_that_of_all(devices, monkeypatch):
    """The other processes get its index in the list of names, and try nothing."""
    for index, name in enumerate(["xla", "mosaic_tpu"]):
        monkeypatch.setattr(module, "value_of_process_zero", lambda work, index=index: index)
        assert choose_attention(RUN, MESH) == name
    assert not devices.tried


def test_on_a_cpu_it_is_the_reference_at_once(monkeypatch):
    monkeypatch.setattr(module, "make_inputs", None)
    monkeypatch.setattr(module, "cached_trials", None)
    assert RUN.attention == "auto" and choose_attention(RUN, MESH) == "xla"


def test_one_that_is_named_is_used_or_refused(devices, monkeypatch):
    named = dataclasses.replace(RUN, attention="mosaic_tpu")
    assert choose_attention(named, MESH) == "mosaic_tpu" and not devices.tried
    monkeypatch.setattr(attention_tpu, "relative_attention", refused)
    with pytest.raises(OptionError, match=r"^--attention mosaic_tpu does not run here: Unaligned sizes$"):
        choose_attention(named, MESH)
    assert choose_attention(RUN, MESH) == "xla"  # auto goes on without it


def test_devices_that_an_implementation_is_not_for():
    device = types.SimpleNamespace(platform="tpu", device_kind="TPU v4")
    with pytest.raises(OptionError, match=r"^--attention mosaic_tpu does not run on TPU v4; choose auto or xla$"):
        check_attention("mosaic_tpu", device)
    for name, kind in (("auto", "TPU v4"), ("xla", "TPU v4"), ("mosaic_tpu", "TPU v5 lite"), ("mosaic_tpu", "TPU7x")):
        check_attention(name, types.SimpleNamespace(platform="tpu", device_kind=kind))
    with pytest.raises(OptionError, match=r"needs TPUs, and the devices are of the platform gpu$"):
        check_attention("mosaic_tpu", types.SimpleNamespace(platform="gpu", device_kind="NVIDIA H200"))


def test_the_sizes_of_a_device():
    """Texts over data, fsdp and micro-batches, heads over tensor if it divides them; a segment with its memory."""
    wide = dataclasses.replace(CONFIG.decoder, hidden_size=1600, num_attention_heads=25, max_memory_length=512)
    config = dataclasses.replace(
        RUN, model=dataclasses.replace(CONFIG, decoder=wide), batch_size=64, accumulate=2, data=DataConfig()
    )
    assert attention_shape(config, {"data": 2, "fsdp": 4, "tensor": 2}) == (4, 25, 127, 127, 64)
    assert attention_shape(config, {"data": 1, "fsdp": 1, "tensor": 5}) == (32, 5, 127, 127, 64)
    segments = dataclasses.replace(config, data=DataConfig(segment_length=32))
    assert attention_shape(segments, MESH) == (32, 25, 32, 544, 64)


def test_inputs_have_all_that_training_has():
    """Packed rows have two texts and padding, each its own; a memory is half full."""
    *_, mask, _ = make_inputs(SHAPE, "bfloat16", packed=True)
    for seen, ends in zip(np.asarray(mask)[:, 0].sum(2), ([43, 115, 131], [44, 114, 131]), strict=True):
        assert seen.tolist() == [i - start + 1 for start, end in zip([0, *ends], ends) for i in range(start, end)]
    q, *_, u, _, mask, d_out = make_inputs(SHAPE._replace(K=151), "bfloat16", packed=False)
    assert np.asarray(mask).sum(1)[[0, -1]].tolist() == [11, 141]
    assert q.dtype == d_out.dtype == jnp.bfloat16 and u.dtype == jnp.float32
