"""Small server with the endpoints of the Hugging Face Hub that downloads and uploads use, on the loopback interface."""

import base64
import hashlib
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import unquote, urlsplit

TOKEN = "hf_test"


@dataclass
class Hub:
    """State of the server.

    Attributes:
        commits: Files of each commit, by repository and hash of the commit.
        branches: Hash of the commit of each branch, by repository.
        private: Repositories that need the token.
        gated: Repositories whose files need permission.
        requests: Method and path of each request.
    """

    address: str = ""
    commits: dict[str, dict[str, dict[str, bytes]]] = field(default_factory=dict)
    branches: dict[str, dict[str, str]] = field(default_factory=dict)
    private: set[str] = field(default_factory=set)
    gated: set[str] = field(default_factory=set)
    requests: list[str] = field(default_factory=list)

    def commit(self, name: str, files: dict[str, bytes]) -> str:
        """Add a commit with changed files to the main branch and return its hash."""
        before = self.commits.setdefault(name, {}).get(self.branches.setdefault(name, {}).get("main", ""), {})
        content = {**before, **files}
        digest = hashlib.sha1(repr((len(self.commits[name]), sorted(content))).encode()).hexdigest()
        self.commits[name][digest] = content
        self.branches[name]["main"] = digest
        return digest


@contextmanager
def serving() -> Iterator[Hub]:
    """Run the server and yield its state."""
    hub = Hub()

    class Handler(_Handler):
        state = hub

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    hub.address = f"http://127.0.0.1:{server.server_address[1]}"
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    state: Hub

    def log_message(self, *args: Any) -> None:
        pass

    def answer(self, content: Any, status: int = 200, **headers: str) -> None:
        body = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(status)
        for name, value in {"Content-Length": str(len(body)), **headers}.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def failed(self, status: int, code: str) -> None:
        self.answer({"error": code}, status, X_Error_Code=code, X_Error_Message=code)

    def allowed(self, name: str) -> bool:
        known = self.headers.get("Authorization") == f"Bearer {TOKEN}"
        if name not in self.state.commits or (name in self.state.private and not known):
            self.failed(404 if known else 401, "RepoNotFound")  # as the Hub: 401 without a login
            return False
        return True

    def do_GET(self) -> None:
        parts = unquote(urlsplit(self.path).path).strip("/").split("/")
        self.state.requests.append(f"{self.command} {self.path}")
        of_api = parts[:2] == ["api", "models"]  # /api/models/org/name/revision/main, or /org/name/resolve/main/file
        name, rest = "/".join(parts[2:4] if of_api else parts[:2]), parts[4 if of_api else 2 :]
        if name == "org/busy":
            self.failed(503, "Overloaded")
            return
        if not self.allowed(name):
            return
        revision = rest[1] if len(rest) > 1 else "main"
        digest = self.state.branches[name].get(revision, revision)
        files = self.state.commits[name].get(digest)
        if files is None:
            self.failed(404, "RevisionNotFound")
        elif of_api and rest[:1] == ["tree"]:
            self.answer([{"type": "file", "path": f, "size": len(c), "oid": _oid(c)} for f, c in files.items()])
        elif of_api:
            siblings = [{"rfilename": file, "size": len(content)} for file, content in files.items()]
            self.answer(
                {"id": name, "sha": digest, "siblings": siblings, "private": name in self.state.private, "tags": []}
            )
        elif name in self.state.gated:
            self.failed(403, "GatedRepo")
        elif (file := "/".join(rest[2:])) in files:
            self.answer(files[file], ETag=f'"{_oid(files[file])}"', X_Repo_Commit=digest)
        else:
            self.failed(404, "EntryNotFound")

    do_HEAD = do_GET  # noqa: N815

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        parts = urlsplit(self.path).path.strip("/").split("/")
        self.state.requests.append(f"POST {self.path}")
        if self.headers.get("Authorization") != f"Bearer {TOKEN}":
            self.failed(401, "Unauthorized")
        elif parts == ["api", "repos", "create"]:
            given = json.loads(body)
            name = f"{given['organization']}/{given['name']}" if given.get("organization") else given["name"]
            if name in self.state.commits:
                self.answer({"error": "exists", "url": f"{self.state.address}/{name}"}, 409)
                return
            self.state.commit(name, {})
            if given.get("private") or given.get("visibility") == "private":
                self.state.private.add(name)
            self.answer({"url": f"{self.state.address}/{name}"})
        elif parts[-1] == "validate-yaml":
            self.answer({"errors": [], "warnings": []})
        elif "preupload" in parts:
            files = json.loads(body)["files"]
            self.answer({"files": [{"path": f["path"], "uploadMode": "regular", "shouldIgnore": False} for f in files]})
        elif "commit" in parts:
            name = "/".join(parts[2:4])
            lines = [json.loads(line) for line in body.splitlines()]
            files = [line["value"] for line in lines if line["key"] == "file"]
            digest = self.state.commit(name, {f["path"]: base64.b64decode(f["content"]) for f in files})
            self.answer({"commitUrl": f"{self.state.address}/{name}/commit/{digest}", "commitOid": digest})
        else:
            self.failed(404, "NotFound")


def _oid(content: bytes) -> str:
    return hashlib.sha1(content).hexdigest()
