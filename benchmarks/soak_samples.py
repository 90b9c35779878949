"""Sample the quantities that soak.py watches while nothing runs, and detect growth."""

from __future__ import annotations

import contextlib
import gc
import itertools
import math
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path

import psutil  # type: ignore[import-untyped]  # vLLM depends on it
from attrs import asdict, frozen

from qlora_infer import QuantizedLoRAEngine
from qlora_infer._vllm.shared_memory import segments_of
from qlora_infer.files.scratch import scratch_folder

MEBIBYTE = 1 << 20

#: By quantity, the rise over a whole run up to which it has not grown: pages, a pool's threads, a cache's entries.
FLOORS: Mapping[str, float] = {
    "rss_caller": 8.0,
    "rss_engine": 8.0,
    "threads_caller": 2.0,
    "threads_engine": 2.0,
    "files_caller": 2.0,
    "files_engine": 2.0,
    "processes": 0.5,
    "kv_usage": 0.001,
    "resident": 2.0,
    "store": 4.0,
    "segments": 0.5,
    "objects": 5000.0,
}

#: What allocators and caches move for minutes; in runs that are shorter than this many hours, it is not judged.
SLOW_QUANTITIES, SLOW_HOURS = ("rss_caller", "rss_engine", "objects"), 0.25

#: The share of the samples, at the beginning, in which caches and pools fill.
WARM_UP = 0.2
NUM_BLOCKS = 8
#: Student's t for 6 degrees of freedom: 1 in 1,000 runs without growth is above it.
STUDENT = 5.21


@frozen
class Sample:
    """An engine and its processes at one moment, while no request runs.

    Attributes:
        hours: Since the traffic began.
        requests: Requests so far.
        rss_caller: MiB in memory of this process.
        rss_engine: MiB in memory of all processes that it has started.
        threads_caller: Threads of this process.
        threads_engine: Threads of the others.
        files_caller: Open files and sockets of this process.
        files_engine: Open files and sockets of the others.
        processes: How many the others are.
        kv_usage: The share of KV blocks in use.
        kv_busy: That share a moment before, while requests ran.
        resident: Versions of adapters in host memory.
        store: MiB of copies on disk.
        segments: Segments of shared memory that these processes have mapped.
        objects: Objects that Python's garbage collector tracks in this process.
    """

    hours: float
    requests: int
    rss_caller: float
    rss_engine: float
    threads_caller: int
    threads_engine: int
    files_caller: int
    files_engine: int
    processes: int
    kv_usage: float
    kv_busy: float
    resident: int
    store: float
    segments: int
    objects: int

    @classmethod
    def take(cls, engine: QuantizedLoRAEngine, *, hours: float, requests: int, kv_busy: float) -> Sample:
        """Look at the engine and the processes."""
        gc.collect()
        caller, stats = psutil.Process(), engine.stats()
        others = _Processes.read(caller.children(recursive=True))
        return cls(
            hours=hours,
            requests=requests,
            rss_caller=caller.memory_info().rss / MEBIBYTE,
            rss_engine=others.rss,
            threads_caller=caller.num_threads(),
            threads_engine=others.threads,
            files_caller=caller.num_fds(),
            files_engine=others.files,
            processes=others.number,
            kv_usage=stats.kv_cache_usage,
            kv_busy=kv_busy,
            resident=sum(adapter.num_resident for adapter in stats.residency.values()),
            store=_size(scratch_folder()) / MEBIBYTE,
            segments=len(segments_of([caller.pid, *others.pids])),
            objects=len(gc.get_objects()),
        )


@frozen
class _Processes:
    pids: tuple[int, ...]
    rss: float
    threads: int
    files: int

    @property
    def number(self) -> int:
        return len(self.pids)

    @classmethod
    def read(cls, processes: Sequence[psutil.Process]) -> _Processes:
        rows = []
        for process in processes:
            with contextlib.suppress(psutil.Error):  # it has ended meanwhile
                rows.append((process.pid, process.memory_info().rss, process.num_threads(), process.num_fds()))
        pids, rss, threads, files = zip(*rows, strict=True) if rows else ((), (), (), ())
        return cls(tuple(pids), sum(rss) / MEBIBYTE, sum(threads), sum(files))


def _size(folder: Path) -> int:
    total = 0
    for path in folder.rglob("*"):
        with contextlib.suppress(OSError):
            total += path.lstat().st_size
    return total


@frozen
class Growth:
    """The growth of a quantity after the warm-up.

    Attributes:
        quantity: A field of ``Sample``.
        first: Its mean in the first of the blocks of samples.
        last: Its mean in the last one.
        per_hour: The slope of the straight line through the means of all blocks.
        noise: What such a slope may be without any growth, from the blocks' distances to the line.
        hours: The time between the first and the last sample.
        is_judged: Whether the run was long enough for this quantity.
    """

    quantity: str
    first: float
    last: float
    per_hour: float
    noise: float
    hours: float
    is_judged: bool = True

    @property
    def is_beyond_noise(self) -> bool:
        """True if it grew by more than the noise and by more than the quantity's floor."""
        return self.is_judged and self.per_hour > self.noise and self.per_hour * self.hours > FLOORS[self.quantity]


def growths(samples: Sequence[Sample]) -> list[Growth]:
    """Fit a line to each quantity; nothing where there are fewer samples than blocks."""
    settled = samples[math.ceil(len(samples) * WARM_UP) :]
    if len(settled) < NUM_BLOCKS:
        return []
    edges = [round(block * len(settled) / NUM_BLOCKS) for block in range(NUM_BLOCKS + 1)]
    blocks = [settled[begin:end] for begin, end in itertools.pairwise(edges)]
    return [_growth(quantity, blocks, is_short=samples[-1].hours < SLOW_HOURS) for quantity in FLOORS]


def _growth(quantity: str, blocks: Sequence[Sequence[Sample]], *, is_short: bool) -> Growth:
    # Samples beside each other resemble each other, so that the noise is told by the means of whole blocks.
    hours = [statistics.fmean(sample.hours for sample in block) for block in blocks]
    values = [statistics.fmean(getattr(sample, quantity) for sample in block) for block in blocks]
    slope, intercept = statistics.linear_regression(hours, values)
    residuals = [value - slope * hour - intercept for hour, value in zip(hours, values, strict=True)]
    middle = statistics.fmean(hours)
    spread = math.sqrt(sum((hour - middle) ** 2 for hour in hours))
    error = math.sqrt(sum(residual**2 for residual in residuals) / (len(blocks) - 2)) / spread
    return Growth(
        quantity,
        values[0],
        values[-1],
        slope,
        STUDENT * error,
        blocks[-1][-1].hours - blocks[0][0].hours,
        is_judged=not (is_short and quantity in SLOW_QUANTITIES),
    )


def sample_line(sample: Sample) -> dict[str, object]:
    """Return a line of JSON's content."""
    return {"kind": "sample", **asdict(sample)}
