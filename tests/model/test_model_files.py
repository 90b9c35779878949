"""A model's files are a stranger's too: any bytes in them are read or refused with a typed error, in bounded time."""

import json
import os
import time

import pytest
from attrs import evolve
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from test_quantization import CONFIG as ENGINE

from qlora_infer import quantization
from qlora_infer.errors import ModelNotFoundError, QLoRAInferError, QuantizationError
from qlora_infer.model import config as model_config
from qlora_infer.model.checkpoint import modules_of_tensors, read_checkpoint
from qlora_infer.plan.size import adapter_bytes, weight_bytes
from qlora_infer.quantization import Platform
from qlora_infer.quantization.checkpoint import QUANTIZATION_FILES

HERE = Platform("cuda", 90, frozenset({"bitsandbytes", "vllm-bnb-plugin", "vllm-gguf-plugin", "torchao"}))
JSON_FILES = ("config.json", *QUANTIZATION_FILES, model_config.INDEX_NAME)

METHODS = (
    "gptq",
    "awq",
    "compressed-tensors",
    "bitsandbytes",
    "fp8",
    "modelopt",
    "mxfp4",
    "auto-round",
    "torchao",
    "gguf",
)
#: Fields that are read, and some more.
FIELDS = (
    *("quantization_config", "compression_config", "text_config", "llm_config", "thinker_config", "architectures"),
    *("hidden_size", "intermediate_size", "num_attention_heads", "num_key_value_heads", "head_dim", "vocab_size"),
    *(
        "num_hidden_layers",
        "quant_method",
        "bits",
        "w_bit",
        "group_size",
        "dynamic",
        "config_groups",
        "sparsity_config",
    ),
    *("weights", "input_activations", "num_bits", "type", "actorder", "targets", "packing_format", "data_type", "sym"),
    *("llm_int8_skip_modules", "bnb_4bit_quant_storage", "producer", "name", "quantization", "quant_algo", "version"),
    *("weight_block_size", "activation_scheme", "load_in_8bit", "desc_act", "weight_map", "a.safetensors"),
)
TEXTS = st.sampled_from(
    (*METHODS, "LlamaForCausalLM", "Qwen3MoeForCausalLM", "GptOssForCausalLM", "modelopt", "int", "../x")
)
SCALARS = (
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | TEXTS
    | st.text(max_size=5)
    | st.just(10**300)
    | st.just(2**31)
)
VALUES = st.recursive(
    SCALARS,
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(FIELDS) | st.text(max_size=3), inner, max_size=5)
    ),
    max_leaves=12,
)
QUANTIZATION = st.dictionaries(st.sampled_from(FIELDS), VALUES, max_size=5)
CONFIG = st.builds(
    lambda fields, method, said: {
        **fields,
        **({"quantization_config": {"quant_method": method, **said}} if method else {}),
    },
    st.dictionaries(st.sampled_from(FIELDS), VALUES, max_size=8),
    st.none() | st.sampled_from(METHODS),
    QUANTIZATION,
)
quick = settings(max_examples=300, deadline=None, suppress_health_check=list(HealthCheck))


@pytest.fixture
def offline(monkeypatch):
    import huggingface_hub.constants  # noqa: F401 - it reads the variable once, and later tests go online

    monkeypatch.setenv("HF_HUB_OFFLINE", "1")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("model")


def write(folder, files):
    for path in folder.iterdir():
        path.unlink()
    for name, content in files.items():
        (folder / name).write_bytes(content)


def read_all(folder):
    """Read a model's folder as an engine, a plan of its memory, and inspect-adapter do."""
    model = str(folder)
    for read in (lambda: serve(model), lambda: read_checkpoint(model)):
        try:
            read()
        except QLoRAInferError:
            pass
    model_config.read_tensor_shapes(model, revision=None, token=None)


def serve(model):
    found = model_config.read_model_config(model, revision=None, token=None)
    config = evolve(ENGINE, model=model)
    strategy = quantization.choose(config, found)
    for size in (weight_bytes(found, strategy.name), adapter_bytes(found, 16)):
        assert size is None or size >= 0
    strategy.check(config, found, HERE)
    strategy.engine_args(config, found)


def safetensors(header):
    content = header if isinstance(header, bytes) else json.dumps(header).encode()
    return len(content).to_bytes(8, "little") + content


