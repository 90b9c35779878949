"""Measure the gaps between the tokens of streaming requests while adapters are loaded.

    python benchmarks/load_pause.py --json runs.jsonl

Some requests stream from the base model. One after another, adapters of rank 64 come and answer a request: cold, never
seen before, then warm, in host memory and not in the one slot. Plain vLLM (with our LoRA kernels, so that only the
loading differs) is given a request with a new ``LoRARequest``; ours ``load_adapter`` and then the request.
"""

from __future__ import annotations

import argparse
import itertools
import statistics
import threading
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Protocol

import common
from runs import keep

ENDLESS = {"temperature": 0.0, "ignore_eos": True, "max_tokens": 100_000}
ONE = {"temperature": 0.0, "max_tokens": 1}


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quantization", default="awq", choices=["awq", "gptq", "bitsandbytes", "none"])
    parser.add_argument("--streams", type=int, default=4)
    parser.add_argument("--adapters", type=int, default=12)
    parser.add_argument("--rank", type=int, default=64)
    parser.add_argument("--repeats", type=int, default=2)
    parser.add_argument("--json", type=Path, help="a file that every run is appended to")
    arguments = parser.parse_args()
    settings = {name: getattr(arguments, name) for name in ("quantization", "streams", "adapters", "rank")}
    settings["machine"] = common.machine()
    model = common.model_for(arguments.quantization)
    limits = {
        "max_loras": 1,
        "max_lora_rank": arguments.rank,
        "max_cpu_loras": arguments.adapters * arguments.repeats + 1,
        "max_model_len": 8192,
        "max_num_seqs": 16,
        "enable_prefix_caching": False,
    }
    total = arguments.adapters * arguments.repeats
    with common.adapters_for(model, total, rank=arguments.rank) as adapters:
        sides: dict[str, Side] = {
            "plain vLLM": PlainSide(common.Plain(model, arguments.quantization, adapters, our_kernels=True, **limits)),
            "ours": OurSide(common.Ours(model, arguments.quantization, {}, **limits), adapters),
        }
        table = measure(sides, list(adapters), arguments.streams, arguments.repeats, settings, arguments.json)
        for side in sides.values():
            side.close()
    print(common.machine())
    print(
        f"{arguments.streams} streams, {arguments.adapters} adapters of rank {arguments.rank} "
        f"({arguments.repeats} times), {arguments.quantization}"
    )
    print(table)


def measure(
    sides: dict[str, Side],
    names: list[str],
    num_streams: int,
    repeats: int,
    settings: Mapping[str, Any],
    path: Path | None,
) -> str:
    """Return the table: each side in turn, without loads, with cold ones, with warm ones.

    Args:
        sides: The two engines by their names.
        names: The adapters to load.
        num_streams: Requests that stream meanwhile.
        repeats: Turns, each with its own share of the adapters.
        settings: What each line of JSON has besides.
        path: The file of these lines; ``None`` for none.
    """
    rows: dict[tuple[str, str], list[tuple[list[float], list[float]]]] = {}
    for repeat in range(repeats):
        batch = names[repeat::repeats]
        for side_name, side in list(sides.items())[:: 1 if repeat % 2 == 0 else -1]:
            for phase, chosen in (("no loads", []), ("cold", batch), ("warm", batch)):
                measured = side.measure(num_streams, chosen)
                rows.setdefault((phase, side_name), []).append(measured)
                loads, gaps = ([round(1e3 * seconds, 2) for seconds in times] for times in measured)
                found = {"phase": phase, "load_ms": loads, "gap_ms": gaps}
                keep(path, {**settings, "side": side_name, "pair": repeat, **found})
                print(f"  {phase}, {side_name}: {len(measured[1])} gaps", flush=True)
    table = []
    for (phase, side_name), runs in sorted(rows.items(), key=lambda row: ("no loads", "cold", "warm").index(row[0][0])):
        loads = [load for run in runs for load in run[0]]
        gaps = sorted(gap * 1e3 for run in runs for gap in run[1])
        load = statistics.median(loads) * 1e3 if loads else "-"
        table.append((phase, side_name, load, statistics.median(gaps), gaps[int(len(gaps) * 0.99)], gaps[-1]))
    header = ("", "", "load and first token, ms", "gap between tokens, median", "p99", "longest")
    return common.table(header, table)


