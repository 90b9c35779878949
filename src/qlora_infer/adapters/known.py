"""Adapters that are known by name and loaded when the first request names them."""

from __future__ import annotations

import contextlib
import copy
import os
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Protocol, TypeAlias

from qlora_infer.adapters.registry import AdapterRegistry
from qlora_infer.adapters.version import AdapterVersion, LoadedAdapter
from qlora_infer.display import format_names
from qlora_infer.errors import (
    AdapterError,
    AdapterNotLoadedError,
    AdapterSourceError,
    EngineClosedError,
    EngineDeadError,
)
from qlora_infer.files.snapshot import CONFIG_NAME
from qlora_infer.sources.source import Source, SourceLike, parse_source

#: Sources by name, a folder with one adapter in each of its folders, or a function from a name to its source.
Sources: TypeAlias = Mapping[str, SourceLike] | str | os.PathLike[str] | Callable[[str], SourceLike | None]

#: Called with an adapter's version, which is in use until it returns, or with what kept it from being loaded.
Waiter: TypeAlias = Callable[[AdapterVersion | Exception], None]

#: Adapters that are loaded at a time.
MAX_LOADS = 4

#: Seconds in which an adapter that could not be loaded is not tried again.
RETRY_AFTER = 5.0

#: So many known names are listed in a message.
NUM_LISTED = 20


class Loader(Protocol):
    """The object that loads a source under a name."""

    def load(self, name: str, source: Source) -> LoadedAdapter:
        """Load it, and wait until requests may name it."""
        ...


class KnownAdapters:
    """Adapters that are loaded on first use, several at a time, in threads of this object.

    A request's callback gets the adapter or the error. Requests within the next ``RETRY_AFTER`` seconds get the same
    error. Over the limit, this object unloads the least recently used of the adapters that it loaded and that have no
    requests. Every thread can use it.

    Args:
        sources: The sources by name; a mapping is read anew each time. ``None`` has none.
        registry: The adapters that are loaded.
        loader: Loads one.
        max_loaded: The limit; ``None`` for none.
        on_failed: Called with the name of each adapter that could not be loaded.
    """

    def __init__(
        self,
        sources: Sources | None,
        registry: AdapterRegistry,
        loader: Loader,
        *,
        max_loaded: int | None,
        on_failed: Callable[[str], None] = lambda name: None,
    ) -> None:
        self._sources = _checked(sources)
        self._registry = registry
        self._loader = loader
        self._max_loaded = max_loaded
        self._on_failed = on_failed
        self._lock = threading.Lock()
        self._waiters: dict[str, list[Waiter]] = {}  # of the adapters that are being loaded
        self._loaded: set[str] = set()  # by this object, and not kept for another reason
        self._failures: dict[str, tuple[float, Exception]] = {}
        self._closed = False
        self._pool = ThreadPoolExecutor(MAX_LOADS, thread_name_prefix="qlora-infer-load")

    def knows(self, name: str) -> bool:
        """Return whether an adapter may be loaded by this name; a function is not asked for it yet."""
        match self._sources:
            case None:
                return False
            case Mapping():
                return name in self._sources and "@" not in name
            case Path():
                with contextlib.suppress(OSError):  # the name is too long for a file
                    return Path(name).name == name and (self._sources / name / CONFIG_NAME).is_file()
                return False
        return bool(name) and "@" not in name

    def unknown(self, error: AdapterNotLoadedError) -> AdapterNotLoadedError:
        """Return the error of a name that is neither loaded nor known."""
        if self._sources is None or "@" in error.adapter:
            return error
        return self._unknown(error.adapter)

    def _unknown(self, name: str) -> AdapterNotLoadedError:
        known = format_names(map(repr, sorted(self._names())), most=NUM_LISTED)
        listed = f" (known: {known})" if known else ""
        return AdapterNotLoadedError(
            name, f"no adapter is loaded as {name!r}, and known_adapters has none of that name{listed}"
        )

    def request(self, name: str, waiter: Waiter) -> None:
        """Load an adapter, and call ``waiter`` when that has ended; at once if it was tried a moment ago in vain."""
        with self._lock:
            error = self._recent_failure(name)
            if error is None and self._closed:
                error = _closed()
            if error is None:
                waiters = self._waiters.setdefault(name, [])
                waiters.append(waiter)
                if len(waiters) == 1:
                    self._pool.submit(self._load, name)
                return
        waiter(error)

    def load(self, name: str) -> LoadedAdapter:
        """Load an adapter and wait for it.

        Raises:
            AdapterNotLoadedError: It is not known.
            Exception: The errors of ``load_adapter``.
        """
        current = self._registry.current(name)
        if current is not None:
            return current.record()
        if not self.knows(name):
            raise self._unknown(name)
        ended: Future[LoadedAdapter] = Future()
        self.request(name, partial(_settle, ended))
        try:
            return ended.result()
        finally:
            del ended  # else a cycle: an error has this frame in its traceback, and the future has the error

    def require(self, name: str) -> None:
        """Load an adapter and wait for it, if it is known and not loaded."""
        if self._registry.current(name) is None and self.knows(name):
            self.load(name)

    def keep(self, name: str) -> None:
        """Keep an adapter loaded, because a caller loaded or pinned it by name."""
        with self._lock:
            self._loaded.discard(name)

    def trim(self) -> None:
        """Start to unload adapters over the limit; called when an adapter's last request has ended."""
        with self._lock:
            if self._num_over() and not self._closed:
                self._pool.submit(self._unload_unused)

    def close(self) -> None:
        """Begin no more loads, and end those that wait for one with ``EngineClosedError``."""
        with self._lock:
            self._closed = True
            waiting, self._waiters = self._waiters, {}
        self._pool.shutdown(wait=False, cancel_futures=True)
        for waiters in waiting.values():
            for waiter in waiters:
                waiter(_closed())

    # In a thread of the pool ------------------------------------------------------------------------------------

    def _load(self, name: str) -> None:
        try:
            with self._loaded_version(name) as version:
                self._call_waiters(name, version)
        except Exception as error:
            with self._lock:
                self._failures[name] = (time.monotonic() + RETRY_AFTER, _bare(error))
            self._call_waiters(name, error)
            if self._registry.current(name) is None:
                self._on_failed(name)
        self._unload_unused()

    @contextlib.contextmanager
    def _loaded_version(self, name: str) -> Iterator[AdapterVersion]:
        if self._registry.current(name) is None:  # nobody else has loaded it meanwhile
            source = self._source(name)
            try:
                self._loader.load(name, source)
            except EngineDeadError:  # an engine that is started again loads it; one that is not says so again
                self._loader.load(name, source)
            with self._lock:
                self._loaded.add(name)
        with self._registry.in_use(name) as version:
            yield version

    def _source(self, name: str) -> Source:
        source: SourceLike | None
        match self._sources:
            case None:
                source = None
            case Mapping():
                source = _answer_of(self._sources.__getitem__, name)
            case Path():
                source = self._sources / name
            case find:
                source = _answer_of(find, name)
        if source is None:
            raise self._unknown(name)
        return parse_source(source)

    def _call_waiters(self, name: str, found: AdapterVersion | Exception) -> None:
        with self._lock:
            waiters = self._waiters.pop(name, [])
        for waiter in waiters:
            waiter(found)

    def _unload_unused(self) -> None:
        """Unload adapters over the limit, except those with requests or in loading."""
        with self._lock:
            versions = {name: self._registry.current(name) for name in self._loaded - self._waiters.keys()}
            self._loaded -= {name for name, version in versions.items() if version is None}  # somebody unloaded it
            unused = [version for version in versions.values() if version is not None and not version.num_uses]
            leaving = sorted(unused, key=lambda version: version.last_used)[: self._num_over()]
            self._loaded -= {version.name for version in leaving}
        for version in leaving:
            with contextlib.suppress(AdapterNotLoadedError):  # somebody else was quicker
                self._registry.unload(version.name)

    def _num_over(self) -> int:
        return 0 if self._max_loaded is None else max(0, len(self._loaded) - self._max_loaded)

    def _recent_failure(self, name: str) -> Exception | None:
        while self._failures and next(iter(self._failures.values()))[0] <= time.monotonic():
            del self._failures[next(iter(self._failures))]  # the oldest
        return _bare(self._failures[name][1]) if name in self._failures else None

    def _names(self) -> list[str]:
        match self._sources:
            case Mapping():
                return list(self._sources)
            case Path():
                return [path.parent.name for path in self._sources.glob(f"*/{CONFIG_NAME}")]
        return []


