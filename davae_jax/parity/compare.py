"""Compares PyTorch and JAX module by module on the same inputs: which module differs first, and by how much.

    python -m convert.parity SRC [--dtype bfloat16] [--against FOLDER] [--no-gradients]

The PyTorch twin (`twin.py`) and the JAX model read the same inputs (`module_values.py`). Each module is compared twice:
end to end, on the outputs of JAX's own earlier modules; and in isolation, on the twin's outputs of the earlier modules,
so that an error is located in the module that causes it, and rounding errors do not accumulate.

Tolerances in float32:
  hidden states, latents, logits: 1e-4; if a tensor's largest value is large, 4e-6 of it end to end and 1e-6 of it in
    isolation. The residual stream of the published depth reaches 136 on random weights. There PyTorch is 9e-5 from the
    twin in float64 and JAX 1.4e-4 (XLA's matrix product on a CPU rounds three times as much as PyTorch's), so they
    differ by 1.6e-4, 1.2e-6 of the largest value; in isolation by 2e-5, 2e-7 of it.
  losses: 1e-5, relative.
  gradients: |difference| up to 1e-4 of the tensor's norm plus 1e-8 of the layer's largest norm. A gradient whose terms
    nearly cancel has the rounding errors of those terms: without the second part, the query bias of the last encoder
    layer, whose gradient is 1e-5 of its neighbours', would miss by a factor of 2.
  The biases of BERT's keys and of `relative` shift all scores of a query alike, and softmax ignores such a shift. Their
    exact gradients are 0, the computed ones rounding errors: a norm up to 1e-5, or 1e-7 of the layer's largest norm
    if that is more.

--dtype bfloat16 compares JAX in bfloat16, including the weights, with the twin in float32. A bfloat16 has 8 significant
bits: each operation rounds by up to 2⁻⁹ of its result, and softmax, LayerNorm and depth amplify that. The tolerances
are 1.5 to 2 times the worst difference measured on random checkpoints: three of tests/golden (8 samples of the inputs
each) and a narrow one of the published depth (2 samples).
  states: 15 % of the largest value (or of 1) end to end, 4 % in isolation; 8 % and 2.6 % were measured.
  losses: 5 %, relative; 2.7 % was measured.
  gradients: half of the tensor's norm. Up to 15 % was measured, except 34 % in a small discriminator, where rounding
    moved a unit across its ReLU's zero.
This detects a wrong module, but not a wrong rounding; only float32 proves equality.

Only what the inputs reach is compared: of the embedding tables, the rows of the sampled ids. Another --seed samples
other rows.
"""

from __future__ import annotations

import gc
import itertools
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, NamedTuple

import jax
import numpy as np

from davae_jax.checkpoints.hub import resolve_source
from davae_jax.checkpoints.pretrained import from_pretrained
from davae_jax.checkpoints.published.published_names import INV_FREQ, NameRow, name_table
from davae_jax.checkpoints.run_folder import CONFIG_FILE, config_folder
from davae_jax.checkpoints.weights import flatten
from davae_jax.model.config import DAVAEConfig
from davae_jax.model.davae import DAVAE, split
from davae_jax.parity import module_values
from davae_jax.parity.module_values import (
    ADVERSARIAL_LOSSES,
    BETA,
    KL_PER_DIM,
    Inputs,
    Progress,
    Values,
    isolated_jax_values,
    jax_gradients,
    jax_values,
    make_inputs,
    twin_values,
)
from davae_jax.utils.errors import InputError, OptionError
from davae_jax.utils.files import temporary_folder
from davae_jax.utils.progress import progress_bar

Dtype = Literal["float32", "bfloat16"]
ZERO_GRADIENTS = "gradient of key and relative biases"
ZERO_GRADIENT_PATHS = re.compile(r"encoder\.layers\.\d+\.key\.bias|decoder\.layers\.\d+\.relative\.bias")


class Tolerances(NamedTuple):
    """The tolerances of the module's docstring.

    Those of states are (absolute, relative to the state's largest value); the larger of the two applies.
    """

    end_to_end: tuple[float, float]
    isolated: tuple[float, float]
    loss: float  # relative
    gradient: float  # relative to the tensor's norm
    gradient_noise: float  # relative to the largest norm in the layer, added to `gradient`
    zero_gradient: float  # norm of a gradient that is exactly 0, absolute
    zero_gradient_noise: float  # the same, relative to the largest norm in the layer; the larger one applies


TOLERANCES: dict[str, Tolerances] = {
    "float32": Tolerances((1e-4, 4e-6), (1e-4, 1e-6), 1e-5, 1e-4, 1e-8, 1e-5, 1e-7),
    "bfloat16": Tolerances((0.15, 0.15), (0.04, 0.04), 0.05, 0.5, 4e-3, 0, 4e-3),
}


