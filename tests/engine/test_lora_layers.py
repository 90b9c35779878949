"""Each of vLLM's LoRA layer classes is listed with the sizes of the whole module, on one worker and on several."""

from types import SimpleNamespace

import pytest

pytest.importorskip("vllm")

import torch
from vllm.config import VllmConfig, set_current_vllm_config
from vllm.config.lora import LoRAConfig
from vllm.lora import layers
from vllm.lora.utils import _all_lora_classes
from vllm.model_executor.layers import linear
from vllm.model_executor.layers.logits_processor import LogitsProcessor
from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead, VocabParallelEmbedding

from qlora_infer._vllm.kernels.cpu.rotary import flatten_heads
from qlora_infer._vllm.lora_layers import row_orders, sizes_of

INPUTS, HEAD, HEADS, KV_HEADS, VOCABULARY = 64, 16, 8, 2, 192
QKV = [HEADS * HEAD, KV_HEADS * HEAD, KV_HEADS * HEAD]
ATTENTION = ["a.q_proj", "a.k_proj", "a.v_proj"]


@pytest.fixture(params=[1, 4], ids=["one worker", "four workers"])
def world(request, monkeypatch, tmp_path):
    """Parallel groups as a worker of one, or the first of four, has them; layers are only built."""
    from vllm.distributed import parallel_state

    with set_current_vllm_config(VllmConfig()):
        parallel_state.init_distributed_environment(1, 0, f"file://{tmp_path}/rendezvous", 0, backend="gloo")
        parallel_state.initialize_model_parallel(1, 1)
        group = parallel_state._TP
        monkeypatch.setattr(group, "world_size", request.param)
        yield request.param
        parallel_state.cleanup_dist_env_and_memory()


@pytest.fixture
def default_vllm_config():
    """vLLM's layers are made within a configuration."""
    with set_current_vllm_config(VllmConfig()):
        yield


def qkv():
    return linear.QKVParallelLinear(INPUTS, HEAD, HEADS, KV_HEADS, bias=False)


def merged(*outputs):
    return linear.MergedColumnParallelLinear(INPUTS, list(outputs), bias=False)


def column():
    return linear.ColumnParallelLinear(INPUTS, 96, bias=False)


def row():
    return linear.RowParallelLinear(INPUTS, 96, bias=False)


#: Of each class: its layer, the names that a checkpoint has for it, and the outputs of each.
LAYERS = {
    "ColumnParallelLinearWithLoRA": (column, ["a.up"], [96]),
    "ColumnParallelLinearWithShardedLoRA": (column, ["a.up"], [96]),
    "MergedColumnParallelLinearWithLoRA": (lambda: merged(96, 96), ["a.gate", "a.up"], [96, 96]),
    "MergedColumnParallelLinearWithShardedLoRA": (lambda: merged(96, 96), ["a.gate", "a.up"], [96, 96]),
    "MergedColumnParallelLinearVariableSliceWithLoRA": (lambda: merged(32, 32, 64), ["a.in_proj"], [128]),
    "QKVParallelLinearWithLoRA": (qkv, ["a.qkv"], [sum(QKV)]),
    "QKVParallelLinearWithShardedLoRA": (qkv, ["a.qkv"], [sum(QKV)]),
    "MergedQKVParallelLinearWithLoRA": (qkv, ATTENTION, QKV),
    "MergedQKVParallelLinearWithShardedLoRA": (qkv, ATTENTION, QKV),
    "RowParallelLinearWithLoRA": (row, ["a.down"], [96]),
    "RowParallelLinearWithShardedLoRA": (row, ["a.down"], [96]),
    "ReplicatedLinearWithLoRA": (lambda: linear.ReplicatedLinear(INPUTS, 96, bias=False), ["a.gate"], [96]),
}
#: Those that are no linear layer have tests of their own.
OTHERS = {"VocabParallelEmbeddingWithLoRA", "LogitsProcessorWithLoRA", "FusedMoEWithLoRA", "FusedMoE3DWithLoRA"}


def wrapped(lora_class, layer, fully_sharded=False):
    """Return vLLM's LoRA layer around a layer, with its slots."""
    made = lora_class(layer)
    config = LoRAConfig(max_lora_rank=8, max_loras=1, fully_sharded_loras=fully_sharded, lora_dtype=torch.float32)
    made.create_lora_weights(1, config)
    return made


