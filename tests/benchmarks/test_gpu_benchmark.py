"""What benchmarks/gpu.py plans, measures, prints and keeps, with the fake engine in place of two engines on a GPU."""

import hashlib
import importlib.util
import json
import math
import os
import sys
import time

import pytest
from doc_blocks import ROOT

from qlora_infer.testing import FakeEngine, fake_engine, write_adapter

BENCHMARKS = ROOT / "benchmarks"


@pytest.fixture
def load(monkeypatch):
    """Imports a benchmark by its name; scripts import each other as those of one folder do."""
    monkeypatch.syspath_prepend(BENCHMARKS)
    for name in ("VLLM_CPU_KVCACHE_SPACE", "VLLM_LOGGING_LEVEL"):
        monkeypatch.setenv(name, "")  # so that it is put back
        monkeypatch.delenv(name)

    def load(name):
        # Not by import: tests/gpu is a package of that name.
        spec = importlib.util.spec_from_file_location(f"benchmark_{name}", BENCHMARKS / f"{name}.py")
        module = importlib.util.module_from_spec(spec)
        monkeypatch.setitem(sys.modules, spec.name, module)
        spec.loader.exec_module(module)
        return module

    return load


class FakeSide:
    """An engine that answers with as many words as it may."""

    def __init__(self, folder, num_adapters, log, name):
        adapters = {f"a{i}": write_adapter(folder / f"{name}{i}", seed=i) for i in range(num_adapters)}
        self.stepped = FakeEngine(reply=lambda prompt, adapter: "word " * 50)
        self.engine = fake_engine(backend=self.stepped, adapters=adapters)
        self.drops = 0
        self._log, self._name = log, name

    @property
    def num_swaps(self):
        return sum(adapter.num_swaps for adapter in self.engine.stats().adapters.values())

    def run(self, texts, params, names):
        self._log.append((self._name, len(texts), set(names)))
        return self.engine.generate(list(texts), list(params), adapter=list(names), use_tqdm=False)

    def drop_adapters(self):
        self.drops += 1


def prompts(number, num_tokens):
    return ["word"] * number


def test_p99_is_what_99_of_100_are_not_above(load):
    """Of 100 values the 99th, of a few the largest, of none not a number."""
    p99 = load("runs").p99
    assert p99(list(range(1, 101))) == 99
    assert p99([3.0, 1.0]) == 3.0
    assert math.isnan(p99([]))


def test_the_plan_has_every_order_of_more_adapters_than_slots(load):
    """The most requests first; what is compared with the order sorted by hand comes after it."""
    runs = load("runs")
    cells = list(runs.plan([0, 8, 32], [1, 64, 512], 8))
    described = [(c.num_adapters, c.num_requests, c.order, c.is_cold) for c in cells]
    assert described == [
        *((number, requests, "interleaved", False) for number in (0, 8) for requests in (512, 64, 1)),
        (32, 512, "sorted by hand", False),
        (32, 512, "interleaved", False),
        (32, 512, "shuffled", False),
        (32, 512, "interleaved", True),
        (32, 512, "Zipf, sorted by hand", False),
        (32, 512, "Zipf", False),
        (32, 64, "interleaved", False),
        (32, 1, "interleaved", False),
    ]
    unsorted = [cell for cell in cells if cell.num_requests == 512 and cell.num_adapters == 32]
    assert all(cells.index(cell.by_hand) <= cells.index(cell) for cell in unsorted)
    assert cells[0].names == [None] * 512
    for cell in unsorted:
        assert sorted(cell.names) == sorted(cell.by_hand.names)


