"""Rows of embeddings and output layers that adapters replace, which are served as LoRA factors of their differences."""

import json

import pytest

np = pytest.importorskip("numpy")
torch = pytest.importorskip("torch")
peft = pytest.importorskip("peft")

from basewise.tiny_bases import save  # noqa: E402
from hypothesis import given, settings  # noqa: E402
from hypothesis import strategies as st  # noqa: E402
from safetensors.torch import load_file, save_file  # noqa: E402

from qlora_infer.adapters.served import write_served  # noqa: E402
from qlora_infer.basewise.rows import ChangedRows, differing_rows  # noqa: E402
from qlora_infer.errors import AdapterError, CorruptAdapterError, IncompatibleAdapterError  # noqa: E402
from qlora_infer.files.manifest import read_manifest  # noqa: E402
from qlora_infer.testing import write_adapter  # noqa: E402

#: PEFT warns of tied weights, of modules that patterns name and it does not find, and of much else that is meant here.
pytestmark = pytest.mark.filterwarnings("ignore::UserWarning", "ignore::RuntimeWarning")

TOKENS = [64, 70, 511, 99]
LORA = {"task_type": "CAUSAL_LM", "r": 8, "lora_alpha": 16, "target_modules": ["q_proj", "v_proj"]}
#: Of logits of about 1 to 10, in float32.
ROUNDING = 2e-4


def assert_the_same(base, adapter, store, **options):
    """Assert that PEFT computes the same with the copy for vLLM as with the adapter, and not what the base does."""
    theirs, ours = base.logits(adapter), base.logits(base.served(adapter, store, **options))
    assert (theirs - ours).abs().max() < ROUNDING
    assert (theirs - base.logits(None)).abs().median() > 0.01


@pytest.mark.parametrize("base", ["llama", "qwen3"])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"use_rslora": True},
        {"rank_pattern": {"q_proj": 3}, "alpha_pattern": {"v_proj": 5, "embed_tokens": 77, "lm_head": 9}},
    ],
    ids=["plain", "rslora", "patterns"],
)
def test_trained_tokens_are_a_lora_of_the_embeddings(base, options, tiny_bases, tmp_path):
    """Beside LoRA of other modules, whatever scales these; of a tied model, the output layer follows."""
    config = peft.LoraConfig(**LORA, **options, trainable_token_indices=TOKENS)
    adapter = save(tiny_bases[base], config, tmp_path / "a")
    assert_the_same(tiny_bases[base], adapter, tmp_path / "store")
    _, fit = tiny_bases[base].held_against(adapter, tmp_path / "again")
    assert set(fit.conversion.rows) == (
        {"model.embed_tokens", "lm_head"} if base == "qwen3" else {"model.embed_tokens"}
    )


@pytest.mark.parametrize("base", ["llama", "qwen3"])
@pytest.mark.parametrize("tokens", [{"lm_head": [80, 81]}, {"embed_tokens": [80], "lm_head": [81, 70]}], ids=str)
def test_trained_tokens_of_named_modules(base, tokens, tiny_bases, tmp_path):
    """A mapping names modules; tied ones of different tokens are not tied any more."""
    adapter = save(tiny_bases[base], peft.LoraConfig(**LORA, trainable_token_indices=tokens), tmp_path / "a")
    assert_the_same(tiny_bases[base], adapter, tmp_path / "store")


@pytest.mark.parametrize("base", ["llama", "qwen3"])
def test_an_adapter_of_trained_tokens_alone(base, tiny_bases, tmp_path):
    """PEFT's TrainableTokensConfig, which has no factors, rank or alpha."""
    config = peft.TrainableTokensConfig(token_indices=TOKENS, target_modules=["embed_tokens"], task_type="CAUSAL_LM")
    assert_the_same(tiny_bases[base], save(tiny_bases[base], config, tmp_path / "a"), tmp_path / "store")


