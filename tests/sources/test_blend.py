"""A blend of adapters is an adapter like any other, and adds to the model what PEFT's own blend adds.

The other half of each comparison is real: PEFT's ``add_weighted_adapter`` on a small model, and vLLM's reader of
adapters. No engine is started.
"""

import json
import math
import subprocess
import sys
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from attrs import evolve, frozen
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from qlora_infer.errors import IncompatibleAdapterError
from qlora_infer.files.manifest import read_manifest
from qlora_infer.files.safetensors import check_finite
from qlora_infer.sources.blend import AdapterPart, write_blend
from qlora_infer.sources.ties import keep_largest, keep_random, mean_of_majority
from qlora_infer.testing import write_adapter

pytest.importorskip("torch")

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
METHODS = ["linear", "ties", "dare_ties"]
VOCABULARY = 48


@pytest.fixture(autouse=True)
def one_thread():
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def part(folder: Path, weight: Any = 1.0) -> AdapterPart:
    return AdapterPart(folder.name, read_manifest(folder.name, folder), weight)


def read(folder: Path) -> dict[str, Any]:
    from safetensors.torch import load_file

    return load_file(folder / WEIGHTS)


def blend(folder: Path, parts: Sequence[AdapterPart], **arguments: Any) -> Path:
    """Write a blend and have it checked as the engine checks an adapter of a user's."""
    assert write_blend("mix", parts, folder, **arguments) == folder
    assert sorted(path.name for path in folder.iterdir()) == [CONFIG, WEIGHTS]
    assert read_manifest("mix", folder).unsupported == ()
    check_finite("mix", folder / WEIGHTS)
    return folder


# The sum, against float64 --------------------------------------------------------------------------------------------

#: Names that a careless pattern takes for each other: the last is the end of the first, a dot is any character.
SHAPES = {
    "model.layers.1.mlp.up": (6, 9),
    "model.layers.11.mlp.up": (6, 9),
    "model.layers-1.mlp.up": (6, 9),
    "model.layers.1.mlp.down": (9, 6),
    "layers.1.mlp.up": (4, 5),
}


@frozen
class Plan:
    """An adapter to be: each module's rank and alpha, and how its config and its tensors are written."""

    modules: Mapping[str, tuple[int, int]]
    use_rslora: bool
    dtype: str
    prefix: str
    seed: int
    weight: float

    def scaling(self, module: str) -> float:
        rank, alpha = self.modules[module]
        return alpha / math.sqrt(rank) if self.use_rslora else alpha / rank

    def write(self, folder: Path) -> Path:
        import torch
        from safetensors.torch import save_file

        patterns = {
            name: {f"^{module}": pair[index] for module, pair in self.modules.items()}
            for index, name in enumerate(["rank_pattern", "alpha_pattern"])
        }
        write_adapter(folder, rank=3, alpha=5, use_rslora=self.use_rslora, **patterns)
        generator = torch.Generator().manual_seed(self.seed)
        tensors = {}
        for module, (rank, _) in self.modules.items():
            inputs, outputs = SHAPES[module]
            for factor, shape in (("A", (rank, inputs)), ("B", (outputs, rank))):
                numbers = torch.randn(shape, generator=generator).to(getattr(torch, self.dtype))
                tensors[f"{self.prefix}{module}.lora_{factor}.weight"] = numbers
        save_file(tensors, folder / WEIGHTS)
        return folder

    def delta(self, folder: Path, module: str) -> tuple[np.ndarray, np.ndarray]:
        """What it adds to a module in float64, and the same of the absolute values: what rounding is measured by."""
        tensors = read(folder)
        b, a = (tensors[f"{self.prefix}{module}.lora_{factor}.weight"].double().numpy() for factor in "BA")
        weight = self.weight * self.scaling(module)
        return weight * (b @ a), abs(weight) * (abs(b) @ abs(a))


