"""LoHa: a product of products, which is a LoRA of the squared rank; it adds what PEFT's own adds."""

import json
import warnings

import pytest
from effects import assert_same, deltas, make_copy

from qlora_infer.errors import CorruptAdapterError, IncompatibleAdapterError

torch = pytest.importorskip("torch")
peft = pytest.importorskip("peft")
transformers = pytest.importorskip("transformers")


def tiny_model():
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(vocab_size=96, **sizes)).eval()


def save_loha(folder, **fields):
    fields = {"r": 4, "alpha": 6, "target_modules": ["q_proj", "v_proj", "down_proj"], **fields}
    model = peft.get_peft_model(tiny_model(), peft.LoHaConfig(init_weights=False, task_type="CAUSAL_LM", **fields))
    model.save_pretrained(folder)
    return folder


def of_peft(folder):
    """What PEFT adds to each weight when it has loaded the folder, in float64."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = peft.PeftModel.from_pretrained(tiny_model(), folder)
    return {
        name.removeprefix("base_model.model."): module.double().get_delta_weight("default").detach().numpy()
        for name, module in model.named_modules()
        if hasattr(module, "hada_w1_a") and "default" in module.hada_w1_a
    }


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"rank_pattern": {"v_proj": 2}, "alpha_pattern": {"layers.1.self_attn.q_proj": 3}},
        {"rank_pattern": {r".*\.layers\.0\.(self_attn|mlp)\.(q|down)_proj": 3}},
    ],
)
def test_it_adds_what_peft_adds(fields, tmp_path):
    """Rank r becomes r * r, and alpha / r stays, also where a pattern changes either."""
    save_loha(tmp_path / "adapter", **fields)
    snapshot, manifest, _ = make_copy(tmp_path / "adapter", tmp_path / "copy")
    assert (snapshot.format, manifest.unsupported) == ("LoHa", ())
    assert {module.rank for module in manifest.modules.values()} <= {4, 9, 16}
    assert_same(deltas(snapshot.folder, manifest), of_peft(tmp_path / "adapter"), tolerance=1e-6)


def test_a_rank_whose_square_is_too_large_is_refused_before_anything_is_computed(tmp_path):
    """22 * 22 is the last that vLLM serves; the way out is PEFT's own conversion."""
    save_loha(tmp_path / "adapter", r=23, target_modules=["q_proj"])
    with pytest.raises(IncompatibleAdapterError, match=r"rank 529, and vLLM serves ranks up to 512: .*save_as_lora"):
        make_copy(tmp_path / "adapter", tmp_path / "a")
    save_loha(tmp_path / "small", r=22, target_modules=["q_proj"])
    assert make_copy(tmp_path / "small", tmp_path / "b")[1].rank == 484


@pytest.mark.parametrize(
    ("fields", "match"),
    [({"r": 3}, "with rank 3"), ({"alpha": None}, "no 'lora_alpha'"), ({"rank_pattern": {"(": 4}}, "no regular expr")],
)
def test_a_fault_is_named(fields, match, tmp_path):
    """Tensors and config that contradict each other are no adapter."""
    save_loha(tmp_path / "adapter")
    path = tmp_path / "adapter" / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **fields}))
    with pytest.raises(CorruptAdapterError, match=match):
        make_copy(tmp_path / "adapter", tmp_path / "copy")
