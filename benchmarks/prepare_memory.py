"""Measures memory and speed of `davae prepare` and of reading its shards, for corpora of 1, 10 and 100 times the size.

    python benchmarks/prepare_memory.py FOLDER [--texts 10000] [--scales 1 10 100] [--json]

Every row measures peak resident memory and texts per second, each in a separate process. Reading takes 500 batches of
64 texts from the whole corpus. The texts are sentences of the demo's corpus, each with a number before it.
"""

import argparse
import itertools
import json
import os
import random
import shutil
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).parent.parent
BATCHES, BATCH_SIZE = 500, 64
READ = f"""
import sys, time
from pathlib import Path
from davae_jax.data.prepared.shards import Prepared
from davae_jax.data.prepared.shard_batches import ShardBatches
batches = ShardBatches(Prepared(Path(sys.argv[1])), {BATCH_SIZE}, pad_id=0, buckets=4)
began = time.perf_counter()
for step in range({BATCHES}):
    batches.batch(step)
print(time.perf_counter() - began)
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="for temporary files; every corpus is removed after it is measured")
    parser.add_argument("--texts", type=int, default=10_000, help="number of texts at scale 1 (10000)")
    parser.add_argument("--scales", type=int, nargs="+", default=[1, 10, 100])
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")
    args = parser.parse_args()
    rows = [measure(args.folder / str(scale), scale, args.texts) for scale in args.scales]
    if args.json:
        print(json.dumps(rows))
        return
    print(
        "| corpus | texts | peak memory of `davae prepare`, one worker | texts/s | peak memory of reading | texts/s |"
    )
    print("|---|---|---|---|---|---|")
    for r in rows:
        print(
            f"| {r['scale']}× | {r['texts']:,} | {r['prepare_mb']:.0f} MB | {r['prepare_rate']:,.0f} "
            f"| {r['read_mb']:.0f} MB | {r['read_rate']:,.0f} |"
        )


def measure(folder: Path, scale: int, texts: int) -> dict:
    """Returns the measurements of a corpus of scale × texts."""
    folder.mkdir(parents=True, exist_ok=True)
    corpus, output = folder / "texts.txt", folder / "prepared"
    write_corpus(corpus, scale * texts)
    # All scales share tokenizers of the first 10,000 texts. Training takes memory that grows up to 50,000 texts.
    tokenizers = folder.parent / "tokenizers"
    command = [sys.executable, "-m", "davae_jax.cli", "prepare"]
    if not tokenizers.exists():
        first = folder.parent / "first.txt"
        write_corpus(first, min(texts, 10_000))
        run([*command, "--input", first, "--output", tokenizers, "--decoder-vocab-size", 600, "--workers", 1])
    began = time.perf_counter()
    options = ["--tokenizers", tokenizers, "--workers", 1]
    prepare_mb, _ = run([*command, "--input", corpus, "--output", output, *options])
    seconds = time.perf_counter() - began
    read_mb, reading = run([sys.executable, "-c", READ, output])
    shutil.rmtree(folder)
    return {
        "scale": scale,
        "texts": scale * texts,
        "prepare_mb": prepare_mb,
        "prepare_rate": scale * texts / seconds,
        "read_mb": read_mb,
        "read_rate": BATCHES * BATCH_SIZE / float(reading),
    }


def write_corpus(path: Path, n: int) -> None:
    """Writes n different texts, one a line."""
    sys.path.insert(0, str(ROOT))
    from davae_jax.data.demo_corpus import all_factors, sentence

    sentences = [sentence(f) for f in random.Random(0).sample(all_factors(), 5000)]
    with path.open("w", encoding="utf-8") as file:
        for i, text in zip(range(n), itertools.cycle(sentences), strict=False):
            file.write(f"{i}：{text}\n")


def run(command: list) -> tuple[float, str]:
    """Runs a process. Returns its peak resident memory in MB, and its standard output."""
    process = subprocess.Popen(list(map(str, command)), cwd=ROOT, stdout=subprocess.PIPE, text=True)
    output = process.stdout.read()
    _, status, usage = os.wait4(process.pid, 0)
    if status:
        raise SystemExit(f"failed: {' '.join(map(str, command))}")
    return usage.ru_maxrss * 1024 / 1e6, output.strip()


if __name__ == "__main__":
    main()
