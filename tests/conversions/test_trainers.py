"""What trainers write: the fields of each PEFT, the files and names of each tool."""

import json

import numpy as np
import pytest
from effects import make_copy

from qlora_infer.errors import AdapterNotFoundError, IncompatibleAdapterError
from qlora_infer.files.safetensors import map_tensors, write_tensors
from qlora_infer.testing import TINY_MODEL, fake_engine, write_adapter

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"

FIRST = {
    "base_model_name_or_path": "fake/model",
    "bias": "none",
    "fan_in_fan_out": False,
    "inference_mode": True,
    "lora_alpha": 16,
    "lora_dropout": 0.05,
    "modules_to_save": None,
    "peft_type": "LORA",
    "r": 8,
    "target_modules": ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"],
    "task_type": "CAUSAL_LM",
}

#: The fields of LoraConfig that each PEFT added (``tuners/lora.py``, ``tuners/lora/config.py``), as it writes them.
SINCE = {
    "0.2": {"merge_weights": False, "enable_lora": None},
    "0.3": {"init_lora_weights": True},
    "0.4": {"auto_mapping": None, "revision": None, "layers_pattern": None, "layers_to_transform": None},
    "0.6": {"alpha_pattern": {}, "rank_pattern": {}},
    "0.7": {"loftq_config": {}, "megatron_config": None, "megatron_core": "megatron.core"},
    "0.8": {"use_rslora": False},
    "0.9": {"use_dora": False},
    "0.10": {"layer_replication": None},
    "0.14": {"exclude_modules": None, "eva_config": None, "lora_bias": False},
    "0.15": {"corda_config": None, "trainable_token_indices": None},
    "0.16": {"use_qalora": False, "qalora_group_size": 16},
    "0.17": {"target_parameters": None},
    "0.18": {
        "alora_invocation_tokens": None,
        "arrow_config": None,
        "ensure_weight_tying": False,
        "peft_version": "0.18.0",
    },
    "0.19": {"use_bdlora": None, "lora_ga_config": None},
    "0.20": {"velora_config": None, "monteclora_config": None},
    "0.21": {"kasa_config": None},
}


def fields_of(version):
    fields = dict(FIRST)
    for since, added in SINCE.items():
        fields |= added
        if since != "0.2":
            fields.pop("enable_lora", None)
            fields.pop("merge_weights", None)
        if since == version:
            return fields
    raise KeyError(version)


def write_with(folder, fields, rename=lambda name: name, dtype="F32"):
    """An adapter with exactly these fields in its config, and names as a tool has them."""
    write_adapter(folder, dtype=dtype)
    (folder / CONFIG).write_text(json.dumps(fields))
    tensors = map_tensors("test", folder / WEIGHTS)
    written = {rename(name): np.array(tensor) for name, tensor in tensors.items()}
    del tensors
    write_tensors(folder / WEIGHTS, written)
    return folder


def refusals(folder, into):
    return " ".join(make_copy(folder, into)[1].unsupported)


@pytest.mark.parametrize("version", SINCE)
def test_the_config_of_each_peft_is_read(version, tmp_path):
    """Fields that an old PEFT did not have are off, and those that a new one has are known."""
    with fake_engine() as engine:
        loaded = engine.load_adapter("pirate", write_with(tmp_path / version, fields_of(version)))
    assert (loaded.rank, loaded.num_modules, loaded.format) == (8, len(TINY_MODEL), "PEFT")


def test_the_table_above_is_this_peft(tmp_path):
    """The installed PEFT writes no field that is missing there, so that a new one is looked at."""
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(target_modules=["q_proj"])
    config.save_pretrained(tmp_path)
    assert set(json.loads((tmp_path / CONFIG).read_text())) <= set(fields_of("0.21"))


@pytest.mark.parametrize(
    "fields",
    [
        {"use_new_thing": False, "new_config": None, "new_number": 5, "new_mode": "none", "new_list": [1]},
        {"new_config": {}, "use_new_thing": None},
    ],
)
def test_a_feature_of_a_newer_peft_that_is_off_changes_nothing(fields, tmp_path):
    """PEFT writes every field, so that a new version's files have names that nobody here knows."""
    folder = write_with(tmp_path / "new", fields_of("0.21") | {"peft_version": "0.99.0"} | fields)
    assert refusals(folder, tmp_path / "copy") == ""


