"""What Prometheus reads of engines, on the fake engine."""

import gc
import json
import re
import subprocess
import sys
import threading
import time
import urllib.request
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

pytest.importorskip("prometheus_client")

from prometheus_client import CollectorRegistry, generate_latest, start_http_server
from prometheus_client.parser import text_string_to_metric_families

from qlora_infer import AdapterError, Durations, QueueFullError, RequestRejectedError, RequestTimeoutError
from qlora_infer.durations import BOUNDS
from qlora_infer.metrics import BASE_MODEL, register
from qlora_infer.testing import FakeEngine, fake_engine, write_adapter

ROOT = Path(__file__).parents[1]
ENDLESS = {"max_tokens": 1000}


class Scrapes:
    """What is scraped from a registry."""

    def __init__(self):
        self.registry = CollectorRegistry()

    def text(self):
        return generate_latest(self.registry).decode()

    def families(self):
        return list(text_string_to_metric_families(self.text()))

    def samples(self):
        """Every series: (name, its labels) -> value."""
        return {
            (sample.name, *sorted(sample.labels.items())): sample.value
            for family in self.families()
            for sample in family.samples
        }

    def value(self, name, **labels):
        return self.samples().get((f"qlora_infer_{name}", *sorted({"engine": "fake/model", **labels}.items())))


class ScrapesOverHTTP(Scrapes):
    """The same from a real server."""

    def __init__(self):
        super().__init__()
        self.server, self.thread = start_http_server(0, addr="127.0.0.1", registry=self.registry)

    def text(self):
        url = f"http://127.0.0.1:{self.server.server_port}/metrics"
        with urllib.request.urlopen(url, timeout=10) as reply:
            return reply.read().decode()

    def close(self):
        self.server.shutdown()
        self.server.server_close()
        self.thread.join(10)


@pytest.fixture
def scrapes():
    return Scrapes()


@pytest.fixture
def scrapes_over_http():
    scrapes = ScrapesOverHTTP()
    yield scrapes
    scrapes.close()


@pytest.fixture(scope="module")
def sources(tmp_path_factory):
    folder = tmp_path_factory.mktemp("adapters")
    return {name: write_adapter(folder / name, seed=seed) for seed, name in enumerate("abc")}


def wait_until(condition, seconds=10):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it did not happen in time"
        time.sleep(0.005)


def is_counter(name):
    return name.endswith(("_total", "_count", "_sum", "_bucket"))


# What is told ------------------------------------------------------------------------------------------------------


def test_requests_and_tokens_are_told_by_adapter(scrapes_over_http, sources):
    """After a few requests, each adapter's series say exactly what it did, and @base what the model did alone."""
    scrapes = scrapes_over_http
    with fake_engine(adapters=sources) as engine:
        register(engine, registry=scrapes.registry)
        engine.generate(["one two"] * 3, adapter=["a", "a", None])
        assert scrapes.value("requests_total", adapter="a") == 2
        assert scrapes.value("request_success_total", adapter="a") == 2
        assert scrapes.value("prompt_tokens_total", adapter="a") == 4
        assert scrapes.value("generation_tokens_total", adapter="a") == 8
        assert scrapes.value("adapter_swaps_total", adapter="a") == 1
        assert scrapes.value("time_to_first_token_seconds_count", adapter="a") == 2
        assert scrapes.value("requests_total", adapter=BASE_MODEL) == 1
        assert scrapes.value("requests_total", adapter="b") is None
        assert scrapes.value("adapter_resident", adapter="b") == 1
        assert scrapes.value("adapter_loads_total", adapter="b") == 1
        assert scrapes.value("up") == 1
    assert scrapes.value("up") == 0
    assert scrapes.value("adapter_resident", adapter="b") == 0


def test_no_adapter_can_have_the_base_model_s_label(sources):
    """The label @base is a name that load_adapter refuses."""
    with fake_engine() as engine, pytest.raises(ValueError, match="must not have an '@'"):
        engine.load_adapter(BASE_MODEL, sources["a"])