plans = st.builds(
    Plan,
    modules=st.dictionaries(
        st.sampled_from(list(SHAPES)), st.tuples(st.integers(1, 5), st.integers(-3, 16)), min_size=1
    ),
    use_rslora=st.booleans(),
    dtype=st.sampled_from(["float64", "float32", "float16", "bfloat16"]),
    prefix=st.sampled_from(["base_model.model.", ""]),
    seed=st.integers(0, 1000),
    weight=st.floats(-3, 3),
)


@given(plans=st.lists(plans, min_size=1, max_size=4))
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=40, deadline=None)
def test_linear_is_the_weighted_sum_of_what_the_adapters_add(plans, tmp_path_factory):
    """Whatever their ranks, alphas, patterns, number types and modules are, the sum is right to float32's rounding."""
    pytest.importorskip("vllm")
    from vllm.lora.peft_helper import PEFTHelper

    home = tmp_path_factory.mktemp("sum")
    folders = [plan.write(home / f"adapter-{i}") for i, plan in enumerate(plans)]
    parts = [part(folder, plan.weight) for folder, plan in zip(folders, plans)]
    mixed = blend(home / "mix", parts, method="linear")
    tensors, reader = read(mixed), PEFTHelper.from_local_dir(str(mixed), 2048)
    assert {name.removeprefix("base_model.model.").rpartition(".lora_")[0] for name in tensors} == {
        module for plan in plans for module in plan.modules
    }
    for module in read_manifest("mix", mixed).modules:
        sharing = [(plan, folder) for plan, folder in zip(plans, folders) if module in plan.modules]
        # vLLM's own reading of the config: what it takes the rank to be, and what it multiplies with.
        assert reader.get_rank_and_scaling(module) == (sum(plan.modules[module][0] for plan, _ in sharing), 1.0)
        b, a = (tensors[f"base_model.model.{module}.lora_{factor}.weight"].double().numpy() for factor in "BA")
        deltas, sizes = zip(*(plan.delta(folder, module) for plan, folder in sharing))
        assert (abs(b @ a - sum(deltas)) <= 2.0**-22 * sum(sizes) + 1e-40).all()

    backwards = blend(home / "backwards", parts[::-1], method="linear")
    assert (backwards / WEIGHTS).read_bytes() == (mixed / WEIGHTS).read_bytes()


# Against PEFT --------------------------------------------------------------------------------------------------------


def tiny_llama() -> Any:
    import torch

    pytest.importorskip("transformers")
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    return LlamaForCausalLM(
        LlamaConfig(
            hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
            vocab_size=VOCABULARY,
        )
    )  # fmt: skip


def tiny_gpt2() -> Any:
    import torch

    pytest.importorskip("transformers")
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    return GPT2LMHeadModel(GPT2Config(n_embd=32, n_layer=2, n_head=4, vocab_size=VOCABULARY, n_positions=32))


