"""What is imported when: importing the package and asking for help must be quick, so neither imports JAX."""

import ast
import json
import subprocess
import sys
from pathlib import Path

import pytest

from davae_jax.cli.main import SUMMARIES
from davae_jax.training.presets import PRESETS

ROOT = Path(__file__).parent.parent
HEAVY = [
    "jax",
    "flax",
    "optax",
    "orbax",
    "transformers",
    "tokenizers",
    "sentencepiece",
    "torch",
    "scipy",
    "sklearn",
    "tensorboard",
    "grain",
    "pyarrow",
]


def imported_by(code: str) -> set[str]:
    """Returns those of the heavy libraries that a new process has imported after running the code."""
    report = f"import json, sys; print('\\n' + json.dumps([name for name in {HEAVY} if name in sys.modules]))"
    done = subprocess.run([sys.executable, "-c", f"{code}\n{report}"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return set(json.loads(done.stdout.splitlines()[-1]))


def test_import():
    assert imported_by("import davae_jax") == set()
    assert imported_by("import davae_jax; davae_jax.DAVAEConfig().to_dict(); davae_jax.InputError") == set()


def test_public_names():
    """Every name can be imported, is listed by dir(), and `from davae_jax import …` works."""
    code = "import davae_jax; assert set(davae_jax.__all__) <= set(dir(davae_jax))"
    code += "; assert all(getattr(davae_jax, name) for name in davae_jax.__all__)"
    code += "; from davae_jax import DAVAE, TextVAE, losses, metrics, sampling"
    assert imported_by(code) >= {"jax", "flax"}
    with pytest.raises(AssertionError, match="module 'davae_jax' has no attribute 'nothing'"):
        imported_by("import davae_jax; davae_jax.nothing")


@pytest.mark.parametrize("preset", PRESETS)
def test_help_of_train(preset):
    assert imported_by(f"import train; assert train.main(['{preset}', '--help']) == 0") == set()


@pytest.mark.parametrize("program", ["train.py", *(f"convert/{path.name}" for path in (ROOT / "convert").glob("*.py"))])
def test_programs_contain_nothing_but_a_call(program):
    """No code of a run is outside of the package."""
    body = ast.parse((ROOT / program).read_text(encoding="utf-8")).body
    imported = [node.module for node in body if isinstance(node, ast.ImportFrom)]
    assert all(module.startswith(("davae_jax.cli.", "davae_jax.utils.")) for module in imported)
    assert not any(isinstance(node, ast.Import | ast.FunctionDef | ast.ClassDef) for node in body)


def test_help_of_davae():
    code = "from davae_jax.cli.main import main; assert main(['--help']) == main(['--version']) == 0"
    assert imported_by(code) == set()


@pytest.mark.parametrize("name", SUMMARIES)
def test_help_of_a_command(name):
    assert imported_by(f"from davae_jax.cli.main import main; assert main(['{name}', '--help']) == 0") == set()


@pytest.mark.parametrize("module", ["from_torch", "to_torch", "parity", "warm_start"])
def test_help_of_convert(module):
    code = f"import runpy, sys; sys.argv = ['convert.{module}', '--help']\n"
    code += f"try: runpy.run_module('convert.{module}', run_name='__main__')\nexcept SystemExit as e: assert not e.code"
    assert imported_by(code) == set()


def test_the_plugin_interface():
    """A plugin may be imported without JAX; its options are dataclass fields."""
    code = "from davae_jax.regularizers import MMD, Regularizer, RegularizersConfig, register"
    assert imported_by(f"{code}; RegularizersConfig(mmd=MMD(weight=1.0))") == set()


def test_generating_ids_needs_neither_tokenizers_nor_torch(tiny_checkpoint):
    code = "import numpy as np, davae_jax; "
    code += f"model = davae_jax.from_pretrained({str(tiny_checkpoint)!r}); "
    code += "davae_jax.generate(model, np.zeros((1, model.config.latent_size), np.float32), max_length=3)"
    used = imported_by(code)
    assert {"jax", "flax", "orbax"} <= used
    unused = {"transformers", "tokenizers", "sentencepiece", "torch", "sklearn", "tensorboard", "grain", "pyarrow"}
    assert not used & unused


def test_generating_texts_needs_neither_transformers_nor_torch(tiny_checkpoint):
    command = ["reconstruct", "--model", str(tiny_checkpoint), "--max-length", "3", "天"]
    used = imported_by(f"from davae_jax.cli.main import main; assert main({command}) == 0")
    assert {"tokenizers", "sentencepiece"} <= used
    assert not used & {"transformers", "torch", "sklearn", "tensorboard", "grain", "pyarrow"}


def test_reading_a_published_file_needs_neither_jax_nor_torch():
    code = "from pathlib import Path; from davae_jax.checkpoints.published.torch_file import read_tensors; "
    code += f"assert read_tensors(Path({str(ROOT / 'tests/golden/small/pytorch_model.bin')!r}))"
    assert imported_by(code) == set()
