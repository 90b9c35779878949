"""``vllm bench serve``, as benchmarks/serve.py runs it, against two servers of the fake engine."""

import importlib.util
import sys
from argparse import Namespace
from pathlib import Path

import pytest

pytest.importorskip("vllm.entrypoints.launchers")

from served import ByteEngine, served

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


@pytest.fixture
def benchmark(monkeypatch):
    """The script, which sets variables for the engines that it starts when it is imported."""
    monkeypatch.syspath_prepend(BENCHMARKS)
    for name in ("VLLM_CPU_KVCACHE_SPACE", "VLLM_LOGGING_LEVEL"):
        monkeypatch.setenv(name, "")  # so that it is put back
    spec = importlib.util.spec_from_file_location("benchmark_serve", BENCHMARKS / "serve.py")
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, spec.name, module)
    spec.loader.exec_module(module)
    return module


def test_vllm_bench_serve_measures_the_server(benchmark, tmp_path, byte_model):
    """Every request of vLLM's load generator is answered, by the adapters that it names, and pairs become a table."""
    options = {"adapters": ("a0", "a1"), "api_key": None}
    arguments = Namespace(requests=20, input_len=8, output_len=16, repeats=1)
    with (
        served(tmp_path / "ours", backend=ByteEngine(step_seconds=0.002), **options) as (ours, engine),
        served(tmp_path / "plain", backend=ByteEngine(step_seconds=0.002), **options) as (plain, _),
    ):
        urls = {"plain": plain, "ours": ours}
        runs = [run for number in (0, 2) for run in benchmark.measure(urls, byte_model, number, "inf", arguments)]
        finished = {name: counts.num_finished for name, counts in engine.stats().adapters.items()}
    assert finished[None] == finished["a0"] + finished["a1"] == 40
    assert min(finished.values()) > 0
    assert sorted((run["num_adapters"], run["side"]) for run in runs) == [
        *((0, "ours"), (0, "plain"), (2, "ours"), (2, "plain")),
    ]
    table = list(benchmark.rows(runs))
    assert [row[:2] for row in table] == [(0, "inf"), (2, "inf")]
    assert all(len(row) == 2 + len(benchmark.MEASURES) and row[2] > 0 for row in table)
