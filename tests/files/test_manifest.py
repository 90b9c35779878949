"""An adapter's files are read as PEFT writes them and as vLLM reads them, whatever else may stand in them."""

import json
import re
import shutil
import struct
import tracemalloc
import warnings
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from qlora_infer.adapters.preflight import Fit, check
from qlora_infer.adapters.served import write_served
from qlora_infer.adapters.store import AdapterStore
from qlora_infer.basewise.conversion import read_saved
from qlora_infer.errors import AdapterError, AdapterNotFoundError, CorruptAdapterError, UnsafeAdapterError
from qlora_infer.files.manifest import AdapterManifest, LoRAModule, read_manifest
from qlora_infer.files.peft_config import MAX_MATCHES, read_config, scaling
from qlora_infer.files.safetensors import check_finite, map_tensors, read_header, write_tensors
from qlora_infer.model.modules import ModelModules, ModuleShape
from qlora_infer.sources.source import parse_source
from qlora_infer.testing import TINY_MODEL, write_adapter

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
VOCABULARY = 96
#: The tiny model's modules with the embedding and the output layer, which PEFT adapts, too.
MODEL = {**TINY_MODEL, "model.embed_tokens": (VOCABULARY, 64), "lm_head": (64, VOCABULARY)}
ATTENTION = ["q_proj", "v_proj"]


def tiny_llama(tie: bool = False, num_layers: int = 2) -> Any:
    pytest.importorskip("transformers")
    from transformers import LlamaConfig, LlamaForCausalLM

    return LlamaForCausalLM(
        LlamaConfig(
            hidden_size=64, intermediate_size=128, num_hidden_layers=num_layers, num_attention_heads=4, num_key_value_heads=2,
            vocab_size=VOCABULARY, tie_word_embeddings=tie,
        )
    )  # fmt: skip


def save_with_peft(folder: Path, *, kind: str = "LoraConfig", tie: bool = False, **config: Any) -> Path:
    """What PEFT's own save_pretrained writes for a tiny random Llama."""
    peft = pytest.importorskip("peft")

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        adapted = peft.get_peft_model(tiny_llama(tie), getattr(peft, kind)(task_type="CAUSAL_LM", **config))
        # "auto" would ask the Hub whether the vocabulary has grown.
        targets = config.get("target_modules", ())
        adapted.save_pretrained(folder, save_embedding_layers=bool({"embed_tokens", "lm_head"} & set(targets)))
    return folder


def load_with_vllm(folder: Path) -> Any:
    """What vLLM's worker does with an adapter's files, on the model above; no engine is started."""
    torch = pytest.importorskip("torch")
    pytest.importorskip("vllm")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch's own, as vLLM imports it
        from vllm.lora.lora_model import LoRAModel
        from vllm.lora.peft_helper import PEFTHelper

    config = PEFTHelper.from_local_dir(str(folder), max_position_embeddings=2048)
    config.validate_legal(SimpleNamespace(max_lora_rank=64))
    names = {name.rpartition(".")[2] for name in MODEL}
    return LoRAModel.from_local_checkpoint(
        str(folder), names, config, lora_model_id=1, device="cpu", dtype=torch.bfloat16, model_vocab_size=VOCABULARY
    )


def shapes_in_vllm(folder: Path) -> dict[str, tuple[int, int, int]]:
    loras = load_with_vllm(folder).loras
    assert all(lora.rank == lora.lora_a.shape[0] == lora.lora_b.shape[1] for lora in loras.values())
    return {name: (lora.rank, lora.lora_a.shape[1], lora.lora_b.shape[0]) for name, lora in loras.items()}


def checked(folder: Path) -> tuple[AdapterManifest, Fit]:
    manifest = read_saved("sound", read_manifest("sound", folder)).with_zeros(check_finite("sound", folder / WEIGHTS))
    model = ModelModules({name: ModuleShape(*shape) for name, shape in MODEL.items()})
    return manifest, check("sound", manifest, model, max_lora_rank=64)


def shapes_read(folder: Path) -> dict[str, tuple[int, int, int]]:
    manifest, fit = checked(folder)
    assert fit.num_modules == len(manifest.modules)
    return {name: (m.rank, m.in_features, m.out_features) for name, m in manifest.modules.items()}