@pytest.mark.parametrize("base", ["llama", "qwen3"])
@pytest.mark.parametrize(
    ("modules", "options"),
    [
        (["embed_tokens"], {}),
        (["lm_head"], {}),
        (["embed_tokens", "lm_head"], {}),
        (["embed_tokens"], {"ensure_weight_tying": True}),
    ],
    ids=["embeddings", "head", "both", "tied"],
)
def test_whole_modules_of_which_few_rows_differ(base, modules, options, tiny_bases, tmp_path):
    """modules_to_save of embeddings and output layers; each is a copy of its own, unless they are to be tied."""
    if options and base == "llama":
        pytest.skip("nothing is tied")

    def change(model):
        for number, module in enumerate(modules):
            for name, parameter in model.named_parameters():
                if f"{module}.modules_to_save.default.weight" in name:
                    parameter[[64 + number, 99, 500]] += torch.randn(3, 128, generator=torch.Generator().manual_seed(7))

    adapter = save(
        tiny_bases[base], peft.LoraConfig(**LORA, **options, modules_to_save=modules), tmp_path / "a", change=change
    )
    assert_the_same(tiny_bases[base], adapter, tmp_path / "store")


def test_a_whole_module_that_is_the_base_models_is_left_out(tiny_bases, tmp_path):
    """Also another one than embeddings."""
    config = peft.LoraConfig(**LORA, modules_to_save=["embed_tokens", "lm_head", "model.norm"])
    adapter = save(tiny_bases["llama"], config, tmp_path / "a")
    assert_the_same(tiny_bases["llama"], adapter, tmp_path / "store")
    _, fit = tiny_bases["llama"].held_against(adapter, tmp_path / "again")
    assert sorted(fit.conversion.equal) == ["lm_head.weight", "model.embed_tokens.weight", "model.norm.weight"]
    assert "without" in str(fit)


@pytest.mark.parametrize("options", [{}, {"use_rslora": True}], ids=str)
def test_vllm_reads_the_copy_as_what_is_added(options, tiny_bases, tmp_path):
    """vLLM 0.32's own reader finds factors whose product, scaled as it scales them, is the difference of the rows."""
    pytest.importorskip("vllm")
    from vllm.config.lora import LoRAConfig
    from vllm.lora.lora_model import LoRAModel
    from vllm.lora.peft_helper import PEFTHelper

    base = tiny_bases["qwen3"]
    config = peft.LoraConfig(**LORA, **options, trainable_token_indices=TOKENS)
    adapter = save(base, config, tmp_path / "a")
    served = base.served(adapter, tmp_path / "store")
    helper = PEFTHelper.from_local_dir(str(served), 256)
    helper.validate_legal(LoRAConfig(max_lora_rank=8))
    names = {"embed_tokens", "lm_head", "q_proj", "v_proj"}
    loras = LoRAModel.from_local_checkpoint(
        str(served), names, helper, lora_model_id=1, device="cpu", dtype=torch.float32, model_vocab_size=512
    ).loras
    added = torch.zeros(512, 128)
    (delta,) = [tensor for name, tensor in load_file(adapter / "adapter_model.safetensors").items() if "delta" in name]
    added[TOKENS] = delta - base.network().get_input_embeddings().weight.detach()[TOKENS]
    embeddings, head = loras["model.embed_tokens"], loras["lm_head"]
    assert torch.equal((embeddings.lora_b @ embeddings.lora_a * embeddings.scaling).T, added)
    assert torch.equal(head.lora_b @ head.lora_a * head.scaling, added)
    assert loras["model.layers.0.self_attn.q_proj"].scaling == (16 / 8**0.5 if options else 2)


def refusal(base, adapter, store, **options):
    with pytest.raises(IncompatibleAdapterError) as refusal:
        base.held_against(adapter, store, **options)
    return " ".join(refusal.value.reasons)


