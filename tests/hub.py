"""A local server that answers the requests of the Hugging Face client when it downloads a snapshot."""

import hashlib
import http.server
import json
import os
import threading
from pathlib import Path

COMMIT = "0123456789abcdef0123456789abcdef01234567"


def serve(repos: dict[str, Path], home: Path) -> tuple[http.server.ThreadingHTTPServer, dict[str, str]]:
    """Starts a server of repos (id → folder); returns it and the environment of a process that uses it as the hub."""

    class Handler(Hub):
        pass

    Handler.repos = repos
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    env = os.environ | {
        "HF_ENDPOINT": f"http://127.0.0.1:{server.server_port}",
        "HF_HOME": str(home),
        "HF_HUB_DISABLE_XET": "1",
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "NO_PROXY": "127.0.0.1",
    }
    env.pop("HF_HUB_OFFLINE", None)
    return server, env


class Hub(http.server.BaseHTTPRequestHandler):
    repos: dict[str, Path]

    def do_GET(self):
        path = self.path.split("?")[0].strip("/")
        for repo, folder in self.repos.items():
            if path in (f"api/models/{repo}", f"api/models/{repo}/revision/main"):
                siblings = [{"rfilename": file.name} for file in folder.iterdir()]
                return self._reply(json.dumps({"id": repo, "sha": COMMIT, "siblings": siblings}).encode())
            if path == f"api/models/{repo}/tree/{COMMIT}":
                files = [
                    {"type": "file", "path": f.name, "size": f.stat().st_size, "oid": _etag(f.read_bytes())}
                    for f in folder.iterdir()
                ]
                return self._reply(json.dumps(files).encode())
            if path.startswith(f"{repo}/resolve/{COMMIT}/"):
                return self._reply((folder / Path(path).name).read_bytes())
        self.send_response(404)
        self.send_header("X-Error-Code", "RepoNotFound")
        self.send_header("Content-Length", "0")
        self.end_headers()

    do_HEAD = do_GET

    def _reply(self, body: bytes):
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.send_header("ETag", f'"{_etag(body)}"')
        self.send_header("X-Repo-Commit", COMMIT)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body)

    def log_message(self, *args):
        pass


def _etag(body: bytes) -> str:
    return hashlib.sha1(body).hexdigest()
