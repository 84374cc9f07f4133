#!/usr/bin/env python3
"""Writes a random checkpoint in the published Randeng-DAVAE layout.

Every tensor is drawn from its own stream (seeded by its name), so the same config and seed give the same bytes on every
machine and under NumPy 1 and 2, and known answers can be kept as a few kilobytes instead of gigabytes.

    python tests/make_checkpoint.py --config CONFIG.json --out DIR [--seed 0]

DIR gets config.json and pytorch_model.bin (float16, torch.save's zip format). Peak memory is a little over the file's
size.
"""

import argparse
import json
import pathlib
import shutil
import zlib

import numpy as np
import torch


def tensor_shapes(config):
    """Name → shape of every tensor of the published file, in file order."""
    enc, dec, latent = config["encoder"], config["decoder"], config["latent_size"]
    h, ffn = enc["hidden_size"], enc["intermediate_size"]
    shapes = {}
    e = "vae_model.encoder."
    shapes[e + "embeddings.position_ids"] = (1, enc["max_position_embeddings"])
    shapes[e + "embeddings.word_embeddings.weight"] = (enc["vocab_size"], h)
    shapes[e + "embeddings.position_embeddings.weight"] = (enc["max_position_embeddings"], h)
    shapes[e + "embeddings.token_type_embeddings.weight"] = (enc["type_vocab_size"], h)
    norm(shapes, e + "embeddings.LayerNorm", h)
    for i in range(enc["num_hidden_layers"]):
        p = f"{e}encoder.layer.{i}."
        for name in ("query", "key", "value"):
            linear(shapes, f"{p}attention.self.{name}", h, h)
        linear(shapes, p + "attention.output.dense", h, h)
        norm(shapes, p + "attention.output.LayerNorm", h)
        linear(shapes, p + "intermediate.dense", h, ffn)
        linear(shapes, p + "output.dense", ffn, h)
        norm(shapes, p + "output.LayerNorm", h)
    linear(shapes, e + "pooler.dense", h, h)
    shapes[e + "linear.weight"] = (2 * latent, h)

    d, h, heads = "vae_model.decoder.", dec["hidden_size"], dec["num_attention_heads"]
    shapes[d + "word_embeddings.weight"] = (dec["vocab_size"], h)
    t = d + "transformer."
    shapes[t + "r_w_bias"] = shapes[t + "r_r_bias"] = (heads, h // heads)
    shapes[t + "linear_emb.weight"] = (h, latent)
    shapes[t + "position_embeddings.inv_freq"] = (h // 2,)
    for i in range(dec["num_layers"]):
        p = f"{t}layers.{i}."
        norm(shapes, p + "input_layernorm", h)
        linear(shapes, p + "attention.query_key_value", h, 3 * h)
        linear(shapes, p + "attention.relative", h, h)
        linear(shapes, p + "attention.dense", h, h)
        norm(shapes, p + "post_attention_layernorm", h)
        linear(shapes, p + "mlp.dense_h_to_4h", h, 4 * h)
        linear(shapes, p + "mlp.dense_4h_to_h", 4 * h, h)
    norm(shapes, t + "final_layernorm", h)
    linear(shapes, "vae_model.Disc.0", latent, 4 * latent)
    linear(shapes, "vae_model.Disc.2", 4 * latent, 1)
    return shapes


def linear(shapes, name, n_in, n_out):
    shapes[name + ".weight"], shapes[name + ".bias"] = (n_out, n_in), (n_out,)


def norm(shapes, name, n):
    shapes[name + ".weight"] = shapes[name + ".bias"] = (n,)


def tensor(name, shape, seed):
    """float16 values of one tensor (the two buffers are computed, not drawn)."""
    if name.endswith("position_ids"):
        return torch.arange(shape[1]).expand(shape).clone()
    if name.endswith("inv_freq"):
        n = 2 * shape[0]
        return (1 / 10000 ** (torch.arange(0.0, n, 2.0) / n)).half()
    draw = np.random.Generator(np.random.PCG64([seed, zlib.crc32(name.encode())]))
    x = draw.standard_normal(shape, dtype=np.float32)
    if "norm.weight" in name.lower():
        x = 1 + 0.1 * x
    elif len(shape) == 1 or name.endswith(("r_w_bias", "r_r_bias")):
        x = 0.05 * x
    elif "embeddings" in name:
        x = 0.1 * x
    elif name.endswith("linear_emb.weight"):
        x = 0.05 * x
    else:
        x = x / np.float32(np.sqrt(shape[1]))  # NumPy 2 would divide by a float64 in float64
    return torch.from_numpy(x.astype(np.float16))


def random_state(config, seed=0):
    """Name → tensor, what pytorch_model.bin holds."""
    return {name: tensor(name, shape, seed) for name, shape in tensor_shapes(config).items()}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", required=True)
    parser.add_argument("--out", required=True)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    config = json.loads(pathlib.Path(args.config).read_text(encoding="utf-8"))
    out = pathlib.Path(args.out)
    out.mkdir(parents=True, exist_ok=True)
    state = random_state(config, args.seed)
    torch.save(state, out / "pytorch_model.bin")
    shutil.copy(args.config, out / "config.json")
    size = (out / "pytorch_model.bin").stat().st_size
    print(f"{len(state)} tensors, {sum(v.numel() for v in state.values()):,} values, {size:,} bytes")


if __name__ == "__main__":
    main()
