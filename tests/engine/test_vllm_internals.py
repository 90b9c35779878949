"""What this library touches of vLLM beyond its public methods: when vLLM changes it, these fail and name it."""

import contextlib
import copy
import dataclasses
import inspect
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

pytest.importorskip("vllm")

from engine.conftest import vllm_release


def parameters(function):
    return list(inspect.signature(function).parameters)


def test_the_cpu_kernels_interface_is_the_one_that_we_replace():
    """The methods of vLLM's CPU wrapper have the parameters that ours take."""
    from vllm.lora.punica_wrapper.punica_cpu import PunicaWrapperCPU as Theirs

    from qlora_infer._vllm.kernels.cpu.lora import GroupedPunicaWrapper as Ours

    for name in ("add_shrink", "add_expand", "add_lora_linear", "add_lora_embedding", "add_lora_logits"):
        theirs, ours = parameters(getattr(Theirs, name)), parameters(getattr(Ours, name))
        assert [parameter for parameter in ours if parameter in theirs] == theirs, name
    assert parameters(Theirs.update_metadata)[1:5] == ["mapping", "lora_index_to_id", "max_loras", "vocab_size"]
    public = {name for name in vars(Theirs) if not name.startswith("_")}
    # For classification heads only, and right: it masks the rows by itself.
    since_0_31 = {"apply_lora_full_linear"} if vllm_release() >= (0, 31) else set()
    assert public == since_0_31 | {
        "add_shrink",
        "add_expand",
        "add_lora_linear",
        "add_lora_embedding",
        "add_lora_logits",
    }


def test_the_gpu_kernels_interface_is_the_one_that_we_replace():
    """vLLM's GPU wrapper has the methods that ours has and was written for, and the manager tells what it asks."""
    from vllm.config import VllmConfig
    from vllm.lora.model_manager import LoRAModelManager
    from vllm.lora.punica_wrapper.punica_base import PunicaWrapperBase
    from vllm.lora.punica_wrapper.punica_gpu import PunicaWrapperGPU as Theirs

    from qlora_infer._vllm.kernels import differences_between
    from qlora_infer._vllm.kernels.cuda.lora import FusedPunicaWrapper as Ours

    assert differences_between(Theirs, Ours) == []
    import vllm

    # The CPU build has not what importing the module needs.
    platform = Path(vllm.__file__).with_name("platforms") / "cuda.py"
    assert '"vllm.lora.punica_wrapper.punica_gpu.PunicaWrapperGPU"' in platform.read_text()
    assert parameters(Theirs)[:3] == ["max_num_batched_tokens", "max_batches", "device"]
    assert parameters(PunicaWrapperBase._update_base_metadata)[1:] == [
        "mapping",
        "lora_index_to_id",
        "max_loras",
        "vocab_size",
    ]
    source = inspect.getsource(Theirs)
    assert "self.token_mapping_meta = LoRAKernelMeta.make(" in source
    assert "self.prompt_mapping_meta.prepare_tensors(self.sampler_indices)" in source
    assert parameters(LoRAModelManager._get_lora_layer_weights)[1:] == ["lora_model", "module_name"]
    assert "self.punica_wrapper_mapping[DEFAULT_LANGUAGE_WRAPPER_KEY]" in inspect.getsource(LoRAModelManager)
    assert "additional_config" in VllmConfig.__dataclass_fields__


def test_a_platform_names_its_kernels_class():
    """CpuPlatform.get_punica_wrapper is the hook that kernels.install replaces."""
    from vllm.lora.punica_wrapper import punica_selector
    from vllm.platforms.cpu import CpuPlatform

    assert CpuPlatform.get_punica_wrapper() == "vllm.lora.punica_wrapper.punica_cpu.PunicaWrapperCPU"
    assert "get_punica_wrapper" in inspect.getsource(punica_selector)


def test_layers_of_4_bits_may_round_what_comes_in_to_8_and_do_not(awq):
    """vLLM's variable for it is the plan's, its kernel reads it, and the plan turns it off."""
    from vllm import envs
    from vllm.model_executor.kernels.linear.mixed_precision import cpu

    assert "VLLM_CPU_INT4_W4A8" in envs.environment_variables
    assert "envs.VLLM_CPU_INT4_W4A8" in inspect.getsource(cpu.CPUWNA16LinearKernel)
    assert awq.plan.environment["VLLM_CPU_INT4_W4A8"] == "0"