@pytest.mark.parametrize("fields", [{"use_new_thing": True}, {"new_config": {"strength": 2}}])
def test_a_feature_of_a_newer_peft_that_is_on_is_refused(fields, tmp_path):
    """It may change what is computed; the same field in another program's file, which no PEFT reads, does not."""
    folder = write_with(tmp_path / "new", fields_of("0.21") | {"peft_version": "0.99.0"} | fields)
    assert "feature of PEFT '0.99.0'" in refusals(folder, tmp_path / "a")
    other = write_with(tmp_path / "other", FIRST | fields)
    assert refusals(other, tmp_path / "b") == ""


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"enable_lora": [True, False, True]}, "enable_lora"),
        ({"use_merged_linear": True}, "use_merged_linear"),
        ({"use_qa_lora": True}, "QA-LoRA"),
    ],
)
def test_features_that_are_gone_are_refused(fields, words, tmp_path):
    """PEFT 0.2 and ms-swift adapted parts of fused modules, in another shape."""
    assert words in refusals(write_with(tmp_path / "old", FIRST | fields), tmp_path / "copy")


#: Read in these tools' sources in 2026: unsloth_zoo/hf_utils.py and peft_utils.py (unslothai/unsloth-zoo),
#: src/axolotl/loaders/adapter.py (axolotl-ai-cloud/axolotl), src/llamafactory/model/adapter.py (hiyouga/LLaMA-Factory),
#: torchtune/models/convert_weights.py (pytorch/torchtune), nemo_automodel/components/checkpoint/addons.py
#: (NVIDIA-NeMo/Automodel), ``HFCheckpointIO`` in nemo/lightning/io/hf.py and ``PEFT`` in
#: nemo/lightning/pytorch/callbacks/peft.py (NVIDIA/NeMo), peft_bridge.py (NVIDIA-NeMo/Megatron-Bridge), and
#: swift/tuners/lora.py (modelscope/ms-swift), whose newer versions write PEFT's fields only.
TOOLS = {
    "Unsloth": {
        **fields_of("0.18"),
        "auto_mapping": {
            "base_model_class": "LlamaForCausalLM",
            "parent_library": "transformers.models.llama.modeling_llama",
            "unsloth_fixed": True,
        },
        "base_model_name_or_path": "unsloth/fake-model-bnb-4bit",
        "target_modules": r"(?:.*?(?:language|text).*?(?:self_attn|attention|attn|mlp).*?(?:q_proj|v_proj))",
        "task_type": None,
    },
    "Axolotl": {
        **fields_of("0.18"),
        "fan_in_fan_out": None,
        "lora_dropout": 0,
        "modules_to_save": None,
        "nvfp4_merge_aware": {"scale_mode": "fresh", "pts_policy": "base_fused_max", "start_step": None},
    },
    "LLaMA-Factory": {**fields_of("0.15"), "target_modules": ["q_proj", "v_proj"], "modules_to_save": None},
    "torchtune": {
        "r": 8,
        "lora_alpha": 16,
        "target_modules": ["q_proj", "v_proj", "o_proj", "gate_proj"],
        "peft_type": "LORA",
        "base_model_name_or_path": "fake/model",
    },
    "NeMo Automodel": {
        "task_type": "CAUSAL_LM",
        "peft_type": "LORA",
        "r": 8,
        "lora_alpha": 16,
        "use_dora": False,
        "target_modules": list(TINY_MODEL),
        "bias": "none",
        "base_model_name_or_path": "N/A",
    },
    "NeMo 2": {**fields_of("0.15"), "megatron_core": None, "runtime_config": {"ephemeral_gpu_offload": False}},
    "Megatron-Bridge": {
        **FIRST,
        "auto_mapping": None,
        "base_model_name_or_path": "",
        "init_lora_weights": True,
        "rank_pattern": {},
        "alpha_pattern": {},
        "use_dora": False,
        "use_rslora": False,
    },
    "Tinker": {"peft_type": "LORA", "r": 8, "lora_alpha": 32, "target_modules": "all-linear"},
    "ms-swift": {
        **fields_of("0.15"),
        "swift_type": "LORA",
        "use_qa_lora": False,
        "use_merged_linear": False,
        "enable_lora": None,
        "lora_dtype": None,
        "lorap_lr_ratio": 16.0,
        "lorap_emb_lr": 1e-06,
        "model_key_mapping": None,
    },
}


