"""What an adapter adds to each module's weight, from its private copy, in float64."""

from pathlib import Path

import numpy as np

from qlora_infer.adapters.store import AdapterStore
from qlora_infer.files.manifest import factor_of
from qlora_infer.files.peft_config import read_config, scaling
from qlora_infer.files.safetensors import as_floats, map_tensors
from qlora_infer.sources.source import parse_source


def make_copy(source, into, **keywords):
    """Fetch and check a source as an engine does, up to the model."""
    store = AdapterStore(Path(into))
    try:
        return store.make("test", 1, parse_source(source), **{"allow_pickle": False, **keywords})
    finally:
        store.close()


def deltas(folder, manifest):
    """The product B A of each module, times its scale, from PEFT's form."""
    config = read_config("test", folder / "adapter_config.json")
    factors = {
        factor_of(name): as_floats(tensor).astype("f8")
        for name, tensor in map_tensors("test", folder / "adapter_model.safetensors").items()
    }
    by_module = {}
    for found, tensor in factors.items():
        by_module.setdefault(found.module, {})[found.factor] = tensor
    assert by_module.keys() == manifest.modules.keys()
    return {name: scaling(config, name, len(pair["A"])) * (pair["B"] @ pair["A"]) for name, pair in by_module.items()}


def assert_same(found, expected, tolerance=1e-6):
    """Compare the effects on each module; the tolerance is relative to the largest number of the module's."""
    assert found.keys() == expected.keys()
    for name, delta in expected.items():
        delta = np.asarray(delta, "f8")
        assert found[name].shape == delta.shape
        largest = np.abs(delta).max()
        assert largest > 0
        assert np.abs(found[name] - delta).max() <= tolerance * largest, name
