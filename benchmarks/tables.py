"""Write the tables and figures of the documentation from the measurements in ``benchmarks/results``.

    python benchmarks/tables.py            # rewrite the tables in the pages
    python benchmarks/tables.py --plots    # draw docs/adapters.svg and docs/soak.svg, too

A page marks a table with ``<!-- table: NAME -->`` and ``<!-- table: end -->``. ``quotes`` has the figures in sentences.
``tests/docs/test_figures.py`` compares both with the pages.
"""

from __future__ import annotations

import argparse
import json
import re
import statistics
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results"
MARKED = re.compile(r"(<!-- table: (?P<name>[\w-]+) -->\n)(?P<table>.*?)(<!-- table: end -->)", re.S)

Line = Mapping[str, Any]

#: The runs of 64 requests on a model of 8 billion parameters: label in the table, file, numbers of adapters.
GAINS = (
    ("W4A16", "8b-w4a16-pairs", (0, 1)),
    ("W4A16", "8b-w4a16", (8,)),
    ("FP8", "8b-fp8", (0, 1, 8)),
    ("GPTQ", "fused-8B", (0, 8)),
    ("GPTQ, Phi-3's modules", "fused-8B-phi3", (0, 8)),
)


def main() -> None:
    """Rewrite the pages."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--plots", action="store_true", help="draw the plots, too (needs matplotlib)")
    if parser.parse_args().plots:
        draw_plots()
    for page in [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]:
        text = page.read_text(encoding="utf-8")
        if (filled := fill(text)) != text:
            page.write_text(filled, encoding="utf-8")
            print(f"rewrote {page.relative_to(ROOT)}")


def fill(text: str) -> str:
    """Return the page with every marked table made anew."""
    return MARKED.sub(lambda match: match[1] + TABLES[match["name"]]() + match[4], text)


def draw_plots() -> None:
    """Draw the plots of the benchmarks page."""
    import plot_adapters
    import plot_soak

    names = [name for _, name, _ in GAINS if name.startswith("8b-")]
    found = plot_adapters.panels(line for name in names for line in results(name))
    plot_adapters.draw(found, ROOT / "docs" / "adapters.svg", "tokens/s")
    plot_soak.draw(plot_soak.panels(results("soak")), ROOT / "docs" / "soak.svg")


# Measurements ---------------------------------------------------------------------------------------------------------


def results(name: str) -> list[Line]:
    """Return the lines of a file of results."""
    return [json.loads(line) for line in (RESULTS / f"{name}.jsonl").read_text(encoding="utf-8").splitlines()]


def medians(name: str, **where: Any) -> list[Line]:
    """Return the medians of a measurement whose raw runs were not kept."""
    lines = [line for line in results("medians") if line["measured"] == name]
    return [line for line in lines if where.items() <= line.items()]


def speeds(name: str) -> dict[int, dict[str, list[float]]]:
    """Return the tokens per second of every run by number of adapters and side."""
    found: dict[int, dict[str, list[float]]] = {}
    for line in results(name):
        if "tokens_per_second" in line:
            sides = found.setdefault(line["num_adapters"], {"plain": [], "ours": []})
            sides[line["side"]].append(line["tokens_per_second"])
    return found


def ratios(sides: Mapping[str, Sequence[float]]) -> list[float]:
    """Return this library's speed divided by plain vLLM's, pair by pair."""
    return [ours / plain for ours, plain in zip(sides["ours"], sides["plain"], strict=True)]


def gain(name: str, num_adapters: int) -> float:
    """Return the median ratio of the pairs with this number of adapters."""
    return statistics.median(ratios(speeds(name)[num_adapters]))


def share_of_base(name: str, num_adapters: int, side: str) -> float:
    """Return a side's speed with adapters divided by its speed with the base model alone."""
    found = {number: statistics.median(sides[side]) for number, sides in speeds(name).items()}
    return found[num_adapters] / found[0]


def growth(quantity: str) -> Line:
    """Return what the soak run fitted to a quantity."""
    (verdict,) = (line for line in results("soak") if line["kind"] == "verdict")
    (found,) = (growth for growth in verdict["growths"] if growth["quantity"] == quantity)
    return found


# Tables ---------------------------------------------------------------------------------------------------------------


def gain_table() -> str:
    """Return tokens per second at 64 requests, by quantization and number of adapters."""
    rows = []
    for label, name, numbers in GAINS:
        for number in numbers:
            sides = speeds(name)[number]
            plain, ours = (statistics.median(sides[side]) for side in ("plain", "ours"))
            ratio = f"{statistics.median(ratios(sides)):.2f}"
            rows.append((label, number or "base", hundreds(plain), hundreds(ours), ratio, len(sides["ours"])))
    return table(("weights", "adapters", "plain vLLM, tokens/s", "qlora_infer", "ratio", "pairs"), rows)


