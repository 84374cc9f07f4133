"""Evaluates each remedy for posterior collapse on the demo corpus, by a demo run without that remedy.

    python benchmarks/ablation.py [RUNS_FOLDER] [--only NAME …]

Trains the runs that are incomplete in RUNS_FOLDER (default runs/ablation), which takes four minutes per run on two
cores, and prints the table of docs/ablation.md.
"""

import argparse
import json
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent
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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="?", type=Path, default=Path("runs/ablation"), metavar="RUNS_FOLDER")
    parser.add_argument("--only", nargs="+", choices=SETTINGS, default=list(SETTINGS), metavar="NAME")
    args = parser.parse_args()
    rows = []
    for name in args.only:
        folder = args.runs / name.replace(" ", "-")
        if not (folder / "figures.json").exists():
            command = [sys.executable, ROOT / "train.py", "--run-dir", folder, "--log.samples", "0", *SETTINGS[name]]
            subprocess.run(list(map(str, command)), check=True, stdout=sys.stderr)
        rows.append(row(name, folder))
    titles = ["run", "KL, nats", "active units", "mutual information", "BLEU", "exact", "BLEU sampled", "prior valid"]
    print("| " + " | ".join(titles) + " |\n|" + "---|" * len(titles))
    print("\n".join(f"| {' | '.join(cells)} |" for cells in rows))


def row(name: str, folder: Path) -> list[str]:
    """Returns the table cells of a run, from its final evaluation and the last line of its log."""
    metrics = json.loads((folder / "figures.json").read_text(encoding="utf-8"))
    last = json.loads((folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()[-1])
    return [
        name,
        f"{last['kl_unmasked']:.1f}",
        f"{metrics['active_units']} of {metrics['latent_size']}",
        f"{metrics['mutual_information']:.2f}",
        f"{metrics['bleu']:.1f}",
        f"{metrics['exact_match']:.1%}",
        f"{metrics['bleu_sampled']:.1f}",
        f"{metrics['prior_valid']:.1%}",
    ]


if __name__ == "__main__":
    main()