@dataclass(frozen=True)
class Check:
    """The comparison of one module.

    Differences are absolute for states, relative for losses, and relative to the tensor's norm for gradients.
    """

    module: str
    end_to_end: float
    allowed: float
    isolated: float | None = None
    isolated_allowed: float | None = None
    detail: str = ""  # for gradients: the path of the tensor with the largest difference

    @property
    def ok(self) -> bool:
        return self.end_to_end <= self.allowed and self.isolated_ok  # False for NaN

    @property
    def isolated_ok(self) -> bool:
        return self.isolated is None or self.isolated <= self.isolated_allowed


@dataclass(frozen=True)
class Report:
    checks: list[Check]  # in the order of computation

    @property
    def ok(self) -> bool:
        return all(check.ok for check in self.checks)

    @property
    def first_difference(self) -> Check | None:
        """Returns the first check that fails in isolation; if there is none, the first that fails end to end."""
        isolated = (check for check in self.checks if not check.isolated_ok)
        return next(isolated, None) or next((check for check in self.checks if not check.ok), None)


def compare(
    src: str | Path,
    *,
    against: str | Path | None = None,
    dtype: Dtype = "float32",
    batch_size: int = 2,
    length: int | None = None,
    seed: int = 0,
    gradients: bool = True,
) -> Report:
    """Compares the JAX model of `src` with the PyTorch twin of `against` (default: of `src`).

    Only one of the two is in memory at a time, with its gradients: at the published size 13 GB, and 5 GB of temporary
    files.

    Raises:
      InputError: a folder contains no model, the two models have tensors of different shapes, or an option is invalid.
    """
    folder = resolve_source(src)
    twin_folder = folder if against is None else resolve_source(against)
    config, twin_config = (DAVAEConfig.from_json(config_folder(f) / CONFIG_FILE) for f in (folder, twin_folder))
    if name_table(config) != name_table(twin_config):
        raise InputError(f"{folder} and {twin_folder}: tensor shapes differ according to their {CONFIG_FILE}")
    if batch_size < 1:
        raise OptionError("--batch-size", f"must be at least 1, not {batch_size}")
    longest = config.encoder.max_position_embeddings
    length = min(48, longest) if length is None else length
    if not module_values.NUM_SEGMENTS <= length <= longest:
        reason = f"must be {module_values.NUM_SEGMENTS} to {longest}, the encoder's positions, not {length}"
        raise OptionError("--length", reason)
    inputs = make_inputs(config, batch_size, length, seed)
    bar = progress_bar(total=12 if gradients else 9, leave=False)

    def report_progress(name: str) -> None:
        bar.set_description(name)
        bar.update()

    with bar, temporary_folder("davae-parity-") as scratch:
        gradient_folder = scratch if gradients else None
        twin = twin_values(twin_folder, twin_config, inputs, gradient_folder, report_progress)
        gc.collect()
        report_progress("JAX: weights")
        model = from_pretrained(folder, dtype=dtype)
        return check_model(model, inputs, twin, dtype, gradient_folder, report_progress)


def check_model(
    model: DAVAE,
    inputs: Inputs,
    twin: Values,
    dtype: Dtype = "float32",
    gradients: Path | None = None,
    report_progress: Progress = lambda name: None,
) -> Report:
    """Compares a model with the values that `twin_values` returned and, if given, with its folder of gradients."""
    tolerances = TOLERANCES[dtype]
    with jax.default_matmul_precision("highest"):
        end_to_end = jax_values(model, inputs, report_progress)
        isolated = isolated_jax_values(model, inputs, twin, dtype, report_progress)
        isolated["encoder embeddings"] = end_to_end["encoder embeddings"]  # their input is the ids in both cases
        twin = _apply_free_bits_mask(twin, end_to_end[KL_PER_DIM], model.config.dim_target_kl)
        checks = [_check_value(name, end_to_end, isolated, twin, tolerances) for name in twin]
        if gradients:
            report_progress("JAX: gradients")
            jax_grads = flatten(jax_gradients(*split(model), inputs))
            report_progress("gradients: difference")
            checks += _check_gradients(jax_grads, gradients, name_table(model.config), tolerances)
    return Report(checks)


# Differences


def _apply_free_bits_mask(twin: Values, kl_BL: np.ndarray, target: float) -> Values:
    """Replaces the twin's fb_mode 1 losses by those with the mask of JAX's KL, `kl_BL`: dimensions above the target.

    If rounding moves a dimension's KL across the target, the loss changes by the KL of the whole dimension. That is not
    an error; the KL per dimension is checked separately.
    """
    change_B = (twin[KL_PER_DIM] * (1.0 * (kl_BL > target) - (twin[KL_PER_DIM] > target))).sum(-1)
    change = np.array([0.0, change_B.mean(), BETA * change_B.sum()], np.float32)
    return twin | {name: twin[name] + change for name, (fb_mode, _) in module_values.LOSSES.items() if fb_mode == 1}


