"""A picture of what soak.py sampled, from the lines of JSON that it keeps.

    python benchmarks/plot_soak.py benchmarks/results/soak.jsonl --output docs/soak.svg

One panel for each quantity; the line that was fitted to it after the warm-up, with its slope.
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from attrs import frozen

#: The panels: a quantity of soak_samples.py and its title.
TITLES = {
    "rss_caller": "memory of the caller, MiB",
    "rss_engine": "memory of the engine's processes, MiB",
    "objects": "objects in the caller",
    "store": "copies on disk, MiB",
    "threads_caller": "threads of the caller",
    "threads_engine": "threads of the engine's processes",
    "files_caller": "open files of the caller",
    "files_engine": "open files of the engine's processes",
    "processes": "processes of the engine",
    "segments": "segments of shared memory",
    "resident": "adapters in host memory",
    "kv_usage": "share of KV blocks in use, no request running",
    "kv_busy": "share of KV blocks in use, before",
}
COLUMNS = 4


@frozen
class Panel:
    """The samples of one quantity, and its growth, where there were enough samples."""

    title: str
    hours: Sequence[float]
    values: Sequence[float]
    growth: Mapping[str, Any] | None


def main() -> None:
    """Write the picture."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("file", type=Path, help="of lines of JSON")
    parser.add_argument("--output", type=Path, default=Path("docs/soak.svg"))
    arguments = parser.parse_args()
    draw(panels(json.loads(line) for line in arguments.file.read_text().splitlines()), arguments.output)


def panels(lines: Iterable[Mapping[str, Any]]) -> list[Panel]:
    """Sort samples by quantity; a run that was aborted has no verdict, and its panels no fitted line."""
    samples, growths = [], {}
    for line in lines:
        if line["kind"] == "sample":
            samples.append(line)
        elif line["kind"] == "verdict":
            growths = {growth["quantity"]: growth for growth in line["growths"]}
    hours = [sample["hours"] for sample in samples]
    return [
        Panel(title, hours, [sample[quantity] for sample in samples], growths.get(quantity))
        for quantity, title in TITLES.items()
    ]


def draw(panels: Sequence[Panel], output: Path) -> None:
    """Draw with matplotlib; the same lines give the same file."""
    import matplotlib as mpl

    mpl.use("svg")
    mpl.rcParams |= {
        "svg.hashsalt": "qlora_infer",
        "font.size": 8,
        "axes.spines.top": False,
        "axes.spines.right": False,
    }
    from matplotlib import pyplot as plt

    num_rows = math.ceil(len(panels) / COLUMNS)
    figure, axes = plt.subplots(num_rows, COLUMNS, figsize=(3.2 * COLUMNS, 2.2 * num_rows), squeeze=False)
    for axis, panel in zip(axes.flat, panels, strict=False):
        _draw_panel(axis, panel)
    for axis in axes.flat[: len(panels)][-COLUMNS:]:
        axis.set_xlabel("hours")
    for axis in axes.flat[len(panels) :]:
        axis.set_axis_off()
    figure.tight_layout()
    figure.savefig(output, metadata={"Date": None})
    plt.close(figure)


def _draw_panel(axis: Any, panel: Panel) -> None:
    axis.plot(panel.hours, panel.values, color="#475569", linewidth=1)
    title = panel.title
    if panel.growth:
        slope, hours = panel.growth["per_hour"], panel.growth["hours"]
        title += f"\n{slope:+.3g} ± {panel.growth['noise']:.2g} per hour"
        ends = [panel.hours[-1] - hours, panel.hours[-1]]
        middle = (panel.growth["first"] + panel.growth["last"]) / 2
        axis.plot(ends, [middle - slope * hours / 2, middle + slope * hours / 2], color="#c2410c", linewidth=1.5)
    axis.set_title(title, fontsize=8)
    axis.set_ylim(bottom=0, top=max(1.2 * max(panel.values, default=0), 0.01))


if __name__ == "__main__":
    main()