def test_the_names_of_vllms_arguments_are_read_without_importing_it():
    """They are the fields of EngineArgs."""
    from vllm import EngineArgs

    from qlora_infer._vllm.arguments import engine_arg_names

    assert engine_arg_names() == {argument.name for argument in dataclasses.fields(EngineArgs)}


def test_kernels_are_not_installed_in_the_users_process(awq):
    """Starting an engine replaces nothing in this process: other engines here keep vLLM's own kernels."""
    from vllm.platforms import current_platform

    assert current_platform.get_punica_wrapper().startswith("vllm.")


def test_the_client_of_the_core_has_what_the_watch_needs(awq):
    """SyncMPClient has the queue, the futures and the processes that _report_death wakes and watches."""
    core = awq._backend._engine.engine_core
    assert type(core).__name__ == "SyncMPClient"
    assert hasattr(core.outputs_queue, "put_nowait")
    assert isinstance(core.utility_results, dict)
    assert core.resources.engine_dead is False
    assert all(process.is_alive() for process in core.resources.engine_manager.processes)


def test_the_renderer_turns_prompts_into_what_add_request_takes(awq):
    """The renderer's methods that _vllm/engine.py uses have their names and parameters."""
    from vllm.renderers.inputs.preprocess import parse_model_prompt
    from vllm.v1.engine.llm_engine import LLMEngine

    assert parameters(parse_model_prompt)[:2] == ["model_config", "prompt"]
    assert hasattr(awq._backend._engine.renderer.default_cmpl_tok_params, "with_kwargs")
    assert {"request_id", "prompt", "params", "lora_request", "prompt_text"} <= set(parameters(LLMEngine.add_request))


def test_sampling_params_may_share_what_is_in_them():
    """What vLLM does to the parameters of a request is the same for each request that was given them."""
    import copy

    from vllm import SamplingParams

    def filled_in(params):
        made = params.clone()
        made.update_from_generation_config({"eos_token_id": [7, 8]}, 7)
        return made

    given = SamplingParams(stop_token_ids=[5], stop=["x"])
    deep = filled_in(given)
    for _ in range(2):
        shallow = copy.copy(given)
        shallow.skip_clone = True
        made = filled_in(shallow)
        assert made.stop is given.stop
        assert (set(made.stop_token_ids), made.all_stop_token_ids) == (set(deep.stop_token_ids), {5, 7, 8})
        assert given.stop_token_ids == [5]


def test_a_step_tells_the_tokens_and_the_scheduler_s_numbers(awq):
    """request_states, their statistics and the logger's place are where step reads them."""
    from vllm.v1.engine.llm_engine import LLMEngine
    from vllm.v1.metrics.stats import RequestStateStats, SchedulerStats

    assert {"num_waiting_reqs", "kv_cache_usage"} <= set(SchedulerStats.__dataclass_fields__)
    assert "num_generation_tokens" in RequestStateStats.__dataclass_fields__
    assert "self.logger_manager.record(" in inspect.getsource(LLMEngine.step)
    assert "self.logger_manager.log()" in inspect.getsource(LLMEngine.do_log_stats)
    handle = awq.add_request("Once upon a time", {"max_tokens": 200, "ignore_eos": True})
    next(iter(handle))
    states = awq._driver.call(lambda: list(awq._backend._engine.output_processor.request_states.values()))
    assert [state.external_req_id for state in states] == [handle.request_id]
    assert states[0].stats.num_generation_tokens > 0
    assert awq._backend._scheduler.kv_cache_usage > 0
    assert handle.cancel()


def test_the_lora_manager_reads_and_takes_adapters_as_the_worker_extension_does():
    """_load_adapter takes a request and changes nothing; _add_adapter completes what it read, and registers it alone."""
    from vllm.lora.model_manager import LRUCacheLoRAModelManager
    from vllm.lora.worker_manager import LRUCacheWorkerLoRAManager

    assert parameters(LRUCacheWorkerLoRAManager._load_adapter) == ["self", "lora_request"]
    assert parameters(LRUCacheLoRAModelManager._add_adapter) == ["self", "lora"]
    completes = inspect.getsource(LRUCacheLoRAModelManager._add_adapter)
    assert completes.endswith(
        "self._create_merged_loras_inplace(lora)\n        self._registered_adapters[lora.id] = lora\n"
    )
    assert "self._add_adapter(lora)" in inspect.getsource(LRUCacheLoRAModelManager.add_adapter)
    theirs = inspect.getsource(LRUCacheWorkerLoRAManager.add_adapter)
    assert "lora = self._load_adapter(lora_request)" in theirs
    assert "self._adapter_manager.add_adapter(lora)" in theirs
    assert "activate" not in inspect.getsource(LRUCacheLoRAModelManager.add_adapter)


