"""Measures what weights in bfloat16 and int8 save, and what they change.

    python benchmarks/weights.py MODEL [--json FILE] [--batches 1 2 8 64] [--tokens 32] [--rounds 3] [--texts 32]

MODEL is a folder that `davae_jax.from_pretrained` reads. For float32, bfloat16 and int8 the program prints:

- the bytes of the weights, and the peak memory of a process that loads the model and generates 8 tokens;
- tokens per second after compilation, greedy, for each batch size (the formats take turns; the median of the rounds),
  and in brackets the bytes per second of the decoder's weights, each read once per step, as a share of the memory
  bandwidth that a sum over 1 GB reaches on this machine;
- the difference from float32: of the logits of texts (largest and mean absolute value), of the KL (mean absolute
  value), and the share of tokens that greedy decoding from the same latents leaves equal.

The texts are samples of the float32 model if the folder has tokenizers, otherwise random ids.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path

import jax
import numpy as np

import davae_jax
from davae_jax.checkpoints.weights import flat_params
from davae_jax.model.latent import kl_per_dimension
from davae_jax.tokenizers.load import TOKENIZER_FILES

ROOT = Path(__file__).parent.parent
FORMATS = ("float32", "bfloat16", "int8")
PEAK = """
import resource, sys
import numpy as np
import davae_jax
model = davae_jax.from_pretrained(sys.argv[1], weights=sys.argv[2])
davae_jax.generate(model, np.zeros((1, model.config.latent_size)), max_length=8, top_k=1)
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024)
"""


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 2, 8, 64])
    parser.add_argument("--tokens", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--texts", type=int, default=32)
    args = parser.parse_args(argv)
    peaks = {weights: peak_memory(args.model, weights) for weights in FORMATS}
    models = {weights: davae_jax.from_pretrained(args.model, weights=weights) for weights in FORMATS}
    bandwidth = read_rate()
    speeds = speed_rows(models, bandwidth, args.batches, args.tokens, args.rounds)
    changes = change_rows(models, *make_texts(args.model, models["float32"], args.texts))
    rows = [
        {"weights": name, "bytes": sum(w.nbytes for w in flat_params(model).values()), "peak_bytes": peaks[name]}
        | {"speed": speeds[name]}
        | changes[name]
        for name, model in models.items()
    ]
    print_rows(rows, bandwidth)
    if args.json:
        args.json.write_text(json.dumps({"read_bytes_per_s": bandwidth, "rows": rows}, indent=1) + "\n")


def peak_memory(folder: Path, weights: str) -> int:
    """Returns the peak resident memory, in bytes, of a process that loads the model and generates 8 tokens."""
    command = [sys.executable, "-c", PEAK, str(folder.absolute()), weights]
    return int(subprocess.run(command, stdout=subprocess.PIPE, text=True, cwd=ROOT, check=True).stdout)


def speed_rows(models: dict, bandwidth: float, batches: list[int], tokens: int, rounds: int) -> dict[str, list[dict]]:
    """Returns, for each format, the speed at each batch size. The formats take turns in every round."""
    speeds: dict[str, list[dict]] = {name: [] for name in models}
    for batch in batches:
        rates: dict[str, list[float]] = {name: [] for name in models}
        for turn in range(rounds + 1):
            for name, model in models.items():
                seconds, steps = time_steps(model, batch, tokens)
                if turn:  # the first one compiles
                    rates[name].append(batch * steps / seconds)
        for name, model in models.items():
            rate = statistics.median(rates[name])
            share = decoder_bytes(model) * rate / batch / bandwidth
            low, high = min(rates[name]), max(rates[name])
            speeds[name].append(dict(batch=batch, tokens_per_s=rate, least=low, most=high, share_of_bandwidth=share))
    return speeds


def time_steps(model: davae_jax.DAVAE, batch: int, tokens: int) -> tuple[float, int]:
    """Returns the seconds that generation takes, and its number of steps, which is less if all texts end early."""
    latent = np.random.default_rng(0).standard_normal((batch, model.config.latent_size), np.float32)
    start = time.perf_counter()
    ids = davae_jax.generate(model, latent, max_length=tokens + 1, top_k=1)
    seconds = time.perf_counter() - start
    return seconds, min(tokens, max(map(len, ids)))


def decoder_bytes(model: davae_jax.DAVAE) -> int:
    """Returns the bytes of the weights that a step reads: the decoder's without `relative`, which is applied once."""
    weights = flat_params(model).items()
    return sum(w.nbytes for path, w in weights if path.startswith("decoder.") and ".relative." not in path)


