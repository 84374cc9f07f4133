"""Measures how much faster the demo trains when its process keeps its memory (davae_jax/utils/huge_pages.py).

    python benchmarks/huge_pages.py [--rounds 5] [--steps 200]

Trains with and without, in turns, and prints the tokens per second of each run and the ratio of the medians. Run it on
an idle machine.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

from davae_jax.utils.huge_pages import SETTINGS

ROOT = Path(__file__).parent.parent


def tokens_per_second(steps: int, env: dict[str, str]) -> float:
    """Returns the median over the logged steps of a run, without its first fifth, which includes the compilation."""
    with tempfile.TemporaryDirectory() as folder:
        options = ["--steps", steps, "--log.every", 10, "--log.figures", 0, "--log.samples", 0, "--run-dir", folder]
        command = list(map(str, [sys.executable, ROOT / "train.py", *options]))
        subprocess.run(command, env=env, check=True, capture_output=True)
        rows = [json.loads(line) for line in (Path(folder) / "metrics.jsonl").open(encoding="utf-8")]
    return statistics.median(row["tokens_per_s"] for row in rows[len(rows) // 5 :])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=200)
    args = parser.parse_args()
    kept = {name: value for name, value in os.environ.items() if name not in SETTINGS}
    without = kept | {"GLIBC_TUNABLES": ""}  # a setting that is present, even an empty one, is left as it is
    pairs = []
    for number in range(args.rounds):
        pairs.append((tokens_per_second(args.steps, without), tokens_per_second(args.steps, kept)))
        print(f"round {number + 1}: {pairs[-1][0]:.0f} tokens/s without, {pairs[-1][1]:.0f} with", flush=True)
    a, b = (statistics.median(values) for values in zip(*pairs))
    print(f"medians: {a:.0f} without, {b:.0f} with, {b / a:.2f} times as fast")


if __name__ == "__main__":
    main()
