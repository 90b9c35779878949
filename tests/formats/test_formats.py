"""Checkpoints that the tools themselves made, served with the demo's adapters: ``nox -s formats`` makes them first."""

import json
import os
import statistics
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path

import pytest
from attrs import frozen

os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")

#: Where ``quantize_*.py`` left, for each tool, ``<tool>/<format>/`` and ``<tool>/<format>.json``.
CHECKPOINTS = Path(os.environ.get("QLORA_INFER_FORMATS", "formats"))
SCRIPTS = sorted(Path(__file__).parent.glob("quantize_*.py"))

#: Where activations are rounded to 8 bits too, a rounding that falls otherwise is carried through all layers. That the
#: weights are read rightly still shows. In torchao's own answers, int8 activations make 0.2 (median) and 0.8 (95th
#: percentile) on the base. For LLM.int8(), the whole batch chooses which columns are computed in 16 bits.
ROUNDED_ACTIVATIONS = {
    "bitsandbytes-int8",
    "llmcompressor-fp8_dynamic",
    "llmcompressor-w8a8",
    "torchao-int8_activations",
}


@frozen
class Tolerance:
    """How far log-probabilities may be from the tool's own, and in a batch from those alone, in nats.

    vLLM computes in bfloat16, some tools' own layers in float32. A checkpoint that is read wrongly changes
    log-probabilities as much as adapters do, by 1 and more.
    """

    median: float = 0.15
    large: float = 1.0
    batch: float = 0.3


@frozen
class Made:
    """What a tool's script left for one format.

    Attributes:
        folder: The checkpoint.
        report: The tool's version, the prompts and the log-probabilities that the tool itself computes, or its error.
    """

    folder: Path
    report: dict

    @property
    def tolerance(self) -> Tolerance:
        """Return what rounding explains in this format."""
        if f"{self.folder.parent.name}-{self.folder.name}" in ROUNDED_ACTIVATIONS:
            return Tolerance(median=0.3, large=2.0, batch=1.5)
        return Tolerance()

    def difference(self, rows: dict, adapter: str, other: str | None = None) -> list[float]:
        """Return how far log-probabilities are from the tool's own for ``other``, by default the same adapter."""
        theirs = self.report["logprobs"][other or adapter]
        return sorted(abs(a - b) for mine, its in zip(rows[adapter], theirs) for a, b in zip(mine, its, strict=True))


def made() -> Iterator[object]:
    """One case for each format of each tool; for a tool that left nothing, one that says so."""
    for script in SCRIPTS:
        tool = script.stem.removeprefix("quantize_")
        reports = sorted((CHECKPOINTS / tool).glob("*.json"))
        for path in reports:
            yield pytest.param(Made(path.with_suffix(""), read(path)), id=f"{tool}-{path.stem}")
        if not reports:
            missing = {"tool": tool, "format": "", "error": "not installed, or not run"}
            yield pytest.param(Made(CHECKPOINTS / tool, missing), id=tool)


@pytest.fixture(scope="module")
def sixteen_bits() -> dict[tuple[int, ...], dict[str, list[float]]]:
    """The log-probabilities of the unquantized demo model, with each adapter: prompt to name to its tokens'."""
    from qlora_infer import QuantizedLoRAEngine
    from qlora_infer.demo import demo_adapters, demo_model

    prompts = next((made["prompts"] for path in CHECKPOINTS.glob("*/*.json") if "prompts" in (made := read(path))), [])
    names = ["base", *sorted(demo_adapters())]
    with QuantizedLoRAEngine(
        demo_model("none"), quantization="none", adapters=demo_adapters(), max_loras=4, max_model_len=512
    ) as engine:
        return {tuple(prompt): {name: logprobs(engine, [prompt], [name])[0] for name in names} for prompt in prompts}