def edit_header(folder: Path, change: Any) -> None:
    path = folder / WEIGHTS
    content = path.read_bytes()
    end = 8 + struct.unpack("<Q", content[:8])[0]
    encoded = json.dumps(change(json.loads(content[8:end]))).encode()
    path.write_bytes(struct.pack("<Q", len(encoded)) + encoded + content[end:])


# As PEFT writes them ------------------------------------------------------------------------------------------------

SOUND = {
    "plain": {"target_modules": ATTENTION},
    "all-linear": {"target_modules": "all-linear"},
    "regular-expression": {"target_modules": r".*layers\.0.*q_proj"},
    "rslora": {"target_modules": ATTENTION, "use_rslora": True},
    "rank-pattern": {
        "target_modules": ATTENTION,
        "rank_pattern": {"layers.0.self_attn.q_proj": 4, r"^model\.layers\.1\..*v_proj": 16},
        "alpha_pattern": {"q_proj": 32},
    },
    "gaussian": {"target_modules": ATTENTION, "init_lora_weights": "gaussian"},
    "embeddings": {"target_modules": ["embed_tokens", "lm_head", "q_proj"]},
    "tied-embedding": {"target_modules": ["embed_tokens", "q_proj"], "tie": True},
}


@pytest.mark.parametrize("case", SOUND)
def test_what_peft_saves_is_read_as_vllm_reads_it(case, tmp_path):
    """Modules, ranks and shapes of PEFT's own adapters are those that vLLM's loader finds in them."""
    folder = save_with_peft(tmp_path / "adapter", r=8, **SOUND[case])
    assert read_manifest("sound", folder).unsupported == ()
    assert shapes_read(folder) == shapes_in_vllm(folder)


#: Keys of rank_pattern and alpha_pattern with their ranks, in the order in which PEFT saves them: sorted.
PATTERNS = {
    "two-groups": {r".*\.layers\.1\.(self_attn|mlp)\.(q_proj|v_proj)": 4},
    "group-without-capture": {r"layers\.(?:1|2)\..*_proj": 4},
    "repetition": {r"layers\.\d{1,2}\.self_attn\.q_proj": 4},
    "one-for-each-layer": {
        rf".*\.layers\.{layer}\.(self_attn|mlp)\.(q|k|up)_proj": 1 + layer % 5 for layer in range(32)
    },
    "first-wins": {r"(?:.*)q_proj": 4, r".*layers\.0\..*(?<!k_proj)": 2, "[a-z.0-9_]*": 3},
    "lookahead": {r"model\.layers\.(?!0\.)\d+\.(self_attn|mlp)\.(up|v)_proj": 16},
    "alternatives-at-the-top": {"q_proj)|(model.layers.1.(?:self_attn|mlp).*": 2},
    "one-name": {r"^model\.layers\.1\.self_attn\.q_proj": 5},
}


@pytest.mark.parametrize("case", PATTERNS)
def test_patterns_give_peft_vllm_and_this_library_the_same_ranks_and_scales(case, tmp_path):
    """The private copy has plain names in the place of patterns, which give each module PEFT's rank and scale."""
    peft = pytest.importorskip("peft")
    pytest.importorskip("vllm")
    from vllm.lora.peft_helper import PEFTHelper

    ranks = PATTERNS[case]
    config = peft.LoraConfig(
        r=8,
        lora_alpha=6,
        target_modules=r".*\.(?:self_attn|mlp)\..*_proj",
        rank_pattern=ranks,
        alpha_pattern={pattern: 10 * rank for pattern, rank in ranks.items()},
    )
    adapted = peft.get_peft_model(tiny_llama(num_layers=32), config)
    adapted.save_pretrained(tmp_path / "saved", save_embedding_layers=False)
    expected = {
        name.removeprefix("base_model.model."): (layer.r["default"], layer.scaling["default"])
        for name, layer in adapted.named_modules()
        if isinstance(layer, peft.tuners.lora.LoraLayer)
    }
    assert len(set(expected.values())) > 1

    store = AdapterStore(tmp_path / "store")
    snapshot, manifest, _ = store.make("a", 1, parse_source(str(tmp_path / "saved")), allow_pickle=False)
    store.close()
    written = read_config("a", snapshot.folder / CONFIG)
    assert expected == {
        name: (module.rank, scaling(written, name, module.rank)) for name, module in manifest.modules.items()
    }
    helper = PEFTHelper.from_local_dir(str(snapshot.folder), max_position_embeddings=None)
    assert expected == {name: helper.get_rank_and_scaling(name) for name in manifest.modules}
    assert case == "one-name" or not any(set(r"*+?(|)") & set(key) for key in written["rank_pattern"])