def test_the_lora_manager_moves_adapters_as_the_slots_collect():
    """activate_adapter calls a module's set_lora or reset_lora, through the instance, and nothing else writes weights."""
    from vllm.lora import layers
    from vllm.lora.layers.base_linear import BaseLinearLayerWithLoRA
    from vllm.lora.layers.column_parallel_linear import MergedColumnParallelLinearWithLoRA
    from vllm.lora.model_manager import LoRAModelManager, LRUCacheLoRAModelManager

    moves = inspect.getsource(LoRAModelManager.activate_adapter)
    assert moves.count("module.set_lora(") == moves.count("module.reset_lora(index)") == 1
    assert "super().activate_adapter(lora_id)" in inspect.getsource(LRUCacheLoRAModelManager.activate_adapter)
    for layer in (BaseLinearLayerWithLoRA, MergedColumnParallelLinearWithLoRA):
        assert parameters(layer.set_lora) == ["self", "index", "lora_a", "lora_b"]
        written = inspect.getsource(layer.set_lora)
        assert written.count(".copy_(") == written.count("non_blocking=True") == 2
        assert written.count("self.lora_") - written.count("len(self.lora_") == 2
    # These are the layers of most models; what their methods write, test_slots.py compares.
    for name in (
        "MergedQKVParallel",
        "QKVParallel",
        "MergedColumnParallel",
        "ColumnParallel",
        "RowParallel",
        "Replicated",
    ):
        layer = getattr(layers, f"{name}LinearWithLoRA")
        assert layer.set_lora in {BaseLinearLayerWithLoRA.set_lora, MergedColumnParallelLinearWithLoRA.set_lora}, name
        assert layer.reset_lora is BaseLinearLayerWithLoRA.reset_lora, name


def test_which_vllm_reads_an_adapter_s_patterns():
    """get_rank_and_scaling came in 0.32, and scales each module; before, _check_scaling refuses what would be wrong."""
    from vllm.lora.lora_weights import LoRALayerWeights
    from vllm.lora.peft_helper import PEFTHelper

    assert hasattr(PEFTHelper, "get_rank_and_scaling") == (vllm_release() >= (0, 32))
    scales_alike = "peft_helper.vllm_lora_scaling_factor" in inspect.getsource(LoRALayerWeights.from_config)
    assert scales_alike == (vllm_release() < (0, 32))


def test_the_batch_sizes_are_those_of_vllm_s_own_class(awq):
    """max_num_seqs is what vllm.LLM would take here, unless engine_args say otherwise."""
    from vllm.engine.arg_utils import EngineArgs
    from vllm.usage.usage_lib import UsageContext

    config = awq._backend._engine.vllm_config.scheduler_config
    _, max_num_seqs = EngineArgs.get_batch_defaults(world_size=1)
    assert awq._backend.max_num_seqs == config.max_num_seqs == max_num_seqs[UsageContext.LLM_CLASS]


def test_the_workers_know_their_lora_modules(awq):
    """qlora_lora_modules finds every projection, the embedding and the head, with the sizes of SmolLM2-135M."""
    modules = {
        name: (shape.in_features, shape.out_features) for name, shape in awq._loader.model_modules.shapes.items()
    }
    assert len(modules) == 30 * 7 + 2
    assert modules["model.layers.0.self_attn.q_proj"] == (576, 576)
    assert modules["model.layers.29.self_attn.v_proj"] == (576, 192)
    assert modules["model.layers.7.mlp.up_proj"] == (576, 1536)
    assert modules["model.layers.7.mlp.down_proj"] == (1536, 576)
    assert modules["lm_head"] == (576, 49152)
    assert modules["model.embed_tokens"] == (49152, 576)


def test_the_ranks_that_vllm_takes_are_ours():
    """ALLOWED_RANKS is vLLM's list."""
    from typing import get_args

    from vllm.config.lora import MaxLoRARanks

    from qlora_infer.config import ALLOWED_RANKS

    assert get_args(MaxLoRARanks) == ALLOWED_RANKS


def test_the_bitsandbytes_plugin_is_the_one_that_we_ask_for():
    """vllm-bnb-plugin registers itself with vLLM under the name that the strategy passes."""
    from importlib.metadata import entry_points

    assert "bitsandbytes" in {entry.name for entry in entry_points(group="vllm.general_plugins")}