def loading_table() -> str:
    """Return the gaps between the tokens of 16 streams while adapters load on a GPU."""
    first = [line for line in medians("load pause") if not line["machine"].startswith("another")]
    titles = {"no loads": "none", "cold": "from disk", "warm": "from host memory"}
    rows = [
        (
            titles[line["phase"]],
            {"plain": "plain vLLM", "ours": "qlora_infer"}[line["side"]],
            f"{line['gap_ms']:.1f} ms",
            f"{line['longest_gap_ms']:.0f} ms",
            f"{line['load_ms']:,.0f} ms" if line["load_ms"] else "-",
        )
        for line in first
    ]
    return table(("loads", "", "median gap", "longest gap", "load and first token"), rows)


def starvation_table() -> str:
    """Return when the one request of a rare adapter starts behind 200 of a busy one."""
    rows = []
    for side, lines in starvation().items():
        place, first_token, seconds = (
            statistics.median(line[name] for line in lines) for name in ("place", "first_token_s", "seconds")
        )
        rows.append((side, f"{place:.0f} of 201", f"{first_token:.0f} s", f"{seconds:.0f} s"))
    return table(("", "place of its first token", "its first token after", "all 201 answered after"), rows)


def starvation() -> dict[str, list[Line]]:
    """Return the runs of the rare adapter by side."""
    names = {"plain": "plain vLLM", "ours": "qlora_infer"}
    return {name: list(medians("starvation", side=side)) for side, name in names.items()}


def cost_table() -> str:
    """Return what a user pays."""
    loads = [line["load_adapter_ms"] for _, name, _ in GAINS for line in results(name) if "load_adapter_ms" in line]
    queue = max(line["fake_engine_us"] for line in medians("queue"))
    start = medians("start")
    cold = medians("load pause", phase="cold")
    memory = growth("rss_engine")
    rows = [
        *(
            (f"base model, {label}", f"{gain(name, 0):.2f} of plain vLLM's speed")
            for label, name, numbers in GAINS[:4]
            if 0 in numbers
        ),
        ("`load_adapter`, rank 16, 8B", f"{min(loads) / 1e3:.1f} to {max(loads) / 1e3:.1f} s"),
        ("load and first token, rank 64, 8B", f"{seconds(cold, 'ours')}; plain vLLM {seconds(cold, 'plain')}"),
        ("start, 8B", f"{spread(start, 'ours_s')} s; plain vLLM, started second, {spread(start, 'plain_s')} s"),
        ("queue and handle, 100,000 waiting", f"under {queue / 1e3:.1f} ms a request"),
        ("engine's memory, two hours of traffic", f"{memory['per_hour']:+.0f} MiB an hour"),
    ]
    return table(("cost", "measured"), rows)


def cpu_table() -> str:
    """Return tokens per second of 16 requests on two CPU cores."""
    titles = {"none": "bf16"}
    rows = [
        (
            titles.get(line["quantization"], line["quantization"]),
            *(line["adapters"], line["plain"], line["peft"], line["ours"]),
            f"{line['ours'] / line['plain']:.1f}",
            percent(line["ours"] / line["ours_base"]),
        )
        for line in on_xeon()
    ]
    header = ("weights", "adapters", "plain vLLM", "PEFT", "qlora_infer", "ratio to plain", "of its base model")
    return table(header, rows)


def on_xeon() -> list[Line]:
    """Return the measurements of LoRA on two cores of a Xeon."""
    return [line for line in medians("cpu lora") if "Xeon" in line["machine"]]


def sixteen_bits_table() -> str:
    """Return what each way to load a 16-bit checkpoint costs and brings."""
    rows = []
    for way, label in (("none", "`none`"), ("fp8", "`fp8`"), ("bitsandbytes", "`bitsandbytes`")):
        lines = [line for line in results("sixteen-bits") if line["way"] == way]
        rows.append(
            (
                label,
                f"{statistics.median(line['memory_gib'] for line in lines):.0f} GiB",
                *(hundreds(sixteen_bits_speed(lines, adapters, 64)) for adapters in (0, 8)),
                *(f"{sixteen_bits_speed(lines, adapters, 1):.0f}" for adapters in (0, 8)),
            )
        )
    header = ("", "memory", "tokens/s, 64 requests: base", "8 adapters", "1 request: base", "8 adapters")
    return table(header, rows)


def sixteen_bits_speed(lines: Iterable[Line], adapters: int, requests: int) -> float:
    """Return the median speed of these runs."""
    chosen = [line for line in lines if (line["adapters"], line["requests"]) == (adapters, requests)]
    return statistics.median(line["tokens_per_second"] for line in chosen)