def test_the_size_is_that_of_all_tensors(tmp_path):
    """num_bytes counts what stands in the file, the copies of base weights included."""
    pytest.importorskip("safetensors")
    from safetensors import safe_open

    folder = save_with_peft(tmp_path / "adapter", **SOUND["embeddings"])
    with safe_open(folder / WEIGHTS, framework="np") as file:
        expected = sum(file.get_tensor(name).nbytes for name in file.keys())  # noqa: SIM118
    assert read_manifest("sound", folder).num_bytes == expected


def test_the_largest_rank_is_that_of_the_pattern(tmp_path):
    """vLLM holds rank_pattern against max_lora_rank, too, so the manifest's rank is the largest anywhere."""
    folder = save_with_peft(tmp_path / "adapter", r=8, **SOUND["rank-pattern"])
    manifest = read_manifest("sound", folder)
    assert manifest.rank == 16
    assert manifest.modules["model.layers.0.self_attn.q_proj"].rank == 4


def peft_config(name: str, **fields: Any) -> Any:
    pytest.importorskip("peft")
    from peft.tuners.lora import config

    return getattr(config, name)(**fields)


UNSUPPORTED = {
    "aLoRA": lambda: {"alora_invocation_tokens": [1, 2]},
    "layer_replication": lambda: {"layer_replication": [[0, 2], [1, 2]]},
    "'pissa'": lambda: {"init_lora_weights": "pissa"},
    "'olora'": lambda: {"init_lora_weights": "olora"},
    "BD-LoRA": lambda: {
        "use_bdlora": peft_config(
            "BdLoraConfig", target_modules_bd_a=["q_proj"], target_modules_bd_b=["v_proj"], nblocks=2
        )
    },
    "KaSA": lambda: {"kasa_config": peft_config("KasaConfig")},
    "lora_velora_embed": lambda: {"velora_config": peft_config("VeloraConfig")},
    "lora_monteclora_sampler": lambda: {"monteclora_config": peft_config("MontecloraConfig")},
    "merge_and_unload": lambda: {"kind": "IA3Config", "feedforward_modules": []},
    "save_as_lora": lambda: {"kind": "LoKrConfig"},
    "adapter of type ADALORA": lambda: {"kind": "AdaLoraConfig", "total_step": 10},
}


def test_modules_that_a_pattern_scales_otherwise_are_told(tmp_path):
    """Those whose alpha over rank is not that of r and lora_alpha; a pattern that changes nothing is none."""

    def told(**config):
        return read_manifest("a", write_adapter(tmp_path / "a", rank=8, alpha=16, **config)).scaled_by_pattern

    names = tuple(read_manifest("a", write_adapter(tmp_path / "a")).modules)
    some = tuple(name for name in names if name.endswith("v_proj"))
    assert some and some != names
    assert told() == told(use_rslora=True) == ()
    assert told(alpha_pattern={"v_proj": 16}) == told(rank_pattern={"v_proj": 8}) == ()
    assert told(alpha_pattern={"v_proj": 8}) == told(alpha_pattern={"v_proj": 0}, use_rslora=True) == some
    # All tensors have rank 8: with r=4, every module's rank is the pattern's.
    assert told(r=4, rank_pattern={".*": 8}) == names
    assert told(r=4, lora_alpha=8, rank_pattern={".*": 8}, alpha_pattern={".*": 16}) == ()


@pytest.mark.parametrize("words", UNSUPPORTED)
def test_what_vllm_cannot_run_is_named_in_what_peft_saves(words, tmp_path):
    """PEFT's other variants, as PEFT saves them, are readable and each is named as unsupported."""
    folder = save_with_peft(tmp_path / "adapter", **{"target_modules": ATTENTION, **UNSUPPORTED[words]()})
    unsupported = read_manifest("odd", folder).unsupported
    assert words in " ".join(unsupported)
    assert all(sentence.startswith("It ") and sentence.endswith(".") for sentence in unsupported)


