"""What do weights in bfloat16 and int8 save, what do they cost, and what do they change?

    python -m benchmarks weights [DIR] [--batches 1 2 8 64] [--tokens 32] [--texts 32] [--layers N] [--width N]

DIR is a folder with a model, in any form; without it the model has random weights and the given sizes of the decoder.
Three tables:

- the bytes of the weights, and the peak memory of a process that loads the model and generates 8 tokens;
- tokens per second of greedy decoding, in turns, with float32 as the peer. The limit is the time to read the decoder's
  weights once per token at the rate of this machine's memory;
- differences from float32: of the logits of texts, of the KL, and of what greedy decoding makes of the same latents.
  The texts are samples of the float32 model if the folder has tokenizers, otherwise random ids.
"""

import tempfile
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import numpy as np

import davae_jax
from benchmarks.common import Row, in_turns, make_parser, memory_rate, parse, positive, report, row, run_python
from benchmarks.models import add_sizes, decoder_weights, resize, write_published
from davae_jax.checkpoints.weights import flat_params
from davae_jax.model.latent import kl_per_dimension
from davae_jax.tokenizers.load import TOKENIZER_FILES
from davae_jax.training.presets import RANDENG_1B

FORMATS = ("float32", "bfloat16", "int8")
ENCODER = {"layers": 4}  # of a model with random weights; decoding does not use it
SMALLEST = {"batches": [1], "tokens": 4, "texts": 2, "layers": 1, "width": 64, "vocab": 64}
LOAD_AND_GENERATE = """
import sys
import numpy as np
import davae_jax
model = davae_jax.from_pretrained(sys.argv[1], weights=sys.argv[2])
davae_jax.generate(model, np.zeros((1, model.config.latent_size)), max_length=8, top_k=1)
"""


def main(argv: list[str] | None = None) -> None:
    parser = make_parser(__doc__, __file__, rounds=3)
    parser.add_argument("model", type=Path, nargs="?", metavar="DIR")
    parser.add_argument("--batches", type=positive, nargs="+", default=[1, 2, 8, 64], help="numbers of texts")
    parser.add_argument("--tokens", type=positive, default=32, help="tokens of each text (32)")
    parser.add_argument("--texts", type=positive, default=32, help="number of texts for the differences (32)")
    add_sizes(parser, RANDENG_1B.model)
    args = parse(parser, argv, SMALLEST)
    with tempfile.TemporaryDirectory() as scratch:
        folder = args.model
        if folder is None:
            decoder = {"layers": args.layers, "width": args.width, "vocab": args.vocab}
            encoder = ENCODER | ({"layers": 1, "width": 64, "vocab": 64} if args.smallest else {})
            folder = write_published(
                resize(RANDENG_1B.model, encoder=encoder, decoder=decoder), Path(scratch) / "model"
            )
        megabytes = 64 if args.smallest else 1024
        report(args, measure(folder, args.batches, args.tokens, args.rounds, args.texts, megabytes))


def measure(folder: Path, batches: list[int], tokens: int, rounds: int, texts: int, megabytes: int) -> Iterator[Row]:
    """Yields the rows of the three tables. megabytes: of the array that shows the rate of the memory."""
    peaks = {weights: run_python("-c", LOAD_AND_GENERATE, folder.absolute(), weights).peak_MB for weights in FORMATS}
    models = {weights: davae_jax.from_pretrained(folder, weights=weights) for weights in FORMATS}
    for name, model in models.items():
        size = sum(w.nbytes for w in flat_params(model).values()) / 1e6
        yield {"table": "Memory", "weights": name, "MB": size, "MB, peak of a process": peaks[name]}
    for batch in batches:
        turns = {name: partial(generation_rate, model, batch, tokens) for name, model in models.items()}
        in_turns(turns, 1)  # compiles
        rates = in_turns(turns, rounds)
        for name, model in models.items():
            limit = "memory stream", batch * memory_rate(megabytes) / sum(w.nbytes for w in decoder_weights(model))
            labels = {"table": "Speed", "weights": name, "texts": batch}
            peer = None if name == "float32" else ("float32", rates["float32"])
            yield row(labels, "tokens/s", rates[name], peer=peer, limit=limit)
    changes = find_changes(models, *make_texts(folder, models["float32"], texts))
    yield from ({"table": "Differences", "weights": name} | values for name, values in changes.items())


def generation_rate(model: davae_jax.DAVAE, batch: int, tokens: int) -> float:
    """Returns the tokens per second of greedy decoding; its steps are fewer than asked for if all texts end early."""
    latent = np.random.default_rng(0).standard_normal((batch, model.config.latent_size), np.float32)
    start = time.perf_counter()
    ids = davae_jax.generate(model, latent, max_length=tokens + 1, top_k=1)
    return batch * min(tokens, max(map(len, ids))) / (time.perf_counter() - start)


def make_texts(folder: Path, model: davae_jax.DAVAE, n: int) -> tuple[list[list[int]], list[list[int]]]:
    """Returns encoder ids and decoder ids, with <bos> in front, of n texts."""
    if all((folder / name).exists() for name in TOKENIZER_FILES):
        vae = davae_jax.TextVAE.from_pretrained(folder)
        texts = [text for text in vae.sample(n, seed=0) if text]
        bos = model.config.bos_token_id
        return vae.encoder_ids(texts), [[bos, *ids] for ids in vae.decoder_ids(texts)]
    rng, sizes = np.random.default_rng(0), (model.config.encoder.vocab_size, model.config.decoder.vocab_size)
    return tuple(rng.integers(1, size, (n, 32)).tolist() for size in sizes)


def find_changes(models: dict, encoder_ids: list[list[int]], decoder_ids: list[list[int]]) -> dict[str, dict]:
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
        rows[name] = {
            "logits, RMS": float(np.sqrt(np.mean(np.square(logits, dtype=np.float64)))),
            "largest difference": float(difference.max()),
            "mean difference": float(difference.mean()),
            "equal next tokens": float((other_logits.argmax(-1) == logits.argmax(-1)).mean()),
            "KL": float(other_kl.mean()),
            "mean difference of the KL": float(np.abs(other_kl - kl).mean()),
            "equal greedy tokens": float(np.mean(equal)),
            "equal greedy texts": float(np.mean([x == y for x, y in zip(texts, other_texts, strict=True)])),
        }
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


if __name__ == "__main__":
    main()
