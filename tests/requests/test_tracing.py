"""OpenTelemetry spans of requests, read from the real SDK, on the fake engine."""

import asyncio
import logging
import subprocess
import sys
import time

import pytest

pytest.importorskip("opentelemetry.sdk")

from opentelemetry import trace
from opentelemetry.sdk.trace import SpanProcessor, TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.trace import StatusCode

from qlora_infer import QueueFullError, RequestCancelledError, RequestRejectedError, RequestTimeoutError
from qlora_infer.testing import FakeEngine, fake_engine, write_adapter

SECRET = "swordfish"


class Faulty(SpanProcessor):
    """Raises when it is told to."""

    fails = False

    def on_end(self, span):
        if self.fails:
            raise RuntimeError("the exporter is broken")


@pytest.fixture(scope="module")
def recorded():
    # The global provider can be set once in a process; without exporters it is as good as none for the other tests.
    provider, exporter = TracerProvider(), InMemorySpanExporter()
    provider.add_span_processor(SimpleSpanProcessor(exporter))
    provider.add_span_processor(Faulty())
    trace.set_tracer_provider(provider)
    yield exporter
    provider.shutdown()


@pytest.fixture
def exporter(recorded):
    recorded.clear()
    return recorded


def spans(exporter, number):
    deadline = time.monotonic() + 10
    while len(exporter.get_finished_spans()) < number:
        assert time.monotonic() < deadline
        time.sleep(0.005)
    assert len(exporter.get_finished_spans()) == number
    return exporter.get_finished_spans()


def test_a_request_is_a_span_with_its_numbers(exporter, tmp_path):
    """Name, kind, attributes, events and times of a request on an adapter are exactly these."""
    began = time.time_ns()
    with fake_engine(adapters={"pirate": write_adapter(tmp_path / "pirate")}) as engine:
        output = engine.generate(["ahoy there"], {"max_tokens": 3, "n": 2}, adapter="pirate", priority=4, timeout=50)[0]
    (span,) = spans(exporter, 1)
    assert (span.name, span.kind.name) == ("text_completion fake/model", "INTERNAL")
    assert dict(span.attributes) == {
        "gen_ai.operation.name": "text_completion",
        "gen_ai.provider.name": "qlora_infer",
        "gen_ai.request.model": "fake/model",
        "gen_ai.request.max_tokens": 3,
        "gen_ai.request.choice.count": 2,
        "gen_ai.response.id": output.request_id,
        "gen_ai.response.finish_reasons": ("length", "length"),
        "gen_ai.usage.input_tokens": 2,
        "gen_ai.usage.output_tokens": 6,
        "qlora_infer.priority": 4,
        "qlora_infer.timeout": 50.0,
        "qlora_infer.adapter.name": "pirate",
        "qlora_infer.adapter.version": 1,
    }
    assert [event.name for event in span.events] == ["qlora_infer.admitted", "qlora_infer.first_token"]
    moments = [began, span.start_time, *(event.timestamp for event in span.events), span.end_time, time.time_ns()]
    assert moments == sorted(moments)
    assert span.end_time - span.start_time == pytest.approx(output.times.total * 1e9, abs=1e5)
    assert span.status.status_code is StatusCode.UNSET


def test_a_chat_is_called_a_chat(exporter):
    """engine.chat makes spans of the operation chat; the base model has no adapter attributes."""
    with fake_engine() as engine:
        engine.chat([{"role": "user", "content": "hello"}])
    (span,) = spans(exporter, 1)
    assert span.name == "chat fake/model"
    assert "qlora_infer.adapter.name" not in span.attributes