def test_an_adapter_that_is_converted_as_the_message_says_is_taken(tmp_path):
    """PEFT turns a CorDA adapter into plain LoRA for the unchanged model, and leaves corda_config in its file."""
    peft = pytest.importorskip("peft")
    torch = pytest.importorskip("torch")
    from peft.tuners.lora.corda import preprocess_corda

    config = peft.LoraConfig(
        init_lora_weights="corda", corda_config=peft_config("CordaConfig"), target_modules=["q_proj"], r=4
    )
    model = tiny_llama()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        preprocess_corda(model, config, run_model=lambda: model(torch.arange(VOCABULARY)[None]))
        adapted = peft.get_peft_model(model, config)
        config.init_lora_weights = True
        adapted.save_pretrained(tmp_path / "initial")
        config.init_lora_weights = "corda"
        adapted.save_pretrained(tmp_path / "trained")
        adapted.save_pretrained(tmp_path / "plain", path_initial_model_for_weight_conversion=str(tmp_path / "initial"))
    (reason,) = read_manifest("corda", tmp_path / "trained").unsupported
    assert "'corda'" in reason
    assert "path_initial_model_for_weight_conversion" in reason
    assert json.loads((tmp_path / "plain" / CONFIG).read_text())["corda_config"]
    assert read_manifest("plain", tmp_path / "plain").unsupported == ()
    assert shapes_read(tmp_path / "plain") == shapes_in_vllm(tmp_path / "plain")
    loftq = {"loftq_config": {"loftq_bits": 4}}
    assert read_manifest("plain", write_adapter(tmp_path / "b", **loftq)).unsupported == ()
    started = write_adapter(tmp_path / "a", init_lora_weights="loftq", **loftq)
    assert "'loftq'" in read_manifest("loftq", started).unsupported[0]


def test_factors_of_3d_parameters_are_those_of_each_expert(tmp_path):
    """Adapters of experts' 3D parameters, as PEFT saves them, have the rank of one expert, and a number of experts."""
    peft = pytest.importorskip("peft")
    torch = pytest.importorskip("torch")

    class Experts(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.gate_up_proj = torch.nn.Parameter(torch.randn(3, 12, 8))
            self.down_proj = torch.nn.Parameter(torch.randn(3, 8, 6))

    model = torch.nn.ModuleDict({"mlp": torch.nn.ModuleDict({"experts": Experts()})})
    config = peft.LoraConfig(
        r=2, target_parameters=["mlp.experts.gate_up_proj", "mlp.experts.down_proj"], alpha_pattern={"down_proj": 5}
    )
    peft.get_peft_model(model, config).save_pretrained(tmp_path / "a")
    assert json.loads((tmp_path / "a" / CONFIG).read_text())["target_modules"] is None
    manifest = read_manifest("experts", tmp_path / "a")
    assert (manifest.rank, manifest.unsupported) == (2, ())
    assert dict(manifest.modules) == {
        "mlp.experts.base_layer": LoRAModule(2, 8, 12, num_experts=3),
        "mlp.experts": LoRAModule(2, 6, 8, num_experts=3),
    }
    assert manifest.scaled_by_pattern == ("mlp.experts",)


def test_prompt_tuning_is_named(tmp_path):
    """An adapter that adapts no module at all is named by its type."""
    folder = save_with_peft(tmp_path / "adapter", kind="PromptTuningConfig", num_virtual_tokens=4)
    assert "adapter of type PROMPT_TUNING" in read_manifest("odd", folder).unsupported[0]


# write_adapter ------------------------------------------------------------------------------------------------------


def test_write_adapter_writes_the_config_that_peft_writes(tmp_path):
    """Every field is there with PEFT's own value, so that a test on it is a test on a real adapter."""
    ours = json.loads((write_adapter(tmp_path / "ours", alpha=8, base_model="m") / CONFIG).read_text())
    theirs = json.loads((save_with_peft(tmp_path / "theirs", target_modules=ATTENTION) / CONFIG).read_text())
    own = {"base_model_name_or_path", "target_modules", "peft_version"}
    assert {k: v for k, v in ours.items() if k not in own} == {k: v for k, v in theirs.items() if k not in own}
    assert set(ours) == set(theirs)


@pytest.mark.parametrize("dtype", ["F64", "F32", "F16", "BF16"])
def test_write_adapter_is_read_by_vllm_in_every_dtype(dtype, tmp_path):
    """What it writes is sound in each number type, for vLLM and for PEFT."""
    peft = pytest.importorskip("peft")

    folder = write_adapter(tmp_path / "adapter", dtype=dtype)
    assert shapes_read(folder) == shapes_in_vllm(folder)
    loaded = peft.PeftModel.from_pretrained(tiny_llama(), folder)
    assert len(loaded.peft_config) == 1


def test_the_same_seed_writes_the_same_weights_and_another_seed_others(tmp_path):
    """Tests that compare versions of an adapter can rely on the seed."""
    first, same, other = (write_adapter(tmp_path / str(i), seed=seed) / WEIGHTS for i, seed in enumerate([0, 0, 1]))
    assert first.read_bytes() == same.read_bytes()
    assert first.read_bytes() != other.read_bytes()


names = st.from_regex(r"model\.layers\.[0-9]{1,3}\.[a-z_]{1,12}\.[a-z_]{1,12}", fullmatch=True)
sizes = st.integers(1, 40)


@given(modules=st.dictionaries(names, st.tuples(sizes, sizes), min_size=1, max_size=8), rank=st.integers(1, 40))
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=60, deadline=None)
def test_any_modules_of_any_rank_are_read_as_they_were_written(modules, rank, tmp_path):
    """Whatever the modules are called and however large they are, the manifest says what was written."""
    manifest = read_manifest("any", write_adapter(tmp_path / "any", modules=modules, rank=rank))
    assert {name: (m.in_features, m.out_features) for name, m in manifest.modules.items()} == modules
    assert {m.rank for m in manifest.modules.values()} == {rank} == {manifest.rank}