@pytest.fixture(autouse=True)
def no_warnings():
    """PEFT warns of a density of 1, of several adapters on one model, and of much else that is meant here."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def train(folder: Path, model: Any = tiny_llama, **config: Any) -> Path:
    """An adapter as PEFT saves one, with random numbers in both factors."""
    peft = pytest.importorskip("peft")
    import torch

    base = model()
    torch.manual_seed(int.from_bytes(folder.name.encode(), "big"))
    fields = {"task_type": "CAUSAL_LM", "init_lora_weights": False, **config}
    adapted = peft.get_peft_model(base, peft.LoraConfig(**fields))
    embedding = bool({"embed_tokens", "lm_head"} & set(config["target_modules"]))
    adapted.save_pretrained(folder, save_embedding_layers=embedding)
    return folder


def load(folders: Sequence[Path], model: Any = tiny_llama) -> Any:
    peft = pytest.importorskip("peft")

    adapted = peft.PeftModel.from_pretrained(model(), folders[0], adapter_name=folders[0].name)
    for folder in folders[1:]:
        adapted.load_adapter(folder, adapter_name=folder.name)
    return adapted.eval()


def logits(adapted: Any, name: str) -> Any:
    import torch

    adapted.set_adapter(name)
    with torch.no_grad():
        return adapted(torch.arange(20).reshape(2, 10) % VOCABULARY).logits


def factors_of(adapted: Any, name: str) -> dict[str, Any]:
    peft = pytest.importorskip("peft")

    return peft.get_peft_model_state_dict(adapted, adapter_name=name, save_embedding_layers=False)


def add_weighted(adapted: Any, weights: Mapping[str, float], kind: str, seed: int = 0, **arguments: Any) -> None:
    """PEFT's blend as the adapter "theirs", drawn from ``seed``: before it draws, it starts the new adapter at random."""
    import torch

    lora = adapted.base_model
    inject = lora.inject_adapter

    def inject_and_seed(*args: Any, **kwargs: Any) -> None:
        inject(*args, **kwargs)
        torch.manual_seed(seed)

    lora.inject_adapter = inject_and_seed
    lora.add_weighted_adapter(
        list(weights), list(weights.values()), "theirs", combination_type=kind, **arguments
    )  # fmt: skip
    lora.inject_adapter = inject


def check_against_peft(tmp_path: Path, folders: Sequence[Path], weights: Sequence[float], **arguments: Any) -> Any:
    """Blend with both, load ours onto the model with PEFT, and hold the logits against each other."""
    import torch

    model = arguments.pop("model", tiny_llama)
    method = arguments.pop("method")
    parts = [part(folder, weight) for folder, weight in zip(folders, weights)]
    ours = blend(tmp_path / "ours", parts, method=method, **arguments)
    adapted = load([*folders, ours], model)
    kind = {"linear": "cat"}.get(method, method)
    add_weighted(adapted, {p.name: p.weight for p in parts}, kind, **arguments)
    found, expected = logits(adapted, "ours"), logits(adapted, "theirs")
    assert torch.allclose(found, expected, rtol=1e-5, atol=1e-5)
    with adapted.disable_adapter():
        assert not torch.allclose(expected, logits(adapted, "theirs"), atol=1e-2)  # they do change the model
    return adapted


WEIGHTS_OF_THREE = {"positive": [0.7, 0.2, 1.5], "negative": [0.7, -0.4, -1.5], "zero": [1.0, 0.0, 0.5]}


@pytest.mark.parametrize("weights", WEIGHTS_OF_THREE.values(), ids=WEIGHTS_OF_THREE)
def test_linear_is_pefts_cat(weights, tmp_path):
    """Adapters of different ranks on different modules, the embedding and the output layer among them."""
    check_against_peft(
        tmp_path,
        [
            train(tmp_path / "a", r=4, lora_alpha=8, target_modules=["q_proj", "v_proj"]),
            train(tmp_path / "b", r=8, lora_alpha=4, target_modules=["q_proj", "embed_tokens", "lm_head"]),
            train(
                tmp_path / "c", r=2, lora_alpha=6, target_modules=["v_proj", "up_proj"],
                rank_pattern={"layers.0.mlp.up_proj": 6}, alpha_pattern={"v_proj": 3},
            ),
        ],
        weights,
        method="linear",
    )  # fmt: skip


@pytest.mark.parametrize("weights", WEIGHTS_OF_THREE.values(), ids=WEIGHTS_OF_THREE)
@pytest.mark.parametrize("density", [0.2, 0.5, 1.0, 1])
@pytest.mark.parametrize("method", ["ties", "dare_ties"])
def test_ties_and_dare_ties_are_pefts(method, density, weights, tmp_path):
    """The same numbers to the last bit, also where an adapter lacks a module, and from the same seed of torch."""
    import torch

    adapted = check_against_peft(
        tmp_path,
        [
            train(tmp_path / "a", r=4, lora_alpha=8, target_modules=["q_proj", "v_proj"]),
            train(tmp_path / "b", r=4, lora_alpha=4, target_modules=["q_proj"]),
            train(tmp_path / "c", r=4, lora_alpha=2, target_modules=["q_proj", "v_proj"], use_rslora=True),
        ],
        weights,
        method=method,
        density=density,
        seed=5,
    )
    ours, theirs = factors_of(adapted, "ours"), factors_of(adapted, "theirs")
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