def test_pairs_are_run_in_turn_kept_and_printed(load, tmp_path, capsys):
    """Pairs of each cell, every other the other way round; each run a line of JSON, each cell a row."""
    runs = load("runs")
    log = []
    sides = [FakeSide(tmp_path, 4, log, name) for name in ("plain", "ours")]
    left, right = ((name, runs.Timed(side, 5, prompts)) for name, side in zip(("plain", "ours"), sides, strict=True))
    kept = tmp_path / "runs.jsonl"
    comparison = runs.Comparison(left, right, 2, time.monotonic() + 1000, {"shape": "tiny"}, kept)
    cells = list(runs.plan([0, 4], [1, 8], 2))
    comparison.measure(cells)

    lines = [json.loads(line) for line in kept.read_text().splitlines()]
    assert [(line["side"], line["pair"]) for line in lines[:4]] == [
        ("plain", 0),
        ("ours", 0),
        ("ours", 1),
        ("plain", 1),
    ]
    assert [(line["num_adapters"], line["num_requests"], line["side"]) for line in lines[4:20]] == [
        (0, 1, name) for name in ["plain", "ours", "ours", "plain"] * runs.OFTEN
    ]
    # The orders of as many requests of as many adapters are run in turn, too.
    orders = [(line["order"], line["is_cold"]) for line in lines if line["num_requests"] == 8 and line["num_adapters"]]
    assert orders[::2] == orders[1::2]
    assert orders[0] == ("sorted by hand", False)
    assert orders[:12] == orders[12:][::-1]
    assert len(lines) == 4 * (7 + 2 * runs.OFTEN)
    assert {line["shape"] for line in lines} == {"tiny"}
    assert all(line["tokens_per_second"] > 0 for line in lines)
    assert all(line["num_steps"] >= 5 for line in lines)
    assert all(1 <= line["num_first_steps"] <= line["num_requests"] for line in lines)
    assert all(0 < line["first_token_median"] <= line["first_token_p99"] for line in lines)
    assert all(0 < line["gap_median"] <= line["gap_p99"] for line in lines)
    assert log[0] == ("plain", 8, {None})
    assert [side.drops for side in sides] == [2, 2]  # before each run from disk

    header, dashes, *rows = capsys.readouterr().out.splitlines()
    assert len(rows) == len(cells)
    assert {row.count("|") for row in (header, dashes, *rows)} == {18}
    assert rows[0].startswith("| base | 8 | - | 2 |")
    assert rows[1].startswith(f"| base | 1 | - | {2 * runs.OFTEN} |")
    assert "| 4 | 8 | interleaved, from disk |" in rows[5]
    for column in (8, 9):
        shares = [row.split("|")[column].strip() for row in rows]
        assert [share == "-" for share in shares] == [not cell.num_adapters or cell.num_requests == 1 for cell in cells]
    for side in sides:
        side.engine.close()


def test_swaps_and_steps_are_counted_in_each_run(load, tmp_path):
    """The base model has none, an adapter that is in its slot has none, and adapters that take turns in a slot each one."""
    runs = load("runs")
    adapters = {f"a{i}": write_adapter(tmp_path / f"a{i}", seed=i) for i in range(2)}
    side = FakeSide(tmp_path, 0, [], "ours")
    side.engine.close()
    side.engine = fake_engine(backend=side.stepped, adapters=adapters, max_loras=1)
    timed = runs.Timed(side, 5, prompts)
    assert timed.run(runs.Cell(0, 4)).swaps_per_second == 0
    timed.run(runs.Cell(1, 1))
    assert timed.run(runs.Cell(1, 1)).swaps_per_second == 0
    began, before = time.monotonic(), side.num_swaps
    run = timed.run(runs.Cell(2, 2, "sorted by hand"))
    assert side.num_swaps - before == 1
    assert run.swaps_per_second >= 1 / (time.monotonic() - began)
    assert run.num_steps >= 10
    assert run.num_first_steps == 2
    assert run.num_large_steps == 0


def test_only_a_run_from_disk_reads_adapters(load, tmp_path):
    """What such a run has not brought back into host memory is read before the next run, and is not a part of it."""
    runs = load("runs")
    log = []
    side = FakeSide(tmp_path, 4, log, "ours")
    timed = runs.Timed(side, 5, prompts)
    assert timed.run(runs.Cell(2, 2, is_cold=True)).num_steps >= 5
    run = timed.run(runs.Cell(4, 8))
    assert log == [("ours", 2, {"a0", "a1"}), ("ours", 2, {"a2", "a3"}), ("ours", 8, {"a0", "a1", "a2", "a3"})]
    assert run.num_steps >= 5
    timed.swaps(["a0", "a1"])
    log.clear()
    timed.run(runs.Cell(4, 4))
    timed.run(runs.Cell(4, 4))
    assert log == [("ours", 2, {"a2", "a3"}), *[("ours", 4, {"a0", "a1", "a2", "a3"})] * 2]
    side.engine.close()


def test_steps_are_large_by_their_prompts(load, tmp_path):
    """A step of one prompt has a graph with 300 tokens, and none with 600."""
    runs = load("runs")
    side = FakeSide(tmp_path, 0, [], "ours")
    side.engine.close()
    side.engine = fake_engine(backend=side.stepped, engine_args={"max_num_seqs": 1})
    found = [runs.Timed(side, num_tokens, prompts).run(runs.Cell(0, 3), num_tokens=1) for num_tokens in (300, 600)]
    assert [(run.num_first_steps, run.num_large_steps) for run in found] == [(3, 0), (3, 3)]
    side.engine.close()


