"""Rows of logits and their adapters, against float64, for any class of LoRA kernels; run by itself, for those of GPUs.

On a CPU vLLM does without Triton, unless it finds a backend for CPUs before it is imported: here there is one in name.
"""

import os
import sys

import torch

if __name__ == "__main__" and not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"
    import triton.backends

    triton.backends.backends["cpu"] = triton.backends.backends["nvidia"]
    torch.cuda.get_device_capability = lambda device=None: (8, 0)

import numpy as np
import pytest
from vllm.config.lora import LoRAConfig
from vllm.lora.layers import LoRAMapping

from qlora_infer._vllm.kernels.logits import PromptLogits, VllmsKernels, slots_of

HIDDEN, VOCABULARY, RANK, SLOTS = 64, 80, 8, 3
IDS = [101, None, 103]
#: Each request's adapter, the tokens of its prompt, and how many of its rows are sampled where tokens are drafted.
REQUESTS = [(101, 7, 1), (0, 3, 4), (103, 1, 1), (101, 12, 4), (0, 1, 1), (103, 30, 2), (101, 3, 3)]
MOST_TOKENS = 128
TOLERANCE = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1.2e-2}


class Head:
    """An adapted head and a step's hidden states; its logits are computed as vLLM's LoRA layer does."""

    def __init__(self, wrapper, device, dtype):
        generator = torch.Generator().manual_seed(0)
        self.wrapper, self.dtype = wrapper, dtype
        self.kernels = wrapper if hasattr(wrapper, "use_logits_rows") else VllmsKernels(wrapper)

        def draw(*shape):
            return (torch.randn(*shape, generator=generator) / 4).to(dtype).to(device)

        self.weight = draw(VOCABULARY, HIDDEN)
        self.a, self.b = draw(SLOTS, 1, RANK, HIDDEN), draw(SLOTS, 1, VOCABULARY, RANK)
        self.hidden_states = draw(sum(tokens for _, tokens, _ in REQUESTS) + 5, HIDDEN)[:-5]  # vLLM pads, and cuts

    def compute_logits(self, rows):
        logits = rows @ self.weight.T
        self.wrapper.add_lora_logits(logits, rows, self.a, self.b, 1.0)
        return logits

    def check(self, logits, rows, ids):
        """Rows are float64's, and those without an adapter what they are without adapters, to the last bit."""
        plain = rows @ self.weight.T
        expected = plain.double()
        slots = slots_of(ids, IDS)
        for row, slot in enumerate(slots):
            if slot >= 0:
                expected[row] += self.b[slot, 0].double() @ (self.a[slot, 0].double() @ rows[row].double())
        distance = float((logits.double() - expected).norm() / expected.norm())
        assert distance < TOLERANCE[self.dtype], distance
        base = torch.from_numpy(np.flatnonzero(slots < 0)).to(rows.device)
        assert torch.equal(logits[base], plain[base])
        assert not torch.equal(logits, plain) or len(base) == len(slots)


def check(wrapper, device, dtype):
    """Sampled rows, rows of prompts and of pieces of them, and drafted rows of requests, in turn."""
    head = Head(wrapper, device, dtype)
    of_tokens = [adapter for adapter, tokens, _ in REQUESTS for _ in range(tokens)]
    ends = np.cumsum([tokens for _, tokens, _ in REQUESTS])
    for is_drafted in (False, True, False):
        counts = [drafted if is_drafted else 1 for _, _, drafted in REQUESTS]
        sampled = [adapter for (adapter, _, _), count in zip(REQUESTS, counts) for _ in range(count)]
        mapping = LoRAMapping(tuple(of_tokens), tuple(sampled), is_prefill=True)
        wrapper.update_metadata(mapping, IDS, SLOTS + 1, VOCABULARY)
        rows = head.hidden_states[np.repeat(ends, counts) - 1]
        for _ in range(2):
            head.check(head.compute_logits(rows), rows, sampled)
            read_prompts(head, of_tokens, ends)
    return head, rows


def read_prompts(head, of_tokens, ends):
    """Prompts one by one without their last tokens, as the first runner has them, and all in pieces, as the second."""
    pieces = [(end - tokens, end - 1) for end, (_, tokens, _) in zip(ends, REQUESTS) if tokens > 1]
    pieces += [(begin, min(begin + 16, len(of_tokens))) for begin in range(0, len(of_tokens), 16)]
    pieces += [(0, len(of_tokens))]
    slots = slots_of(of_tokens, IDS)
    with PromptLogits(head.kernels, head.compute_logits, head.hidden_states, lambda: slots) as logits:
        for begin, end in pieces:
            rows = head.hidden_states[:-1][begin:end] if end < len(of_tokens) else head.hidden_states[begin:end]
            head.check(logits(rows), rows, of_tokens[begin:end])


def check_lengths(head, rows):
    """More rows than slots, or fewer, are refused before a kernel starts, which checks no bounds."""
    for others in (rows[:-1], torch.cat([rows, rows])):
        with pytest.raises(ValueError, match=f"{len(rows)} rows of logits have a slot, but there are {len(others)}"):
            head.compute_logits(others)


def main():
    """The kernels for GPUs: ours, and vLLM's own, which need one."""
    from qlora_infer._vllm.kernels.cuda.lora import FusedPunicaWrapper, PunicaWrapperGPU

    has_gpu = torch.cuda.is_available()
    device = "cuda" if has_gpu else "cpu"
    for kind in (FusedPunicaWrapper, PunicaWrapperGPU) if has_gpu else (FusedPunicaWrapper,):
        for dtype in (torch.float16, torch.bfloat16) if has_gpu else (torch.float16,):
            wrapper = kind(MOST_TOKENS, 16, device, lora_config=LoRAConfig(max_lora_rank=RANK, max_loras=SLOTS))
            head, rows = check(wrapper, device, dtype)
            if kind is FusedPunicaWrapper:
                check_lengths(head, rows)
            sys.stdout.write(f"{kind.__name__} {dtype}\n")


if __name__ == "__main__":
    main()
