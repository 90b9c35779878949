"""Tinker's adapters: those of experts, whose factors are stacked, are served one by one."""

import json

import numpy as np
import pytest
from effects import assert_same, deltas, make_copy

from qlora_infer.conversions import conversion
from qlora_infer.errors import CorruptAdapterError
from qlora_infer.files.safetensors import write_tensors

LAYER = "base_model.model.model.layers.0.mlp.experts"
RANK, HIDDEN, WIDE, NUM_EXPERTS = 4, 16, 24, 3


def stacked(*, shared=(), projections=("w1", "w2", "w3")):
    """Random factors of a layer's experts; those in ``shared`` are one for all of them."""
    generator = np.random.default_rng(0)
    sizes = {"w1": (HIDDEN, WIDE), "w2": (WIDE, HIDDEN), "w3": (HIDDEN, WIDE)}
    tensors = {}
    for projection in projections:
        inputs, outputs = sizes[projection]
        for factor, shape in (("A", (RANK, inputs)), ("B", (outputs, RANK))):
            count = 1 if f"{projection}.{factor}" in shared else NUM_EXPERTS
            tensors[f"{LAYER}.{projection}.lora_{factor}.weight"] = generator.normal(size=(count, *shape)).astype("f4")
    return tensors


def write(folder, tensors, **config):
    folder.mkdir()
    fields = {
        "peft_type": "LORA",
        "r": RANK,
        "lora_alpha": 8,
        "base_model_name_or_path": "Qwen/Qwen3-30B-A3B",
        **config,
    }
    (folder / "adapter_config.json").write_text(json.dumps(fields))
    write_tensors(folder / "adapter_model.safetensors", tensors)
    return folder


def expected(tensors, names):
    """``lora_alpha / r`` times B A of each expert, as tinker-cookbook merges it, in float64."""
    found = {}
    for projection, name in names.items():
        a, b = (tensors[f"{LAYER}.{projection}.lora_{factor}.weight"].astype("f8") for factor in "AB")
        for expert in range(NUM_EXPERTS):
            one, other = a[0 if len(a) == 1 else expert], b[0 if len(b) == 1 else expert]
            found[f"{LAYER.removeprefix('base_model.model.')}.{expert}.{name}"] = 8 / RANK * other @ one
    return found


@pytest.mark.parametrize(
    "shared", [(), ("w1.A", "w3.A", "w2.B")], ids=["each expert its own", "what they have in common is shared"]
)
def test_each_expert_gets_its_factors(shared, tmp_path):
    """w1, w2 and w3 are the gate, down and up projections; a shared factor is each expert's."""
    tensors = stacked(shared=shared)
    snapshot, manifest, _ = make_copy(write(tmp_path / "adapter", tensors), tmp_path / "copy")
    assert snapshot.format == "Tinker"
    assert manifest.unsupported == ()
    names = {"w1": "gate_proj", "w2": "down_proj", "w3": "up_proj"}
    assert_same(deltas(snapshot.folder, manifest), expected(tensors, names), tolerance=1e-14)


def test_experts_without_a_gate_have_no_w3(tmp_path):
    """Nemotron's experts go up and down: w1 is the up projection, as in tinker-cookbook."""
    tensors = stacked(projections=("w1", "w2"))
    snapshot, manifest, _ = make_copy(write(tmp_path / "adapter", tensors), tmp_path / "copy")
    assert_same(deltas(snapshot.folder, manifest), expected(tensors, {"w1": "up_proj", "w2": "down_proj"}))


def test_one_of_attention_is_pefts_own(tmp_path):
    """Without experts Tinker writes what PEFT would; the output layer's name is an alias, which models know."""
    names = ("model.layers.0.self_attn.q_proj", "model.unembed_tokens")
    tensors = {
        f"base_model.model.{name}.lora_{factor}.weight": np.ones(shape, "f4")
        for name in names
        for factor, shape in (("A", (RANK, HIDDEN)), ("B", (WIDE, RANK)))
    }
    snapshot, manifest, _ = make_copy(write(tmp_path / "a", tensors, target_modules="all-linear"), tmp_path / "copy")
    assert snapshot.format == "PEFT"
    assert set(manifest.modules) == set(names)


def test_what_a_shared_factor_takes_is_bounded(tmp_path, monkeypatch):
    """One large factor that many small ones share would be written many times: that is refused before it is written."""
    tensors = {
        f"{LAYER}.w1.lora_A.weight": np.ones((1, 1, 1 << 16), "f4"),
        f"{LAYER}.w1.lora_B.weight": np.ones((1000, 1, 1), "f4"),
    }
    with pytest.raises(CorruptAdapterError, match="as PEFT writes LoRA: too many"):
        make_copy(write(tmp_path / "a", tensors, r=1), tmp_path / "copy-a")
    monkeypatch.setattr(conversion, "MAX_GROWTH", 1)
    with pytest.raises(CorruptAdapterError, match="too many"):
        make_copy(write(tmp_path / "b", stacked(shared=("w1.A", "w3.A", "w2.B"))), tmp_path / "copy-b")


@pytest.mark.parametrize(
    ("name", "shape", "match"),
    [
        ("w1.lora_A", (2, RANK, HIDDEN), "has the shapes"),
        ("w1.lora_A", (RANK, HIDDEN), "has the shapes"),
        ("w1.lora_A", (NUM_EXPERTS, RANK + 1, HIDDEN), "has the shapes"),
        ("w1.lora_A", (NUM_EXPERTS, RANK, 0), "has the shapes"),
        ("w1.lora_A", None, "no lora_A"),
    ],
)
def test_a_fault_is_named(name, shape, match, tmp_path):
    """Factors that do not belong together are no adapter."""
    tensors = stacked()
    tensors[f"{LAYER}.{name}.weight"] = np.ones(shape or (1,), "f4")
    if shape is None:
        del tensors[f"{LAYER}.{name}.weight"]
    with pytest.raises(CorruptAdapterError, match=match):
        make_copy(write(tmp_path / "adapter", tensors), tmp_path / "copy")
