"""PyTorch and JAX side by side on the same inputs: which module differs first, and by how much.

    python -m convert.parity SRC [--dtype bfloat16] [--against FOLDER] [--no-gradients]

The PyTorch twin (`twin.py`) and the JAX model read the same seeded ids (rows of unequal length, padded), embedding
noise and latent noise. Each module is compared twice. End to end, everything before it is JAX's own. In isolation, it
is given the twin's input of that module, so that a fault shows where it happens and rounding does not add up.

What is allowed, float32:
  hidden states, latents, logits  1e-4, or 4e-6 of the largest value where that is more. A 32-layer residual stream grows
      past 100, where two correct float32 programs come to differ by 2e-4: 1.2e-6 of the largest value was measured.
  losses  1e-5, relative.
  gradients  |difference| up to 1e-4 of the tensor's norm and 1e-8 of the layer's largest norm: a gradient whose terms
      nearly cancel carries the rounding of the terms. The biases of BERT's keys and of `relative` shift all scores of a
      query alike, which softmax ignores: their gradients are noise, of a norm up to 1e-5 or 1e-7 of the layer's largest.

bfloat16 is JAX in bfloat16, weights rounded too, against the twin in float32. TODO

Only what the inputs reach is compared: of the embeddings, the rows of the ids drawn. Another --seed draws others.
"""

from __future__ import annotations

import gc
import itertools
import re
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Annotated, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import tyro
from flax import nnx
from tqdm import tqdm

from davae_jax.checkpoint import CONFIG_FILE, PARAMS_FOLDER, flatten, from_pretrained, resolve_source
from davae_jax.cli import Command, run
from davae_jax.config import DAVAEConfig
from davae_jax.decoder import visible_keys
from davae_jax.errors import InputError
from davae_jax.latent import Posterior
from davae_jax.losses import adversarial_losses, published_loss
from davae_jax.model import DAVAE, merge, split

from . import torch_file
from .from_torch import checked_rows, read_state
from .names import INV_FREQ, Row, rows
from .to_torch import published_state

Dtype = Literal["float32", "bfloat16"]
Values = dict[str, np.ndarray]  # module → what it computes; the twin's are in the order of computation
Step = Callable[[str], None]  # told what begins

BETA = 0.5  # the KL's weight in the losses compared
NOISE = 0.1  # standard deviation of the embedding noise
SEGMENTS = 3  # the pieces in which a text is read with memory
MASKS = {"published mask": "published", "full mask": None}
LOSSES = {
    f"loss, fb_mode {fb_mode}{', length weighted' * weighted}": (fb_mode, weighted)
    for fb_mode in (0, 1, 2)
    for weighted in (True, False)
}
FREE_BITS = {name for name, (fb_mode, _) in LOSSES.items() if fb_mode == 1}
ADVERSARIAL = "adversarial losses"
IGNORED = "gradient of key and relative biases"
SOFTMAX_IGNORES = re.compile(r"encoder\.layers\.\d+\.key\.bias|decoder\.layers\.\d+\.relative\.bias")


class Tolerances(NamedTuple):
    """What the module's docstring says, as numbers."""

    end_to_end: tuple[float, float]  # of a state's |difference|: absolute, or of its largest value if that is more
    isolated: tuple[float, float]
    loss: float  # relative
    free_bits: float  # relative, fb_mode 1
    gradient: float  # of the tensor's norm
    gradient_noise: float  # of the largest norm in the layer
    ignored: float  # absolute norm of a gradient that should be 0
    ignored_noise: float  # the same, of the largest norm in the layer


TOLERANCES: dict[str, Tolerances] = {
    "float32": Tolerances((1e-4, 4e-6), (1e-4, 4e-6), 1e-5, 1e-5, 1e-4, 1e-8, 1e-5, 1e-7),
    "bfloat16": Tolerances((0.1, 0.1), (0.03, 0.03), 0.05, 0.1, 0.25, 1e-3, 0, 1e-3),
}


@dataclass(frozen=True)
class Check:
    """One module. Differences are absolute for states, relative for losses, of the tensor's norm for gradients."""

    module: str
    end_to_end: float
    allowed: float
    isolated: float | None = None
    isolated_allowed: float | None = None
    detail: str = ""  # the tensor that a gradient's numbers are of

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
        """The first that differs in isolation; if none does, the first that differs at all."""
        isolated = (check for check in self.checks if not check.isolated_ok)
        return next(isolated, None) or next((check for check in self.checks if not check.ok), None)