def test_every_class_of_vllm_is_looked_at():
    """vLLM has no LoRA layer class that these tests leave out."""
    assert {lora_class.__name__ for lora_class in _all_lora_classes} == set(LAYERS) | OTHERS


@pytest.mark.parametrize("name", LAYERS)
def test_a_linear_layer_is_listed_with_its_whole_sizes(name, world):
    """Whatever a worker holds of it, a module has the sizes that an adapter has for it."""
    build, parts, outputs = LAYERS[name]
    layer = wrapped(getattr(layers, name), build(), fully_sharded="Sharded" in name)
    assert sizes_of("a.layer", parts, layer) == {
        part: (INPUTS, out, 0) for part, out in zip(parts, outputs, strict=True)
    }


def test_two_parts_may_stand_for_four_slices(world):
    """Qwen3.5's in_proj_qkvz: the first part covers three slices."""
    layer = wrapped(layers.MergedColumnParallelLinearWithLoRA, merged(32, 32, 64, 64))
    assert sizes_of("a.in_proj_qkvz", ["a.in_proj_qkv", "a.in_proj_z"], layer) == {
        "a.in_proj_qkv": (INPUTS, 128, 0),
        "a.in_proj_z": (INPUTS, 64, 0),
    }


def test_keys_that_are_repeated_on_workers_are_counted_once(world, monkeypatch):
    """With fewer key-value heads than workers, each worker holds one, and an adapter has what the checkpoint has."""
    layer = wrapped(layers.MergedQKVParallelLinearWithLoRA, qkv())
    assert sum(out for _, out, _ in sizes_of("a.qkv_proj", ATTENTION, layer).values()) == sum(QKV)
    assert layer.base_layer.num_kv_head_replicas == max(1, world // KV_HEADS)


def test_embeddings_and_output_layers_are_listed_without_padding(world):
    """vLLM pads the vocabulary to a multiple of 64, and an adapter's is the checkpoint's."""
    embedding = wrapped(layers.VocabParallelEmbeddingWithLoRA, VocabParallelEmbedding(VOCABULARY - 5, INPUTS))
    assert sizes_of("embed_tokens", ["embed_tokens"], embedding) == {"embed_tokens": (VOCABULARY - 5, INPUTS, 0)}
    head = ParallelLMHead(VOCABULARY - 5, INPUTS)
    processor = layers.LogitsProcessorWithLoRA(
        LogitsProcessor(VOCABULARY - 5), INPUTS, torch.float32, torch.device("cpu"), None
    )
    assert sizes_of("lm_head", ["lm_head"], processor) == {"lm_head": (INPUTS, head.org_vocab_size, 0)}


class Experts(layers.FusedMoEWithLoRA):
    """A layer of experts with what sizes_of reads, without the kernels, which the CPU has not."""

    def __init__(self, tp_size, num_experts, **sizes):
        torch.nn.Module.__init__(self)
        parallel = SimpleNamespace(tp_size=tp_size)
        self.moe_config = SimpleNamespace(num_experts=num_experts, moe_parallel_config=parallel, **sizes)
        self.tp_size = tp_size
        self.w13_lora_a_stacked = ()


class StackedExperts(Experts, layers.FusedMoE3DWithLoRA):
    """The same for experts whose first two projections are one."""


SIZES = {
    "hidden_dim": 128,  # padded
    "hidden_dim_unpadded": 96,
    "intermediate_size_per_partition": 64,
    "intermediate_size_per_partition_unpadded": 48,
}


@pytest.mark.parametrize("names", [("gate_proj", "down_proj", "up_proj"), ("w1", "w2", "w3"), ("up_proj", "down_proj")])
def test_experts_are_listed_one_by_one(names):
    """Each projection has the sizes of the checkpoint, unpadded and whole; the one that leads out has them turned."""
    parts = [f"mlp.experts.{expert}.{name}" for expert in range(4) for name in names]
    listed = sizes_of("mlp.experts", parts, Experts(2, 4, **SIZES))
    assert listed == dict.fromkeys(parts, (96, 96, 0))
    listed = sizes_of("mlp.experts", parts, Experts(1, 4, **SIZES))
    assert {part for part, sizes in listed.items() if sizes == (48, 96, 0)} == {
        part for part in parts if part.endswith(("down_proj", "w2"))
    }


def test_stacked_experts_are_listed_as_peft_names_them():
    """experts.base_layer holds gate and up of all experts, experts the way out."""
    listed = sizes_of("mlp.experts", ["mlp.experts"], StackedExperts(1, 4, **SIZES))
    assert listed == {"mlp.experts.base_layer": (96, 96, 4), "mlp.experts": (48, 96, 4)}


def test_experts_of_two_names_are_not_listed():
    """vLLM's transformers backend lists w1 and gate_proj of each expert, and would take them for twice as many."""
    parts = [
        f"mlp.experts.{i}.{name}" for i in range(4) for name in ("gate_proj", "down_proj", "up_proj", "w1", "w2", "w3")
    ]
    with pytest.raises(ValueError, match="more than one name"):
        sizes_of("mlp.experts", parts, Experts(1, 4, **SIZES))


def test_a_class_of_tomorrow_is_listed_by_its_slots(world):
    """A LoRA layer whose base layer tells no sizes is listed from its slots, and named where workers share it."""
    tomorrow = SimpleNamespace(
        base_layer=SimpleNamespace(),
        tp_size=world,
        lora_a_stacked=(torch.zeros(1, 1, 8, INPUTS), torch.zeros(1, 1, 8, INPUTS)),
        lora_b_stacked=(torch.zeros(1, 1, 96, 8), torch.zeros(1, 1, 32, 8)),
    )
    if world > 1:
        with pytest.raises(ValueError, match="unknown layer"):
            sizes_of("new", ["one", "two"], tomorrow)
    else:
        assert sizes_of("new", ["one", "two"], tomorrow) == {"one": (INPUTS, 96, 0), "two": (INPUTS, 32, 0)}


def test_llama_4s_queries_and_keys_are_in_the_order_that_vllm_gives_them():
    """The order of outputs is that in which vLLM's own loader puts the rows of a weight."""
    from vllm.model_executor.models.llama4 import Llama4ForCausalLM

    class Model(torch.nn.Module):
        permute_qk_weight_for_rotary = Llama4ForCausalLM.permute_qk_weight_for_rotary
        config = SimpleNamespace(num_attention_heads=HEADS, num_key_value_heads=KV_HEADS)

    model = Model()
    sizes = dict(zip(ATTENTION, ((INPUTS, outputs, 0) for outputs in QKV), strict=True))
    orders = row_orders(torch.nn.ModuleList([model]), sizes)
    assert set(orders) == {"q_proj", "k_proj"}
    for name, outputs in zip(("q_proj", "k_proj"), QKV, strict=False):
        weight = torch.randn(outputs, INPUTS)
        _, loaded = model.permute_qk_weight_for_rotary(f"layers.0.self_attn.{name}.weight", weight)
        assert torch.equal(loaded, weight[orders[name]])
        assert not torch.equal(loaded, weight)
    assert row_orders(torch.nn.Linear(2, 2), sizes) == {}


def test_rotary_embeddings_turn_every_head_on_the_cpu(default_vllm_config):
    """Queries and keys with a dimension of their own for heads get what torch computes, in place of the first head only."""
    from vllm.model_executor.layers.rotary_embedding.base import RotaryEmbedding

    rotary = RotaryEmbedding(HEAD, HEAD, 64, 10000, True, torch.float32)
    positions = torch.arange(5)
    query, key = torch.randn(5, HEADS, HEAD), torch.randn(5, KV_HEADS, HEAD)
    expected = rotary.forward_native(positions, query.clone(), key.clone())
    theirs = RotaryEmbedding.forward_cpu
    try:
        flatten_heads()
        turned = rotary.forward_cpu(positions, query.clone(), key.clone())
        flat = rotary.forward_cpu(positions, query.flatten(-2).clone(), key.flatten(-2).clone())
    finally:
        RotaryEmbedding.forward_cpu = theirs
    for ours, other, torchs in zip(turned, flat, expected, strict=True):
        assert torch.allclose(ours, torchs, atol=1e-5)
        assert torch.allclose(other, torchs.flatten(-2), atol=1e-5)
