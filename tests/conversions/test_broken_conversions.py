"""Untrusted adapters in other forms: whatever the bytes, a typed error or a sound adapter, in bounded room."""

import json
import shutil
import struct

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from mlx_adapters import factors, write_mlx
from test_shards import split

from qlora_infer.conversions.conversion import convert
from qlora_infer.errors import AdapterError, CorruptAdapterError
from qlora_infer.files.manifest import read_manifest
from qlora_infer.files.safetensors import MAX_TENSORS, check_finite
from qlora_infer.testing import TINY_MODEL, write_adapter

CONFIG, WEIGHTS, MLX_WEIGHTS = "adapter_config.json", "adapter_model.safetensors", "adapters.safetensors"
MODULES = dict(list(TINY_MODEL.items())[:3])

fuzz = settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=60, deadline=None)

json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=20),
    lambda children: st.lists(children, max_size=4) | st.dictionaries(st.text(max_size=10), children, max_size=4),
    max_leaves=12,
)


def safetensors(entries):
    """A file of tensors, each with a dtype, a shape and as many zeros as it needs."""
    sizes = {"F32": 4, "F16": 2, "BF16": 2, "F64": 8, "I32": 4, "U8": 1}
    header, end = {}, 0
    for name, (dtype, shape) in entries.items():
        begin, end = end, end + int(np.prod(shape, dtype=int)) * sizes[dtype]
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}
    encoded = json.dumps(header).encode()
    return struct.pack("<Q", len(encoded)) + encoded + bytes(end)


def write_peft(folder, **fields):
    folder.mkdir(parents=True, exist_ok=True)
    (folder / CONFIG).write_text(json.dumps({"target_modules": ["q_proj"], **fields}))
    return folder


def write_adalora(folder, rank=4, **fields):
    write_peft(folder, peft_type="ADALORA", init_r=rank, lora_alpha=8, **fields)
    shapes = {}
    for name, (inputs, outputs) in MODULES.items():
        shapes[f"base_model.model.{name}.lora_A"] = ("F32", [rank, inputs])
        shapes[f"base_model.model.{name}.lora_B"] = ("F32", [outputs, rank])
        shapes[f"base_model.model.{name}.lora_E"] = ("F32", [rank, 1])
    (folder / WEIGHTS).write_bytes(safetensors(shapes))
    return folder


def write_loha(folder, rank=4, **fields):
    write_peft(folder, peft_type="LOHA", r=rank, alpha=8, **fields)
    shapes = {}
    for name, (inputs, outputs) in MODULES.items():
        for part in ("w1", "w2"):
            shapes[f"base_model.model.{name}.hada_{part}_a"] = ("F32", [outputs, rank])
            shapes[f"base_model.model.{name}.hada_{part}_b"] = ("F32", [rank, inputs])
    (folder / WEIGHTS).write_bytes(safetensors(shapes))
    return folder


def write_tinker(folder, **fields):
    write_peft(folder, peft_type="LORA", r=4, lora_alpha=8, **fields)
    shapes = {"a.experts.w2.lora_A.weight": ("F32", [3, 4, 16]), "a.experts.w2.lora_B.weight": ("F32", [1, 8, 4])}
    (folder / WEIGHTS).write_bytes(safetensors(shapes))
    return folder


def write_split(folder):
    return split(write_adapter(folder, modules=MODULES), index="adapter_model.safetensors.index.json")


FORMS = {
    "mlx": lambda folder: write_mlx(folder, factors(MODULES)),
    "adalora": write_adalora,
    "loha": write_loha,
    "shards": write_split,
    "tinker": write_tinker,
}
FIELDS = {
    "mlx": ["lora_parameters", "fine_tune_type", "num_layers", "lora_layers", "model", "rank", "alpha", "peft_type"],
    "adalora": ["init_r", "lora_alpha", "rank_pattern", "alpha_pattern", "target_modules", "peft_type", "bias"],
    "tinker": ["r", "lora_alpha", "rank_pattern", "target_modules", "peft_type", "use_new", "peft_version"],
    "loha": ["r", "alpha", "rank_pattern", "alpha_pattern", "target_modules", "peft_type", "use_rslora"],
}


