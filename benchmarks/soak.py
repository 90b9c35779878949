"""Hours of traffic on one engine: does anything grow, get lost, or answer with another adapter's text?

    python benchmarks/soak.py --minutes 120 --json benchmarks/results/soak.jsonl
    python benchmarks/soak.py --fake --minutes 2

Threads and coroutines ask 200 adapters on 4 slots (Zipf): requests that are read, streamed, cancelled, left, too late
and too long. Meanwhile adapters are swapped, pushed from memory, rolled back, pinned, prefetched, hosted for one
request, and broken ones are loaded. Before, each content answers each prompt alone. Whenever no request runs, at each
sample, processes, memory and files are counted. It ends with a table, and with status 1 if a text was another one, a
request did not end exactly once, or anything grew beyond its noise. How long anything took decides nothing.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import common
from attrs import asdict, frozen
from soak_adapters import (
    PROMPTS,
    Content,
    ContentFake,
    Versions,
    broken_adapters,
    demo_contents,
    fake_contents,
    load_all,
    named,
)
from soak_samples import Growth, Sample, growths, sample_line
from soak_traffic import Counts, Traffic, balance, ledger_lines, too_long_prompt

from qlora_infer import QLoRAInferError, QuantizedLoRAEngine
from qlora_infer.testing import fake_engine

MAX_MODEL_LEN = 128

#: The engine's arguments; the copies of three quarters of the adapters fit on the disk.
SLOTS, IN_MEMORY, ON_DISK = 4, 16, 0.75


@frozen(kw_only=True)
class Load:
    """Say how much traffic there is, and for how long.

    Attributes:
        minutes: How long.
        interval: Seconds between samples.
        threads: Callers in threads.
        coroutines: Callers in coroutines.
        operators: Threads that change adapters.
        pause: Seconds between two calls of a caller, in the mean.
        margin: Nats between the best token and the second, below which a text is compared no further.
    """

    minutes: float
    interval: float = 20.0
    threads: int = 6
    coroutines: int = 10
    operators: int = 2
    pause: float = 0.2
    margin: float = 0.5


@frozen
class Verdict:
    """Judge a run.

    Attributes:
        faults: Texts that were others, requests that ended otherwise than they had to, errors; the first hundred.
        num_faults: How many there were.
        unbalanced: Where the callers' counts of ends and the engine's differ.
        growths: By quantity.
        counts: What was asked, and how it ended.
    """

    faults: Sequence[str]
    num_faults: int
    unbalanced: Sequence[str]
    growths: Sequence[Growth]
    counts: Mapping[str, Any]

    @property
    def grown(self) -> list[str]:
        """The quantities that grew."""
        return [growth.quantity for growth in self.growths if growth.is_beyond_noise]

    @property
    def passed(self) -> bool:
        """True if nothing was wrong."""
        return not (self.num_faults or self.unbalanced or self.grown)

    def __str__(self) -> str:
        lines = [
            json.dumps(self.counts),
            common.table(("quantity", "first", "last", "per hour", "noise", ""), [_row(row) for row in self.growths]),
            *self.faults,
            *self.unbalanced,
            *[f"{quantity} has grown" for quantity in self.grown],
        ]
        return "\n".join([*lines, f"{self.num_faults} faults: {'passed' if self.passed else 'FAILED'}"])


def _row(growth: Growth) -> tuple[object, ...]:
    note = "GROWN" if growth.is_beyond_noise else "" if growth.is_judged else "not judged"
    return (growth.quantity, growth.first, growth.last, growth.per_hour, growth.noise, note)


Write = Callable[[Mapping[str, Any]], None]


def soak(
    engine: QuantizedLoRAEngine,
    contents: Sequence[Content],
    broken: Sequence[Path],
    load: Load,
    *,
    max_model_len: int,
    write: Write,
) -> Verdict:
    """Load the contents, let traffic run over them, and judge it."""
    versions, names = Versions(), named(contents)
    before = Counts.read(engine.stats(), list(names))
    texts = load_all(engine, names, versions, margin=load.margin, report=_report)
    num_alone = len(texts)
    traffic = Traffic(
        engine, list(names), contents, texts, broken, versions, load.pause, too_long_prompt(max_model_len)
    )
    samples = []
    began = time.monotonic()
    traffic.start(num_threads=load.threads, num_coroutines=load.coroutines, num_operators=load.operators)
    try:
        while time.monotonic() - began < load.minutes * 60:
            time.sleep(load.interval)
            samples.append(_sample(traffic, names, began))
            write(sample_line(samples[-1]))
    except KeyboardInterrupt:
        _report("interrupted: what has been sampled is judged")
    except QLoRAInferError as error:
        traffic.ledger.fault(f"the run ended early: {error!r}")
    finally:
        traffic.stop()
    _wait_until_idle(traffic, names)
    counts = Counts.read(engine.stats(), list(names)).since(before)
    traffic.ledger.submitted(num_alone)
    traffic.ledger.ends["output"] += num_alone
    verdict = Verdict(
        tuple(traffic.ledger.faults),
        traffic.ledger.num_faults,
        balance(traffic.ledger, counts),
        growths(samples),
        ledger_lines(traffic.ledger),
    )
    write({"kind": "verdict", "passed": verdict.passed, **asdict(verdict)})
    return verdict


def _sample(traffic: Traffic, names: Mapping[str, Content], began: float) -> Sample:
    kv_busy = traffic.engine.stats().kv_cache_usage
    with traffic.gate.closed() as is_empty:
        if not is_empty:
            traffic.ledger.fault("calls have not ended when a sample was due")
        _wait_until_idle(traffic, names)
        # Whatever was cancelled is gone from the engine before the step that this takes.
        traffic.engine.generate(PROMPTS[0], {"max_tokens": 1}, use_tqdm=False)
        traffic.ledger.submitted()
        traffic.ledger.ends["output"] += 1
        hours = (time.monotonic() - began) / 3600
        sample = Sample.take(traffic.engine, hours=hours, requests=traffic.ledger.num_submitted, kv_busy=kv_busy)
    if sample.kv_usage:
        traffic.ledger.fault(f"{sample.kv_usage:.2%} of the KV blocks are in use, and no request runs")
    _report(
        f"{60 * sample.hours:.1f} min: {sample.requests} requests, {traffic.ledger.num_faults} faults, "
        f"{sample.rss_caller:.0f} + {sample.rss_engine:.0f} MiB"
    )
    return sample


def _wait_until_idle(traffic: Traffic, names: Mapping[str, Content], *, timeout: float = 60.0) -> None:
    """Wait for the streams that were left; the engine cancels them after their handles are gone."""
    deadline = time.monotonic() + timeout
    while Counts.read(traffic.engine.stats(), list(names)).num_unfinished:
        if time.monotonic() > deadline:
            traffic.ledger.fault(f"requests that nobody holds are unfinished after {timeout:.0f} s")
            return
        time.sleep(0.02)


def _report(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


@contextlib.contextmanager
def lines_to(path: Path | None) -> Iterator[Write]:
    """Yield what writes each line of JSON at once, so that an aborted run keeps its samples."""
    if path is None:
        yield lambda line: None
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w") as file:

        def write(line: Mapping[str, Any]) -> None:
            file.write(json.dumps(line) + "\n")
            file.flush()

        yield write


def some_engine(contents: Sequence[Content], *, is_fake: bool) -> QuantizedLoRAEngine:
    """Start an engine that is short of slots, host memory and disk."""
    num_bytes = sum(path.stat().st_size for content in contents for path in content.folder.iterdir())
    arguments: dict[str, Any] = {
        "max_loras": SLOTS,
        "max_lora_rank": 16,
        "max_cpu_loras": IN_MEMORY,
        "max_disk_bytes": int(ON_DISK * num_bytes),
        "max_model_len": MAX_MODEL_LEN,
        "engine_args": {"max_num_seqs": 16},
    }
    if is_fake:
        return fake_engine(backend=ContentFake(step_seconds=0.002, load_seconds=0.002), **arguments)
    return QuantizedLoRAEngine(common.model_for("awq"), **arguments)


def main() -> None:
    """Run it, and print the verdict."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=120.0)
    parser.add_argument("--adapters", type=int, default=200)
    parser.add_argument("--interval", type=float, help="seconds between samples; default: 20, or a twentieth of it all")
    parser.add_argument("--threads", type=int, default=6, help="callers in threads")
    parser.add_argument("--coroutines", type=int, default=10, help="callers in coroutines")
    parser.add_argument("--operators", type=int, default=2, help="threads that change adapters")
    parser.add_argument("--pause", type=float, default=0.2, help="mean seconds between a caller's requests")
    parser.add_argument("--margin", type=float, default=0.5, help="nats; texts are compared up to a nearer tie")
    parser.add_argument("--json", type=Path, help="where samples and verdict go, as lines of JSON")
    parser.add_argument("--fake", action="store_true", help="on the fake engine of qlora_infer.testing")
    arguments = parser.parse_args()
    load = Load(
        minutes=arguments.minutes,
        interval=arguments.interval or min(20.0, arguments.minutes * 60 / 20),
        threads=arguments.threads,
        coroutines=arguments.coroutines,
        operators=arguments.operators,
        pause=arguments.pause,
        margin=arguments.margin,
    )
    with tempfile.TemporaryDirectory() as folder, lines_to(arguments.json) as write:
        make = fake_contents if arguments.fake else demo_contents
        contents = make(arguments.adapters, Path(folder) / "contents")
        broken = broken_adapters(contents[0], Path(folder) / "broken")
        machine = "the fake engine" if arguments.fake else common.machine()
        write({"kind": "run", "machine": machine, "adapters": arguments.adapters, "slots": SLOTS, **asdict(load)})
        with some_engine(contents, is_fake=arguments.fake) as engine:
            verdict = soak(engine, contents, broken, load, max_model_len=MAX_MODEL_LEN, write=write)
    print(machine)
    print(verdict)
    sys.exit(0 if verdict.passed else 1)


if __name__ == "__main__":
    main()
