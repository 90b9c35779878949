"""What a trainer has in memory, held against the files that PEFT itself writes of it."""

import json
from types import SimpleNamespace

import pytest

from qlora_infer import TensorSource, parse_source
from qlora_infer.testing import fake_engine

peft = pytest.importorskip("peft")
torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

from safetensors.torch import load_file  # noqa: E402

#: PEFT's: it could not ask the Hub, or saves an embedding whole.
pytestmark = [
    pytest.mark.filterwarnings("ignore:Could not find a config file:UserWarning"),
    pytest.mark.filterwarnings("ignore:Setting `save_embedding_layers`:UserWarning"),
]

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"


@pytest.fixture(autouse=True)
def hub_is_out_of_reach(monkeypatch):
    """PEFT asks the Hub whether the vocabulary has grown."""
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")


def trained(**adapters):
    """A tiny model with some adapters, the last of which is active, whose B is not zero as that of a new one."""
    model = transformers.LlamaForCausalLM(
        transformers.LlamaConfig(
            hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
            vocab_size=96,
        )
    )  # fmt: skip
    model.name_or_path = "org/model"
    for name, fields in adapters.items():
        config = peft.LoraConfig(task_type="CAUSAL_LM", **fields)
        if isinstance(model, peft.PeftModel):
            model.add_adapter(name, config)
        else:
            model = peft.get_peft_model(model, config, adapter_name=name)
    model.set_adapter(name)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.02)
    return model


ATTENTION = {"r": 4, "target_modules": ["q_proj", "v_proj"]}


@pytest.mark.parametrize(
    "adapters",
    [
        {"default": ATTENTION},
        {"other": {"r": 8, "target_modules": ["down_proj"]}, "policy": ATTENTION},
        {"default": {"r": 8, "target_modules": "all-linear", "rank_pattern": {"q_proj": 2}, "use_rslora": True}},
        {"default": {"r": 4, "target_modules": ["embed_tokens", "lm_head"]}},
        {"default": {**ATTENTION, "use_dora": True}},
        {"default": {**ATTENTION, "modules_to_save": ["lm_head"]}},
    ],
    ids=["plain", "the active one of two", "patterns", "embeddings", "dora", "modules_to_save"],
)
def test_a_peft_model_is_written_as_peft_writes_it(adapters, tmp_path):
    """Of the active adapter, the tensors are those of save_pretrained to the bit, and the config is its config."""
    model = trained(**adapters)
    *_, active = adapters
    model.save_pretrained(tmp_path / "peft", selected_adapters=[active])
    parse_source(model).fetch("x", tmp_path / "ours", token=None, allow_pickle=False)
    theirs, ours = tmp_path / "peft" / (active if active != "default" else ""), tmp_path / "ours"
    assert sorted(path.name for path in ours.iterdir()) == [CONFIG, WEIGHTS]
    expected, found = load_file(theirs / WEIGHTS), load_file(ours / WEIGHTS)
    assert set(found) == set(expected)
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())
    configs = [json.loads((folder / CONFIG).read_text()) for folder in (theirs, ours)]
    for config in configs:
        config.pop("inference_mode")  # PEFT sets it in the file only
        for name, value in config.items():
            config[name] = sorted(value) if isinstance(value, list) else value  # they are sets
    assert configs[0] == configs[1]


def test_a_trainer_pushes_its_model(tmp_path):
    """load_adapter(name, model) is all that a training loop needs; each changed content is a version."""
    model = trained(default=ATTENTION)
    with fake_engine() as engine:
        first = engine.load_adapter("policy", model)
        assert (first.version, first.rank, first.num_modules, first.source) == (1, 4, 4, "tensors in memory")
        assert engine.load_adapter("policy", model) == first
        torch.nn.init.normal_(next(p for p in model.parameters() if p.requires_grad))
        assert engine.load_adapter("policy", model, expect=1).version == 2
    with fake_engine(adapters={"policy": model}) as engine:
        assert engine.adapters["policy"].base_model == "org/model"


def test_a_model_without_one_active_adapter_is_refused():
    """Which of several adapters is meant cannot be guessed; the error says what to call."""
    model = SimpleNamespace(peft_config={"a": {}, "b": {}}, active_adapters=["a", "b"])
    with pytest.raises(ValueError, match=r"one adapter .* must be active, got \['a', 'b'\]: model.set_adapter\(name\)"):
        TensorSource.from_peft(model)