def read_rate() -> float:
    """Returns the memory bandwidth, in bytes per second, of a sum over 1 GB with all cores."""
    x = np.ones(1 << 28, np.float32)
    total = jax.jit(lambda parts: [part.sum() for part in parts])
    parts = [jax.numpy.asarray(part) for part in np.split(x, 8 * (os.cpu_count() or 1))]
    jax.block_until_ready(total(parts))
    times = []
    for _ in range(5):
        start = time.perf_counter()
        jax.block_until_ready(total(parts))
        times.append(time.perf_counter() - start)
    return x.nbytes / min(times)


def make_texts(folder: Path, model: davae_jax.DAVAE, n: int) -> tuple[list[list[int]], list[list[int]]]:
    """Returns encoder ids and decoder ids, with <bos> in front, of n texts."""
    if all((folder / name).exists() for name in TOKENIZER_FILES):
        vae = davae_jax.TextVAE.from_pretrained(folder)
        texts = [text for text in vae.sample(n, seed=0) if text]
        bos = model.config.bos_token_id
        return vae.encoder_ids(texts), [[bos, *ids] for ids in vae.decoder_ids(texts)]
    rng, sizes = np.random.default_rng(0), (model.config.encoder.vocab_size, model.config.decoder.vocab_size)
    return tuple(rng.integers(1, size, (n, 32)).tolist() for size in sizes)


def change_rows(models: dict, encoder_ids: list[list[int]], decoder_ids: list[list[int]]) -> dict[str, dict]:
    """Returns, for each format, how it differs from float32. All decode the latents of the float32 model."""
    encoder_ids, _ = pad(encoder_ids)
    padded, mask = pad(decoder_ids)
    latent = np.asarray(models["float32"].encode(encoder_ids).mean)
    values = {}
    for name, model in models.items():
        kl = np.asarray(kl_per_dimension(model.encode(encoder_ids)).sum(-1))
        batches = range(0, len(padded), 4)  # logits of long texts are large
        logits = [np.asarray(model.decode(padded[i : i + 4], latent[i : i + 4])[0])[mask[i : i + 4]] for i in batches]
        values[name] = kl, np.concatenate(logits), davae_jax.generate(model, latent, top_k=1)
    kl, logits, texts = values["float32"]
    rows = {}
    for name, (other_kl, other_logits, other_texts) in values.items():
        difference = np.abs(other_logits - logits)
        equal = [equal_share(x[1:], y[1:]) for x, y in zip(texts, other_texts, strict=True)]
        rows[name] = dict(
            logits_rms=float(np.sqrt(np.mean(np.square(logits, dtype=np.float64)))),
            logits_max_difference=float(difference.max()),
            logits_mean_difference=float(difference.mean()),
            equal_next_tokens=float((other_logits.argmax(-1) == logits.argmax(-1)).mean()),
            kl=float(other_kl.mean()),
            kl_mean_difference=float(np.abs(other_kl - kl).mean()),
            equal_greedy_tokens=float(np.mean(equal)),
            equal_greedy_texts=float(np.mean([x == y for x, y in zip(texts, other_texts, strict=True)])),
        )
    return rows


def equal_share(a: list[int], b: list[int]) -> float:
    """Returns the share of the longer text's tokens that the other text has at the same place."""
    same = sum(x == y for x, y in zip(a, b, strict=False))
    return same / max(len(a), len(b)) if a or b else 1.0


def pad(rows: list[list[int]]) -> tuple[np.ndarray, np.ndarray]:
    """Returns the rows in one array, filled up with 0, and a mask that is True where a row has an id."""
    lengths = np.array([len(row) for row in rows])
    mask = np.arange(lengths.max()) < lengths[:, None]
    array = np.zeros(mask.shape, np.int32)
    array[mask] = np.concatenate(rows)
    return array, mask


def print_rows(rows: list[dict], bandwidth: float) -> None:
    """Prints a line for each figure and a column for each format."""
    print(f"memory bandwidth {bandwidth / 1e9:.1f} GB/s, {os.cpu_count()} cores, jax {jax.__version__}")
    lines = {"": [row["weights"] for row in rows]}
    for name, label in [("bytes", "weights, MB"), ("peak_bytes", "peak memory, MB")]:
        lines[label] = [f"{row[name] / 1e6:,.0f}" for row in rows]
    for i, speed in enumerate(rows[0]["speed"]):
        values = [row["speed"][i] for row in rows]
        label = f"tokens/s at batch {speed['batch']}"
        lines[label] = [f"{v['tokens_per_s']:.1f} ({v['share_of_bandwidth']:.0%})" for v in values]
    for name in list(rows[0])[4:]:
        lines[name.replace("_", " ")] = [f"{row[name]:.4g}" for row in rows]
    for label, values in lines.items():
        print(f"{label:26}" + "".join(f"{value:>18}" for value in values))


if __name__ == "__main__":
    main()