def test_what_no_factors_can_hold_is_refused_with_the_way_out(tiny_bases, tmp_path):
    """A module of another kind, more rows than there are ranks, and rows of tokens that the model lacks."""
    base = tiny_bases["llama"]

    def change(model):
        for name, parameter in model.named_parameters():
            if "modules_to_save.default" in name:
                parameter += 0.1

    config = peft.LoraConfig(**LORA, modules_to_save=["model.norm", "embed_tokens"])
    adapter = save(base, config, tmp_path / "a", change=change)
    words = refusal(base, adapter, tmp_path / "1")
    assert "model.norm.weight" in words
    assert "merge_and_unload" in words
    assert "512 rows" in words
    assert "max_lora_rank=512" in words

    many = save(base, peft.LoraConfig(**LORA, trainable_token_indices=list(range(64, 100))), tmp_path / "b")
    words = refusal(base, many, tmp_path / "2")
    assert "36 rows" in words
    assert "max_lora_rank=64" in words
    assert base.held_against(many, tmp_path / "3", max_lora_rank=64)

    path = many / "adapter_config.json"
    path.write_text(path.read_text().replace("99", "512"))
    assert "no new token embeddings" in refusal(base, many, tmp_path / "4", max_lora_rank=64)


@pytest.mark.parametrize(("size", "words"), [(500, "made smaller"), (520, "no new token embeddings")])
def test_embeddings_of_another_number_of_tokens_are_refused(size, words, tiny_bases, tmp_path):
    """A trainer that resizes the model to its tokenizer leaves such; PEFT cannot load them either."""
    adapter = save(tiny_bases["llama"], peft.LoraConfig(**LORA, modules_to_save=["embed_tokens"]), tmp_path / "a")
    path = adapter / "adapter_model.safetensors"
    tensors = load_file(path)
    tensors["base_model.model.model.embed_tokens.weight"] = torch.randn(size, 128)
    save_file(tensors, path)
    assert words in refusal(tiny_bases["llama"], adapter, tmp_path / "store")


def test_factors_and_rows_of_one_module_are_refused(tiny_bases, tmp_path):
    """PEFT cannot compute them either."""
    adapter = save(tiny_bases["qwen3"], peft.LoraConfig(**{**LORA, "target_modules": ["lm_head"]}), tmp_path / "a")
    tokens = save(tiny_bases["qwen3"], peft.LoraConfig(**LORA, trainable_token_indices=TOKENS), tmp_path / "b")
    path = tokens / "adapter_model.safetensors"
    save_file({**load_file(path), **load_file(adapter / path.name)}, path)
    assert "both factors and rows of lm_head" in refusal(tiny_bases["qwen3"], tokens, tmp_path / "store")


@pytest.mark.parametrize(
    "said", [[1, 2], [1, 1, 2, 3], [1, 2, 3, -4], [1, 2, 3, "x"], None, {"wte": [1, 2, 3, 4]}, 7], ids=str
)
def test_tokens_that_are_not_those_of_the_rows_are_corrupt(said, tiny_bases, tmp_path):
    """What the config says has to fit the tensor."""
    adapter = save(tiny_bases["llama"], peft.LoraConfig(**LORA, trainable_token_indices=TOKENS), tmp_path / "a")
    path = adapter / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "trainable_token_indices": said}))
    with pytest.raises(CorruptAdapterError, match="trainable_token_indices"):
        tiny_bases["llama"].held_against(adapter, tmp_path / "store")


KINDS = [
    "model.embed_tokens.token_adapter.trainable_tokens_delta",
    "lm_head.weight",
    "model.norm.weight",
    "lm_head.bias",
]
KINDS += [
    "model.embed_tokens.weight",
    "model.layers.0.self_attn.q_proj.lora_B.bias",
    "weight",
    "x.weight",
    "a" * 400 + ".weight",
]
ANY = st.none() | st.booleans() | st.integers(-2, 600) | st.sampled_from(["", "lm_head", "embed_tokens", "all", "VERA"])
MANY = st.lists(ANY, max_size=4)
JSON = ANY | MANY | st.dictionaries(st.sampled_from(["", "embed_tokens", "lm_head"]), ANY | MANY)
FIELDS = [
    "trainable_token_indices",
    "modules_to_save",
    "bias",
    "lora_bias",
    "ensure_weight_tying",
    "peft_type",
    "token_indices",
]


