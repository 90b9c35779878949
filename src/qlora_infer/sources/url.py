"""A URL as a user writes one: which part names a place, and which part is secret."""

from __future__ import annotations

import re
from urllib.parse import quote

from attrs import evolve, frozen

_URL = re.compile(
    r"(?P<scheme>[A-Za-z][A-Za-z0-9+.-]+)://(?:(?P<user>[^/?]*)@)?(?P<place>[^?]*)(?P<query>(?:\?.*)?)", re.DOTALL
)
# A colon behind the host that is followed by no port: most likely a password with a slash in it.
_NO_PORT = re.compile(r"(?:\[[^\]/]*\]|[^/:\[]*):(?!\d*(?:/|$))")


@frozen(repr=False)
class SourceURL:
    """The parts of ``scheme://user:password@host/path?query``; ``str()`` leaves out those that are secret.

    A user with a password is secret, and over HTTP a user without one, too, which is how access tokens are written.
    A query is secret, because that is where signed URLs have their signature. Elsewhere a user without a password
    names a place (``abfs://container@account.dfs.core.windows.net``).

    Attributes:
        scheme: What stands before ``://``.
        user: What stands before the host's ``@``; ``None`` where there is none.
        place: The host or bucket, and the path.
        query: The query with its ``?``, or nothing.
    """

    scheme: str
    user: str | None
    place: str
    query: str

    @classmethod
    def read(cls, text: str) -> SourceURL | None:
        """Take a URL apart; ``None`` for text that is none."""
        match = _URL.fullmatch(text)
        return cls(**match.groupdict()) if match else None

    @property
    def is_http(self) -> bool:
        """Whether it is fetched over HTTP, where queries and Authorization headers have a meaning."""
        return self.scheme in ("http", "https")

    @property
    def is_file(self) -> bool:
        """Whether it names a local path."""
        return self.scheme in ("file", "local")

    def check(self) -> None:
        """Raise ``ValueError``, without any secret, for a URL that would be misread."""
        if "::" in self.text:
            raise ValueError(
                f"a {self.scheme} URL has a '::', which chains URLs: name one place, and write an IPv6 address out"
            )
        if _NO_PORT.match(self.place):  # first, because the others show the place
            raise ValueError(f"a {self.scheme} URL has a ':' without a port: in a password, write '/' as %2F")
        if not self.text.isprintable():
            raise ValueError(f"a URL is printable text, got {str(self)!a}")
        if not self.place:
            raise ValueError(f"{self} names no place: write it with its host or bucket, and the path")
        if self.is_file and not self.text.startswith(f"{self.scheme}:///"):
            raise ValueError(f"{self} is not absolute: write {self.scheme}:///folder, or the path alone")
        if self.query and not self.is_http:
            raise ValueError(f"{self} has a '?', which only http(s) has: pass what it says as storage_options=")
        if self.is_http and "#" in self.text:
            raise ValueError(f"a {self.scheme} URL has a '#': leave it out, or write it as %23 where it is in a name")

    @property
    def text(self) -> str:
        """The whole URL, as it was written, with its secrets."""
        user = "" if self.user is None else f"{self.user}@"
        return f"{self.scheme}://{user}{self.place}{self.query}"

    def below(self, path: str) -> SourceURL:
        """The URL of a file or folder inside this one; its query stays at the end."""
        return evolve(self, place=f"{self.place.rstrip('/')}/{quote(path) if self.is_http else path}")

    def __str__(self) -> str:
        has_secret_user = self.is_http or ":" in (self.user or "")
        return evolve(self, user=None if has_secret_user else self.user, query="").text
