"""A Hub on loopback, for tests: it speaks as much of the Hub's HTTP API as huggingface_hub asks of it.

Paths, headers and error codes are those of https://huggingface.co/docs/hub/api and of huggingface_hub 1.x and 2.x.
Point a process at it with ``HF_ENDPOINT``, which ``qlora_infer`` reads at each call. It has no Xet storage.
"""

from __future__ import annotations

import hashlib
import json
import threading
from collections.abc import Mapping
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import unquote, urlsplit

from attrs import define, field


@define
class Repository:
    """Commits by hash, each with its files; branches and tags that point to commits.

    With a ``token`` it is private; ``gated`` as well, everybody sees that it is there and the token opens its files.
    """

    commits: dict[str, dict[str, bytes]] = field(factory=dict)
    branches: dict[str, str] = field(factory=dict)
    token: str | None = None
    gated: bool = False

    def commit(self, files: Mapping[str, bytes], branch: str = "main") -> str:
        """Put files on a branch; returns the commit's hash."""
        content = json.dumps(sorted((name, hashlib.sha1(data).hexdigest()) for name, data in files.items()))
        commit = hashlib.sha1(f"{content}{len(self.commits)}".encode()).hexdigest()
        self.commits[commit] = dict(files)
        self.branches[branch] = commit
        return commit

    def files_at(self, revision: str) -> tuple[str, dict[str, bytes] | None]:
        commit = self.branches.get(revision, revision)
        return commit, self.commits.get(commit)


class HubServer:
    """Serves ``repositories`` on 127.0.0.1 until its block ends.

    Attributes:
        requests: Every request, as ``(method, path)``.
        tokens: Every token that was sent.
        invalid_tokens: Tokens that have expired: 401 for everything.
        break_at: Connections break at this byte of a file; a download that resumes there gets nothing more.
        breaks: How many more times; after that files come whole.
        truncating: Files are half as long as their HEAD says, in a well-formed answer.
        failing: Answer everything with this status.
        failing_downloads: Answer requests for files with this status, and others as usual.
        silent: Accept requests and answer none until the block ends.
    """

    def __init__(self) -> None:
        self.repositories: dict[str, Repository] = {}
        self.requests: list[tuple[str, str]] = []
        self.tokens: list[str] = []
        self.invalid_tokens: set[str] = set()
        self.break_at: int | None = None
        self.breaks = 1_000_000
        self.truncating = False
        self.failing: int | None = None
        self.failing_downloads: int | None = None
        self.silent = False
        self.closing = threading.Event()
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), type("Answer", (_Answer,), {"hub": self}))
        self._server.daemon_threads = True
        self._server.block_on_close = False

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self._server.server_address[1]}"

    def downloads(self) -> list[str]:
        """The files whose content was fetched, by their paths in their repositories."""
        asked = [path for method, path in self.requests if method == "GET" and "/resolve/" in path]
        return [path.split("/resolve/")[1].partition("/")[2] for path in asked]

    def __enter__(self) -> HubServer:
        threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self.closing.set()
        self._server.shutdown()
        self._server.server_close()


class _Answer(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    hub: HubServer

    def do_GET(self) -> None:
        path = unquote(urlsplit(self.path).path)
        self.hub.requests.append((self.command, path))
        if token := self.token():
            self.hub.tokens.append(token)
        if self.hub.silent:
            self.hub.closing.wait(60)
        elif self.hub.failing:
            self.fail(self.hub.failing)
        elif token in self.hub.invalid_tokens:
            self.fail(401, message="Invalid credentials in Authorization header")
        else:
            self.answer(path)

    def do_HEAD(self) -> None:
        self.do_GET()

    def log_message(self, *_: Any) -> None:
        pass

    def token(self) -> str:
        return self.headers.get("Authorization", "").removeprefix("Bearer ")

    def answer(self, path: str) -> None:
        is_api = path.startswith("/api/models/")
        parts = path.removeprefix("/api/models").strip("/").split("/")
        name, rest = "/".join(parts[:2]), parts[2:]
        repository = self.hub.repositories.get(name)
        if repository is None:
            # As the Hub does: who has no token is not told whether a repository is private or missing.
            self.fail(404 if self.token() else 401, "RepoNotFound")
        elif repository.gated and self.token() != repository.token:
            # A gated repository is listed for everybody.
            self.answer_api(repository, name, rest) if is_api else self.fail(403 if self.token() else 401, "GatedRepo")
        elif repository.token and self.token() != repository.token:
            self.fail(403) if self.token() else self.fail(401, "RepoNotFound")
        elif is_api:
            self.answer_api(repository, name, rest)
        elif self.hub.failing_downloads:
            self.fail(self.hub.failing_downloads)
        else:
            self.answer_file(repository, rest)

    def answer_api(self, repository: Repository, name: str, rest: list[str]) -> None:
        # A revision may have slashes in it, which come quoted.
        commit, files = repository.files_at("/".join(rest[1:]) or "main")
        if files is None:
            self.fail(404, "RevisionNotFound")
            return
        listing = {"id": name, "sha": commit, "private": bool(repository.token), "gated": repository.gated}
        listing |= {"downloads": 0, "likes": 0, "tags": [], "siblings": [{"rfilename": path} for path in files]}
        self.send(200, json.dumps(listing).encode(), {"Content-Type": "application/json"})

    def answer_file(self, repository: Repository, rest: list[str]) -> None:
        revision = next(
            (name for name in repository.branches if rest[1:][: name.count("/") + 1] == name.split("/")), ""
        )
        revision = revision or rest[1]
        path = "/".join(rest[2 + revision.count("/") :])
        commit, files = repository.files_at(revision)
        if files is None:
            self.fail(404, "RevisionNotFound")
        elif path not in files:
            self.fail(404, "EntryNotFound", commit=commit)
        else:
            self.send_file(files[path], path, commit)

    def send_file(self, content: bytes, path: str, commit: str) -> None:
        headers = {"ETag": f'"{etag(path, content)}"', "X-Repo-Commit": commit, "Accept-Ranges": "bytes"}
        start = int(self.headers.get("Range", "bytes=0-").removeprefix("bytes=").split("-")[0])
        if start:
            headers["Content-Range"] = f"bytes {start}-{len(content) - 1}/{len(content)}"
        body = content[start:]
        if self.command == "GET" and self.hub.truncating:
            body = body[: len(body) // 2]
        break_at = self.hub.break_at
        breaks = self.command == "GET" and break_at is not None and len(content) > break_at and self.hub.breaks > 0
        if breaks and break_at is not None:
            self.hub.breaks -= 1
            self.send(206 if start else 200, body, headers, sent=body[: max(break_at - start, 0)])
            self.close_connection = True
            return
        self.send(206 if start else 200, body, headers)

    def fail(self, status: int, code: str = "", message: str = "", commit: str = "") -> None:
        named = {"X-Error-Code": code, "X-Error-Message": message or code, "X-Repo-Commit": commit}
        self.send(status, b"", {name: value for name, value in named.items() if value})

    def send(self, status: int, body: bytes, headers: Mapping[str, str], sent: bytes | None = None) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body if sent is None else sent)


def etag(path: str, content: bytes) -> str:
    """SHA-256 of what the Hub keeps in LFS, and Git's own hash of other files."""
    if path.endswith((".safetensors", ".bin")):
        return hashlib.sha256(content).hexdigest()
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()
