"""Three quantizations of a base model, each with several LoRA adapters in one batch.

On a machine with a GPU and the Hub, the models that this job was first written for:

    pip install 'qlora-infer[cuda]'
    python examples/quantized_lora_inference.py

Anywhere else, a small real model and three adapters that need no network (this is what ``nox -s demo`` runs):

    python examples/quantized_lora_inference.py --demo
    python examples/quantized_lora_inference.py --demo --quantization awq
"""

import argparse
import gc
import logging
import os
import time
from collections.abc import Mapping

from attrs import frozen

from qlora_infer import GenerationOutput, QuantizedLoRAEngine
from qlora_infer.demo import demo_adapters, demo_model

SAMPLING_PARAMS = {"temperature": 0.0, "logprobs": 1, "prompt_logprobs": 1, "max_tokens": 128}


@frozen
class Job:
    """One base model, its adapters, and the prompts, each with the adapter that answers it."""

    quantization: str
    model: str
    adapters: Mapping[str, str]
    prompts: tuple[tuple[str, str | None], ...]


def prompts_for(first: str, second: str, third: str) -> tuple[tuple[str, str | None], ...]:
    """Return prompts for the base model and three adapters, all in one batch."""
    return (
        ("My name is", None),
        ("my name is", first),
        ("The capital of USA is", second),
        ("The capital of France is", third),
    )


def original_jobs() -> list[Job]:
    """Models on the Hub, for a GPU."""
    # Three names for one content are three adapters to the engine, as in the job this was first.
    names = ("lora-test-1", "lora-test-2", "lora-test-3")
    flan = dict.fromkeys(names, "timdettmers/qlora-flan-7b")
    tinyllama = dict.fromkeys(names, "jashing/tinyllama-colorist-lora")
    prompts = prompts_for(*names)
    return [
        Job("bitsandbytes", "huggyllama/llama-7b", flan, prompts),
        Job("awq", "TheBloke/TinyLlama-1.1B-Chat-v0.3-AWQ", tinyllama, prompts),
        Job("gptq", "TheBloke/TinyLlama-1.1B-Chat-v0.3-GPTQ", tinyllama, prompts),
    ]


def demo_jobs() -> list[Job]:
    """Return the same jobs on the demo model, which the package builds itself."""
    adapters = {name: str(folder) for name, folder in demo_adapters().items()}
    prompts = prompts_for("pirate", "json", "spanish")
    return [Job(name, str(demo_model(name)), adapters, prompts) for name in ("bitsandbytes", "awq", "gptq")]


def run(job: Job) -> list[GenerationOutput]:
    """Start the engine, answer all prompts in one batch, and free its memory."""
    with QuantizedLoRAEngine(job.model, quantization=job.quantization, max_loras=4, max_model_len=512) as engine:
        for name, source in job.adapters.items():
            # The original adapters are of 2023, when PEFT still pickled the weights.
            engine.load_adapter(name, source, allow_pickle=True)
        prompts = [prompt for prompt, _ in job.prompts]
        return engine.generate(prompts, SAMPLING_PARAMS, adapter=[adapter for _, adapter in job.prompts])


def main() -> None:
    """Run the jobs, one quantization after the other."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--demo", action="store_true", help="the demo model, on any machine")
    parser.add_argument("--quantization", choices=["bitsandbytes", "awq", "gptq"], help="only this one")
    arguments = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    logging.getLogger("httpx").setLevel(logging.WARNING)
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")
    if arguments.demo:
        os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")  # GiB; the demo's answers are short
    for job in demo_jobs() if arguments.demo else original_jobs():
        if arguments.quantization in (None, job.quantization):
            show(job)
            gc.collect()


def show(job: Job) -> None:
    """Run one job and print what came out."""
    print(f"\n~~~~~~~~ {job.quantization}: {job.model} ~~~~~~~~", flush=True)
    began = time.monotonic()
    for output in run(job):
        print("-" * 50)
        print(f"Prompt:  {output.prompt}")
        print(f"Adapter: {output.adapter or 'none, the base model'}")
        print(f"Output:  {output.text.strip()}", flush=True)
    print(f"({time.monotonic() - began:.0f} s with the start, memory freed)", flush=True)


if __name__ == "__main__":
    main()