# As vLLM reads them -------------------------------------------------------------------------------------------------

FEW = {name: TINY_MODEL[name] for name in list(TINY_MODEL)[:3]}
values = st.sampled_from(
    [
        None,
        True,
        0,
        8,
        4,
        -1,
        8.0,
        1e300,
        10**30,
        "",
        "x",
        "none",
        "lora",
        [],
        {},
        ["q_proj"],
        {"q_proj": 4},
        {"q_proj": 8},
    ]
)
prefix = "base_model.model."
new_names = st.sampled_from(
    [
        *(
            prefix + "lora_A.weight",
            ".lora_A.weight",
            "x",
            prefix + "score.weight",
            prefix + "lm_head.base_layer.weight",
        ),
        *(
            prefix + "model.layers.0.self_attn.q_proj." + end
            for end in ("lora_B.bias", "lora_A.default.weight", "lora_A")
        ),
        *(prefix + "model.embed_tokens.lora_embedding_A", prefix + "model.layers.0.self_attn.q_proj.lora_embedding_A"),
        *(
            "model.layers.0.self_attn.q_proj.lora_A.weight",
            prefix * 2 + "model.layers.0.self_attn.q_proj.lora_A.weight",
        ),
    ]
)
faults = st.one_of(
    st.tuples(st.just("config"), st.sampled_from(["r", "lora_alpha", "use_rslora", "rank_pattern", "alpha_pattern", "bias",
              "init_lora_weights", "peft_type", "modules_to_save", "lora_bias", "target_modules", "use_qalora"]), values),
    st.tuples(st.just("name"), st.integers(0, 5), new_names),
    st.tuples(st.just("metadata"), st.just(0), st.sampled_from([5, None, {}, {"a": "b"}, {"a": 1}, [], "x", {"a": "\ud800"}])),
    st.tuples(st.just("byte"), st.integers(8, 800), st.integers(0, 255)),
)  # fmt: skip


def apply(folder: Path, fault: tuple[str, Any, Any]) -> None:
    kind, where, value = fault
    if kind == "config":
        write_adapter(folder, modules=FEW, rank=4, **{where: value})
        return
    write_adapter(folder, modules=FEW, rank=4)
    if kind == "name":
        edit_header(folder, lambda header: {value if i == where else k: v for i, (k, v) in enumerate(header.items())})
    elif kind == "metadata":
        edit_header(folder, lambda header: {"__metadata__": value, **header})
    else:
        content = bytearray((folder / WEIGHTS).read_bytes())
        content[where] = value
        (folder / WEIGHTS).write_bytes(content)


@given(fault=faults)
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=300, deadline=None)
def test_nothing_is_accepted_that_vllm_refuses_or_reads_otherwise(fault, tmp_path):
    """An adapter with a fault is refused with an AdapterError, or vLLM's loader finds in it what the manifest says.

    vLLM gets a copy of one that has more than factors, all of which changes nothing.
    """
    folder = tmp_path / "faulty"
    apply(folder, fault)
    try:
        read = shapes_read(folder)
    except AdapterError:
        return
    _, fit = checked(folder)
    copy = write_served("sound", folder, fit.placement, fit.conversion) if fit.conversion.is_needed else folder
    assert read == shapes_in_vllm(copy)


