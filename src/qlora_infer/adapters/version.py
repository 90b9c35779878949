"""A version of an adapter, its number, and the record of it that users see."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from attrs import define, field, frozen

from qlora_infer.adapters.preflight import Fit
from qlora_infer.display import Displayed, DisplayedCollection, Table
from qlora_infer.files.extras import Extras
from qlora_infer.files.lineage import Lineage
from qlora_infer.files.manifest import AdapterManifest
from qlora_infer.files.snapshot import Snapshot
from qlora_infer.sources.source import Source

#: So many names that are gone are remembered.
NUM_REMEMBERED = 10_000


@frozen
class LoadedAdapter(Displayed):
    """A loaded adapter; ``print`` shows a table.

    Attributes:
        name: The name for requests.
        version: The number of the version under this name, from 1. It is never reused for other content, and requests
            can name it as ``"name@2"``.
        int_id: The integer id of the version in vLLM, never reused.
        source: The source, without any token.
        digest: The SHA-256 of the files, in hexadecimal digits.
        rank: The largest rank of a module.
        num_modules: The number of the model's modules that the adapter changes.
        num_model_modules: The number of the model's modules that an adapter can change.
        num_bytes: The size of the tensors in bytes.
        base_model: The base model in the adapter's config; ``None`` if it has none.
        lineage: The relation of that model to the engine's: ``"same"``, ``"quantized"`` (another quantization of it),
            ``"other"``, or ``"unknown"``.
        share: The adapter's weight beside other adapters; the default is 1.
        carries: The files in use beside config and weights, such as ``chat_template.jinja``.
        format: The source's format: ``"PEFT"``, or a converted one, such as ``"MLX"``.
    """

    name: str
    version: int
    int_id: int
    source: str
    digest: str = field(repr=lambda digest: digest[:12])
    rank: int
    num_modules: int
    num_model_modules: int
    num_bytes: int
    base_model: str | None
    lineage: Lineage = "unknown"
    share: float = 1.0
    carries: tuple[str, ...] = ()
    format: str = "PEFT"

    def _tables(self) -> Sequence[Table]:
        rows = [
            ("name", self.name),
            ("version", f"{self.version}, {self.digest[:12]}"),
            ("source", self.source),
            ("format", self.format),
            ("rank", str(self.rank)),
            ("modules", f"{self.num_modules} of {self.num_model_modules}"),
            ("size", f"{_mebibytes(self.num_bytes)} MiB"),
            ("trained on", f"{self.base_model or 'it does not say'} ({self.lineage})"),
            ("share", str(self.share)),
            ("carries", ", ".join(self.carries) or "nothing beside its weights"),
        ]
        return [Table(rows)]


class LoadedAdapters(DisplayedCollection, Mapping[str, LoadedAdapter]):
    """Adapters by name, as they were at one moment; a copy that does not change."""

    def __init__(self, loaded: Mapping[str, LoadedAdapter] = {}) -> None:  # it is copied
        self._loaded = dict(loaded)

    def __getitem__(self, name: str) -> LoadedAdapter:
        return self._loaded[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._loaded)

    def __len__(self) -> int:
        return len(self._loaded)

    def __repr__(self) -> str:
        return repr(self._loaded)

    def _tables(self) -> Sequence[Table]:
        header = ("adapter", "version", "rank", "modules", "MiB", "share", "lineage", "source")
        rows = [
            (
                name,
                loaded.version,
                loaded.rank,
                f"{loaded.num_modules} of {loaded.num_model_modules}",
                _mebibytes(loaded.num_bytes),
                loaded.share,
                loaded.lineage,
                loaded.source,
            )
            for name, loaded in self.items()
        ]
        return [Table(rows, header, empty="no adapters")]


@define(eq=False)
class AdapterVersion:
    """One immutable content under a name, which a request uses from its first token to its last.

    ``vllm_name`` and ``int_id`` belong to this content alone. vLLM finds KV blocks by name and path and slots by the
    integer id, so neither can ever answer for other bytes.

    Attributes:
        name: The name for requests.
        int_id: Its integer id in vLLM.
        source: The text of its source, without any secret.
        origin: The source itself, token and all, where it can be fetched again; else ``None``.
        allow_pickle: Whether it may be read from a pickle.
        snapshot: The private copy that vLLM reads.
        manifest: The manifest of the copy.
        extras: The files beside its weights: a chat template, generation defaults, tokens.
        number: Its number under this name, given when it is published.
        lineage: How the model that it was trained on compares with this one.
        share: Its share of the engine beside other adapters.
        fit: How it fits the model; set once that has been checked.
        served: The copy in the running model's names, where vLLM needs one.
        num_bytes: The size of the tensors that vLLM reads.
        num_uses: Requests that wait for it or run on it, and calls that work with it.
        num_running: Requests that run on it, from the moment when the queue admits them.
        last_used: When it was last asked for, in seconds of ``time.monotonic()``.
        retired: Whether no request can name it any more, so that it ends with its last one.
        freed: Whether it has ended, and its files are gone.
    """

    name: str
    int_id: int
    source: str
    origin: Source | None
    allow_pickle: bool
    snapshot: Snapshot
    manifest: AdapterManifest
    extras: Extras
    number: int = 0
    lineage: Lineage = "unknown"
    share: float = 1.0
    fit: Fit | None = None
    served: Path | None = None
    num_bytes: int = field()
    num_uses: int = 0
    num_running: int = 0
    last_used: float = 0.0
    retired: bool = False
    freed: bool = False

    @num_bytes.default
    def _num_bytes(self) -> int:
        return self.manifest.num_bytes

    @property
    def vllm_name(self) -> str:
        """The name in vLLM."""
        return f"{self.name}#{self.int_id}@{self.snapshot.digest[:16]}"

    @property
    def path(self) -> Path:
        """The folder that vLLM reads it from."""
        return self.served or self.snapshot.folder

    def record(self) -> LoadedAdapter:
        """Return the record that users see."""
        assert self.fit is not None
        return LoadedAdapter(
            name=self.name,
            version=self.number,
            int_id=self.int_id,
            source=self.source,
            digest=self.snapshot.digest,
            rank=max([self.manifest.rank, *(module.rank for module in self.fit.conversion.modules.values())]),
            num_modules=self.fit.num_modules,
            num_model_modules=self.fit.num_model_modules,
            num_bytes=self.num_bytes,
            base_model=self.manifest.base_model,
            lineage=self.lineage,
            share=self.share,
            carries=self.extras.followed,
            format=self.snapshot.format,
        )


class VersionNumbers:
    """Numbers the versions of each name, 1 for the first; no number is given twice under a name.

    That holds also for a name that ends and comes again, so that ``"name@1"`` of before never means what came after. Of
    names that are gone only the last are remembered, so that ever new names take no memory. A name that is not known
    goes on after the largest number that was forgotten, for it may have been that one.

    It is not locked.

    Args:
        num_remembered: How many names that are gone are remembered.
    """

    def __init__(self, num_remembered: int = NUM_REMEMBERED) -> None:
        self._num_remembered = num_remembered
        self._newest: dict[str, int] = {}
        self._gone: dict[str, int] = {}  # the one that was longest ago comes first
        self._largest_forgotten = 0

    @property
    def num_names(self) -> int:
        """Names of which something is kept."""
        return len(self._newest) + len(self._gone)

    def next(self, name: str) -> int:
        """Return the number of a name's next version."""
        before = self._newest.get(name) or self._gone.pop(name, self._largest_forgotten)
        self._newest[name] = before + 1
        return before + 1

    def end(self, name: str) -> None:
        """Count a name that is gone, with all of its versions."""
        self._gone[name] = self._newest.pop(name)
        if len(self._gone) > self._num_remembered:
            longest_gone = next(iter(self._gone))
            self._largest_forgotten = max(self._largest_forgotten, self._gone.pop(longest_gone))


def _mebibytes(num_bytes: int) -> float:
    return round(num_bytes / (1 << 20), 1)
