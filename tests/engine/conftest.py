"""The real vLLM, started once for each quantization and shared; the order of the tests keeps one engine at a time."""

import atexit
import functools
import json
import os
import shutil
import tempfile
from pathlib import Path

import pytest
from attrs import frozen

os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")

#: What a machine needs beside, as JSON; on a GPU, say, {"gpu_memory_utilization": 0.3}.
ENGINE_ARGS = json.loads(os.environ.get("QLORA_INFER_TEST_ENGINE_ARGS", "{}"))


def vllm_release():
    """vLLM's release, such as (0, 32): a few tests say what holds for which."""
    from vllm.version import __version_tuple__

    return __version_tuple__[:2]


QUANTIZATIONS = ("awq", "gptq", "bitsandbytes")
#: The demo model in each quantization, and in AWQ as a Phi-3, whose modules are fused in the checkpoint.
LIVELY_FORMS = (*QUANTIZATIONS, "phi3")
#: Those, and others that only answer, for time: how adapters come and go does not depend on the weights.
FORMS = (*LIVELY_FORMS, "compressed-tensors", "none")


@frozen
class Demo:
    """A form of the demo model.

    Attributes:
        served: The checkpoint that vLLM reads.
        unquantized: The same model in 16 bits.
        adapters: Its adapters' folders, by name.
        quantization: How the engine is asked to serve it.
    """

    served: Path
    unquantized: Path
    adapters: dict[str, Path]
    quantization: str = "auto"


@functools.cache
def demo(form):
    """Return a form of the demo model, which is built where it is not there."""
    from models.phi3_demo import phi3_adapters, phi3_model

    from qlora_infer.demo import demo_adapters, demo_model

    if form != "phi3":
        quantization = form if form in ("none", "bitsandbytes") else "auto"
        return Demo(demo_model(form), demo_model("none"), demo_adapters(), quantization)
    folder = Path(tempfile.mkdtemp())
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    plain, quantized = phi3_model(folder / "model")
    return Demo(quantized, plain, phi3_adapters(folder / "adapters"))


class Engines:
    """At most one running engine: asking for another form closes the one before."""

    def __init__(self):
        self._name = None
        self._engine = None

    @property
    def demo(self):
        """What the running engine serves."""
        return demo(self._name)

    def get(self, form):
        from qlora_infer import QuantizedLoRAEngine

        if self._name != form or self._engine is None:
            self.close()
            self._engine = QuantizedLoRAEngine(
                demo(form).served,
                quantization=demo(form).quantization,
                adapters=demo(form).adapters,
                max_loras=4,
                max_lora_rank=64,
                max_cpu_loras=16,
                max_model_len=512,
                engine_args=ENGINE_ARGS,
            )
            self._name = form
        return self._engine

    def close(self):
        if self._engine is not None:
            self._engine.close()
        self._engine = self._name = None


@pytest.fixture(scope="session")
def engines():
    engines = Engines()
    yield engines
    engines.close()


@pytest.fixture(params=FORMS)
def engine(request, engines):
    """An engine of each form, with the demo's adapters."""
    engine = engines.get(request.param)
    yield engine
    unload_others(engine)


@pytest.fixture
def awq(engines):
    """The AWQ engine, for what does not depend on the quantization."""
    engine = engines.get("awq")
    yield engine
    unload_others(engine)


@pytest.fixture
def doomed(request, engines):
    """The shared engine of a quantization, when all other tests are done with it: this one may end it as it likes."""
    yield engines.get(request.param)
    engines.close()


def unload_others(engine):
    """A test that failed in the middle leaves nothing for the next one."""
    for name in set(engine.adapters) - {"json", "pirate", "spanish"}:
        engine.unload_adapter(name)


def pytest_collection_modifyitems(items):
    """Tests of one engine stand together, and those that need an engine of their own come last."""
    here = os.path.dirname(__file__)
    mine = [item for item in items if str(item.path).startswith(here)]

    def place(item):
        if "served" in getattr(item, "fixturenames", ()):
            return 100 + list(item.module.MODELS).index(item.callspec.params["served"])
        for at, fixture in ((2, "engine"), (3, "doomed")):
            if fixture in getattr(item, "fixturenames", ()):
                return FORMS.index(item.callspec.params[fixture]) * 2 + at
        return 1 if "awq" in getattr(item, "fixturenames", ()) else 99

    for item in mine:
        item.add_marker(pytest.mark.engine)
    items[:] = [item for item in items if item not in mine] + sorted(mine, key=place)