# What is hostile ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("targets", [None, "all-linear", r".*\.(q|v)_proj", "(unclosed", r"([\w.]+)+-", "x" * 5000, []])
def test_any_target_modules_are_plain_names_for_vllm(targets, tmp_path):
    """The tensors have the modules: what the config says of them is never matched, and vLLM gets their names."""
    source = write_adapter(
        tmp_path / "source", modules=FEW, rank=4, target_modules=targets, exclude_modules="(", layers_pattern=7
    )
    store = AdapterStore(tmp_path / "store")
    snapshot, manifest, _ = store.make("x", 1, parse_source(str(source)), allow_pickle=False)
    written = read_config("x", snapshot.folder / CONFIG)["target_modules"]
    assert written == (targets if isinstance(targets, list) else sorted({name.rpartition(".")[2] for name in FEW}))
    assert manifest.modules.keys() == FEW.keys()
    assert shapes_in_vllm(snapshot.folder) == {name: (4, *shape) for name, shape in FEW.items()}


def test_an_adapter_without_target_modules_is_read(tmp_path):
    """vLLM needs the field, which its copy then has."""
    source = write_adapter(tmp_path / "source", modules=FEW, rank=4)
    config = json.loads((source / CONFIG).read_text())
    del config["target_modules"]
    (source / CONFIG).write_text(json.dumps(config))
    snapshot, _, _ = AdapterStore(tmp_path / "store").make("x", 1, parse_source(str(source)), allow_pickle=False)
    assert shapes_in_vllm(snapshot.folder) == {name: (4, *shape) for name, shape in FEW.items()}
    with pytest.raises(ValueError, match="target_modules"):
        load_with_vllm(source)


@pytest.mark.parametrize(
    "pattern",
    [
        *("q_proj", r"^model\.layers\.0\..*", "layers.(0|1).self_attn.q_proj", r"layers\.\d+\..*_proj$", "[kq]_proj"),
        *("(a+)+", "(a|a)(a|a)", "a*a*a*", "(?=q)", r"\1", "a{9}", "a*+", "", "q" * 257, "k_proj)|(q_proj"),
    ],
)
def test_any_regular_expression_may_be_a_key(pattern, tmp_path):
    """Names and regular expressions may be keys of rank_pattern and alpha_pattern, as in PEFT."""
    for field in ("rank_pattern", "alpha_pattern"):
        assert read_manifest("sound", write_adapter(tmp_path / field, **{field: {pattern: 8}})).rank == 8


@pytest.mark.parametrize("pattern", ["a**", "(?i)q", r"\p{L}", "(q", "[q", "q\n", "(" * 3000 + ")" * 3000])
def test_a_key_that_is_no_regular_expression_is_refused(pattern, tmp_path):
    """What Python's re cannot compile, and so PEFT cannot match, ends in an error that names it."""
    for field in ("rank_pattern", "alpha_pattern"):
        with pytest.raises(CorruptAdapterError, match=f"{field}|cannot be shown"):
            read_manifest("bad", write_adapter(tmp_path / field, **{field: {pattern: 8}}))


@pytest.mark.parametrize("pattern", [r"([a-z.0-9_]+)+-", r"(?:\w+\.?)*-"])
def test_a_key_that_backtracks_for_ever_is_refused(pattern, tmp_path):
    """It is matched in a process that the kernel ends; neither this one nor vLLM ever matches it."""
    with pytest.raises(CorruptAdapterError, match="more than 2 s to match with 14 modules: write plain names"):
        read_manifest("slow", write_adapter(tmp_path / "slow", alpha_pattern={pattern: 8}))


def test_a_rank_for_every_module_by_name_is_taken(tmp_path):
    """EVA writes one pattern for each module: 560 of them, as a model of 80 layers has, are well below the limit."""
    modules = {f"model.layers.{layer}.self_attn.{part}": (4, 4) for layer in range(80) for part in "abcdefg"}
    folder = write_adapter(tmp_path / "eva", modules=modules, rank=2, rank_pattern=dict.fromkeys(modules, 2))
    assert len(modules) ** 2 < MAX_MATCHES
    assert len(read_manifest("eva", folder).modules) == 560