@pytest.mark.parametrize(
    ("change", "moved", "is_kept"),
    [
        ({}, {"q_proj", "v_proj"}, True),
        ({}, {"q_proj"}, False),
        ({"target_modules": ".*_proj"}, {"q_proj", "v_proj"}, False),
        ({"lora_alpha": 24}, {"q_proj", "v_proj"}, False),
        ({"alpha_pattern": {"q_proj": 24}}, {"q_proj", "v_proj"}, False),
    ],
)
def test_an_adapter_read_in_few_calls_is_what_vllm_reads(tmp_path, change, moved, is_kept):
    """All of its tensors, with the scaling in B already.

    Where that is a power of two, and all modules are moved into slots at once, they stay in the file's dtype, and are
    what vLLM would have if it scaled before it rounds; else they are cast first, as vLLM does.
    """
    import torch
    from vllm.lora.lora_model import LoRAModel
    from vllm.lora.peft_helper import PEFTHelper

    from qlora_infer._vllm.kernels.loading.lora_model import PinnedLoRAModel
    from qlora_infer.demo import demo_adapters

    if vllm_release() < (0, 32) and "alpha_pattern" in change:
        is_kept = True  # it is not read
    folder = shutil.copytree(demo_adapters()["pirate"], tmp_path / "pirate")
    config = folder / "adapter_config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), **change}))

    def read(kind, dtype):
        helper = PEFTHelper.from_local_dir(str(folder), 512)
        modules = {f"{name}_proj" for name in ("q", "k", "v", "o", "gate", "up", "down")}
        options = {"peft_helper": helper, "lora_model_id": 1, "device": "cpu", "dtype": dtype}
        return kind.from_local_checkpoint(str(folder), modules, **options).loras

    theirs = read(LoRAModel, torch.float32 if is_kept else torch.float16)
    ours = read(PinnedLoRAModel.moved_at_once(frozenset(moved)), torch.float16)
    assert list(theirs) == list(ours)
    assert len(ours) > 50
    assert any(lora.scaling != 1 for lora in theirs.values())
    for name, lora in theirs.items():
        assert ours[name].lora_a.dtype == ours[name].lora_b.dtype == (torch.bfloat16 if is_kept else torch.float16)
        assert ours[name].scaling == 1
        assert torch.equal(lora.lora_a.half(), ours[name].lora_a.half())
        assert torch.equal(lora.optimize().lora_b.half(), ours[name].lora_b.half())


READERS = """
import copy
import sys
import threading
import time
import torch
import vllm.lora.model_manager
from vllm import LLM, SamplingParams
from vllm.lora.request import LoRARequest

folder, in_float16, nowhere = sys.argv[2:]
llm = LLM(
    sys.argv[1], max_model_len=256, enable_lora=True, max_loras=1, max_lora_rank=16, max_cpu_loras=4,
    kv_cache_memory_bytes=1 << 28, worker_extension_cls="qlora_infer._vllm.worker.WorkerExtension",
)
before, found, has_ended = sys.getswitchinterval(), [], threading.Event()

def watch():
    while not has_ended.is_set():
        found.append(sys.getswitchinterval())
        time.sleep(1e-4)

def load(*adapter):
    while not (ended := llm.collective_rpc("qlora_poll_loads", args=([adapter],))[0]):
        time.sleep(0.01)
    return ended[adapter[1]]

threading.Thread(target=watch).start()
assert load("good", 1, folder) is None
has_ended.set()
assert round(min(found), 6) == 0.0005, min(found)
assert sys.getswitchinterval() == before
print("refused:", load("broken", 2, nowhere))
assert load("broken", 2, nowhere).startswith("LoRAAdapterNotFoundError"), "another worker may not have ended"
llm.collective_rpc("qlora_drop_load", args=(2,))
assert sys.getswitchinterval() == before
"""

