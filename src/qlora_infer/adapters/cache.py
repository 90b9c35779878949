"""The adapters that an engine serves: name -> version -> integer id."""

from __future__ import annotations

import itertools
import shutil
import threading
from collections.abc import Callable, Iterable
from pathlib import Path

from attrs import define, field, frozen

from qlora_infer.adapters.manifest import AdapterManifest, read_manifest
from qlora_infer.adapters.pickles import convert_pickle
from qlora_infer.adapters.preflight import Fit
from qlora_infer.adapters.snapshot import WEIGHTS_NAME, Snapshot, take_snapshot
from qlora_infer.adapters.source import AdapterSource
from qlora_infer.adapters.tensors import check_finite
from qlora_infer.errors import AdapterNotLoadedError


@frozen
class LoadedAdapter:
    """An adapter that requests may name.

    Attributes:
        name: What requests call it.
        int_id: Its integer id in vLLM, never used again for another content.
        source: Where it came from, without any token.
        digest: SHA-256 of its two files, in hexadecimal digits.
        rank: The largest rank of its modules.
        num_modules: How many of the model's modules it changes.
        num_model_modules: How many modules of the model an adapter may change.
        num_bytes: The size of its tensors.
        base_model: The model that it says it was trained on, if it says so.
        weight: Its share of the engine beside other adapters.
    """

    name: str
    int_id: int
    source: str
    digest: str = field(repr=lambda digest: digest[:12])
    rank: int
    num_modules: int
    num_model_modules: int
    num_bytes: int
    base_model: str | None
    weight: float = 1.0


@define(eq=False)
class AdapterVersion:
    """One immutable content under a name: what a request runs on, from its first token to its last.

    ``vllm_name`` and ``int_id`` belong to this content alone. vLLM finds KV blocks by name and path and slots by the
    integer id, so neither can ever answer for other bytes.

    Attributes:
        name: What requests call it.
        int_id: Its integer id in vLLM.
        source: What the user named.
        snapshot: The private copy that vLLM reads.
        manifest: What the copy says of itself.
        weight: Its share of the engine beside other adapters.
        fit: How it fits the model; set once that has been checked.
        num_uses: Requests that wait for it or run on it.
        retired: Whether the name has moved on, so that the version ends with its last request.
    """

    name: str
    int_id: int
    source: AdapterSource
    snapshot: Snapshot
    manifest: AdapterManifest
    weight: float = 1.0
    fit: Fit | None = None
    num_uses: int = 0
    retired: bool = False

    @property
    def vllm_name(self) -> str:
        """The name that vLLM knows it by."""
        return f"{self.name}#{self.int_id}@{self.snapshot.digest[:16]}"

    @property
    def path(self) -> Path:
        """The folder that vLLM reads it from."""
        return self.snapshot.folder

    def loaded(self) -> LoadedAdapter:
        """The record that users see."""
        assert self.fit is not None
        return LoadedAdapter(
            name=self.name,
            int_id=self.int_id,
            source=str(self.source),
            digest=self.snapshot.digest,
            rank=self.manifest.rank,
            num_modules=len(self.manifest.modules),
            num_model_modules=self.fit.num_model_modules,
            num_bytes=self.manifest.num_bytes,
            base_model=self.manifest.base_model,
            weight=self.weight,
        )