def test_plain_names_for_too_many_modules_are_refused(tmp_path):
    """vLLM matches every name with every module, so half of 3,000 experts cannot have an alpha of their own."""
    modules = {f"experts.{expert}.up_proj": (1, 1) for expert in range(3000)}
    folder = write_adapter(
        tmp_path / "a", modules=modules, rank=1, alpha_pattern={r"experts\.\d*?[02468]\.(up_proj)+": 3}
    )
    with pytest.raises(CorruptAdapterError, match="1500 patterns for 3000 modules, too many to match"):
        read_manifest("a", folder)


def test_hostile_sizes_are_never_allocated(tmp_path):
    """A config of 8 GiB, and a header that says it has 2**62 bytes, are refused in a few megabytes of memory."""
    folder = write_adapter(tmp_path / "huge")
    shutil.copytree(folder, tmp_path / "header")
    with (folder / CONFIG).open("ab") as file:
        file.truncate(8 << 30)  # a hole: it takes no space on the disk
    with (tmp_path / "header" / WEIGHTS).open("r+b") as file:
        file.write(struct.pack("<Q", 1 << 62))
    tracemalloc.start()
    try:
        with pytest.raises(CorruptAdapterError, match="too large"):
            read_manifest("huge", folder)
        with pytest.raises(CorruptAdapterError, match="header ends at byte"):
            read_manifest("huge", tmp_path / "header")
        assert tracemalloc.get_traced_memory()[1] < 16 << 20
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize("num_layers", [2, 8000])
def test_a_header_that_was_seen_before_is_checked_against_its_own_file(num_layers, tmp_path):
    """An adapter like one that was read, but a byte short, is refused by its own name and path, however large the header."""
    modules = {f"model.layers.{layer}.mlp.up_proj": (1, 1) for layer in range(num_layers)}
    sound = write_adapter(tmp_path / "sound", modules=modules, rank=1) / WEIGHTS
    short = write_adapter(tmp_path / "short", modules=modules, rank=1, seed=1) / WEIGHTS
    entries = read_header("sound", sound)
    assert read_header("short", short) == entries
    short.write_bytes(short.read_bytes()[:-1])
    for _ in range(2):
        with pytest.raises(CorruptAdapterError, match=f"{re.escape(str(short))} is not a whole") as refused:
            read_header("short", short)
        assert refused.value.adapter == "short"
    assert read_header("sound", sound) == entries


@pytest.mark.parametrize("dtype", ["F64", "F32", "F16", "BF16"])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_the_last_number_of_a_large_tensor_is_looked_at(dtype, value, tmp_path):
    """NaN and infinity are found in every number type and behind the first megabytes, by the tensor's name."""
    import numpy as np

    name = "model.layers.0.mlp.up_proj"
    folder = write_adapter(tmp_path / "nan", rank=1, modules={name: (3_000_000, 1)}, dtype=dtype)
    check_finite("nan", folder / WEIGHTS)
    content = bytearray((folder / WEIGHTS).read_bytes())
    size = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2}[dtype]
    single = np.array(value, "<f4").tobytes()
    bits = single[2:] if dtype == "BF16" else np.array(value, f"<f{size}").tobytes()
    content[-2 * size : -size] = bits  # the last of lora_A; the very last is lora_B's only number
    (folder / WEIGHTS).write_bytes(content)
    with pytest.raises(CorruptAdapterError, match=rf"1 tensors hold NaN or infinity: base_model.model.{name}.lora_A"):
        check_finite("nan", folder / WEIGHTS)


@pytest.mark.parametrize("dtype", ["F64", "F32", "F16", "BF16"])
def test_tensors_of_zeros_are_named_by_the_pass_that_looks_for_nan(dtype, tmp_path):
    """Zeros of both signs count; one other number behind the first megabytes does not make a zero tensor."""
    modules = {"model.layers.0.mlp.up_proj": (3_000_000, 1), "model.layers.1.mlp.up_proj": (3_000_000, 1)}
    weights = write_adapter(tmp_path / "zero", rank=1, modules=modules, dtype=dtype) / WEIGHTS
    assert check_finite("sound", weights) == frozenset()
    tensors = {name: tensor.copy() for name, tensor in map_tensors("zero", weights).items()}
    first, last = (f"base_model.model.{module}.lora_A.weight" for module in modules)
    for name in (first, last):
        tensors[name][:] = 0
    tensors[first][0, ::2] = 0x8000 if dtype == "BF16" else -0.0
    tensors[last][0, -1] = 1
    write_tensors(weights, tensors)
    assert check_finite("zero", weights) == {first}


