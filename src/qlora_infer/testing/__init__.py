"""For tests of code that uses this library: an engine without a model, and adapters that fit it."""

from qlora_infer.testing._adapter import TINY_MODEL, write_adapter
from qlora_infer.testing._engine import FakeEngine, FakeLogprob, FakeSamplingParams, fake_engine, say_back

__all__ = [
    "TINY_MODEL",
    "FakeEngine",
    "FakeLogprob",
    "FakeSamplingParams",
    "fake_engine",
    "say_back",
    "write_adapter",
]
