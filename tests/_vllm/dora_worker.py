"""A worker of ours with a tiny quantized model, without an engine: from an adapter's files to each layer's outputs.

Prints the largest difference of a layer's outputs from PEFT's, by kind of adapter, relative to their deviation. Run by
test_dora_worker.py, because importing ``worker`` changes its process.
"""

import json
import os
import sys
import tempfile
import time
from pathlib import Path
from types import SimpleNamespace

os.environ["VLLM_CPU_INT4_W4A8"] = "0"  # as this library's engines have it

import attrs
import torch
from models import catalog, checkpoints, reference
from vllm.config import set_current_vllm_config
from vllm.distributed import parallel_state
from vllm.engine.arg_utils import EngineArgs
from vllm.lora.layers import LoRAMapping
from vllm.lora.worker_manager import LRUCacheWorkerLoRAManager
from vllm.model_executor.model_loader import get_model

from qlora_infer._vllm.worker import WorkerExtension
from qlora_infer.adapters import preflight
from qlora_infer.adapters.served import write_served
from qlora_infer.adapters.store import AdapterStore
from qlora_infer.model.modules import ModelModules
from qlora_infer.model.weights import BaseWeights
from qlora_infer.sources.folder import FolderSource

torch.accelerator.empty_cache = lambda: None  # as the runner for CPUs has it

#: vLLM's arguments for weights that are quantized as they load.
IN_FLIGHT = {"bitsandbytes": {"quantization": "bitsandbytes", "load_format": "bitsandbytes"}}
#: vLLM's id of each adapter.
IDS = {"dora": 1, "all": 2, "trained-biases": 3}


def main(name):
    root = Path(tempfile.mkdtemp())
    tiny = attrs.evolve(catalog.BY_NAME[name], adapters=(catalog.DORA, catalog.ALL, catalog.TRAINED_BIASES), refused=())
    checkpoint = checkpoints.write(tiny, root)
    config = EngineArgs(
        model=str(checkpoint.served), dtype=tiny.dtype, enable_lora=True, max_loras=1, max_cpu_loras=3, max_lora_rank=8,
        max_model_len=64, enforce_eager=True, **IN_FLIGHT.get(tiny.quantization, {}),
    ).create_engine_config()  # fmt: skip
    with set_current_vllm_config(config):
        parallel_state.init_distributed_environment(1, 0, f"file://{root}/rendezvous", 0, backend="gloo")
        parallel_state.initialize_model_parallel(1, 1)
        model = get_model(vllm_config=config)
        lora_manager = LRUCacheWorkerLoRAManager(config, torch.device("cpu"), model.embedding_modules)
        lora_manager.create_lora_manager(model, config)
        worker = WorkerExtension()
        worker.device = torch.device("cpu")
        worker.model_runner = SimpleNamespace(
            lora_manager=lora_manager, model=model, _get_prompt_logprobs_dict=lambda *arguments: {}
        )
        modules = ModelModules.of([worker.qlora_lora_modules()])
        loads = [
            (each, int_id, str(served(checkpoint.served_adapters[each], root / each, modules, checkpoint.served)))
            for each, int_id in IDS.items()
        ]
        ended, polls = {}, 0
        while len(ended) < len(loads):
            ended |= worker.qlora_poll_loads(loads)
            polls += 1
            time.sleep(0.001)  # a step
        assert set(ended.values()) == {None}, ended
        # One slot: the adapter with magnitudes, then the one without, one with biases, then the first again.
        manager = lora_manager._adapter_manager
        differences = [compare(manager, checkpoint, each) for each in ("dora", "all", "trained-biases", "dora")]
        without = min(compare(manager, checkpoint, each, drop_gains=True) for each in ("dora", "trained-biases"))
    sys.stdout.write(json.dumps({"polls": polls, "differences": differences, "without": without}) + "\n")


def served(folder, into, modules, base):
    """An adapter's copy for vLLM, as the loader writes it."""
    store = AdapterStore(into)
    snapshot, manifest, _ = store.make("adapter", 1, FolderSource(folder), allow_pickle=False)
    fit = preflight.check("adapter", manifest, modules, max_lora_rank=8, base=BaseWeights(str(base)))
    store.close()
    if fit.is_vllms_own(modules):
        return snapshot.folder
    return write_served("adapter", snapshot.folder, fit.placement, fit.conversion)


def compare(manager, checkpoint, adapter, *, drop_gains=False):
    """Put an adapter into the slot, without its gains if so asked, and hold each layer's outputs against PEFT's."""
    for int_id in IDS.values():
        manager.deactivate_adapter(int_id)
    manager.activate_adapter(IDS[adapter])
    if drop_gains:
        for wrapper in manager.punica_wrapper_mapping.values():
            wrapper.use_gains(0, {})
    ids = (IDS[adapter],) * 3
    manager._set_adapter_mapping(LoRAMapping(ids, ids, is_prefill=True))
    network = reference.load(checkpoint.model.architecture, checkpoint.reference)
    theirs = dict(reference.with_adapter(network, checkpoint.reference_adapters[adapter]).named_modules())
    generator = torch.Generator().manual_seed(0)
    largest = 0.0
    for name, layer in manager.modules.items():
        parts = [theirs[f"base_model.model.{part}"] for part in manager.packed_modules.get(name, [name])
                 if f"base_model.model.{part}" in theirs and hasattr(theirs[f"base_model.model.{part}"], "lora_A")]  # fmt: skip
        if not parts or not hasattr(layer, "n_slices"):
            continue
        x = torch.randn(3, layer.input_size, generator=generator).bfloat16()
        with torch.no_grad():
            ours = layer(x.to(layer.lora_a_stacked[0].dtype))
            ours = (ours[0] if isinstance(ours, tuple) else ours).float()
            expected = torch.cat([part(x.float()) for part in parts], dim=1)
        largest = max(largest, float((ours - expected).abs().max() / expected.std()))
    assert largest
    return round(largest, 5)


if __name__ == "__main__":
    main(sys.argv[1])
