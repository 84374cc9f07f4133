"""PyTorch and JAX side by side on the same inputs, module by module.

    python -m convert.parity SRC [--dtype bfloat16] [--against FOLDER]

TODO
"""

from __future__ import annotations

import gc
import re
import sys
import tempfile
from collections.abc import Callable, Iterator
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
from .names import INV_FREQ, rows
from .to_torch import published_state

Dtype = Literal["float32", "bfloat16"]
Values = dict[str, np.ndarray]  # module → what it computes; both sides fill one with the same keys, in the same order
Step = Callable[[str], None]  # tells the progress bar what is begun

BETA = 0.5
NOISE = 0.1  # standard deviation of the embedding noise
LOSSES = [(fb_mode, weighted) for fb_mode in (0, 1, 2) for weighted in (True, False)]
MASKS = {"published": "published", "full": None}
SEGMENTS = 3


class Batch(NamedTuple):
    """Inputs of both sides. Rows have unequal lengths; segment_ids alone has no padding."""

    encoder_ids: np.ndarray  # [B, S], padded with 0
    decoder_ids: np.ndarray  # [B, T], padded with the end token's id, as the published loss wants it
    segment_ids: np.ndarray  # [B, T], read in three pieces
    noise: np.ndarray  # [B, S, D], added to the encoder's embeddings
    eps: np.ndarray  # [B, L]
    prior: np.ndarray  # [B, L], what the discriminator should take for the prior


