"""How much faster does the demo train when its process keeps its memory (davae_jax/utils/huge_pages.py)?

    python -m benchmarks huge_pages [--rounds 5] [--steps 200]

Trains with and without, in turns. Run it on an idle machine.
"""

import json
import os
import statistics
import tempfile
from collections.abc import Iterator
from functools import partial
from pathlib import Path

from benchmarks.common import ROOT, Row, in_turns, make_parser, parse, positive, report, row, run_python
from benchmarks.models import SMALLEST_TRAINING, write_texts
from davae_jax.utils.huge_pages import SETTINGS


def main(argv: list[str] | None = None) -> None:
    parser = make_parser(__doc__, __file__, rounds=5)
    parser.add_argument("--steps", type=positive, default=200, help="number of steps of a run (200)")
    args = parse(parser, argv, {"steps": 20})
    with tempfile.TemporaryDirectory() as folder:
        texts = write_texts(Path(folder), 200)
        options = [*SMALLEST_TRAINING, "--data.train", texts] if args.smallest else []
        report(args, measure(args.rounds, [*options, "--steps", args.steps]))


def measure(rounds: int, options: list) -> Iterator[Row]:
    """Yields the row of the demo with its memory kept, beside one without."""
    kept = {name: value for name, value in os.environ.items() if name not in SETTINGS}
    without = kept | {"GLIBC_TUNABLES": ""}  # a setting that is present, even an empty one, is left as it is
    runs = {"kept": partial(tokens_per_second, options, kept), "not": partial(tokens_per_second, options, without)}
    rates = in_turns(runs, rounds)
    yield row({"memory": "kept"}, "tokens/s", rates["kept"], peer=("glibc's default", rates["not"]))


def tokens_per_second(options: list, env: dict[str, str]) -> float:
    """Returns the median over the logged steps of a run, without its first fifth, which includes the compilation."""
    with tempfile.TemporaryDirectory() as folder:
        log = ["--log.every", 10, "--log.figures", 0, "--log.samples", 0, "--run-dir", folder]
        run_python(ROOT / "train.py", *options, *log, env=env)
        rows = [json.loads(line) for line in (Path(folder) / "metrics.jsonl").open(encoding="utf-8")]
    return statistics.median(row["tokens_per_s"] for row in rows[len(rows) // 5 :])


if __name__ == "__main__":
    main()
