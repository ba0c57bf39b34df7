"""A stand-in for a Hugging Face hub on this machine: as much of its HTTP interface as downloading a model takes."""

from __future__ import annotations

import hashlib
import json
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlsplit

TOKEN = "hf_secret"


class Hub:
    """Repositories served from folders.

    Attributes:
        repos: ``user/model`` to the folder with its files; ``gated/`` ones are readable with :data:`TOKEN` only.
        requests: method and path of what was asked for.
        restless: repositories that get a new commit with each request for their list of files.
        endpoint: its address, for HF_ENDPOINT.
    """

    def __init__(self, endpoint: str) -> None:
        self.repos: dict[str, Path] = {}
        self.requests: list[str] = []
        self.restless: set[str] = set()
        self.endpoint = endpoint

    def answer(self, path: str, token: str | None) -> tuple[int, dict[str, str], bytes]:
        """Status, headers and body for a GET."""
        api = re.fullmatch(r"/api/models/([^/]+/[^/]+)(?:/revision/[^/]+|(/tree/[^/]+)|(/refs))?", path)
        file = re.fullmatch(r"/([^/]+/[^/]+)/resolve/[^/]+/(.+)", path)
        folder = self.repos.get((api or file)[1]) if api or file else None
        if folder is None:
            return 404, {"X-Error-Code": "RepoNotFound"}, b""
        if folder.name.startswith("gated") and token != f"Bearer {TOKEN}":
            return 403, {"X-Error-Code": "GatedRepo"}, b""
        version = len(self.requests) if (api or file)[1] in self.restless and not file else 0
        commit = hashlib.sha1(f"{folder} {version}".encode()).hexdigest()
        if file:
            if not (folder / file[2]).is_file():
                return 404, {"X-Error-Code": "EntryNotFound"}, b""
            body = (folder / file[2]).read_bytes()
            return 200, {"ETag": f'"{_etag(body)}"', "X-Repo-Commit": commit}, body
        if api[3]:
            return 200, {}, json.dumps({"branches": [{"name": "main", "targetCommit": commit}]}).encode()
        files = [
            {"path": name, "rfilename": name, "type": "file", "size": p.stat().st_size, "oid": _etag(p.read_bytes())}
            for name, p in sorted((p.relative_to(folder).as_posix(), p) for p in folder.rglob("*") if p.is_file())
        ]
        return 200, {}, json.dumps(files if api[2] else {"id": api[1], "sha": commit, "siblings": files}).encode()


def _etag(body: bytes) -> str:
    return hashlib.sha1(body).hexdigest()


@contextmanager
def hub_server() -> Iterator[Hub]:
    """Runs a hub without repositories in a thread."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            path = unquote(urlsplit(self.path).path)
            hub.requests.append(f"{self.command} {path}")
            status, headers, body = hub.answer(path, self.headers.get("Authorization"))
            self.send_response(status)
            for name, value in (headers | {"Content-Length": str(len(body))}).items():
                self.send_header(name, value)
            self.end_headers()
            if self.command == "GET":
                self.wfile.write(body)

        do_HEAD = do_GET

        def log_message(self, *args: object) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        hub = Hub(f"http://127.0.0.1:{server.server_address[1]}")
        thread = threading.Thread(target=server.serve_forever, daemon=True)
        thread.start()
        try:
            yield hub
        finally:
            server.shutdown()
            thread.join()
