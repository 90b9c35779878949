"""The registry of the adapters that an engine serves, from name to versions to integer ids."""

from __future__ import annotations

import itertools
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager

from qlora_infer.adapters.name_locks import NameLocks
from qlora_infer.adapters.store import AdapterStore
from qlora_infer.adapters.version import AdapterVersion, LoadedAdapter, LoadedAdapters, VersionNumbers
from qlora_infer.errors import AdapterConflictError, AdapterNotLoadedError
from qlora_infer.files.manifest import AdapterManifest
from qlora_infer.sources.source import Source

#: Versions of a name that are held: the one that serves, and the one before it.
HELD_VERSIONS = 2

#: So many hexadecimal digits of a digest name a version, at least.
MIN_DIGEST = 7


class AdapterRegistry:
    """Names, their versions, and how many requests each version still serves.

    Of each name the version that serves now is held, and the one before it, for ``rollback``. Any thread may use this
    object. Its lock is never held across a download, a read or a load: a slow adapter delays
    nobody.

    Args:
        store: The private copies that versions are read from.
        on_idle: Called with each version that new requests do not get by its name, when its last request has ended.
        on_gone: Called with each name that is gone, when the last request of its last version has ended.
        on_unused: Called when a version's last request has ended, whatever the version.
    """

    def __init__(
        self,
        store: AdapterStore,
        on_idle: Callable[[AdapterVersion], None],
        on_gone: Callable[[str], None] = lambda name: None,
        on_unused: Callable[[], None] = lambda: None,
    ) -> None:
        self._store = store
        self._on_idle = on_idle
        self._on_gone = on_gone
        self._on_unused = on_unused
        self._lock = threading.Lock()
        self._loading = NameLocks()
        self._held: dict[str, list[AdapterVersion]] = {}  # the last one is what the name stands for
        self._numbers = VersionNumbers()
        self._num_alive: dict[str, int] = {}  # versions that are held, or have requests
        self._int_ids = itertools.count(1)

    def prepare(self, name: str, source: Source, *, allow_pickle: bool, strict: bool = False) -> AdapterVersion:
        """Copy and check a source, up to everything that can be said without the model.

        Args:
            name: The name to be.
            source: The adapter's source.
            allow_pickle: Whether a pickled ``adapter_model.bin`` may be converted.
            strict: Refuse an invalid file beside its config and weights instead of leaving it out.

        Returns:
            A version that is not published yet: ``publish`` it, or ``discard`` it.

        Raises:
            AdapterError: The source cannot be read, or what it holds cannot be an adapter.
        """
        int_id = next(self._int_ids)
        made = self._store.make(name, int_id, source, allow_pickle=allow_pickle, strict=strict)
        snapshot, manifest, extras = made
        origin = source if source.refetch_cost is not None else None  # not a trainer's tensors
        version = AdapterVersion(name, int_id, str(source), origin, allow_pickle, snapshot, manifest, extras)
        try:
            self._store.keep(version)
        except BaseException:
            self.discard(version)
            raise
        return version

    def fetch(self, version: AdapterVersion) -> None:
        """Fetch a version's copy again if it has made room for others; the calling thread waits.

        Raises:
            AdapterError: Its source cannot be read, or holds another content now.
        """
        self._store.restore(version)

    def serve(self, version: AdapterVersion) -> None:
        """Write a version's copy in the running model's names.

        Raises:
            AdapterLoadError: There is no room for it on disk.
        """
        self._store.serve(version)

    def plain(self, version: AdapterVersion) -> AbstractContextManager[AdapterManifest]:
        """Return an adapter as plain LoRA, for a blend, while the block runs."""
        return self._store.plain(version)

    def loading(self, name: str) -> AbstractContextManager[None]:
        """Return the lock under which one adapter at a time is loaded under a name, in the order of the calls."""
        return self._loading.hold(name)

    def current(self, name: str) -> AdapterVersion | None:
        """Return the version that the name stands for now."""
        with self._lock:
            return self._current(name)

    def before(self, name: str) -> AdapterVersion:
        """Return the version that ``rollback`` would go back to.

        Raises:
            AdapterNotLoadedError: The name is not loaded, or no earlier version of it is held.
        """
        with self._lock:
            return self._before(name)

    def require_version(self, name: str, expect: str | int | None) -> None:
        """Raise ``AdapterConflictError`` unless the name stands for this version; ``None`` expects nothing."""
        with self._lock:
            self._require_version(name, expect)

    def publish(self, version: AdapterVersion, *, expect: str | int | None = None) -> None:
        """Move the name over to a version, in one step; the one before is held for ``rollback``.

        Raises:
            AdapterConflictError: The name does not stand for the version that is expected.
        """
        with self._lock:
            self._require_version(version.name, expect)
            held = self._held.setdefault(version.name, [])
            version.number = self._numbers.next(version.name)
            self._num_alive[version.name] = self._num_alive.get(version.name, 0) + 1
            held.append(version)
            left, self._held[version.name] = held[:-HELD_VERSIONS], held[-HELD_VERSIONS:]
        for old in [*left, *held[-HELD_VERSIONS:-1]]:
            self._let_go(old, retire=old in left)

    def rollback(self, name: str) -> AdapterVersion:
        """Move the name back to the version before, in one step, and forget the newest.

        Raises:
            AdapterNotLoadedError: The name is not loaded, or no earlier version of it is held.
        """
        with self._lock:
            before = self._before(name)
            newest = self._held[name].pop()
        self._let_go(newest, retire=True)
        return before

    def discard(self, version: AdapterVersion) -> None:
        """Throw away a version that was prepared and not published."""
        self._store.remove(version)

    def unload(self, name: str) -> None:
        """Forget a name; requests that wait or run finish on the version that they have.

        Raises:
            AdapterNotLoadedError: No adapter has that name.
        """
        with self._lock:
            if name not in self._held:
                raise self._not_loaded(name)
            held = self._held.pop(name)
            self._numbers.end(name)
        for version in held:
            self._let_go(version, retire=True)

    def acquire(self, adapter: str | AdapterVersion | None) -> AdapterVersion | None:
        """Return the version that a new request runs on; ``release`` it when the request has ended.

        ``None`` is the base model, which needs no version; a version that is in use is what it is.

        Raises:
            AdapterNotLoadedError: No adapter has that name, or the version has ended.
        """
        if adapter is None:
            return None
        if not isinstance(adapter, str | AdapterVersion):
            raise TypeError(f"adapter must be the name of a loaded one, or None, got {adapter!r}")
        with self._lock:
            version = adapter if isinstance(adapter, AdapterVersion) else self._find(adapter)
            if version.freed:
                raise self._not_loaded(version.name)
            version.num_uses += 1
            version.last_used = time.monotonic()
            self._store.use(version)
            return version

    @contextmanager
    def in_use(self, adapter: str | AdapterVersion) -> Iterator[AdapterVersion]:
        """Keep a version and its copy from being freed inside the ``with`` block.

        Raises:
            AdapterNotLoadedError: No adapter has that name, or the version has ended.
        """
        version = self.acquire(adapter)
        assert version is not None
        try:
            yield version
        finally:
            self.release(version)

    def release(self, version: AdapterVersion | None) -> None:
        """Count a request that has ended."""
        if version is None:
            return
        with self._lock:
            version.num_uses -= 1
            is_unused = not version.num_uses
        self._let_go(version)
        self._store.trim()
        if is_unused:
            self._on_unused()

    def records(self) -> LoadedAdapters:
        """Return the adapters that requests may name now, in the order of loading."""
        with self._lock:
            return LoadedAdapters({name: held[-1].record() for name, held in self._held.items()})

    def versions(self, name: str) -> list[LoadedAdapter]:
        """Return the versions of a name that requests may name exactly, the newest first.

        Raises:
            AdapterNotLoadedError: No adapter has that name.
        """
        with self._lock:
            if name not in self._held:
                raise self._not_loaded(name)
            return [version.record() for version in reversed(self._held[name])]

    def require(self, names: Iterable[str]) -> None:
        """Raise ``AdapterNotLoadedError`` for the first name that is not loaded."""
        with self._lock:
            for name in names:
                self._find(name)

    def _current(self, name: str) -> AdapterVersion | None:
        held = self._held.get(name)
        return held[-1] if held else None

    def _before(self, name: str) -> AdapterVersion:
        held = self._held.get(name)
        if held is None:
            raise self._not_loaded(name)
        if len(held) < 2:
            raise AdapterNotLoadedError(
                name, f"no version of {name!r} before {held[-1].number} is held: load the content that you want"
            )
        return held[-2]

    def _find(self, name: str) -> AdapterVersion:
        current = self._current(name)
        if current is not None:
            return current
        base, _, reference = name.rpartition("@")
        for version in self._held.get(base, ()):
            if _is_meant(version, reference):
                return version
        raise self._not_loaded(name)

    def _require_version(self, name: str, expect: str | int | None) -> None:
        if expect is None:
            return
        current = self._current(name)
        if current is None and expect == 0:
            return
        if current is None or not _is_meant(current, str(expect)):
            now = f"version {current.number}, digest {current.snapshot.digest[:12]}" if current else "not loaded"
            raise AdapterConflictError(name, f"adapter {name!r} is {now}, not {expect!r}: another caller changed it")

    def _not_loaded(self, name: str) -> AdapterNotLoadedError:
        known = ", ".join(map(repr, self._held)) or "none"
        base, _, reference = name.rpartition("@")
        if base in self._held:
            held = ", ".join(f"{version.number} ({version.snapshot.digest[:12]})" for version in self._held[base])
            return AdapterNotLoadedError(name, f"adapter {base!r} has no version {reference!r} now (held: {held})")
        return AdapterNotLoadedError(
            name,
            f"no adapter is loaded as {name!r} (loaded: {known}): load_adapter({name!r}, source) loads one",
        )

    def _let_go(self, version: AdapterVersion, *, retire: bool = False) -> None:
        """Free what a version needs no longer: its memory when it is idle and old, its files when it is forgotten."""
        with self._lock:
            version.retired |= retire
            if version.num_uses or version.freed or version is self._current(version.name):
                return
            version.freed = version.retired
            is_last = version.freed and self._count_out(version.name)
        self._on_idle(version)
        if version.freed:
            self.discard(version)
        if is_last:
            self._on_gone(version.name)

    def _count_out(self, name: str) -> bool:
        """Count a version that is freed; whether it was the last of its name."""
        self._num_alive[name] -= 1
        if self._num_alive[name]:
            return False
        del self._num_alive[name]
        return True


def _is_meant(version: AdapterVersion, reference: str) -> bool:
    """Return whether ``reference`` is the number of a version, or the beginning of its digest."""
    if reference == str(version.number):
        return True
    return len(reference) >= MIN_DIGEST and version.snapshot.digest.startswith(reference.lower())
