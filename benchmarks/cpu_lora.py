"""Measure LoRA on a CPU: against plain vLLM, against transformers and PEFT, and against no adapter at all.

    python benchmarks/cpu_lora.py                    # whole engines, tokens/s
    python benchmarks/cpu_lora.py --layer            # one module's arithmetic, microseconds, and its floor
    python benchmarks/cpu_lora.py --step             # where a step's LoRA goes, milliseconds, and its floor

All three are in one process tree and take turns; two vLLM engines and PEFT fit into 12 GiB. Plain vLLM is as its
documentation shows it, with its own kernels and settings. PEFT has the same weights where transformers can read them
(bitsandbytes, none), and for AWQ and GPTQ the unquantized ones, which are faster for it. LoRA's weights are bf16.
"""

from __future__ import annotations

import argparse
import itertools
import os
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import common

MAX_ADAPTERS = 4
#: The modules of a layer, as vLLM packs them: inputs, and the outputs of each slice.
MODULES = {
    "135M": {
        "q, k, v": (576, (576, 192, 192)),
        "o": (576, (576,)),
        "gate, up": (576, (1536, 1536)),
        "down": (1536, (576,)),
    },
    "1.1B": {
        "q, k, v": (2048, (2048, 256, 256)),
        "o": (2048, (2048,)),
        "gate, up": (2048, (5632, 5632)),
        "down": (5632, (2048,)),
    },
}
#: Bytes that are read between two calls so that weights are not in the cache: what a step of the 135M model reads.
BETWEEN_TWO_CALLS = 2**27


class Peft:
    """transformers and PEFT, whose ``generate`` takes an adapter for each row."""

    def __init__(self, quantization: str, adapters: Mapping[str, Path]) -> None:
        import torch
        from peft import PeftModel
        from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig

        options: dict[str, Any] = {"dtype": torch.bfloat16}
        if quantization == "bitsandbytes":
            options["quantization_config"] = BitsAndBytesConfig(
                load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.bfloat16
            )
        folder = common.model_for("none")
        self._tokenizer = AutoTokenizer.from_pretrained(folder, padding_side="left")
        self._tokenizer.pad_token = self._tokenizer.eos_token
        self._model = AutoModelForCausalLM.from_pretrained(folder, **options)
        for name, path in adapters.items():
            if isinstance(self._model, PeftModel):
                self._model.load_adapter(path, name, autocast_adapter_dtype=False)
            else:
                self._model = PeftModel.from_pretrained(self._model, path, name, autocast_adapter_dtype=False)
        self._model.eval()

    def speed(self, texts: Sequence[str], num_tokens: int, names: Sequence[str | None]) -> float:
        """Tokens/s of one batch."""
        import torch

        batch = self._tokenizer(list(texts), return_tensors="pt", padding=True)
        if len(set(names)) == 1:  # the quicker way, where all have one
            self._model.set_adapter(names[0])
            extra = {}
        else:
            extra = {"adapter_names": [name or "__base__" for name in names]}
        with torch.inference_mode():
            began = time.perf_counter()
            self._model.generate(
                **batch, **extra, min_new_tokens=num_tokens, max_new_tokens=num_tokens, do_sample=False
            )
            return len(texts) * num_tokens / (time.perf_counter() - began)


