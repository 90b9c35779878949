"""Many adapters on few slots, in orders that a caller cannot choose.

    python benchmarks/many_adapters.py

240 requests of 24 adapters on 4 slots: sorted by hand, interleaved, shuffled, and Zipf-distributed. The same
requests run in plain vLLM with our LoRA kernels (so that only the scheduling differs) and in ours; plain vLLM as it
is installed runs the interleaved order once, which on a CPU takes minutes.
"""

from __future__ import annotations

import argparse
import random
import statistics
from functools import partial

import common


def orders(num_adapters: int, num_requests: int) -> dict[str, list[str]]:
    """Return the adapter of each request, by the name of the order.

    "sorted" is the multiset of the interleaved order.
    """
    names = [f"a{number}" for number in range(num_adapters)]
    interleaved = [names[number % num_adapters] for number in range(num_requests)]
    generator = random.Random(0)
    shuffled = generator.sample(interleaved, num_requests)
    zipf = generator.choices(names, [1 / (rank + 1) for rank in range(num_adapters)], k=num_requests)
    return {
        "sorted by hand": sorted(interleaved),
        "interleaved": interleaved,
        "shuffled": shuffled,
        "Zipf": zipf,
        "Zipf, sorted by hand": sorted(zipf),
    }


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quantization", default="awq", choices=["awq", "gptq", "bitsandbytes", "none"])
    parser.add_argument("--adapters", type=int, default=24)
    parser.add_argument("--slots", type=int, default=4)
    parser.add_argument("--requests", type=int, default=240)
    parser.add_argument("--seqs", type=int, default=32, help="max_num_seqs")
    parser.add_argument("--tokens", type=int, default=24, help="mean tokens of an answer")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--no-plain-kernels", action="store_true", help="leave out plain vLLM with its own kernels")
    arguments = parser.parse_args()
    model = common.model_for(arguments.quantization)
    limits = {
        "max_loras": arguments.slots,
        "max_lora_rank": 8,
        "max_cpu_loras": arguments.slots * 4,
        "max_model_len": 512,
        "max_num_seqs": arguments.seqs,
        "enable_prefix_caching": False,
    }
    texts, params = common.prompts(arguments.requests), common.lengths(arguments.requests, arguments.tokens)
    speed: dict[str, dict[str, list[float]]] = {}
    with common.adapters_for(model, arguments.adapters) as adapters:
        ours = common.Ours(model, arguments.quantization, adapters, **limits)
        plain = common.Plain(model, arguments.quantization, adapters, our_kernels=True, **limits)
        engines: dict[str, common.Plain | common.Ours] = {"plain vLLM, our kernels": plain, "ours": ours}
        _run_all(engines, orders(arguments.adapters, arguments.requests), texts, params, arguments.repeats, speed)
        for engine in engines.values():
            engine.close()
        if not arguments.no_plain_kernels:
            engines = {"plain vLLM": common.Plain(model, arguments.quantization, adapters, **limits)}
            interleaved = {"interleaved": orders(arguments.adapters, arguments.requests)["interleaved"]}
            _run_all(engines, interleaved, texts, params, 1, speed)
            engines["plain vLLM"].close()
    print(common.machine())
    print(
        f"{arguments.requests} requests of {arguments.adapters} adapters, {arguments.slots} slots, "
        f"max_num_seqs {arguments.seqs}, {arguments.tokens} tokens in the mean, {arguments.quantization}"
    )
    rows = []
    for order, measured in speed.items():
        by_hand = speed["Zipf, sorted by hand" if "Zipf" in order else "sorted by hand"]["ours"]
        medians = {name: statistics.median(values) for name, values in measured.items()}
        rows.append(
            (
                order,
                medians.get("plain vLLM", "-"),
                medians["plain vLLM, our kernels"],
                medians["ours"],
                statistics.median(a / b for a, b in zip(measured["ours"], by_hand, strict=True)),
                common.ratio(measured, "ours", "plain vLLM, our kernels"),
                medians["ours"] / medians["plain vLLM"] if "plain vLLM" in medians else "-",
            )
        )
    header = (
        "order",
        "plain vLLM",
        "plain, our kernels",
        "ours",
        "ours / by hand",
        "ours / plain, our kernels",
        "ours / plain",
    )
    print(common.table(header, rows))


def _run_all(
    engines: dict[str, common.Plain | common.Ours],
    orders: dict[str, list[str]],
    texts: list[str],
    params: list[dict],
    repeats: int,
    speed: dict[str, dict[str, list[float]]],
) -> None:
    for order, names in orders.items():
        print(order, flush=True)
        runs = {
            key: partial(common.tokens_per_second, partial(engine.run, texts, params, names))
            for key, engine in engines.items()
        }
        speed.setdefault(order, {}).update(common.in_turn(repeats, runs))


if __name__ == "__main__":
    main()