#: What readers do for a GPU, for which there has to be vLLM 0.32.
FOR_A_GPU = """
def compare(worker):
    from qlora_infer._vllm.kernels.loading.lora_model import PinnedLoRAModel
    from qlora_infer._vllm.kernels.loading.slots import move_at_once

    manager = worker.model_runner.lora_manager
    theirs, aside = manager._load_adapter(LoRARequest("theirs", 3, folder)), copy.copy(manager._adapter_manager)
    aside._registered_adapters = {}
    aside._add_adapter(theirs)
    moved = move_at_once(manager._adapter_manager)
    manager._lora_model_cls = PinnedLoRAModel.moved_at_once(moved)
    assert moved == {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}, moved
    vllm.lora.model_manager.PIN_MEMORY = True  # which fails without a GPU, for whoever asks for it
    ours = worker._qlora_load(LoRARequest("ours", 4, folder))
    vllm.lora.model_manager.PIN_MEMORY = False
    assert list(ours.loras) == list(theirs.loras)
    for name, lora in theirs.loras.items():
        for kind in ("lora_a", "lora_b"):
            their, our = getattr(lora, kind), getattr(ours.loras[name], kind)
            assert isinstance(our, list) == isinstance(their, list)
            for left, right in zip(their, our) if isinstance(our, list) else [(their, our)]:
                assert (left is right is None) or torch.equal(left, right.to(left.dtype))
    print("packed:", sum(isinstance(lora.lora_a, list) for lora in ours.loras.values()))

def say(number):
    params = SamplingParams(temperature=0.0, max_tokens=16)
    (output,) = llm.generate("The sea", params, lora_request=LoRARequest(f"{number}", number, in_float16))
    return output.outputs[0].text

expected = say(11)
llm.collective_rpc(compare)
assert say(12) == expected, (say(12), expected)
assert load("13", 13, in_float16) is None
assert say(13) == expected, (say(13), expected)

def dtypes(worker):
    manager = worker.model_runner.lora_manager._adapter_manager
    parts = [part for lora in manager._registered_adapters[13].loras.values() for part in lora.lora_a if part is not None]
    return {part.dtype for part in parts}, manager.lora_config.lora_dtype

((found, wanted),) = llm.collective_rpc(dtypes)
assert found == {torch.float16} != {wanted}, (found, wanted)
print("all said:", expected)
"""


def test_what_readers_do_beside_the_steps(tmp_path):
    """They take short turns only while they read, and put modules together as vLLM does, pinning nothing again.

    All linear modules of a Llama are moved into slots at once; and an adapter of another dtype than its slot, which is
    cast when it is moved there, says what it says as vLLM reads it. The worker and its readers are in the process that
    looks.
    """
    from qlora_infer.demo import demo_adapters, demo_model

    adapter = demo_adapters()["pirate"]
    in_float16 = Path(shutil.copytree(adapter, tmp_path / "float16"))
    weights = load_file(in_float16 / "adapter_model.safetensors")
    save_file({name: tensor.half() for name, tensor in weights.items()}, in_float16 / "adapter_model.safetensors")
    folders = map(str, (adapter, in_float16, tmp_path / "nowhere"))
    is_for_gpus = vllm_release() >= (0, 32)
    script = READERS + (FOR_A_GPU if is_for_gpus else "")
    command = [sys.executable, "-c", script, str(demo_model("awq")), *folders]
    environment = {**os.environ, "VLLM_ENABLE_V1_MULTIPROCESSING": "0"}
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, env=environment)
    assert done.returncode == 0, done.stderr
    assert "refused:" in done.stdout
    assert ("all said:" in done.stdout) == is_for_gpus


def test_vllm_reads_adapters_as_we_know_it():
    """The worker's manager makes adapters with the class that we replace, from the method that we extend."""
    from vllm.lora.lora_model import LoRAModel
    from vllm.lora.lora_weights import LoRALayerWeights
    from vllm.lora.worker_manager import WorkerLoRAManager

    assert "self._lora_model_cls.from_local_checkpoint(" in inspect.getsource(WorkerLoRAManager._load_adapter)
    from_file = set(inspect.signature(LoRAModel.from_local_checkpoint).parameters)
    from_tensors = set(inspect.signature(LoRAModel.from_lora_tensors).parameters)
    until_0_31 = {"tensorizer_config_dict"}  # which has no meaning on a CPU, where another class reads
    assert from_file - from_tensors - until_0_31 == {"lora_dir", "expected_lora_modules", "moe_ep_spec"}
    assert from_tensors - from_file == {"tensors"}
    lora = LoRALayerWeights("m", 2, 8, *(pytest.importorskip("torch").ones(shape) for shape in ((2, 3), (4, 2))))
    lora.optimize()
    lora.optimize()
    assert lora.lora_b.tolist() == [[4.0, 4.0]] * 4