def main() -> None:
    """Print the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quantization", nargs="+", default=["awq"], choices=["awq", "gptq", "bitsandbytes", "none"])
    parser.add_argument("--rank", nargs="+", type=int, default=[16])
    parser.add_argument("--requests", nargs="+", type=int, default=[1, 8, 16, 32])
    parser.add_argument("--adapters", nargs="+", type=int, default=[1, 4])
    parser.add_argument("--tokens", type=int, default=24, help="tokens of an answer")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--layer", action="store_true")
    parser.add_argument("--models", nargs="+", default=list(MODULES), choices=list(MODULES), help="of --layer")
    parser.add_argument("--modules", nargs="+", default=["gate, up"], choices=list(MODULES["1.1B"]), help="of --layer")
    parser.add_argument("--step", action="store_true")
    parser.add_argument("--dtype", default="auto", help="of the model's activations and unquantized weights, in --step")
    arguments = parser.parse_args()
    print(common.machine(), flush=True)
    if arguments.layer:
        print(layers(arguments))
        return
    if arguments.step:
        print(steps(arguments.quantization[0], arguments.rank[0], arguments))
        return
    for quantization in arguments.quantization:
        for rank in arguments.rank:
            print(f"\n{quantization}, rank {rank}\n", flush=True)
            print(engines(quantization, rank, arguments), flush=True)


def engines(quantization: str, rank: int, arguments: argparse.Namespace) -> str:
    """Return a table of one quantization and one rank."""
    model = common.model_for(quantization)
    max_rank = next(allowed for allowed in (8, 16, 32, 64) if allowed >= rank)
    limits: dict[str, Any] = {"max_loras": MAX_ADAPTERS, "max_lora_rank": max_rank, "max_cpu_loras": 8}
    limits |= {"max_model_len": 256, "max_num_seqs": max(arguments.requests), "enable_prefix_caching": False}
    with common.adapters_for(model, MAX_ADAPTERS, rank=rank) as adapters:
        # Plain vLLM first: what ours sets in the environment at its start, plain vLLM must not find there.
        plain = common.Plain(model, quantization, adapters, **limits)
        ours = common.Ours(model, quantization, adapters, **limits)
        peft = Peft(quantization, adapters)
        rows = []
        for num_requests in arguments.requests:
            for num_adapters in arguments.adapters:
                if num_adapters > num_requests:
                    continue
                texts = common.prompts(num_requests)
                names = [f"a{i % num_adapters}" for i in range(num_requests)]
                base: list[str | None] = [None] * num_requests
                runs = {
                    "base": partial(_speed, ours, texts, arguments.tokens, base),
                    "ours": partial(_speed, ours, texts, arguments.tokens, names),
                    "plain base": partial(_speed, plain, texts, arguments.tokens, base),
                    "plain": partial(_speed, plain, texts, arguments.tokens, names),
                    "peft": partial(peft.speed, texts, arguments.tokens, names),
                }
                for run in runs.values():
                    run()
                measured = common.in_turn(arguments.repeats, runs)
                ratios = (common.ratio(measured, "ours", to) for to in ("base", "plain", "peft"))
                speeds = (statistics.median(measured[name]) for name in ("plain base", "plain", "peft", "base", "ours"))
                rows.append((num_requests, num_adapters, *speeds, *ratios))
        plain.close()
        ours.close()
    header = ("requests", "adapters", "plain vLLM, base", "plain vLLM", "PEFT", "ours, base", "ours")
    return common.table((*header, "ours / ours, base", "ours / plain vLLM", "ours / PEFT"), rows)


def _speed(
    engine: common.Plain | common.Ours, texts: Sequence[str], num_tokens: int, names: Sequence[str | None]
) -> float:
    params = {"temperature": 0.0, "ignore_eos": True, "max_tokens": num_tokens}
    return common.tokens_per_second(partial(engine.run, texts, [params] * len(texts), names))


def layers(arguments: argparse.Namespace) -> str:
    """Return a table of the arithmetic of a layer's modules, with its lowest possible cost."""
    import torch

    peak, bandwidth = _peak(torch), _bandwidth(torch)
    rows = []
    for model in arguments.models:
        for module in arguments.modules:
            in_size, out_sizes = MODULES[model][module]
            for rank in arguments.rank:
                for num_rows, num_adapters in ((1, 1), (8, 1), (8, 4), (16, 1), (16, 4), (32, 1), (32, 4), (512, 1)):
                    times = _layer(torch, in_size, out_sizes, rank, num_rows, num_adapters)
                    widths = len(out_sizes) * in_size + sum(out_sizes)
                    size = 2 * (num_adapters * rank * widths + num_rows * (in_size + 2 * sum(out_sizes)))
                    floor = max(2 * num_rows * rank * widths / peak, size / bandwidth)
                    rows.append((model, module, rank, num_rows, num_adapters, *times, floor * 1e6))
    threads = torch.get_num_threads()
    title = (
        f"{peak / 1e9:.0f} GFLOP/s in bf16 and {bandwidth / 1e9:.0f} GB/s, measured; {threads} threads; microseconds\n"
    )
    header = ("model", "module", "rank", "rows", "adapters", "vLLM", "`F.linear` for each adapter", "ours")
    return title + "\n" + common.table((*header, "ours, weights not in the cache", "floor"), rows)


