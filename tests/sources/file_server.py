"""A plain HTTP file server on loopback, for tests: it asks for a token, breaks, falls silent or redirects."""

from __future__ import annotations

import contextlib
import socket
import struct
import threading
from collections.abc import Mapping
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any


class FileServer:
    """Serves ``files`` by their paths on 127.0.0.1 until its block ends.

    Attributes:
        requests: Every path that was asked for, with its query.
        authorizations: The ``Authorization`` header of each request, or nothing.
        authorization: What that header must be: 401 without it, 403 with another.
        query: What the query must be; 403 for another.
        status: Answer everything with this.
        redirect_to: Send everybody to this server.
        stop_at: Send a file up to this byte, and then ...
        afterwards: ... ``"end"`` or ``"reset"`` the connection, be ``"silent"``, or ``"drip"`` a byte now and then.
        num_bytes: Send so many zeros in place of a file.
        raw: Answer a path with these very bytes, status line and headers too, and end the connection.
        ranges: The ``Range`` header of each request, or nothing.
    """

    def __init__(self, files: Mapping[str, bytes]) -> None:
        self.files = {f"/{path}": content for path, content in files.items()}
        self.requests: list[str] = []
        self.authorizations: list[str] = []
        self.authorization: str | None = None
        self.query: str | None = None
        self.status: int | None = None
        self.redirect_to: str | None = None
        self.stop_at: int | None = None
        self.afterwards = "end"
        self.num_bytes = 0
        self.raw: dict[str, bytes] = {}
        self.ranges: list[str] = []
        self.closing = threading.Event()
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), type("Answer", (_Answer,), {"files": self}))
        self._server.daemon_threads = True
        self._server.block_on_close = False

    @property
    def host(self) -> str:
        return f"127.0.0.1:{self._server.server_address[1]}"

    @property
    def url(self) -> str:
        return f"http://{self.host}"

    def __enter__(self) -> FileServer:
        threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self.closing.set()
        self._server.shutdown()
        self._server.server_close()


class _Answer(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    files: FileServer

    def do_GET(self) -> None:
        server = self.files
        authorization = self.headers.get("Authorization", "")
        path, _, query = self.path.partition("?")
        server.requests.append(self.path)
        server.authorizations.append(authorization)
        server.ranges.append(self.headers.get("Range", ""))
        if path in server.raw:
            self.close_connection = True
            with contextlib.suppress(OSError):  # the client has gone
                self.wfile.write(server.raw[path])
        elif server.status:
            self.send(server.status)
        elif server.redirect_to:
            self.send(302, headers={"Location": server.redirect_to + self.path})
        elif server.authorization and authorization != server.authorization:
            self.send(403 if authorization else 401)
        elif server.query is not None and query != server.query:
            self.send(403)
        elif path not in server.files:
            self.send(404)
        elif server.num_bytes:
            self.send(200, bytes(server.num_bytes))
        else:
            self.send(200, server.files[path], stop_at=server.stop_at)

    def do_HEAD(self) -> None:
        self.do_GET()

    def log_message(self, *_: Any) -> None:
        pass

    def send(
        self, status: int, body: bytes = b"", *, headers: Mapping[str, str] | None = None, stop_at: int | None = None
    ) -> None:
        self.send_response(status)
        for name, value in {"Content-Length": str(len(body)), **(headers or {})}.items():
            self.send_header(name, value)
        self.end_headers()
        try:
            self.wfile.write(body[:stop_at])
            if stop_at is not None and stop_at < len(body):
                self.stop(body[stop_at:])
        except OSError:  # the client has gone
            self.close_connection = True

    def stop(self, rest: bytes) -> None:
        self.close_connection = True
        if self.files.afterwards == "reset":  # what closes a socket that lingers for no time is a reset
            self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            self.connection.close()
            raise ConnectionResetError
        if self.files.afterwards == "silent":
            self.files.closing.wait(60)
        for byte in rest if self.files.afterwards == "drip" else b"":
            if self.files.closing.wait(0.02):
                return
            self.wfile.write(bytes([byte]))
