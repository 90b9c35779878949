"""A picture of throughput against the number of adapters, from the lines of JSON that gpu.py keeps.

    python benchmarks/plot_adapters.py 8b.jsonl awq.jsonl --output docs/adapters.svg
    python benchmarks/plot_adapters.py 8b.jsonl --share --output docs/share.svg

One panel for each model; of each number of adapters, the runs with the most requests, in an order that nobody sorted.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

#: Lines, from the one that is looked for; the names of sides as gpu.py writes them.
STYLES = {"ours": ("qlora_infer", "#c2410c", "-"), "plain": ("plain vLLM", "#475569", "--")}

Curves = dict[str, dict[int, float]]


def main() -> None:
    """Write the picture."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("files", type=Path, nargs="+", help="of lines of JSON")
    parser.add_argument("--share", action="store_true", help="of the base model's speed on the same side, not tokens/s")
    parser.add_argument("--output", type=Path, default=Path("docs/adapters.svg"))
    arguments = parser.parse_args()
    lines = [json.loads(line) for path in arguments.files for line in path.read_text().splitlines()]
    found = panels(lines)
    if arguments.share:
        draw(shares(found), arguments.output, "share of the base model's speed")
    else:
        draw(found, arguments.output, "tokens/s")


def panels(lines: Iterable[Mapping[str, Any]]) -> dict[str, Curves]:
    """Tokens per second by the number of adapters, 0 for the base model; by side, by model."""
    found: dict[str, dict[str, dict[int, list[Mapping[str, Any]]]]] = {}
    for line in lines:
        if line.get("against") == "plain" and line.get("num_adapters") is not None and not line["is_cold"]:
            model = f"{line['shape']} {line['quantization']}"
            found.setdefault(model, {}).setdefault(line["side"], {}).setdefault(line["num_adapters"], []).append(line)
    return {
        model: {side: {number: _speed(runs) for number, runs in sorted(by.items())} for side, by in sides.items()}
        for model, sides in found.items()
    }


def _speed(runs: Sequence[Mapping[str, Any]]) -> float:
    """Return the median of the runs with the most requests, in shuffled order where there is one."""
    most = max(run["num_requests"] for run in runs)
    runs = [run for run in runs if run["num_requests"] == most]
    shuffled = [run for run in runs if run["order"] == "shuffled"]
    return statistics.median(run["tokens_per_second"] for run in shuffled or runs)


def shares(panels: Mapping[str, Curves]) -> dict[str, Curves]:
    """Each side's speeds by that of its own base model."""
    return {
        model: {side: {number: speed / curve[0] for number, speed in curve.items()} for side, curve in curves.items()}
        for model, curves in panels.items()
    }


def draw(panels: Mapping[str, Curves], output: Path, quantity: str) -> None:
    """Draw with matplotlib; the same lines give the same file."""
    import matplotlib as mpl

    mpl.use("svg")
    mpl.rcParams |= {
        "svg.hashsalt": "qlora_infer",
        "font.size": 9,
        "axes.spines.top": False,
        "axes.spines.right": False,
    }
    from matplotlib import pyplot as plt

    num_columns = min(len(panels), 3)
    num_rows = math.ceil(len(panels) / num_columns)
    figure, axes = plt.subplots(num_rows, num_columns, figsize=(4.2 * num_columns, 3.2 * num_rows), squeeze=False)
    for axis, (model, curves) in zip(axes.flat, panels.items(), strict=False):
        _draw_panel(axis, model, curves)
    for row in axes:
        row[0].set_ylabel(quantity)
    axes.flat[0].legend(frameon=False, loc="lower left")
    for axis in axes.flat[len(panels) :]:
        axis.set_axis_off()
    figure.tight_layout()
    figure.savefig(output, metadata={"Date": None})
    plt.close(figure)


def _draw_panel(axis: Any, model: str, curves: Curves) -> None:
    numbers = sorted({number for curve in curves.values() for number in curve if number})
    for side, (label, color, line) in STYLES.items():
        curve = curves.get(side, {})
        if 0 in curve:
            axis.axhline(curve[0], color=color, linestyle=":", linewidth=1, label=f"{label}, base model")
        given = [number for number in numbers if number in curve]
        axis.plot(given, [curve[number] for number in given], line, color=color, marker="o", markersize=4, label=label)
    axis.set_xscale("log", base=2)
    axis.set_xticks(numbers, [str(number) for number in numbers])
    axis.set_ylim(bottom=0)
    axis.set_xlabel("adapters")
    axis.set_title(model)


if __name__ == "__main__":
    main()