def fresh(tmp_path):
    folder = tmp_path / "fuzz"
    shutil.rmtree(folder, ignore_errors=True)
    return folder


def check(folder, *, growth=24):
    """Convert and read; what is written may be so many times larger than the files were, and no name more remains."""
    num_bytes = sum(path.stat().st_size for path in folder.iterdir())
    try:
        form = convert("fuzz", folder)
        manifest = read_manifest("fuzz", folder)
        check_finite("fuzz", folder / WEIGHTS)
    except AdapterError:
        return None
    assert sum(path.stat().st_size for path in folder.iterdir()) <= growth * num_bytes + 65536
    assert {path.name for path in folder.iterdir()} == {CONFIG, WEIGHTS}
    assert isinstance(form, str)
    return manifest


@pytest.mark.parametrize("form", FORMS)
def test_each_form_is_sound_as_it_is(form, tmp_path):
    """What the tests below break is an adapter before."""
    manifest = check(FORMS[form](tmp_path / "sound"))
    experts = {f"a.experts.{expert}.down_proj": (16, 8) for expert in range(3)}
    expected = experts if form == "tinker" else MODULES
    assert {name: (shape.in_features, shape.out_features) for name, shape in manifest.modules.items()} == expected
    assert manifest.unsupported == ()


@pytest.mark.parametrize("form", FIELDS)
@fuzz
@given(data=st.data(), value=json_values)
def test_any_value_in_any_field_is_read_or_refused(form, data, value, tmp_path):
    """A config with any JSON in one of its fields ends in an AdapterError or an adapter."""
    folder = FORMS[form](fresh(tmp_path))
    config = json.loads((folder / CONFIG).read_text())
    config[data.draw(st.sampled_from(FIELDS[form]))] = value
    (folder / CONFIG).write_text(json.dumps(config))
    check(folder)


@fuzz
@given(name=st.sampled_from(["rank", "scale", "alpha", "keys", "dropout"]), value=json_values)
def test_any_value_among_mlxs_parameters_is_read_or_refused(name, value, tmp_path):
    """So does one with any JSON among its lora_parameters."""
    check(write_mlx(fresh(tmp_path), factors(MODULES), parameters={"rank": 8, "scale": 2.0, name: value}))


@pytest.mark.parametrize("form", FORMS)
@fuzz
@given(data=st.data(), content=st.binary(max_size=200))
def test_any_bytes_in_any_file_end_in_a_typed_error(form, data, content, tmp_path):
    """Whatever stands in one of the files, in place of it or of a part, is an AdapterError or an adapter."""
    folder = FORMS[form](fresh(tmp_path))
    path = data.draw(st.sampled_from(sorted(folder.iterdir())))
    before = path.read_bytes()
    start = data.draw(st.integers(0, min(len(before), 600)))
    path.write_bytes(before[:start] + content + data.draw(st.sampled_from([b"", before[start + len(content) :]])))
    check(folder)


PARTS = [
    *("lora_a", "lora_b", "m", "A", "B", "lora_A", "lora_B", "lora_E", "lora_A.weight"),
    *("experts.w1.lora_A.weight", "experts.w1.lora_B.weight", "lora_B.weight"),
    *("hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b", "weight"),
]
names = st.builds(
    "{}.{}".format,
    st.sampled_from(["base_model.model.a.q_proj", "a.q_proj", "a.mlp.switch_mlp.up_proj", "embed_tokens", "é.q", ""]),
    st.sampled_from(PARTS),
)
shapes = st.lists(st.sampled_from([0, 1, 2, 3, 4, 8]), max_size=4)
tensors = st.dictionaries(
    names, st.tuples(st.sampled_from(["F32", "BF16", "F16", "F64", "I32", "U8"]), shapes), min_size=1, max_size=6
)