# Links --------------------------------------------------------------------------------------------------------------


def hub_cache(root: Path, repository: str = "models--org--name") -> Path:
    """An adapter as the Hub's cache keeps it: links from snapshots/<commit> to blobs/<hash>."""
    snapshot, blobs = root / repository / "snapshots" / "c0ffee" / "sub", root / repository / "blobs"
    write_adapter(snapshot)
    blobs.mkdir()
    for name in (CONFIG, WEIGHTS):
        (snapshot / name).rename(blobs / name[:11])
        (snapshot / name).symlink_to(Path("../../../blobs") / name[:11])
    return snapshot


def test_the_links_of_the_hubs_cache_are_followed(tmp_path):
    """A snapshot's files are links to the blobs of the same repository, which are the adapter's own."""
    cached = hub_cache(tmp_path)
    assert (cached / WEIGHTS).is_symlink()
    assert len(read_manifest("cached", cached).modules) == len(TINY_MODEL)


def test_the_links_of_the_hubs_shared_store_are_followed(tmp_path):
    """A blob may itself be a link into the store that the cache's repositories share, as with Xet, and nowhere else."""
    repository = tmp_path / "models--org--name"
    snapshot, blobs, store = repository / "snapshots" / "c0ffee", repository / "blobs", tmp_path / "blobs" / "ab"
    write_adapter(snapshot)
    blobs.mkdir()
    store.mkdir(parents=True)
    for name in (CONFIG, WEIGHTS):
        (snapshot / name).rename(store / name)
        (blobs / name).symlink_to(store / name)
        (snapshot / name).symlink_to(blobs / name)
    assert read_manifest("xet", snapshot).rank == 8
    (store / WEIGHTS).rename(tmp_path / "elsewhere")
    (blobs / WEIGHTS).unlink()
    (blobs / WEIGHTS).symlink_to(tmp_path / "elsewhere")
    with pytest.raises(UnsafeAdapterError, match="link to a place outside"):
        read_manifest("xet", snapshot)


def test_a_link_to_another_repositorys_blobs_is_unsafe(tmp_path):
    """A snapshot may not borrow another repository's files."""
    cached, other = hub_cache(tmp_path), hub_cache(tmp_path, "models--org--private")
    (cached / WEIGHTS).unlink()
    (cached / WEIGHTS).symlink_to((other / WEIGHTS).resolve())
    with pytest.raises(UnsafeAdapterError, match="link to a place outside"):
        read_manifest("cached", cached)


@pytest.mark.parametrize("name", [CONFIG, WEIGHTS])
def test_a_link_within_the_folder_is_followed_and_one_that_leaves_it_is_not(name, tmp_path):
    """Both files are held to it, so that no adapter makes this process read what is not its own."""
    folder = write_adapter(tmp_path / "adapter")
    (folder / name).rename(folder / "real")
    (folder / name).symlink_to("real")
    assert read_manifest("linked", folder).rank == 8
    (folder / "real").rename(tmp_path / "real")
    (folder / name).unlink()
    (folder / name).symlink_to("../real")
    with pytest.raises(UnsafeAdapterError, match="link to a place outside"):
        read_manifest("linked", folder)


def test_a_link_to_nothing_is_a_file_that_is_missing(tmp_path):
    """A broken link, as an interrupted clean-up of the Hub's cache leaves, is not called an attack."""
    cached = hub_cache(tmp_path)
    (cached / WEIGHTS).resolve().unlink()
    with pytest.raises(AdapterNotFoundError, match=WEIGHTS):
        read_manifest("cached", cached)


# Copies of base weights ---------------------------------------------------------------------------------------------


def test_a_base_weight_without_factors_is_no_copy(tmp_path):
    """vLLM passes over an embedding's base weight; without factors beside it that may be a trained one."""
    folder = save_with_peft(tmp_path / "adapter", **SOUND["tied-embedding"])
    edit_header(
        folder, lambda header: {k.replace("embed_tokens.lora", "layers.0.x.lora"): v for k, v in header.items()}
    )
    (saved,) = read_manifest("odd", folder).saved.values()
    assert (saved.module, saved.kind) == ("model.embed_tokens", "weight")
