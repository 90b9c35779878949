"""Faults on purpose in vLLM's own processes: each ends in a typed error, or in a new core that answers as before."""

import contextlib
import threading

import psutil
import pytest

from engine.test_life import start
from qlora_infer import EngineDeadError
from qlora_infer.demo import demo_adapters

GREEDY = {"temperature": 0.0, "max_tokens": 8}
PROMPT = "The capital of France is"


@pytest.fixture(autouse=True)
def alone(engines):
    """No shared engine runs beside these tests' own."""
    engines.close()


def processes(engine, words):
    """Return the engine's processes whose command line has these words."""
    (core,) = engine._backend.pids
    found = [psutil.Process(core), *psutil.Process(core).children(recursive=True)]
    return [process for process in found if words in " ".join(process.cmdline())]


def test_a_worker_or_a_core_that_is_killed_while_it_reads_is_replaced():
    """With restart="on-failure": the load, or a request, says what happened, or succeeds; then all answer as before.

    The worker is killed while it reads an adapter, the core while it is told to move one.
    """
    with start(adapters=demo_adapters(), restart="on-failure", max_cpu_loras=4) as engine:
        expected = {name: ask(engine, name) for name in (None, *demo_adapters())}
        for number, words in enumerate(("Worker", "EngineCore")):
            (victim,) = processes(engine, words)
            threading.Timer(0.03 * number, victim.kill).start()
            loading = True
            while loading and victim.is_running():
                try:
                    engine.load_adapter("again", demo_adapters()["pirate"])
                except EngineDeadError:
                    loading = False
            assert {name: answer(engine, name) for name in expected} == expected
        assert engine.stats().num_restarts == 2


def ask(engine, adapter):
    return engine.generate(PROMPT, GREEDY, adapter=adapter, use_tqdm=False)[0].text


def answer(engine, adapter):
    """Ask until an engine that is being started again answers; a request that had begun gets the error once."""
    for _ in range(3):
        with contextlib.suppress(EngineDeadError):
            return ask(engine, adapter)
    return ask(engine, adapter)