@pytest.mark.parametrize("form", FIELDS)
@fuzz
@given(entries=tensors, rank=st.integers(1, 4))
def test_any_tensors_are_read_or_refused(form, entries, rank, tmp_path):
    """Names that mean something, with any shapes and dtypes, end in an AdapterError or an adapter."""
    folder = FORMS[form](fresh(tmp_path))
    config = json.loads((folder / CONFIG).read_text())
    config |= {"r": rank, "init_r": rank, "lora_parameters": {"rank": rank, "scale": 2.0}}
    if form == "mlx":
        del config["r"], config["init_r"]
        (folder / MLX_WEIGHTS).unlink()
    (folder / CONFIG).write_text(json.dumps(config))
    (folder / WEIGHTS).write_bytes(safetensors(entries))
    check(folder)


pairs = st.tuples(st.integers(1, 6), st.integers(1, 6), st.integers(1, 4), st.integers(1, 4))


@fuzz
@given(sizes=pairs, seed=st.integers(0, 9), is_stacked=st.booleans())
def test_factors_of_any_sizes_are_converted_as_they_are(sizes, seed, is_stacked, tmp_path):
    """A sound MLX adapter of any sizes has the modules, ranks and sizes that it was written with."""
    inputs, outputs, rank, num_experts = sizes
    generator = np.random.default_rng(seed)
    leading = (num_experts,) if is_stacked else ()
    a, b = generator.normal(size=(*leading, rank, inputs)), generator.normal(size=(*leading, outputs, rank))
    name = "model.layers.0.mlp.switch_mlp.up_proj" if is_stacked else "model.layers.0.mlp.up_proj"
    written = {f"{name}.lora_a": a if is_stacked else a.T, f"{name}.lora_b": b if is_stacked else b.T}
    manifest = check(write_mlx(fresh(tmp_path), written, rank=rank))
    assert len(manifest.modules) == (num_experts if is_stacked else 1)
    for module in manifest.modules.values():
        assert (module.rank, module.in_features, module.out_features) == (rank, inputs, outputs)


@pytest.mark.parametrize(
    ("form", "names"),
    [
        ("mlx", ["a.q_proj.lora_a", "a.q_proj.lora_b", "a.q_proj.lora_A.weight"]),
        (
            "adalora",
            ["base_model.model.a.lora_A", "a.lora_A", "a.lora_B", "a.lora_E", "base_model.model.a.lora_A.weight"],
        ),
    ],
)
def test_two_tensors_for_one_factor_are_refused(form, names, tmp_path):
    """Of two tensors that would have one name none is lost in silence."""
    folder = FORMS[form](tmp_path / "adapter")
    shapes = {"lora_E": [4, 1], "lora_b": [8, 8], "lora_a": [8, 8], "lora_B": [8, 4]}
    (folder / MLX_WEIGHTS).unlink(missing_ok=True)
    entries = {name: ("F32", shapes.get(name.rpartition(".")[2], [4, 8])) for name in names}
    (folder / WEIGHTS).write_bytes(safetensors(entries))
    with pytest.raises(CorruptAdapterError, match="two tensors for one factor"):
        convert("fuzz", folder)


def test_many_experts_in_a_small_file_are_refused(tmp_path):
    """Names of experts are counted before they are written: a file of some bytes for each makes no more of them."""
    count = MAX_TENSORS // 2 + 1
    folder = write_mlx(tmp_path / "mlx")
    (folder / MLX_WEIGHTS).unlink()
    shapes = {"a.up_proj.lora_a": ("F16", [count, 8, 1]), "a.up_proj.lora_b": ("F16", [count, 1, 8])}
    (folder / WEIGHTS).write_bytes(safetensors(shapes))
    with pytest.raises(CorruptAdapterError):
        convert("fuzz", folder)
    several = {
        f"{layer}.up_proj.lora_{part}": ("F16", [count // 4, 8, 1] if part == "a" else [count // 4, 1, 8])
        for layer in range(5)
        for part in "ab"
    }
    (folder / WEIGHTS).write_bytes(safetensors(several))
    with pytest.raises(CorruptAdapterError, match=f"more than {MAX_TENSORS} tensors"):
        convert("fuzz", folder)