def test_vllm_logs_what_ends_a_start():
    """The words by which a process of vLLM knows that its start has failed are those of its source."""
    import vllm.v1.engine.core
    import vllm.v1.executor.multiproc_executor

    from qlora_infer._vllm.start_fault import ENDINGS

    modules = (vllm.v1.engine.core, vllm.v1.executor.multiproc_executor)
    sources = [Path(module.__file__).read_text() for module in modules]
    for words in ENDINGS:
        assert any(f'logger.exception("{words}")' in source for source in sources), words


def test_an_engine_is_made_of_a_configuration_and_an_executor():
    """LLMEngine.from_engine_args makes the configuration, chooses the executor and calls the class, as we do."""
    from vllm.v1.engine.core import EngineCore
    from vllm.v1.engine.llm_engine import LLMEngine
    from vllm.v1.executor.abstract import Executor

    from qlora_infer._vllm.executor import FaultLeavingExecutor

    wanted = {"vllm_config", "executor_class", "log_stats", "usage_context", "multiprocess_mode"}
    assert wanted <= set(parameters(LLMEngine))
    source = inspect.getsource(LLMEngine.from_engine_args)
    assert "vllm_config = engine_args.create_engine_config(usage_context)" in source
    assert "Executor.get_class(vllm_config)" in source
    assert "log_stats=not engine_args.disable_log_stats" in source
    assert "executor_class(vllm_config)" in inspect.getsource(EngineCore.__init__)
    assert "executor_class = MultiprocExecutor" in inspect.getsource(Executor.get_class)
    assert issubclass(FaultLeavingExecutor, Executor)


def test_a_class_of_models_tells_whether_it_has_lora():
    """vLLM refuses a model without LoRA by the check that we ask its class with, when its weights are read."""
    from vllm.model_executor.models import ModelRegistry
    from vllm.v1.worker import lora_model_runner_mixin

    source = inspect.getsource(lora_model_runner_mixin)
    assert "if not supports_lora(model):" in source
    assert "does not support LoRA yet." in source
    assert parameters(ModelRegistry.resolve_model_cls) == ["architectures", "model_config"]
    assert callable(ModelRegistry.models["LlamaForCausalLM"].load_model_cls)


def test_logits_of_prompts_are_computed_where_their_rows_are_given():
    """The first runner computes a prompt's logits of a view of the step's hidden states, which has the tokens' order."""
    from vllm.lora.layers import LogitsProcessorWithLoRA
    from vllm.lora.punica_wrapper.punica_base import PunicaWrapperBase
    from vllm.v1.worker.gpu_input_batch import InputBatch
    from vllm.v1.worker.gpu_model_runner import GPUModelRunner

    assert parameters(GPUModelRunner._get_prompt_logprobs_dict) == ["self", "hidden_states", "num_scheduled_tokens"]
    reads = inspect.getsource(GPUModelRunner._get_prompt_logprobs_dict)
    assert "num_prompt_logprobs_dict = self.num_prompt_logprobs" in reads
    assert "offset = self.query_start_loc.np[req_idx].item()" in reads
    assert "prompt_hidden_states = hidden_states[offset : offset + num_logits]" in reads
    assert (
        reads.count("self.model.compute_logits(") == reads.count("self.model.compute_logits(prompt_hidden_states)") == 1
    )
    # Here the rows of drafted tokens are right.
    maps = inspect.getsource(InputBatch.make_lora_inputs)
    assert "req_lora_mapping = self.request_lora_mapping[: self.num_reqs]" in maps
    assert "req_lora_mapping.repeat(num_sampled_tokens)" in maps
    assert "req_lora_mapping.repeat(num_scheduled_tokens)" in maps
    assert "num_sampled_tokens = num_draft_tokens + 1" in inspect.getsource(GPUModelRunner._prepare_inputs)
    assert "sampler_indices_len = self.indices_len[1]" in inspect.getsource(PunicaWrapperBase.sampler_indices.fget)
    assert "self.punica_wrapper.add_lora_logits(" in inspect.getsource(LogitsProcessorWithLoRA._get_logits)


