"""A Hugging Face hub on this machine: folders served over HTTP the way the real one serves repositories.

It speaks as much of the hub's protocol as huggingface_hub needs to look up, list, download (whole or by range) and
upload, keeps every request it got, and can be told to refuse or to cut a connection.
"""

import base64
import hashlib
import json
import re
import socket
import threading
from collections.abc import Mapping
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

import pytest


@dataclass
class Seen:
    """One request."""

    method: str
    path: str
    range: str | None
    token: str | None


@dataclass
class Repo:
    """Commits (file name -> content) and the branches and tags that point to them."""

    token: str | None = None
    gated: bool = False
    commits: dict[str, dict[str, bytes]] = field(default_factory=dict)
    refs: dict[str, str] = field(default_factory=dict)

    def commit(self, files: Mapping[str, bytes], revision: str) -> str:
        digest = hashlib.sha1()
        for name, content in sorted(files.items()):
            digest.update(name.encode() + b"\0" + hashlib.sha1(content).digest())
        self.commits[digest.hexdigest()] = dict(files)
        self.refs[revision] = digest.hexdigest()
        return digest.hexdigest()

    def find(self, revision: str) -> str | None:
        sha = self.refs.get(revision, revision)
        return sha if sha in self.commits else None


class HubServer:
    """The server; a context manager that listens on a free port of this machine."""

    def __init__(self) -> None:
        self.repos: dict[str, Repo] = {}
        self.requests: list[Seen] = []
        self.refusals: list[tuple[re.Pattern[str], int, dict[str, str]]] = []
        self.cut_after: list[int] = []
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), _Handler)
        self._server.daemon_threads = True
        self._server.hub = self  # type: ignore[attr-defined]
        self._thread = threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)

    @property
    def endpoint(self) -> str:
        return f"http://127.0.0.1:{self._server.server_port}"

    def __enter__(self) -> "HubServer":
        self._thread.start()
        return self

    def __exit__(self, *exc: object) -> None:
        self.stop()

    def stop(self) -> None:
        """From here on connections are refused, as without a network."""
        if self._thread.is_alive():
            self._server.shutdown()
            self._server.server_close()
            self._thread.join()

    def add_repo(
        self, name: str, folder: Path | Mapping[str, bytes], *, revision: str = "main", token: str | None = None,
        gated: bool = False,
    ) -> str:  # fmt: skip
        """Serve `folder`'s files as one more commit of `name`, which `revision` then points to; returns its hash.

        With `token` the repository is private to those who send it; with `gated` it is closed until its terms are
        accepted, which nobody has done.
        """
        if not isinstance(folder, Mapping):
            folder = {p.relative_to(folder).as_posix(): p.read_bytes() for p in folder.rglob("*") if p.is_file()}
        repo = self.repos.setdefault(name, Repo())
        repo.token, repo.gated = token, gated
        return repo.commit(folder, revision)

    def refuse(self, status: int, *, path: str = ".*", headers: Mapping[str, str] | None = None) -> None:
        """Answer `status` to every request whose path matches the regular expression `path`."""
        self.refusals.append((re.compile(path), status, dict(headers or {})))

    def cut(self, *after: int) -> None:
        """Cut the next downloads' connections, each after that many bytes of the file."""
        self.cut_after.extend(after)

    def use(self, monkeypatch: pytest.MonkeyPatch, home: Path) -> None:
        """Point huggingface_hub of this process, and of processes it starts, to this server and a cache in `home`."""
        import huggingface_hub
        from huggingface_hub import constants, hf_api

        for name, value in {"HF_ENDPOINT": self.endpoint, "HF_HOME": str(home)}.items():
            monkeypatch.setenv(name, value)
        # huggingface_hub reads the environment once, when it is imported.
        monkeypatch.setattr(constants, "ENDPOINT", self.endpoint)
        template = self.endpoint + "/{repo_id}/resolve/{revision}/{filename}"
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        monkeypatch.setattr(constants, "HF_HOME", str(home))
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(home / "hub"))
        monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(home / "token"))
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(hf_api.api, "endpoint", self.endpoint)
        huggingface_hub.close_session()

    def paths(self, method: str = "GET") -> list[str]:
        """Paths of the requests so far."""
        return [seen.path for seen in self.requests if seen.method == method]


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    @property
    def hub(self) -> HubServer:
        return self.server.hub  # type: ignore[attr-defined]

    def log_message(self, format: str, *args: object) -> None:
        """Quiet: the requests are kept instead."""

    def do_GET(self) -> None:
        self._answer()

    def do_HEAD(self) -> None:
        self._answer()

    def do_POST(self) -> None:
        self._answer()

    def _answer(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        quoted = urlsplit(self.path).path
        path = unquote(quoted)
        token = (self.headers.get("Authorization") or "").removeprefix("Bearer ") or None
        self.hub.requests.append(Seen(self.command, path, self.headers.get("Range"), token))
        for pattern, status, headers in self.hub.refusals:
            if pattern.fullmatch(path):
                return self._send(status, b'{"error": "refused"}', headers)
        if path == "/api/whoami-v2":
            return self._json({"type": "user", "name": "tester", "orgs": []})
        if path == "/api/validate-yaml":
            return self._json({"errors": [], "warnings": []})
        if path == "/api/repos/create":
            return self._create(json.loads(body))
        # A branch's own slashes come quoted, so that the path is taken apart first.
        if found := re.fullmatch(r"/api/models/(.+?)(?:/(revision|tree|preupload|commit)/([^/]+))?", quoted):
            return self._api(found[1], found[2] or "revision", unquote(found[3] or "main"), token, body)
        if found := re.fullmatch(r"/(.+?)/resolve/([^/]+)/(.+)", quoted):
            return self._file(found[1], unquote(found[2]), unquote(found[3]), token)
        return self._error(404, "EntryNotFound")

    def _commit(self, name: str, revision: str, token: str | None) -> tuple[Repo, str] | None:
        """The repository and commit asked for; else the hub's own refusal is sent."""
        repo = self.hub.repos.get(name)
        if repo is None or (repo.token is not None and token != repo.token):
            # Who does not say who he is learns neither what is private nor what does not exist.
            self._error(404 if token else 401, "RepoNotFound")
        elif repo.gated:
            self._error(403 if token else 401, "GatedRepo")
        elif (sha := repo.find(revision)) is None:
            self._error(404, "RevisionNotFound")
        else:
            return repo, sha
        return None

    def _create(self, wanted: dict[str, Any]) -> None:
        name = f"{wanted.get('organization') or 'tester'}/{wanted['name']}"
        if name not in self.hub.repos:
            self.hub.add_repo(name, {})
        self._json({"url": f"{self.hub.endpoint}/{name}", "id": name})

    def _api(self, name: str, what: str, revision: str, token: str | None, body: bytes) -> None:
        commit = self._commit(name, revision, token)
        if commit is None:
            return
        repo, sha = commit
        files = repo.commits[sha]
        if what == "tree":
            entries = [
                {"type": "file", "path": path, "size": len(content), "oid": hashlib.sha1(content).hexdigest()}
                for path, content in sorted(files.items())
            ]
            self._json(entries)
        elif what == "preupload":
            paths = [file["path"] for file in json.loads(body)["files"]]
            self._json({"files": [{"path": p, "uploadMode": "regular", "shouldIgnore": False} for p in paths]})
        elif what == "commit":
            changed = [json.loads(line) for line in body.splitlines()]
            added = {c["value"]["path"]: base64.b64decode(c["value"]["content"]) for c in changed if c["key"] == "file"}
            sha = repo.commit({**files, **added}, revision)
            self._json({"success": True, "commitOid": sha, "commitUrl": f"{self.hub.endpoint}/{name}/commit/{sha}"})
        else:
            siblings = [{"rfilename": path} for path in sorted(files)]
            self._json({"id": name, "modelId": name, "sha": sha, "private": False, "tags": [], "siblings": siblings})

    def _file(self, name: str, revision: str, path: str, token: str | None) -> None:
        commit = self._commit(name, revision, token)
        if commit is None:
            return
        repo, sha = commit
        content = repo.commits[sha].get(path)
        if content is None:
            return self._error(404, "EntryNotFound", {"X-Repo-Commit": sha})
        headers = {"ETag": f'"{hashlib.sha1(content).hexdigest()}"', "X-Repo-Commit": sha, "Accept-Ranges": "bytes"}
        start = re.fullmatch(r"bytes=(\d+)-", self.headers.get("Range") or "")
        if start is None:
            return self._send(200, content, headers)
        headers["Content-Range"] = f"bytes {start[1]}-{len(content) - 1}/{len(content)}"
        return self._send(206, content[int(start[1]) :], headers)

    def _json(self, value: object) -> None:
        self._send(200, json.dumps(value).encode(), {"Content-Type": "application/json"})

    def _error(self, status: int, code: str, headers: Mapping[str, str] | None = None) -> None:
        self._send(status, b"{}", {"X-Error-Code": code, "X-Error-Message": code, **(headers or {})})

    def _send(self, status: int, content: bytes, headers: Mapping[str, str]) -> None:
        self.send_response(status)
        for name, value in {**headers, "Content-Length": str(len(content)), "Connection": "close"}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command == "HEAD":
            return
        if "ETag" in headers and self.hub.cut_after:
            self.wfile.write(content[: self.hub.cut_after.pop(0)])
            self.wfile.flush()
            self.connection.shutdown(socket.SHUT_RDWR)
            self.close_connection = True
            return
        self.wfile.write(content)
