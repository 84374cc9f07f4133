"""`davae convert ORG/NAME`, with a local server as the hub."""

import subprocess
import sys

import pytest
from conftest import GOLDEN
from hub import serve


@pytest.fixture(scope="module")
def convert(tmp_path_factory):
    """Returns a function that runs `davae convert` with the local server as the hub."""
    pytest.importorskip("torch")
    server, env = serve({"acme/davae": GOLDEN / "small"}, tmp_path_factory.mktemp("hub"))

    def run(*args):
        command = [sys.executable, "-m", "davae_jax.cli", "convert", *map(str, args)]
        return subprocess.run(command, env=env, capture_output=True, text=True, timeout=120)

    yield run
    server.shutdown()


def test_convert_a_repo(convert, tmp_path):
    run = convert("acme/davae", tmp_path / "converted")
    assert run.returncode == 0, run.stderr
    assert (tmp_path / "converted" / "params").is_dir()
    assert (tmp_path / "converted" / "config.json").read_bytes() == (GOLDEN / "small" / "config.json").read_bytes()


def test_a_repo_that_is_not_there(convert, tmp_path):
    run = convert("acme/no-such-model", tmp_path / "converted")
    assert run.returncode == 1
    last = run.stderr.strip().splitlines()
    assert len(last) == 1 and last[0].startswith("davae convert: error: acme/no-such-model: "), run.stderr
    assert not list(tmp_path.iterdir())