def test_errors_are_told_by_kind(scrapes, sources):
    """A timeout, a refused prompt, a full queue and an adapter that does not load are each counted under their class."""
    backend = FakeEngine(step_seconds=0.02)
    arguments = {"max_model_len": 30, "max_waiting": 1, "engine_args": {"max_num_seqs": 1}}
    with fake_engine(backend=backend, adapters=sources, **arguments) as engine:
        register(engine, registry=scrapes.registry)
        with pytest.raises(RequestRejectedError):
            engine.generate(" ".join("x" * 40), adapter="a")
        with pytest.raises(RequestTimeoutError):
            engine.generate("one two three four five six seven", timeout=0.01, adapter="a")
        with pytest.raises(QueueFullError):
            handles = [engine.add_request("one two three", adapter="a", block=False) for _ in range(50)]
            assert not handles
        backend.refuse("d", "it looks bad")
        with pytest.raises(AdapterError):
            engine.load_adapter("d", sources["c"])
        with pytest.raises(AdapterError):
            engine.load_adapter("nowhere", ROOT / "there is no such folder")
        assert scrapes.value("request_errors_total", adapter="a", error="RequestRejectedError") == 1
        assert scrapes.value("request_errors_total", adapter="a", error="RequestTimeoutError") == 1
        assert scrapes.value("admission_rejections_total", adapter="a") == 1
        assert scrapes.value("adapter_load_errors_total", error="AdapterLoadError") == 1
        assert scrapes.value("adapter_load_errors_total", error="AdapterNotFoundError") == 1
        assert not [key for key in scrapes.samples() if {("adapter", "d"), ("adapter", "nowhere")} & set(key[1:])]


def test_evictions_and_reloads_are_told(scrapes, sources):
    """With room for one adapter, each other one that runs evicts it, and its next request loads it again."""
    with fake_engine(adapters=sources, max_loras=1, max_cpu_loras=1) as engine:
        register(engine, registry=scrapes.registry)
        evicted, loaded = (scrapes.value(f"adapter_{what}_total", adapter="c") for what in ("evictions", "loads"))
        assert (evicted, loaded, scrapes.value("adapter_resident", adapter="c")) == (0, 1, 1)
        engine.generate("x", adapter="a")
        assert scrapes.value("adapter_evictions_total", adapter="c") == 1
        assert scrapes.value("adapter_resident", adapter="c") == scrapes.value("adapter_in_slots", adapter="c") == 0
        assert scrapes.value("adapter_resident", adapter="a") == scrapes.value("adapter_in_slots", adapter="a") == 1
        engine.generate("x", adapter="c")
        assert scrapes.value("adapter_loads_total", adapter="c") == 2
        assert scrapes.value("adapter_load_time_seconds_count", adapter="c") == 2


def test_an_unloaded_adapter_s_series_go_away(scrapes, sources):
    """After unload_adapter nothing names the adapter; loaded again, it begins at 0."""
    with fake_engine(adapters=sources) as engine:
        register(engine, registry=scrapes.registry)
        engine.generate("x", adapter=["a"])
        engine.unload_adapter("a")
        engine.generate("flush")
        assert not [key for key in scrapes.samples() if ("adapter", "a") in key]
        engine.load_adapter("a", sources["a"])
        assert scrapes.value("adapter_loads_total", adapter="a") == 1
        engine.generate("x", adapter="a")
        assert scrapes.value("requests_total", adapter="a") == 1


# Sums --------------------------------------------------------------------------------------------------------------


@given(st.lists(st.floats(0, 1000), max_size=50))
def test_buckets_hold_what_was_measured(seconds):
    """Each bucket of Durations has the values between its two bounds, and they sum up to the count."""
    durations = Durations()
    for value in seconds:
        durations = durations.plus(value)
    edges = [-1.0, *BOUNDS, float("inf")]
    expected = [sum(low < value <= high for value in seconds) for low, high in zip(edges, edges[1:])]
    assert list(durations.buckets) == expected
    assert (durations.count, durations.total) == (len(seconds), pytest.approx(sum(seconds)))


