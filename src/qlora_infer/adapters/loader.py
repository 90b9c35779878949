"""The loader, which prepares an adapter, checks it against the model, loads it and publishes its name."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future
from typing import Any, Protocol

from qlora_infer.adapters import preflight
from qlora_infer.adapters.memory import HostMemory
from qlora_infer.adapters.registry import AdapterRegistry
from qlora_infer.adapters.version import AdapterVersion, LoadedAdapter
from qlora_infer.errors import AdapterLoadError, EngineClosedError, EngineDeadError
from qlora_infer.files.lineage import lineage
from qlora_infer.model.modules import ModelModules
from qlora_infer.model.weights import BaseWeights
from qlora_infer.plan.memory import DEFAULT_RANK
from qlora_infer.sources.blend import BlendSource
from qlora_infer.sources.source import Source

logger = logging.getLogger("qlora_infer")

#: With ``max_lora_rank="auto"``: the least rank that adapters at the start make room for.
LEAST_MAX_LORA_RANK = 16

#: Seconds that an adapter may take into host memory, and one with DoRA, whose first load computes the norms of a
#: model's weights. What a load that took longer has computed is kept for the next.
READ_TIMEOUT, DORA_TIMEOUT = 300.0, 3600.0


class DrivingThread(Protocol):
    """The thread on which the engine's driving methods may be called."""

    def call(self, function: Callable[..., Any], *args: Any) -> Any:
        """Run a function there, between two steps, and return what it returns."""
        ...


