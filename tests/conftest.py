"""What all tests share."""

import contextlib
import importlib
import importlib.util
import os
import signal
from pathlib import Path

import pytest

if not Path("/dev/nvidiactl").exists():
    # Triton settles as it is imported whether its own functions are compiled or interpreted. tests/_vllm/test_fused.py needs
    # them interpreted, and vLLM, which other tests import before it, would have them compiled.
    with pytest.MonkeyPatch.context() as environment, contextlib.suppress(ImportError):
        environment.setenv("TRITON_INTERPRET", "1")
        importlib.import_module("triton")

if os.environ.get("QLORA_INFER_REQUIRE_PACKAGES"):
    # `nox -s tests` installs every package, so a package that cannot be imported fails its tests instead of skipping them.
    pytest.importorskip = importlib.import_module


#: Folders whose tests meet vLLM, or tools that quantize, which warn of themselves.
WARNED = {"engine", "gpu", "formats", "serve"}

WARNINGS = (
    "error",
    "ignore:The following alpha_pattern keys:RuntimeWarning",  # of experts, whose patterns PEFT does not match itself
    "ignore:Detected pickle protocol:UserWarning",
    "ignore::ResourceWarning",  # it comes when the garbage collector finds something, in whichever test that is
    r"ignore::DeprecationWarning:ray\..*",
)


def pytest_collection_modifyitems(items):
    """A warning fails a test."""
    for item in items:
        if not WARNED & set(item.path.parts):
            item.add_marker(pytest.mark.filterwarnings(*WARNINGS))


@pytest.fixture(autouse=True, scope="session")
def ctrl_c_is_heard():
    """A shell starts what it puts in the background with SIGINT ignored, and children take that over."""
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(autouse=True)
def own_strategies():
    """What a test, or an example that one runs, registers is gone after it."""
    if importlib.util.find_spec("qlora_infer") is None:  # tests of the package's distributions install it elsewhere
        yield
        return
    from qlora_infer.quantization import strategy

    before = dict(strategy._registry)
    yield
    strategy._registry.clear()
    strategy._registry.update(before)