@given(name=st.sampled_from(JSON_FILES), content=st.binary(max_size=200))
@quick
def test_any_bytes_in_a_models_files_are_read_or_refused(name, content, folder):
    """Bytes that are no JSON, no text, or too much are a typed error, in whichever file they are."""
    write(folder, {"config.json": b"{}", name: content})
    read_all(folder)


@given(config=CONFIG, beside=st.dictionaries(st.sampled_from(JSON_FILES[1:]), QUANTIZATION | VALUES, max_size=2))
@quick
def test_any_json_in_a_models_files_is_read_or_refused(config, beside, folder):
    """Any values in any fields of config.json and of the files beside it end in a value or a typed error."""
    write(folder, {name: json.dumps(value).encode() for name, value in {**beside, "config.json": config}.items()})
    read_all(folder)


DEEP = 100_000
HOSTILE = {
    "deep lists": b'{"quantization_config":' + b"[" * DEEP + b"]" * DEEP + b"}",
    "deep objects": b'{"a":' * DEEP + b"1" + b"}" * DEEP,
    "as deep as Python reads": b'{"quantization_config":{"quant_method":' + b"[" * 900 + b"]" * 900 + b"}}",
    "a number of a million digits": b'{"hidden_size":' + b"9" * 1_000_000 + b"}",
    "infinity": b'{"hidden_size": 1e999, "num_hidden_layers": -Infinity, "vocab_size": NaN}',
    "half of a character": b'{"quantization_config": {"quant_method": "\\ud800"}, "architectures": ["\\ud800"]}',
    "layers without end": json.dumps(
        {
            "architectures": ["LlamaForCausalLM"],
            "num_hidden_layers": 10**12,
            "vocab_size": 5,
            "hidden_size": 8,
            "intermediate_size": 8,
            "num_attention_heads": 2,
        }
    ).encode(),
    "texts for sizes": json.dumps({"hidden_size": 10**9, "num_attention_heads": "x", "head_dim": 10**9}).encode(),
    "not UTF-8": b"\xff\xfe{}",
    "nothing": b"",
}


@pytest.mark.parametrize("name", JSON_FILES)
@pytest.mark.parametrize("kind", HOSTILE)
def test_hostile_json_is_read_or_refused_in_time(kind, name, folder):
    """Depth, huge numbers and endless layers cost neither a crash nor more than a moment."""
    write(folder, {"config.json": b"{}", name: HOSTILE[kind]})
    started = time.process_time()
    read_all(folder)
    assert time.process_time() - started < 5


@pytest.mark.parametrize("name", ["config.json", "quant_config.json", model_config.INDEX_NAME])
def test_a_file_that_is_too_large_is_not_read(name, folder):
    """A file of gibibytes is refused by its size, before it is read."""
    write(folder, {"config.json": b"{}"})
    with (folder / name).open("wb") as file:
        file.truncate(64 << 30)
    with pytest.raises(ModelNotFoundError, match="too large"):
        model_config.read_model_config(str(folder), revision=None, token=None)
    read_all(folder)


@pytest.mark.parametrize("name", [*JSON_FILES, "model.safetensors"])
def test_what_is_no_file_is_not_waited_for(name, folder):
    """A pipe, a device or a folder in a file's place is refused; to open a pipe would wait for ever."""
    for make in (os.mkfifo, lambda path: os.symlink("/dev/zero", path), os.mkdir):
        write(folder, {"config.json": b"{}"})
        (folder / name).unlink(missing_ok=True)
        make(folder / name)
        read_all(folder)
        (folder / name).rmdir() if make is os.mkdir else None


NAMES = st.sampled_from(
    (
        *("0.weight", ".weight", "weight", "", "..", "model.layers.0.self_attn.q_proj.weight", "lm_head.weight"),
        *(
            "model.layers.0.mlp.experts.down_proj",
            "model.layers.1.mlp.experts.0.down_proj.weight",
            "a.experts.w2_blocks",
        ),
        *("model.layers.0.mlp.gate_proj.qweight", "model.layers.0.mlp.gate_proj.scales", "a.weight_packed"),
        *("a.weight_scale", "a.weight_scale_2", "a.weight", "a._weight_qdata", "model.embed_tokens.weight"),
        *("a.weight.quant_state.bitsandbytes__nf4", f"model.layers.{'9' * 5000}.mlp.up_proj.weight"),
    )
) | st.text(max_size=8)
SHAPES = st.lists(st.integers(0, 3) | st.sampled_from([2**31, 2**40, 8]), max_size=5).map(tuple)


