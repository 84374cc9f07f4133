"""A short run of the harness."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from ledger import Ledger
from summary import KINDS

pytestmark = pytest.mark.robustness

# What two idle cores do in two and a half minutes.
SHORT = ["--inputs", "2400", "--programs", "40", "--kills", "12", "--scenes", "8", "--no-processes", "--jobs", "2"]


@pytest.fixture(scope="session")
def short_run(tmp_path_factory):
    """Runs the harness and returns its verdicts, the summary, and what it printed."""
    folder = tmp_path_factory.mktemp("robustness")
    argv = [sys.executable, Path(__file__).with_name("run.py"), "--output", folder, *SHORT]
    done = subprocess.run(list(map(str, argv)), text=True, capture_output=True)
    assert (folder / "summary.md").exists(), done.stderr[-3000:]
    return list(Ledger(folder / "ledger.jsonl").read()), (folder / "summary.md").read_text(encoding="utf-8"), done


@pytest.mark.parametrize("kind", KINDS)
def test_no_fault(kind, short_run, record_property):
    verdicts, summary, done = short_run
    own = [verdict for verdict in verdicts if verdict.case.startswith(f"{kind}/")]
    if kind == "reader":
        record_property("summary", summary)  # printed at the end
    assert own, done.stderr[-3000:]
    if not_run := [verdict for verdict in own if verdict.verdict == "not run"]:
        assert kind == "scene"
        if len(not_run) == len(own):
            pytest.skip(not_run[0].done)
    faults = [f"{v.case}: {v.faults} {v.done} {v.error}"[:600] for v in own if v.faults]
    assert not faults, "\n".join(faults)


def test_the_short_run_is_complete(short_run):
    """No case is left out because of an error of the harness, or for lack of time."""
    verdicts, _, done = short_run
    assert "Traceback" not in done.stderr, done.stderr[-3000:]
    assert sum(verdict.case.startswith("reader/") for verdict in verdicts) >= 2400
    assert sum(verdict.attempts for verdict in verdicts if verdict.case.startswith("kill/")) >= 12