def test_the_caller_s_span_is_the_parent(exporter):
    """Requests of threads and of coroutines that run at once are each a child of the span that is current there."""
    tracer = trace.get_tracer("test")

    async def ask(engine, number):
        with tracer.start_as_current_span(f"caller {number}"):
            await asyncio.sleep(0)
            return (await engine.add_request(f"n {number}")).request_id

    async def ask_all(engine):
        return await asyncio.gather(*(ask(engine, number) for number in range(5)))

    with fake_engine() as engine:
        ids = asyncio.run(ask_all(engine))
        with tracer.start_as_current_span("caller 5"):
            ids += [output.request_id for output in engine.generate(["n 5"])]
        ids += [output.request_id for output in engine.generate(["alone"])]
    found = spans(exporter, 13)
    callers = {span.context.span_id: span.name for span in found if span.name.startswith("caller")}
    requests = {span.attributes["gen_ai.response.id"]: span.parent for span in found if "caller" not in span.name}
    parents = [parent and callers[parent.span_id] for parent in (requests[request_id] for request_id in ids)]
    assert parents == [*(f"caller {number}" for number in range(6)), None]


def test_failures_are_errors_of_their_class(exporter):
    """Timeouts, cancels, refused prompts and a full queue have the status ERROR and their class, once each."""
    backend = FakeEngine(step_seconds=0.02)
    long = " ".join(["word"] * 20)
    arguments = {"max_model_len": 30, "max_waiting": 1, "engine_args": {"max_num_seqs": 1}}
    with fake_engine(backend=backend, **arguments) as engine:
        with pytest.raises(RequestRejectedError):
            engine.generate(" ".join("x" * 40))
        with pytest.raises(RequestTimeoutError):
            engine.generate(long, timeout=0.05)
        handle = engine.add_request(long)
        handle.cancel()
        with pytest.raises(RequestCancelledError):
            handle.result()
        with pytest.raises(QueueFullError):
            handles = [engine.add_request(long, block=False) for _ in range(50)]
            assert not handles
    kinds = [span.attributes.get("error.type") for span in spans(exporter, len(exporter.get_finished_spans()))]
    assert kinds[:3] == ["RequestRejectedError", "RequestTimeoutError", "RequestCancelledError"]
    assert kinds.count("QueueFullError") == 1
    assert set(kinds[3:]) <= {"QueueFullError", "RequestCancelledError", "EngineClosedError"}
    assert {span.status.status_code for span in exporter.get_finished_spans()} == {StatusCode.ERROR}


def test_a_dropped_handle_ends_its_span(exporter):
    """A request whose handle is thrown away has a span too, which ends with it."""
    with fake_engine(backend=FakeEngine(step_seconds=0.01)) as engine:
        engine.add_request(" ".join(["word"] * 500), {"max_tokens": 500})
        (span,) = spans(exporter, 1)
    assert span.attributes["error.type"] == "RequestCancelledError"


def test_no_span_has_what_was_asked_or_answered(exporter):
    """Prompts and answers, of requests that fail too, are nowhere in a span."""
    with fake_engine(max_model_len=30) as engine:
        engine.generate([f"the word is {SECRET}"])
        with pytest.raises(RequestRejectedError):
            engine.generate([" ".join([SECRET] * 40)])
        engine.chat([{"role": "user", "content": SECRET}])
    assert not [span for span in spans(exporter, 3) if SECRET in span.to_json()]


def test_a_faulty_exporter_disturbs_nobody(exporter, caplog, monkeypatch):
    """An exporter that raises is logged; requests are answered and the engine lives on."""
    monkeypatch.setattr(Faulty, "fails", True)
    with caplog.at_level(logging.ERROR, "qlora_infer"), fake_engine() as engine:
        assert [engine.generate("hi")[0].text for _ in range(3)] == ["You said: hi"] * 3
    assert [record.message for record in caplog.records] == ["a span could not be ended"] * 3


def test_without_the_api_package_requests_run():
    """Where opentelemetry cannot be imported, requests are answered; without an SDK nothing is recorded either."""
    code = (
        "import sys\n{}\n"
        "from qlora_infer.testing import fake_engine\n"
        "with fake_engine() as engine:\n"
        "    print(engine.generate('hi')[0].text, engine._client._tracer is None)\n"
        "print('opentelemetry.sdk' in sys.modules)"
    )
    for first, is_none in (("sys.modules['opentelemetry'] = None", True), ("import opentelemetry.trace", False)):
        shown = subprocess.check_output([sys.executable, "-c", code.format(first)], text=True)
        assert shown == f"You said: hi {is_none}\nFalse\n"
