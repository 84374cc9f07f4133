"""Do the memory and the speed of `davae prepare`, and of reading its shards, change with the size of the corpus?

    python -m benchmarks prepare_memory [FOLDER] [--texts 10000] [--scales 1 10 100]

Measures peak resident memory and texts per second for corpora of 1, 10 and 100 times the size, each in a process of
its own. Reading takes 500 batches of 64 texts from the whole corpus. The texts are sentences of the demo's corpus, each
with a number before it.
"""

import itertools
import random
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

from benchmarks.common import Row, make_parser, parse, positive, report, run_python
from davae_jax.data.demo_corpus import all_factors, sentence

BATCHES, BATCH_SIZE = 500, 64
READ = f"""
import sys, time
from pathlib import Path
from davae_jax.data.prepared.shards import Prepared
from davae_jax.data.prepared.shard_batches import ShardBatches
began = time.perf_counter()
batches = ShardBatches(Prepared(Path(sys.argv[1])), {BATCH_SIZE}, pad_id=0, buckets=4)
batches.batch(0)
opened = time.perf_counter()
for step in range({BATCHES}):
    batches.batch(step)
print(opened - began, time.perf_counter() - opened)
"""


def main(argv: list[str] | None = None) -> None:
    parser = make_parser(__doc__, __file__)
    parser.add_argument("folder", type=Path, nargs="?", help="for temporary files (a temporary folder)")
    parser.add_argument("--texts", type=positive, default=10_000, help="number of texts at scale 1 (10000)")
    parser.add_argument("--scales", type=positive, nargs="+", default=[1, 10, 100])
    args = parse(parser, argv, {"texts": 200, "scales": [1]})
    with tempfile.TemporaryDirectory(dir=args.folder) as folder:
        report(args, measure(Path(folder).absolute(), args.texts, args.scales))


def measure(folder: Path, texts: int, scales: list[int]) -> Iterator[Row]:
    """Yields a row for each corpus of `texts` times a scale. Every corpus is removed after it is measured."""
    for scale in scales:
        yield {"corpus": f"{scale}×"} | measure_corpus(folder, scale * texts)


def measure_corpus(folder: Path, texts: int) -> Row:
    """Returns the measurements of a corpus of so many texts.

    All corpora share tokenizers of 10,000 texts. Training takes memory that grows up to 50,000 texts.
    """
    corpus, output, tokenizers = folder / "texts.txt", folder / "prepared", folder / "tokenizers"
    prepare = ["-m", "davae_jax.cli", "prepare", "--workers", 1]
    if not tokenizers.exists():
        write_corpus(corpus, min(texts, 10_000))
        run_python(*prepare, "--input", corpus, "--output", tokenizers, "--decoder-vocab-size", 600)
    write_corpus(corpus, texts)
    prepared = run_python(*prepare, "--input", corpus, "--output", output, "--tokenizers", tokenizers)
    read = run_python("-c", READ, output)
    opened, reading = map(float, read.output.split())
    shutil.rmtree(output)
    return {
        "texts": texts,
        "prepare, peak MB": prepared.peak_MB,
        "prepare, texts/s": texts / prepared.seconds,
        "read, peak MB": read.peak_MB,
        "until the first batch, s": opened,
        "read, texts/s": BATCHES * BATCH_SIZE / reading,
    }


def write_corpus(path: Path, n: int) -> None:
    """Writes n different texts, one a line."""
    sentences = [sentence(f) for f in random.Random(0).sample(all_factors(), 5000)]
    with path.open("w", encoding="utf-8") as file:
        for i, text in zip(range(n), itertools.cycle(sentences), strict=False):
            file.write(f"{i}：{text}\n")


if __name__ == "__main__":
    main()