def _check_value(name: str, end_to_end: Values, isolated: Values, twin: Values, tolerances: Tolerances) -> Check:
    """Compares the value of one module, end to end and, if there is one, in isolation."""
    expected = twin[name]
    if name in module_values.LOSSES or name == ADVERSARIAL_LOSSES:
        scale = np.abs(expected)
        allowed = isolated_allowed = tolerances.loss
    else:
        scale, largest = 1.0, float(np.abs(expected).max(initial=0.0))
        allowed, isolated_allowed = (max(absolute, relative * largest) for absolute, relative in tolerances[:2])
    difference = _largest_difference(end_to_end[name], expected, scale)
    if name not in isolated:
        return Check(name, difference, allowed)
    return Check(name, difference, allowed, _largest_difference(isolated[name], expected, scale), isolated_allowed)


def _largest_difference(actual: np.ndarray, expected: np.ndarray, scale: np.ndarray | float = 1.0) -> float:
    """Returns the largest |actual − expected| / scale, with 0/0 = 0; infinity if the shapes differ."""
    if actual.shape != expected.shape:
        return np.inf
    difference = np.abs(actual - expected)
    with np.errstate(divide="ignore", invalid="ignore"):
        return float(np.where(difference == 0, 0.0, difference / scale).max(initial=0.0))


def _check_gradients(gradients: dict, folder: Path, table: list[NameRow], tolerances: Tolerances) -> list[Check]:
    """Compares gradients with those in the folder: a check per module and one for zero gradients.

    Empties `gradients` as it proceeds, to free memory.
    """
    t = tolerances
    checks, zero_gradient = [], []
    for module, group in itertools.groupby((row for row in table if row.name != INV_FREQ), _gradient_name):
        differences, zeros = {}, {}
        for row in group:
            expected = np.load(folder / f"{row.name}.npy", mmap_mode="r")
            gradient = row.to_file(np.asarray(gradients.pop(row.path), np.float32))
            norm = float(np.linalg.norm(expected))
            if ZERO_GRADIENT_PATHS.fullmatch(row.path):
                zeros[row.path] = float(np.maximum(norm, np.linalg.norm(gradient)))
            else:
                differences[row.path] = norm, _largest_difference(gradient, expected)
        largest = max(norm for norm, _ in differences.values())
        tensors = []
        for path, (norm, difference) in differences.items():
            scale = norm or 1.0
            allowed = t.gradient * norm + t.gradient_noise * largest
            tensors.append(Check(module, difference / scale, allowed / scale, detail=path))
        checks.append(_worst(tensors))
        allowed = max(t.zero_gradient, t.zero_gradient_noise * largest)
        zero_gradient += [Check(ZERO_GRADIENTS, norm, allowed, detail=path) for path, norm in zeros.items()]
    return [*checks, _worst(zero_gradient)]


def _gradient_name(row: NameRow) -> str:
    if layer := re.match(r"(\w+)\.layers\.(\d+)\.", row.path):
        return f"gradient of {layer[1]} layer {layer[2]}"
    return f"gradient of {'.'.join(row.path.split('.')[:2])}"


def _worst(checks: list[Check]) -> Check:
    """Returns the check whose difference is largest relative to its tolerance; failing checks come first."""

    def excess(check):
        return check.end_to_end / check.allowed if check.ok and check.allowed else 0.0 if check.ok else np.inf

    return max(checks, key=excess)


# The report


def format_report(report: Report) -> str:
    """Formats the checks as a table; the last line is the verdict."""
    width = max(len(check.module) for check in report.checks)
    lines = [f"{'module':{width}}  end to end  allowed  isolated  allowed"]
    for c in report.checks:
        isolated = f"{'–':>8}  {'–':>7}" if c.isolated is None else f"{c.isolated:8.1e}  {c.isolated_allowed:7.1e}"
        lines.append(
            f"{c.module:{width}}  {c.end_to_end:10.1e}  {c.allowed:7.1e}  {isolated}  {'ok' if c.ok else 'DIFFERS'}"
        )
    first = report.first_difference
    if first is None:
        return "\n".join([*lines, f"all {len(report.checks)} modules agree"])
    if not first.isolated_ok:
        difference = f"in isolation {first.isolated:.1e}, allowed {first.isolated_allowed:.1e}"
    else:
        difference = f"{first.end_to_end:.1e}, allowed {first.allowed:.1e}"
        if first.isolated is not None:
            difference = f"end to end {difference}; no module differs in isolation"
    detail = f"{first.detail}: " if first.detail else ""
    return "\n".join([*lines, f"first difference: {first.module} ({detail}{difference})"])
