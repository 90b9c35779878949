"""Measure the queue: microseconds a request, with few and with very many waiting requests over 1,000 adapters.

    python benchmarks/queue_cost.py

The first column is the queue alone: append, admit, charge and leave of each request, while so many wait all the time.
The second is everything around the engine: add_request, the driving thread, the handle and its result, on the fake
engine, whose own work is in it too.
"""

from __future__ import annotations

import argparse
import itertools
import random
import statistics
import tempfile
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import common

from qlora_infer.requests.pending import PendingRequest
from qlora_infer.requests.queue import RequestQueue
from qlora_infer.requests.request import GenerationRequest
from qlora_infer.testing import FakeEngine, fake_engine, write_adapter

NUM_ADAPTERS = 1000
NUM_MEASURED = 20_000


class Version(SimpleNamespace):
    """An adapter as the queue sees it."""

    __hash__ = object.__hash__  # type: ignore[assignment]
    __eq__ = object.__eq__  # type: ignore[assignment]


def queue_alone(num_waiting: int) -> float:
    """Microseconds for one request to go through a queue in which ``num_waiting`` others wait."""
    generator = random.Random(0)
    versions: list[Any] = [Version(name=f"a{i}", share=1.0, num_running=0) for i in range(NUM_ADAPTERS)]
    queue = RequestQueue(max_loras=8, max_num_seqs=256)
    ids = itertools.count()

    def request() -> PendingRequest:
        return PendingRequest(GenerationRequest(str(next(ids)), "", None, generator.choice(versions)))

    for _ in range(num_waiting):
        queue.append(request())
    coming = [request() for _ in range(NUM_MEASURED)]
    running: list[PendingRequest] = []
    num_done = 0
    began = time.perf_counter()
    while num_done < NUM_MEASURED:
        while (pending := queue.admit()) is not None:
            running.append(pending)
            queue.charge(pending, 20)
        queue.count_step()
        # Each step, a quarter of what runs has finished, and as many new requests have come.
        leaving, running = running[: len(running) // 4 + 1], running[len(running) // 4 + 1 :]
        for pending in leaving:
            queue.charge(pending, 32)
            queue.leave(pending)
            if num_done < NUM_MEASURED:
                queue.append(coming[num_done])
            num_done += 1
    return (time.perf_counter() - began) / NUM_MEASURED * 1e6


def whole_engine(num_waiting: int, adapters: dict[str, Path]) -> float:
    """Microseconds for one request from add_request to its result, when ``num_waiting`` are added at once."""
    names = list(adapters)
    with fake_engine(backend=FakeEngine(), adapters=adapters, max_loras=8, max_cpu_loras=NUM_ADAPTERS) as engine:
        params = engine._backend.sampling_params({"max_tokens": 1})
        began = time.perf_counter()
        handles = [engine.add_request("a", params, adapter=names[i % len(names)]) for i in range(num_waiting)]
        for handle in handles:
            handle.result()
        return (time.perf_counter() - began) / num_waiting * 1e6


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=3)
    arguments = parser.parse_args()
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        adapters = {f"a{i}": write_adapter(Path(folder) / str(i), rank=1, seed=i) for i in range(NUM_ADAPTERS)}
        for num_waiting in (100, 10_000, 100_000):
            alone = [queue_alone(num_waiting) for _ in range(arguments.repeats)]
            whole = [whole_engine(num_waiting, adapters) for _ in range(arguments.repeats)]
            rows.append((f"{num_waiting:,}", statistics.median(alone), statistics.median(whole)))
    print(common.machine())
    print(common.table(("waiting requests", "queue, µs a request", "with the fake engine, µs a request"), rows))


if __name__ == "__main__":
    main()
