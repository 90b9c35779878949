"""An engine without a model, and adapters that fit it, for tests of code that uses this library."""

from qlora_infer.testing._adapter import TINY_MODEL, write_adapter
from qlora_infer.testing._engine import FakeEngine, FakeLogprob, FakeSamplingParams, echo, fake_engine

__all__ = [
    "TINY_MODEL",
    "FakeEngine",
    "FakeLogprob",
    "FakeSamplingParams",
    "fake_engine",
    "echo",
    "write_adapter",
]
