"""The store of private copies on disk, which are made, checked, deleted for room, and made again."""

from __future__ import annotations

import contextlib
import errno
import json
import logging
import shutil
import tempfile
import threading
from collections.abc import Iterator
from concurrent.futures import CancelledError, Future, ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING

from qlora_infer.adapters.placement import Piece, Placement
from qlora_infer.adapters.served import write_served
from qlora_infer.basewise.conversion import read_saved
from qlora_infer.conversions.conversion import convert
from qlora_infer.errors import (
    AdapterError,
    AdapterLoadError,
    AdapterNotFoundError,
    AdapterSourceError,
    CorruptAdapterError,
    EngineClosedError,
    ModelNotFoundError,
)
from qlora_infer.files.content import digest_of
from qlora_infer.files.extras import Extras, read_extras, with_sound_template
from qlora_infer.files.manifest import AdapterManifest, read_manifest
from qlora_infer.files.pickles import convert_pickle
from qlora_infer.files.safetensors import check_finite
from qlora_infer.files.snapshot import CONFIG_NAME, WEIGHTS_NAME, Snapshot
from qlora_infer.sources.source import Source

if TYPE_CHECKING:
    from qlora_infer.adapters.version import AdapterVersion

#: AdapterStore that are made again at a time.
MAX_FETCHES = 4

#: Seconds that a copy may take to be made again, for those who wait for it.
FETCH_TIMEOUT = 300.0

logger = logging.getLogger("qlora_infer")

_DISK_IS_FULL = (errno.ENOSPC, errno.EDQUOT)