@pytest.mark.skipif(vllm_release() < (0, 32), reason="read in 0.32")
def test_the_runner_of_gpus_computes_logits_where_their_rows_are_given():
    """The second runner hands its compute_logits to two methods, and makes LoRA's mapping after the rows are known."""
    from vllm.config import VllmConfig
    from vllm.lora.layers import LogitsProcessorWithLoRA
    from vllm.v1.worker.gpu.lora_utils import LoraState
    from vllm.v1.worker.gpu.model_runner import GPUModelRunner
    from vllm.v1.worker.gpu.sample import prompt_logprob

    worker = prompt_logprob.PromptLogprobsWorker
    for name in ("compute_prompt_logprobs", "compute_prompt_token_id_logprobs"):
        assert parameters(getattr(worker, name))[:4] == ["self", "logits_fn", "hidden_states", "input_batch"]
    reads = inspect.getsource(prompt_logprob)
    assert "hidden_states[: input_batch.num_tokens]," in reads
    assert "logits_fn(prompt_hidden_states[start_idx:end_idx])" in reads
    assert "logits_fn(hidden_states[base + a : base + b])" in reads
    assert reads.count("logits_fn(") == 2
    samples = inspect.getsource(GPUModelRunner.sample_tokens)
    assert samples.count("self.model.compute_logits,\n") == 2
    assert "self.model.compute_logits(" not in samples
    assert not hasattr(GPUModelRunner, "_get_prompt_logprobs_dict")

    # A request's rows of logits are as many as cu_num_logits_np says; vLLM names its adapter once.
    runs = inspect.getsource(GPUModelRunner.execute_model)
    assert runs.count("self.prepare_inputs(") == runs.count("self.lora_state.make_lora_inputs(") == 1
    assert runs.index("self.prepare_inputs(") < runs.index("self.lora_state.make_lora_inputs(")
    assert parameters(LoraState.make_lora_inputs) == ["self", "req_ids", "idx_mapping", "num_scheduled_tokens"]
    assert "prompt_lora_mapping = tuple(lora_ids)\n" in inspect.getsource(LoraState.make_lora_inputs)
    assert "cu_num_logits_np=cu_num_logits_np," in inspect.getsource(GPUModelRunner.prepare_inputs)
    assert "hidden_states[input_batch.logits_indices]" in inspect.getsource(GPUModelRunner.sample)

    # Two ways to sample for which the rows could not be known: the first is off unless it is asked for, and ends the
    # start; vLLM refuses the second.
    assert "if skip_gather:\n            raise NotImplementedError(" in inspect.getsource(
        LogitsProcessorWithLoRA._get_logits
    )
    off = "self.parallel_config.enable_batch_sharded_sampling = False"
    assert off in inspect.getsource(VllmConfig._validate_batch_sharded_sampling)
    refuses = inspect.getsource(VllmConfig._validate_adaptive_verification)
    assert "Adaptive verification is not currently compatible with LoRA" in refuses


def test_experts_run_the_router_that_they_have():
    """vLLM puts a router's LoRA layer into the layer around the experts, from where we hand it on to the experts."""
    from vllm.lora.layers.fused_moe import FusedMoEWithLoRA
    from vllm.lora.model_manager import LoRAModelManager
    from vllm.model_executor.layers.fused_moe import MoERunner

    rewiring = inspect.getsource(LoRAModelManager._create_lora_modules)
    assert "parent = self.model.get_submodule(_parent_module(module_name))" in rewiring
    assert 'setattr(parent, module_name.rpartition(".")[-1], existing_wrapper)' in rewiring
    assert "self.gate(hidden_states)" in inspect.getsource(MoERunner)
    assert "self._fse_fuse_gate = " in inspect.getsource(MoERunner.__init__)
    assert "gate" not in vars(FusedMoEWithLoRA)
    assert "return self.base_layer.forward(" in inspect.getsource(FusedMoEWithLoRA.forward)


def test_rows_are_reordered_where_we_know_of_it():
    """vLLM's loaders that put queries and keys in another order are Llama 4's, which is asked, and K2-Horizon's."""
    from vllm.model_executor import models

    from qlora_infer._vllm.lora_layers import is_reordered

    sources = {path.stem: path.read_text() for path in Path(models.__file__).parent.glob("*.py")}
    names = ("rope_perm_idx", "permute_qk_weight_for_rotary")
    found = {stem for stem, source in sources.items() if any(name in source for name in names)}
    assert found == {"llama4", "llama4_eagle", "k2_horizon"}
    assert is_reordered("K2HorizonForCausalLM", "model.layers.0.self_attn.q_proj")
    assert not is_reordered("K2HorizonForCausalLM", "model.layers.0.self_attn.v_proj")