def quality_table() -> str:
    """Return how far each quantization moves the demo model's predictions."""
    labels = {"none": "`none`", "fp8": "`fp8`", "bitsandbytes": "`bitsandbytes`", "AWQ": "`awq`", "GPTQ": "`gptq`"}
    lines = medians("quality, from 16 bits") + [
        line for line in medians("quality, 4 bits") if line["quantization"] in ("AWQ", "GPTQ")
    ]
    rows = [
        (
            labels[line["quantization"]],
            line["adapter"] or "-",
            f"{line['perplexity']:.0f}",
            f"{line['shift']:.2f}",
            percent(line["other_tokens"]),
        )
        for line in lines
    ]
    return table(("", "adapter", "perplexity", "mean shift of a log-probability", "other top tokens"), rows)


def four_bits_table() -> str:
    """Return the speed of three 4-bit quantizations."""
    columns = ("awq", "gptq", "bitsandbytes")
    rows: list[tuple[object, ...]] = [
        (f"{model} on an H100, {title}", *(hundreds(speed_of_512(model, name, key)) for name in columns))
        for model in ("8B", "1.1B")
        for title, key in (("base", "base"), ("one adapter", "one_adapter"))
    ]
    cpu = {line["quantization"].lower(): line for line in on_xeon() if line["adapters"] == 1}
    for title, key in (("base", "ours_base"), ("one adapter", "ours")):
        rows.append((f"the demo model on two CPU cores, {title}", *(cpu[name][key] for name in columns)))
    return table(("tokens/s", *(f"`{name}`" for name in columns)), rows)


def speed_of_512(model: str, quantization: str, key: str) -> float:
    """Return tokens per second with 512 requests."""
    (line,) = medians("512 requests", model=model, quantization=quantization)
    return float(line[key])


TABLES: Mapping[str, Callable[[], str]] = {
    "gain": gain_table,
    "loading": loading_table,
    "starvation": starvation_table,
    "cost": cost_table,
    "cpu": cpu_table,
    "sixteen-bits": sixteen_bits_table,
    "quality": quality_table,
    "four-bits": four_bits_table,
}


# Text -----------------------------------------------------------------------------------------------------------------


def table(header: Sequence[object], rows: Iterable[Sequence[object]]) -> str:
    """Return a Markdown table."""
    lines = [header, ["---"] * len(header), *rows]
    return "".join("| " + " | ".join(map(str, line)) + " |\n" for line in lines)


def hundreds(value: float) -> str:
    """Round to two significant digits, or to hundreds."""
    return f"{round(value, -2):,.0f}"


def percent(share: float) -> str:
    """Return a share in percent."""
    return f"{100 * share:.0f} %"


def spread(lines: Iterable[Line], key: str, digits: int = 0) -> str:
    """Return the smallest and the largest value of a key."""
    values = [line[key] for line in lines]
    return f"{min(values):.{digits}f} to {max(values):.{digits}f}"


def seconds(lines: Iterable[Line], side: str) -> str:
    """Return the smallest and the largest load of a side."""
    values = [line["load_ms"] / 1e3 for line in lines if line["side"] == side]
    low, high = f"{min(values):.1f}", f"{max(values):.1f}"
    return f"{low} s" if low == high else f"{low} to {high} s"


# Sentences ------------------------------------------------------------------------------------------------------------


def quotes() -> Iterator[tuple[str, str]]:
    """Yield the words with figures that a page contains: page, words."""
    eight = gain("8b-w4a16", 8)
    yield "docs/benchmarks.md", f"{eight:.2f} times as fast as with plain vLLM"
    yield "docs/benchmarks.md", f"answered {from_disk(32)} times as fast"
    yield "docs/benchmarks.md", f"with 128 adapters {from_disk(128)} times"
    plain, ours = (
        line["longest_gap_ms"]
        for side in ("plain", "ours")
        for line in medians("load pause", side=side, phase="cold")
        if line["machine"].startswith("another")
    )
    yield "docs/benchmarks.md", f"the longest gap was {plain} ms, and {ours} ms with this library"
    (verdict,) = (line for line in results("soak") if line["kind"] == "verdict")
    yield "docs/benchmarks.md", f"{verdict['counts']['num_submitted']:,} requests each ended exactly once"
    memory = growth("rss_engine")
    yield "docs/benchmarks.md", f"they grew by {memory['per_hour'] * memory['hours']:.1f} MiB"
    avx2 = [line for line in medians("cpu lora") if line["machine"].startswith("AMD EPYC with AVX2")]
    yield "docs/benchmarks.md", f"{extremes(line['ours'] / line['plain'] for line in avx2)} times as fast as plain vLLM"
    yield "docs/benchmarks.md", f"{extremes(line['ours'] / line['peft'] for line in avx2)} times as fast as PEFT"

    for page in ("README.md", "docs/index.md"):
        yield page, f"eight adapters run {eight:.2f} times as fast as in plain vLLM"
    plain, ours = (
        spread(medians("load pause", side=side, phase="cold"), "longest_gap_ms") for side in ("plain", "ours")
    )
    for page in ("README.md", "docs/index.md"):
        yield page, f"for {ours} ms instead of {plain} ms"
    cost = {side: 1 - share_of_base("8b-w4a16", 8, side) for side in ("plain", "ours")}
    yield "docs/why.md", f"eight adapters cost {percent(cost['plain'])} of a W4A16 base model's speed"
    yield "docs/why.md", f"They cost {percent(cost['ours'])}."
    shares = [100 * (1 - line["ours"] / line["ours_base"]) for line in on_xeon()]
    yield "docs/why.md", f"It costs {min(shares):.0f} to {max(shares):.0f} %."
    repeated, *others = (speedup_of_drafts(*case) for case in DRAFTED)
    yield "docs/asking.md", f"{repeated:.2f} times as fast with drafts"
    yield "docs/asking.md", f"{min(others):.2f} to {max(others):.2f} times as fast"
    yield from hardware_quotes()