class AdapterCache:
    """Names, their versions, and how many requests each version still serves.

    Any thread may use it. Its lock is never held across a download, a read or a load: a slow adapter delays nobody.

    Args:
        store: The folder for private copies; this object owns what is inside.
        on_freed: Called with each version that nobody needs any more.
    """

    def __init__(self, store: Path, on_freed: Callable[[AdapterVersion], None]) -> None:
        self._store = store
        self._on_freed = on_freed
        self._lock = threading.Lock()
        self._loading: dict[str, threading.Lock] = {}
        self._current: dict[str, AdapterVersion] = {}
        self._int_ids = itertools.count(1)

    def prepare(self, name: str, source: AdapterSource, *, token: str | None, allow_pickle: bool) -> AdapterVersion:
        """Resolve, copy and check a source, up to everything that can be said without the model.

        Args:
            name: The name to be.
            source: What the user named.
            token: The Hub's access token for sources that have none of their own.
            allow_pickle: Whether a pickled ``adapter_model.bin`` may be converted.

        Returns:
            A version that is not published yet: ``publish`` it, or ``discard`` it.

        Raises:
            AdapterError: The source cannot be read, or what it holds cannot be an adapter.
        """
        folder = source.resolve(name, default_token=token, allow_pickle=allow_pickle)
        int_id = next(self._int_ids)
        target = self._store / str(int_id)
        try:
            if allow_pickle and not (folder / WEIGHTS_NAME).exists():
                folder = convert_pickle(name, folder, self._store / f"{int_id}-converted")
            read_manifest(name, folder)
            snapshot = take_snapshot(name, folder, target)
            # What is served is what was checked: the copy, which nobody else writes to.
            manifest = read_manifest(name, target)
            check_finite(name, target / WEIGHTS_NAME)
        except BaseException:
            shutil.rmtree(target, ignore_errors=True)
            raise
        finally:
            shutil.rmtree(self._store / f"{int_id}-converted", ignore_errors=True)
        return AdapterVersion(name, int_id, source, snapshot, manifest)

    def loading(self, name: str) -> threading.Lock:
        """The lock under which one adapter at a time is loaded under a name, in the order of the calls."""
        with self._lock:
            return self._loading.setdefault(name, threading.Lock())

    def current(self, name: str) -> AdapterVersion | None:
        """The version that the name stands for now."""
        with self._lock:
            return self._current.get(name)

    def publish(self, version: AdapterVersion) -> None:
        """Move the name over to a version, in one step; the one before ends with its last request."""
        with self._lock:
            previous = self._current.get(version.name)
            self._current[version.name] = version
        if previous is not None:
            self._retire(previous)

    def discard(self, version: AdapterVersion) -> None:
        """Throw away a version that was prepared and not published."""
        shutil.rmtree(version.path, ignore_errors=True)

    def unload(self, name: str) -> None:
        """Forget a name; requests that wait or run finish on the version that they have.

        Raises:
            AdapterNotLoadedError: No adapter has that name.
        """
        with self._lock:
            if name not in self._current:
                raise self._not_loaded(name)
            version = self._current.pop(name)
        self._retire(version)

    def acquire(self, name: str | None) -> AdapterVersion | None:
        """The version that a new request runs on; ``release`` it when the request has ended.

        ``None`` is the base model, which needs no version.

        Raises:
            AdapterNotLoadedError: No adapter has that name.
        """
        if name is None:
            return None
        with self._lock:
            version = self._current.get(name)
            if version is None:
                raise self._not_loaded(name)
            version.num_uses += 1
            return version

    def release(self, version: AdapterVersion | None) -> None:
        """Count a request that has ended."""
        if version is None:
            return
        with self._lock:
            version.num_uses -= 1
            is_free = version.retired and version.num_uses == 0
        if is_free:
            self._free(version)

    def loaded(self) -> dict[str, LoadedAdapter]:
        """What may be named now, in the order of loading."""
        with self._lock:
            return {name: version.loaded() for name, version in self._current.items()}

    def require(self, names: Iterable[str]) -> None:
        """Raise ``AdapterNotLoadedError`` for the first name that is not loaded."""
        with self._lock:
            for name in names:
                if name not in self._current:
                    raise self._not_loaded(name)

    def _not_loaded(self, name: str) -> AdapterNotLoadedError:
        known = ", ".join(map(repr, self._current)) or "none"
        return AdapterNotLoadedError(
            name,
            f"no adapter is loaded as {name!r} (loaded: {known}): load_adapter({name!r}, source) loads one",
        )

    def _retire(self, version: AdapterVersion) -> None:
        with self._lock:
            version.retired = True
            is_free = version.num_uses == 0
        if is_free:
            self._free(version)

    def _free(self, version: AdapterVersion) -> None:
        self._on_freed(version)
        self.discard(version)
