"""Checks figures.json of a demo run against what README promises: `python tests/check_demo.py runs/demo`."""

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
    measures = json.loads((Path(sys.argv[1]) / "figures.json").read_text(encoding="utf-8"))
    failures = [f"{name} {measures[name]} is below {low}" for name, low in AT_LEAST.items() if measures[name] < low]
    failures += [f"{name} {measures[name]} is above {high}" for name, high in AT_MOST.items() if measures[name] > high]
    print("\n".join(failures) or "passed: " + ", ".join(f"{name} {measures[name]}" for name in [*AT_LEAST, *AT_MOST]))
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