def test_latent_attention_takes_a_layer_apart_when_the_model_is_loaded():
    """kv_b_proj's weight is split for decoding, so that LoRA beside the layer is not applied there."""
    from vllm.model_executor.layers.attention.mla_attention import MLAAttention

    assert "split_kv_b_proj" in inspect.getsource(MLAAttention)
    assert "kv_b_proj" in parameters(MLAAttention)


def test_what_leaves_experts_without_lora_on_a_cpu():
    """The flag that chooses kernels for experts, the list of targets, and where the model's layers are wrapped."""
    from vllm.config.lora import LoRAConfig
    from vllm.model_executor.layers.fused_moe.config import FusedMoEConfig
    from vllm.v1.worker.lora_model_runner_mixin import LoRAModelRunnerMixin

    assert "is_lora_enabled" in FusedMoEConfig.__dataclass_fields__
    assert "target_modules" in LoRAConfig.__dataclass_fields__
    assert parameters(LoRAModelRunnerMixin.load_lora_model)[1:] == ["model", "vllm_config", "device"]


#: What checkpoints say, and whether vLLM runs it: the strategies' ``check`` has the same answers in words.
QUANTIZATIONS = {
    "awq of 8 bits": ({"quant_method": "awq", "bits": 8, "group_size": 128, "zero_point": True}, False),
    "awq": ({"quant_method": "awq", "w_bit": 4, "q_group_size": 128, "zero_point": True}, True),
    **{
        f"gptq of {bits} bits, sym={sym}, desc_act={order} in {size}": (
            {"quant_method": "gptq", "bits": bits, "sym": sym, "desc_act": order, "group_size": size},
            bits in (4, 8) and sym and (not order or size == -1),
        )
        for bits in (2, 3, 4, 8)
        for sym in (True, False)
        for order, size in ((False, 128), (True, 128), (True, -1))
    },
    "gptq with a rule": (
        {
            "quant_method": "gptq",
            "bits": 4,
            "sym": True,
            "desc_act": False,
            "group_size": 128,
            "dynamic": {"+:.*down.*": {"desc_act": True}},
        },
        False,
    ),
    **{
        f"compressed-tensors, actorder={order}": (
            {
                "quant_method": "compressed-tensors",
                "format": "pack-quantized",
                "config_groups": {
                    "group_0": {
                        "targets": ["Linear"],
                        "weights": {"num_bits": 4, "type": "int", "strategy": "group", "group_size": 128, **order},
                    }
                },
            },
            order.get("actorder") not in ("group", "dynamic"),
        )
        for order in ({}, {"actorder": "group"}, {"actorder": "dynamic"}, {"actorder": "static"})
    },
    "sparse": (
        {
            "quant_method": "compressed-tensors",
            "config_groups": {},
            "sparsity_config": {"format": "sparse-24-bitmask", "targets": ["Linear"]},
        },
        False,
    ),
    "fp8": ({"quant_method": "fp8", "activation_scheme": "dynamic", "weight_block_size": [128, 128]}, True),
    "fp8, static blocks": (
        {"quant_method": "fp8", "activation_scheme": "static", "weight_block_size": [128, 128]},
        False,
    ),
    "modelopt": ({"quant_method": "modelopt", "quant_algo": "NVFP4", "group_size": 16}, True),
    "modelopt, int4": ({"quant_method": "modelopt", "quant_algo": "INT4_AWQ"}, False),
    "mxfp4": ({"quant_method": "mxfp4"}, True),
    "auto-round": ({"quant_method": "auto-round", "bits": 4, "group_size": 128, "sym": True}, True),
}


@pytest.mark.parametrize("name", QUANTIZATIONS)
def test_the_strategies_refuse_what_vllm_refuses(name):
    """Asked of the same quantization config, vLLM's own class and the strategy say the same, on a GPU."""
    from test_quantization import CONFIG
    from vllm.model_executor.layers.quantization import get_quantization_config

    from qlora_infer import QuantizationError, quantization

    says, is_served = QUANTIZATIONS[name]
    strategy = quantization.choose(CONFIG, {"quantization_config": says})
    here = quantization.Platform("cuda", 90, frozenset())
    method = strategy.engine_args(CONFIG, {"quantization_config": says})["quantization"]
    vllms = get_quantization_config(method)
    with contextlib.nullcontext() if is_served else pytest.raises(QuantizationError):
        strategy.check(CONFIG, {"quantization_config": says}, here)
    with contextlib.nullcontext() if is_served else pytest.raises((ValueError, DeprecationWarning)):
        vllms.from_config(copy.deepcopy(says))
    assert here.capability >= vllms.get_min_capability()
