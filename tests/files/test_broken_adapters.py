"""Untrusted adapters: each fault ends in a typed error that names it, and nothing else is disturbed."""

import json
import struct

import pytest
from broken_adapters import BROKEN, BrokenAdapter
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from qlora_infer.basewise.conversion import read_saved
from qlora_infer.errors import AdapterError, IncompatibleAdapterError
from qlora_infer.files.manifest import read_manifest
from qlora_infer.files.safetensors import check_finite
from qlora_infer.testing import TINY_MODEL, FakeEngine, fake_engine, write_adapter


def test_every_broken_adapter_has_a_fault_of_its_own():
    """The corpus has at least twenty adapters, each with another name."""
    assert len({broken.name for broken in BROKEN}) == len(BROKEN) >= 20


@pytest.fixture(scope="module")
def engine():
    with fake_engine(max_lora_rank=64) as engine:
        yield engine


@pytest.mark.parametrize("broken", BROKEN, ids=lambda broken: broken.name)
def test_a_broken_adapter_is_refused_by_the_name_of_its_fault(broken: BrokenAdapter, engine, tmp_path):
    """Loading it raises exactly the error of its fault, names the fault and the adapter, and loads nothing."""
    folder = broken.make(tmp_path / "broken", TINY_MODEL)
    with pytest.raises(broken.error, match=broken.match) as caught:
        engine.load_adapter("broken", folder)
    assert type(caught.value) is broken.error
    assert caught.value.adapter == "broken"
    assert len(str(caught.value)) < 1500
    assert "broken" not in engine.adapters
    assert engine.generate("still here")[0].text == "You said: still here"


def test_a_broken_replacement_leaves_the_old_version_serving(tmp_path):
    """When the new content of a name is broken, requests go on with the old one, and the folder is as it was."""
    with fake_engine() as engine:
        before = engine.load_adapter("pirate", write_adapter(tmp_path / "good"))
        for broken in BROKEN:
            folder = broken.make(tmp_path / broken.name, TINY_MODEL)
            with pytest.raises(AdapterError):
                engine.load_adapter("pirate", folder)
        assert engine.adapters == {"pirate": before}
        assert engine.generate("ahoy", adapter="pirate")[0].text == "pirate says: ahoy"


def test_an_engine_with_a_broken_adapter_does_not_start(tmp_path):
    """An adapter that is broken by itself is told before the model is loaded; nothing stays behind."""
    backend = FakeEngine()
    folder = next(broken for broken in BROKEN if broken.name == "nan").make(tmp_path / "nan", TINY_MODEL)
    with pytest.raises(AdapterError):
        fake_engine(backend=backend, adapters={"bad": folder})
    assert backend.engine_args == {}
    assert not backend.is_running


def test_every_reason_is_told_at_once(tmp_path):
    """An adapter with several faults is refused with all of them, each a sentence."""
    modules = {**TINY_MODEL, "model.layers.7.self_attn.q_proj": (64, 64), "model.layers.0.mlp.up_proj": (64, 256)}
    folder = write_adapter(tmp_path / "bad", rank=80, modules=modules, use_dora=True, init_lora_weights="olora")
    with fake_engine() as engine, pytest.raises(IncompatibleAdapterError) as caught:
        engine.load_adapter("bad", folder)
    assert len(caught.value.reasons) == 5
    text = " ".join(caught.value.reasons)
    for words in ("DoRA", "olora", "max_lora_rank=128", "layers.7.", "its layers are 0 to 1", "up_proj has 64 inputs"):
        assert words in text


@given(content=st.binary(max_size=400))
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=200, deadline=None)
def test_any_bytes_as_weights_end_in_a_typed_error(content, tmp_path):
    """Whatever stands in the weights file, reading it ends in an AdapterError and in nothing else."""
    folder = write_adapter(tmp_path / "fuzz")
    (folder / "adapter_model.safetensors").write_bytes(content)
    with pytest.raises(AdapterError):
        read_manifest("fuzz", folder)


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=20),
    lambda children: st.lists(children, max_size=4) | st.dictionaries(st.text(max_size=10), children, max_size=4),
    max_leaves=12,
)


@given(
    field=st.sampled_from(
        [
            "r",
            "lora_alpha",
            "target_modules",
            "rank_pattern",
            "alpha_pattern",
            "bias",
            "peft_type",
            "modules_to_save",
            "init_lora_weights",
            "use_dora",
            "base_model_name_or_path",
            "layer_replication",
            "lora_bias",
            "ensure_weight_tying",
            "trainable_token_indices",
            "target_parameters",
        ]
    ),
    value=json_values,
)
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=300, deadline=None)
def test_any_value_in_any_field_of_the_config_is_read_or_refused(field, value, tmp_path):
    """A config with any JSON in one of its fields is read, or refused with an AdapterError."""
    folder = write_adapter(tmp_path / "fuzz", **{field: value})
    try:
        read_saved("fuzz", read_manifest("fuzz", folder))
    except AdapterError:
        pass


@given(
    field=st.sampled_from(["dtype", "shape", "data_offsets"]),
    value=json_values,
    which=st.integers(0, 27),
)
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=300, deadline=None)
def test_any_value_in_any_field_of_a_header_is_read_or_refused(field, value, which, tmp_path):
    """A header with any JSON in one of its fields ends in an AdapterError unless it says what it said before."""
    folder = write_adapter(tmp_path / "fuzz")
    path = folder / "adapter_model.safetensors"
    content = path.read_bytes()
    length = struct.unpack("<Q", content[:8])[0]
    header = json.loads(content[8 : 8 + length])
    list(header.values())[which][field] = value
    encoded = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(encoded)) + encoded + content[8 + length :])
    with pytest.raises(AdapterError):
        read_manifest("fuzz", folder)
        check_finite("fuzz", path)


names = st.lists(st.sampled_from(sorted(TINY_MODEL)), min_size=1, unique=True)


@given(chosen=names, rank=st.integers(1, 64), seed=st.integers(0, 9))
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=40, deadline=None)
def test_a_sound_adapter_is_read_as_it_was_written(chosen, rank, seed, tmp_path):
    """The manifest has the modules, ranks, shapes and size that were written."""
    modules = {name: TINY_MODEL[name] for name in chosen}
    folder = write_adapter(tmp_path / "sound", rank=rank, modules=modules, seed=seed)
    manifest = read_manifest("sound", folder)
    assert {name: (m.in_features, m.out_features) for name, m in manifest.modules.items()} == modules
    assert manifest.rank == rank
    assert manifest.num_bytes == sum(4 * rank * (a + b) for a, b in modules.values())
    assert manifest.unsupported == ()
    assert manifest.base_model == "fake/model"
    check_finite("sound", folder / "adapter_model.safetensors")