@given(
    numbers=st.lists(st.lists(st.integers(-2, 2), min_size=12, max_size=12), min_size=1, max_size=4),
    weights=st.lists(st.floats(-2, 2, width=32), min_size=4, max_size=4),
    density=st.floats(0.01, 1),
    seed=st.integers(0, 9),
)
@settings(max_examples=150, deadline=None)
def test_numbers_that_cancel_or_are_equal_are_elected_as_peft_elects_them(numbers, weights, density, seed):
    """Ties in size and sums of zero go the way that they go in PEFT's merge_utils, bit for bit."""
    import torch

    pytest.importorskip("peft")
    from peft.utils import merge_utils

    tensors = [torch.tensor(row, dtype=torch.float32).reshape(3, 4) for row in numbers]
    weights = weights[: len(tensors)]
    ours = mean_of_majority([keep_largest(tensor, density) for tensor in tensors], weights)
    assert torch.equal(ours, merge_utils.ties(tensors, torch.tensor(weights), density))
    generator = torch.Generator().manual_seed(seed)
    ours = mean_of_majority([keep_random(tensor, density, generator) for tensor in tensors], weights)
    torch.manual_seed(seed)
    assert torch.equal(ours, merge_utils.dare_ties(tensors, torch.tensor(weights), density))


def test_ties_blends_embeddings_as_peft_does(tmp_path):
    """The factors of an embedding have other names, and are blended as those of linear layers."""
    targets = {"target_modules": ["embed_tokens", "lm_head", "down_proj"]}
    folders = [train(tmp_path / name, r=4, lora_alpha=alpha, **targets) for name, alpha in (("a", 8), ("b", 4))]
    check_against_peft(tmp_path, folders, [0.5, 0.8], method="ties", density=0.4)
    assert any(name.endswith("embed_tokens.lora_embedding_A") for name in read(tmp_path / "ours"))


@pytest.mark.parametrize("method", METHODS)
def test_layers_that_store_their_weights_the_other_way_are_blended_too(method, tmp_path):
    """GPT-2's Conv1D has fan_in_fan_out, which the blend carries on."""
    fields = {"model": tiny_gpt2, "fan_in_fan_out": True, "target_modules": ["c_attn", "c_fc"], "lora_alpha": 2}
    folders = [train(tmp_path / name, r=4, **fields) for name in "ab"]
    check_against_peft(tmp_path, folders, [0.5, 0.8], method=method, density=1.0, model=tiny_gpt2)
    assert json.loads((tmp_path / "ours" / CONFIG).read_text())["fan_in_fan_out"] is True


@pytest.mark.parametrize("method", METHODS)
def test_one_adapter_is_only_scaled(method, tmp_path):
    """PEFT does not prune an adapter that is alone, whatever the method; nor does the blend."""
    folder = train(tmp_path / "a", r=4, lora_alpha=8, target_modules=["q_proj", "v_proj"])
    check_against_peft(tmp_path, [folder], [0.6], method=method, density=0.3)


