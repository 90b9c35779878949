"""AdaLoRA: the LoRA that is served adds to each weight what PEFT's own forward adds."""

import json
import warnings

import numpy as np
import pytest
from effects import assert_same, deltas, make_copy

from qlora_infer.errors import CorruptAdapterError
from qlora_infer.files.safetensors import map_tensors, write_tensors
from qlora_infer.sources.tensors import TensorSource

torch = pytest.importorskip("torch")
peft = pytest.importorskip("peft")
transformers = pytest.importorskip("transformers")


def tiny_model(**fields):
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(vocab_size=96, **{**sizes, **fields})).eval()


def adalora(*, alpha=8, pattern=None, init_r=6, **fields):
    """A model with an adapter of random factors; ``pattern`` are the rows that stay, by the end of a module's name."""
    config = peft.AdaLoraConfig(
        init_r=init_r,
        lora_alpha=alpha,
        total_step=10,
        target_modules=["q_proj", "v_proj", "down_proj"],
        task_type="CAUSAL_LM",
        **fields,
    )
    model = peft.get_peft_model(tiny_model(), config)
    generator = torch.Generator().manual_seed(1)
    for name, parameter in model.named_parameters():
        if ".lora_" in name:
            parameter.data = torch.randn(parameter.shape, generator=generator) * 0.1
    if pattern:
        names = [name for name, _ in model.base_model.model.named_parameters() if ".lora_E." in name]
        config.rank_pattern = {
            name: kept for name in names for end, kept in pattern.items() if name.split(".lora_E")[0].endswith(end)
        }
    return model


def of_peft(folder):
    """What PEFT adds to each weight when it has loaded the folder, in float64."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = peft.PeftModel.from_pretrained(tiny_model(), folder)
    return {
        name.removeprefix("base_model.model."): module.double().get_delta_weight("default").detach().numpy()
        for name, module in model.named_modules()
        if hasattr(module, "lora_E") and module.r["default"]
    }


HALF = [True, False, True, False, True, False]
PATTERNS = {
    "no pattern": None,
    "another rank for each kind": {"q_proj": HALF, "v_proj": [True] * 5 + [False], "down_proj": [True] * 6},
    "one module left out": {"q_proj": HALF, "layers.0.self_attn.v_proj": [False] * 6, "layers.1.mlp.down_proj": HALF},
}


@pytest.mark.parametrize("alpha", [8, 0, 3])
@pytest.mark.parametrize("pattern", PATTERNS.values(), ids=PATTERNS)
def test_it_adds_what_peft_adds(pattern, alpha, tmp_path):
    """Ranks, singular values and PEFT's scale, alpha / (init_r + 1e-5), are in the factors."""
    model = adalora(alpha=alpha, pattern=pattern)
    with warnings.catch_warnings():  # PEFT takes a module of rank 0 for one that ZeRO-3 did not gather
        warnings.simplefilter("ignore")
        model.save_pretrained(tmp_path / "adapter")
    expected = of_peft(tmp_path / "adapter")
    snapshot, manifest, _ = make_copy(tmp_path / "adapter", tmp_path / "copy")
    assert (snapshot.format, manifest.unsupported) == ("AdaLoRA", ())
    assert_same(deltas(snapshot.folder, manifest), expected, tolerance=1e-6)


def test_it_answers_as_pefts_own_forward(tmp_path):
    """The converted adapter, loaded by PEFT as LoRA, has the logits of the AdaLoRA that was saved."""
    adalora(pattern=PATTERNS["another rank for each kind"]).save_pretrained(tmp_path / "adapter")
    snapshot, _, _ = make_copy(tmp_path / "adapter", tmp_path / "copy")
    tokens = torch.arange(12)[None]
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        expected = peft.PeftModel.from_pretrained(tiny_model(), tmp_path / "adapter")(tokens).logits
        found = peft.PeftModel.from_pretrained(tiny_model(), snapshot.folder)(tokens).logits
        base = tiny_model()(tokens).logits
    assert (found - expected).abs().max() < 1e-5 < (expected - base).abs().max()


