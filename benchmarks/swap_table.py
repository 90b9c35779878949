"""The table of quantization, adapters and swap rate, from the lines of JSON that gpu.py keeps.

    python benchmarks/swap_table.py 8b.jsonl awq.jsonl gptq.jsonl bnb.jsonl

A row for each model, number of adapters and order, of the runs with the most requests; medians.
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import common
from runs import Cell

HEADER = (
    *("model", "adapters", "order", "pairs", "swaps/s: plain", "ours", "steps: plain", "ours"),
    *("steps of 512 tokens and more: plain", "ours", "tokens/s: plain", "ours", "ours / plain"),
)
SIDES = ("plain", "ours")


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("files", type=Path, nargs="+", help="of lines of JSON")
    lines = [json.loads(line) for path in parser.parse_args().files for line in path.read_text().splitlines()]
    print(common.table(HEADER, rows(lines)))


def rows(lines: Iterable[Mapping[str, Any]]) -> list[Sequence[object]]:
    """Return the rows, in the order in which their cells were measured first."""
    lines = [line for line in lines if line.get("against") == "plain" and "num_adapters" in line]
    most = max((line["num_requests"] for line in lines), default=0)
    found: dict[tuple[str, Cell], dict[str, list[Mapping[str, Any]]]] = {}
    for line in lines:
        if line["num_requests"] == most:
            cell = Cell(line["num_adapters"], most, line["order"], line["is_cold"])
            model = f"{line['shape']} {line['quantization']}"
            found.setdefault((model, cell), {name: [] for name in SIDES})[line["side"]].append(line)
    return [
        (model, cell.num_adapters or "base", cell.title, *_measured(sides))
        for (model, cell), sides in found.items()
        if all(sides.values())  # a benchmark that was cut off has one side of its last cell
    ]


def _measured(sides: Mapping[str, Sequence[Mapping[str, Any]]]) -> list[object]:
    names = ("swaps_per_second", "num_steps", "num_large_steps", "tokens_per_second")
    medians = [_median(run.get(name) for run in sides[side]) for name in names for side in SIDES]
    pairs = list(zip(sides["plain"], sides["ours"], strict=False))  # the last pair may have been cut off
    ratio = statistics.median(ours["tokens_per_second"] / plain["tokens_per_second"] for plain, ours in pairs)
    return [len(pairs), *medians, ratio]


def _median(values: Iterable[float | None]) -> float | str:
    known = [value for value in values if value is not None]
    return statistics.median(known) if known else "-"  # runs of before it was counted


if __name__ == "__main__":
    main()
