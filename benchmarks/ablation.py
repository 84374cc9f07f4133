"""What does each remedy for posterior collapse contribute on the demo corpus?

    python -m benchmarks ablation [RUNS_FOLDER] [--only NAME …]

Trains the demo once without each remedy, as far as RUNS_FOLDER (default runs/ablation) lacks these runs, which takes
four minutes per run on two cores, and prints the table of docs/ablation.md.
"""

import json
import shlex
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

from benchmarks.common import ROOT, Row, make_parser, parse, report, run_python
from benchmarks.models import SMALLEST_TRAINING

SETTINGS = {
    "the demo": [],
    "no KL annealing": ["--beta.ratio-zero", "0", "--beta.ratio-increase", "0"],
    "no free bits": ["--free-bits.mode", "off"],
    "latent at the first layer only": ["--model.decoder.no-latent-every-layer"],
    "no noise on the embeddings": ["--noise.embedding", "0"],
    "adversarial training added, λ 0.05": ["--adversarial.weight", "0.05"],
    "no annealing, no free bits, β 0.1": [
        *["--beta.ratio-zero", "0", "--beta.ratio-increase", "0", "--beta.max", "0.1", "--free-bits.mode", "off"]
    ],
}
SMALLEST = [*SMALLEST_TRAINING, "--steps", "2", "--log.figures", "8"]


def main(argv: list[str] | None = None) -> None:
    parser = make_parser(__doc__, __file__)
    parser.add_argument("runs", nargs="?", type=Path, default=Path("runs/ablation"), metavar="RUNS_FOLDER")
    parser.add_argument("--only", nargs="+", choices=SETTINGS, default=list(SETTINGS), metavar="NAME")
    parser.add_argument("--options", default="", help="further options of train.py")
    with tempfile.TemporaryDirectory() as scratch:
        smallest = {"runs": Path(scratch), "only": ["no free bits"], "options": shlex.join(SMALLEST)}
        args = parse(parser, argv, smallest)
        report(args, measure(args.runs, args.only, shlex.split(args.options)))


def measure(runs: Path, names: list[str], options: list[str]) -> Iterator[Row]:
    """Yields the row of each run, which is trained first if it is not complete."""
    for name in names:
        folder = runs.absolute() / name.replace(" ", "-")
        if not (folder / "figures.json").exists():
            train = [ROOT / "train.py", "--run-dir", folder, "--log.samples", "0", *options, *SETTINGS[name]]
            print(run_python(*train).output, file=sys.stderr)
        yield row_of(name, folder)


def row_of(name: str, folder: Path) -> Row:
    """Returns the figures of a run, from its final evaluation and the last line of its log."""
    metrics = json.loads((folder / "figures.json").read_text(encoding="utf-8"))
    last = json.loads((folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()[-1])
    return {
        "run": name,
        "KL, nats": last["kl_unmasked"],
        "active units": f"{metrics['active_units']} of {metrics['latent_size']}",
        "mutual information": metrics["mutual_information"],
        "BLEU": metrics["bleu"],
        "exact, %": 100 * metrics["exact_match"],
        "BLEU sampled": metrics["bleu_sampled"],
        "prior valid, %": 100 * metrics["prior_valid"],
    }


if __name__ == "__main__":
    main()
