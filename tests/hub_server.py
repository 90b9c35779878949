"""A Hub on loopback, for tests: it speaks as much of the Hub's HTTP API as huggingface_hub asks of it.

Paths and headers are those of https://huggingface.co/docs/hub/api and of huggingface_hub 1.x and 2.x.
"""

from __future__ import annotations

import hashlib
import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import unquote, urlsplit

from attrs import define, field


@define
class Repository:
    """Commits by hash, each with its files; branches that point to commits."""

    commits: dict[str, dict[str, bytes]] = field(factory=dict)
    branches: dict[str, str] = field(factory=dict)
    token: str | None = None
    gated: bool = False

    def commit(self, files: dict[str, bytes], branch: str = "main") -> str:
        """Put files on a branch; returns the commit's hash."""
        content = json.dumps(sorted((name, hashlib.sha1(data).hexdigest()) for name, data in files.items()))
        commit = hashlib.sha1(f"{content}{len(self.commits)}".encode()).hexdigest()
        self.commits[commit] = files
        self.branches[branch] = commit
        return commit


class HubServer:
    """Serves ``repositories`` on 127.0.0.1 until its block ends; ``requests`` lists what was asked.

    ``broken_downloads`` counts down: while it is positive, each file is cut off in the middle. ``failing`` answers
    everything with that status.
    """

    def __init__(self) -> None:
        self.repositories: dict[str, Repository] = {}
        self.requests: list[tuple[str, str]] = []
        self.broken_downloads = 0
        self.failing: int | None = None
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), self._answering())
        self._server.daemon_threads = True

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self._server.server_address[1]}"

    def downloads(self) -> list[str]:
        """The files whose content was fetched."""
        return [path for method, path in self.requests if method == "GET" and "/resolve/" in path]

    def __enter__(self) -> HubServer:
        threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self._server.shutdown()
        self._server.server_close()

    def _answering(hub) -> type[BaseHTTPRequestHandler]:  # noqa: N805
        class Answer(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_GET(self) -> None:
                self.answer()

            def do_HEAD(self) -> None:
                self.answer()

            def log_message(self, *_: Any) -> None:
                pass

            def answer(self) -> None:
                path = unquote(urlsplit(self.path).path)
                hub.requests.append((self.command, path))
                if hub.failing:
                    self.fail(hub.failing, None)
                    return
                api = path.startswith("/api/models/")
                parts = path.removeprefix("/api/models").strip("/").split("/")
                repository = hub.repositories.get("/".join(parts[:2]))
                if repository is None:
                    # As the Hub does: who has no token is not told whether a repository is private or missing.
                    self.fail(404 if "Authorization" in self.headers else 401, "RepoNotFound")
                elif not self.may_read(repository):
                    pass
                elif api:
                    self.answer_api(repository, "/".join(parts[:2]), parts[2:])
                else:
                    self.answer_file(repository, parts[2:])

            def may_read(self, repository: Repository) -> bool:
                given = self.headers.get("Authorization", "").removeprefix("Bearer ")
                if repository.gated and given != repository.token:
                    self.fail(403 if given else 401, "GatedRepo")
                    return False
                if repository.token and given != repository.token:
                    self.fail(403 if given else 401, None if given else "RepoNotFound")
                    return False
                return True

            def answer_api(self, repository: Repository, name: str, rest: list[str]) -> None:
                revision = rest[1] if len(rest) > 1 and rest[0] in ("revision", "tree") else "main"
                commit = repository.branches.get(revision, revision)
                files = repository.commits.get(commit)
                if files is None:
                    self.fail(404, "RevisionNotFound")
                elif rest and rest[0] == "tree":
                    self.send_json([self.entry(path, data) for path, data in files.items()])
                else:
                    siblings = [{"rfilename": path} for path in files]
                    self.send_json(
                        {
                            "_id": name,
                            "id": name,
                            "modelId": name,
                            "sha": commit,
                            "private": bool(repository.token),
                            "gated": repository.gated,
                            "disabled": False,
                            "tags": [],
                            "downloads": 0,
                            "likes": 0,
                            "siblings": siblings,
                        }
                    )

            def entry(self, path: str, data: bytes) -> dict[str, Any]:
                entry: dict[str, Any] = {
                    "type": "file",
                    "path": path,
                    "size": len(data),
                    "oid": blob_id(data),
                }
                if path.endswith(".safetensors"):
                    entry["lfs"] = {
                        "oid": hashlib.sha256(data).hexdigest(),
                        "size": len(data),
                        "pointerSize": 134,
                    }
                return entry

            def answer_file(self, repository: Repository, rest: list[str]) -> None:
                if len(rest) < 3 or rest[0] != "resolve":
                    self.fail(404, "EntryNotFound")
                    return
                commit = repository.branches.get(rest[1], rest[1])
                files = repository.commits.get(commit)
                path = "/".join(rest[2:])
                if files is None:
                    self.fail(404, "RevisionNotFound")
                elif path not in files:
                    self.fail(404, "EntryNotFound", commit)
                else:
                    self.send_file(files[path], path, commit)

            def send_file(self, data: bytes, path: str, commit: str) -> None:
                start = 0
                if (asked := self.headers.get("Range", "")).startswith("bytes="):
                    start = int(asked.removeprefix("bytes=").split("-")[0] or 0)
                body = data[start:]
                self.send_response(206 if start else 200)
                is_lfs = path.endswith(".safetensors")
                etag = hashlib.sha256(data).hexdigest() if is_lfs else blob_id(data)
                self.send_header("ETag", f'"{etag}"')
                self.send_header("X-Repo-Commit", commit)
                self.send_header("Accept-Ranges", "bytes")
                if start:
                    self.send_header("Content-Range", f"bytes {start}-{len(data) - 1}/{len(data)}")
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                if self.command == "HEAD":
                    return
                if hub.broken_downloads > 0:
                    hub.broken_downloads -= 1
                    self.wfile.write(body[: len(body) // 2])
                    self.close_connection = True
                    self.connection.close()
                    return
                self.wfile.write(body)

            def send_json(self, value: Any) -> None:
                body = json.dumps(value).encode()
                self.send_response(200)
                self.send_header("Content-Type", "application/json")
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                if self.command != "HEAD":
                    self.wfile.write(body)

            def fail(self, status: int, code: str | None, commit: str | None = None) -> None:
                self.send_response(status)
                if code:
                    self.send_header("X-Error-Code", code)
                    self.send_header("X-Error-Message", code)
                if commit:
                    self.send_header("X-Repo-Commit", commit)
                self.send_header("Content-Length", "0")
                self.end_headers()

        return Answer


def blob_id(data: bytes) -> str:
    """Git's own hash of a file, which the Hub gives as the ETag of small ones."""
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()