@given(
    tensors=st.dictionaries(NAMES, SHAPES, max_size=6),
    config=CONFIG,
    architecture=st.sampled_from(
        ["LlamaForCausalLM", "Qwen3MoeForCausalLM", "GptOssForCausalLM", "Phi3ForCausalLM", "X"]
    ),
)
@example({"model.layers.0.mlp.experts.down_proj": (2**31, 8, 4)}, {"hidden_size": 8}, "Qwen3MoeForCausalLM")
@example({"0.weight": (4, 4)}, {}, "X")
@example({"a.qweight": (4, 4), "a.scales": ()}, {"quantization_config": {"quant_method": "awq"}}, "X")
@quick
def test_any_tensors_are_modules_or_none(tensors, config, architecture):
    """Whatever names and shapes headers claim, they become a list of modules no longer than what they may have."""
    modules_of_tensors(tensors, {**config, "architectures": [architecture]})


ENTRY = st.fixed_dictionaries(
    {"dtype": st.sampled_from(["F16", "U8", "X"]) | SCALARS, "shape": st.lists(st.integers(0, 3), max_size=3) | VALUES},
    optional={"data_offsets": st.just([0, 0]) | VALUES},
)


@given(header=st.dictionaries(NAMES, ENTRY | VALUES, max_size=4) | VALUES | st.binary(max_size=40), config=CONFIG)
@quick
def test_any_header_is_read_or_taken_for_none(header, config, folder):
    """A safetensors file with any header tells of its tensors, or counts as one that cannot be read."""
    write(folder, {"config.json": json.dumps(config).encode(), "model.safetensors": safetensors(header)})
    read_all(folder)


@pytest.mark.parametrize("length", [0, 1, 2**31, 2**63, 2**64 - 1])
def test_a_header_of_any_length_is_never_allocated(length, folder):
    """The eight bytes that say how long a header is are held against the file's size first."""
    write(folder, {"config.json": b"{}", "model.safetensors": length.to_bytes(8, "little") + b"{}"})
    assert model_config.read_tensor_shapes(str(folder), revision=None, token=None) == {}


@pytest.mark.parametrize("target", ["../secret.safetensors", "/dev/stdin", "sub/../../x", "", ".", "\0"])
def test_an_index_names_files_of_its_own_folder_only(target, folder):
    """An index that leads out of the model's folder is not followed."""
    outside = folder.parent / "secret.safetensors"
    outside.write_bytes(safetensors({"a": {"dtype": "U8", "shape": [0], "data_offsets": [0, 0]}}))
    write(folder, {"config.json": b"{}", model_config.INDEX_NAME: json.dumps({"weight_map": {"a": target}}).encode()})
    assert model_config.read_tensor_shapes(str(folder), revision=None, token=None) == {}


@given(
    model=st.text(max_size=30)
    | st.builds(
        "{}{}{}".format, st.text("a/.~:-_\0 ", max_size=8), st.just("b"), st.sampled_from([".gguf", ":Q4", ":"])
    )
)
@example(model="~\0/model.gguf")
@example(model="a" * 5000)
@example(model=f"./{'a' * 5000}.gguf")
@example(model=f"org/{'a' * 300}")
@example(model="\0")
@example(model="org/\ud800.gguf")
@example(model="~\ud800")
@quick
def test_any_text_as_a_model_is_one_or_a_typed_error(model, offline):
    """A name that no file system, no user and no repository can have is a typed error, GGUF or not."""
    with pytest.raises(QLoRAInferError):
        model_config.read_model_config(model, revision=None, token=None)


@pytest.mark.parametrize(
    ("method", "field", "value"),
    [
        ("compressed-tensors", "config_groups", [1]),
        ("compressed-tensors", "config_groups", {"group_0": 5}),
        ("compressed-tensors", "config_groups", {"group_0": {"weights": [4]}}),
        ("compressed-tensors", "sparsity_config", "dense"),
        ("gptq", "dynamic", ["-:lm_head"]),
        ("auto-round", "packing_format", 4),
        ("bitsandbytes", "llm_int8_skip_modules", [1]),
    ],
)
def test_a_field_of_another_kind_is_named(method, field, value, folder):
    """A quantization whose field is not what its tool writes is refused by the field's name."""
    said = {"quant_method": method, field: value}
    write(folder, {"config.json": json.dumps({"quantization_config": said}).encode()})
    with pytest.raises(QuantizationError, match=f"{field} in the quantization of"):
        model_config.read_model_config(str(folder), revision=None, token=None)