@pytest.fixture(scope="module")
def table(pytestconfig) -> Iterator[list[str]]:
    """Lines that are printed at the end, whatever pytest captures."""
    lines = [
        "Log-probabilities from the tool's own: median / 95th percentile, in nats (the median change by the adapter).",
        "Then those in a mixed batch from those alone, 95th percentile; last, those of the base and of each adapter from",
        "the same in 16 bits, mean.\n",
        "| tool | format | served | base | json | pirate | spanish | mixed | from 16 bits |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    yield lines
    with pytestconfig.pluginmanager.get_plugin("capturemanager").global_and_fixture_disabled():
        sys.stdout.write("\n".join(("\n", *lines, "")))


@pytest.mark.timeout(1800)
@pytest.mark.parametrize("checkpoint", made())
def test_a_tools_checkpoint_answers_as_the_tool_itself_computes(
    checkpoint: Made, table: list[str], sixteen_bits: dict[tuple[int, ...], dict[str, list[float]]]
) -> None:
    """The base and each adapter, alone and in one batch, give the log-probabilities that the tool and PEFT give."""
    from qlora_infer import QuantizedLoRAEngine
    from qlora_infer.demo import demo_adapters
    from qlora_infer.errors import MissingDependencyError, QuantizationError

    about = f"| {checkpoint.report['tool']} | {checkpoint.report['format']} |"
    if "error" in checkpoint.report:
        table.append(f"{about} not run: {first_line(checkpoint.report['error'])} |")
        pytest.skip(table[-1])
    try:
        engine = QuantizedLoRAEngine(checkpoint.folder, adapters=demo_adapters(), max_loras=4, max_model_len=512)
    except (QuantizationError, MissingDependencyError) as error:
        table.append(f"{about} refused: {first_line(error)} |")
        pytest.skip(table[-1])
    except Exception as error:
        table.append(f"{about} **failed**: {type(error).__name__}: {first_line(error)} |")
        raise
    names = list(checkpoint.report["logprobs"])
    prompts = checkpoint.report["prompts"]
    with engine:
        alone = {name: [logprobs(engine, [prompt], [name])[0] for prompt in prompts] for name in names}
        jobs = [(prompt, name) for prompt in prompts for name in names]
        mixed = logprobs(engine, [prompt for prompt, _ in jobs], [name for _, name in jobs])

    batch = sorted(
        abs(a - b)
        for (prompt, name), row in zip(jobs, mixed, strict=True)
        for a, b in zip(row, alone[name][prompts.index(prompt)], strict=True)
    )
    errors = {name: checkpoint.difference(alone, name) for name in names}
    effects = {
        name: statistics.median(checkpoint.difference(checkpoint.report["logprobs"], name, "base")) for name in names
    }
    lost = {
        name: statistics.mean(
            abs(a - b)
            for prompt, row in zip(prompts, rows, strict=True)
            for a, b in zip(row, sixteen_bits[tuple(prompt)][name], strict=True)
        )
        for name, rows in alone.items()
    }
    table.append(
        f"{about} yes | {' | '.join(cells(errors, effects))} | {percentile(batch, 0.95):.3f} |"
        f" {' / '.join(f'{distance:.2f}' for distance in lost.values())} |"
    )
    for name in names:
        assert statistics.median(errors[name]) < checkpoint.tolerance.median, table[-1]
        assert percentile(errors[name], 0.95) < checkpoint.tolerance.large, table[-1]
    assert percentile(batch, 0.95) < checkpoint.tolerance.batch, table[-1]


def logprobs(engine, prompts: list[list[int]], names: list[str]) -> list[list[float]]:
    """Return the log-probabilities of the prompts' tokens but the first, each with its adapter, in one batch."""
    params = {"temperature": 0.0, "max_tokens": 1, "prompt_logprobs": 0}
    adapters = [None if name == "base" else name for name in names]
    outputs = engine.generate(prompts, params, adapter=adapters, use_tqdm=False)
    return [
        [step[token].logprob for step, token in zip(output.prompt_logprobs[1:], prompt[1:], strict=True)]
        for prompt, output in zip(prompts, outputs, strict=True)
    ]


def read(report: Path) -> dict:
    """Return what a tool's script wrote about one format."""
    return json.loads(report.read_text(encoding="utf-8"))


def percentile(ordered: list[float], share: float) -> float:
    return ordered[int(share * len(ordered))]


def cells(errors: dict, effects: dict) -> Iterable[str]:
    for name, differences in errors.items():
        effect = "" if name == "base" else f" ({effects[name]:.2f})"
        yield f"{statistics.median(differences):.3f} / {percentile(differences, 0.95):.3f}{effect}"


def first_line(error: object) -> str:
    return str(error).strip().partition("\n")[0][:300]