@pytest.mark.parametrize("tool", TOOLS)
def test_the_config_of_each_tool_is_read(tool, tmp_path):
    """Null for a switch, an empty list, a pattern for the modules, or few fields: what the tools write is served."""
    with fake_engine() as engine:
        loaded = engine.load_adapter("pirate", write_with(tmp_path / "adapter", TOOLS[tool]))
    assert loaded.num_modules == len(TINY_MODEL)


NAMES = {
    "PEFT": lambda name: name,
    "ms-swift's own": lambda name: name.removeprefix("base_model.model.").replace(".weight", ".default.weight"),
    "FSDP": lambda name: name.replace(".self_attn", "._fsdp_wrapped_module.self_attn"),
    "torch.compile": lambda name: name.replace("base_model.model.", "base_model.model._orig_mod."),
    "activation checkpointing": lambda name: name.replace(".mlp", ".mlp._checkpoint_wrapped_module"),
    "DeepSpeed": lambda name: f"module.{name}",
    "saved twice": lambda name: f"base_model.model.{name}",
}


@pytest.mark.parametrize("tool", NAMES)
def test_the_names_of_each_tool_are_found(tool, tmp_path):
    """What wrappers leave in the names of tensors is left out where then all modules are the model's."""
    with fake_engine() as engine:
        loaded = engine.load_adapter("pirate", write_with(tmp_path / "adapter", fields_of("0.15"), NAMES[tool]))
    assert loaded.num_modules == len(TINY_MODEL)


def test_where_a_tool_puts_an_adapter_in_a_folder_it_is_named(tmp_path):
    """The next step in the error: NeMo's ``model`` and ``hf_adapter``, ms-swift's ``default``, verl's ``lora_adapter``.

    LLaMA-Factory 1.0 writes ``checkpoint-NNN/model`` (src/llamafactory/v1/core/utils/checkpoint.py).
    """
    for name in ("model", "hf_adapter", "default", "lora_adapter"):
        write_adapter(tmp_path / name / "run" / name)
        (tmp_path / name / "run" / "config.yaml").write_text("")
        with pytest.raises(AdapterNotFoundError, match=rf"name \S+/run/{name}$"):
            make_copy(tmp_path / name / "run", tmp_path / "copy")


def test_torchtunes_own_weights_beside_pefts_are_not_read(tmp_path):
    """It writes adapter_model.pt in its own names beside PEFT's file, and both are of the same adapter."""
    folder = write_with(tmp_path / "epoch_0", TOOLS["torchtune"])
    (folder / "adapter_model").mkdir()
    (folder / "config.json").write_text("{}")  # the base's files are copied there
    (folder / "adapter_model.pt").write_bytes(b"not read")
    (folder / "model-00001-of-00002.safetensors").write_bytes(b"not read")
    assert make_copy(folder, tmp_path / "a")[0].format == "PEFT"
    assert make_copy(folder, tmp_path / "b", allow_pickle=True)[0].format == "PEFT"


@pytest.mark.parametrize(
    ("peft_type", "words"),
    [
        *((name, "save_as_lora") for name in ("LOKR", "FOURIERFT", "RANDLORA", "VBLORA", "MISS")),
        *((name, "merge_and_unload") for name in ("OFT", "BOFT", "IA3", "LN_TUNING", "ROAD", "HRA")),
        *((name, "train a LoRA") for name in ("PROMPT_TUNING", "P_TUNING", "PREFIX_TUNING", "ADAPTION_PROMPT")),
        ("XLORA", "load those that it mixes"),
        ("BRAND_NEW", "type BRAND_NEW, and vLLM serves LoRA only."),
    ],
)
def test_another_method_of_pefts_says_what_it_is_and_the_way_out(peft_type, words, tmp_path):
    """Each is refused by its name, with PEFT's call that makes something that can be served, where there is one."""
    folder = write_with(tmp_path / "other", {"peft_type": peft_type, "base_model_name_or_path": "fake/model"})
    with fake_engine() as engine, pytest.raises(IncompatibleAdapterError) as caught:
        engine.load_adapter("pirate", folder)
    assert f"It is an adapter of type {peft_type}," in caught.value.reasons[0]
    assert words in caught.value.reasons[0]