def test_linear_respects_the_scaling_that_peft_gives_each_module(tmp_path):
    """With rsLoRA and patterns everywhere, the sum is that of PEFT's own get_delta_weight.

    PEFT's "cat" cannot be asked: where the first adapter is an rsLoRA, it multiplies its blend with sqrt(rank) again.
    """
    import torch

    patterns = {"rank_pattern": {r"layers\.1\..*q_proj": 6}, "alpha_pattern": {"layers.0.self_attn.v_proj": 5}}
    folders = [
        train(tmp_path / "a", r=4, lora_alpha=8, target_modules=["q_proj", "v_proj"], use_rslora=True, **patterns),
        train(tmp_path / "b", r=3, lora_alpha=7, target_modules=["q_proj", "down_proj"], **patterns),
    ]
    weights = {"a": 0.7, "b": -0.3}
    mixed = blend(tmp_path / "mix", [part(folder, weights[folder.name]) for folder in folders], method="linear")
    layers = [module for module in load([*folders, mixed]).modules() if "mix" in getattr(module, "lora_A", ())]
    assert len(layers) == 6
    for layer in layers:
        sharing = [name for name in weights if name in layer.lora_A]
        expected = sum(weights[name] * layer.get_delta_weight(name) for name in sharing)
        assert layer.scaling["mix"] == 1
        assert torch.allclose(layer.get_delta_weight("mix"), expected, rtol=1e-4, atol=1e-6)


def test_peft_adapts_the_modules_of_the_blend_and_no_others(tmp_path):
    """Layers that no adapter of the blend changes stay as they are, though their last name is the same."""
    folders = [
        train(tmp_path / "a", r=4, target_modules=["q_proj"], layers_to_transform=[1]),
        train(tmp_path / "b", r=2, target_modules=["v_proj"], layers_to_transform=[0]),
    ]
    mixed = blend(tmp_path / "mix", [part(folder) for folder in folders], method="linear")
    adapted = load([mixed])
    assert {name for name, module in adapted.named_modules() if hasattr(module, "lora_A")} == {
        "base_model.model.model.layers.1.self_attn.q_proj", "base_model.model.model.layers.0.self_attn.v_proj"
    }  # fmt: skip


# As vLLM reads it ----------------------------------------------------------------------------------------------------


def test_vllm_reads_ranks_and_factors_as_they_were_written(tmp_path):
    """vLLM's loader finds scaling 1 and the right rank in every module, also where adapters lack it."""
    import torch

    pytest.importorskip("vllm")
    from vllm.lora.lora_model import LoRAModel
    from vllm.lora.peft_helper import PEFTHelper

    folders = [
        train(tmp_path / "a", r=4, lora_alpha=8, target_modules=["q_proj", "v_proj"]),
        train(tmp_path / "b", r=8, target_modules=["q_proj", "embed_tokens"]),
        train(tmp_path / "c", r=2, target_modules=["q_proj"], layers_to_transform=[1]),
    ]
    mixed = blend(tmp_path / "mix", [part(folder) for folder in folders], method="linear")
    config = PEFTHelper.from_local_dir(str(mixed), max_position_embeddings=2048)
    config.validate_legal(SimpleNamespace(max_lora_rank=16))
    loaded = LoRAModel.from_local_checkpoint(
        str(mixed), {"q_proj", "v_proj", "embed_tokens"}, config,
        lora_model_id=1, device="cpu", dtype=torch.float32, model_vocab_size=VOCABULARY,
    )  # fmt: skip
    assert {name: lora.rank for name, lora in loaded.loras.items()} == {
        "model.embed_tokens": 8,
        "model.layers.0.self_attn.q_proj": 12,
        "model.layers.1.self_attn.q_proj": 14,
        "model.layers.0.self_attn.v_proj": 4,
        "model.layers.1.self_attn.v_proj": 4,
    }
    assert all(lora.scaling == 1 and lora.lora_a.shape[0] == lora.rank for lora in loaded.loras.values())


def test_ranks_that_differ_by_kind_of_module_need_one_pattern_a_kind(tmp_path):
    """vLLM matches every pattern with every module, so a large model's blend must not name each of its layers."""
    kinds = {"q_proj": (8, 8), "v_proj": (8, 4), "up_proj": (8, 16)}
    modules = {f"model.layers.{i}.{kind}": shape for i in range(40) for kind, shape in kinds.items()}
    some = {name: shape for name, shape in modules.items() if not name.endswith("up_proj")}
    folders = [write_adapter(tmp_path / "a", modules=modules), write_adapter(tmp_path / "b", modules=some)]
    config = json.loads((blend(tmp_path / "mix", list(map(part, folders)), method="linear") / CONFIG).read_text())
    assert config["r"] == config["lora_alpha"] == 16
    assert config["rank_pattern"] == config["alpha_pattern"] == {"up_proj": 8}


