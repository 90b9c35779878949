"""benchmarks/soak.py, against the fake engine: two minutes of its traffic, and what its verdict must not miss."""

import functools
import json
import sys

import pytest
from doc_blocks import ROOT

from qlora_infer.testing import fake_engine

pytest.importorskip("torch")  # reads tensors for adapters in memory
pytest.importorskip("psutil")  # comes with vLLM

MODULES = ("common", "soak", "soak_adapters", "soak_samples", "soak_traffic", "plot_soak")
MAX_MODEL_LEN = 128


@pytest.fixture
def soak(monkeypatch):
    """The script, imported as it imports its siblings."""
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    for name in ("VLLM_CPU_KVCACHE_SPACE", "VLLM_LOGGING_LEVEL"):
        monkeypatch.setenv(name, "")  # so that it is put back
        monkeypatch.delenv(name)
    for name in MODULES:
        monkeypatch.delitem(sys.modules, name, raising=False)
    import soak

    yield soak
    for name in MODULES:
        sys.modules.pop(name, None)


@pytest.fixture
def run(soak, tmp_path):
    """A run on a fake engine, with another backend on demand; gives the verdict and the lines of JSON."""
    from soak_adapters import broken_adapters, fake_contents

    def run(number, *, backend=None, **load):
        contents = fake_contents(number, tmp_path / "contents")
        broken = broken_adapters(contents[0], tmp_path / "broken")
        lines = []
        engine = soak.some_engine(contents, is_fake=True) if backend is None else start(backend)
        with engine:
            verdict = soak.soak(
                engine, contents, broken, soak.Load(**load), max_model_len=MAX_MODEL_LEN, write=lines.append
            )
        return verdict, json.loads(json.dumps(lines))

    return run


def start(backend):
    return fake_engine(backend=backend, max_loras=4, max_cpu_loras=16, max_model_len=MAX_MODEL_LEN)


def test_two_minutes_of_traffic_lose_and_leave_nothing(run, tmp_path):
    """Each request ends once, each text is its version's own, and neither threads nor files nor copies grow."""
    verdict, lines = run(60, minutes=2, interval=5, pause=0.3)
    assert verdict.passed, str(verdict)
    assert {"output", "RequestCancelledError", "RequestTimeoutError", "RequestRejectedError"} == set(
        verdict.counts["ends"]
    )
    assert len(verdict.counts["calls"]) == 8  # each kind of change
    assert verdict.growths

    from plot_soak import draw, panels

    pytest.importorskip("matplotlib")
    draw(panels(lines), tmp_path / "soak.svg")
    assert "open files of the caller" in (tmp_path / "soak.svg").read_text()


def test_an_engine_that_dies_ends_the_run(run):
    """The run does not go on to its end, and its verdict names the error."""
    from soak_adapters import ContentFake

    class Mortal(ContentFake):
        num_requests = 0

        def add_request(self, request):
            self.num_requests += 1
            if self.num_requests > 60:  # 12 texts alone, and some traffic
                self.die()
            return super().add_request(request)

    verdict, lines = run(3, backend=Mortal(step_seconds=0.001), minutes=5, interval=1, pause=0.05)
    assert not verdict.passed
    assert "EngineDeadError" in str(verdict)
    assert lines[-1]["kind"] == "verdict"


SHORT = {"minutes": 0.05, "interval": 1, "pause": 0.01}


def test_a_wrong_text_is_a_fault(run, soak):
    """An engine that answers with one adapter's text for all is found out, with both texts."""
    from soak_adapters import ContentFake

    class OneAnswer(ContentFake):
        num_requests = 0

        def add_request(self, request):
            self.num_requests += 1
            return super().add_request(request)

        def _answer(self, prompt, adapter):
            if self.num_requests > 5 * 3 + 3 and adapter:  # each content alone came before
                self._alpha = 1
            return super()._answer(prompt, adapter)

    verdict, _ = run(5, backend=OneAnswer(step_seconds=0.001), **SHORT)
    assert not verdict.passed
    assert any("'content 1 answers" in fault and "'content 2 answers" in fault for fault in verdict.faults)


def test_a_request_that_is_not_counted_is_a_fault(soak):
    """Ends that callers did not see, or the engine did not, are listed by kind."""
    from soak_traffic import Counts, Ledger, balance

    ledger = Ledger()
    ledger.submitted(3)
    ledger.ended(ValueError())
    ledger.ends["output"] = 1
    ledger.dropped()
    even = functools.partial(Counts, errors={"ValueError": 1, "RequestCancelledError": 1}, num_unfinished=0)
    assert balance(ledger, even(num_finished=1, num_failed=2)) == []
    assert len(balance(ledger, even(num_finished=2, num_failed=2))) == 1  # one ended twice
    assert len(balance(ledger, Counts(1, 1, 1, {"ValueError": 1}))) == 1  # one has not ended
    ledger.submitted()
    assert len(balance(ledger, even(num_finished=2, num_failed=2))) == 1  # its caller has seen no end


def some_samples(soak, **quantities):
    """Forty samples of two hours; each quantity as a function of the sample's number."""
    from soak_samples import FLOORS, Sample

    fixed = dict.fromkeys([*FLOORS, "kv_busy"], lambda number: 100)
    return [
        Sample(hours=number / 20, requests=number, **{n: f(number) for n, f in {**fixed, **quantities}.items()})
        for number in range(1, 41)
    ]


def test_growth_is_told_from_noise_and_from_a_warm_up(soak):
    """A leak is found in noise of its own size; noise, a fall, and a rise at the beginning are none."""
    from soak_samples import growths

    found = growths(
        some_samples(
            soak,
            files_caller=lambda number: 100 + number // 4,
            rss_engine=lambda number: 500 + number + 8 * (number % 3),
            rss_caller=lambda number: 500 + 30 * (number % 7),
            objects=lambda number: 1e6 - 1e4 * number,
            threads_engine=lambda number: min(number, 8),
        )
    )
    assert {growth.quantity for growth in found if growth.is_beyond_noise} == {"files_caller", "rss_engine"}