#: Prompts and adapter; the base model repeats what it has read twice, and the pirate does not.
DRAFTED = (("repeated", None), ("repeated", "pirate"), ("free", None), ("free", "pirate"))


def speedup_of_drafts(prompts: str, adapter: str | None) -> float:
    """Return the median over the pairs of the speed with drafts over the speed without."""
    lines = [line for line in results("drafts") if (line["prompts"], line["adapter"]) == (prompts, adapter)]
    speeds = {(line["side"], line["pair"]): line["tokens_per_s"] for line in lines}
    pairs = {pair for _, pair in speeds}
    return statistics.median(speeds["with drafts", pair] / speeds["without", pair] for pair in pairs)


def hardware_quotes() -> Iterator[tuple[str, str]]:
    """Yield the words with figures on the pages about hardware."""
    (graphs,) = medians("graphs of steps with prompts", adapters=0, requests=1)
    slow, fast = (graphs[f"first_token_{name}_ms"] for name in ("decoding_only", "all_steps"))
    yield "docs/hardware.md", f"comes after {fast} ms instead of {slow} ms"
    yield "docs/internals/gpu.md", f"{spread(medians('start'), 'ours_s')} s"
    (single,) = medians("the example's settings", requests=1)
    words = f"a single request runs at {single['example']} tokens/s instead of {single['ours']} tokens/s"
    yield "docs/internals/gpu.md", words
    (large,) = (line for line in medians("graphs of up to 4096 tokens") if "up_to_512" in line)
    ratio = large["up_to_4096"] / large["up_to_512"]
    yield "docs/internals/gpu.md", f"answered {ratio:.1f} times as fast"
    alone = extremes(line["vllm_ms"] / line["ours_ms"] for line in medians("LoRA alone on a GPU"))
    yield "docs/internals/gpu.md", f"{alone} times as fast as vLLM's"
    for line in medians("two streams, 64 requests"):
        words = f"{line['base']:,} tokens/s | {line['eight_adapters']:,} tokens/s"
        yield "docs/internals/gpu.md", words
    for line, requests in zip(medians("16 or 8 bits"), ("one request", "16"), strict=True):
        times = f"{line['base_16_bits_ms']} ms instead of {line['base_8_bits_ms']} ms with {requests}"
        yield "docs/internals/cpu.md", times
    awq = {line["quantization"]: line for line in medians("quality, 16 or 8 bits", adapter=None)}
    with_16, with_8 = (awq["AWQ"][f"perplexity_{bits}_bits"] for bits in (16, 8))
    plain = awq["unquantized"]["perplexity_16_bits"]
    yield "docs/internals/cpu.md", f"{with_16} with 16 bits, {with_8} with 8, and {plain} unquantized"
    yield "docs/internals/cpu.md", f"{kernel('ours'):.0f} ms of CPU time, and the best simpler way {simpler():.0f} ms"


def kernel(way: str) -> float:
    """Return the CPU time in milliseconds of a step's LoRA: the demo model, 16 rows, four adapters."""
    shape = {"model": "135M", "dtype": "bf16", "rank": 16, "rows": 16, "adapters": 4, "way": way}
    return statistics.median(line["us"] / 1e3 for line in results("cpu-kernels") if shape.items() <= line.items())


def simpler() -> float:
    """Return the CPU time of the fastest of the ways that are easier to read."""
    return min(map(kernel, ("by group", "bmm", "numba", "numba by fours")))


def from_disk(num_adapters: int) -> str:
    """Return how much faster requests with adapters from disk are answered."""
    return extremes(line["ratio"] for line in medians("from disk", adapters=num_adapters))


def extremes(values: Iterable[float]) -> str:
    """Return the smallest and the largest value."""
    found = list(values)
    return f"{min(found):.1f} to {max(found):.1f}"


if __name__ == "__main__":
    main()