def _settle(ended: Future[LoadedAdapter], found: AdapterVersion | Exception) -> None:
    if isinstance(found, Exception):
        ended.set_exception(found)
    else:
        ended.set_result(found.record())


def _checked(sources: Sources | None) -> Mapping[str, SourceLike] | Path | Callable[[str], SourceLike | None] | None:
    """Return the sources, a folder as a path; raise ``TypeError`` for anything else."""
    if isinstance(sources, str | os.PathLike):
        folder = Path(sources)
        if not folder.is_dir():
            raise ValueError(f"known_adapters: {folder} is no folder")
        return folder
    if sources is None or isinstance(sources, Mapping) or callable(sources):
        return sources
    raise TypeError(
        "known_adapters must map names to sources, be a folder of adapters, or a function from a name to its source, "
        f"got {type(sources).__name__}"
    )


def _answer_of(find: Callable[[str], SourceLike | None], name: str) -> SourceLike | None:
    """Ask a user's function for a source; it may raise anything."""
    try:
        return find(name)
    except LookupError:
        return None
    except (AdapterError, EngineDeadError):
        raise
    except BaseException as error:  # SystemExit, too: somebody waits
        raise AdapterSourceError(
            name, f"known_adapters was asked for adapter {name!r} and raised {type(error).__name__}"
        ) from error


def _bare(error: Exception) -> Exception:
    """Return a copy without the traceback, whose frames would be kept with it."""
    try:
        return copy.copy(error)
    except Exception:  # an error of somebody else's, which cannot be copied
        return error.with_traceback(None)


def _closed() -> EngineClosedError:
    return EngineClosedError("the engine was closed while an adapter was loaded: load it into a new one")