WORK = st.lists(st.tuples(st.sampled_from(["a", "b", "c", None]), st.integers(1, 6), st.booleans()), max_size=30)


@settings(deadline=None, max_examples=15)
@given(st.lists(WORK, min_size=1, max_size=3))
def test_counters_only_grow_and_agree_with_what_was_done(sources, work):
    """While threads ask, cancel and are answered, no counter ever falls; in the end each has what was done."""
    scrapes = Scrapes()
    done = []

    def ask(engine, requests):
        for adapter, num_words, is_cancelled in requests:
            handle = engine.add_request(" ".join(["x"] * num_words), {"max_tokens": 2}, adapter=adapter)
            was_cancelled = is_cancelled and handle.cancel()
            done.append((adapter or BASE_MODEL, num_words, was_cancelled))
            if not was_cancelled:
                handle.result(timeout=10)

    with fake_engine(adapters=sources, max_loras=1, max_cpu_loras=2) as engine:
        register(engine, registry=scrapes.registry)
        threads = [threading.Thread(target=ask, args=(engine, requests)) for requests in work]
        for thread in threads:
            thread.start()
        before = {}
        while any(thread.is_alive() for thread in threads) or engine.stats().num_running + engine.stats().num_waiting:
            before = check_growth(before, scrapes.samples())
        check_growth(before, scrapes.samples())
        check_totals(scrapes, done)


def check_growth(before, after):
    for key, value in before.items():
        if is_counter(key[0]):
            assert after[key] >= value, key
    return after


def check_totals(scrapes, done):
    for adapter in {adapter for adapter, _, _ in done}:
        mine = [row for row in done if row[0] == adapter]
        num_cancelled = sum(row[2] for row in mine)
        cancelled = scrapes.value("request_errors_total", adapter=adapter, error="RequestCancelledError")
        assert scrapes.value("requests_total", adapter=adapter) == len(mine)
        assert scrapes.value("request_success_total", adapter=adapter) == len(mine) - num_cancelled
        assert (cancelled or 0) == num_cancelled
        assert scrapes.value("time_to_first_token_seconds_count", adapter=adapter) == len(mine) - num_cancelled
        assert scrapes.value("prompt_tokens_total", adapter=adapter) >= sum(row[1] for row in mine if not row[2])


def test_the_buckets_of_a_histogram_agree_with_its_count(scrapes, sources):
    """In every scraped histogram buckets never fall towards the larger bounds, and the last is the count."""
    with fake_engine(adapters=sources) as engine:
        register(engine, registry=scrapes.registry)
        engine.generate(["x y z"] * 30, adapter=["a", "b", None] * 10)
        histograms = [family for family in scrapes.families() if family.type == "histogram"]
        assert len(histograms) == 4
        for family in histograms:
            counts = {}
            for sample in family.samples:
                of = counts.setdefault((sample.labels["engine"], sample.labels.get("adapter")), {})
                of.setdefault(sample.name.removeprefix(family.name), []).append(sample.value)
            for of in counts.values():
                assert of["_bucket"] == sorted(of["_bucket"])
                assert [of["_bucket"][-1]] == of["_count"]
                assert len(of["_bucket"]) == len(BOUNDS) + 1
        stats = engine.stats()
        total = scrapes.value("request_queue_time_seconds_sum", adapter="a")
        assert total == pytest.approx(stats.adapters["a"].queue_time.total)


# Engines -----------------------------------------------------------------------------------------------------------


def test_engines_share_a_registry(scrapes):
    """Two engines have series of their own under each metric; a name that is taken is refused while its engine runs."""
    with fake_engine() as one, fake_engine() as two:
        register(one, registry=scrapes.registry)
        with pytest.raises(ValueError, match="another engine is exported as 'fake/model'"):
            register(two, registry=scrapes.registry)
        register(two, name="two", registry=scrapes.registry)
        one.generate("x y")
        two.generate("x")
        assert scrapes.value("prompt_tokens_total", adapter=BASE_MODEL) == 2
        assert scrapes.value("prompt_tokens_total", engine="two", adapter=BASE_MODEL) == 1
    with fake_engine() as three:
        register(three, registry=scrapes.registry)
        assert scrapes.value("up") == 1


