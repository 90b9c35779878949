"""The source of an adapter behind a URL, whose secret parts are never printed."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any
from urllib.parse import quote

from attrs import evolve, field, frozen

_URL = re.compile(
    r"(?P<scheme>[A-Za-z][A-Za-z0-9+.-]+)://(?:(?P<user>[^/?]*)@)?(?P<place>[^?]*)(?P<query>(?:\?.*)?)", re.DOTALL
)
# A colon behind the host that is followed by no port: most likely a password with a slash in it.
_NO_PORT = re.compile(r"(?:\[[^\]/]*\]|[^/:\[]*):(?!\d*(?:/|$))")


@frozen(repr=False)
class URL:
    """The parts of ``scheme://user:password@host/path?query``; ``str()`` leaves out those that are secret.

    A user with a password is secret, and over HTTP a user without one, too, which is how access tokens are written.
    A query is secret, because that is where signed URLs have their signature. Elsewhere a user without a password
    names a place (``abfs://container@account.dfs.core.windows.net``).

    Attributes:
        scheme: The text before ``://``.
        user: The text before the host's ``@``; ``None`` if there is none.
        place: The host or bucket, and the path.
        query: The query with its ``?``, or nothing.
    """

    scheme: str
    user: str | None
    place: str
    query: str

    @classmethod
    def read(cls, text: str) -> URL | None:
        """Take a URL apart; ``None`` for text that is none."""
        match = _URL.fullmatch(text)
        return cls(**match.groupdict()) if match else None

    @property
    def is_http(self) -> bool:
        """True if it is fetched over HTTP, where queries and Authorization headers have a meaning."""
        return self.scheme in ("http", "https")

    @property
    def is_file(self) -> bool:
        """True if it names a local path."""
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

    def below(self, path: str) -> URL:
        """Return the URL of a file or folder inside this one; its query stays at the end."""
        return evolve(self, place=f"{self.place.rstrip('/')}/{quote(path) if self.is_http else path}")

    def __str__(self) -> str:
        has_secret_user = self.is_http or ":" in (self.user or "")
        return evolve(self, user=None if has_secret_user else self.user, query="").text


def _check_url(source: URLSource, attribute: Any, text: Any) -> None:
    if not isinstance(text, str):
        raise TypeError(f"url must be text, got {type(text).__name__}")
    url = URL.read(text)
    if url is None:
        raise ValueError("a URL is written 's3://bucket/folder' or 'https://host/folder'")
    url.check()
    if url.is_file:
        raise ValueError(f"{url} is a local folder: pass its path")
    from qlora_infer.sources import filesystem

    filesystem.check_scheme(url.scheme)


def _check_token(source: URLSource, attribute: Any, token: Any) -> None:
    if token is None:
        return
    if not isinstance(token, str):
        raise TypeError(f"token must be text, got {type(token).__name__}")  # attrs' own message would show it
    url = source._parts
    if not url.is_http:
        raise ValueError(f"{url} takes no token, which is for the Hub and http(s): pass storage_options=")
    if url.user is not None:
        raise ValueError(f"{url} has a user in its URL and a token: leave one of them out")


def _copied(options: Mapping[str, Any]) -> dict[str, Any]:
    """Copy options with ``dict``, in a form whose types type checkers understand."""
    return dict(options)


@frozen
class URLSource:
    """A folder on any filesystem of fsspec, such as ``s3://bucket/pirate`` or ``https://host/pirate``.

    ``str()`` and ``repr()`` show no secrets: no token, no storage option, and neither the password nor the query of the
    URL, because the query of a signed URL is its signature.

    Attributes:
        url: The folder's URL, with its secrets.
        token: For http(s), the token to send as ``Authorization: Bearer``; ``None`` for none.
        storage_options: The arguments of fsspec's filesystem, such as a key or an endpoint.

    Raises:
        ValueError: The text is not a URL, fsspec does not know its scheme, or an attribute contradicts it.
        TypeError: An attribute is not a text.
        MissingDependencyError: fsspec is not installed.
    """

    url: str = field(validator=_check_url, repr=lambda text: repr(str(URL.read(text))))
    token: str | None = field(default=None, kw_only=True, repr=False, validator=_check_token)
    storage_options: Mapping[str, Any] = field(factory=dict, kw_only=True, converter=_copied, repr=False, hash=False)

    @property
    def refetch_cost(self) -> float:
        """The cost of fetching it again, in copies of a local folder."""
        return 8.0

    def fetch(self, adapter: str, into: Path, *, token: str | None, allow_pickle: bool) -> None:
        """Download the adapter's files into a new folder; ``Source`` describes the arguments.

        ``filesystem.download_adapter`` describes the errors.
        """
        from qlora_infer.sources import filesystem

        filesystem.download_adapter(
            adapter,
            self._parts,
            into,
            token=self.token,
            storage_options=self.storage_options,
            allow_pickle=allow_pickle,
        )

    @property
    def _parts(self) -> URL:
        url = URL.read(self.url)
        assert url is not None
        return url

    def __str__(self) -> str:
        return str(self._parts)
