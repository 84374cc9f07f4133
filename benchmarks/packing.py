"""How much faster do packed rows train than batches of length buckets, and how much padding do they save?

    python -m benchmarks packing TEXTS --tokenizers FOLDER [--steps N] [--max-length N]

Prints the second table of docs/packing.md. All kinds of batches train the same small model in one process, taking turns
step by step, with about the same number of trained tokens per step. On CPU, time is measured as process time, so other
load on the machine has little effect.
"""

import dataclasses
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import jax
import numpy as np

from benchmarks.common import Row, make_parser, parse, positive, report, row
from benchmarks.models import TRAINED_IDS, VOCABULARY, random_model, write_texts
from davae_jax import DAVAEConfig
from davae_jax.data.batches import Batch, TextBatches
from davae_jax.data.inputs.readers import read_texts
from davae_jax.data.packing import PackedBatches
from davae_jax.data.tokenize import TokenizedTexts, tokenize
from davae_jax.model.davae import split
from davae_jax.tokenizers.load import load_tokenizers
from davae_jax.training.presets import DEMO
from davae_jax.training.run.vocabularies import with_vocabularies
from davae_jax.training.state import init_state
from davae_jax.training.step import make_train_step

ROWS = 8  # of a packed batch


def main(argv: list[str] | None = None) -> None:
    parser = make_parser(__doc__, __file__)
    parser.add_argument("texts", type=Path, nargs="?")
    parser.add_argument("--tokenizers", type=Path, help="folder with spiece.model and vocab.txt")
    parser.add_argument("--steps", type=positive, default=8, help="timed steps of each kind")
    parser.add_argument("--max-length", type=positive, default=128)
    parser.add_argument("--buckets", type=positive, nargs="+", default=[1, 4, 8], help="numbers of length buckets")
    args = parse(parser, argv, {"steps": 1, "max_length": 40, "buckets": [1]})
    with tempfile.TemporaryDirectory() as scratch:
        published = DAVAEConfig()
        if args.smallest:
            published = with_vocabularies(published, VOCABULARY, VOCABULARY)
            published = dataclasses.replace(published, **TRAINED_IDS)
            args.texts, args.tokenizers = write_texts(Path(scratch), 50, tokenizers=True), Path(scratch)
        if not args.texts or not args.tokenizers:
            parser.error("TEXTS and --tokenizers are required")
        tokenizers = load_tokenizers(args.tokenizers, published)
        texts = read_texts(args.texts)
        texts = tokenize(texts, *tokenizers, max_length=args.max_length, source=str(args.texts))
        report(args, measure(texts, args.max_length, args.steps, published, args.buckets))


def measure(
    texts: TokenizedTexts, max_length: int, steps: int, published: DAVAEConfig, buckets: list[int]
) -> Iterator[Row]:
    """Yields a row for each kind of batches, for a model of the demo's widths with the published vocabularies."""
    small = DEMO.model
    model = dataclasses.replace(
        published,
        encoder=dataclasses.replace(
            small.encoder, vocab_size=published.encoder.vocab_size, max_position_embeddings=512
        ),
        decoder=dataclasses.replace(small.decoder, vocab_size=published.decoder.vocab_size),
        latent_size=small.latent_size,
    )
    pad_id = published.pad_token_id
    packed = PackedBatches(texts, ROWS, pad_id=pad_id, row_length=max_length)
    per_step = trained(packed.batch(0)) / np.mean([len(ids) - 1 for ids in texts.decoder_ids])  # texts per step
    kinds = {
        "one length" if n == 1 else f"{n} buckets": TextBatches(texts, round(per_step), pad_id=pad_id, buckets=n)
        for n in buckets
    }
    kinds["packed"] = packed
    graphdef, params = split(random_model(model))
    rates = speeds(kinds, make_train_step(graphdef, DEMO), init_state(params, DEMO), steps)
    for name, batches in kinds.items():
        encoder, decoder = padding(batches)
        peer = ("packed", [rates["packed"]])
        shares = {"padding of the encoder, %": 100 * encoder, "padding of the decoder, %": 100 * decoder}
        yield row({"batches": name}, "tokens/s", [rates[name]], peer=peer, **shares)


def trained(batch: Batch) -> int:
    """Returns the number of target tokens in a batch."""
    return int(np.maximum(batch.lengths - 1, 0).sum())


def padding(batches: TextBatches | PackedBatches) -> np.ndarray:
    """Returns the fractions of an epoch's encoder and decoder slots that are padding.

    Unpacked decoder rows have one slot fewer than their length, because the last token is only a target.
    """
    if isinstance(batches, PackedBatches):
        return batches.padding
    real = slots = np.zeros(2)
    for step in range(batches.steps_per_epoch):
        rows, (S, T) = batches.select_texts(step)
        real = real + [sum(len(batches.texts.encoder_ids[i]) for i in rows), trained(batches.batch(step))]
        slots = slots + len(rows) * np.array([S, T - 1])
    return 1 - real / slots


def speeds(kinds: dict, take_step, state, n: int) -> dict[str, float]:
    """Returns the trained tokens per second of each kind of batch, over n steps of each."""
    clock = time.process_time if jax.default_backend() == "cpu" else time.perf_counter
    # Run each shape once before timing, so that no compilation is timed.
    warm = {
        name: {batches.select_texts(step)[1]: step for step in range(batches.steps_per_epoch)}
        for name, batches in kinds.items()
    }
    for name, shapes in warm.items():
        for step in shapes.values():
            state, _ = take_step(state, kinds[name].batch(step))
    tokens, seconds = dict.fromkeys(kinds, 0), dict.fromkeys(kinds, 0.0)
    for step in range(n):
        for name, batches in kinds.items():
            batch = batches.batch(step)
            jax.block_until_ready(state)
            began = clock()
            state, _ = take_step(state, batch)
            jax.block_until_ready(state)
            tokens[name], seconds[name] = tokens[name] + trained(batch), seconds[name] + clock() - began
    return {name: tokens[name] / seconds[name] for name in kinds}


if __name__ == "__main__":
    main()
