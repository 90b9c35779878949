"""Adapters that were started with a change of the base model: served where PEFT has converted them, else refused."""

import json
import warnings

import pytest
from effects import assert_same, deltas, make_copy

from qlora_infer.errors import IncompatibleAdapterError
from qlora_infer.testing import fake_engine

torch = pytest.importorskip("torch")
peft = pytest.importorskip("peft")
transformers = pytest.importorskip("transformers")

SIZES = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
PATTERNS = {"rank_pattern": {"v_proj": 2, "layers.1.mlp.down_proj": 6}, "alpha_pattern": {"q_proj": 3}}


def tiny_model():
    torch.manual_seed(0)
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(vocab_size=96, num_key_value_heads=2, **SIZES)).eval()


def started(init, **fields):
    """A model whose base the start of the training has changed."""
    fields = {"r": 4, "lora_alpha": 6, "target_modules": ["q_proj", "v_proj", "down_proj"], **fields}
    if init == "corda":
        fields["corda_config"] = peft.tuners.lora.config.CordaConfig()
    start = False if init == "loftq" else init
    config = peft.LoraConfig(init_lora_weights=start, task_type="CAUSAL_LM", **fields)
    model = tiny_model()
    if init == "corda":
        from peft.tuners.lora.corda import preprocess_corda

        preprocess_corda(model, config, run_model=lambda: model(torch.arange(96)[None]))
    adapted = peft.get_peft_model(model, config)
    if init == "loftq":  # PEFT's own start computes on a GPU; the base becomes what the factors leave, as there
        config.init_lora_weights, config.loftq_config = "loftq", {"loftq_bits": 4, "loftq_iter": 1}
        for module in adapted.modules():
            if hasattr(module, "lora_A"):
                module.get_base_layer().weight.data -= module.get_delta_weight("default").detach()
    return adapted, config


def trained_and_saved(folder, init, **fields):
    """Save before the training, after it, and converted; return the converted folder and what was added to weights."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model, config = started(init, **fields)
        config.init_lora_weights = True  # as PEFT's guide to PiSSA has it
        model.save_pretrained(folder / "initial")
        config.init_lora_weights = init
        before = products(model)
        generator = torch.Generator().manual_seed(1)
        for name, parameter in model.named_parameters():
            if ".lora_" in name:
                parameter.data += torch.randn(parameter.shape, generator=generator) * 0.05
        added = {name: (after - before[name]).numpy() for name, after in products(model).items()}
        model.save_pretrained(folder / "trained")
        model.save_pretrained(folder / "plain", path_initial_model_for_weight_conversion=str(folder / "initial"))
    return folder / "plain", added


def products(model):
    return {
        name.removeprefix("base_model.model."): module.get_delta_weight("default").detach().double()
        for name, module in model.named_modules()
        if hasattr(module, "lora_A")
    }


@pytest.mark.parametrize("fields", [{}, {"use_rslora": True}, PATTERNS], ids=["plain", "rslora", "patterns"])
@pytest.mark.parametrize("init", ["pissa", "pissa_niter_4", "olora", "corda", "loftq"])
def test_a_converted_adapter_adds_what_the_training_added(init, fields, tmp_path):
    """PEFT doubles ranks and alphas, and leaves the base as it was; B A with its scale is trained minus initial."""
    folder, added = trained_and_saved(tmp_path, init, **fields)
    config = json.loads((folder / "adapter_config.json").read_text())
    assert (config["r"], config["init_lora_weights"]) == (8, True)
    snapshot, manifest, _ = make_copy(folder, tmp_path / "copy")
    assert (snapshot.format, manifest.unsupported) == ("PEFT", ())
    assert_same(deltas(snapshot.folder, manifest), added, tolerance=1e-5)


@pytest.mark.parametrize("init", ["pissa", "olora", "corda", "loftq"])
def test_one_that_is_not_converted_is_refused_with_the_call_that_converts(init, tmp_path):
    """Its factors are for a base that nobody serves; the reason has PEFT's call, and the other way out."""
    trained_and_saved(tmp_path, init)
    with fake_engine() as engine, pytest.raises(IncompatibleAdapterError) as caught:
        engine.load_adapter("pirate", tmp_path / "trained")
    (reason,) = [reason for reason in caught.value.reasons if init in reason]
    assert "model.save_pretrained(folder, path_initial_model_for_weight_conversion=initial)" in reason
    assert "set init_lora_weights to true" in reason


@pytest.mark.parametrize("init", ["pissa", "olora", "corda", "loftq"])
def test_it_answers_on_the_unchanged_base_as_it_was_trained(init, tmp_path):
    """The logits of the trained model, whose base was changed, are those of the converted adapter on the model itself."""
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")
        folder, _ = trained_and_saved(tmp_path, init)
        snapshot, _, _ = make_copy(folder, tmp_path / "copy")
        model, _ = started(init)
        generator = torch.Generator().manual_seed(1)
        for name, parameter in model.named_parameters():
            if ".lora_" in name:
                parameter.data += torch.randn(parameter.shape, generator=generator) * 0.05
        tokens = torch.arange(12)[None]
        expected = model(tokens).logits
        found = peft.PeftModel.from_pretrained(tiny_model(), snapshot.folder)(tokens).logits
        assert (found - expected).abs().max() < 1e-4 < (expected - tiny_model()(tokens).logits).abs().max()