def test_a_share_of_the_order_sorted_by_hand_is_of_the_same_turn(load, capsys):
    """A machine that becomes half as fast from one turn to the next changes no share."""
    runs = load("runs")

    class Drifting:
        """Fast in the first turn; twice as fast with the order sorted by hand as with any other."""

        def __init__(self, speed):
            self._speeds = {name: [speed, speed / 2] for name in ("sorted by hand", "shuffled")}

        def run(self, cell):
            speed = self._speeds[cell.order].pop(0) * (2 if cell.order == "sorted by hand" else 1)
            return runs.Run(speed, 0.0, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0)

    sides = ("plain", Drifting(100.0)), ("ours", Drifting(150.0))
    cells = [runs.Cell(4, 8, order) for order in ("sorted by hand", "shuffled")]
    runs.Comparison(*sides, 2, time.monotonic() + 1000, {}, None).measure(cells)
    rows = [[cell.strip() for cell in row.split("|")] for row in capsys.readouterr().out.splitlines()[2:]]
    assert [row[7:10] for row in rows] == [["1.50", "1.50", "1.00"], ["1.50", "0.75", "0.50"]]


def test_after_the_deadline_no_row_is_begun(load, tmp_path, capsys):
    """What there was no time for is said."""
    runs = load("runs")
    side = FakeSide(tmp_path, 1, [], "ours")
    timed = runs.Timed(side, 5, prompts)
    comparison = runs.Comparison(("a", timed), ("b", timed), 1, time.monotonic() - 1, {}, None)
    comparison.measure([runs.Cell(0, 1), runs.Cell(1, 1)])
    assert "left out for lack of time: 2 of 2 rows" in capsys.readouterr().out
    side.engine.close()


def test_swaps_are_told_by_where_the_adapter_is(load, tmp_path):
    """In a slot, in host memory and on disk; only for the last the adapters are dropped."""
    runs = load("runs")
    side = FakeSide(tmp_path, 4, [], "ours")
    found = runs.Timed(side, 5, prompts).swaps(["a0", "a1", "a2", "a3"])
    assert list(found) == ["in a slot", "in host memory", "on disk"]
    assert all(milliseconds > 0 for milliseconds in found.values())
    assert side.drops == 1
    side.engine.close()


def test_arguments(load):
    """The default is 8 billion parameters in GPTQ against plain vLLM; the example's settings bring their own adapters."""
    gpu = load("gpu")
    default = gpu.parse([])
    assert (default.shape, default.quantization, default.against, default.num_adapters) == ("8B", "gptq", ["plain"], 32)
    assert gpu.limits(default)["max_cpu_loras"] == 40
    assert gpu.limits(default)["load_format"] == "dummy"
    assert "load_format" not in gpu.limits(gpu.parse(["--quantization", "bitsandbytes"]))
    assert gpu.parse(["--adapters", "0", "1", "--against", "example"]).num_adapters == 32
    chosen = gpu.planned(gpu.parse(["--adapters", "8", "32", "--orders", "shuffled", "interleaved, from disk"]))
    assert [(cell.num_adapters, cell.title) for cell in chosen] == [(32, "shuffled"), (32, "interleaved, from disk")]
    with pytest.raises(SystemExit, match="sorted by hand"):
        gpu.planned(gpu.parse(["--orders", "from disk"]))
    tuned = gpu.parse(["--ours-args", '{"specialize_active_lora": true}', "--ours-env", "A=1"])
    assert "ours with {'specialize_active_lora': True, 'A': '1'}" in gpu.title(tuned)
    assert "lora_kernels=vllm" in gpu.title(gpu.parse(["--kernels", "vllm"]))


def test_environment_variables_are_put_back(load, monkeypatch):
    """What only ours is given is gone when the other side starts."""
    gpu = load("gpu")
    monkeypatch.setenv("QLORA_TEST_SET", "before")
    with gpu.environment(["QLORA_TEST_SET=within", "QLORA_TEST_UNSET=within"]):
        assert (os.environ["QLORA_TEST_SET"], os.environ["QLORA_TEST_UNSET"]) == ("within", "within")
    assert os.environ["QLORA_TEST_SET"] == "before"
    assert "QLORA_TEST_UNSET" not in os.environ


def test_no_two_adapters_are_the_same(load, tmp_path):
    """Adapters beyond the written contents are copies with another number, and fit the model they are made for."""
    shapes = load("llama_shapes")
    with shapes.model_and_adapters("tiny", "gptq", tmp_path, 6, 8) as (model, adapters):
        contents = {
            hashlib.sha256((path / "adapter_model.safetensors").read_bytes()).digest() for path in adapters.values()
        }
        assert len(contents) == 6
        modules = sys.modules["common"].llama_modules(model)
        with fake_engine(backend=FakeEngine(modules=modules), adapters=adapters) as engine:
            assert {adapter.num_modules for adapter in engine.adapters.values()} == {14}


