"""On a GPU: many adapters on few slots in orders that nobody sorted, and what this library costs where it wins nothing.

    python benchmarks/gpu.py --tokenizer FOLDER

Models have the shape of a Llama and random weights, for speed does not depend on them; only the tokenizer is read, from
any model's folder. The same requests run in plain vLLM and in ours, in turn, with the same arguments.
"""

from __future__ import annotations

import argparse
import json
import random
import shutil
import statistics
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import common
import load_pause
from many_adapters import orders

from qlora_infer.testing import write_adapter

SHAPES = {
    "8B": {
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
    },
    "1.1B": {
        "hidden_size": 2048,
        "intermediate_size": 5632,
        "num_hidden_layers": 22,
        "num_attention_heads": 32,
        "num_key_value_heads": 4,
    },
}
QUANTIZATIONS = {
    "gptq": {"quant_method": "gptq", "bits": 4, "group_size": 128, "sym": True, "desc_act": False},
    "awq": {"quant_method": "awq", "bits": 4, "group_size": 128, "version": "gemm", "zero_point": True},
}


def main() -> None:
    """Print the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokenizer", type=Path, required=True)
    parser.add_argument("--shape", default="8B", choices=SHAPES)
    parser.add_argument("--quantization", default="gptq", choices=QUANTIZATIONS)
    parser.add_argument("--adapters", type=int, default=32)
    parser.add_argument("--slots", type=int, default=8)
    parser.add_argument("--requests", type=int, default=512)
    parser.add_argument("--seqs", type=int, default=64, help="max_num_seqs")
    parser.add_argument("--tokens", type=int, default=64, help="of a prompt, and of an answer")
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--repeats", type=int, default=2)
    parser.add_argument("--pause", action="store_true", help="instead: what others feel while adapters are loaded")
    arguments = parser.parse_args()
    if arguments.pause:
        arguments.slots = 1
    sizes = [size for size in (1, 2, 4, 8, 16, 32, 48, 64, 128, 256) if size <= arguments.seqs]
    limits: dict[str, Any] = {
        "max_loras": arguments.slots,
        "max_lora_rank": arguments.rank,
        "max_cpu_loras": arguments.adapters + arguments.slots,
        "max_model_len": 4 * arguments.tokens,
        "max_num_seqs": arguments.seqs,
        "enable_prefix_caching": False,
        "gpu_memory_utilization": 0.35,
        "load_format": "dummy",
        "compilation_config": {"mode": 0, "cudagraph_mode": "FULL_DECODE_ONLY", "cudagraph_capture_sizes": sizes},
    }
    with model_and_adapters(arguments) as (model, adapters):
        if arguments.pause:
            measure_pause(model, adapters, limits, arguments)
            return
        engines: dict[str, Any] = {}
        for name, start in (
            ("plain", partial(common.Plain, model, arguments.quantization, adapters, **limits)),
            ("ours", partial(common.Ours, model, arguments.quantization, adapters, **limits)),
        ):
            began = time.perf_counter()
            engines[name] = start()
            print(f"{name}: started in {time.perf_counter() - began:.0f} s", flush=True)
        overhead = measure_overhead(engines, arguments)
        print(common.machine(), flush=True)
        print(common.table(("", "plain vLLM", "ours", "ours / plain"), overhead), flush=True)
        rows = measure_orders(engines, arguments)
        for engine in engines.values():
            engine.close()
    print(
        f"\n{arguments.requests} requests of {arguments.adapters} adapters of rank {arguments.rank}, {arguments.slots} "
        f"slots, max_num_seqs {arguments.seqs}, prompts and answers of {arguments.tokens} tokens, {arguments.shape} "
        f"{arguments.quantization}, {arguments.repeats} pairs, tokens/s"
    )
    header = ("order", "plain vLLM", "ours", "ours / plain, same order", "ours / plain, sorted by hand", "swaps")
    print(common.table(header, rows))


def measure_pause(
    model: Path, adapters: dict[str, Path], limits: dict[str, Any], arguments: argparse.Namespace
) -> None:
    """Print the table of load_pause.py."""
    limits = {**limits, "max_model_len": 8192}
    sides: dict[str, load_pause.Side] = {
        "plain vLLM": load_pause.PlainSide(common.Plain(model, arguments.quantization, adapters, **limits)),
        "ours": load_pause.OurSide(common.Ours(model, arguments.quantization, {}, **limits), adapters),
    }
    table = load_pause.measure(sides, list(adapters), arguments.seqs // 2, arguments.repeats)
    for side in sides.values():
        side.close()
    print(common.machine())
    print(
        f"{arguments.seqs // 2} streams, {arguments.adapters} adapters of rank {arguments.rank}, {arguments.shape} "
        f"{arguments.quantization}"
    )
    print(table)


def measure_overhead(engines: dict[str, Any], arguments: argparse.Namespace) -> list[tuple[object, ...]]:
    """The base model and one adapter, with one request and with a full batch several times over."""
    rows = []
    for number in (1, 4 * arguments.seqs):
        for title, name in (("base model", None), ("one adapter", "a0")):
            texts, params = prompts(number, arguments.tokens), lengths(number, arguments.tokens)
            runs = {key: partial(speed, engine, texts, params, [name] * number) for key, engine in engines.items()}
            for run in runs.values():
                run()
            measured = common.in_turn(2 * arguments.repeats, runs)
            medians = [statistics.median(measured[key]) for key in ("plain", "ours")]
            rows.append((f"{title}, {number} requests", *medians, common.ratio(measured, "ours", "plain")))
    return rows


def measure_orders(engines: dict[str, Any], arguments: argparse.Namespace) -> list[tuple[object, ...]]:
    """Each order, in plain and in ours."""
    texts = prompts(arguments.requests, arguments.tokens)
    params = lengths(arguments.requests, arguments.tokens)
    speeds, swaps = {}, {}
    for engine in engines.values():  # compiles kernels, and brings every adapter into host memory
        speed(engine, texts, params, orders(arguments.adapters, arguments.requests)["interleaved"])
    for order, names in orders(arguments.adapters, arguments.requests).items():
        before = num_swaps(engines["ours"])
        runs = {key: partial(speed, engine, texts, params, names) for key, engine in engines.items()}
        speeds[order] = common.in_turn(arguments.repeats, runs)
        swaps[order] = (num_swaps(engines["ours"]) - before) / arguments.repeats
    rows = []
    for order, measured in speeds.items():
        by_hand = speeds["Zipf, sorted by hand" if "Zipf" in order else "sorted by hand"]["plain"]
        rows.append(
            (
                order,
                statistics.median(measured["plain"]),
                statistics.median(measured["ours"]),
                common.ratio(measured, "ours", "plain"),
                statistics.median(measured["ours"]) / statistics.median(by_hand),
                swaps[order],
            )
        )
    return rows


def speed(engine: Any, texts: Sequence[Any], params: Sequence[Any], names: Sequence[str | None]) -> float:
    """Generated tokens in a second."""
    return common.tokens_per_second(partial(engine.run, texts, params, names))


def num_swaps(ours: common.Ours) -> int:
    """How often an adapter was moved into a slot so far."""
    return sum(adapter.num_swaps for adapter in ours.engine.stats().adapters.values())


def prompts(number: int, num_tokens: int) -> list[list[int]]:
    """Random token ids."""
    generator = random.Random(0)
    return [[generator.randrange(1000, 20_000) for _ in range(num_tokens)] for _ in range(number)]


def lengths(number: int, num_tokens: int) -> list[dict[str, Any]]:
    """Greedy answers of exactly so many tokens."""
    return [{"temperature": 0.0, "ignore_eos": True, "max_tokens": num_tokens}] * number


@contextmanager
def model_and_adapters(arguments: argparse.Namespace) -> Iterator[tuple[Path, dict[str, Path]]]:
    """A model's folder without weights, and adapters that fit it."""
    with tempfile.TemporaryDirectory() as temporary:
        model = Path(temporary) / "model"
        model.mkdir()
        for path in arguments.tokenizer.glob("tokenizer*"):
            shutil.copy(path, model)
        config = {
            "architectures": ["LlamaForCausalLM"],
            "model_type": "llama",
            "dtype": "float16",
            "hidden_act": "silu",
            "max_position_embeddings": 8192,
            "rms_norm_eps": 1e-5,
            "rope_theta": 10000.0,
            "vocab_size": 49152,
            "bos_token_id": 1,
            "eos_token_id": 2,
            **SHAPES[arguments.shape],
            "quantization_config": QUANTIZATIONS[arguments.quantization],
        }
        (model / "config.json").write_text(json.dumps(config))
        modules = common.llama_modules(model)
        # Four contents in many folders: what is in them makes no difference to the time, writing them does.
        for number in range(min(4, arguments.adapters)):
            write_adapter(
                Path(temporary) / f"a{number}", rank=arguments.rank, modules=modules, dtype="BF16", seed=number
            )
        for number in range(4, arguments.adapters):
            shutil.copytree(Path(temporary) / f"a{number % 4}", Path(temporary) / f"a{number}")
        yield model, {f"a{number}": Path(temporary) / f"a{number}" for number in range(arguments.adapters)}


if __name__ == "__main__":
    main()
