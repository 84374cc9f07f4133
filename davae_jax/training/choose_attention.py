"""Chooses how a run computes the decoder's attention: `auto` tries each implementation on the run's own device.

An implementation is trusted after it has been tried: one layer's attention, forward and backward, at the sizes that
each device of the run has, must agree with the reference. The fastest of those that agree is used.
"""

from __future__ import annotations

import functools
import hashlib
import statistics
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend import backend
from jaxtyping import Array

from davae_jax.model import attention
from davae_jax.model.attention import causal_mask, relative_attention
from davae_jax.model.layers import same_segment
from davae_jax.parallel.agreement import run_on_all_processes, value_of_process_zero
from davae_jax.parallel.chips import find_chip
from davae_jax.training.config import TrainConfig
from davae_jax.training.flops import AttentionShape, attention_shape
from davae_jax.utils.errors import InputError, OptionError, first_line
from davae_jax.utils.files import user_cache_folder, write_json
from davae_jax.utils.json_files import has_right_sum, read_json_object, with_sum

REFERENCE = "xla"
PLATFORMS = {"mosaic_tpu": "tpu"}  # the platform that an implementation is for; the reference is for all
RESULTS = ("output", "dq", "dk", "dv", "dr", "du", "dw")  # what an implementation computes, in this order
BLOCK = 128  # queries or keys, at least, whose errors are averaged: those of a kernel's tile
TIMED_RUNS = 5

Attend = Callable[..., Array]  # takes q, k, v, r, u, w and the mask, as `relative_attention`
Inputs = tuple[Array, ...]  # q, k, v, r, u, w, the mask and the output's gradient


class Trial(NamedTuple):
    """The outcome of trying an implementation."""

    name: str
    problem: str | None = None  # why it cannot be used
    error: float | None = None  # the largest; up to 1 it is explained by rounding. None if it does not run
    seconds: float | None = None  # forward and backward, the median of several runs. None if it cannot be used


# ---- the choice of a run


def check_attention(name: str, device: jax.Device) -> None:
    """Raises OptionError if the implementation that --attention names is not for this kind of device."""
    platform, chip = PLATFORMS.get(name, device.platform), find_chip(device.device_kind)
    if platform != device.platform:
        reason = f"needs {platform.upper()}s, and the devices are of the platform {device.platform}"
        raise OptionError("--attention", f"{name} {reason}")
    if name in PLATFORMS and chip and name not in chip.attention:
        raise OptionError("--attention", f"{name} does not run on {chip.name}; choose auto or {REFERENCE}")


def choose_attention(config: TrainConfig, mesh: Mapping[str, int]) -> str:
    """Returns the implementation that the run uses: the one that --attention names, or else the choice of process 0.

    It is tried on one device, at the sizes that each device of the mesh has, and process 0 prints the outcome. All
    processes must call this, while the memory of their devices is empty.

    Raises:
      OptionError: the implementation that is named does not run at these sizes.
    """
    platform = jax.local_devices()[0].platform
    names = [REFERENCE, *(name for name, needed in PLATFORMS.items() if needed == platform)]
    if config.attention == REFERENCE or names == [REFERENCE]:
        return REFERENCE
    inputs = functools.partial(make_inputs, attention_shape(config, mesh), config.dtype, config.data.pack)
    attends = {name: functools.partial(relative_attention, implementation=name) for name in names}
    if config.attention != "auto":
        run_on_all_processes(lambda: check_compiles(config.attention, attends[config.attention], inputs))
        return config.attention

    def index_of_fastest() -> int:
        key = cache_key(config, mesh, names)
        try:
            folder = user_cache_folder()
        except FileNotFoundError:  # nothing is kept
            trials, source = try_all(attends, inputs()), "tried now"
        else:
            trials, source = cached_trials(folder, key, lambda: try_all(attends, inputs()))
        print(format_trials(trials, f"{key['device']}, {source}"))
        return names.index(fastest(trials))

    return names[value_of_process_zero(index_of_fastest)]


def fastest(trials: Sequence[Trial]) -> str:
    """Returns the name of the fastest that can be used; if there is none, the reference."""
    usable = [trial for trial in trials if trial.problem is None]
    return min(usable, key=lambda trial: trial.seconds, default=Trial(REFERENCE)).name