def test_registering_keeps_no_engine_alive(scrapes):
    """An engine that is dropped is closed as ever, and its series are gone; a removed one has none either."""
    backend = FakeEngine()
    engine = fake_engine(backend=backend)
    collector = register(engine, registry=scrapes.registry)
    assert scrapes.value("up") == 1
    collector.remove(engine)
    assert scrapes.value("up") is None
    collector.add(engine)
    assert scrapes.value("up") == 1
    del engine
    gc.collect()
    assert not backend.is_running
    assert scrapes.samples() == {}


def test_without_prometheus_client_the_error_names_the_extra():
    """Importing qlora_infer.metrics without the package says what to install; the rest of the library works."""
    code = (
        "import sys; sys.modules['prometheus_client'] = None\n"
        "from qlora_infer.testing import fake_engine\n"
        "fake_engine().close()\n"
        "try:\n    import qlora_infer.metrics\n"
        "except ImportError as error:\n    print(type(error).__name__, error)"
    )
    shown = subprocess.check_output([sys.executable, "-c", code], text=True)
    assert shown == (
        "MissingDependencyError metrics need the package prometheus_client: pip install 'qlora-infer[metrics]'\n"
    )


# What is written of them -------------------------------------------------------------------------------------------


def exported():
    """Each metric's name, as it is scraped, with its kind and its labels."""
    registry = CollectorRegistry()
    with fake_engine() as engine:
        families = list(register(engine, registry=registry).describe())
    return {
        family.name + "_total" * (family.type == "counter"): (family.type, ", ".join(family._labelnames))
        for family in families
    }


def test_the_dashboard_asks_for_metrics_that_exist():
    """Every metric of the Grafana dashboard is exported, and every exported one is on it."""
    dashboard = json.loads((ROOT / "examples/grafana_dashboard.json").read_text())
    asked = set(re.findall(r"qlora_infer_\w+", json.dumps(dashboard["panels"] + dashboard["templating"]["list"])))
    assert {name.removesuffix("_bucket") for name in asked} == set(exported())


def test_the_dashboards_queries_fit_their_metrics():
    """Labels are those of the metric, counters and buckets are rates, gauges are not; one unit and one place a panel."""
    panels = json.loads((ROOT / "examples/grafana_dashboard.json").read_text())["panels"]
    metrics, places = exported(), set()
    for panel in panels:
        where = panel["gridPos"]
        squares = {(where["x"] + x, where["y"] + y) for x in range(where["w"]) for y in range(where["h"])}
        assert not squares & places, panel["title"]
        places |= squares
        for target in panel["targets"]:
            query = target["expr"]
            ((name, selected),) = re.findall(r"(qlora_infer_\w+)\{([^}]*)\}", query)
            kind, labels = metrics[name.removesuffix("_bucket")]
            shown = set(re.findall(r"(\w+)=~", selected)) | set(re.findall(r"\{\{(\w+)\}\}", target["legendFormat"]))
            grouped = {label for group in re.findall(r"by \(([^)]*)\)", query) for label in group.split(", ")}
            assert shown | (grouped - {"le"}) <= set(labels.split(", ")), query
            assert ("rate(" in query) == (kind != "gauge") or panel["type"] == "stat", query
            assert name.endswith("_bucket") == (kind == "histogram") == ("histogram_quantile" in query), query
            assert (panel["fieldConfig"]["defaults"]["unit"] == "s") == (kind == "histogram"), panel["title"]


def test_the_page_lists_every_metric_with_its_kind():
    """The table of docs/metrics.md is complete, and right about counters, gauges, histograms and labels."""
    page = (ROOT / "docs/metrics.md").read_text()
    rows = re.findall(r"^\| `(qlora_infer_\w+)` \| (\w+) \| ([\w, ]+) \|", page, re.MULTILINE)
    assert {name: (kind, labels) for name, kind, labels in rows} == exported()