def test_a_training_that_reduces_ranks_is_served_at_every_step(tmp_path):
    """Saved before, while and after the ranks are reduced: what PEFT loads from the folder is what is served."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        config = peft.AdaLoraConfig(
            init_r=4, target_r=2, tinit=1, tfinal=2, total_step=6, deltaT=1, target_modules=["q_proj", "v_proj"]
        )
        model = peft.get_peft_model(tiny_model(), config).train()
        optimizer = torch.optim.Adam(model.parameters(), lr=0.02)
        for step in range(7):
            loss = model(torch.arange(12)[None], labels=torch.arange(12)[None]).loss
            loss.backward()
            optimizer.step()
            model.base_model.update_and_allocate(step)
            optimizer.zero_grad()
            model.save_pretrained(tmp_path / f"{step}")
            snapshot, manifest, _ = make_copy(tmp_path / f"{step}", tmp_path / f"copy-{step}")
            assert_same(deltas(snapshot.folder, manifest), of_peft(tmp_path / f"{step}"), tolerance=1e-5)
    assert json.loads((tmp_path / "6" / "adapter_config.json").read_text())["rank_pattern"]


def test_a_model_in_training_is_a_source(tmp_path):
    """PEFT's model in memory is converted as its saved folder is."""
    model = adalora(pattern=PATTERNS["another rank for each kind"])
    model.save_pretrained(tmp_path / "adapter")
    snapshot, manifest, _ = make_copy(model, tmp_path / "copy")
    assert isinstance(TensorSource.from_peft(model), TensorSource)
    assert_same(deltas(snapshot.folder, manifest), of_peft(tmp_path / "adapter"))


def test_what_it_trains_beside_the_factors_is_refused(tmp_path):
    """Whole modules beside it stay a reason, as in a LoRA."""
    adalora(modules_to_save=["lm_head"]).save_pretrained(tmp_path / "adapter")
    _, manifest, _ = make_copy(tmp_path / "adapter", tmp_path / "copy")
    assert any("modules_to_save" in reason for reason in manifest.unsupported)


def rewritten(folder, change=lambda tensors: None, **fields):
    config = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps({**config, **fields}))
    path = folder / "adapter_model.safetensors"
    tensors = {name: np.array(tensor) for name, tensor in map_tensors("test", path).items()}
    change(tensors)
    write_tensors(path, tensors)
    return folder


def without_e(tensors):
    del tensors[next(name for name in tensors if name.endswith("lora_E"))]


def short_e(tensors):
    name = next(name for name in tensors if name.endswith("lora_E"))
    tensors[name] = tensors[name][:2]


@pytest.mark.parametrize(
    ("change", "fields", "match"),
    [
        (without_e, {}, "no lora_E"),
        (short_e, {}, r"with rank 6, .* \[6, 1\]"),
        (lambda tensors: None, {"init_r": 4}, "with rank 4"),
        (lambda tensors: None, {"init_r": "4"}, "'init_r' must be"),
        (lambda tensors: None, {"lora_alpha": [1]}, "'lora_alpha' must be"),
        (lambda tensors: None, {"rank_pattern": {"model.layers.0.self_attn.q_proj.lora_E": [True]}}, "with rank 1"),
        (lambda tensors: None, {"rank_pattern": {"q_proj": 4}}, "lists of true and false"),
        (lambda tensors: None, {"rank_pattern": [4]}, "lists of true and false"),
    ],
)
def test_a_fault_is_named(change, fields, match, tmp_path):
    """Tensors and config that contradict each other are no adapter."""
    adalora().save_pretrained(tmp_path / "adapter")
    with pytest.raises(CorruptAdapterError, match=match):
        make_copy(rewritten(tmp_path / "adapter", change, **fields), tmp_path / "copy")
