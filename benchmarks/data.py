"""How many texts per second does a core tokenize, prepare and batch, and does training wait for them?

    python -m benchmarks data [--texts 20000] [--batch-size 64] [--steps 60] [--options "--model.latent-size 32 …"]

The texts are sentences of the demo's corpus. Rates are texts per second of processor time, so they are those of one
core. The last rows train the demo, with `--options` of train.py, on texts in memory and on prepared ones: the share of
the time between steps that the program waits for a batch, as metrics.jsonl names it. The peer of the batches is
PyTorch's DataLoader on the same tokenized texts.
"""

import json
import shlex
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path

from benchmarks.common import ROOT, Row, in_turns, make_parser, parse, positive, report, row, run_python
from benchmarks.models import SMALLEST_TRAINING, TRAINED_IDS, write_texts
from davae_jax.data.batches import TextBatches
from davae_jax.data.packing import PackedBatches
from davae_jax.data.prepared.build_shards import VocabularySizes, build_shards
from davae_jax.data.prepared.shard_batches import ShardBatches
from davae_jax.data.prepared.shard_writer import ShardSettings
from davae_jax.data.prepared.shards import Prepared
from davae_jax.data.tokenize import TokenizedTexts, tokenize
from davae_jax.tokenizers.load import load_tokenizers
from davae_jax.training.presets import DEMO
from davae_jax.training.run.vocabularies import with_vocabularies

VOCABULARY = 600
MAX_LENGTH = 128


def main(argv: list[str] | None = None) -> None:
    parser = make_parser(__doc__, __file__, rounds=3)
    parser.add_argument("--texts", type=positive, default=20_000, help="number of texts (20000)")
    parser.add_argument("--batch-size", type=positive, default=64)
    parser.add_argument("--steps", type=positive, default=60, help="of the trainings (60)")
    parser.add_argument("--options", default="", help="of train.py")
    args = parse(parser, argv, {"texts": 200, "batch_size": 4, "steps": 4, "options": shlex.join(SMALLEST_TRAINING)})
    with tempfile.TemporaryDirectory() as folder:
        report(args, measure(Path(folder), args))


def measure(folder: Path, args) -> Iterator[Row]:
    """Yields the rows of tokenizing and preparing, of the batches, and of two trainings."""
    file, prepared = write_texts(folder, args.texts), folder / "prepared"
    positions = DEMO.model.encoder.max_position_embeddings
    settings = ShardSettings(("text",), MAX_LENGTH, positions, truncate=False, held_out=None, shard_size=None)
    build_shards([file], prepared, settings, VocabularySizes(VOCABULARY, VOCABULARY), workers=1)
    model = replace(with_vocabularies(DEMO.model, VOCABULARY, VOCABULARY), **TRAINED_IDS)
    encoder, decoder = load_tokenizers(prepared, model)
    texts = file.read_text(encoding="utf-8").splitlines()
    tokenized = tokenize(texts, encoder, decoder, max_length=MAX_LENGTH, source=str(file))
    functions = {
        "tokenize for the encoder": lambda: len(encoder.encode(texts)),
        "tokenize for the decoder": lambda: len([decoder.encode(text) for text in texts]),
        "tokenize for both": lambda: len(
            tokenize(texts, encoder, decoder, max_length=MAX_LENGTH, source=str(file)).lines
        ),
        "davae prepare": lambda: prepare_again(file, settings, prepared),
    }
    rates = in_turns({name: partial(cpu_rate, function) for name, function in functions.items()}, args.rounds)
    for name, values in rates.items():
        yield row({"table": "Texts per second of processor time", "what": name}, "texts/s", values)
    yield from batch_rows(tokenized, Prepared(prepared), args.batch_size, model.pad_token_id, args.rounds)
    for name, source in (("texts in memory", file), ("prepared texts", prepared)):
        options = [*shlex.split(args.options), "--data.train", str(source), "--tokenizers", str(prepared)]
        yield {"table": "Training", "texts": name} | waiting(options, folder / f"run on {name}", args.steps)


def prepare_again(file: Path, settings: ShardSettings, tokenizers: Path) -> int:
    """Prepares the texts in this process. Returns their number."""
    with tempfile.TemporaryDirectory() as folder:
        return build_shards([file], Path(folder) / "prepared", settings, tokenizers, workers=1)["texts"]


def batch_rows(texts: TokenizedTexts, prepared: Prepared, batch_size: int, pad_id: int, rounds: int) -> Iterator[Row]:
    """Yields a row for each kind of batches, for an epoch, but at most 500 batches."""
    sources = {
        "batches of texts in memory": TextBatches(texts, batch_size, pad_id=pad_id, buckets=4),
        "batches of prepared texts": ShardBatches(prepared, batch_size, pad_id=pad_id, buckets=4),
        "packed batches": PackedBatches(texts, max(1, batch_size // 4), pad_id=pad_id, row_length=MAX_LENGTH),
    }

    def read(source) -> int:
        steps = range(min(500, source.steps_per_epoch))
        return sum(int((source.batch(step).lengths > 0).sum()) for step in steps)

    peer = "PyTorch's DataLoader"
    functions = {name: partial(read, source) for name, source in sources.items()}
    functions[peer] = lambda: read_torch(texts, batch_size, pad_id)
    timed = {name: partial(cpu_rate, function) for name, function in functions.items()}
    in_turns(timed, 1)  # imports PyTorch
    rates = in_turns(timed, rounds)
    for name in sources:
        labels = {"table": "Texts per second of processor time", "what": name}
        yield row(labels, "texts/s", rates[name], peer=(peer, rates[peer]))


def read_torch(texts: TokenizedTexts, batch_size: int, pad_id: int) -> int:
    """Reads up to 500 batches as a PyTorch program would. Returns their number of texts."""
    import torch
    from torch.nn.utils.rnn import pad_sequence
    from torch.utils.data import DataLoader

    def collate(rows):
        encoder_ids, decoder_ids = (list(map(torch.from_numpy, column)) for column in zip(*rows))
        lengths = torch.tensor([len(ids) for ids in decoder_ids])
        return pad_sequence(encoder_ids, True, 0), pad_sequence(decoder_ids, True, pad_id), lengths

    rows = list(zip(texts.encoder_ids, texts.decoder_ids))
    loader = DataLoader(rows, batch_size, shuffle=True, drop_last=True, collate_fn=collate)
    return sum(len(lengths) for _, (_, _, lengths) in zip(range(500), loader))


def cpu_rate(function: Callable[[], int]) -> float:
    """Returns the texts per second of processor time of a function that returns its number of texts."""
    start = time.process_time()
    return function() / (time.process_time() - start)


def waiting(options: list[str], folder: Path, steps: int) -> Row:
    """Trains, and returns the median share of the time that waits for batches, and the texts per second."""
    log = ["--log.every", "2", "--log.samples", "0", "--log.figures", "0", "--run-dir", str(folder)]
    run_python(ROOT / "train.py", *options, *log, "--steps", steps)
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    rows = rows[len(rows) // 5 :]  # the first ones include the compilation
    return {
        "waits for batches, %": 100 * statistics.median(row["data_wait"] for row in rows),
        "tokens/s": statistics.median(row["tokens_per_s"] for row in rows),
    }


if __name__ == "__main__":
    main()