def format_trials(trials: Sequence[Trial], where: str) -> str:
    """Returns a table of the trials, a line each."""
    lines, chosen = [f"attention of one layer, forward and backward ({where}):"], fastest(trials)
    for name, problem, error, seconds in trials:
        outcome = problem or f"{1e3 * seconds:9.3f} ms, largest error {error:.2f} of what rounding explains"
        lines.append(f"  {name:12} {outcome}{', chosen' if name == chosen else ''}")
    return "\n".join(lines)


def check_compiles(name: str, attend: Attend, inputs: Callable[[], Inputs]) -> None:
    """Raises OptionError if an implementation cannot be compiled for this device and inputs of these shapes."""
    try:
        _compile(attend, jax.eval_shape(inputs))
    except Exception as e:  # whatever a compiler raises
        raise OptionError("--attention", f"{name} does not run here: {first_line(e)}") from e


# ---- trials


@functools.partial(jax.jit, static_argnames=("shape", "dtype", "packed"))
def make_inputs(shape: AttentionShape, dtype: str, packed: bool) -> Inputs:
    """Returns random inputs: q, k, v, r, u, w, the mask and the gradient of the output.

    If there are more keys than queries, a memory that is half full. If packed, rows of two texts and padding.
    """
    B, N, T, K, H = shape
    shapes = [(B, N, T, H), (B, N, K, H), (B, N, K, H), (N, K, H), (N, H), (N, H), (B, N, T, H)]
    dtypes = [*[jnp.dtype(dtype)] * 4, jnp.float32, jnp.float32, jnp.dtype(dtype)]  # biases are weights
    keys = jax.random.split(jax.random.key(0), len(shapes))
    *arguments, d_out = map(jax.random.normal, keys, shapes, dtypes)
    mask = causal_mask(T, K, offset=K - T, first_key=(K - T) // 2)
    if packed:
        position, row = jnp.arange(T), jnp.arange(B)[:, None]
        segments = 1 + (position >= T // 3 + row % 7) - 2 * (position >= T - T // 8 - row % 5)
        mask = mask & same_segment(segments)
    return *arguments, mask, d_out


def try_all(
    attends: Mapping[str, Attend], inputs: Inputs, measure: Callable[[Callable], float] | None = None
) -> list[Trial]:
    """Tries the implementations, by name. The reference is not judged: the others are compared with it.

    Args:
      measure: returns the seconds of a call (default: `median_seconds`).
    """
    exact, rounding = exact_results(inputs)
    return [_try(name, attend, inputs, exact, rounding, measure or median_seconds) for name, attend in attends.items()]


def _try(name: str, attend: Attend, inputs: Inputs, exact, rounding, measure) -> Trial:
    try:
        program = _compile(attend, inputs)
        ratios = {
            result: float(_largest_ratio(array, *expected))
            for result, array, *expected in zip(RESULTS, program(*inputs), exact, rounding, strict=True)
        }
        result, error = max(ratios.items(), key=lambda item: np.nan_to_num(item[1], nan=np.inf))
        if not error <= 1 and name != REFERENCE:
            return Trial(name, f"is wrong: {result} differs by {error:.3g} times what rounding explains", error)
        return Trial(name, None, error, measure(lambda: jax.block_until_ready(program(*inputs))))
    except Exception as e:  # whatever a compiler or a device raises
        return Trial(name, f"does not run: {first_line(e)}")


def _compile(attend: Attend, inputs: Inputs) -> Callable[..., list[Array]]:
    return jax.jit(functools.partial(results, attend)).lower(*inputs).compile()


def results(attend: Attend, *inputs: Array) -> list[Array]:
    """Returns an implementation's output and its gradients, in the order of RESULTS."""
    *arguments, mask, d_out = inputs
    output, pull = jax.vjp(lambda *x: attend(*x, mask), *arguments)
    return [output, *pull(d_out)]


@jax.jit
def exact_results(inputs: Inputs) -> tuple[list[Array], list[Array]]:
    """Returns the reference's results in float32, and how much of a difference from each rounding explains.

    The latter are the largest root mean squares of a block's errors that are tolerated (`_block_errors`): twice those
    that the reference has itself in the dtype of the inputs, and float32's rounding. An implementation that rounds the
    same values as often has errors of the same size; averages of thousands of them differ by a few percent. Float32's
    relative error of sums of K products, and for the gradients of what all texts share of T · B more, grows as the
    root of their number.

    The texts are computed one after the other, so that their scores need not be in memory together.
    """
    wide = tuple(x if x.dtype == bool else x.astype(jnp.float32) for x in inputs)
    with jax.default_matmul_precision("highest"):
        exact = _text_by_text(wide)
    B, _, T, _ = inputs[0].shape
    relative = 4 * jnp.finfo(jnp.float32).eps * jnp.sqrt(inputs[1].shape[2] + B * T)
    rounding = [
        2 * _block_errors(alone - x) + relative * jnp.abs(x).max()
        for alone, x in zip(_text_by_text(inputs), exact, strict=True)
    ]
    return exact, rounding


def _text_by_text(inputs: Inputs) -> list[Array]:
    q, k, v, r, u, w, mask, d_out = inputs
    masks = jnp.broadcast_to(mask, (len(q), 1, *mask.shape[-2:]))

    def of_text(text):
        q, k, v, mask, d_out = (x[None] for x in text)
        output, dq, dk, dv, *shared = results(relative_attention, q, k, v, r, u, w, mask, d_out)
        return [x.astype(jnp.float32) for x in (output[0], dq[0], dk[0], dv[0], *shared)]

    *per_text, dr, du, dw = jax.lax.map(of_text, (q, k, v, masks, d_out))
    return [*per_text, dr.sum(0), du.sum(0), dw.sum(0)]


@jax.jit
def _largest_ratio(array: Array, exact: Array, rounding: Array) -> Array:
    return (_block_errors(array.astype(jnp.float32) - exact) / rounding).max()


def _block_errors(difference: Array) -> Array:
    """Returns the root mean squares over all texts of blocks of BLOCK or more queries or keys, for each head; of the
    biases' gradients, the one over all.

    A tile that is wrong is therefore seen among many that are right. Of fewer keys, some have almost no gradient, and
    their errors say little.
    """
    if difference.ndim == 2:
        return jnp.sqrt(jnp.mean(jnp.square(difference)))
    *_, N, length, H = difference.shape
    squares = jnp.square(difference).reshape(-1, N, length, H).mean((0, 3))
    blocks = jnp.array_split(squares, max(1, length // BLOCK), axis=1)
    return jnp.sqrt(jnp.stack([block.mean(1) for block in blocks]))


def median_seconds(run: Callable[[], Any]) -> float:
    """Returns the median duration of several calls, after one that is not counted."""
    run()
    seconds = []
    for _ in range(TIMED_RUNS):
        started = time.perf_counter()
        run()
        seconds.append(time.perf_counter() - started)
    return statistics.median(seconds)


# ---- the cache


def cache_key(config: TrainConfig, mesh: Mapping[str, int], names: Sequence[str]) -> dict[str, Any]:
    """Returns all that the outcome depends on, as plain values: devices, libraries, kernels, sizes, dtype and mesh."""
    source = Path(attention.__file__)
    files = [source, source.with_name("attention_tpu.py"), Path(__file__)]
    return {
        "device": jax.local_devices()[0].device_kind,
        "jax": jax.__version__,
        "compiler": backend.get_backend().platform_version,
        "kernels": hashlib.sha256(b"".join(file.read_bytes() for file in files)).hexdigest(),
        "shape": attention_shape(config, mesh)._asdict(),
        "packed": config.data.pack,
        "dtype": config.dtype,
        "mesh": dict(mesh),
        "implementations": list(names),
    }


def cached_trials(folder: Path, key: dict[str, Any], run_trials: Callable[[], list[Trial]]) -> tuple[list[Trial], str]:
    """Returns the trials that a file in the folder holds for this key, or runs them and writes it, and their source.

    A file that is damaged is replaced, and a folder that cannot be written is done without; both with one warning.
    """
    digest = hashlib.sha256(repr(sorted(key.items())).encode()).hexdigest()
    file, problem = folder / f"attention-{digest[:16]}.json", None
    try:
        values = read_json_object(file)
        if has_right_sum(values) and values.get("key") == key:
            return [Trial(**trial) for trial in values["trials"]], f"as tried before: {file}"
        problem = f"{file}: is damaged, and replaced"
    except FileNotFoundError:
        pass
    except InputError as e:
        problem = f"{e}; attention is tried anew"
    trials = run_trials()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        write_json(file, with_sum({"key": key, "trials": [trial._asdict() for trial in trials]}))
    except OSError as e:
        problem = problem or f"{file}: cannot be written ({e.strerror}); the next run tries attention anew"
    if problem:
        warnings.warn(problem, stacklevel=2)
    return trials, "tried now"