# Chance --------------------------------------------------------------------------------------------------------------


def two(tmp_path: Path, **fields: Any) -> list[AdapterPart]:
    modules = {"model.layers.0.mlp.up_proj": (100, 120)}
    folders = [write_adapter(tmp_path / name, modules=modules, seed=i, **fields) for i, name in enumerate("ab")]
    return [part(folder, 0.5) for folder in folders]


def test_dare_ties_is_drawn_from_its_seed_alone(tmp_path):
    """The same seed gives the same file, in whatever order the adapters are named, and torch's own seed stays."""
    import torch

    parts = two(tmp_path)
    torch.manual_seed(1)
    state = torch.get_rng_state()
    first = blend(tmp_path / "first", parts, method="dare_ties", seed=3)
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(2)
    again = blend(tmp_path / "again", parts[::-1], method="dare_ties", seed=3)
    other = blend(tmp_path / "other", parts, method="dare_ties", seed=4)
    assert (first / WEIGHTS).read_bytes() == (again / WEIGHTS).read_bytes() != (other / WEIGHTS).read_bytes()


@pytest.mark.parametrize("method", ["ties", "dare_ties"])
@pytest.mark.parametrize("density", [0.1, 0.4, 0.9])
def test_density_is_the_share_of_numbers_that_is_kept(method, density, tmp_path):
    """Of a module that only one of the adapters has, that share is left; DARE enlarges it by what was dropped."""
    import torch

    lone = write_adapter(tmp_path / "lone", modules={"model.layers.1.mlp.up_proj": (100, 120)}, rank=8, alpha=8)
    parts = [*two(tmp_path), part(lone)]
    mixed = read(blend(tmp_path / "mix", parts, method=method, density=density))
    for name, numbers in read(lone).items():
        kept = mixed[name] != 0
        assert float(kept.double().mean()) == pytest.approx(density, abs=0.05)
        expected = numbers[kept] / density if method == "dare_ties" else numbers[kept]
        assert torch.allclose(mixed[name][kept], expected)
        if method == "ties":
            assert abs(numbers[kept]).min() >= abs(numbers[~kept]).max()


# At the door ---------------------------------------------------------------------------------------------------------


def refused(tmp_path: Path, parts: Sequence[AdapterPart], words: str, error: type = ValueError, **fields: Any) -> None:
    with pytest.raises(error, match=words):
        write_blend("mix", parts, tmp_path / "mix", **{"method": "linear", **fields})
    assert not (tmp_path / "mix").exists()


@pytest.mark.parametrize("method", ["svd", "LINEAR", None, ["linear"]])
def test_a_method_that_does_not_exist_is_told_with_those_that_do(method, tmp_path):
    """The message lists the methods; nothing is written."""
    refused(tmp_path, two(tmp_path), "one of .*'linear', 'ties', 'dare_ties'", method=method)


def test_a_blend_of_nothing_is_refused(tmp_path):
    """The message shows how to name one."""
    refused(tmp_path, [], "at least one adapter: .*0.7")


@pytest.mark.parametrize("weight", [math.nan, math.inf, -math.inf, "0.5", None, True, 1j, [1.0]])
def test_a_weight_is_a_finite_number(weight, tmp_path):
    """The message names the adapter and shows what was given."""
    a, b = two(tmp_path)
    refused(tmp_path, [a, evolve(b, weight=weight)], "weight of 'b' must be a finite number")


