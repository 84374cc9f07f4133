"""`davae convert ORG/NAME`, with a local server as the hub."""

import re
import subprocess
import sys

import pytest
from conftest import GOLDEN
from hub import serve

from davae_jax.checkpoints.hub import resolve_source
from davae_jax.utils.errors import InputError


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


@pytest.mark.parametrize("name", ["runs/latest", "latest/run", "./none", "../none", "none/."])
def test_what_is_no_name_of_a_repo_is_not_looked_up(name, tmp_path, monkeypatch):
    """A link whose folder was moved would otherwise be the name of somebody's repo."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("huggingface_hub.snapshot_download", lambda *_, **__: pytest.fail("looked up"))
    (tmp_path / "runs").mkdir()
    for link in ("runs/latest", "latest"):
        (tmp_path / link).symlink_to("moved")
    with pytest.raises(InputError, match=f"^{re.escape(name)}: no such folder") as e:
        resolve_source(name)
    assert ("is a link to nothing" in str(e.value)) == ("latest" in name)