class Side(Protocol):
    """One of the two that are compared."""

    def measure(self, num_streams: int, names: list[str]) -> tuple[list[float], list[float]]:
        """Seconds of each load, and between the tokens of the streams."""
        ...

    def close(self) -> None:
        """End its core."""
        ...


class PlainSide:
    """Plain vLLM, stepped by hand as its documentation shows."""

    def __init__(self, plain: common.Plain) -> None:
        self._plain = plain
        self._engine = plain.llm.llm_engine
        self._numbers = itertools.count()

    def measure(self, num_streams: int, names: list[str]) -> tuple[list[float], list[float]]:
        """Seconds of each load, and between the tokens of the streams."""
        streams = [self._add("Once upon a time", ENDLESS, None) for _ in range(num_streams)]
        clock = Clock(streams)
        self._steps(clock, 20)
        clock.clear()
        loads = []
        for name in names or [None] * 12:
            self._steps(clock, 10)
            if name is None:
                continue
            began = time.perf_counter()
            request = self._add("ahoy", ONE, name)
            while request not in self._step(clock):
                pass
            loads.append(time.perf_counter() - began)
        self._engine.abort_request(streams)
        while self._engine.has_unfinished_requests():
            self._engine.step()
        return loads, clock.gaps

    def _add(self, prompt: str, params: dict[str, Any], name: str | None) -> str:
        from vllm import SamplingParams

        number = str(next(self._numbers))
        self._engine.add_request(number, prompt, SamplingParams(**params), lora_request=self._plain._adapters[name])
        return number

    def _steps(self, clock: Clock, number: int) -> None:
        for _ in range(number):
            self._step(clock)

    def _step(self, clock: Clock) -> set[str]:
        outputs = self._engine.step()
        for output in outputs:
            clock.tick(output.request_id)
        return {output.request_id for output in outputs if output.finished}

    def close(self) -> None:
        """End its core."""
        self._plain.close()


class OurSide:
    """Ours: a thread for each stream, and one that loads."""

    def __init__(self, ours: common.Ours, adapters: dict[str, Any]) -> None:
        self._ours = ours
        self._engine = ours.engine
        self._adapters = adapters

    def measure(self, num_streams: int, names: list[str]) -> tuple[list[float], list[float]]:
        """Seconds of each load, and between the tokens of the streams."""
        handles = [self._engine.add_request("Once upon a time", ENDLESS) for _ in range(num_streams)]
        clock = Clock([handle.request_id for handle in handles])
        threads = [threading.Thread(target=self._read, args=(handle, clock)) for handle in handles]
        for thread in threads:
            thread.start()
        clock.wait(20)
        clock.clear()
        loads = []
        for name in names or [None] * 12:
            clock.wait(10)
            if name is None:
                continue
            began = time.perf_counter()
            if name not in self._engine.adapters:
                self._engine.load_adapter(name, self._adapters[name])
            self._engine.add_request("ahoy", ONE, adapter=name).result(timeout=60)
            loads.append(time.perf_counter() - began)
        gaps = list(clock.gaps)
        for handle in handles:
            handle.cancel()
        for thread in threads:
            thread.join()
        return loads, gaps

    def _read(self, handle: Any, clock: Clock) -> None:
        from qlora_infer import RequestCancelledError

        try:
            for _ in handle:
                clock.tick(handle.request_id)
        except RequestCancelledError:
            pass

    def close(self) -> None:
        """End its core."""
        self._ours.close()


class Clock:
    """The times when tokens came."""

    def __init__(self, streams: list[str]) -> None:
        self._last: dict[str, float] = {}
        self._streams = set(streams)
        self._num_ticks = 0
        self.gaps: list[float] = []

    def tick(self, stream: str) -> None:
        """Note that a token has come."""
        if stream not in self._streams:
            return
        now = time.perf_counter()
        if stream in self._last:
            self.gaps.append(now - self._last[stream])
        self._last[stream] = now
        self._num_ticks += 1

    def clear(self) -> None:
        """Begin anew."""
        self.gaps.clear()

    def wait(self, num_steps: int) -> None:
        """Sleep for so many tokens of each stream."""
        until = self._num_ticks + num_steps * len(self._streams)
        _wait_for(lambda: self._num_ticks >= until)


def _wait_for(condition: Callable[[], bool]) -> None:
    while not condition():
        time.sleep(0.002)


if __name__ == "__main__":
    main()