def make_batch(config: DAVAEConfig, batch_size: int, length: int, seed: int) -> Batch:
    rng = np.random.default_rng(seed)
    end = config.end_token_id

    def padded(ids, pad):
        lengths = rng.integers(length // 2, length, batch_size)
        lengths[0] = length
        return np.where(np.arange(length) < lengths[:, None], ids, pad).astype(np.int32)

    def decoder_ids():
        ids = rng.integers(0, config.decoder.vocab_size - 1, (batch_size, length), dtype=np.int32)
        return ids + (ids >= end)  # any id but the end token's

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


def run_twin(folder: Path, batch: Batch, gradients: Path | None, step: Step) -> Values:
    """The PyTorch side. Each tensor's gradient goes to a file in the folder `gradients`, under its published name."""
    import torch

    from .twin import build_twin

    step("PyTorch: weights")
    config = DAVAEConfig.from_json(folder / CONFIG_FILE)
    twin = build_twin(config.to_dict(), _published_state(folder, config))
    b = Batch(*(torch.from_numpy(a).long() if a.dtype == np.int32 else torch.from_numpy(a) for a in batch))
    with torch.no_grad():
        step("PyTorch: states")
        encoded = twin.encode(b.encoder_ids, b.noise)
        latent = encoded.mean + b.eps * (encoded.logvar / 2).exp()
        decoded = twin.decode(b.decoder_ids, latent)
        values = _states(encoded, latent, decoded, decoded.logits, twin.discriminate(latent))
        step("PyTorch: memory")
        for mask, window in MASKS.items():
            memory = None
            for i, ids in enumerate(torch.tensor_split(b.segment_ids, SEGMENTS, dim=1)):
                logits, memory, *_ = twin.decode(ids, latent, memory, window)
                values[f"{mask} mask, segment {i}"] = logits
            values[f"{mask} mask, memory"] = torch.stack(memory)
        step("PyTorch: losses")
        for fb_mode, weighted in LOSSES:
            loss = twin.published_loss(b.encoder_ids, b.decoder_ids, b.eps, BETA, fb_mode, weighted)
            values[_loss_name(fb_mode, weighted)] = torch.stack(loss)
        values["adversarial losses"] = torch.stack(twin.adversarial_losses(latent, b.prior))
    if gradients:
        step("PyTorch: gradients")
        posterior = twin.encode(b.encoder_ids)
        latent = posterior.mean + b.eps * (posterior.logvar / 2).exp()
        total = twin.published_loss(b.encoder_ids, b.decoder_ids, b.eps, BETA, 0, True)[2]
        (total + sum(twin.adversarial_losses(latent, b.prior))).backward()
        for name, parameter in twin.named_parameters():
            np.save(gradients / f"{name}.npy", parameter.grad.numpy())
            parameter.grad = None
    return {name: value.numpy() for name, value in values.items()}


def _published_state(folder, config):
    if (folder / PARAMS_FOLDER).is_dir():
        return published_state(folder, config, np.dtype(np.float32))
    state = read_state(folder)
    checked_rows(state, config, torch_file.find(folder))
    return state


def _states(encoded, latent, decoded, logits, discriminated):
    return {
        "encoder embeddings": encoded.hidden[0],
        **{f"encoder layer {i}": h for i, h in enumerate(encoded.hidden[1:])},
        "pooled": encoded.pooled,
        "posterior mean": encoded.mean,
        "posterior logvar": encoded.logvar,
        "latent": latent,
        "decoder input": decoded.hidden[0],
        **{f"decoder layer {i}": h for i, h in enumerate(decoded.hidden[1:])},
        "decoder norm": decoded.final,
        "logits": logits,
        "discriminator": discriminated,
    }


def _loss_name(fb_mode, weighted):
    return f"loss, fb_mode {fb_mode}, length weighted" if weighted else f"loss, fb_mode {fb_mode}"


@partial(jax.jit, static_argnums=0)
def _forward(graphdef, params, b: Batch):
    model = merge(graphdef, params)
    encoded = model.encoder(b.encoder_ids, b.noise)
    latent = Posterior(encoded.mean, encoded.logvar).at(b.eps)
    decoded = model.decoder(b.decoder_ids, latent)
    return _states(encoded, latent, decoded, model.decoder.logits(decoded.final), model.discriminate(latent))


@partial(jax.jit, static_argnums=0)
def _losses(graphdef, params, b: Batch):
    model = merge(graphdef, params)
    return {
        _loss_name(*how): jnp.stack(
            published_loss(
                model, b.encoder_ids, b.decoder_ids, eps=b.eps, beta=BETA, fb_mode=how[0], length_weighted=how[1]
            )
        )
        for how in LOSSES
    }


@partial(jax.jit, static_argnums=0)
def _gradients(graphdef, params, b):
    def loss(params):
        model = merge(graphdef, params)
        encoded = model.encoder(b.encoder_ids)
        latent = Posterior(encoded.mean, encoded.logvar).at(b.eps)
        total = published_loss(
            model, b.encoder_ids, b.decoder_ids, eps=b.eps, beta=BETA, fb_mode=0, length_weighted=True
        )[2]
        return total + sum(adversarial_losses(model, latent, b.prior))

    return jax.grad(loss)(params)


def run_jax(model: DAVAE, b: Batch, step) -> Values:
    step("JAX: states")
    values = dict(_forward(*split(model), b))
    latent = values["latent"]
    values = _states_order(values)
    step("JAX: memory")
    for mask, window in MASKS.items():
        memory = None
        for i, ids in enumerate(np.array_split(b.segment_ids, SEGMENTS, axis=1)):
            logits, memory = model.decode(ids, latent, memory=memory, window=window)
            values[f"{mask} mask, segment {i}"] = logits
        values[f"{mask} mask, memory"] = jnp.stack(memory.hidden)[:, :, memory.capacity - int(memory.length) :]
    step("JAX: losses")
    values |= _losses(*split(model), b)
    values["adversarial losses"] = jnp.stack(adversarial_losses(model, latent, b.prior))
    return {name: np.asarray(value.astype(jnp.float32)) for name, value in values.items()}


def _states_order(v):
    return v


@partial(jax.jit, static_argnums=0)
def _encoder_layer(graphdef, params, x, score_bias):
    return nnx.merge(graphdef, params)(x, score_bias)


@partial(jax.jit, static_argnums=0)
def _decoder_layer(graphdef, params, x, features, visible, u, v, term):
    layer = nnx.merge(graphdef, params)
    return layer(x, layer.relative_keys(features), u, v, visible)[0] + term


def run_isolated(model, b, twin, dtype, step):
    enc, dec = model.encoder, model.decoder
    cast = lambda x: jnp.asarray(x, dtype)
    out = {}
    step("JAX: encoder layers one by one")
    bias = jnp.where(b.encoder_ids > 0, 0.0, -10000.0)[:, None, None]
    x = cast(twin["encoder embeddings"])
    for i, layer in enumerate(enc.layers):
        out[n := f"encoder layer {i}"] = _encoder_layer(*split(layer), x, bias)
        x = cast(twin[n])
    out["pooled"] = jnp.tanh(enc.pooler(x[:, 0]))
    mean, logvar = jnp.split(enc.posterior(cast(twin["pooled"])).astype(jnp.float32), 2, -1)
    out |= {"posterior mean": mean, "posterior logvar": logvar}
    out["latent"] = Posterior(twin["posterior mean"], twin["posterior logvar"]).at(b.eps)
    step("JAX: decoder layers one by one")
    term = dec.latent_term(twin["latent"])
    out["decoder input"] = dec.embedding(b.decoder_ids) + term
    T = b.decoder_ids.shape[1]
    f = dec.position_features(jnp.arange(T - 1, -1, -1))
    vis = visible_keys(T, T, offset=0)
    x = cast(twin["decoder input"])
    for i, layer in enumerate(dec.layers):
        out[n := f"decoder layer {i}"] = _decoder_layer(
            *split(layer), x, f, vis, dec.r_w_bias[...], dec.r_r_bias[...], term
        )
        x = cast(twin[n])
    out["decoder norm"] = dec.norm(x)
    out["logits"] = dec.logits(cast(twin["decoder norm"]))
    out["discriminator"] = model.discriminate(twin["latent"])
    out["adversarial losses"] = jnp.stack(adversarial_losses(model, jnp.asarray(twin["latent"]), b.prior))
    return {name: np.asarray(value.astype(jnp.float32)) for name, value in out.items()}


if __name__ == "__main__":
    import time, resource, os

    src, dtype = Path(sys.argv[1]), sys.argv[2]
    grads = len(sys.argv) > 3
    config = DAVAEConfig.from_json(src / CONFIG_FILE)
    b = make_batch(config, 2, 48, 0)
    t0 = time.time()

    def step(s):
        print(
            f"{time.time() - t0:7.1f} s  {resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6:.1f} GB  {s}",
            flush=True,
        )

    import contextlib

    with (
        tempfile.TemporaryDirectory() as tmp,
        jax.default_matmul_precision("highest") if dtype == "float32" else contextlib.nullcontext(),
    ):
        tmp = Path(tmp)
        twin = run_twin(src, b, tmp if grads else None, step)
        gc.collect()
        step("JAX weights")
        model = from_pretrained(src, dtype=dtype)
        if os.environ.get("ISO_FIRST"):
            pass
        end = run_jax(model, b, step)
        alone = run_isolated(model, b, twin, dtype, step)
        print("cache", _encoder_layer._cache_size(), _decoder_layer._cache_size())
        step("done")
        for n, v in twin.items():
            d = np.abs(end[n] - v)
            a = np.abs(alone[n] - v) if n in alone else np.zeros(1)
            if "loss" in n:
                d = d / abs(v)
                a = a / abs(v)
            rel = np.linalg.norm(end[n] - v) / np.linalg.norm(v)
            rela = np.linalg.norm(alone[n] - v) / np.linalg.norm(v) if n in alone else 0
            print(
                f"{n:34} e2e {d.max():.2e} iso {a.max():.2e} | rms {np.sqrt((v**2).mean()):.2e} max {np.abs(v).max():.2e} | /max {d.max() / np.abs(v).max():.1e} {a.max() / np.abs(v).max():.1e} | l2 {rel:.1e} {rela:.1e}",
                v if "loss" in n else "",
            )
        if grads:
            step("JAX gradients")
            g = flatten(_gradients(*split(model), b))
            jax.block_until_ready(g)
            step("compare")
            worst = {}
            for row in rows(config):
                if row.name == INV_FREQ:
                    continue
                t = np.load(tmp / f"{row.name}.npy", mmap_mode="r")
                j = row.to_file(np.asarray(g.pop(row.path).astype(jnp.float32)))
                n = np.linalg.norm(t)
                kind = re.sub(r"\.\d+\.", ".N.", row.path)
                m = (np.abs(j - t).max() / n, np.linalg.norm(j - t) / n, n, np.linalg.norm(j), row.path)
                if kind not in worst or m[0] > worst[kind][0]:
                    worst[kind] = m
            step("done")
            for k, m in worst.items():
                print(f"{k:50} max/norm {m[0]:.1e} l2 {m[1]:.1e}  norms {m[2]:.2e} {m[3]:.2e} {m[4]}")