class AdapterStore:
    """The copies that vLLM reads adapters from, within a budget of bytes; no other program writes to them.

    Over the budget, copies go that can be made again from their source and whose adapters have no requests. Which of
    them is GreedyDual's choice (Young, "The k-server dual and loose competitiveness for paging", 1994): the least
    recently used, where a use counts for more the more it costs to make the copy again. A copy whose source holds
    another content by now goes only when no other can. Any thread may use it.

    Args:
        folder: The folder for the copies; this object owns what is inside.
        max_bytes: The budget; ``None`` for none.
        token: The Hub's access token for sources that have none of their own.
    """

    def __init__(self, folder: Path, *, max_bytes: int | None = None, token: str | None = None) -> None:
        self._folder = folder
        self._max_bytes = max_bytes
        self._token = token
        self._lock = threading.Lock()
        self._sizes: dict[AdapterVersion, int] = {}  # those that are on disk
        self._num_bytes = 0
        self._values: dict[AdapterVersion, float] = {}  # the lowest goes first
        self._clock = 0.0
        self._digests: dict[Source, str] = {}  # what each source held when it was last read
        self._fetches: dict[AdapterVersion, Future[None]] = {}
        self._closed = False
        self._pool = ThreadPoolExecutor(MAX_FETCHES, thread_name_prefix="qlora-infer-fetch")

    @property
    def num_bytes(self) -> int:
        """The bytes that the copies take."""
        return self._num_bytes

    def make(
        self, name: str, int_id: int, source: Source, *, allow_pickle: bool, strict: bool = False
    ) -> tuple[Snapshot, AdapterManifest, Extras]:
        """Fetch a source into a private copy and check it, up to everything that can be said without the model.

        Raises:
            AdapterError: The source cannot be read, or what it holds cannot be an adapter; if ``strict``, also where
                a file beside its config and weights is invalid.
            AdapterLoadError: The disk is full.
            EngineClosedError: This object was closed meanwhile.
        """
        folder = self._folder / str(int_id)
        try:
            source.fetch(name, folder, token=self._token, allow_pickle=allow_pickle)
            return _check(name, folder, allow_pickle=allow_pickle, strict=strict)
        except BaseException as error:
            self._delete(folder)
            if self._closed and isinstance(error, Exception):
                raise _closed() from error
            if _is_full(error):
                raise AdapterLoadError(
                    name,
                    f"{self._folder} has no room: free some, or start with TMPDIR set to a folder of a larger disk",
                ) from error
            if isinstance(error, AdapterError):  # the copy was checked, and the user knows its source
                error.args = (str(error).replace(str(folder), str(source).rstrip("/")),)
            elif isinstance(error, FileNotFoundError):
                raise AdapterNotFoundError(name, f"{error.filename} is gone: load the adapter again") from error
            elif isinstance(error, OSError) and error.errno is not None:
                raise AdapterSourceError(name, f"adapter {name!r} could not be copied: {error}: try again") from error
            raise

    def keep(self, version: AdapterVersion) -> None:
        """Count a copy that was made, and let others go where there is too little room.

        Raises:
            AdapterLoadError: There is too little for it, whatever goes.
            EngineClosedError: This object was closed.
        """
        with self._lock:
            if self._closed:
                raise _closed()
            self._count(version)
            needed = self._num_bytes
        if self._max_bytes is None or needed <= self._max_bytes:
            return
        raise AdapterLoadError(
            version.name,
            f"adapter {version.name!r} has no room on disk: with those that are in use, or cannot be fetched again, it "
            f"would be {needed} bytes, and max_disk_bytes is {self._max_bytes} (unload some, or raise it)",
        )

    def serve(self, version: AdapterVersion) -> None:
        """Write a version's copy in the running model's names, which its ``fit`` knows.

        Raises:
            AdapterLoadError: The disk is full, or ``max_disk_bytes`` leaves no room for it.
            EngineClosedError: This object was closed.
        """
        self._write_served(version)
        self.keep(version)

    @contextlib.contextmanager
    def plain(self, version: AdapterVersion) -> Iterator[AdapterManifest]:
        """Write an adapter that was converted with the base model as plain LoRA under its own names, for a blend.

        The files go when the block ends. Any other adapter is yielded as it is, one that no factors can hold among
        them.

        Raises:
            AdapterLoadError: The disk is full, or the base model's files are gone.
        """
        manifest, fit = version.manifest, version.fit
        if fit is None or not manifest.saved or manifest.magnitudes or fit.conversion.biases:
            yield manifest
            return
        own = Placement({name: Piece(name, module) for name, module in fit.conversion.modules.items()})
        with tempfile.TemporaryDirectory(dir=self._folder) as folder:
            with self._writing(version):
                write_served(version.name, version.snapshot.folder, own, fit.conversion, target=Path(folder))
            yield read_manifest(version.name, Path(folder))

    def use(self, version: AdapterVersion) -> None:
        """Note that an adapter is asked for, so that its copy stays longer than others."""
        if self._max_bytes is not None:
            with self._lock:
                self._use(version)

    def trim(self) -> None:
        """Remove copies that are too many, and had to stay while their adapters had requests."""
        if self._max_bytes is not None and self._num_bytes > self._max_bytes:
            with self._lock:
                self._make_room()

    def remove(self, version: AdapterVersion) -> None:
        """Delete a copy that is not wanted any more."""
        with self._lock:
            self._num_bytes -= self._sizes.pop(version, 0)
            self._values.pop(version, None)
            if len(self._digests) > 2 * len(self._values):
                living = {other.origin for other in self._values}
                self._digests = {source: digest for source, digest in self._digests.items() if source in living}
        self._delete(version.snapshot.folder)

    def fetch(self, version: AdapterVersion) -> Future[None] | None:
        """Begin to make a copy again; ``None`` where it is there.

        The result is an ``AdapterError`` where the source cannot be read, or holds another content now.

        Raises:
            EngineClosedError: This object was closed.
        """
        with self._lock:
            if version.origin is None or self._is_there(version):
                return None
            if self._closed:
                raise _closed()
            if version not in self._fetches:
                self._fetches[version] = self._pool.submit(self._make_again, version)
            return self._fetches[version]

    def restore(self, version: AdapterVersion) -> bool:
        """Fetch a copy again where it is gone, and wait for it; return whether it was.

        Raises:
            AdapterError: What ``fetch`` ends with, or it was not made within ``FETCH_TIMEOUT`` seconds.
            EngineClosedError: This object was closed, before or meanwhile.
        """
        fetched = self.fetch(version)
        if fetched is None:
            return False
        try:
            fetched.result(FETCH_TIMEOUT)
        except CancelledError as error:
            raise _closed() from error
        except TimeoutError as error:
            raise AdapterLoadError(
                version.name, f"adapter {version.name!r} was not fetched again within {FETCH_TIMEOUT:g} s: try again"
            ) from error
        return True

    def close(self) -> None:
        """Begin no more work, and delete what is still being made when that ends."""
        with self._lock:  # nobody is between asking whether it is closed and beginning
            self._closed = True
        self._pool.shutdown(wait=False, cancel_futures=True)

    def _make_again(self, version: AdapterVersion) -> None:
        made = False
        try:
            self._make_same(version)
            made = True
        finally:
            # In one step: in between, somebody else would begin to make it where it is.
            with self._lock:
                del self._fetches[version]
                kept = made and not version.freed and not self._closed
                if kept:
                    self._count(version)
        if not kept:
            self.remove(version)
            if self._closed:
                raise _closed()

    def _make_same(self, version: AdapterVersion) -> None:
        assert version.origin is not None
        snapshot, _, _ = self.make(version.name, version.int_id, version.origin, allow_pickle=version.allow_pickle)
        if snapshot.digest != version.snapshot.digest:
            self._delete(version.snapshot.folder)
            raise CorruptAdapterError(
                version.name,
                f"its copy on disk is gone (max_disk_bytes, or somebody removed it), and {version.source} holds "
                "another content now: load it again",
            )
        if version.served is not None:
            self._write_served(version)

    def _write_served(self, version: AdapterVersion) -> None:
        assert version.fit is not None
        with self._writing(version):
            version.served = write_served(
                version.name, version.snapshot.folder, version.fit.placement, version.fit.conversion
            )
            if version.fit.conversion.is_needed:
                version.num_bytes = version.served.joinpath(WEIGHTS_NAME).stat().st_size

    @contextlib.contextmanager
    def _writing(self, version: AdapterVersion) -> Iterator[None]:
        """Make errors of a copy's conversion those of the adapter."""
        try:
            yield
        except ModelNotFoundError as error:
            raise AdapterLoadError(version.name, f"adapter {version.name!r} could not be converted: {error}") from error
        except OSError as error:
            raise AdapterLoadError(
                version.name, f"adapter {version.name!r} could not be written for vLLM into {self._folder}: {error}"
            ) from error

    def _is_there(self, version: AdapterVersion) -> bool:
        """Return whether a copy is on disk: a cleaner of temporary files may have taken one that was counted."""
        if version not in self._sizes:
            return False
        if version.path.joinpath(WEIGHTS_NAME).exists():
            return True
        logger.warning("the copy of adapter %s is gone from %s: it is made again", version.name, self._folder)
        self._num_bytes -= self._sizes.pop(version)
        shutil.rmtree(version.snapshot.folder, ignore_errors=True)
        return False

    def _delete(self, folder: Path) -> None:
        shutil.rmtree(folder, ignore_errors=True)
        if self._closed:
            with contextlib.suppress(OSError):  # made anew by work that outlived the engine
                self._folder.rmdir()

    def _count(self, version: AdapterVersion) -> None:
        size = sum(path.stat().st_size for path in version.snapshot.folder.rglob("*") if path.is_file())
        self._num_bytes += size - self._sizes.get(version, 0)
        self._sizes[version] = size
        self._use(version)
        if self._max_bytes is not None and version.origin is not None:
            self._digests[version.origin] = version.snapshot.digest
        self._make_room(keep=version)

    def _use(self, version: AdapterVersion) -> None:
        cost = version.origin.refetch_cost if version.origin is not None else None
        self._values[version] = self._clock + (cost or 0.0)

    def _make_room(self, *, keep: AdapterVersion | None = None) -> None:
        while self._max_bytes is not None and self._num_bytes > self._max_bytes:
            may_go = [
                version
                for version in self._sizes
                if version is not keep and not version.num_uses and version.origin is not None
            ]
            if not may_go:
                return
            going = min(may_go, key=lambda version: (self._is_last_of_its_content(version), self._values[version]))
            self._clock = max(self._clock, self._values[going])
            self._num_bytes -= self._sizes.pop(going)
            shutil.rmtree(going.snapshot.folder, ignore_errors=True)

    def _is_last_of_its_content(self, version: AdapterVersion) -> bool:
        """Return whether its source now holds other content, so that the copy could not be made again."""
        assert version.origin is not None
        return self._digests.get(version.origin, version.snapshot.digest) != version.snapshot.digest