class Batch(NamedTuple):
    """What both sides read. Rows have unequal lengths, those of segment_ids excepted."""

    encoder_ids: np.ndarray  # [B, S], padded with 0
    decoder_ids: np.ndarray  # [B, T], padded with the end token's id, as the published loss has it
    segment_ids: np.ndarray  # [B, T], read in pieces
    noise: np.ndarray  # [B, S, D], added to the encoder's embeddings
    eps: np.ndarray  # [B, L]
    prior: np.ndarray  # [B, L], what the discriminator should take for the prior


def compare(
    src: str | Path,
    *,
    against: str | Path | None = None,
    dtype: Dtype = "float32",
    batch_size: int = 2,
    length: int = 48,
    seed: int = 0,
    gradients: bool = True,
) -> Report:
    """Compares the JAX model of `src` with the PyTorch twin of `against`, by default of `src` as well.

    One side is in memory at a time, with its gradients: at the published size 10 GB, and 5 GB in the temporary folder.

    Raises:
      InputError: no model there, the two do not have the same tensors, or a number that cannot be.
    """
    folder = resolve_source(src)
    twin_folder = folder if against is None else resolve_source(against)
    config, twin_config = (DAVAEConfig.from_json(f / CONFIG_FILE) for f in (folder, twin_folder))
    if rows(config) != rows(twin_config):
        raise InputError(f"{folder} and {twin_folder}: their {CONFIG_FILE} give tensors of different shapes")
    if batch_size < 1:
        raise InputError(f"--batch-size must be at least 1, not {batch_size}", exit_code=2)
    longest = config.encoder.max_position_embeddings
    if not SEGMENTS <= length <= longest:
        raise InputError(
            f"--length must be {SEGMENTS} to {longest}, the encoder's positions, not {length}", exit_code=2
        )
    batch = make_batch(config, batch_size, length, seed)
    bar = tqdm(total=12 if gradients else 9, disable=None, leave=False)

    def step(name: str) -> None:
        bar.set_description(name)
        bar.update()

    with bar, tempfile.TemporaryDirectory(prefix="davae-parity-") as scratch:
        gradient_folder = Path(scratch) if gradients else None
        twin = run_twin(twin_folder, twin_config, batch, gradient_folder, step)
        gc.collect()
        step("JAX: weights")
        model = from_pretrained(folder, dtype=dtype)
        return check_model(model, batch, twin, dtype, gradient_folder, step)


