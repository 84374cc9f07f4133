"""The tables of README.md name tests that exist, and leave no golden array out."""

import ast
import fnmatch
import json
import re
from pathlib import Path

import numpy as np
import pytest
from conftest import GOLDEN

HERE = Path(__file__).parent
TEXT = (HERE / "README.md").read_text(encoding="utf-8")
NAMED = sorted(set(re.findall(r"\b(test_\w+\.py)::(test_\w+)", TEXT)))


@pytest.mark.parametrize("file", sorted({file for file, _ in NAMED}))
def test_every_named_test_exists(file):
    functions = ast.parse((HERE / file).read_text(encoding="utf-8")).body
    defined = {function.name for function in functions if isinstance(function, ast.FunctionDef)}
    assert {name for named, name in NAMED if named == file} <= defined


def test_every_golden_array_is_listed():
    patterns = re.findall(r"`([^`]+)`", TEXT.partition("## The golden files")[2].partition("## model")[0])
    arrays = set()
    for path in GOLDEN.rglob("*"):
        if path.suffix == ".npz":
            with np.load(path) as file:
                arrays |= set(file.files)
        elif path.name in ("generation.json", "text.json"):
            arrays |= json.loads(path.read_text(encoding="utf-8")).keys()
    inputs = {"latent", "prompts", "prompts_plain", "prompts_unequal", "texts", "decode_ids", "filter_in"}
    inputs |= {"simulate_texts", "simulate_prompts", "simulate_eps"}
    unlisted = {name for name in arrays - inputs if not any(fnmatch.fnmatch(name, pattern) for pattern in patterns)}
    assert not unlisted
