"""Biases that an adapter saves: left out where they are zero or the base model's, and refused elsewhere."""

import pytest

torch = pytest.importorskip("torch")
peft = pytest.importorskip("peft")

from basewise.tiny_bases import TinyBase, save  # noqa: E402
from models import catalog, tiny  # noqa: E402

from qlora_infer.adapters.store import AdapterStore  # noqa: E402
from qlora_infer.errors import IncompatibleAdapterError  # noqa: E402
from qlora_infer.sources.folder import FolderSource  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning", "ignore::RuntimeWarning")

LORA = {"task_type": "CAUSAL_LM", "r": 8, "lora_alpha": 16, "target_modules": ["q_proj", "v_proj", "down_proj"]}


@pytest.fixture(scope="module")
def qwen2(tmp_path_factory):
    """A model whose queries, keys and values have biases."""
    folder = tmp_path_factory.mktemp("qwen2")
    tiny.build(catalog.BY_NAME["qwen2"], folder)
    return TinyBase(folder, "Qwen2ForCausalLM")


@pytest.mark.parametrize(
    "options",
    [{"lora_bias": True}, {"bias": "all"}, {"bias": "lora_only"}, {"bias": "all", "lora_bias": True}],
    ids=str,
)
def test_biases_that_change_nothing_are_left_out(options, qwen2, tmp_path):
    """They were not trained: what is served is exactly the adapter."""
    config = peft.LoraConfig(**LORA, **options)
    adapter = save(qwen2, config, tmp_path / "a", change=zero_lora_biases)
    assert (qwen2.logits(adapter) - qwen2.logits(qwen2.served(adapter, tmp_path / "store"))).abs().max() < 1e-4
    _, fit = qwen2.held_against(adapter, tmp_path / "again")
    assert fit.conversion.equal


def test_a_bias_of_zeros_does_not_make_its_module_one_that_changes_nothing(qwen2, tmp_path):
    """Only zeros in A or B do."""

    def change(model):
        for name, parameter in model.named_parameters():
            if name.endswith(".bias"):
                parameter.zero_()

    adapter = save(qwen2, peft.LoraConfig(**LORA, bias="lora_only"), tmp_path / "a", change=change)
    copies = AdapterStore(tmp_path / "store")
    _, manifest, _ = copies.make("zero", 1, FolderSource(adapter), allow_pickle=False)
    assert manifest.saved
    assert not manifest.zero_modules


def zero_lora_biases(model):
    for name, parameter in model.named_parameters():
        if "lora_B.default.bias" in name:
            parameter.zero_()


@pytest.mark.parametrize(
    ("options", "named", "words"),
    [
        ({"lora_bias": True}, "lora_B.default.bias", "lora_bias=False"),
        ({"bias": "all"}, "q_proj.base_layer.bias", "merge_and_unload"),
        ({"bias": "lora_only"}, "v_proj.base_layer.bias", "merge_and_unload"),
    ],
    ids=["lora_bias", "all", "lora_only"],
)
def test_biases_that_were_trained_are_refused(options, named, words, qwen2, tmp_path):
    """The reason names them and the way out."""

    def change(model):
        for name, parameter in model.named_parameters():
            if name.endswith(named):
                parameter += 0.5

    adapter = save(qwen2, peft.LoraConfig(**LORA, **options), tmp_path / "a", change=change)
    with pytest.raises(IncompatibleAdapterError, match=words) as refusal:
        qwen2.held_against(adapter, tmp_path / "store")
    assert "bias" in str(refusal.value)