def test_the_picture_shows_the_unsorted_order(load):
    """Of 32 adapters the shuffled runs with the most requests, of the base model what there is; cold runs are left out."""
    line = {"against": "plain", "shape": "8B", "quantization": "gptq", "is_cold": False, "side": "ours"}

    def run(num_adapters, num_requests, order, speed, **more):
        asked = {"num_adapters": num_adapters, "num_requests": num_requests, "order": order}
        return {**line, **asked, "tokens_per_second": speed, **more}

    lines = [
        run(0, 512, "interleaved", 8000.0),
        run(32, 512, "shuffled", 5000.0),
        run(32, 512, "shuffled", 5200.0),
        run(32, 512, "sorted by hand", 5500.0),
        run(32, 1, "interleaved", 150.0),
        run(32, 512, "interleaved", 900.0, is_cold=True),
        run(32, 512, "shuffled", 4000.0, side="plain"),
        run(1, 64, "interleaved", 30.0, against="example"),
        {**line, "load_adapter_ms": 100.0},
    ]
    found = load("plot_adapters").panels(lines)
    assert found == {"8B gptq": {"ours": {0: 8000.0, 32: 5100.0}, "plain": {32: 4000.0}}}


def test_a_share_is_of_the_same_sides_base_model(load):
    """Each side's speeds are divided by that of its own base model, which becomes 1."""
    panels = {"8B gptq": {"ours": {0: 8000.0, 8: 6000.0}, "plain": {0: 4000.0, 8: 1000.0}}}
    assert load("plot_adapters").shares(panels) == {"8B gptq": {"ours": {0: 1.0, 8: 0.75}, "plain": {0: 1.0, 8: 0.25}}}


def test_the_picture_is_an_svg(load, tmp_path):
    """The same lines give the same file."""
    pytest.importorskip("matplotlib")
    plot = load("plot_adapters")
    for name in ("one.svg", "two.svg"):
        plot.draw(
            {"8B gptq": {"ours": {0: 8000.0, 1: 6000.0, 32: 5000.0}, "plain": {1: 6000.0}}}, tmp_path / name, "tokens/s"
        )
    assert (tmp_path / "one.svg").read_text().count("<svg") == 1
    assert (tmp_path / "one.svg").read_bytes() == (tmp_path / "two.svg").read_bytes()


def test_the_table_of_swap_rates_has_a_row_for_each_model_number_and_order(load):
    """Of the runs with the most requests against plain vLLM; medians, and the median of the ratios of pairs."""
    line = {"against": "plain", "shape": "1.1B", "quantization": "awq", "is_cold": False, "order": "shuffled"}

    def runs(num_adapters, plain, ours, **more):
        asked = {**line, "num_adapters": num_adapters, "num_requests": 512, **more}
        return [
            {**asked, "side": side, "tokens_per_second": speed, "swaps_per_second": rate, "num_steps": 100 / rate}
            for pair in zip(plain, ours, strict=True)
            for side, (speed, rate) in zip(("plain", "ours"), pair, strict=True)
        ]

    lines = [
        *runs(0, [(100.0, 0.5)], [(110.0, 0.5)], num_large_steps=9.0),
        *runs(32, [(100.0, 4.0), (50.0, 2.0), (80.0, 3.0)], [(200.0, 1.0), (50.0, 2.0), (120.0, 1.5)]),
        *runs(32, [(10.0, 4.0)], [(20.0, 3.0)], is_cold=True),
        *runs(32, [(1.0, 1.0)], [(1.0, 1.0)], num_requests=64),
        *runs(4, [(1.0, 1.0)], [(1.0, 1.0)], against="example"),
        {**line, "side": "ours", "load_adapter_ms": 100.0},
        runs(128, [(1.0, 1.0)], [(1.0, 1.0)])[0],  # the end came before the other side's turn
    ]
    assert load("swap_table").rows(lines) == [
        ("1.1B awq", "base", "-", 1, 0.5, 0.5, 200.0, 200.0, 9.0, 9.0, 100.0, 110.0, 1.1),
        ("1.1B awq", 32, "shuffled", 3, 3.0, 1.5, 100 / 3, 100 / 1.5, "-", "-", 80.0, 120.0, 1.5),
        ("1.1B awq", 32, "shuffled, from disk", 1, 4.0, 3.0, 25.0, 100 / 3, "-", "-", 10.0, 20.0, 2.0),
    ]
