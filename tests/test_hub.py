"""The README's first command, `davae convert ORG/NAME`, against a stand-in for the hub on this machine."""

import hashlib
import http.server
import json
import os
import subprocess
import sys
import threading
from pathlib import Path

import pytest
from conftest import GOLDEN

COMMIT = "0123456789abcdef0123456789abcdef01234567"


class Hub(http.server.BaseHTTPRequestHandler):
    """One repo, acme/davae: what the hub's client asks of it when it downloads a snapshot."""

    folder = GOLDEN / "small"

    def do_GET(self):
        path = self.path.split("?")[0].rstrip("/")
        if path in ("/api/models/acme/davae", "/api/models/acme/davae/revision/main"):
            siblings = [{"rfilename": file.name} for file in self.folder.iterdir()]
            self._reply(json.dumps({"id": "acme/davae", "sha": COMMIT, "siblings": siblings}).encode())
        elif path == f"/api/models/acme/davae/tree/{COMMIT}":
            files = [
                {"type": "file", "path": f.name, "size": f.stat().st_size, "oid": self._etag(f.read_bytes())}
                for f in self.folder.iterdir()
            ]
            self._reply(json.dumps(files).encode())
        elif path.startswith(f"/acme/davae/resolve/{COMMIT}/"):
            self._reply((self.folder / Path(path).name).read_bytes())
        else:
            self.send_response(404)
            self.send_header("X-Error-Code", "RepoNotFound")
            self.send_header("Content-Length", "0")
            self.end_headers()

    do_HEAD = do_GET

    def _etag(self, body: bytes) -> str:
        return hashlib.sha1(body).hexdigest()

    def _reply(self, body: bytes):
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.send_header("ETag", f'"{self._etag(body)}"')
        self.send_header("X-Repo-Commit", COMMIT)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body)

    def log_message(self, *args):
        pass


@pytest.fixture(scope="module")
def convert(tmp_path_factory):
    """Runs `davae convert` with the stand-in as the hub."""
    pytest.importorskip("torch")
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    home = tmp_path_factory.mktemp("hub")
    env = os.environ | {
        "HF_ENDPOINT": f"http://127.0.0.1:{server.server_port}",
        "HF_HOME": str(home),
        "HF_HUB_DISABLE_XET": "1",
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "NO_PROXY": "127.0.0.1",
    }
    env.pop("HF_HUB_OFFLINE", None)

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
