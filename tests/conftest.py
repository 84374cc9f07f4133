"""Shared models and folders. Golden files are the published program's answers on small random checkpoints."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import compiler

compiler.share_programs()

import jax
import numpy as np
import pytest
from tiny_checkpoint import make_checkpoint

import davae_jax

jax.config.update("jax_num_cpu_devices", 8)  # for meshes; whatever names no device runs on the first

GOLDEN = Path(__file__).parent / "golden"
LONGEST = [  # first those whose slow tests take longest
    *["test_processes", "test_readme", "test_train", "test_lowering", "test_compare", "test_sharding"],
    *["test_train_step", "test_previous_version", "test_packing", "test_convert", "test_plan", "test_regularizers"],
    *["test_golden_model", "test_parity", "test_model", "test_warm_start", "test_generation", "test_cli"],
    *["test_check", "test_imports", "test_long_runs", "test_numerics", "test_golden_generation", "test_attention_tpu"],
    *["test_choose_attention", "test_benchmarks"],
    *["test_evaluate", "test_metrics", "test_hub", "test_long_texts", "test_prepare", "test_text"],
]


def pytest_configure(config):
    """Compiles quickly, except for tests of the published size: there a program runs longer than it compiles."""
    if re.search("not (slow|full_size)", config.option.markexpr):
        os.environ.setdefault("XLA_FLAGS", compiler.QUICK)


def pytest_collection_modifyitems(items):
    """The longest files first, so that no worker is left with one when the others have finished."""
    items.sort(key=lambda item: LONGEST.index(item.path.stem) if item.path.stem in LONGEST else len(LONGEST))


def pytest_terminal_summary(terminalreporter):
    """Prints what the harness of tests/robustness has tried."""
    for reports in terminalreporter.stats.values():
        for report in reports:
            summary = dict(getattr(report, "user_properties", [])).get("summary")
            if summary and report.when == "call":
                terminalreporter.write_line(summary)


@pytest.fixture(scope="session")
def reference_dir() -> Path:
    """A folder with the real tokenizers (tokenizers/spiece.model, tokenizers/vocab.txt), which are not ours to ship."""
    folder = os.environ.get("DAVAE_REFERENCE_DIR")
    if not folder:
        pytest.skip("DAVAE_REFERENCE_DIR is not set: the real tokenizers are not part of this project")
    return Path(folder)


@pytest.fixture(scope="session")
def load_model():
    """Loads a golden checkpoint once a session."""
    pytest.importorskip("torch")
    models = {}

    def load(name: str) -> davae_jax.DAVAE:
        if name not in models:
            models[name] = davae_jax.from_pretrained(GOLDEN / name)
        return models[name]

    return load


@pytest.fixture(scope="session")
def golden_arrays():
    """io.npz of a golden folder, as a dict."""
    return lambda name: dict(np.load(GOLDEN / name / "io.npz"))


@pytest.fixture(scope="session")
def golden_json():
    return lambda name, file: json.loads((GOLDEN / name / file).read_text(encoding="utf-8"))


@pytest.fixture(scope="session")
def full_checkpoint(tmp_path_factory) -> Path:
    """A random checkpoint of the published size in the published layout, 2.5 GB."""
    if folder := os.environ.get("DAVAE_FULL_CHECKPOINT"):
        return Path(folder)
    folder = tmp_path_factory.mktemp("published")
    make = [sys.executable, GOLDEN.parent / "make_checkpoint.py", "--config", GOLDEN / "full" / "config.json"]
    subprocess.run([*make, "--out", folder], check=True)
    return folder


@pytest.fixture(scope="session")
def tiny_checkpoint(tmp_path_factory) -> Path:
    """A converted checkpoint of a tiny random model, with small tokenizers. Copy it to change it."""
    return make_checkpoint(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="session")
def tiny_vae(tiny_checkpoint) -> davae_jax.TextVAE:
    return davae_jax.TextVAE.from_pretrained(tiny_checkpoint)