def _check(name: str, folder: Path, *, allow_pickle: bool, strict: bool) -> tuple[Snapshot, AdapterManifest, Extras]:
    """Check a private copy: nobody else writes to it, so that what is served is what was checked."""
    if allow_pickle:
        convert_pickle(name, folder)
    form = convert(name, folder)
    manifest = read_saved(name, read_manifest(name, folder))
    extras = read_extras(name, folder, strict=strict)
    if manifest.plain_config is not None:
        (folder / CONFIG_NAME).write_text(json.dumps(manifest.plain_config))
    manifest = manifest.with_zeros(check_finite(name, folder / WEIGHTS_NAME))
    extras = with_sound_template(name, extras, strict=strict)
    return Snapshot(folder, digest_of(folder, extras=extras.file_names), form), manifest, extras


def _closed() -> EngineClosedError:
    return EngineClosedError("the engine was closed while an adapter was loaded: load it into a new one")


def _is_full(error: BaseException) -> bool:
    """Return whether a disk was full.

    Safetensors reports that only in its message, and ``CorruptAdapterError`` may wrap it.
    """
    cause = error.__cause__ if isinstance(error, CorruptAdapterError) else error
    if isinstance(cause, OSError):
        return cause.errno in _DISK_IS_FULL
    return any(f"(os error {number})" in str(cause) for number in _DISK_IS_FULL)
