"""vLLM's second runner, which GPUs have, on a CPU; run by test_lm_head.py with a model, a job and adapters by name.

It reads prompts in pieces, drafts tokens where texts repeat themselves, and prints as JSON what it gave. Its kernels are
Triton's, which are interpreted here; vLLM wants a backend for CPUs, of which there is one in name.
"""

import json
import os
import sys

os.environ |= {"TRITON_INTERPRET": "1", "VLLM_USE_V2_MODEL_RUNNER": "1", "VLLM_ENABLE_V1_MULTIPROCESSING": "0"}
os.environ["VLLM_CPU_INT4_W4A8"] = "0"  # as our engines start: with AMX, vLLM rounds what comes into a layer to 8 bits

import triton.backends
import triton.runtime.interpreter

triton.backends.backends["cpu"] = triton.backends.backends["nvidia"]

from vllm import LLM, SamplingParams  # noqa: E402
from vllm.lora.request import LoRARequest  # noqa: E402


def main(model, jobs, folders):
    """Answer ``[prompt, adapter, max_tokens]`` in one batch."""
    mend_the_interpreter()
    llm = LLM(
        model,
        max_model_len=256,
        max_num_seqs=8,
        max_num_batched_tokens=40,
        enable_lora=True,
        max_loras=2,
        max_lora_rank=8,
        kv_cache_memory_bytes=1 << 28,
        enforce_eager=True,
        enable_prefix_caching=False,
        disable_log_stats=False,
        worker_extension_cls="qlora_infer._vllm.worker.WorkerExtension",
        speculative_config={"method": "ngram", "num_speculative_tokens": 3, "prompt_lookup_max": 3},
    )
    llm.collective_rpc("qlora_lora_modules")
    requests = {name: LoRARequest(name, number, folder) for number, (name, folder) in enumerate(folders.items(), 1)}
    outputs = llm.generate(
        [prompt for prompt, _, _ in jobs],
        [
            SamplingParams(temperature=0.0, max_tokens=max_tokens, logprobs=0, prompt_logprobs=1, ignore_eos=True)
            for _, _, max_tokens in jobs
        ],
        lora_request=[requests.get(name) for _, name, _ in jobs],
        use_tqdm=False,
    )
    answers = [
        {
            "adapter": name,
            "prompt_token_ids": list(output.prompt_token_ids),
            "prompt_logprobs": chosen(output.prompt_logprobs[1:], output.prompt_token_ids[1:]),
            "token_ids": list(output.outputs[0].token_ids),
            "logprobs": chosen(output.outputs[0].logprobs, output.outputs[0].token_ids),
        }
        for (_, name, _), output in zip(jobs, outputs, strict=True)
    ]
    name = "vllm:spec_decode_num_accepted_tokens"
    (num_accepted,) = [metric.value for metric in llm.get_metrics() if metric.name == name]
    (runner,) = llm.collective_rpc(lambda worker: type(worker.model_runner).__module__)
    sys.stdout.write(json.dumps({"answers": answers, "num_accepted": num_accepted, "runner": runner}) + "\n")


def mend_the_interpreter():
    """Triton 3's interpreter makes integers of masks that are combined of several, and then refuses them."""
    builder = triton.runtime.interpreter.InterpreterBuilder
    theirs = builder.create_masked_load

    def create_masked_load(self, pointers, mask, *rest):
        mask.data = mask.data.astype(bool)
        return theirs(self, pointers, mask, *rest)

    builder.create_masked_load = create_masked_load


def chosen(steps, token_ids):
    return [step[token].logprob for step, token in zip(steps, token_ids, strict=True)]


if __name__ == "__main__":
    main(sys.argv[1], json.loads(sys.argv[2]), json.loads(sys.argv[3]))