def test_numpys_numbers_are_numbers(tmp_path):
    """A weight or density that somebody computed is taken as it comes."""
    a, b = two(tmp_path)
    parts = [evolve(a, weight=np.float32(0.5)), evolve(b, weight=np.int64(1))]
    blend(tmp_path / "mix", parts, method="ties", density=np.float64(0.5))


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("density", [0, -0.5, 1.01, math.nan, math.inf, "0.5", None, True])
def test_a_density_is_a_share_above_nothing(density, method, tmp_path):
    """The message names the range, also where the method does not use it."""
    refused(tmp_path, two(tmp_path), "density must be above 0 and at most 1", method=method, density=density)


@pytest.mark.parametrize("method", METHODS)
def test_adapters_of_models_of_other_sizes_are_refused(method, tmp_path):
    """The message names the module and both shapes."""
    a, _ = two(tmp_path)
    other = write_adapter(tmp_path / "other", modules={"model.layers.0.mlp.up_proj": (64, 120)})
    words = r"layers\.0\.mlp\.up_proj has other .*'a' 100 and 120, 'other' 64 and 120"
    refused(tmp_path, [a, part(other)], words, method=method)


@pytest.mark.parametrize("method", ["ties", "dare_ties"])
def test_ties_names_the_ranks_that_differ_and_the_way_out(method, tmp_path):
    """Adapters of several ranks are for "linear"."""
    a, _ = two(tmp_path)
    other = write_adapter(tmp_path / "other", modules={"model.layers.0.mlp.up_proj": (100, 120)}, rank=16)
    words = rf"'{method}' needs one rank, .*up_proj \('a' 8, 'other' 16\): use 'linear'"
    refused(tmp_path, [a, part(other)], words, method=method)


def test_a_rank_that_vllm_cannot_serve_is_refused(tmp_path):
    """512 is the largest that vLLM serves, in any module; the message adds up where it comes from."""
    a, b = two(tmp_path, rank=256)
    blend(tmp_path / "just", [a, b], method="linear")
    more = write_adapter(tmp_path / "c", modules={"model.layers.0.mlp.up_proj": (100, 120)}, rank=1)
    refused(tmp_path, [a, b, part(more)], r"rank 513 in .*up_proj \('a' 256, 'b' 256, 'c' 1\), .* up to 512")


def test_a_weight_that_leaves_float16_is_refused(tmp_path):
    """What no engine could load is not written."""
    a, b = two(tmp_path)
    refused(tmp_path, [a, evolve(b, weight=1e9)], "beyond 65504, .*smaller weights")
    refused(tmp_path, [a, evolve(b, weight=1e308)], "beyond 65504", method="ties")


def test_what_is_more_than_lora_factors_is_refused(tmp_path):
    """DoRA's magnitudes would be lost in a sum of factors."""
    a, _ = two(tmp_path)
    dora = train(tmp_path / "dora", r=4, target_modules=["q_proj"], use_dora=True)
    refused(tmp_path, [a, part(dora)], "'dora' cannot run here: .*DoRA", IncompatibleAdapterError)


def test_a_folder_that_is_there_is_left_alone(tmp_path):
    """A blend never overwrites an adapter, its own parts least of all."""
    a, b = two(tmp_path)
    before = (a.manifest.folder / WEIGHTS).read_bytes()
    with pytest.raises(FileExistsError):
        write_blend("mix", [a, b], a.manifest.folder, method="linear")
    assert (a.manifest.folder / WEIGHTS).read_bytes() == before


def test_the_blend_says_its_base_model(tmp_path):
    """PEFT's AutoPeftModel finds it there; an adapter that does not say it does not hide it."""
    a = write_adapter(tmp_path / "a", base_model=None)
    b = write_adapter(tmp_path / "b", base_model="some/model")
    mixed = blend(tmp_path / "mix", [part(a), part(b)], method="linear")
    assert read_manifest("mix", mixed).base_model == "some/model"


def test_torch_is_not_loaded_before_something_is_blended():
    """Importing the library stays cheap."""
    code = "import sys, qlora_infer.sources.blend; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