@settings(max_examples=100, deadline=None)
@given(
    tensors=st.dictionaries(
        st.sampled_from(KINDS), st.sampled_from([(512, 128), (2, 128), (128,), (512,), (520, 128), (0,), (0, 128)])
    ),
    fields=st.dictionaries(st.sampled_from(FIELDS), JSON, max_size=3),
)
def test_whatever_an_adapter_saves_is_served_or_refused(tensors, fields, tiny_bases, tmp_path_factory):
    """Any tensors beside the factors, and any fields about them, end in a typed error or in a copy for vLLM."""
    folder = write_adapter(
        tmp_path_factory.mktemp("fuzz") / "a", modules={"model.layers.0.self_attn.q_proj": (128, 256)}
    )
    path = folder / "adapter_model.safetensors"
    added = {f"base_model.model.{name}": torch.randn(shape) for name, shape in tensors.items()}
    save_file({**load_file(path), **added}, path)
    config = folder / "adapter_config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), **fields}))
    try:
        manifest, fit = tiny_bases["qwen3"].held_against(folder, folder.parent / "store", max_lora_rank=512)
    except AdapterError:
        return
    served = write_served("x", manifest.folder, fit.placement, fit.conversion)
    assert read_manifest("x", served).unsupported == ()


def test_a_served_row_is_nearer_than_bfloat16_rounds():
    """The base model's row plus the difference, each in bfloat16, as vLLM adds them."""
    torch.manual_seed(0)
    for change in (0.001, 0.02, 0.1):
        base = (torch.randn(1000, 512) * 0.02).bfloat16().float()
        new = (base + torch.randn(1000, 512) * change).bfloat16().float()
        served = (base + (new - base).bfloat16().float()).bfloat16().float()
        assert ((served - new).norm(dim=1) / new.norm(dim=1)).mean() < 0.00135


FLOATS = st.floats(-4, 4, width=32)


@settings(deadline=None)
@given(
    base=st.lists(st.lists(FLOATS, min_size=3, max_size=3), min_size=1, max_size=6),
    dtypes=st.tuples(*[st.sampled_from(["float32", "bfloat16", "float16"])] * 2),
    changed=st.sets(st.integers(0, 5)),
    is_ours_rounded=st.booleans(),
)
def test_rows_that_only_differ_in_rounding_are_equal(base, dtypes, changed, is_ours_rounded):
    """A matrix of which one is the other in another dtype has its rows; those that were changed are found."""
    original = torch.tensor(base).to(getattr(torch, dtypes[0]))
    pair = original, original.to(getattr(torch, dtypes[1]), copy=True)
    theirs, ours = pair if is_ours_rounded else pair[::-1]
    rows = sorted(row for row in changed if row < len(base))
    ours[rows] += 8
    assert differing_rows(as_numpy(ours), as_numpy(theirs)) == rows


@settings(deadline=None)
@given(
    rows=st.sets(st.integers(0, 19), min_size=1, max_size=5),
    dtypes=st.tuples(*[st.sampled_from(["float32", "bfloat16"])] * 2),
    is_output=st.booleans(),
)
def test_the_product_of_the_factors_is_the_difference(rows, dtypes, is_output):
    """In float32, to the bit: each of its rows is one of the differences, or zero."""
    rows = tuple(rows)
    ours, theirs = (torch.randn(20, 4).to(getattr(torch, dtype)) for dtype in dtypes)
    changed = ChangedRows("t", "m", rows, rows, 20, 4, is_output)
    a, b = (as_torch(factor.compute()) for factor in changed.factors(as_numpy(ours), as_numpy(theirs)))
    expected = torch.zeros(20, 4)
    expected[list(rows)] = ours.float()[list(rows)] - theirs.float()[list(rows)]
    assert torch.equal(b @ a if is_output else (b @ a).T, expected)


def as_numpy(tensor):
    return tensor.view(torch.uint16).numpy() if tensor.dtype == torch.bfloat16 else tensor.numpy()


def as_torch(array):
    tensor = torch.from_numpy(array)
    return tensor.view(torch.bfloat16).float() if tensor.dtype == torch.uint16 else tensor