def _layer(
    torch: Any, in_size: int, out_sizes: tuple[int, ...], rank: int, num_rows: int, num_adapters: int
) -> list[float]:
    """Microseconds of vLLM's, of a product for each adapter, of ours, and of ours with cold caches."""
    from vllm.lora.layers import LoRAMapping
    from vllm.lora.punica_wrapper.punica_cpu import PunicaWrapperCPU

    from qlora_infer._vllm.kernels.cpu.lora import GroupedPunicaWrapper

    x = torch.randn(num_rows, in_size).bfloat16()
    y = torch.zeros(num_rows, sum(out_sizes)).bfloat16()
    a = tuple(torch.randn(MAX_ADAPTERS, 1, rank, in_size).bfloat16() for _ in out_sizes)
    b = tuple(torch.randn(MAX_ADAPTERS, 1, size, rank).bfloat16() for size in out_sizes)
    ids = tuple(1 + i % num_adapters for i in range(num_rows))

    def adding(wrapper_class: type[Any]) -> Callable[[], object]:
        wrapper = wrapper_class(max_num_batched_tokens=512, max_batches=512, device="cpu")
        mapping = LoRAMapping(ids, ids, is_prefill=num_rows > 32)
        wrapper.update_metadata(mapping, list(range(1, MAX_ADAPTERS + 1)), MAX_ADAPTERS + 1, 512)
        own = tuple(tensor.clone() for tensor in b)
        return lambda: wrapper.add_lora_linear(y, x, a, own, 1.0, out_sizes)

    rows = [torch.arange(i, num_rows, num_adapters) for i in range(num_adapters)]
    slices = [slice(end - size, end) for size, end in zip(out_sizes, itertools.accumulate(out_sizes), strict=True)]

    def by_adapter() -> None:
        for index, where in enumerate(rows):
            for number, outputs in enumerate(slices):
                shrunk = torch.nn.functional.linear(x[where], a[number][index, 0])
                y[where, outputs] += torch.nn.functional.linear(shrunk, b[number][index, 0])

    other = torch.zeros(BETWEEN_TWO_CALLS // 4)

    def read_something_else() -> None:
        other.sum()
        x.sum(), y.sum()  # which the base model's product has just read and written

    ours = adding(GroupedPunicaWrapper)
    times = [_microseconds(run) for run in (adding(PunicaWrapperCPU), by_adapter, ours)]
    return [*times, _microseconds(ours, before=read_something_else)]


def _microseconds(run: Callable[[], object], before: Callable[[], object] = lambda: None) -> float:
    """Return the median of as many calls as fit into some time; ``before`` each of them is not counted."""
    run()
    began, number = time.perf_counter(), 0
    times = []
    while number < 5 or time.perf_counter() - began < 0.3:
        before()
        started = time.perf_counter()
        run()
        times.append(time.perf_counter() - started)
        number += 1
    return statistics.median(times) * 1e6


def steps(quantization: str, rank: int, arguments: argparse.Namespace) -> str:
    """Return a table of a step's milliseconds: the base model, with adapters, and LoRA's share of them.

    The model runs in this process, so that its parts can be timed. Answers of one token are the step of the prompts
    alone; what longer ones take more is that of the steps which decode.
    """
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    model = common.model_for(quantization)
    limits: dict[str, Any] = {"max_loras": MAX_ADAPTERS, "max_lora_rank": rank, "max_cpu_loras": 8}
    limits |= {"max_model_len": 256, "max_num_seqs": max(arguments.requests), "enable_prefix_caching": False}
    limits["dtype"] = arguments.dtype
    widths = sum(sum(shape) for shape in common.llama_modules(model).values())
    table = []
    with common.adapters_for(model, MAX_ADAPTERS, rank=rank) as adapters:
        engine = common.Plain(
            model, quantization, adapters, our_kernels=True, distributed_executor_backend="uni", **limits
        )
        # After vLLM's start, which looks through all modules that are there and fails at one of numba's.
        import torch

        from qlora_infer._vllm.kernels.cpu import lora, rows

        spent = [_timed(lora.GroupedPunicaWrapper, "_add_lora"), _timed(rows.Rows, "add")]
        peak, bandwidth = _peak(torch), _bandwidth(torch)

        def measured(texts: Sequence[str], names: Sequence[str | None], num_tokens: int) -> list[float]:
            """Milliseconds of all steps, of them in LoRA's layers, and of these in compiled code."""
            for seconds in spent:
                seconds[0] = 0.0
            whole = len(texts) * num_tokens / _speed(engine, texts, num_tokens, names)
            return [value * 1e3 for value in (whole, *(seconds[0] for seconds in spent))]

        for num_requests in arguments.requests:
            texts = common.prompts(num_requests)
            num_prompt_tokens = sum(len(engine.llm.get_tokenizer()(text).input_ids) for text in texts)
            for num_adapters in (number for number in arguments.adapters if number <= num_requests):
                names = [f"a{number % num_adapters}" for number in range(num_requests)]
                prompt_steps, decoding_steps = [], []
                for repeat in range(arguments.repeats + 1):
                    first = [measured(texts, chosen, 1) for chosen in ([None] * num_requests, names)]
                    whole = [measured(texts, chosen, arguments.tokens) for chosen in ([None] * num_requests, names)]
                    if repeat:  # the first warms up
                        prompt_steps.append((first[0][0], *first[1]))
                        decoding_steps.append(
                            [
                                (long - short) / (arguments.tokens - 1)
                                for long, short in zip((whole[0][0], *whole[1]), prompt_steps[-1], strict=True)
                            ]
                        )
                for kind, num_rows, times in (
                    ("prompts", num_prompt_tokens, prompt_steps),
                    ("decoding", num_requests, decoding_steps),
                ):
                    floor = max(2 * num_rows * rank * widths / peak, 2 * widths * rank * num_adapters / bandwidth) * 1e3
                    figures = (statistics.median(column) for column in zip(*times, strict=True))
                    table.append((num_requests, num_adapters, kind, num_rows, *figures, floor))
        engine.close()
    header = (
        "requests",
        "adapters",
        "step",
        "rows",
        "base",
        "with adapters",
        "in LoRA's layers",
        "of it in compiled code",
    )
    return common.table((*header, "floor"), table)


def _timed(owner: type[Any], name: str) -> list[float]:
    """From now on, the seconds that a method takes are added up in what this returns."""
    method, spent = getattr(owner, name), [0.0]

    def timed(*arguments: Any) -> Any:
        began = time.perf_counter()
        try:
            return method(*arguments)
        finally:
            spent[0] += time.perf_counter() - began

    setattr(owner, name, timed)
    return spent


def _peak(torch: Any) -> float:
    """Floating-point operations a second of a large product in bf16."""
    left, right = torch.randn(1024, 1024).bfloat16(), torch.randn(1024, 1024).bfloat16()
    return 2 * 1024**3 / (_microseconds(lambda: left @ right) * 1e-6)


def _bandwidth(torch: Any) -> float:
    """Bytes a second that are read from memory."""
    large = torch.zeros(2**27)
    return large.numel() * 4 / (_microseconds(large.sum) * 1e-6)


if __name__ == "__main__":
    main()