def make_batch(config: DAVAEConfig, batch_size: int, length: int, seed: int) -> Batch:
    rng = np.random.default_rng(seed)
    end = config.end_token_id

    def decoder_ids():
        ids = rng.integers(0, config.decoder.vocab_size - 1, (batch_size, length), dtype=np.int32)
        return ids + (ids >= end)  # any id but the end token's

    def padded(ids, pad):
        lengths = rng.integers(length // 2, length, batch_size)
        lengths[0] = length
        return np.where(np.arange(length) < lengths[:, None], ids, pad).astype(np.int32)

    def normal(*shape):
        return rng.standard_normal((batch_size, *shape), dtype=np.float32)

    return Batch(
        encoder_ids=padded(rng.integers(1, config.encoder.vocab_size, (batch_size, length)), 0),
        decoder_ids=padded(decoder_ids(), end),
        segment_ids=decoder_ids(),
        noise=NOISE * normal(length, config.encoder.hidden_size),
        eps=normal(config.latent_size),
        prior=normal(config.latent_size),
    )


# PyTorch


def run_twin(
    folder: Path, config: DAVAEConfig, batch: Batch, gradients: Path | None = None, step: Step = lambda name: None
) -> Values:
    """Everything the twin computes. Each tensor's gradient goes to a file in `gradients`, under its published name."""
    try:
        import torch
    except ImportError:
        raise InputError("comparing needs PyTorch: pip install 'davae-jax[torch]'") from None
    from .twin import build_twin

    step("PyTorch: weights")
    twin = build_twin(config.to_dict(), _published_arrays(folder, config))
    b = Batch(*(torch.from_numpy(x.astype(np.int64) if x.dtype == np.int32 else x) for x in batch))

    def read(ids, memory, window):
        decoded = twin.decode(ids, latent, memory, window)
        return decoded.logits, decoded.memory

    with torch.no_grad():
        step("PyTorch: states")
        encoded = twin.encode(b.encoder_ids, b.noise)
        latent = encoded.mean + b.eps * (encoded.logvar / 2).exp()
        decoded = twin.decode(b.decoder_ids, latent)
        values = _states(encoded, latent, decoded, decoded.logits)
        step("PyTorch: memory")
        values |= _segments(read, b.segment_ids.tensor_split(SEGMENTS, dim=1), torch.stack)
        step("PyTorch: losses")
        values["discriminator"] = twin.discriminate(latent)
        values[ADVERSARIAL] = torch.stack(twin.adversarial_losses(latent, b.prior))
        for name, (fb_mode, weighted) in LOSSES.items():
            losses = twin.published_loss(b.encoder_ids, b.decoder_ids, b.eps, BETA, fb_mode, weighted)
            values[name] = torch.stack(losses)
    if gradients:
        step("PyTorch: gradients")
        mean, logvar, *_ = twin.encode(b.encoder_ids)
        total = twin.published_loss(b.encoder_ids, b.decoder_ids, b.eps, BETA, 0, True)[2]
        loss_d, loss_g = twin.adversarial_losses(mean + b.eps * (logvar / 2).exp(), b.prior)
        (total + loss_d + loss_g).backward()
        for name, parameter in twin.named_parameters():
            np.save(gradients / f"{name}.npy", parameter.grad.numpy())
            parameter.grad = None
    return {name: value.numpy() for name, value in values.items()}


def _published_arrays(folder: Path, config: DAVAEConfig) -> dict[str, np.ndarray]:
    """The weights under the published names, of a converted checkpoint or a published folder."""
    if (folder / PARAMS_FOLDER).is_dir():
        return published_state(folder, config, np.dtype(np.float32))
    state = read_state(folder)
    checked_rows(state, config, torch_file.find(folder))
    return state


# Both sides


def _states(encoded, latent, decoded, logits) -> dict:
    return {
        "encoder embeddings": encoded.hidden[0],
        **{f"encoder layer {i}": h for i, h in enumerate(encoded.hidden[1:])},
        "pooled": encoded.pooled,
        "posterior mean": encoded.mean,
        "posterior logvar": encoded.logvar,
        "latent": latent,
        "decoder input": decoded.hidden[0],
        **{f"decoder layer {i}": h for i, h in enumerate(decoded.hidden[1:])},
        "final norm": decoded.final,
        "logits": logits,
    }


def _segments(read: Callable, pieces: Sequence, stack: Callable) -> dict:
    """Logits of each piece and the memory at the end. `read(ids, memory, window)` gives logits and the memory."""
    logits, first = read(pieces[0], None, None)
    values = {"segment 0": logits}
    for mask, window in MASKS.items():
        memory = first
        for i, ids in enumerate(pieces[1:], 1):
            values[f"segment {i}, {mask}"], memory = read(ids, memory, window)
        values[f"memory, {mask}"] = stack(memory)
    return values


# JAX


def check_model(
    model: DAVAE,
    batch: Batch,
    twin: Values,
    dtype: Dtype = "float32",
    gradients: Path | None = None,
    step: Step = lambda name: None,
) -> Report:
    """Compares a model with what `run_twin` computed, and with the gradients it left in that folder."""
    tolerances = TOLERANCES[dtype]
    with jax.default_matmul_precision("highest"):
        end_to_end = _run_jax(model, batch, step)
        isolated = _run_isolated(model, batch, twin, dtype, step)
        isolated["encoder embeddings"] = end_to_end["encoder embeddings"]  # their input is the ids
        checks = [_check(name, end_to_end, isolated, twin, tolerances) for name in twin]
        if gradients:
            step("JAX: gradients")
            found = flatten(_gradients(*split(model), batch))
            step("gradients: difference")
            checks += _check_gradients(found, gradients, rows(model.config), tolerances)
    return Report(checks)


def _run_jax(model: DAVAE, b: Batch, step: Step) -> Values:
    step("JAX: states")
    values = dict(_forward(*split(model), b))
    latent = values["latent"]

    def read(ids, memory, window):
        return model.decode(ids, latent, memory=memory, window=window)

    def stack(memory):
        return jnp.stack(memory.hidden)[:, :, memory.capacity - int(memory.length) :]

    step("JAX: memory")
    values |= _segments(read, np.array_split(b.segment_ids, SEGMENTS, axis=1), stack)
    step("JAX: losses")
    values["discriminator"] = model.discriminate(latent)
    values[ADVERSARIAL] = jnp.stack(adversarial_losses(model, latent, b.prior))
    values |= _losses(*split(model), b)
    return {name: np.asarray(value, np.float32) for name, value in values.items()}


@partial(jax.jit, static_argnums=0)
def _forward(graphdef, params, b: Batch):
    model = merge(graphdef, params)
    encoded = model.encoder(b.encoder_ids, b.noise)
    latent = Posterior(encoded.mean, encoded.logvar).at(b.eps)
    decoded = model.decoder(b.decoder_ids, latent)
    return _states(encoded, latent, decoded, model.decoder.logits(decoded.final))


@partial(jax.jit, static_argnums=0)
def _losses(graphdef, params, b: Batch):
    # All in one program: the compiler merges what they share.
    return {name: jnp.stack(_loss(merge(graphdef, params), b, *how)) for name, how in LOSSES.items()}


@partial(jax.jit, static_argnums=0)
def _gradients(graphdef, params, b: Batch):
    """Of the published loss and both adversarial ones together, which reach every weight.

    fb_mode 0: no dimension's KL is masked, so none can fall on the other side of the mask.
    """

    def total(params):
        model = merge(graphdef, params)
        encoded = model.encoder(b.encoder_ids)
        latent = Posterior(encoded.mean, encoded.logvar).at(b.eps)
        return _loss(model, b, 0, True)[2] + sum(adversarial_losses(model, latent, b.prior))

    return jax.grad(total)(params)


def _loss(model, b: Batch, fb_mode: int, weighted: bool):
    how = dict(eps=b.eps, beta=BETA, fb_mode=fb_mode, length_weighted=weighted)
    return published_loss(model, b.encoder_ids, b.decoder_ids, **how)


def _run_isolated(model: DAVAE, b: Batch, twin: Values, dtype: Dtype, step: Step) -> Values:
    """Each module on the twin's input of that module."""
    encoder, decoder = model.encoder, model.decoder
    given = {name: jnp.asarray(value, dtype) for name, value in twin.items() if name not in LOSSES}
    values = {}

    step("JAX: encoder in isolation")
    score_bias = jnp.where(b.encoder_ids > 0, 0.0, -10000.0)[:, None, None, :]
    x = given["encoder embeddings"]
    for i, layer in enumerate(encoder.layers):
        name = f"encoder layer {i}"
        values[name] = _encoder_layer(*split(layer), x, score_bias)
        x = given[name]
    values["pooled"] = jnp.tanh(encoder.pooler(x[:, 0]))
    posterior = encoder.posterior(given["pooled"]).astype(jnp.float32)
    values["posterior mean"], values["posterior logvar"] = jnp.split(posterior, 2, axis=-1)
    values["latent"] = Posterior(twin["posterior mean"], twin["posterior logvar"]).at(b.eps)

    step("JAX: decoder in isolation")
    T = b.decoder_ids.shape[1]
    latent_term = decoder.latent_term(twin["latent"])
    features, visible = decoder.position_features(jnp.arange(T - 1, -1, -1)), visible_keys(T, T, offset=0)
    shared = features, decoder.r_w_bias[...], decoder.r_r_bias[...], visible, latent_term
    values["decoder input"] = decoder.embedding(b.decoder_ids) + latent_term
    x = given["decoder input"]
    for i, layer in enumerate(decoder.layers):
        name = f"decoder layer {i}"
        values[name] = _decoder_layer(*split(layer), x, *shared)
        x = given[name]
    values["final norm"] = decoder.norm(x)
    values["logits"] = decoder.logits(given["final norm"])
    values["discriminator"] = model.discriminate(twin["latent"])
    values[ADVERSARIAL] = jnp.stack(adversarial_losses(model, jnp.asarray(twin["latent"]), b.prior))
    return {name: np.asarray(value, np.float32) for name, value in values.items()}


# Every layer has the same shapes and gives its weights as arguments, so each of the two compiles once.


@partial(jax.jit, static_argnums=0)
def _encoder_layer(graphdef, params, x, score_bias):
    return nnx.merge(graphdef, params)(x, score_bias)


@partial(jax.jit, static_argnums=0)
def _decoder_layer(graphdef, params, x, features, r_w_bias, r_r_bias, visible, latent_term):
    layer = nnx.merge(graphdef, params)
    return layer(x, layer.relative_keys(features), r_w_bias, r_r_bias, visible)[0] + latent_term


# Differences


def _check(name: str, end_to_end: Values, isolated: Values, twin: Values, tolerances: Tolerances) -> Check:
    expected = twin[name]
    if name in LOSSES or name == ADVERSARIAL:
        scale = np.abs(expected)
        allowed = isolated_allowed = tolerances.free_bits if name in FREE_BITS else tolerances.loss
    else:
        scale, largest = 1.0, np.abs(expected).max(initial=0.0)
        allowed, isolated_allowed = (max(floor, part * largest) for floor, part in tolerances[:2])
    difference = _largest_difference(end_to_end[name], expected, scale)
    if name not in isolated:
        return Check(name, difference, allowed)
    return Check(name, difference, allowed, _largest_difference(isolated[name], expected, scale), isolated_allowed)


def _largest_difference(found: np.ndarray, expected: np.ndarray, scale: np.ndarray | float = 1.0) -> float:
    """Largest |found − expected| / scale, 0/0 being 0; infinite where the shapes differ."""
    if found.shape != expected.shape:
        return np.inf
    difference = np.abs(found - expected)
    with np.errstate(divide="ignore", invalid="ignore"):
        return float(np.where(difference == 0, 0.0, difference / scale).max(initial=0.0))


def _check_gradients(found: dict, folder: Path, table: list[Row], tolerances: Tolerances) -> list[Check]:
    """One check a module, of its worst tensor, and one of all that softmax ignores. Empties `found` as it goes."""
    t = tolerances
    checks, ignored = [], []
    for module, group in itertools.groupby((row for row in table if row.name != INV_FREQ), _gradient_of):
        differences, zeros = {}, {}
        for row in group:
            expected = np.load(folder / f"{row.name}.npy", mmap_mode="r")
            gradient = row.to_file(np.asarray(found.pop(row.path), np.float32))
            norm = float(np.linalg.norm(expected))
            if SOFTMAX_IGNORES.fullmatch(row.path):
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
        allowed = max(t.ignored, t.ignored_noise * largest)
        ignored += [Check(IGNORED, norm, allowed, detail=path) for path, norm in zeros.items()]
    return [*checks, _worst(ignored)]


def _gradient_of(row: Row) -> str:
    if layer := re.match(r"(\w+)\.layers\.(\d+)\.", row.path):
        return f"gradient of {layer[1]} layer {layer[2]}"
    return f"gradient of {'.'.join(row.path.split('.')[:2])}"


def _worst(checks: list[Check]) -> Check:
    """The one nearest to what is allowed, or furthest past it."""

    def excess(check):
        return check.end_to_end / check.allowed if check.ok and check.allowed else 0.0 if check.ok else np.inf

    return max(checks, key=excess)


# Command


def format_report(report: Report) -> str:
    """The table, and the line that says it all."""
    width = max(len(check.module) for check in report.checks)
    lines = [f"{'module':{width}}  end to end  allowed  isolated  allowed"]
    for c in report.checks:
        alone = f"{'–':>8}  {'–':>7}" if c.isolated is None else f"{c.isolated:8.1e}  {c.isolated_allowed:7.1e}"
        lines.append(
            f"{c.module:{width}}  {c.end_to_end:10.1e}  {c.allowed:7.1e}  {alone}  {'ok' if c.ok else 'DIFFERS'}"
        )
    first = report.first_difference
    if first is None:
        return "\n".join([*lines, f"all {len(report.checks)} modules agree"])
    if not first.isolated_ok:
        said = f"in isolation {first.isolated:.1e}, allowed {first.isolated_allowed:.1e}"
    else:
        said = f"{first.end_to_end:.1e}, allowed {first.allowed:.1e}"
        if first.isolated is not None:
            said = f"end to end {said}; no module differs in isolation"
    detail = f"{first.detail}: " if first.detail else ""
    return "\n".join([*lines, f"first difference: {first.module} ({detail}{said})"])


@dataclass(kw_only=True)
class Main(Command):
    """Runs PyTorch and JAX side by side and says which module differs first; exit code 1 if one does."""

    src: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="SRC")]
    """Published folder, converted checkpoint or Hugging Face repo id: the weights of both sides."""

    against: str | None = None
    """Take PyTorch's weights from here instead: the folder that SRC was converted from."""

    dtype: Dtype = "float32"
    """JAX's number format; PyTorch's is float32. bfloat16 is allowed to differ more."""

    batch_size: int = 2
    """Rows of the random inputs."""

    length: int = 48
    """Tokens of the longest row."""

    seed: int = 0
    """Of the random inputs."""

    gradients: bool = True
    """Compare every tensor's gradient: half of the time, and a temporary file (in TMPDIR) as large as the weights."""

    def run(self) -> int:
        report = compare(
            self.src,
            against=self.against,
            dtype=self.dtype,
            batch_size=self.batch_size,
            length=self.length,
            seed=self.seed,
            gradients=self.gradients,
        )
        print(format_report(report))
        return 0 if report.ok else 1


if __name__ == "__main__":
    sys.exit(run(lambda: Main, None, "convert.parity"))