class AdapterLoader:
    """Loads, replaces, takes back and pins adapters while requests run.

    Any thread may use it. What is slow (downloads, copies, checks) happens on the thread that asks; only the load
    into the engine happens on the driving thread.

    Args:
        registry: Names and versions.
        memory: What is in host memory; only touched on the driving thread.
        driving: That thread.
        model: The name of the model that is served.
        base: Its tensors, for adapters that are LoRA only together with them.
        vocabulary: Tells the tokens of its tokenizer; ``None`` where any token is known.
    """

    def __init__(
        self,
        registry: AdapterRegistry,
        memory: HostMemory,
        driving: DrivingThread,
        *,
        model: str,
        base: BaseWeights | None = None,
        vocabulary: Callable[[], Mapping[str, int] | None],
    ) -> None:
        self._registry = registry
        self._memory = memory
        self._driving = driving
        self._model = model
        self._base = base
        self._vocabulary = vocabulary
        self._waiting: dict[object, Future[LoadedAdapter]] = {}
        self.model_modules = ModelModules({})
        self.max_lora_rank = 0

    def prepare(self, name: str, source: Source, *, allow_pickle: bool = False, strict: bool = False) -> AdapterVersion:
        """Everything that can be done without the model; raises ``AdapterError``."""
        version = self._registry.prepare(check_name(name), source, allow_pickle=allow_pickle, strict=strict)
        version.lineage = lineage(version.manifest.base_model, self._model)
        return version

    def load(
        self,
        name: str,
        source: Source,
        *,
        share: float = 1.0,
        allow_pickle: bool = False,
        strict: bool = False,
        expect: str | int | None = None,
    ) -> LoadedAdapter:
        """Load a source under a name; the adapters of a blend stay until it has been written."""
        with contextlib.ExitStack() as stack:
            if isinstance(source, BlendSource):
                versions = {part: stack.enter_context(self._registry.in_use(part)) for part in source.adapters}
                for version in versions.values():
                    self._registry.fetch(version)
                named = {
                    part: (f"{version.name}@{version.number}", stack.enter_context(self._registry.plain(version)))
                    for part, version in versions.items()
                }
                source = source.of(named)
            return self._replace(name, source, share=share, allow_pickle=allow_pickle, strict=strict, expect=expect)

    def _replace(
        self,
        name: str,
        source: Source,
        *,
        share: float,
        allow_pickle: bool,
        strict: bool,
        expect: str | int | None,
    ) -> LoadedAdapter:
        """Prepare and publish, one at a time under each name; equal calls that wait for their turn are one."""
        name = check_name(name)

        def load(call: object = None) -> LoadedAdapter:
            with self._registry.loading(name), self._counting_errors():
                # Who calls from now on may mean what the source holds from now on.
                self._waiting.pop(call, None)
                self._registry.require_version(name, expect)
                version = self.prepare(name, source, allow_pickle=allow_pickle, strict=strict)
                return self.publish(version, share=share, strict=strict, expect=expect)

        if expect is not None or source.refetch_cost is None:
            return load()
        call = (name, source, share, allow_pickle, strict)
        mine: Future[LoadedAdapter] = Future()
        first = self._waiting.setdefault(call, mine)
        try:
            if first is not mine:
                return first.result()
            try:
                mine.set_result(load(call))
            except BaseException as error:
                self._waiting.pop(call, None)
                why = f"the call that loaded adapter {name!r} was interrupted: try again"
                mine.set_exception(error if isinstance(error, Exception) else AdapterLoadError(name, why))
                raise
            return mine.result()
        finally:
            del mine, first  # else a cycle: an error has this frame in its traceback, and the future has the error

    def publish(
        self, version: AdapterVersion, *, share: float = 1.0, strict: bool = False, expect: str | int | None = None
    ) -> LoadedAdapter:
        """Hold a prepared version against the model, load it, and move its name over."""
        version.share = share
        current = self._registry.current(version.name)
        is_same = current is not None and current.snapshot.digest == version.snapshot.digest
        if current is not None and is_same and not (strict and current.extras.left_out):
            self._registry.discard(version)
            current.share = share
            if version.origin is not None:  # where it is fetched from again, from now on
                current.source, current.origin = version.source, version.origin
                current.allow_pickle = version.allow_pickle
            return current.record()
        try:
            version.fit, version.extras = preflight.check_with_extras(
                version.name,
                version.manifest,
                version.extras,
                self.model_modules,
                vocabulary=self._vocabulary,
                max_lora_rank=self.max_lora_rank,
                base=self._base,
                strict=strict,
            )
            with self._registry.in_use(version):  # its copy stays
                if not version.fit.is_vllms_own(self.model_modules):
                    self._registry.serve(version)
                self._load(version)
                self._registry.publish(version, expect=expect)
        except BaseException:
            self._forget(version)
            self._registry.discard(version)
            raise
        self._log_fit(version)
        self._log_extras(version)
        return version.record()

    def rollback(self, name: str) -> LoadedAdapter:
        """Load the version before, and move the name back to it."""
        # The version is in use meanwhile, because another thread may unload the name.
        with self._registry.loading(check_name(name)), self._registry.in_use(self._registry.before(name)) as before:
            self._load(before)
            version = self._registry.rollback(name)
        logger.info("adapter %r is version %d again", name, version.number)
        return version.record()

    def pin(self, name: str) -> None:
        """Keep an adapter in host memory."""
        with self._registry.in_use(name) as version:
            self._load(version)
            self._driving.call(self._memory.pin, version)
        if self._registry.current(version.name) is None:  # it was unloaded before it was pinned
            self._unpin(version.name)

    def unpin(self, name: str) -> None:
        """Allow an adapter to leave host memory again."""
        with self._registry.in_use(name) as version:
            self._driving.call(self._memory.unpin, version.name)

    def unload(self, name: str) -> None:
        """Forget a name, and that it was pinned."""
        self._registry.unload(name)
        self._unpin(name)

    def prefetch(self, names: Iterable[str]) -> None:
        """Begin to read adapters into host memory, as far as there is room."""
        names = list(names)
        self._registry.require(names)
        for name in names:
            with self._registry.in_use(name) as version:
                self._driving.call(self._memory.prefetch, version)

    def choose_rank(self, max_lora_rank: int | str, versions: Sequence[AdapterVersion]) -> int:
        """Return the rank that the engine has to provide for."""
        if isinstance(max_lora_rank, int):
            self.max_lora_rank = max_lora_rank
        elif not versions:
            self.max_lora_rank = DEFAULT_RANK
        else:
            ranks = [version.manifest.rank_needed for version in versions]
            self.max_lora_rank = preflight.lora_rank_for([LEAST_MAX_LORA_RANK, *ranks])
        return self.max_lora_rank

    @contextlib.contextmanager
    def _counting_errors(self) -> Iterator[None]:
        try:
            yield
        except Exception as error:
            self._memory.recorder.count_failure(error)
            raise

    def _load(self, version: AdapterVersion) -> None:
        """Load a version into host memory and wait for it, while steps go on."""
        self._registry.fetch(version)
        loaded: Future[None] = self._driving.call(self._memory.load, version)
        seconds = DORA_TIMEOUT if version.manifest.magnitudes else READ_TIMEOUT
        try:
            loaded.result(seconds)
        except TimeoutError as error:
            why = f"adapter {version.name!r} was not read within {seconds:g} s"
            raise AdapterLoadError(version.name, why) from error
        finally:
            loaded.cancel()  # nobody waits for it any more
            del loaded  # else a cycle: an error has this frame in its traceback, and the future has the error

    def _unpin(self, name: str) -> None:
        with contextlib.suppress(EngineClosedError, EngineDeadError):
            self._driving.call(self._memory.unpin, name)

    def _forget(self, version: AdapterVersion) -> None:
        """Take what did not come to serve out of memory."""
        with contextlib.suppress(EngineClosedError, EngineDeadError):
            self._driving.call(self._memory.evict, version)
            if self._registry.current(version.name) is None:
                self._memory.recorder.forget(version.name)

    def _log_fit(self, version: AdapterVersion) -> None:
        assert version.fit is not None
        logger.info("adapter %r loaded as version %d: %s", version.name, version.number, version.fit)
        if version.snapshot.format != "PEFT":
            logger.info("adapter %r was converted to PEFT's LoRA from %s", version.name, version.snapshot.format)
        if version.fit.changes_nothing(version.manifest):
            logger.warning(
                "adapter %r changes nothing: lora_A or lora_B is all zeros in each of the %d modules that are applied. "
                "Was it saved before its training began?",
                version.name,
                version.fit.num_modules,
            )
        trained_on = version.manifest.base_model
        if version.lineage == "quantized":
            logger.info("adapter %r was trained on %s, of which %s is a build", version.name, trained_on, self._model)
        elif version.lineage == "other":
            logger.warning(
                "adapter %r says that it was trained on %s, and this engine serves %s: its shapes fit, and its answers "
                "may be poor (verify_adapter tells how much it changes)",
                version.name,
                trained_on,
                self._model,
            )

    def _log_extras(self, version: AdapterVersion) -> None:
        for part, reason in version.extras.left_out.items():
            logger.warning("adapter %r is loaded without %s: %s (strict=True refuses it)", version.name, part, reason)
        for token, name in version.extras.renamed_tokens.items():
            logger.warning(
                "adapter %r has the name %a for the model's token %a: prompts need the model's name",
                version.name,
                token[:80],
                name[:80],
            )


def check_name(name: str) -> str:
    """Return the name if an adapter may have it; otherwise raise ``TypeError`` or ``ValueError``."""
    if not isinstance(name, str):
        raise TypeError(f"an adapter's name must be a string, got {name!r}")
    if not name or not name.isprintable():
        raise ValueError(f"an adapter's name must be printable text, got {name!r}")
    if "@" in name:
        raise ValueError(f"an adapter's name must not have an '@', which stands before a version, got {name!r}")
    return name
