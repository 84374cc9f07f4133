"""Holds a demo run's figures.json against what the demo promises: `python tests/check_demo.py runs/demo`."""

import json
import sys
from pathlib import Path

AT_LEAST = {
    "n": 1000,
    "bleu": 85,
    "exact_match": 0.5,
    "bleu_sampled": 55,
    "prior_valid": 0.7,
    "prior_distinct": 0.9,
    "mutual_information": 6.0,
    "active_units": 8,
}
AT_MOST = {"bleu_other_latent": 10}


def main() -> int:
    figures = json.loads((Path(sys.argv[1]) / "figures.json").read_text(encoding="utf-8"))
    missed = [f"{name} {figures[name]} is below {least}" for name, least in AT_LEAST.items() if figures[name] < least]
    missed += [f"{name} {figures[name]} is above {most}" for name, most in AT_MOST.items() if figures[name] > most]
    print("\n".join(missed) or f"all as promised: {figures}")
    return 1 if missed else 0


if __name__ == "__main__":
    sys.exit(main())
